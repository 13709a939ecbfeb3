"""Shards to batches, in an order that depends on the seed and the step alone.

The draws of a run are numbered: draw n is one sample of one epoch's permutation. Which process
takes draw n follows from the step and the number of processes, so that a resumed run goes on with
the very next sample, and a run on more processes sees the same samples in the same order.
"""

import signal
from collections.abc import Callable, Iterator, Sequence
from functools import lru_cache, partial
from typing import Any

import numpy as np
import torch
from torch.utils.data import DataLoader, Dataset, get_worker_info

from tempolora.config import ConfigError
from tempolora.data.shards import Sample, ShardReader


def sample_of_draw(draw: int, num_samples: int, seed: int) -> int:
    """Which of the samples (in key order) draw n takes; each epoch visits all of them."""
    epoch, position = divmod(draw, num_samples)
    return int(_order(num_samples, seed, epoch)[position])


@lru_cache(maxsize=2)
def _order(num_samples: int, seed: int, epoch: int) -> np.ndarray:
    return np.random.default_rng([seed, epoch]).permutation(num_samples)


class Draws(Dataset):
    """Draw n of a run: (n, sample)."""

    def __init__(self, reader: ShardReader, groups: Sequence[Sequence[int]], seed: int) -> None:
        self._reader, self._groups, self._seed = reader, groups, seed

    def __getitem__(self, draw: int) -> tuple[int, Sample] | ConfigError:
        try:
            turn, group = divmod(draw, len(self._groups))
            positions = self._groups[group]
            chosen = sample_of_draw(turn, len(positions), self._seed)
            return draw, self._reader.read(positions[chosen])
        except ConfigError as error:
            return error  # raised in a loader process, it would arrive wrapped in a traceback


def batches(
    reader: ShardReader,
    collate: Callable[[list[tuple[int, Sample]]], Any],
    *,
    groups: Sequence[Sequence[int]],
    seed: int,
    batch_size: int,
    first_draw: int,
    microsteps: int,
    rank: int,
    world: int,
    workers: int,
) -> Iterator[Any]:
    """What `collate` makes of each microstep's (draw, sample) pairs, read ahead by `workers`.

    groups: positions of the samples to draw from, in key order; draws take turns between the
    groups, so that small ones count as much as large ones. first_draw: draws that the run has
    used up, on all processes together. Raises ConfigError for a damaged sample, and where a batch
    does not fit into shared memory.
    """
    starts = (first_draw + (step * world + rank) * batch_size for step in range(microsteps))
    loader = DataLoader(
        Draws(reader, groups, seed),
        batch_sampler=[range(start, start + batch_size) for start in starts],
        collate_fn=partial(_collate_whole, collate),
        num_workers=workers,
        pin_memory=torch.cuda.is_available(),  # a batch that can be pinned is copied in no time
        # fork: the workers only read files, and spawn would import torch again in each of them
        multiprocessing_context="fork" if workers else None,
        worker_init_fn=_outlive_stop,
    )
    for batch in loader:
        if isinstance(batch, ConfigError):
            raise batch
        yield batch


STAY_S = 60  # enough for the step under way


def _outlive_stop(_worker: int) -> None:
    """In a reader: signals that all processes of a job hear must not cost the step under way.

    A second SIGTERM ends it at once, the first after STAY_S. SIGUSR1 is the trainer's alone: by the
    handler that comes with the fork a reader would say that it stops the run.
    """

    def stay(*_: object) -> None:
        signal.signal(signal.SIGTERM, signal.SIG_DFL)
        signal.alarm(STAY_S)

    signal.signal(signal.SIGTERM, stay)
    signal.signal(signal.SIGUSR1, signal.SIG_IGN)


def _collate_whole(collate: Callable[..., Any], drawn: list[Any]) -> Any:
    damaged = next((item for item in drawn if isinstance(item, ConfigError)), None)
    if damaged or get_worker_info() is None:
        return damaged or collate(drawn)
    return _shared(collate(drawn))


def _shared(batch: Any) -> Any:
    """In a reader: the batch in the shared memory by which it reaches the trainer, or the error.

    torch would put it there on its way out, in a thread that prints a traceback where that fails
    and drops the batch, for which the trainer would wait for ever.
    """
    if not hasattr(batch, "share_memory"):  # asked for as torch asks for `pin_memory`
        return batch
    try:
        return batch.share_memory()
    except RuntimeError as error:
        return ConfigError(
            f"data.workers: no room in shared memory for a batch ({error}); make /dev/shm larger "
            "(docker run --shm-size=8g), or set data.workers=0"
        )
