"""Tensors of safetensors files, read at the disk's rate straight into the memory they stay in.

A few threads read pieces in the order in which they lie in the file, each into a buffer of its own
(page-locked where there is a GPU), and cast them from there into place: no tensor is ever held
beside the one that is wanted. Mapping the files instead would wait for the disk page by page.
"""

import json
import math
import os
from collections import deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import ExitStack
from dataclasses import dataclass, replace
from pathlib import Path
from queue import SimpleQueue
from typing import TypeVar

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

PIECE = 2**24  # bytes read at a time; a multiple of every element's size
THREADS = 4
AHEAD = 2**27  # bytes of file: no more than this, or two tensors, are under way at a time
DTYPES = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "F8_E4M3": torch.float8_e4m3fn,
    "F8_E5M2": torch.float8_e5m2,
}
"""What weights may be stored in, by the format's names."""

Key = TypeVar("Key")


@dataclass(frozen=True)
class Stored:
    """A tensor in a file: its bytes begin at `start`. dtype is the format's name for it."""

    path: Path
    dtype: str
    shape: tuple[int, ...]
    start: int

    @property
    def nbytes(self) -> int:
        return math.prod(self.shape) * DTYPES[self.dtype].itemsize

    def part(self, begin: int, length: int) -> "Stored":
        """Some of its elements, in the order in which they lie in memory: (length,)."""
        start = self.start + begin * DTYPES[self.dtype].itemsize
        return replace(self, shape=(length,), start=start)


def contents(path: Path) -> dict[str, Stored]:
    """What a safetensors file holds, by name. Raises OSError or ValueError for one that is torn."""
    try:
        with safe_open(path, framework="pt"):  # it checks all places and the file's length
            pass
    except SafetensorError as error:
        raise ValueError(str(error)) from error
    with path.open("rb") as file:
        length = int.from_bytes(file.read(8), "little")
        header = json.loads(file.read(length))
    header.pop("__metadata__", None)
    data = 8 + length  # offsets count from here
    return {
        name: Stored(path, at["dtype"], tuple(at["shape"]), data + at["data_offsets"][0])
        for name, at in header.items()
    }


def read(
    wanted: Mapping[Key, Stored], home: Callable[[Key], Sequence[Tensor]], pinned: bool
) -> Iterator[tuple[Key, Sequence[Tensor]]]:
    """Fill the homes of all that is wanted, and give each with its key when it is whole.

    home(key) is called when the tensor's turn comes: one-dimensional tensors that together have its
    length, of any type and on any device. pinned: read into page-locked memory. Raises OSError.
    """
    keys = sorted(wanted, key=lambda key: (wanted[key].path, wanted[key].start))
    buffers: SimpleQueue[Tensor] = SimpleQueue()
    for _ in range(THREADS):
        buffers.put(torch.empty(PIECE, dtype=torch.uint8, pin_memory=pinned))
    under_way: deque[tuple[Key, Sequence[Tensor], list[Future]]] = deque()
    ahead = 0

    def first() -> tuple[Key, Sequence[Tensor]]:
        key, spans, pieces = under_way.popleft()
        for piece in pieces:
            piece.result()
        return key, spans

    with ExitStack() as stack:
        files = {
            path: stack.enter_context(path.open("rb", buffering=0)).fileno()
            for path in dict.fromkeys(wanted[key].path for key in keys)
        }
        pool = ThreadPoolExecutor(THREADS, thread_name_prefix="read")
        stack.callback(pool.shutdown, cancel_futures=True)
        for key in keys:
            stored = wanted[key]
            while len(under_way) > 1 and ahead + stored.nbytes > AHEAD:
                ahead -= wanted[under_way[0][0]].nbytes
                yield first()
            spans = home(key)
            pieces = [
                pool.submit(_piece, files[stored.path], stored, at, spans, buffers)
                for at in range(0, stored.nbytes, PIECE)
            ]
            under_way.append((key, spans, pieces))
            ahead += stored.nbytes
        while under_way:
            yield first()


def fill(spans: Sequence[Tensor], at: int, values: Tensor) -> None:
    """Copy values (N,) to element `at` and on of tensors in a row, cast to their type.

    Done when this returns, as far as `values` goes: its memory may be written again.
    """
    for span in spans:
        begin, end = max(at, 0), min(at + len(values), len(span))
        if begin < end:
            part = values[begin - at : end - at]
            if span.is_cuda and span.dtype != part.dtype:
                part = part.to(span.device)  # cast there, not by the CPU
            span[begin:end].copy_(part)
        at -= len(span)


def _piece(
    file: int, stored: Stored, at: int, spans: Sequence[Tensor], buffers: "SimpleQueue[Tensor]"
) -> None:
    """Read the PIECE that is `at` bytes into a tensor, and cast it into its place."""
    buffer = buffers.get()
    try:
        raw = buffer[: min(PIECE, stored.nbytes - at)]
        _read_whole(file, stored, at, raw)
        dtype = DTYPES[stored.dtype]
        fill(spans, at // dtype.itemsize, raw.view(dtype))
    finally:
        buffers.put(buffer)


def _read_whole(file: int, stored: Stored, at: int, raw: Tensor) -> None:
    view, done = memoryview(raw.numpy()), 0
    while done < len(view):  # one call reads 2 GiB at most, and may read less
        count = os.preadv(file, [view[done:]], stored.start + at + done)
        if not count:
            raise OSError(f"{stored.path} has become shorter")
        done += count
