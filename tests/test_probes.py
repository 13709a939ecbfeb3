"""Rhythm terms against torch.fft and plain differences in float64, on a known linear VAE."""

import pytest
import torch

from tempolora.rhythm.kernels import probe_energy
from tempolora.rhythm.probes import (
    draw,
    frequency_response,
    sound_probe,
    spectral_bins,
    spectral_probe,
    tv_probe,
)
from tempolora.rhythm.readout import Readout
from tempolora.timebase import TimeBase

CHANNELS = 16


def residual(shape, seed=0, dtype=torch.float64):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=dtype)


def known_readout(num_frames=49, g2=1.0, channels=CHANNELS):
    """A linear VAE: every group of latents reads as four frames, with lags, well conditioned."""
    weight_GKJC = 0.1 * residual((3, 4, 3, channels), seed=3)
    weight_GKJC[:, :, 0, :4] += torch.eye(4)
    weight_GKJC[0, :, 2] = 0
    g2_F = torch.full(((num_frames - 1) // 2 + 1,), g2, dtype=torch.float64)
    zeros = torch.zeros(3, 4, dtype=torch.float64)
    return Readout(weight_GKJC, zeros, zeros, g2_F, num_frames)


def latents_of(luma_S, readout, timebase):
    """The smallest latents (1, C, T, 1, 1) that read as a luminance curve."""
    matrix = readout.matrix(timebase.latent_frames)
    z = torch.linalg.lstsq(matrix.flatten(1), luma_S[:, None], driver="gelsd").solution
    return z.view(1, *matrix.shape[1:], 1, 1)


def windowed_power(x_NS):
    """|rfft|^2 of columns with mean and slope taken away and a Hann window, without our code."""
    samples = x_NS.shape[1]
    time = torch.arange(samples, dtype=torch.float64)
    design = torch.stack([torch.ones_like(time), time], dim=1)
    x_NS = x_NS - (design @ torch.linalg.lstsq(design, x_NS.T).solution).T
    window = torch.hann_window(samples, periodic=True, dtype=torch.float64)
    return torch.fft.rfft(x_NS * window).abs().square()


def energy_by_fft(e_BCTHW, timebase, readout, weight_of_bin):
    """Up to one common factor: weighted power of the readout or of each latent channel."""
    if readout:
        y = torch.einsum("sct,bcthw->bhws", readout.matrix(timebase.latent_frames), e_BCTHW)
    else:
        y = e_BCTHW[:, :, 1:].movedim(2, -1)
    power = windowed_power(y.reshape(-1, y.shape[-1])).view(len(e_BCTHW), -1, y.shape[-1] // 2 + 1)
    return sum(weight * power[..., k].sum(dim=1) for k, weight in weight_of_bin.items())


@pytest.mark.parametrize("num_frames", [17, 49, 81, 121])
@pytest.mark.parametrize(("fps", "channels"), [(16.0, 16), (24.0, 48)])
@pytest.mark.parametrize("form", ["readout", "latent"])
def test_the_spectral_energy_is_the_windowed_power_that_torch_fft_gives(
    num_frames, fps, channels, form
):
    timebase = TimeBase(fps, num_frames)
    readout = known_readout(num_frames, channels=channels) if form == "readout" else None
    band, cutoff = ((0.5, 6.0), 6.0) if readout else ((0.5, 1.6), 1.9)
    probe = spectral_probe(timebase, readout, cutoff, band, channels=channels).double()
    kept = {
        k: 1.0
        for k, hz in timebase.usable_bins_hz(form).items()
        if band[0] <= hz <= band[1] or hz >= cutoff
    }
    # The common factor follows from unit Frobenius norm, and goes out in a ratio.
    one, two = (residual((2, channels, timebase.latent_frames, 3, 2), seed) for seed in (1, 2))
    ours = probe_energy(one, probe) / probe_energy(two, probe)
    reference = energy_by_fft(one, timebase, readout, kept) / energy_by_fft(
        two, timebase, readout, kept
    )
    assert torch.allclose(ours, reference, rtol=1e-5)  # the probe is stored in float32


def test_bins_weigh_by_coherence_and_gain_and_those_the_readout_cannot_see_are_dropped():
    timebase, readout = TimeBase(16, 49), known_readout()
    readout.g2_F[3], readout.g2_F[5], readout.g2_F[20] = 0.49, 0.6, 0.8
    bins = spectral_bins(timebase, readout, 6.0, (0.5, 6.0), band_gain=1.0, jitter_gain=3.0)
    assert 3 not in bins.weight
    assert bins.weight[5] == pytest.approx(0.6)
    assert bins.weight[20] == pytest.approx(0.8 * 3)
    assert bins.weight[18] == 3  # 6 Hz is both: the larger gain counts
    assert not {11, 12, 13, 23, 24} & set(bins.weight)  # 4 and 8 Hz, and beside them
    probe = spectral_probe(timebase, readout, 6.0, (0.5, 6.0), jitter_gain=3.0).double()
    e = [residual((1, 16, 13, 3, 2), seed) for seed in (1, 2)]
    ours = probe_energy(e[0], probe) / probe_energy(e[1], probe)
    by_fft = [energy_by_fft(x, timebase, readout, bins.weight) for x in e]
    assert torch.allclose(ours, by_fft[0] / by_fft[1], rtol=1e-5)


def response_by_bin(timebase, readout, luma_S):
    """Energy of single-bin probes for a luminance curve, {bin: share of all}."""
    z = latents_of(luma_S, readout, timebase)
    read = torch.einsum("sct,bcthw->bs", readout.matrix(timebase.latent_frames), z)
    power = windowed_power(read)[0]
    return power / power.sum()


@pytest.mark.parametrize("k", [2, 3, 5, 8, 10, 14, 16, 19, 21, 22])
@pytest.mark.parametrize("phase", [0.0, 1.1])
def test_a_tone_through_a_linear_vae_costs_at_its_frequency_alone(k, phase):
    """99 % of the energy of a probe that looks everywhere lies in the tone's bin +-1."""
    timebase, readout = TimeBase(16, 49), known_readout()
    hz = timebase.bins_hz[k]
    time_s = torch.arange(48, dtype=torch.float64) / 16
    z = latents_of(torch.cos(2 * torch.pi * hz * time_s + phase), readout, timebase)

    def energy(low, high):
        probe = spectral_probe(timebase, readout, 99, (low, high), jitter_gain=0).double()
        bins = spectral_bins(timebase, readout, 99, (low, high), jitter_gain=0)
        # undo the norm: energies of different bands must add up
        rows = probe_energy(z, probe).item()
        return rows / frequency_scale(timebase, readout, bins)

    near = energy(hz - 0.34, hz + 0.34)
    assert near / energy(0.1, 7.9) > 0.99


def frequency_scale(timebase, readout, bins):
    """The factor that unit norm has put on the energy of these bins."""
    samples = timebase.samples
    time = torch.arange(samples, dtype=torch.float64)
    window = torch.hann_window(samples, periodic=True, dtype=torch.float64)
    basis = torch.linalg.qr(torch.stack([torch.ones_like(time), time], dim=1))[0]
    rows = torch.stack(
        [
            f(2 * torch.pi * k * time / samples) * window
            for k in bins.weight
            for f in (torch.cos, torch.sin)
        ]
    )
    rows = rows - (rows @ basis) @ basis.T
    full = torch.einsum("ps,sct->pct", rows, readout.matrix(timebase.latent_frames))
    return 1 / full.square().sum().item()


def test_a_pattern_of_four_frames_lands_on_the_comb_and_costs_nothing():
    """What the decoder itself leaves in every group: 99 % in the comb +-1, none in the probe."""
    timebase, readout = TimeBase(16, 49), known_readout()
    pattern = torch.tensor([0.3, -0.1, 0.4, -0.6], dtype=torch.float64).repeat(12)
    share = response_by_bin(timebase, readout, pattern)
    assert share[[11, 12, 13, 23, 24]].sum() > 0.99
    z = latents_of(pattern, readout, timebase)
    loud = latents_of(
        pattern.roll(1) * torch.hann_window(48, dtype=torch.float64), readout, timebase
    )
    probe = spectral_probe(timebase, readout, 6.0, (0.5, 6.0)).double()
    assert probe_energy(z, probe) < 1e-3 * probe_energy(loud, tv_probe(timebase, readout).double())


def test_a_moving_edge_that_is_predicted_costs_nothing_though_it_holds_fast_power():
    timebase, readout = TimeBase(16, 49), known_readout()
    edge = torch.sigmoid((torch.arange(48, dtype=torch.float64) - 21.3) / 0.4)
    x0 = latents_of(edge, readout, timebase)
    probe = spectral_probe(timebase, readout, 6.0, (0.5, 6.0)).double()
    v = residual(x0.shape, seed=5) - x0
    v_hat = v.clone().requires_grad_()
    energy = probe_energy(v_hat - v, probe)
    energy.sum().backward()
    assert energy.item() == 0 and v_hat.grad.abs().max() == 0
    assert probe_energy(x0, probe) > 1e-4 * probe_energy(x0, tv_probe(timebase, readout).double())


def test_no_probe_moves_the_minimiser_off_the_posterior_mean():
    """Two clips may have led to the same x_t: at the mean of their velocities the gradient of the
    expected energy is zero, and anywhere else it points back there."""
    timebase, readout = TimeBase(16, 49), known_readout()
    first, second = residual((1, 16, 13, 2, 2), 7), residual((1, 16, 13, 2, 2), 8)
    share = 0.3
    for probe in (
        spectral_probe(timebase, readout, 6.0, (0.5, 6.0)).double(),
        tv_probe(timebase, readout).double(),
    ):

        def expected(v_hat, probe=probe):
            return share * probe_energy(v_hat - first, probe) + (1 - share) * probe_energy(
                v_hat - second, probe
            )

        mean = (share * first + (1 - share) * second).requires_grad_()
        (gradient,) = torch.autograd.grad(expected(mean).sum(), mean)
        assert gradient.abs().max() < 1e-12
        away = residual(mean.shape, 9)
        (gradient,) = torch.autograd.grad(expected(mean + away).sum(), mean)
        assert (gradient * away).sum() > 0


def test_the_tv_energy_is_the_mean_square_first_difference_of_the_readout():
    timebase, readout = TimeBase(16, 49), known_readout()
    e = residual((2, 16, 13, 4, 5))
    luma = torch.einsum("sct,bcthw->bshw", readout.matrix(13), e)
    difference = luma.diff(dim=1).square().sum(dim=1).mean(dim=(1, 2))
    energy = probe_energy(e, tv_probe(timebase, readout).double())
    assert torch.allclose(energy[0] / energy[1], difference[0] / difference[1], rtol=1e-5)


def test_without_a_readout_it_is_that_of_the_latent_frames():
    e = residual((2, 16, 13, 4, 5))
    energy = probe_energy(e, tv_probe(TimeBase(16, 49), None, channels=16).double())
    difference = e[:, :, 1:].diff(dim=2).square().sum(dim=(1, 2)).mean(dim=(1, 2))
    # 11 differences of two unit entries in each of 16 channels: ||K||^2 = 16 * 11 * 2
    assert torch.allclose(energy, difference / (16 * 11 * 2), rtol=1e-6)


def test_the_sound_probe_counts_a_change_by_the_onset_of_the_frame_it_leads_into():
    timebase, readout = TimeBase(16, 49), known_readout()
    onset_BF = residual((2, 49)).abs().float()
    e = residual((2, 16, 13, 3, 4))
    luma = torch.einsum("sct,bcthw->bshw", readout.matrix(13), e)
    change = luma.diff(dim=1).square().mean(dim=(2, 3))  # into video frames 2..48
    expected = (change * onset_BF[:, 2:].double()).sum(dim=1)
    energy = probe_energy(e, sound_probe(timebase, readout, onset_BF).double())
    assert torch.allclose(energy[0] / energy[1], expected[0] / expected[1], rtol=1e-5)
    ones = sound_probe(timebase, readout, torch.ones(2, 49))
    assert torch.equal(ones[0], tv_probe(timebase, readout))
    assert sound_probe(timebase, readout, torch.zeros(2, 49)).abs().max() == 0


@pytest.mark.parametrize("form", ["readout", "latent"])
def test_all_probes_have_the_norm_of_the_flow_loss(form):
    """So that a term on a residual that is white equals the flow loss."""
    timebase = TimeBase(16, 49)
    readout = known_readout() if form == "readout" else None
    cutoff, band = (6.0, (0.5, 6.0)) if readout else (1.5, (0.5, 1.5))
    e = residual((1, 16, 13, 200, 200))
    for probe in (
        spectral_probe(timebase, readout, cutoff, band, channels=16),
        tv_probe(timebase, readout, channels=16),
    ):
        assert probe_energy(e, probe.double()).item() == pytest.approx(
            e.square().mean().item(), rel=0.05
        )


def test_a_steady_error_and_a_steady_drift_cost_nothing_in_the_spectrum():
    timebase, readout = TimeBase(16, 49), known_readout()
    probe = spectral_probe(timebase, readout, 6.0, (0.5, 6.0)).double()
    drift = latents_of(0.02 * torch.arange(48, dtype=torch.float64) + 3, readout, timebase)
    assert probe_energy(drift, probe).item() < 1e-10


def test_a_readout_that_reads_nothing_is_refused_and_what_it_reads_is_named():
    timebase = TimeBase(16, 49)
    with pytest.raises(ValueError, match=r"can be read from the latents; readable: none"):
        spectral_probe(timebase, known_readout(g2=0.4), 6.0, (0.5, 6.0))
    readout = known_readout()
    readout.g2_F[18:] = 0.3
    with pytest.raises(ValueError, match=r"at or above the cutoff of 6 Hz.*0\.33, 0\.67.*, 5\.67$"):
        spectral_probe(timebase, readout, 6.0, (0.5, 6.0))
    with pytest.raises(ValueError, match="no frequency in the band"):
        spectral_probe(timebase, None, 1.5, (0.1, 0.2), channels=16)


def test_the_frequency_response_is_the_energy_of_a_tone():
    timebase, readout = TimeBase(16, 49), known_readout()
    probe = spectral_probe(timebase, readout, 6.0, (0.5, 6.0))
    hz_F = torch.tensor([1.0, 2.2, 4.0, 7.0], dtype=torch.float64)
    response = frequency_response(probe, timebase, readout, hz_F)
    time_s = torch.arange(48, dtype=torch.float64) / 16
    for hz, value in zip(hz_F, response, strict=True):
        angle = 2 * torch.pi * hz * time_s
        both = [
            probe_energy(latents_of(wave, readout, timebase), probe.double()).item()
            for wave in (angle.cos(), angle.sin())
        ]
        assert value.item() == pytest.approx(sum(both) / 2, rel=1e-4)
    assert response[0] > 20 * response[2]  # 4 Hz is the comb


def test_probes_are_drawn_with_their_frequencies():
    timebase, readout = TimeBase(16, 49), known_readout()
    figure = draw({"tv": tv_probe(timebase, readout)}, timebase, readout)
    (axes,) = figure.axes
    hz, response = axes.lines[0].get_data()
    assert hz[-1] == 8 and response.max() == 1
    # a first difference: |1 - exp(-i w)|^2, 4 sin^2(w / 2), at the ends of the axis and in between
    assert response[0] == pytest.approx(0, abs=1e-9)
    assert response[250] / response[-1] == pytest.approx(0.5, abs=0.03)
