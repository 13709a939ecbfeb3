"""The rollout term: bands of real clips, a hinge outside of them, a gradient of one step."""

import pytest
import torch
from test_objective import CPU, batch, config, objective
from test_probes import known_readout, latents_of

from tempolora.config import ConfigError
from tempolora.rhythm.bank import Bank, bands_of, hinge, log_bands
from tempolora.rhythm.tempo import motion, power_spectrum
from tempolora.timebase import TimeBase
from tempolora.train.rollout import Rollout

TIMEBASE = TimeBase(16, 49)


def test_bands_part_the_band_by_equal_steps_of_log_frequency_and_end_above_the_cutoff():
    bins = TIMEBASE.usable_bins_hz("readout")
    bands = bands_of(bins, (0.5, 6.0), 6.0)
    hz = [[TIMEBASE.bins_hz[k] for k in row.nonzero().flatten().tolist()] for row in bands]
    ratio = 12**0.25
    for k in range(4):
        assert all(0.5 * ratio**k <= f < 0.5 * ratio ** (k + 1) * (1 + 1e-6) for f in hz[k])
    assert hz[4] == pytest.approx([6, 19 / 3, 20 / 3, 7, 22 / 3])
    assert sorted({f for row in hz[:4] for f in row}) == pytest.approx(
        [f for f in bins.values() if 0.5 <= f <= 6]
    )


def test_the_range_is_that_of_clips_that_move_alike():
    """Power grows with motion; the range for a slow clip must not be that of fast ones."""
    generator = torch.Generator().manual_seed(0)
    motion_N = torch.logspace(-4, 0, 400)
    power_NF = motion_N[:, None] * torch.rand(400, 25, generator=generator).add(0.5)
    bands = bands_of(TIMEBASE.usable_bins_hz("readout"), (0.5, 6.0), 6.0)
    low, high = Bank(power_NF, motion_N).log_range(bands, torch.tensor([1e-3, 1e-1]))
    assert (low < high).all()
    assert (high[0] < low[1]).all()


def test_the_hinge_is_zero_inside_and_square_outside():
    low, high = torch.zeros(1, 2), torch.ones(1, 2)
    inside = hinge(torch.tensor([[0.0, 0.7]]), low, high)
    outside = hinge(torch.tensor([[-2.0, 1.5]]), low, high)
    assert inside.tolist() == [0]
    assert outside.tolist() == pytest.approx([(4 + 0.25) / 2])


def test_band_power_of_a_tone_is_that_of_its_window():
    """A Hann window of S samples leaves a tone of amplitude a with power 3/8 S (S/2) a^2 / 2."""
    time_s = torch.arange(48, dtype=torch.float64) / 16
    tone = 0.3 * torch.cos(2 * torch.pi * 7 / 3 * time_s)  # its band holds both neighbours
    power = power_spectrum(tone.view(1, 48, 1, 1))
    bands = bands_of(TIMEBASE.usable_bins_hz("readout"), (0.5, 6.0), 6.0).double()
    total = log_bands(power, bands).exp().max().item()
    assert total == pytest.approx(0.3**2 * 48**2 * 3 / 32, rel=0.02)


def real_bank(readout, clips=40):
    """Clips of slow swings, as the bank holds them."""
    generator = torch.Generator().manual_seed(2)
    time_s = torch.arange(48, dtype=torch.float64) / 16
    curves = []
    for _ in range(clips):
        hz, phase, size = torch.rand(3, generator=generator, dtype=torch.float64)
        curves.append((0.3 + size) * torch.cos(2 * torch.pi * ((1 + 2 * hz) * time_s + phase)))
    luma = torch.stack(curves).view(clips, 48, 1, 1)
    luma = luma + 0.01 * torch.randn(luma.shape, generator=generator, dtype=torch.float64)
    return Bank(power_spectrum(luma).float(), motion(luma).float())


def rollout(cfg, expert="low"):
    readout = known_readout()
    return Rollout(cfg, expert, readout, real_bank(readout), CPU)


def test_a_clip_like_the_others_costs_little_flicker_and_standstill_cost_much():
    made = rollout(config("rhythm.rollout_every=1"))
    readout = known_readout()
    time_s = torch.arange(48, dtype=torch.float64) / 16
    swing = 0.8 * torch.cos(2 * torch.pi * 2 * time_s)
    noise = 0.01 * torch.randn(48, dtype=torch.float64, generator=torch.Generator().manual_seed(5))
    usual, flicker, still = (
        latents_of(curve, readout, TIMEBASE).float()
        for curve in (swing + noise, swing + 0.2 * torch.cos(14 * torch.pi * time_s), noise)
    )
    cost = {
        name: made.outside(x, usual).item()
        for name, x in {"usual": usual, "flicker": flicker, "still": still}.items()
    }
    assert cost["usual"] < 0.2
    assert cost["flicker"] > 10 * cost["usual"] and cost["flicker"] > 1
    assert cost["still"] > 1


@pytest.mark.parametrize(("expert", "top"), [("low", 0.875), ("single", 1.0)])
def test_it_starts_at_the_experts_highest_sigma_and_ends_at_zero(expert, top):
    variant = ("model.variant=ti2v_5b",) if expert == "single" else ()
    cfg = config("rhythm.rollout_every=1", "rhythm.rollout_steps=5", *variant)
    channels = cfg.variant.latent_channels
    readout = known_readout(channels=channels)
    made = Rollout(cfg, expert, readout, real_bank(readout), CPU)
    assert made.sigmas[0] == pytest.approx(top) and made.sigmas[-1] == 0 and len(made.sigmas) == 6
    assert all(a > b for a, b in zip(made.sigmas, made.sigmas[1:], strict=False))


def test_euler_steps_follow_a_known_field_to_the_clip():
    """With the velocity of a straight line, any number of steps arrives exactly."""
    cfg = config("rhythm.rollout_every=1")
    made, drawn = rollout(cfg), batch(cfg)

    def predict(x, sigma_B, text_BLD, **given):
        return (x - drawn.latents_BCTHW) / sigma_B.view(-1, 1, 1, 1, 1)

    x = made.sample(objective(cfg, "low"), predict, drawn)
    assert torch.allclose(x, drawn.latents_BCTHW, atol=1e-4)


def test_only_the_last_step_is_differentiated_and_the_term_joins_the_loss():
    cfg = config("rhythm.rollout_every=1", "rhythm.rollout_steps=4", "rhythm.rollout_weight=0.5")
    made, drawn = rollout(cfg), batch(cfg)
    judge = objective(cfg, "low", drawn)
    gain = torch.tensor(0.5, requires_grad=True)
    with_grad = []

    def predict(x, sigma_B, text_BLD, **given):
        with_grad.append(torch.is_grad_enabled())
        return gain * x

    before = judge(predict, drawn)
    joined = made.join(before, judge, predict, drawn)
    assert with_grad == [True, False, False, False, True]
    terms = joined.terms()
    assert terms["rollout"] > 0
    assert joined.loss.item() == pytest.approx((before.loss + 0.5 * terms["rollout"]).item())
    (alone,) = torch.autograd.grad(before.loss, gain, retain_graph=True)
    (both,) = torch.autograd.grad(joined.loss, gain)
    assert torch.isfinite(both) and both != alone


def test_too_few_clips_are_refused():
    cfg, readout = config("rhythm.rollout_every=1"), known_readout()
    with pytest.raises(ConfigError, match="12 samples are too few to know what is usual"):
        Rollout(cfg, "low", readout, real_bank(readout, clips=12), CPU)
