"""launch/submit.py: submitit's own local executor runs real processes; what reaches sbatch is read
from a stand-in that keeps it. Real Slurm: test_slurm_real.py."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from conftest import SMALL, overrides

ROOT = Path(__file__).resolve().parents[1]
TOY = ["--config", str(ROOT / "configs" / "toy.json")]

# In place of the command: writes down what reached it, and on its first start waits for a signal.
COMMAND = """
import json, os, signal, sys, time
from pathlib import Path

folder, status, rank = Path(sys.argv[1]), int(sys.argv[2]), os.environ["RANK"]
starts = len(list(folder.glob(f"{rank}-*.json")))
heard = []
for number in (signal.SIGUSR1, signal.SIGTERM):
    signal.signal(number, lambda *_: heard.append(1))
(folder / f"{rank}-{starts}.json.part").write_text(
    json.dumps({"argv": sys.argv[3:], "env": dict(os.environ), "task": os.getppid()})
)
(folder / f"{rank}-{starts}.json.part").rename(folder / f"{rank}-{starts}.json")
if "wait" in sys.argv and not starts:
    for _ in range(600):
        if heard:
            sys.exit(status)
        time.sleep(0.1)
    sys.exit("no signal came")
"""


@pytest.fixture
def submit(monkeypatch):
    """launch/submit.py as a module that the jobs find, too."""
    monkeypatch.syspath_prepend(str(ROOT / "launch"))
    monkeypatch.setenv("PYTHONPATH", f"{ROOT}:{ROOT / 'launch'}")
    for name in [n for n in os.environ if n.startswith(("SLURM_", "MASTER_", "CUDA_"))]:
        monkeypatch.delenv(name)
    import submit

    return submit


@pytest.fixture
def run(submit, tmp_path):
    """run(command, *arguments, status=0, tasks=1, **part): a submitted stand-in, and its folder."""
    import submitit

    (tmp_path / "command.py").write_text(COMMAND)
    (tmp_path / "seen").mkdir()

    def start(command, *arguments, status=0, tasks=1, **part):
        executor = submitit.AutoExecutor(tmp_path / "logs", cluster="local")
        executor.update_parameters(timeout_min=5, tasks_per_node=tasks)
        line = (str(tmp_path / "command.py"), str(tmp_path / "seen"), str(status), *arguments)
        return executor.submit(submit.Job(command, line, **part))

    start.seen = tmp_path / "seen"
    return start


def seen(run):
    """(rank, start) -> what that process was given."""
    return {
        tuple(int(n) for n in path.stem.split("-")): json.loads(path.read_text())
        for path in run.seen.glob("*.json")
    }


def interrupt(run, job):
    """To submitit's task what Slurm sends before the time is up, once the command waits for it."""
    deadline = time.monotonic() + 60
    while not seen(run):
        assert time.monotonic() < deadline, job.stderr()
        time.sleep(0.1)
    os.kill(seen(run)[0, 0]["task"], signal.SIGUSR2)


def test_every_task_of_a_training_job_has_its_rank_and_the_same_meeting_point(run):
    run("train", tasks=2).results()
    given = [seen(run)[rank, 0]["env"] for rank in (0, 1)]
    assert [(e["RANK"], e["LOCAL_RANK"], e["WORLD_SIZE"]) for e in given] == [
        ("0", "0", "2"),
        ("1", "1", "2"),
    ]
    assert given[0]["MASTER_ADDR"] == given[1]["MASTER_ADDR"]
    assert given[0]["MASTER_PORT"] == given[1]["MASTER_PORT"]
    assert 20000 <= int(given[0]["MASTER_PORT"]) < 30000


def test_parts_of_precompute_share_out_all_ranks_and_do_not_meet(run):
    for part in range(2):
        run("precompute", tasks=2, part=part, parts=2).results()
    given = seen(run)
    assert sorted(given) == [(rank, 0) for rank in range(4)]
    assert {g["env"]["WORLD_SIZE"] for g in given.values()} == {"4"}
    assert not any("MASTER_ADDR" in g["env"] for g in given.values())


@pytest.mark.parametrize(
    ("command", "status", "added"),
    [
        ("train", 0, ["--resume", "auto"]),
        ("precompute", 3, []),
    ],
)
def test_an_interrupted_job_saves_starts_again_and_goes_on(run, command, status, added):
    job = run(command, "wait", "--resume", "none", status=status)
    interrupt(run, job)
    assert job.result() == 0
    given = seen(run)
    assert sorted(given) == [(0, 0), (0, 1)]
    assert given[0, 1]["argv"] == ["wait", "--resume", "none", *added]


def test_training_that_fails_while_it_is_stopped_is_not_started_again(run):
    import submitit

    job = run("train", "wait", status=1)
    interrupt(run, job)
    with pytest.raises(submitit.core.utils.UncompletedJobError):
        job.result()
    assert sorted(seen(run)) == [(0, 0)]


def test_what_is_pickled_is_small(submit):
    import cloudpickle

    cloudpickle.register_pickle_by_value(submit)  # as when it is the program
    try:
        job = submit.Job("train", ("train.py", "--config", "a.json"))
        assert len(cloudpickle.dumps(job)) < 10_000
    finally:
        cloudpickle.unregister_pickle_by_value(submit)


