"""A folder of videos -> metrics.json and evaluate.html: how they move and how much they flicker.

Each mp4 is decoded as it is, at its own size and rate, and measured by `results/measured.py`, one
after the other; reference clips are first brought to the videos' size, rate and length. What could
not be read or computed stands in both files, with the reason.
"""

import json
import logging
import math
import tempfile
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from torch import Tensor

from tempolora.config import ConfigError
from tempolora.data.clips import ClipRejected, Whole, WindowSpec, read_clip
from tempolora.files import replacing, write_json
from tempolora.progress import progress
from tempolora.results.evaluate_page import page
from tempolora.results.measured import (
    AUDIO,
    METRICS,
    REFERENCE,
    TRUTH,
    VIDEOS,
    Measured,
    Reference,
    Settings,
    Video,
    compare,
    judge,
    listen,
    measure,
    mover,
)
from tempolora.rhythm import metrics
from tempolora.variants import TEMPORAL_STRIDE

log = logging.getLogger(__name__)

MOST_PIXELS = 2**27  # of a video over all its frames; what is longer is measured up to there
LEAST_FRAMES = 2 * TEMPORAL_STRIDE + 1


def evaluate(
    videos: Path,
    out: Path,
    settings: Settings,
    *,
    reference: Path | None = None,
    truth: Path | None = None,
    audio: bool = False,
) -> Path:
    """Measure the mp4s of a folder; writes out/metrics.json and out/evaluate.html, returns that.

    reference: folder of clips that "log2 of reference" and the scores are relative to, best real
    ones decoded by the same VAE. Where every video has a namesake there, that is taken as it is;
    else clips are resampled as for training to what the first readable video is. truth: JSON
    object, file -> kind, hz, fps, track_px, colour. audio: match motion with the videos' own
    soundtracks. Raises ConfigError for what the user can mend; files that cannot be read are named
    in the results.
    """
    sources = {"--videos": list_mp4s(videos, "--videos")}
    if reference is not None:
        sources["--reference"] = list_mp4s(reference, "--reference")
    known = {} if truth is None else read_truth(truth, sources["--videos"])
    out.mkdir(parents=True, exist_ok=True)
    skipped: list[dict[str, str]] = []
    base = None
    masks_FHW: dict[str, Tensor] = {}
    if reference is not None:
        names = {path.name for path in sources["--videos"]}
        paired = names <= {path.name for path in sources["--reference"]}
        like = None if paired else _window_of(sources["--videos"], settings)
        measured = {}
        for video in _readable("--reference", sources["--reference"], settings, skipped, like):
            measured[video.name] = measure(video, settings)
            if video.name in known:
                mask_FHW = mover(video, known[video.name])[0][0]
                masks_FHW[video.name] = (metrics.LEVELS * mask_FHW).round().byte()
        base = Reference.of(measured, paired)
    found: dict[str, Measured] = {}
    for video in _readable("--videos", sources["--videos"], settings, skipped):
        result = found[video.name] = measure(video, settings)
        if base is not None:
            compare(result, video.name, base)
        if video.name in known:
            judge(result, video, known[video.name], masks_FHW.get(video.name), settings)
        if audio:
            listen(result, video)
    options = {VIDEOS: True, REFERENCE: base, TRUTH: known, AUDIO: audio}
    given = {option for option, value in options.items() if value}
    results = {
        "videos": str(videos),
        "reference": None if reference is None else str(reference),
        "truth": None if truth is None else str(truth),
        "paired": base is not None and base.paired,
        "cutoff_hz": settings.cutoff_hz,
        "band_hz": list(settings.band_hz),
        "mean": _means(found),
        "clips": {name: result.values for name, result in found.items()},
        "not_computed": _not_computed(found, given),
        "skipped": skipped,
    }
    if base is not None:
        results["reference_clips"] = {name: m.values for name, m in base.clips.items()}
    write_json(out / "metrics.json", results)
    with replacing(out / "evaluate.html") as temporary:
        temporary.write_text(page(results), encoding="utf-8")
    return out / "evaluate.html"


# --- Reading --------------------------------------------------------------------------------------


def list_mp4s(folder: Path, option: str) -> list[Path]:
    """The mp4 files of a folder, by name. Raises ConfigError where there is none."""
    if not folder.is_dir():
        raise ConfigError(f"{option}: there is no folder {folder}")
    found = sorted(p for p in folder.iterdir() if p.suffix.lower() == ".mp4" and p.name[0] != ".")
    if not found:
        raise ConfigError(f"{option}: there is no .mp4 file in {folder}")
    return found


