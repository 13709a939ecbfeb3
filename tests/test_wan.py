"""Wan's parts against diffusers' own pipelines, which are the reference throughout."""

import re
import shutil
import subprocess
import sys
from types import SimpleNamespace

import huggingface_hub.constants
import pytest
import torch
from diffusers import WanImageToVideoPipeline, WanPipeline
from PIL import Image
from safetensors.torch import load_file, save_file

from tempolora.config import ConfigError, ModelConfig, ModelFiles
from tempolora.model import wan
from tempolora.model.architectures import TRANSFORMER, VAE, architecture
from tempolora.model.location import check_model
from tempolora.variants import TEXT_TOKENS, VARIANTS

FRAMES, SIZE = 5, 64
PROMPTS = ["a red ball   bounces &amp; rolls", "", "跳ねる 猫"]
SMALL = {"num_attention_heads": 2, "ffn_dim": 64, "num_layers": 3, "text_dim": 32}


@pytest.fixture(scope="module")
def parts(tinywan):
    """parts(variant): its fp32 parts by our loaders, and by diffusers' in two pipelines."""
    cache = {}

    def load(variant):
        if variant not in cache:
            folder = tinywan(variant)
            model = ModelConfig(id=str(folder), variant=variant, base="fp32")
            cls = {"t2v": WanPipeline, "i2v": WanImageToVideoPipeline}
            pipes = {task: cls[task].from_pretrained(folder) for task in VARIANTS[variant].tasks}
            for pipe in pipes.values():
                pipe.set_progress_bar_config(disable=True)
            tokenizer, text_encoder = wan.load_text(model, "cpu")
            cache[variant] = SimpleNamespace(
                model=model,
                pipes=pipes,
                tokenizer=tokenizer,
                text_encoder=text_encoder,
                vae=wan.load_vae(model, "cpu"),
                transformer=wan.load_transformer(model, VARIANTS[variant].experts[0], "cpu"),
            )
        return cache[variant]

    return load


@pytest.fixture(scope="module")
def video():
    """uint8 (1, F, H, W, 3): smooth in space and time, so that no pixel is an outlier."""
    generator = torch.Generator().manual_seed(1)
    coarse = torch.rand(1, 3, 3, 8, 8, generator=generator)
    smooth = torch.nn.functional.interpolate(coarse, (FRAMES, SIZE, SIZE), mode="trilinear")
    return (smooth * 255).to(torch.uint8).permute(0, 2, 3, 4, 1).contiguous()


