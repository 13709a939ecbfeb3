"""The smallest card: step time and memory of a full-size model at random weights under caps.

    python -m tempolora.bench memory [--config configs/a14b.json] [--rows 7.3 12 24] [--json FILE]

First how fast page-locked memory is copied; then a reference step (compiled, full checkpointing,
all on the GPU), and under each cap the step, two steps of sampling, and the encoding of a text and
a clip. Each runs in a process of its own, so that caps and peaks are its own. Needs no data.
"""

import argparse
import json
import statistics
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from tempolora.bench.alone import figures_of
from tempolora.config import Config, load_config
from tempolora.files import write_json

GIB = 2**30
COMMON = ("model.init=random", "train.optimizer=adamw", "train.compile=true")
ROWS = {
    "reference": ("train.checkpointing=full", "model.placement=gpu"),
    "7.3": ("model.placement=host", "train.checkpointing=offload", "parallel.gpu_memory_gib=7.3"),
    "12": ("model.placement=host", "train.checkpointing=offload", "parallel.gpu_memory_gib=12"),
    "24": ("model.placement=host", "train.checkpointing=offload", "parallel.gpu_memory_gib=24"),
    "24-full": ("model.placement=host", "train.checkpointing=full", "parallel.gpu_memory_gib=24"),
}
"""Settings of each row; a cap is in GiB."""


def main(arguments: list[str]) -> None:
    parser = argparse.ArgumentParser(prog="python -m tempolora.bench memory", description=__doc__)
    parser.add_argument("--config", type=Path, default=Path("configs/a14b.json"))
    parser.add_argument("--rows", nargs="+", choices=ROWS, default=list(ROWS))
    parser.add_argument("--tasks", nargs="+", choices=TASKS, default=list(TASKS))
    parser.add_argument("--set", action="append", default=[], metavar="KEY=VALUE", dest="settings")
    parser.add_argument("--steps", type=int, default=4)
    parser.add_argument("--json", type=Path, help="write the figures here too")
    parser.add_argument("--task", choices=TASKS, help="one task in this process, printed as JSON")
    options = parser.parse_args(arguments)
    if options.task:
        (row,) = options.rows
        cfg = load_config(options.config, [*COMMON, *ROWS[row], *options.settings])
        print(json.dumps(TASKS[options.task](cfg, options.steps)))
        return
    results: dict[str, dict[str, Any]] = {}
    for row in options.rows:
        results[row] = {}
        for task in options.tasks:
            if row == "reference" or task != "copy":
                results[row][task] = run_alone(options, row, task)
                print(describe(row, task, results), flush=True)
                if options.json:
                    write_json(options.json, results)


def run_alone(options: argparse.Namespace, row: str, task: str) -> dict[str, Any]:
    """A task in a process of its own: its figures, or {"error": its last line}."""
    command = [sys.executable, "-m", "tempolora.bench", "memory", "--config", str(options.config)]
    command += ["--rows", row, "--task", task, "--steps", str(options.steps)]
    for setting in options.settings:
        command += ["--set", setting]
    return figures_of(command)


def describe(row: str, task: str, results: dict[str, dict[str, Any]]) -> str:
    """A result as a line."""
    found = results[row][task]
    if "error" in found:
        return f"{row} | {task} | {found['error']}"
    if task == "copy":
        return f"copy | to the GPU {found['in_gb_s']:.1f} GB/s, back {found['out_gb_s']:.1f} GB/s"
    line = f"{row} | {task} | {found['reserved_gib']:.2f} GiB reserved, "
    line += f"{found['allocated_gib']:.2f} allocated"
    if task == "step":
        line += f", {found['host_gib']:.1f} in page-locked host memory"
        line += f" | first {found['first_s']:.2f} s, then {found['rest_s']:.3f} s"
        reference = results.get("reference", {})
        if "rest_s" in reference.get("step", {}):
            line += f", {found['rest_s'] / reference['step']['rest_s']:.3f} of the reference"
        if "in_gb_s" in reference.get("copy", {}):
            floor_s = max(
                found["in_gib"] * GIB / reference["copy"]["in_gb_s"],
                found["out_gib"] * GIB / reference["copy"]["out_gb_s"],
            )
            line += f" (copies alone {floor_s / 1e9:.2f} s)"
    else:
        line += f" | {found['seconds']:.1f} s with loading"
    return line


