"""Flow matching as published: the path, the shift, the experts' ranges."""

import numpy as np
import pytest
import torch
from scipy import stats

from tempolora.train.flow import (
    expert_range,
    interpolate,
    sample_sigma,
    shift_sigma,
    unshift_sigma,
    velocity,
)
from tempolora.variants import VARIANTS


def test_the_clean_estimate_and_the_noise_follow_from_the_true_velocity():
    generator = torch.Generator().manual_seed(0)
    x0, noise = (torch.randn(2, 4, 3, 2, 2, generator=generator, dtype=torch.float64) for _ in "ab")
    sigma_B = torch.tensor([0.2, 0.9], dtype=torch.float64)
    x_t, v = interpolate(x0, noise, sigma_B), velocity(x0, noise)
    sigma = sigma_B.view(-1, 1, 1, 1, 1)
    assert torch.allclose(x_t - sigma * v, x0)
    assert torch.allclose(x_t + (1 - sigma) * v, noise)


def test_the_shift_is_that_of_diffusers_flow_match_scheduler():
    from diffusers import FlowMatchEulerDiscreteScheduler

    scheduler = FlowMatchEulerDiscreteScheduler(num_train_timesteps=1000, shift=12.0)
    u = torch.linspace(1, 0.001, 1000)
    assert torch.allclose(shift_sigma(u, 12.0), scheduler.sigmas[:1000].float(), atol=1e-5)


@pytest.mark.parametrize("shift", [1.0, 5.0, 12.0])
def test_unshift_is_the_inverse(shift):
    u = torch.linspace(0, 1, 101, dtype=torch.float64)
    assert torch.allclose(unshift_sigma(shift_sigma(u, shift), shift), u, atol=1e-12)


def test_the_experts_share_the_sigmas_at_the_published_boundary():
    assert expert_range(VARIANTS["t2v_a14b"], "high") == (0.875, 1.0)
    assert expert_range(VARIANTS["t2v_a14b"], "low") == (0.0, 0.875)
    assert expert_range(VARIANTS["i2v_a14b"], "high") == (0.900, 1.0)
    assert expert_range(VARIANTS["ti2v_5b"], "single") == (0.0, 1.0)


@pytest.mark.parametrize("density", ["uniform", "logit_normal"])
@pytest.mark.parametrize(
    ("name", "expert"), [("t2v_a14b", "high"), ("t2v_a14b", "low"), ("ti2v_5b", "single")]
)
def test_drawn_sigmas_have_the_stated_density_cut_to_the_experts_range(density, name, expert):
    """Against rejection sampling of the uncut density: two-sample Kolmogorov-Smirnov."""
    variant = VARIANTS[name]
    generator = torch.Generator().manual_seed(1)
    drawn = sample_sigma(torch.rand(20_000, generator=generator), variant, expert, density)
    low, high = expert_range(variant, expert)
    assert drawn.min() >= low - 1e-6
    assert drawn.max() <= high + 1e-6
    rng = np.random.default_rng(2)
    u = rng.random(400_000) if density == "uniform" else 1 / (1 + np.exp(-rng.normal(size=400_000)))
    uncut = variant.shift * u / (1 + (variant.shift - 1) * u)
    kept = uncut[(uncut >= low) & (uncut <= high)][:20_000]
    assert stats.ks_2samp(drawn.numpy(), kept).pvalue > 1e-3


def test_the_ends_of_the_draw_stay_finite():
    ends = torch.tensor([0.0, 1.0 - 2**-24])
    for density in ("uniform", "logit_normal"):
        for expert in ("high", "low"):
            assert sample_sigma(ends, VARIANTS["t2v_a14b"], expert, density).isfinite().all()
