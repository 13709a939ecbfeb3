"""metrics.json -> evaluate.html: one page that needs nothing beside it."""

from collections.abc import Sequence
from html import escape
from importlib.resources import files
from pathlib import Path
from typing import Any

from tempolora.results.charts import Curve, figure, note, number, scatter, table
from tempolora.results.measured import METRICS

READ_TOGETHER = (
    "Intervals: 95 %, bootstrap over videos. Flicker, jerk and warping error are best in a frozen "
    "video; read them beside the motion, or take the scores, which are 0 where nothing moves."
)


def page(results: dict[str, Any]) -> str:
    """The page; `results` is what stands in metrics.json."""
    videos, reference = results["videos"], results["reference"]
    heading = f"TempoLoRA: {Path(videos).resolve().name}, measured"
    sheet = files("tempolora.results").joinpath("report_page.html").read_text("utf-8")
    style = sheet[sheet.index("<style>") : sheet.index("</style>") + len("</style>")]
    low, high = results["band_hz"]
    how = "the clips of the same names" if results["paired"] else "the mean over all clips"
    facts = [
        f"{len(results['clips'])} videos",
        f"band {low:g} to {high:g} Hz, cutoff {results['cutoff_hz']:g} Hz",
        f"relative to {how} in {reference}" if reference else "relative to nothing: no --reference",
    ]
    skipped = [f"{entry['why']} ({entry['folder']})" for entry in results["skipped"]]
    counted = "1 file" if len(skipped) == 1 else f"{len(skipped)} files"
    notes = [f"Left out, {counted}: " + "; ".join(skipped)] if skipped else []
    return f"""<!doctype html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<title>{escape(heading)}</title>
{style}
</head>
<body>
<header>
<h1>{escape(heading)}</h1>
<p class="soft">{" &middot; ".join(map(escape, facts))}</p>
</header>
{"".join(map(note, notes))}
<h2>Means over the videos</h2>
{_mean_table(results["mean"])}
<p class="caption">{READ_TOGETHER}</p>
<h2>Flicker against motion</h2>
{_flicker_against_motion(results)}
<h2>Each video</h2>
{_clip_table(results["clips"])}
<h2>Not computed</h2>
{_missing_table(results["not_computed"], len(results["clips"]))}
</body>
</html>
"""


def _mean_table(means: dict[str, dict[str, Any]]) -> str:
    rows = []
    for name, found in means.items():
        title, unit, _ = METRICS[name]
        interval = (
            "" if found["low"] is None else f"{number(found['low'])} to {number(found['high'])}"
        )
        cells = [
            escape(title),
            f"<code>{name}</code>",
            escape(unit),
            number(found["mean"]),
            interval,
        ]
        rows.append([*cells, str(found["videos"])])
    return table(["Metric", "Name", "Unit", "Mean", "Interval", "Videos"], rows, first_number=3)


def _clip_table(clips: dict[str, dict[str, float]]) -> str:
    names = [name for name in METRICS if any(name in values for values in clips.values())]
    rows = [
        [escape(clip), *(number(values[n]) if n in values else "" for n in names)]
        for clip, values in clips.items()
    ]
    return table(["Video", *names], rows, first_number=1)


def _missing_table(entries: Sequence[dict[str, Any]], videos: int) -> str:
    if not entries:
        return note("Everything could be computed.")
    rows = [
        [
            escape(entry["why"]),
            escape(", ".join(entry["metrics"])),
            "all" if len(entry["videos"]) == videos else escape(", ".join(entry["videos"])),
        ]
        for entry in entries
    ]
    return table(["Why", "Metrics", "Videos"], rows, first_number=3)


def _flicker_against_motion(results: dict[str, Any]) -> str:
    groups = {"videos": results["clips"], "reference": results.get("reference_clips", {})}
    curves, legend = [], ""
    for colour, (name, clips) in enumerate(groups.items()):
        points = [v for v in clips.values() if "motion" in v]
        if points:
            flicker = [values["jitter_rms"] for values in points]
            curves.append(Curve([values["motion"] for values in points], flicker, colour))
            legend += (
                f'<span><svg viewBox="0 0 30 6"><line class="line-{colour}" x2="30" y1="3" y2="3"/>'
                f"</svg>{name}</span>"
            )
    if not curves:
        return note("No video is long enough for a spectrum.")
    said = "Each dot is a video. Good is low and far to the right; a frozen video lies at 0, 0."
    chart = scatter("change above the cutoff", "motion in the band", curves)
    drawn = figure("Levels of 255, rms", chart, said)
    return f'<p class="legend">{legend}</p><div class="charts">{drawn}</div>'
