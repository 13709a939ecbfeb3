"""The step bench: its counts, and that its variants compute the same step."""

import json
from pathlib import Path

import pytest
import torch

from tempolora.bench import ceilings, kernel_profile, step
from tempolora.train.work import work_of

TOY = Path(__file__).parents[1] / "configs" / "toy.json"
A14B = work_of(step.load_config(TOY.with_name("a14b.json")), "high")


def test_the_floor_counts_what_is_computed_again():
    times = {f"{M}x{K}x{N}": 2.0 for M, K, N in ceilings.products(A14B)}
    attention = {"slow": {"forward": 50, "backward": 100}, "fast": {"forward": 30, "backward": 80}}
    rates = {"plain": times, "fp8": {}, "attention": attention}
    cfg = step.load_config(TOY)

    def floor(*levels):
        return ceilings.floor_seconds(A14B, rates, cfg, list(levels))

    model = 40 * (2 * 16 + 30 + 80) / 1e3
    assert floor() == (pytest.approx(model), pytest.approx(model))
    assert floor("full", "attention", "matmuls")[1] == pytest.approx(model + (14 + 30 + 14) / 1e3)
    fp8 = step.load_config(TOY, ["model.base=fp8"])
    assert ceilings.floor_seconds(A14B, rates, fp8, []) is None


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
    assert kernel_profile.kernel_class(name) == kind


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
