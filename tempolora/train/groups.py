"""Two expert groups of one run: each a world of its own, that begin, stop and end together.

Ranks are contiguous, so that a group is spread over as few hosts as can be. The groups share no
collective. They meet at the launcher's store, where each group's world gets a part of its own, and
beside that exchange only words:

    joined          how many processes are here
    prepared        process 0 has made output.dir ready
    stop            why all are to stop: a signal, or what failed
    state/<rank>    a number that a thread raises while the process lives; then how it ended
    over, heard     how the whole run ended, by process 0, and how many have read it
"""

import logging
import math
import os
import threading
import time
from collections.abc import Callable
from datetime import timedelta
from functools import partial, wraps
from types import TracebackType
from typing import Self

import torch.distributed as dist
from torch.distributed.rendezvous import rendezvous

from tempolora.config import ConfigError
from tempolora.launched import place
from tempolora.train.stop import Stopped, StopSignal
from tempolora.train.world import Seat, check_meeting_point

log = logging.getLogger(__name__)

EVERY_S = 1.0  # between looks at the store
SILENT_S = 60.0  # after which a process that has raised no number is taken for dead
STOPPING_S = 15.0  # the same, once all have been asked to stop
LINGER_S = 60.0  # for others to save, once something has failed
HEARD_S = 10.0  # for others to read how the run ended
MEET_S = 600.0  # for all processes to arrive
ENDS = DONE, STOPPED, FAILED = "done", "stopped", "failed"
ASKED = "a stop was asked for"


class GroupFailed(RuntimeError):
    """The run ends because a process of the other group failed; what was trained here is saved."""


def _or_lost(method: Callable) -> Callable:
    """Trouble with the store means that process 0, or the launcher, is gone: a failure of the run,
    which must not keep this process from saving."""

    @wraps(method)
    def careful(self: "Group", *arguments):
        try:
            return method(self, *arguments)
        except RuntimeError as error:  # what torch makes of it
            self._lost = True
            self._word = f"the processes' meeting point is gone ({str(error).splitlines()[0]})"

    return careful


