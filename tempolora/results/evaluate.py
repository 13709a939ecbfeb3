"""A folder of videos -> metrics.json and evaluate.html: how they move and how much they flicker.

Each mp4 is decoded as it is, at its own size and rate, and measured by `rhythm/metrics.py`. What
a metric needs beside the videos (real clips, their truth, sound) may be missing: then the metric is
left out, and the reason stands in both files. docs/metrics.md says what each of them means.

Shapes: F video frame, G = F - 1 steps from frame to frame, H, W height and width.
"""

import json
import logging
import math
import tempfile
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from html import escape
from importlib.resources import files
from itertools import pairwise
from pathlib import Path
from typing import Any

import av
import cv2
import numpy as np
import torch
import torch.nn.functional as nnf
from torch import Tensor
from tqdm import tqdm

from tempolora.config import ConfigError
from tempolora.data import resample
from tempolora.data.audio import has_sound, onset_envelope
from tempolora.data.clips import ClipRejected, DecodedClip, WindowSpec, read_clip
from tempolora.files import replacing, write_json
from tempolora.results import charts
from tempolora.results.charts import Curve, figure, note, number
from tempolora.results.report import _table as table
from tempolora.rhythm import metrics
from tempolora.rhythm.tempo import LUMA
from tempolora.timebase import TimeBase
from tempolora.variants import TEMPORAL_STRIDE

log = logging.getLogger(__name__)

MOST_PIXELS = 2**27  # of a video over all its frames; what is longer is measured up to there
LEAST_FRAMES = 2 * TEMPORAL_STRIDE + 1
SAME_RATE = 0.005
TEMPO_SIDE = 32  # blocks in each direction whose luma tells the frequency
ONSET_RATE_HZ = 100
TRACK_ERROR_PX = 0.05  # what the tracker is known to; smaller movements are not told apart
PANS = {"pan"}
UNTRACKED = {  # kinds of motion whose mover cannot be followed by its colour
    "pulse": "the mover of a pulse stays where it is",
    "spin": "the hub and blades of a spinner are too like its mover",
    "water": "the water is too like what floats on it",
}

VIDEOS, REFERENCE, TRUTH, AUDIO = "the videos", "--reference", "--truth", "--audio"

METRICS = {
    "flicker": ("Flicker", "levels of 255", VIDEOS),
    "vbench_flickering": ("VBench temporal_flickering", "0..1", VIDEOS),
    "motion": ("Motion in the band", "levels rms", VIDEOS),
    "band_rms": ("All change in the band", "levels rms", VIDEOS),
    "jitter_rms": ("Change above the cutoff", "levels rms", VIDEOS),
    "comb_rms": ("Change on the decoder's comb", "levels rms", VIDEOS),
    "visible_flicker": ("Visible flicker", "% contrast rms", VIDEOS),
    "warping_error": ("Warping error, estimated flow", "levels", VIDEOS),
    "dominant_hz": ("Dominant frequency", "Hz", VIDEOS),
    "dominant_share": ("Its share of all change", "0..1", VIDEOS),
    "band_log2": ("Power in the band", "log2 of reference", REFERENCE),
    "jitter_log2": ("Excess power above the cutoff", "log2 of reference", REFERENCE),
    "comb_log2": ("Power on the comb", "log2 of reference", REFERENCE),
    "motion_retained": ("Motion retained", "share, at most 1", REFERENCE),
    "flicker_score": ("Score: flicker and motion", "0..1", REFERENCE),
    "visible_flicker_score": ("Score: visible flicker and motion", "0..1", REFERENCE),
    "warping_score": ("Score: warping and motion", "0..1", REFERENCE),
    "hz_log2": ("Dominant frequency", "log2 of true", TRUTH),
    "amplitude_log2": ("Amplitude of the track", "log2 of true", TRUTH),
    "jerk_log2": ("Jerk of the track", "log2 of true", TRUTH),
    "jerk_score": ("Score: jerk and amplitude", "0..1", TRUTH),
    "track_jitter_px": ("Track above the cutoff", "px rms", TRUTH),
    "track_jitter_log2": ("Track above the cutoff", "log2 of true", TRUTH),
    "colour_error": ("Colour of the mover", "dE 1976", TRUTH),
    "area_log2": ("Area of the mover", "log2 of reference", TRUTH),
    "shape_overlap": ("Shape of the mover", "IoU, centred", TRUTH),
    "beat_precision": ("Beats of motion with an onset", "share", AUDIO),
    "beat_recall": ("Onsets with a beat of motion", "share", AUDIO),
    "beat_f1": ("Both ways (F1 at 50 ms)", "0..1", AUDIO),
    "beat_chance": ("The same, sound shuffled", "0..1", AUDIO),
    "beat_gain": ("Matched minus shuffled", "-1..1", AUDIO),
}
"""Name -> title, unit and what it needs, in the order of the table."""
READ_TOGETHER = (
    "Intervals: 95 %, bootstrap over videos. Flicker, jerk and warping error are best in a frozen "
    "video; read them beside the motion, or take the scores, which are 0 where nothing moves."
)


