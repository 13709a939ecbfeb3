"""The step bench: its counts, and that its variants compute the same step."""

import json
from pathlib import Path

import pytest
import torch

from tempolora.bench import step

TOY = Path(__file__).parents[1] / "configs" / "toy.json"
A14B = step.Shape(batch=1, tokens=29952, width=5120, ffn=13824, heads=40, blocks=40)


def test_flops_of_the_a14b_step_are_those_counted_before():
    """3.68 PFLOP at 49x576x1024, and no adapter."""
    assert sum(A14B.flops({}).values()) == pytest.approx(3.68e15, rel=2e-3)
    adapter = {"blocks.0.attn1.to_q.lora_A.weight": 16 * 5120}
    assert A14B.flops(adapter)["lora"] == 3 * 2 * 29952 * 16 * 5120


def test_the_floor_counts_what_is_computed_again():
    times = {f"{M}x{K}x{N}": 2.0 for M, K, N in A14B.products()}
    attention = {"slow": {"forward": 50, "backward": 100}, "fast": {"forward": 30, "backward": 80}}
    ceilings = {"plain": times, "fp8": {}, "attention": attention}
    cfg = step.load_config(TOY)

    def floor(*levels):
        return step.floor_seconds(A14B, ceilings, cfg, list(levels))

    model = 40 * (2 * 16 + 30 + 80) / 1e3
    assert floor() == (pytest.approx(model), pytest.approx(model))
    assert floor("full", "attention", "matmuls")[1] == pytest.approx(model + (14 + 30 + 14) / 1e3)
    fp8 = step.load_config(TOY, ["model.base=fp8"])
    assert step.floor_seconds(A14B, ceilings, fp8, []) is None


@pytest.mark.parametrize(
    ("name", "kind"),
    [
        ("nvjet_tst_128x256_64x4_1x2_h_bz_coopA_NTT", "product"),
        ("cudnn_generated_fort_native_sdpa_sm90_flash_bprop_wgmma_f16", "attention backward"),
        ("cudnn_generated_fort_native_sdpa_sm90_flash_fprop_wgmma_f16", "attention forward"),
        ("triton_red_fused__to_copy_abs_amax_native_layer_norm_0", "fused elementwise (triton)"),
        ("void at::native::vectorized_elementwise_kernel<4>", "elementwise"),
        ("Memcpy DtoD (Device -> Device)", "copy"),
    ],
)
def test_kernels_are_told_apart_by_name(name, kind):
    assert step.kernel_class(name) == kind


def test_variants_of_one_step_agree_and_a_broken_one_is_a_row(tmp_path, capsys, monkeypatch):
    found = tmp_path / "found.json"
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    names = [
        "full-eager",
        "selective+train.kept_blocks=1",
        "fp8-attention",
        "selective+train.kept_blocks=9",
    ]
    step.main(
        [
            *("--config", str(TOY), "--frames", "17", "--steps", "2", "--json", str(found)),
            *("--profile", "--variants"),
            *names,
        ]
    )
    printed = capsys.readouterr().out
    record = json.loads(found.read_text())
    same, fp8, broken = (record["variants"][name] for name in names[1:])
    assert record["variants"]["full-eager"]["ratio"] == 1
    assert same["levels"] == {"attention": 2, "matmuls": 1}
    assert same["gradient_error"] == same["loss_error"] == 0
    assert 0 < fp8["loss_error"] < 1e-2 and 0 < fp8["gradient_error"] < 0.2
    assert 0.98 < fp8["least_cosine"] < 1
    assert "at most 3" in broken["failed"] and "at most 3" in printed
    assert sum(count for _, count in same["profile"].values()) > 100
    assert "full-eager: kernels" in printed
