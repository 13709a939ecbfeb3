"""Videos against what was asked for and against the base's of the same noise: numbers per video.

Only `rhythm/metrics.py` measures; here is what it is asked. Values that ought to be compared as
ratios are log2. NaN: not defined for this video, such as the track of a mover that is not found.

Shapes: N video, F video frame, H, W height and width, K bin of the spectrum, G = F - 1 steps.
"""

import math
from dataclasses import dataclass

import torch
import torch.nn.functional as nnf
from einops import rearrange
from torch import Tensor

from tempolora.data import toy
from tempolora.rhythm import metrics
from tempolora.study.clips import says_tempo
from tempolora.timebase import TimeBase

CUTOFF_HZ, BAND_HZ = 6.0, (0.5, 6.0)
TOGETHER = 32  # videos measured at a time
BLOCKS = 32  # in each direction, whose luma tells the frequency
LEAST_MOTION = 0.01  # levels
LEAST_TRACK = 1e-3  # px a frame
REACH_PX = 4  # around the mover, where flicker of its region is measured
UNTRACKED = {"pulse", "spin", "water"}
PANS = {"pan"}
TWICE_A_TURN = {"spin"}  # its arm looks alike twice a turn, so its frequency is not what is seen
THIRDS = 3  # slow, steady, fast

ALONE = (
    "flicker",
    "visible_flicker",
    "jitter_log2",
    "face_jitter_log2",
    "texture_jitter_log2",
    "comb_log2",
    "band_log2",
    "amplitude_log2",
    "hz_log2",
    "hz_share",
    "tempo_error",
    "colour_error",
    "area_error",
    "shape_error",
    "tracked",
    "speed_log2",
    "jerk_log2",
    "track_jitter_log2",
)
AGAINST_BASE = ("drift_colour", "drift_shape", "drift_picture")
STILLS = ("still_drift", "still_colour")
TRUE_FLOW = ("warping_error",)


@dataclass(frozen=True)
class Asked:
    """The scenes whose captions were sampled, and where their mover is in clean clips of them.

    true_NFHW: cover of the mover in 0..1, in clips that went through the VAE, which blurs; on the
    device that measures.
    """

    scenes: toy.Scenes
    true_NFHW: Tensor
    timebase: TimeBase

    @classmethod
    def of(cls, scenes: toy.Scenes, true_NFHW3: Tensor, timebase: TimeBase) -> "Asked":
        tint_N3 = scenes.tint_N3.to(true_NFHW3.device).float()
        covers = [
            metrics.cover(_rgb(clip), tint)
            for clip, tint in zip(true_NFHW3.split(TOGETHER), tint_N3.split(TOGETHER), strict=True)
        ]
        return cls(scenes, torch.cat(covers), timebase)

    def part(self, start: int, count: int) -> "Asked":
        rows = slice(start, start + count)
        return Asked(self.scenes[rows], self.true_NFHW[rows], self.timebase)


def measure(
    asked: Asked, videos_NFHW3: Tensor, base_NFHW3: Tensor | None = None
) -> tuple[dict[str, Tensor], Tensor]:
    """Numbers of uint8 videos, (N,) each on the CPU, and their power in each bin (N, K).

    base_NFHW3: the base's videos of the same noise; without them nothing is said of drift.
    """
    found: list[dict[str, Tensor]] = []
    for start in range(0, len(videos_NFHW3), TOGETHER):
        rows = slice(start, start + TOGETHER)
        video_NF3HW = _rgb(videos_NFHW3[rows])
        some = asked.part(start, len(video_NF3HW))
        mask_NFHW = metrics.cover(video_NF3HW, _tint(some, video_NF3HW))
        values = _alone(some, video_NF3HW, mask_NFHW, start)
        if base_NFHW3 is not None:
            values |= _against(some, video_NF3HW, mask_NFHW, _rgb(base_NFHW3[rows]))
        found.append({name: value.float().cpu() for name, value in values.items()})
    joined = {name: torch.cat([part[name] for part in found]) for name in found[0]}
    power_NK = joined.pop("power")
    return joined, power_NK


def stills(asked: Asked, videos_N1HW3: Tensor, base_N1HW3: Tensor) -> dict[str, Tensor]:
    """How far single frames are from the base's: levels of RGB, and dE of the mover, (N,)."""
    video, base = _rgb(videos_N1HW3), _rgb(base_N1HW3)
    tint_N3 = _tint(asked, video)
    masks = [metrics.cover(picture, tint_N3) for picture in (video, base)]
    return {
        "still_drift": metrics.LEVELS * (video - base).abs().mean(dim=(1, 2, 3, 4)).cpu(),
        "still_colour": _apart(video, masks[0], base, masks[1]).cpu(),
    }