@dataclass(frozen=True)
class Settings:
    """What counts as jitter and as natural motion, in Hz; how long decoding may take, in s."""

    cutoff_hz: float
    band_hz: tuple[float, float]
    decode_timeout_s: float


@dataclass(frozen=True)
class Video:
    """A decoded file: uint8 RGB (F, H, W, 3) at `fps` Hz, with its sound where it has one."""

    name: str
    frames_FHW3: np.ndarray
    fps: float
    clip: DecodedClip


@dataclass
class Measured:
    """The numbers of one video at `fps` Hz, and of each that could not be had the reason."""

    fps: float
    values: dict[str, float]
    missing: dict[str, str]

    def put(self, name: str, value: Tensor | float, reason: str = "") -> None:
        """Keep a number; where it is none, the reason."""
        assert name in METRICS, name
        value = float(value)
        if math.isfinite(value):
            self.values[name] = value
        else:
            self.missing[name] = reason

    def lack(self, names: Sequence[str], reason: str) -> None:
        self.missing |= dict.fromkeys(names, reason)


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
    ones decoded by the same VAE. truth: JSON object, file -> kind, hz, fps, track_px, colour.
    audio: match motion with the videos' own soundtracks. Raises ConfigError for what the user can
    mend; files that cannot be read are named in the results.
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
        measured = {}
        for video in _readable("--reference", sources["--reference"], settings, skipped):
            measured[video.name] = measure(video, settings)
            if video.name in known:
                mask_FHW = _mover(video, known[video.name])[0][0]
                masks_FHW[video.name] = (metrics.LEVELS * mask_FHW).round().byte()
        names = {path.name for path in sources["--videos"]}
        base = Reference.of(measured, paired=names <= {p.name for p in sources["--reference"]})
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


def _readable(
    option: str, paths: Sequence[Path], settings: Settings, skipped: list[dict[str, str]]
) -> Iterator[Video]:
    """The videos one after the other; what cannot be read is added to `skipped`, with the reason.

    Raises ConfigError where none can be read.
    """
    read, first_reason = 0, ""
    for path in tqdm(paths, option.lstrip("-"), unit="video", disable=None):
        with tempfile.TemporaryDirectory(prefix="tempolora_evaluate_") as scratch:
            try:
                video = read_video(path, Path(scratch), settings.decode_timeout_s)
            except ClipRejected as reason:
                first_reason = first_reason or str(reason)
                skipped.append({"folder": option, "file": path.name, "why": str(reason)})
                log.warning("%s: left out: %s", option, reason)
                continue
            yield video
            read += 1
    if not read:
        raise ConfigError(f"{option}: none of {len(paths)} videos can be read; {first_reason}")


