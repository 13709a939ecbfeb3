"""Stopping and going on: what a run puts into a checkpoint, and which checkpoint it takes up."""

import logging
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from torch import nn

from tempolora.config import Config, ConfigError
from tempolora.files import sha256_of
from tempolora.model.location import PART_OF
from tempolora.model.targets import adapter_rows
from tempolora.model.wan import fingerprint
from tempolora.train import checkpoint
from tempolora.train.world import World
from tempolora.train.zero_state import optimizer_cut

log = logging.getLogger(__name__)

# What shapes the adapters, the order in which samples and noise come, or the loss's scale.
FIXED = {
    "model": ("variant", "task", "base"),
    "lora": ("rank", "alpha", "target", "time_rows", "blocks"),
    "train": ("optimizer", "ema_decay", "seed"),
    "data": ("held_out",),
    # What c(sigma) was measured with.
    "rhythm": ("signal", "spec_form", "spec_cutoff_hz", "band_hz", "band_gain", "jitter_gain"),
}


def checkpoint_root(cfg: Config, expert: str) -> Path:
    """Where an expert's checkpoints lie."""
    return Path(cfg.output.dir) / "checkpoints" / expert


def run_facts(cfg: Config, expert: str, transformer: nn.Module, world: World) -> dict[str, Any]:
    """What a checkpoint says of itself beside its step; enough to export it without the model."""
    head_dim = transformer.config.attention_head_dim
    return {
        "expert": expert,
        "config": cfg.model_dump(mode="json"),
        "base": fingerprint(cfg.model, PART_OF[expert]),
        "data": sha256_of(Path(cfg.data.shards) / "manifest.json"),
        "processes": world.size,
        "optimizer_cut": optimizer_cut(cfg, world.size),
        "num_heads": transformer.config.num_attention_heads,
        "head_dim": head_dim,
        "rows": adapter_rows(cfg.lora, cfg.timebase, head_dim),
    }


def find_resume(
    cfg: Config, resume: str, processes: Mapping[str, int]
) -> dict[str, checkpoint.Checkpoint]:
    """The checkpoint each expert goes on from, by what `--resume auto | none | FOLDER` means.

    processes: how many train each expert. A folder is one expert's; the others go on from their
    newest. Raises ConfigError where a checkpoint does not fit this run, naming the setting, and
    where an expert has checkpoints of which none is whole.
    """
    if resume == "none":
        return {}
    starts = {}
    if resume != "auto":
        given = checkpoint.open_checkpoint(Path(resume))
        expert = given.state["expert"]
        if expert not in cfg.experts:
            raise ConfigError(
                f"--resume: {resume} is of the {expert} expert, this run trains "
                f"{' and '.join(cfg.experts)}"
            )
        starts[expert] = given
    for expert in cfg.experts:
        if expert not in starts and (newest := checkpoint.latest(checkpoint_root(cfg, expert))):
            starts[expert] = newest
    for expert, start in starts.items():
        _refuse_other_run(cfg, expert, start, processes[expert])
        log.info("%s: goes on after step %d (%s)", expert, start.state["step"], start.folder)
    return starts


def _refuse_other_run(
    cfg: Config, expert: str, found: checkpoint.Checkpoint, processes: int
) -> None:
    state = found.state
    before, now = state["config"], cfg.model_dump(mode="json")
    for section, keys in FIXED.items():
        for key in keys:
            if now[section][key] != "auto":  # which takes the checkpoint's
                _refuse_unless_equal(
                    found, f"{section}.{key}", before[section][key], now[section][key]
                )
    rows = adapter_rows(cfg.lora, cfg.timebase, state["head_dim"])
    _refuse_unless_equal(found, "data.num_frames, whose lora.time_rows", state["rows"], rows)
    base = fingerprint(cfg.model, PART_OF[expert])
    _refuse_unless_equal(found, "model: a base of fingerprint", state["base"], base)
    cut = optimizer_cut(cfg, processes)
    if state["optimizer_cut"] != cut:
        raise ConfigError(
            f"--resume: {found.folder} holds 8-bit optimizer state {_cut(state['optimizer_cut'])}, "
            f"this run takes it {_cut(cut)}; start as many processes for this expert, under the "
            "same engine, as before (train.optimizer adamw goes on with any)"
        )
    if state["data"] != sha256_of(Path(cfg.data.shards) / "manifest.json"):
        log.warning(
            "%s: the shards have changed since %s: samples come in another order from here on",
            expert,
            found.folder,
        )


def _cut(processes: int | None) -> str:
    return f"as DeepSpeed cuts it for {processes} processes" if processes else "whole"


def _refuse_unless_equal(found: checkpoint.Checkpoint, key: str, before: Any, now: Any) -> None:
    if before != now:
        raise ConfigError(
            f"{key}: the checkpoint {found.folder} has {before!r}, this config {now!r}; "
            "choose another output.dir, or --resume none to start over"
        )
