"""TinyWan: a folder that diffusers loads, the same wherever it is built."""

import json
from functools import cache

import numpy as np
import pytest
import torch
from diffusers import AutoencoderKLWan, WanImageToVideoPipeline, WanPipeline
from transformers import AutoTokenizer

from tempolora.config import ModelConfig
from tempolora.data.toy import KINDS, Scenes, draw_scenes, render, scene
from tempolora.model import tinywan as module
from tempolora.model import wan
from tempolora.variants import VARIANTS

PARTS = ("transformer", "vae", "text_encoder")
SIZE = {"fps": 16.0, "num_frames": 17, "height": 64, "width": 64}
SCENES = Scenes.cat(
    [
        draw_scenes(1, np.random.default_rng([7, n]), kinds=(kind,), hz=(1.0, 4.0))
        for n, kind in enumerate(KINDS)
    ]
)


def build(folder, variant="t2v_a14b"):
    folder.mkdir()
    module.build_tinywan(variant, folder)
    return folder


def contents(folder):
    return {
        str(path.relative_to(folder)): path.read_bytes()
        for path in sorted(folder.rglob("*"))
        if path.is_file()
    }


@pytest.mark.parametrize("variant", VARIANTS)
def test_diffusers_pipelines_load_the_folder(tinywan, variant):
    folder = tinywan(variant)
    pipelines = {"t2v": WanPipeline, "i2v": WanImageToVideoPipeline}
    for task in VARIANTS[variant].tasks:
        pipeline = pipelines[task].from_pretrained(folder)
        assert pipeline.config.boundary_ratio == VARIANTS[variant].boundary
        assert pipeline.config.expand_timesteps == VARIANTS[variant].per_token_time
        assert pipeline.scheduler.config.flow_shift == VARIANTS[variant].shift
        assert (pipeline.transformer_2 is None) == (VARIANTS[variant].boundary is None)
        assert pipeline.transformer.config.attention_head_dim == 128
    index = json.loads((folder / "model_index.json").read_text())
    assert index["_class_name"] == pipelines[VARIANTS[variant].tasks[0]].__name__


def test_two_builds_are_the_same_to_the_byte(tmp_path):
    first, second = build(tmp_path / "first"), build(tmp_path / "second")
    assert contents(first) == contents(second)


def test_building_leaves_the_random_state_alone(tmp_path):
    torch.manual_seed(3)
    expected = torch.rand(4)
    torch.manual_seed(3)
    build(tmp_path / "folder", "ti2v_5b")
    assert torch.equal(torch.rand(4), expected)


def test_the_slower_of_two_racing_builds_takes_the_other_one(tmp_path, monkeypatch):
    """The other process finishes while ours is still building."""
    monkeypatch.setenv("TEMPOLORA_CACHE", str(tmp_path))

    def write(variant, folder):
        (folder / "who").write_text("first")

    def write_late(variant, folder):
        monkeypatch.setattr(module, "build_tinywan", write)
        module.tinywan_folder(variant)
        (folder / "who").write_text("second")

    monkeypatch.setattr(module, "build_tinywan", write_late)
    folder = module.tinywan_folder("t2v_a14b")
    assert (folder / "who").read_text() == "first"
    assert list(tmp_path.iterdir()) == [folder]


def test_a_build_that_fails_leaves_nothing_behind(tmp_path, monkeypatch):
    monkeypatch.setenv("TEMPOLORA_CACHE", str(tmp_path))

    def fail(variant, folder):
        (folder / "half").touch()
        raise OSError("disk full")

    monkeypatch.setattr(module, "build_tinywan", fail)
    with pytest.raises(OSError, match="disk full"):
        module.tinywan_folder("t2v_a14b")
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    "text",
    [
        "a red ball",
        "reddish red ball",
        "猫が跳ねる",
        "naïve é é  two  spaces",
        "tab\tline\n",
        "🎬",
        "",
    ],
)
def test_any_text_comes_back_from_its_tokens(tinywan, text):
    tokenizer = AutoTokenizer.from_pretrained(tinywan("t2v_a14b"), subfolder="tokenizer")
    tokens = tokenizer(text).input_ids
    words = [word for word in text.split() if word in module.WORDS.split()]
    assert len(tokens) == len(text.encode()) - sum(len(word) - 1 for word in words) + 1
    assert tokens[-1] == tokenizer.eos_token_id
    assert tokenizer.decode(tokens, skip_special_tokens=True) == text


@pytest.fixture(scope="module")
def passed(tinywan):
    """passed(variant): (clips, their latents, their reconstruction) through the folder's VAE."""

    @cache
    def through(variant):
        model = ModelConfig(id=str(tinywan(variant)), variant=variant, base="fp32")
        vae = wan.load_vae(model, "cpu")
        clips = render(SCENES, **SIZE)
        latents = wan.encode_video(vae, clips)
        return clips, latents, wan.decode_video(vae, latents)

    return through


