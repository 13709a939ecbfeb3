"""Sampling: the same video as diffusers' Wan pipelines, with one expert in memory at a time."""

import gc
import weakref
from pathlib import Path

import av
import numpy as np
import pytest
import torch
from diffusers import UniPCMultistepScheduler, WanImageToVideoPipeline, WanPipeline
from PIL import Image
from safetensors.torch import save_file

from tempolora.config import Config, ConfigError
from tempolora.model.tinywan import tinywan_folder
from tempolora.model.wan import load_text, load_transformer
from tempolora.results import sample
from tempolora.results.names import lora_file_name
from tempolora.results.sample import (
    Tempo,
    draw_noise,
    loras_in,
    read_image,
    sample_from_prompt,
    sample_latents,
    sample_video,
)
from tempolora.variants import VARIANTS

PROMPT, NEGATIVE = "a bell swings", "blurred"
SIZE = {"t2v_a14b": 32, "i2v_a14b": 32, "ti2v_5b": 64}  # pixels: 4 by 4 latent pixels each
FRAMES, STEPS, SEED = 9, 6, 3
# Steps of six on either side of the boundary: T2V 4 and 2, I2V 2 and 4, so both experts work.

# What the official code samples with (Wan2.2 wan/configs/*.py), written out once more here.
OFFICIAL = {
    "t2v_a14b": {"shift": 12.0, "guidance_scale": 4.0, "guidance_scale_2": 3.0},
    "i2v_a14b": {"shift": 5.0, "guidance_scale": 3.5, "guidance_scale_2": 3.5},
    "ti2v_5b": {"shift": 5.0, "guidance_scale": 5.0},
}
# fp32 against fp32 through the same modules, latents of size 1: only roundings differ, such as
# that of 1000 * (t / 1000). Seen: 0 to 3e-6.
TOLERANCE = 2e-5


def config(variant: str, task: str | None = None) -> Config:
    return Config.model_validate(
        {
            "model": {"id": "tinywan", "variant": variant, "task": task, "base": "fp32"},
            "data": {"num_frames": FRAMES, "height": SIZE[variant], "width": SIZE[variant]},
            "rhythm": {"spec_weight": 0.0},
        }
    )


def reference(cls: type, variant: str, noise_BCTHW: torch.Tensor, output_type: str, **inputs):
    """diffusers' own pipeline, told the official settings; `prepare` may change it first."""
    prepare = inputs.pop("prepare", lambda pipe: None)
    settings = dict(OFFICIAL[variant])
    pipe = cls.from_pretrained(tinywan_folder(variant), torch_dtype=torch.float32)
    pipe.set_progress_bar_config(disable=True)
    pipe.scheduler = UniPCMultistepScheduler.from_config(
        pipe.scheduler.config, flow_shift=settings.pop("shift")
    )
    prepare(pipe)
    return pipe(
        prompt=PROMPT,
        negative_prompt=NEGATIVE,
        height=SIZE[variant],
        width=SIZE[variant],
        num_frames=FRAMES,
        num_inference_steps=STEPS,
        latents=noise_BCTHW,
        output_type=output_type,
        **settings,
        **inputs,
    ).frames


def picture(size: int) -> Image.Image:
    ramp = np.tile(np.linspace(0, 255, size, dtype=np.uint8), (size, 1))
    return Image.fromarray(np.stack([ramp, ramp.T, ramp], -1))


@pytest.fixture(scope="module", autouse=True)
def quick_collections():
    """Freeing a model collects garbage; what the imports left behind need not be walked again."""
    gc.collect()
    gc.freeze()
    yield
    gc.unfreeze()


@pytest.fixture
def sampled(monkeypatch) -> dict[str, torch.Tensor]:
    """The latents of the last sample_video, which goes on with a black video: decoding is slow."""
    seen = {}

    def decode(vae, latents_BCTHW):
        seen["latents"] = latents_BCTHW
        return torch.zeros(1, FRAMES, 64, 64, 3, dtype=torch.uint8)

    monkeypatch.setattr(sample, "decode_video", decode)
    return seen


