"""The planner: memory and time of a training step by arithmetic, and the settings that fit.

Nothing is loaded and no GPU is asked. What is kept for the backward pass follows from the shapes
and the level of checkpointing; what one block needs while it is recomputed and differentiated is a
fitted number of values of each token (tempolora/train/rates.py). `predict` says what a choice of
settings costs, `fitting` which choices fit, fastest first, and `next_setting` what to change.

D width, F width of the feed-forward layers.
"""

import json
from collections.abc import Callable, Iterator, Mapping
from dataclasses import asdict, dataclass, replace
from functools import cached_property
from itertools import product
from math import prod
from typing import Any

from tempolora.config import Config, ConfigError
from tempolora.train.rates import (
    DECODE_BYTES,
    ENCODE_BYTES,
    GIB,
    H200,
    TEXT_BLOCKS,
    TEXT_DIM,
    TEXT_EMBEDDING,
    TEXT_ENCODER,
    TEXT_FLIGHT,
    TILE_PIXELS,
    VAE_WEIGHTS,
    VALUES,
    Gpu,
)
from tempolora.train.work import BF16, FP32, Flops, Work, kept_bytes, work_of
from tempolora.variants import TEXT_TOKENS

SPARE = 0.05  # of the memory, to be left by what is chosen
BACKWARD_PRODUCTS = 2.5  # fused attention backward, in forward ones: five products for two
SHARDED = ("fsdp", "deepspeed")
UNTRIED = {"fsdp": ("none", "selective"), "deepspeed": ("selective",)}
"""What checkpointing auto leaves alone under an engine."""
AUTO_KEYS = ("model.base", "model.placement", "train.checkpointing")
HOST_GPUS = 8  # of a host, where that is not known
FEWEST_FRAMES = 13  # that a spectrum can be had of


@dataclass(frozen=True)
class Settings:
    """What the planner may choose. kept_blocks, host_blocks: 0 but with checkpointing selective."""

    engine: str
    base: str
    placement: str
    checkpointing: str
    kept_blocks: int = 0
    host_blocks: int = 0

    @property
    def streamed(self) -> bool:
        """Whether weights or inputs come and go."""
        return self.placement == "host" or self.checkpointing == "offload"

    def keys(self) -> dict[str, Any]:
        """The configuration's keys that say the same, but for the engine."""
        return {
            "model.base": self.base,
            "model.placement": self.placement,
            "train.checkpointing": self.checkpointing,
        }


@dataclass(frozen=True)
class Plan:
    """What settings cost on each GPU. parts: bytes by name, whose sum is the peak that torch
    reserves. pinned: bytes of host memory that stay locked, for each process."""

    settings: Settings
    parts: Mapping[str, float]
    pinned: float
    seconds: float

    @property
    def peak(self) -> float:
        """Bytes."""
        return sum(self.parts.values())

    def as_json(self) -> dict[str, Any]:
        """Numbers for machines, in GiB and seconds."""
        return {
            "settings": asdict(self.settings),
            "parts_gib": {name: size / GIB for name, size in self.parts.items()},
            "peak_gib": self.peak / GIB,
            "pinned_gib": self.pinned / GIB,
            "seconds": self.seconds,
        }


@dataclass(frozen=True)
class Card:
    """What there is. room: bytes that torch may reserve on each GPU. host: bytes of a host's
    memory, or None where nothing is known of it; gpus share it."""

    room: float
    gpus: int = 1
    host: float | None = None
    gpu: Gpu = H200

    def holds(self, plan: Plan) -> bool:
        """Whether the plan fits here with memory to spare."""
        if self.host is not None and plan.pinned * self.gpus > self.host:
            return False
        return plan.peak <= self.room


def card_of(memory: float, **others: Any) -> Card:
    """A whole card of so many bytes: the CUDA context and some to spare are taken off."""
    return Card((1 - SPARE) * memory - VALUES["context_gib"] * GIB, **others)


def changed(cfg: Config, keys: Mapping[str, Any]) -> Config:
    """The configuration with `section.key` values laid over it, checked as a file is."""
    content = cfg.model_dump(mode="json")
    for key, value in keys.items():
        section, _, name = key.partition(".")
        content[section][name] = value
    return Config.model_validate_json(json.dumps(content))


