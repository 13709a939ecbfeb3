"""Rhythm terms against torch.fft and plain differences in float64."""

import pytest
import torch

from tempolora.rhythm.kernels import probe_energy
from tempolora.rhythm.probes import spectral_probe, tv_probe
from tempolora.timebase import TimeBase


def residual(shape, seed=0, dtype=torch.float64):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=dtype)


def spectral_reference(e_BCTHW, timebase, cutoff_hz, band_hz):
    """Detrended, Hann-windowed power of each kept bin by torch.fft, up to one common factor."""
    x = e_BCTHW[:, :, 1:].double()
    samples = x.shape[2]
    time = torch.arange(samples, dtype=torch.float64)
    design = torch.stack([torch.ones_like(time), time], dim=1)
    flat = x.movedim(2, 0).reshape(samples, -1)
    fit = design @ torch.linalg.lstsq(design, flat).solution
    x = (flat - fit).reshape(samples, *x.movedim(2, 0).shape[1:]).movedim(0, 2)
    window = torch.hann_window(samples, periodic=True, dtype=torch.float64)
    power = torch.fft.rfft(x * window.view(1, 1, -1, 1, 1), dim=2).abs().square()
    kept = [
        k
        for k, hz in enumerate(timebase.latent_bins_hz)
        if k and (band_hz[0] <= hz <= band_hz[1] or hz >= cutoff_hz)
    ]
    return power[:, :, kept].sum(dim=(1, 2)).mean(dim=(1, 2))


@pytest.mark.parametrize("num_frames", [17, 49, 81, 121])
@pytest.mark.parametrize(("fps", "channels"), [(16.0, 16), (24.0, 48)])
def test_the_spectral_energy_is_the_windowed_power_that_torch_fft_gives(num_frames, fps, channels):
    timebase = TimeBase(fps, num_frames)
    band, cutoff = (0.5, 1.6), 1.9  # 17 frames at 24 fps have bins at 1.5 and 3 Hz alone
    probe = spectral_probe(timebase, channels, cutoff, band).double()
    # The common factor follows from unit Frobenius norm, which a delta at every place measures.
    one, two = (residual((2, channels, timebase.latent_frames, 3, 2), seed) for seed in (1, 2))
    ours = probe_energy(one, probe) / probe_energy(two, probe)
    reference = spectral_reference(one, timebase, cutoff, band) / spectral_reference(
        two, timebase, cutoff, band
    )
    assert torch.allclose(ours, reference, rtol=1e-5)  # the probe is stored in float32


def test_the_tv_energy_is_the_mean_square_first_difference():
    timebase = TimeBase(16, 49)
    e = residual((2, 16, 13, 4, 5))
    energy = probe_energy(e, tv_probe(timebase, 16).double())
    difference = e[:, :, 1:].diff(dim=2).square().sum(dim=(1, 2)).mean(dim=(1, 2))
    # 11 differences of two unit entries in each of 16 channels: ||K||^2 = 16 * 11 * 2
    assert torch.allclose(energy, difference / (16 * 11 * 2), rtol=1e-6)


@pytest.mark.parametrize(
    "make", [lambda tb: spectral_probe(tb, 16, 1.5, (0.5, 1.5)), lambda tb: tv_probe(tb, 16)]
)
def test_on_a_white_residual_every_term_equals_the_flow_loss(make):
    """So that a weight is a share of the flow loss: unit Frobenius norm."""
    timebase = TimeBase(16, 49)
    probe = make(timebase)
    assert probe.square().sum().item() == pytest.approx(1, rel=1e-5)
    e = residual((1, 16, 13, 200, 200))
    assert probe_energy(e, probe.double()).item() == pytest.approx(
        e.square().mean().item(), rel=0.02
    )


def test_the_first_latent_frame_is_left_out():
    timebase = TimeBase(16, 49)
    for probe in (spectral_probe(timebase, 16, 1.5, (0.5, 1.5)), tv_probe(timebase, 16)):
        assert probe[:, :, 0].abs().max() == 0
        assert probe[:, :, 1:].abs().sum() > 0


def test_a_steady_error_and_a_steady_drift_cost_nothing_in_the_spectrum():
    probe = spectral_probe(TimeBase(16, 49), 16, 1.5, (0.5, 1.5)).double()
    ramp = torch.arange(13, dtype=torch.float64).view(1, 1, 13, 1, 1).expand(1, 16, 13, 2, 2)
    assert probe_energy(ramp + 3, probe).item() < 1e-10


def test_a_tone_costs_only_where_its_frequency_is_kept():
    """12 latent frames at 4 Hz: bin 1 is 0.33 Hz, bin 6 is 2 Hz; a Hann tone leaks to +-1 bin."""
    timebase = TimeBase(16, 49)
    time_s = (torch.arange(13, dtype=torch.float64) - 1) / timebase.latent_fps
    only_high = spectral_probe(timebase, 1, 2.0, (1.9, 2.1)).double()

    def energy(hz):
        tone = torch.cos(2 * torch.pi * hz * time_s).view(1, 1, 13, 1, 1)
        return probe_energy(tone, only_high).item()

    assert energy(2.0) > 100 * energy(1.0)


def test_a_band_without_a_bin_is_refused_and_the_bins_are_named():
    with pytest.raises(ValueError, match="no bin in the range above the cutoff; there are 0"):
        spectral_probe(TimeBase(16, 49), 16, 6.0, (0.5, 1.5))
    with pytest.raises(ValueError, match="no bin in the band"):
        spectral_probe(TimeBase(16, 49), 16, 1.5, (0.1, 0.2))


def test_gradients_are_right():
    probe_PCT = residual((3, 2, 5), seed=4)
    e = residual((2, 2, 5, 2, 2)).requires_grad_()
    assert torch.autograd.gradcheck(lambda x: probe_energy(x, probe_PCT), e)


def test_one_probe_per_sample_equals_one_sample_at_a_time():
    probes_BPCT, e = residual((2, 3, 4, 5)), residual((2, 4, 5, 3, 3), seed=1)
    together = probe_energy(e, probes_BPCT)
    apart = torch.cat([probe_energy(e[b : b + 1], probes_BPCT[b]) for b in range(2)])
    assert torch.equal(together, apart) or torch.allclose(together, apart, rtol=1e-12)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
def test_half_precision_is_accumulated_in_float32_even_under_autocast(dtype):
    probe = spectral_probe(TimeBase(16, 49), 16, 1.5, (0.5, 1.5))
    e = residual((2, 16, 13, 8, 8)).to(dtype)
    reference = probe_energy(e.double(), probe.double())
    with torch.autocast("cpu", torch.bfloat16):
        energy = probe_energy(e, probe)
    assert energy.dtype == torch.float32
    assert torch.allclose(energy.double(), reference, rtol=1e-5)