@pytest.fixture
def decoded(monkeypatch) -> dict[str, np.ndarray]:
    """The frames of the last sample_video, before the mp4 loses any of them."""
    seen = {}

    def write(path, frames_FHW3, fps):
        seen["frames"] = frames_FHW3

    monkeypatch.setattr(sample, "write_mp4", write)
    return seen


def ours(cfg: Config, out: Path, **given) -> Path:
    arguments = {"prompt": PROMPT, "negative": NEGATIVE, "loras": {}, "seed": SEED, "steps": STEPS}
    return sample_from_prompt(cfg, out, device="cpu", **arguments | given)


def write_lora(path: Path, scale: float, **metadata: str) -> Path:
    """A LoRA on self-attention q and v of two of TinyWan's blocks; scale 0 leaves B at zero."""
    generator = torch.Generator().manual_seed(len(path.name))
    width, tensors = 256, {}
    for block in range(2):
        for layer in ("q", "v"):
            name = f"diffusion_model.blocks.{block}.self_attn.{layer}"
            down = torch.randn(4, width, generator=generator) / width**0.5
            tensors[f"{name}.lora_A.weight"] = down
            tensors[f"{name}.lora_B.weight"] = scale * torch.randn(width, 4, generator=generator)
    save_file(tensors, path, metadata=metadata or None)
    return path


@pytest.mark.parametrize(
    ("variant", "task", "pipeline"),
    [
        ("t2v_a14b", "t2v", WanPipeline),
        ("i2v_a14b", "i2v", WanImageToVideoPipeline),
        ("ti2v_5b", "t2v", WanPipeline),
        ("ti2v_5b", "i2v", WanImageToVideoPipeline),
    ],
)
def test_sampling_equals_diffusers_pipeline(tmp_path, sampled, variant, task, pipeline):
    cfg = config(variant, task)
    given, inputs = {}, {}
    if task == "i2v":
        image = picture(SIZE[variant])
        image.save(tmp_path / "first.png")
        given, inputs = {"image": tmp_path / "first.png"}, {"image": image}
    ours(cfg, tmp_path / "out.mp4", **given)
    if (variant, task) == ("ti2v_5b", "i2v"):
        inputs |= {"prepare": lambda pipe: pipe.register_to_config(expand_timesteps=True)}
    noise_BCTHW = draw_noise((1, *cfg.latent_shape), SEED)
    expected = reference(pipeline, variant, noise_BCTHW, "latent", **inputs)
    assert not torch.allclose(expected, noise_BCTHW, atol=0.1)
    torch.testing.assert_close(sampled["latents"], expected, atol=TOLERANCE, rtol=TOLERANCE)


def test_prompt_and_loras_of_both_experts_give_the_pipelines_video(tmp_path, decoded):
    loras = {
        expert: write_lora(tmp_path / lora_file_name(expert), 0.5) for expert in ("high", "low")
    }
    cfg = config("t2v_a14b")
    ours(cfg, tmp_path / "out.mp4", loras=loras)
    with_loras = decoded["frames"]
    noise_BCTHW = draw_noise((1, *cfg.latent_shape), SEED)

    def load(pipe: WanPipeline) -> None:
        pipe.load_lora_weights(str(loras["high"]))
        pipe.load_lora_weights(str(loras["low"]), load_into_transformer_2=True)

    expected = reference(WanPipeline, "t2v_a14b", noise_BCTHW, "np", prepare=load)[0] * 255
    # the pipeline clips to [0, 1] and does not round: half a grey level, and fp32 beside it
    assert np.abs(with_loras - expected).max() < 0.51
    ours(cfg, tmp_path / "base.mp4")
    assert np.abs(with_loras.astype(int) - decoded["frames"]).max() > 2


def test_lora_with_zero_b_gives_the_base_video(tmp_path, sampled):
    cfg = config("t2v_a14b")
    ours(cfg, tmp_path / "base.mp4", steps=1)
    base = sampled["latents"]
    zero = write_lora(tmp_path / "zero.safetensors", 0.0)
    ours(cfg, tmp_path / "zero.mp4", steps=1, loras={"high": zero})
    assert torch.equal(base, sampled["latents"])