def with_engine(cfg: Config, engine: str) -> Config:
    """The configuration with this engine in the place of "auto"."""
    keys: dict[str, Any] = {"parallel.engine": engine}
    if engine != "deepspeed":
        keys |= {"parallel.zero_stage": None, "parallel.deepspeed": {}}
    return changed(cfg, keys)


def key_of(cfg: Config, key: str) -> Any:
    """The value of `section.key`."""
    section, _, name = key.partition(".")
    return getattr(getattr(cfg, section), name)


# --- What settings cost ---------------------------------------------------------------------------


def predict(
    cfg: Config,
    settings: Settings,
    gpus: int = 1,
    gpu: Gpu = H200,
    values: Mapping[str, float] = VALUES,
) -> Plan:
    """Memory of each GPU and seconds a step under these settings."""
    return _Step(cfg, work_of(cfg, cfg.experts[0]), settings, gpus, gpu, values).plan()


class _Step:
    def __init__(
        self,
        cfg: Config,
        work: Work,
        settings: Settings,
        gpus: int,
        gpu: Gpu,
        values: Mapping[str, float],
    ) -> None:
        self.cfg, self.work, self.settings, self.gpus = cfg, work, settings, gpus
        self.gpu, self.values = gpu, values
        self.compiled = cfg.train.compile is not False
        self.trained_blocks = work.blocks - work.adapted[0]  # those below are not differentiated

    def plan(self) -> Plan:
        return Plan(self.settings, self._parts(), self._pinned(), self._seconds())

    @property
    def by_thirds(self) -> bool:
        """Whether a third of a block is recomputed at a time (tempolora/train/recompute.py)."""
        return self.settings.checkpointing == "offload"

    def _values(self, d: float, f: float = 0.0) -> float:
        """Bytes of so many bf16 values of width D and F for each token."""
        return BF16 * self.work.all_tokens * (d * self.work.width + f * self.work.ffn)

    def _parts(self) -> dict[str, float]:
        work, train = self.work, self.cfg.train
        adapters = FP32 * sum(work.adapters)
        latents = FP32 * train.batch_size * prod(self.cfg.latent_shape) / work.context
        average = {} if train.ema_decay is None else {"moving average": adapters}
        return {
            "weights": self._weights(),
            "LoRA": adapters,
            **average,
            "gradients": adapters * (1 if self.gpus == 1 else 2),  # and flat, to be averaged
            "optimizer": work.optimizer_bytes(train.optimizer),
            "activations kept": self._graphs() * self._kept(),
            "activations in flight": self._flight(),
            "text and time": self._conditioning(),
            "latents and loss": 8 * latents,
            "allocator": self.values["slack_gib"] * GIB,
        }

    def _weights(self) -> float:
        work, base = self.work, self.settings.base
        if self.settings.placement == "host":  # slots for thirds of blocks, which take turns
            return hosted_weights(work, base, 3 if self.by_thirds else 6)
        stage_2 = self.settings.engine == "deepspeed" and self.cfg.parallel.zero_stage == 2
        if self.settings.engine in SHARDED and not stage_2 and self.gpus > 1:
            shared_by = sharers_of(self.cfg, self.gpus)
            return work.weights(base) / shared_by + 2 * work.block_weights(base)
        # A product of 4-bit weights restores its own; the widest in bf16.
        restored = BF16 * work.width * work.ffn if base == "nf4" else 0
        return work.weights(base) + restored

    def _graphs(self) -> float:
        """Forward passes whose graphs live at the same time, in passes of the whole clip."""
        train, rhythm = self.cfg.train, self.cfg.rhythm
        anchor = bool(train.anchor_weight) / self.cfg.timebase.latent_frames
        return 1 + anchor + bool(rhythm.rollout_every)

    def _kept(self) -> float:
        """Bytes that wait for the backward pass: of one graph, all blocks."""
        work, level = self.work, self.settings.checkpointing
        log_sum_exp = FP32 * work.all_tokens * work.heads
        text = 2 * BF16 * work.batch * TEXT_TOKENS * work.width  # keys and values
        if level == "offload":
            return self._values(3)  # the MLP's input, and x and attention's output being fetched
        if level == "full":
            return self.trained_blocks * self._values(1)
        if level == "none":
            # Eager: tensors that autograd saves, counted on a block. Compiled: the same as a kept
            # block, and q and k behind their rotation.
            saved = self._values(11, 1) if self.compiled else self._values(20 + self._extra(), 1)
            return self.trained_blocks * (saved + 2 * log_sum_exp + text)
        kept, hosted = self._whole_blocks()
        # the hosted block that goes backward, and the one that is fetched meanwhile
        here = min(2, hosted) * self._block("matmuls")
        others = self.trained_blocks - hosted
        return others * self._block("attention") + kept * self.kept_block_bytes + here

    def _sent(self) -> float:
        """Bytes that a block keeps in host memory by thirds: its input, self-attention's output and
        the sums of its rows, the MLP's input."""
        return self._values(3) + FP32 * self.work.all_tokens * self.work.heads

    def _whole_blocks(self) -> tuple[int, int]:
        """Blocks that repeat no product: (on the GPU, on the host)."""
        kept = min(self.settings.kept_blocks, self.trained_blocks)
        return kept, min(self.settings.host_blocks, self.trained_blocks - kept)

    @cached_property
    def kept_block_bytes(self) -> float:
        """What a block keeps that repeats no matrix product, beyond self-attention's output."""
        return self._block("matmuls") - self._block("attention")

    def _block(self, level: str) -> float:
        work = self.work
        return kept_bytes(
            level,
            tokens=work.all_tokens,
            width=work.width,
            ffn=work.ffn,
            heads=work.heads,
            text_tokens=work.batch * TEXT_TOKENS,
        )

    def most_kept_blocks(self, room: float) -> int:
        """Blocks that can keep all their products when all keep their attention's output. room:
        bytes beside frozen weights and adapters."""
        for kept in range(self.trained_blocks, 0, -1):
            settings = replace(self.settings, kept_blocks=kept)
            step = _Step(self.cfg, self.work, settings, self.gpus, self.gpu, self.values)
            parts = step._parts().items()
            if sum(b for name, b in parts if name not in ("weights", "LoRA")) <= room:
                return kept
        return 0

    def _extra(self) -> float:
        """Units of D that a block spends on a timestep for each token, six tables of D in fp32."""
        return (6 if self.compiled else 16) * self.work.per_token_time

    def _flight(self) -> float:
        """One block's recomputation and gradients, or its backward pass."""
        mode = "compiled" if self.compiled else "eager"
        d, f = self.values[f"{mode}_flight"] + self._extra(), 3.0
        if self.by_thirds:  # self-attention's, or the feed-forward layer's, of a compiled block
            share = self.values["thirds_flight"]
            d -= self.values["compiled_flight"]
            if 10 * self.work.width > 4 * self.work.ffn:
                d, f = d + 13 * share, 0.0
            else:
                d, f = d + 3 * share, 4 * share
        if self.settings.checkpointing == "selective":
            d -= 1  # self-attention's output is counted among what is kept
        if self.settings.base == "fp8":
            f += self.values["fp8_flight"]
        bytes_ = self._values(d, f)
        if self.settings.checkpointing == "none":  # nothing is computed again
            bytes_ = max(bytes_ - self._values(9, 1), self._values(3, 2))
        return bytes_ * (2 if self.settings.base == "fp32" else 1)

    def _conditioning(self) -> float:
        work = self.work
        text = BF16 * work.batch * TEXT_TOKENS * (work.text_dim + work.width)
        return text + self._values(7.0 * work.per_token_time)

    def _pinned(self) -> float:
        """Host memory that transfers need, bytes a process."""
        pinned = 0.0
        if self.settings.placement == "host":
            pinned += self.work.blocks * self.work.block_matrices(self.settings.base)
        if self.by_thirds:
            pinned += self._graphs() * self.trained_blocks * self._sent()
        _, hosted = self._whole_blocks()
        return pinned + self._graphs() * hosted * self._block("matmuls")

    # --- Seconds ----------------------------------------------------------------------------------

    def _seconds(self) -> float:
        compute = self._compute(self.work.flops, self._recomputed(), backward=True)
        rollout = self.cfg.rhythm.rollout_every
        if rollout:
            forward = self._compute(self._forward(), Flops(), backward=False)
            compute += ((self.cfg.rhythm.rollout_steps - 1) * forward + compute) / rollout
        if self.cfg.train.anchor_weight:  # two passes forward and one backward over one frame
            compute *= 1 + 4 / 3 / self.cfg.timebase.latent_frames
        transfer = self._transferred() / self.gpu.host_link
        seconds = max(compute, transfer) + self.values["exposed"] * transfer
        if self.gpus > 1:
            kind = "streamed" if self.settings.streamed else self.settings.engine
            seconds /= self.values.get(f"{kind}_share", 1.0)
        return self.cfg.train.gradient_accumulation * seconds

    def _compute(self, flops: Flops, again: Flops, backward: bool) -> float:
        """Seconds of products, attention and everything between them, one after the other."""
        values, gpu, work = self.values, self.gpu, self.work
        times = {"fp8": values["fp8_time"], "nf4": values["nf4_time"], "fp32": 12.0}
        slower = times.get(self.settings.base, 1.0)
        linear = flops.linear_forward + flops.linear_backward + again.linear_forward
        seconds = slower * linear / gpu.matmul
        seconds += (flops.attention_forward + again.attention_forward) / gpu.attention_forward
        traffic = values["compiled_traffic" if self.compiled else "eager_traffic"]
        block = traffic * self._values(11, 3) / gpu.copy
        seconds += work.blocks * block
        if backward:
            fused = BACKWARD_PRODUCTS * flops.attention_forward * self.trained_blocks / work.blocks
            seconds += fused / gpu.attention_backward
            passes = 1 if self.settings.checkpointing == "none" else 2
            seconds += self.trained_blocks * passes * block
        return seconds

    def _forward(self) -> Flops:
        flops = self.work.flops
        return Flops(flops.linear_forward, 0, flops.attention_forward, 0)

    def _recomputed(self) -> Flops:
        """What checkpointing computes a second time."""
        level, blocks = self.settings.checkpointing, self.trained_blocks
        if level == "none":
            return Flops()
        one = self.work.block_flops(self.work.adapted[0], entered=True)
        if level in ("selective", "offload"):
            return Flops(linear_forward=(blocks - sum(self._whole_blocks())) * one.linear_forward)
        return Flops(blocks * one.linear_forward, 0, blocks * one.attention_forward, 0)

    def _transferred(self) -> float:
        """Bytes between host and GPU, both ways."""
        moved = 0.0
        if self.settings.placement == "host":
            passes = self.work.blocks + self.trained_blocks
            moved += passes * self.work.block_matrices(self.settings.base)
        if self.by_thirds:
            moved += 2 * self.trained_blocks * self._sent()
        _, hosted = self._whole_blocks()
        return moved + 2 * hosted * self._block("matmuls")


