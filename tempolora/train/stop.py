"""Stopping when asked: SIGTERM or SIGUSR1 to any one process ends the run on all after a step."""

import logging
import signal
from types import FrameType
from typing import Self

import torch

from tempolora.train.world import World

log = logging.getLogger(__name__)

SIGNALS = (signal.SIGTERM, signal.SIGUSR1)


class Stopped(Exception):
    """The run was asked to stop, and its state is saved."""


class StopSignal:
    """While entered, the signals are noted instead of obeyed; the handlers before come back."""

    def __init__(self, world: World) -> None:
        self._world = world
        self._asked = False
        self._before: dict[signal.Signals, object] = {}

    def requested(self) -> bool:
        """Whether any process was asked; all processes call it and get the same answer."""
        seat = self._world.seat
        here = seat.stopping(self._asked) if seat else self._asked
        if self._world.size == 1:
            return here
        asked = torch.tensor(float(here), device=self._world.device)
        return bool(self._world.mean(asked) > 0)

    def _note(self, number: int, _frame: FrameType | None) -> None:
        log.warning("%s: stopping after this step", signal.Signals(number).name)
        self._asked = True

    def __enter__(self) -> Self:
        self._before = {number: signal.signal(number, self._note) for number in SIGNALS}
        return self

    def __exit__(self, *_: object) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)