def read_truth(path: Path, videos: Sequence[Path]) -> dict[str, dict[str, Any]]:
    """What is known of the videos, by file name. Raises ConfigError naming the entry at fault."""
    try:
        known = json.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise ConfigError(f"--truth: {path}: cannot read ({error.strerror})") from None
    except ValueError as error:
        raise ConfigError(f"--truth: {path}: not JSON: {error}") from None
    if not isinstance(known, dict):
        raise ConfigError(f"--truth: {path}: must hold one JSON object, file name -> what is known")
    known = {video.name: known[video.name] for video in videos if video.name in known}
    if not known:
        raise ConfigError(f"--truth: {path}: names none of the videos; its keys are file names")
    for name, entry in known.items():
        if fault := _fault_in(entry):
            raise ConfigError(f"--truth: {path}: {name}: {fault}")
    return known


def _fault_in(entry: Any) -> str | None:
    def numbers(value: Any, length: int | None = None) -> bool:
        return (
            isinstance(value, list)
            and (length is None or len(value) == length)
            and all(type(v) in (int, float) and math.isfinite(v) for v in value)
        )

    if not isinstance(entry, dict):
        return "must be an object"
    track = entry.get("track_px")
    if not isinstance(entry.get("kind"), str):
        return "kind must be a word"
    for key in ("hz", "fps"):
        if not (numbers([entry.get(key)]) and entry[key] > 0):
            return f"{key} must be a number above 0"
    if not numbers(entry.get("colour"), 3):
        return "colour must be [r, g, b] in 0..255"
    if not (isinstance(track, list) and len(track) >= LEAST_FRAMES):
        return f"track_px must be a list of [x, y], one a frame, at least {LEAST_FRAMES}"
    if not all(numbers(place, 2) for place in track):
        return "track_px must be a list of [x, y]"
    return None


def _window_of(paths: Sequence[Path], settings: Settings) -> WindowSpec:
    """What the first readable video is: its rate, length and size."""
    video = next(_readable("--videos", paths, settings, []))
    frames, height, width, _ = video.frames_FHW3.shape
    return WindowSpec(video.fps, frames, height, width, "first", 1, "auto")


def _readable(
    option: str,
    paths: Sequence[Path],
    settings: Settings,
    skipped: list[dict[str, str]],
    like: WindowSpec | None = None,
) -> Iterator[Video]:
    """The videos one after the other; what cannot be read is added to `skipped`, with the reason.

    Raises ConfigError where none can be read.
    """
    read, first_reason = 0, ""
    for path in progress(paths, what=option.lstrip("-"), unit="video"):
        with tempfile.TemporaryDirectory(prefix="tempolora_evaluate_") as scratch:
            try:
                video = read_video(path, Path(scratch), settings.decode_timeout_s, like)
            except ClipRejected as reason:
                first_reason = first_reason or str(reason)
                skipped.append({"folder": option, "file": path.name, "why": str(reason)})
                log.warning("%s: left out: %s", option, reason)
                continue
            yield video
            read += 1
    if not read:
        raise ConfigError(f"{option}: none of {len(paths)} videos can be read; {first_reason}")


def read_video(
    path: Path, scratch: Path, timeout_s: float, like: WindowSpec | None = None
) -> Video:
    """Decode an mp4 in a process of its own; frames stay in `scratch`.

    Whole, at its own size and rate, but no more than MOST_PIXELS; or a window `like` that. Raises
    ClipRejected where it cannot be read, cannot give such a window, or its frames are not evenly
    spaced: what would have to be made up is not measured.
    """
    clip = read_clip(path, like or Whole(LEAST_FRAMES, MOST_PIXELS), scratch, timeout_s)
    return Video(path.name, clip.windows[0].frames, like.fps if like else clip.source_fps, clip)


# --- Results --------------------------------------------------------------------------------------


def _means(found: dict[str, Measured]) -> dict[str, dict[str, float | int | None]]:
    """Per metric the mean over videos and its 95 % bootstrap interval, none for a single video."""
    means = {}
    for name in METRICS:
        values = [result.values[name] for result in found.values() if name in result.values]
        if values:
            mean, low, high = metrics.bootstrap_interval(np.array(values))
            interval = (low, high) if len(values) > 1 else (None, None)
            means[name] = dict(zip(("mean", "low", "high"), (mean, *interval)))
            means[name]["videos"] = len(values)
    return means


def _not_computed(found: dict[str, Measured], given: set[str]) -> list[dict[str, Any]]:
    """What could not be had, by reason: why, the metrics, and the videos it holds for."""
    lacking: dict[tuple[str, tuple[str, ...]], list[str]] = {}
    for name, (_, _, needs) in METRICS.items():
        reasons: dict[str, list[str]] = {}
        for video, result in found.items():
            if name not in result.values:
                known = result.missing.get(name, f"{needs} does not know the video")
                why = known if needs in given else f"{needs} was not given"
                reasons.setdefault(why, []).append(video)
        for why, videos in reasons.items():
            lacking.setdefault((why, tuple(videos)), []).append(name)
    return [
        {"why": why, "metrics": names, "videos": list(videos)}
        for (why, videos), names in lacking.items()
    ]
