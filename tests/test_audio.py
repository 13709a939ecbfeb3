"""The onset envelope is on the video's clock."""

import numpy as np
import pytest

from tempolora.data.audio import Track, has_sound, onset_envelope
from tempolora.data.toy_set import click_track

TIMES_S = np.arange(49) / 16


@pytest.mark.parametrize("rate", [8_000, 22_050, 44_100, 96_000])
@pytest.mark.parametrize("click_s", [0.5, 0.51, 0.55, 1.0, 1.23, 2.9])
def test_a_click_peaks_at_the_frame_nearest_to_it(rate, click_s):
    envelope = onset_envelope(click_track(np.array([click_s]), 3.1, rate), rate, TIMES_S)
    assert envelope.shape == (49,)
    assert envelope.dtype == np.float32
    assert envelope.argmax() == np.abs(TIMES_S - click_s).argmin()
    assert envelope.max() == 1


def test_frame_times_count_from_the_start_of_the_sound():
    audio = click_track(np.array([1.0]), 3.1, 22_050)
    late = onset_envelope(audio, 22_050, TIMES_S - 0.5)  # sound that starts half a second late
    assert late.argmax() == 24


def test_stereo_is_heard_like_mono():
    mono = click_track(np.array([0.4, 1.7]), 3.1, 44_100)
    stereo = onset_envelope(np.stack([mono, mono], 1), 44_100, TIMES_S)
    np.testing.assert_allclose(stereo, onset_envelope(mono, 44_100, TIMES_S), atol=1e-6)


def test_silence_has_no_onsets_and_no_sound():
    for audio in (np.zeros(22_050, np.float32), np.zeros(0, np.float32)):
        assert not has_sound(audio)
        assert not onset_envelope(audio, 22_050, TIMES_S).any()


def test_the_silence_threshold_is_minus_60_dbfs():
    tone = np.sin(2 * np.pi * 440 * np.arange(22_050) / 22_050) * np.sqrt(2)  # RMS 1
    assert has_sound(10 ** (-59 / 20) * tone)
    assert not has_sound(10 ** (-61 / 20) * tone)


RATES = (8_000, 22_050, 44_100, 48_000, 96_000)


@pytest.mark.parametrize("channels", [1, 2])
@pytest.mark.parametrize("rate", RATES)
def test_onsets_of_more_than_a_minute_are_exact_from_the_first_to_the_last(rate, channels):
    duration_s = 62.0  # a piece of analysis ends at 60 s
    clicks_s = np.concatenate([np.arange(0.33, 4, 0.71), np.arange(57, 61.5, 0.53), [60.0]])
    mono = click_track(clicks_s, duration_s, rate)
    track = Track(mono if channels == 1 else np.stack([mono, mono], 1), rate)
    times_s = np.arange(len(track.strength_S)) / track.rate_hz
    off_s = []
    for click_s in clicks_s:
        near = np.abs(times_s - click_s) < 0.03
        off_s.append(times_s[near][track.strength_S[near].argmax()] - click_s)
        assert track.strength_S[near].max() > 10
    assert np.abs(off_s).max() < 0.008  # a hop is 5 ms, half a frame at 24 fps 21 ms
    far = np.abs(times_s[:, None] - clicks_s).min(1) > 0.06
    assert track.strength_S[far].max() < 1
    assert abs(np.mean(off_s[:6]) - np.mean(off_s[6:])) < 0.004  # no drift
    at_s = np.arange(round(duration_s * 24)) / 24
    on = np.flatnonzero(track.envelope(at_s) > 0.4) / 24
    assert np.abs(on[:, None] - clicks_s).min(1).max() <= 1.3 * 0.5 / 24


def test_pieces_of_the_analysis_join_without_a_seam(monkeypatch):
    noise = np.random.default_rng(0).normal(0, 0.1, 8 * 22_050).astype(np.float32)
    whole = Track(noise, 22_050).strength_S
    monkeypatch.setattr("tempolora.data.audio.PIECE_S", 1.7)
    np.testing.assert_allclose(Track(noise, 22_050).strength_S, whole, atol=1e-4)


def test_hiss_is_no_rhythm_and_the_envelope_says_so():
    noise = np.random.default_rng(1).normal(0, 0.1, 4 * 22_050).astype(np.float32)
    envelope = onset_envelope(noise, 22_050, TIMES_S)
    assert envelope.max() < 0.3
    clicked = noise + 5 * click_track(np.array([1.5]), 4.0, 22_050)
    assert onset_envelope(clicked, 22_050, TIMES_S).argmax() == 24


def test_a_sound_that_is_there_from_the_start_begins_nowhere_and_one_that_sets_in_later_does():
    tone = 0.3 * np.sin(2 * np.pi * 440 * np.arange(3 * 22_050) / 22_050).astype(np.float32)
    assert Track(tone, 22_050).envelope(TIMES_S)[:16].max() < 0.2
    late = Track(tone, 22_050, start_s=1.0).envelope(TIMES_S)
    assert late.argmax() == 16
    assert not late[:15].any()


def test_sound_that_ends_before_the_pictures_leaves_noughts():
    track = Track(click_track(np.arange(0.1, 1.4, 0.2), 1.5, 22_050), 22_050)
    assert track.envelope(TIMES_S)[:24].max() == 1
    assert not track.envelope(TIMES_S)[25:].any()
    assert track.is_heard(TIMES_S[:24])
    assert not track.is_heard(TIMES_S[25:])


@pytest.mark.parametrize("samples", [0, 1, 10, 300])
def test_a_few_samples_are_no_trouble(samples):
    track = Track(np.full(samples, 0.5, np.float32), 22_050)
    assert track.envelope(TIMES_S).shape == (49,)
    assert track.tempo is None
    assert not len(track.beats_s)


def test_silence_has_no_tempo_and_no_beats():
    track = Track(np.zeros(4 * 22_050, np.float32), 22_050)
    assert track.tempo is None
    assert not len(track.beats_s)


@pytest.mark.parametrize("speed", [0.5, 1.0, 2.0])
def test_a_window_has_its_own_part_of_the_sound_at_its_own_speed(speed):
    clicks_s = np.arange(0.25, 12, 0.5)
    track = Track(click_track(clicks_s - 0.2, 12.0, 22_050), 22_050, start_s=0.2)
    shown_s = np.arange(33) / 16
    window = track.window(3.1 + speed * shown_s, 16)  # shows the clip at `speed`
    inside = clicks_s[(clicks_s >= 3.1) & (clicks_s <= 3.1 + 2 * speed)]
    expected_s = (inside - 3.1) / speed
    np.testing.assert_allclose(window.beats_s, expected_s, atol=0.012 / speed)
    on = np.flatnonzero(window.onset_F > 0.5) / 16
    assert len(on) >= len(expected_s)
    assert np.abs(on[:, None] - expected_s).min(1).max() <= 0.5 / 16 + 0.008 / speed
    assert window.tempo.bpm == pytest.approx(120 * speed, rel=0.01)
    assert window.tempo.confidence > 0.9
