"""Resampled motion is as smooth and as sharp as motion drawn at the target rate."""

import numpy as np
import pytest

from tempolora.bench.resample import RATES, SQUARES, measure
from tempolora.data import resample
from tempolora.data.resample import Pick

PLAIN, TEXTURED = SQUARES


def clock_of(fps, num):
    return resample.clock(np.arange(num) / fps, 16)


def test_a_source_within_half_a_percent_of_the_target_is_taken_one_to_one():
    for fps in (15.95, 16, 16.05):
        picks = resample.plan_picks(clock_of(fps, 200), 16)
        assert picks == [Pick(k, k, 0.0) for k in range(200)]


def test_a_23_976_fps_source_gives_a_real_frame_at_every_other_output():
    picks = resample.plan_picks(clock_of(24000 / 1001, 1200), 16)
    assert len(picks) == 800
    assert picks[0::2] == [Pick(3 * k, 3 * k, 0.0) for k in range(400)]
    assert all(pick.at == pytest.approx(0.5) for pick in picks[1::2])


def test_a_25_fps_source_is_taken_by_its_timestamps():
    picks = resample.plan_picks(clock_of(25, 50), 16)
    where = [(1 - p.at) * p.left + p.at * p.right for p in picks]
    np.testing.assert_allclose(where, np.arange(len(picks)) * 25 / 16, atol=0.02)


def test_uneven_timestamps_are_followed():
    pts_s = np.cumsum([0.0, *np.tile([0.03, 0.05], 30)])
    clock_s = resample.clock(5 + pts_s, 16)
    picks = resample.plan_picks(clock_s, 16)
    times = [np.interp(p.left + p.at, np.arange(61), pts_s) for p in picks]
    np.testing.assert_allclose(times, np.arange(len(picks)) / 16, atol=0.001)


def test_a_source_slower_than_the_target_is_told():
    assert resample.is_too_slow(np.arange(50) / 15.9, 16)
    assert not resample.is_too_slow(np.arange(50) / 15.95, 16)


def test_a_gap_of_more_than_two_target_intervals_is_a_hole():
    clock_s = np.delete(np.arange(60) / 30, [20, 21, 22])  # a gap of 4/30 s = 2.13 / 16 s
    picks = resample.plan_picks(clock_s, 16)
    assert resample.hole_in(picks, clock_s, 16) == pytest.approx(4 / 30)
    assert resample.hole_in(picks[:10], clock_s, 16) is None


@pytest.mark.parametrize("gap_s", [1 / 24, 1 / 30, 1 / 60])
def test_paths_keep_swings_of_1_to_4_hz_to_one_percent(gap_s):
    """Against the swing itself; the straight line between neighbours loses up to 13 %."""
    knots = [-1.0, 0.0, 1.0, 2.0]
    for hz in (1, 2, 3, 4):
        for phase in np.linspace(0, np.pi, 7):
            for at in (0.25, 0.5, 0.7):
                swing = np.cos(2 * np.pi * hz * gap_s * np.array([*knots, at]) + phase)
                weights = resample.time_weights(knots, at, gap_s)
                assert weights @ swing[:4] == pytest.approx(swing[4], abs=0.01)
    assert resample.time_weights(knots, 0.3, gap_s) @ np.array(knots) == pytest.approx(0.3)


def test_a_scene_cut_takes_the_nearest_frame():
    rng = np.random.default_rng(0)
    scenes = rng.integers(0, 255, (2, 48, 64, 3), np.uint8)
    frames = [scenes[0], scenes[0], scenes[1], scenes[1]]
    make = resample.frame_maker(frames.__getitem__, np.arange(4.0), "auto")
    made = make(Pick(1, 2, 0.6))
    assert made.origin == "nearest"
    np.testing.assert_array_equal(made.frame, scenes[1])


def test_blend_is_the_mean_weighted_by_time_and_nearest_the_nearer():
    frames = [np.full((8, 8, 3), level, np.uint8) for level in (40, 140)]
    for mode, level in (("blend", 70), ("nearest", 40)):
        make = resample.frame_maker(frames.__getitem__, np.arange(2.0), mode)
        assert (make(Pick(0, 1, 0.3)).frame == level).all()


@pytest.mark.parametrize("rate", RATES, ids=lambda rate: f"{float(rate):.3f}")
@pytest.mark.parametrize(
    ("mover", "hz"),
    [(PLAIN, 1.0), (PLAIN, 2.0), (PLAIN, 3.0), (PLAIN, 4.0), (TEXTURED, 1.0), (TEXTURED, 4.0)],
)
def test_resampled_motion_has_the_power_and_the_edges_of_motion_drawn_at_16_fps(mover, rate, hz):
    (cell,) = measure(mover, rate, hz, height=64, width=96, modes=("auto",))
    assert cell.power <= 1.2
    assert cell.sharpness >= 0.9
    assert cell.fallbacks == 0


@pytest.mark.parametrize("rate", [24.0, 30.0, 25.0])
@pytest.mark.parametrize(("hz", "least", "most"), [(2, 0.97, 1.03), (5, 0.85, 1.05), (11, 0, 0.1)])
def test_a_sped_up_tone_passes_below_the_limit_and_is_gone_above(rate, hz, least, most):
    """A pixel that swings at `hz` after the speed-up, twice as fast as it was filmed.

    11 Hz would come back as 5 Hz at 16 fps.
    """
    speed, fps, frames = 2.0, 16.0, 33
    pts_s = np.arange(int(rate * speed * (frames + 1) / fps)) / rate
    level = 128 + 100 * np.cos(2 * np.pi * (hz / speed * pts_s))

    def get(index):
        return np.full((2, 2, 3), np.rint(level[index]), np.uint8)

    clock_s = resample.clock(pts_s / speed, fps)
    picks = resample.plan_picks(clock_s, fps)[:frames]
    make = resample.smooth_maker(get, clock_s, fps)
    made = np.array([make(pick).frame[0, 0, 0] for pick in picks], float)
    time_s = np.arange(frames) / fps
    waves = [np.ones(frames), *(f(2 * np.pi * hz * time_s) for f in (np.cos, np.sin))]
    _, a, b = np.linalg.lstsq(np.stack(waves, 1)[2:-2], made[2:-2], rcond=None)[0]
    assert least <= np.hypot(a, b) / 100 <= most


def test_a_still_picture_stays_as_it_is_when_sped_up():
    clock_s = np.arange(40) / 48.0
    picture = np.random.default_rng(0).integers(0, 256, (4, 5, 3), dtype=np.uint8)
    make = resample.smooth_maker(lambda _: picture, clock_s, 16.0)
    for pick in resample.plan_picks(clock_s, 16.0):
        assert np.array_equal(make(pick).frame, picture)
