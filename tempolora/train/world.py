"""The processes of one run: who we are, and how we talk, whichever launcher started us."""

import logging
import math
import os
from collections.abc import Callable
from dataclasses import dataclass
from datetime import timedelta

import torch
import torch.distributed as dist

from tempolora.config import ConfigError
from tempolora.launched import place

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Seat:
    """A process's place in a world that is a part of the processes started: an expert group."""

    rank: int
    size: int
    local_rank: int
    """On the host, among all that were started there."""
    store: dist.Store
    """Where the group's processes meet."""
    stopping: Callable[[bool], bool]
    """Tells the other group whether a stop was asked here; whether one was asked anywhere."""
    group: int
    """Number of the group, from 0."""


@dataclass(frozen=True)
class World:
    """This process among `size`; collectives run over all of them.

    context: how many processes in a row share each clip. context_group: those that share ours.
    """

    rank: int
    size: int
    device: torch.device
    memory_gib: float | None = None
    """What this process may use of its GPU; None: all."""
    context: int = 1
    context_group: dist.ProcessGroup | None = None
    seat: Seat | None = None
    """Where others train another expert meanwhile."""

    @property
    def data_rank(self) -> int:
        """Which share of each step's samples is ours: the same for all that share their clips."""
        return self.rank // self.context

    @property
    def data_size(self) -> int:
        """How many shares each step's samples come in."""
        return self.size // self.context

    @property
    def is_main(self) -> bool:
        return self.rank == 0

    @property
    def gpu_bytes(self) -> float:
        """Memory of this process's GPU that it may use; without a GPU there is no such limit."""
        if self.device.type != "cuda":
            return math.inf
        if self.memory_gib is not None:
            return self.memory_gib * 2**30
        return torch.cuda.get_device_properties(self.device).total_memory

    def free_bytes(self) -> float:
        """Memory that a run may take on each GPU: the least that is free on any process's, with
        what torch holds here unused. Every process must call it."""
        if self.device.type != "cuda":
            return self.gpu_bytes
        mine = torch.tensor(free_bytes(self.device), dtype=torch.float64, device=self.device)
        if self.size > 1:
            dist.all_reduce(mine, op=dist.ReduceOp.MIN)
        return mine.item()

    def mean(self, value: torch.Tensor) -> torch.Tensor:
        """The mean over all processes, on every one of them; in place."""
        if self.size > 1:
            dist.all_reduce(value)
            value /= self.size
        return value

    def gather(self, rows_NK: torch.Tensor) -> torch.Tensor:
        """The rows of all processes under each other, in their order; as many from each. Of those
        that share their clips, which have the same, one counts."""
        if self.size == 1:
            return rows_NK
        parts = [torch.empty_like(rows_NK) for _ in range(self.size)]
        dist.all_gather(parts, rows_NK.contiguous())
        return torch.cat(parts[:: self.context])

    def barrier(self) -> None:
        """Wait until every process is here."""
        if self.size > 1:
            dist.barrier()


def free_bytes(device: torch.device) -> float:
    """Memory of a GPU that this process may still use, its own unused reserve included."""
    if device.index is None:
        device = torch.device("cuda", torch.cuda.current_device())
    free, total = torch.cuda.mem_get_info(device)
    allocated, reserved = torch.cuda.memory_allocated(device), torch.cuda.memory_reserved(device)
    allowed = torch.cuda.get_per_process_memory_fraction(device) * total
    return min(free + reserved - allocated, allowed - allocated)


def pick_device(local_rank: int, memory_gib: float | None = None) -> torch.device:
    """This process's GPU, of which it takes no more than `memory_gib`; the CPU where there is none.

    To be called before anything lies on a GPU. Raises ConfigError where there is less.
    """
    if not torch.cuda.is_available():
        return torch.device("cpu")
    if local_rank >= torch.cuda.device_count():
        raise ConfigError(
            f"process {local_rank} of this host has no GPU of its own: "
            f"{torch.cuda.device_count()} visible; start at most that many per host"
        )
    device = torch.device("cuda", local_rank)
    torch.cuda.set_device(device)
    if memory_gib is not None:
        share = memory_gib * 2**30 / torch.cuda.get_device_properties(device).total_memory
        if share > 1:
            raise ConfigError(
                f"parallel.gpu_memory_gib: {memory_gib:g} is more than the GPU's "
                f"{memory_gib / share:.1f}"
            )
        # Segments that grow leave no holes; a small share has no room for holes.
        torch.cuda.memory._set_allocator_settings("expandable_segments:True")
        torch.cuda.set_per_process_memory_fraction(share, device)
    return device


def check_meeting_point(size: int) -> None:
    """Raise ConfigError where several processes have no way to find each other."""
    if size > 1 and "MASTER_ADDR" not in os.environ:
        raise ConfigError(
            f"{size} processes and no MASTER_ADDR: start them with torchrun or deepspeed, "
            "on Slurm with slurm/train.sh"
        )


def join_world(
    with_deepspeed: bool,
    memory_gib: float | None = None,
    context: int = 1,
    seat: Seat | None = None,
    timeout_minutes: float = 40.0,
) -> World:
    """Meet the other processes; collectives work afterwards. memory_gib: as in `pick_device`.

    context: how many processes in a row share each clip. seat: meet those of this group alone.
    timeout_minutes: how long to wait for the others, now and in each collective.
    """
    rank, size, local_rank = (seat.rank, seat.size, seat.local_rank) if seat else place()
    check_meeting_point(size)
    os.environ.update(RANK=str(rank), WORLD_SIZE=str(size), LOCAL_RANK=str(local_rank))
    device = pick_device(local_rank, memory_gib)
    backend = "nccl" if device.type == "cuda" else "gloo"
    timeout = timedelta(minutes=timeout_minutes)
    meeting = {"store": seat.store, "rank": rank, "world_size": size} if seat else {}
    alone = size == 1 and not with_deepspeed
    if not alone and (seat or not with_deepspeed):
        gpu = device if device.type == "cuda" else None
        dist.init_process_group(backend, device_id=gpu, timeout=timeout, **meeting)
    if with_deepspeed:  # which takes over a world that is there
        import deepspeed

        if size == 1:
            os.environ.setdefault("MASTER_ADDR", "127.0.0.1")
            os.environ.setdefault("MASTER_PORT", "0")
        deepspeed.init_distributed(dist_backend=backend, timeout=timeout)
    group = None
    if context > 1:
        group = dist.new_subgroups(group_size=context, timeout=timeout)[0]
    return World(rank, size, device, memory_gib, context, group, seat)


def leave_world() -> None:
    """Shut collectives down; what follows runs on this process alone."""
    if dist.is_initialized():
        dist.destroy_process_group()
