"""One output folder -> one `report.html` that shows what the run did and opens anywhere.

The last stage of the flow. It reads what training left behind (config.json, metrics.jsonl, the
before/after videos, the headers of the LoRA files) and nothing else, so it can be made again at
any time, also of a run that is still going. What is missing is said in the page.
"""

import base64
import io
import itertools
import json
import math
import statistics
from collections.abc import Iterable, Sequence
from html import escape
from importlib.resources import files
from pathlib import Path
from string import Template
from typing import Any

import av
import numpy as np
from PIL import Image
from safetensors import SafetensorError, safe_open

from tempolora.config import ConfigError
from tempolora.files import replacing
from tempolora.results.names import EXPERTS, lora_file_name, video_file_name

EXPERT_NAMES = {"single": "transformer", "high": "high-noise", "low": "low-noise"}
TERMS = {"loss": "Loss", "flow": "Flow term", "spectral": "Spectral term", "tv": "Smoothness term"}
WEIGHT_KEYS = {"spectral": "rhythm.spec_weight", "tv": "rhythm.tv_weight"}
OTHER_CURVES = {
    "grad_norm": "Gradient norm",
    "lr": "Learning rate",
    "sigma": "Mean sigma",
    "seconds": "Seconds per step",
    "samples_per_s": "Samples per second",
    "peak_gib": "Peak GPU memory in GiB",
}
VIDEOS = {"before": "Before: base model", "after": "After: with the LoRA"}
VIDEO_CONTROLS = (
    '<p class="controls"><button id="play" type="button">Pause</button></p>'
    '<p class="caption">Below each video: frames from first to last, then one row of pixels over '
    "time (time runs down). Still things draw vertical lines, motion slants them, flicker draws "
    "horizontal bands.</p>"
)
FIRST_CAPTION = "the first caption of the data set (output.prompts is empty)"
MAX_LISTED = 12  # line numbers in a remark
STRIP_FRAMES, STRIP_WIDTH = 4, 560  # frames in a strip; its width in pixels
SCHEDULED = {"lr"}  # known without noise: a running mean would only bend it
CHART_W, CHART_H = 340, 200
PLOT = (56, 8, CHART_W - 14, CHART_H - 34)  # left, top, right, bottom

Metrics = dict[str, list[dict[str, Any]]]


def write_report(folder: Path) -> Path:
    """Write `folder/report.html` and return its path.

    The page refers to the mp4 files beside it and to nothing else. Raises ConfigError if
    config.json is missing or unreadable, or metrics.jsonl is missing or holds no step.
    """
    folder = Path(folder)
    config = _read_config(folder / "config.json")
    metrics, notes = _read_metrics(folder / "metrics.jsonl")
    heading = f"TempoLoRA: {folder.resolve().name}"
    page = Template(files("tempolora.results").joinpath("report_page.html").read_text("utf-8"))
    html = page.substitute(
        title=escape(heading),
        heading=escape(heading),
        facts=_facts(config),
        notes="".join(_note(text) for text in notes),
        videos=_videos(folder, config),
        summary=_summary(folder, config, metrics),
        loras=_loras(folder, metrics),
        curves=_curves(config, metrics),
        config=escape(json.dumps(config, indent=2, ensure_ascii=False)),
    )
    path = folder / "report.html"
    with replacing(path) as temporary:
        temporary.write_text(html, encoding="utf-8")
    return path


def _read_config(path: Path) -> dict[str, Any]:
    try:
        config = json.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise ConfigError(
            f"{path}: cannot read ({error.strerror}); a report needs an output folder of training"
        ) from None
    except ValueError as error:
        raise ConfigError(f"{path}: not JSON: {error}") from None
    if not isinstance(config, dict):
        raise ConfigError(f"{path}: must hold one JSON object of sections")
    return config


