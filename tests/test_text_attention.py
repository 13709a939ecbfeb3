"""Attention to the text with folded queries, against diffusers' own."""

import pytest
import torch

from tempolora.config import LoraConfig
from tempolora.model import text_attention, tinywan
from tempolora.model.lora import add_lora, lora_parameters
from tempolora.model.wan import predict_velocity
from tempolora.timebase import TimeBase


@pytest.mark.parametrize(
    ("queries", "expected"), [(29_952, 13), (32_760, 15), (7488, 16), (160, 16), (7, 7), (31, 1)]
)
def test_queries_are_folded_into_equal_parts_of_whole_tiles_where_there_are_any(queries, expected):
    assert text_attention.parts(queries) == expected


def test_folded_attention_is_diffusers_own_and_so_are_all_gradients():
    """With adapters on the text's keys and values too, whose gradients are sums over the parts."""
    found = []
    for fold in (False, True):
        model = tinywan.read_expert(tinywan.expert_file("high")).requires_grad_(False)
        add_lora(model, LoraConfig(target="all_linear", rank=4), TimeBase(16.0, 17), seed=0)
        generator = torch.Generator().manual_seed(0)
        for name, p in lora_parameters(model).items():
            if "lora_B" in name:
                p.data.normal_(0, 0.05, generator=generator)
        if fold:
            text_attention.fold_text_attention(model)
        video = torch.randn(2, 16, 5, 8, 8, generator=generator)
        text = torch.randn(2, 512, model.config.text_dim, generator=generator)
        v_hat = predict_velocity(model, video, torch.tensor([0.9, 0.95]), text)
        v_hat.square().mean().backward()
        found.append((v_hat.detach(), [p.grad for p in lora_parameters(model).values()]))
    (plain, gradients), (folded, ours) = found
    torch.testing.assert_close(folded, plain, rtol=1e-5, atol=1e-6)
    for gradient, other in zip(ours, gradients, strict=True):
        assert (gradient - other).norm() <= 1e-5 * other.norm()
