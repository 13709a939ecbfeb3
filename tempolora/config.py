"""One strict JSON file -> one `Config`; every mistake in it is one sentence naming the key.

Nothing heavy is imported here, so that a typing error costs no time. Defaults stand here alone.
`python -m tempolora.config` prints the JSON schema that editors complete from.
"""

import difflib
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator

from tempolora import ConfigError
from tempolora.timebase import TimeBase
from tempolora.variants import PATCH, TEMPORAL_STRIDE, VARIANTS, Variant

Positive = Annotated[int, Field(ge=1)]
Count = Annotated[int, Field(ge=0)]
Share = Annotated[float, Field(ge=0, le=1)]
Weight = Annotated[float, Field(ge=0)]
Hz = Annotated[float, Field(gt=0)]
Speed = Annotated[float, Field(ge=0.25, le=4)]


class _Section(BaseModel):
    model_config = ConfigDict(
        extra="forbid", strict=True, frozen=True, allow_inf_nan=False, use_attribute_docstrings=True
    )


class ModelFiles(_Section):
    transformer: str | None = None
    """Single-file checkpoint (.safetensors) of the high-noise or only transformer."""
    transformer_2: str | None = None
    """Single-file checkpoint of the low-noise transformer."""
    vae: str | None = None
    """Single-file checkpoint of the VAE."""


class ModelConfig(_Section):
    id: str = "Wan-AI/Wan2.2-T2V-A14B-Diffusers"
    """Diffusers folder, hub id, or "tinywan" for the embedded small model."""
    variant: Literal["t2v_a14b", "i2v_a14b", "ti2v_5b"] = "t2v_a14b"
    """Which Wan 2.2 model this is: native frame rate, sigma shift, expert boundary, VAE."""
    task: Literal["t2v", "i2v"] | None = None
    """Text to video or image to video; by default what the variant is made for."""
    init: Literal["pretrained", "random"] = "pretrained"
    """"random" builds the full-size architecture at random weights (for speed trials)."""
    expert: Literal["high", "low", "both"] | None = None
    """Which expert to train; by default both. A one-transformer model takes none."""
    base: Literal["auto", "bf16", "fp8", "nf4", "fp32"] = "bf16"
    """Number format of the frozen weights. fp8: the transformer blocks' linear layers in 8 bits,
    with a scale per row; the rest bf16. nf4: the same layers in 4 bits, by bitsandbytes; whole on
    every GPU only. auto: bf16 where that fits on the GPU, else fp8."""
    placement: Literal["auto", "gpu", "host"] = "auto"
    """host: the matrices of transformer blocks and text encoder lie in pinned host memory and are
    streamed to the GPU as they are used. auto: gpu where that is predicted to fit."""
    files: ModelFiles = ModelFiles()
    """Single-file checkpoints to read in place of parts of the folder."""


class DataConfig(_Section):
    source: str = "wan22_data"
    """Folder of clips with prompts.txt or metadata.jsonl."""
    draw_toy: bool = False
    """Draw the toy set into `source` where that folder is missing."""
    shards: str = "wan22_shards"
    """Folder that precompute fills and training reads."""
    num_frames: int = 49
    """Pixel frames per sample, 4k+1."""
    height: Positive = 576
    """Pixels; a multiple of 16 (32 for the 5B)."""
    width: Positive = 1024
    """Pixels; a multiple of 16 (32 for the 5B)."""
    fps: Hz | None = None
    """Frames per second that clips are brought to; by default the model's native rate."""
    windows: Literal["first", "all", "spaced"] = "first"
    """Which windows of num_frames to cut from each clip."""
    max_windows: Positive | None = None
    """Windows per clip with windows: "spaced", by default 4."""
    speeds: tuple[Speed, ...] = (1.0,)
    """Speeds at which each clip is stored, for a tempo adapter: 2 is twice as fast. Slower only as
    far as the clip's own frame rate allows, faster where it is long enough."""
    resample: Literal["auto", "nearest", "blend"] = "auto"
    """auto: motion-compensated in-betweens where no source frame falls on the output time."""
    decode_timeout_s: Annotated[float, Field(gt=0)] = 600.0
    """Seconds after which decoding one clip is given up."""
    samples_per_shard: Positive = 64
    """Samples per shard file."""
    workers: Count = 2
    """Loader processes per training process."""
    held_out: Count | None = None
    """Clips kept from training to measure the loss on; by default one in 20, at most 4, and none
    of fewer than 10."""


