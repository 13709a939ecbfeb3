"""lora.py against PEFT's own LoRA, by hand-made references and inside diffusers' Wan."""

import copy

import peft
import pytest
import torch
from diffusers import WanTransformer3DModel
from torch import nn
from torch.utils.checkpoint import checkpoint

from tempolora.config import ConfigError, LoraConfig
from tempolora.model import lora as lora_module
from tempolora.model.lora import (
    AdapterLinear,
    add_lora,
    load_lora_state,
    lora_parameters,
    set_lora_scale,
    standard_lora,
)
from tempolora.model.targets import scaling, target_modules, time_channels, time_rows
from tempolora.timebase import TimeBase

HEADS, HEAD_DIM = 2, 128
CLIP = TimeBase(16.0, 49)  # 13 latent frames: 16 time rows
ROWS = 16


@pytest.fixture(scope="module")
def base():
    torch.manual_seed(0)
    return WanTransformer3DModel(
        num_attention_heads=HEADS,
        attention_head_dim=HEAD_DIM,
        text_dim=32,
        freq_dim=32,
        ffn_dim=96,
        num_layers=2,
    )


@pytest.fixture
def model(base):
    return copy.deepcopy(base)


def fill(transformer, seed=1):
    """Give B values, as training would."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in lora_parameters(transformer).items():
            if "lora_B" in name:
                parameter.copy_(0.1 * torch.randn(parameter.shape, generator=generator))


def state_of(transformer):
    return {name: p.detach().clone() for name, p in lora_parameters(transformer).items()}


def inputs(dtype=torch.float32):
    generator = torch.Generator().manual_seed(2)
    return {
        "hidden_states": torch.randn(1, 16, 2, 4, 6, generator=generator).to(dtype),
        "timestep": torch.tensor([500.0]),
        "encoder_hidden_states": torch.randn(1, 5, 32, generator=generator).to(dtype),
    }


def run(transformer, **kwargs):
    return transformer(**inputs(**kwargs), return_dict=False)[0]


def gradients(transformer):
    transformer.zero_grad()
    run(transformer).square().mean().backward()
    return {name: p.grad.clone() for name, p in lora_parameters(transformer).items()}


def assert_same(left, right, tolerance):
    assert left.keys() == right.keys()
    for name in left:
        torch.testing.assert_close(left[name], right[name], rtol=tolerance, atol=tolerance)


def plain_peft(transformer, lora, state):
    """The same adapters as an ordinary PEFT LoRA: B padded with zeros by hand, scale by PEFT."""
    alpha = lora.rank if lora.alpha is None else lora.alpha
    names = target_modules(lora, 2)
    config = peft.LoraConfig(r=lora.rank, lora_alpha=alpha, target_modules=names)
    peft.inject_adapter_in_model(config, transformer)
    wide = {}
    for name, weight in state.items():
        if "lora_B" in name and lora.target == "temporal":
            padded = torch.zeros(HEADS * HEAD_DIM, lora.rank)
            for head in range(HEADS):
                rows = weight[head * ROWS : (head + 1) * ROWS]
                padded[head * HEAD_DIM : head * HEAD_DIM + ROWS] = rows
            weight = padded
        wide[name] = weight
    result = peft.set_peft_model_state_dict(transformer, wide)
    assert not result.unexpected_keys
    return transformer


@pytest.mark.parametrize(("frames", "rows"), [(49, 16), (81, 18), (121, 20)])
def test_auto_takes_the_pairs_that_turn_over_the_clip(frames, rows):
    assert time_rows(TimeBase(16.0, frames)) == rows


def test_the_rows_are_those_that_diffusers_rope_turns_over_the_clip(base):
    assert base.rope.t_dim == time_channels(HEAD_DIM) == 44
    # 13 latent frames of one patch: the angle differs between tokens in time alone
    cos, sin = (table[0, :, 0].double() for table in base.rope(torch.empty(1, 16, 13, 2, 2)))
    step = torch.atan2(sin[1], cos[1])  # rad per latent frame; the fastest pair turns by 1
    turned = (12 * step).abs() > 0.5
    assert turned.nonzero().flatten().tolist() == list(range(ROWS))


@pytest.mark.parametrize(
    ("target", "expected"),
    [
        ("temporal", {"attn1.to_q", "attn1.to_k"}),
        ("qk", {"attn1.to_q", "attn1.to_k"}),
        ("self_attention", {"attn1.to_q", "attn1.to_k", "attn1.to_v", "attn1.to_out.0"}),
        (
            "all_linear",
            {f"{a}.{n}" for a in ("attn1", "attn2") for n in ("to_q", "to_k", "to_v", "to_out.0")}
            | {"ffn.net.0.proj", "ffn.net.2"},
        ),
    ],
)
def test_each_target_adapts_its_layers_and_no_others(model, target, expected):
    add_lora(model, LoraConfig(rank=2, target=target), CLIP, seed=0)
    adapted = {name.split(".lora_")[0] for name in lora_parameters(model)}
    assert adapted == {f"blocks.{n}.{name}" for n in range(2) for name in expected}


def test_a_block_range_adapts_those_blocks_alone_also_where_numbers_share_digits():
    model = WanTransformer3DModel(
        num_attention_heads=1, text_dim=8, freq_dim=8, ffn_dim=8, num_layers=13
    )
    add_lora(model, LoraConfig(rank=1, blocks=(1, 3), target="all_linear"), CLIP, seed=0)
    blocks = [int(name.split(".")[1]) for name in lora_parameters(model)]
    assert set(blocks) == {1, 2}
    model = WanTransformer3DModel(
        num_attention_heads=1, text_dim=8, freq_dim=8, ffn_dim=8, num_layers=13
    )
    add_lora(model, LoraConfig(rank=1), CLIP, seed=0)
    blocks = [int(name.split(".")[1]) for name in lora_parameters(model)]
    assert blocks == sorted(blocks) and set(blocks) == set(range(13))


def test_a_block_range_past_the_model_is_refused():
    with pytest.raises(ConfigError, match=r"lora\.blocks.*\[1, 3\].*2 blocks"):
        target_modules(LoraConfig(blocks=(1, 3)), 2)


def test_more_rows_than_the_head_has_time_channels_are_refused(base):
    lora = LoraConfig(time_rows=30)
    with pytest.raises(ConfigError, match=r"lora\.time_rows"):
        lora_module.adapter_rows(lora, CLIP, head_dim=24)


def test_only_adapters_train_and_they_are_fp32_over_a_bf16_base(model):
    model.to(torch.bfloat16)
    add_lora(model, LoraConfig(rank=4, target="all_linear"), CLIP, seed=0)
    trained = {id(p) for p in model.parameters() if p.requires_grad}
    adapters = lora_parameters(model).values()
    assert trained == {id(p) for p in adapters}
    assert all(p.dtype == torch.float32 for p in adapters)


def test_a_new_adapter_leaves_the_model_as_it_was(model):
    before = run(model)
    add_lora(model, LoraConfig(rank=4, target="all_linear"), CLIP, seed=0)
    assert torch.equal(run(model), before)


def test_outputs_outside_the_time_rows_are_the_base_layers_bit_for_bit(model, base):
    add_lora(model, LoraConfig(rank=4), CLIP, seed=0)
    fill(model)
    x_BLD = torch.randn(2, 7, HEADS * HEAD_DIM, generator=torch.Generator().manual_seed(3))
    for name in ("to_q", "to_k"):
        ours = getattr(model.blocks[1].attn1, name)(x_BLD).unflatten(-1, (HEADS, HEAD_DIM))
        theirs = getattr(base.blocks[1].attn1, name)(x_BLD).unflatten(-1, (HEADS, HEAD_DIM))
        assert torch.equal(ours[..., ROWS:], theirs[..., ROWS:])
        assert (ours[..., :ROWS] != theirs[..., :ROWS]).float().mean() > 0.99


@pytest.mark.parametrize("target", ["temporal", "qk", "all_linear"])
def test_output_and_gradient_equal_a_plain_peft_lora(model, base, target):
    lora = LoraConfig(rank=4, alpha=6.0, target=target)
    add_lora(model, lora, CLIP, seed=0)
    fill(model)
    theirs = plain_peft(copy.deepcopy(base), lora, state_of(model))
    torch.testing.assert_close(run(model), run(theirs), rtol=1e-6, atol=1e-6)
    expected = {}
    run(theirs).square().mean().backward()
    for name, parameter in theirs.named_parameters():
        if parameter.grad is not None:
            grad = parameter.grad
            if "lora_B" in name and target == "temporal":
                grad = grad.unflatten(0, (HEADS, HEAD_DIM))[:, :ROWS].flatten(0, 1)
            expected[name.replace(".default", "")] = grad
    # fp32 sums of gradients up to 1e-2 in another order
    assert_same(gradients(model), expected, 1e-6)


def test_pefts_own_state_dict_functions_carry_the_adapters(model, base):
    lora = LoraConfig(rank=4)
    add_lora(model, lora, CLIP, seed=0)
    fill(model)
    saved = peft.get_peft_model_state_dict(model)
    assert saved.keys() == lora_parameters(model).keys()
    assert saved["blocks.0.attn1.to_q.lora_B.weight"].shape == (HEADS * ROWS, 4)
    other = copy.deepcopy(base)
    add_lora(other, lora, CLIP, seed=9)
    result = peft.set_peft_model_state_dict(other, saved)
    assert not result.unexpected_keys
    assert torch.equal(run(other), run(model))


def test_pefts_merge_gives_the_adapted_model_and_unmerge_the_base(model):
    add_lora(model, LoraConfig(rank=4, alpha=2.0), CLIP, seed=0)
    before = run(model)
    fill(model)
    adapted = run(model)
    for module in model.modules():
        if isinstance(module, lora_module.RowLora):
            module.merge()
    torch.testing.assert_close(run(model), adapted, rtol=1e-5, atol=1e-5)
    for module in model.modules():
        if isinstance(module, lora_module.RowLora):
            module.unmerge()
            module.enable_adapters(False)
    torch.testing.assert_close(run(model), before, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("target", ["temporal", "all_linear"])
def test_checkpointing_leaves_every_gradient_identical(model, target):
    add_lora(model, LoraConfig(rank=4, target=target), CLIP, seed=0)
    fill(model)
    plain = gradients(model)
    for block in model.blocks:
        forward = block.forward
        block.forward = lambda *args, f=forward: checkpoint(f, *args, use_reentrant=False)
    assert_same(gradients(model), plain, 0)
    assert all(grad.abs().max() > 0 for grad in plain.values())


@pytest.mark.parametrize(
    ("target", "backend", "dtype", "tolerance"),
    [
        ("temporal", "aot_eager", torch.float32, 1e-6),  # functionalised, as inductor has it
        ("temporal", "eager", torch.bfloat16, 0),  # under autocast
        ("all_linear", "eager", torch.float32, 0),
    ],
)
def test_a_block_compiles_whole_with_the_same_gradients(model, target, backend, dtype, tolerance):
    add_lora(model, LoraConfig(rank=4, target=target), CLIP, seed=0)
    fill(model)
    with torch.autocast("cpu", dtype, enabled=dtype != torch.float32):
        plain = gradients(model)
        names = list(lora_parameters(model))
        torch.compiler.reset()
        model.blocks[1].compile(fullgraph=True, backend=backend)
        compiled = gradients(model)
    assert list(lora_parameters(model)) == names
    assert_same(compiled, plain, tolerance)


def test_changing_the_scale_of_a_compiled_block_does_not_keep_recompiling(model):
    add_lora(model, LoraConfig(rank=4), CLIP, seed=0)
    compiled = []
    torch.compiler.reset()
    model.blocks[0].compile(fullgraph=True, backend=lambda graph, _: compiled.append(1) or graph)
    for step in range(6):
        set_lora_scale(model, 0.1 * step)
        run(model)
    assert len(compiled) <= 2  # the first scale, then any


def test_a_bf16_base_without_autocast_computes_and_returns_bf16(model):
    model.to(torch.bfloat16)
    add_lora(model, LoraConfig(rank=4, target="self_attention"), CLIP, seed=0)
    fill(model)
    seen = []
    for module in model.modules():
        if isinstance(module, AdapterLinear):
            module.register_forward_hook(lambda m, args, out: seen.append((args[0], out)))
    layer = model.blocks[0].attn1.to_q
    out = layer(torch.randn(1, 3, HEADS * HEAD_DIM, dtype=torch.bfloat16))
    assert out.dtype == torch.bfloat16 and len(seen) == 2
    assert all(x.dtype == y.dtype == torch.bfloat16 for x, y in seen)


@pytest.mark.parametrize("target", ["temporal", "qk"])
def test_full_backward_hooks_on_every_layer_change_no_gradient(model, target):
    """They wrap outputs in views that autograd won't have modified in place."""
    add_lora(model, LoraConfig(rank=4, target=target), CLIP, seed=0)
    fill(model)
    plain = gradients(model)
    for module in model.modules():
        if isinstance(module, nn.Linear):
            module.register_full_backward_hook(lambda *_: None)
    assert_same(gradients(model), plain, 0)


