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


@pytest.mark.parametrize("num_frames", [0, 1, 4, 48, 50])
def test_other_frame_counts_are_refused(num_frames):
    with pytest.raises(ValueError, match="4k"):
        TimeBase(16, num_frames)
