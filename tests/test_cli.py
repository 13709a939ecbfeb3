"""The commands as a user meets them: one sentence and exit 2 for a mistake, whole results else."""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import av
import pytest
from conftest import SMALL, overrides

from tempolora import cli
from tempolora.files import sha256_of

ROOT = Path(__file__).parents[1]


def refuse(capsys, *arguments: str) -> str:
    """Run a command that must end with exit 2; its line on stderr."""
    code = cli.main(list(arguments))
    stderr = capsys.readouterr().err.strip()
    assert code == 2
    assert "\n" not in stderr
    return stderr


def toy(*settings: str) -> list[str]:
    return overrides(*SMALL, *settings)


@pytest.fixture
def no_models(monkeypatch):
    """Any attempt to load a model fails the test."""
    from tempolora.model import wan

    def loaded(*_):
        raise AssertionError("a model was loaded before the mistake was found")

    for name in ("load_transformer", "load_vae", "load_text"):
        monkeypatch.setattr(wan, name, loaded)


LISTS = {
    "no folder": (None, r"no such folder; put the clips"),
    "no list": ({}, "neither prompts.txt nor metadata.jsonl"),
    "empty list": ({"prompts.txt": "\n# nothing\n"}, "lists no clip"),
    "no bar": ({"prompts.txt": "a.mp4 a prompt\n"}, "line 1: no | in 'a.mp4 a prompt'"),
    "missing file": ({"prompts.txt": "\na.mp4|a prompt\n"}, "line 2: a.mp4 is not there"),
    "path out": ({"prompts.txt": "../a.mp4|a prompt\n"}, "line 1: ../a.mp4 leads out of"),
}


@pytest.mark.parametrize("case", LISTS)
@pytest.mark.parametrize("command", ["precompute", "train"])
def test_a_mistake_in_the_clip_list_is_one_line_and_exit_2(
    case, command, tmp_path, capsys, no_models
):
    files, sentence = LISTS[case]
    source = tmp_path / "clips"
    if files is not None:
        source.mkdir()
        for name, text in files.items():
            (source / name).write_text(text)
    sets = toy(f"data.source={source}", f"data.shards={tmp_path / 's'}", "data.draw_toy=false")
    assert sentence in refuse(capsys, command, *sets)
    assert not (tmp_path / "s").exists()


@pytest.mark.parametrize(
    ("override", "sentence"),
    [
        ("data.num_frames=18", "data.num_frames: 18 is not 4k+1"),
        ("data.width=72", "data.width: 72 is not divisible by 16"),
        ("train.learning_rate=1", "unknown key train.learning_rate"),
        ("train.max_steps=many", 'train.max_steps: given "many"'),
        ("model.id=./no_such_model", "model.id: ./no_such_model is not a folder"),
        ('model.files={"vae": "vae.ckpt"}', "model.files.vae: vae.ckpt is not a .safetensors file"),
        ("lora.blocks=[0,99]", "lora.blocks: given [0, 99] (first, end), but this model has 3"),
    ],
)
def test_a_mistake_in_the_config_is_one_line_and_exit_2(
    override, sentence, toy_shards, tmp_path, capsys
):
    sets = toy(f"data.shards={toy_shards}", f"output.dir={tmp_path / 'out'}", override)
    assert sentence in refuse(capsys, "train", *sets)


def test_shards_made_for_another_config_are_refused_by_training(
    toy_shards, tmp_path, capsys, no_models
):
    sets = toy(f"data.shards={toy_shards}", f"output.dir={tmp_path / 'o'}", "data.width=48")
    line = refuse(capsys, "train", *sets)
    assert "data.width: the shards in" in line
    assert not (tmp_path / "o").exists()


def with_sound(shards, folder, states):
    """A copy of shards whose samples are said to have these kinds of sound."""
    shutil.copytree(shards, folder)
    manifest = json.loads((folder / "manifest.json").read_text())
    for shard in manifest["shards"]:
        path = folder / f"{shard['name']}.json"
        index = json.loads(path.read_text())
        index["sound"] = dict(zip(index["sound"], states, strict=True))
        path.write_text(json.dumps(index))
        shard["index_sha256"] = sha256_of(path)
    (folder / "manifest.json").write_text(json.dumps(manifest))
    return folder