class PerExpert(_Section):
    high: Weight
    """Weight for the high-noise expert."""
    low: Weight
    """Weight for the low-noise expert."""


class RhythmConfig(_Section):
    signal: Literal["readout", "latent"] = "readout"
    """What the terms look at: readout is luminance at the full frame rate, read from the latents;
    latent is the latent frames themselves, whose spectrum ends at fps/8."""
    spec_weight: Weight | PerExpert = 0.05
    """Weight of the spectral term, a share of the flow loss; 0 switches it off. For each expert
    its own: {"high": 0.1, "low": 0.05}."""
    spec_form: Literal["residual", "absolute"] = "residual"
    """residual: the spectrum of the velocity's error; absolute: power above the cutoff in the
    predicted clean clip."""
    spec_cutoff_hz: Hz = 6.0
    """Jitter counts from this frequency up."""
    band_hz: tuple[Hz, Hz] = (0.5, 6.0)
    """The band of natural motion, lowest and highest frequency."""
    band_gain: Weight = 1.0
    """How much the band counts within the spectral term."""
    jitter_gain: Weight = 1.0
    """How much frequencies from the cutoff up count within the spectral term."""
    tv_weight: Weight | PerExpert = 0.01
    """Weight of the temporal smoothness term, or one for each expert; 0 switches it off."""
    sound_weight: Weight | PerExpert = 0.0
    """Weight of the sound term, or one for each expert: errors of motion at onsets of the clip's
    own sound. 0 switches it off."""
    rollout_every: Count = 0
    """Steps between rollouts of the sampler whose band power is held to that of real clips;
    0: none."""
    rollout_weight: Weight = 0.05
    """Weight of the rollout term in its steps."""
    rollout_steps: Annotated[int, Field(ge=2, le=50)] = 8
    """Sampler steps of a rollout; the last one is differentiated."""

    def weight(self, term: str, expert: str) -> float:
        """The weight of "spec", "tv" or "sound" for an expert."""
        weight = getattr(self, f"{term}_weight")
        return getattr(weight, expert) if isinstance(weight, PerExpert) else weight


class LoraConfig(_Section):
    kind: Literal["rhythm", "tempo"] = "rhythm"
    """rhythm: trained on clips at their own speed; tempo: a slider of speed, trained on faster and
    slower ones, whose strength is log2 of the speed."""
    rank: Positive = 16
    """Rank of every adapter."""
    alpha: Annotated[float, Field(gt=0)] | None = None
    """Scale is alpha / rank; by default alpha = rank."""
    target: Literal["temporal", "qk", "self_attention", "all_linear"] = "temporal"
    """temporal: time rows of self-attention q and k; the others train whole linear layers."""
    time_rows: Literal["auto"] | int = "auto"
    """Rows per head with target "temporal": even, at most 44; auto: the RoPE pairs that turn
    more than 0.5 rad over the clip."""
    blocks: tuple[Count, Positive] | None = None
    """First and one past the last transformer block to adapt; by default all."""