def _read_metrics(path: Path) -> tuple[Metrics, list[str]]:
    """Per expert its lines in order of step, and remarks for the page.

    A resumed run writes again the steps after its checkpoint: the later line counts. Lines that a
    killed run left torn are skipped.
    """
    try:
        text = path.read_text(encoding="utf-8", errors="replace")
    except OSError as error:
        raise ConfigError(
            f"{path}: cannot read ({error.strerror}); a report needs an output folder of training"
        ) from None
    by_step: dict[str, dict[int, dict[str, Any]]] = {}
    torn, repeated = [], 0
    for number, line in enumerate(text.split("\n"), start=1):
        if not line.strip():
            continue
        entry = _metrics_entry(line)
        if entry is None:
            torn.append(number)
            continue
        steps = by_step.setdefault(entry["expert"], {})
        repeated += entry["step"] in steps
        steps[entry["step"]] = entry
    if not by_step:
        raise ConfigError(f"{path}: holds no steps; train first")
    notes = [_torn_note(torn)] if torn else []
    if repeated:
        notes.append(
            f"The run was resumed: {repeated} logged steps stand twice in metrics.jsonl, "
            "and the later line counts."
        )
    order = [name for name in EXPERTS if name in by_step]
    order += [name for name in by_step if name not in EXPERTS]
    return {name: [by_step[name][step] for step in sorted(by_step[name])] for name in order}, notes


def _metrics_entry(line: str) -> dict[str, Any] | None:
    """A line's values, or None for what no run has written whole."""
    try:
        entry = json.loads(line)
    except ValueError:
        return None
    whole = (
        isinstance(entry, dict)
        and isinstance(entry.get("expert"), str)
        and isinstance(entry.get("step"), int)
    )
    return entry if whole else None


def _torn_note(numbers: Sequence[int]) -> str:
    listed = ", ".join(map(str, numbers[:MAX_LISTED]))
    more = f" and {len(numbers) - MAX_LISTED} more" if len(numbers) > MAX_LISTED else ""
    return (
        f"Lines of metrics.jsonl that cannot be read and were left out: {len(numbers)} "
        f"(line {listed}{more}). A run that is killed while it writes leaves such a line."
    )


def _setting(config: dict[str, Any], key: str) -> Any:
    """The value at "section.key", or None if the run's config does not hold it."""
    section, _, name = key.partition(".")
    return config.get(section, {}).get(name)


def _note(text: str) -> str:
    return f'<p class="note">{escape(text)}</p>'


def _facts(config: dict[str, Any]) -> str:
    model, data = config.get("model", {}), config.get("data", {})
    fps = f"{data['fps']:g} fps" if data.get("fps") else "native frame rate"
    parts = [
        model.get("id"),
        model.get("variant"),
        model.get("task"),
        f"{data.get('num_frames')} frames, {data.get('width')} x {data.get('height')}, {fps}",
        f"LoRA: {_setting(config, 'lora.target')}, rank {_setting(config, 'lora.rank')}",
    ]
    line = " &middot; ".join(escape(str(part)) for part in parts if part)
    return f'<p class="soft">{line}</p>'


def _videos(folder: Path, config: dict[str, Any]) -> str:
    prompts = _setting(config, "output.prompts") or [FIRST_CAPTION]
    pairs = [{when: video_file_name(when, n + 1) for when in VIDEOS} for n in range(len(prompts))]
    present = {name for pair in pairs for name in pair.values() if (folder / name).is_file()}
    if not present:
        if _setting(config, "output.sample_steps") == 0:
            return _note("No videos: output.sample_steps is 0.")
        names = " and ".join(pairs[0].values())
        return _note(f"No videos: {names} are not in the folder; training writes them.")
    pairs_shown = "".join(map(_pair, itertools.repeat(folder), pairs, prompts))
    return (VIDEO_CONTROLS if "<video " in pairs_shown else "") + pairs_shown


def _pair(folder: Path, names: dict[str, str], prompt: str) -> str:
    """One prompt's videos side by side; names: "before" and "after" -> file name."""
    frames: dict[str, np.ndarray] = {}
    problems: dict[str, str] = {}
    for when, name in names.items():
        if not (folder / name).is_file():
            problems[when] = f"{name} is not in the folder."
            continue
        try:
            frames[when] = _read_frames(folder / name)
        except (av.FFmpegError, ValueError) as error:
            problems[when] = f"{name} cannot be read: {error}"
    row = _liveliest_row(frames.values())
    figures = []
    for when, title in VIDEOS.items():
        if when in problems:
            body = _note(problems[when])
        else:
            body = _video(names[when], title, frames[when], row[len(frames[when][0])])
        figures.append(f"<figure><h3>{escape(title)}</h3>{body}</figure>")
    said = f'<p class="prompt"><span class="soft">Prompt:</span> {escape(prompt)}</p>'
    return f'<div class="card videos">{said}<div class="pair">{"".join(figures)}</div></div>'