def test_the_sound_term_says_how_many_samples_it_has_and_is_refused_without_any(
    toy_shards, tmp_path, capsys, caplog
):
    mixed = with_sound(toy_shards, tmp_path / "mixed", ["heard"] * 4 + ["silent", "absent"])
    out = f"output.dir={tmp_path / 'o'}"
    run = toy(out, "rhythm.sound_weight=0.1", "train.max_steps=2", "model.expert=low")
    assert cli.main(["train", *run, *overrides(f"data.shards={mixed}")]) == 0
    assert (
        "sound term: sound is heard in 4 of 6 samples (1 silent, 1 without a sound track); "
        "the others take no part in it"
    ) in caplog.text
    assert '"sound":' in (tmp_path / "o" / "metrics.jsonl").read_text()
    none = with_sound(toy_shards, tmp_path / "none", ["silent"] * 3 + ["broken"] * 3)
    capsys.readouterr()
    line = refuse(capsys, "train", *run, *overrides(f"data.shards={none}"))
    assert "rhythm.sound_weight: sound is heard in 0 of 6 samples (3 silent, 3 with a" in line


def test_a_damaged_shard_stops_training_with_one_line(toy_shards, tmp_path, capsys):
    folder = shutil.copytree(toy_shards, tmp_path / "shards")
    shard = next(folder.glob("*.tar"))
    content = bytearray(shard.read_bytes())
    content[2000] ^= 1
    shard.write_bytes(content)
    sets = toy(f"data.shards={folder}", f"output.dir={tmp_path / 'o'}", "train.max_steps=8")
    assert "are not what was written; delete" in refuse(capsys, "train", *sets)
    assert "differs from what was written" in refuse(capsys, "verify", *sets)


def test_resuming_with_another_rank_is_refused_and_start_over_keeps_the_old_results(
    toy_shards, tmp_path, capsys, caplog
):
    out = tmp_path / "out"
    sets = toy(
        f"data.shards={toy_shards}",
        f"output.dir={out}",
        "train.max_steps=2",
        "train.checkpoint_every=1",
        "model.expert=low",
    )
    assert cli.main(["train", *sets]) == 0
    capsys.readouterr()
    line = refuse(capsys, "train", *sets, *overrides("lora.rank=4"))
    assert "lora.rank: the checkpoint" in line
    assert "has 16, this config 4" in line
    assert cli.main(["train", *sets, *overrides("lora.rank=4"), "--resume", "none"]) == 0
    assert (out / "previous-1" / "wan22_temporal_lora_low_noise.safetensors").is_file()
    assert (out / "wan22_temporal_lora_low_noise.safetensors").is_file()
    assert cli.main(["verify", *sets]) == 0
    exported = tmp_path / "again" / "wan22_temporal_lora_low_noise.safetensors"
    step = str(out / "checkpoints" / "low" / "step-000002")
    assert cli.main(["export", "--checkpoint", step, "--out", str(exported.parent)]) == 0
    assert exported.is_file()


def test_a_finished_run_is_not_trained_again(toy_shards, tmp_path, caplog):
    out = tmp_path / "out"
    sets = toy(f"data.shards={toy_shards}", f"output.dir={out}", "train.max_steps=1")
    assert cli.main(["train", *sets]) == 0
    before = (out / "metrics.jsonl").read_bytes()
    assert cli.main(["train", *sets]) == 0
    assert (out / "metrics.jsonl").read_bytes() == before


def frames_of(path: Path) -> tuple[int, float]:
    with av.open(str(path)) as video:
        stream = video.streams.video[0]
        return sum(1 for _ in video.decode(stream)), float(stream.average_rate)


