"""Going on from a checkpoint: which one, and what would make it another run."""

import json
import shutil

import pytest
from conftest import SMALL, overrides

from tempolora import cli
from tempolora.config import ConfigError, load_config
from tempolora.launched import check_engine
from tempolora.train.metrics import MetricsLog


@pytest.fixture(scope="module")
def finished(toy_shards, tmp_path_factory):
    """A run of both experts with checkpoints at steps 1, 2 and 3."""
    out = tmp_path_factory.mktemp("resume") / "out"
    assert cli.main(["train", *settings(toy_shards, out)]) == 0
    return out


@pytest.fixture
def out(finished, tmp_path):
    """A copy of it that a test may go on from."""
    return shutil.copytree(finished, tmp_path / "out")


def settings(shards, out, *more):
    paths = (f"data.shards={shards}", f"output.dir={out}")
    return overrides(*SMALL, *paths, "train.max_steps=3", "train.checkpoint_every=1", *more)


def steps(out, expert):
    return sorted(int(p.name[5:]) for p in (out / "checkpoints" / expert).glob("step-*"))


def test_a_folder_takes_its_own_expert_back_and_leaves_the_other_alone(toy_shards, out):
    high = (out / "checkpoints/high/step-000003/manifest.json").read_bytes()
    first = out / "checkpoints" / "low" / "step-000001"
    more = ("train.max_steps=2", "train.lr=1e-4")
    assert cli.main(["train", *settings(toy_shards, out, *more), "--resume", str(first)]) == 0
    assert (out / "checkpoints/high/step-000003/manifest.json").read_bytes() == high
    assert steps(out, "high") == [1, 2, 3]
    assert steps(out, "low") == [1, 2]
    state = json.loads((out / "checkpoints/low/step-000002/state.json").read_text())
    assert state["config"]["train"]["lr"] == 1e-4
    assert (out / "checkpoints/low/superseded/step-000003/manifest.json").is_file()


def test_a_folder_of_an_expert_that_is_not_trained_is_refused(toy_shards, out, capsys):
    folder = str(out / "checkpoints" / "low" / "step-000001")
    sets = settings(toy_shards, out, "model.expert=high")
    assert cli.main(["train", *sets, "--resume", folder]) == 2
    assert "is of the low expert, this run trains high" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("override", "named"),
    [
        ("lora.rank=8", "lora.rank: the checkpoint"),
        ("lora.target=qk", "lora.target: the checkpoint"),
        ("train.seed=1", "train.seed: the checkpoint"),
        ("train.optimizer=adamw8bit", "train.optimizer: the checkpoint"),
        ("model.base=bf16", "model.base: the checkpoint"),
        ("model.init=random", "model: a base of fingerprint: the checkpoint"),
    ],
)
def test_another_run_is_refused_and_the_setting_named(
    override, named, toy_shards, out, capsys, monkeypatch
):
    from tempolora import run

    # Other weights are other shards too, which is said first; here the checkpoint is asked.
    monkeypatch.setattr(run, "fingerprint", lambda *_: {})
    assert cli.main(["train", *settings(toy_shards, out, override)]) == 2
    line = capsys.readouterr().err
    assert named in line
    assert "--resume none to start over" in line


def test_changed_shards_are_taken_up_with_a_warning(toy_shards, out, tmp_path, caplog):
    folder = shutil.copytree(toy_shards, tmp_path / "shards")
    manifest = folder / "manifest.json"
    manifest.write_text(manifest.read_text() + "\n")
    assert cli.main(["train", *settings(folder, out, "train.max_steps=4")]) == 0
    assert "the shards have changed since" in caplog.text
    assert steps(out, "high") == [1, 2, 3, 4]


def test_a_torn_line_of_a_killed_run_does_not_spoil_the_next(tmp_path):
    (tmp_path / "metrics.jsonl").write_text('{"expert": "high", "step": 1}\n{"expert": "hi')
    with MetricsLog(tmp_path, "high", 1, ()) as metrics:
        metrics.write(2, {"loss": 0.5})
    lines = (tmp_path / "metrics.jsonl").read_text().splitlines()
    assert json.loads(lines[0])["step"] == 1
    assert json.loads(lines[-1]) == {"expert": "high", "step": 2, "loss": 0.5}


def test_prompts_are_not_asked_for_where_no_video_is_made(toy_shards, out):
    """The shards hold no embedding of this prompt, and with output.sample_steps 0 need none."""
    assert cli.main(["train", *settings(toy_shards, out, 'output.prompts=["a cat"]')]) == 0


@pytest.mark.parametrize(("engine", "processes"), [("plain", 2), ("fsdp", 1), ("ddp", 1)])
def test_an_engine_that_does_not_go_with_the_number_of_processes_is_refused(engine, processes):
    cfg = load_config(None, [f"parallel.engine={engine}"])
    with pytest.raises(ConfigError, match=f'parallel.engine: "{engine}"'):
        check_engine(cfg, processes)


@pytest.mark.parametrize("engine", ["fsdp", "deepspeed"])
def test_blocks_kept_on_the_host_are_refused_where_the_base_is_sharded(engine):
    sets = ["train.checkpointing=selective", "train.host_blocks=2", f"parallel.engine={engine}"]
    with pytest.raises(ConfigError, match=r"train\.host_blocks: has only been made for bases"):
        check_engine(load_config(None, sets), 2)
