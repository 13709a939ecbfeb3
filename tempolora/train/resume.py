"""Stopping and going on: what a run puts into a checkpoint, and which checkpoint it takes up."""

import logging
from pathlib import Path
from typing import Any

from torch import Tensor, nn

from tempolora.config import Config, ConfigError
from tempolora.files import sha256_of
from tempolora.model.lora import adapter_rows
from tempolora.train import checkpoint
from tempolora.train.engine import Engine, uses_deepspeed
from tempolora.train.world import World

log = logging.getLogger(__name__)

# What shapes the adapters, or the order in which samples and noise come.
FIXED = {
    "model": ("variant", "task"),
    "lora": ("rank", "alpha", "target", "time_rows", "blocks"),
    "train": ("optimizer", "ema_decay", "seed"),
}


def checkpoint_root(cfg: Config, expert: str) -> Path:
    """Where an expert's checkpoints lie."""
    return Path(cfg.output.dir) / "checkpoints" / expert


def run_facts(
    cfg: Config, expert: str, transformer: nn.Module, engine: Engine, world: World
) -> dict[str, Any]:
    """What a checkpoint says of itself beside its step; enough to export it without the model."""
    head_dim = transformer.config.attention_head_dim
    return {
        "expert": expert,
        "config": cfg.model_dump(mode="json"),
        "data": sha256_of(Path(cfg.data.shards) / "manifest.json"),
        "processes": world.size,
        "sharded_optimizer": engine.sharded_optimizer,
        "num_heads": transformer.config.num_attention_heads,
        "head_dim": head_dim,
        "rows": adapter_rows(cfg.lora, cfg.timebase, head_dim),
    }


def save(
    cfg: Config, engine: Engine, ema: dict[str, Tensor] | None, state: dict[str, Any], world: World
) -> Path:
    """Write a checkpoint, on which all processes work; the folder. state: facts, step, draws."""
    root, step = checkpoint_root(cfg, state["expert"]), state["step"]
    folder = checkpoint.begin(root, step)
    weights = engine.lora_state()
    if world.is_main:
        checkpoint.write_tensors(folder, "lora.safetensors", weights)
        if ema is not None:
            checkpoint.write_tensors(folder, "ema.safetensors", ema)
    if world.is_main or engine.sharded_optimizer:
        name = f"optimizer-{world.rank:05d}.safetensors"
        checkpoint.write_tensors(folder, name, engine.optimizer_state())
    world.barrier()
    if world.is_main:
        checkpoint.commit(root, step, state, cfg.train.keep_checkpoints)
    world.barrier()
    return root / f"step-{step:06d}"


def find_resume(
    cfg: Config, expert: str, resume: str, processes: int
) -> checkpoint.Checkpoint | None:
    """The checkpoint that `--resume auto | none | FOLDER` means for an expert, if any.

    Raises ConfigError where it does not fit this run, naming the setting.
    """
    found = None
    if resume == "auto":
        found = checkpoint.latest(checkpoint_root(cfg, expert))
    elif resume != "none":
        found = checkpoint.open_checkpoint(Path(resume))
        if found.state["expert"] != expert:
            return None
    if found is None:
        return None
    _refuse_other_run(cfg, found, processes)
    log.info("%s: goes on after step %d (%s)", expert, found.state["step"], found.folder)
    return found


def _refuse_other_run(cfg: Config, found: checkpoint.Checkpoint, processes: int) -> None:
    before, now = found.state["config"], cfg.model_dump(mode="json")
    for section, keys in FIXED.items():
        for key in keys:
            if before[section][key] != now[section][key]:
                raise ConfigError(
                    f"{section}.{key}: the checkpoint {found.folder} has {before[section][key]!r}, "
                    f"this config {now[section][key]!r}; choose another output.dir, or "
                    "--resume none to start over"
                )
    if found.state["sharded_optimizer"] != uses_deepspeed(cfg):
        raise ConfigError(
            f"parallel.engine: the checkpoint {found.folder} was "
            f"{'' if found.state['sharded_optimizer'] else 'not '}written by deepspeed, whose "
            "optimizer state is its own; go on with the same engine"
        )
    if found.state["sharded_optimizer"] and found.state["processes"] != processes:
        raise ConfigError(
            f"--resume: {found.folder} holds DeepSpeed state of {found.state['processes']} "
            f"processes, {processes} were started; start as many as before"
        )
