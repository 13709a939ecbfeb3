"""How well a clip keeps its rhythm, measured on its pixels: one number per clip.

Where only change is counted (flicker, power above the cutoff, jerk, warping error, visible flicker)
a frozen video is perfect. Such a number is a defect and never stands alone: `score` multiplies how
small the defect is by how much motion is left, both against a reference, so a frozen video gets 0.

Shapes: N clip, F video frame, H, W height and width, K bin of the spectrum, S sample in time,
D signals that share a clock, G = F - 1 steps from frame to frame, 2 = x, y in px. Videos and luma
are in [0, 1], as shown (gamma-coded); "levels" are of 255.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
import torch.nn.functional as F
from einops import rearrange
from scipy.signal import find_peaks
from torch import Tensor

from tempolora.rhythm.tempo import LUMA, detrend, spectrum
from tempolora.timebase import TimeBase

LEVELS = 255
TINY = 1e-12  # luma^2, a millionth of the rounding to 8 bits: what stands still has no logarithm
ROWS = 64  # of pixels whose spectra are held at a time
HANN_POWER = 3 / 8  # mean square of the window


def luminance(video_NF3HW: Tensor) -> Tensor:
    """RGB to luma (BT.601), (N, F, H, W)."""
    return torch.einsum("c,nfchw->nfhw", video_NF3HW.new_tensor(LUMA), video_NF3HW)


# --- The score ------------------------------------------------------------------------------------


def score(
    defect_N: Tensor, motion_N: Tensor, defect_reference: Tensor, motion_reference: Tensor
) -> Tensor:
    """min(1, reference / defect) * min(1, motion / reference), (N,) in 0..1.

    1: no worse than the reference, with all of its motion. A frozen video has none and gets 0, a
    video with the motion but twice the defect gets 1/2. References are per clip or one for all.
    """
    quality_N = ((defect_reference + TINY) / (defect_N + TINY)).clamp(max=1)
    return quality_N * retained(motion_N, motion_reference)


def retained(motion_N: Tensor, motion_reference: Tensor) -> Tensor:
    """The share of the reference's motion that is left, at most 1."""
    return (motion_N / motion_reference).clamp(max=1)


# --- Flicker and spectra --------------------------------------------------------------------------


def flicker(video: Tensor) -> Tensor:
    """Mean absolute change from frame to frame in levels, (N,); video (N, F, ...), RGB or luma.

    VBench's temporal_flickering (Huang et al. 2024, arXiv 2311.17982) before its score; there the
    frames are RGB.
    """
    steps = [(b - a).abs().flatten(1).mean(1) for a, b in _steps(video)]
    return LEVELS * torch.stack(steps).mean(0)


def vbench_flickering(flicker_N: Tensor) -> Tensor:
    """VBench's score of it, (255 - flicker) / 255; 1 for a frozen video."""
    return (LEVELS - flicker_N) / LEVELS


@dataclass(frozen=True)
class Bins:
    """Bins of the spectrum of a clip: natural motion, jitter from the cutoff up, decoder's comb.

    No bin is in two of them. The comb is every multiple of fps / 4 with its neighbours, into which
    the Hann window spreads it; honest motion near fps / 4 falls there too.
    """

    band: list[int]
    jitter: list[int]
    comb: list[int]


def bins_of(timebase: TimeBase, cutoff_hz: float, band_hz: tuple[float, float]) -> Bins:
    """Sort the bins of a clip. Raises ValueError where none is in the band or above the cutoff."""
    (low, high), slack = band_hz, 1e-9 * timebase.fps
    usable = timebase.usable_bins_hz("readout")
    jitter = [k for k, hz in usable.items() if hz >= cutoff_hz - slack]
    band = [k for k, hz in usable.items() if low - slack <= hz <= high + slack if k not in jitter]
    for name, kept in ((f"{low:g} to {high:g} Hz", band), (f"{cutoff_hz:g} Hz and above", jitter)):
        if not kept:
            there = ", ".join(f"{hz:.2f}" for hz in usable.values()) or "none"
            raise ValueError(
                f"{timebase.num_frames} frames at {timebase.fps:g} fps have no bin of {name} "
                f"beside the decoder's comb; there are: {there} Hz"
            )
    comb = [k for k in range(1, len(timebase.bins_hz)) if k not in usable]
    return Bins(band, jitter, comb)