@pytest.mark.parametrize(("variant", "floor_db"), [("t2v_a14b", 22.0), ("ti2v_5b", 20.5)])
def test_the_shipped_vae_reconstructs_clips_it_never_saw(passed, variant, floor_db):
    """A random VAE reaches about 8 dB; the floor is 2 dB below what these clips measure."""
    clips, _, decoded = passed(variant)
    error = (clips.double() - decoded.double()).square().mean((1, 2, 3, 4))
    assert (10 * torch.log10(255**2 / error)).mean() > floor_db


@pytest.mark.parametrize("variant", ["t2v_a14b", "ti2v_5b"])
def test_latents_of_drawn_content_have_about_zero_mean_and_unit_variance(passed, variant):
    """On other clips than the statistics were taken from, so not exactly."""
    latents = passed(variant)[1]
    assert latents.mean((0, 2, 3, 4)).abs().max() < 1
    assert latents.mean().abs() < 0.2
    assert 0.7 < latents.std() < 1.4
    assert latents.std((0, 2, 3, 4)).min() > 0.3


@pytest.mark.parametrize(("variant", "lowest"), [("t2v_a14b", 0.8), ("ti2v_5b", 0.5)])
def test_the_shipped_vae_passes_pulses_and_motion_from_1_to_5_hz(tinywan, variant, lowest):
    """Amplitude after over before, of brightness and of a square's position. The 16x VAE is weak
    on fast motion, see docs/tinywan.md."""
    model = ModelConfig(id=str(tinywan(variant)), variant=variant, base="fp32")
    vae = wan.load_vae(model, "cpu")
    for hz in (1.0, 3.0, 5.0):
        turn = 2 * np.pi * hz * np.arange(33) / 16 + 0.7
        pulse = np.broadcast_to(120 + 40 * np.cos(turn)[:, None, None, None], (33, 32, 32, 3))
        look = {"tint": (230, 230, 230), "ground": (40, 40, 40)}
        look |= {"texture": "flat", "ground_texture": "flat"}
        square = render(scene("slide", hz, 0.7, 6 / 64, **look), **SIZE | {"num_frames": 33})
        square = square[0].numpy()
        for clip, track, low, high in (
            (pulse, lambda video: video.mean((1, 2, 3)), 0.9, 1.1),
            (square, centre_x, lowest, 1.2),
        ):
            before = torch.from_numpy(np.rint(clip).astype(np.uint8))[None]
            after = wan.decode_video(vae, wan.encode_video(vae, before))
            gain = swing(track(after[0].numpy().astype(float)), hz)
            gain /= swing(track(before[0].numpy().astype(float)), hz)
            assert low < gain < high, (hz, gain)


def centre_x(video_FHW3):
    light = (video_FHW3.mean(3) - 60).clip(0)
    return (light * np.arange(light.shape[2])).sum((1, 2)) / light.sum((1, 2))


def swing(track_F, hz):
    """Amplitude at `hz`, beside a mean, without the first frame."""
    turn = 2 * np.pi * hz * np.arange(len(track_F)) / 16
    basis = np.stack([np.cos(turn), np.sin(turn), np.ones_like(turn)], 1)
    return np.hypot(*np.linalg.lstsq(basis[1:], track_F[1:], rcond=None)[0][:2])


@pytest.mark.parametrize("variant", VARIANTS)
def test_the_folder_holds_the_shipped_vae_in_fp32(tinywan, variant):
    found = AutoencoderKLWan.from_pretrained(tinywan(variant), subfolder="vae")
    shipped = module.read_vae(module.vae_file(variant))
    assert {name: found.config[name] for name in module.plain_config(shipped)} == (
        module.plain_config(shipped)
    )
    for name, tensor in shipped.state_dict().items():
        assert found.state_dict()[name].dtype == torch.float32
        assert torch.equal(found.state_dict()[name], tensor), name


TEXT = "text_encoder.safetensors"


def test_the_shipped_weights_stay_small_and_fit_what_the_code_builds():
    vaes = {module.vae_file(variant) for variant in VARIANTS}
    experts = {module.expert_file(expert) for expert in ("high", "low")}
    assert set(module.WEIGHTS.iterdir()) == {*vaes, *experts, module.WEIGHTS / TEXT}
    assert sum(path.stat().st_size for path in module.WEIGHTS.iterdir()) < 16_000_000
    wanted = wan.new_transformer(module.expert_architecture()).state_dict()
    for path in experts:
        state = module.read_expert(path).state_dict()
        assert {k: v.shape for k, v in state.items()} == {k: v.shape for k, v in wanted.items()}
    for variant in VARIANTS:
        config = module.plain_config(module.read_vae(module.vae_file(variant)))
        wanted = module.vae_architecture(variant)
        scaled = ("latents_mean", "latents_std")
        assert {k: v for k, v in config.items() if k not in scaled} == {
            k: v for k, v in wanted.items() if k not in scaled
        }


@pytest.mark.parametrize("variant", VARIANTS)
def test_every_expert_and_part_is_its_own(tinywan, variant):
    model = ModelConfig(id=str(tinywan(variant)), variant=variant)
    parts = PARTS + ("transformer_2",) * (VARIANTS[variant].boundary is not None)
    assert len({wan.fingerprint(model, part) for part in parts}) == len(parts)
