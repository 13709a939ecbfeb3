"""Records of many seeds to differences with intervals, and the claims' thresholds applied to them.

Every figure is the mean of a linear combination of arms over paired samples, so that one two-level
bootstrap serves all. Shapes: S seed, or seed and model where there are several, N sample.
"""

import math
from collections.abc import Collection
from dataclasses import dataclass
from typing import Any

import numpy as np

from tempolora.rhythm.metrics import bootstrap_interval
from tempolora.study.arms import FILTERED

REFERENCE = "decoded"  # clean clips through the VAE
STRIDE_KINDS = ("walk", "pan")
LEAST_SEEDS = 3
HALF, ALIKE_POWER, ALIKE_MOTION, ALIKE_TEMPO, LEAST_SLOPE = 0.5, 1.10, 1.05, 1.10, 0.1
Runs = dict[str, dict[tuple[str, int], dict[str, Any]]]
"""arm -> (model, seed) -> record"""


@dataclass(frozen=True)
class Figure:
    """A mean with its 95 % interval, and how many seeds and samples of each it is of."""

    mean: float
    low: float
    high: float
    seeds: int
    samples: int

    @property
    def above(self) -> bool:
        return self.low > 0

    @property
    def below(self) -> bool:
        return self.high < 0

    def within(self, reach: float) -> bool:
        return -reach <= self.low and self.high <= reach


@dataclass(frozen=True)
class Finding:
    """One condition of a claim. holds: None where it was not measured."""

    claim: str
    condition: str
    figure: Figure | None
    holds: bool | None

    @property
    def verdict(self) -> str:
        """holds, fails or not measured; and where there are too few seeds to believe it."""
        said = {True: "holds", False: "fails", None: "not measured"}[self.holds]
        if self.figure and self.figure.seeds < LEAST_SEEDS:
            said += f", but on {self.figure.seeds} of {LEAST_SEEDS} seeds"
        return said


def by_arm(records: Collection[dict[str, Any]]) -> Runs:
    """Sort the records of a study."""
    runs: Runs = {}
    for record in records:
        key = record["config"]["model"]["id"], record["seed"]
        runs.setdefault(record["arm"], {})[key] = record
    return runs


def combine(
    runs: Runs, weights: dict[str, float], metric: str, kinds: Collection[str] = ()
) -> Figure | None:
    """Mean over samples of sum_arm weight * metric, over the seeds that all these arms have.

    Samples for which one of the values is not defined, in any of the seeds, are left out for all.
    kinds: of motion, if only some count. None where nothing is left.
    """
    values_SN = paired(runs, weights, metric, kinds)
    return None if values_SN is None else figure(values_SN)


def paired(
    runs: Runs, weights: dict[str, float], metric: str, kinds: Collection[str] = ()
) -> np.ndarray | None:
    """The combinations themselves, (S, N)."""
    seeds = sorted(set.intersection(*(set(runs.get(arm, ())) for arm in weights)))
    if not all(metric in runs[arm][seed]["metrics"] for arm in weights for seed in seeds):
        return None
    rows = []
    for seed in seeds:
        per_arm = [
            weight * np.array(runs[arm][seed]["metrics"][metric], np.float64)
            for arm, weight in weights.items()
        ]
        row = np.sum(per_arm, axis=0)
        shown = runs[next(iter(weights))][seed]["scenes"]["kind"]
        row[[bool(kinds) and kind not in kinds for kind in shown]] = np.nan
        rows.append(row)
    return _complete(rows)


def slopes(runs: Runs, arm: str) -> np.ndarray | None:
    """Least-squares slope of log2 dominant frequency on adapter strength, (S, N)."""
    rows = []
    for _, record in sorted(runs.get(arm, {}).items()):
        if "knob" not in record:
            return None
        strength = np.array(record["knob"]["strength"])
        hz_log2 = np.array(record["knob"]["hz_log2"], np.float64)  # (strengths, N)
        away = strength - strength.mean()
        rows.append(away @ hz_log2 / (away @ away))
    return _complete(rows)


def figure(values_SN: np.ndarray) -> Figure:
    """The two-level bootstrap interval of paired values."""
    return Figure(*bootstrap_interval(values_SN), *values_SN.shape)


def cell(found: Figure | None) -> str:
    """Mean and interval as a table has them; empty where nothing was measured."""
    if found is None:
        return ""
    digits = 3 if abs(found.mean) < 1 else 2
    mean, low, high = (f"{value:+.{digits}f}" for value in (found.mean, found.low, found.high))
    return f"{mean} [{low}, {high}]"


def findings(runs: Runs, plain: str, ours: str) -> list[Finding]:
    """The claims of docs/evidence.md, condition by condition."""
    return [
        *_flicker(runs, plain, ours),
        *_looks(runs, "temporal rows", "time_16/flow"),
        *_looks(runs, "temporal rows, amended", "time_16/anchor"),
        *_smoothness(runs, plain, ours),
        *_knob(runs, ours),
    ]


