"""A LoRA on any chosen rows of each attention head: the controls of the time rows.

Shapes: D width, R rank, K heads x chosen rows.
"""

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from tempolora.model.lora import ADAPTER, AdapterLinear, RowLora
from tempolora.model.targets import time_channels

STREAM = 7  # of random numbers


class RowsOfB(AdapterLinear):
    """B (D, R) of which only some rows are stored, the others being zero."""

    def __init__(self, weight_KR: Tensor, row_K: Tensor, width: int) -> None:
        super().__init__(weight_KR)
        self.width = width
        self.register_buffer("row_K", row_K, persistent=False)

    def full(self) -> Tensor:
        """B with its zeros, (D, R)."""
        zeros_DR = self.weight.new_zeros(self.width, self.weight.shape[1])
        return zeros_DR.index_copy(0, self.row_K, self.weight)

    def forward(self, x: Tensor) -> Tensor:
        return F.linear(x, self.full().to(x.dtype))


def chosen_rows(kind: str, count: int, head_dim: int, seed: int, block: int) -> list[int]:
    """`count` rows of a head: "random", drawn for each block, or "spatial".

    Spatial ones are the first, which RoPE turns most, of the channels of height and of width.
    """
    if kind == "random":
        drawn = np.random.default_rng([seed, STREAM, block]).choice(head_dim, count, replace=False)
        return sorted(drawn.tolist())
    assert kind == "spatial", kind
    height = time_channels(head_dim)
    width = height + (head_dim - height) // 2
    return [start + n for start in (height, width) for n in range(count // 2)]


def move_rows(transformer: nn.Module, kind: str, seed: int) -> None:
    """Let the adapters that `add_lora` limited to the first rows of each head write other ones."""
    heads, head_dim = (
        transformer.config.num_attention_heads,
        transformer.config.attention_head_dim,
    )
    for name, layer in transformer.named_modules():
        if not isinstance(layer, RowLora):
            continue
        weight = layer.lora_B[ADAPTER].weight.detach()
        rows = chosen_rows(kind, len(weight) // heads, head_dim, seed, int(name.split(".")[1]))
        row_K = torch.tensor([head * head_dim + row for head in range(heads) for row in rows])
        layer.lora_B[ADAPTER] = RowsOfB(weight, row_K.to(weight.device), layer.out_features)
