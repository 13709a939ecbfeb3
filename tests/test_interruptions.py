"""No lost night: whatever ends a run, the same command goes on to the very same LoRA.

A seeded chain of interruptions of one run of two processes; the reference is the run that nothing
interrupted. What they do beside that is in docs/continuation.md, whose table the soak prints.
"""

import json
import math
import os
import random
import re
import shutil
import signal
import time
from collections import Counter
from pathlib import Path

import pytest
import torch
from conftest import SMALL, overrides
from safetensors.torch import load_file

from tempolora.train.checkpoint import latest

ROOT = Path(__file__).parents[1]
LORA = "wan22_temporal_lora_high_noise.safetensors"
EVERY = 2  # steps between checkpoints
KINDS = ("SIGKILL", "SIGTERM", "SIGUSR1", "disk full", "truncated")
ENGINES = ("ddp", "fsdp", "deepspeed")
# Rank and bytes: below the size of the largest file it writes into a checkpoint, 210 kB of
# optimizer; above what else it writes.
FULL = (0, 190_000)


def arguments(engine: str, shards: Path, out: Path, *more: str) -> list[str]:
    return [
        "train",
        *("--config", str(ROOT / "configs" / "toy.json")),
        *overrides(*SMALL, f"data.shards={shards}", f"output.dir={out}", "model.expert=high"),
        *overrides("data.workers=0", "train.validate_every=0", "rhythm.spec_weight=0"),
        *overrides(f"parallel.engine={engine}", f"train.checkpoint_every={EVERY}", *more),
    ]


def lines(out: Path) -> list[dict]:
    path = out / "metrics.jsonl"
    text = path.read_text() if path.is_file() else ""
    return [json.loads(line) for line in text.splitlines(keepends=True) if line.endswith("\n")]


def root(out: Path) -> Path:
    return out / "checkpoints" / "high"


def newest(out: Path) -> int:
    found = latest(root(out))
    return found.state["step"] if found else 0


# --- Interruptions --------------------------------------------------------------------------------


def interrupt(kind: str, draw: random.Random, pids: list[int], out: Path) -> str:
    """Send the signal at a random moment; which sort of moment it was."""
    moment = draw.choice(("loading", "step", "saving"))
    before, began = len(lines(out)), time.monotonic()
    while not all(listens(pid) for pid in pids) and time.monotonic() < began + 60:
        time.sleep(0.002)  # before that a signal ends Python's own start
    if moment == "loading":
        time.sleep(draw.uniform(0, 1.5))
    else:
        ahead = draw.randint(1, 3)
        while len(lines(out)) < before + ahead and time.monotonic() < began + 60:
            time.sleep(0.002)
    if moment == "step":
        time.sleep(draw.uniform(0, 0.2))
    late = before + 4 * EVERY
    while moment == "saving" and not any(root(out).glob(".step-*.tmp")):
        time.sleep(0.0005)
        if len(lines(out)) > late:  # missed them all: on a busy machine a save is seen by luck
            moment = "step"
    for _ in range(draw.randint(1, 2)):
        try:
            os.kill(draw.choice(pids), signal.Signals[kind])
        except ProcessLookupError:
            return "after the end"
    return moment


def listens(pid: int) -> bool:
    """Whether the process has a handler for SIGUSR1."""
    try:
        status = Path(f"/proc/{pid}/status").read_text()
    except OSError:
        return False
    caught = int(re.search(r"^SigCgt:\s*(\w+)", status, re.M)[1], 16)
    return bool(caught >> (signal.SIGUSR1 - 1) & 1)


def chain(ranks, engine: str, shards: Path, folder: Path, kinds: list[str], seed: int) -> Counter:
    """Interrupt one run as often as `kinds` is long, let it end, and compare; what happened."""
    draw = random.Random(seed)
    steps = 8 * len(kinds) + 8  # more than are made between interruptions
    size = 2
    whole, out, log = folder / "whole", folder / "out", folder / "log"
    more = (f"train.max_steps={steps}", "train.gradient_accumulation=2", "train.deterministic=true")
    assert ranks.run(size, arguments(engine, shards, whole, *more), log) == [0, 0], log.read_text()
    seen = Counter()
    for number, kind in enumerate(kinds):
        start, before = newest(out), len(lines(out))
        full = FULL if kind == "disk full" else None
        log = folder / f"log.{number}"
        pids = ranks.start(size, arguments(engine, shards, out, *more), log, full=full)
        moment = "saving"
        if kind != "disk full":
            stop_by = "SIGKILL" if kind == "truncated" else kind
            moment = interrupt(stop_by, draw, pids, out)
        codes = ranks.wait()
        said = log.read_text()
        # of this run: steps that an earlier one lost stand in the log as well
        reached = max([line["step"] for line in lines(out)[before:]], default=start)
        if kind in ("SIGTERM", "SIGUSR1"):
            assert codes == [0, 0], f"{kind} {moment}: {codes}\n{said}"
            assert newest(out) == reached, said  # nothing at all is lost
        elif kind == "disk full":
            assert codes == [2, 2], f"{codes}\n{said}"
            assert re.search(r"the checkpoint of step \d+ could not be written .*\(File too", said)
            assert not any(root(out).glob(".step-*")), "half a checkpoint was left"
        if kind == "truncated" and newest(out) > EVERY:  # else there is none before it
            path = draw.choice(sorted((root(out) / f"step-{newest(out):06d}").iterdir()))
            os.truncate(path, draw.randrange(path.stat().st_size))
        assert newest(out) >= start - (EVERY if kind == "truncated" else 0)
        lost = reached - newest(out)
        # one interval; and one more where the newest was not sealed yet, or was damaged
        assert lost <= 2 * EVERY, f"{kind} {moment}: {lost} steps lost"
        seen[f"{kind}, {moment}"] += 1
        name = f"most steps lost: {kind}"
        seen[name] = max(seen[name], lost)
    log = folder / "log.last"
    assert ranks.run(size, arguments(engine, shards, out, *more), log) == [0, 0], log.read_text()
    ours, theirs = load_file(out / LORA), load_file(whole / LORA)
    assert ours.keys() == theirs.keys()
    assert all(torch.equal(ours[name], theirs[name]) for name in ours)
    losses = {line["step"]: line["loss"] for line in lines(out)}
    assert losses == {line["step"]: line["loss"] for line in lines(whole)}
    return seen


