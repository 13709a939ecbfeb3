"""The batch scripts hand every argument on unharmed, ask Slurm for what they use, and pass USR1 on.

`srun`, `scontrol` and `scancel` are stand-ins on PATH that run the command here; torchrun is real;
in place of launch/*.py stands a script that writes down what reached it.
"""

import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
SCRIPTS = ["train.sh", "precompute.sh"]
ARGS = ["--set", "output.dir=my run's $HOME", "--set", 'output.prompts=["a *", "b \\" c"]', ""]

# Runs the command once per task, as Slurm would, and takes srun's status: the worst one.
SRUN = """#!/bin/bash
printf '%s\\0' "$@" > "$RECORD/srun"
while [[ "$1" == --* ]]; do shift; done
pids=()
for ((task = 0; task < ${FAKE_TASKS:-1}; task++)); do
  SLURM_PROCID=$task SLURM_LOCALID=$task SLURM_NTASKS=${FAKE_TASKS:-1} SLURM_NODEID=0 "$@" &
  pids+=($!)
done
status=0
for pid in "${pids[@]}"; do wait "$pid" || status=$?; done
exit "$status"
"""
SCONTROL = """#!/bin/bash
if [[ "$1 $2" == "show hostnames" ]]; then echo localhost; else echo "$*" >> "$RECORD/scontrol"; fi
"""
# Like Slurm's own, it signals every process of the step: torchrun and its workers.
SCANCEL = """#!/bin/bash
echo "$*" >> "$RECORD/scancel"
kill -USR1 $(cat "$RECORD"/pid.*)
"""
# The pause between two signals, shortened.
SLEEP = """#!/bin/bash
exec /bin/sleep 0.3
"""
LAUNCHED = """
import json, os, signal, sys, time
from pathlib import Path

record, rank = Path(os.environ["RECORD"]), os.environ["RANK"]
heard = []
signal.signal(signal.SIGUSR1, lambda *_: heard.append(1))
(record / f"seen.{rank}").write_text(json.dumps({"argv": sys.argv, "env": dict(os.environ)}))
needed = 3 if "deaf" in sys.argv else 1
if "wait" in sys.argv:
    (record / f"pid.agent{rank}").write_text(f"{os.getppid()} ")
    (record / f"pid.{rank}").write_text(f"{os.getpid()} ")
    for _ in range(600):
        if len(heard) >= needed:
            break
        time.sleep(0.1)
    else:
        sys.exit("no signal came")
sys.exit(3 if "fail" in sys.argv else 0)
"""


@pytest.fixture
def cluster(tmp_path):
    """A repository in a folder with a space, and a function that starts one of its scripts."""
    repo = tmp_path / "a repo"
    record = tmp_path / "record it"
    shims = tmp_path / "bin"
    for folder in (repo / "launch", record, shims):
        folder.mkdir(parents=True)
    stand_ins = {"srun": SRUN, "scontrol": SCONTROL, "scancel": SCANCEL, "sleep": SLEEP}
    for name, text in stand_ins.items():
        (shims / name).write_text(text)
        (shims / name).chmod(0o755)
    for name in ("train.py", "precompute.py"):
        (repo / "launch" / name).write_text(LAUNCHED)

    def start(script, *args, **env):
        # Slurm runs a copy of the script from its own spool folder.
        spooled = shutil.copy(ROOT / "slurm" / script, tmp_path / "slurm_script")
        inherited = {
            k: v
            for k, v in os.environ.items()
            if not k.startswith(("SLURM_", "CUDA_", "MASTER_"))
            and k not in ("CONFIG", "NPROC", "OMP_NUM_THREADS", "RETRIES", "PARTS")
        }
        return subprocess.Popen(
            ["bash", spooled, *args],
            env=inherited
            | {
                "PATH": f"{shims}:{os.environ['PATH']}",
                "PYTHON": sys.executable,
                "RECORD": str(record),
                "SLURM_SUBMIT_DIR": str(repo),
                "SLURM_JOB_ID": "4321",
                "SLURM_JOB_NODELIST": "localhost",
                "SLURM_NNODES": "1",
            }
            | env,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )

    start.record = record
    start.repo = repo
    return start


def finish(process, status=0):
    output, _ = process.communicate(timeout=120)
    assert process.returncode == status, output
    return output


def seen(cluster):
    """What each rank was given, by rank."""
    return {int(p.suffix[1:]): json.loads(p.read_text()) for p in cluster.record.glob("seen.*")}


def directives(script):
    lines = (ROOT / "slurm" / script).read_text().splitlines()
    return dict(
        re.fullmatch(r"#SBATCH --([a-z-]+)(?:=(\S+))?", line).groups()
        for line in lines
        if line.startswith("#SBATCH")
    )


