"""Flow matching as Wan 2.2 was trained: the line from clip to noise, and where on it to train.

    x_t = (1 - sigma) * x0 + sigma * noise        v = noise - x0        x0_hat = x_t - sigma * v_hat

Formulas as in the official code and its trainers (diffusion-pipe `models/wan/wan.py`,
musubi-tuner `wan_train_network.py`).
"""

import torch
from torch import Tensor

from tempolora.variants import Variant


def shift_sigma(u: Tensor, shift: float) -> Tensor:
    """sigma = k u / (1 + (k - 1) u): u and sigma both in 0..1, elementwise."""
    return shift * u / (1 + (shift - 1) * u)


def unshift_sigma(sigma: Tensor | float, shift: float) -> Tensor | float:
    """The u that `shift_sigma` takes to sigma."""
    return sigma / (shift - (shift - 1) * sigma)


def expert_range(variant: Variant, expert: str) -> tuple[float, float]:
    """Lowest and highest sigma an expert works at: high from the boundary up, low below it."""
    if expert == "single":
        return 0.0, 1.0
    return (variant.boundary, 1.0) if expert == "high" else (0.0, variant.boundary)


def u_range(variant: Variant, expert: str) -> tuple[float, float]:
    """The expert's range in unshifted time."""
    low, high = expert_range(variant, expert)
    return float(unshift_sigma(low, variant.shift)), float(unshift_sigma(high, variant.shift))


def sample_sigma(u: Tensor, variant: Variant, expert: str, density: str) -> Tensor:
    """Turn uniform u in 0..1 into sigmas of the expert's range, elementwise.

    density: of the unshifted time: "uniform" or "logit_normal" (sigmoid of a standard normal,
    Esser et al. 2024, section 3.1), both restricted to the expert's range exactly, by way of the
    distribution function, so that no draw is thrown away.
    """
    low, high = u_range(variant, expert)
    if density == "uniform":
        return shift_sigma(low + (high - low) * u, variant.shift)
    edges = torch.tensor([low, high], dtype=torch.float64)
    low_p, high_p = torch.special.ndtr(torch.logit(edges)).tolist()
    p = (low_p + (high_p - low_p) * u.double()).clamp(1e-7, 1 - 1e-7)
    return shift_sigma(torch.sigmoid(torch.special.ndtri(p)), variant.shift).to(u.dtype)


def interpolate(x0_BCTHW: Tensor, noise_BCTHW: Tensor, sigma_B: Tensor) -> Tensor:
    """x_t of every sample at its sigma."""
    sigma = sigma_B.view(-1, 1, 1, 1, 1)
    return (1 - sigma) * x0_BCTHW + sigma * noise_BCTHW


def velocity(x0_BCTHW: Tensor, noise_BCTHW: Tensor) -> Tensor:
    """The target v."""
    return noise_BCTHW - x0_BCTHW
