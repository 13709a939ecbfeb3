"""Frozen weights in pinned host memory, of which a few units at a time lie on the GPU.

A unit is a module that is used as one: a third of a Wan block, a layer of the text encoder. Its
matrices are packed into host memory; `StreamedWeights.resident` lends it a slot of GPU memory,
while a side stream already fills another slot with the unit that comes next. Vectors (biases,
norms, modulation) and adapters stay on the GPU: they are small.

    with weights.resident([k], then=[k + 1]):
        ... run unit k ...

Between its turns a matrix is a stand-in of the right shape, type and device and of no size, whose
every element is NaN: a use out of turn is seen. On a CPU the same code copies at once.
"""

import math
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from tempolora.model.parts import (
    GIVEN,
    attend,
    feed_forward,
    in_parts,
    mix,
    normalise,
    thirds_of,
)

CHUNK = 2**28  # bytes; torch rounds a pinned allocation up to a power of two, so these are ones
ALIGNED = 256  # bytes; every matrix begins at a multiple, as compiled kernels expect


def as_bytes(tensor: Tensor) -> Tensor:
    """A contiguous tensor's memory as uint8 (N,)."""
    return tensor.reshape(-1).view(torch.uint8)


class Lane:
    """A side stream for copies between host and GPU. Without a GPU it copies at once.

    An event is what a copy or `now` returns; None stands for one that has come to pass.
    """

    def __init__(self, device: torch.device) -> None:
        self._stream = torch.cuda.Stream(device) if device.type == "cuda" else None

    def now(self) -> Any:
        """The event that all work issued so far is done."""
        if self._stream is None:
            return None
        return torch.cuda.current_stream(self._stream.device).record_event()

    def copy(self, pairs: Iterable[tuple[Tensor, Tensor]], after: Sequence[Any]) -> Any:
        """Copy each source into its destination, (destination, source), once `after` has come.

        The event that it is done. Sources and destinations may be dropped before that, but for a
        destination on the GPU, which must be waited for.
        """
        if self._stream is None:
            for destination, source in pairs:
                destination.copy_(source)
            return None
        for event in after:
            if event is not None:
                self._stream.wait_event(event)
        with torch.cuda.stream(self._stream):
            for destination, source in pairs:
                destination.copy_(source, non_blocking=True)
                if source.is_cuda:
                    source.record_stream(self._stream)
        return self._stream.record_event()

    def wait(self, event: Any) -> None:
        """Let work issued from now on begin after `event`."""
        if event is not None:
            torch.cuda.current_stream(self._stream.device).wait_event(event)

    def lend(self, buffer: Tensor) -> None:
        """Keep the memory of `buffer`, once it is dropped, until the copies into it are done."""
        if self._stream is not None:
            buffer.record_stream(self._stream)


class HostMemory:
    """Page-locked memory in pieces of CHUNK bytes that are cut up and never given back singly."""

    def __init__(self, device: torch.device) -> None:
        self._pinned = device.type == "cuda"
        self._rest: Tensor | None = None
        self._coming: deque[Future[Tensor]] = deque()
        self.taken = 0
        """Bytes, whole pieces."""

    def expect(self, size: int) -> None:
        """Take `size` bytes in the background: to lock pages lasts as long as to read a disk."""
        pool = ThreadPoolExecutor(1, thread_name_prefix="pin")
        self._coming.extend(pool.submit(self._piece) for _ in range(math.ceil(size / CHUNK)))
        pool.shutdown(wait=False)

    def _piece(self) -> Tensor:
        return torch.empty(CHUNK, dtype=torch.uint8, pin_memory=self._pinned)

    def take(self, size: int) -> list[Tensor]:
        """`size` bytes as uint8 tensors in a row."""
        spans = []
        while size:
            if self._rest is None or not len(self._rest):
                self._rest = self._coming.popleft().result() if self._coming else self._piece()
                self.taken += CHUNK
            spans.append(self._rest[:size])
            self._rest = self._rest[size:]
            size -= len(spans[-1])
        return spans


def beside(spans: Sequence[Tensor], whole: Tensor) -> list[tuple[Tensor, Tensor]]:
    """Each span with the bytes of uint8 `whole` that belong to it."""
    lengths = [len(span) for span in spans]
    return list(zip(spans, whole[: sum(lengths)].split(lengths), strict=True))


