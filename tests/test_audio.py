"""The onset envelope is on the video's clock."""

import numpy as np
import pytest

from tempolora.data.audio import has_sound, onset_envelope
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