def sharers_of(cfg: Config, gpus: int) -> int:
    """How many of the GPUs share one copy of a sharded base, where hosts have HOST_GPUS each."""
    shared = HOST_GPUS if cfg.parallel.shard_over == "node" else cfg.parallel.shard_over
    return min(shared or gpus, gpus)


def hosted_weights(work: Work, base: str, slots: int) -> float:
    """Bytes on the GPU when the blocks' matrices are on the host: slots for thirds of blocks, what
    lies outside the blocks, and their vectors."""
    vectors = work.blocks * (work.block_weights(base) - work.block_matrices(base))
    return work.outer_weights(base) + vectors + slots * work.largest_third(base)


def kept_blocks_in(room: float, cfg: Config) -> int:
    """Blocks that keep their products under checkpointing "selective", where train.kept_blocks is
    null. room: bytes of a GPU that already holds what it will of weights and adapters."""
    engine = cfg.parallel.engine
    settings = Settings(
        engine, cfg.model.base, cfg.model.placement, "selective", 0, cfg.train.host_blocks
    )
    gpus = 1 if engine in ("plain", "auto") else 2  # more need no more than two
    work = work_of(cfg, cfg.experts[0])
    return _Step(cfg, work, settings, gpus, H200, VALUES).most_kept_blocks(room)


