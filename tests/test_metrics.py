"""Each metric has a case whose answer is known without it, and a frozen video never wins.

Videos are drawn here by numpy from formulas: blobs, pans of a sum of waves, pulses of brightness.
"""

import math
from itertools import pairwise

import numpy as np
import pytest
import torch

from tempolora.rhythm import metrics
from tempolora.rhythm.tempo import motion_energy
from tempolora.timebase import TimeBase

FPS, FRAMES, SIDE = 16, 49, 48
CLOCK = TimeBase(FPS, FRAMES)
BINS = metrics.bins_of(CLOCK, 6.0, (0.5, 6.0))
TIME_F = np.arange(FRAMES) / FPS


def blobs(track_F2: np.ndarray, *, wide: float = 4.0, side: int = SIDE) -> np.ndarray:
    """A Gaussian blob of width `wide` px with its centre on the track, 0..1, (F, H, W)."""
    place = np.arange(side) + 0.5
    x, y = (np.exp(-(((place - track_F2[:, axis, None]) / wide) ** 2) / 2) for axis in (0, 1))
    return y[:, :, None] * x[:, None, :]


def swing(hz: float, amplitude: float = 8.0, time: np.ndarray = TIME_F) -> np.ndarray:
    """A track that swings sideways about the middle, (F, 2)."""
    x = SIDE / 2 + amplitude * np.cos(2 * np.pi * hz * time + 0.4)
    return np.stack([x, np.full_like(x, SIDE / 2)], axis=1)


def waves(track_F2: np.ndarray, side: int = 64) -> np.ndarray:
    """A texture of five waves that moves along the track, exact at any place, (F, H, W)."""
    rng = np.random.default_rng(5)
    y, x = np.mgrid[0:side, 0:side]
    out = np.full((len(track_F2), side, side), 0.5)
    for pitch in (7, 11, 17, 23, 31):
        angle, start = rng.uniform(0, 2 * np.pi, 2)
        k_x, k_y = 2 * np.pi / pitch * np.array([np.cos(angle), np.sin(angle)])
        u = k_x * (x - track_F2[:, 0, None, None]) + k_y * (y - track_F2[:, 1, None, None])
        out += 0.08 * np.cos(u + start)
    return out


def batch(*clips: np.ndarray) -> torch.Tensor:
    return torch.tensor(np.stack(clips), dtype=torch.float32)


def noise(sd: float, seed: int, shape: tuple[int, ...] = (FRAMES, SIDE, SIDE)) -> np.ndarray:
    return np.random.default_rng(seed).normal(0, sd, shape)


CLEAN = 0.2 + 0.5 * blobs(swing(1.3))
FROZEN = np.repeat(CLEAN[:1], FRAMES, axis=0)
FLICKERING = CLEAN + noise(0.02, 1)


def powers(*clips: np.ndarray) -> torch.Tensor:
    return metrics.spectral_power(batch(*clips), CLOCK)


# --- Flicker and spectra --------------------------------------------------------------------------


def test_flicker_is_vbenchs_mean_absolute_difference():
    rng = np.random.default_rng(0)
    frames = rng.integers(0, 256, (FRAMES, 8, 10, 3), dtype=np.uint8)
    steps = [np.abs(b.astype(float) - a).mean() for a, b in pairwise(frames)]
    video = torch.tensor(frames).movedim(-1, 1).float()[None] / 255
    found = metrics.flicker(video)
    assert found.item() == pytest.approx(np.mean(steps), rel=1e-5)
    assert metrics.vbench_flickering(found).item() == pytest.approx((255 - np.mean(steps)) / 255)


def test_flicker_of_an_alternating_grey_is_its_step():
    grey = np.where(np.arange(FRAMES) % 2, 0.5, 0.5 + 6 / 255)[:, None, None] * np.ones((1, 4, 4))
    assert metrics.flicker(batch(grey)).item() == pytest.approx(6, rel=1e-4)


