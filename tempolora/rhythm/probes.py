"""Rhythm terms as small matrices: fixed linear maps of the (C, T) column at each latent pixel.

A probe K has shape (P, C, T); its term is the energy mean_hw ||K e||^2 of the velocity residual
e = v_hat - v. Every probe here has unit Frobenius norm, as the flow loss itself has (identity /
sqrt(CT)): on a residual that is white in time and channels all terms are equal, so that a weight
is a share of the flow loss. Where K does not depend on the clip, the minimiser of the sum stays
the true velocity, so no term can freeze the video.

Latent frame 0 holds one pixel frame where the others hold four, and is left out.
"""

import math

import torch
from torch import Tensor

from tempolora.timebase import TimeBase


def spectral_probe(
    timebase: TimeBase, channels: int, cutoff_hz: float, band_hz: tuple[float, float]
) -> Tensor:
    """diag(sqrt(w)) . DFT . Hann . detrend over each channel's latent frames; (P, C, T) float32.

    Bins in band_hz and bins from cutoff_hz up weigh one, the others nothing. Raises ValueError
    where no bin is left in the band or above the cutoff, naming the bins there are.
    """
    bins_hz = timebase.latent_bins_hz
    low, high = band_hz
    in_band = [k for k, hz in enumerate(bins_hz) if k and low <= hz <= high]
    above = [k for k, hz in enumerate(bins_hz) if k and hz >= cutoff_hz]
    for name, kept in (("band", in_band), ("range above the cutoff", above)):
        if not kept:
            raise ValueError(f"no bin in the {name}; there are {', '.join(map(str, bins_hz))} Hz")
    samples = timebase.latent_frames - 1
    window = torch.hann_window(samples, periodic=True, dtype=torch.float64)
    time = torch.arange(samples, dtype=torch.float64)
    rows = []
    for k in sorted({*in_band, *above}):
        angle = 2 * math.pi * k * time / samples
        rows.append(angle.cos() * window)
        rows.append(-angle.sin() * window)
    return _per_channel(torch.stack(rows) @ _detrend(samples), channels)


def tv_probe(timebase: TimeBase, channels: int) -> Tensor:
    """First difference in time of each channel's latent frames; (P, C, T) float32."""
    samples = timebase.latent_frames - 1
    difference = torch.eye(samples, dtype=torch.float64).diff(dim=0)
    return _per_channel(difference, channels)


def _detrend(samples: int) -> Tensor:
    """The projection that takes mean and slope away, (samples, samples)."""
    time = torch.linspace(-1, 1, samples, dtype=torch.float64)
    basis, _ = torch.linalg.qr(torch.stack([torch.ones_like(time), time], dim=1))
    return torch.eye(samples, dtype=torch.float64) - basis @ basis.T


def _per_channel(map_PT: Tensor, channels: int) -> Tensor:
    """The same map for every channel, frame 0 left out, unit Frobenius norm."""
    map_PT = torch.nn.functional.pad(map_PT, (1, 0))
    probe = torch.einsum("pt,cd->pcdt", map_PT, torch.eye(channels, dtype=map_PT.dtype))
    probe_PCT = probe.flatten(0, 1)
    return (probe_PCT / probe_PCT.norm()).float()