# --- Beside training ------------------------------------------------------------------------------


def other_peaks(cfg: Config, settings: Settings) -> dict[str, float]:
    """Bytes at the peak of what runs before and after training, on one GPU. The VAE decodes whole
    frames, or with weights on the host a tile at a time.

    Only the transformer's where the model is no published one.
    """
    work = work_of(cfg, cfg.experts[0])
    host, base = settings.placement == "host", settings.base
    stride, pixels = cfg.variant.spatial_stride, cfg.data.height * cfg.data.width
    frames = 3 * cfg.data.num_frames * pixels
    vae, text = VAE_WEIGHTS[stride], TEXT_ENCODER
    # a timestep for each token: six tables of D, in fp32 and as they came, and what they come from
    units = VALUES["sample_flight"] * 11 + 19 * work.per_token_time
    hidden = VALUES["sample_flight"] * 3
    flight = BF16 * work.tokens * (units * work.width + hidden * work.ffn)
    weights = work.weights(base)
    decoded = pixels
    if host:
        flight += 3 * BF16 * work.tokens * work.width  # query and key are turned in fp32
        weights = hosted_weights(work, base, 3)
        text = TEXT_EMBEDDING + 3 * (TEXT_ENCODER - TEXT_EMBEDDING) / TEXT_BLOCKS
        decoded = min(pixels, TILE_PIXELS)
    peaks = {"sampling: transformer": weights + FP32 * sum(work.adapters) + flight}
    if work.text_dim != TEXT_DIM:
        return peaks
    return peaks | {
        "sampling: VAE decoder": vae + DECODE_BYTES[stride] * decoded + 10 * frames,
        "precompute: VAE encoder": vae + ENCODE_BYTES * pixels + 6 * frames,
        "precompute: text encoder": text + TEXT_FLIGHT,
    }


