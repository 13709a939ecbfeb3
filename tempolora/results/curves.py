"""metrics.jsonl as figures: every number over the steps or by sigma, and what to look for in it.

Runs differ in what they log: a figure is there when its number is.
"""

import math
import statistics
from html import escape
from typing import Any

from tempolora.results.charts import (
    COLOURS,
    Curve,
    figure,
    measured_over_steps,
    note,
    over_sigma,
    over_steps,
)

Config = dict[str, Any]
"""A run's config.json: sections of settings."""

Lines = list[dict[str, Any]]
"""Lines of metrics.jsonl; what is grouped there has names of its own: flow_by_sigma/0.912."""

Metrics = dict[str, Lines]
"""Per expert its lines in order of step; step 0 is what was measured before training."""

CALLED = {"single": "transformer", "high": "high-noise", "low": "low-noise"}
TERMS = {
    "loss": "Loss",
    "flow": "Flow term",
    "spectral": "Spectral term",
    "tv": "Smoothness term",
    "sound": "Sound term",
    "rollout": "Rollout term",
    "anchor": "Anchor",
}
SETTINGS = {
    "spectral": "rhythm.spec_weight",
    "tv": "rhythm.tv_weight",
    "sound": "rhythm.sound_weight",
    "rollout": "rhythm.rollout_every",
    "anchor": "train.anchor_weight",
}
SELDOM = {"sound", "rollout", "anchor"}  # off by default: not missed where they are off
GROUPS = GRAD_SHARE, FLOW_BY_SIGMA, HELD_OUT_BY_SIGMA = (
    "grad_share/",
    "flow_by_sigma/",
    "held_out_by_sigma/",
)
OTHERS = {
    "motion_to_clip": "Motion over the clip's",
    "grad_norm": "Gradient norm",
    "lr": "Learning rate",
    "sigma": "Mean sigma",
    "seconds": "Seconds per step",
    "samples_per_s": "Samples per second",
    "tokens_per_s": "Tokens per second",
    "model_tflops": "Model TFLOP/s of the first process",
    "data_wait": "Share of a step spent waiting for data",
    "peak_gib": "Peak GPU memory in GiB",
}
MEANINGS = {
    "scaled": "Scaled at each sigma to be as large as the flow term of the base model. Look for it "
    "to fall further than the flow term.",
    "absolute": "Power above the cutoff in the clean estimate, scaled at each sigma to be as large "
    "as the flow term of the base model. Look for it to fall while motion stays near 1: a video "
    "that freezes lowers it too.",
    "rollout": "How far the band power of sampled clips lies outside that of real clips which move "
    "as much. Look for a fall toward 0, which is inside.",
    "anchor": "How far the adapters change what is predicted for a single frame, in the flow "
    "term's unit: 0 at first, since they start as nothing. Look for a value far below the flow "
    "term.",
    "grad_share": "Gradient of each weighted term over that of the flow term, at the prediction. "
    "Look for shares well below 1: at 1 a term pulls as hard as the flow term.",
    "motion": "Motion energy of the clean estimate over the base model's at the same sigma. Look "
    "for a mean near 1: where it stays below 0.7, motion may be freezing.",
    "flow_by_sigma": "Look for the sigmas where the error is largest.",
    "held_out": "Look for a fall that lasts: a rise while the training loss falls is overfitting. "
    "The axis need not begin at 0.",
    "held_out_by_sigma": "Look for the solid line below the dashed one.",
}
HELD_OUT = (
    '<p class="caption">Flow loss on clips that are not trained on, at fixed sigmas with fixed '
    "noise: unlike the training loss it can be compared between steps and runs.</p>"
)
SCHEDULED = {"lr"}  # known without noise: a running mean would only bend it
SMALL_DATA = "data.held_out is not set, and of few clips none is kept"


