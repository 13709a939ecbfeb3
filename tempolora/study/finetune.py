"""One expert's LoRA, trained in memory with the product's own loss, adapters and drawing."""

import logging
import math
from collections.abc import Iterable
from dataclasses import replace
from functools import partial

import torch
from torch import Tensor, nn
from tqdm import tqdm

from tempolora.config import Config
from tempolora.data.loader import Draws
from tempolora.data.shards import Sample
from tempolora.model import lora, wan
from tempolora.study.arms import Arm
from tempolora.study.clips import TrainingClips
from tempolora.study.peers import build_extra
from tempolora.study.rows import move_rows
from tempolora.train.anchor import Anchor
from tempolora.train.engine import build_optimizer
from tempolora.train.flow import velocity
from tempolora.train.objective import Objective
from tempolora.train.rollout import Rollout
from tempolora.train.schedule import lr_at
from tempolora.train.speeds import follow_speed, speed_groups
from tempolora.train.step import Batch, Collate
from tempolora.train.world import World

log = logging.getLogger(__name__)


def with_adapters(cfg: Config, arm: Arm, expert: str, device: torch.device) -> nn.Module:
    """The expert's transformer with the arm's adapters in it, fresh ones where it has any."""
    transformer = wan.load_transformer(cfg.model, expert, device)
    if arm.is_tuned:
        lora.add_lora(transformer, cfg.lora, cfg.timebase, cfg.train.seed)
        if arm.target.rows:
            move_rows(transformer, arm.target.rows, cfg.train.seed)
    return transformer


def training_batches(
    cfg: Config, expert: str, clips: TrainingClips, device: torch.device
) -> list[Batch]:
    """What each step trains on, drawn as the trainer does: the same in all arms of a seed."""
    collate = Collate(cfg, expert, clips.empty_text_LD)
    shelf = Shelf(clips.samples)
    groups = speed_groups(cfg.lora.kind, shelf, [*range(len(clips.samples))])
    drawn = Draws(shelf, groups, cfg.train.seed)
    size = cfg.train.batch_size
    starts = range(0, cfg.train.max_steps * size, size)
    return [collate([drawn[n] for n in range(s, s + size)]).to(device) for s in starts]


class Shelf:
    """Samples in memory, read as those of shards are."""

    def __init__(self, samples: list[Sample]) -> None:
        self._samples = samples

    def speed(self, position: int) -> float:
        return self._samples[position].meta["speed"]

    def read(self, position: int) -> Sample:
        return self._samples[position]


def finetune(
    cfg: Config,
    arm: Arm,
    expert: str,
    clips: TrainingClips,
    batches: list[Batch],
    device: torch.device,
) -> tuple[nn.Module, float]:
    """The expert with trained adapters, and its flow loss, mean over the last tenth of the steps.

    Raises FloatingPointError where that is not finite.
    """
    transformer = with_adapters(cfg, arm, expert, device)
    world = World(0, 1, device)
    readout = clips.readout if cfg.rhythm.signal == "readout" else None
    objective = Objective(cfg, expert, readout, device)
    terms = [Anchor(cfg, transformer)] if cfg.train.anchor_weight else []
    if cfg.rhythm.rollout_every and expert == "low":  # as in the trainer
        terms.append(Rollout(cfg, expert, clips.readout, clips.bank, device))
    extra = build_extra(arm.loss.extra, transformer, cfg.train.seed)
    weights = list(lora.lora_parameters(transformer).values())
    weights += list(extra.parameters()) if extra else []
    optimizer = build_optimizer(cfg.train, weights)
    predict = partial(wan.predict_velocity, transformer)
    flows: list[Tensor] = []
    for step, batch in enumerate(tqdm(batches, f"{arm.name} {expert}", disable=None), start=1):
        follow_speed(cfg.lora.kind, transformer, batch)
        if objective.uncalibrated:
            objective.calibrate(predict, [batch], world)
        v_hat = objective.denoise(predict, batch, objective.noised(batch), batch.sigma_B)
        outcome = objective.compare(batch, v_hat)
        if objective.calibrating(step):
            objective.note(batch, outcome)
        if extra:
            v = velocity(batch.latents_BCTHW, batch.noise_BCTHW)
            outcome = replace(outcome, loss=extra(outcome.loss, v_hat, v))
        for term in terms:
            if term.due(step):
                outcome = term.join(outcome, objective, predict, batch)
        outcome.loss.backward()
        objective.settle(world)
        nn.utils.clip_grad_norm_(weights, cfg.train.max_grad_norm)
        for group in optimizer.param_groups:
            group["lr"] = lr_at(step, cfg.train)
        optimizer.step()
        optimizer.zero_grad()
        flows.append(outcome.flow_B.mean())
    if extra:
        extra.close()
    flow = torch.stack(flows[-max(1, len(flows) // 10) :]).mean().item()
    if not math.isfinite(flow):
        raise FloatingPointError(f"{arm.name}, {expert}: the loss is not finite")
    log.info("%s %s: flow %.4f", arm.name, expert, flow)
    return transformer.requires_grad_(False).eval(), flow


def finetune_all(
    cfg: Config, arm: Arm, names: Iterable[str], clips: TrainingClips, device: torch.device
) -> tuple[dict[str, nn.Module], dict[str, float]]:
    """`finetune` of each named expert on these clips: transformers and flow losses."""
    experts, flow = {}, {}
    for name in names:
        batches = training_batches(cfg, name, clips, device)
        experts[name], flow[name] = finetune(cfg, arm, name, clips, batches, device)
    return experts, flow
