"""Processes of a run that are forked from one that has the imports behind it: starts of a second.

A `Ranks` is such a process. It starts training, or a test's function, as torchrun does, a process
per rank over gloo, and like it ends the others where one fails; what trains is the trainer itself.
`python ranks.py` is its inner side, which reads a job per line.
"""

import gc
import importlib
import json
import os
import resource
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
LIMIT_S = 540  # of a job: less than the watch over hung tests, which leaves processes behind
GRACE_S = 20  # from SIGTERM to SIGKILL for those that are left when one has failed


class Ranks:
    """Starts runs; `start` gives the processes' ids, `wait` their exit codes."""

    def __init__(self) -> None:
        path = os.pathsep.join([str(Path(sys.executable).parent), os.environ["PATH"]])
        self._inner = subprocess.Popen(
            [sys.executable, __file__],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            env=os.environ | {"PYTHONPATH": str(ROOT), "PATH": path},
            cwd=ROOT,
        )
        self._running = False
        self._answer()

    def start(
        self,
        size: int,
        arguments: list[str],
        log: Path,
        full: tuple[int, int] | None = None,
        spoilt: tuple[int, list[int]] | None = None,
        apart: bool = False,
        function: str | None = None,
    ) -> list[int]:
        """Start `tempolora ARGUMENTS` in `size` processes, which all write into `log`.

        full: (rank, bytes) beyond which none of its files may grow. spoilt: (rank, microsteps)
        whose latents are NaN; microsteps from 0. apart: as on as many hosts, where nobody ends the
        others; logs are then `log`.RANK. function: "module:name" of tests/, which is called with
        the rank and the arguments in place of the command.
        """
        job = {"size": size, "argv": [str(each) for each in arguments], "log": str(log)}
        job |= {"full": full, "spoilt": spoilt, "apart": apart, "function": function}
        if self._running:  # left by a test that failed before it waited
            self.wait()
        self._running = True
        self._inner.stdin.write(json.dumps(job) + "\n")
        self._inner.stdin.flush()
        return self._answer()

    def wait(self) -> list[int]:
        """Exit codes by rank; negative: the signal that ended it."""
        codes = self._answer()
        self._running = False
        return codes

    def run(self, size: int, arguments: list[str], log: Path, **more: Any) -> list[int]:
        self.start(size, arguments, log, **more)
        return self.wait()

    def call(self, function: str, size: int, arguments: list[Any], log: Path) -> None:
        """Call a function of a test in as many processes; what they print where one fails."""
        codes = self.run(size, arguments, log, function=function)
        assert not any(codes), f"{codes}\n{log.read_text()[-6000:]}"

    def close(self) -> None:
        self._inner.stdin.close()
        self._inner.wait(60)

    def _answer(self) -> Any:
        line = self._inner.stdout.readline()
        assert line, "the process that forks ranks has ended"
        return json.loads(line)


def _serve() -> None:
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # libraries print too
    import tempolora.model.wan
    import tempolora.run

    assert tempolora.model.wan and tempolora.run
    gc.freeze()  # else the first collection of each fork copies all pages
    print(json.dumps("ready"), file=answers, flush=True)
    for line in sys.stdin:
        job = json.loads(line)
        with socket.create_server(("127.0.0.1", 0)) as server:
            port = server.getsockname()[1]
        pids = [_fork(job, rank, port) for rank in range(job["size"])]
        print(json.dumps(pids), file=answers, flush=True)
        print(json.dumps(_wait(pids, job["apart"])), file=answers, flush=True)
    os._exit(0)  # without seconds of taking modules apart


def _fork(job: dict[str, Any], rank: int, port: int) -> int:
    if pid := os.fork():
        return pid
    code = 1
    try:
        with open(f"{job['log']}.{rank}" if job["apart"] else job["log"], "ab") as log:
            for stream in (1, 2):
                os.dup2(log.fileno(), stream)
        os.dup2(os.open(os.devnull, os.O_RDONLY), 0)
        size = job["size"]
        if size > 1 or job["function"]:
            local = 0 if job["apart"] else rank
            place = {"RANK": rank, "WORLD_SIZE": size, "LOCAL_RANK": local, "MASTER_PORT": port}
            os.environ.update({name: str(value) for name, value in place.items()})
            os.environ["MASTER_ADDR"] = "127.0.0.1"
        if job["full"] and rank == job["full"][0]:
            resource.setrlimit(resource.RLIMIT_FSIZE, (job["full"][1],) * 2)
        if job["spoilt"] and rank == job["spoilt"][0]:
            _spoil(job["spoilt"][1])
        if job["function"]:
            module, _, name = job["function"].partition(":")
            getattr(importlib.import_module(module), name)(rank, *job["argv"])
            code = 0
        else:
            from tempolora.cli import main

            code = main(job["argv"])
    except BaseException:
        import traceback

        traceback.print_exc()
    finally:
        sys.stderr.flush()
        os._exit(code)


def _spoil(microsteps: list[int]) -> None:
    from tempolora.train import loop

    whole = loop.batches

    def batches(*args: Any, **kwargs: Any) -> Any:
        for number, batch in enumerate(whole(*args, **kwargs)):
            if number in microsteps:
                batch.latents_BCTHW[0, 0, 0, 0, 0] = float("nan")
            yield batch

    loop.batches = batches


def _wait(pids: list[int], apart: bool) -> list[int]:
    codes: dict[int, int] = {}
    deadline, limit = None, time.monotonic() + LIMIT_S
    while len(codes) < len(pids):
        for pid in set(pids) - codes.keys():
            ended, status = os.waitpid(pid, os.WNOHANG)
            if ended:
                codes[pid] = os.waitstatus_to_exitcode(status)
        left = set(pids) - codes.keys()
        failed = any(codes.values()) and not apart
        if left and deadline is None and (failed or time.monotonic() > limit):
            deadline = time.monotonic() + GRACE_S
            for pid in left:
                os.kill(pid, signal.SIGTERM)
        if deadline and time.monotonic() > deadline:
            for pid in left:
                os.kill(pid, signal.SIGKILL)
        time.sleep(0.005)
    return [codes[pid] for pid in pids]


if __name__ == "__main__":
    _serve()
