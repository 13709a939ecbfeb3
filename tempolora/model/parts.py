"""A Wan block as three functions in a row, so that less than a block can be held at a time.

    x -> self_attention -> cross_attention -> feed_forward

Each is `(block, x_BLD, text_BLD, temb, rope) -> x_BLD` and together they are the block's own
forward, line for line (diffusers `transformer_wan.py: WanTransformerBlock.forward`).

Shapes: B batch, L token, D width. temb: (B, 6, D), or (B, L, 6, D) with a time for each token.
"""

from collections.abc import Callable
from typing import Any

from torch import Tensor, nn

Part = Callable[..., Tensor]


def self_attention(
    block: nn.Module, x_BLD: Tensor, text_BLD: Tensor, temb: Tensor, rope: Any
) -> Tensor:
    """x plus gated self-attention of the modulated norm of x."""
    shift, scale, gate = _modulation(block, temb)[:3]
    normed = (block.norm1(x_BLD.float()) * (1 + scale) + shift).type_as(x_BLD)
    return (x_BLD.float() + block.attn1(normed, None, None, rope) * gate).type_as(x_BLD)


def cross_attention(
    block: nn.Module, x_BLD: Tensor, text_BLD: Tensor, temb: Tensor, rope: Any
) -> Tensor:
    """x plus attention of its norm to the text."""
    normed = block.norm2(x_BLD.float()).type_as(x_BLD)
    return x_BLD + block.attn2(normed, text_BLD, None, None)


def feed_forward(
    block: nn.Module, x_BLD: Tensor, text_BLD: Tensor, temb: Tensor, rope: Any
) -> Tensor:
    """x plus the gated MLP of the modulated norm of x."""
    shift, scale, gate = _modulation(block, temb)[3:]
    normed = (block.norm3(x_BLD.float()) * (1 + scale) + shift).type_as(x_BLD)
    return (x_BLD.float() + block.ffn(normed).float() * gate).type_as(x_BLD)


THIRDS: tuple[Part, ...] = (self_attention, cross_attention, feed_forward)


def whole(block: nn.Module, x_BLD: Tensor, text_BLD: Tensor, temb: Tensor, rope: Any) -> Tensor:
    """All of THIRDS, one after the other."""
    for part in THIRDS:
        x_BLD = part(block, x_BLD, text_BLD, temb, rope)
    return x_BLD


def thirds_of(block: nn.Module) -> tuple[nn.Module, nn.Module, nn.Module]:
    """The module that holds the matrices of each of THIRDS."""
    return block.attn1, block.attn2, block.ffn


def _modulation(block: nn.Module, temb: Tensor) -> tuple[Tensor, ...]:
    """(shift, scale, gate) of self-attention and of the MLP, float32, to be broadcast over x."""
    if temb.ndim == 4:
        return (block.scale_shift_table.unsqueeze(0) + temb.float()).unbind(2)
    return (block.scale_shift_table + temb.float()).chunk(6, dim=1)