def spectral_power(luma_NFHW: Tensor, timebase: TimeBase) -> Tensor:
    """Variance of luma in each bin of timebase.bins_hz, mean over pixels, (N, K).

    Detrended and Hann-windowed as in the loss, and scaled for the window: a steady sinusoid of
    amplitude A has A^2 / 2 in all, two thirds of it in its own bin. Frame 0, which the VAE codes
    apart, and frames past timebase.num_frames are left out.
    """
    samples_NSHW = luma_NFHW[:, 1 : timebase.num_frames]
    assert samples_NSHW.shape[1] == timebase.samples, "fewer frames than the clock has"
    total_NK = 0
    for rows_NSHW in samples_NSHW.split(ROWS, dim=2):
        total_NK = total_NK + _variances(rows_NSHW.movedim(1, -1)).sum(dim=(1, 2))
    return total_NK / luma_NFHW[0, 0].numel()


def pooled(power_NK: Tensor, bins: Sequence[int]) -> Tensor:
    """Variance in these bins together, (N,)."""
    return power_NK[:, list(bins)].sum(1)


def excess_log2(power_N: Tensor, reference_M: Tensor) -> Tensor:
    """log2 of pooled power over the geometric mean of M reference clips, (N,).

    0: as the reference. Above the cutoff more is flicker and less is blur; in the band less is
    motion lost, and a frozen video is far below 0 in both.
    """
    return power_N.clamp(min=TINY).log2() - reference_M.clamp(min=TINY).log2().mean()


FLOOR = 0.25


def motion_amplitude(power_NK: Tensor, bins: Bins) -> Tensor:
    """Rms of luma's change in the band, in levels, (N,): how much moves, and not how much flickers.

    Flicker is white more often than not and reaches into the band. Motion is lines with valleys
    between them, so the lower quartile of all bins of band and jitter is taken for flicker and off
    every bin of the band. Fooled by gain that flickers in the whole picture at once: its spectrum
    has valleys too.
    """
    floor_N1 = power_NK[:, bins.band + bins.jitter].quantile(FLOOR, dim=1, keepdim=True)
    return LEVELS * (power_NK[:, bins.band] - floor_N1).sum(1).clamp(min=0).sqrt()


CSF_TAU_S, CSF_KAPPA, CSF_ZETA, CSF_ORDERS = 0.00494, 1.33, 0.9, (9, 10)


def temporal_csf(hz: Tensor) -> Tensor:
    """The eye's sensitivity to contrast that alternates at `hz`, its greatest value 1.

    |(1 + i w tau)^-9 - zeta (1 + i w kappa tau)^-10|, w = 2 pi hz: the linear filter of Watson 1986
    (Temporal sensitivity, Handbook of Perception and Human Performance, ch. 6, eq. 40 to 45; orders
    and kappa of its fig. 6.5), with tau = 4.94 ms as in ISETCam's watsonImpulseResponse.m and
    zeta = 0.9. It has the shape of de Lange's curves: greatest near 10 Hz, falling to both sides.
    """

    def filtered(hz: Tensor) -> Tensor:
        turn = 2j * math.pi * CSF_TAU_S * hz.double()
        fast, slow = CSF_ORDERS
        return ((1 + turn) ** -fast - CSF_ZETA * (1 + CSF_KAPPA * turn) ** -slow).abs()

    return (filtered(hz) / filtered(torch.linspace(0.1, 40, 4000)).max()).to(hz)