def test_a_frozen_video_has_the_best_flicker_and_the_worst_score():
    flicker = metrics.flicker(batch(CLEAN, FROZEN, FLICKERING))
    motion = metrics.motion_amplitude(powers(CLEAN, FROZEN, FLICKERING), BINS)
    assert flicker[1] == 0 and motion[1] < 1e-4
    clean, frozen, flickering = metrics.score(flicker, motion, flicker[0], motion[0])
    assert clean == 1 and frozen < 1e-6
    assert 0.05 < flickering < 0.95
    assert flickering == pytest.approx((flicker[0] / flicker[2]).item(), rel=0.02)


def test_a_video_with_half_of_the_motion_scores_half():
    one = torch.tensor([1.0])
    assert metrics.score(one, one / 2, one, one).item() == pytest.approx(0.5)
    assert metrics.score(one / 2, one, one, one).item() == 1  # less of a defect earns nothing more


def test_power_of_a_pulse_is_half_its_amplitude_squared_and_lies_at_its_frequency():
    amplitude, hz = 0.1, CLOCK.bins_hz[9]  # 3 Hz
    pulse = 0.5 + amplitude * np.cos(2 * np.pi * hz * TIME_F)[:, None, None] * np.ones((1, 70, 2))
    power_K = powers(pulse)[0]
    assert power_K.sum().item() == pytest.approx(amplitude**2 / 2, rel=0.02)
    assert power_K[9].item() == pytest.approx(amplitude**2 / 2 * 2 / 3, rel=0.02)
    assert power_K[8:11].sum() > 0.99 * power_K.sum()


def test_power_agrees_with_scipys_density():
    from scipy.signal import detrend, periodogram

    luma_SHW = FLICKERING[1:]
    _, density_KHW = periodogram(
        detrend(luma_SHW, axis=0), FPS, "hann", detrend=False, axis=0, scaling="density"
    )
    expected_K = density_KHW.mean(axis=(1, 2)) * FPS / len(luma_SHW)
    assert np.allclose(powers(FLICKERING)[0].numpy(), expected_K, rtol=1e-3, atol=1e-10)


def test_bins_are_those_of_the_loss_and_the_comb_stands_apart():
    assert [round(CLOCK.bins_hz[k], 2) for k in BINS.comb] == [3.67, 4.0, 4.33, 7.67, 8.0]
    assert [round(CLOCK.bins_hz[k], 2) for k in BINS.jitter] == [6.0, 6.33, 6.67, 7.0, 7.33]
    assert CLOCK.bins_hz[BINS.band[0]] >= 0.5 and CLOCK.bins_hz[BINS.band[-1]] < 6
    assert sorted(BINS.band + BINS.jitter + BINS.comb) == list(range(2, 25))


def test_a_cutoff_that_no_bin_reaches_is_refused():
    with pytest.raises(ValueError, match=r"no bin of 7\.9 Hz and above"):
        metrics.bins_of(CLOCK, 7.9, (0.5, 6.0))


def test_excess_power_of_white_flicker_has_the_known_value_and_a_group_pattern_is_no_excess():
    """White noise of variance v has 2 v / S in each bin but the last."""
    sd = 0.03
    group = np.full((FRAMES, SIDE, SIDE), 0.5)
    group[1:] += 0.05 * np.tile([1, -1, -1, 1], 12)[:, None, None]
    white = 0.5 + noise(sd, 2)
    base = 0.5 + noise(sd / 4, 3)
    power = powers(white, base, group)
    jitter = metrics.pooled(power, BINS.jitter)
    assert jitter[0].item() == pytest.approx(2 * sd**2 / 48 * len(BINS.jitter), rel=0.03)
    excess = metrics.excess_log2(jitter, jitter[1:2])
    assert excess[0].item() == pytest.approx(4, abs=0.05)  # 16 times the power
    assert excess[1].item() == pytest.approx(0, abs=1e-6)
    comb = metrics.pooled(power, BINS.comb)
    assert comb[2] > 0.99 * power[2].sum() and excess[2] < -3


def test_the_excess_of_the_reference_clips_themselves_is_0_in_the_mean():
    power = metrics.pooled(
        powers(*(CLEAN + noise(0.01 * (i + 1), i) for i in range(4))), BINS.jitter
    )
    assert metrics.excess_log2(power, power).mean().item() == pytest.approx(0, abs=1e-5)


