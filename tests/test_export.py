"""LoRA files against diffusers' own pipeline and against ComfyUI's rules, written here anew."""

import copy
import json
import logging

import pytest
import safetensors.torch
import torch
from diffusers import FlowMatchEulerDiscreteScheduler, WanPipeline, WanTransformer3DModel

from tempolora.config import ConfigError, LoraConfig
from tempolora.model.lora import (
    add_lora,
    load_lora_state,
    lora_parameters,
    set_lora_scale,
)
from tempolora.model.targets import TARGETS, adapter_rows
from tempolora.results.export import apply_lora_file, check_lora_file, export_lora, read_metadata
from tempolora.results.names import lora_file_name
from tempolora.timebase import TimeBase

HEADS, HEAD_DIM, BLOCKS = 2, 128, 2
CLIP = TimeBase(16.0, 49)
EXPERTS = ["high", "low"]


def build(seed, heads=HEADS, blocks=BLOCKS):
    torch.manual_seed(seed)
    return WanTransformer3DModel(
        num_attention_heads=heads,
        attention_head_dim=HEAD_DIM,
        text_dim=32,
        freq_dim=32,
        ffn_dim=96,
        num_layers=blocks,
    )


@pytest.fixture(scope="module")
def bases():
    """Two experts with weights of their own."""
    return {"high": build(0), "low": build(1)}


def run(transformer):
    generator = torch.Generator().manual_seed(2)
    with torch.no_grad():
        return transformer(
            torch.randn(1, 16, 2, 4, 6, generator=generator),
            torch.tensor([500.0]),
            torch.randn(1, 5, 32, generator=generator),
            return_dict=False,
        )[0]


def trained(base, lora, seed=0):
    transformer = copy.deepcopy(base)
    add_lora(transformer, lora, CLIP, seed)
    generator = torch.Generator().manual_seed(seed + 10)
    for name, parameter in lora_parameters(transformer).items():
        if "lora_B" in name:
            parameter.data = 0.1 * torch.randn(parameter.shape, generator=generator)
    return transformer


def export(transformer, path, lora, **metadata):
    export_lora(
        {name: p.detach() for name, p in lora_parameters(transformer).items()},
        path,
        lora=lora,
        rows=adapter_rows(lora, CLIP, HEAD_DIM),
        num_heads=transformer.config.num_attention_heads,
        head_dim=HEAD_DIM,
        metadata=metadata,
    )
    return path