def noise(variant, seed=2):
    channels, stride = VARIANTS[variant].latent_channels, VARIANTS[variant].spatial_stride
    shape = (1, channels, 1 + (FRAMES - 1) // 4, SIZE // stride, SIZE // stride)
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def picture(video):
    return Image.fromarray(video[0, 0].numpy())


def first_step(pipe, latents, image=None):
    """(timestep, transformer output) of the first step of a pipeline without guidance."""
    seen = []
    hook = pipe.transformer.register_forward_hook(
        lambda module, args, kwargs, output: seen.append((kwargs["timestep"], output[0])),
        with_kwargs=True,
    )
    options = {} if image is None else {"image": image}
    with torch.no_grad(), pipe.progress_bar(total=0):
        pipe(
            prompt=PROMPTS[0],
            height=SIZE,
            width=SIZE,
            num_frames=FRAMES,
            num_inference_steps=1,
            guidance_scale=1.0,
            latents=latents,
            output_type="latent",
            **options,
        )
    hook.remove()
    return seen[0]


def velocity(parts, latents, timestep, **options):
    sigma = timestep.max().float().reshape(1) / 1000
    text = wan.pad_text(wan.encode_prompts(parts.tokenizer, parts.text_encoder, PROMPTS[:1]))
    with torch.no_grad():
        return wan.predict_velocity(parts.transformer, latents, sigma, text, **options)


# --- Text and video -------------------------------------------------------------------------------


def test_padded_prompts_equal_the_pipelines_embeddings(parts):
    wan_parts = parts("t2v_a14b")
    texts = wan.encode_prompts(wan_parts.tokenizer, wan_parts.text_encoder, PROMPTS)
    expected, _ = wan_parts.pipes["t2v"].encode_prompt(
        PROMPTS, do_classifier_free_guidance=False, max_sequence_length=TEXT_TOKENS
    )
    torch.testing.assert_close(wan.pad_text(texts), expected, rtol=0, atol=1e-5)
    # known words and other bytes of the clean text, and the end
    assert [len(text) for text in texts] == [19, 1, 14]


@pytest.mark.parametrize("variant", ["t2v_a14b", "ti2v_5b"])
def test_decoded_video_equals_the_pipelines(parts, variant):
    pipe = parts(variant).pipes["t2v"]
    options = {"height": SIZE, "width": SIZE, "num_frames": FRAMES, "num_inference_steps": 1}
    options |= {"prompt": "a", "guidance_scale": 1.0, "latents": noise(variant)}
    latents = pipe(output_type="latent", **options).frames
    expected = torch.from_numpy(pipe(output_type="np", **options).frames) * 255
    ours = wan.decode_video(parts(variant).vae, latents)
    assert ours.dtype == torch.uint8
    assert (ours - expected).abs().max() < 0.51  # rounded to whole levels


def test_i2v_condition_equals_the_pipelines(parts, video):
    pipe = parts("i2v_a14b").pipes["i2v"]
    image = pipe.video_processor.preprocess(picture(video), height=SIZE, width=SIZE)
    _, expected = pipe.prepare_latents(
        image, 1, 16, SIZE, SIZE, FRAMES, torch.float32, torch.device("cpu"), torch.Generator()
    )
    vae = parts("i2v_a14b").vae
    ours = wan.condition_channels(wan.encode_condition(vae, video[:, 0], FRAMES))
    assert ours.shape[1] == 20
    torch.testing.assert_close(ours, expected, rtol=0, atol=1e-4)


def test_encoded_first_frame_equals_the_pipelines(parts, video):
    pipe = parts("ti2v_5b").pipes["i2v"]
    image = pipe.video_processor.preprocess(picture(video), height=SIZE, width=SIZE)
    _, expected, _ = pipe.prepare_latents(
        image, 1, 48, SIZE, SIZE, FRAMES, torch.float32, torch.device("cpu"), torch.Generator()
    )
    ours = wan.encode_video(parts("ti2v_5b").vae, video)
    assert ours.shape == (1, 48, 2, 4, 4)
    # Causal: the first latent frame of a clip is that of its first picture alone.
    torch.testing.assert_close(ours[:, :, :1], expected, rtol=0, atol=1e-4)


# --- The velocity ---------------------------------------------------------------------------------


def test_velocity_equals_a_pipeline_step_in_t2v_a14b(parts):
    latents = noise("t2v_a14b")
    timestep, expected = first_step(parts("t2v_a14b").pipes["t2v"], latents)
    ours = velocity(parts("t2v_a14b"), latents, timestep)
    torch.testing.assert_close(ours, expected, rtol=0, atol=1e-4)


def test_velocity_equals_a_pipeline_step_in_i2v_a14b(parts, video):
    latents, wan_parts = noise("i2v_a14b"), parts("i2v_a14b")
    timestep, expected = first_step(wan_parts.pipes["i2v"], latents, picture(video))
    condition = wan.condition_channels(wan.encode_condition(wan_parts.vae, video[:, 0], FRAMES))
    ours = velocity(wan_parts, latents, timestep, condition_BCTHW=condition)
    torch.testing.assert_close(ours, expected, rtol=0, atol=1e-4)


def test_velocity_equals_a_pipeline_step_in_t2v_5b(parts):
    latents = noise("ti2v_5b")
    timestep, expected = first_step(parts("ti2v_5b").pipes["t2v"], latents)
    ours = velocity(parts("ti2v_5b"), latents, timestep, per_token_time=True)
    torch.testing.assert_close(ours, expected, rtol=0, atol=1e-4)


def test_velocity_equals_a_pipeline_step_in_i2v_5b(parts, video):
    latents, wan_parts = noise("ti2v_5b"), parts("ti2v_5b")
    timestep, expected = first_step(wan_parts.pipes["i2v"], latents, picture(video))
    clean = latents.clone()
    clean[:, :, :1] = wan.encode_video(wan_parts.vae, video[:, :1])
    ours = velocity(wan_parts, clean, timestep, per_token_time=True, clean_first_frame=True)
    torch.testing.assert_close(ours, expected, rtol=0, atol=1e-4)


# --- Loading --------------------------------------------------------------------------------------


def test_loaded_parts_are_frozen_and_keep_wans_fp32_modules(parts):
    model = parts("t2v_a14b").model.model_copy(update={"base": "bf16"})
    transformer = wan.load_transformer(model, "high", "cpu")
    reference = WanPipeline.from_pretrained(model.id, torch_dtype=torch.bfloat16).transformer
    assert dtypes(transformer) == dtypes(reference)
    assert {torch.float32, torch.bfloat16} == set(dtypes(transformer).values())
    assert not transformer.training
    assert not any(parameter.requires_grad for parameter in transformer.parameters())


def dtypes(module):
    return {name: parameter.dtype for name, parameter in module.named_parameters()}


def original_transformer_name(name):
    """A diffusers key as the published single files spell it (Wan2.2 `wan/modules/model.py`)."""
    table = {
        r"^condition_embedder\.time_embedder\.linear_1": "time_embedding.0",
        r"^condition_embedder\.time_embedder\.linear_2": "time_embedding.2",
        r"^condition_embedder\.text_embedder\.linear_1": "text_embedding.0",
        r"^condition_embedder\.text_embedder\.linear_2": "text_embedding.2",
        r"^condition_embedder\.time_proj": "time_projection.1",
        r"^scale_shift_table": "head.modulation",
        r"^proj_out": "head.head",
        r"\.scale_shift_table": ".modulation",
        r"\.attn1\.": ".self_attn.",
        r"\.attn2\.": ".cross_attn.",
        r"\.to_([qkv])\.": r".\1.",
        r"\.to_out\.0\.": ".o.",
        r"\.ffn\.net\.0\.proj": ".ffn.0",
        r"\.ffn\.net\.2": ".ffn.2",
        r"^(blocks\.\d+)\.norm2": r"\1.norm3",
    }
    for pattern, original in table.items():
        name = re.sub(pattern, original, name)
    return name


@pytest.mark.parametrize("prefix", ["", "model.diffusion_model.", "diffusers"])
@pytest.mark.parametrize("base", ["bf16", "fp32"])
def test_single_file_equals_the_folder(tinywan, tmp_path, prefix, base):
    folder = tinywan("t2v_a14b")
    state = load_file(folder / "transformer_2" / "diffusion_pytorch_model.safetensors")
    if prefix != "diffusers":
        state = {prefix + original_transformer_name(name): tensor for name, tensor in state.items()}
        assert f"{prefix}blocks.0.cross_attn.o.weight" in state
    save_file(state, tmp_path / "low.safetensors")
    model = ModelConfig(
        id=str(folder), base=base, files=ModelFiles(transformer_2=str(tmp_path / "low.safetensors"))
    )
    check_model(model)
    ours = wan.load_transformer(model, "low", "cpu")
    reference = wan.load_transformer(ModelConfig(id=str(folder), base=base), "low", "cpu")
    assert dtypes(ours) == dtypes(reference)
    for (name, tensor), expected in zip(
        ours.named_parameters(), reference.parameters(), strict=True
    ):
        assert torch.equal(tensor, expected), name
    assert torch.equal(ours.rope.freqs_cos, reference.rope.freqs_cos)


RESIDUAL = {
    "norm1": "residual.0",
    "conv1": "residual.2",
    "norm2": "residual.3",
    "conv2": "residual.6",
    "conv_shortcut": "shortcut",
}


def original_vae_name(name, nested, per_block):
    """A diffusers key as Wan's `vae2_1.py` (flat) or `vae2_2.py` (nested) spells it."""
    for ours, theirs in RESIDUAL.items():
        name = name.replace(f".{ours}.", f".{theirs}.")
    if nested:
        name = re.sub(r"down_blocks\.(\d+)\.resnets\.", r"downsamples.\1.downsamples.", name)
        name = re.sub(r"up_blocks\.(\d+)\.resnets\.", r"upsamples.\1.upsamples.", name)
        down, up = per_block, per_block + 1
        name = re.sub(
            r"down_blocks\.(\d+)\.downsampler", rf"downsamples.\1.downsamples.{down}", name
        )
        name = re.sub(r"up_blocks\.(\d+)\.upsampler", rf"upsamples.\1.upsamples.{up}", name)
    else:
        name = name.replace("down_blocks.", "downsamples.")
        block = re.match(r"decoder\.up_blocks\.(\d+)\.(resnets|upsamplers)\.(\d+)\.", name)
        if block:
            index = 4 * int(block[1]) + (3 if block[2] == "upsamplers" else int(block[3]))
            name = f"decoder.upsamples.{index}." + name[block.end() :]
    name = name.replace("mid_block.resnets.0.", "middle.0.").replace("post_quant_conv", "conv2")
    name = name.replace("mid_block.resnets.1.", "middle.2.").replace("quant_conv", "conv1")
    name = name.replace("mid_block.attentions.0.", "middle.1.").replace(
        "coder.conv_in", "coder.conv1"
    )
    return name.replace("norm_out", "head.0").replace("conv_out", "head.2")


@pytest.mark.parametrize("variant", ["t2v_a14b", "ti2v_5b"])
def test_vae_single_file_equals_the_folder(tmp_path, variant):
    config = VAE[variant] | {"base_dim": 4, "decoder_base_dim": 4}
    vae = wan.new_vae(config)
    vae.save_pretrained(tmp_path / "vae")
    nested = config["is_residual"]
    state = {
        original_vae_name(name, nested, config["num_res_blocks"]): tensor.contiguous()
        for name, tensor in vae.state_dict().items()
    }
    known = (
        "decoder.upsamples.0.upsamples.3.time_conv.weight"
        if nested
        else ("decoder.upsamples.3.time_conv.weight")
    )
    assert known in state
    save_file(state, tmp_path / "vae.safetensors")
    model = ModelConfig(
        id=str(tmp_path), variant=variant, files=ModelFiles(vae=str(tmp_path / "vae.safetensors"))
    )
    ours = wan.load_vae(model.model_copy(update={"base": "fp32"}), "cpu")
    for name, tensor in vae.state_dict().items():
        assert torch.equal(ours.state_dict()[name], tensor), name


def test_a_single_file_of_another_model_is_named(tinywan, tmp_path):
    save_file({"blocks.0.self_attn.q.weight": torch.zeros(2, 2)}, tmp_path / "x.safetensors")
    model = ModelConfig(
        id=str(tinywan("t2v_a14b")), files=ModelFiles(transformer=str(tmp_path / "x.safetensors"))
    )
    with pytest.raises(ConfigError, match=r"model\.files\.transformer: .* does not fit"):
        wan.load_transformer(model, "high", "cpu")


def test_weights_missing_from_the_folder_are_named_not_made_up(tinywan, tmp_path):
    folder = shutil.copytree(tinywan("ti2v_5b"), tmp_path / "wan")
    path = folder / "transformer" / "diffusion_pytorch_model.safetensors"
    state = load_file(path)
    del state["proj_out.weight"]
    save_file(state, path, metadata={"format": "pt"})
    with pytest.raises(ConfigError, match=r"^model\.id: the transformer .* lacks weights"):
        wan.load_transformer(ModelConfig(id=str(folder), variant="ti2v_5b"), "single", "cpu")


def test_a_hub_id_out_of_reach_is_one_sentence(monkeypatch):
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    model = ModelConfig(id="nobody/no-such-model")
    for load in (wan.load_vae, wan.load_text):
        with pytest.raises(ConfigError, match=r"^model\.id: cannot load the .*") as error:
            load(model, "cpu")
        assert "\n" not in str(error.value)
    with pytest.raises(ConfigError, match="cannot load the vae of nobody"):
        wan.fingerprint(model, "vae")


# --- Random weights -------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("variant", "part", "billions"),
    [
        ("t2v_a14b", "transformer", 14.288),
        ("i2v_a14b", "transformer", 14.289),
        ("ti2v_5b", "transformer", 5.000),
        ("t2v_a14b", "vae", 0.127),
        ("ti2v_5b", "vae", 0.705),
        ("t2v_a14b", "text_encoder", 5.681),
    ],
)
def test_published_architectures_have_their_published_size(variant, part, billions):
    new = {"vae": wan.new_vae, "text_encoder": wan.new_text_encoder}.get(part, wan.new_transformer)
    with torch.device("meta"):
        module = new(architecture(variant, part))
    count = sum(parameter.numel() for parameter in module.parameters())
    assert round(count / 1e9, 3) == billions