def test_a_tempo_adapter_beside_a_rhythm_lora_is_what_diffusers_makes_of_both(tmp_path, sampled):
    """Strength log2(speed): that of any tool's slider."""
    rhythm = write_lora(tmp_path / "high_noise.safetensors", 0.3)
    tempo = write_lora(tmp_path / "tempo_high.safetensors", 0.5, kind="tempo")
    cfg = config("t2v_a14b")
    ours(cfg, tmp_path / "a.mp4", loras={"high": rhythm}, tempo=Tempo({"high": tempo}, 0.71))
    both = sampled["latents"]

    def load(pipe: WanPipeline) -> None:
        pipe.load_lora_weights(str(rhythm), adapter_name="rhythm")
        pipe.load_lora_weights(str(tempo), adapter_name="tempo")
        pipe.set_adapters(["rhythm", "tempo"], [1.0, float(np.log2(0.71))])

    noise_BCTHW = draw_noise((1, *cfg.latent_shape), SEED)
    expected = reference(WanPipeline, "t2v_a14b", noise_BCTHW, "latent", prepare=load)
    torch.testing.assert_close(both, expected, atol=TOLERANCE, rtol=TOLERANCE)


def test_tempo_1_is_the_video_without_the_adapter_to_the_bit(tmp_path, sampled):
    tempo = write_lora(tmp_path / "tempo_high.safetensors", 0.5, kind="tempo")
    latents = {}
    for speed in (None, 1.0, 2.0):
        asked = None if speed is None else Tempo({"high": tempo}, speed)
        ours(config("t2v_a14b"), tmp_path / "a.mp4", steps=2, tempo=asked)
        latents[speed] = sampled["latents"]
    assert torch.equal(latents[None], latents[1.0])
    assert not torch.allclose(latents[None], latents[2.0], atol=1e-3)


def test_a_rhythm_lora_is_no_tempo_adapter(tmp_path):
    rhythm = write_lora(tmp_path / "high.safetensors", 0.5, kind="rhythm")
    with pytest.raises(ConfigError, match="is a rhythm LoRA; give it with --lora"):
        ours(config("t2v_a14b"), tmp_path / "a.mp4", tempo=Tempo({"high": rhythm}, 2.0))


def test_video_has_the_frames_size_and_rate_of_the_config(tmp_path):
    out = ours(config("ti2v_5b", "t2v"), tmp_path / "new" / "out.mp4", steps=1)
    with av.open(out) as container:
        stream = container.streams.video[0]
        assert (stream.width, stream.height, stream.average_rate) == (64, 64, 24)
        assert sum(1 for _ in container.decode(video=0)) == FRAMES


def test_one_expert_is_in_memory_at_a_time_and_each_is_loaded_once():
    cfg = config("t2v_a14b")
    loaded: list[tuple[str, weakref.ref]] = []

    def load_expert(name: str) -> torch.nn.Module:
        gc.collect()
        assert all(module() is None for _, module in loaded)
        transformer = load_transformer(cfg.model, name, "cpu")
        loaded.append((name, weakref.ref(transformer)))
        return transformer

    text_BLD = torch.zeros(1, 512, 32)
    sample_latents(
        load_expert,
        cfg.variant,
        draw_noise((1, *cfg.latent_shape), 0),
        text_BLD,
        text_BLD,
        steps=STEPS,
    )
    assert [name for name, _ in loaded] == ["high", "low"]


def test_text_encoder_is_gone_before_an_expert_comes(tmp_path, monkeypatch, sampled):
    encoders = []

    def remembering_load_text(model, device):
        tokenizer, encoder = load_text(model, device)
        encoders.append(weakref.ref(encoder))
        return tokenizer, encoder

    def checking_load_transformer(model, expert, device):
        assert [encoder() for encoder in encoders] == [None]
        return load_transformer(model, expert, device)

    monkeypatch.setattr(sample, "load_text", remembering_load_text)
    monkeypatch.setattr(sample, "load_transformer", checking_load_transformer)
    ours(config("t2v_a14b"), tmp_path / "out.mp4", steps=1)