def test_a_frozen_video_is_far_below_the_reference_in_the_band():
    band = metrics.pooled(powers(CLEAN, FROZEN, FLICKERING), BINS.band)
    excess = metrics.excess_log2(band, band[:1])
    assert excess[1] < -15 and 0 < excess[2] < 0.2


def test_motion_amplitude_is_the_rms_of_a_pulse_and_does_not_count_white_flicker():
    pulse = 0.5 + 0.1 * np.cos(2 * np.pi * 2 * TIME_F)[:, None, None] * np.ones((1, SIDE, SIDE))
    still = np.full_like(pulse, 0.5)
    motion = metrics.motion_amplitude(
        powers(pulse, pulse + noise(0.05, 4), still + noise(0.05, 5), still), BINS
    )
    expected = 255 * 0.1 / math.sqrt(2)
    assert motion[0].item() == pytest.approx(expected, rel=0.01)
    assert motion[1].item() == pytest.approx(expected, rel=0.03)
    assert motion[2] < 0.25 * 255 * 0.05 and motion[3] < 1e-3


def test_motion_amplitude_keeps_fast_motion_whose_edges_reach_above_the_cutoff():
    fast = 0.2 + 0.5 * blobs(swing(3.5), wide=1.5)
    power = powers(fast, fast + noise(0.05, 5))
    assert metrics.pooled(power, BINS.jitter)[0] > 0.3 * metrics.pooled(power, BINS.band)[0]
    motion = metrics.motion_amplitude(power, BINS)
    band_rms = 255 * metrics.pooled(power, BINS.band).sqrt()
    assert 0.8 * band_rms[0] < motion[0] < band_rms[0]
    assert motion[1].item() == pytest.approx(motion[0].item(), rel=0.05)


def test_the_eye_sees_10_hz_best_and_neither_slow_change_nor_60_hz():
    sensitivity = metrics.temporal_csf(torch.tensor([0.5, 10.0, 30.0, 60.0]))
    hz = torch.linspace(0.5, 40, 400)
    assert 7 < hz[metrics.temporal_csf(hz).argmax()] < 13
    assert sensitivity[1] > 0.97 and sensitivity[0] < 0.3
    assert sensitivity[2] < 0.4 and sensitivity[3] < 0.05


def test_visible_flicker_of_a_grey_pulse_is_its_contrast_times_the_sensitivity():
    hz = 20 / 3  # a bin of its own, away from the comb
    light = 0.3 * (1 + 0.02 * np.cos(2 * np.pi * hz * TIME_F))[:, None, None] * np.ones((1, 4, 4))
    coded = 1.055 * light ** (1 / 2.4) - 0.055
    found = metrics.visible_flicker(batch(coded), CLOCK, 6.0).item()
    expected = 2 / math.sqrt(2) * metrics.temporal_csf(torch.tensor([hz])).item()
    assert found == pytest.approx(expected, rel=0.03)


def test_visible_flicker_follows_the_rate_of_playback():
    """The same frames alternate at 3 Hz or, shown twice as fast, at 6: the eye sees more."""
    pulse = 0.5 + 0.01 * np.cos(2 * np.pi * 3 * TIME_F)[:, None, None] * np.ones((1, 4, 4))
    slow, fast = (
        metrics.visible_flicker(batch(pulse), TimeBase(fps, FRAMES), 1.0) for fps in (16, 32)
    )
    ratio = metrics.temporal_csf(torch.tensor([6.0])) / metrics.temporal_csf(torch.tensor([3.0]))
    assert (fast / slow).item() == pytest.approx(ratio.item(), rel=0.05) and ratio > 1.2