def test_random_transformer_is_finite_at_forty_layers_and_like_a_loaded_one(parts, monkeypatch):
    small = TRANSFORMER["t2v_a14b"] | SMALL | {"num_layers": 40}
    monkeypatch.setattr(wan, "architecture", lambda variant, part: small)
    model = ModelConfig(init="random")
    ours = wan.load_transformer(model, "high", "cpu")
    loaded = wan.load_transformer(
        parts("t2v_a14b").model.model_copy(update={"base": "bf16"}), "high", "cpu"
    )
    assert dtypes(loaded).items() <= dtypes(ours).items()
    assert torch.equal(ours.rope.freqs_sin, loaded.rope.freqs_sin)
    with torch.no_grad():
        output = wan.predict_velocity(
            ours, noise("t2v_a14b")[..., :4, :4], torch.tensor([0.5]), torch.randn(1, 8, 32)
        )
    assert output.isfinite().all()
    assert output.std() > 1e-3
    again, other = (wan.load_transformer(model, expert, "cpu") for expert in ("high", "low"))
    assert torch.equal(again.proj_out.weight, ours.proj_out.weight)
    assert not torch.equal(other.proj_out.weight, ours.proj_out.weight)
    assert wan.fingerprint(model, "transformer") != wan.fingerprint(model, "transformer_2")