def visible_flicker(luma_NFHW: Tensor, timebase: TimeBase, cutoff_hz: float) -> Tensor:
    """Rms contrast from the cutoff up as the eye weighs it, in % of the clip's mean light, (N,).

    Power of linear light (sRGB's curve undone), times temporal_csf squared at the frequency of real
    playback; the comb counts, because the eye sees it. No model of space: each pixel counts alone.
    """
    light_NFHW = _linear(luma_NFHW)
    power_NK = spectral_power(light_NFHW, timebase)
    hz_K = power_NK.new_tensor(timebase.bins_hz)
    weight_K = temporal_csf(hz_K).square() * (hz_K >= cutoff_hz * (1 - 1e-9))
    mean_N = light_NFHW.mean(dim=(1, 2, 3))
    return 100 * (power_NK @ weight_K).sqrt() / mean_N.clamp(min=1e-6)


# --- Tracks ---------------------------------------------------------------------------------------


def cover(video_NF3HW: Tensor, colour_N3: Tensor) -> Tensor:
    """How far each pixel belongs to a mover of this colour, (N, F, H, W) in 0..1.

    1.5 - 2 d / D, cut off at 0 and 1: d from the pixel's colour to the mover's, D from the ground's
    (the clip's median) to the mover's. A pixel half covered has d = D / 2 and keeps half; textures
    of either, a quarter of D at most, change nothing. The mover must leave more than half of the
    picture free; other things of its colour count with it.
    """
    pixels = rearrange(video_NF3HW[..., ::2, ::2], "n f c h w -> n c (f h w)")
    ground_N3 = pixels.median(dim=-1).values
    whole_N = (colour_N3 - ground_N3).norm(dim=1).clamp(min=TINY)
    away_NFHW = (video_NF3HW - colour_N3[:, None, :, None, None]).norm(dim=2)
    return (1.5 - 2 * away_NFHW / whole_N[:, None, None, None]).clamp(0, 1)


def centroid(weight_NFHW: Tensor) -> Tensor:
    """Centre of the weights in px, (N, F, 2), the first pixel's at 0.5. NaN: no weight."""
    height, width = weight_NFHW.shape[2:]
    x_W = torch.arange(width).to(weight_NFHW) + 0.5
    y_H = torch.arange(height).to(weight_NFHW) + 0.5
    total_NF = weight_NFHW.sum(dim=(2, 3))
    x_NF = torch.einsum("nfhw,w->nf", weight_NFHW, x_W) / total_NF
    y_NF = torch.einsum("nfhw,h->nf", weight_NFHW, y_H) / total_NF
    return torch.stack([x_NF, y_NF], dim=-1)


PAN_ROUNDS = 3


def pan_track(luma_NFHW: Tensor) -> Tensor:
    """Where the whole picture has moved since frame 0, in px, (N, F, 2); rightwards x > 0.

    From frame to frame: the peak of the phase correlation (Kuglin & Hines 1975, here half whitened,
    so that noise has no say), then the plane through the phases of the low spatial frequencies
    (Stone et al. 2001) of the frames laid over each other, repeated because the window hides part
    of a shift. Up to a third of the picture per frame.
    """
    before_MHW, after_MHW = luma_NFHW[:, :-1].flatten(0, 1), luma_NFHW[:, 1:].flatten(0, 1)
    shift_M2 = _whole_shift(before_MHW, after_MHW)
    for _ in range(PAN_ROUNDS):
        shift_M2 = shift_M2 + _small_shift(before_MHW, _shifted_back(after_MHW, shift_M2))
    steps_NG2 = shift_M2.unflatten(0, (len(luma_NFHW), -1))
    return F.pad(steps_NG2.cumsum(1), (0, 0, 1, 0))


def track_amplitude(track_NF2: Tensor) -> Tensor:
    """Rms distance from the track's mean place, px, (N,): A / sqrt(2) for a swing of A."""
    return (track_NF2 - track_NF2.mean(1, keepdim=True)).square().sum(-1).mean(1).sqrt()


def jerk(track_NF2: Tensor, fps: float) -> Tensor:
    """Rms of the third difference of the track times fps^3, px / s^3, (N,). Frozen: 0."""
    return track_NF2.diff(n=3, dim=1).square().sum(-1).mean(1).sqrt() * fps**3