def test_a_frozen_video_shows_no_flicker_and_scores_nothing():
    calm = 0.2 + 0.5 * blobs(swing(0.8), wide=8.0)
    clips = calm, np.repeat(calm[:1], FRAMES, axis=0), calm + noise(0.03, 1)
    seen = metrics.visible_flicker(batch(*clips), CLOCK, 6.0)
    motion = metrics.motion_amplitude(powers(*clips), BINS)
    scores = metrics.score(seen, motion, seen[0], motion[0])
    assert seen[1] < 1e-4 * seen[2] and seen[2] > 3 * seen[0]
    assert scores[0] == 1 and scores[1] < 1e-6 and 0 < scores[2] < 0.5


# --- Tracks ---------------------------------------------------------------------------------------


def coloured(
    weight_FHW: np.ndarray, colour=(0.8, 0.2, 0.1), ground=(0.25, 0.3, 0.35)
) -> torch.Tensor:
    weight = weight_FHW[:, None]
    mixed = weight * np.reshape(colour, (3, 1, 1)) + (1 - weight) * np.reshape(ground, (3, 1, 1))
    return batch(mixed)


COLOUR = torch.tensor([[0.8, 0.2, 0.1]])


def discs(track_F2: np.ndarray, radius: float = 8.0) -> np.ndarray:
    y, x = np.mgrid[0:SIDE, 0:SIDE] + 0.5
    away = np.hypot(x - track_F2[:, 0, None, None], y - track_F2[:, 1, None, None])
    return np.clip(radius - away + 0.5, 0, 1)


def test_the_centre_of_a_coloured_disc_is_found_to_a_tenth_of_a_pixel():
    track = swing(1.3) + 0.31 * np.sin(9 * TIME_F)[:, None]
    video = coloured(discs(track)) + 0.02 * torch.tensor(noise(1, 6, (1, FRAMES, 3, SIDE, SIDE)))
    found = metrics.centroid(metrics.cover(video.float(), COLOUR))[0].numpy()
    assert np.abs(found - track).max() < 0.1


def test_the_mask_of_a_disc_has_its_area_though_both_are_textured():
    texture = 0.04 * np.sign(np.sin(np.arange(SIDE)))
    video = coloured(discs(swing(1.3))) + torch.tensor(texture, dtype=torch.float32)
    area = metrics.cover(video, COLOUR).sum(dim=(2, 3)).mean().item()
    assert area == pytest.approx(math.pi * 8**2, rel=0.01)


def test_a_mover_that_is_not_there_has_no_track():
    video = coloured(np.zeros((FRAMES, SIDE, SIDE)))
    assert metrics.centroid(metrics.cover(video, COLOUR)).isnan().all()


@pytest.mark.parametrize("amplitude", [0.7, 9.0])
def test_a_pan_is_followed_to_a_twentieth_of_a_pixel(amplitude):
    track = np.stack(
        [amplitude * np.cos(2 * np.pi * 1.1 * TIME_F), 0.4 * amplitude * np.sin(5 * TIME_F)], 1
    )
    found = metrics.pan_track(batch(waves(track) + noise(0.002, 7, (FRAMES, 64, 64))))[0].numpy()
    assert np.abs(found - (track - track[0])).max() < 0.05


def test_nothing_pans_in_a_frozen_or_empty_picture():
    frozen = np.repeat(waves(np.zeros((1, 2))), FRAMES, axis=0)
    assert metrics.pan_track(batch(frozen, np.full_like(frozen, 0.5))).abs().max() < 1e-4


def test_jerk_of_a_swing_is_its_third_derivative():
    hz, amplitude, fps = 1.3, 8.0, 240
    track = swing(hz, amplitude, np.arange(2 * fps) / fps)
    expected = amplitude * (2 * np.pi * hz) ** 3 * np.abs(np.cos(0)) / math.sqrt(2)
    assert metrics.jerk(batch(track), fps).item() == pytest.approx(expected, rel=0.05)


