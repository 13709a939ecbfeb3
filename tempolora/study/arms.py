"""What is compared: each arm is a LoRA target with a loss, or something to measure it by.

An arm is called `target/loss`; beside these there are the drawn clips themselves, the base model
and videos that are only filtered. Ranks are chosen so that all targets train as many parameters.
"""

from dataclasses import dataclass

from torch import nn

from tempolora.config import Config, ConfigError, load_config
from tempolora.model.targets import adapter_rows, target_modules

ROWS = 16  # per head, of the targets that write few
TOLERANCE = 1.05  # most parameters of a target over fewest
LEAST_RANK, MOST_RANK = 4, 32  # of the largest target


@dataclass(frozen=True)
class Target:
    """Which weights are trained. `rows` names where in each head B's rows lie, where not first."""

    lora: tuple[str, ...]
    rows: str | None = None
    rank: int | None = None
    """Set: not matched."""


@dataclass(frozen=True)
class Loss:
    """What is added to the flow loss: settings of the product's own terms, or another's loss."""

    settings: tuple[str, ...] = ()
    extra: str | None = None


def _few(rows: str | None = None, rank: int | None = None) -> Target:
    return Target(("lora.target=temporal", f"lora.time_rows={ROWS}"), rows, rank)


TARGETS = {
    "all_linear": Target(("lora.target=all_linear",)),
    "self_attention": Target(("lora.target=self_attention",)),
    "qk": Target(("lora.target=qk",)),
    "time_44": Target(("lora.target=temporal", "lora.time_rows=44")),
    "time_16": _few(),
    "random_16": _few("random"),
    "spatial_16": _few("spatial"),
    "default": _few(rank=16),
}
"""All but the last have as many parameters; that is the product's default."""


def _spectral(weight: float, *more: str) -> Loss:
    return Loss((f"rhythm.spec_weight={weight}", *more))


ABSOLUTE, ANCHOR = "rhythm.spec_form=absolute", "train.anchor_weight=5"
LOSSES = {
    "flow": Loss(),
    "tv": Loss(("rhythm.tv_weight=0.1",)),
    # Taken for frames at 16 fps, latent frames at 4 fps have 1.5 Hz where 6 Hz is meant.
    "absolute_latent": _spectral(
        0.2, ABSOLUTE, "rhythm.signal=latent", "rhythm.spec_cutoff_hz=1.5"
    ),
    "absolute_005": _spectral(0.05, ABSOLUTE),
    "absolute_02": _spectral(0.2, ABSOLUTE),
    "absolute_05": _spectral(0.5, ABSOLUTE),
    "absolute_1": _spectral(1.0, ABSOLUTE),
    "residual_005": _spectral(0.05),
    "residual_02": _spectral(0.2),
    "residual_1": _spectral(1.0),
    "rollout": Loss(("rhythm.rollout_every=4", "rhythm.rollout_weight=0.2")),
    "anchor": Loss((ANCHOR,)),
    "absolute_05_anchor": _spectral(0.5, ABSOLUTE, ANCHOR),
    "absolute_07_anchor": _spectral(0.7, ABSOLUTE, ANCHOR),
    "absolute_1_anchor": _spectral(1.0, ABSOLUTE, ANCHOR),
    "neighbour_frame": Loss(extra="neighbour_frame"),
    "frame_difference": Loss(extra="frame_difference"),
    "rhythm": _spectral(0.05, "rhythm.tv_weight=0.01"),
}
"""The last is the product's default."""

NO_TERMS = ("rhythm.spec_weight=0", "rhythm.tv_weight=0")
SETTINGS = (
    "model.id=tinywan",
    "model.variant=t2v_a14b",
    "model.base=fp32",
    "data.num_frames=49",
    "data.height=64",
    "data.width=64",
    "train.max_steps=400",
    "train.batch_size=64",
    "train.lr=1e-3",
    "train.optimizer=adamw",
    "train.checkpointing=none",
    "output.sample_steps=30",
)
"""Laid over the product's defaults, in all arms."""