def test_initial_weights_follow_from_seed_and_name_alone(base):
    def initial(seed, noise=0, **kwargs):
        transformer = copy.deepcopy(base)
        torch.manual_seed(noise)  # as another rank or another order of construction would
        add_lora(transformer, LoraConfig(rank=4, **kwargs), CLIP, seed)
        return state_of(transformer)

    first = initial(7)
    assert_same(first, initial(7, noise=1), 0)
    wider = initial(7, noise=2, target="all_linear")
    last = initial(7, blocks=(1, 2))
    for name in first:
        if "lora_A" in name:
            assert torch.equal(first[name], wider[name])
            assert name not in last or torch.equal(first[name], last[name])
        else:
            assert not first[name].any()
    a = [weight for name, weight in (first | initial(8)).items() if "lora_A" in name]
    a += [weight for name, weight in first.items() if "lora_A" in name]
    assert len({weight.sum().item() for weight in a}) == 8  # all differ, by name and by seed
    bound = (HEADS * HEAD_DIM) ** -0.5  # kaiming_uniform(a=sqrt(5)) is U(-1, 1) / sqrt(fan_in)
    assert all(0.95 * bound < weight.abs().max() <= bound for weight in a)


def test_scale_is_linear_in_the_adapter_and_zero_is_the_base_exactly(model, base):
    lora = LoraConfig(rank=4, alpha=8.0)
    add_lora(model, lora, CLIP, seed=0)
    fill(model)
    x_BLD = torch.randn(1, 5, HEADS * HEAD_DIM, generator=torch.Generator().manual_seed(4))
    q, q_base = model.blocks[0].attn1.to_q, base.blocks[0].attn1.to_q(x_BLD)
    full = q(x_BLD) - q_base
    set_lora_scale(model, 0.5)
    torch.testing.assert_close(q(x_BLD) - q_base, full / 2, rtol=1e-5, atol=1e-5)
    set_lora_scale(model, 0.0)
    assert torch.equal(run(model), run(base))
    set_lora_scale(model, 1.0)
    torch.testing.assert_close(q(x_BLD) - q_base, full)