def stand_in(like: Tensor, device: torch.device) -> Tensor:
    """A tensor of this shape and type on `device` that takes no memory: every element is NaN."""
    nan = torch.tensor(math.nan if like.is_floating_point() else 0).to(like.dtype)
    return nan.to(device).expand(like.shape)


def _is_stand_in(tensor: Tensor) -> bool:
    return not any(tensor.stride())


@dataclass
class _Matrix:
    """Where a tensor lies in its unit's bytes, and what stands for it while they are away."""

    tensor: Tensor
    stand_in: Tensor
    offset: int

    def bind(self, buffer: Tensor) -> None:
        like = self.stand_in
        size = like.numel() * like.element_size()
        self.tensor.data = (
            buffer[self.offset : self.offset + size].view(like.dtype).view(like.shape)
        )

    def release(self) -> None:
        self.tensor.data = self.stand_in


@dataclass
class _Unit:
    """Matrices, and the host memory of all of them once there is some."""

    matrices: list[_Matrix] = field(default_factory=list)
    nbytes: int = 0
    spans: list[Tensor] | None = None


@dataclass(eq=False)
class _Slot:
    buffer: Tensor
    holds: int | None = None
    ready: Any = None
    free: Any = None


class StreamedWeights:
    """The matrices of `units` in host memory; up to `slots` units of them on `device` at a time.

    Takes the units' frozen matrices as they are, on any device, and leaves stand-ins. A matrix that
    is a stand-in already gets its values from whoever asks for its `place`. Everything that is
    trained later must be added after this: matrices found here are never written back.
    """

    def __init__(
        self, units: Sequence[nn.Module], device: torch.device, lane: Lane | None = None
    ) -> None:
        self.device = device
        self.slots = 3
        """To be set before the first use."""
        self._lane = lane or Lane(device)
        self._memory = HostMemory(device)
        self._empty: dict[int, tuple[_Unit, _Matrix]] = {}  # by the id of their tensor
        self._packed = [self._pack(unit) for unit in units]
        self._held: list[_Slot] = []  # least recently used first
        self._memory.expect(sum(unit.nbytes for unit in self._packed if unit.spans is None))

    def __len__(self) -> int:
        return len(self._packed)

    @property
    def host_bytes(self) -> int:
        """Host memory that is held."""
        return self._memory.taken

    @property
    def slot_bytes(self) -> int:
        """GPU memory of one slot: the largest unit."""
        return max(unit.nbytes for unit in self._packed)

    def place(self, tensor: Tensor) -> list[Tensor] | None:
        """Host memory for a matrix that came as a stand-in, to be filled before the first use.

        One-dimensional, of its type, in a row. None for a tensor that is not such a matrix.
        """
        if id(tensor) not in self._empty:
            return None
        return self._spans(*self._empty[id(tensor)])

    @contextmanager
    def resident(self, wanted: Sequence[int], then: Sequence[int] = ()) -> Iterator[None]:
        """Units `wanted` with their weights in place; units `then` are fetched meanwhile.

        Nothing may keep a reference to a weight beyond this block: its memory is lent on.
        """
        if not self._held:
            self._held = [self._new_slot() for _ in range(min(self.slots, len(self)))]
        assert len(wanted) <= len(self._held), "more units at a time than slots"
        then = [unit for unit in then if unit not in wanted][: len(self._held) - len(wanted)]
        used = [self._fetch(unit, wanted) for unit in wanted]
        for unit in then:
            self._fetch(unit, [*wanted, *then])
        for unit, slot in zip(wanted, used, strict=True):
            self._lane.wait(slot.ready)
            for matrix in self._packed[unit].matrices:
                matrix.bind(slot.buffer)
        try:
            yield
        finally:
            free = self._lane.now()
            for unit, slot in zip(wanted, used, strict=True):
                slot.free = free
                for matrix in self._packed[unit].matrices:
                    matrix.release()

    def _fetch(self, unit: int, keep: Sequence[int]) -> _Slot:
        """The unit's slot; filled from host memory where no slot holds it."""
        slot = next((slot for slot in self._held if slot.holds == unit), None)
        if slot is None:
            slot = next(slot for slot in self._held if slot.holds not in keep)
            spans = self._packed[unit].spans
            pairs = [(part, span) for span, part in beside(spans, slot.buffer)]
            slot.ready = self._lane.copy(pairs, after=[slot.free])
            slot.holds = unit
        self._held.remove(slot)
        self._held.append(slot)
        return slot

    def _new_slot(self) -> _Slot:
        buffer = torch.empty(self.slot_bytes, dtype=torch.uint8, device=self.device)
        self._lane.lend(buffer)
        return _Slot(buffer, free=self._lane.now())

    def _pack(self, module: nn.Module) -> _Unit:
        """Move a unit's matrices into host memory, or keep room for them."""
        unit = _Unit()
        tensors = {id(t): t for t in (*module.parameters(), *module.buffers()) if t.ndim == 2}
        for tensor in tensors.values():
            assert not tensor.requires_grad, "only what is frozen is never written back"
            unit.matrices.append(_Matrix(tensor, stand_in(tensor, self.device), unit.nbytes))
            unit.nbytes += -(-tensor.nbytes // ALIGNED) * ALIGNED
        for matrix in unit.matrices:
            if _is_stand_in(matrix.tensor):
                self._empty[id(matrix.tensor)] = unit, matrix
            else:
                source = matrix.tensor.detach().contiguous().view(-1)
                place = self._spans(unit, matrix)
                for span, part in zip(place, source.split([len(s) for s in place]), strict=True):
                    span.copy_(part)
            matrix.release()
        return unit

    def _spans(self, unit: _Unit, matrix: _Matrix) -> list[Tensor]:
        """A matrix's part of its unit's host memory, in its type."""
        if unit.spans is None:
            unit.spans = self._memory.take(unit.nbytes)
        begin, found = matrix.offset, []
        end = begin + matrix.stand_in.nbytes
        for span in unit.spans:
            cut = span[max(begin, 0) : max(end, 0)]
            if len(cut):
                found.append(cut.view(matrix.stand_in.dtype))
            begin, end = begin - len(span), end - len(span)
        return found


def move(module: nn.Module, device: torch.device) -> None:
    """Move what is not on `device` there, tensor by tensor; stand-ins are there already."""
    for tensor in (*module.parameters(), *module.buffers()):
        if tensor.device != device:
            tensor.data = tensor.data.to(device)


def stream_transformer(transformer: nn.Module, device: torch.device) -> StreamedWeights:
    """Keep the blocks' matrices of a frozen Wan transformer in host memory, the rest on `device`.

    Its forward works as before, without a gradient; `tempolora.train.recompute` gives it one. The
    weights are then `transformer.streamed`, a unit for each third of a block, in order.
    """
    units = [third for block in transformer.blocks for third in thirds_of(block)]
    transformer.streamed = StreamedWeights(units, device)
    move(transformer, device)
    for n, block in enumerate(transformer.blocks):
        in_parts(block)
        block.forward = _in_thirds(block, 3 * n, transformer.streamed)
    return transformer.streamed


def _in_thirds(block: nn.Module, first: int, weights: StreamedWeights) -> Callable[..., Tensor]:
    def forward(x_BLD: Tensor, *rest: Any) -> Tensor:
        assert not torch.is_grad_enabled(), "a streamed block alone has no backward pass"
        with weights.resident([first], then=[first + 1]):
            normed = normalise(block, x_BLD, *rest)
            given = [part(block, normed, *rest) for part in GIVEN]
        del normed
        out_BNLE = attend(*given)
        with weights.resident([first + 1], then=[first + 2]):
            x_BLD = mix(block, x_BLD, out_BNLE, *rest)
        with weights.resident([first + 2], then=[(first + 3) % len(weights)]):
            return feed_forward(block, x_BLD, *rest)

    return forward


def stream_layers(
    module: nn.Module, layers: Sequence[nn.Module], device: torch.device
) -> StreamedWeights:
    """The same for a stack of layers that each run as a whole, as a text encoder's."""
    weights = StreamedWeights(layers, device)
    move(module, device)
    for n, layer in enumerate(layers):
        layer.forward = _as_a_whole(layer.forward, n, weights)
    return weights


def _as_a_whole(forward: Callable[..., Any], n: int, weights: StreamedWeights) -> Callable:
    def run(*args: Any, **kwargs: Any) -> Any:
        assert not torch.is_grad_enabled(), "a streamed layer has no backward pass"
        with weights.resident([n], then=[(n + 1) % len(weights)]):
            return forward(*args, **kwargs)

    return run
