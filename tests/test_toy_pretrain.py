"""How TinyWan's VAE is trained and measured: the short way through it equals diffusers' own, and
the measures find what is known to be there."""

import json

import numpy as np
import pytest
import torch
from safetensors import safe_open

from tempolora import toy_pretrain
from tempolora.model import tinywan, wan


@pytest.mark.parametrize("variant", ["t2v_a14b", "ti2v_5b"])
def test_whole_clips_equal_diffusers_chunks(variant):
    torch.manual_seed(0)
    vae = toy_pretrain.new_vae(variant).eval()
    video = 1.6 * torch.rand(2, 3, 17, 32, 32) - 0.8
    with torch.no_grad():
        posterior = vae.encode(video).latent_dist
        decoded = vae.decode(posterior.mean).sample
        with toy_pretrain.whole_clips(vae):
            mean, log_variance = toy_pretrain.encode_whole(vae, video)
            whole = toy_pretrain.decode_whole(vae, mean)
        again = vae.encode(video).latent_dist
    torch.testing.assert_close(mean, posterior.mean, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(log_variance, posterior.logvar, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(whole.clamp(-1, 1), decoded, rtol=1e-4, atol=1e-4)
    assert torch.equal(again.mean, posterior.mean), "the hooks are gone afterwards"


def test_block_luminance_is_the_mean_of_bt601_luma_over_frame_and_block():
    rng = np.random.default_rng(0)
    video = rng.random((2, 3, 9, 16, 24))
    found = toy_pretrain.block_luminance(torch.from_numpy(video), 8).numpy()
    assert found.shape == (2, 4, 2, 2, 3)
    luma = 0.299 * video[:, 0] + 0.587 * video[:, 1] + 0.114 * video[:, 2]
    for k in range(4):
        for t in (1, 2):
            block = luma[1, 4 * (t - 1) + k + 1, 8:16, 16:24]
            assert found[1, k, t - 1, 1, 2] == pytest.approx(block.mean())


@pytest.mark.parametrize(
    ("clips", "track", "size"),
    [
        (lambda hz: toy_pretrain.swinging_squares(hz), toy_pretrain.track_square, 6.0),
        (
            lambda hz: toy_pretrain.swinging_gratings(hz, 32),
            lambda luma: toy_pretrain.track_grating(luma, 32),
            3.0,
        ),
    ],
)
def test_a_position_track_has_the_drawn_amplitude_at_its_own_frequency_alone(clips, track, size):
    found = track(clips((1.0, 5.0)) @ np.array(toy_pretrain.LUMA))
    for row, hz in zip(found, (1.0, 5.0)):
        assert toy_pretrain.amplitude(row, hz) == pytest.approx(size, rel=0.05)
        assert toy_pretrain.amplitude(row, 3.0) < 0.1 * size


def test_brightness_at_half_the_swing_has_half_the_gain():
    clips = toy_pretrain.pulsing_clips((2.0,)).astype(float)
    halved = clips.mean(1, keepdims=True) + 0.5 * (clips - clips.mean(1, keepdims=True))
    full, half = (
        toy_pretrain.amplitude(toy_pretrain.track_brightness(c @ np.array(toy_pretrain.LUMA))[0], 2)
        for c in (clips, halved)
    )
    assert half / full == pytest.approx(0.5, rel=1e-3)


def test_readout_finds_a_linear_code_and_none_in_shuffled_latents():
    generator = torch.Generator().manual_seed(0)
    latents = torch.randn(8, 6, 7, 4, 4, generator=generator)
    weights = torch.randn(4, 6, generator=generator).double()
    blocks = torch.einsum("k c, b c t h w -> b t k h w", weights, latents.double())
    frames = torch.cat([torch.zeros(8, 1, 4, 4), blocks[:, 1:].flatten(1, 2)], dim=1)
    luma = frames.repeat_interleave(8, 2).repeat_interleave(8, 3)
    assert toy_pretrain._readout_figures(latents, luma, 8)["readout R2"] > 0.999999
    shuffled = latents[:, :, torch.randperm(7, generator=generator)].roll(1, 0)
    assert toy_pretrain._readout_figures(shuffled, luma, 8)["readout R2"] < 0.1


def test_a_batch_is_drawn_anew_within_range_and_repeats_with_its_seed():
    pool = torch.from_numpy(np.stack([toy_pretrain.draw_one((0, n)) for n in range(3)]))
    torch.manual_seed(1)
    first = toy_pretrain.draw_batch(pool, 8, 17, 32)
    second = toy_pretrain.draw_batch(pool, 8, 17, 32)
    torch.manual_seed(1)
    assert torch.equal(toy_pretrain.draw_batch(pool, 8, 17, 32), first)
    assert not torch.equal(first, second)
    assert first.shape == (8, 3, 17, 32, 32)
    assert first.abs().max() <= 1
    assert first.std() > 0.1


def test_two_steps_write_a_file_that_tinywan_reads(tmp_path, monkeypatch):
    monkeypatch.setattr(toy_pretrain, "PHASES", ((0.5, 2, 13, 4), (0.5, 1, 17, 4)))
    out = tmp_path / "vae.safetensors"
    options = ["--steps", "2", "--drawn", "3", "--workers", "1", "--seed", "5", "--device", "cpu"]
    assert toy_pretrain.main(["vae", "--out", str(out), *options]) == 0
    with safe_open(out, "pt") as file:
        training = json.loads(file.metadata()["training"])
    assert training == {"steps": 2, "seed": 5, "drawn": 3, "real_windows": 0}
    vae = tinywan.read_vae(out)
    latents = wan.encode_video(vae, torch.from_numpy(toy_pretrain.drawn_clips(3, seed=0)))
    torch.testing.assert_close(latents.mean((0, 2, 3, 4)), torch.zeros(16), atol=0.02, rtol=0)
    torch.testing.assert_close(latents.std((0, 2, 3, 4)), torch.ones(16), atol=0.02, rtol=0)
    assert list(tmp_path.iterdir()) == [out]


def test_training_moves_the_weights_and_lowers_the_loss(monkeypatch):
    monkeypatch.setattr(toy_pretrain, "PHASES", ((1.0, 2, 13, 4),))
    monkeypatch.setattr(toy_pretrain, "WARMUP_STEPS", 1)
    losses = []

    def watched(step, device):
        def run():
            figures = step()
            losses.append(figures[0].item())
            return figures

        return run

    monkeypatch.setattr(toy_pretrain, "repeated", watched)
    pool = torch.from_numpy(np.stack([toy_pretrain.draw_one((0, n)) for n in range(3)]))
    toy_pretrain.train_vae("t2v_a14b", pool, 30, 0)
    assert np.mean(losses[-5:]) < 0.8 * np.mean(losses[:5])


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--out", "{tmp}/no/vae.safetensors"], "--out: there is no folder"),
        (["--out", "{tmp}/vae.safetensors", "--steps", "0"], "--steps: must be at least 1"),
    ],
)
def test_a_mistake_ends_with_one_line_and_code_2(tmp_path, capsys, options, message):
    arguments = [option.format(tmp=tmp_path) for option in options]
    assert toy_pretrain.main(["vae", *arguments]) == 2
    error = capsys.readouterr().err
    assert message in error
    assert error.count("\n") == 1
