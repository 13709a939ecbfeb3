"""Levels of checkpointing: the same gradients from fewer bytes, and as many bytes as counted.

Compiled blocks run on dynamo and the partitioner, which decide what is kept, without inductor.
"""

import functools
from pathlib import Path

import pytest
import torch
from torch._dynamo.utils import counters

from tempolora.config import ConfigError, load_config
from tempolora.model.lora import add_lora, lora_parameters
from tempolora.model.quick_parts import use_quick_parts
from tempolora.model.wan import load_transformer, predict_velocity
from tempolora.train import blocks, hosted
from tempolora.train.engine import build_engine
from tempolora.train.plan import Settings, kept_blocks_in, predict
from tempolora.train.recompute import KeptInput
from tempolora.train.work import kept_bytes
from tempolora.train.world import World

TOY = Path(__file__).parents[1] / "configs" / "toy.json"
CPU = torch.device("cpu")
SELECTIVE = "train.checkpointing=selective"
LEVELS = {
    "full": ("train.checkpointing=full",),
    "attention": (SELECTIVE, "train.kept_blocks=0"),
    "mixed": (SELECTIVE, "train.kept_blocks=1"),
    "matmuls": (SELECTIVE,),
}


def one_step(*sets, num_blocks=3, quick=False):
    """LoRA gradients of one forward and backward, and bytes kept in between."""
    cfg = load_config(TOY, ["data.num_frames=33", "data.height=128", "data.width=128", *sets])
    transformer = load_transformer(cfg.model, "high", "cpu")
    transformer.blocks = transformer.blocks[:num_blocks]
    add_lora(transformer, cfg.lora, cfg.timebase, 0)
    generator = torch.Generator().manual_seed(0)
    for name, parameter in lora_parameters(transformer).items():
        if "lora_B" in name:  # so that gradients reach A as well
            parameter.data.normal_(0, 0.02, generator=generator)
    if quick:
        use_quick_parts(transformer, compiled=True)
    engine = build_engine("plain", cfg, transformer, World(0, 1, CPU))
    latents = torch.randn(1, *cfg.latent_shape, generator=generator)
    text = torch.randn(1, 512, transformer.config.text_dim, generator=generator)
    kept = {}

    def keep(tensor):
        if not isinstance(tensor, torch.nn.Parameter):
            kept[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        v_hat = predict_velocity(engine.transformer, latents, torch.tensor([0.5]), text)
    engine.backward(v_hat.square().mean())
    gradients = {name: p.grad for name, p in lora_parameters(transformer).items()}
    return gradients, sum(kept.values())


@pytest.mark.parametrize("target", ["temporal", "all_linear"])
@pytest.mark.parametrize("level", LEVELS)
def test_what_is_kept_changes_no_gradient(level, target):
    kept, _ = one_step("train.checkpointing=none", f"lora.target={target}")
    ours, _ = one_step(*LEVELS[level], f"lora.target={target}")
    assert all(torch.equal(ours[name], kept[name]) for name in kept)


@pytest.fixture
def without_inductor(monkeypatch):
    torch._dynamo.reset()
    counters.clear()
    compiled = functools.partial(torch.compile, backend="aot_eager_decomp_partition")
    monkeypatch.setattr(blocks.torch, "compile", compiled)
    yield
    torch._dynamo.reset()


@pytest.mark.soak
def test_a_compiled_block_keeps_the_bytes_that_were_counted(without_inductor):
    """What `kept_bytes` says, twice as much in fp32, within 10 %: rank 2 adds little."""
    one = ("lora.rank=2", "lora.blocks=[0,1]")
    eager, _ = one_step("train.checkpointing=none", *one, num_blocks=1)
    found = {}
    for level in ("full", "attention", "matmuls"):
        torch._dynamo.reset()
        sets = (*LEVELS[level], "train.compile=true", *one)
        gradients, found[level] = one_step(*sets, num_blocks=1)
        for name, gradient in eager.items():
            assert (gradients[name] - gradient).norm() <= 1e-5 * gradient.norm(), name
    sizes = {"tokens": 9 * 8 * 8, "width": 256, "ffn": 512, "heads": 2}
    # with more text tokens than channels, TinyWan's text is not worth keeping at "attention"
    text = {"full": 0, "attention": 0, "matmuls": 512}
    counted = {level: 2 * kept_bytes(level, **sizes, text_tokens=text[level]) for level in found}
    for more, less in (("attention", "full"), ("matmuls", "attention")):
        assert found[more] - found[less] == pytest.approx(counted[more] - counted[less], rel=0.1)


@pytest.mark.parametrize("level", ["full", "attention", "matmuls"])
def test_quick_parts_keep_nothing_more(level, without_inductor):
    """In bf16, where attention to the text is an operator of its own."""
    sets = (*LEVELS[level], "train.compile=true", "model.base=bf16")
    _, plain = one_step(*sets)
    torch._dynamo.reset()
    _, quick = one_step(*sets, quick=True)
    assert 0 < quick <= plain


@pytest.mark.parametrize("base", ["fp8", "nf4"])
def test_a_rounded_base_keeps_nothing_more_under_full_checkpointing(base, without_inductor):
    """Whose products are autograd functions."""
    sets = (*LEVELS["full"], "train.compile=true")
    _, plain = one_step(*sets, "model.base=bf16")
    torch._dynamo.reset()
    _, rounded = one_step(*sets, f"model.base={base}")
    assert 0 < rounded <= plain


@pytest.mark.slow
def test_blocks_of_one_level_share_a_compilation_and_those_on_the_host_have_its_gradients(
    without_inductor, monkeypatch
):
    """The first block is alone in having an input without gradient."""
    monkeypatch.setattr(hosted, "SMALLEST", 1)
    taken = []
    take = KeptInput.take
    monkeypatch.setattr(KeptInput, "take", lambda kept: taken.append(take(kept)) or taken[-1])
    sets = (*LEVELS["mixed"], "train.compile=true")
    kept, _ = one_step(*sets)
    assert counters["stats"]["unique_graphs"] == 3  # first; attention; matmuls
    assert not counters["graph_break"]
    assert not taken
    ours, _ = one_step(*sets, "train.host_blocks=2")
    assert all(torch.equal(ours[name], kept[name]) for name in kept)
    assert len(taken) >= 2 * 8  # eight outputs of products and attention in each of two blocks


def test_host_blocks_are_spread_among_those_that_are_not_kept():
    cfg = load_config(TOY, [SELECTIVE, "train.kept_blocks=1", "train.host_blocks=40"])
    transformer = load_transformer(cfg.model, "high", "cpu")
    add_lora(transformer, cfg.lora, cfg.timebase, 0)
    count = len(transformer.blocks)
    assert blocks.choose_levels(cfg, transformer, CPU) == ["hosted"] * (count - 1) + ["matmuls"]
    levels = blocks._spread(12, 4)
    assert [n for n, level in enumerate(levels) if level == "hosted"] == [2, 5, 8, 11]
    assert blocks._spread(5, 0) == ["attention"] * 5


def test_blocks_below_the_first_adapter_are_left_alone():
    cfg = load_config(TOY, [*LEVELS["mixed"], "lora.blocks=[1,3]"])
    transformer = load_transformer(cfg.model, "high", "cpu")
    add_lora(transformer, cfg.lora, cfg.timebase, 0)
    assert blocks.choose_levels(cfg, transformer, CPU) == ["none", "attention", "matmuls"]
    more = load_config(TOY, [SELECTIVE, "train.kept_blocks=3", "lora.blocks=[1,3]"])
    with pytest.raises(ConfigError, match=r"train.kept_blocks: given 3, but 2 blocks are trained"):
        blocks.choose_levels(more, transformer, CPU)


A14B = {"tokens": 29952, "width": 5120, "ffn": 13824, "heads": 40, "text_tokens": 512}


def test_kept_bytes_of_the_a14b_are_those_counted_by_hand():
    hidden, inner = 29952 * 5120 * 2, 29952 * 13824 * 2  # 307 and 828 MB
    text, denominators = 2 * 512 * 5120 * 2, 40 * 29952 * 4
    assert kept_bytes("full", **A14B) == hidden
    assert kept_bytes("attention", **A14B) == 2 * hidden + text + denominators
    matmuls = kept_bytes("matmuls", **A14B)
    assert matmuls == 8 * hidden + inner + text + denominators
    assert matmuls == pytest.approx(3.3e9, rel=0.02)


def test_as_many_blocks_are_kept_as_fit():
    cfg = load_config(TOY.with_name("a14b.json"), [SELECTIVE, "train.compile=true"])

    def chosen(gib):
        return kept_blocks_in(gib * 2**30, cfg)

    assert [chosen(gib) for gib in (0, 30, 1000)] == [0, 0, 40]
    bare = predict(cfg, Settings("plain", "bf16", "gpu", "selective"))
    beside = bare.peak - bare.parts["weights"] - bare.parts["LoRA"]
    each = kept_bytes("matmuls", **A14B) - kept_bytes("attention", **A14B)
    for gib in (40, 80, 100):
        kept = chosen(gib)
        assert 0 < kept < 40
        assert beside + kept * each <= gib * 2**30 < beside + (kept + 1) * each


def test_kept_blocks_without_selective_checkpointing_is_refused():
    with pytest.raises(ConfigError, match=r"train\.kept_blocks: has no meaning"):
        load_config(TOY, ["train.checkpointing=full", "train.kept_blocks=2"])