def test_train_leaves_everything_it_promises(toy_shards, tmp_path):
    out = tmp_path / "out"
    sets = toy(
        f"data.shards={toy_shards}",
        f"output.dir={out}",
        "train.max_steps=2",
        "output.sample_steps=2",
        'output.trackers=["tensorboard"]',
    )
    assert cli.main(["train", *sets]) == 0
    names = {path.name for path in out.iterdir()}
    assert names >= {
        "wan22_temporal_lora_high_noise.safetensors",
        "wan22_temporal_lora_low_noise.safetensors",
        "sample_before_lora.mp4",
        "sample_after_lora.mp4",
        "metrics.jsonl",
        "tensorboard",
        "config.json",
        "checkpoints",
        "report.html",
    }
    assert frames_of(out / "sample_before_lora.mp4") == (17, 16.0)
    assert frames_of(out / "sample_after_lora.mp4") == (17, 16.0)
    lines = [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]
    assert [(line["expert"], line["step"]) for line in lines] == [
        ("high", 1), ("high", 2), ("low", 1), ("low", 2)
    ]  # fmt: skip
    assert "sample_after_lora.mp4" in (out / "report.html").read_text()
    assert {path.parent.name for path in out.glob("tensorboard/*/events*")} == {"high", "low"}


@pytest.mark.slow
@pytest.mark.parametrize("variant", ["i2v_a14b", "ti2v_5b"])
def test_the_other_variants_go_the_whole_road(variant, toy_data, tmp_path):
    out, clips = tmp_path / "out", shutil.copytree(toy_data, tmp_path / "clips")
    lines = (clips / "prompts.txt").read_text().splitlines(keepends=True)
    (clips / "prompts.txt").write_text("".join(lines[:2]))
    size = ("data.height=64", "data.width=64", "data.fps=16", "train.max_steps=1")
    task = "model.task=i2v"
    sets = toy(
        f"model.variant={variant}",
        task,
        *size,
        f"data.source={clips}",
        f"data.shards={tmp_path / 'shards'}",
        f"output.dir={out}",
        "output.sample_steps=2",
    )
    assert cli.main(["train", *sets]) == 0
    assert frames_of(out / "sample_after_lora.mp4") == (17, 16.0)


def test_sample_writes_a_video_with_the_lora_files_of_a_folder(toy_shards, tmp_path, capsys):
    out = tmp_path / "out"
    sets = toy(f"data.shards={toy_shards}", f"output.dir={out}", "train.max_steps=1")
    assert cli.main(["train", *sets]) == 0
    video = tmp_path / "v.mp4"
    ask = ["--prompt", "a red square", "--steps", "2", "--lora", str(out), "--out", str(video)]
    assert cli.main(["sample", *sets, *ask]) == 0
    assert frames_of(video) == (17, 16.0)
    capsys.readouterr()
    line = refuse(capsys, "sample", *sets, "--prompt", "x", "--steps", "1", "--lora", "none")
    assert "--lora: there is no none" in line


def test_without_a_config_and_without_data_the_toy_set_is_drawn(tmp_path):
    """`python launch/train.py` in an empty folder, as its own process."""
    few = ("data.num_frames=9", "rhythm.spec_weight=0", "output.sample_steps=0")
    sets = overrides(*few, "train.max_steps=1", "model.expert=high")
    run = subprocess.run(
        [sys.executable, str(ROOT / "launch" / "train.py"), *sets],
        cwd=tmp_path,
        env=os.environ | {"PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert run.returncode == 0, run.stderr
    assert "no data found: drawing the toy set" in run.stderr
    assert (tmp_path / "tempolora_demo" / "clips" / "prompts.txt").is_file()
    assert (tmp_path / "tempolora_demo" / "out" / "report.html").is_file()


def test_a_full_disk_is_one_line_that_names_the_file(tmp_path):
    """The limit on a file's size fails a write as a full disk does."""
    full = (
        "import resource, sys; from tempolora import cli; "
        "resource.setrlimit(resource.RLIMIT_FSIZE, (16, 16)); sys.exit(cli.main(sys.argv[1:]))"
    )
    out = tmp_path / "plan.json"
    plan = ["plan", "--config", "configs/a14b.json", "--gpu-memory", "80", "--json", str(out)]
    command = [sys.executable, "-c", full, *plan]
    done = subprocess.run(command, capture_output=True, text=True, cwd=ROOT)
    assert (done.returncode, done.stderr) == (
        2,
        f"tempolora: {out}: File too large; make room first\n",
    )
    assert not list(tmp_path.iterdir())