def test_position_noise_raises_jerk_and_jitter_by_the_known_amount_and_a_frozen_track_has_none():
    sd, truth = 0.2, swing(1.3)
    shaken = truth + np.random.default_rng(8).normal(0, sd, (FRAMES, 2))
    frozen = np.repeat(truth[:1], FRAMES, axis=0)
    tracks = batch(truth, shaken, frozen)
    jerk = metrics.jerk(tracks, FPS)
    # the third difference has the weights 1, 3, 3, 1: variance 20 sd^2 in x and in y
    expected = math.sqrt(jerk[0].item() ** 2 + 40 * sd**2 * FPS**6)
    assert jerk[1].item() == pytest.approx(expected, rel=0.15)
    assert metrics.ratio_log2(jerk, jerk[0], 1.0)[1] > 1
    jitter = metrics.track_jitter(tracks, FPS, 6.0)
    assert jitter[0] < 0.01 * sd
    assert jitter[1].item() == pytest.approx(math.sqrt(2) * sd * math.sqrt(2 / 8), rel=0.3)
    motion = metrics.track_amplitude(tracks)
    assert motion[0].item() == pytest.approx(8 / math.sqrt(2), rel=0.03)
    scores = metrics.score(jerk, motion, jerk[0], motion[0])
    assert jerk[2] == 0 and scores[2] < 1e-6 and scores[0] == 1 and scores[1] < 0.5


# --- Flow -----------------------------------------------------------------------------------------


def panned(frames: int = 9, step: tuple[float, float] = (1.5, -0.75)):
    """A pan, its true flow and the flow of what does not move."""
    track = np.arange(frames)[:, None] * np.array(step)
    clip = waves(track)
    flow = torch.tensor(step).expand(1, frames - 1, 64, 64, 2).clone()
    return clip, flow


def test_with_the_true_flow_a_pan_has_no_warping_error_and_flicker_has_its_own():
    clip, flow = panned()
    gain = np.where(np.arange(9) % 2, 8 / 255, 0)[:, None, None]
    clean, flickering, frozen = (
        metrics.warping_error(batch(c), flow).item()
        for c in (clip, clip + gain, np.repeat(clip[:1], 9, axis=0))
    )
    assert clean < 0.6  # of 25 levels rms: bicubic look-up of waves of 7 px
    assert flickering == pytest.approx(8, rel=0.05)
    assert frozen > 10


def test_by_its_own_flow_a_frozen_video_has_no_warping_error_and_scores_nothing():
    clip, flow = panned(FRAMES)
    frozen = np.repeat(clip[:1], FRAMES, axis=0)
    errors = metrics.warping_error(batch(clip, frozen), torch.cat([flow, torch.zeros_like(flow)]))
    motion = metrics.motion_amplitude(metrics.spectral_power(batch(clip, frozen), CLOCK), BINS)
    scores = metrics.score(errors, motion, errors[0], motion[0])
    assert errors[1] < 1e-3 and scores[1] < 1e-6 and scores[0] == 1


def test_what_leaves_the_picture_or_is_hidden_does_not_count():
    clip, flow = panned()
    spoilt = clip.copy()
    spoilt[1::2, 20:30, 20:30] = 1.0
    valid = torch.ones(1, 8, 64, 64, dtype=torch.bool)
    valid[:, :, 15:35, 15:35] = False
    assert metrics.warping_error(batch(spoilt), flow).item() > 3
    assert metrics.warping_error(batch(spoilt), flow, valid).item() < 0.6
    assert metrics.warping_error(batch(clip), flow, ~valid & valid).isnan().all()


def test_flow_that_does_not_lead_back_is_not_consistent():
    forth = torch.zeros(1, 16, 16, 2)
    forth[..., 0] = 3
    back = -forth
    back[:, :, 8:] = 0  # there is something else where the right half went
    seen = metrics.consistent(forth, back)[0]
    assert seen[:, :4].all() and not seen[:, 6:].any()


# --- Tempo and beats ------------------------------------------------------------------------------


@pytest.mark.parametrize("hz", [0.5, 0.83, 1.3, 2.71, 5.9])
def test_the_frequency_of_a_track_is_found_to_one_percent(hz):
    found, share = metrics.dominant_hz(batch(swing(hz) + noise(0.1, 9, (FRAMES, 2))), FPS)
    assert found.item() == pytest.approx(hz, rel=0.01)
    assert share.item() > 0.95


