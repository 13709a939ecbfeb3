"""Rhythm terms as small matrices: fixed linear maps of the (C, T) column at each latent pixel.

A probe K is (P, C, T), and its term is the energy mean_hw ||K e||^2 of the velocity residual
e = v_hat - v. With a readout R (S, C, T), which maps the column to S samples of luminance at the
full frame rate, K = M R for some (P, S) map M of time. Without one every channel's latent frames
are mapped alike, and K is (P, T). Where K does not depend on the clip, the minimiser of the sum
stays the true velocity, so no term can freeze the video.

All but the sound probe have unit Frobenius norm, as the flow loss itself has (identity / sqrt(CT)):
on a residual that is white in time and channels all terms are equal.
"""

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from tempolora.rhythm.readout import Readout
from tempolora.rhythm.tempo import detrend
from tempolora.timebase import TimeBase

LEAST_COHERENCE = 0.5  # below it the readout says more about itself than about the video


@dataclass(frozen=True)
class SpectralBins:
    """The frequencies of a spectral probe: bin number -> Hz kept in the band and above the cutoff,
    bin number -> weight of both together."""

    band: dict[int, float]
    jitter: dict[int, float]
    weight: dict[int, float]


def spectral_bins(
    timebase: TimeBase,
    readout: Readout | None,
    cutoff_hz: float,
    band_hz: tuple[float, float],
    band_gain: float = 1.0,
    jitter_gain: float = 1.0,
) -> SpectralBins:
    """Choose and weigh the bins: coherence times gain, the larger one where band and jitter meet.

    Left out: the decoder's comb with its neighbours, and bins that the readout cannot see
    (coherence below 0.5). Raises ValueError where no bin is left in the band or above the cutoff
    though its gain is not 0, naming what survived.
    """
    low, high = band_hz
    every = timebase.usable_bins_hz("readout" if readout else "latent")
    coherence = {k: float(readout.g2_F[k]) if readout else 1.0 for k in every}
    seen = {k: hz for k, hz in every.items() if coherence[k] >= LEAST_COHERENCE}
    slack = 1e-9 * timebase.fps
    band = {k: hz for k, hz in seen.items() if low - slack <= hz <= high + slack and band_gain}
    jitter = {k: hz for k, hz in seen.items() if hz >= cutoff_hz - slack and jitter_gain}
    for name, gain, kept in (
        (f"in the band of {low:g} to {high:g} Hz", band_gain, band),
        (f"at or above the cutoff of {cutoff_hz:g} Hz", jitter_gain, jitter),
    ):
        if gain and not kept:
            there = ", ".join(f"{hz:.2f}" for hz in seen.values()) or "none"
            raise ValueError(f"no frequency {name} can be read from the latents; readable: {there}")
    gains = {k: max(band_gain * (k in band), jitter_gain * (k in jitter)) for k in seen}
    weight = {k: coherence[k] * gain for k, gain in sorted(gains.items()) if gain}
    return SpectralBins(band, jitter, weight)


def spectral_probe(
    timebase: TimeBase,
    readout: Readout | None,
    cutoff_hz: float,
    band_hz: tuple[float, float],
    *,
    band_gain: float = 1.0,
    jitter_gain: float = 1.0,
    channels: int | None = None,
) -> Tensor:
    """diag(sqrt(w)) . DFT . Hann . detrend, of the readout (P, C, T) or each channel (P, T).

    channels: C, needed without a readout. Errors as `spectral_bins`.
    """
    bins = spectral_bins(timebase, readout, cutoff_hz, band_hz, band_gain, jitter_gain)
    samples = timebase.samples if readout else timebase.latent_frames - 1
    window = torch.hann_window(samples, periodic=True, dtype=torch.float64)
    time = torch.arange(samples, dtype=torch.float64)
    rows = []
    for k, weight in bins.weight.items():
        angle = 2 * math.pi * k * time / samples
        rows.append(weight**0.5 * angle.cos() * window)
        if 2 * k != samples:  # the sine of the highest bin is zero
            rows.append(-(weight**0.5) * angle.sin() * window)
    return _unit(_of_latents(torch.stack(rows) @ detrend(samples), timebase, readout), channels)


