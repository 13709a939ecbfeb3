"""On a real Slurm of two nodes, brought up here: training that USR1 stops goes on from the queue as
if nothing had been; an array of precompute jobs encodes every clip once.

munged, slurmctld and two slurmd run from one temporary folder on free ports. Slurm's own programs
must be installed (Debian: slurm-wlm, munge) and the tests run as root, who alone may start jobs.
"""

import json
import os
import shutil
import socket
import subprocess
import sys
import tempfile
import time
from contextlib import ExitStack
from pathlib import Path

import pytest
from conftest import SMALL, overrides

ROOT = Path(__file__).resolve().parents[1]
PROGRAMS = ("munged", "slurmctld", "slurmd", "sbatch", "srun", "squeue", "scontrol", "scancel")
WAIT_S = 240

# Two nodes on one host, told apart by their ports; one counted GPU each, which is none.
SLURM_CONF = """
ClusterName=test
SlurmctldHost={host}(127.0.0.1)
SlurmctldPort={ctld}
SlurmUser=root
SlurmdUser=root
AuthType=auth/munge
AuthInfo=socket={folder}/munge.socket
CredType=cred/munge
StateSaveLocation={folder}/state
SlurmdSpoolDir={folder}/spool-%n
SlurmctldPidFile={folder}/slurmctld.pid
SlurmdPidFile={folder}/slurmd-%n.pid
SlurmctldLogFile={folder}/slurmctld.log
SlurmdLogFile={folder}/slurmd-%n.log
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
SwitchType=switch/none
MpiDefault=none
SelectType=select/cons_tres
SchedulerParameters=sched_interval=2,sched_min_interval=100000,bf_interval=2
SlurmdParameters=config_overrides
ReturnToService=2
JobAcctGatherType=jobacct_gather/none
AccountingStorageType=accounting_storage/none
JobRequeue=1
KillWait=30
MailProg=/bin/true
GresTypes=gpu
NodeName=n1 NodeHostname={host} NodeAddr=127.0.0.1 Port={n1} CPUs=8 RealMemory=4000 Gres=gpu:1
NodeName=n2 NodeHostname={host} NodeAddr=127.0.0.1 Port={n2} CPUs=8 RealMemory=4000 Gres=gpu:1
PartitionName=test Nodes=n1,n2 Default=YES MaxTime=60 State=UP
"""


def missing() -> str:
    """Why there can be no Slurm here; empty where there can."""
    absent = [name for name in PROGRAMS if shutil.which(name, path=search_path()) is None]
    if absent:
        return f"not installed: {', '.join(absent)} (Debian: apt-get install slurm-wlm munge)"
    return "" if os.geteuid() == 0 else "slurmd starts jobs as root only, and this is not root"


def search_path() -> str:
    return f"{os.environ['PATH']}:/usr/sbin:/sbin"  # Debian keeps the daemons there


pytestmark = pytest.mark.skipif(bool(missing()), reason=f"no real Slurm: {missing()}")


def free_ports(count: int) -> list[int]:
    with ExitStack() as stack:
        sockets = [stack.enter_context(socket.socket()) for _ in range(count)]
        for each in sockets:
            each.bind(("127.0.0.1", 0))
        return [each.getsockname()[1] for each in sockets]


def until(true, what: str, seconds: float = WAIT_S):
    """What `true()` gives once that is true."""
    deadline = time.monotonic() + seconds
    while not (value := true()):
        assert time.monotonic() < deadline, f"{what}: not in {seconds:.0f} s"
        time.sleep(0.2)
    return value