def track_jitter(track_NF2: Tensor, fps: float, cutoff_hz: float) -> Tensor:
    """Rms of the detrended, Hann-windowed track from the cutoff up, px, (N,). Frozen: 0."""
    variance_NK = _variances(track_NF2.movedim(1, -1)).sum(1)
    hz_K = torch.arange(variance_NK.shape[1]) * fps / track_NF2.shape[1]
    return variance_NK[:, hz_K >= cutoff_hz * (1 - 1e-9)].sum(1).sqrt()


def ratio_log2(value_N: Tensor, reference: Tensor | float, floor: float) -> Tensor:
    """log2 of value over reference, (N,), neither taken for less than the measurement's error."""
    reference = torch.as_tensor(reference).to(value_N)
    return (value_N.clamp(min=floor) / reference.clamp(min=floor)).log2()


# --- Flow -----------------------------------------------------------------------------------------


def sample_at(frames_MCHW: Tensor, flow_MHW2: Tensor) -> tuple[Tensor, Tensor]:
    """frames at p + flow[p] (M, C, H, W), bicubic, and where that lies in the picture (M, H, W)."""
    height, width = frames_MCHW.shape[2:]
    last_2 = flow_MHW2.new_tensor([width - 1, height - 1])
    x, y = torch.meshgrid(torch.arange(width), torch.arange(height), indexing="xy")
    place_MHW2 = torch.stack([x, y], dim=-1).to(flow_MHW2) + flow_MHW2
    inside_MHW = ((place_MHW2 >= 0) & (place_MHW2 <= last_2)).all(dim=-1)
    sampled_MCHW = F.grid_sample(
        frames_MCHW,
        2 * place_MHW2 / last_2 - 1,
        mode="bicubic",
        padding_mode="border",
        align_corners=True,
    )
    return sampled_MCHW, inside_MHW


def consistent(forth_MHW2: Tensor, back_MHW2: Tensor) -> Tensor:
    """Where flow there and back again ends near its start: neither hidden nor guessed, (M, H, W).

    |forth + back|^2 < 0.01 (|forth|^2 + |back|^2) + 0.5 px^2 (Sundaram et al. 2010).
    """
    returned, inside_MHW = sample_at(back_MHW2.movedim(-1, 1), forth_MHW2)
    returned_MHW2 = returned.movedim(1, -1)
    astray, lengths = (
        (forth_MHW2 + returned_MHW2).square().sum(-1),
        forth_MHW2.square().sum(-1) + returned_MHW2.square().sum(-1),
    )
    return inside_MHW & (astray < 0.01 * lengths + 0.5)


def warping_error(
    luma_NFHW: Tensor, flow_NGHW2: Tensor, valid_NGHW: Tensor | None = None
) -> Tensor:
    """Mean absolute difference, in levels, of each frame and the next one carried back, (N,).

    flow: px, where the pixels of frame k are found in frame k + 1. Pixels that leave the picture
    and those that are not `valid` do not count. After E_warp of Lai et al. 2018 (arXiv 1808.00449).
    A frozen video has none with its own flow, much with the true one. NaN where nothing is valid.
    """
    error_NG, count_NG = [], []
    for k, (now, after) in enumerate(_steps(luma_NFHW)):
        carried, inside_NHW = sample_at(after[:, None], flow_NGHW2[:, k])
        valid_NHW = inside_NHW if valid_NGHW is None else inside_NHW & valid_NGHW[:, k]
        error_NG.append(((carried[:, 0] - now).abs() * valid_NHW).sum(dim=(1, 2)))
        count_NG.append(valid_NHW.sum(dim=(1, 2)))
    return LEVELS * torch.stack(error_NG).sum(0) / torch.stack(count_NG).sum(0)


# --- Tempo and beats ------------------------------------------------------------------------------


