"""Both experts at once: each group trains as if it were alone, and what ends one ends the other.

The reference is one plain process that trains one expert after the other. Processes are real ones:
under torchrun and deepspeed, and started without where a launcher must not help, as on two hosts.
"""

import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import time
from itertools import chain
from pathlib import Path

import pytest
import torch
from conftest import SMALL, overrides
from safetensors.torch import load_file

from tempolora.cli import main
from tempolora.config import ConfigError, load_config
from tempolora.results.report import write_report
from tempolora.train.metrics import MetricsLog, join_metrics
from tempolora.train.plan import card_of
from tempolora.train.plan_text import Report
from tempolora.train.rates import GIB
from tempolora.train.split import shares

ROOT = Path(__file__).parents[1]
TOY = ["--config", str(ROOT / "configs" / "toy.json")]
SCRIPT = [str(ROOT / "launch" / "train.py"), *TOY]
ONE_EACH = ["torchrun", "--standalone", "--nproc_per_node", "2"]
MANY = ("train.max_steps=400", "train.checkpoint_every=400", "data.held_out=0")
"""More steps than a test waits for."""


def settings(shards: Path, out: Path, *more: str) -> list[str]:
    measured = ("data.held_out=1", "train.validate_every=4")
    return overrides(*SMALL, f"data.shards={shards}", f"output.dir={out}", *measured, *more)


def start(launcher: list[str], arguments: list[str], **env: str) -> subprocess.Popen:
    """Start launch/train.py as a user would; both of its streams in one."""
    folder = Path(sys.executable).parent
    path = f"{folder}{os.pathsep}{os.environ['PATH']}"
    return subprocess.Popen(
        [str(folder / launcher[0]), *launcher[1:], *SCRIPT, *arguments],
        env=os.environ | {"PATH": path, "PYTHONPATH": str(ROOT)} | env,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )


def finish(run: subprocess.Popen, within: float = 300) -> str:
    try:
        return run.communicate(timeout=within)[0]
    finally:
        run.kill()


def losses(out: Path) -> dict[tuple[str, int], float]:
    """By expert and step; of experts that trained at once also while they do."""
    lines = chain.from_iterable(p.read_text().splitlines() for p in sorted(out.glob("metrics*")))
    entries = [json.loads(line) for line in lines]
    return {(e["expert"], e["step"]): e["loss"] for e in entries if "loss" in e}


def await_steps(out: Path, run: subprocess.Popen) -> None:
    """Until both experts have done one."""
    while {expert for expert, _ in losses(out)} != {"high", "low"}:
        assert run.poll() is None, run.communicate()[0]
        time.sleep(0.05)


def process_of(run: subprocess.Popen, rank: int) -> int:
    """The process id of a trainer, found among the launcher's children by its environment."""
    listed = Path(f"/proc/{run.pid}/task/{run.pid}/children").read_text().split()
    for pid in listed:
        if f"\0RANK={rank}\0".encode() in Path(f"/proc/{pid}/environ").read_bytes():
            return int(pid)
    raise AssertionError(f"no process of rank {rank} among {listed}")


def newest(out: Path, expert: str) -> Path:
    return max((out / "checkpoints" / expert).glob("step-*"))


def same_tensors(a: Path, b: Path) -> bool:
    ours, theirs = load_file(a), load_file(b)
    same = all(torch.equal(ours[name], theirs[name]) for name in theirs)
    return ours.keys() == theirs.keys() and same


@pytest.fixture(scope="module")
def in_turn(toy_shards, tmp_path_factory):
    """One process, one expert after the other."""
    out = tmp_path_factory.mktemp("in_turn") / "out"
    assert main(["train", *settings(toy_shards, out)]) == 0
    return out


@pytest.mark.slow
def test_a_signal_to_one_group_stops_both_and_the_resumed_run_equals_the_uninterrupted_one(
    in_turn, ranks, toy_shards, tmp_path
):
    """The first by torchrun, which meets the groups at a store of its own; the second forked."""
    out = tmp_path / "out"
    run = start(ONE_EACH, settings(toy_shards, out, *MANY))
    await_steps(out, run)
    os.kill(process_of(run, 1), signal.SIGUSR1)
    said = finish(run, within=60)
    assert "SIGUSR1: stopping after this step" in said
    for expert in ("high", "low"):
        last = max(step for name, step in losses(out) if name == expert)
        assert last < 400
        assert newest(out, expert).name == f"step-{last:06d}"
        assert (newest(out, expert) / "manifest.json").is_file()
    assert not list(out.glob("*.safetensors"))

    # both experts of an uninterrupted run go on from step 2, in groups
    resumed = tmp_path / "resumed"
    shutil.copytree(in_turn, resumed)
    (resumed / "metrics.jsonl").unlink()
    for expert in ("high", "low"):
        shutil.rmtree(resumed / "checkpoints" / expert / "step-000004")
    log = tmp_path / "log"
    sets = settings(toy_shards, resumed)
    assert ranks.run(2, ["train", *TOY, *sets], log) == [0, 0], log.read_text()
    whole = losses(in_turn)
    assert losses(resumed) == {key: whole[key] for key in whole if key[1] > 2}
    assert [path.name for path in resumed.glob("metrics*")] == ["metrics.jsonl"]
    for name in ("high", "low"):
        lora = f"wan22_temporal_lora_{name}_noise.safetensors"
        assert same_tensors(resumed / lora, in_turn / lora)