DATA = ("clean", "flickering", "decoded", "decoded_flickering")
BASE, PLAIN, OURS = "base", "all_linear/flow", "all_linear/absolute_1_anchor"
FILTERED = {
    "lowpass_base": (BASE, "amplitude_log2"),
    "lowpass_plain": (PLAIN, "amplitude_log2"),
    "calm_base": (BASE, "jitter_log2"),
    "calm_plain": (PLAIN, "jitter_log2"),
}
"""What is filtered in time, and which measure comes down to that of ours: as much motion is left in
the first two, as much power above 6 Hz in the others."""
PRIMARY = (
    *DATA,
    BASE,
    PLAIN,
    "all_linear/residual_02",
    "all_linear/absolute_05",
    "all_linear/anchor",
    OURS,
    "all_linear/absolute_05_anchor",
    "time_16/flow",
    "time_16/anchor",
    "time_16/rhythm",
    "time_44/absolute_05_anchor",
    "random_16/flow",
    *FILTERED,
)
REST = tuple(
    name
    for name in (
        *(f"all_linear/{loss}" for loss in LOSSES),
        *(f"{target}/flow" for target in TARGETS),
        "default/rhythm",
    )
    if name not in PRIMARY
)


@dataclass(frozen=True)
class Arm:
    """One thing that is measured. target and loss: of a fine-tuning; else none."""

    name: str
    target: Target | None = None
    loss: Loss | None = None

    @property
    def file(self) -> str:
        return self.name.replace("/", "-")

    @property
    def is_tuned(self) -> bool:
        return self.target is not None


def arm(name: str) -> Arm:
    """The arm of this name. Raises ConfigError where there is none."""
    if name in (*DATA, BASE, *FILTERED):
        return Arm(name)
    target, _, loss = name.partition("/")
    if target not in TARGETS or loss not in LOSSES:
        raise ConfigError(
            f"--arms: there is no {name!r}; give {', '.join((*DATA, BASE, *FILTERED))}, or "
            f"TARGET/LOSS of {', '.join(TARGETS)} and {', '.join(LOSSES)}"
        )
    return Arm(name, TARGETS[target], LOSSES[loss])


def arms(names: list[str]) -> list[Arm]:
    """The named arms, each once; "primary", "rest" and "all" stand for several."""
    groups = {"primary": PRIMARY, "rest": REST, "all": (*PRIMARY, *REST)}
    every = [one for name in names for one in groups.get(name, (name,))]
    return [arm(name) for name in dict.fromkeys(every)]


def arm_config(of: Arm, seed: int, rank: int, settings: tuple[str, ...]) -> Config:
    """The whole configuration of an arm; `settings` are laid over those of the study."""
    chosen = [*SETTINGS, *settings, *NO_TERMS, f"train.seed={seed}"]
    if of.is_tuned:
        chosen += [*of.target.lora, f"lora.rank={rank}", *of.loss.settings]
    cfg = load_config(None, chosen)
    if cfg.task != "t2v" or cfg.variant.experts == ("single",):
        raise ConfigError("--set: the study is of text to video with two experts")
    return cfg


def parameters_per_rank(transformer: nn.Module, target: Target) -> int:
    """Trained parameters of an adapter of rank 1."""
    cfg = load_config(None, [*SETTINGS, *target.lora])
    heads = transformer.config.num_attention_heads
    rows = adapter_rows(cfg.lora, cfg.timebase, transformer.config.attention_head_dim)
    count = 0
    for name in target_modules(cfg.lora, transformer.config.num_layers):
        layer = transformer.get_submodule(name)
        count += layer.in_features + (layer.out_features if rows is None else heads * rows)
    return count


def matched_ranks(transformer: nn.Module) -> dict[str, int]:
    """A rank for each target, the least ones at which their parameters agree within 5 %.

    Raises ConfigError where no ranks do.
    """
    units = {name: parameters_per_rank(transformer, target) for name, target in TARGETS.items()}
    free = {name: unit for name, unit in units.items() if TARGETS[name].rank is None}
    fixed = {name: target.rank for name, target in TARGETS.items() if target.rank is not None}
    for rank in range(LEAST_RANK, MOST_RANK + 1):
        ranks = {name: round(rank * max(free.values()) / unit) for name, unit in free.items()}
        counts = [ranks[name] * unit for name, unit in free.items()]
        if max(counts) <= TOLERANCE * min(counts):
            return ranks | fixed
    raise ConfigError(f"--model: no ranks up to {MOST_RANK} give all targets as many parameters")