def read_video(path: Path, scratch: Path, timeout_s: float) -> Video:
    """Decode an mp4 at its own size and rate in a process of its own; frames stay in `scratch`.

    At most MOST_PIXELS of it. Raises ClipRejected where it cannot be read or its frames are not
    evenly spaced: what would have to be made up is not measured.
    """
    spec = _as_it_is(path)
    clip = read_clip(path, spec, scratch, timeout_s)
    if clip.rotation % 180:
        spec = replace(spec, height=spec.width, width=spec.height)
        clip = read_clip(path, spec, scratch, timeout_s)
    return Video(path.name, clip.windows[0].frames, spec.fps, clip)


def _as_it_is(path: Path) -> WindowSpec:
    """The window that is the whole file, from its packets; nothing is decoded."""
    try:
        with av.open(path, format="mov") as container:  # named, so that no playlist is followed
            if not container.streams.video:
                raise ClipRejected(f"{path.name}: it has no video stream")
            stream = container.streams.video[0]
            height, width = stream.height, stream.width
            packets = [p for p in container.demux(stream) if p.size and not p.is_discard]
            pts_s = np.sort([float(p.pts * p.time_base) for p in packets if p.pts is not None])
    except (av.error.FFmpegError, OSError) as error:
        raise ClipRejected(f"{path.name}: it cannot be opened ({error.strerror})") from None
    if len(pts_s) < LEAST_FRAMES:
        raise ClipRejected(f"{path.name}: it has {len(pts_s)} frames, {LEAST_FRAMES} are needed")
    if np.diff(pts_s).min() <= 0:
        raise ClipRejected(f"{path.name}: two of its frames share a timestamp")
    fps = resample.source_fps(pts_s)
    picks = resample.plan_picks(resample.clock(pts_s, fps), fps)
    if len(picks) != len(pts_s) or any(pick.at for pick in picks):
        raise ClipRejected(f"{path.name}: its frames are not evenly spaced in time")
    num_frames = min(len(pts_s), MOST_PIXELS // (height * width))
    if num_frames < LEAST_FRAMES:
        raise ClipRejected(f"{path.name}: {width}x{height} is too large; scale it down")
    return WindowSpec(fps, num_frames, height, width, "first", 1, "auto")


# --- Measuring ------------------------------------------------------------------------------------


def measure(video: Video, settings: Settings) -> Measured:
    """What the video alone tells."""
    result = Measured(video.fps, {}, {})
    frames_FHW3, fps = video.frames_FHW3, video.fps
    luma_FHW = luma_of(frames_FHW3)
    changes = [cv2.absdiff(a, b).mean() for a, b in pairwise(frames_FHW3)]
    flicker = float(np.mean(changes))  # as metrics.flicker, without a float copy of the video
    result.put("flicker", flicker)
    result.put("vbench_flickering", metrics.vbench_flickering(torch.tensor(flicker)))
    _measure_spectrum(result, luma_FHW[None], fps, settings)
    result.put("warping_error", warping_error(frames_FHW3), "no pixel has a trustworthy flow")
    low, high = settings.band_hz
    try:
        small = nnf.adaptive_avg_pool2d(luma_FHW, [min(TEMPO_SIDE, n) for n in luma_FHW.shape[1:]])
        hz_N, share_N = metrics.dominant_hz(small.flatten(1)[None], fps, (low, high))
    except ValueError as error:
        result.lack(["dominant_hz", "dominant_share"], str(error))
    else:
        result.put("dominant_hz", hz_N[0], "nothing moves")
        result.put("dominant_share", share_N[0])
    return result


def luma_of(frames_FHW3: np.ndarray) -> Tensor:
    """uint8 RGB to float32 luma (F, H, W) in 0..1, one frame at a time."""
    weights = torch.tensor(LUMA) / 255
    return torch.stack([torch.from_numpy(np.array(f)).float() @ weights for f in frames_FHW3])


def _measure_spectrum(result: Measured, luma_NFHW: Tensor, fps: float, settings: Settings) -> None:
    frames = luma_NFHW.shape[1]
    timebase = TimeBase(fps, (frames - 1) // TEMPORAL_STRIDE * TEMPORAL_STRIDE + 1)
    try:
        bins = metrics.bins_of(timebase, settings.cutoff_hz, settings.band_hz)
    except ValueError as error:
        names = ["motion", "band_rms", "jitter_rms", "comb_rms", "visible_flicker"]
        return result.lack(names, str(error))
    power_NK = metrics.spectral_power(luma_NFHW, timebase)
    result.put("motion", metrics.motion_amplitude(power_NK, bins)[0])
    for name in ("band", "jitter", "comb"):
        variance_N = metrics.pooled(power_NK, getattr(bins, name))
        result.put(f"{name}_rms", metrics.LEVELS * variance_N[0].sqrt())
    seen_N = metrics.visible_flicker(luma_NFHW, timebase, settings.cutoff_hz)
    result.put("visible_flicker", seen_N[0])


def warping_error(frames_FHW3: np.ndarray) -> float:
    """metrics.warping_error in levels with the flow that resampling estimates (dense inverse
    search), on pictures shrunk as there; only where flow there and back agree."""
    grays = [cv2.cvtColor(np.array(frame), cv2.COLOR_RGB2GRAY) for frame in frames_FHW3]
    shrink = math.ceil(min(grays[0].shape) / resample.FLOW_SIDE)
    if shrink > 1:
        size = grays[0].shape[1] // shrink, grays[0].shape[0] // shrink
        grays = [cv2.resize(gray, size, interpolation=cv2.INTER_AREA) for gray in grays]
    pairs = list(pairwise(grays))
    forth_GHW2, back_GHW2 = (
        torch.from_numpy(np.stack([resample._flow(*pair) for pair in way]))
        for way in (pairs, [(after, now) for now, after in pairs])
    )
    valid_GHW = metrics.consistent(forth_GHW2, back_GHW2)
    luma_FHW = torch.from_numpy(np.stack(grays)).float() / 255
    return float(metrics.warping_error(luma_FHW[None], forth_GHW2[None], valid_GHW[None])[0])


# --- Comparing ------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Reference:
    """What videos are measured by: clips of one rate (Hz), and their numbers.

    paired: every video has a clip of its own name here and is measured by that one alone.
    """

    fps: float
    clips: dict[str, Measured]
    paired: bool

    @classmethod
    def of(cls, clips: dict[str, Measured], paired: bool) -> "Reference":
        """Raises ConfigError where the clips run at several rates."""
        rates = sorted(clip.fps for clip in clips.values())
        if rates[-1] > rates[0] * (1 + SAME_RATE):
            raise ConfigError(
                f"--reference: its clips run at {rates[0]:.4g} to {rates[-1]:.4g} fps; "
                "give clips of one rate, that of the videos"
            )
        return cls(rates[0], clips, paired)

    def values(self, name: str, video: str) -> Tensor:
        """A number of the clips that this video is measured by, of those that have it, (M,)."""
        clips = [c for key, c in self.clips.items() if key == video or not self.paired]
        return torch.tensor([c.values[name] for c in clips if name in c.values])


SCORES = {
    "flicker_score": "flicker",
    "visible_flicker_score": "visible_flicker",
    "warping_score": "warping_error",
}


def compare(result: Measured, video: str, base: Reference) -> None:
    """What the video is relative to its reference clips."""
    names = [name for name, (_, _, needs) in METRICS.items() if needs == REFERENCE]
    if abs(result.fps / base.fps - 1) > SAME_RATE:
        why = f"the video runs at {result.fps:.4g} fps and the reference at {base.fps:.4g}"
        return result.lack(names, why)
    if "motion" not in result.values:
        return result.lack(names, result.missing["motion"])
    motion, moves_M = torch.tensor(result.values["motion"]), base.values("motion", video)
    if not len(moves_M) or moves_M.mean() == 0:
        return result.lack(names, "nothing moves in the reference, or it is too short to tell")
    for name in ("band", "jitter", "comb"):
        rms = torch.tensor([result.values[f"{name}_rms"]]), base.values(f"{name}_rms", video)
        power_N, power_M = ((r / metrics.LEVELS).square() for r in rms)
        result.put(f"{name}_log2", metrics.excess_log2(power_N, power_M)[0])
    result.put("motion_retained", metrics.retained(motion, moves_M.mean()))
    for score, name in SCORES.items():
        defect_M = base.values(name, video)
        if name not in result.values or not len(defect_M):
            result.lack([score], result.missing.get(name, "the reference has none"))
            continue
        defect = torch.tensor(result.values[name])
        result.put(score, metrics.score(defect, motion, defect_M.mean(), moves_M.mean()))
    return None


TRACKS = ("amplitude_log2", "jerk_log2", "jerk_score", "track_jitter_px", "track_jitter_log2")


def judge(
    result: Measured,
    video: Video,
    known: dict[str, Any],
    true_FHW: Tensor | None,
    settings: Settings,
) -> None:
    """What the video is against what is known of it.

    true_FHW: uint8 mask of the mover in the reference clip of the same name, where there is one.
    """
    names = [name for name, (_, _, needs) in METRICS.items() if needs == TRUTH]
    if abs(result.fps / known["fps"] - 1) > SAME_RATE:
        why = f"the video runs at {result.fps:.4g} fps and its truth at {known['fps']:.4g}"
        return result.lack(names, why)
    if "dominant_hz" in result.values:
        result.put("hz_log2", math.log2(result.values["dominant_hz"] / known["hz"]))
    else:
        result.lack(["hz_log2"], result.missing["dominant_hz"])
    mask_NFHW, colour_N3, video_NF3HW = _mover(video, known)
    _judge_shape(result, known, mask_NFHW, true_FHW)
    result.put("colour_error", metrics.colour_error(video_NF3HW, mask_NFHW, colour_N3))
    if known["kind"] in UNTRACKED:
        return result.lack(TRACKS, UNTRACKED[known["kind"]])
    if known["kind"] in PANS:
        found_NF2 = metrics.pan_track(luma_of(video.frames_FHW3)[None])
    else:
        found_NF2 = metrics.centroid(mask_NFHW)
    if lost := int(found_NF2.isnan().any(-1).sum()):
        result.lack(TRACKS, f"nothing of the mover's colour in {lost} frames")
        result.put("jerk_score", 0.0)
        return None
    true_NF2, fps = torch.tensor(known["track_px"])[None].float(), result.fps
    swing, true_swing = (metrics.track_amplitude(track) for track in (found_NF2, true_NF2))
    jerk, true_jerk = (metrics.jerk(track, fps) for track in (found_NF2, true_NF2))
    # what noise of that size in each frame makes of the third difference, weights 1, 3, 3, 1
    jerk_error = TRACK_ERROR_PX * math.sqrt(20) * fps**3
    result.put("amplitude_log2", metrics.ratio_log2(swing, true_swing, TRACK_ERROR_PX))
    result.put("jerk_log2", metrics.ratio_log2(jerk, true_jerk, jerk_error))
    result.put(
        "jerk_score",
        metrics.score(jerk, swing, true_jerk.clamp(min=jerk_error), true_swing),
        "the true track does not move",
    )
    jitter, true_jitter = (
        metrics.track_jitter(track, fps, settings.cutoff_hz) for track in (found_NF2, true_NF2)
    )
    result.put("track_jitter_px", jitter)
    result.put("track_jitter_log2", metrics.ratio_log2(jitter, true_jitter, TRACK_ERROR_PX))
    return None


def _mover(video: Video, known: dict[str, Any]) -> tuple[Tensor, Tensor, Tensor]:
    """Where the mover is (1, F, H, W), its true colour (1, 3), and the video (1, F, 3, H, W)."""
    video_NF3HW = torch.from_numpy(np.array(video.frames_FHW3)).movedim(-1, 1)[None].float() / 255
    colour_N3 = torch.tensor(known["colour"])[None].float() / 255
    return metrics.cover(video_NF3HW, colour_N3), colour_N3, video_NF3HW


def _judge_shape(
    result: Measured, known: dict[str, Any], mask_NFHW: Tensor, true_FHW: Tensor | None
) -> None:
    """The mover's shape against that in the reference clip of the same name."""
    names = ["area_log2", "shape_overlap"]
    if known["kind"] in PANS:
        return result.lack(names, "a pan has no mover")
    if true_FHW is None:
        return result.lack(names, f"needs a clip of the same name in {REFERENCE}")
    if mask_NFHW.shape[2:] != true_FHW.shape[1:]:
        return result.lack(names, "the reference clip of the same name has another size")
    frames = min(mask_NFHW.shape[1], len(true_FHW))
    mask_NFHW, true_NFHW = mask_NFHW[:, :frames], true_FHW[None, :frames].float() / metrics.LEVELS
    result.put("area_log2", metrics.area_log2(mask_NFHW, true_NFHW))
    result.put("shape_overlap", metrics.shape_overlap(mask_NFHW, true_NFHW))
    return None


def listen(result: Measured, video: Video) -> None:
    """Match the beats of motion with the onsets of the video's own sound."""
    names = [name for name, (_, _, needs) in METRICS.items() if needs == AUDIO]
    clip, fps = video.clip, video.fps
    if clip.audio is None:
        return result.lack(names, clip.no_audio)
    if not has_sound(clip.audio):
        return result.lack(names, "its sound track is silent")
    duration_s = len(video.frames_FHW3) / fps
    times_s = np.arange(round(duration_s * ONSET_RATE_HZ)) / ONSET_RATE_HZ
    envelope = onset_envelope(clip.audio, clip.audio_rate, times_s - clip.audio_start_s)
    # a nought at each end, so that an onset on the first frame is a peak
    onsets_s = metrics.peak_times(np.pad(envelope, 1), ONSET_RATE_HZ, -1 / ONSET_RATE_HZ)
    if not len(onsets_s):
        return result.lack(names, "its sound track has no onset")
    curve_G = metrics.motion_curve(luma_of(video.frames_FHW3)[None])[0].numpy()
    match = metrics.beat_match(metrics.motion_beats(curve_G, fps), onsets_s, duration_s)
    for name in names:
        result.put(name, getattr(match, name.removeprefix("beat_")))
    return None


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


def page(results: dict[str, Any]) -> str:
    """evaluate.html: one page that needs nothing beside it."""
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
    skipped = [
        f"{entry['file']} ({entry['folder']}): {entry['why']}" for entry in results["skipped"]
    ]
    notes = [f"Left out, {len(skipped)} files: " + "; ".join(skipped)] if skipped else []
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


def scatter(name: str, x_name: str, curves: Sequence[Curve]) -> str:
    """Points of two numbers of one kind, both axes from 0: an SVG of the report's style."""
    xs, ys = ([v for c in curves for v in getattr(c, axis)] for axis in ("xs", "ys"))
    ticks_y, floor, ceiling = charts._heights(0.0, max(ys))
    ticks, first, last = charts._heights(0.0, max(xs))
    ticks_x = list(zip(ticks, charts._tick_labels(ticks)))
    plot = charts._Plot(ticks_x, first, last, floor, ceiling)
    return plot.drawn(name, x_name, x_name, ticks_y, [plot.dots(curve) for curve in curves])
