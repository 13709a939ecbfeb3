"""Submit: `tempolora train` or `precompute` as a Slurm job, or on this machine, through submitit.

    python launch/submit.py --config configs/a14b.json --nodes 4 --partition gpu
    python launch/submit.py --config configs/a14b.json --command precompute --nodes 1 --array 16%4
    python launch/submit.py --config configs/a14b.json --local

One task per GPU, whose only child is the command itself with rank and meeting point in its
environment. Before the time is up, or the job is preempted, submitit calls `Job.checkpoint`: the
run saves and ends, goes back into the queue and resumes. Paths count from where this is called, as
with the command; logs go to `submitit/` in output.dir.

submitit hands a job over as a pickle in that folder and unpickles it in the job, so whoever can
write there can run code as you. What is pickled is a `Job`: a command line and two numbers.
"""

import argparse
import os
import re
import shutil
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import submitit
from submitit.core.utils import FailedJobError, FailedSubmissionError
from submitit.helpers import DelayedSubmission

from tempolora.config import Config, ConfigError, load_config
from tempolora.launched import check_engine
from tempolora.model.location import check_model

NOTICE_S = {"train": 300, "precompute": 120}  # before the time is up
REPEAT_S = 20
MOST_STARTS = 1000  # submitit counts the time-outs that it lets pass


@dataclass
class Job:
    """One process of a run, as every task of the job calls it."""

    command: str
    arguments: tuple[str, ...]
    part: int = 0
    parts: int = 1

    # of the process while it runs; never pickled
    _child = None
    _status = None

    def __call__(self) -> int:
        """Run the command to its end; its status, 0. Raises CalledProcessError for another."""
        arguments = [sys.executable, *self.arguments]
        # Slurm signals the whole task: what is meant for submitit must not end the command.
        self._child = subprocess.Popen(
            arguments, env=self._environment(), preexec_fn=_ignore_signals
        )
        # A thread waits: the handler that calls checkpoint() may interrupt this one anywhere.
        threading.Thread(target=self._wait, daemon=True).start()
        try:
            while self._status is None:
                time.sleep(0.2)
        finally:
            if self._status is None:
                self._child.terminate()
        if self._status:
            raise subprocess.CalledProcessError(self._status, arguments)
        return self._status

    def checkpoint(self) -> DelayedSubmission | None:
        """End the command so that it can go on later; what to start then, None if it failed."""
        training = self.command == "train"
        said = -REPEAT_S
        while self._status is None:
            # While a model loads nobody listens, so it is said more than once.
            if time.monotonic() - said >= REPEAT_S:
                said = time.monotonic()
                os.kill(self._child.pid, signal.SIGUSR1 if training else signal.SIGTERM)
            time.sleep(0.2)
        if training and self._status != 0:
            return None
        # The last one counts: `--resume none` was meant for the first start.
        resume = ("--resume", "auto") if training else ()
        return DelayedSubmission(Job(self.command, self.arguments + resume, self.part, self.parts))

    def _wait(self) -> None:
        self._status = self._child.wait()

    def _environment(self) -> dict[str, str]:
        here = submitit.JobEnvironment()
        ours = {
            "RANK": self.part * here.num_tasks + here.global_rank,
            "WORLD_SIZE": self.parts * here.num_tasks,
            "LOCAL_RANK": here.local_rank,
            "LOCAL_WORLD_SIZE": here.num_tasks // here.num_nodes,
        }
        usual = {"OMP_NUM_THREADS": os.environ.get("SLURM_CPUS_PER_TASK", 1)}
        if self.command == "train":
            usual["MASTER_ADDR"] = here.hostnames[0]
            # By the job, so that two on one host do not meet; below what the kernel hands out.
            usual["MASTER_PORT"] = 20000 + int(here.raw_job_id) % 10000
        return {name: str(value) for name, value in {**usual, **os.environ, **ours}.items()}


def _ignore_signals() -> None:
    for number in (signal.SIGUSR1, signal.SIGUSR2):
        signal.signal(number, signal.SIG_IGN)


def main(arguments: Sequence[str] | None = None) -> int:
    """Submit; the exit code. With --local also wait: 1 where the command failed."""
    options = _parser().parse_args(arguments)
    try:
        jobs = submit(options)
    except ConfigError as error:
        print(f"tempolora: {error}", file=sys.stderr)
        return 2
    except (FailedJobError, FailedSubmissionError):  # what sbatch says stands there already
        print("tempolora: sbatch refused the job, nothing was submitted", file=sys.stderr)
        return 2
    for job in jobs:
        print(f"job {job.job_id}, log: {job.paths.stdout}", flush=True)
    if options.local:
        failed = [job for job in jobs if job.exception() is not None]
        for job in failed:
            print(f"tempolora: job {job.job_id} failed, see its log", file=sys.stderr)
        return 1 if failed else 0
    return 0


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="submit.py", description="Submit training or precompute to Slurm, or run it here."
    )
    add = parser.add_argument
    add("--config", type=Path, required=True, help="JSON file")
    add("--set", action="append", default=[], metavar="SECTION.KEY=VALUE", help="as everywhere")
    add("--command", choices=tuple(NOTICE_S), default="train")
    add("--resume", default="auto", metavar="auto|none|FOLDER", help="of training's first start")
    add("--nodes", type=int, default=1)
    add("--gpus-per-node", type=int, metavar="N", help="8; with --local as many as there are")
    add("--processes-per-node", type=int, metavar="N", help="one per GPU, or one")
    add("--cpus-per-process", type=int, default=8, metavar="N")
    add("--time", default="24:00:00", metavar="HH:MM:SS", help="also D-HH:MM:SS")
    add("--partition")
    add("--account")
    add(
        "--sbatch",
        action="append",
        default=[],
        metavar="OPTION=VALUE",
        help="any other option of sbatch, without dashes: qos=high, mem=0",
    )
    add("--array", metavar="N[%M]", help="precompute in N jobs, M of them at once")
    add("--local", action="store_true", help="run here, without Slurm, and wait")
    return parser


