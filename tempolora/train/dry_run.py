"""A dry run of sharding: the model of one process among many, by the trainer's own code, no GPU.

Weights have shapes and number formats but no memory, adapters are real, and the processes are
torch's fake ones: to each it seems that all have met, and nothing is sent. What FSDP2 makes of the
frozen base is then counted and held against the plan.
"""

from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from math import prod
from typing import Any

import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.tensor import DTensor

from tempolora.config import Config
from tempolora.model.lora import add_lora
from tempolora.model.wan import blank_transformer
from tempolora.train.engine import build_engine
from tempolora.train.plan import HOST_GPUS, Plan, changed
from tempolora.train.rates import GIB
from tempolora.train.spread import spread_of
from tempolora.train.world import World


@dataclass(frozen=True)
class Part:
    """The frozen base on one process, in bytes.

    held: its shards, padding included; own: without. gathered: the largest block, whole, with
    every process's padding.
    """

    rank: int
    held: int
    own: int
    gathered: int

    @property
    def weights(self) -> int:
        """What the planner calls weights: the shards and two blocks in passing."""
        return self.held + 2 * self.gathered


@dataclass(frozen=True)
class Trial:
    """The parts of some of `size` processes, beside what was planned for each, in bytes."""

    size: int
    planned: float
    parts: list[Part]

    def lines(self) -> Iterator[str]:
        """As `tempolora plan` prints it."""
        yield f"dry run of fsdp, {self.size} processes; planned weights {_gib(self.planned)}"
        for part in self.parts:
            error = part.weights / self.planned - 1
            yield (
                f"  process {part.rank:<6} {_gib(part.held)} of shards, of it padding "
                f"{_gib(part.held - part.own)}; with two gathered blocks {_gib(part.weights)}, "
                f"{error:+.2%}"
            )

    def as_json(self) -> dict[str, Any]:
        """The same for machines, in bytes."""
        return asdict(self)


def dry_run(cfg: Config, plan: Plan, size: int) -> Trial:
    """Build the first and the last of `size` processes by a plan whose engine is fsdp."""
    assert plan.settings.engine == "fsdp"
    cfg = changed(cfg, plan.settings.keys() | {"parallel.engine": "fsdp"})
    return Trial(size, plan.parts["weights"], list(build_parts(cfg, [0, size - 1], size)))


def build_parts(cfg: Config, ranks: Iterable[int], size: int) -> Iterator[Part]:
    """What each of these of `size` processes holds of the first expert under FSDP2.

    For a process that is in no process group itself.
    """
    # Nobody is there to say how many processes a host has.
    asked = cfg.parallel.shard_over
    shard_over = {None: size, "node": HOST_GPUS}.get(asked, asked)
    # adamw needs nothing installed
    cfg = changed(cfg, {"train.optimizer": "adamw", "parallel.shard_over": shard_over})
    for rank in ranks:
        with pretended_world(rank, size, cfg.parallel.context) as world:
            transformer = blank_transformer(cfg.model, cfg.experts[0])
            spread_of("fsdp", cfg, world)(transformer)
            add_lora(transformer, cfg.lora, cfg.timebase, cfg.train.seed)
            build_engine("fsdp", cfg, transformer, world)
            part = _part(rank, transformer)
        yield part


@contextmanager
def pretended_world(rank: int, size: int, context: int) -> Iterator[World]:
    """This process as one of many, none of whom is there: collectives do nothing. With `context`
    of them to a clip."""
    from torch.testing._internal.distributed.fake_pg import FakeStore

    assert not dist.is_initialized(), "a dry run is no part of a run"
    dist.init_process_group("fake", store=FakeStore(), rank=rank, world_size=size)
    try:
        group = dist.new_subgroups(group_size=context)[0] if context > 1 else None
        yield World(rank, size, torch.device("cpu"), context=context, context_group=group)
    finally:
        dist.destroy_process_group()


def _part(rank: int, transformer: nn.Module) -> Part:
    local = [p.to_local() for p in transformer.parameters() if isinstance(p, DTensor)]
    return Part(
        rank,
        held=sum(shard.untyped_storage().nbytes() for shard in local),
        own=sum(shard.nbytes for shard in local),
        gathered=max(map(_gathered, transformer.blocks)),
    )


def _gathered(block: nn.Module) -> int:
    """Bytes of a block's sharded weights when all shards are there."""
    whole = 0
    for weight in block.parameters():
        if isinstance(weight, DTensor):
            sizes = zip(weight.device_mesh.shape, weight.placements, strict=True)
            shards = prod(size for size, placement in sizes if placement.is_shard())
            whole += shards * weight.to_local().untyped_storage().nbytes()
    return whole


def _gib(size: float) -> str:
    return f"{size / GIB:.3f} GiB"