def test_noise_depends_on_the_seed_alone():
    torch.manual_seed(1)
    first = draw_noise((1, 4, 3, 2, 2), 7)
    before = torch.get_rng_state()
    torch.testing.assert_close(draw_noise((1, 4, 3, 2, 2), 7), first, atol=0, rtol=0)
    assert torch.equal(torch.get_rng_state(), before)
    assert not torch.equal(draw_noise((1, 4, 3, 2, 2), 8), first)


@pytest.mark.parametrize("variant", VARIANTS)
def test_expert_and_guidance_follow_the_official_boundary(variant):
    official = OFFICIAL[variant]
    high = official["guidance_scale"]
    low = official.get("guidance_scale_2")
    chosen = [sample.expert_at(VARIANTS[variant], t) for t in (999, 900, 899, 875, 874, 0)]
    expected = {
        "t2v_a14b": [("high", high)] * 4 + [("low", low)] * 2,
        "i2v_a14b": [("high", high)] * 2 + [("low", low)] * 4,
        "ti2v_5b": [("single", high)] * 6,
    }
    assert chosen == expected[variant]


@pytest.mark.parametrize(
    ("variant", "task", "content", "words"),
    [
        ("i2v_a14b", "i2v", None, "starts from an image"),
        ("ti2v_5b", "i2v", None, "starts from an image"),
        ("t2v_a14b", "t2v", b"", "takes no image"),
        ("ti2v_5b", "t2v", b"", "takes no image"),
        ("i2v_a14b", "i2v", b"", "cannot read"),
        ("i2v_a14b", "i2v", b"\x89PNG\r\n\x1a\n and then nothing", "cannot read"),
    ],
)
def test_wrong_image_is_a_user_mistake_found_before_anything_is_loaded(
    tmp_path, monkeypatch, variant, task, content, words
):
    monkeypatch.delattr(sample, "load_text")
    image = None
    if content is not None:
        image = tmp_path / "image.png"
        image.write_bytes(content)
    with pytest.raises(ConfigError, match=words):
        ours(config(variant, task), tmp_path / "out.mp4", image=image)


def test_image_cut_short_is_a_user_mistake(tmp_path):
    path = tmp_path / "cut.png"
    picture(64).save(path)
    path.write_bytes(path.read_bytes()[:-60])
    with pytest.raises(ConfigError, match=r"cut\.png"):
        read_image(path, 64, 64)


def test_image_is_cut_at_its_centre_and_not_stretched(tmp_path):
    wide = np.zeros((40, 120, 3), np.uint8)
    wide[:, 40:80] = 200  # the middle third, square
    Image.fromarray(wide).save(tmp_path / "wide.png")
    cropped = read_image(tmp_path / "wide.png", 40, 40)
    assert cropped.shape == (40, 40, 3) and (cropped == 200).all()


def test_image_is_turned_upright_and_its_transparency_dropped(tmp_path):
    exif = Image.Exif()
    exif[0x0112] = 6  # Orientation: the camera was turned, rotate 90 degrees clockwise to view
    sideways = np.full((32, 64, 3), 20, np.uint8)
    sideways[:, :16] = 220  # the left of the stored picture is the top of the seen one
    Image.fromarray(sideways).save(tmp_path / "turned.png", exif=exif)
    upright = read_image(tmp_path / "turned.png", 64, 32)
    assert upright[:14].min() > 200 and upright[18:].max() < 40
    Image.new("RGBA", (32, 32), (10, 20, 30, 128)).save(tmp_path / "clear.png")
    assert read_image(tmp_path / "clear.png", 32, 32)[0, 0].tolist() == [10, 20, 30]


def test_lora_folder_gives_the_file_of_each_expert(tmp_path):
    files = {
        expert: write_lora(tmp_path / lora_file_name(expert), 0.0) for expert in ("high", "low")
    }
    assert loras_in(tmp_path, ("high", "low")) == files
    assert loras_in([tmp_path]) == files
    files["low"].unlink()
    assert loras_in(tmp_path, ("high", "low")) == {"high": files["high"]}