def tv_probe(timebase: TimeBase, readout: Readout | None, *, channels: int | None = None) -> Tensor:
    """First difference in time of the readout (P, C, T) or of each channel's latent frames (P, T).

    channels: C, needed without a readout.
    """
    samples = timebase.samples if readout else timebase.latent_frames - 1
    return _unit(_of_latents(_difference(samples), timebase, readout), channels)


def sound_probe(timebase: TimeBase, readout: Readout, onset_BF: Tensor) -> Tensor:
    """First difference of the readout, times sqrt(onset) of the frame it leads into; (B, P, C, T).

    onset_BF: onset envelope of each video frame, 0..1. With an envelope of ones it is `tv_probe`.
    This probe follows the clip, so it moves the minimiser: motion at onsets is fitted at the cost
    of motion elsewhere.
    """
    probe_PCT = tv_probe(timebase, readout).to(onset_BF.device)
    # sample i is video frame i + 1, so difference i leads into frame i + 2
    return onset_BF[:, 2:, None, None].clamp(min=0).sqrt() * probe_PCT


def frequency_response(
    probe: Tensor, timebase: TimeBase, readout: Readout | None, hz_F: Tensor
) -> Tensor:
    """Energy (F,) of a probe on a tone of unit amplitude at each frequency, mean over its phase.

    The latents of a tone are the smallest that read as it: pinv(R) tone; without a readout one
    channel's latent frames follow the tone.
    """
    samples = timebase.samples if readout else timebase.latent_frames - 1
    rate_hz = timebase.fps if readout else timebase.latent_fps
    angle_SF = 2 * math.pi * torch.arange(samples)[:, None].double() / rate_hz * hz_F.double()
    if readout:
        read = readout.matrix(timebase.latent_frames).flatten(1)
        map_PS = probe.double().flatten(1) @ torch.linalg.pinv(read, rtol=1e-6)
    else:
        map_PS = probe.double()[:, 1:]
    return sum((map_PS @ tone).square().sum(dim=0) for tone in (angle_SF.cos(), angle_SF.sin())) / 2


def draw(probes: dict[str, Tensor], timebase: TimeBase, readout: Readout | None):
    """A matplotlib Figure of the frequency response of named probes, peaks at 1, comb marked."""
    from matplotlib.figure import Figure

    top = timebase.nyquist_hz if readout else timebase.latent_nyquist_hz
    hz_F = torch.linspace(0, top, 500, dtype=torch.float64)
    figure = Figure(figsize=(8, 3.6), layout="constrained")
    axes = figure.add_subplot()
    for name, probe in probes.items():
        response = frequency_response(probe, timebase, readout, hz_F)
        axes.plot(hz_F, response / response.max(), label=name)
    for hz in timebase.comb_hz:
        if hz <= top:
            axes.axvline(hz, color="0.7", linestyle=":", linewidth=1)
    axes.set(xlabel="frequency, Hz", ylabel="energy, largest = 1", xlim=(0, top), ylim=(0, None))
    figure.legend(loc="outside upper center", ncols=len(probes), frameon=False)
    return figure


def _difference(samples: int) -> Tensor:
    return torch.eye(samples, dtype=torch.float64).diff(dim=0)


def _of_latents(map_PS: Tensor, timebase: TimeBase, readout: Readout | None) -> Tensor:
    """The map of time as a map of latents: through the readout, or of all latent frames but 0."""
    if readout is None:
        return torch.nn.functional.pad(map_PS, (1, 0))
    return torch.einsum("ps,sct->pct", map_PS, readout.matrix(timebase.latent_frames))


def _unit(probe: Tensor, channels: int | None) -> Tensor:
    """Unit Frobenius norm, a (P, T) map counted once for each of `channels`; float32."""
    norm = probe.norm() if probe.ndim == 3 else probe.norm() * channels**0.5
    return (probe / norm).float()
