"""What is written while training: a line of JSON per logged step, and TensorBoard events.

Experts that train at once write a file each, `metrics-high.jsonl` and `metrics-low.jsonl`, as not
every cluster's file system keeps apart what two hosts append to one file; `join_metrics` makes one
of them.
"""

import json
import os
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any, BinaryIO, Self

from tempolora.files import sync_file

TOGETHER, APART = "metrics.jsonl", "metrics-*.jsonl"


class MetricsLog:
    """Appends one expert's values to `metrics.jsonl`, and to its own TensorBoard run.

    A resumed run's lines follow those of the run before: the later line of a step counts.
    folder: None on processes that write nothing. step: the last step done before; what TensorBoard
    holds after it is hidden. apart: in the expert's own file, as another trains at the same time.
    """

    def __init__(
        self,
        folder: Path | None,
        expert: str,
        step: int,
        trackers: tuple[str, ...],
        apart: bool = False,
    ) -> None:
        self._file = self._writer = None
        if folder is None:
            return
        folder.mkdir(parents=True, exist_ok=True)
        self._expert = expert
        name = APART.replace("*", expert) if apart else TOGETHER
        self._file = open(folder / name, "a+b")  # noqa: SIM115
        _end_line(self._file)
        if "tensorboard" in trackers:
            from torch.utils.tensorboard import SummaryWriter

            self._writer = SummaryWriter(folder / "tensorboard" / expert, purge_step=step + 1)

    def write(self, step: int, values: dict[str, Any]) -> None:
        """One step's values."""
        if self._file is None:
            return
        line = {"expert": self._expert, "step": step, **values}
        self._file.write(json.dumps(line, ensure_ascii=False).encode() + b"\n")
        self._file.flush()
        if self._writer:
            for name, value in _flat(values):
                self._writer.add_scalar(name, value, step)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        if self._file:
            self._file.close()
        if self._writer:
            self._writer.close()


def _flat(values: dict[str, Any]) -> Iterator[tuple[str, float]]:
    """What is grouped in a line gets names of its own: flow_by_sigma/0.912."""
    for name, value in values.items():
        if isinstance(value, dict):
            yield from ((f"{name}/{key}", inner) for key, inner in value.items())
        else:
            yield name, value


def join_metrics(folder: Path) -> None:
    """Append to `metrics.jsonl` what experts wrote apart, and remove that. To be called while none
    writes; cut short it leaves lines twice, of which the later counts."""
    for part in sorted(folder.glob(APART)):
        with open(folder / TOGETHER, "a+b") as whole, open(part, "rb") as lines:
            _end_line(whole)
            shutil.copyfileobj(lines, whole)
        sync_file(folder / TOGETHER)
        part.unlink()


def _end_line(file: BinaryIO) -> None:
    """A killed run's torn line must not spoil the next."""
    if file.seek(0, os.SEEK_END) == 0:
        return
    file.seek(-1, os.SEEK_END)
    if file.read(1) != b"\n":
        file.write(b"\n")