def test_lora_file_says_its_expert_in_its_header_or_else_in_its_name(tmp_path):
    told = write_lora(tmp_path / "mine_low.safetensors", 0.0, expert="high")
    named = write_lora(tmp_path / "Wan_LowNoise.safetensors", 0.0)
    assert loras_in([told, named], ("high", "low")) == {"high": told, "low": named}
    bare = write_lora(tmp_path / "high_contrast.safetensors", 0.0)
    assert loras_in(bare, ("single",)) == {"single": bare}


def test_undecidable_double_foreign_or_missing_loras_are_user_mistakes(tmp_path):
    bare = write_lora(tmp_path / "style.safetensors", 0.0)
    both = write_lora(tmp_path / "high_and_low.safetensors", 0.0)
    first = write_lora(tmp_path / "a_high.safetensors", 0.0)
    second = write_lora(tmp_path / "b_high.safetensors", 0.0)
    torn = tmp_path / "high.safetensors"
    torn.write_bytes(b"no safetensors")
    cases = [
        ([bare], "cannot tell which expert"),
        ([both], "cannot tell which expert"),
        ([first, second], "both for"),
        ([torn], "high.safetensors"),
        ([tmp_path / "high_gone.safetensors"], "high_gone"),
        ([tmp_path], "holds no wan22_temporal_lora_high_noise"),
    ]
    for paths, words in cases:
        with pytest.raises(ConfigError, match=words):
            loras_in(paths, ("high", "low"))
    with pytest.raises(ConfigError, match="the model has single"):
        loras_in(write_lora(tmp_path / "c.safetensors", 0.0, expert="low"), ("single",))


def test_lora_of_an_expert_the_model_lacks_is_refused_before_anything_is_loaded(
    tmp_path, monkeypatch
):
    monkeypatch.delattr(sample, "load_transformer")
    text_LD = torch.zeros(2, 32)
    with pytest.raises(ConfigError, match="expert 'high'; the model has single"):
        sample_video(
            config("ti2v_5b", "t2v"),
            tmp_path / "out.mp4",
            text_LD=text_LD,
            negative_LD=text_LD,
            loras={"high": tmp_path / "any.safetensors"},
            seed=0,
            steps=1,
            device="cpu",
        )


def nothing_loads(monkeypatch) -> None:
    for name in ("load_text", "load_vae", "load_transformer"):
        monkeypatch.delattr(sample, name)


def test_lora_that_does_not_fit_is_refused_before_anything_is_loaded(tmp_path, monkeypatch):
    nothing_loads(monkeypatch)
    fits = write_lora(tmp_path / "high.safetensors", 0.5)
    other = tmp_path / "low.safetensors"
    name = "diffusion_model.blocks.0.self_attn.q"
    save_file(
        {f"{name}.lora_A.weight": torch.zeros(4, 384)}
        | {f"{name}.lora_B.weight": torch.zeros(384, 4)},
        other,
    )
    with pytest.raises(ConfigError, match=r"low\.safetensors: made for another model"):
        ours(config("t2v_a14b"), tmp_path / "out.mp4", loras={"high": fits, "low": other})


@pytest.mark.parametrize(
    ("out", "words"),
    [
        (".", "is a folder"),
        ("folder", "is a folder"),
        ("file/out.mp4", r"there can be no .*out\.mp4"),
        ("file/new/out.mp4", r"there can be no .*out\.mp4"),
    ],
)
def test_out_that_cannot_be_written_is_refused_before_anything_is_loaded(
    tmp_path, monkeypatch, out, words
):
    nothing_loads(monkeypatch)
    (tmp_path / "folder").mkdir()
    (tmp_path / "file").touch()
    with pytest.raises(ConfigError, match=f"^--out: .*{words}"):
        ours(config("t2v_a14b"), tmp_path / out)


def test_out_in_a_folder_without_the_right_to_write_is_refused(tmp_path, monkeypatch):
    nothing_loads(monkeypatch)
    monkeypatch.setattr("os.access", lambda path, mode: Path(path) != tmp_path)  # root may always
    with pytest.raises(ConfigError, match="no right to write"):
        ours(config("t2v_a14b"), tmp_path / "out.mp4")
