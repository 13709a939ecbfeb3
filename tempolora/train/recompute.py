"""Checkpointing of our own for weights that come and go: nothing lasts from forward to backward
but each part's input.

A part is a block or a third of one (`tempolora.model.parts`). Its forward runs without a gradient;
its backward fetches weights and input, runs it again with one and goes back through that at once,
so that no graph ever refers to weights that have left. What stands inside a part may be compiled.
Inputs stay on the GPU, or go to pinned host memory and come back one part ahead of their use.

Memory of the A14B at 49x576x1024 (29,952 tokens, bf16, rank 16 on self-attention), counted in
tensors (tokens, 5120) of 0.29 GiB while self-attention, the largest third, goes backward:

    its input, q and k before their norm, q, k, v, the output of attention    7
    incoming gradient, that of attention's output, of q, k, v                 5
    attention's own float32 sums                                              2
    the next part's input                                                     1
    together                                                                 15   4.3 GiB
    three slots of 0.26 GiB for thirds of blocks                                  0.8 GiB
    weights outside the matrices of the blocks                                    0.5 GiB
    adapters, their gradients and optimizer states                                0.4 GiB
    in all                                                                        6.0 GiB

The MLP: its input and gradients 4, of 2.7 each the hidden layer before and after its activation and
the gradients of both: 15 as well. A whole block at a time needs about 24 and six slots: 9.6 GiB.
Measured on an H200: 6.1 GiB allocated, 7.2 reserved under a cap of 7.3 (docs/performance.md).
"""

import weakref
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from tempolora.model.offload import HostMemory, Lane, StreamedWeights, as_bytes, beside
from tempolora.model.parts import THIRDS, Part, thirds_of, whole

Resident = Callable[[int, int], AbstractContextManager]
"""Makes the weights of a part usable, given its number and that of the part that follows."""


class KeptInputs:
    """Inputs of parts in host memory until their backward; buffers are used again."""

    def __init__(self, device: torch.device, lanes: tuple[Lane, Lane] | None = None) -> None:
        self.device = device
        self.out, self.back = lanes or (Lane(device), Lane(device))
        self._memory = HostMemory(device)
        self._free: dict[int, list[tuple[list[Tensor], Any]]] = {}
        self._stack: list[weakref.ref[KeptInput]] = []

    @property
    def host_bytes(self) -> int:
        """Host memory that is held."""
        return self._memory.taken

    def keep(self, x: Tensor) -> "KeptInput":
        """Begin to copy x to the host."""
        kept = KeptInput(self, x)
        self._stack.append(weakref.ref(kept))
        return kept

    def prefetch(self, since: "KeptInput") -> None:
        """Begin to fetch what was kept before `since`: the backward pass takes it next."""
        while self._stack and self._stack.pop()() is not since:
            pass
        while self._stack and self._stack[-1]() is None:
            self._stack.pop()  # its graph was dropped
        if self._stack:
            self._stack[-1]().fetch()

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
    """x -> run(x) of one part, with no graph inside. No randomness and no autocast: Wan has none.

    trigger: requires a gradient, as the first part's x does not. pool: None keeps x on the device.
    """

    @staticmethod
    def forward(ctx, x, trigger, run, number, resident, pool):
        with resident(number, number + 1):
            out = run(x.detach())  # one compiled graph, whether x has a gradient or not
        if pool is None:
            ctx.save_for_backward(x)
        else:
            ctx.kept = pool.keep(x)
        ctx.run, ctx.number, ctx.resident, ctx.pool = run, number, resident, pool
        return out

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, grad):
        if ctx.pool is not None:
            ctx.kept.fetch()
            ctx.pool.prefetch(since=ctx.kept)
        with torch.enable_grad(), ctx.resident(ctx.number, ctx.number - 1):
            (x,) = ctx.saved_tensors if ctx.pool is None else (ctx.kept.take(),)
            # Always with a gradient to x: one compiled graph then serves the first block too.
            x = x.detach().requires_grad_()
            out = ctx.run(x)
            edge = torch.autograd.graph.get_gradient_edge(out)
            del out  # its memory is not needed to go back
            torch.autograd.backward(edge, grad)
        return x.grad, None, None, None, None, None


def recompute_blocks(
    transformer: nn.Module, device: torch.device, *, offload: bool, compiled: bool
) -> None:
    """Put checkpointing into every block, for weights on the device or `transformer.streamed`.

    offload: by thirds of a block, inputs in host memory; else by block, inputs on the device.
    compiled: the parts' functions are compiled, each once for all blocks.
    """
    weights: StreamedWeights | None = getattr(transformer, "streamed", None)
    parts = THIRDS if offload else (whole,)
    pool = KeptInputs(device) if offload else None
    transformer.kept_inputs = pool
    if weights is None:
        resident: Resident = lambda number, then: nullcontext()  # noqa: E731
    else:
        # offload: the third in use, the next one, the one just left; else two blocks
        weights.slots = 3 if offload else 2 * len(THIRDS)
        resident = partial(_resident, weights, len(THIRDS) // len(parts))
    runs = [torch.compile(part) if compiled else part for part in parts]
    for n, block in enumerate(transformer.blocks):
        numbered = list(enumerate(runs, start=len(runs) * n))
        last = len(runs) * len(transformer.blocks) - 1
        block.forward = _forward(block, numbered, last, resident, pool)


def _resident(
    weights: StreamedWeights, units: int, number: int, then: int
) -> AbstractContextManager:
    """units: how many of `weights` a part needs. A part that is none of the model's needs none."""

    def of(part: int) -> range:
        return range(max(part, 0) * units, min((part + 1) * units, len(weights)))

    return weights.resident(of(number), of(then))


def _forward(
    block: nn.Module,
    runs: Sequence[tuple[int, Part]],
    last: int,
    resident: Resident,
    pool: KeptInputs | None,
) -> Callable[..., Tensor]:
    """A block's forward through its numbered parts; last: the number of the model's last part."""
    thirds = thirds_of(block)
    share = len(thirds) // len(runs)
    trained = [
        any(
            p.requires_grad
            for third in thirds[share * k : share * (k + 1)]
            for p in third.parameters()
        )
        for k in range(len(runs))
    ]
    trigger = torch.empty(0, requires_grad=True)

    def forward(x_BLD: Tensor, *rest: Any) -> Tensor:
        assert not any(isinstance(t, Tensor) and t.requires_grad for t in rest)
        for (number, part), adapted in zip(runs, trained, strict=True):
            if torch.is_grad_enabled() and (x_BLD.requires_grad or adapted):
                run = partial(_call, part, block, rest)
                x_BLD = _Recomputed.apply(x_BLD, trigger, run, number, resident, pool)
            else:  # no gradient work below the first adapter
                following = 0 if number == last else number + 1
                with torch.no_grad(), resident(number, following):
                    x_BLD = part(block, x_BLD, *rest)
        return x_BLD

    return forward


def _call(part: Part, block: nn.Module, rest: Sequence[Any], x_BLD: Tensor) -> Tensor:
    return part(block, x_BLD, *rest)