@pytest.mark.parametrize("script", SCRIPTS)
def test_script_is_valid_bash(script):
    subprocess.run(["bash", "-n", ROOT / "slurm" / script], check=True)


@pytest.mark.parametrize("script", SCRIPTS)
def test_directives_come_before_the_first_command(script):
    """sbatch stops reading directives at the first line that is not a comment."""
    lines = (ROOT / "slurm" / script).read_text().splitlines()
    first_command = next(i for i, line in enumerate(lines) if line and not line.startswith("#"))
    assert not any(line.startswith("#SBATCH") for line in lines[first_command:])


@pytest.mark.parametrize("script", SCRIPTS)
def test_directives_are_those_a_cluster_needs(script):
    options = directives(script)
    needed = {"job-name", "nodes", "ntasks-per-node", "gpus-per-node", "cpus-per-task", "time"}
    assert needed <= options.keys()
    assert options["output"] == "%x-%j.out"
    assert options["open-mode"] == "append"
    assert "requeue" in options


@pytest.mark.parametrize(("script", "seconds"), [("train.sh", 300), ("precompute.sh", 120)])
def test_the_script_itself_is_signalled_before_the_time_is_up(script, seconds):
    assert directives(script)["signal"] == f"B:USR1@{seconds}"


def test_train_asks_for_one_task_per_node():
    assert directives("train.sh")["ntasks-per-node"] == "1"


def test_precompute_asks_for_one_task_per_gpu():
    options = directives("precompute.sh")
    assert options["ntasks-per-node"] == options["gpus-per-node"]


def test_train_passes_arguments_and_environment_to_every_rank(cluster):
    config = "configs/with space.json"
    output = finish(
        cluster("train.sh", *ARGS, CONFIG=config, SLURM_GPUS_ON_NODE="2", SLURM_CPUS_PER_TASK="8")
    )
    ranks = seen(cluster)
    assert sorted(ranks) == [0, 1]
    for rank, got in ranks.items():
        assert got["argv"] == ["launch/train.py", "--config", config, *ARGS]
        env = got["env"]
        assert env["WORLD_SIZE"] == env["LOCAL_WORLD_SIZE"] == "2"
        assert env["LOCAL_RANK"] == str(rank)
        assert env["OMP_NUM_THREADS"] == "4"
        assert env["SRUN_CPUS_PER_TASK"] == "8"
        assert env["TORCHELASTIC_RUN_ID"] == "4321.0"
        assert Path(env["PWD"]) == cluster.repo
    assert "localhost:24321" in output  # 20000 + job id
    srun = (cluster.record / "srun").read_text().split("\0")
    assert "--kill-on-bad-exit=1" in srun
    assert srun[-len(ARGS) - 1 : -1] == ARGS


@pytest.mark.parametrize("gpus", [{}, {"SLURM_GPUS_ON_NODE": "0"}], ids=["unset", "none"])
def test_train_runs_one_process_without_gpus(cluster, gpus):
    finish(cluster("train.sh", **gpus))
    assert sorted(seen(cluster)) == [0]
    assert seen(cluster)[0]["argv"] == ["launch/train.py", "--config", "configs/a14b.json"]


def test_train_reports_the_status_of_a_failed_run(cluster):
    finish(cluster("train.sh", "fail", NPROC="1"), status=1)  # torchrun's own status
    assert not (cluster.record / "scontrol").exists()


def test_a_failed_run_is_tried_again_as_often_as_asked(cluster):
    """RETRIES=1: the first start's failure is, the second's is not."""
    failing = {"PYTHON": "/bin/false", "RETRIES": "1"}
    finish(cluster("train.sh", **failing), status=1)
    assert (cluster.record / "scontrol").read_text() == "requeue 4321\n"
    finish(cluster("train.sh", SLURM_RESTART_COUNT="1", **failing), status=1)
    assert (cluster.record / "scontrol").read_text() == "requeue 4321\n"


def test_a_job_that_comes_back_resumes_even_where_its_first_start_was_anew(cluster):
    finish(cluster("train.sh", "--resume", "none", NPROC="1", SLURM_RESTART_COUNT="2"))
    got = seen(cluster)[0]
    assert got["argv"][3:] == ["--resume", "none", "--resume", "auto"]
    assert got["env"]["TORCHELASTIC_RUN_ID"] == "4321.2"


def waiting(cluster, job, processes):
    """Until that many processes wait for a signal."""
    deadline = time.monotonic() + 100
    while sum(bool(p.read_text()) for p in cluster.record.glob("pid.*")) < processes:
        assert job.poll() is None and time.monotonic() < deadline, job.communicate()[0]
        time.sleep(0.1)
    return job


def test_signal_before_the_time_limit_reaches_the_ranks_and_requeues_the_job(cluster):
    job = waiting(cluster, cluster("train.sh", "wait", NPROC="2"), 4)
    job.send_signal(signal.SIGUSR1)
    finish(job)
    assert set((cluster.record / "scancel").read_text().splitlines()) == {"--signal=USR1 4321"}
    assert (cluster.record / "scontrol").read_text() == "requeue 4321\n"


