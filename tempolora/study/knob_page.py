"""The knob's records as a table: slope, fit and order of the speeds that came out, and the rest.

Shapes: S seed, A asked speed, N sample.
"""

import json
import math
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
from scipy.stats import spearmanr

from tempolora.study.compare import Figure, figure
from tempolora.study.knob import BASE_HZ, FOLDER, FORMAT, clips_path
from tempolora.study.pictures import draw_speeds
from tempolora.variants import VARIANTS

SHOWN_WAY = "guide"
FPS = VARIANTS["t2v_a14b"].fps
FLAT = {
    "amplitude_log2": "amplitude, log2",
    "jitter_log2": "above 6 Hz, log2",
    "area_error": "area error, log2",
    "colour_error": "colour error, dE",
}
HEAD = (
    "way",
    "seeds x samples",
    "slope",
    "R² of the mean",
    "rank correlation, each seed",
    "log2 of measured over own speed, at each asked",
    *(f"{name}: largest change" for name in FLAT.values()),
    "claim 5 fails by",
)
SLOPE, R2, RANK, SHARE = (0.9, 1.1), 0.95, 0.9, 0.1


def knob_section(out: Path) -> list[str]:
    """Markdown lines; none where nothing was measured."""
    rows = [_row(way, records) for way, records in sorted(_by_way(out).items())]
    if not rows:
        return []
    low, high = BASE_HZ
    return [
        "### Tempo knob",
        "",
        f"Samples that move at {low:g} to {high:g} Hz where no other speed is asked for.",
        "",
        f"| {' | '.join(HEAD)} |",
        "|" + " --- |" * len(HEAD),
        *rows,
        "",
    ]


def draw_knob(out: Path, docs: Path) -> None:
    """`pictures.draw_speeds` of SHOWN_WAY, where its clips are at hand."""
    for record in sorted(out.glob(f"*/{FOLDER}/{SHOWN_WAY}-*.json")):
        if clips_path(record).is_file():
            asked = json.loads(record.read_text("utf-8"))["asked"]
            draw_speeds(clips_path(record), [2**step for step in asked], FPS, docs)
            return


def _by_way(out: Path) -> dict[str, list[dict[str, Any]]]:
    ways: dict[str, list[dict[str, Any]]] = {}
    for record in _records(out):
        ways.setdefault(f"{Path(record['model']).name}: {record['way']}", []).append(record)
    return ways


def _records(out: Path) -> Iterator[dict[str, Any]]:
    for path in sorted(out.glob(f"*/{FOLDER}/*.json")):
        record = json.loads(path.read_text("utf-8"))
        if record["format"] == FORMAT:
            yield record


def octaves(record: dict[str, Any]) -> tuple[np.ndarray, np.ndarray]:
    """Asked (A,) and measured (A, N) log2 speeds of the samples whose own speed is in range."""
    asked_A = np.array(record["asked"])
    hz_AN = _values(record, "hz_log2")
    return asked_A, hz_AN - hz_AN[np.abs(asked_A).argmin()]


def _values(record: dict[str, Any], metric: str) -> np.ndarray:
    """Of the samples whose own speed is in range and found at every asked one (A, N)."""
    hz_AN = np.array(record["metrics"]["hz_log2"], np.float64)
    own_N = hz_AN[np.abs(record["asked"]).argmin()]
    low, high = (math.log2(hz) for hz in BASE_HZ)
    fit_N = np.isfinite(hz_AN).all(axis=0) & (own_N >= low) & (own_N <= high)
    return np.array(record["metrics"][metric], np.float64)[:, fit_N]


def fit(asked_A: np.ndarray, gap_AN: np.ndarray) -> tuple[np.ndarray, float, float]:
    """Slope of each sample (N,), R² of the mean over samples, Spearman's rank correlation."""
    away_A = asked_A - asked_A.mean()
    slope_N = away_A @ gap_AN / (away_A @ away_A)
    mean_A = gap_AN.mean(axis=1)
    left_A = mean_A - mean_A.mean() - slope_N.mean() * away_A
    spread = np.square(mean_A - mean_A.mean()).sum()
    r2 = 1 - np.square(left_A).sum() / spread if spread else 0.0
    asked_AN = np.broadcast_to(asked_A[:, None], gap_AN.shape)
    rank = spearmanr(asked_AN.ravel(), gap_AN.ravel()).statistic if spread else 0.0
    return slope_N, float(r2), float(rank)


def _row(way: str, records: list[dict[str, Any]]) -> str:
    asked_A, _ = octaves(records[0])
    gaps = [octaves(record)[1] for record in records]
    count = min(gap_AN.shape[1] for gap_AN in gaps)
    if not count:
        return f"| `{way}` | {len(records)} x 0 |" + " |" * (len(HEAD) - 2)
    fits = [fit(asked_A, gap_AN) for gap_AN in gaps]
    slope = figure(np.stack([slope_N[:count] for slope_N, _, _ in fits]))
    _, r2, _ = fit(asked_A, np.concatenate(gaps, axis=1))
    ranks = ", ".join(f"{rank:.2f}" for _, _, rank in fits)
    mean_A = np.concatenate(gaps, axis=1).mean(axis=1)
    came_out = ", ".join(f"{a:+.2f}: {m:+.2f}" for a, m in zip(asked_A, mean_A, strict=True))
    changes = (f"{_largest_change(records, metric):+.3f}" for metric in FLAT)
    misses = ", ".join(_misses(records, slope, r2, [rank for _, _, rank in fits])) or "nothing"
    cells = [f"{len(records)} x {count}", _interval(slope), f"{r2:.3f}", ranks, came_out, *changes]
    cells.append(misses)
    return f"| `{way}` | {' | '.join(cells)} |"


def _misses(
    records: list[dict[str, Any]], slope: Figure, r2: float, ranks: list[float]
) -> Iterator[str]:
    """The conditions of claim 5 that do not hold."""
    octave = math.log2(1 + SHARE)
    if not SLOPE[0] <= slope.low <= slope.high <= SLOPE[1]:
        yield "slope"
    if not r2 > R2:
        yield "R²"
    if not min(ranks) > RANK:
        yield "rank"
    for metric, name in (("amplitude_log2", "amplitude"), ("area_error", "area")):
        if abs(_largest_change(records, metric)) > octave:
            yield name
    before = _means(records, "colour_error")[np.abs(records[0]["asked"]).argmin()]
    if abs(_largest_change(records, "colour_error")) > SHARE * before:
        yield "colour"


def _means(records: list[dict[str, Any]], metric: str) -> np.ndarray:
    """Over the samples of all seeds, of each asked speed (A,)."""
    values_AN = np.concatenate([_values(record, metric) for record in records], axis=1)
    return np.nanmean(values_AN, axis=1)


def _largest_change(records: list[dict[str, Any]], metric: str) -> float:
    """Of the mean over samples, from the clip's own speed to any other."""
    mean_A = _means(records, metric)
    change_A = mean_A - mean_A[np.abs(records[0]["asked"]).argmin()]
    return float(change_A[np.abs(change_A).argmax()])


def _interval(found: Figure) -> str:
    return f"{found.mean:+.2f} [{found.low:+.2f}, {found.high:+.2f}]"