def training_figures(config: Config, metrics: Metrics) -> str:
    """Every number that was logged over the steps, and the flow term by sigma."""
    figures = [_term(config, metrics, term) for term in TERMS]
    figures += [_gradient_shares(metrics), _motion(metrics), _flow_by_sigma(metrics)]
    shown = {*TERMS, *OTHERS, "motion", "held_out", "expert", "step"}
    further = {n: n for n in _names(metrics) if n not in shown and not n.startswith(GROUPS)}
    for name, title in (OTHERS | further).items():
        if curves := by_expert(metrics, name):
            svg, outside = over_steps(name, curves, smooth=name not in SCHEDULED)
            figures.append(figure(title, svg, outside))
    explained = '<span class="soft">thin: each logged step; thick: running mean</span>'
    return _legend(metrics, explained) + f'<div class="charts">{"".join(figures)}</div>'


def held_out_figures(config: Config, metrics: Metrics) -> str:
    """The loss on clips that are not trained on, over the steps and by sigma."""
    curves = by_expert(metrics, "held_out")
    if not curves:
        return note(f"held_out is not in metrics.jsonl{_why_not_held_out(config)}.")
    figures = []
    for curve in curves:  # a chart each: experts differ by more than training changes
        whose = f", {called(list(metrics)[curve.colour])}" if len(metrics) > 1 else ""
        svg = measured_over_steps("held_out", [curve])
        figures.append(figure(f"Held-out loss{whose}", svg, MEANINGS["held_out"]))
    figures.append(_held_out_by_sigma(metrics))
    return HELD_OUT + _legend(metrics) + f'<div class="charts">{"".join(figures)}</div>'


def by_expert(metrics: Metrics, name: str, dash: int = 0) -> list[Curve]:
    """One number over the steps, of the experts that logged it, in the colour of each."""
    each = [series(lines, name) for lines in metrics.values()]
    return [Curve(*points, colour, dash) for colour, points in enumerate(each) if points[0]]


def series(lines: Lines, name: str) -> tuple[list[int], list[float]]:
    """Steps and values of one number, where it was logged and is finite."""
    points = [(line["step"], float(line[name])) for line in lines if _finite(line.get(name))]
    return [step for step, _ in points], [value for _, value in points]


def first_and_last_held_out(lines: Lines) -> tuple[dict[str, Any], dict[str, Any]]:
    """The lines with the held-out loss before training and as last measured; {} where missing."""
    measured = [line for line in lines if _finite(line.get("held_out"))]
    before = [line for line in measured if line["step"] == 0]
    after = [line for line in measured if line["step"] > 0]
    return before[0] if before else {}, after[-1] if after else {}


def setting(config: Config, key: str) -> Any:
    """The value at "section.key", or None if the run's config does not hold it."""
    section, _, name = key.partition(".")
    return config.get(section, {}).get(name)


def called(expert: str) -> str:
    """An expert's name in the page."""
    return CALLED.get(expert, expert)


def _term(config: Config, metrics: Metrics, term: str) -> str:
    """A term of the loss. Where it was not logged, its setting says why."""
    told = _told(config, SETTINGS[term]) if term in SETTINGS else ""
    curves = by_expert(metrics, term)
    if not curves:
        if term in SELDOM and not _is_on(setting(config, SETTINGS[term])):
            return ""
        why = f" ({told})" if told else ""
        return figure(TERMS[term], note(f"{term} is not in metrics.jsonl{why}."))
    svg, outside = over_steps(term, curves)
    told = f"{told}." if told else ""
    return figure(TERMS[term], svg, _meaning(config, metrics, term), told, outside)


def _meaning(config: Config, metrics: Metrics, term: str) -> str:
    scaled = any(name.startswith(FLOW_BY_SIGMA) for name in _names(metrics))
    if term not in SETTINGS or not scaled:  # runs that did not log it did not scale their terms
        return ""
    if term == "spectral" and setting(config, "rhythm.spec_form") == "absolute":
        return MEANINGS["absolute"]
    return MEANINGS.get(term, MEANINGS["scaled"])


def _gradient_shares(metrics: Metrics) -> str:
    terms = [n.removeprefix(GRAD_SHARE) for n in _names(metrics) if n.startswith(GRAD_SHARE)]
    terms.sort(key=[*TERMS, *terms].index)
    curves = [c for i, term in enumerate(terms) for c in by_expert(metrics, GRAD_SHARE + term, i)]
    if not curves:
        return ""
    svg, outside = over_steps("grad_share", curves)
    key = [TERMS.get(term, term) for term in terms]
    return figure("Gradient shares", svg, MEANINGS["grad_share"], outside, key=key)