@pytest.mark.soak
def test_killing_a_process_ends_the_other_group_with_its_state_saved(toy_shards, tmp_path):
    out = tmp_path / "out"
    run = start(ONE_EACH, settings(toy_shards, out, *MANY))
    await_steps(out, run)
    os.kill(process_of(run, 0), signal.SIGKILL)
    said = finish(run, within=60)
    assert run.returncode != 0, said
    last = max(step for name, step in losses(out) if name == "low")
    assert newest(out, "low").name == f"step-{last:06d}", said
    assert not (out / "checkpoints" / "high").exists()


def start_by_hand(shards: Path, out: Path, *more: str) -> list[subprocess.Popen]:
    """Two processes that no launcher ends when the other is gone, as on two hosts."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = str(probe.getsockname()[1])
    where = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port, "WORLD_SIZE": "2"}
    return [
        start(["python"], settings(shards, out, *MANY, *more), RANK=f"{n}", LOCAL_RANK="0", **where)
        for n in range(2)
    ]


@pytest.mark.slow
def test_a_failure_in_one_group_stops_the_other_where_no_launcher_does(ranks, toy_shards, tmp_path):
    out, log = tmp_path / "out", tmp_path / "log"
    more = ('rhythm.spec_weight={"high": 1e39, "low": 0.5}', "train.log_every=1")
    sets = settings(toy_shards, out, *MANY, *more)
    codes = ranks.run(2, ["train", *TOY, *sets], log, apart=True)
    high, low = (Path(f"{log}.{rank}").read_text() for rank in range(2))
    assert codes == [1, 1], high + low
    assert "norm is" in high
    assert "the run failed: high failed in process 0" in low
    last = max(step for name, step in losses(out) if name == "low")
    assert newest(out, "low").name == f"step-{last:06d}"
    # nothing of a failed run is lost to the report or to the run that goes on
    assert (out / "metrics-low.jsonl").is_file()
    assert "low-noise" in write_report(out).read_text()


@pytest.mark.soak
@pytest.mark.parametrize("rank", [0, 1])
def test_a_dead_process_is_missed_where_no_launcher_sees_it(rank, toy_shards, tmp_path):
    """Process 0 holds the store, which is missed at once; another is missed by its silence."""
    out = tmp_path / "out"
    more = ("train.max_steps=100000", "train.gradient_accumulation=8")
    runs = start_by_hand(toy_shards, out, *more)
    await_steps(out, runs[1 - rank])
    runs[rank].kill()
    said = finish(runs[1 - rank], within=120)
    assert runs[1 - rank].returncode == 1
    assert ("meeting point is gone" if rank == 0 else "process 1 has not been heard of") in said
    expert = ("high", "low")[1 - rank]
    last = max(step for name, step in losses(out) if name == expert)
    assert newest(out, expert).name == f"step-{last:06d}"


@pytest.mark.soak
def test_a_signal_to_a_group_that_waits_stops_the_one_that_trains(in_turn, toy_shards, tmp_path):
    out = tmp_path / "out"
    shutil.copytree(in_turn, out)
    shutil.rmtree(out / "checkpoints" / "low")
    (out / "metrics.jsonl").unlink()
    (out / "wan22_temporal_lora_low_noise.safetensors").unlink()
    run = start(ONE_EACH, settings(toy_shards, out, "train.gradient_accumulation=100"))
    while not losses(out):
        assert run.poll() is None, run.communicate()[0]
        time.sleep(0.05)
    os.kill(process_of(run, 0), signal.SIGUSR1)
    said = finish(run, within=120)
    assert "high is trained, the other expert was stopped" in said
    assert newest(out, "low").name < "step-000004"
    assert not (out / "wan22_temporal_lora_low_noise.safetensors").exists()


@pytest.mark.soak
@pytest.mark.parametrize(
    ("launcher", "engine"),
    [
        (["torchrun", "--standalone", "--nproc_per_node", "4"], "fsdp"),
        (["deepspeed", "--num_accelerators", "4"], "deepspeed"),
    ],
)
def test_groups_of_two_equal_one_process_that_takes_two_microsteps(
    launcher, engine, toy_shards, tmp_path
):
    reference, out = tmp_path / "reference", tmp_path / "out"
    accumulate = settings(toy_shards, reference, "train.gradient_accumulation=2")
    assert main(["train", *accumulate]) == 0
    more = [] if engine == "deepspeed" else [f"parallel.engine={engine}"]
    run = start(launcher, settings(toy_shards, out, *more))
    said = finish(run, within=540)
    assert run.returncode == 0, said
    assert "both experts at once: high on 2, low on 2" in said
    assert losses(out) == pytest.approx(losses(reference), rel=1e-5)
    for expert in ("high", "low"):
        state = json.loads((newest(out, expert) / "state.json").read_text())
        assert (state["processes"], state["draws"]) == (2, 8)


# --- Who trains what ------------------------------------------------------------------------------


def a14b(*more: str):
    return load_config(ROOT / "configs" / "a14b.json", more)


def test_halves_train_at_once_and_the_odd_process_trains_the_low_noise_expert():
    assert shares(a14b(), 8, None) == {"high": 4, "low": 4}
    assert shares(a14b(), 3, None) == {"high": 1, "low": 2}
    assert shares(a14b("parallel.expert_split=[6, 2]"), 8, None) == {"high": 6, "low": 2}


@pytest.mark.parametrize(
    "more", [("parallel.expert_split=null",), ("model.expert=low",), ("model.expert=high",)]
)
def test_all_processes_train_one_expert_where_that_is_asked_for(more):
    assert shares(a14b(*more), 8, None) == {}


def test_auto_makes_no_group_of_one_for_an_engine_that_shares():
    assert shares(a14b("parallel.engine=fsdp"), 3, None) == {}
    assert shares(a14b("parallel.engine=fsdp"), 4, None) == {"high": 2, "low": 2}
    assert shares(a14b(), 1, None) == {}


def test_auto_lets_all_gpus_share_a_base_that_half_of_them_cannot_hold():
    cfg = a14b("parallel.engine=fsdp")
    assert shares(cfg, 4, card_of(40 * GIB, gpus=4)) == {"high": 2, "low": 2}
    assert shares(cfg, 4, card_of(34 * GIB, gpus=4)) == {}
    assert shares(cfg, 8, card_of(34 * GIB, gpus=8)) == {"high": 4, "low": 4}


@pytest.mark.parametrize(
    ("more", "processes", "message"),
    [
        (["parallel.expert_split=[2, 3]"], 4, r"expert_split: \[2, 3\] are 5 processes, 4 were"),
        (["parallel.expert_split=[1, 3]", "parallel.engine=fsdp"], 4, "nothing to share with one"),
    ],
)
def test_a_split_that_does_not_go_with_the_processes_is_refused(more, processes, message):
    with pytest.raises(ConfigError, match=message):
        shares(a14b(*more), processes, None)


def test_a_split_of_one_expert_is_refused():
    with pytest.raises(ConfigError, match=r"parallel\.expert_split: .*no meaning"):
        a14b("parallel.expert_split=[2, 2]", "model.expert=low")
    with pytest.raises(ConfigError, match=r"parallel\.expert_split"):
        a14b("parallel.expert_split=[0, 2]")


def test_the_plan_says_who_trains_what_and_for_how_long():
    split = Report(a14b(), card_of(80 * GIB, gpus=8), 80 * GIB, named=False)
    assert "high on 4 GPUs: 800 steps of 4 samples:" in "\n".join(split.lines())
    turns = a14b("parallel.expert_split=null")
    in_turn = Report(turns, card_of(80 * GIB, gpus=8), 80 * GIB, named=False)
    assert "high on 8 GPUs: 800 steps of 8 samples:" in "\n".join(in_turn.lines())
    assert split.as_json()["expert_split"] == [4, 4]
    assert in_turn.as_json()["expert_split"] is None
    # each process brings its own samples: half the GPUs take as long for a step
    assert split.as_json()["hours"] == pytest.approx(in_turn.as_json()["hours"])


def test_metrics_of_two_experts_become_one_file_in_which_later_lines_stay_later(tmp_path):
    (tmp_path / "metrics.jsonl").write_text('{"expert": "low", "step": 1, "loss": 0}\n{"torn')
    for expert in ("high", "low"):
        with MetricsLog(tmp_path, expert, 0, (), apart=True) as metrics:
            metrics.write(1, {"loss": 1.0})
    join_metrics(tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == ["metrics.jsonl"]
    lines = (tmp_path / "metrics.jsonl").read_text().splitlines()
    assert lines[1] == '{"torn'
    joined = [json.loads(line) for line in (lines[0], *lines[2:])]
    assert [(e["expert"], e["loss"]) for e in joined] == [("low", 0), ("high", 1.0), ("low", 1.0)]
    join_metrics(tmp_path)
    assert (tmp_path / "metrics.jsonl").read_text().splitlines() == lines
