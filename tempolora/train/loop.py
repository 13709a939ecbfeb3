"""The training loop: samples in, checkpoints and metrics out, one expert at a time."""

import logging
import math
import time
from collections import Counter
from collections.abc import Iterator
from contextlib import ExitStack
from functools import partial
from itertools import islice
from pathlib import Path

import torch
from torch import Tensor, nn
from tqdm import tqdm

from tempolora.config import Config, ConfigError
from tempolora.data.loader import batches
from tempolora.data.readout import load_bank, load_readout
from tempolora.data.shards import HEARD, ShardReader, describe_sound, load_prompt
from tempolora.model import lora, wan
from tempolora.model.memory import free_memory, host_peak
from tempolora.progress import progress
from tempolora.rhythm.bank import Bank
from tempolora.rhythm.readout import Readout
from tempolora.train.anchor import Anchor
from tempolora.train.auto import MemoryAdvice
from tempolora.train.checkpoint import Checkpoint
from tempolora.train.context import WHOLE, Context, context_of
from tempolora.train.engine import Engine, build_engine, choose_engine
from tempolora.train.heartbeat import Heartbeat
from tempolora.train.metrics import MetricsLog
from tempolora.train.objective import Objective
from tempolora.train.resume import run_facts
from tempolora.train.rollout import Rollout
from tempolora.train.saver import Saver
from tempolora.train.schedule import ema_decay_at, lr_at
from tempolora.train.skip import Skips
from tempolora.train.speeds import follow_speed, of_each_group, speed_groups
from tempolora.train.spread import spread_of
from tempolora.train.step import Batch, Collate
from tempolora.train.stop import StopSignal
from tempolora.train.terms import describe_terms
from tempolora.train.validate import Validation, split_clips
from tempolora.train.watch import Watch
from tempolora.train.world import World

log = logging.getLogger(__name__)


def train_expert(
    cfg: Config,
    expert: str,
    reader: ShardReader,
    world: World,
    resume: Checkpoint | None,
    stop: StopSignal,
    heart: Heartbeat,
) -> Path:
    """Train one expert's adapters up to `train.max_steps`; the folder of the last checkpoint.

    resume: the checkpoint to go on from, or None to start at step 0. Raises FloatingPointError
    where gradients are not finite for too many steps, ConfigError for a damaged sample, where the
    first step runs out of GPU memory or a checkpoint cannot be written, and Stopped, with a
    checkpoint written, where a signal asked for it.
    """
    done, draws = (resume.state["step"], resume.state["draws"]) if resume else (0, 0)
    if resume and done >= cfg.train.max_steps:
        log.info("%s: step %d was reached before", expert, done)
        return resume.folder
    train = cfg.train
    heart.loading(f"loading the {expert} expert")
    context = context_of(cfg, world)
    objective, rollout = build_objective(cfg, expert, world.device, resume, context)
    kind = choose_engine(cfg, world)
    advice = MemoryAdvice(cfg, kind, world)
    with advice:
        spread = spread_of(kind, cfg, world)
        transformer = load_with_adapters(cfg, expert, world.device, resume, spread)
        engine = build_engine(kind, cfg, transformer, world)
    ema = _take_up(cfg, engine, world, resume)
    facts = run_facts(cfg, expert, transformer, world)
    predict = partial(wan.predict_velocity, engine.transformer)
    extra = [rollout] if rollout else []
    extra += [Anchor(cfg, engine.transformer)] if train.anchor_weight else []
    left = train.max_steps - done
    source, validation = _data(cfg, expert, reader, world, draws, left, context)
    prepare = partial(follow_speed, cfg.lora.kind, engine.transformer)
    watch = Watch(cfg, expert, world)
    skips = Skips(world, train.max_skipped, resume.state.get("skipped", 0) if resume else 0)
    with ExitStack() as stack:
        stack.enter_context(advice)
        stack.callback(source.close)  # else readers live as long as an error's traceback
        saver = stack.enter_context(Saver(cfg, engine, world, facts, stop))
        metrics = stack.enter_context(_metrics(cfg, expert, done, world))
        bar = stack.enter_context(_progress(expert, done, train.max_steps, world))
        saver.before(done + 1)
        if not done and validation.due(0):
            metrics.write(0, validation.measure(objective, predict, world, prepare))
        for step in range(done + 1, train.max_steps + 1):
            watch.begin()
            heart.at(step, "reading samples")
            microsteps = list(islice(source, train.gradient_accumulation))
            watch.fetched()
            heart.at(step, "forward and backward passes")
            if objective.uncalibrated:
                objective.calibrate(predict, microsteps, world)
            for batch in microsteps:
                batch = batch.to(world.device)
                prepare(batch)
                outcome = objective(predict, batch)
                if objective.calibrating(step):
                    objective.note(batch, outcome)
                for term in extra:
                    if term.due(step):
                        outcome = term.join(outcome, objective, predict, batch)
                engine.backward(outcome.loss)
                watch.add(batch, outcome)
            objective.settle(world)
            rate = lr_at(step, train)
            heart.at(step, "averaging gradients")
            norm = engine.step(rate)
            skipped = skips.look(step, norm, engine, watch.keys)
            advice.passed()
            heart.training()
            draws += train.batch_size * train.gradient_accumulation * world.data_size
            if ema is not None and not skipped:
                _average(ema, engine.lora_state(), ema_decay_at(step, train.ema_decay))
            due, last = validation.due(step), step == train.max_steps
            if skipped or due or last or step % train.log_every == 0:
                heart.at(step, "measuring")
                values = {"skipped": skipped}
                if not skipped:
                    values = watch.values(objective, step, norm, rate)
                if due:
                    values |= validation.measure(objective, predict, world, prepare)
                metrics.write(step, values)
                bar.set_postfix(loss=f"{values.get('loss', math.nan):.4f}", refresh=False)
            bar.update()
            heart.at(step, "saving")
            state = {"step": step, "draws": draws, "skipped": skips.in_a_row}
            saver.after(state | {"calibration": objective.state()}, ema)
    engine.close()
    folder = saver.folder(step)
    del engine, transformer, objective, rollout, extra, predict, saver
    free_memory(world.device)
    return folder


