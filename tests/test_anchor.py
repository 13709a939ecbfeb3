"""The anchor: it sees one frame with adapters and without, and it holds what frames look like."""

from dataclasses import replace
from functools import partial

import pytest
import torch
from test_objective import batch, config, guess_zero, objective

from tempolora.config import ConfigError
from tempolora.model import lora, tinywan, wan
from tempolora.train.anchor import Anchor

RECIPE = ("train.anchor_weight=2", "lora.target=all_linear", "lora.rank=4")


def read_low():
    return tinywan.read_expert(tinywan.expert_file("low"))


def with_adapters(cfg, moved):
    """The low-noise expert with adapters that change something where `moved`."""
    expert = read_low()
    lora.add_lora(expert, cfg.lora, cfg.timebase, seed=0)
    generator = torch.Generator().manual_seed(1)
    for name, weight in lora.lora_parameters(expert).items():
        if moved and ".lora_B." in name:
            weight.data = 0.05 * torch.randn(weight.shape, generator=generator)
    return expert


def joined(cfg, expert, drawn):
    predict = partial(wan.predict_velocity, expert)
    judge = objective(cfg, "low", drawn)
    nothing = judge(guess_zero, drawn)
    return nothing, Anchor(cfg, expert).join(nothing, judge, predict, drawn)


def test_adapters_that_are_still_nothing_cost_nothing():
    cfg = config(*RECIPE)
    drawn = batch(cfg, sigma=(0.2, 0.6))
    before, after = joined(cfg, with_adapters(cfg, moved=False), drawn)
    assert after.loss == before.loss
    assert after.terms()["anchor"] == 0


def test_it_is_the_change_of_the_first_frame_alone():
    """Against diffusers' model called on the frame, without adapters and with."""
    cfg = config(*RECIPE)
    drawn = batch(cfg, sigma=(0.2, 0.6))
    changed = with_adapters(cfg, moved=True)
    before, after = joined(cfg, changed, drawn)
    sigma = drawn.sigma_B.view(2, 1, 1, 1, 1)
    x = ((1 - sigma) * drawn.latents_BCTHW + sigma * drawn.noise_BCTHW)[:, :, :1]
    plain = read_low()
    with torch.no_grad():
        seen = [
            model(x, 1000 * drawn.sigma_B, drawn.text_BLD, return_dict=False)[0]
            for model in (changed, plain)
        ]
    wanted = (seen[0] - seen[1]).square().mean()
    assert wanted > 1e-4
    torch.testing.assert_close(after.terms()["anchor"], wanted, rtol=1e-4, atol=0)
    torch.testing.assert_close(after.loss, before.loss + 2 * wanted, rtol=1e-4, atol=0)

    others = replace(
        drawn, latents_BCTHW=drawn.latents_BCTHW.clone(), noise_BCTHW=drawn.noise_BCTHW.clone()
    )
    others.latents_BCTHW[:, :, 1:] = 0
    others.noise_BCTHW[:, :, 1:] = 0
    assert joined(cfg, changed, others)[1].terms()["anchor"] == after.terms()["anchor"]


def test_the_gradient_draws_the_frame_back_and_the_adapters_stay_on():
    cfg = config(*RECIPE)
    drawn = batch(cfg, sigma=(0.2, 0.6))
    changed = with_adapters(cfg, moved=True)
    weights = list(lora.lora_parameters(changed).values())
    _, first = joined(cfg, changed, drawn)
    gradients = torch.autograd.grad(first.loss, weights)
    with torch.no_grad():
        for weight, gradient in zip(weights, gradients, strict=True):
            weight -= 0.01 * gradient
    _, second = joined(cfg, changed, drawn)
    assert 0 < second.terms()["anchor"] < first.terms()["anchor"]


@pytest.mark.parametrize("variant", ["i2v_a14b", "ti2v_5b"])
def test_where_the_first_frame_is_given_it_is_refused(variant):
    with pytest.raises(ConfigError, match=r"train\.anchor_weight: has no meaning with task i2v"):
        config("train.anchor_weight=1", f"model.variant={variant}", "model.task=i2v")


def test_single_frames_stay_nearer_to_the_bases():
    """Trained on one batch with and without it: the change of other frames, with other captions."""
    changes = {}
    for weight in (0, 10):
        cfg = config(*RECIPE, f"train.anchor_weight={weight}")
        model = with_adapters(cfg, moved=False)
        predict, term = partial(wan.predict_velocity, model), Anchor(cfg, model)
        drawn = batch(cfg, sigma=(0.3, 0.6))
        judge = objective(cfg, "low", drawn)
        optimizer = torch.optim.Adam(lora.lora_parameters(model).values(), lr=3e-3)
        for _ in range(12):
            outcome = judge(predict, drawn)
            term.join(outcome, judge, predict, drawn).loss.backward()
            optimizer.step()
            optimizer.zero_grad()
        unseen = batch(cfg, seed=7, sigma=(0.3, 0.6))
        changes[weight] = term.join(outcome, judge, predict, unseen).terms()["anchor"].item()
    assert changes[10] < 0.5 * changes[0]
