"""What a step computes, counted from sizes, against torch's own counter and real modules."""

from pathlib import Path

import pytest
import torch
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from tempolora.config import load_config
from tempolora.model.lora import add_lora, lora_parameters
from tempolora.model.wan import load_transformer, meta_transformer, predict_velocity
from tempolora.train.work import work_of

ROOT = Path(__file__).parents[1]


def config(name="toy", *overrides):
    return load_config(ROOT / "configs" / f"{name}.json", list(overrides))


def counted(cfg):
    """FLOPs of TinyWan's forward and backward as torch counts them, one by one, on the CPU."""
    expert = cfg.experts[0]
    transformer = load_transformer(cfg.model, expert, "cpu")
    add_lora(transformer, cfg.lora, cfg.timebase, 0)
    generator = torch.Generator().manual_seed(0)
    x, batch = cfg.latent_shape, cfg.train.batch_size
    noise = torch.randn(batch, *x, generator=generator)
    text = torch.randn(batch, 512, transformer.config.text_dim, generator=generator)
    # Plain products: of the fused kernels the counter takes the textbook sum, needed or not.
    with sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter:
        velocity = predict_velocity(
            transformer,
            noise,
            torch.full((batch,), 0.5),
            text,
            per_token_time=cfg.variant.per_token_time,
        )
        velocity.square().mean().backward()
    return counter.get_total_flops(), transformer


@pytest.mark.parametrize(
    "overrides",
    [
        ("lora.target=temporal",),
        ("lora.target=self_attention", "train.batch_size=1"),
        ("lora.target=all_linear", "lora.rank=4"),
        ("lora.target=qk", "lora.blocks=[1,2]"),
        ("lora.target=self_attention", "model.variant=ti2v_5b", "model.expert=null"),
    ],
    ids=lambda overrides: " ".join(overrides),
)
def test_flops_are_those_that_torch_counts(overrides):
    cfg = config("toy", "data.num_frames=9", "rhythm.spec_weight=0", *overrides)
    expected, transformer = counted(cfg)
    work = work_of(cfg, cfg.experts[0])
    assert work.flops.total == pytest.approx(expected, rel=1e-9)
    assert sum(work.adapters) == sum(p.numel() for p in lora_parameters(transformer).values())


@pytest.mark.parametrize("name", ["a14b", "a14b_i2v", "ti2v_5b"])
def test_weights_are_those_of_the_published_model(name):
    cfg = config(name)
    work = work_of(cfg, cfg.experts[0])
    module = meta_transformer(cfg.model, cfg.experts[0])
    kept = set(module._keep_in_fp32_modules)
    expected = sum(
        p.numel() * (4 if kept & set(name.split(".")) else 2)
        for name, p in module.named_parameters()
    )
    assert work.weights("bf16") == expected
    assert work.weights("fp32") == 4 * sum(p.numel() for p in module.parameters())
    assert work.block_weights("fp8") < 0.51 * work.block_weights("bf16")


def test_a_full_step_of_the_a14b_is_what_was_counted_by_hand():
    """3.68 PFLOP at 49x576x1024; 29,952 tokens."""
    cfg = config("a14b")
    work = work_of(cfg, "high")
    assert work.tokens == 29952
    assert work.flops.total == pytest.approx(3.68e15, rel=0.01)
    assert sum(work.adapters) == pytest.approx(7.37e6, rel=1e-3)  # 7.37 M in the train log