def submit(options: argparse.Namespace) -> list[submitit.Job]:
    """Hand the jobs to submitit. Raises ConfigError for mistakes, before anything is submitted."""
    cfg = load_config(options.config, options.set)
    check_model(cfg.model)
    parts, at_once = _array(options)
    minutes = _minutes(options.time)
    processes, gpus = _places(options)
    if options.command == "train":
        check_engine(cfg, options.nodes * processes)
    elif options.resume != "auto":
        raise ConfigError("--resume: precompute always goes on; leave it out")
    if not options.local and shutil.which("sbatch") is None:
        raise ConfigError("sbatch: not found; submit from a host of the cluster, or use --local")
    extra = _sbatch_options(options.sbatch)
    executor = submitit.AutoExecutor(
        _log_folder(cfg),
        cluster="local" if options.local else "slurm",
        slurm_max_num_timeout=MOST_STARTS,
        local_max_num_timeout=MOST_STARTS,
    )
    together = ["--kill-on-bad-exit=1"] if options.command == "train" else []
    executor.update_parameters(
        name=f"tempolora-{options.command}",
        timeout_min=minutes,
        nodes=options.nodes,
        tasks_per_node=processes,
        gpus_per_node=gpus or None,
        cpus_per_task=options.cpus_per_process,
        stderr_to_stdout=True,
        slurm_partition=options.partition,
        slurm_account=options.account,
        slurm_signal_delay_s=NOTICE_S[options.command],
        slurm_array_parallelism=at_once,
        # srun no longer takes the CPUs over from sbatch by itself
        slurm_srun_args=[f"--cpus-per-task={options.cpus_per_process}", *together],
        slurm_additional_parameters={"requeue": True, **extra},
    )
    line = _command_line(options)
    jobs = [Job(options.command, line, part, parts) for part in range(parts)]
    if parts == 1:
        return [executor.submit(jobs[0])]
    with executor.batch():
        return [executor.submit(job) for job in jobs]


def _command_line(options: argparse.Namespace) -> tuple[str, ...]:
    script = Path(__file__).resolve().with_name(f"{options.command}.py")
    line = [str(script), "--config", str(options.config)]
    for override in options.set:
        line += ["--set", override]
    if options.resume != "auto":
        line += ["--resume", options.resume]
    return tuple(line)


def _log_folder(cfg: Config) -> Path:
    return Path(cfg.output.dir).absolute() / "submitit" / "%j"


def _places(options: argparse.Namespace) -> tuple[int, int]:
    """(processes, GPUs) of a node."""
    for name in ("nodes", "processes_per_node", "cpus_per_process"):
        value = getattr(options, name)
        if value is not None and value < 1:
            raise ConfigError(f"--{name.replace('_', '-')}: given {value}; allowed: 1 and more")
    if options.local and options.nodes > 1:
        raise ConfigError(f"--nodes: --local is one node, given {options.nodes}")
    gpus = options.gpus_per_node
    if gpus is None and options.local:
        import torch

        gpus = torch.cuda.device_count()
    elif gpus is None:
        gpus = 8
    if gpus < 0:
        raise ConfigError(f"--gpus-per-node: given {gpus}; allowed: 0 and more")
    return options.processes_per_node or gpus or 1, gpus


def _array(options: argparse.Namespace) -> tuple[int, int | None]:
    """(parts, how many at once; None: Slurm's affair)."""
    if options.array is None:
        return 1, None
    if options.command != "precompute":
        raise ConfigError("--array: only precompute is split into jobs; training takes --nodes")
    if options.local:
        raise ConfigError("--array: needs Slurm; with --local use --processes-per-node")
    found = re.fullmatch(r"([1-9]\d{0,3})(?:%([1-9]\d{0,3}))?", options.array)
    if not found:
        raise ConfigError(f"--array: given {options.array!r}; allowed: a number, as 16 or 16%4")
    return int(found[1]), int(found[2]) if found[2] else None


def _minutes(text: str) -> int:
    """D-HH:MM:SS or HH:MM:SS in minutes, rounded up."""
    found = re.fullmatch(r"(?:(\d{1,3})-)?(\d{1,3}):(\d\d):(\d\d)", text)
    days, hours, minutes, seconds = (int(n or 0) for n in found.groups()) if found else (0,) * 4
    total = -(-(((days * 24 + hours) * 60 + minutes) * 60 + seconds) // 60)
    if not total:
        raise ConfigError(f"--time: given {text!r}; allowed: HH:MM:SS or D-HH:MM:SS, above zero")
    return total


def _sbatch_options(given: list[str]) -> dict[str, str | bool]:
    options: dict[str, str | bool] = {}
    for text in given:
        name, found, value = text.partition("=")
        if not re.fullmatch(r"[a-z][a-z-]*", name):
            raise ConfigError(f"--sbatch: given {text!r}; allowed: OPTION=VALUE, as qos=high")
        options[name] = value if found else True
    return options


if __name__ == "__main__":
    sys.exit(main())
