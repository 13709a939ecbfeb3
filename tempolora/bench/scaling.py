"""One training step over several GPUs, by engine: seconds, share of one GPU's speed, memory.

    python -m tempolora.bench scaling [--gpus 1 2 4] [--engines ddp fsdp deepspeed] [--set K=V ...]

Each GPU has a sample of its own, so the work grows with the GPUs and the seconds should not. A row
is a torchrun of its own over full-size weights, drawn at random. With --context C, C GPUs share
a sample. Reserved memory is the highest of all GPUs.
"""

import argparse
import json
import sys
from pathlib import Path
from typing import Any

from tempolora.bench.alone import figures_of
from tempolora.bench.memory import training_steps
from tempolora.config import Config, load_config
from tempolora.files import write_json

COMMON = ("model.init=random", "train.optimizer=adamw", "model.placement=gpu")
ENGINES = ("ddp", "fsdp", "deepspeed")


def main(arguments: list[str]) -> None:
    parser = argparse.ArgumentParser(prog="python -m tempolora.bench scaling", description=__doc__)
    parser.add_argument("--config", type=Path, default=Path("configs/a14b.json"))
    parser.add_argument("--gpus", type=int, nargs="+", default=[1, 2])
    parser.add_argument("--engines", nargs="+", choices=ENGINES, default=list(ENGINES))
    parser.add_argument("--set", action="append", default=[], metavar="KEY=VALUE", dest="settings")
    parser.add_argument("--context", type=int, default=1, help="GPUs that share a sample")
    parser.add_argument("--steps", type=int, default=4)
    parser.add_argument("--json", type=Path, help="write the figures here too")
    parser.add_argument("--engine", choices=("plain", *ENGINES), help=argparse.SUPPRESS)
    options = parser.parse_args(arguments)
    if options.engine:
        found = measure(load_config(options.config, settings_of(options)), options)
        if found:
            print(json.dumps(found))
        return
    rows = [("plain", 1)] if 1 in options.gpus else []
    rows += [(engine, n) for engine in options.engines for n in options.gpus if n > 1]
    results: dict[str, Any] = {}
    print(
        "engine | GPUs | load s | first s | s/step | of one GPU's speed | GiB reserved, allocated"
    )
    for engine, count in rows:
        found = run_alone(options, engine, count)
        results[f"{engine} {count}"] = found
        print(describe(engine, count, found, results.get("plain 1", {})), flush=True)
        if options.json:
            write_json(options.json, results)


def settings_of(options: argparse.Namespace) -> list[str]:
    cfg = load_config(options.config, [])
    high = ["model.expert=high"] if len(cfg.variant.experts) == 2 else []
    shared = [] if options.engine == "plain" else [f"parallel.context={options.context}"]
    return [*COMMON, *high, f"parallel.engine={options.engine}", *shared, *options.settings]


def run_alone(options: argparse.Namespace, engine: str, count: int) -> dict[str, Any]:
    """A row in processes of its own: its figures, or {"error": its last line}."""
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone"]
    command += ["--nproc-per-node", str(count), "-m", "tempolora.bench", "scaling"]
    command += ["--config", str(options.config), "--engine", engine, "--steps", str(options.steps)]
    command += ["--context", str(options.context)]
    for setting in options.settings:
        command += ["--set", setting]
    return figures_of(command)


def measure(cfg: Config, options: argparse.Namespace) -> dict[str, Any] | None:
    """This process's part of a row; the figures, on the first process."""
    import torch

    from tempolora.train.deterministic import make_deterministic
    from tempolora.train.world import join_world, leave_world

    parallel = cfg.parallel
    if cfg.train.deterministic:
        make_deterministic()
    world = join_world(options.engine == "deepspeed", parallel.gpu_memory_gib, parallel.context)
    found = training_steps(cfg, options.engine, world, options.steps)
    peaks = torch.tensor([[found["reserved_gib"], found["allocated_gib"]]], device=world.device)
    found["reserved_gib"], found["allocated_gib"] = world.gather(peaks).amax(dim=0).tolist()
    leave_world()
    return found | {"context": world.context} if world.is_main else None


def describe(engine: str, count: int, found: dict[str, Any], alone: dict[str, Any]) -> str:
    """A row as a line."""
    if "error" in found:
        return f"{engine} | {count} | {found['error']}"
    share = ""
    if "rest_s" in alone:
        share = f"{alone['rest_s'] / found['rest_s'] / found['context']:.1%}"
    return (
        f"{engine} | {count} | {found['load_s']:.1f} | {found['first_s']:.1f} | "
        f"{found['rest_s']:.3f} | {share} | "
        f"{found['reserved_gib']:.1f}, {found['allocated_gib']:.1f}"
    )
