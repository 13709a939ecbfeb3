"""What auto becomes in a run, that a resumed run keeps it, and what is said when memory ends."""

import json
import logging
import shutil
from types import SimpleNamespace

import pytest
import torch
from conftest import SMALL, overrides

from tempolora import cli
from tempolora.config import load_config
from tempolora.model import wan
from tempolora.train import auto
from tempolora.train.plan import AUTO_KEYS, Card, key_of
from tempolora.train.rates import GIB
from tempolora.train.world import World

CPU, GPU = World(0, 1, torch.device("cpu")), World(0, 1, torch.device("cuda"))
ALL_AUTO = [f"{key}=auto" for key in AUTO_KEYS]


def chosen(cfg):
    return {key: key_of(cfg, key) for key in AUTO_KEYS}


@pytest.fixture
def card(monkeypatch):
    """card(gib, gpus): what the run finds, where there is no GPU to ask."""

    def put(gib, gpus=1):
        monkeypatch.setattr(auto, "card_here", lambda world: Card(gib * GIB, gpus))

    return put


def test_without_a_gpu_auto_is_what_the_defaults_were():
    resolved = auto.resolve(load_config(None, ALL_AUTO), CPU, {})
    assert chosen(resolved) == {
        "model.base": "bf16",
        "model.placement": "gpu",
        "train.checkpointing": "full",
    }
    beside = auto.resolve_beside(load_config(None, ALL_AUTO), CPU.device, "sampling")
    assert (beside.model.base, beside.model.placement) == ("bf16", "gpu")


def test_on_a_gpu_auto_is_the_planners_choice_and_said_in_one_line(card, caplog):
    caplog.set_level(logging.INFO)
    card(131)
    large = auto.resolve(load_config(None, ["train.compile=true"]), GPU, {})
    assert chosen(large) == {
        "model.base": "bf16",
        "model.placement": "gpu",
        "train.checkpointing": "selective",
    }
    (line,) = [record.getMessage() for record in caplog.records]
    assert line.startswith("auto: model.placement=gpu train.checkpointing=selective: predicted")
    card(7.3)
    small = auto.resolve(load_config(None, ["train.compile=true"]), GPU, {})
    assert (small.model.placement, small.train.checkpointing) == ("host", "offload")


def test_what_is_set_is_left_alone(card):
    card(7.3)
    cfg = load_config(None, ["train.checkpointing=full", "model.placement=gpu"])
    assert auto.resolve(cfg, GPU, {}) is cfg
    half = auto.resolve(load_config(None, ["train.checkpointing=offload"]), GPU, {})
    assert (half.model.placement, half.train.checkpointing) == ("host", "offload")
    other = auto.resolve(load_config(None, ["model.placement=host"]), GPU, {})
    assert (other.model.placement, other.train.checkpointing) == ("host", "offload")
    none = load_config(None, ["train.checkpointing=none"])  # which goes with the GPU alone
    assert auto.resolve(none, GPU, {}).model.placement == "gpu"
    sampled = auto.resolve_beside(none, GPU.device, "sampling")
    assert sampled.model.placement == "host"


def test_a_checkpoint_decides_and_not_the_memory_of_the_day(card):
    card(7.3)
    before = load_config(None, ["train.checkpointing=selective", "model.placement=gpu"])
    start = SimpleNamespace(state={"config": before.model_dump(mode="json")}, folder="step-1")
    resumed = auto.resolve(load_config(None), GPU, {"high": start})
    assert (resumed.model.placement, resumed.train.checkpointing) == ("gpu", "selective")


def test_a_checkpoints_choice_that_another_engine_cannot_bear_is_made_anew_but_for_the_base(card):
    card(131, gpus=2)
    sets = ["model.base=fp8", "model.placement=host", "train.checkpointing=offload"]
    before = load_config(None, sets).model_dump(mode="json")
    start = SimpleNamespace(state={"config": before}, folder="step-1")
    sharded = load_config(None, ["parallel.engine=fsdp", "model.base=auto"])
    assert chosen(auto.resolve(sharded, World(0, 2, GPU.device), {"high": start})) == {
        "model.base": "fp8",
        "model.placement": "gpu",
        "train.checkpointing": "full",
    }


def test_sampling_and_precompute_stream_only_where_they_must(card):
    open_base = load_config(None, ["model.base=auto"])
    for gib, phase, base, placement in (
        (80, "sampling", "bf16", "gpu"),
        (22, "sampling", "fp8", "gpu"),
        (7.3, "sampling", "bf16", "host"),
        (22, "precompute", "bf16", "gpu"),
        (7.3, "precompute", "bf16", "host"),
    ):
        card(gib)
        found = auto.resolve_beside(open_base, GPU.device, phase)
        assert (found.model.base, found.model.placement) == (base, placement), (gib, phase)


def settings(shards, out, *more):
    paths = (f"data.shards={shards}", f"output.dir={out}", "model.expert=low")
    return overrides(*SMALL, *paths, *more)


def test_a_run_writes_what_auto_became_and_a_resumed_one_takes_it_up(toy_shards, tmp_path, caplog):
    out, shards = tmp_path / "out", shutil.copytree(toy_shards, tmp_path / "shards")
    sets = settings(shards, out, *ALL_AUTO, "train.checkpoint_every=1")
    assert cli.main(["train", *sets, *overrides("train.max_steps=1")]) == 0
    assert "train.checkpointing=full: there is no GPU" in caplog.text
    assert json.loads((out / "config.json").read_text())["train"]["checkpointing"] == "full"
    state = json.loads((out / "checkpoints/low/step-000001/state.json").read_text())
    assert state["config"]["model"]["base"] == "bf16"
    assert cli.main(["train", *sets, *overrides("train.max_steps=2")]) == 0
    assert "train.checkpointing=full, as in" in caplog.text


def test_running_out_of_memory_in_the_first_step_is_advice(
    toy_shards, tmp_path, monkeypatch, capsys
):
    def full(*_, **__):
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB")

    monkeypatch.setattr(wan, "predict_velocity", full)
    out = tmp_path / "out"
    assert cli.main(["train", *settings(toy_shards, out, "train.checkpointing=none")]) == 2
    line = capsys.readouterr().err.strip().splitlines()[-1]
    assert "out of GPU memory in the first step with train.checkpointing=none" in line
    assert "; set train.checkpointing=selective, predicted at" in line


def test_running_out_of_memory_later_is_no_mistake_of_the_settings(
    toy_shards, tmp_path, monkeypatch
):
    predict, calls = wan.predict_velocity, []

    def full_later(*given, **named):
        calls.append(1)
        if len(calls) > 2:  # the look at the base, and the first step
            raise torch.OutOfMemoryError("CUDA out of memory")
        return predict(*given, **named)

    monkeypatch.setattr(wan, "predict_velocity", full_later)
    with pytest.raises(torch.OutOfMemoryError):
        cli.main(["train", *settings(toy_shards, tmp_path / "out", "train.validate_every=0")])