# --- Which settings -------------------------------------------------------------------------------


def options(cfg: Config, card: Card) -> Iterator[Settings]:
    """The choices that the configuration leaves open, `auto` being all there is.

    Raises ConfigError where it leaves none.
    """
    engines = [cfg.parallel.engine]
    if engines == ["auto"]:
        engines = ["ddp", "fsdp"] if card.gpus > 1 else ["plain"]
    bases = [cfg.model.base] if cfg.model.base != "auto" else ["bf16", "fp8"]
    if "fp8" in bases and not card.gpu.fp8:
        bases.remove("fp8")
    if not bases:
        raise ConfigError(f"model.base: an {card.gpu.name} has no fp8 arithmetic; use bf16")
    placement, level = cfg.model.placement, cfg.train.checkpointing
    placements = [placement] if placement != "auto" else ["gpu", "host"]
    levels = [level] if level != "auto" else ["none", "selective", "full", "offload"]
    found = [
        Settings(*choice)
        for choice in product(engines, bases, placements, levels)
        if _possible(*choice) and not (level == "auto" and choice[3] in UNTRIED.get(choice[0], ()))
    ]
    if not found:  # anything else is refused when the configuration is read
        raise ConfigError(
            f'model.base: "{cfg.model.base}" does not go with DeepSpeed, whose ZeRO partitions no '
            '8-bit weights; use "bf16", or parallel.engine "fsdp" or "ddp" under torchrun'
        )
    yield from found


def _possible(engine: str, base: str, placement: str, level: str) -> bool:
    if placement == "host" and (engine in SHARDED or level not in ("full", "offload")):
        return False
    if engine in SHARDED and level == "offload":
        return False
    if base == "nf4" and (engine in SHARDED or placement == "host"):
        return False
    return not (engine == "deepspeed" and base == "fp8")


def candidates(cfg: Config, card: Card) -> list[Plan]:
    """A plan for each choice that is open; selective keeps as many blocks as the card has room."""
    work = work_of(cfg, cfg.experts[0])
    return [_with_kept_blocks(cfg, work, settings, card) for settings in options(cfg, card)]


def _with_kept_blocks(cfg: Config, work: Work, settings: Settings, card: Card) -> Plan:
    def step(kept: int) -> _Step:
        chosen = replace(settings, kept_blocks=kept, host_blocks=cfg.train.host_blocks)
        return _Step(cfg, work, chosen, card.gpus, card.gpu, VALUES)

    if settings.checkpointing != "selective":
        return _Step(cfg, work, settings, card.gpus, card.gpu, VALUES).plan()
    if cfg.train.kept_blocks is not None:
        return step(cfg.train.kept_blocks).plan()
    none = step(0)
    parts = none.plan().parts
    return step(none.most_kept_blocks(card.room - parts["weights"] - parts["LoRA"])).plan()


