"""What a run says of itself: losses by sigma, and an alarm for a video that freezes."""

import logging
import math

import numpy as np
import pytest
import torch
from test_objective import ALONE, batch, config, guess_zero, objective

from tempolora.train.flow import unshift_sigma
from tempolora.train.watch import FREEZE_WINDOW, FreezeAlarm, Watch, bin_centres
from tempolora.train.work import work_of


@pytest.mark.parametrize("expert", ["high", "low"])
def test_the_nine_sigmas_part_the_experts_time_equally(expert):
    cfg = config()
    centres = bin_centres(cfg, expert)
    low, high = (0.875, 1.0) if expert == "high" else (0.0, 0.875)
    assert len(centres) == 9 and low < centres[0] and centres[-1] < high
    u = [unshift_sigma(float(sigma), 12.0) for sigma in centres]
    assert np.allclose(np.diff(u), np.diff(u)[0])
    assert u[0] - unshift_sigma(low, 12.0) == pytest.approx(np.diff(u)[0] / 2)


def test_a_logged_step_has_every_term_its_gradient_share_and_the_loss_by_sigma():
    cfg = config()
    made = objective(cfg, calibrated_on=batch(cfg))
    watch = Watch(cfg, "high", ALONE)
    watch.begin()
    watch.fetched()
    flows = {}
    for seed, sigma in enumerate((0.88, 0.93, 0.99)):
        drawn = batch(cfg, seed, sigma=(sigma, sigma))
        outcome = made(guess_zero, drawn)
        watch.add(drawn, outcome)
        flows[sigma] = outcome.flow_B.mean().item()
    values = watch.values(made, 7, torch.tensor(0.5), 1e-4)
    assert values["loss"] > values["flow"] == pytest.approx(np.mean([*flows.values()]))
    assert values["samples_per_s"] == pytest.approx(6 / values["seconds"])
    tokens = 13 * 4 * 4
    assert values["tokens_per_s"] == pytest.approx(tokens * values["samples_per_s"])
    work = work_of(cfg, "high")
    assert work.tokens == tokens
    flops = work.flops.total / cfg.train.batch_size
    assert values["model_tflops"] == pytest.approx(flops / 1e12 * values["samples_per_s"])
    assert 0 < values["data_wait"] < 0.5
    assert set(values["grad_share"]) == {"spectral", "tv"}
    assert values["grad_norm"] == 0.5 and values["lr"] == 1e-4
    assert 0 < values["motion"] < math.inf
    assert 0 < values["motion_to_clip"] < math.inf
    by_sigma = {float(sigma): loss for sigma, loss in values["flow_by_sigma"].items()}
    assert len(by_sigma) == 3
    for sigma, loss in flows.items():
        nearest = min(by_sigma, key=lambda centre: abs(centre - sigma))
        assert by_sigma[nearest] == pytest.approx(loss, rel=1e-5)
    watch.begin()
    drawn = batch(cfg, 9)
    watch.add(drawn, made(guess_zero, drawn))
    assert len(watch.values(made, 8, torch.tensor(0.5), 1e-4)["flow_by_sigma"]) <= 2


def hear(alarm, ratio, times, shares, caplog, to_clip=0.5):
    with caplog.at_level(logging.WARNING):
        for step in range(times):
            alarm.hear(step, math.log(ratio), math.log(to_clip), shares)
    return [record.getMessage() for record in caplog.records]


def test_the_freeze_alarm_names_the_term_that_weighs_too_much(caplog):
    heard = hear(FreezeAlarm(), 0.5, FREEZE_WINDOW, {"spectral": 0.9, "tv": 0.1}, caplog)
    assert len(heard) == 1
    assert "motion energy is 0.50 of what it was before" in heard[0]
    assert "the spectral term's gradient is 90% of the flow's: lower its weight" in heard[0]


def test_without_a_heavy_term_it_looks_elsewhere_and_it_does_not_repeat_itself_each_step(caplog):
    heard = hear(FreezeAlarm(), 0.5, 3 * FREEZE_WINDOW - 1, {"spectral": 0.05}, caplog)
    assert len(heard) == 2
    assert "lower train.lr" in heard[0]


def test_motion_like_the_bases_or_stronger_is_no_alarm(caplog):
    assert not hear(FreezeAlarm(), 0.75, 200, {}, caplog)
    assert not hear(FreezeAlarm(), 3.0, 200, {}, caplog)
    assert not hear(FreezeAlarm(), 0.1, FREEZE_WINDOW - 1, {}, caplog)


def test_an_estimate_that_moves_more_than_its_clip_may_calm_down(caplog):
    """A bad base's estimate is full of noise, which counts as motion until it is learned away."""
    assert not hear(FreezeAlarm(), 0.3, 200, {}, caplog, to_clip=5.0)
