"""What a run says of itself while it trains: the numbers of a logged step, and the freeze alarm."""

import logging
import math
import time
from collections import deque
from typing import Any

import torch
from torch import Tensor

from tempolora.config import Config
from tempolora.train.flow import shift_sigma, u_range
from tempolora.train.objective import Objective, Outcome
from tempolora.train.step import Batch
from tempolora.train.work import work_of
from tempolora.train.world import World

log = logging.getLogger(__name__)

SIGMA_BINS = 9
FREEZE_WINDOW = 20  # logged steps that the alarm averages
FREEZE_BELOW = 0.7  # of the base's motion energy at the same sigma


def bin_centres(cfg: Config, expert: str) -> Tensor:
    """The nine sigmas at the middle of equal parts of the expert's unshifted time, rising."""
    low, high = u_range(cfg.variant, expert)
    u = low + (high - low) * (torch.arange(SIGMA_BINS, dtype=torch.float64) + 0.5) / SIGMA_BINS
    return shift_sigma(u, cfg.variant.shift)


def by_sigma(centres: Tensor, values: Tensor) -> dict[str, float]:
    """Values named by their bin's sigma; a bin that holds nothing (NaN) is left out."""
    pairs = zip(centres.tolist(), values.tolist(), strict=True)
    return {f"{sigma:.3f}": value for sigma, value in pairs if not math.isnan(value)}


class Watch:
    """Collects microsteps; `values` gives the line of metrics of a logged step."""

    def __init__(self, cfg: Config, expert: str, world: World) -> None:
        self._world = world
        self.centres = bin_centres(cfg, expert)
        low, high = u_range(cfg.variant, expert)
        inner = low + (high - low) * torch.arange(1, SIGMA_BINS, dtype=torch.float64) / SIGMA_BINS
        self._edges = shift_sigma(inner, cfg.variant.shift).float().to(world.device)
        self._bins = torch.zeros(2, SIGMA_BINS, device=world.device)  # sums of flow, and counts
        self._alarm = FreezeAlarm()
        work = work_of(cfg, expert)
        self._sample_flops = work.flops.total / work.batch
        self._tokens = work.tokens
        self.begin()

    def begin(self) -> None:
        """Start of a step."""
        self._began = time.perf_counter()
        self._waited = 0.0
        self._terms: list[dict[str, Tensor]] = []
        self.keys: list[str] = []  # the step's samples on this process

    def fetched(self) -> None:
        """The loader has given the step's samples: what went by since `begin` was waiting."""
        self._waited = time.perf_counter() - self._began

    def add(self, batch: Batch, outcome: Outcome) -> None:
        """One microstep; nothing here waits for the device."""
        self._terms.append(outcome.terms() | {"sigma": batch.sigma_B.mean()})
        self.keys += batch.keys
        self._last = batch, outcome  # the others' tensors are let go
        place_B = torch.bucketize(batch.sigma_B, self._edges)
        self._bins[0].index_add_(0, place_B, outcome.flow_B.float())
        self._bins[1].index_add_(0, place_B, torch.ones_like(outcome.flow_B, dtype=torch.float32))

    def values(self, objective: Objective, step: int, norm: Tensor, lr: float) -> dict[str, Any]:
        """The step's numbers, means over all processes. Copies from the device and so waits."""
        means = self._means(objective)
        shares = {n[6:]: means.pop(n) for n in list(means) if n.startswith("share/")}
        change, to_clip = means.pop("motion"), means.pop("motion_to_clip")
        values = means | {"grad_norm": norm.item(), "lr": lr}
        if shares:
            values["grad_share"] = shares
        if not math.isnan(change):
            values |= {"motion": math.exp(change), "motion_to_clip": math.exp(to_clip)}
            self._alarm.hear(step, change, to_clip, shares)
        values["flow_by_sigma"] = self._flow_by_sigma()
        seconds = time.perf_counter() - self._began
        samples = len(self.keys) * self._world.data_size
        values |= {
            "seconds": seconds,
            "samples_per_s": samples / seconds,
            "tokens_per_s": samples * self._tokens / seconds,
            "model_tflops": len(self.keys) * self._sample_flops / seconds / 1e12,
            "data_wait": self._waited / seconds,
        }
        if self._world.device.type == "cuda":
            values["peak_gib"] = torch.cuda.max_memory_reserved(self._world.device) / 2**30
        return values

    def _means(self, objective: Objective) -> dict[str, float]:
        terms = self._terms
        local = {name: torch.stack([row[name] for row in terms]).mean() for name in terms[0]}
        shares = objective.gradient_shares(*self._last)
        local |= {f"share/{name}": share for name, share in shares.items()}
        change_B, to_clip_B = objective.motion_change(*self._last)
        local |= {"motion": change_B.mean(), "motion_to_clip": to_clip_B.mean()}
        means = self._world.mean(torch.stack([v.float() for v in local.values()])).tolist()
        return dict(zip(local, means, strict=True))

    def _flow_by_sigma(self) -> dict[str, float]:
        """Since the last logged step."""
        sums, counts = self._world.mean(self._bins.clone()).cpu()
        self._bins.zero_()
        return by_sigma(self.centres, sums / counts)


class FreezeAlarm:
    """Warns where the clean estimate moves clearly less than the base's at the same sigma, and less
    than the clip does: an estimate that moves more than its clip is noisy, and may well calm down.
    """

    def __init__(self) -> None:
        self._heard: deque[tuple[float, float]] = deque(maxlen=FREEZE_WINDOW)

    def hear(self, step: int, change: float, to_clip: float, shares: dict[str, float]) -> None:
        """change, to_clip: log of the estimate's motion energy against the base's and against the
        clip's. shares: of the terms' gradients."""
        self._heard.append((change, to_clip))
        if len(self._heard) < FREEZE_WINDOW:
            return
        mean_change, mean_to_clip = (sum(log) / FREEZE_WINDOW for log in zip(*self._heard))
        ratio = math.exp(mean_change)
        if ratio >= FREEZE_BELOW or mean_to_clip >= 0:
            return
        self._heard.clear()  # speak again after as many steps
        heavy = max(shares, key=shares.get, default=None)
        advice = (
            f"the {heavy} term's gradient is {shares[heavy]:.0%} of the flow's: lower its weight"
            if heavy and shares[heavy] > 0.2
            else "no rhythm term is heavy: lower train.lr, or look for clips that hardly move"
        )
        log.warning(
            "step %d: freeze alarm: the clean estimate's motion energy is %.2f of what it was "
            "before training at the same sigma; %s",
            step,
            ratio,
            advice,
        )