def log2_hz(videos_NFHW3: Tensor, fps: float) -> tuple[Tensor, Tensor]:
    """log2 of the dominant frequency, (N,), and the share of all change it explains."""
    found = [_dominant(_luma(_rgb(some)), fps) for some in videos_NFHW3.split(TOGETHER)]
    hz_N, share_N = (torch.cat(part).cpu() for part in zip(*found, strict=True))
    return hz_N.log2(), share_N


def log2_power(videos_NFHW3: Tensor, timebase: TimeBase) -> dict[str, Tensor]:
    """What a filter leaves: amplitude and power above the cutoff, log2, (N,) each."""
    bins, found = metrics.bins_of(timebase, CUTOFF_HZ, BAND_HZ), []
    for some in videos_NFHW3.split(TOGETHER):
        power_NK = metrics.spectral_power(_luma(_rgb(some)), timebase)
        found.append(
            (_log2_amplitude(power_NK, bins).cpu(), _log2_power(power_NK, bins.jitter).cpu())
        )
    amplitude, jitter = (torch.cat(part) for part in zip(*found, strict=True))
    return {"amplitude_log2": amplitude, "jitter_log2": jitter}


def motion_curves(videos_NFHW3: Tensor) -> Tensor:
    """metrics.motion_curve of each, (N, G), on the CPU."""
    chunks = videos_NFHW3.split(TOGETHER)
    return torch.cat([metrics.motion_curve(_luma(_rgb(some))).cpu() for some in chunks])


def warping_error(asked: Asked, videos_NFHW3: Tensor, sizes: dict[str, float]) -> Tensor:
    """metrics.warping_error with the scenes' true flow, for videos that show just these, (N,)."""
    found = []
    for start in range(0, len(videos_NFHW3), TOGETHER):
        rows = slice(start, start + TOGETHER)
        flow_NGHW2, valid_NGHW = toy.flow(asked.scenes[rows].to(videos_NFHW3.device), **sizes)
        luma_NFHW = _luma(_rgb(videos_NFHW3[rows]))
        found.append(metrics.warping_error(luma_NFHW, flow_NGHW2, valid_NGHW).cpu())
    return torch.cat(found)


# --- One chunk of videos --------------------------------------------------------------------------


def _alone(asked: Asked, video_NF3HW: Tensor, mask_NFHW: Tensor, first: int) -> dict[str, Tensor]:
    """What needs no other model's video. first: number of the first scene, for its caption."""
    timebase, fps = asked.timebase, asked.timebase.fps
    luma_NFHW = _luma(video_NF3HW)
    bins = metrics.bins_of(timebase, CUTOFF_HZ, BAND_HZ)
    power_NK = metrics.spectral_power(luma_NFHW, timebase)
    hz_N, share_N = _dominant(luma_NFHW, fps)
    colour_N3 = _tint(asked, video_NF3HW)
    around_NHW = _around(mask_NFHW)
    nearby_NK = metrics.spectral_power(luma_NFHW * around_NHW[:, None].sqrt(), timebase)
    nearby_N = _log2_power(nearby_NK, bins.jitter)
    face_N = asked.scenes.shape_N == toy.SHAPES.index("face")
    textured_N = (asked.scenes.texture_N != toy.TEXTURES.index("flat")) & ~face_N
    log_hz_N = hz_N.log2()
    values = {
        "power": power_NK,
        "flicker": metrics.flicker(video_NF3HW),
        "visible_flicker": metrics.visible_flicker(luma_NFHW, timebase, CUTOFF_HZ),
        "jitter_log2": _log2_power(power_NK, bins.jitter),
        "face_jitter_log2": _only(nearby_N, face_N),
        "texture_jitter_log2": _only(nearby_N, textured_N),
        "comb_log2": _log2_power(power_NK, bins.comb),
        "band_log2": _log2_power(power_NK, bins.band),
        "amplitude_log2": _log2_amplitude(power_NK, bins),
        "hz_log2": log_hz_N,
        "hz_share": share_N,
        "tempo_error": _tempo_error(asked.scenes, log_hz_N, first),
        "colour_error": metrics.colour_error(video_NF3HW, mask_NFHW, colour_N3),
        "area_error": metrics.area_log2(mask_NFHW, asked.true_NFHW).abs(),
        "shape_error": 1 - metrics.shape_overlap(mask_NFHW, asked.true_NFHW),
    }
    return values | _tracks(asked.scenes, luma_NFHW, mask_NFHW, fps)


def _against(
    asked: Asked, video_NF3HW: Tensor, mask_NFHW: Tensor, base_NF3HW: Tensor
) -> dict[str, Tensor]:
    """How far the looks are from the base's; means over time, so that its flicker is no drift."""
    base_mask_NFHW = metrics.cover(base_NF3HW, _tint(asked, base_NF3HW))
    shown_N = (base_mask_NFHW.sum(dim=(2, 3)) > 0).all(dim=1)  # what is not there cannot drift
    apart_N3HW = (video_NF3HW.mean(1) - base_NF3HW.mean(1)).abs()
    return {
        "drift_colour": _apart(video_NF3HW, mask_NFHW, base_NF3HW, base_mask_NFHW),
        "drift_shape": _only(1 - metrics.shape_overlap(mask_NFHW, base_mask_NFHW), shown_N),
        "drift_picture": metrics.LEVELS * apart_N3HW.mean(dim=(1, 2, 3)),
    }