def dominant_hz(
    signal_NSD: Tensor, fps: float, band_hz: tuple[float, float] = (0.5, math.inf)
) -> tuple[Tensor, Tensor]:
    """The frequency of the sinusoid that explains most of D signals together: Hz (N,), share (N,).

    Least squares with mean and slope free (Lomb 1976; VanderPlas 2018, arXiv 1703.09824), so that
    a clip of a turn or two is no worse than a long one; the peak is interpolated. Not below one
    turn in the clip, nor above 0.98 fps / 2. The share of variance explained, 0..1, is the
    confidence; NaN Hz where nothing moves. Give it tracks (D = 2) or the luma of pixels: the energy
    of motion and any speed peak at twice the frequency of a swing, which is fast twice a turn.
    Raises ValueError where the clip is too short for the band.
    """
    samples = signal_NSD.shape[1]
    low, high = max(band_hz[0], fps / samples), min(band_hz[1], 0.98 * fps / 2)
    if low >= high:
        raise ValueError(f"{samples} frames at {fps:g} fps hold no whole turn up to {high:g} Hz")
    hz_Q = torch.linspace(low, high, max(3, math.ceil(24 * samples * (high - low) / fps)))
    hz_Q = hz_Q.double()
    time_S = torch.arange(samples, dtype=torch.float64) / fps
    angle_QS = 2 * math.pi * hz_Q[:, None] * time_S
    flat_SS = detrend(samples)
    waves_QS2 = torch.stack([angle_QS.cos(), angle_QS.sin()], dim=-1)
    basis_QS2 = torch.linalg.qr(flat_SS @ waves_QS2).Q.to(signal_NSD)
    signal_NSD = flat_SS.to(signal_NSD) @ signal_NSD
    explained_NQ = sum(  # one of the two waves at a time: D may be many pixels
        torch.einsum("qs,nsd->nqd", basis_QS2[..., wave], signal_NSD).square().sum(-1)
        for wave in (0, 1)
    )
    total_N = signal_NSD.square().sum(dim=(1, 2))
    best_N = explained_NQ.argmax(dim=1)
    # a parabola through the peak and its neighbours, its top between them
    three_N3 = explained_NQ.gather(1, _around(best_N, explained_NQ.shape[1]))
    left_N, peak_N, right_N = three_N3.unbind(1)
    bend_N = (left_N - 2 * peak_N + right_N).clamp(max=-TINY)
    at_N = ((left_N - right_N) / bend_N / 2).clamp(-1, 1)
    middle_N = best_N.clamp(1, explained_NQ.shape[1] - 2)
    hz_N = hz_Q.to(signal_NSD)[middle_N] + at_N * float(hz_Q[1] - hz_Q[0])
    still_N = total_N <= TINY * signal_NSD[0].numel()
    share_N = peak_N.maximum(explained_NQ.max(1).values) / total_N.clamp(min=TINY)
    return hz_N.masked_fill(still_N, math.nan), share_N.masked_fill(still_N, 0).clamp(max=1)


def motion_curve(luma_NFHW: Tensor) -> Tensor:
    """Mean square change of luma at the times (k + 1/2) / fps between frames, (N, G)."""
    return torch.stack([(b - a).square().mean(dim=(1, 2)) for a, b in _steps(luma_NFHW)], dim=1)


PROMINENCE = 0.1  # of the curve's range: smaller peaks are noise


def peak_times(curve_S: np.ndarray, rate_hz: float, start_s: float) -> np.ndarray:
    """Times in s of the maxima inside a curve whose first sample is at start_s, interpolated."""
    curve_S = np.asarray(curve_S, np.float64)
    reach = np.ptp(curve_S)
    if reach <= TINY:
        return np.zeros(0)
    peaks, _ = find_peaks(curve_S, prominence=PROMINENCE * reach)
    left, top, right = curve_S[peaks - 1], curve_S[peaks], curve_S[peaks + 1]
    bend = np.minimum(left - 2 * top + right, -TINY)
    return start_s + (peaks + np.clip((left - right) / bend / 2, -0.5, 0.5)) / rate_hz


def fastest(curve_G: np.ndarray, fps: float) -> np.ndarray:
    """Times in s at which motion is fastest, from `motion_curve` of one clip."""
    return peak_times(curve_G, fps, 0.5 / fps)