@pytest.mark.slow
@pytest.mark.parametrize("engine", ["fsdp", pytest.param("deepspeed", marks=pytest.mark.soak)])
def test_interrupted_runs_go_on_to_the_same_lora_a_sample(engine, ranks, toy_shards, tmp_path):
    kinds = {"fsdp": ["SIGUSR1", "SIGKILL"], "deepspeed": ["disk full"]}[engine]
    seen = chain(ranks, engine, toy_shards, tmp_path, kinds, seed=0)
    assert sum(count for name, count in seen.items() if "," in name) == len(kinds)


@pytest.mark.soak
@pytest.mark.parametrize("engine", ENGINES)
def test_thirty_interruptions_lose_nothing(engine, ranks, toy_shards, tmp_path, capsys):
    count = int(os.environ.get("INTERRUPTIONS", "30"))
    kinds = [KINDS[number % len(KINDS)] for number in range(count)]
    random.Random(1).shuffle(kinds)
    began = time.monotonic()
    seen = chain(ranks, engine, toy_shards, tmp_path, kinds, seed=1)
    with capsys.disabled():
        print(f"\n{engine}: {count} interruptions in {time.monotonic() - began:.0f} s")
        for name, number in sorted(seen.items()):
            print(f"| {engine} | {name} | {number} |")


# --- Another number of processes ------------------------------------------------------------------


@pytest.mark.slow
@pytest.mark.parametrize(
    ("experts", "before", "after"),
    [
        ("both", ("ddp", 2, 1), ("plain", 1, 2)),
        ("high", ("deepspeed", 2, 2), ("deepspeed", 4, 1)),
        ("low", ("plain", 1, 2), ("deepspeed", 2, 1)),
    ],
    ids=["ddp_to_plain", "deepspeed_on_more", "plain_to_deepspeed"],
)
def test_on_other_processes_a_run_meets_the_same_samples_and_losses(
    experts, before, after, ranks, toy_shards, tmp_path
):
    """(engine, processes, microsteps) from step 0, and after step 2, in the middle of an epoch.

    In fp32 only the order of sums differs, 1e-7 a sum.
    """
    whole, out, log = tmp_path / "whole", tmp_path / "out", tmp_path / "log"

    def train(folder, engine, processes, microsteps):
        more = (f"model.expert={experts}", f"train.gradient_accumulation={microsteps}")
        sets = arguments(engine, toy_shards, folder, *more)
        assert ranks.run(processes, sets, log) == [0] * processes, log.read_text()

    train(whole, *before)
    shutil.copytree(whole, out)
    (out / "metrics.jsonl").unlink()
    for last in out.glob("checkpoints/*/step-000004"):
        shutil.rmtree(last)
    train(out, *after)
    expected = [line for line in lines(whole) if line["step"] > 2]
    assert [(line["expert"], line["step"]) for line in lines(out)] == [
        (line["expert"], line["step"]) for line in expected
    ]
    for key in ("loss", "flow", "sigma"):
        ours, theirs = ([line[key] for line in each] for each in (lines(out), expected))
        assert ours == pytest.approx(theirs, rel=1e-5), key