@pytest.mark.parametrize("phase", np.linspace(0, np.pi, 5))
def test_little_more_than_one_turn_on_a_slope_is_enough(phase):
    time = np.arange(25) / FPS
    signal = np.cos(2 * np.pi * 0.8 * time + phase) + 5 + 3 * time
    found, share = metrics.dominant_hz(batch(signal[:, None]).double(), FPS)
    assert found.item() == pytest.approx(0.8, rel=0.01) and share.item() > 0.999


def test_pixels_tell_the_frequency_of_a_swing_and_the_energy_of_motion_twice_of_it():
    clip = batch(CLEAN)
    pixels, _ = metrics.dominant_hz(clip.flatten(2), FPS)
    energy = motion_energy((clip[0, ..., None].expand(-1, -1, -1, 3) * 255).byte())
    twice, _ = metrics.dominant_hz(energy[None, 1:, None], FPS)
    assert pixels.item() == pytest.approx(1.3, rel=0.02)
    assert twice.item() == pytest.approx(2.6, rel=0.03)


def test_noise_has_little_confidence_and_a_frozen_video_none_and_no_frequency():
    signals = batch(noise(1, 10, (FRAMES, 64)), np.ones((FRAMES, 64)))
    hz, share = metrics.dominant_hz(signals, FPS)
    assert share[0] < 0.15 and share[1] == 0
    assert hz[1].isnan() and not hz[0].isnan()


def test_a_clip_without_one_whole_turn_is_refused():
    with pytest.raises(ValueError, match="no whole turn"):
        metrics.dominant_hz(torch.zeros(1, 4, 1), 16, (0.5, 3.0))


def test_motion_beats_are_the_ends_of_a_swing():
    hz = 1.3
    curve = metrics.motion_curve(batch(CLEAN))[0].numpy()
    found = metrics.motion_beats(curve, FPS)
    turns = (np.arange(1, 8) / 2 - 0.4 / (2 * np.pi)) / hz
    inside = turns[(turns > 1 / FPS) & (turns < TIME_F[-1] - 1 / FPS)]
    assert len(found) == len(inside) and np.abs(found - inside).max() < 0.01


def test_matched_beats_beat_shuffled_ones_and_a_shift_by_half_a_beat_does_not():
    beats = np.arange(0.2, 3, 0.5)
    on, off = (metrics.beat_match(beats, beats + late, 3.0) for late in (0.03, 0.25))
    assert on.f1 == on.precision == on.recall == 1
    # within 50 ms of a beat every 0.5 s lies a fifth of all shifts
    assert on.chance == pytest.approx(0.2, abs=0.06) and on.gain > 0.7
    assert off.f1 == 0 and off.gain < 0


def test_precision_and_recall_look_both_ways():
    onsets = np.arange(0.2, 3, 1.0)
    half = metrics.beat_match(np.arange(0.2, 3, 0.5), onsets, 3.0)
    assert half.recall == 1 and half.precision == pytest.approx(0.5)


def test_one_beat_is_not_matched_twice():
    match = metrics.beat_match(np.array([1.0]), np.array([0.96, 1.0, 1.04]), 3.0)
    assert match.recall == pytest.approx(1 / 3) and match.precision == 1


def test_beats_everywhere_gain_nothing():
    rng = np.random.default_rng(11)
    gains = [
        metrics.beat_match(rng.uniform(0, 3, 40), rng.uniform(0, 3, 6), 3.0).gain for _ in range(60)
    ]
    assert abs(np.mean(gains)) < 0.03


def test_other_clips_soundtracks_may_be_the_shuffled_ones():
    beats = np.arange(0.2, 3, 0.5)
    assert metrics.beat_match(beats, beats, 3.0, [beats]).gain == 0
    assert metrics.beat_match(beats, beats, 3.0, [beats + 0.25]).gain == 1


def test_a_frozen_video_is_on_no_beat():
    curve = metrics.motion_curve(batch(FROZEN))[0].numpy()
    match = metrics.beat_match(metrics.motion_beats(curve, FPS), np.arange(0.2, 3, 0.5), 3.0)
    assert match.f1 == 0 == match.gain


# --- Appearance -----------------------------------------------------------------------------------