def test_random_vae_and_text_encoder_work(monkeypatch, video):
    small = {
        "vae": VAE["ti2v_5b"] | {"base_dim": 8, "decoder_base_dim": 8},
        "text_encoder": architecture("ti2v_5b", "text_encoder")
        | {"vocab_size": 300, "d_model": 32, "num_heads": 2, "d_ff": 64, "num_layers": 2},
    }
    monkeypatch.setattr(wan, "architecture", lambda variant, part: small[part])
    model = ModelConfig(variant="ti2v_5b", init="random", base="fp32")
    latents = wan.encode_video(wan.load_vae(model, "cpu"), video)
    assert latents.isfinite().all()
    texts = wan.encode_prompts(*wan.load_text(model, "cpu"), PROMPTS)
    assert all(text.isfinite().all() for text in texts)


# --- Naming the weights ---------------------------------------------------------------------------


def test_fingerprint_follows_the_weights_not_the_folder(tinywan, tmp_path):
    folder = tinywan("ti2v_5b")
    copy = shutil.copytree(folder, tmp_path / "copy")
    model = ModelConfig(id=str(folder), variant="ti2v_5b")
    moved = model.model_copy(update={"id": str(copy)})
    assert wan.fingerprint(model, "transformer") == wan.fingerprint(moved, "transformer")
    path = copy / "transformer" / "diffusion_pytorch_model.safetensors"
    save_file({k: v + 1e-3 for k, v in load_file(path).items()}, path)
    assert wan.fingerprint(model, "transformer") != wan.fingerprint(moved, "transformer")
    assert wan.fingerprint(model, "vae") == wan.fingerprint(moved, "vae")