def copy(cfg: Config, steps: int) -> dict[str, float]:
    """Bandwidth between page-locked host memory and the GPU, each way alone, in 1e9 bytes/s."""
    import torch

    from tempolora.train.world import pick_device

    device = pick_device(0)
    host = torch.empty(GIB // 4, dtype=torch.uint8, pin_memory=device.type == "cuda")
    there = torch.empty_like(host, device=device)
    rates = {}
    for name, to, of in (("in_gb_s", there, host), ("out_gb_s", host, there)):
        to.copy_(of)
        begin = _seconds(device)
        for _ in range(8):
            to.copy_(of, non_blocking=True)
        rates[name] = 8 * len(host) / 1e9 / (_seconds(device) - begin)
    return rates


def step(cfg: Config, steps: int) -> dict[str, float]:
    """Training steps on one GPU: seconds, memory, and what is copied in a step."""
    from tempolora.train.world import World, pick_device

    device = pick_device(0, cfg.parallel.gpu_memory_gib)
    return training_steps(cfg, "plain", World(0, 1, device), steps)


def training_steps(cfg: Config, kind: str, world: Any, steps: int) -> dict[str, float]:
    """Seconds of loading and of steps on one random sample a process, with engine `kind`; memory,
    and GiB copied in a step. Every process of the world must call it."""
    import torch

    from tempolora.model import wan
    from tempolora.train.context import context_of
    from tempolora.train.engine import build_engine
    from tempolora.train.loop import load_with_adapters
    from tempolora.train.spread import spread_of

    device = world.device
    begin = _seconds(device)
    spread = spread_of(kind, cfg, world)
    transformer = load_with_adapters(cfg, cfg.experts[0], device, None, spread)
    engine = build_engine(kind, cfg, transformer, world)
    load_s = _seconds(device) - begin
    latents_BCTHW = torch.randn(cfg.train.batch_size, *cfg.latent_shape, device=device)
    latents_BCTHW = context_of(cfg, world).cut(latents_BCTHW).contiguous()
    given: dict[str, Any] = {"per_token_time": cfg.variant.per_token_time}
    if cfg.task == "i2v" and not cfg.variant.per_token_time:
        given["condition_BCTHW"] = wan.condition_channels(torch.randn_like(latents_BCTHW))
    width = transformer.config.text_dim
    text_BLD = torch.randn(cfg.train.batch_size, wan.TEXT_TOKENS, width, device=device)
    sigma_B = torch.full((cfg.train.batch_size,), 0.9, device=device)
    seconds = []
    for _ in range(max(2, steps)):
        world.barrier()
        begin = _seconds(device)
        v_BCTHW = wan.predict_velocity(
            engine.transformer, latents_BCTHW, sigma_B, text_BLD, **given
        )
        loss = (v_BCTHW - latents_BCTHW).square().mean()
        del v_BCTHW
        engine.backward(loss)
        engine.step(1e-4)
        seconds.append(_seconds(device) - begin)
    pools = ("streamed", "kept_inputs", "kept_outputs")
    held = {name: getattr(transformer, name, None) for name in pools}
    held_bytes = {name: pool.host_bytes if pool else 0 for name, pool in held.items()}
    sent = held_bytes["kept_inputs"] + held_bytes["kept_outputs"]
    return {
        "load_s": load_s,
        "first_s": seconds[0],
        "rest_s": statistics.median(seconds[1:]),
        "host_gib": sum(held_bytes.values()) / GIB,
        "in_gib": (2 * held_bytes["streamed"] + sent) / GIB,
        "out_gib": sent / GIB,
    } | _peak(device)


def sample(cfg: Config, steps: int) -> dict[str, float]:
    """Two sampler steps with guidance, and the decoder."""
    import torch

    from tempolora.results.sample import sample_video
    from tempolora.train.world import pick_device

    device = pick_device(0, cfg.parallel.gpu_memory_gib)
    text_LD, negative_LD = torch.randn(2, 64, _text_width(cfg))
    given = {}
    C, T, H, W = cfg.latent_shape
    if cfg.task == "i2v" and cfg.variant.per_token_time:
        given["first_latent"] = torch.randn(C, 1, H, W)
    elif cfg.task == "i2v":
        given["condition"] = torch.randn(C, T, H, W)
    begin = _seconds(device)
    with tempfile.TemporaryDirectory(prefix="bench-memory-") as folder:
        sample_video(
            cfg,
            Path(folder) / "video.mp4",
            text_LD=text_LD,
            negative_LD=negative_LD,
            loras={},
            seed=0,
            steps=2,
            device=device,
            **given,
        )
    return {"seconds": _seconds(device) - begin} | _peak(device)


def precompute(cfg: Config, steps: int) -> dict[str, float]:
    """One caption through the text encoder, one clip through the VAE."""
    import torch

    from tempolora.model.encoders import WanEncoders
    from tempolora.train.world import pick_device

    device = pick_device(0, cfg.parallel.gpu_memory_gib)
    encoders, data = WanEncoders(cfg, device), cfg.data
    begin = _seconds(device)
    for _ in encoders.encode_texts(["a panda eats bamboo"]):
        pass
    shape = (data.num_frames, data.height, data.width, 3)
    encoders.encode_frames(torch.randint(0, 256, shape, dtype=torch.uint8))
    return {"seconds": _seconds(device) - begin} | _peak(device)


TASKS = {"copy": copy, "step": step, "sample": sample, "precompute": precompute}


def _text_width(cfg: Config) -> int:
    from tempolora.model.wan import meta_transformer

    return meta_transformer(cfg.model, cfg.experts[0]).config.text_dim


def _seconds(device: Any) -> float:
    import torch

    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter()


def _peak(device: Any) -> dict[str, float]:
    """Memory of this process's GPU at its highest; without a GPU there is none."""
    import torch

    if device.type != "cuda":
        return {"reserved_gib": 0.0, "allocated_gib": 0.0}
    return {
        "reserved_gib": torch.cuda.max_memory_reserved(device) / GIB,
        "allocated_gib": torch.cuda.max_memory_allocated(device) / GIB,
    }
