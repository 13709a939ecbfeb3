"""The loss: what it sees of each variant, what its terms weigh, and when it is calibrated."""

import pytest
import torch
from test_probes import known_readout

from tempolora.config import ConfigError, load_config
from tempolora.train.objective import Objective
from tempolora.train.step import Batch
from tempolora.train.terms import describe_terms
from tempolora.train.world import World

CPU = torch.device("cpu")
ALONE = World(0, 1, CPU)


def config(*overrides):
    return load_config(None, ["data.height=64", "data.width=64", *overrides])


def batch(cfg, seed=0, condition=False, sigma=(0.9, 0.95)):
    generator = torch.Generator().manual_seed(seed)

    def randn():
        return torch.randn(len(sigma), *cfg.latent_shape, generator=generator)

    text = torch.randn(len(sigma), 512, 32, generator=generator)
    onset = torch.rand(len(sigma), cfg.data.num_frames, generator=generator)
    keys = [f"clip{k}" for k in range(len(sigma))]
    given = randn() if condition else None
    return Batch(
        keys, randn(), randn(), torch.tensor(sigma), text, given, onset, torch.ones(len(sigma))
    )


def objective(cfg, expert="high", calibrated_on=None):
    readout = known_readout(cfg.data.num_frames, channels=cfg.variant.latent_channels)
    made = Objective(cfg, expert, readout if cfg.rhythm.signal == "readout" else None, CPU)
    if calibrated_on is not None:
        made.calibrate(guess_zero, [calibrated_on], ALONE)
    return made


def guess_zero(x, sigma_B, text_BLD, **given):
    return torch.zeros_like(x)


def seen_by_model(cfg, drawn):
    """What the objective hands to the model, and what it makes of the answer zero."""
    seen = {}

    def predict(x, sigma_B, text_BLD, **given):
        seen.update(x=x, sigma=sigma_B, **given)
        return torch.zeros_like(x)

    return seen, objective(cfg, cfg.experts[0], drawn)(predict, drawn)


@pytest.mark.parametrize("extra", [(), ("rhythm.sound_weight=0.1",), ("rhythm.signal=latent",)])
def test_the_true_velocity_costs_nothing(extra):
    latent = ("rhythm.spec_cutoff_hz=1.5", "rhythm.band_hz=[0.5,1.5]")
    cfg = config(*extra, *(latent if "rhythm.signal=latent" in extra else ()))
    drawn = batch(cfg)
    truth = drawn.noise_BCTHW - drawn.latents_BCTHW
    outcome = objective(cfg, calibrated_on=drawn)(lambda *args, **given: truth, drawn)
    assert outcome.loss == 0
    assert set(outcome.terms()) == {
        "loss",
        "flow",
        "spectral",
        "tv",
        *(("sound",) * bool(cfg.rhythm.sound_weight)),
    }
    assert all(term == 0 for term in outcome.terms().values())


def test_the_loss_is_the_flow_term_plus_the_weighted_rhythm_terms():
    cfg = config("rhythm.spec_weight=0.5", "rhythm.tv_weight=0.25", "rhythm.sound_weight=0.125")
    _, outcome = seen_by_model(cfg, batch(cfg))
    terms = outcome.terms()
    total = terms["flow"] + 0.5 * terms["spectral"] + 0.25 * terms["tv"] + 0.125 * terms["sound"]
    assert outcome.loss.item() == pytest.approx(total.item(), rel=1e-5)
    assert terms["flow"].item() == pytest.approx(2, rel=0.05)  # variance of noise - latents


def test_once_calibrated_a_weight_is_a_share_of_the_bases_flow_loss():
    """Whatever the residual's spectrum: the term of the base itself equals its flow loss."""
    cfg = config()
    torch.manual_seed(0)
    made = objective(cfg)
    slow = torch.linspace(0, 3, 13).sin().view(1, 1, 13, 1, 1)
    for seed in range(30):
        drawn = batch(cfg, seed, sigma=(0.88 + 0.004 * seed,))
        truth = drawn.noise_BCTHW - drawn.latents_BCTHW
        wrong = truth + 0.3 * slow * drawn.sigma_B**3 + 0.01 * torch.randn(truth.shape)
        made.note(drawn, made.compare(drawn, wrong))
        made.settle(ALONE)
    for sigma in (0.89, 0.93, 0.98):
        drawn = batch(cfg, 99, sigma=(sigma,))
        truth = drawn.noise_BCTHW - drawn.latents_BCTHW
        wrong = truth + 0.3 * slow * sigma**3 + 0.01 * torch.randn(truth.shape)
        terms = made.compare(drawn, wrong).terms()
        for name in ("spectral", "tv"):
            assert (terms[name] / terms["flow"]).item() == pytest.approx(1, rel=0.1), name