class Group:
    """This process's place in one of two groups, as a context: what ends one ends the other.

    sizes: processes by expert, in the order of ranks. On leaving without an exception it waits for
    the other group, and raises GroupFailed where that has failed, Stopped where it was stopped.
    """

    def __init__(self, sizes: dict[str, int]) -> None:
        self._rank, self._count, local_rank = place()
        check_meeting_point(self._count)
        ends = [sum(list(sizes.values())[: n + 1]) for n in range(len(sizes))]
        number = next(n for n, end in enumerate(ends) if self._rank < end)
        self.expert, size = list(sizes.items())[number]
        first = ends[number] - size
        self._elsewhere = [r for r in range(self._count) if not first <= r < first + size]
        self._is_main = self._rank == first
        if self._is_main:  # each expert's first process speaks
            logging.getLogger("tempolora").setLevel(logging.INFO)
        self._sizes = sizes
        self._word: str | None = None  # why all are to stop
        self._seen: dict[int, tuple[str, float]] = {}  # by rank, its state and since when
        self._beats, self._lost = 0, False
        self._patience: float | None = None  # until when process 0 waits for others to save
        self._closing = threading.Event()
        self._thread = threading.Thread(target=self._listen, name="groups", daemon=True)
        meet, self._store = _stores(self._rank, self._count)
        # A connection of its own: collectives may wait at theirs for a long time.
        store = dist.PrefixStore(f"tempolora/{self.expert}", meet)
        self.seat = Seat(self._rank - first, size, local_rank, store, self._stopping, number)

    @property
    def is_first(self) -> bool:
        """Whether this is the first process of all."""
        return self._rank == 0

    def await_folder(self) -> None:
        """Go on when process 0, which made output.dir ready, has come here."""
        if self.is_first:
            self._store.set("prepared", "")
        else:
            self._await(lambda: self._store.check(["prepared"]), "process 0 to prepare output.dir")

    # --- While training ---------------------------------------------------------------------------

    def _stopping(self, asked: bool) -> bool:
        if asked and self._word is None:
            self._say(ASKED)
        return self._word is not None

    def _listen(self) -> None:
        """The thread: show that this process lives, and hear of the others."""
        while not self._closing.wait(EVERY_S) and not self._lost:
            self._attend()

    @_or_lost
    def _attend(self) -> None:
        self._beat()
        self._hear()
        self._mourn(self._silent(self._elsewhere if self._is_main else [], SILENT_S))

    def _mourn(self, dead: list[int]) -> None:
        if dead and self._failure is None:
            self._say(f"process {dead[0]} has not been heard of for long: it is dead or stuck")

    def _beat(self) -> None:
        self._beats += 1
        self._store.set(f"state/{self._rank}", str(self._beats))

    def _hear(self) -> None:
        if self._store.check(["stop"]):
            self._word = self._store.get("stop").decode()

    @_or_lost
    def _say(self, word: str) -> None:
        """Ask all to stop. What failed counts for more than a request."""
        if word == ASKED:
            self._word = self._store.compare_set("stop", "", word).decode()
        else:
            log.error("%s", word)
            self._word = word
            self._store.set("stop", word)

    @property
    def _patient_s(self) -> float:
        return SILENT_S if self._word is None else STOPPING_S

    @property
    def _failure(self) -> str | None:
        return None if self._word in (None, ASKED) else self._word

    def _states(self, ranks: list[int]) -> dict[int, str]:
        values = self._store.multi_get([f"state/{rank}" for rank in ranks]) if ranks else []
        return {rank: value.decode() for rank, value in zip(ranks, values, strict=True)}

    def _silent(self, ranks: list[int], seconds: float) -> list[int]:
        """Those that have not ended and have shown no life for so long."""
        now = time.monotonic()
        for rank, state in self._states(ranks).items():
            if self._seen.get(rank, ("", 0.0))[0] != state:
                self._seen[rank] = (state, now)
        seen = [(rank, *self._seen[rank]) for rank in ranks]
        return [r for r, state, since in seen if state not in ENDS and now - since > seconds]

    # --- Begin and end ----------------------------------------------------------------------------

    def __enter__(self) -> Self:
        """Meet all processes. Raises ConfigError where they do not see the same sizes."""
        said = ", ".join(f"{expert} on {size}" for expert, size in self._sizes.items())
        agreed = self._store.compare_set("sizes", "", said).decode()
        if agreed != said:
            raise ConfigError(
                f"parallel.expert_split: auto gives {said} on process {self._rank} and {agreed} "
                "on another, whose GPU differs; set [high, low] processes"
            )
        self._store.set(f"state/{self._rank}", "0")
        self._store.add("joined", 1)
        self._await(lambda: self._store.add("joined", 0) == self._count, "all processes to arrive")
        log.info("both experts at once: %s; this is %s", said, self.expert)
        self._thread.start()
        return self

    def _await(self, come: Callable[[], bool], what: str) -> None:
        end = time.monotonic() + MEET_S
        while not come():
            if self._failure:
                raise GroupFailed(f"stopped: {self._failure}")
            if time.monotonic() > end:
                raise GroupFailed(f"process {self._rank} has waited {MEET_S:g} s for {what}")
            time.sleep(EVERY_S / 10)

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self._closing.set()
        self._thread.join(HEARD_S)
        ended = DONE if error is None else STOPPED if isinstance(error, Stopped) else FAILED
        if ended == FAILED and self._failure is None:
            self._say(f"{self.expert} failed in process {self._rank}: {error or kind.__name__}")
        over = self._end(ended) or FAILED
        if ended == FAILED:
            return
        if self._failure or over == FAILED:
            here = error or f"{self.expert} is trained"
            raise GroupFailed(f"{here}; the run failed: {self._failure or 'elsewhere'}") from None
        if over == STOPPED and error is None:
            raise Stopped(f"{self.expert} is trained, the other expert was stopped")

    @_or_lost
    def _end(self, ended: str) -> str:
        """Say how this process ended; returns how the run did. One that failed goes at once, but
        for process 0, which lets the others hear of it. The others wait for all: where the store is
        process 0's own it must stay, and a launcher may end those that still save when the first is
        gone."""
        if ended != FAILED:
            judge = partial(self._judge, ended) if self.is_first else partial(self._judged, ended)
            over = self._wait(judge)
        else:
            self._store.set(f"state/{self._rank}", over := FAILED)
            if self.is_first:
                self._await_two_beats()
        if self.is_first:
            self._store.set("over", over)
            states = self._states(range(1, self._count)).values()
            waiting = sum(state in (DONE, STOPPED) for state in states)
            end = time.monotonic() + HEARD_S
            while self._store.add("heard", 0) < waiting and time.monotonic() < end:
                time.sleep(EVERY_S / 10)
        return over

    def _await_two_beats(self) -> None:
        """Of all that live: each listens after its beat, and has then heard why all are to stop. A
        store that is this process's own holds that word no longer than this process."""
        before, end = self._states(self._elsewhere), time.monotonic() + HEARD_S
        while time.monotonic() < end:
            now = self._states(self._elsewhere)
            if all(s in ENDS or int(s) >= int(before[rank]) + 2 for rank, s in now.items()):
                return
            time.sleep(EVERY_S / 10)

    def _wait(self, over: Callable[[], str | None]) -> str:
        """Until `over` answers. A signal meanwhile stops the other group."""
        with StopSignal() as stop:
            while (found := over()) is None and not self._lost:
                self._stopping(stop.asked)
                time.sleep(EVERY_S)
        return found or FAILED

    def _judge(self, ended: str) -> str | None:
        """Process 0: how the run ended, once all others have or are dead."""
        self._beat()
        self._hear()
        others = self._states(range(1, self._count))
        running = [rank for rank, state in others.items() if state not in ENDS]
        dead = self._silent(running, self._patient_s)
        self._mourn(dead)
        if self._failure and self._patience is None:
            self._patience = time.monotonic() + LINGER_S
        if set(running) - set(dead) and time.monotonic() < (self._patience or math.inf):
            return None
        ends = {ended, *others.values()}
        return FAILED if self._failure or FAILED in ends else STOPPED if STOPPED in ends else DONE

    def _judged(self, ended: str) -> str | None:
        """The others: what process 0 says."""
        self._store.set(f"state/{self._rank}", ended)
        self._hear()
        if self._store.check(["over"]):
            self._store.add("heard", 1)
            return self._store.get("over").decode()
        dead = self._silent([0], self._patient_s)
        self._mourn(dead)
        return FAILED if dead else None


def _stores(rank: int, count: int) -> tuple[dist.Store, dist.Store]:
    """Two connections to the launcher's meeting point, which process 0 opens where it does not."""
    limit = timedelta(seconds=MEET_S)
    first, _, _ = next(rendezvous("env://", rank, count, timeout=limit))
    host, port = os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"])
    second = dist.TCPStore(host, port, is_master=False, timeout=limit, wait_for_workers=False)
    return first, dist.PrefixStore("tempolora/groups", second)
