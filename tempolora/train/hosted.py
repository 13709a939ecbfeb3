"""What some blocks keep for their backward pass, in pinned host memory.

A compiled block hands autograd what it saved when its forward is done. Here that is copied to the
host on a side stream while the next blocks compute, and fetched again when the backward pass is
one hosted block away. It is the same bytes: no gradient changes.
"""

import weakref
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.graph import saved_tensors_hooks
from torch.utils._pytree import tree_leaves

from tempolora.train.recompute import KeptInput, KeptInputs, is_dense

SMALLEST = 2**20  # bytes; less than that is not worth a copy


class HostedBlocks:
    """The pool of host memory, and the saved tensors of the last hosted block of a forward."""

    def __init__(self, transformer: nn.Module, device: torch.device) -> None:
        self._pool = KeptInputs(device)
        self._latest: list[weakref.ref[KeptInput]] = []
        transformer.kept_outputs = self._pool

    def keeping(
        self, block: nn.Module, forward: Callable[..., Tensor], hosted: bool
    ) -> Callable[..., Tensor]:
        """A block's forward, whose saved tensors go to the host where it is `hosted`.

        When the backward pass reaches the block, those of the hosted block before it are fetched.
        """

        def run(x_BLD: Tensor, *rest: Any, **named: Any) -> Tensor:
            before = self._latest
            if not hosted or not torch.is_grad_enabled():
                out = forward(x_BLD, *rest, **named)
            else:
                out = self._run_hosted(block, forward, x_BLD, *rest, **named)
            if before and out.requires_grad:
                out.register_hook(lambda _: _fetch(before))
            return out

        return run

    def _run_hosted(
        self, block: nn.Module, forward: Callable[..., Tensor], *args: Any, **named: Any
    ) -> Tensor:
        given = [t for t in tree_leaves((args[1:], named)) if isinstance(t, Tensor)]
        stays = {_storage(t) for t in (*block.parameters(), *block.buffers(), *given)}
        group: list[weakref.ref[KeptInput]] = []

        def pack(x: Tensor) -> Tensor | KeptInput:
            # weights, and what all blocks are given, would be copied for nothing
            if x.nbytes < SMALLEST or _storage(x) in stays or not is_dense(x):
                return x
            kept = KeptInput(self._pool, x)
            group.append(weakref.ref(kept))
            return kept

        with saved_tensors_hooks(pack, lambda x: x.take() if isinstance(x, KeptInput) else x):
            out = forward(*args, **named)
        self._latest = group
        return out


def _fetch(group: list[weakref.ref[KeptInput]]) -> None:
    for kept in group:
        if kept() is not None:
            kept().fetch()


def _storage(x: Tensor) -> int:
    return x.untyped_storage().data_ptr()