def check_objective(cfg: Config, expert: str) -> str:
    """What the expert's rhythm terms are, in a line. Raises ConfigError as `build_objective`."""
    build_objective(cfg, expert, torch.device("cpu"), None)
    return f"rhythm terms: {describe_terms(cfg, expert, _readout(cfg))}"


def check_sound(cfg: Config, reader: ShardReader) -> str:
    """How many samples the sound term trains on. Raises ConfigError where there are none."""
    positions, _ = split_clips(reader.keys, cfg.data.held_out)
    count = Counter(reader.sound[reader.keys[position]] for position in positions)
    if not count[HEARD]:
        raise ConfigError(
            f"rhythm.sound_weight: sound is {describe_sound(count)} to train on; set it to 0, or "
            "give clips with sound and run `tempolora precompute` into a new folder"
        )
    return f"sound term: sound is {describe_sound(count)}; the others take no part in it"


def _readout(cfg: Config) -> Readout | None:
    return load_readout(Path(cfg.data.shards)) if cfg.rhythm.signal == "readout" else None


def build_objective(
    cfg: Config,
    expert: str,
    device: torch.device,
    resume: Checkpoint | None,
    context: Context = WHOLE,
) -> tuple[Objective, Rollout | None]:
    """The loss of an expert, and its rollout term where there is one, from what lies by the shards.

    Raises ConfigError where the shards have no readout, or one that reads too little.
    """
    shards = Path(cfg.data.shards)
    readout = _readout(cfg)
    objective = Objective(cfg, expert, readout, device, context)
    if resume:
        objective.load_state(resume.state["calibration"])
    if not cfg.rhythm.rollout_every or expert == "high":  # which alone reaches no clean clip
        return objective, None
    return objective, Rollout(cfg, expert, readout, Bank(*load_bank(shards)), device)


def load_with_adapters(
    cfg: Config,
    expert: str,
    device: torch.device,
    resume: Checkpoint | None,
    spread: wan.Spread | None = None,
) -> nn.Module:
    """The expert's transformer, frozen, with fresh or resumed adapters in place. spread: as in
    `load_transformer`."""
    begin = time.perf_counter()
    transformer = wan.load_transformer(cfg.model, expert, device, spread)
    seconds, host = time.perf_counter() - begin, host_peak() / 2**30
    log.info("%s: loaded in %.1f s; host memory so far at most %.1f GiB", expert, seconds, host)
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
        engine.load_optimizer_state(resume.optimizer())
    if cfg.train.ema_decay is None:
        return None
    start = resume.ema() if resume else engine.lora_state()
    return {name: value.to(world.device, copy=True) for name, value in start.items()}


def _data(
    cfg: Config,
    expert: str,
    reader: ShardReader,
    world: World,
    first_draw: int,
    steps: int,
    context: Context,
) -> tuple[Iterator[Batch], Validation]:
    """The batches of the steps to come on this process, and the clips held out from them."""
    collate = Collate(cfg, expert, load_prompt(Path(cfg.data.shards), ""), context)
    positions, held_out = split_clips(reader.keys, cfg.data.held_out)
    held_out = of_each_group(cfg.lora.kind, reader, held_out)
    source = batches(
        reader,
        collate,
        groups=speed_groups(cfg.lora.kind, reader, positions),
        seed=cfg.train.seed,
        batch_size=cfg.train.batch_size,
        first_draw=first_draw,
        microsteps=steps * cfg.train.gradient_accumulation,
        rank=world.data_rank,
        world=world.data_size,
        workers=cfg.data.workers,
    )
    return source, Validation(cfg, expert, reader, held_out, collate)


def _metrics(cfg: Config, expert: str, done: int, world: World) -> MetricsLog:
    out = Path(cfg.output.dir) if world.is_main else None
    return MetricsLog(out, expert, done, cfg.output.trackers, apart=world.seat is not None)


def _progress(expert: str, done: int, steps: int, world: World) -> tqdm:
    """Of the first process; the others say nothing."""
    row = world.seat and world.seat.group  # below the other group's
    bar = {"total": steps, "initial": done, "unit": "step", "position": row}
    return progress(what=expert, hidden=not world.is_main, **bar)


def _average(ema: dict[str, Tensor], now: dict[str, Tensor], decay: float) -> None:
    for name, value in ema.items():
        value.lerp_(now[name], 1 - decay)
