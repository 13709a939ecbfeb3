"""What is written while training: a line of JSON per logged step, and TensorBoard events."""

import json
from pathlib import Path
from typing import Any, Self


class MetricsLog:
    """Appends to `metrics.jsonl`; a resumed run's lines follow, the later line of a step counts."""

    def __init__(self, folder: Path, trackers: tuple[str, ...]) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        self._file = open(folder / "metrics.jsonl", "a", encoding="utf-8")  # noqa: SIM115
        self._writer = None
        if "tensorboard" in trackers:
            from torch.utils.tensorboard import SummaryWriter

            self._writer = SummaryWriter(folder / "tensorboard")

    def write(self, expert: str, step: int, values: dict[str, Any]) -> None:
        """One step's values; numbers also go to TensorBoard under the expert's name."""
        line = {"expert": expert, "step": step, **values}
        self._file.write(json.dumps(line, ensure_ascii=False) + "\n")
        self._file.flush()
        if self._writer:
            for name, value in values.items():
                if isinstance(value, int | float):
                    self._writer.add_scalar(f"{expert}/{name}", value, step)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self._file.close()
        if self._writer:
            self._writer.close()