def test_lab_of_the_primaries_is_the_published_one():
    published = {(1, 1, 1): (100, 0, 0), (1, 0, 0): (53.24, 80.09, 67.20), (0, 0, 0): (0, 0, 0)}
    for rgb, expected in published.items():
        assert metrics.lab(torch.tensor([rgb]).double())[0].tolist() == pytest.approx(
            expected, abs=0.1
        )


def test_colour_error_is_the_distance_in_lab_and_a_mover_that_is_missing_has_a_large_one():
    mask = torch.tensor(discs(swing(1.3)))[None].float()
    other = (0.8, 0.4, 0.1)
    videos = [coloured(mask[0].numpy(), colour) for colour in ((0.8, 0.2, 0.1), other)]
    inner = (mask == 1).float()
    right, wrong = (metrics.colour_error(video, inner, COLOUR).item() for video in videos)
    true_lab, other_lab = metrics.lab(torch.tensor([[0.8, 0.2, 0.1], other]))
    assert right < 0.01
    assert wrong == pytest.approx((true_lab - other_lab).norm().item(), rel=1e-3)
    empty = coloured(np.zeros((FRAMES, SIDE, SIDE)))
    missing = metrics.colour_error(empty, metrics.cover(empty, COLOUR), COLOUR).item()
    assert missing > 40


def test_shape_is_judged_wherever_the_mover_is():
    here, there = (torch.tensor(discs(t))[None].float() for t in (swing(1.3), swing(2.1)))
    assert metrics.shape_overlap(there, here).item() > 0.97
    assert abs(metrics.area_log2(there, here).item()) < 0.01
    small = torch.tensor(discs(swing(1.3), 8 / math.sqrt(2)))[None].float()
    assert metrics.shape_overlap(small, here).item() == pytest.approx(0.5, abs=0.02)
    assert metrics.area_log2(small, here).item() == pytest.approx(-1, abs=0.03)
    none = torch.zeros_like(here)
    assert metrics.shape_overlap(none, here).item() == 0
    assert metrics.area_log2(none, here).item() < -10


# --- Intervals ------------------------------------------------------------------------------------


def test_the_interval_of_one_seed_is_the_normal_one():
    values = np.random.default_rng(12).normal(3, 2, 400)
    mean, low, high = metrics.bootstrap_interval(values)
    half = 1.96 * values.std() / math.sqrt(400)
    assert mean == pytest.approx(values.mean())
    assert [low, high] == pytest.approx([mean - half, mean + half], abs=0.1 * half)


def test_the_interval_of_many_seeds_has_the_width_of_both_levels():
    """Seeds of sd 1, samples of sd 3: the mean's variance is 1 / S + 9 / (S N), and as much again
    of the second part, because both levels are drawn anew."""
    rng = np.random.default_rng(13)
    seeds, samples = 60, 20
    values = rng.normal(0, 1, (seeds, 1)) + rng.normal(0, 3, (seeds, samples))
    mean, low, high = metrics.bootstrap_interval(values)
    half = 1.96 * math.sqrt(1 / seeds + 2 * 9 / (seeds * samples))
    assert (high - low) / 2 == pytest.approx(half, rel=0.2)
    flat = metrics.bootstrap_interval(values.ravel())
    assert flat[2] - flat[1] < 0.8 * (high - low)  # as if all samples were of one seed
    assert low < mean < high


def test_the_interval_covers_the_truth_as_often_as_it_says():
    rng = np.random.default_rng(14)
    hits = 0
    for trial in range(100):
        values = rng.normal(0, 1, (12, 1)) + rng.normal(0, 1, (12, 16))
        _, low, high = metrics.bootstrap_interval(values, resamples=300, seed=trial)
        hits += low < 0 < high
    assert hits >= 87


def test_the_interval_is_the_same_each_time():
    values = np.random.default_rng(15).normal(size=(3, 8))
    assert metrics.bootstrap_interval(values) == metrics.bootstrap_interval(values)
    assert metrics.bootstrap_interval(values) != metrics.bootstrap_interval(values, seed=1)