def test_names_stay_clean_inside_checkpoint_and_compile_wrappers(model):
    from torch.distributed.algorithms._checkpoint.checkpoint_wrapper import checkpoint_wrapper

    add_lora(model, LoraConfig(rank=4), CLIP, seed=0)
    plain = list(lora_parameters(model))
    model.blocks[0] = checkpoint_wrapper(model.blocks[0])
    model.blocks[1] = torch.compile(checkpoint_wrapper(model.blocks[1]))
    assert list(lora_parameters(model)) == plain
    assert plain[:2] == [f"blocks.0.attn1.to_k.lora_{x}.weight" for x in "AB"]
    set_lora_scale(model, 0.0)


def test_loading_is_strict_and_leaves_nothing_half_loaded(model, base):
    add_lora(model, LoraConfig(rank=4), CLIP, seed=0)
    fill(model)
    state = state_of(model)
    other = copy.deepcopy(base)
    add_lora(other, LoraConfig(rank=4), CLIP, seed=5)
    before = state_of(other)
    name = "blocks.1.attn1.to_k.lora_B.weight"
    wrong = [
        ({k: v for k, v in state.items() if k != name}, f"missing {name}"),
        (state | {"blocks.2.x": torch.zeros(1)}, "unexpected blocks.2.x"),
        (state | {name: torch.zeros(256, 4)}, rf"{name} has shape \(256, 4\), not \(32, 4\)"),
    ]
    for bad, message in wrong:
        with pytest.raises(ValueError, match=message):
            load_lora_state(other, bad)
        assert_same(state_of(other), before, 0)
    load_lora_state(other, state)
    assert torch.equal(run(other), run(model))


def test_the_standard_form_has_zeros_outside_the_time_rows_and_the_scale_in_b(model):
    lora = LoraConfig(rank=4, alpha=6.0)
    add_lora(model, lora, CLIP, seed=0)
    fill(model)
    state = state_of(model)
    wide = standard_lora(state, lora, num_heads=HEADS, head_dim=HEAD_DIM, rows=ROWS)
    assert wide.keys() == state.keys() and scaling(lora) == 1.5
    for name, weight in wide.items():
        if "lora_A" in name:
            assert torch.equal(weight, state[name])
            continue
        for row in range(HEADS * HEAD_DIM):
            head, channel = divmod(row, HEAD_DIM)
            if channel < ROWS:
                assert torch.equal(weight[row], 1.5 * state[name][head * ROWS + channel])
            else:
                assert not weight[row].any()
    with pytest.raises(ValueError, match="32 rows, not 3 heads"):
        standard_lora(state, lora, num_heads=3, head_dim=HEAD_DIM, rows=ROWS)
