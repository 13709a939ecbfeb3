"""One output folder -> one `report.html` that shows what the run did and opens anywhere.

The last stage of the flow. It reads what training left behind (config.json, metrics.jsonl, the
before/after videos, the headers of the LoRA files) and nothing else, so it can be made again at
any time, also of a run that is still going. What is missing is said in the page.
"""

import json
import statistics
from collections.abc import Sequence
from html import escape
from importlib.resources import files
from pathlib import Path
from string import Template
from typing import Any

from safetensors import SafetensorError, safe_open

from tempolora.config import ConfigError
from tempolora.files import replacing
from tempolora.results.charts import note, number, table
from tempolora.results.compare_page import comparison
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
from tempolora.results.side_by_side import VIDEO_CONTROLS, side_by_side

VIDEOS = {"before": "Before: base model", "after": "After: with the LoRA"}
AT_FULL_STRENGTH = "After: with the tempo LoRA at strength 1, asked for twice the speed"
FIRST_CAPTION = "the first caption of the data set (output.prompts is empty)"
MAX_LISTED = 12  # line numbers in a remark


def write_report(folder: Path) -> Path:
    """Write `folder/report.html` and return its path.

    The page refers to the mp4 files beside and below it and to nothing else. Raises ConfigError if
    config.json is missing or unreadable, or metrics.jsonl is missing or holds no step.
    """
    folder = Path(folder)
    config = _read_config(folder / "config.json")
    metrics, notes = _read_metrics(folder / "metrics.jsonl")
    heading = f"TempoLoRA: {folder.resolve().name}"
    compared, videos = comparison(folder), _videos(folder, config)
    page = Template(files("tempolora.results").joinpath("report_page.html").read_text("utf-8"))
    html = page.substitute(
        title=escape(heading),
        heading=escape(heading),
        facts=_facts(config),
        notes="".join(note(text) for text in notes),
        controls=VIDEO_CONTROLS if "<video " in compared + videos else "",
        comparison=compared,
        videos=videos,
        summary=_summary(folder, config, metrics),
        loras=_loras(folder, metrics, _kind(config)),
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

    Experts that train at once, or were killed then, have a file each beside the common one.

    A resumed run writes again the steps after its checkpoint: the later line counts. Lines that a
    killed run left torn are skipped. Step 0 is what was measured before training.
    """
    try:
        apart = sorted(path.parent.glob("metrics-*.jsonl"))
        paths = [path, *apart] if path.exists() or not apart else apart
        text = "\n".join(p.read_text(encoding="utf-8", errors="replace") for p in paths)
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
    titles = VIDEOS | ({"after": AT_FULL_STRENGTH} if _kind(config) == "tempo" else {})
    return "".join(
        side_by_side(folder, {title: pair[when] for when, title in titles.items()}, prompt)
        for pair, prompt in zip(pairs, prompts)
    )


def _summary(folder: Path, config: dict[str, Any], metrics: Metrics) -> str:
    planned = setting(config, "train.max_steps")
    terms = [term for term in TERMS if any(series(lines, term)[0] for lines in metrics.values())]
    head = ["Expert", "Steps", *(TERMS[term] for term in terms)]
    explained = "Losses are means over the last tenth of the steps, steps/s is the median."
    held_out = bool(by_expert(metrics, "held_out"))
    if held_out:
        head += ["Held-out before", "Held-out after"]
        explained += " Held-out loss is before training and as last measured."
    rows, kind = [], _kind(config)
    for expert, lines in metrics.items():
        done = lines[-1]["step"]
        steps = f"{done} of {planned}" if planned else str(done)
        losses = [_tail_mean(series(lines, term)[1]) for term in terms]
        if held_out:
            losses += [line.get("held_out") for line in first_and_last_held_out(lines)]
        seconds = series(lines, "seconds")[1]
        rate = number(1 / statistics.median(seconds)) if seconds else "not logged"
        file = folder / lora_file_name(expert, kind) if expert in EXPERTS else None
        size = _bytes(file.stat().st_size) if file and file.is_file() else "none yet"
        rows.append([escape(called(expert)), steps, *map(number, losses), rate, size])
    head += ["Steps/s", "LoRA file"]
    return table(head, rows, first_number=1) + f'<p class="caption">{explained}</p>'


def _kind(config: dict[str, Any]) -> str:
    """What the adapters are for: "tempo", else "rhythm"."""
    return "tempo" if setting(config, "lora.kind") == "tempo" else "rhythm"


def _loras(folder: Path, metrics: Metrics, kind: str) -> str:
    rows, notes, blocks = [], [], []
    trained = [name for name in EXPERTS if name in metrics]
    for expert in EXPERTS:
        path = folder / lora_file_name(expert, kind)
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
