"""The soundtracks' records as tables: what came out, differences, and the claim's conditions.

Every figure is of `compare.combine`: a way that is sampled unguided or guided counts as an arm.
"""

import json
import math
from pathlib import Path

from tempolora.study.compare import Finding, Runs, cell, combine
from tempolora.study.sound import CLICKS_HZ, FOLDER, FORMAT, TRAINED_HZ, WAYS

COLUMNS = {
    "gain": "gain",
    "gain_late": "gain, half a beat late",
    "f1": "F1",
    "hz_share": "periodicity",
    "amplitude_log2": "amplitude, log2",
    "jitter_log2": "above 6 Hz, log2",
    "flicker": "flicker, levels",
}
LEAD = "gain less gain_late"
SAMPLED = ("unguided", "guided")
MOST = 1.1  # of the unguided


def sound_section(out: Path) -> list[str]:
    """Markdown lines; none where nothing was measured."""
    models = runs_of(out)
    if not models:
        return []
    lines = [
        "### Soundtracks",
        "",
        f"Each sample is asked to follow clicks at a rate of {_span(CLICKS_HZ)}; the LoRAs were "
        f"trained on clips with beats at {_span(TRAINED_HZ)}. Gain is the F1 of beats, matched "
        "minus shuffled. Mean and 95 % interval.",
        "",
    ]
    for model, runs in sorted(models.items()):
        lines += [f"#### {model}", "", *_ways(runs), "", *_differences(runs), ""]
        lines += ["Claim 6, of the base model:", "", *_claims(runs), ""]
    return lines


def runs_of(out: Path) -> dict[str, Runs]:
    """model -> "way, unguided" and "way, guided" -> (model, seed) -> record for `combine`."""
    models: dict[str, Runs] = {}
    for path in sorted(out.glob(f"*/{FOLDER}/*.json")):
        record = json.loads(path.read_text("utf-8"))
        if record["format"] != FORMAT:
            continue
        model = Path(record["config"]["model"]["id"]).name
        runs = models.setdefault(model, {})
        for name in SAMPLED:
            values = record[name]
            pairs = zip(values["gain"], values["gain_late"], strict=True)
            values[LEAD] = [own - late for own, late in pairs]
            of = {"metrics": values, "scenes": {"kind": record["kind"]}}
            runs.setdefault(f"{record['way']}, {name}", {})[model, record["seed"]] = of
    return models


def findings(runs: Runs) -> list[Finding]:
    """The conditions of claim 6, of the base model."""
    base, guided = "base, unguided", "base, guided"
    gain = combine(runs, {guided: 1}, "gain")
    more = combine(runs, {guided: 1, base: -1}, "gain")
    late = combine(runs, {guided: 1}, LEAD)
    power = combine(runs, {guided: 1, base: -1}, "jitter_log2")
    flicker = combine(runs, {guided: 1, base: -MOST}, "flicker")
    return [
        Finding("6", "gain, guided", gain, gain and gain.above),
        Finding("6", "gain, guided less unguided", more, more and more.above),
        Finding("6", "gain, guided, less that half a beat late", late, late and late.above),
        Finding(
            "6",
            f"log2 power above 6 Hz, guided less unguided: at most {math.log2(MOST):.3f}",
            power,
            power and power.high <= math.log2(MOST),
        ),
        Finding(
            "beside the threshold",
            f"flicker, guided less {MOST:g} of unguided: at most 0",
            flicker,
            flicker and flicker.high <= 0,
        ),
    ]


def _ways(runs: Runs) -> list[str]:
    head = ["way", "seeds x samples", *COLUMNS.values()]
    lines = [_line(head), "|" + " --- |" * len(head)]
    for arm in (f"{way}, {name}" for way in WAYS for name in SAMPLED):
        figures = [combine(runs, {arm: 1}, metric) for metric in COLUMNS]
        if figures[0]:
            count = f"{figures[0].seeds} x {figures[0].samples}"
            lines.append(_line([f"`{arm}`", count, *map(cell, figures)]))
    return lines


def _differences(runs: Runs) -> list[str]:
    pairs = [(f"{way}, guided", f"{way}, unguided") for way in WAYS]
    pairs += [(f"sound, {name}", f"plain, {name}") for name in SAMPLED]
    head = ["of the same captions, noise and clicks", *COLUMNS.values()]
    lines = [_line(head), "|" + " --- |" * len(head)]
    for arm, less in pairs:
        figures = [combine(runs, {arm: 1, less: -1}, metric) for metric in COLUMNS]
        if figures[0]:
            lines.append(_line([f"`{arm}` less `{less}`", *map(cell, figures)]))
    if {"sound, guided", "plain, guided"} <= set(runs):
        lines += [
            "",
            "Claim 7 has no threshold: what the sound term adds is `sound` less `plain`, the gain "
            "when guided, periodicity and amplitude when unguided.",
        ]
    return lines


def _claims(runs: Runs) -> list[str]:
    lines = ["| claim | condition | figure | verdict |", "| --- | --- | --- | --- |"]
    lines += [
        _line([found.claim, found.condition, cell(found.figure), found.verdict])
        for found in findings(runs)
    ]
    return lines


def _line(cells: list[str]) -> str:
    return f"| {' | '.join(cells)} |"


def _span(hz: tuple[float, float]) -> str:
    return f"{hz[0]:g} to {hz[1]:g} Hz"
