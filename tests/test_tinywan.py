"""TinyWan: a folder that diffusers loads, the same wherever it is built."""

import json

import numpy as np
import pytest
import torch
from diffusers import WanImageToVideoPipeline, WanPipeline
from transformers import AutoTokenizer

from tempolora.config import ModelConfig
from tempolora.data.toy import Motion, draw_clip
from tempolora.model import tinywan as module
from tempolora.model import wan
from tempolora.variants import VARIANTS

PARTS = ("transformer", "vae", "text_encoder")


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
    "text", ["a red ball", "猫が跳ねる", "naïve é é  two  spaces", "tab\tline\n", "🎬", ""]
)
def test_any_text_comes_back_from_its_tokens(tinywan, text):
    tokenizer = AutoTokenizer.from_pretrained(tinywan("t2v_a14b"), subfolder="tokenizer")
    tokens = tokenizer(text).input_ids
    assert len(tokens) == len(text.encode()) + 1
    assert tokens[-1] == tokenizer.eos_token_id
    assert tokenizer.decode(tokens, skip_special_tokens=True) == text


@pytest.mark.parametrize("variant", ["t2v_a14b", "ti2v_5b"])
def test_latents_of_drawn_content_have_about_unit_variance(tinywan, variant):
    """On clips the statistics were not taken from; a factor of 3 is the natural spread."""
    vae = wan.load_vae(ModelConfig(id=str(tinywan(variant)), variant=variant, base="fp32"), "cpu")
    size = {"fps": 16.0, "num_frames": 17, "height": 64, "width": 64}
    clips = [draw_clip(Motion(kind, 1.0, 0.0, 12.0), **size) for kind in ("square", "pan", "disc")]
    latents = wan.encode_video(vae, torch.from_numpy(np.stack(clips)))
    assert latents.mean((0, 2, 3, 4)).abs().max() < 3
    assert 1 / 3 < latents.std() < 3
    assert latents.std((0, 2, 3, 4)).min() > 0.1


@pytest.mark.parametrize("variant", VARIANTS)
def test_every_expert_and_part_is_its_own(tinywan, variant):
    model = ModelConfig(id=str(tinywan(variant)), variant=variant)
    parts = PARTS + ("transformer_2",) * (VARIANTS[variant].boundary is not None)
    assert len({wan.fingerprint(model, part) for part in parts}) == len(parts)
