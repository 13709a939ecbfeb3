"""What `tempolora plan` prints: memory by part, the settings that are open, and what to change."""

import math
from collections.abc import Iterator
from typing import Any

from tempolora.config import Config
from tempolora.train.plan import (
    SPARE,
    Card,
    Plan,
    candidates,
    fitting,
    in_words,
    next_setting,
    other_peaks,
    preference,
    smallest,
)
from tempolora.train.rates import GIB
from tempolora.train.split import part_of, seconds, shares
from tempolora.train.work import tokens_of


class Report:
    """The plan of a configuration on a card. memory: bytes of the whole card, of which
    `card.room` may be taken. named: whether the user said which GPU it is.

    Where experts train at once, the plan is that of the smaller group."""

    def __init__(self, cfg: Config, card: Card, memory: float, named: bool) -> None:
        self._sizes = shares(cfg, card.gpus, card)
        self._hours = {
            expert: seconds(cfg, expert, self._sizes.get(expert, card.gpus), card) / 3600
            for expert in cfg.experts
        }
        self._total = card.gpus
        if self._sizes:
            card = part_of(card, min(self._sizes.values()))
        self._cfg, self._card, self._memory, self._named = cfg, card, memory, named
        plans = fitting(cfg, card)
        self.fits = bool(plans)
        self._plan = plans[0] if plans else smallest(cfg, card)
        self._all = sorted(candidates(cfg, card), key=preference(cfg))
        self._next = None if plans else next_setting(cfg, card)

    @property
    def plan(self) -> Plan:
        """The best that fits, or else the smallest."""
        return self._plan

    @property
    def group(self) -> int:
        """On how many GPUs: all, or those of the smaller of two groups."""
        return self._card.gpus

    @property
    def rates(self) -> str:
        """Where the seconds come from."""
        gpu = self._card.gpu
        if not self._named:
            found = "seconds are those of an H200, as no --gpu is named"
        elif gpu.measured:
            found = f"seconds are those of an {gpu.name}, whose rates were measured"
        else:
            found = f"seconds are an estimate for an {gpu.name}, from its data sheet"
        guessed = self._plan.settings.base == "nf4"
        return f"{found}; nf4 is taken to be as fast as bf16, not measured" if guessed else found

    @property
    def advice(self) -> str:
        """What to do, in a sentence."""
        if self.fits:
            return "it fits"
        if self._next is None:
            return "it does not fit, and no setting or smaller clip does"
        keys, plan = self._next
        cost = f"{plan.peak / GIB:.1f} GiB, {plan.seconds:.2f} s a step"
        return f"it does not fit; set {in_words(keys)} ({cost})"

    def as_json(self) -> dict[str, Any]:
        """The same for machines."""
        return {
            "fits": self.fits,
            "advice": self.advice,
            "change": self._next[0] if self._next else {},
            "gpu": self._card.gpu.name,
            "gpus": self._total,
            "expert_split": list(self._sizes.values()) or None,
            "hours": self._hours if all(map(math.isfinite, self._hours.values())) else None,
            "gpu_memory_gib": self._memory / GIB,
            "room_gib": self._card.room / GIB,
            "rates": self.rates,
            "tokens": tokens_of(self._cfg),
            **self._plan.as_json(),
            "other_peaks_gib": {n: b / GIB for n, b in self._others().items()},
            "choices": [p.as_json() | {"fits": self._card.holds(p)} for p in self._all],
        }

    def _others(self) -> dict[str, float]:
        return other_peaks(self._cfg, self._plan.settings)

    def _experts(self) -> Iterator[str]:
        """Who trains which expert, and for how long."""
        train = self._cfg.train
        for expert, hours in self._hours.items():
            gpus = self._sizes.get(expert, self._total)
            samples = train.batch_size * train.gradient_accumulation * gpus
            each = "a sample" if samples == 1 else f"{samples} samples"
            long = f"{hours:.2f} h" if math.isfinite(hours) else "does not fit"
            yield f"{expert} on {_gpus(gpus)}: {train.max_steps} steps of {each}: {long}"
        if self._sizes:
            yield "both experts at once (parallel.expert_split); below, the smaller group"
        elif len(self._hours) > 1:
            yield "one expert after the other"

    def lines(self) -> Iterator[str]:
        """The page, line by line."""
        cfg, card, plan = self._cfg, self._card, self._plan
        data = cfg.data
        yield (
            f"{cfg.model.variant}, {data.num_frames} frames of {data.height}x{data.width}: "
            f"{tokens_of(cfg)} tokens a sample, batch size {cfg.train.batch_size}"
        )
        yield (
            f"{_gpus(self._total)} of {self._memory / GIB:g} GiB: {card.room / GIB:.1f} may be "
            f"taken, the CUDA context and {SPARE:.0%} are left"
        )
        yield from self._experts()
        yield ""
        yield f"{_words(plan)}:"
        for name, size in plan.parts.items():
            yield f"  {name:28}{size / GIB:8.2f} GiB"
        yield f"  {'peak':28}{plan.peak / GIB:8.2f} GiB"
        if plan.pinned:
            yield f"  {'host memory, pinned':28}{plan.pinned / GIB:8.2f} GiB"
        for name, size in self._others().items():
            over = "" if size <= card.room else "  does not fit"
            yield f"  {name:28}{size / GIB:8.2f} GiB{over}"
        yield f"  {'a step':28}{plan.seconds:8.2f} s"
        if len(self._all) > 1:
            yield ""
            yield "choices, best first                                     GiB   pinned   s/step"
            for other in self._all:
                mark = "*" if other is self._plan or other == self._plan else " "
                over = "" if card.holds(other) else "  does not fit"
                yield (
                    f"{mark} {_words(other):49}{other.peak / GIB:8.1f} {other.pinned / GIB:8.1f} "
                    f"{other.seconds:8.2f}{over}"
                )
        yield ""
        yield f"{self.rates}; {self.advice}"


def _gpus(count: int) -> str:
    return "1 GPU" if count == 1 else f"{count} GPUs"


def _words(plan: Plan) -> str:
    settings = plan.settings
    kept = f" (kept_blocks {settings.kept_blocks})" if settings.checkpointing == "selective" else ""
    if settings.host_blocks:
        kept = f"{kept[:-1]}, host_blocks {settings.host_blocks})"
    return (
        f"{settings.engine}, {settings.base} on the {settings.placement}, "
        f"{settings.checkpointing}{kept}"
    )