class TrainConfig(_Section):
    max_steps: Positive = 800
    """Optimizer steps per expert."""
    batch_size: Positive = 1
    """Samples per process and forward pass."""
    gradient_accumulation: Positive = 1
    """Forward passes per optimizer step."""
    lr: Annotated[float, Field(gt=0)] = 1e-4
    """Peak learning rate."""
    schedule: Literal["cosine", "constant"] = "cosine"
    """Learning rate after the warm-up: to zero along a cosine, or constant."""
    warmup_steps: Count = 20
    """Steps of linear warm-up."""
    optimizer: Literal["adamw8bit", "adamw"] = "adamw8bit"
    """adamw8bit: bitsandbytes, blockwise 8-bit states; adamw: torch, fp32 states."""
    weight_decay: Weight = 0.01
    """Decoupled weight decay."""
    max_grad_norm: Annotated[float, Field(gt=0)] = 1.0
    """Gradients are scaled down to this global norm."""
    sigma_sampling: Literal["uniform", "logit_normal"] = "uniform"
    """Density of u before the shift: uniform, or logit-normal (0, 1)."""
    caption_dropout: Share = 0.1
    """Share of samples trained with the empty prompt."""
    anchor_weight: Weight = 0.0
    """Weight of the anchor: how far the adapters change what is predicted for a single frame, in
    the flow loss's unit; keeps looks as they are. Text to video only; 0: none."""
    ema_decay: Annotated[float, Field(ge=0, lt=1)] | None = None
    """Keep and export an exponential moving average of the LoRA."""
    checkpointing: Literal["auto", "none", "selective", "full", "offload"] = "auto"
    """Gradient checkpointing: none; selective: attention's outputs are kept in every transformer
    block, and those of all matrix products in `kept_blocks` of them; full: every block is
    recomputed; offload: thirds of blocks are, one at a time, from inputs in pinned host memory,
    where self-attention's output is kept too. auto: the fastest that is predicted to fit, and full
    without a GPU."""
    kept_blocks: Count | None = None
    """Blocks that keep the outputs of their matrix products under checkpointing "selective"; by
    default as many as the GPU's free memory allows."""
    host_blocks: Count = 0
    """Blocks beyond `kept_blocks` that keep the same in pinned host memory (at most all of them);
    for compiled blocks on whole models."""
    compile: bool | None = None
    """torch.compile each transformer block; by default on a GPU."""
    seed: Count = 0
    """Seed of LoRA initialisation, data order, noise and sigma."""
    checkpoint_every: Positive = 100
    """Optimizer steps between checkpoints; the last step always gets one."""
    keep_checkpoints: Positive = 2
    """Checkpoints kept per expert, the newest."""
    keep_every: Positive | None = None
    """Checkpoints whose step is a multiple of this are kept for ever, beside the newest."""
    max_skipped: Positive = 10
    """Steps in a row whose loss or gradient is not finite, and whose update is left out, after
    which a run stops."""
    deterministic: bool = False
    """Bit-identical repetition on a GPU, by slower kernels."""
    log_every: Positive = 1
    """Optimizer steps between lines of metrics.jsonl."""
    validate_every: Count = 200
    """Optimizer steps between measurements of the loss on held-out clips, the first before
    training; 0: none."""


class ParallelConfig(_Section):
    engine: Literal["auto", "plain", "ddp", "fsdp", "deepspeed"] = "auto"
    """auto: deepspeed if its launcher started us, else plain on one process, else ddp where the
    whole base is predicted to fit, else fsdp."""
    zero_stage: Literal[2, 3] | None = None
    """ZeRO stage of the deepspeed engine, by default 3."""
    deepspeed: dict[str, Any] = {}
    """Keys laid over the DeepSpeed configuration derived from this file."""
    expert_split: Literal["auto"] | tuple[Positive, Positive] | None = "auto"
    """Both experts at once, each on its own group of processes: [high, low] processes, or auto,
    where that is predicted to end sooner. null: all processes train one expert after the other."""
    shard_over: Annotated[int, Field(ge=2)] | Literal["node"] | None = None
    """Engine fsdp: how many processes in a row share one copy of the base; "node": those of one
    host. null: all, or with several hosts those of one host where that is predicted to fit."""
    context: Positive = 1
    """Processes that share each clip, a part of the picture each: for long clips. It must divide
    the number of processes, the attention heads, and the picture into equal parts."""
    gpu_memory_gib: Annotated[float, Field(gt=0)] | None = None
    """Use no more than this of each GPU; by default all of it."""
    timeout_minutes: Annotated[float, Field(gt=0)] = 10.0
    """How long a process waits for the others within a step before the run ends and names the one
    that is behind; four times as long while models are loaded and in the first step."""


class OutputConfig(_Section):
    dir: str = "wan22_lora_out"
    """Folder for LoRA files, videos, metrics, checkpoints and the report."""
    prompts: tuple[str, ...] = ()
    """Prompts of the before/after videos; by default the first sample's caption."""
    sample_steps: Count = 40
    """Sampler steps of the before/after videos; 0: none are made."""
    sample_seed: Count = 0
    """Seed of the before/after videos."""
    trackers: tuple[Literal["tensorboard"], ...] = ("tensorboard",)
    """Loggers beside metrics.jsonl."""


