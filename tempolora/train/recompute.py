"""Checkpointing of our own for weights that come and go: little lasts from forward to backward.

A block is recomputed as a whole, from its input on the GPU, or by thirds (`tempolora.model.parts`):

    x -> query, key, value, attend -> out        x, out -> mix -> y        y -> feed_forward

x, out and y then go to pinned host memory and come back one third ahead of their use. A forward
runs without a gradient; a backward fetches weights and inputs, runs it again with one and goes back
through that at once, so that no graph ever refers to weights that have left. Attention alone, the
dearest of all by far, is not run again (`tempolora.train.attended`). Parts may be compiled.

Memory of the A14B at 49x576x1024 (29,952 tokens, bf16), in tensors (tokens, 5120) of 0.29 GiB,
while attention goes backward:

    x, its gradient so far, the incoming gradient              3
    out and its gradient                                       2
    the norm of x, query and key before theirs                 3
    query, key, value and their gradients                      6
    attention's own float32 sums                               2
    y of the block before, being fetched                       1
    together                                                  17   4.9 GiB
    three slots of 0.26 GiB for thirds of blocks                   0.8 GiB
    weights outside the matrices of the blocks, the rest           0.6 GiB
    in all                                                         6.3 GiB

An H200 had 17.1 of them, 9.1 while mix and 10.4 while the MLP went backward; 6.4 GiB allocated and
7.3 reserved under a cap of 7.3 (docs/performance.md). One compiled graph for query, key and value
would take four more.
"""

import weakref
from collections.abc import Callable, Iterable, Sequence
from contextlib import AbstractContextManager, nullcontext
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.graph import get_gradient_edge

from tempolora.model import parts
from tempolora.model.offload import HostMemory, Lane, StreamedWeights, as_bytes, beside
from tempolora.model.parts import Part, attend, in_parts, thirds_of
from tempolora.train.attended import Attended

THIRDS = 3  # of a block
Resident = Callable[[Iterable[int], Iterable[int]], AbstractContextManager]
"""Makes thirds of blocks usable, by their numbers in the model, and fetches those that follow."""


class KeptInputs:
    """Inputs of parts in host memory until their backward; buffers are used again."""

    def __init__(self, device: torch.device, lanes: tuple[Lane, Lane] | None = None) -> None:
        self.device = device
        self.out, self.back = lanes or (Lane(device), Lane(device))
        self._memory = HostMemory(device)
        self._free: dict[int, list[tuple[list[Tensor], Any]]] = {}
        self._stack: list[list[weakref.ref[KeptInput]]] = []

    @property
    def host_bytes(self) -> int:
        """Host memory that is held."""
        return self._memory.taken

    def keep(self, *xs: Tensor) -> "list[KeptInput]":
        """Begin to copy them to the host. They are taken together."""
        kept = [KeptInput(self, x) for x in xs]
        self._stack.append([weakref.ref(one) for one in kept])
        return kept

    def take_back(self, kept: "list[KeptInput]") -> list[Tensor]:
        """The tensors, back on the device, once. Those that were kept before them, which the
        backward pass takes next, begin to be fetched."""
        for one in kept:
            one.fetch()
        while self._stack and self._stack.pop()[0]() is not kept[0]:
            pass
        while self._stack and self._stack[-1][0]() is None:
            self._stack.pop()  # its graph was dropped
        if self._stack:
            for one in self._stack[-1]:
                one().fetch()
        return [one.take() for one in kept]

    def take(self, size: int) -> tuple[list[Tensor], Any]:
        """A host buffer and the event from which it may be written."""
        free = self._free.get(size)
        return free.pop() if free else (self._memory.take(size), None)

    def give(self, spans: list[Tensor], event: Any) -> None:
        """Take a buffer back, which may be written after `event`."""
        self._free.setdefault(sum(map(len, spans)), []).append((spans, event))


