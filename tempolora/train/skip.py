"""Updates left out because a loss or gradient was not finite: on all processes, said, and counted.

A loss that is not finite makes every gradient of its process not finite (`Engine.backward`), so
that the norm, which all processes share, tells of both.
"""

import logging

import torch
from torch import Tensor

from tempolora.train.engine import Engine
from tempolora.train.world import World

log = logging.getLogger(__name__)

KEY_BYTES = 4096  # of a process's sample keys; more is cut


class Skips:
    """How many updates in a row were left out. in_a_row: at the checkpoint that is gone on from."""

    def __init__(self, world: World, most: int, in_a_row: int = 0) -> None:
        self._world, self._most, self.in_a_row = world, most, in_a_row

    def look(self, step: int, norm: Tensor, engine: Engine, keys: list[str]) -> list[str]:
        """After `engine.step` on every process: the samples at fault, or none after an update.

        keys: this process's samples of the step. Raises FloatingPointError after `most` in a row.
        """
        if torch.isfinite(norm):
            self.in_a_row = 0
            return []
        self.in_a_row += 1
        at_fault = self._at_fault(bool(engine.own_finite), keys)
        log.warning(
            "step %d: the gradient's norm is %g: no update; samples: %s",
            step,
            norm.item(),
            ", ".join(at_fault),
        )
        if self.in_a_row >= self._most:
            raise FloatingPointError(
                f"step {step}: loss or gradient was not finite in {self.in_a_row} steps in a row "
                f"(train.max_skipped), the last time with {', '.join(at_fault)}; look at these "
                "samples or lower train.lr; the last checkpoint is from before"
            )
        return at_fault

    def _at_fault(self, finite: bool, keys: list[str]) -> list[str]:
        """Samples of the processes that had something not finite; of all where none can tell."""
        row = torch.zeros(1, 1 + KEY_BYTES, dtype=torch.uint8)
        text = "\n".join(keys).encode()[:KEY_BYTES]
        row[0, 0] = not finite
        row[0, 1 : 1 + len(text)] = torch.frombuffer(bytearray(text), dtype=torch.uint8)
        rows = self._world.gather(row.to(self._world.device)).cpu()
        guilty = [r for r in rows if r[0]] or list(rows)
        names = [bytes(r[1:].tolist()).rstrip(b"\0").decode(errors="replace") for r in guilty]
        return [key for name in names for key in name.split("\n")]