def _tracks(
    scenes: toy.Scenes, luma_NFHW: Tensor, mask_NFHW: Tensor, fps: float
) -> dict[str, Tensor]:
    """Speed, jerk and jitter of the mover, or of the picture in a pan; log2 of px and s."""
    pans_N = torch.tensor([kind in PANS for kind in scenes.kinds], device=luma_NFHW.device)
    followed_N = torch.tensor([kind not in UNTRACKED for kind in scenes.kinds])
    track_NF2 = metrics.centroid(mask_NFHW)
    if pans_N.any():
        track_NF2[pans_N] = metrics.pan_track(luma_NFHW[pans_N]).to(track_NF2)
    track_NF2 = track_NF2.cpu()
    found_N = followed_N & track_NF2.isfinite().all(dim=2).all(dim=1)
    still_NF2 = track_NF2.nan_to_num()
    speed_N = still_NF2.diff(dim=1).square().sum(-1).mean(1).sqrt() * fps
    floor = LEAST_TRACK * fps
    jitter_N = metrics.track_jitter(still_NF2, fps, CUTOFF_HZ).clamp(min=LEAST_TRACK)
    jerk_N = metrics.jerk(still_NF2, fps).clamp(min=LEAST_TRACK * fps**3)
    return {
        "tracked": _only(found_N.float(), followed_N),
        "speed_log2": _only(speed_N.clamp(min=floor).log2(), found_N),
        "jerk_log2": _only(jerk_N.log2(), found_N),
        "track_jitter_log2": _only(jitter_N.log2(), found_N),
    }


def _tempo_error(scenes: toy.Scenes, log_hz_N: Tensor, first: int) -> Tensor:
    """Octaves from the middle of the third of 0.5 to 6 Hz that the caption names."""
    low, high = (math.log2(hz) for hz in toy.BAND_HZ)
    share_N = (scenes.hz_N.to(log_hz_N).log2() - low) / (high - low)
    third_N = (THIRDS * share_N).floor().clamp(0, THIRDS - 1)
    middle_N = low + (high - low) * (third_N + 0.5) / THIRDS
    told_N = torch.tensor(
        [says_tempo(first + n) and kind not in TWICE_A_TURN for n, kind in enumerate(scenes.kinds)]
    )
    return _only((log_hz_N - middle_N).abs(), told_N)


def _dominant(luma_NFHW: Tensor, fps: float) -> tuple[Tensor, Tensor]:
    small = [min(BLOCKS, size) for size in luma_NFHW.shape[2:]]
    signal_NFD = nnf.adaptive_avg_pool2d(luma_NFHW, small).flatten(2)
    return metrics.dominant_hz(signal_NFD, fps, BAND_HZ)


def _around(mask_NFHW: Tensor) -> Tensor:
    """Where the mover ever is, widened, its mean 1: weights of pixels, (N, H, W)."""
    size = 2 * REACH_PX + 1
    ever_NHW = nnf.max_pool2d(mask_NFHW.amax(dim=1), size, stride=1, padding=REACH_PX)
    return ever_NHW / ever_NHW.mean(dim=(1, 2), keepdim=True)


def _apart(video: Tensor, mask: Tensor, base: Tensor, base_mask: Tensor) -> Tensor:
    """CIE 1976 difference of the mean colours under two masks, (N,); NaN where one is empty."""
    means = [
        torch.einsum("nfchw,nfhw->nc", picture, where) / where.sum(dim=(1, 2, 3))[:, None]
        for picture, where in ((video, mask), (base, base_mask))
    ]
    return (metrics.lab(means[0]) - metrics.lab(means[1])).norm(dim=-1)


def _log2_amplitude(power_NK: Tensor, bins: metrics.Bins) -> Tensor:
    return metrics.motion_amplitude(power_NK, bins).clamp(min=LEAST_MOTION).log2()


def _log2_power(power_NK: Tensor, bins: list[int]) -> Tensor:
    return metrics.pooled(power_NK, bins).clamp(min=metrics.TINY).log2()


def _only(value_N: Tensor, where_N: Tensor) -> Tensor:
    return value_N.masked_fill(~where_N.to(value_N.device), math.nan)


def _tint(asked: Asked, like: Tensor) -> Tensor:
    return asked.scenes.tint_N3.to(like)


def _rgb(videos_NFHW3: Tensor) -> Tensor:
    return rearrange(videos_NFHW3, "N F H W C -> N F C H W").float() / 255


def _luma(video_NF3HW: Tensor) -> Tensor:
    return metrics.luminance(video_NF3HW)