def _motion(metrics: Metrics) -> str:
    curves = by_expert(metrics, "motion")
    if not curves:
        return ""
    svg, outside = over_steps("motion", curves, level=1.0)
    return figure("Motion", svg, MEANINGS["motion"], outside)


def _flow_by_sigma(metrics: Metrics) -> str:
    """Means over the last quarter of the run: one line holds few sigmas."""
    curves, spans = [], []
    for colour, (expert, lines) in enumerate(metrics.items()):
        last = lines[-1]["step"]
        first = last - max(1, last // 4) + 1
        seen: dict[float, list[float]] = {}
        for line in lines:
            for sigma, flow in _parts(line, FLOW_BY_SIGMA).items():
                if line["step"] >= first:
                    seen.setdefault(sigma, []).append(flow)
        if seen:
            sigmas = sorted(seen)
            curves.append(Curve(sigmas, [statistics.fmean(seen[s]) for s in sigmas], colour))
            spans.append(f"{called(expert)} {first} to {last}")
    if not curves:
        return ""
    when = f"Means over the last quarter of the steps ({', '.join(spans)})."
    svg = over_sigma("flow", curves)
    return figure("Flow term by sigma", svg, when, MEANINGS["flow_by_sigma"])


def _held_out_by_sigma(metrics: Metrics) -> str:
    curves, changes = [], []
    for colour, (expert, lines) in enumerate(metrics.items()):
        first, last = first_and_last_held_out(lines)
        before, after = _parts(first, HELD_OUT_BY_SIGMA), _parts(last, HELD_OUT_BY_SIGMA)
        for dash, losses in enumerate((after, before)):
            if losses:
                curves.append(Curve(list(losses), list(losses.values()), colour, dash))
        ratios = [after[sigma] / before[sigma] for sigma in after if before.get(sigma)]
        if ratios:
            low, high = (100 * (ratio - 1) for ratio in (min(ratios), max(ratios)))
            fell = f"{sum(ratio < 1 for ratio in ratios)} of {len(ratios)} sigmas"
            who = f"{called(expert)} at step {last['step']}".capitalize()
            changes.append(f"{who}: lower at {fell}; change {low:+.3g} to {high:+.3g} %.")
    if not curves:
        return ""
    svg = over_sigma("held_out", curves)
    key = ("as last measured", "before training")
    said = MEANINGS["held_out_by_sigma"]
    return figure("Held-out loss by sigma", svg, said, *changes, key=key)


def _why_not_held_out(config: Config) -> str:
    every, clips = setting(config, "train.validate_every"), setting(config, "data.held_out")
    if every is None:
        return ""  # a run of before there was such a loss
    if every and clips is None:
        return f" ({SMALL_DATA})"
    return f" ({_told(config, 'data.held_out' if every else 'train.validate_every')})"


def _parts(line: dict[str, Any], group: str) -> dict[float, float]:
    """{sigma: value} of a group in one line, finite values in order of sigma."""
    values = {float(n.removeprefix(group)): v for n, v in line.items() if n.startswith(group)}
    return {sigma: values[sigma] for sigma in sorted(values) if _finite(values[sigma])}


def _finite(value: Any) -> bool:
    return isinstance(value, int | float) and math.isfinite(value)


def _names(metrics: Metrics) -> list[str]:
    """Every name in metrics.jsonl, in order of the alphabet."""
    return sorted({name for lines in metrics.values() for line in lines for name in line})


def _told(config: Config, key: str) -> str:
    """A setting in words; a weight may be one for each expert."""
    value = setting(config, key)
    if isinstance(value, dict):
        value = ", ".join(f"{weight} ({called(expert)})" for expert, weight in value.items())
    return f"{key} is {value}"


def _is_on(weight: Any) -> bool:
    return any(weight.values()) if isinstance(weight, dict) else bool(weight)


def _legend(metrics: Metrics, explained: str = "") -> str:
    experts = "".join(
        f'<span><svg viewBox="0 0 16 6"><line class="line-{i % COLOURS}" x2="16" y1="3" y2="3"/>'
        f"</svg>{escape(called(expert))}</span>"
        for i, expert in enumerate(metrics)
    )
    return f'<p class="legend">{experts}{explained}</p>'
