"""How far long work has come: a bar on a terminal, elsewhere a line of the log now and then."""

import logging
import sys
from collections.abc import Iterable
from typing import Any

from tqdm import tqdm

log = logging.getLogger(__name__)

EVERY_S = 60.0  # between two lines of the log; what takes less says nothing
LINE = "{desc}: {n_fmt} of {total_fmt}, {elapsed} gone, {remaining} to go{postfix}"


class _Log:
    """The file that tqdm writes to: each state of a bar is a line of the log."""

    def write(self, text: str) -> None:
        if line := text.strip():
            log.info("%s", line)

    def flush(self) -> None:
        pass


def progress(
    work: Iterable | None = None,
    *,
    what: str,
    hidden: bool = False,
    position: int | None = None,
    **options: Any,
) -> tqdm:
    """Goes through `work`, or is told of each part by `update()`.

    hidden: say nothing, as another process speaks. position: the bar's row on the terminal.
    options: tqdm's `total`, `initial` and `unit`.
    """
    if hidden or sys.stderr.isatty():
        return tqdm(work, what, disable=hidden, position=position, **options)
    # one line at a time: a bar's row and its terminal codes mean nothing in a log
    return tqdm(
        work,
        what,
        file=_Log(),
        position=0,
        bar_format=LINE,
        delay=EVERY_S,
        mininterval=EVERY_S,
        maxinterval=EVERY_S,
        miniters=1,
        **options,
    )