def motion_beats(curve_G: np.ndarray, fps: float) -> np.ndarray:
    """Times in s at which motion comes to rest, from `motion_curve` of one clip.

    Kinematic beats, the minima of speed, as in AIST++ (Li et al. 2021, arXiv 2101.08779). A swing
    rests at both ends, twice a turn.
    """
    return peak_times(-np.asarray(curve_G), fps, 0.5 / fps)


@dataclass(frozen=True)
class BeatMatch:
    """Precision: share of the motion's beats with an onset; recall: share of onsets with a beat.

    chance: f1 of soundtracks that do not belong; gain = f1 - chance is what counts, since many
    beats match anything.
    """

    precision: float
    recall: float
    f1: float
    chance: float

    @property
    def gain(self) -> float:
        """Matched minus shuffled, -1..1; 0 for no beats at all, so for a frozen video."""
        return self.f1 - self.chance


TOLERANCE_S = 0.05
SHIFTS = 64


def beat_match(
    motion_s: np.ndarray,
    sound_s: np.ndarray,
    duration_s: float,
    others_s: Sequence[np.ndarray] | None = None,
) -> BeatMatch:
    """Pair beats of motion with onsets of sound, one to one, at most 50 ms apart. All times in s.

    others_s: onsets of other clips' soundtracks, to be the shuffled ones; by default the clip's own
    in a circle of duration_s, turned by 64 steps less those within the tolerance.
    """
    if others_s is None:
        turns = np.arange(1, SHIFTS) / SHIFTS * duration_s
        turns = turns[np.minimum(turns, duration_s - turns) > TOLERANCE_S]
        others_s = [np.sort((sound_s + turn) % duration_s) for turn in turns]
    precision, recall, f1 = _matched(motion_s, sound_s)
    shuffled = [_matched(motion_s, other_s)[2] for other_s in others_s]
    return BeatMatch(precision, recall, f1, float(np.mean(shuffled)) if shuffled else 0.0)


def _matched(motion_s: np.ndarray, sound_s: np.ndarray) -> tuple[float, float, float]:
    motion_s, sound_s = np.sort(motion_s), np.sort(sound_s)
    i = j = pairs = 0
    while i < len(motion_s) and j < len(sound_s):  # the earliest pair that fits is never wrong
        apart = motion_s[i] - sound_s[j]
        if abs(apart) <= TOLERANCE_S + 1e-9:
            pairs, i, j = pairs + 1, i + 1, j + 1
        elif apart < 0:
            i += 1
        else:
            j += 1
    beats, onsets = len(motion_s), len(sound_s)
    return pairs / max(beats, 1), pairs / max(onsets, 1), 2 * pairs / max(beats + onsets, 1)


# --- Appearance -----------------------------------------------------------------------------------

# IEC 61966-2-1 (sRGB) to XYZ, each row over the D65 white
XYZ = ((0.4124, 0.3576, 0.1805), (0.2126, 0.7152, 0.0722), (0.0193, 0.1192, 0.9505))
WHITE = (0.9505, 1.0, 1.089)


def lab(colour_N3: Tensor) -> Tensor:
    """sRGB in [0, 1] to CIE 1976 L*a*b* with white D65, (..., 3)."""
    xyz = _linear(colour_N3) @ colour_N3.new_tensor(XYZ).T / colour_N3.new_tensor(WHITE)
    bent = torch.where(
        xyz > (6 / 29) ** 3, xyz.clamp(min=TINY) ** (1 / 3), xyz * 841 / 108 + 4 / 29
    )
    x, y, z = bent.unbind(-1)
    return torch.stack([116 * y - 16, 500 * (x - y), 200 * (y - z)], dim=-1)


