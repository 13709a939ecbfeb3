"""One microstep: what the loss sees of each variant, and where its randomness comes from."""

import pytest
import torch

from tempolora.config import load_config
from tempolora.data.shards import Sample
from tempolora.train.step import Batch, Collate, Objective

SHORT = ("data.num_frames=9", "rhythm.spec_weight=0")
CPU = torch.device("cpu")


def config(*overrides):
    return load_config(None, ["data.height=64", "data.width=64", *overrides])


def batch(cfg, seed=0, condition=False):
    generator = torch.Generator().manual_seed(seed)

    def randn():
        return torch.randn(2, *cfg.latent_shape, generator=generator)

    text = torch.randn(2, 512, 32, generator=generator)
    sigma = torch.tensor([0.9, 0.95])
    return Batch(["a", "b"], randn(), randn(), sigma, text, randn() if condition else None)


def seen_by_model(cfg, drawn):
    """What the objective hands to the model, and the loss of the answer zero."""
    seen = {}

    def predict(x, sigma_B, text_BLD, **given):
        seen.update(x=x, sigma=sigma_B, **given)
        return torch.zeros_like(x)

    loss, terms = Objective(cfg, CPU)(predict, drawn)
    return seen, loss, terms


def test_the_true_velocity_costs_nothing():
    cfg = config()
    drawn = batch(cfg)
    truth = drawn.noise_BCTHW - drawn.latents_BCTHW
    loss, terms = Objective(cfg, CPU)(lambda *args, **given: truth, drawn)
    assert loss == 0
    assert set(terms) == {"flow", "spectral", "tv"}
    assert all(term == 0 for term in terms.values())


def test_the_loss_is_the_flow_term_plus_the_weighted_rhythm_terms():
    cfg = config("rhythm.spec_weight=0.5", "rhythm.tv_weight=0.25")
    _, loss, terms = seen_by_model(cfg, batch(cfg))
    assert loss.item() == pytest.approx(
        (terms["flow"] + 0.5 * terms["spectral"] + 0.25 * terms["tv"]).item()
    )
    assert terms["flow"].item() == pytest.approx(2, rel=0.05)  # variance of noise - latents


def test_a_weight_of_zero_leaves_its_term_out():
    cfg = config("rhythm.spec_weight=0", "rhythm.tv_weight=0")
    _, loss, terms = seen_by_model(cfg, batch(cfg))
    assert set(terms) == {"flow"}
    assert loss == terms["flow"]


def test_t2v_noises_every_frame():
    cfg = config()
    drawn = batch(cfg)
    seen, _, _ = seen_by_model(cfg, drawn)
    sigma = drawn.sigma_B.view(-1, 1, 1, 1, 1)
    assert torch.equal(seen["x"], (1 - sigma) * drawn.latents_BCTHW + sigma * drawn.noise_BCTHW)
    assert seen["condition_BCTHW"] is None
    assert not seen["clean_first_frame"]


def test_i2v_a14b_sees_mask_and_condition_in_20_channels_and_learns_every_frame():
    cfg = config("model.variant=i2v_a14b")
    drawn = batch(cfg, condition=True)
    seen, _, terms = seen_by_model(cfg, drawn)
    condition = seen["condition_BCTHW"]
    assert condition.shape[1] == 20
    assert condition[:, :4, 0].eq(1).all()
    assert condition[:, :4, 1:].eq(0).all()
    assert torch.equal(condition[:, 4:], drawn.condition_BCTHW)
    residual = drawn.noise_BCTHW - drawn.latents_BCTHW
    assert terms["flow"].item() == pytest.approx(residual.square().mean().item())


def test_5b_i2v_is_given_a_clean_first_frame_and_does_not_learn_it():
    cfg = config("model.variant=ti2v_5b", "model.task=i2v")
    drawn = batch(cfg)
    seen, _, terms = seen_by_model(cfg, drawn)
    assert torch.equal(seen["x"][:, :, 0], drawn.latents_BCTHW[:, :, 0])
    assert seen["clean_first_frame"]
    assert seen["per_token_time"]
    residual = (drawn.noise_BCTHW - drawn.latents_BCTHW)[:, :, 1:]
    assert terms["flow"].item() == pytest.approx(residual.square().mean().item())


def test_5b_t2v_has_a_time_per_token_and_noises_every_frame():
    cfg = config("model.variant=ti2v_5b")
    seen, _, _ = seen_by_model(cfg, batch(cfg))
    assert seen["per_token_time"]
    assert not seen["clean_first_frame"]


def drawn_samples(cfg, draws, expert="high"):
    sample = Sample("k", {"latents": torch.zeros(cfg.latent_shape)}, torch.ones(3, 32), {}, {})
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
