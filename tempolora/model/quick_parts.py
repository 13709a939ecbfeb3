"""Three parts of a Wan block in forms that take a GPU less time. The mathematics is the same.

Attention to the text: its keys and values come from frozen layers, and their gradients, which the
libraries' backward passes spend most of their time on, are asked for by nobody. Here only the
queries have one, found from queries, keys, values and the incoming gradient alone; so that nothing
of the forward pass has to be kept or repeated for it.

GELU: x * sigmoid(2 u) is x / 2 * (1 + tanh u), and compiles to an exponential and a division, where
tanh becomes a slow function.

The rotary embedding: a product with each channel's neighbour compiles to one kernel, and writing
even and odd channels in turn to four.

Shapes: B batch, N head, L query, S key, E channel of a head, D = N E.
"""

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn

WIDTHS = (16, 32, 64, 128)  # channels of a head that the kernel takes
_ROOT = 2 * math.sqrt(2 / math.pi)


def use_quick_parts(transformer: nn.Module, *, compiled: bool) -> None:
    """Put them into every block; only attention to the text where blocks are not compiled, as the
    others need a compiler to be quick."""
    for block in transformer.blocks:
        block.attn2.set_processor(TextAttention())
        if compiled:
            block.attn1.set_processor(SelfAttention())
            block.ffn.net[0].gelu = gelu_tanh


def gelu_tanh(x: Tensor) -> Tensor:
    """F.gelu(x, approximate="tanh"), in float32 inside."""
    h = x.float()
    return (h * torch.sigmoid(_ROOT * (h + 0.044715 * h * h * h))).to(x.dtype)