def colour_error(video_NF3HW: Tensor, mask_NFHW: Tensor, colour_N3: Tensor) -> Tensor:
    """CIE 1976 difference (dE) of the mean colour under the mask and the true one, (N,).

    2.3 is just seen. Where the mask is empty the mean is the whole picture's: a mover that is not
    there is not of its colour. A frozen video gets what its one picture deserves.
    """
    weight_NF1HW = torch.where(
        mask_NFHW.sum(dim=(1, 2, 3), keepdim=True) > 0, mask_NFHW, torch.ones_like(mask_NFHW)
    )[:, :, None]
    mean_N3 = (video_NF3HW * weight_NF1HW).sum(dim=(1, 3, 4)) / weight_NF1HW.sum(dim=(1, 3, 4))
    return (lab(mean_N3) - lab(colour_N3)).norm(dim=-1)


def area_log2(mask_NFHW: Tensor, true_NFHW: Tensor) -> Tensor:
    """log2 of the mask's area over the true one's, both means over time, (N,); no less than -20."""
    area_N, true_N = (m.mean(dim=(1, 2, 3)) for m in (mask_NFHW, true_NFHW))
    return ratio_log2(area_N, true_N, 2.0**-20)


def shape_overlap(mask_NFHW: Tensor, true_NFHW: Tensor) -> Tensor:
    """Intersection over union of the masks with their centres laid over each other, (N,).

    Mean over frames; 1 for the same shape wherever it is. A frame without a mask counts as 0.
    """
    frames = mask_NFHW.shape[1]
    mask_MHW, true_MHW = mask_NFHW.flatten(0, 1), true_NFHW.flatten(0, 1)
    apart_M2 = (centroid(mask_NFHW) - centroid(true_NFHW)).flatten(0, 1).nan_to_num()
    flow_MHW2 = apart_M2[:, None, None].expand(-1, *mask_MHW.shape[1:], -1)
    laid_MHW = sample_at(mask_MHW[:, None], flow_MHW2)[0][:, 0].clamp(0, 1)
    both_M = torch.minimum(laid_MHW, true_MHW).sum(dim=(1, 2))
    either_M = torch.maximum(laid_MHW, true_MHW).sum(dim=(1, 2))
    return (both_M / either_M.clamp(min=TINY)).unflatten(0, (-1, frames)).mean(1)


# --- Intervals ------------------------------------------------------------------------------------


CHUNK = 500  # resamples drawn at a time


def bootstrap_interval(
    values_SN: np.ndarray, *, level: float = 0.95, resamples: int = 4000, seed: int = 0
) -> tuple[float, float, float]:
    """The mean and a bootstrap interval of it that resamples seeds, and samples in each drawn seed.

    values_SN: S training seeds with N samples each, or (N,) for one seed, whose interval says
    nothing of other seeds. For a comparison give the paired differences. The variance is that of
    the seeds' means over S plus the variance within a seed over S N; few seeds (3) make it too
    narrow by up to sqrt((S - 1) / S) and the second level a little too wide. Percentiles
    (Davison & Hinkley 1997, ch. 3.8).
    """
    values_SN = np.atleast_2d(np.asarray(values_SN, np.float64))
    seeds, samples = values_SN.shape
    rng = np.random.default_rng(seed)
    means = []
    for start in range(0, resamples, CHUNK):
        count = min(CHUNK, resamples - start)
        seed_RS1 = rng.integers(seeds, size=(count, seeds, 1))
        sample_RSN = rng.integers(samples, size=(count, seeds, samples))
        means.extend(values_SN[seed_RS1, sample_RSN].mean(axis=(1, 2)))
    low, high = np.quantile(means, [(1 - level) / 2, (1 + level) / 2])
    return float(values_SN.mean()), float(low), float(high)


# --- Parts ----------------------------------------------------------------------------------------


def _steps(video: Tensor) -> list[tuple[Tensor, Tensor]]:
    """Each frame with the next, (N, ...) both."""
    return [(video[:, k], video[:, k + 1]) for k in range(video.shape[1] - 1)]


def _variances(signal: Tensor) -> Tensor:
    """Variance in each bin of the detrended, windowed signals, (..., S) -> (..., S // 2 + 1)."""
    samples = signal.shape[-1]
    power = spectrum(signal).abs().square() / (HANN_POWER * samples**2)
    both = torch.full((power.shape[-1],), 2.0).to(power)  # bins stand for their mirror images too
    both[0] = 1
    if samples % 2 == 0:
        both[-1] = 1
    return power * both


