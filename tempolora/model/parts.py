"""A Wan block as functions in a row, so that less than a block can be held at a time.

    x -> normalise -> query, key, value -> attend -> mix -> feed_forward

    normalise          x to self-attention's input; no matrices
    query, key, value  that to each of them
    attend             these to self-attention's output; no weights
    mix                x and that output to x with both attentions added
    feed_forward       x with the MLP added

Together they are the block's own forward, line for line (diffusers `transformer_wan.py:
WanTransformerBlock.forward`). Blocks must have been given `SelfAttention` (`in_parts`).

Shapes: B batch, L token, D width, N head, E channel of a head. temb: (B, 6, D), or (B, L, 6, D)
with a time for each token.
"""

from collections.abc import Callable
from typing import Any

from torch import Tensor, nn
from torch.nn.functional import scaled_dot_product_attention as attend

from tempolora.model.quick_parts import SelfAttention

Part = Callable[..., Any]


def in_parts(block: nn.Module) -> None:
    """Have a block's self-attention come apart."""
    if not isinstance(block.attn1.processor, SelfAttention):
        block.attn1.set_processor(SelfAttention())


def normalise(block: nn.Module, x_BLD: Tensor, text_BLD: Tensor, temb: Tensor, rope: Any) -> Tensor:
    """The modulated norm of x."""
    shift, scale, _ = _modulation(block, temb)[:3]
    return (block.norm1(x_BLD.float()) * (1 + scale) + shift).type_as(x_BLD)


def query(
    block: nn.Module, normed_BLD: Tensor, text_BLD: Tensor, temb: Tensor, rope: Any
) -> Tensor:
    """(B, N, L, E), turned."""
    return block.attn1.processor.query(block.attn1, normed_BLD, rope)


def key(block: nn.Module, normed_BLD: Tensor, text_BLD: Tensor, temb: Tensor, rope: Any) -> Tensor:
    """(B, N, L, E), turned."""
    return block.attn1.processor.key(block.attn1, normed_BLD, rope)


def value(
    block: nn.Module, normed_BLD: Tensor, text_BLD: Tensor, temb: Tensor, rope: Any
) -> Tensor:
    """(B, N, L, E)."""
    return block.attn1.processor.value(block.attn1, normed_BLD)


def mix(
    block: nn.Module, x_BLD: Tensor, out_BNLE: Tensor, text_BLD: Tensor, temb: Tensor, rope: Any
) -> Tensor:
    """x plus gated self-attention, whose output is given, and attention to the text."""
    gate = _modulation(block, temb)[2]
    attended_BLD = block.attn1.processor.finish(block.attn1, out_BNLE)
    x_BLD = (x_BLD.float() + attended_BLD * gate).type_as(x_BLD)
    normed = block.norm2(x_BLD.float()).type_as(x_BLD)
    return x_BLD + block.attn2(normed, text_BLD, None, None)


def feed_forward(
    block: nn.Module, x_BLD: Tensor, text_BLD: Tensor, temb: Tensor, rope: Any
) -> Tensor:
    """x plus the gated MLP of the modulated norm of x."""
    shift, scale, gate = _modulation(block, temb)[3:]
    normed = (block.norm3(x_BLD.float()) * (1 + scale) + shift).type_as(x_BLD)
    return (x_BLD.float() + block.ffn(normed).float() * gate).type_as(x_BLD)


GIVEN = query, key, value  # to attention


def whole(block: nn.Module, x_BLD: Tensor, *rest: Any) -> Tensor:
    """All of them."""
    normed = normalise(block, x_BLD, *rest)
    given = [part(block, normed, *rest) for part in GIVEN]
    x_BLD = mix(block, x_BLD, attend(*given), *rest)
    return feed_forward(block, x_BLD, *rest)


def thirds_of(block: nn.Module) -> tuple[nn.Module, nn.Module, nn.Module]:
    """What holds the matrices of query, key and value, of mix, of feed_forward: block thirds."""
    first, second = block.attn1, block.attn2
    return (
        nn.ModuleList([first.to_q, first.to_k, first.to_v]),
        nn.ModuleList([first.to_out, second]),
        block.ffn,
    )


def _modulation(block: nn.Module, temb: Tensor) -> tuple[Tensor, ...]:
    """(shift, scale, gate) of self-attention and of the MLP, float32, to be broadcast over x."""
    if temb.ndim == 4:
        return (block.scale_shift_table.unsqueeze(0) + temb.float()).unbind(2)
    return (block.scale_shift_table + temb.float()).chunk(6, dim=1)
