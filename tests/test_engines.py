"""Every engine, started by its real launcher, trains the same LoRA; and stopping changes nothing.

The reference is one plain process that accumulates two microsteps where two processes take one
each: the same samples meet the same noise. In fp32 only the order of sums differs, 1e-7 a sum;
Adam's first steps divide gradients by their own size, so that a gradient near zero can carry that
into the weights at the size of the rate. Losses see little of it: they agree to 1e-5.
"""

import json
import math
import os
import shutil
import signal
import subprocess
import sys
import time
from functools import partial
from pathlib import Path

import pytest
import torch
from conftest import SMALL, overrides
from safetensors.torch import load_file

from tempolora.cli import main
from tempolora.config import load_config
from tempolora.train.engine import build_engine, choose_engine
from tempolora.train.objective import Objective
from tempolora.train.world import World

ROOT = Path(__file__).parents[1]
TOY = ["--config", str(ROOT / "configs" / "toy.json")]
LORA = "wan22_temporal_lora_high_noise.safetensors"
LAUNCHERS = {
    "ddp": ["torchrun", "--standalone", "--nproc_per_node", "2"],
    "fsdp": ["torchrun", "--standalone", "--nproc_per_node", "2"],
    "deepspeed": ["deepspeed", "--num_accelerators", "2"],
}


def settings(shards: Path, out: Path, *more: str) -> list[str]:
    paths = (f"data.shards={shards}", f"output.dir={out}", "model.expert=high")
    # gradients here have norms near 5e-4: this clips every one of them
    measured = ("data.held_out=1", "train.validate_every=4", "train.anchor_weight=1")
    return overrides(*SMALL, *paths, *measured, "train.max_grad_norm=1e-4", *more)


