"""One output folder -> one `report.html` that shows what the run did and opens anywhere.

The last stage of the flow. It reads what training left behind (config.json, metrics.jsonl, the
before/after videos, the headers of the LoRA files) and nothing else, so it can be made again at
any time, also of a run that is still going. What is missing is said in the page.
"""

import base64
import io
import itertools
import json
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
from tempolora.results.charts import note, number
from tempolora.results.curves import (
    TERMS,
    Metrics,
    by_expert,
    called,
    first_and_last_held_out,
    held_out_figures,
    series,
    setting,
    training_figures,
)
from tempolora.results.names import EXPERTS, lora_file_name, video_file_name

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
        notes="".join(note(text) for text in notes),
        videos=_videos(folder, config),
        summary=_summary(folder, config, metrics),
        loras=_loras(folder, metrics),
        held_out=held_out_figures(config, metrics),
        curves=training_figures(config, metrics),
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
    killed run left torn are skipped. Step 0 is what was measured before training.
    """
    try:
        text = path.read_text(encoding="utf-8", errors="replace")
    except OSError as error:
        raise ConfigError(
            f"{path}: cannot read ({error.strerror}); a report needs an output folder of training"
        ) from None
    by_step: dict[str, dict[int, dict[str, Any]]] = {}
    torn, repeated = [], 0
    for row, line in enumerate(text.split("\n"), start=1):
        if not line.strip():
            continue
        entry = _metrics_entry(line)
        if entry is None:
            torn.append(row)
            continue
        steps = by_step.setdefault(entry["expert"], {})
        repeated += entry["step"] > 0 and entry["step"] in steps
        steps[entry["step"]] = entry
    if not any(step > 0 for steps in by_step.values() for step in steps):
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
    """A line's values, or None for what no run has written whole.

    What is grouped gets names of its own, as in TensorBoard: flow_by_sigma/0.912.
    """
    try:
        entry = json.loads(line)
    except ValueError:
        return None
    whole = (
        isinstance(entry, dict)
        and isinstance(entry.get("expert"), str)
        and isinstance(entry.get("step"), int)
    )
    if not whole:
        return None
    values = {}
    for name, value in entry.items():
        grouped = isinstance(value, dict)
        values |= {f"{name}/{part}": v for part, v in value.items()} if grouped else {name: value}
    return values


def _torn_note(numbers: Sequence[int]) -> str:
    listed = ", ".join(map(str, numbers[:MAX_LISTED]))
    more = f" and {len(numbers) - MAX_LISTED} more" if len(numbers) > MAX_LISTED else ""
    return (
        f"Lines of metrics.jsonl that cannot be read and were left out: {len(numbers)} "
        f"(line {listed}{more}). A run that is killed while it writes leaves such a line."
    )


def _facts(config: dict[str, Any]) -> str:
    model, data = config.get("model", {}), config.get("data", {})
    fps = f"{data['fps']:g} fps" if data.get("fps") else "native frame rate"
    parts = [
        model.get("id"),
        model.get("variant"),
        model.get("task"),
        f"{data.get('num_frames')} frames, {data.get('width')} x {data.get('height')}, {fps}",
        f"LoRA: {setting(config, 'lora.target')}, rank {setting(config, 'lora.rank')}",
    ]
    line = " &middot; ".join(escape(str(part)) for part in parts if part)
    return f'<p class="soft">{line}</p>'


def _videos(folder: Path, config: dict[str, Any]) -> str:
    prompts = setting(config, "output.prompts") or [FIRST_CAPTION]
    pairs = [{when: video_file_name(when, n + 1) for when in VIDEOS} for n in range(len(prompts))]
    present = {name for pair in pairs for name in pair.values() if (folder / name).is_file()}
    if not present:
        if setting(config, "output.sample_steps") == 0:
            return note("No videos: output.sample_steps is 0.")
        names = " and ".join(pairs[0].values())
        return note(f"No videos: {names} are not in the folder; training writes them.")
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
            body = note(problems[when])
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
    planned = setting(config, "train.max_steps")
    terms = [term for term in TERMS if any(series(lines, term)[0] for lines in metrics.values())]
    head = ["Expert", "Steps", *(TERMS[term] for term in terms)]
    explained = "Losses are means over the last tenth of the steps, steps/s is the median."
    held_out = bool(by_expert(metrics, "held_out"))
    if held_out:
        head += ["Held-out before", "Held-out after"]
        explained += " Held-out loss is before training and as last measured."
    rows = []
    for expert, lines in metrics.items():
        done = lines[-1]["step"]
        steps = f"{done} of {planned}" if planned else str(done)
        losses = [_tail_mean(series(lines, term)[1]) for term in terms]
        if held_out:
            losses += [line.get("held_out") for line in first_and_last_held_out(lines)]
        seconds = series(lines, "seconds")[1]
        rate = number(1 / statistics.median(seconds)) if seconds else "not logged"
        file = folder / lora_file_name(expert) if expert in EXPERTS else None
        size = _bytes(file.stat().st_size) if file and file.is_file() else "none yet"
        rows.append([escape(called(expert)), steps, *map(number, losses), rate, size])
    head += ["Steps/s", "LoRA file"]
    return table(head, rows, first_number=1) + f'<p class="caption">{explained}</p>'


def _loras(folder: Path, metrics: Metrics) -> str:
    rows, notes, blocks = [], [], []
    trained = [name for name in EXPERTS if name in metrics]
    for expert in EXPERTS:
        path = folder / lora_file_name(expert)
        if not path.is_file():
            if expert in trained:
                notes.append(note(f"{path.name} is not there yet: training writes it at its end."))
            continue
        try:
            ranks, metadata = _lora_header(path)
        except (OSError, SafetensorError) as error:
            notes.append(note(f"{path.name} cannot be read: {error}"))
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
    listed = table(head, rows, first_number=1) if rows else ""
    return "".join(notes) + listed + "".join(blocks)


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


def _tail_mean(values: Sequence[float]) -> float | None:
    return statistics.fmean(values[-max(1, len(values) // 10) :]) if values else None


def _bytes(count: int) -> str:
    size = float(count)
    for unit in ("B", "KiB", "MiB"):
        if size < 1024:
            return f"{size:.4g} {unit}"
        size /= 1024
    return f"{size:.4g} GiB"


def table(head: Sequence[str], rows: Sequence[Sequence[str]], *, first_number: int) -> str:
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
