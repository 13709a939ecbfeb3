"""Saving off the step's path: tensors are copied to host memory, a thread writes and seals them.

One checkpoint is under way at a time, and the first process writes it. What goes wrong in its
thread ends the run on all processes after the step under way; the checkpoint before is still there.
"""

import logging
import time
from pathlib import Path
from threading import Thread
from typing import Any, Self

import torch
from torch import Tensor

from tempolora.config import Config, ConfigError
from tempolora.train import checkpoint
from tempolora.train.engine import Engine
from tempolora.train.resume import checkpoint_root
from tempolora.train.stop import Stopped, StopSignal
from tempolora.train.world import World

log = logging.getLogger(__name__)

AT_EXIT_S = 30.0  # for the thread where a run ends with an error: its disk may be what hangs


def agree(world: World, *flags: bool) -> list[bool]:
    """Whether any process raises each flag; all processes call it and get the same answer."""
    raised = torch.tensor([float(flag) for flag in flags], device=world.device)
    return (world.mean(raised) > 0).tolist()


def to_host(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """Copies in host memory that no later step changes; waits for the device once."""
    copies = {
        name: torch.empty(t.shape, dtype=t.dtype, pin_memory=t.is_cuda).copy_(t, non_blocking=True)
        for name, t in tensors.items()
    }
    if any(t.is_cuda for t in tensors.values()):
        torch.cuda.current_stream().synchronize()
    return copies


class Saver:
    """One expert's checkpoints. facts: what each says of the run beside its state."""

    def __init__(
        self, cfg: Config, engine: Engine, world: World, facts: dict[str, Any], stop: StopSignal
    ) -> None:
        self._cfg, self._engine, self._world, self._facts = cfg, engine, world, facts
        self._root = checkpoint_root(cfg, facts["expert"])
        self._stop = stop
        self._thread: Thread | None = None
        self._error: ConfigError | None = None

    def before(self, step: int) -> None:
        """Raise Stopped where a signal came before a first step was done: nothing is new."""
        if agree(self._world, self._asked())[0]:
            raise Stopped(f"stopped before step {step}; the same command goes on from there")

    def after(self, state: dict[str, Any], ema: dict[str, Tensor] | None) -> None:
        """End of a step on every process: save where it is due, stop where a signal asked for it.

        state: step, draws and whatever else the next run takes up. The last step's checkpoint, and
        that of a stop, is sealed when this returns. Raises Stopped then, and ConfigError where a
        checkpoint could not be written.
        """
        step, train = state["step"], self._cfg.train
        stopping, failed = agree(self._world, self._asked(), self._error is not None)
        if failed:
            self._fail()
        last = step == train.max_steps
        if stopping or last or step % train.checkpoint_every == 0:
            self._save(step, self._facts | state, ema)
        if stopping or last:
            self._finish()
        if stopping:
            raise Stopped(
                f"stopped after step {step}; the same command goes on from {self.folder(step)}"
            )

    def _asked(self) -> bool:
        """Whether this process is to stop, or the other expert group has been asked to."""
        seat = self._world.seat
        return seat.stopping(self._stop.asked) if seat else self._stop.asked

    def folder(self, step: int) -> Path:
        """Where the checkpoint of a step lies once it is sealed."""
        return self._root / f"step-{step:06d}"

    def _save(self, step: int, state: dict[str, Any], ema: dict[str, Tensor] | None) -> None:
        world, engine = self._world, self._engine
        self._wait()
        if world.is_main and self._error is None:
            try:
                checkpoint.begin(self._root, step)
            except OSError as error:
                self._note(step, error)
        self._finish()  # the folder is there when the others come out of this
        tensors = {"lora": engine.lora_state(), "optimizer": engine.optimizer_state(), "ema": ema}
        if world.is_main:
            files = {name: to_host(each) for name, each in tensors.items() if each is not None}
            # a daemon: an interpreter that must end does not wait for it, `__exit__` does
            self._thread = Thread(target=self._write, args=(step, files, state), daemon=True)
            self._thread.start()

    def _write(self, step: int, files: dict[str, dict[str, Tensor]], state: dict[str, Any]) -> None:
        root, train = self._root, self._cfg.train
        try:
            digests = {}
            for name, tensors in files.items():
                digests |= checkpoint.write_tensors(root, step, f"{name}.safetensors", tensors)
            keep, every = train.keep_checkpoints, train.keep_every or 0
            checkpoint.seal(root, step, digests, state, keep, every)
        except Exception as error:
            self._note(step, error)
            checkpoint.abandon(root, step)

    def _note(self, step: int, error: Exception) -> None:
        why = getattr(error, "strerror", None) or error
        self._error = ConfigError(
            f"output.dir: the checkpoint of step {step} could not be written to {self._root} "
            f"({why}); make that good and give the same command again, which goes on from the "
            "one before"
        )

    def _wait(self) -> None:
        """Until the thread is done, which the first process has."""
        if self._thread is None:
            return
        began = time.perf_counter()
        if self._thread.is_alive():
            self._thread.join()
            waited = time.perf_counter() - began
            log.info("waited %.1f s for a checkpoint to be written", waited)
        self._thread = None

    def _finish(self) -> None:
        """Until the checkpoint under way is sealed. Raises ConfigError where that failed."""
        self._wait()
        if agree(self._world, self._error is not None)[0]:
            self._fail()

    def _fail(self) -> None:
        raise self._error or ConfigError(
            "output.dir: process 0 could not write a checkpoint, and says why"
        )

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        if self._thread is not None:  # the run ends with an error: the last checkpoint need not
            self._thread.join(AT_EXIT_S)
