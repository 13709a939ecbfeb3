"""Attention whose backward pass repeats no forward pass, though little of it lasts until then.

The backward pass takes query, key and value, the output and a number for each of its rows. The
first three follow from a block's input by matrix products and are computed again. The output is not
had so cheaply: 2 L products a number, where a product over the model's width D takes D. It and the
numbers are kept, by whoever calls. Hooks take apart what autograd saves, so that no kernel is named
here: it is the one that torch chose.

Shapes: B batch, N head, L token, E channel of a head.
"""

from collections.abc import Callable, Sequence

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.autograd.graph import get_gradient_edge, saved_tensors_hooks

from tempolora.model.parts import attend

SMALL = 64  # bytes; what is smaller, as the state of a random generator, stays in the graph


class Attended:
    """One attention between its forward and its backward pass, with none of its tensors."""

    def __init__(self, given_BNLE: Sequence[Tensor]) -> None:
        """given: query, key, value; no gradient goes to them."""
        seen, self._back = list(given_BNLE), None

        def pack(x: Tensor) -> Tensor | int:
            if x.nbytes <= SMALL:
                return x
            return _position(seen, x)

        def unpack(x: Tensor | int) -> Tensor:
            return self._back[x] if isinstance(x, int) else x

        with torch.enable_grad(), saved_tensors_hooks(pack, unpack):
            fresh = _Fresh.apply(torch.empty(0, requires_grad=True), *given_BNLE)
            out = attend(*fresh)
        self._edge, self._given = get_gradient_edge(out), [get_gradient_edge(t) for t in fresh]
        self._at = _position(seen, out.detach())
        self.kept = seen[len(given_BNLE) :]
        """What the backward pass must have again, in this order. The caller moves it elsewhere."""
        seen.clear()  # the graph holds its hooks, and by `pack` all that is in here

    def out_of(self, kept: Sequence[Tensor]) -> Tensor:
        """The output (B, N, L, E), which is among them."""
        return kept[self._at - len(self._given)]

    def back_from(
        self, gradient_BNLE: Tensor, kept: Sequence[Tensor]
    ) -> Callable[[Tensor, Tensor, Tensor], Tensor]:
        """A function of query, key and value as they were, whose result, (), stands for the output:
        a backward pass from it is one from the output with this gradient. Once. Nothing of what is
        given here lasts longer than attention's own backward pass, if the caller holds none."""
        parcel = [gradient_BNLE, *kept]
        return lambda *given_BNLE: _Replayed.apply(self, parcel, *given_BNLE)

    def _backward(
        self, gradient_BNLE: Tensor, given_BNLE: Sequence[Tensor], kept: Sequence[Tensor]
    ) -> tuple[Tensor, ...]:
        """Gradients to query, key and value."""
        self._back = [*given_BNLE, *kept]
        try:
            return torch.autograd.grad(self._edge, self._given, gradient_BNLE)
        finally:
            self._back = None


class _Replayed(torch.autograd.Function):
    """Attention's backward pass in a graph of query, key and value that were computed again, whose
    gradients are then gone as soon as they are used."""

    @staticmethod
    def forward(ctx, attended, parcel, *given):
        ctx.attended, ctx.parcel = attended, parcel
        ctx.save_for_backward(*given)
        return given[0].new_zeros(())

    @staticmethod
    @once_differentiable
    def backward(ctx, _):
        gradient, *kept = ctx.parcel
        ctx.parcel.clear()
        return None, None, *ctx.attended._backward(gradient, ctx.saved_tensors, kept)


class _Fresh(torch.autograd.Function):
    """The same tensors as outputs of a graph that does not hold them, as one of leaves would."""

    @staticmethod
    def forward(ctx, trigger, *given):
        return tuple(t.view_as(t) for t in given)


def _position(seen: list[Tensor], x: Tensor) -> int:
    """Which of `seen` is x; it is put there where none is."""
    for position, known in enumerate(seen):
        if known.data_ptr() == x.data_ptr() and _lies(known) == _lies(x):
            return position
    seen.append(x)
    return len(seen) - 1


def _lies(x: Tensor) -> list[tuple[int, int]]:
    """Sizes and strides, but for those of single rows, which a kernel may call as it likes."""
    return [pair for pair in zip(x.shape, x.stride(), strict=True) if pair[0] > 1]