# --- Mistakes found before anything heavy ---------------------------------------------------------


def test_check_model_needs_no_torch():
    code = "import sys, tempolora.model.location; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"id": "./nowhere"}, r"^model\.id: \./nowhere is not a folder"),
        ({"id": "/no/such/wan"}, r"^model\.id: /no/such/wan is not a folder"),
        ({"id": "wan"}, r"^model\.id: 'wan' is no folder here, no hub id"),
        ({"files": {"vae": "vae.pth"}}, r"^model\.files\.vae: .* not a \.safetensors file"),
        ({"files": {"vae": "no.safetensors"}}, r"^model\.files\.vae: there is no file"),
        ({"init": "random", "files": {"vae": "v.safetensors"}}, r"^model\.files\.vae: .* random"),
    ],
)
def test_a_wrong_place_is_one_sentence_naming_the_key(settings, message):
    with pytest.raises(ConfigError, match=message):
        check_model(ModelConfig(**settings))


def test_a_folder_that_is_not_the_variant_is_refused(tinywan, tmp_path):
    folder = tinywan("t2v_a14b")
    check_model(ModelConfig(id=str(folder)))
    with pytest.raises(ConfigError, match=r"^model\.variant: i2v_a14b has in_channels 36"):
        check_model(ModelConfig(id=str(folder), variant="i2v_a14b"))
    partial = shutil.copytree(folder, tmp_path / "wan")
    (partial / "text_encoder" / "model.safetensors").unlink()
    with pytest.raises(ConfigError, match=r"text_encoder holds no \.safetensors"):
        check_model(ModelConfig(id=str(partial)))
    shutil.rmtree(partial / "transformer_2")
    with pytest.raises(ConfigError, match=r"^model\.id: .* holds no transformer_2"):
        check_model(ModelConfig(id=str(partial)))
