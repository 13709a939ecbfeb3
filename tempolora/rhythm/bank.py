"""How much power real clips have in each band of frequencies, and what lies outside of it.

Power is that of the readout, pooled over latent pixels before anything else: a single pixel has no
range worth the name.
"""

import math
from dataclasses import dataclass

import torch
from torch import Tensor

LOWER, UPPER = 0.05, 0.95
LEAST_CLIPS = 20  # fewer have no 5 % quantile
LIKE = 0.25  # share of the clips that count as moving alike
TINY = 1e-20  # of a clip that stands still there is no logarithm
BANDS = 4  # equal steps of log frequency between the ends of the band


def bands_of(bins_hz: dict[int, float], band_hz: tuple[float, float], cutoff_hz: float) -> Tensor:
    """Which bins each band pools: (bands, highest bin + 1) of 0 and 1; bands without a bin go.

    bins_hz: bin number -> Hz of what can be used. Four bands from band_hz[0] to band_hz[1], and
    one from the cutoff up.
    """
    low, high = band_hz
    edges = [low * (high / low) ** (k / BANDS) for k in range(BANDS + 1)]
    spans = [*zip(edges, [*edges[1:-1], high * (1 + 1e-9)], strict=False), (cutoff_hz, math.inf)]
    rows = []
    for start, end in spans:
        row = torch.zeros(max(bins_hz) + 1)
        row[[k for k, hz in bins_hz.items() if start <= hz < end]] = 1
        rows.append(row)
    return torch.stack([row for row in rows if row.any()])


@dataclass(frozen=True)
class Bank:
    """Real clips: power_NF, spectra pooled over pixels; motion_N, motion energy. Any unit."""

    power_NF: Tensor
    motion_N: Tensor

    def log_range(self, bands_QF: Tensor, motion_B: Tensor) -> tuple[Tensor, Tensor]:
        """5 % and 95 % quantiles of log band power among clips that move alike, (B, Q) each.

        motion_B: motion energy of the clip each result is measured by; the quarter of the bank
        nearest to it counts, and at least 20 clips.
        """
        log_NQ = log_bands(self.power_NF, bands_QF)
        log_B, log_N = (motion.clamp(min=TINY).log() for motion in (motion_B, self.motion_N))
        distance_BN = (log_B[:, None] - log_N[None]).abs()
        count = min(len(self.motion_N), max(LEAST_CLIPS, round(LIKE * len(self.motion_N))))
        nearest_BK = distance_BN.topk(count, dim=1, largest=False).indices
        low, high = (torch.quantile(log_NQ[nearest_BK], q, dim=1) for q in (LOWER, UPPER))
        return low, high


def log_bands(power_BF: Tensor, bands_QF: Tensor) -> Tensor:
    """Log power of each band, (B, Q)."""
    return (power_BF[:, : bands_QF.shape[1]] @ bands_QF.T).clamp(min=TINY).log()


def hinge(log_power_BQ: Tensor, low_BQ: Tensor, high_BQ: Tensor) -> Tensor:
    """Mean square of what lies outside the range, (B,): zero inside it."""
    outside = (log_power_BQ - high_BQ).clamp(min=0) + (low_BQ - log_power_BQ).clamp(min=0)
    return outside.square().mean(dim=1)
