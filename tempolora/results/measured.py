"""One video -> its numbers: how it moves and how much it flickers, by `rhythm/metrics.py`.

What a metric needs beside the video (real clips, their truth, sound) may be missing: then it is
left out and the reason kept. docs/metrics.md says what each of them means.

Shapes: N video, here 1, M reference clip, F video frame, G = F - 1 steps from frame to frame, K
frequency, H, W height and width.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import cv2
import numpy as np
import torch
import torch.nn.functional as nnf
from torch import Tensor

from tempolora.config import ConfigError
from tempolora.data import resample
from tempolora.data.audio import has_sound, onset_envelope
from tempolora.data.clips import DecodedClip
from tempolora.rhythm import metrics
from tempolora.rhythm.tempo import LUMA
from tempolora.timebase import TimeBase
from tempolora.variants import TEMPORAL_STRIDE

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
SCORES = {
    "flicker_score": "flicker",
    "visible_flicker_score": "visible_flicker",
    "warping_score": "warping_error",
}
TRACKS = ("amplitude_log2", "jerk_log2", "jerk_score", "track_jitter_px", "track_jitter_log2")


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


# --- Of itself ------------------------------------------------------------------------------------


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
        torch.from_numpy(np.stack([resample.dense_flow(*pair) for pair in way]))
        for way in (pairs, [(after, now) for now, after in pairs])
    )
    valid_GHW = metrics.consistent(forth_GHW2, back_GHW2)
    luma_FHW = torch.from_numpy(np.stack(grays)).float() / 255
    return float(metrics.warping_error(luma_FHW[None], forth_GHW2[None], valid_GHW[None])[0])


# --- Against real clips ---------------------------------------------------------------------------


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


# --- Against the truth ----------------------------------------------------------------------------


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
    mask_NFHW, colour_N3, video_NF3HW = mover(video, known)
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


def mover(video: Video, known: dict[str, Any]) -> tuple[Tensor, Tensor, Tensor]:
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


# --- Against its sound ----------------------------------------------------------------------------


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