def _video(name: str, title: str, frames_FHW3: np.ndarray, row: int) -> str:
    count, height = frames_FHW3.shape[:2]
    strip = _png(_frame_strip(frames_FHW3))
    time_slice = _png(frames_FHW3[:, row])
    return (
        f'<video src="{name}" muted loop autoplay playsinline preload="auto"></video>'
        f'<img src="{strip}" alt="{escape(title)}: {STRIP_FRAMES} frames from first to last">'
        f'<img class="slice" src="{time_slice}" alt="{escape(title)}: row {row} over time">'
        f"<figcaption>{count} frames; row {row} of {height} over time</figcaption>"
    )


def _read_frames(path: Path) -> np.ndarray:
    with av.open(path) as container:
        frames = [frame.to_ndarray(format="rgb24") for frame in container.decode(video=0)]
    if not frames:
        raise ValueError("it holds no frames")
    return np.stack(frames)


def _liveliest_row(videos: Iterable[np.ndarray]) -> dict[int, int]:
    """Per frame height the pixel row that changes most over time.

    Videos of one height share their row, so that their slices can be compared.
    """
    change: dict[int, np.ndarray] = {}
    for frames_FHW3 in videos:
        by_row = np.zeros(frames_FHW3.shape[1])
        for before, after in itertools.pairwise(frames_FHW3):
            by_row += np.abs(after.astype(np.int16) - before).mean(axis=(1, 2))
        height = len(by_row)
        change[height] = change.get(height, 0) + by_row / len(frames_FHW3)
    return {height: int(by_row.argmax()) for height, by_row in change.items()}


