"""The dry run: what FSDP2 gives each of many processes, without GPUs, memory or the others."""

import json
from functools import cache
from pathlib import Path

import pytest
import torch
import torch.distributed as dist

from tempolora.cli import main
from tempolora.config import load_config
from tempolora.model.wan import blank_transformer, load_transformer
from tempolora.train.dry_run import build_parts, dry_run
from tempolora.train.plan import Settings, predict
from tempolora.train.work import work_of

ROOT = Path(__file__).parents[1]
FSDP = Settings("fsdp", "bf16", "gpu", "full")


def config(name, *overrides):
    return load_config(ROOT / "configs" / f"{name}.json", list(overrides))


@cache
def rows_of(length, size):
    """How many of a tensor's rows each process gets: torch's own way to cut one in pieces."""
    pieces = [len(piece) for piece in torch.empty(length).chunk(size)]
    return pieces + [0] * (size - len(pieces))


def own_bytes(cfg, size):
    """Of each process, without padding."""
    tensors = list(blank_transformer(cfg.model, cfg.experts[0]).parameters())
    return [sum(rows_of(len(p), size)[rank] * p[0].nbytes for p in tensors) for rank in range(size)]


def test_blank_weights_are_those_that_are_loaded():
    for base in ("bf16", "fp8", "fp32"):
        cfg = config("toy", f"model.base={base}")
        blank = blank_transformer(cfg.model, "high").state_dict()
        loaded = load_transformer(cfg.model, "high", "cpu").state_dict()
        assert {n: (p.shape, p.dtype) for n, p in blank.items()} == {
            n: (p.shape, p.dtype) for n, p in loaded.items()
        }


def test_the_a14b_over_64_processes_is_whole_and_as_planned():
    cfg = config("a14b", "parallel.engine=fsdp", "model.expert=high")
    expected = own_bytes(cfg, 64)
    whole = work_of(cfg, "high").weights("bf16")
    assert sum(expected) == whole
    plan = predict(cfg, FSDP, gpus=64)
    trial = dry_run(cfg, plan, 64)
    assert [part.rank for part in trial.parts] == [0, 63]
    for part in (*trial.parts, *build_parts(cfg, [31], 64)):
        assert part.own == expected[part.rank]
        assert part.held >= part.own
        assert part.weights == pytest.approx(plan.parts["weights"], rel=0.02)
        assert part.held == pytest.approx(whole / 64, rel=0.02)
    assert "\n".join(trial.lines()) in (ROOT / "docs" / "scaling.md").read_text()


@pytest.mark.parametrize("overrides", [(), ("parallel.context=2",)], ids=["alone", "context"])
def test_all_parts_together_are_the_model(overrides):
    """8 processes: tensors of fewer rows than that leave some of them without."""
    cfg = config("toy", "parallel.engine=fsdp", "model.base=bf16", *overrides)
    parts = list(build_parts(cfg, range(8), 8))
    assert sum(part.own for part in parts) == work_of(cfg, "high").weights("bf16")
    assert [part.own for part in parts] == own_bytes(cfg, 8)
    assert len({part.held for part in parts}) == 1  # padding makes them equal
    assert parts[0].held == max(own_bytes(cfg, 8)) and parts[-1].own < parts[-1].held


def test_it_leaves_no_processes_behind_and_disturbs_none():
    cfg = config("toy", "parallel.engine=fsdp")
    list(build_parts(cfg, [0], 2))
    assert not dist.is_initialized()
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    try:
        with pytest.raises(AssertionError, match="no part of a run"):
            list(build_parts(cfg, [0], 2))
        assert dist.get_backend() == "gloo" and dist.get_world_size() == 1
    finally:
        dist.destroy_process_group()


def plan(*arguments):
    """`tempolora plan` for TinyWan on cards of 80 GiB."""
    common = ["--config", str(ROOT / "configs" / "toy.json"), "--gpu-memory", "80", "--dry-run"]
    return main(["plan", *common, *arguments])


def test_the_command_says_what_each_process_holds(tmp_path, capsys):
    file = tmp_path / "plan.json"
    split = ("--gpus", "8", "--set", "parallel.engine=fsdp")
    assert plan(*split, "--json", str(file)) == 0
    assert "dry run of fsdp, 4 processes" in capsys.readouterr().out  # a half trains each expert
    parts = json.loads(file.read_text())["dry_run"]["parts"]
    assert [part["rank"] for part in parts] == [0, 3] and parts[0]["own"] > 0


def test_what_is_not_sharded_by_fsdp_is_refused(capsys):
    for engine in ("ddp", "deepspeed"):
        assert plan("--gpus", "8", "--set", f"parallel.engine={engine}") == 2
        line = capsys.readouterr().err.strip()
        assert f'--dry-run: the plan is "{engine}"' in line and "\n" not in line