class KeptInput:
    """One tensor in host memory."""

    def __init__(self, pool: KeptInputs, x: Tensor) -> None:
        if not is_dense(x):
            x = x.contiguous()
        self._pool, self._like = pool, (x.shape, x.stride(), x.dtype)
        self._spans, written_from = pool.take(x.numel() * x.element_size())
        pairs = beside(self._spans, _memory(x))
        self._stored = pool.out.copy(pairs, after=[pool.out.now(), written_from])
        self._x: Tensor | None = None
        self._ready: Any = None

    def fetch(self) -> None:
        """Begin to copy it back, unless that was begun or it was taken."""
        if self._x is not None or self._spans is None:
            return
        shape, stride, dtype = self._like
        x = torch.empty_strided(shape, stride, dtype=dtype, device=self._pool.device)
        pairs = [(part, span) for span, part in beside(self._spans, _memory(x))]
        back = self._pool.back
        # x's memory may still be read by work issued before
        self._ready = back.copy(pairs, after=[back.now(), self._stored])
        self._x = x

    def take(self) -> Tensor:
        """The tensor, back on the device; it can be taken once."""
        assert self._spans is not None, "backward a second time through a graph that was freed"
        self.fetch()
        self._pool.back.wait(self._ready)
        self._pool.give(self._spans, self._ready)
        x, self._x, self._spans = self._x, None, None
        return x

    def __del__(self) -> None:
        if self._spans is not None:  # never taken: its graph was dropped
            if self._x is not None:
                self._pool.back.wait(self._ready)
            self._pool.give(self._spans, self._ready or self._stored)


def is_dense(x: Tensor) -> bool:
    """Whether x's elements fill its memory, each a place of its own, in whatever order."""
    expected = 1
    for stride, size in sorted(zip(x.stride(), x.shape, strict=True)):
        if size != 1 and stride != expected:
            return False
        expected *= size
    return True


def _memory(x: Tensor) -> Tensor:
    """A dense tensor's elements as they lie in memory, as uint8 (N,)."""
    return as_bytes(x.as_strided((x.numel(),), (1,)))


class _Recomputed(torch.autograd.Function):
    """x -> run(x), of some thirds of a block, with no graph inside.

    No randomness and no autocast: Wan has none. trigger: requires a gradient, as the first block's
    x does not. pool: None keeps x on the device.
    """

    @staticmethod
    def forward(ctx, x, trigger, run, thirds, resident, pool):
        with resident(thirds, _after(thirds)):
            out = run(x.detach())  # one compiled graph, whether x has a gradient or not
        if pool is None:
            ctx.save_for_backward(x)
        else:
            ctx.kept = pool.keep(x)
        ctx.run, ctx.thirds, ctx.resident, ctx.pool = run, thirds, resident, pool
        return out

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, gradient):
        (x,) = ctx.saved_tensors if ctx.pool is None else ctx.pool.take_back(ctx.kept)
        with torch.enable_grad(), ctx.resident(ctx.thirds, _before(ctx.thirds)):
            # Always with a gradient to x: one compiled graph then serves the first block too.
            x = _leaf(x)
            edge = get_gradient_edge(ctx.run(x))  # what comes out is not needed to go back
            torch.autograd.backward(edge, gradient)
        return x.grad, *[None] * 5


class _AttentionRecomputed(torch.autograd.Function):
    """x -> mix(x, attention of x's norm), the first two thirds of a block, in the same way, but for
    attention's forward pass: what it came to is kept beside x, and it is not repeated."""

    @staticmethod
    def forward(ctx, x, trigger, normalise, given, mix, first, resident, pool):
        with resident([first], [first + 1]):
            normed = normalise(x.detach())
            attended = Attended([part(normed) for part in given])
            del normed
        with resident([first + 1], [first + 2]):
            out = mix(x.detach(), attended.out_of(attended.kept))
        ctx.kept, attended.kept = pool.keep(x, *attended.kept), None
        ctx.normalise, ctx.given, ctx.mix = normalise, given, mix
        ctx.attended, ctx.first, ctx.resident, ctx.pool = attended, first, resident, pool
        return out

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, gradient):
        x, *kept = ctx.pool.take_back(ctx.kept)
        with torch.enable_grad(), ctx.resident([ctx.first + 1], [ctx.first]):
            mixed, out = _leaf(x), _leaf(ctx.attended.out_of(kept))
            edge = get_gradient_edge(ctx.mix(mixed, out))
            torch.autograd.backward(edge, gradient)
        with torch.enable_grad(), ctx.resident([ctx.first], [ctx.first - 1]):
            x = _leaf(x)
            x.grad, back = mixed.grad, ctx.attended.back_from(out.grad, kept)
            del mixed, out, kept
            normed = ctx.normalise(x)
            edge = get_gradient_edge(back(*(part(normed) for part in ctx.given)))
            del normed
            torch.autograd.backward(edge)
        return x.grad, *[None] * 7