def _frame_strip(frames_FHW3: np.ndarray) -> np.ndarray:
    chosen = frames_FHW3[np.linspace(0, len(frames_FHW3) - 1, STRIP_FRAMES).round().astype(int)]
    height, width = chosen.shape[1:3]
    small_width = min(width, STRIP_WIDTH // STRIP_FRAMES)
    size = (small_width, max(1, round(height * small_width / width)))
    return np.hstack([np.asarray(Image.fromarray(frame).resize(size)) for frame in chosen])


def _png(image_HW3: np.ndarray) -> str:
    buffer = io.BytesIO()
    Image.fromarray(image_HW3).save(buffer, format="PNG", optimize=True)
    return "data:image/png;base64," + base64.b64encode(buffer.getvalue()).decode("ascii")


def _summary(folder: Path, config: dict[str, Any], metrics: Metrics) -> str:
    planned = _setting(config, "train.max_steps")
    terms = [term for term in TERMS if any(_series(lines, term)[0] for lines in metrics.values())]
    head = ["Expert", "Steps", *(TERMS[term] for term in terms), "Steps/s", "LoRA file"]
    rows = []
    for expert, lines in metrics.items():
        done = lines[-1]["step"]
        steps = f"{done} of {planned}" if planned else str(done)
        finals = [_number(_tail_mean(_series(lines, term)[1])) for term in terms]
        seconds = _series(lines, "seconds")[1]
        rate = _number(1 / statistics.median(seconds)) if seconds else "not logged"
        file = folder / lora_file_name(expert) if expert in EXPERTS else None
        size = _bytes(file.stat().st_size) if file and file.is_file() else "none yet"
        rows.append([escape(EXPERT_NAMES.get(expert, expert)), steps, *finals, rate, size])
    explained = "Losses are means over the last tenth of the steps, steps/s is the median."
    return _table(head, rows, first_number=1) + f'<p class="caption">{explained}</p>'


def _loras(folder: Path, metrics: Metrics) -> str:
    rows, notes, blocks = [], [], []
    trained = [name for name in EXPERTS if name in metrics]
    for expert in EXPERTS:
        path = folder / lora_file_name(expert)
        if not path.is_file():
            if expert in trained:
                notes.append(_note(f"{path.name} is not there yet: training writes it at its end."))
            continue
        try:
            ranks, metadata = _lora_header(path)
        except (OSError, SafetensorError) as error:
            notes.append(_note(f"{path.name} cannot be read: {error}"))
            continue
        rank = ", ".join(str(rank) for rank in sorted(set(ranks)))
        size = _bytes(path.stat().st_size)
        rows.append([f"<code>{path.name}</code>", size, escape(rank), str(len(ranks))])
        listing = json.dumps(metadata, indent=2, ensure_ascii=False)
        blocks.append(
            f'<details class="card"><summary>Header of {path.name}</summary>'
            f"<pre>{escape(listing)}</pre></details>"
        )
    head = ["File", "Size", "Rank", "Adapted layers"]
    table = _table(head, rows, first_number=1) if rows else ""
    return "".join(notes) + table + "".join(blocks)


def _lora_header(path: Path) -> tuple[list[int], dict[str, Any]]:
    """The rank of every adapted layer, and the header's metadata with JSON values parsed."""
    with safe_open(path, framework="np") as file:
        down = [key for key in file.keys() if "lora_A" in key]  # noqa: SIM118 - no dict
        ranks = [file.get_slice(key).get_shape()[0] for key in down]
        metadata = file.metadata() or {}
    return ranks, {key: _parsed(value) for key, value in sorted(metadata.items())}


def _parsed(value: str) -> Any:
    try:
        return json.loads(value)
    except ValueError:
        return value


def _series(lines: list[dict[str, Any]], term: str) -> tuple[list[int], list[float]]:
    """Steps and values of one term, where it was logged as a finite number."""
    points = [
        (line["step"], float(line[term]))
        for line in lines
        if isinstance(line.get(term), int | float) and math.isfinite(line[term])
    ]
    return [step for step, _ in points], [value for _, value in points]


def _tail_mean(values: Sequence[float]) -> float | None:
    return statistics.fmean(values[-max(1, len(values) // 10) :]) if values else None


def _curves(config: dict[str, Any], metrics: Metrics) -> str:
    known = {**TERMS, **OTHER_CURVES}
    logged = {key for lines in metrics.values() for line in lines for key in line}
    further = sorted(logged - known.keys() - {"expert", "step"})
    charts = []
    for term, title in [*known.items(), *((name, name) for name in further)]:
        curves = {expert: _series(lines, term) for expert, lines in metrics.items()}
        if any(steps for steps, _ in curves.values()):
            chart = _chart(term, curves)
        elif term in TERMS:
            weight = WEIGHT_KEYS.get(term)
            why = f" ({weight} is {_setting(config, weight)})" if weight else ""
            chart = _note(f"{term} is not in metrics.jsonl{why}.")
        else:
            continue  # not a term of the loss: nothing was promised
        charts.append(f'<figure class="card chart"><h3>{escape(title)}</h3>{chart}</figure>')
    legend = "".join(
        f'<span><svg viewBox="0 0 16 6"><line class="line-{i % 3}" x2="16" y1="3" y2="3"/></svg>'
        f"{escape(EXPERT_NAMES.get(expert, expert))}</span>"
        for i, expert in enumerate(metrics)
    )
    explained = "<span class='soft'>thin: each logged step; thick: running mean</span>"
    return f'<p class="legend">{legend}{explained}</p><div class="charts">{"".join(charts)}</div>'


def _chart(term: str, curves: dict[str, tuple[list[int], list[float]]]) -> str:
    """One term over optimizer steps, every expert in its own colour, as inline SVG.

    The axis ends at twice the 98th percentile: a few outliers must not flatten the rest.
    """
    left, top, right, bottom = PLOT
    smoothed = {
        expert: values if term in SCHEDULED else _running_mean(values)
        for expert, (_, values) in curves.items()
    }
    every = [value for _, values in curves.values() for value in values]
    floor = min(0.0, *every)
    usual = float(np.quantile(every, 0.98, method="lower"))
    ceiling = min(max(every), floor + 2 * (usual - floor)) if usual > floor else max(every)
    ticks_y = _ticks(floor, ceiling)
    floor, ceiling = min(floor, ticks_y[0]), max(ceiling, ticks_y[-1])
    last = max(step for steps, _ in curves.values() for step in steps)
    ticks_x = _ticks(0, last, whole=True)
    end = max(last, 1)

    def points(steps: Sequence[int], values: Sequence[float]) -> str:
        xs = (left + (right - left) * step / end for step in steps)
        ys = (bottom - (bottom - top) * (value - floor) / (ceiling - floor) for value in values)
        return " ".join(f"{x:.1f},{y:.1f}" for x, y in zip(xs, ys, strict=True))

    parts = []
    for tick, label in zip(ticks_y, _tick_labels(ticks_y), strict=True):
        y = bottom - (bottom - top) * (tick - floor) / (ceiling - floor)
        parts.append(f'<line class="grid" x1="{left}" x2="{right}" y1="{y:.1f}" y2="{y:.1f}"/>')
        parts.append(f'<text x="{left - 6}" y="{y + 4:.1f}" text-anchor="end">{label}</text>')
    for tick in ticks_x:
        x = left + (right - left) * tick / end
        parts.append(f'<text x="{x:.1f}" y="{bottom + 15}" text-anchor="middle">{tick:.0f}</text>')
    middle_x, middle_y = (left + right) / 2, (top + bottom) / 2
    parts.append(f'<text x="{middle_x}" y="{CHART_H - 3}" text-anchor="middle">step</text>')
    parts.append(
        f'<text transform="translate(11 {middle_y}) rotate(-90)" text-anchor="middle">'
        f"{escape(term)}</text>"
    )
    # a nested svg clips to the plot without needing an id that is unique in the page
    parts.append(f'<svg x="{left}" y="{top}" width="{right - left}" height="{bottom - top}" ')
    parts.append(f'viewBox="{left} {top} {right - left} {bottom - top}">')
    for kind in ("raw", "smooth"):
        for i, (expert, (steps, values)) in enumerate(curves.items()):
            shown = values if kind == "raw" else smoothed[expert]
            parts.append(f'<polyline class="{kind} line-{i % 3}" points="{points(steps, shown)}"/>')
    parts.append("</svg>")
    above = sum(value > ceiling for value in every)
    caption = f"<figcaption>{above} of {len(every)} points lie above</figcaption>" if above else ""
    label = f"{term} over optimizer steps"
    return (
        f'<svg viewBox="0 0 {CHART_W} {CHART_H}" role="img" aria-label="{escape(label)}">'
        f"{''.join(parts)}</svg>{caption}"
    )


def _running_mean(values: Sequence[float]) -> list[float]:
    """Centred mean over a tenth of the run, with shorter windows at both ends."""
    reach = len(values) // 20
    total = np.concatenate([[0.0], np.cumsum(values)])
    index = np.arange(len(values))
    low, high = np.maximum(index - reach, 0), np.minimum(index + reach + 1, len(values))
    return ((total[high] - total[low]) / (high - low)).tolist()


def _ticks(low: float, high: float, *, whole: bool = False) -> list[float]:
    """Three to six round numbers that cover low to high (whole: inside it, integers)."""
    if high <= low:
        high = low + 1
    rough = (high - low) / 4
    size = 10.0 ** math.floor(math.log10(rough))
    step = next(size * factor for factor in (1, 2, 2.5, 5, 10) if size * factor >= rough * 0.999)
    if whole:
        step = max(1, round(step))
    first = math.floor(low / step + 1e-9)
    last = math.floor(high / step + 1e-9) if whole else math.ceil(high / step - 1e-9)
    return [index * step for index in range(first, last + 1)]


def _tick_labels(ticks: Sequence[float]) -> list[str]:
    """All in one form, and none so long that it would meet the name of the axis."""
    if 0.01 <= max(map(abs, ticks)) < 1e5:
        return [_number(tick) for tick in ticks]
    parts = (f"{tick:.2e}".split("e") for tick in ticks)
    return [
        f"{float(mantissa):g}e{int(power)}" if float(mantissa) else "0" for mantissa, power in parts
    ]


def _number(value: float | None) -> str:
    return "none" if value is None else f"{value:.4g}"


def _bytes(count: int) -> str:
    size = float(count)
    for unit in ("B", "KiB", "MiB"):
        if size < 1024:
            return f"{size:.4g} {unit}"
        size /= 1024
    return f"{size:.4g} GiB"


def _table(head: Sequence[str], rows: Sequence[Sequence[str]], *, first_number: int) -> str:
    """A table of ready HTML cells; columns from first_number on are right-aligned."""

    def line(cells: Sequence[str], tag: str) -> str:
        kinds = ("" if i < first_number else ' class="number"' for i in range(len(cells)))
        inner = (f"<{tag}{k}>{cell}</{tag}>" for k, cell in zip(kinds, cells, strict=True))
        return f"<tr>{''.join(inner)}</tr>"

    body = "".join(line(row, "td") for row in rows)
    return (
        f'<div class="card scroll"><table><thead>{line(head, "th")}</thead>'
        f"<tbody>{body}</tbody></table></div>"
    )
