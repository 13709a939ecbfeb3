"""Long clips: several processes share each of them, every one with a part of the picture.

A part is all latent frames of a rectangle. Everything in Wan and in the losses treats a token or a
pixel by itself, but for two: the rotary embedding, which must know where the part lies, and
self-attention, which sees the whole clip. There Ulysses (Jacobs et al. 2023) exchanges tokens for
heads: each process attends with some of the heads to the tokens of all, and exchanges back. So a
process never holds more of a clip than its part: latents, activations and losses are all shared.

The loss is the same on all processes of a group; each has the gradient by way of its own part, and
their sum is the clip's.

Shapes: B batch, C channel, T latent frame, H, W latent height and width, L token of this process,
N head, E channel of a head.
"""

from dataclasses import dataclass

import torch
import torch.distributed as dist
from einops import rearrange
from torch import Tensor, nn

from tempolora.config import Config
from tempolora.model.quick_parts import SelfAttention
from tempolora.rhythm.sharded import mean_of_slices
from tempolora.train.world import World

_exchange_op = torch.ops._c10d_functional.all_to_all_single
_wait_op = torch.ops._c10d_functional.wait_tensor


@dataclass(frozen=True)
class Context:
    """Part `index` of a picture that is cut into rows x columns equal ones; group: who has them."""

    rows: int = 1
    columns: int = 1
    index: int = 0
    group: dist.ProcessGroup | None = None

    @property
    def size(self) -> int:
        """How many processes share a clip."""
        return self.rows * self.columns

    def cut(self, whole: Tensor) -> Tensor:
        """This part of a tensor (..., height, width), a view."""
        row, column = divmod(self.index, self.columns)
        height, width = whole.shape[-2] // self.rows, whole.shape[-1] // self.columns
        return whole[..., row * height :, column * width :][..., :height, :width]

    def mean(self, value: Tensor) -> Tensor:
        """The whole's mean over pixels, from this part's; its gradient here is that of our part."""
        return value if self.size == 1 else mean_of_slices(value, self.group)


WHOLE = Context()


def context_of(cfg: Config, world: World) -> Context:
    """This process's part of the clips that it works on."""
    if world.context == 1:
        return WHOLE
    return Context(*cfg.context_grid, world.rank % world.context, world.context_group)


def share_attention(transformer: nn.Module, context: Context) -> None:
    """Have a transformer see its inputs as this part of larger ones; before it is compiled."""
    transformer.rope.register_forward_pre_hook(_OfTheWhole(context))
    transformer.rope.register_forward_hook(_OfThePart(context))
    for block in transformer.blocks:
        block.attn1.processor = SharedAttention(context)


@dataclass(frozen=True)
class _OfTheWhole:
    """The rotary embedding is asked for the whole picture: it looks at its input's shape alone."""

    context: Context

    def __call__(self, rope: nn.Module, given: tuple[Tensor]) -> tuple[Tensor]:
        *outer, height, width = given[0].shape
        whole = (*outer, height * self.context.rows, width * self.context.columns)
        return (given[0].new_empty(()).expand(whole),)


@dataclass(frozen=True)
class _OfThePart:
    """... and the tokens that are here are taken out."""

    context: Context

    def __call__(
        self, rope: nn.Module, given: tuple[Tensor], found: tuple[Tensor, ...]
    ) -> tuple[Tensor, ...]:
        _, height, width = (
            size // patch for size, patch in zip(given[0].shape[2:], rope.patch_size, strict=True)
        )
        parts = []
        for table in found:
            whole = rearrange(table, "1 (t h w) 1 e -> e t h w", h=height, w=width)
            parts.append(rearrange(self.context.cut(whole), "e t h w -> 1 (t h w) 1 e"))
        return tuple(parts)


class SharedAttention(SelfAttention):
    """Self-attention over the tokens of all processes of a group.

    Not diffusers' own Ulysses: its backward pass computes attention forward once more, and hides it
    from selective checkpointing.
    """

    def __init__(self, context: Context) -> None:
        self._size, self._name = context.size, context.group.group_name

    def heads(self, x_BLNE: Tensor) -> Tensor:
        """All heads of our tokens -> (B, N / size, L * size, E): our heads of all tokens."""
        sent = rearrange(x_BLNE, "b l (p n) e -> (p l) b n e", p=self._size)
        return rearrange(self._exchange(sent), "l b n e -> b n l e")

    def tokens(self, x_BNLE: Tensor) -> Tensor:
        """Our heads of all tokens -> (B, L, D): all heads of our tokens."""
        received = self._exchange(rearrange(x_BNLE, "b n l e -> l b n e"))
        return rearrange(received, "(p l) b n e -> b l (p n e)", p=self._size)

    def _exchange(self, x: Tensor) -> Tensor:
        return _exchange(x, self._size, self._name)


# An operator of our own: the compiler would keep what torch's collectives return for the backward
# pass, whatever checkpointing says.
@torch.library.custom_op("tempolora::exchange", mutates_args=())
def _exchange(x: Tensor, size: int, name: str) -> Tensor:
    """Part p of x, along its first axis, goes to process p. The way back is the same."""
    shares = [x.shape[0] // size] * size
    return _wait_op(_exchange_op(x.contiguous(), shares, shares, name))


@_exchange.register_fake
def _(x: Tensor, size: int, name: str) -> Tensor:
    return torch.empty_like(x, memory_format=torch.contiguous_format)


def _keep_group(ctx, inputs: tuple[Tensor, int, str], output: Tensor) -> None:
    ctx.group = inputs[1:]


def _exchange_back(ctx, gradient: Tensor) -> tuple[Tensor, None, None]:
    return _exchange(gradient, *ctx.group), None, None


_exchange.register_autograd(_exchange_back, setup_context=_keep_group)
