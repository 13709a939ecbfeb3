"""The training loop: samples in, checkpoints and metrics out, one expert at a time."""

import logging
import time
from collections.abc import Iterator
from contextlib import ExitStack
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from tqdm import tqdm

from tempolora.config import Config
from tempolora.data.loader import batches
from tempolora.data.shards import ShardReader, load_prompt
from tempolora.model import lora, wan
from tempolora.model.memory import free_memory
from tempolora.train.checkpoint import Checkpoint
from tempolora.train.engine import Engine, build_engine, choose_engine, loading_device
from tempolora.train.metrics import MetricsLog
from tempolora.train.resume import run_facts, save
from tempolora.train.schedule import ema_decay_at, lr_at
from tempolora.train.step import Batch, Collate, Objective
from tempolora.train.stop import Stopped, StopSignal
from tempolora.train.world import World

log = logging.getLogger(__name__)


def train_expert(
    cfg: Config, expert: str, reader: ShardReader, world: World, resume: Checkpoint | None
) -> Path:
    """Train one expert's adapters up to `train.max_steps`; the folder of the last checkpoint.

    resume: the checkpoint to go on from, or None to start at step 0. Raises FloatingPointError
    where a gradient is not finite, ConfigError for a damaged sample, and Stopped, with a
    checkpoint written, where a signal asked for it.
    """
    done, draws = (resume.state["step"], resume.state["draws"]) if resume else (0, 0)
    if resume and done >= cfg.train.max_steps:
        log.info("%s: step %d was reached before", expert, done)
        return resume.folder
    train = cfg.train
    kind = choose_engine(cfg, world, wan.transformer_bytes(cfg.model, expert))
    transformer = load_with_adapters(cfg, expert, loading_device(kind, cfg, world), resume)
    engine = build_engine(kind, cfg, transformer, world)
    ema = _take_up(cfg, engine, world, resume)
    facts = run_facts(cfg, expert, transformer, engine, world)
    objective = Objective(cfg, world.device)
    predict = partial(wan.predict_velocity, engine.transformer)
    source = _batches(cfg, expert, reader, world, draws, train.max_steps - done)
    with ExitStack() as stack:
        metrics = bar = None
        stop = stack.enter_context(StopSignal(world))
        if world.is_main:
            metrics = MetricsLog(Path(cfg.output.dir), expert, done, cfg.output.trackers)
            stack.enter_context(metrics)
            bar = stack.enter_context(
                tqdm(total=train.max_steps, initial=done, desc=expert, unit="step", disable=None)
            )
        for step in range(done + 1, train.max_steps + 1):
            began = time.perf_counter()
            seen: list[Batch] = []
            sums: dict[str, Tensor] = {}
            for _ in range(train.gradient_accumulation):
                seen.append(next(source).to(world.device))
                loss, terms = objective(predict, seen[-1])
                engine.backward(loss)
                for name, term in {"loss": loss.detach(), **terms}.items():
                    sums[name] = sums.get(name, 0) + term / train.gradient_accumulation
            rate = lr_at(step, train)
            norm = _apply(engine, rate, step, seen)
            draws += train.batch_size * train.gradient_accumulation * world.size
            if ema is not None:
                _average(ema, engine.lora_state(), ema_decay_at(step, train.ema_decay))
            if step % train.log_every == 0 or step == train.max_steps:
                values = _measure(sums, norm, rate, seen, world, began)
                if metrics:
                    metrics.write(step, values)
                    bar.set_postfix(loss=f"{values['loss']:.4f}", refresh=False)
            if bar is not None:
                bar.update()
            stopping = stop.requested()
            if stopping or step % train.checkpoint_every == 0 or step == train.max_steps:
                last = save(cfg, engine, ema, {**facts, "step": step, "draws": draws}, world)
            if stopping:
                raise Stopped(f"stopped after step {step}; the same command goes on from {last}")
    engine.close()
    del engine, transformer, objective, predict
    free_memory(world.device)
    return last


def load_with_adapters(
    cfg: Config, expert: str, device: torch.device, resume: Checkpoint | None
) -> nn.Module:
    """The expert's transformer, frozen, with fresh or resumed adapters in place."""
    transformer = wan.load_transformer(cfg.model, expert, device)
    lora.add_lora(transformer, cfg.lora, cfg.timebase, cfg.train.seed)
    if resume:
        lora.load_lora_state(transformer, resume.lora())
    count = sum(p.numel() for p in lora.lora_parameters(transformer).values())
    log.info("%s: %.3f M trained parameters (lora.target %s)", expert, count / 1e6, cfg.lora.target)
    return transformer


def _take_up(
    cfg: Config, engine: Engine, world: World, resume: Checkpoint | None
) -> dict[str, Tensor] | None:
    """Give the optimizer its memory back; the moving average, where one is kept."""
    if resume:
        part = world.rank if engine.sharded_optimizer else 0
        engine.load_optimizer_state(resume.optimizer(part))
    if cfg.train.ema_decay is None:
        return None
    start = resume.ema() if resume else engine.lora_state()
    return {name: value.to(world.device, copy=True) for name, value in start.items()}


def _batches(
    cfg: Config, expert: str, reader: ShardReader, world: World, first_draw: int, steps: int
) -> Iterator[Batch]:
    return batches(
        reader,
        Collate(cfg, expert, load_prompt(Path(cfg.data.shards), "")),
        seed=cfg.train.seed,
        batch_size=cfg.train.batch_size,
        first_draw=first_draw,
        microsteps=steps * cfg.train.gradient_accumulation,
        rank=world.rank,
        world=world.size,
        workers=cfg.data.workers,
    )


def _apply(engine: Engine, rate: float, step: int, seen: list[Batch]) -> Tensor:
    try:
        return engine.step(rate)
    except FloatingPointError as error:
        keys = ", ".join(key for batch in seen for key in batch.keys)
        raise FloatingPointError(f"step {step}: {error}; its samples here: {keys}") from None


def _average(ema: dict[str, Tensor], now: dict[str, Tensor], decay: float) -> None:
    for name, value in ema.items():
        value.lerp_(now[name], 1 - decay)


def _measure(
    sums: dict[str, Tensor],
    norm: Tensor,
    rate: float,
    seen: list[Batch],
    world: World,
    began: float,
) -> dict[str, Any]:
    """One step's numbers, means over all processes. This copies from the device and so waits."""
    sigma = torch.cat([batch.sigma_B for batch in seen]).mean()
    means = world.mean(torch.stack([*sums.values(), sigma]).float()).tolist()
    values = dict(zip([*sums, "sigma"], means, strict=True))
    values |= {"grad_norm": norm.item(), "lr": rate}
    seconds = time.perf_counter() - began
    samples = sum(len(batch.keys) for batch in seen) * world.size
    values |= {"seconds": seconds, "samples_per_s": samples / seconds}
    if world.device.type == "cuda":
        values["peak_gib"] = torch.cuda.max_memory_reserved(world.device) / 2**30
    return values