def preference(cfg: Config) -> Callable[[Plan], tuple[int, float]]:
    """Smaller is better: seconds; where the base is open too, fp8, which changes numbers, comes
    after bf16 on the GPU and before bf16 that is streamed there."""

    def order(plan: Plan) -> tuple[int, float]:
        settings = plan.settings
        if cfg.model.base != "auto":
            return 0, plan.seconds
        return 2 * (settings.placement == "host") + (settings.base == "fp8"), plan.seconds

    return order


def fitting(cfg: Config, card: Card) -> list[Plan]:
    """The plans that fit, best first."""
    return sorted((p for p in candidates(cfg, card) if card.holds(p)), key=preference(cfg))


def smallest(cfg: Config, card: Card) -> Plan:
    """The plan of least memory among the open choices, selective with no block kept whole."""
    return min(candidates(cfg, replace(card, room=0.0)), key=lambda plan: plan.peak)


def next_setting(
    cfg: Config, card: Card, below: float | None = None
) -> tuple[dict[str, Any], Plan] | None:
    """The mildest change of settings that fits: keys with their values, and what they cost.

    below: bytes; only plans of a smaller peak count. First what leaves numbers alone, then what
    changes them, then smaller batches and smaller clips. None where not even these help.
    """
    below = float("inf") if below is None else below
    card = replace(card, room=min(card.room, below))
    for keys in _changes(cfg, card):
        try:
            other = changed(cfg, keys)
            plans = [p for p in fitting(other, card) if p.peak < below]
        except ConfigError:
            continue
        if not plans:
            continue
        plan = plans[0]
        found = {key: value for key, value in keys.items() if value != "auto"}
        for key, value in plan.settings.keys().items():
            if keys.get(key) == "auto" and key_of(cfg, key) not in (value, "auto"):
                found[key] = value
        if keys.get("parallel.engine") == "auto" and plan.settings.engine != cfg.parallel.engine:
            found["parallel.engine"] = plan.settings.engine
        if found:
            return found, plan
    return None


def _changes(cfg: Config, card: Card) -> Iterator[dict[str, Any]]:
    train, data = cfg.train, cfg.data
    free: dict[str, Any] = {"train.checkpointing": "auto"}
    if train.checkpointing in ("selective", "auto"):
        yield {"train.checkpointing": "selective", "train.kept_blocks": 0}
    if train.kept_blocks is not None:
        free["train.kept_blocks"] = None
    if train.host_blocks:
        free["train.host_blocks"] = 0
    levels = ("none", "selective", "full", "offload")
    past = len(levels) if train.checkpointing == "auto" else levels.index(train.checkpointing) + 1
    for level in levels[past:]:
        yield free | {"train.checkpointing": level}
    yield free
    if train.compile is False:
        yield free | {"train.compile": True}
    if card.gpus > 1 and cfg.parallel.engine == "ddp":
        yield free | {"parallel.engine": "fsdp"}
    free["model.placement"] = "auto"
    yield free
    if train.compile is False:
        free["train.compile"] = True
        yield free
    if cfg.model.base == "nf4":  # which cannot be streamed
        yield free | {"model.base": "bf16"}
    if cfg.model.base != "fp8":
        yield free | {"model.base": "fp8"}
    if train.batch_size > 1:
        accumulation = train.gradient_accumulation * train.batch_size
        free |= {"train.batch_size": 1, "train.gradient_accumulation": accumulation}
        yield free
    for frames in range(data.num_frames - 4, FEWEST_FRAMES - 1, -4):
        yield free | {"data.num_frames": frames}
    multiple = cfg.variant.size_multiple
    for eighths in range(7, 1, -1):
        height, width = (
            max(multiple, size * eighths // 8 // multiple * multiple)
            for size in (data.height, data.width)
        )
        yield free | {"data.height": height, "data.width": width}


def in_words(keys: Mapping[str, Any]) -> str:
    """Settings as they are given on the command line."""
    return " ".join(f"{key}={json.dumps(value).strip(chr(34))}" for key, value in keys.items())