def _linear(value: Tensor) -> Tensor:
    """sRGB's curve undone: light from coded values, both in 0..1."""
    return torch.where(
        value <= 0.04045, value / 12.92, ((value + 0.055) / 1.055).clamp(min=0) ** 2.4
    )


def _around(best_N: Tensor, count: int) -> Tensor:
    """Indices of each peak and its two neighbours, moved inwards at the ends, (N, 3)."""
    middle_N = best_N.clamp(1, count - 2)
    return torch.stack([middle_N - 1, middle_N, middle_N + 1], dim=1)


def _cross_power(a_MHW: Tensor, b_MHW: Tensor) -> Tensor:
    """conj(A) B of the windowed pictures without their means, (M, H, W // 2 + 1)."""
    height, width = a_MHW.shape[1:]
    window_HW = torch.hann_window(height)[:, None] * torch.hann_window(width)
    window_HW = window_HW.to(a_MHW)
    a, b = (
        torch.fft.rfft2((m - m.mean(dim=(1, 2), keepdim=True)) * window_HW) for m in (a_MHW, b_MHW)
    )
    return a.conj() * b


def _whole_shift(a_MHW: Tensor, b_MHW: Tensor) -> Tensor:
    """By how many whole px b has moved against a, (M, 2)."""
    height, width = a_MHW.shape[1:]
    cross = _cross_power(a_MHW, b_MHW)
    whitened = cross / cross.abs().clamp(min=TINY).sqrt()
    peak_M = torch.fft.irfft2(whitened, s=(height, width)).flatten(1).argmax(dim=1)
    x_M, y_M = peak_M % width, peak_M // width
    x_M, y_M = x_M - width * (x_M > width // 2), y_M - height * (y_M > height // 2)
    return torch.stack([x_M, y_M], dim=1).to(a_MHW)


def _small_shift(a_MHW: Tensor, b_MHW: Tensor) -> Tensor:
    """By how much b has moved against a, (M, 2), less than a px: the slope of the phases."""
    cross_MHW = _cross_power(a_MHW, b_MHW)
    k_HW2 = _wave_numbers(a_MHW)
    low_HW = k_HW2.norm(dim=-1) < math.pi / 2  # above, rounding and noise speak
    weight_MHW = cross_MHW.abs() * low_HW
    left_M22 = torch.einsum("mhw,hwi,hwj->mij", weight_MHW, k_HW2, k_HW2)
    right_M2 = torch.einsum("mhw,mhw,hwi->mi", weight_MHW, -cross_MHW.angle(), k_HW2)
    ridge_M11 = 1e-9 * left_M22.diagonal(dim1=1, dim2=2).sum(1)[:, None, None] + TINY
    return torch.linalg.solve(left_M22 + ridge_M11 * torch.eye(2).to(a_MHW), right_M2)


def _shifted_back(b_MHW: Tensor, shift_M2: Tensor) -> Tensor:
    """b moved by -shift, exact between pixels; what leaves on one side enters on the other."""
    turn_MHW = torch.einsum("hwi,mi->mhw", _wave_numbers(b_MHW), shift_M2)
    moved = torch.fft.rfft2(b_MHW) * torch.polar(torch.ones_like(turn_MHW), turn_MHW)
    return torch.fft.irfft2(moved, s=b_MHW.shape[1:])


def _wave_numbers(m_MHW: Tensor) -> Tensor:
    """Radians per px in x and y of each bin of rfft2, (H, W // 2 + 1, 2)."""
    height, width = m_MHW.shape[1:]
    k_y = torch.fft.fftfreq(height)[:, None].expand(-1, width // 2 + 1)
    k_x = torch.fft.rfftfreq(width).expand(height, -1)
    return 2 * math.pi * torch.stack([k_x, k_y], dim=-1).to(m_MHW)
