"""How TinyWan's parts are trained and measured: the short way through the VAE equals that of
diffusers, the measures find what is known to be there, an expert learns."""

import json

import numpy as np
import pytest
import torch
from safetensors import safe_open

from tempolora.config import ModelConfig
from tempolora.data.toy import KINDS, SHAPES, TEXTURES, Scenes, captions, draw_scenes, scene
from tempolora.model import tinywan, wan
from tempolora.rhythm.tempo import LUMA
from tempolora.toy_pretrain import __main__ as command
from tempolora.toy_pretrain import clips, experts, measure
from tempolora.toy_pretrain import vae as training
from tempolora.toy_pretrain.__main__ import main
from tempolora.toy_pretrain.parts import write_part


@pytest.mark.parametrize("variant", ["t2v_a14b", "ti2v_5b"])
def test_whole_clips_equal_diffusers_chunks(variant):
    torch.manual_seed(0)
    vae = training.new_vae(variant).eval()
    video = 1.6 * torch.rand(2, 3, 17, 32, 32) - 0.8
    with torch.no_grad():
        posterior = vae.encode(video).latent_dist
        decoded = vae.decode(posterior.mean).sample
        with training.whole_clips(vae):
            mean, log_variance = training.encode_whole(vae, video)
            whole = training.decode_whole(vae, mean)
        again = vae.encode(video).latent_dist
    torch.testing.assert_close(mean, posterior.mean, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(log_variance, posterior.logvar, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(whole.clamp(-1, 1), decoded, rtol=1e-4, atol=1e-4)
    assert torch.equal(again.mean, posterior.mean), "the hooks are gone afterwards"


def test_block_luminance_is_the_mean_of_bt601_luma_over_frame_and_block():
    rng = np.random.default_rng(0)
    video = rng.random((2, 3, 9, 16, 24))
    found = training.block_luminance(torch.from_numpy(video), 8).numpy()
    assert found.shape == (2, 4, 2, 2, 3)
    luma = 0.299 * video[:, 0] + 0.587 * video[:, 1] + 0.114 * video[:, 2]
    for k in range(4):
        for t in (1, 2):
            block = luma[1, 4 * (t - 1) + k + 1, 8:16, 16:24]
            assert found[1, k, t - 1, 1, 2] == pytest.approx(block.mean())


@pytest.mark.parametrize(
    ("drawn", "track", "size"),
    [
        (lambda hz: measure.swinging_squares(hz), measure.track_square, 6.0),
        (
            lambda hz: measure.swinging_gratings(hz, 32),
            lambda luma: measure.track_grating(luma, 32),
            3.0,
        ),
    ],
)
def test_a_position_track_has_the_drawn_amplitude_at_its_own_frequency_alone(drawn, track, size):
    found = track(drawn((1.0, 5.0)) @ np.array(LUMA))
    for row, hz in zip(found, (1.0, 5.0)):
        assert measure.amplitude(row, hz) == pytest.approx(size, rel=0.05)
        assert measure.amplitude(row, 3.0) < 0.1 * size


def test_brightness_at_half_the_swing_has_half_the_gain():
    whole = measure.pulsing_clips((2.0,)).astype(float)
    halved = whole.mean(1, keepdims=True) + 0.5 * (whole - whole.mean(1, keepdims=True))
    full, half = (
        measure.amplitude(measure.track_brightness(c @ np.array(LUMA))[0], 2)
        for c in (whole, halved)
    )
    assert half / full == pytest.approx(0.5, rel=1e-3)


def test_readout_finds_a_linear_code_and_none_in_shuffled_latents():
    generator = torch.Generator().manual_seed(0)
    latents = torch.randn(8, 6, 7, 4, 4, generator=generator)
    weights = torch.randn(4, 6, generator=generator).double()
    blocks = torch.einsum("k c, b c t h w -> b t k h w", weights, latents.double())
    frames = torch.cat([torch.zeros(8, 1, 4, 4), blocks[:, 1:].flatten(1, 2)], dim=1)
    luma = frames.repeat_interleave(8, 2).repeat_interleave(8, 3)
    assert measure._readout_figures(latents, luma, 8)["readout R2"] > 0.999999
    shuffled = latents[:, :, torch.randperm(7, generator=generator)].roll(1, 0)
    assert measure._readout_figures(shuffled, luma, 8)["readout R2"] < 0.1


def test_the_pool_holds_every_kind_shape_and_texture_and_a_third_of_it_flickers():
    rng = np.random.default_rng(0)
    scenes, styles = zip(*(clips.pool_scene(96, rng) for _ in range(600)))
    both = Scenes.cat(scenes)
    assert set(both.kinds) == set(KINDS)
    for found_N, names in (
        (both.shape_N, SHAPES),
        (both.texture_N, TEXTURES),
        (both.ground_texture_N, TEXTURES),
    ):
        assert torch.bincount(found_N, minlength=len(names)).min() > 0.7 * 600 / len(names)
    assert 0.5 <= both.hz_N.min() < 0.6 and 5 < both.hz_N.max() <= 6
    flickers = np.array(styles) == "flickering"
    assert flickers.mean() == pytest.approx(1 / 3, abs=0.06)  # three standard deviations
    walker_N = both.kind_N == KINDS.index("walk")
    face_N = both.shape_N == SHAPES.index("face")
    assert flickers[walker_N].any() and flickers[face_N].any() and (walker_N & face_N).any()


@pytest.mark.parametrize("style", ["clean", "flickering"])
def test_a_pool_clip_is_drawn_in_its_style(style, monkeypatch):
    still = scene("slide", 1.0, amplitude=0.0), style
    monkeypatch.setattr(clips, "pool_scene", lambda size, rng: still)
    change = np.abs(np.diff(clips.draw_one((0, 0)).astype(float), axis=0)).mean((1, 2, 3))
    assert len(change) == clips.POOL_FRAMES - 1
    assert change.min() > 1 if style == "flickering" else change.max() == 0


def test_a_batch_is_drawn_anew_within_range_and_repeats_with_its_seed():
    pool = torch.from_numpy(np.stack([clips.draw_one((0, n)) for n in range(3)]))
    torch.manual_seed(1)
    first = clips.draw_batch(pool, 8, 17, 32)
    second = clips.draw_batch(pool, 8, 17, 32)
    torch.manual_seed(1)
    assert torch.equal(clips.draw_batch(pool, 8, 17, 32), first)
    assert not torch.equal(first, second)
    assert first.shape == (8, 3, 17, 32, 32)
    assert first.abs().max() <= 1
    assert first.std() > 0.1


def test_two_steps_write_a_file_that_tinywan_reads(tmp_path, monkeypatch):
    monkeypatch.setattr(training, "PHASES", ((0.5, 2, 13, 4), (0.5, 1, 17, 4)))
    out = tmp_path / "vae.safetensors"
    options = ["--steps", "2", "--drawn", "3", "--workers", "1", "--seed", "5", "--device", "cpu"]
    assert main(["vae", "--out", str(out), *options]) == 0
    with safe_open(out, "pt") as file:
        header = json.loads(file.metadata()["training"])
    assert header == {"steps": 2, "seed": 5, "drawn": 3, "real_windows": 0}
    vae = tinywan.read_vae(out)
    latents = wan.encode_video(vae, torch.from_numpy(clips.drawn_clips(3, seed=0)))
    torch.testing.assert_close(latents.mean((0, 2, 3, 4)), torch.zeros(16), atol=0.02, rtol=0)
    torch.testing.assert_close(latents.std((0, 2, 3, 4)), torch.ones(16), atol=0.02, rtol=0)
    assert list(tmp_path.iterdir()) == [out]


def test_training_moves_the_weights_and_lowers_the_loss(monkeypatch):
    monkeypatch.setattr(training, "PHASES", ((1.0, 2, 13, 4),))
    monkeypatch.setattr(training, "WARMUP_STEPS", 1)
    losses = []

    def watched(step, device):
        def run():
            figures = step()
            losses.append(figures[0].item())
            return figures

        return run

    monkeypatch.setattr(training, "repeated", watched)
    pool = torch.from_numpy(np.stack([clips.draw_one((0, n)) for n in range(3)]))
    training.train_vae("t2v_a14b", pool, 30, 0)
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
    assert main(["vae", *arguments]) == 2
    error = capsys.readouterr().err
    assert message in error
    assert error.count("\n") == 1


def test_captions_are_words_to_the_tokenizer_and_other_text_comes_back():
    tokenizer, _ = tinywan.text_parts()
    scenes = draw_scenes(400, np.random.default_rng(0))
    known = set(tinywan.WORDS.split())
    for caption in captions(scenes, tempo_words=True):
        tokens = tokenizer.convert_ids_to_tokens(tokenizer(caption).input_ids)
        assert [token for token in tokens[:-1] if token in known] == caption.split()
    for text in ("redder stars, café\n", "静态 a red  star"):
        ids = tokenizer(text).input_ids
        assert tokenizer.decode(ids, skip_special_tokens=True) == text


def test_one_token_of_padding_counts_for_all_of_it():
    torch.manual_seed(0)
    transformer = wan.new_transformer(tinywan.expert_architecture()).eval()
    for block in transformer.blocks:  # so that words differ in what they are worth
        torch.nn.init.normal_(block.attn2.to_k.weight, std=0.2)
    prompts = ["a red disc lights up and dims", "", "a blue square swings like a pendulum"]
    texts = wan.encode_prompts(*tinywan.text_parts(), prompts)
    tokens = 1 + max(len(text) for text in texts)
    text_BLD = wan.pad_text(texts)
    latents, sigma_B = torch.randn(3, 16, 5, 8, 8), torch.tensor([0.1, 0.5, 0.9])
    with torch.no_grad():
        whole = wan.predict_velocity(transformer, latents, sigma_B, text_BLD)
        uncounted = wan.predict_velocity(transformer, latents, sigma_B, text_BLD[:, :tokens])
        experts.count_padding(transformer, tokens)
        short = wan.predict_velocity(transformer, latents, sigma_B, text_BLD[:, :tokens])
    assert (uncounted - whole).norm() > 1e-3 * whole.norm()
    assert (short - whole).norm() < 1e-5 * whole.norm()


def test_an_expert_learns_is_written_and_read_back(tmp_path, monkeypatch):
    monkeypatch.setattr(experts, "BATCH", 4)
    monkeypatch.setattr(experts, "WARMUP_STEPS", 2)
    small = tinywan.expert_architecture() | {"num_layers": 1, "ffn_dim": 128}
    monkeypatch.setattr(tinywan, "expert_architecture", lambda: small)
    pool = experts.encode_pool(tinywan.read_vae(tinywan.vae_file("t2v_a14b")), 2, 0)
    assert pool.latents_NCThw.shape == (2, 16, 13, 8, 8)
    monkeypatch.setattr(command, "encode_pool", lambda *_: pool)
    losses = []
    for steps in (1, 40):
        out = tmp_path / f"{steps}.safetensors"
        arguments = ["experts", "--expert", "low", "--steps", str(steps), "--drawn", "2"]
        assert main([*arguments, "--out", str(out)]) == 0
        losses.append(flow_loss(tinywan.read_expert(out), pool))
    assert losses[1] < 0.8 * losses[0]
    with safe_open(out, "pt") as file:
        assert json.loads(file.metadata()["training"])["steps"] == 40
        assert {file.get_tensor(name).dtype for name in file.keys()} == {torch.bfloat16}  # noqa: SIM118


def test_a_folder_of_trained_experts_is_a_model(tmp_path, capsys):
    small = tinywan.expert_architecture() | {"num_layers": 1, "ffn_dim": 128}
    files = {name: tmp_path / f"{name}.safetensors" for name in ("high", "low")}
    for seed, path in enumerate(files.values()):
        torch.manual_seed(seed)
        write_part(wan.new_transformer(small), small, path, {}, torch.bfloat16)
    arguments = ["folder", "--high", str(files["high"]), "--low", str(files["low"]), "--out"]
    assert main([*arguments, str(tmp_path / "model")]) == 0
    model = ModelConfig(id=str(tmp_path / "model"), base="fp32")
    for name, path in files.items():
        loaded = wan.load_transformer(model, name, "cpu").state_dict()
        for key, value in tinywan.read_expert(path).state_dict().items():
            assert torch.equal(loaded[key], value), (name, key)
    assert main([*arguments, str(tmp_path / "model")]) == 2
    assert "is there already" in capsys.readouterr().err
    assert main(["folder", "--high", "no", "--low", "no", "--out", str(tmp_path / "other")]) == 2
    assert {path.name for path in tmp_path.iterdir()} == {
        "model",
        *(p.name for p in files.values()),
    }


def flow_loss(transformer, pool) -> float:
    """At sigma 0.5, of both clips, with noise that training has not met."""
    generator = torch.Generator().manual_seed(5)
    x0 = pool.latents_NCThw.float()
    noise = torch.randn(x0.shape, generator=generator)
    sigma_B = torch.full((2,), 0.5)
    text = wan.pad_text([pool.text_KLD[n].float() for n in pool.caption_N.tolist()])
    with torch.no_grad():
        v_hat = wan.predict_velocity(transformer, 0.5 * x0 + 0.5 * noise, sigma_B, text)
    return (v_hat - (noise - x0)).square().mean().item()
