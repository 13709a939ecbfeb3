"""Tempo and beats against tracks whose beats are known, and against what has none."""

import numpy as np
import pytest

from tempolora.rhythm.beat import MOST_LAG_S, SURE, _self_correlation, align, beats_of, tempo_of

RATE_HZ = 200.0


def struck(beats_s, duration_s, strength=1.0):
    """A curve that is `strength` at each beat, and falls off within 20 ms."""
    curve = np.zeros(round(duration_s * RATE_HZ))
    at = np.round(np.asarray(beats_s) * RATE_HZ).astype(int)
    np.maximum.at(curve, at, strength)
    return np.convolve(curve, [1, 0.6, 0.3, 0.1])[: len(curve)]


@pytest.mark.parametrize("duration_s", [3.1, 10, 60])
@pytest.mark.parametrize("bpm", [50, 60, 90, 120, 140, 200, 235])
def test_the_tempo_of_a_metronome_is_found_with_confidence(bpm, duration_s):
    tempo = tempo_of(struck(np.arange(0.11, duration_s - 0.05, 60 / bpm), duration_s), RATE_HZ)
    assert tempo.bpm == pytest.approx(bpm, rel=0.02)
    assert tempo.confidence > 0.85


def test_weaker_strokes_between_the_beats_do_not_double_the_tempo():
    curve = struck(np.arange(0, 20, 0.5), 20.1) + struck(np.arange(0.25, 20, 0.5), 20.1, 0.3)
    assert tempo_of(curve, RATE_HZ).bpm == pytest.approx(120, rel=0.01)


def test_noise_and_random_strokes_have_no_tempo_to_be_sure_of():
    rng = np.random.default_rng(0)
    for duration_s, most in ((6, SURE), (10, 0.35), (60, 0.15)):
        found = []
        for _ in range(20):
            noise = rng.standard_normal(round(duration_s * RATE_HZ))
            strokes = struck(rng.uniform(0, duration_s - 0.1, round(2.5 * duration_s)), duration_s)
            found += [tempo_of(c, RATE_HZ).confidence for c in (np.abs(noise), strokes)]
        assert max(found) < most


@pytest.mark.parametrize("curve", [np.zeros(2000), np.full(2000, 3.0), np.zeros(0), np.ones(40)])
def test_what_never_changes_and_what_is_too_short_has_no_tempo(curve):
    assert tempo_of(curve, RATE_HZ) is None


def test_confidence_falls_as_the_player_becomes_uneven():
    rng = np.random.default_rng(0)
    steady = np.arange(0.2, 30, 0.5)
    sure = [
        tempo_of(struck(steady + rng.normal(0, off_s, 60), 30.5), RATE_HZ).confidence
        for off_s in (0, 0.01, 0.02, 0.05)
    ]
    assert sure == sorted(sure, reverse=True)
    assert sure[1] > 0.8 > SURE > sure[3]


def test_self_correlation_equals_the_correlation_of_what_overlaps():
    curve = np.random.default_rng(0).standard_normal(300)
    found = _self_correlation(curve, 150)
    for lag in (0, 1, 77, 150):
        early, late = curve[: 300 - lag], curve[lag:]
        expected = early @ late / np.sqrt((early @ early) * (late @ late))
        assert found[lag] == pytest.approx(expected, abs=1e-10)


def test_beats_are_where_the_player_struck_though_unevenly():
    rng = np.random.default_rng(3)
    beats_s = np.arange(1.2, 18, 60 / 105)
    beats_s = beats_s + rng.normal(0, 0.01, len(beats_s))
    curve = struck(beats_s, 20) + 0.05 * rng.random(4000)
    found_s = beats_of(curve, RATE_HZ, tempo_of(curve, RATE_HZ).bpm)
    assert len(found_s) == len(beats_s)  # none before the first stroke, none after the last
    np.testing.assert_allclose(found_s, beats_s, atol=0.02)


def test_a_missed_stroke_still_has_its_beat():
    beats_s = np.arange(0.3, 12, 0.6)
    curve = struck(np.delete(beats_s, 9), 12.5)
    np.testing.assert_allclose(beats_of(curve, RATE_HZ, 100), beats_s, atol=0.02)


@pytest.mark.parametrize("later_s", [-0.4, -0.03, 0.0, 0.2])
@pytest.mark.parametrize("sign", [1, -1])
def test_the_lag_and_the_sign_between_two_curves_are_found(later_s, sign):
    rng = np.random.default_rng(0)
    at_s = np.arange(240) / 24
    hits_s = np.sort(rng.uniform(0.6, 9.4, 12))

    def bumps(shift_s):
        return np.exp(-(((at_s[:, None] - hits_s - shift_s) / 0.06) ** 2)).sum(1)

    found = align(sign * bumps(later_s), bumps(0), 24)
    assert found.lag_s == pytest.approx(later_s, abs=0.005)
    assert sign * found.correlation > 0.95
    assert found.chance < 0.5


def test_unlike_curves_are_alike_by_chance_only():
    rng = np.random.default_rng(0)
    found = align(rng.random(240), rng.random(240), 24)
    assert abs(found.lag_s) <= MOST_LAG_S
    assert abs(abs(found.correlation) - found.chance) < 0.1


def test_flat_curves_and_short_clips_are_not_aligned():
    curve = np.random.default_rng(0).random(100)
    assert align(np.ones(100), curve, 16) is None
    assert align(curve, np.zeros(100), 16) is None
    assert align(curve[:40], curve[:40], 16) is None