@pytest.mark.slow
def test_8_bit_state_that_deepspeed_cut_goes_on_as_it_was_cut_and_not_otherwise(
    ranks, toy_shards, tmp_path
):
    whole, out, log = tmp_path / "whole", tmp_path / "out", tmp_path / "log"
    eight = "train.optimizer=adamw8bit"
    assert ranks.run(2, arguments("deepspeed", toy_shards, whole, eight), log) == [0, 0]
    shutil.copytree(whole, out)
    shutil.rmtree(root(out) / "step-000004")
    for engine, processes, takes in (
        ("plain", 1, "takes it whole"),
        ("deepspeed", 1, "takes it as DeepSpeed cuts it for 1 processes"),
    ):
        more = (eight, "train.gradient_accumulation=2")
        codes = ranks.run(processes, arguments(engine, toy_shards, out, *more), log)
        said = log.read_text()
        assert codes == [2], said
        assert "8-bit optimizer state as DeepSpeed cuts it for 2 processes, this run" in said
        assert takes in said
    assert ranks.run(2, arguments("deepspeed", toy_shards, out, eight), log) == [0, 0]
    for name in ("lora", "optimizer"):
        file = f"step-000004/{name}.safetensors"
        ours, theirs = load_file(root(out) / file), load_file(root(whole) / file)
        assert ours.keys() == theirs.keys()
        assert all(torch.equal(ours[key], theirs[key]) for key in ours), name
    assert any(value.dtype == torch.uint8 for value in theirs.values())


# --- Losses and gradients that are not finite -----------------------------------------------------


@pytest.mark.slow
@pytest.mark.parametrize("engine", ["plain", "fsdp", "deepspeed"])
def test_a_loss_that_is_not_finite_costs_its_step_alone_on_all_processes(
    engine, ranks, toy_shards, tmp_path
):
    """Step 2's only bad sample is on the last process; step 4 and 5 are bad too, and one too many.

    ddp differs from fsdp in the frozen base alone.
    """
    out, log = tmp_path / "out", tmp_path / "log"
    size = 1 if engine == "plain" else 2
    more = ("train.checkpoint_every=1", "train.max_steps=6", "train.max_skipped=2")
    sets = arguments(engine, toy_shards, out, *more, "train.ema_decay=0.5")
    codes = ranks.run(size, sets, log, spoilt=(size - 1, [1, 3, 4]))
    said = log.read_text()
    assert codes == [1] * size, said
    assert "step 2: the gradient's norm is" in said
    assert "step 5: loss or gradient was not finite in 2 steps in a row" in said
    written = lines(out)
    assert [line["step"] for line in written] == [1, 2, 3, 4]
    for step, line in enumerate(written, start=1):
        assert ("skipped" in line) == (step in (2, 4))
        assert step in (2, 4) or math.isfinite(line["loss"])
    assert len(written[1]["skipped"]) == 1  # of the one process at fault
    for name in ("lora", "ema", "optimizer"):
        one, two, three = (
            load_file(root(out) / f"step-{step:06d}" / f"{name}.safetensors") for step in (1, 2, 3)
        )
        assert all(torch.equal(one[key], two[key]) for key in one), name
        assert any(not torch.equal(three[key], two[key]) for key in two), name
        assert all(value.isfinite().all() for value in three.values())


# --- Hangs ----------------------------------------------------------------------------------------


@pytest.mark.slow
def test_of_two_processes_the_one_that_hangs_is_named(ranks, toy_shards, tmp_path):
    """Process 1 is stopped; process 0 says so and ends by itself."""
    out, log = tmp_path / "out", tmp_path / "log"
    sets = arguments(
        "ddp", toy_shards, out, "train.max_steps=100000", "parallel.timeout_minutes=0.2"
    )
    first, hung = ranks.start(2, sets, log, apart=True)
    told = Path(f"{log}.0")  # by process 0
    try:
        deadline = time.monotonic() + 240
        while len(lines(out)) < 3:
            assert alive(first) and time.monotonic() < deadline, told.read_text()
            time.sleep(0.05)
        os.kill(hung, signal.SIGSTOP)
        began = time.monotonic()
        while alive(first):
            assert time.monotonic() < began + 60, "process 0 waits for ever"
            time.sleep(0.1)
    finally:
        for pid in (first, hung):
            if alive(pid):
                os.kill(pid, signal.SIGKILL)
        codes = ranks.wait()
    assert codes == [1, -signal.SIGKILL]
    said = told.read_text()
    assert re.search(
        r"tempolora: stopped: process 0 has waited \d+ s at step \d+, .*: process 1 \(host .*\) is "
        r"stopped or gone: silent since step \d+, (reading|forward|averaging|measuring|saving)",
        said,
    ), said


def alive(pid: int) -> bool:
    return Path(f"/proc/{pid}").exists()


def test_who_is_behind_is_told_from_who_waits():
    from tempolora.train.heartbeat import describe

    def entry(beats, marks, step, phase):
        return [beats, marks, step, phase, 60.0, "node"]

    mine = entry(50, 21, 5, "averaging gradients")
    behind = {1: entry(50, 20, 5, "reading samples"), 2: entry(50, 21, 5, "averaging gradients")}
    later = {r: [e[0] + 3, *e[1:]] for r, e in behind.items()}
    said = describe(0, mine, behind, later)
    assert said.endswith("process 1 (host node) is behind, at step 5, reading samples")
    silent = later | {2: behind[2]}
    assert "process 2 (host node) is stopped or gone" in describe(0, mine, behind, silent)
    same = {1: entry(50, 21, 5, "averaging gradients")}
    assert "and so have all others" in describe(0, mine, same, {1: [53, *same[1][1:]]})
