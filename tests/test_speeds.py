"""The tempo adapter: which samples it sees, and how strong it is for each of them."""

from functools import partial

import pytest
import torch
from test_objective import batch, config

from tempolora.config import ConfigError
from tempolora.model import lora, tinywan, wan
from tempolora.train.speeds import follow_speed, of_each_group, speed_groups

SPEEDS = (0.5, 0.71, 1.0, 1.41, 2.0)


class Shelf:
    """A reader of samples of which only the speed is known."""

    def __init__(self, *speeds):
        self._speeds = speeds

    def speed(self, position):
        return self._speeds[position]


def moved_expert(cfg):
    expert = tinywan.read_expert(tinywan.expert_file("high"))
    lora.add_lora(expert, cfg.lora, cfg.timebase, seed=0)
    generator = torch.Generator().manual_seed(1)
    for name, weight in lora.lora_parameters(expert).items():
        if ".lora_B." in name:
            weight.data = 0.05 * torch.randn(weight.shape, generator=generator)
    return expert


def tempo_config(*more):
    return config("lora.kind=tempo", f"data.speeds={list(SPEEDS)}", *more)


def test_a_rhythm_adapter_sees_clips_at_their_own_speed_and_a_tempo_adapter_all_others():
    reader = Shelf(1.0, 0.5, 2.0, 1.0, 1.41, 0.71)
    assert speed_groups("rhythm", reader, [*range(6)]) == [[0, 3]]
    assert speed_groups("tempo", reader, [*range(6)]) == [[2, 4], [1, 5]]
    assert of_each_group("rhythm", reader, [[0, 1, 2], [3, 4]]) == [0, 3]
    assert of_each_group("tempo", reader, [[0, 1, 2], [3, 4, 5]]) == [2, 1, 4, 5]


def test_without_one_of_the_groups_there_is_nothing_to_balance():
    with pytest.raises(ConfigError, match="no clip to train on is there slower"):
        speed_groups("tempo", Shelf(1.0, 2.0), [0, 1])


@pytest.mark.parametrize("target", ["temporal", "all_linear"])
def test_each_sample_of_a_batch_has_its_own_strength(target):
    """Against one sample at a time at a strength of its own."""
    cfg = tempo_config(f"lora.target={target}")
    expert, drawn = moved_expert(cfg), batch(cfg, sigma=(0.9, 0.93, 0.97))
    drawn.speed_B[:] = torch.tensor([0.5, 1.0, 1.41])
    predict = partial(wan.predict_velocity, expert)
    with torch.no_grad():
        follow_speed("tempo", expert, drawn)
        together = predict(drawn.noise_BCTHW, drawn.sigma_B, drawn.text_BLD)
        for n, strength in enumerate((-1.0, 0.0, 0.4957)):
            lora.set_lora_scale(expert, strength)
            one = slice(n, n + 1)
            alone = predict(drawn.noise_BCTHW[one], drawn.sigma_B[one], drawn.text_BLD[one])
            torch.testing.assert_close(together[one], alone, rtol=1e-4, atol=1e-4)
        base = tinywan.read_expert(tinywan.expert_file("high"))
        own_speed = wan.predict_velocity(base, drawn.noise_BCTHW, drawn.sigma_B, drawn.text_BLD)
    assert (together[0] - own_speed[0]).norm() > 1e-3 * own_speed[0].norm()
    torch.testing.assert_close(together[1], own_speed[1], rtol=1e-6, atol=1e-6)


def test_opposite_speeds_pull_the_adapter_opposite_ways():
    """The gradient of B is the strength times the same thing: at speed 1 there is none."""
    cfg = tempo_config()
    expert = tinywan.read_expert(tinywan.expert_file("high"))
    lora.add_lora(expert, cfg.lora, cfg.timebase, seed=0)  # B is zero: all speeds predict alike
    drawn = batch(cfg, sigma=(0.9,))
    gradients = {}
    for speed in (0.5, 1.0, 2.0):
        drawn.speed_B[:] = speed
        follow_speed("tempo", expert, drawn)
        v_hat = wan.predict_velocity(expert, drawn.noise_BCTHW, drawn.sigma_B, drawn.text_BLD)
        weights = [w for name, w in lora.lora_parameters(expert).items() if ".lora_B." in name]
        grads = torch.autograd.grad(v_hat.square().mean(), weights)
        gradients[speed] = torch.cat([gradient.flatten() for gradient in grads])
    assert gradients[2.0].norm() > 0
    assert gradients[1.0].norm() == 0
    torch.testing.assert_close(gradients[0.5], -gradients[2.0], rtol=1e-5, atol=1e-12)


def test_the_base_comes_back_for_a_moment():
    cfg = tempo_config()
    expert, drawn = moved_expert(cfg), batch(cfg, sigma=(0.9, 0.95))
    follow_speed("tempo", expert, drawn)
    before = [layer.scaling[lora.ADAPTER] for layer in lora._layers(expert).values()]
    with lora.without_lora(expert):
        assert {layer.scaling[lora.ADAPTER] for layer in lora._layers(expert).values()} == {0.0}
    after = [layer.scaling[lora.ADAPTER] for layer in lora._layers(expert).values()]
    assert all(first is second for first, second in zip(before, after, strict=True))


@pytest.mark.parametrize(
    ("sets", "says"),
    [
        (["data.speeds=[1.0,2.0]"], "holds no slower or no faster speed than 1"),
        (["data.speeds=[1.0]"], "holds no slower or no faster speed than 1"),
        (["data.speeds=[0.5,2,2.0]"], "names a speed twice"),
        (["data.speeds=[]"], "is empty"),
        (["data.speeds=[0.1,1,2]"], "data.speeds"),
    ],
)
def test_speeds_that_cannot_be_are_refused(sets, says):
    with pytest.raises(ConfigError, match=says):
        config("lora.kind=tempo", *sets)