def rotate(x_BLNE: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Each pair of channels (a, b) as (a cos - b sin, a sin + b cos), in float32 inside.

    cos, sin: (1, L, 1, E), every value twice, as diffusers' `WanRotaryPosEmbed` gives them.
    """
    neighbour_BLNE = x_BLNE.unflatten(-1, (-1, 2)).flip(-1).flatten(-2)
    sign_E = torch.arange(x_BLNE.shape[-1], device=x_BLNE.device) % 2 * 2 - 1
    return (x_BLNE * cos + neighbour_BLNE * (sin * sign_E)).type_as(x_BLNE)


class SelfAttention:
    """Takes the place of diffusers' `WanAttnProcessor` in self-attention, and follows it line for
    line."""

    def __call__(
        self,
        attn: nn.Module,
        x_BLD: Tensor,
        text_BLD: None = None,
        mask: None = None,
        rope: tuple[Tensor, Tensor] | None = None,
    ) -> Tensor:
        """As diffusers' processors are called."""
        query, key = self.query(attn, x_BLD, rope), self.key(attn, x_BLD, rope)
        value = self.value(attn, x_BLD)
        return self.finish(attn, F.scaled_dot_product_attention(query, key, value))

    def query(self, attn: nn.Module, x_BLD: Tensor, rope: tuple[Tensor, Tensor]) -> Tensor:
        """(B, N, L, E)."""
        query = attn.norm_q(attn.to_q(x_BLD)).unflatten(2, (attn.heads, -1))
        return self.heads(rotate(query, *rope))

    def key(self, attn: nn.Module, x_BLD: Tensor, rope: tuple[Tensor, Tensor]) -> Tensor:
        """(B, N, L, E)."""
        key = attn.norm_k(attn.to_k(x_BLD)).unflatten(2, (attn.heads, -1))
        return self.heads(rotate(key, *rope))

    def value(self, attn: nn.Module, x_BLD: Tensor) -> Tensor:
        """(B, N, L, E)."""
        return self.heads(attn.to_v(x_BLD).unflatten(2, (attn.heads, -1)))

    def finish(self, attn: nn.Module, out_BNLE: Tensor) -> Tensor:
        """What attention came to, through the last linear layer, (B, L, D)."""
        return attn.to_out[1](attn.to_out[0](self.tokens(out_BNLE)))

    def heads(self, x_BLNE: Tensor) -> Tensor:
        """(B, N, L, E), as attention takes it."""
        return x_BLNE.transpose(1, 2)

    def tokens(self, out_BNLE: Tensor) -> Tensor:
        """(B, L, D) of what it gives."""
        return out_BNLE.transpose(1, 2).flatten(2)


class TextAttention:
    """The same for attention to the text."""

    def __call__(
        self, attn: nn.Module, x_BLD: Tensor, text_BSD: Tensor, mask: None = None, rope: None = None
    ) -> Tensor:
        """As diffusers' processors are called."""
        heads = (attn.heads, -1)
        query = attn.norm_q(attn.to_q(x_BLD)).unflatten(2, heads).transpose(1, 2)
        key = attn.norm_k(attn.to_k(text_BSD)).unflatten(2, heads).transpose(1, 2)
        value = attn.to_v(text_BSD).unflatten(2, heads).transpose(1, 2)
        out_BLD = attend(query, key, value).transpose(1, 2).flatten(2).type_as(query)
        return attn.to_out[1](attn.to_out[0](out_BLD))


def attend(query_BNLE: Tensor, key_BNSE: Tensor, value_BNSE: Tensor) -> Tensor:
    """softmax(q k^T / sqrt(E)) v, (B, N, L, E)."""
    fixed = not (key_BNSE.requires_grad or value_BNSE.requires_grad)
    half = query_BNLE.dtype in (torch.bfloat16, torch.float16)
    if fixed and half and query_BNLE.shape[-1] in WIDTHS:
        return text_attention(query_BNLE, key_BNSE, value_BNSE)
    return F.scaled_dot_product_attention(query_BNLE, key_BNSE, value_BNSE)


# An operator of our own and no autograd.Function: of one torch 2.11 keeps a tensor in each compiled
# block, whatever checkpointing says.
@torch.library.custom_op("tempolora::text_attention", mutates_args=())
def text_attention(query_BNLE: Tensor, key_BNSE: Tensor, value_BNSE: Tensor) -> Tensor:
    """Attention with a gradient for the queries alone, (B, N, L, E) as they lie in memory."""
    out_BNLE = F.scaled_dot_product_attention(query_BNLE, key_BNSE, value_BNSE)
    like = torch.empty_like(query_BNLE)
    return out_BNLE if out_BNLE.stride() == like.stride() else like.copy_(out_BNLE)


@text_attention.register_fake
def _(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
    return torch.empty_like(query)


@torch.library.custom_op("tempolora::query_gradient", mutates_args=(), device_types="cuda")
def query_gradient(
    gradient_BNLE: Tensor, query_BNLE: Tensor, key_BNSE: Tensor, value_BNSE: Tensor
) -> Tensor:
    """Gradient of attention to its queries, (B, N, L, E) as they lie in memory."""
    from tempolora.model.query_gradient import launch

    return launch(gradient_BNLE, query_BNLE, key_BNSE, value_BNSE)


@query_gradient.register_kernel("cpu")
def _on_cpu(gradient: Tensor, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
    g, q, k, v = (x.float() for x in (gradient, query, key, value))
    scale = query.shape[-1] ** -0.5
    p_BNLS = (q @ k.mT * scale).softmax(dim=-1)
    dp_BNLS = g @ v.mT
    ds_BNLS = p_BNLS * (dp_BNLS - (p_BNLS * dp_BNLS).sum(dim=-1, keepdim=True))
    return torch.empty_like(query).copy_(ds_BNLS @ k * scale)


@query_gradient.register_fake
def _(gradient: Tensor, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
    return torch.empty_like(query)


def _keep(ctx, inputs: tuple[Tensor, ...], output: Tensor) -> None:
    ctx.save_for_backward(*inputs)


def _to_queries(ctx, gradient: Tensor) -> tuple[Tensor, None, None]:
    return query_gradient(gradient, *ctx.saved_tensors), None, None


text_attention.register_autograd(_to_queries, setup_context=_keep)