@pytest.mark.slow
def test_a_local_run_leaves_what_the_command_leaves(toy_shards, tmp_path):
    """The program itself, in a process of its own; it waits for the job."""
    out = tmp_path / "out put"
    paths = (f"data.shards={toy_shards}", f"output.dir={out}")
    sets = overrides(*SMALL, *paths, "model.expert=high", "train.max_steps=2")
    done = subprocess.run(
        [sys.executable, ROOT / "launch" / "submit.py", *TOY, "--local", *sets],
        env=os.environ | {"PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    assert (out / "wan22_temporal_lora_high_noise.safetensors").is_file()
    (log,) = (out / "submitit").glob("*/*_0_log.out")
    assert str(log) in done.stdout and "wrote" in log.read_text()


# --- What reaches sbatch --------------------------------------------------------------------------


@pytest.fixture
def sbatch(tmp_path, monkeypatch):
    """The file in which a stand-in keeps the script it was given; SBATCH_SAYS_NO lets it refuse."""
    shims = tmp_path / "bin"
    shims.mkdir()
    kept = tmp_path / "submitted.sh"
    (shims / "sbatch").write_text(
        '#!/bin/bash\nif [[ -n "$SBATCH_SAYS_NO" ]]; then echo "$SBATCH_SAYS_NO" >&2; exit 1; fi\n'
        f'cat "$1" > {kept}\necho Submitted batch job 77\n'
    )
    (shims / "srun").write_text("#!/bin/bash\n")
    for shim in shims.iterdir():
        shim.chmod(0o755)
    monkeypatch.setenv("PATH", f"{shims}:{os.environ['PATH']}")
    return kept


def directives(text):
    return {line.removeprefix("#SBATCH --") for line in text.splitlines() if "#SBATCH" in line}


def test_training_asks_slurm_for_a_task_per_gpu_and_notice(submit, sbatch, tmp_path, capsys):
    out = overrides(f"output.dir={tmp_path / 'out'}")
    options = ["--nodes", "2", "--time", "1-00:00:30", "--partition", "gpu", "--sbatch", "qos=high"]
    assert submit.main([*TOY, *out, *options]) == 0
    text = sbatch.read_text()
    assert {
        *("nodes=2", "ntasks-per-node=8", "gpus-per-node=8", "cpus-per-task=8", "time=1441"),
        *("partition=gpu", "qos=high", "requeue", "open-mode=append", "signal=USR2@300"),
    } <= directives(text)
    assert "--cpus-per-task=8 --kill-on-bad-exit=1" in text
    assert f"job 77, log: {tmp_path / 'out' / 'submitit' / '77'}" in capsys.readouterr().out


def test_precompute_array_is_one_submission(submit, sbatch, tmp_path, capsys):
    out = overrides(f"output.dir={tmp_path / 'out'}")
    assert submit.main([*TOY, *out, "--command", "precompute", "--array", "6%2"]) == 0
    assert "array=0-5%2" in directives(sbatch.read_text())
    assert [line.split(",")[0] for line in capsys.readouterr().out.splitlines()] == [
        f"job 77_{part}" for part in range(6)
    ]


def test_what_sbatch_refuses_is_said_without_a_traceback(
    submit, sbatch, tmp_path, monkeypatch, capsys
):
    monkeypatch.setenv("SBATCH_SAYS_NO", "sbatch: error: invalid partition specified: gpu")
    assert submit.main([*TOY, *overrides(f"output.dir={tmp_path / 'out'}")]) == 2
    said = capsys.readouterr().err
    assert said.splitlines() == [
        "sbatch: error: invalid partition specified: gpu",
        "tempolora: sbatch refused the job, nothing was submitted",
    ]


@pytest.mark.parametrize(
    ("options", "said"),
    [
        (["--config", "absent.json"], "absent.json"),
        ([*TOY, "--set", "train.lr=fast"], "train.lr"),
        ([*TOY, "--set", "parallel.engine=plain"], "parallel.engine"),
        ([*TOY, "--time", "tomorrow"], "--time"),
        ([*TOY, "--array", "4"], "--array: only precompute"),
        ([*TOY, "--command", "precompute", "--array", "0-3"], "--array: given"),
        ([*TOY, "--command", "precompute", "--array", "4", "--local"], "--array: needs Slurm"),
        ([*TOY, "--command", "precompute", "--resume", "none"], "--resume"),
        ([*TOY, "--local", "--nodes", "2"], "--nodes"),
        ([*TOY, "--nodes", "0"], "--nodes"),
        ([*TOY, "--sbatch", "#rm -rf"], "--sbatch"),
    ],
)
def test_a_mistake_is_one_sentence_and_nothing_is_submitted(submit, sbatch, options, said, capsys):
    assert submit.main(options) == 2
    line = capsys.readouterr().err
    assert said in line and line.count("\n") == 1
    assert not sbatch.exists()


def test_without_slurm_the_sentence_says_so(submit, monkeypatch, capsys):
    monkeypatch.setenv("PATH", "")
    assert submit.main(TOY) == 2
    assert "sbatch: not found" in capsys.readouterr().err
