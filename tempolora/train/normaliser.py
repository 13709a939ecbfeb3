"""What a log ratio is at each sigma before training has changed anything: fitted, then frozen.

The rhythm terms are scaled by it: c(sigma) = flow / energy of the base makes a weight of 0.05 five
per cent of the flow loss at every sigma. The freeze alarm compares with it.
"""

import math

import numpy as np
import torch
from torch import Tensor

LEAST_SIGMA = 1e-3  # below it log sigma runs away and nothing is left to learn
SHRINK = 1.0  # pseudo-observations that hold slope and curvature at zero


class SigmaFit:
    """A quadratic in log sigma through observed log ratios, computed alike on every process.

    points: (sigma, log ratio) pairs. Outside the sigmas seen it stays at the value of the nearest.
    """

    def __init__(self, points: list[list[float]] | None = None) -> None:
        self.points = list(points or [])
        self._refit()

    def add(self, sigma_N: Tensor, log_ratio_N: Tensor) -> None:
        """Take in observations; those that are not finite say nothing and are left out."""
        pairs = torch.stack([sigma_N, log_ratio_N], dim=1).tolist()
        self.points += [pair for pair in pairs if all(map(math.isfinite, pair))]
        self._refit()

    def __call__(self, sigma_B: Tensor) -> Tensor:
        """The log ratio at each sigma, (B,) float32. Raises ValueError while there is no point."""
        if not self.points:
            raise ValueError("nothing was observed yet")
        # On sigma's own device, so that nothing waits for it.
        x = sigma_B.double().clamp(min=LEAST_SIGMA).log().clamp(self._low, self._high)
        x = (x - self._centre) / self._spread
        constant, slope, bend = self._coefficients
        return (constant + slope * x + bend * x * x).float()

    def _refit(self) -> None:
        if not self.points:
            return
        sigma, ratio = np.array(self.points, np.float64).T
        x = np.log(np.maximum(sigma, LEAST_SIGMA))
        self._low, self._high = float(x.min()), float(x.max())
        self._centre, self._spread = float(x.mean()), max(float(x.std()), 1e-6)
        x = (x - self._centre) / self._spread
        design = np.stack([np.ones_like(x), x, x * x], axis=1)
        normal = design.T @ design + np.diag([0.0, SHRINK, SHRINK])
        self._coefficients = np.linalg.solve(normal, design.T @ ratio).tolist()