def _flicker(runs: Runs, plain: str, ours: str) -> list[Finding]:
    found = _nearer(runs, "flicker", "jitter_log2", ours, plain, HALF)
    for name, metric, alike in (
        ("power in 0.5 to 6 Hz within 10 % of plain's", "band_log2", ALIKE_POWER),
        ("motion amplitude within 5 % of plain's", "amplitude_log2", ALIKE_MOTION),
    ):
        gap = combine(runs, {ours: 1, plain: -1}, metric)
        found.append(_finding("flicker", name, gap, gap and gap.within(math.log2(alike))))
    for name, (_, measure) in FILTERED.items():
        other = "amplitude_log2" if measure == "jitter_log2" else "jitter_log2"
        found += _nearer(runs, "flicker, against a filter", other, ours, name)
    for metric in ("band_log2", "amplitude_log2"):
        found += _nearer(runs, "flicker, amended", metric, ours, plain)
    return found


def _nearer(
    runs: Runs,
    claim: str,
    metric: str,
    ours: str,
    other: str,
    share: float = 1.0,
    kinds: Collection[str] = (),
) -> list[Finding]:
    """|ours - clean| < share * |other - clean|, as two conditions without the bars."""
    away = combine(runs, {other: 1, REFERENCE: -1}, metric, kinds)
    signed = math.copysign(share, away.mean) if away else share
    found = []
    for name, side in (("above", 1), ("below", -1)):
        weights = {ours: side, other: -signed, REFERENCE: signed - side}
        gap = combine(runs, weights, metric, kinds)
        half = "half " if share == HALF else ""
        condition = f"{SAID[metric]}: how far {name} clean data's, less {half}that of `{other}`"
        found.append(_finding(claim, condition, gap, gap and gap.below))
    return found


SAID = {
    "jitter_log2": "power above 6 Hz",
    "band_log2": "power in 0.5 to 6 Hz",
    "amplitude_log2": "amplitude",
    "speed_log2": "speed",
}


def _looks(runs: Runs, claim: str, few: str) -> list[Finding]:
    many, random, found = "all_linear/flow", "random_16/flow", []
    for name, metric in LOOKS.items():
        gap = combine(runs, {few: 1, many: -HALF}, metric)
        found.append(_finding(claim, f"{name}, less half of all-linear's", gap, gap and gap.below))
    gap = combine(runs, {few: 1, many: -ALIKE_TEMPO}, "tempo_error")
    found.append(_finding(claim, "tempo error, less 1.1 of all-linear's", gap, gap and gap.below))
    for name, metric in {**LOOKS, "power above 6 Hz": "jitter_log2"}.items():
        gap = combine(runs, {few: 1, random: -1}, metric)
        found.append(_finding(claim, f"{name}, less random rows'", gap, gap and gap.below))
    return found


LOOKS = {
    "drift of colour": "drift_colour",
    "drift of shape": "drift_shape",
    "single-frame drift": "still_drift",
}


def _smoothness(runs: Runs, plain: str, ours: str) -> list[Finding]:
    gap = combine(runs, {ours: 1, plain: -1}, "jerk_log2", STRIDE_KINDS)
    speed = combine(runs, {ours: 1, plain: -1}, "speed_log2", STRIDE_KINDS)
    alike = speed and speed.within(math.log2(ALIKE_MOTION))
    return [
        _finding("walk and pan", "jerk of ours less plain's", gap, gap and gap.below),
        _finding("walk and pan", "speed within 5 % of plain's", speed, alike),
        *_nearer(runs, "walk and pan, amended", "speed_log2", ours, plain, kinds=STRIDE_KINDS),
    ]


def _knob(runs: Runs, ours: str) -> list[Finding]:
    values_SN = slopes(runs, ours)
    if values_SN is None:
        return [_finding("emergent knob", "slope of log2 frequency", None, None)]
    slope = figure(values_SN)
    signs = set(np.sign(values_SN.mean(axis=1)))
    holds = abs(slope.mean) >= LEAST_SLOPE and (slope.above or slope.below) and len(signs) == 1
    condition = "slope of log2 frequency at least 0.1, of one sign on every seed"
    return [_finding("emergent knob", condition, slope, holds)]


def _finding(claim: str, condition: str, gap: Figure | None, holds: bool | None) -> Finding:
    return Finding(claim, condition, gap, None if gap is None else bool(holds))


def _complete(rows: list[np.ndarray]) -> np.ndarray | None:
    """The samples that are defined in every seed."""
    if not rows:
        return None
    if len({len(row) for row in rows}) != 1:
        raise ValueError("the seeds have different numbers of samples")
    values_SN = np.stack(rows)
    values_SN = values_SN[:, np.isfinite(values_SN).all(axis=0)]
    return values_SN if values_SN.size else None
