"""Rates as pure functions of the step."""

import pytest
import torch

from tempolora.config import TrainConfig
from tempolora.train.schedule import ema_decay_at, lr_at


def test_the_warm_up_rises_linearly_and_the_peak_comes_right_after_it():
    train = TrainConfig(lr=1.0, warmup_steps=4, schedule="constant", max_steps=10)
    assert [lr_at(step, train) for step in range(1, 7)] == pytest.approx([0.2, 0.4, 0.6, 0.8, 1, 1])


def test_the_cosine_is_that_of_torch():
    train = TrainConfig(lr=1.0, warmup_steps=0, max_steps=20)
    parameter = torch.nn.Parameter(torch.zeros(1))
    optimizer = torch.optim.SGD([parameter], lr=1.0)
    torch_cosine = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, T_max=21)
    for step in range(1, 21):
        optimizer.step()
        torch_cosine.step()
        assert lr_at(step, train) == pytest.approx(torch_cosine.get_last_lr()[0], abs=1e-9)


def test_no_step_has_a_rate_of_zero():
    train = TrainConfig(lr=1.0, warmup_steps=3, max_steps=12)
    assert all(lr_at(step, train) > 0 for step in range(1, 13))


def test_the_moving_average_forgets_its_start_and_then_keeps_its_decay():
    assert ema_decay_at(1, 0.999) == pytest.approx(2 / 11)
    assert ema_decay_at(100_000, 0.999) == 0.999
