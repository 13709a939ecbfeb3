"""How fast the loader gives samples, and how long a step waits for them.

    python -m tempolora.bench loader [--config configs/a14b.json] [--samples 32] [--workers 0 1 2 4]
        [--step-s 5] [--json F]

Writes shards of random samples of the configured size and reads them as training does. Samples a
second: nothing else is done. Wait: a step that takes --step-s is slept through, and its wait for
the next batch is the share given; the first step, which nothing could be read ahead for, is not
counted.
"""

import argparse
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file

from tempolora.config import Config, load_config
from tempolora.data.loader import batches
from tempolora.data.shards import (
    ABSENT,
    PROMPTS,
    Sample,
    ShardIndex,
    ShardReader,
    fingerprint,
    prompt_name,
    sample_key,
    write_manifest,
    write_shard,
)
from tempolora.files import write_json
from tempolora.model.architectures import TEXT_ENCODER
from tempolora.train.step import Batch, Collate

MODELS = {"vae": "none", "text_encoder": "none"}
CAPTION_TOKENS = 120


def main(arguments: list[str]) -> None:
    parser = argparse.ArgumentParser(
        prog="python -m tempolora.bench loader",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--config", type=Path, default=Path("configs/a14b.json"))
    parser.add_argument("--set", action="append", default=[], metavar="KEY=VALUE")
    parser.add_argument("--samples", type=int, default=32)
    parser.add_argument("--workers", type=int, nargs="+", default=[0, 1, 2, 4])
    parser.add_argument("--step-s", type=float, default=5.0, help="seconds that a step takes")
    parser.add_argument("--steps", type=int, default=4, help="steps to sleep through")
    parser.add_argument("--json", type=Path, help="write the figures there")
    options = parser.parse_args(arguments)
    cfg = load_config(options.config, options.set)
    with tempfile.TemporaryDirectory(prefix="bench-loader-") as folder:
        reader = drawn_shards(cfg, Path(folder), options.samples)
        rows = measure(cfg, reader, options)
    if options.json:
        write_json(options.json, rows)


def measure(cfg: Config, reader: ShardReader, options: argparse.Namespace) -> dict[str, Any]:
    """A line for each number of workers."""
    needed = cfg.train.batch_size * cfg.train.gradient_accumulation / options.step_s
    print(
        f"{cfg.latent_shape} latents; a step of {options.step_s:g} s needs {needed:.2f} samples/s"
    )
    print("workers | samples/s | wait for data, share of a step")
    rows = {}
    for workers in options.workers:
        batch_size = cfg.train.batch_size
        count = max(2, options.samples // batch_size)
        began = time.perf_counter()
        for batch in source(cfg, reader, count, workers):
            place(batch)
        rate = count * batch_size / (time.perf_counter() - began)
        waited = wait_share(cfg, source(cfg, reader, 1 + options.steps, workers), options)
        rows[str(workers)] = {"samples_per_s": rate, "needed": needed, "wait": waited}
        print(f"{workers} | {rate:.1f} | {waited:.3%}", flush=True)
    return rows


def wait_share(cfg: Config, batches_ahead: Iterator[Batch], options: argparse.Namespace) -> float:
    """Of steps that take --step-s beside the wait, one microstep each."""
    place(next(batches_ahead))
    waited = 0.0
    for _ in range(options.steps):
        time.sleep(options.step_s / cfg.train.gradient_accumulation)
        began = time.perf_counter()
        place(next(batches_ahead))
        waited += time.perf_counter() - began
    slept = options.steps * options.step_s / cfg.train.gradient_accumulation
    return waited / (waited + slept)


def source(cfg: Config, reader: ShardReader, microsteps: int, workers: int) -> Iterator[Batch]:
    """What training reads, by one process."""
    expert = cfg.experts[0]
    return batches(
        reader,
        Collate(cfg, expert, torch.zeros(1, TEXT_ENCODER["d_model"], dtype=torch.bfloat16)),
        groups=[range(len(reader))],
        seed=cfg.train.seed,
        batch_size=cfg.train.batch_size,
        first_draw=0,
        microsteps=microsteps,
        rank=0,
        world=1,
        workers=workers,
    )


def place(batch: Batch) -> None:
    """On the device, where there is one."""
    if torch.cuda.is_available():
        batch.to(torch.device("cuda"))
        torch.cuda.synchronize()


def drawn_shards(cfg: Config, folder: Path, count: int) -> ShardReader:
    """Random samples of the configured size, in shards of the configured number."""
    wanted = fingerprint(cfg, MODELS)
    indexes = {}
    per_shard = cfg.data.samples_per_shard
    for number, start in enumerate(range(0, count, per_shard)):
        positions = range(start, min(start + per_shard, count))
        name = f"00000-{number:06d}.tar"
        indexes[name] = ShardIndex(wanted)
        write_shard(folder / name, [drawn_sample(cfg, p) for p in positions], indexes[name])
    save_file({prompt_name(""): torch.zeros(1, 1)}, folder / PROMPTS)
    write_manifest(folder, indexes, {"clips": count, "rhythm": {}})
    return ShardReader(folder, wanted)


def drawn_sample(cfg: Config, position: int) -> Sample:
    generator = torch.Generator().manual_seed(position)
    names = ["latents"]
    if cfg.task == "i2v" and not cfg.variant.per_token_time:
        names.append("condition")
    key = sample_key(f"drawn {position}", 0)
    latents = {n: torch.randn(cfg.latent_shape, generator=generator).bfloat16() for n in names}
    text = torch.randn(CAPTION_TOKENS, TEXT_ENCODER["d_model"], generator=generator).bfloat16()
    rhythm = {"motion_energy": torch.zeros(cfg.data.num_frames)}
    return Sample(key, latents, text, rhythm, {"key": key, "sound": ABSENT, "speed": 1.0})
