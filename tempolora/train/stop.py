"""Stopping when asked: SIGTERM or SIGUSR1 to any one process ends the run on all after a step.

Nothing heavy is imported, so that a signal is heard before the long imports.
"""

import logging
import signal
from types import FrameType
from typing import Self

log = logging.getLogger(__name__)

SIGNALS = (signal.SIGTERM, signal.SIGUSR1)


class Stopped(Exception):
    """The run was asked to stop, and its state is saved."""


class StopSignal:
    """While entered, the signals are noted instead of obeyed; the handlers before come back."""

    def __init__(self) -> None:
        self.asked = False
        """Whether this process was; the others may not know of it."""
        self._before: dict[signal.Signals, object] = {}

    def _note(self, number: int, _frame: FrameType | None) -> None:
        log.warning("%s: stopping after this step", signal.Signals(number).name)
        self.asked = True

    def __enter__(self) -> Self:
        if not self._before:  # entered before the imports, and again by who trains
            self._before = {number: signal.signal(number, self._note) for number in SIGNALS}
        return self

    def __exit__(self, *_: object) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)
        self._before = {}