def assert_output(transformer, expected, base):
    """Equal to 1e-5 in fp32, where the LoRA itself moves the output a hundred times as far."""
    assert (expected - run(base)).abs().max() > 1e-3
    torch.testing.assert_close(run(transformer), expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("target", list(TARGETS))
def test_both_experts_files_load_in_the_diffusers_pipeline(bases, tmp_path, target):
    lora = LoraConfig(rank=4, alpha=6.0, target=target, blocks=(1, 2) if target == "qk" else None)
    expected = {}
    for seed, expert in enumerate(EXPERTS):
        model = trained(bases[expert], lora, seed)
        expected[expert] = run(model)
        export(model, tmp_path / lora_file_name(expert), lora)
    pipe = WanPipeline(
        tokenizer=None,
        text_encoder=None,
        vae=None,
        scheduler=FlowMatchEulerDiscreteScheduler(),
        transformer=copy.deepcopy(bases["high"]),
        transformer_2=copy.deepcopy(bases["low"]),
    )
    pipe.load_lora_weights(tmp_path, weight_name=lora_file_name("high"))
    pipe.load_lora_weights(
        tmp_path, weight_name=lora_file_name("low"), load_into_transformer_2=True
    )
    assert_output(pipe.transformer, expected["high"], bases["high"])
    assert_output(pipe.transformer_2, expected["low"], bases["low"])


# --- ComfyUI: its model carries the names of the original Wan code (comfy/lora.py, key map) -------

ORIGINAL = {
    "self_attn.q": "attn1.to_q",
    "self_attn.k": "attn1.to_k",
    "self_attn.v": "attn1.to_v",
    "self_attn.o": "attn1.to_out.0",
    "cross_attn.q": "attn2.to_q",
    "cross_attn.k": "attn2.to_k",
    "cross_attn.v": "attn2.to_v",
    "cross_attn.o": "attn2.to_out.0",
    "ffn.0": "ffn.net.0.proj",
    "ffn.2": "ffn.net.2",
}
PAIRS = [("lora_B.weight", "lora_A.weight"), ("lora_up.weight", "lora_down.weight")]


def comfy_merge(weights, file):
    """`weights`, by original names, after the patches that ComfyUI would make of `file`."""
    key_map = {}
    for key in weights:
        stem = key.removesuffix(".weight")
        key_map[stem] = key
        key_map["lora_unet_" + stem.removeprefix("diffusion_model.").replace(".", "_")] = key
    merged, used = dict(weights), set()
    for stem, key in key_map.items():
        for up, down in PAIRS:
            if f"{stem}.{up}" not in file:
                continue
            b, a = file[f"{stem}.{up}"], file[f"{stem}.{down}"]
            alpha = file.get(f"{stem}.alpha")
            scale = 1.0 if alpha is None else alpha.item() / len(a)
            merged[key] = weights[key] + scale * (b @ a)
            used |= {f"{stem}.{up}", f"{stem}.{down}", f"{stem}.alpha"}
    assert set(file) <= used, f"ComfyUI would not load {set(file) - used}"
    return merged


def original_weights(transformer):
    state = transformer.state_dict()
    return {
        f"diffusion_model.blocks.{n}.{theirs}.weight": state[f"blocks.{n}.{ours}.weight"]
        for n in range(BLOCKS)
        for theirs, ours in ORIGINAL.items()
    }


@pytest.mark.parametrize("target", list(TARGETS))
def test_comfyuis_rules_merge_the_file_into_the_trained_model(bases, tmp_path, target):
    base = bases["high"]
    lora = LoraConfig(rank=4, alpha=6.0, target=target)
    model = trained(base, lora)
    file = safetensors.torch.load_file(export(model, tmp_path / "x.safetensors", lora))
    merged = comfy_merge(original_weights(base), file)

    ours = trained(base, lora)
    changed = 0
    for name, module in ours.named_modules():
        if hasattr(module, "merge"):
            module.merge()
            block, layer = name.removeprefix("blocks.").split(".", 1)
            original = {v: k for k, v in ORIGINAL.items()}[layer]
            expected = module.base_layer.weight
            got = merged[f"diffusion_model.blocks.{block}.{original}.weight"]
            torch.testing.assert_close(got, expected, rtol=1e-6, atol=1e-6)
            changed += 1
    assert changed == len(file) // 2 == BLOCKS * len(TARGETS[target])

    tool = copy.deepcopy(base)
    state = tool.state_dict()
    for key, weight in merged.items():
        block, layer = key.removeprefix("diffusion_model.blocks.").split(".", 1)
        state[f"blocks.{block}.{ORIGINAL[layer.removesuffix('.weight')]}.weight"] = weight
    tool.load_state_dict(state)
    assert_output(tool, run(model), base)


# --- The file itself ------------------------------------------------------------------------------


@pytest.fixture
def exported(bases, tmp_path):
    lora = LoraConfig(rank=4, alpha=6.0)
    model = trained(bases["high"], lora)
    path = tmp_path / "new" / lora_file_name("high")
    return model, export(model, path, lora, expert="high", fps="16")


def test_file_names_are_those_of_the_contract():
    assert [lora_file_name(expert) for expert in ("high", "low", "single")] == [
        "wan22_temporal_lora_high_noise.safetensors",
        "wan22_temporal_lora_low_noise.safetensors",
        "wan22_temporal_lora.safetensors",
    ]


def test_a_file_is_fp32_with_its_metadata_no_alpha_and_nothing_left_beside_it(exported):
    _, path = exported
    tensors = safetensors.torch.load_file(path)
    assert {t.dtype for t in tensors.values()} == {torch.float32}
    assert not any("alpha" in key for key in tensors)
    assert tensors["diffusion_model.blocks.0.self_attn.q.lora_B.weight"].shape == (256, 4)
    assert read_metadata(path) == {"expert": "high", "fps": "16"}
    assert list(path.parent.iterdir()) == [path]


def test_an_export_that_fails_leaves_the_old_file_whole(exported, monkeypatch):
    model, path = exported
    before = path.read_bytes()

    def full_disk(_):
        raise OSError("no space left")

    monkeypatch.setattr("os.fsync", full_disk)
    with pytest.raises(OSError, match="no space"):
        export(model, path, LoraConfig(rank=4))
    assert path.read_bytes() == before and list(path.parent.iterdir()) == [path]


def test_a_layer_that_no_tool_would_load_is_not_written(tmp_path):
    state = {"blocks.0.attn2.add_k_proj.lora_A.weight": torch.zeros(4, 8)}
    with pytest.raises(ValueError, match="add_k_proj"):
        export_lora(
            state,
            tmp_path / "x.safetensors",
            lora=LoraConfig(rank=4, target="all_linear"),
            rows=None,
            num_heads=2,
            head_dim=128,
            metadata={},
        )
    assert not list(tmp_path.iterdir())


# --- Reading files, ours and others' --------------------------------------------------------------


def test_our_file_gives_the_trained_model_again(exported, bases):
    model, path = exported
    fresh = copy.deepcopy(bases["high"])
    check_lora_file(copy.deepcopy(fresh).to("meta"), path)
    apply_lora_file(fresh, path)
    assert_output(fresh, run(model), bases["high"])


def lora_in_form(form, folder):
    """The same random LoRA (rank 4, alpha 6, all layers) as three other trainers would write it."""
    generator = torch.Generator().manual_seed(5)
    layers = {}
    for n in range(BLOCKS):
        for theirs, ours in ORIGINAL.items():
            wide, narrow = {"ffn.0": (96, 256), "ffn.2": (256, 96)}.get(theirs, (256, 256))
            a = torch.randn(4, narrow, generator=generator) * 0.05
            b = torch.randn(wide, 4, generator=generator) * 0.05
            layers[n, theirs, ours] = a, b
    tensors, metadata = {}, None
    for (n, theirs, ours), (a, b) in layers.items():
        if form == "diffusers":
            stem, names = f"transformer.blocks.{n}.{ours}", ("lora_A", "lora_B")
        elif form == "comfyui":
            stem, names = f"diffusion_model.blocks.{n}.{theirs}", ("lora_down", "lora_up")
        else:
            flat = theirs.replace(".", "_")
            stem, names = f"lora_unet_blocks_{n}_{flat}", ("lora_down", "lora_up")
        tensors |= {f"{stem}.{name}.weight": t for name, t in zip(names, (a, b))}
        if form != "diffusers":
            tensors[f"{stem}.alpha"] = torch.tensor(6.0)
    if form == "diffusers":
        names = [f"blocks.{n}.{ours}" for n, _, ours in layers]
        settings = {"r": 4, "lora_alpha": 6, "target_modules": names}
        settings = {f"transformer.{key}": value for key, value in settings.items()}
        metadata = {"lora_adapter_metadata": json.dumps(settings)}
    path = folder / f"{form}.safetensors"
    safetensors.torch.save_file(tensors, path, metadata)
    return path, layers


@pytest.mark.parametrize("form", ["diffusers", "comfyui", "musubi"])
def test_others_files_apply_at_their_own_alpha(bases, tmp_path, form):
    base = bases["high"]
    path, layers = lora_in_form(form, tmp_path)
    merged = copy.deepcopy(base)
    for (n, _, ours), (a, b) in layers.items():
        merged.get_submodule(f"blocks.{n}.{ours}").weight.data += 6 / 4 * b @ a
    fresh = copy.deepcopy(base)
    apply_lora_file(fresh, path)
    assert_output(fresh, run(merged), base)


def test_files_add_up_with_each_other_and_with_adapters_in_training(exported, bases, tmp_path):
    model, path = exported
    other, layers = lora_in_form("comfyui", tmp_path)
    merged = copy.deepcopy(model)
    for (n, _, ours), (a, b) in layers.items():
        layer = merged.get_submodule(f"blocks.{n}.{ours}")
        getattr(layer, "base_layer", layer).weight.data += 6 / 4 * b @ a
    expected = run(merged)
    stacked = copy.deepcopy(bases["high"])
    apply_lora_file(stacked, path)
    apply_lora_file(stacked, other)
    assert_output(stacked, expected, model)
    before = set(lora_parameters(model))
    apply_lora_file(model, other)
    assert_output(model, expected, bases["high"])
    assert set(lora_parameters(model)) == before
    set_lora_scale(model, 0.0)
    only_other = copy.deepcopy(bases["high"])
    apply_lora_file(only_other, other)
    assert_output(only_other, run(model), bases["high"])
    load_lora_state(model, {name: p.detach() for name, p in lora_parameters(model).items()})


def refused(transformer, path, message):
    before = {name: p.clone() for name, p in transformer.named_parameters()}
    with pytest.raises(ConfigError, match=message) as caught:
        apply_lora_file(transformer, path)
    assert str(path) in str(caught.value) and "\n" not in str(caught.value)
    with pytest.raises(ConfigError, match=message):
        check_lora_file(copy.deepcopy(transformer).to("meta"), path)
    after = dict(transformer.named_parameters())
    assert before.keys() == after.keys() and all(torch.equal(before[n], after[n]) for n in after)


def test_files_that_do_not_fit_are_refused_and_change_nothing(exported, bases, tmp_path):
    _, good = exported
    base = bases["high"]
    tensors = safetensors.torch.load_file(good)
    key = "diffusion_model.blocks.1.self_attn.k.lora_B.weight"

    def write(name, content):
        path = tmp_path / f"{name}.safetensors"
        safetensors.torch.save_file(content, path)
        return path

    refused(base, tmp_path / "nowhere.safetensors", "no such LoRA file")
    refused(base, tmp_path, "no such LoRA file")
    broken = tmp_path / "broken.safetensors"
    broken.write_bytes(good.read_bytes()[:-100])
    refused(base, broken, "safetensors")
    broken.write_bytes(b"\x80\x04 a pickle")
    refused(base, broken, "safetensors")
    empty = write("empty", {})
    refused(base, empty, "no LoRA weights")
    refused(base, write("image", {"unet.down.lora_A.weight": torch.zeros(4, 8)}), "no place for")
    refused(base, write("other", {"diffusion_model.x.lora_A.weight": torch.zeros(4, 8)}), "Wan")
    half = {k: v for k, v in tensors.items() if k != key}
    refused(base, write("half", half), "lora_A or lora_B but not both")
    refused(base, write("rank", tensors | {key: torch.zeros(256, 3)}), "rank 4 in lora_A and 3")
    deeper = trained(build(3, blocks=3), LoraConfig(rank=4))
    refused(base, export(deeper, tmp_path / "d.safetensors", LoraConfig(rank=4)), "no place for")
    wider = trained(build(3, heads=3), LoraConfig(rank=4))
    path = export(wider, tmp_path / "w.safetensors", LoraConfig(rank=4))
    refused(base, path, r"another model: .* is \(384, 384\) there and \(256, 256\) here")
    subset = {"lora_unet_blocks_0_self_attn_q.lora_down.weight": torch.zeros(4, 256)}
    refused(base, write("subset", subset), "lora_up|converted")


def test_tensors_that_are_left_out_are_warned_of(exported, bases, tmp_path, caplog):
    _, good = exported
    tensors = safetensors.torch.load_file(good)
    tensors["diffusion_model.blocks.0.norm3.diff"] = torch.zeros(256)
    path = tmp_path / "diff.safetensors"
    safetensors.torch.save_file(tensors, path)
    with caplog.at_level(logging.WARNING):
        apply_lora_file(copy.deepcopy(bases["high"]), path)
    assert "1 tensors that are no LoRA pairs" in caplog.text