class Config(_Section):
    """Everything a run depends on; `variant_facts`, `timebase` and `experts` are derived."""

    model: ModelConfig = ModelConfig()
    data: DataConfig = DataConfig()
    rhythm: RhythmConfig = RhythmConfig()
    lora: LoraConfig = LoraConfig()
    train: TrainConfig = TrainConfig()
    parallel: ParallelConfig = ParallelConfig()
    output: OutputConfig = OutputConfig()

    @property
    def variant(self) -> Variant:
        return VARIANTS[self.model.variant]

    @property
    def task(self) -> str:
        return self.model.task or self.variant.tasks[0]

    @property
    def timebase(self) -> TimeBase:
        return TimeBase(self.data.fps or self.variant.fps, self.data.num_frames)

    @property
    def experts(self) -> tuple[str, ...]:
        """The experts to train, in order."""
        if self.model.expert in (None, "both"):
            return self.variant.experts
        return (self.model.expert,)

    @property
    def latent_shape(self) -> tuple[int, int, int, int]:
        """(C, T, H, W) of one sample's latents."""
        variant, data = self.variant, self.data
        stride = variant.spatial_stride
        frames = self.timebase.latent_frames
        return variant.latent_channels, frames, data.height // stride, data.width // stride

    @property
    def context_grid(self) -> tuple[int, int]:
        """Rows and columns of the equal parts of the picture that `parallel.context` processes
        take; no part cuts through a token. Raises ConfigError where there are no such parts."""
        context, (height, width) = self.parallel.context, self.latent_shape[2:]
        rows, columns = height // PATCH, width // PATCH
        for down in range(1, context + 1):
            if not (context % down or rows % down or columns % (context // down)):
                return down, context // down
        raise ConfigError(
            f"parallel.context: {rows} x {columns} tokens of a frame cannot be cut into {context} "
            "equal parts; take a number whose factors divide these two"
        )

    @model_validator(mode="after")
    def _combinations(self) -> "Config":
        for check in CHECKS:
            check(self)
        return self


def _check_model(cfg: Config) -> None:
    model, variant = cfg.model, cfg.variant
    if cfg.task not in variant.tasks:
        raise ConfigError(
            f"model.task: {model.variant} does not do {model.task}; "
            f"allowed: {', '.join(variant.tasks)}"
        )
    if model.expert and variant.experts == ("single",):
        raise ConfigError(f"model.expert: {model.variant} has one transformer; leave expert out")
    if model.files.transformer_2 and variant.experts == ("single",):
        raise ConfigError(f"model.files.transformer_2: {model.variant} has one transformer")


def _check_sizes(cfg: Config) -> None:
    data, multiple = cfg.data, cfg.variant.size_multiple
    stride = TEMPORAL_STRIDE
    if data.num_frames <= stride or data.num_frames % stride != 1:
        raise ConfigError(
            f"data.num_frames: {data.num_frames} is not {stride}k+1; the nearest allowed is "
            f"{max(1, round((data.num_frames - 1) / stride)) * stride + 1}"
        )
    for key in ("height", "width"):
        value = getattr(data, key)
        if value % multiple:
            raise ConfigError(
                f"data.{key}: {value} is not divisible by {multiple}, as {cfg.model.variant} "
                f"needs; the nearest allowed is {max(1, round(value / multiple)) * multiple}"
            )


def _check_data(cfg: Config) -> None:
    if cfg.data.max_windows is not None and cfg.data.windows != "spaced":
        raise ConfigError(
            f"data.max_windows: has no meaning with data.windows {cfg.data.windows!r}; leave it out"
        )


def _check_parallel(cfg: Config) -> None:
    parallel = cfg.parallel
    if parallel.engine not in ("auto", "deepspeed"):
        for key in ("zero_stage", "deepspeed"):
            if getattr(parallel, key):
                raise ConfigError(
                    f"parallel.{key}: has no meaning with parallel.engine {parallel.engine!r}; "
                    "leave it out"
                )
    if parallel.shard_over is not None and parallel.engine != "fsdp":
        raise ConfigError(
            f"parallel.shard_over: has no meaning with parallel.engine {parallel.engine!r}; "
            'set that to "fsdp", or leave it out'
        )
    if isinstance(parallel.expert_split, tuple) and len(cfg.experts) == 1:
        raise ConfigError(
            f"parallel.expert_split: {list(parallel.expert_split)} has no meaning where one expert "
            "is trained; leave it out"
        )
    _ = cfg.context_grid  # which there must be
    zero = parallel.deepspeed.get("zero_optimization")
    if isinstance(zero, dict) and zero.get("memory_efficient_linear"):
        raise ConfigError(
            "parallel.deepspeed: memory_efficient_linear loses gradients where torch compiles it; "
            "leave it out"
        )
    for key, ours in GOVERNED.items():
        if key in parallel.deepspeed:
            raise ConfigError(f"parallel.deepspeed: {key} is derived here; set {ours} instead")
    if "stage" in parallel.deepspeed.get("zero_optimization", {}):
        raise ConfigError("parallel.deepspeed: the stage is set by parallel.zero_stage")


def _check_nf4(cfg: Config) -> None:
    if cfg.model.base != "nf4":
        return
    if cfg.model.placement == "host":
        raise ConfigError(
            'model.base: "nf4" weights are not streamed from host memory; set model.placement to '
            '"gpu", or model.base to "bf16" or "fp8"'
        )
    if cfg.parallel.engine in ("fsdp", "deepspeed"):
        raise ConfigError(
            f'model.base: "nf4" weights are whole on every GPU, and parallel.engine '
            f'"{cfg.parallel.engine}" shards them; leave that at "auto", or use "bf16"'
        )


def _check_offload(cfg: Config) -> None:
    host, level = cfg.model.placement == "host", cfg.train.checkpointing
    if host and level not in ("auto", "full", "offload"):
        raise ConfigError(
            f"train.checkpointing: {level!r} keeps a use of every weight until the backward pass, "
            'but model.placement host lends their memory on; use "full" or "offload"'
        )
    for key, value, on in (
        ("model.placement", "host", host),
        ("train.checkpointing", "offload", level == "offload"),
    ):
        if on and cfg.parallel.engine in ("fsdp", "deepspeed"):
            raise ConfigError(
                f"{key}: {value} needs parallel.engine plain or ddp, not {cfg.parallel.engine}; "
                "to shard and offload at once, give the deepspeed engine "
                '{"zero_optimization": {"offload_param": {"device": "cpu"}}} as parallel.deepspeed'
            )


GOVERNED = {
    "train_batch_size": "train.batch_size",
    "train_micro_batch_size_per_gpu": "train.batch_size",
    "gradient_accumulation_steps": "train.gradient_accumulation",
    "gradient_clipping": "train.max_grad_norm",
    "optimizer": "train.optimizer",
    "scheduler": "train.schedule",
    "bf16": "model.base",
    "fp16": "model.base",
}
"""DeepSpeed's own names for what other keys of this file decide."""


def _check_speeds(cfg: Config) -> None:
    speeds = cfg.data.speeds
    if not speeds or len({round(1000 * speed) for speed in speeds}) < len(speeds):
        raise ConfigError(f"data.speeds: {list(speeds)} is empty, or names a speed twice")
    if cfg.lora.kind == "tempo" and not min(speeds) < 1 < max(speeds):
        raise ConfigError(
            f"data.speeds: {list(speeds)} holds no slower or no faster speed than 1, between which "
            'a tempo adapter is trained; try [0.5, 0.71, 1, 1.41, 2], or set lora.kind to "rhythm"'
        )


def _check_lora(cfg: Config) -> None:
    rows = cfg.lora.time_rows
    if rows != "auto":
        if cfg.lora.target != "temporal":
            raise ConfigError(
                f"lora.time_rows: has no meaning with lora.target {cfg.lora.target!r}; leave it out"
            )
        if not 2 <= rows <= 44 or rows % 2:
            raise ConfigError(
                f'lora.time_rows: given {rows}; allowed: "auto" or an even number from 2 to 44'
            )
    if cfg.train.anchor_weight and cfg.task != "t2v":
        raise ConfigError(
            f"train.anchor_weight: has no meaning with task {cfg.task}, where the first frame is "
            "given; leave it out"
        )
    if cfg.train.kept_blocks is not None and cfg.train.checkpointing != "selective":
        raise ConfigError(
            f"train.kept_blocks: has no meaning with train.checkpointing "
            f"{cfg.train.checkpointing!r}; leave it out"
        )
    if cfg.train.host_blocks and cfg.train.checkpointing != "selective":
        raise ConfigError(
            f"train.host_blocks: has no meaning with train.checkpointing "
            f"{cfg.train.checkpointing!r}; leave it out, or set that to selective"
        )
    if cfg.train.host_blocks and cfg.train.compile is False:
        raise ConfigError(
            "train.host_blocks: what an uncompiled block keeps cannot be moved; set train.compile "
            "to true, or leave host_blocks out"
        )
    if cfg.lora.blocks and cfg.lora.blocks[0] >= cfg.lora.blocks[1]:
        raise ConfigError(f"lora.blocks: {list(cfg.lora.blocks)} holds no block (first, end)")


def _check_rhythm(cfg: Config) -> None:
    rhythm = cfg.rhythm
    low, high = rhythm.band_hz
    if low >= high:
        raise ConfigError(f"rhythm.band_hz: {low} Hz is not below {high} Hz")
    terms = ("spec", "tv", "sound")
    for term in terms:
        weight = getattr(rhythm, f"{term}_weight")
        if isinstance(weight, PerExpert) and cfg.variant.experts == ("single",):
            raise ConfigError(
                f"rhythm.{term}_weight: {cfg.model.variant} has one transformer; give one number"
            )
    on = {term: any(rhythm.weight(term, expert) for expert in cfg.experts) for term in terms}
    if on["sound"] and rhythm.signal == "latent":
        raise ConfigError(
            'rhythm.sound_weight: onsets need the full frame rate; set rhythm.signal to "readout"'
        )
    if rhythm.signal == "latent" and on["tv"] and cfg.data.num_frames < 9:
        raise ConfigError(
            f"rhythm.tv_weight: {cfg.data.num_frames} frames are too few for a difference of "
            "latent frames; set it to 0, or data.num_frames to 9 or more"
        )
    if on["spec"]:
        _check_spectrum(cfg)
    if rhythm.rollout_every:
        _check_rollout(cfg)


def _check_spectrum(cfg: Config) -> None:
    """Refuse a band or a cutoff that no frequency reaches: the term would be zero in silence."""
    rhythm, timebase = cfg.rhythm, cfg.timebase
    low, high = rhythm.band_hz
    bins = [*timebase.usable_bins_hz(rhythm.signal).values()]
    # Latent frame 0 is left out, and two samples have no spectrum once their trend is taken away.
    if not bins or timebase.latent_frames < 4:
        raise ConfigError(
            f"rhythm.spec_weight: {cfg.data.num_frames} frames are too few for a spectrum; set it "
            "to 0, or data.num_frames to 13 or more"
        )
    comb = ", away from the decoder's comb at " + " and ".join(f"{hz:g}" for hz in timebase.comb_hz)
    carried = (
        f"{cfg.data.num_frames} frames at {timebase.fps:g} fps carry {bins[0]:.2f} to "
        f'{bins[-1]:.2f} Hz (rhythm.signal "{rhythm.signal}"'
        + (f"{comb} Hz)" if rhythm.signal == "readout" else ")")
    )
    if rhythm.jitter_gain and rhythm.spec_cutoff_hz > bins[-1] * (1 + 1e-9):
        raise ConfigError(
            f"rhythm.spec_cutoff_hz: no frequency reaches {rhythm.spec_cutoff_hz:g} Hz: {carried}; "
            f"lower it to at most {bins[-1]:.2f}"
        )
    if rhythm.band_gain and not any(low <= hz <= high for hz in bins):
        raise ConfigError(f"rhythm.band_hz: no frequency lies in {low:g} to {high:g} Hz: {carried}")
    if not rhythm.band_gain and not rhythm.jitter_gain:
        raise ConfigError(
            "rhythm.jitter_gain: 0 together with rhythm.band_gain 0 leaves the spectral term "
            "empty; set rhythm.spec_weight to 0 instead"
        )
    if rhythm.spec_form == "absolute" and not rhythm.jitter_gain:
        raise ConfigError(
            'rhythm.jitter_gain: 0 leaves nothing of spec_form "absolute", which looks above the '
            "cutoff only"
        )


def _check_rollout(cfg: Config) -> None:
    if cfg.rhythm.signal == "latent":
        raise ConfigError('rhythm.rollout_every: set rhythm.signal to "readout", or leave it out')
    if cfg.experts == ("high",):
        raise ConfigError(
            "rhythm.rollout_every: the high-noise expert alone does not reach a clean clip; "
            "train the low one with it, or leave it out"
        )
    if cfg.data.num_frames < 13:
        raise ConfigError(
            f"rhythm.rollout_every: {cfg.data.num_frames} frames are too few for a spectrum"
        )


CHECKS = (
    _check_model,
    _check_sizes,
    _check_data,
    _check_parallel,
    _check_nf4,
    _check_offload,
    _check_speeds,
    _check_lora,
    _check_rhythm,
)


def load_config(path: Path | None, overrides: Sequence[str] = ()) -> Config:
    """Read a config file (None: all defaults) and lay `section.key=value` overrides over it.

    Raises ConfigError with one sentence for a missing or malformed file, an unknown key, a wrong
    type or value, or a combination that cannot work.
    """
    settings = _read_json(path) if path else {}
    settings.pop("$schema", None)
    for override in overrides:
        _apply(settings, override)
    where = f"{path}: " if path else ""
    try:
        return Config.model_validate_json(json.dumps(settings))
    except ValidationError as error:
        raise ConfigError(where + _sentence(error)) from None
    except ConfigError as error:
        raise ConfigError(f"{where}{error}") from None


def _read_json(path: Path) -> dict[str, Any]:
    def no_duplicates(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        keys = [key for key, _ in pairs]
        for key in keys:
            if keys.count(key) > 1:
                raise ConfigError(f"{path}: the key {key!r} stands there twice; keep one")
        return dict(pairs)

    try:
        text = path.read_text(encoding="utf-8")
        settings = json.loads(text, object_pairs_hook=no_duplicates)
    except OSError as error:
        raise ConfigError(f"--config: cannot read {path}: {error.strerror}") from None
    except UnicodeDecodeError:
        raise ConfigError(f"{path}: not a UTF-8 text file") from None
    except json.JSONDecodeError as error:
        raise ConfigError(f"{path}: line {error.lineno}: not JSON: {error.msg}") from None
    if not isinstance(settings, dict):
        raise ConfigError(f"{path}: must hold one JSON object of sections")
    return settings


def _apply(settings: dict[str, Any], override: str) -> None:
    key, equals, text = override.partition("=")
    parts = key.split(".")
    if not equals or len(parts) < 2 or not all(parts):
        raise ConfigError(f"--set: {override!r} is not section.key=value")
    try:
        value = json.loads(text)
    except json.JSONDecodeError:
        value = text  # a bare word is a string: --set data.shards=my_shards
    for part in parts[:-1]:
        settings = settings.setdefault(part, {})
        if not isinstance(settings, dict):
            raise ConfigError(f"--set: {override!r}: {part!r} is not a section")
    settings[parts[-1]] = value


def _sentence(error: ValidationError) -> str:
    """The first problem pydantic found, in one line."""
    problem = error.errors()[0]
    location = _key_path(problem["loc"])
    key = ".".join(location)
    more = len({tuple(_key_path(other["loc"])) for other in error.errors()}) - 1
    tail = f" (and {more} more)" if more else ""
    if problem["type"] == "extra_forbidden":
        known = sorted(_keys_beside(location))
        near = difflib.get_close_matches(location[-1], known, n=1)
        hint = f"did you mean {near[0]!r}?" if near else f"known here: {', '.join(known)}"
        return f"unknown key {key}; {hint}{tail}"
    if problem["type"] == "json_invalid":
        return f"not JSON that can be read: {problem['msg']}"
    given = json.dumps(problem["input"], ensure_ascii=False)
    allowed = problem["msg"].removeprefix("Input should be ")
    return f"{key or 'the file'}: given {given}; allowed: {allowed}{tail}"


def _key_path(loc: tuple[int | str, ...]) -> list[str]:
    """The key alone: pydantic adds list positions and the names of a union's members."""
    path, section = [], Config
    for part in loc:
        if not (isinstance(section, type) and issubclass(section, _Section)):
            break
        path.append(str(part))
        field = section.model_fields.get(str(part))
        section = field.annotation if field else None
    return path


def _keys_beside(location: list[str]) -> list[str]:
    section: Any = Config
    for name in location[:-1]:
        section = section.model_fields[name].annotation
    return list(section.model_fields)


if __name__ == "__main__":
    print(json.dumps(Config.model_json_schema(), indent=2))