def launch(engine: str, shards: Path, out: Path, *more: str) -> None:
    """Run launch/train.py under the engine's own launcher, as a user would."""
    launcher = LAUNCHERS[engine]
    command = [str(Path(sys.executable).with_name(launcher[0])), *launcher[1:]]
    script = [str(ROOT / "launch" / "train.py"), *TOY]
    engine_set = overrides(f"parallel.engine={engine}") if engine != "deepspeed" else []
    path = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"
    run = subprocess.run(
        [*command, *script, *settings(shards, out, *more), *engine_set],
        env=os.environ | {"PATH": path, "PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
        timeout=540,
        cwd=out.parent,
    )
    assert run.returncode == 0, run.stdout[-3000:] + run.stderr[-3000:]


def logged(out: Path, key: str) -> list[float]:
    """A value at every step that has it."""
    lines = [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]
    return [line[key] for line in sorted(lines, key=lambda line: line["step"]) if key in line]


def losses(out: Path) -> list[float]:
    return logged(out, "loss")


@pytest.fixture(scope="module")
def reference(toy_shards, tmp_path_factory):
    """One process, two microsteps a step."""
    out = tmp_path_factory.mktemp("plain") / "out"
    assert main(["train", *settings(toy_shards, out, "train.gradient_accumulation=2")]) == 0
    return out


@pytest.mark.slow
@pytest.mark.parametrize("engine", LAUNCHERS)
def test_two_processes_equal_one_and_a_resumed_run_equals_an_uninterrupted_one(
    engine, reference, ranks, toy_shards, tmp_path
):
    """The first run by the engine's launcher; for the second its processes are forked."""
    out = tmp_path / "out"
    launch(engine, toy_shards, out)
    for value in ("loss", "spectral", "tv", "held_out"):
        assert len(logged(out, value)) == (2 if value == "held_out" else 4)
        assert logged(out, value) == pytest.approx(logged(reference, value), rel=1e-5), value
    ours, theirs = load_file(out / LORA), load_file(reference / LORA)
    assert ours.keys() == theirs.keys()
    moved = max(w.abs().max() for name, w in theirs.items() if "lora_B" in name)
    for name, weight in theirs.items():
        assert (ours[name] - weight).abs().mean() < 1e-3 * moved, name

    stopped = tmp_path / "stopped"
    shutil.copytree(out, stopped)
    shutil.rmtree(stopped / "checkpoints" / "high" / "step-000004")
    (stopped / LORA).unlink()
    (stopped / "metrics.jsonl").unlink()
    sets = [*settings(toy_shards, stopped), *overrides(f"parallel.engine={engine}")]
    log = tmp_path / "log"
    assert ranks.run(2, ["train", *TOY, *sets], log) == [0, 0], log.read_text()
    assert losses(stopped) == losses(out)[2:]
    resumed = load_file(stopped / LORA)
    assert all(torch.equal(resumed[name], ours[name]) for name in ours)


@pytest.mark.soak
@pytest.mark.parametrize("engine", LAUNCHERS)
def test_compiled_blocks_take_the_same_steps_under_every_engine(engine, tmp_path):
    torchrun = [str(Path(sys.executable).with_name("torchrun")), *LAUNCHERS["ddp"][1:]]
    script = [str(ROOT / "tests" / "compiled_steps.py"), engine, str(tmp_path / "out.json")]
    path = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"
    env = os.environ | {"PATH": path, "PYTHONPATH": str(ROOT)}
    run = subprocess.run([*torchrun, *script], env=env, capture_output=True, text=True, timeout=540)
    assert run.returncode == 0, run.stdout[-3000:] + run.stderr[-3000:]
    found = json.loads((tmp_path / "out.json").read_text())
    assert found["graphs"] and not found["breaks"]
    for eager, compiled in zip(found["eager"], found["compiled"], strict=True):
        assert compiled == pytest.approx(eager, rel=1e-5)


@pytest.mark.parametrize("optimizer", ["adamw", "adamw8bit"])
def test_a_plain_run_resumes_bit_for_bit_with_accumulation_and_a_moving_average(
    optimizer, toy_shards, tmp_path
):
    more = (f"train.optimizer={optimizer}", "train.gradient_accumulation=2", "train.ema_decay=0.9")
    whole, stopped = tmp_path / "whole", tmp_path / "stopped"
    assert main(["train", *settings(toy_shards, whole, *more)]) == 0
    shutil.copytree(whole, stopped)
    shutil.rmtree(stopped / "checkpoints" / "high" / "step-000004")
    (stopped / "metrics.jsonl").unlink()
    assert main(["train", *settings(toy_shards, stopped, *more)]) == 0
    assert losses(stopped) == losses(whole)[2:]
    for name in ("lora", "ema", "optimizer"):
        file = f"checkpoints/high/step-000004/{name}.safetensors"
        a, b = load_file(whole / file), load_file(stopped / file)
        assert a.keys() == b.keys()
        assert all(torch.equal(a[key], b[key]) for key in a), name


LONG = ("train.gradient_accumulation=2", "train.max_steps=24")


@pytest.fixture(scope="module")
def long_reference(toy_shards, tmp_path_factory):
    """A run long enough to be caught in the middle."""
    out = tmp_path_factory.mktemp("long") / "out"
    assert main(["train", *settings(toy_shards, out, *LONG)]) == 0
    return out


@pytest.mark.slow
@pytest.mark.soak
@pytest.mark.parametrize("number", ["SIGUSR1", "SIGTERM"])
def test_a_signal_ends_the_run_after_a_step_with_a_checkpoint_that_loses_nothing(
    number, long_reference, toy_shards, tmp_path
):
    out = tmp_path / "out"
    sets = settings(toy_shards, out, *LONG)
    script = [str(ROOT / "launch" / "train.py"), "--config", str(ROOT / "configs" / "toy.json")]
    run = subprocess.Popen(
        [sys.executable, *script, *sets, *overrides("train.checkpoint_every=100")],
        env=os.environ | {"PYTHONPATH": str(ROOT)},
        stderr=subprocess.PIPE,
        text=True,
    )
    while not (out / "metrics.jsonl").exists() or not losses(out):
        assert run.poll() is None, run.stderr.read()
        time.sleep(0.01)
    run.send_signal(getattr(signal, number))
    _, stderr = run.communicate(timeout=120)
    assert run.returncode == 0, stderr
    assert f"{number}: stopping after this step" in stderr
    stopped_at = len(losses(out))
    assert stopped_at < 24
    assert (out / "checkpoints" / "high" / f"step-{stopped_at:06d}" / "manifest.json").is_file()
    assert main(["train", *sets]) == 0
    assert losses(out) == losses(long_reference)


def test_the_moving_average_is_what_gets_exported(toy_shards, tmp_path):
    out = tmp_path / "out"
    sets = settings(toy_shards, out, "train.ema_decay=0.9", "train.max_steps=2")
    assert main(["train", *sets]) == 0
    checkpoint = out / "checkpoints/high/step-000002"
    key = "blocks.0.attn1.to_q.lora_A.weight"
    exported = load_file(out / LORA)["diffusion_model.blocks.0.self_attn.q.lora_A.weight"]
    assert torch.equal(exported, load_file(checkpoint / "ema.safetensors")[key])
    assert not torch.equal(exported, load_file(checkpoint / "lora.safetensors")[key])


def one_step_gradients(cfg, toy_shards) -> dict[str, torch.Tensor]:
    from tempolora.data.readout import load_readout
    from tempolora.data.shards import ShardReader, load_prompt, read_manifest
    from tempolora.model.lora import add_lora, lora_parameters
    from tempolora.model.wan import load_transformer, predict_velocity
    from tempolora.train.step import Collate

    reader = ShardReader(toy_shards, read_manifest(toy_shards)["fingerprint"])
    transformer = load_transformer(cfg.model, "high", "cpu")
    add_lora(transformer, cfg.lora, cfg.timebase, 0)
    generator = torch.Generator().manual_seed(0)
    for name, parameter in lora_parameters(transformer).items():
        if "lora_B" in name:  # so that gradients reach A as well
            parameter.data.normal_(0, 0.02, generator=generator)
    engine = build_engine("plain", cfg, transformer, World(0, 1, torch.device("cpu")))
    batch = Collate(cfg, "high", load_prompt(toy_shards, ""))([(0, reader.read(0))])
    predict = partial(predict_velocity, engine.transformer)
    objective = Objective(cfg, "high", load_readout(toy_shards), torch.device("cpu"))
    objective.calibrate(predict, [batch], World(0, 1, torch.device("cpu")))
    engine.backward(objective(predict, batch).loss)
    return {name: p.grad.clone() for name, p in lora_parameters(transformer).items()}


def toy(*more: str):
    return load_config(ROOT / "configs" / "toy.json", [*SMALL, *more])


def test_checkpointing_changes_no_gradient(toy_shards):
    kept = one_step_gradients(toy("train.checkpointing=none"), toy_shards)
    recomputed = one_step_gradients(toy("train.checkpointing=full"), toy_shards)
    assert all(torch.equal(kept[name], recomputed[name]) for name in kept)


@pytest.mark.slow
def test_compiled_blocks_are_really_compiled_and_change_gradients_by_rounding_only(toy_shards):
    from torch._dynamo.utils import counters

    eager = one_step_gradients(toy("train.checkpointing=full"), toy_shards)
    counters.clear()
    compiled = one_step_gradients(toy("train.checkpointing=full", "train.compile=true"), toy_shards)
    assert counters["stats"]["unique_graphs"] >= 1  # dynamo passes over in silence what it can't
    for name, gradient in eager.items():
        assert (compiled[name] - gradient).norm() <= 1e-4 * gradient.norm(), name


def test_training_leaves_the_base_as_it_was_and_moves_the_adapters(reference):
    first, last = (
        load_file(reference / f"checkpoints/high/step-00000{n}/lora.safetensors") for n in (2, 4)
    )
    assert all(".lora_" in name for name in last)
    assert any(not torch.equal(first[name], last[name]) for name in last)


@pytest.mark.parametrize(
    ("engine", "size", "gpu_gib", "chosen"),
    [
        ("auto", 1, 139, "plain"),
        ("auto", 2, 139, "ddp"),
        ("auto", 2, 39, "fsdp"),
        ("auto", 2, math.inf, "ddp"),
        ("fsdp", 2, 139, "fsdp"),
    ],
)
def test_auto_shards_the_base_only_where_it_must(engine, size, gpu_gib, chosen, monkeypatch):
    monkeypatch.setattr(World, "gpu_bytes", gpu_gib * 2**30)
    world = World(0, size, torch.device("cpu"))
    overrides = [f"parallel.engine={engine}", "model.placement=gpu", "train.checkpointing=full"]
    cfg = load_config(ROOT / "configs" / "a14b.json", overrides)
    assert choose_engine(cfg, world) == chosen


def test_the_base_is_sized_without_loading_it():
    from tempolora.model.wan import transformer_bytes

    model = load_config(ROOT / "configs" / "a14b.json").model
    assert transformer_bytes(model, "high") == pytest.approx(2 * 14.288e9, rel=1e-3)
