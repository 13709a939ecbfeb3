"""Where every process is, so that of many that wait the one they wait for is named.

A thread of each process writes its step and phase to the store over which the processes met.
Where this process has stood in one place for too long, the thread reads what the others wrote and
says which one is silent or behind. The collective's own timeout then ends the run.
"""

import json
import logging
import os
import time
from contextlib import AbstractContextManager
from datetime import timedelta
from pathlib import Path
from socket import gethostname
from threading import Event, Thread
from typing import Any, Self

import torch.distributed as dist

from tempolora.train.world import World

log = logging.getLogger(__name__)

LOADING = 4
"""How many times longer than in a step a process may wait for weights, compilation and the like."""
NAME_AT = 0.7  # of the limit; what follows must be over before the collective gives up
MOST_BEAT_S = 5.0

Mark = tuple[int, int, str, float]  # number of marks so far, step, phase, since


def record_flights(folder: Path) -> None:
    """Let NCCL keep its last collectives and write them to `folder` at a timeout; to be called
    before processes meet. `torchfrtrace` reads them. What the environment says already stays."""
    folder.mkdir(parents=True, exist_ok=True)
    for name, value in {
        "TORCH_FR_BUFFER_SIZE": "2000",
        "TORCH_NCCL_DUMP_ON_TIMEOUT": "1",
        "TORCH_NCCL_ASYNC_ERROR_HANDLING": "1",  # the watchdog ends the process
        "TORCH_FR_DUMP_TEMP_FILE": f"{folder}/rank_",
        "TORCH_NCCL_DEBUG_INFO_TEMP_FILE": f"{folder}/rank_",  # its name before torch 2.9
    }.items():
        os.environ.setdefault(name, value)


class Heartbeat(AbstractContextManager):
    """This process's marks, and the thread that writes and reads them; nothing with one process.

    minutes: how long a step's phase may wait; as given to the process group.
    """

    def __init__(self, world: World, minutes: float) -> None:
        self._world, self._minutes = world, minutes
        self._number, self._done = 0, Event()
        self.named: str | None = None
        """What was said of a process that the others wait for, or None."""
        self.loading("start")

    def loading(self, phase: str) -> None:
        """What may take LOADING times longer begins: weights, compilation, a first step."""
        self._limit_s = 60 * self._minutes * LOADING
        self._set_timeouts()
        self.at(0, phase)

    def training(self) -> None:
        """From here on a step's limit holds."""
        if self._limit_s != 60 * self._minutes:
            self._limit_s = 60 * self._minutes
            self._set_timeouts()

    def at(self, step: int, phase: str) -> None:
        """This process begins a phase; all processes pass the same phases in the same order."""
        self._number += 1
        self._mark: Mark = (self._number, step, phase, time.monotonic())

    def _set_timeouts(self) -> None:
        if self._world.size > 1:
            for group in list(dist.distributed_c10d._world.pg_map):
                dist.distributed_c10d._set_pg_timeout(timedelta(seconds=self._limit_s), group)

    # --- The thread -------------------------------------------------------------------------------

    def __enter__(self) -> Self:
        if self._world.size > 1:
            # a connection of its own: the main thread's may be waiting
            self._store = dist.distributed_c10d._get_default_store().clone()
            # at least ten beats between naming a process and the collective's end
            self._every = min(MOST_BEAT_S, self._minutes * 60 / 40)
            self._thread = Thread(target=self._guarded, daemon=True)
            self._thread.start()
        return self

    def __exit__(self, _kind: object, error: BaseException | None, _trace: object) -> None:
        """Raises TimeoutError with the sentence where a collective ended for that."""
        self._done.set()
        if self._world.size > 1:
            self._thread.join(2 * self._every)
        if self.named and isinstance(error, RuntimeError):
            raise TimeoutError(self.named) from None

    def _guarded(self) -> None:
        try:
            self._beat()
        except RuntimeError as error:  # of the store
            if not self._done.is_set():
                self._say(
                    "the store over which the processes met does not answer: the host or process "
                    f"that holds it, most often process 0, is gone or stopped ({_first(error)})"
                )

    def _beat(self) -> None:
        beats = 0
        while not self._done.wait(self._every):
            beats += 1
            mark = self._mark
            entry = [beats, *mark[:3], time.monotonic() - mark[3], gethostname()]
            self._store.set(_key(self._world.rank), json.dumps(entry))
            if entry[4] > NAME_AT * self._limit_s and not self.named:
                others = [rank for rank in range(self._world.size) if rank != self._world.rank]
                before = self._read(others)
                time.sleep(4 * self._every)  # in which a living one beats
                if self._mark is mark:
                    after = self._read(others)
                    self._say(describe(self._world.rank, entry, before, after))

    def _read(self, ranks: list[int]) -> dict[int, list[Any]]:
        there = [rank for rank in ranks if self._store.check([_key(rank)])]
        return {rank: json.loads(self._store.get(_key(rank))) for rank in there}

    def _say(self, sentence: str) -> None:
        self.named = sentence
        log.error("%s", sentence)


def describe(
    rank: int, mine: list[Any], before: dict[int, list[Any]], after: dict[int, list[Any]]
) -> str:
    """Which process the others wait for.

    Entries: beats, marks so far, step, phase, seconds in it, host; before and after: those of the
    other processes, some beats apart.
    """
    here = f"process {rank} has waited {mine[4]:.0f} s at {_place(mine)}"
    silent = [r for r in after if r in before and after[r][0] == before[r][0]]
    if silent:
        return f"{here}: {_list(silent, after)} stopped or gone: silent since {_at(silent, after)}"
    everyone = after | {rank: mine}
    least = min(entry[1] for entry in everyone.values())
    behind = [r for r, entry in everyone.items() if entry[1] == least]
    if len(behind) == len(everyone):
        return f"{here}, and so have all others: the network or a driver holds a collective up"
    return f"{here}: {_list(behind, everyone)} behind, at {_at(behind, everyone)}"


def _list(ranks: list[int], entries: dict[int, list[Any]]) -> str:
    names = [f"process {rank} (host {entries[rank][5]})" for rank in sorted(ranks)]
    return f"{', '.join(names)} {'is' if len(names) == 1 else 'are'}"


def _at(ranks: list[int], entries: dict[int, list[Any]]) -> str:
    return " and ".join(dict.fromkeys(_place(entries[rank]) for rank in sorted(ranks)))


def _place(entry: list[Any]) -> str:
    return f"step {entry[2]}, {entry[3]}" if entry[2] else entry[3]


def _key(rank: int) -> str:
    return f"tempolora/beat/{rank}"


def _first(error: Exception) -> str:
    return str(error).splitlines()[0]
