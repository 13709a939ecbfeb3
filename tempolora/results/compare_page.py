"""compare.json -> the report's section on base, plain LoRA and ours: figures and videos."""

import json
from collections.abc import Mapping
from html import escape
from pathlib import Path
from statistics import fmean
from typing import Any

from tempolora.results.charts import note, number, table
from tempolora.results.side_by_side import side_by_side

COMPARED, RESULT = "compared", "compare.json"
ARMS = {"clean": "Clean", "base": "Base", "plain": "Plain LoRA", "ours": "Ours"}
"""Folder of an arm in `compared`, in the order of the page, and what it is called there."""
READ_TOGETHER = (
    "Means over {videos} videos of an arm, one for each prompt below; base, plain LoRA and ours "
    "start from the same noise. Clean is the scene that the prompt asks for, drawn without flicker "
    "and passed through the VAE; power is a multiple of its power (geometric mean; decoder's comb "
    "left out), so 1 is best in both columns. Plain LoRA is the same training as ours, {steps} "
    "steps of each expert on the same clips, with the weights of the rhythm terms at 0. All motion "
    "counts as flicker and some flicker as motion, and a frozen video has none of either: read the "
    "columns together. {videos} videos of one training show how it is done and prove nothing; the "
    "evidence is in docs/evidence.md."
)


def comparison(folder: Path) -> str:
    """The section for an output folder, with its heading; "" where nothing was compared."""
    path = folder / COMPARED / RESULT
    if not path.is_file():
        return ""
    heading = "<h2>Base, plain LoRA, ours</h2>"
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
        figures = _figures(found)
        captions = {str(name): str(caption) for name, caption in found["captions"].items()}
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        return heading + note(f"{path.name} cannot be read: {type(error).__name__}: {error}")
    cards = (
        side_by_side(folder, {t: f"{COMPARED}/{arm}/{name}" for arm, t in ARMS.items()}, caption)
        for name, caption in captions.items()
    )
    return heading + figures + "".join(cards)


def _figures(found: Mapping[str, Any]) -> str:
    (low, high), cutoff = found["band_hz"], found["cutoff_hz"]
    head = [
        "",
        "Flicker: change from frame to frame (levels of 255)",
        f"Power from {cutoff:g} Hz up (multiple of clean)",
        f"Power in {low:g} to {high:g} Hz (multiple of clean)",
        "Motion amplitude (levels, rms)",
    ]
    rows = []
    for arm, title in ARMS.items():
        videos = found["arms"][arm].values()
        mean = {name: fmean(v[name] for v in videos) for name in next(iter(videos))}
        power = [2 ** mean[f"{part}_log2"] for part in ("jitter", "band")]
        cells = [mean["flicker"], *power, mean["motion"]]
        rows.append([escape(title), *(number(cell) for cell in cells)])
    said = READ_TOGETHER.format(videos=len(found["captions"]), steps=found["train_steps"])
    return table(head, rows, first_number=1) + f'<p class="caption">{said}</p>'