def test_the_scale_is_frozen_after_the_first_steps_and_goes_through_a_checkpoint():
    cfg = config("train.warmup_steps=3")
    made, drawn = objective(cfg), batch(cfg)
    assert made.uncalibrated
    made.calibrate(guess_zero, [drawn], ALONE)
    assert not made.uncalibrated
    for step in range(1, 30):
        later = batch(cfg, step)
        if made.calibrating(step):
            made.note(later, made(guess_zero, later))
        made.settle(ALONE)
    assert made.calibrating(10) and not made.calibrating(11)
    points = made.state()
    assert all(len(seen) == 2 * 11 for seen in points.values())
    again = objective(cfg)
    again.load_state(points)
    assert torch.equal(again(guess_zero, drawn).loss, made(guess_zero, drawn).loss)


def test_a_weight_of_zero_leaves_its_term_out():
    cfg = config("rhythm.spec_weight=0", "rhythm.tv_weight=0")
    _, outcome = seen_by_model(cfg, batch(cfg))
    assert set(outcome.terms()) == {"loss", "flow"}
    assert outcome.loss == outcome.flow_B.mean()


def test_each_expert_has_its_own_weights():
    cfg = config('rhythm.spec_weight={"high": 0.5, "low": 0}')
    assert objective(cfg, "high").weights == {"spectral": 0.5, "tv": 0.01}
    assert objective(cfg, "low").weights == {"tv": 0.01}


def test_the_sound_term_is_tv_weighed_by_the_envelope_and_nothing_without_sound():
    cfg = config("rhythm.sound_weight=0.5", "rhythm.tv_weight=0")
    made, drawn = objective(cfg), batch(cfg)
    drawn.onset_BF = torch.ones_like(drawn.onset_BF)
    made.calibrate(guess_zero, [drawn], ALONE)
    terms = made(guess_zero, drawn).terms()
    assert terms["sound"].item() == pytest.approx(terms["tv"].item(), rel=1e-5)
    drawn.onset_BF[:, 20:] = 0
    assert 0 < made(guess_zero, drawn).terms()["sound"] < terms["sound"]
    drawn.onset_BF[:] = 0
    silent = made(guess_zero, drawn).terms()
    assert silent["sound"] == 0
    assert silent["loss"].item() == pytest.approx(
        (silent["flow"] + 0.05 * silent["spectral"]).item()
    )


def test_the_absolute_form_looks_at_the_clean_estimate_above_the_cutoff_alone():
    """The true velocity costs what the clip itself holds up there; slow motion costs nothing."""
    cfg = config("rhythm.spec_form=absolute", "rhythm.tv_weight=0")
    drawn = batch(cfg)
    made = objective(cfg, calibrated_on=drawn)
    truth = drawn.noise_BCTHW - drawn.latents_BCTHW
    outcome = made.compare(drawn, truth)
    assert outcome.flow_B.abs().max() == 0 and outcome.energies["spectral"].min() > 0
    x0_hat = made.noised(drawn) - drawn.sigma_B.view(-1, 1, 1, 1, 1) * truth
    assert torch.allclose(x0_hat, drawn.latents_BCTHW, atol=1e-5)
    velocity = truth.clone().requires_grad_()
    made.compare(drawn, velocity).loss.backward()
    assert velocity.grad.abs().max() > 0


def test_gradient_shares_are_norms_of_the_terms_own_gradients():
    cfg = config("rhythm.spec_weight=0.3", "rhythm.tv_weight=0.2")
    drawn = batch(cfg)
    made = objective(cfg, calibrated_on=drawn)
    outcome = made(guess_zero, drawn)
    shares = made.gradient_shares(drawn, outcome)
    both = torch.zeros_like(drawn.noise_BCTHW, requires_grad=True)
    made.compare(drawn, both).loss.backward()
    only_flow = objective(config("rhythm.spec_weight=0", "rhythm.tv_weight=0"))
    flow = torch.zeros_like(both, requires_grad=True)
    only_flow.compare(drawn, flow).loss.backward()
    for name, other in (("spectral", "tv"), ("tv", "spec")):
        alone = config(*cfg_weights(cfg), f"rhythm.{other}_weight=0")
        single = objective(alone)
        single.load_state(made.state())
        term = torch.zeros_like(both, requires_grad=True)
        single.compare(drawn, term).loss.backward()
        expected = (term.grad - flow.grad).norm() / flow.grad.norm()
        assert shares[name].item() == pytest.approx(expected.item(), rel=1e-3)


