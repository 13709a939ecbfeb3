"""The clock: what 49 frames can and cannot carry."""

import numpy as np
import pytest

from tempolora.timebase import TimeBase


def test_49_frames_at_16_fps_are_13_latent_frames_that_end_at_2_hz():
    timebase = TimeBase(16, 49)
    assert timebase.latent_frames == 13
    assert (timebase.nyquist_hz, timebase.latent_nyquist_hz) == (8.0, 2.0)
    assert timebase.comb_hz == (4.0, 8.0)
    assert timebase.duration_s == pytest.approx(49 / 16)


def test_the_5b_has_its_comb_at_6_and_12_hz():
    assert TimeBase(24, 121).comb_hz == (6.0, 12.0)


@pytest.mark.parametrize("num_frames", [5, 9, 17, 49, 81, 121])
@pytest.mark.parametrize("fps", [16.0, 24.0, 23.976])
def test_latent_bins_are_those_of_the_real_dft(num_frames, fps):
    timebase = TimeBase(fps, num_frames)
    samples = timebase.latent_frames - 1
    assert np.allclose(timebase.latent_bins_hz, np.fft.rfftfreq(samples, 4 / fps))


@pytest.mark.parametrize("num_frames", [13, 17, 49, 81, 121])
@pytest.mark.parametrize("fps", [16.0, 24.0])
def test_the_readout_can_be_asked_about_all_bins_but_the_comb_and_its_neighbours(num_frames, fps):
    timebase = TimeBase(fps, num_frames)
    frequencies = np.fft.rfftfreq(num_frames - 1, 1 / fps)
    assert np.allclose(timebase.bins_hz, frequencies)
    width = frequencies[1]
    expected = [
        k
        for k, hz in enumerate(frequencies)
        if k and all(abs(hz - comb) > 1.5 * width for comb in (fps / 4, fps / 2))
    ]
    usable = timebase.usable_bins_hz("readout")
    assert list(usable) == expected
    assert np.allclose(list(usable.values()), frequencies[expected])


def test_above_6_hz_49_frames_at_16_fps_leave_four_frequencies():
    above = [hz for hz in TimeBase(16, 49).usable_bins_hz("readout").values() if hz > 6.1]
    assert np.allclose(above, [19 / 3, 20 / 3, 7, 22 / 3])


@pytest.mark.parametrize("num_frames", [0, 1, 4, 48, 50])
def test_other_frame_counts_are_refused(num_frames):
    with pytest.raises(ValueError, match="4k"):
        TimeBase(16, num_frames)