def test_signal_is_repeated_until_the_run_has_heard_it(cluster):
    """While a model loads nobody listens; here the first two are lost."""
    job = waiting(cluster, cluster("train.sh", "wait", "deaf", NPROC="1"), 2)
    job.send_signal(signal.SIGUSR1)
    finish(job)
    assert (cluster.record / "scontrol").read_text() == "requeue 4321\n"


@pytest.mark.parametrize("script", SCRIPTS)
def test_signal_while_the_job_sets_out_does_not_end_it(cluster, script, tmp_path):
    """Slurm sends it at once where the time limit is shorter than the notice."""
    (tmp_path / "bin" / "git").write_text(
        "#!/bin/bash\nkill -USR1 $(awk '/PPid/ {print $2}' /proc/$PPID/status)\necho now\n"
    )
    (tmp_path / "bin" / "git").chmod(0o755)
    (tmp_path / "bin" / "scancel").write_text('#!/bin/bash\necho $* >> "$RECORD/scancel"\n')
    finish(cluster(script, NPROC="1"))
    assert (cluster.record / "scancel").read_text().startswith("--signal=")
    assert sorted(seen(cluster)) == [0]


def test_precompute_that_is_stopped_goes_back_into_the_queue(cluster, tmp_path):
    (tmp_path / "bin" / "scancel").write_text(
        '#!/bin/bash\nkill ${1/--signal=/-} $(cat "$RECORD/pid.0")\n'
    )
    job = waiting(cluster, cluster("precompute.sh", "wait"), 2)
    job.send_signal(signal.SIGUSR1)
    finish(job, status=143)  # 128 + TERM
    assert (cluster.record / "scontrol").read_text() == "requeue 4321\n"


def test_precompute_gives_each_task_its_rank_and_one_gpu(cluster):
    config = "configs/with space.json"
    finish(
        cluster("precompute.sh", *ARGS, CONFIG=config, FAKE_TASKS="3", CUDA_VISIBLE_DEVICES="4,5,6")
    )
    ranks = seen(cluster)
    assert sorted(ranks) == [0, 1, 2]
    for rank, got in ranks.items():
        assert got["argv"] == ["launch/precompute.py", "--config", config, *ARGS]
        assert got["env"]["WORLD_SIZE"] == "3"
        assert got["env"]["CUDA_VISIBLE_DEVICES"] == str(4 + rank)
        assert got["env"]["LOCAL_RANK"] == "0"
        assert "MASTER_ADDR" not in got["env"]  # no process group: the work is split by clip


def test_precompute_array_covers_every_rank_once(cluster):
    """Array 2-6:2 of two tasks each is three parts, six ranks."""
    for task_id in (2, 4, 6):
        finish(
            cluster(
                "precompute.sh",
                FAKE_TASKS="2",
                SLURM_ARRAY_TASK_ID=str(task_id),
                SLURM_ARRAY_TASK_MIN="2",
                SLURM_ARRAY_TASK_MAX="6",
                SLURM_ARRAY_TASK_STEP="2",
                SLURM_ARRAY_TASK_COUNT="3",
            )
        )
    ranks = seen(cluster)
    assert sorted(ranks) == list(range(6))
    assert {got["env"]["WORLD_SIZE"] for got in ranks.values()} == {"6"}


GAPS = {
    "SLURM_ARRAY_TASK_ID": "7",
    "SLURM_ARRAY_TASK_MIN": "3",
    "SLURM_ARRAY_TASK_MAX": "7",
    "SLURM_ARRAY_TASK_COUNT": "2",
}


def test_precompute_array_with_gaps_is_parts_of_the_whole_one(cluster):
    finish(cluster("precompute.sh", FAKE_TASKS="2", PARTS="16", **GAPS))
    ranks = seen(cluster)
    assert sorted(ranks) == [14, 15]
    assert {got["env"]["WORLD_SIZE"] for got in ranks.values()} == {"32"}


@pytest.mark.parametrize(
    ("parts", "said"), [({}, "how many parts"), ({"PARTS": "7"}, "there is no part 7")]
)
def test_precompute_array_that_would_leave_clips_out_is_refused(cluster, parts, said):
    output = finish(cluster("precompute.sh", **GAPS, **parts), status=2)
    assert said in output and output.count("\n") == 1
    assert not seen(cluster)


@pytest.mark.parametrize("script", SCRIPTS)
def test_submitting_from_elsewhere_is_one_clear_line(cluster, script, tmp_path):
    output = finish(cluster(script, SLURM_SUBMIT_DIR=str(tmp_path)), status=2)
    assert output.count("\n") == 1
    assert "submit from the repository's root" in output