def cfg_weights(cfg):
    return (
        f"rhythm.spec_weight={cfg.rhythm.spec_weight}",
        f"rhythm.tv_weight={cfg.rhythm.tv_weight}",
    )


def test_motion_change_tells_a_frozen_estimate_from_a_moving_one():
    cfg = config()
    drawn = batch(cfg)
    made = objective(cfg)
    truth = drawn.noise_BCTHW - drawn.latents_BCTHW
    made.note(drawn, made.compare(drawn, truth))
    made.settle(ALONE)
    assert made.motion_change(drawn, made.compare(drawn, truth))[0].abs().max() < 1e-3
    still = drawn.latents_BCTHW.mean(dim=2, keepdim=True)
    x0_hat = still + 0.5 * (drawn.latents_BCTHW - still)
    v_hat = (made.noised(drawn) - x0_hat) / drawn.sigma_B.view(-1, 1, 1, 1, 1)
    change, to_clip = made.motion_change(drawn, made.compare(drawn, v_hat))
    assert torch.equal(to_clip, made.motion_log_ratio(drawn, v_hat))
    # half the motion, a quarter of its energy; the readout's edge groups see the mean too
    assert change.mean().item() == pytest.approx(torch.tensor(0.25).log().item(), abs=0.3)


def test_t2v_noises_every_frame():
    cfg = config()
    drawn = batch(cfg)
    seen, _ = seen_by_model(cfg, drawn)
    sigma = drawn.sigma_B.view(-1, 1, 1, 1, 1)
    assert torch.equal(seen["x"], (1 - sigma) * drawn.latents_BCTHW + sigma * drawn.noise_BCTHW)
    assert seen["condition_BCTHW"] is None
    assert not seen["clean_first_frame"]


def test_i2v_a14b_sees_mask_and_condition_in_20_channels_and_learns_every_frame():
    cfg = config("model.variant=i2v_a14b")
    drawn = batch(cfg, condition=True)
    seen, outcome = seen_by_model(cfg, drawn)
    condition = seen["condition_BCTHW"]
    assert condition.shape[1] == 20
    assert condition[:, :4, 0].eq(1).all()
    assert condition[:, :4, 1:].eq(0).all()
    assert torch.equal(condition[:, 4:], drawn.condition_BCTHW)
    residual = drawn.noise_BCTHW - drawn.latents_BCTHW
    assert outcome.flow_B.mean().item() == pytest.approx(residual.square().mean().item())


def test_5b_i2v_is_given_a_clean_first_frame_and_does_not_learn_it():
    cfg = config("model.variant=ti2v_5b", "model.task=i2v", "rhythm.sound_weight=0.1")
    drawn = batch(cfg)
    seen, outcome = seen_by_model(cfg, drawn)
    assert torch.equal(seen["x"][:, :, 0], drawn.latents_BCTHW[:, :, 0])
    assert seen["clean_first_frame"]
    assert seen["per_token_time"]
    residual = (drawn.noise_BCTHW - drawn.latents_BCTHW)[:, :, 1:]
    assert outcome.flow_B.mean().item() == pytest.approx(residual.square().mean().item())
    # nothing that the model says of the given frame counts, in any term
    made = objective(cfg, "single", drawn)
    v_hat = torch.zeros_like(drawn.noise_BCTHW)
    wild = v_hat.clone()
    wild[:, :, 0] = 1e3
    one, other = made.compare(drawn, v_hat), made.compare(drawn, wild)
    assert torch.equal(one.loss, other.loss)
    change = [made.motion_log_ratio(drawn, x) for x in (v_hat, wild)]
    assert torch.equal(*change)


def test_5b_t2v_has_a_time_per_token_and_noises_every_frame():
    cfg = config("model.variant=ti2v_5b")
    seen, _ = seen_by_model(cfg, batch(cfg))
    assert seen["per_token_time"]
    assert not seen["clean_first_frame"]


def test_what_the_spectrum_looks_at_is_said():
    text = describe_terms(config(), "high", known_readout())
    assert "spectral 0.05, tv 0.01" in text
    assert "in the band 14 frequencies from 0.67 to 6.00 Hz" in text
    assert "above the cutoff 5 frequencies from 6.00 to 7.33 Hz" in text
    assert "comb at 4 and 8 Hz" in text


def test_a_useless_readout_is_refused_before_training():
    cfg = config()
    with pytest.raises(ConfigError, match=r"rhythm\.spec_weight: no frequency .* can be read"):
        Objective(cfg, "high", known_readout(g2=0.3), CPU)