def _leaf(x: Tensor) -> Tensor:
    return x.detach().requires_grad_()


def _after(thirds: range) -> range:
    return range(thirds.stop, thirds.stop + len(thirds))


def _before(thirds: range) -> range:
    return range(thirds.start - len(thirds), thirds.start)


def recompute_blocks(
    transformer: nn.Module, device: torch.device, *, offload: bool, compiled: bool
) -> None:
    """Put checkpointing into every block, for weights on the device or `transformer.streamed`.

    offload: by thirds of a block, what they keep in host memory; else by block, inputs on the
    device. compiled: the parts' functions are compiled, each once for all blocks.
    """
    weights: StreamedWeights | None = getattr(transformer, "streamed", None)
    pool = KeptInputs(device) if offload else None
    transformer.kept_inputs = pool
    if weights is None:
        resident: Resident = lambda thirds, then: nullcontext()  # noqa: E731
    else:
        # offload: the third in use, the next one, the one just left; else two blocks
        weights.slots = THIRDS if offload else 2 * THIRDS
        resident = partial(_resident, weights, THIRDS * len(transformer.blocks))
    by_thirds = (parts.normalise, *parts.GIVEN, parts.mix, parts.feed_forward)
    functions = by_thirds if offload else (parts.whole,)
    functions = [torch.compile(each) if compiled else each for each in functions]
    for n, block in enumerate(transformer.blocks):
        in_parts(block)
        thirds = range(THIRDS * n, THIRDS * (n + 1))
        if offload:
            block.forward = _by_thirds(block, functions, thirds, resident, pool)
        else:
            block.forward = _at_once(block, functions[0], thirds, resident)


def _resident(
    weights: StreamedWeights, count: int, thirds: Iterable[int], then: Iterable[int]
) -> AbstractContextManager:
    """then: without those that are none of the model's."""
    return weights.resident(list(thirds), [third for third in then if 0 <= third < count])


def _at_once(
    block: nn.Module, whole: Part, thirds: range, resident: Resident
) -> Callable[..., Tensor]:
    """A block's forward, all of it recomputed in one go, from its input on the device."""
    adapted, trigger = _trained(block), torch.empty(0, requires_grad=True)

    def forward(x_BLD: Tensor, *rest: Any) -> Tensor:
        run = _bound(whole, block, rest)
        if torch.is_grad_enabled() and (x_BLD.requires_grad or adapted):
            return _Recomputed.apply(x_BLD, trigger, run, thirds, resident, None)
        with torch.no_grad(), resident(thirds, _after(thirds)):
            return run(x_BLD)

    return forward


def _by_thirds(
    block: nn.Module,
    functions: Sequence[Part],
    thirds: range,
    resident: Resident,
    pool: KeptInputs,
) -> Callable[..., Tensor]:
    """A block's forward, by thirds."""
    first, second, third = thirds
    *attention, mlp = map(_trained, thirds_of(block))
    trigger = torch.empty(0, requires_grad=True)

    def forward(x_BLD: Tensor, *rest: Any) -> Tensor:
        normalise, *given, mix, feed_forward = (_bound(each, block, rest) for each in functions)
        grad = torch.is_grad_enabled()
        if grad and (x_BLD.requires_grad or any(attention)):
            x_BLD = _AttentionRecomputed.apply(
                x_BLD, trigger, normalise, given, mix, first, resident, pool
            )
        else:  # no gradient work below the first adapter
            with torch.no_grad():
                with resident([first], [second]):
                    normed = normalise(x_BLD)
                    out_BNLE = attend(*(part(normed) for part in given))
                    del normed
                with resident([second], [third]):
                    x_BLD = mix(x_BLD, out_BNLE)
        if grad and (x_BLD.requires_grad or mlp):
            own = range(third, third + 1)
            return _Recomputed.apply(x_BLD, trigger, feed_forward, own, resident, pool)
        with torch.no_grad(), resident([third], [third + 1]):
            return feed_forward(x_BLD)

    return forward


def _trained(module: nn.Module) -> bool:
    return any(p.requires_grad for p in module.parameters())


def _bound(part: Part, block: nn.Module, rest: Sequence[Any]) -> Part:
    """The part as a function of the tensors that come to it from the part before."""
    assert not any(isinstance(t, Tensor) and t.requires_grad for t in rest)
    return lambda *xs: part(block, *xs, *rest)