class Cluster:
    """Slurm's commands with this cluster's configuration."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        kept = {
            name: value
            for name, value in os.environ.items()
            if not name.startswith(("SLURM_", "SBATCH_", "MASTER_", "PYTEST_"))
            and name not in ("CONFIG", "NPROC", "CUDA_VISIBLE_DEVICES")
        }
        self.env = kept | {
            "PATH": search_path(),
            "SLURM_CONF": str(folder / "slurm.conf"),
            "PYTHON": sys.executable,
            "PYTHONPATH": str(ROOT),
            "MASTER_ADDR": "127.0.0.1",  # no name server knows n1
        }

    def run(self, *command: str, **env: str) -> str:
        done = subprocess.run(
            command, cwd=ROOT, env=self.env | env, capture_output=True, text=True, timeout=WAIT_S
        )
        assert done.returncode == 0, f"{command}: {done.stderr}"
        return done.stdout.strip()

    def sbatch(self, *arguments: str, **env: str) -> str:
        """Submit with the log in this folder; the job's number."""
        log = f"--output={self.folder}/job-%j.out"
        return self.run("sbatch", "--parsable", log, *arguments, **env)

    def state(self, job: str) -> str:
        """States of the job's tasks, as squeue has them; empty where it knows none."""
        done = subprocess.run(
            ["squeue", "-h", "-j", job, "-t", "all", "-o", "%T"],
            env=self.env,
            capture_output=True,
            text=True,
        )
        return " ".join(sorted(set(done.stdout.split())))

    def log(self, job: str) -> str:
        path = self.folder / f"job-{job}.out"
        return path.read_text() if path.exists() else ""

    def finish(self, job: str, logs: Path | None = None) -> None:
        """Until the job is done; its logs, by default in this folder, where it has failed."""
        running = ("RUNNING", "PENDING", "COMPLETING", "CONFIGURING")
        until(lambda: not any(word in self.state(job) for word in running), f"the end of {job}")
        written = logs.rglob("*.out") if logs else self.folder.glob("job-*.out")
        assert self.state(job) == "COMPLETED", "\n".join(path.read_text() for path in written)

    def start_now(self, job: str) -> None:
        """Slurm lets a requeued job wait for two minutes; this one need not."""
        until(lambda: self.state(job) == "PENDING", f"{job} back in the queue")
        # Not at once: its nodes refuse what was signed before they were done with the first start.
        self.run("scontrol", "update", f"jobid={job}", "StartTime=now+3")


@pytest.fixture(scope="module")
def cluster():
    # A short path: a socket's may have 107 characters.
    with tempfile.TemporaryDirectory(prefix="slurm-") as name, ExitStack() as stack:
        folder = Path(name)
        for part in ("state", "spool-n1", "spool-n2"):
            (folder / part).mkdir()
        (folder / "munge.key").write_bytes(os.urandom(128))
        (folder / "munge.key").chmod(0o600)
        ctld, n1, n2 = free_ports(3)
        conf = SLURM_CONF.format(host=socket.gethostname(), folder=folder, ctld=ctld, n1=n1, n2=n2)
        (folder / "slurm.conf").write_text(conf)
        (folder / "gres.conf").write_text("Name=gpu File=/dev/null\n")
        here = Cluster(folder)

        def daemon(*command: str) -> None:
            output = stack.enter_context(open(folder / f"{command[0]}.out", "ab"))
            process = subprocess.Popen(command, env=here.env, stdout=output, stderr=output)

            def stop() -> None:
                process.terminate()
                try:
                    process.wait(20)
                except subprocess.TimeoutExpired:
                    process.kill()
                    process.wait()

            stack.callback(stop)

        daemon(
            *("munged", "--foreground", "--force"),
            *(f"--{key}={folder}/munge.{end}" for key, end in MUNGE_FILES.items()),
        )
        until((folder / "munge.socket").exists, "munged")
        daemon("slurmctld", "-D", "-f", str(folder / "slurm.conf"))
        for node in ("n1", "n2"):
            daemon("slurmd", "-D", "-N", node, "-f", str(folder / "slurm.conf"))
        try:
            until(lambda: idle(here) == 2, "two idle nodes", 60)
        except AssertionError:
            logs = "\n".join(path.read_text() for path in folder.glob("*.log"))
            pytest.fail(f"Slurm is installed and did not come up:\n{logs}")
        yield here
        jobs = here.run("squeue", "-h", "-o", "%A").split()
        if jobs:
            here.run("scancel", "--full", "--signal=KILL", *jobs)
            here.run("scancel", *jobs)
        until(lambda: not here.run("squeue", "-h"), "an empty queue", 60)


MUNGE_FILES = {
    "key-file": "key",
    "socket": "socket",
    "pid-file": "pid",
    "log-file": "log",
    "seed-file": "seed",
}


def idle(cluster: Cluster) -> int:
    listed = subprocess.run(
        ["sinfo", "-h", "-N", "-t", "idle", "-o", "%N"],
        env=cluster.env,
        capture_output=True,
        text=True,
    )
    return len(listed.stdout.split())


SETTINGS = (
    *SMALL,
    "model.expert=high",
    "train.max_steps=40",
    "train.checkpoint_every=1000",
    "train.log_every=1",
)
TWO_NODES = ("--nodes=2", "--gpus-per-node=1", "--cpus-per-task=1", "--time=20")


def training(shards: Path, out: Path) -> list[str]:
    return overrides(*SETTINGS, f"data.shards={shards}", f"output.dir={out}")


