"""A batch: where its randomness comes from, and what comes along."""

import pytest
import torch

from tempolora.config import load_config
from tempolora.data.shards import Sample
from tempolora.train.step import Collate

SHORT = ("data.num_frames=9", "rhythm.spec_weight=0")


def config(*overrides):
    return load_config(None, ["data.height=64", "data.width=64", *overrides])


def drawn_samples(cfg, draws, expert="high"):
    sample = Sample(
        "k", {"latents": torch.zeros(cfg.latent_shape)}, torch.ones(3, 32), {}, {"speed": 1.0}
    )
    return Collate(cfg, expert, torch.zeros(1, 32))([(draw, sample) for draw in draws])


def test_noise_and_sigma_are_functions_of_seed_expert_and_draw_alone():
    cfg = config()
    together, alone = drawn_samples(cfg, [7, 8]), drawn_samples(cfg, [8])
    assert torch.equal(together.noise_BCTHW[1], alone.noise_BCTHW[0])
    assert together.sigma_B[1] == alone.sigma_B[0]
    for other in (
        drawn_samples(cfg, [9]),
        drawn_samples(cfg, [8], "low"),
        drawn_samples(config("train.seed=1"), [8]),
    ):
        assert not torch.equal(other.noise_BCTHW[0], alone.noise_BCTHW[0])


def test_captions_are_dropped_at_the_set_rate_for_the_empty_prompt():
    cfg = config("train.caption_dropout=0.25", *SHORT)
    drawn = drawn_samples(cfg, range(2000))
    dropped = drawn.text_BLD.flatten(1).eq(0).all(dim=1).float().mean().item()
    assert dropped == pytest.approx(0.25, abs=0.03)  # 3 standard deviations


def test_sigmas_stay_in_the_experts_range():
    cfg = config(*SHORT)
    assert drawn_samples(cfg, range(200), "high").sigma_B.min() >= 0.875
    assert drawn_samples(cfg, range(200), "low").sigma_B.max() <= 0.875


def test_onsets_come_along_and_a_clip_without_sound_has_none():
    cfg = config(*SHORT)
    beats = torch.rand(9)
    latents = {"latents": torch.zeros(cfg.latent_shape)}
    samples = [Sample("a", latents, torch.ones(3, 32), {"onset": beats}, {"speed": 1.0})]
    samples += [Sample("b", latents, torch.ones(3, 32), {}, {"speed": 1.0})]
    drawn = Collate(cfg, "high", torch.zeros(1, 32))([*enumerate(samples)])
    assert torch.equal(drawn.onset_BF, torch.stack([beats, torch.zeros(9)]))