def steps_in(out: Path) -> int:
    metrics = out / "metrics.jsonl"
    return len(metrics.read_text().splitlines()) if metrics.exists() else 0


def lora_in(out: Path) -> bytes:
    """The final adapters' bytes."""
    (file,) = (out / "checkpoints" / "high" / "step-000040").glob("lora.safetensors")
    return file.read_bytes()


@pytest.mark.slow
def test_a_job_stopped_by_usr1_goes_on_in_the_queue_to_the_same_lora(
    cluster, ranks, toy_shards, tmp_path
):
    stopped, straight = tmp_path / "stopped", tmp_path / "straight"
    env = {"CONFIG": "configs/toy.json"}
    script = "slurm/train.sh"
    # Its first start is anew; that must not hold for the second.
    anew = ("--resume", "none")
    job = cluster.sbatch(*TWO_NODES, script, *training(toy_shards, stopped), *anew, **env)
    until(lambda: steps_in(stopped) >= 3, f"three steps of\n{cluster.log(job)}")
    cluster.run("scancel", "--batch", "--signal=USR1", job)
    cluster.start_now(job)
    reached = steps_in(stopped)
    assert 3 <= reached < 40
    assert (stopped / "checkpoints" / "high" / f"step-{reached:06d}" / "manifest.json").is_file()
    cluster.finish(job)
    assert "start 2" in cluster.log(job) and "meeting at 127.0.0.1" in cluster.log(job)
    assert [json.loads(line)["step"] for line in (stopped / "metrics.jsonl").open()] == [
        *range(1, 41)
    ]
    assert not list(stopped.glob("previous-*"))
    # The same without Slurm, in two processes that are forked.
    log = tmp_path / "log"
    sets = ["train", "--config", "configs/toy.json", *training(toy_shards, straight)]
    assert ranks.run(2, sets, log) == [0, 0], log.read_text()
    assert lora_in(stopped) == lora_in(straight)


def samples(shards: Path) -> dict[str, dict[str, str]]:
    """key -> member -> SHA-256, over all shards; no key stands in two."""
    found: dict[str, dict[str, str]] = {}
    for path in shards.glob("*.tar.json"):
        for key, members in json.loads(path.read_text())["samples"].items():
            assert key not in found
            found[key] = {name: sha256 for name, (_, _, sha256) in members.items()}
    return found


@pytest.mark.slow
def test_an_array_of_jobs_encodes_every_clip_once(cluster, toy_data, toy_shards, tmp_path):
    """Two parts, one job each, and the same samples as of one process."""
    shards = tmp_path / "shards"
    sets = overrides(*SMALL, f"data.source={toy_data}", f"data.shards={shards}")
    asked = ("--array=0-1%2", "--ntasks-per-node=1", "--gpus-per-node=1", "--cpus-per-task=1")
    job = cluster.sbatch(
        *asked, "--time=20", "slurm/precompute.sh", *sets, CONFIG="configs/toy.json"
    )
    cluster.finish(job)
    logs = "".join(path.read_text() for path in cluster.folder.glob("job-*.out"))
    assert "part 0 of 2" in logs and "part 1 of 2" in logs
    assert len(list(shards.glob("*.tar"))) == 2
    assert samples(shards) == samples(toy_shards)
    assert json.loads((shards / "manifest.json").read_text())["samples"] == 6


@pytest.mark.soak
def test_a_job_of_submitit_stopped_by_its_signal_goes_on_in_the_queue(
    cluster, toy_shards, tmp_path
):
    """launch/submit.py on two nodes; USR2 is what Slurm sends submitit before the time is up."""
    out = tmp_path / "out"
    line = ("launch/submit.py", "--config", "configs/toy.json", "--nodes=2", "--gpus-per-node=1")
    said = cluster.run(
        *(sys.executable, *line, "--cpus-per-process=1", "--time=00:20:00"),
        *("--resume", "none", *training(toy_shards, out)),
    )
    job = said.removeprefix("job ").split(",")[0]
    until(lambda: steps_in(out) >= 3, "three steps")
    cluster.run("scancel", "--signal=USR2", job)
    cluster.start_now(job)
    reached = steps_in(out)
    assert 3 <= reached < 40
    assert (out / "checkpoints" / "high" / f"step-{reached:06d}" / "manifest.json").is_file()
    cluster.finish(job, out / "submitit")
    assert [json.loads(line)["step"] for line in (out / "metrics.jsonl").open()] == [*range(1, 41)]
    assert not list(out.glob("previous-*"))
