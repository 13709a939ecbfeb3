"""The loss on clips that are not trained on, at nine fixed sigmas with fixed noise.

Training's own loss jumps with every sigma drawn; these nine do not, so runs can be compared.
"""

from collections.abc import Callable, Sequence
from hashlib import sha256
from typing import Any

import numpy as np
import torch

from tempolora.config import Config
from tempolora.data.shards import ShardReader
from tempolora.train.objective import Objective, Predict
from tempolora.train.step import Batch, Collate
from tempolora.train.watch import bin_centres, by_sigma
from tempolora.train.world import World

LEAST_CLIPS = 10  # of fewer, none is spared
ONE_IN, AT_MOST = 20, 4


def split_clips(keys: Sequence[str], held_out: int | None) -> tuple[list[int], list[list[int]]]:
    """Positions of the samples to train on, and those of each clip that is held out.

    Whole clips are held out, so that no window of one is trained on; which ones follows from
    their names alone. held_out: how many clips; None: one in 20, at most 4, none of fewer than 10.
    """
    clips: dict[str, list[int]] = {}
    for position, key in enumerate(keys):
        clips.setdefault(key.rsplit("-w", 1)[0], []).append(position)
    if held_out is None:
        count = min(AT_MOST, -(-len(clips) // ONE_IN)) if len(clips) >= LEAST_CLIPS else 0
    else:
        count = min(held_out, len(clips) - 1)
    chosen = sorted(clips, key=lambda clip: sha256(clip.encode()).hexdigest())[:count]
    away = {position for clip in chosen for position in clips[clip]}
    train = [position for position in range(len(keys)) if position not in away]
    return train, sorted(clips[clip] for clip in chosen)


class Validation:
    """Held-out clips times nine sigmas, shared out over the processes."""

    def __init__(
        self, cfg: Config, expert: str, reader: ShardReader, positions: list[int], collate: Collate
    ) -> None:
        self._cfg, self._reader, self._collate = cfg, reader, collate
        self._centres = bin_centres(cfg, expert)
        self._jobs = [(p, s) for p in positions for s in range(len(self._centres))]

    def due(self, step: int) -> bool:
        """Whether the loss is to be measured after this step; 0: before training."""
        every = self._cfg.train.validate_every
        last = step == self._cfg.train.max_steps
        return bool(every and self._jobs) and (step % every == 0 or last)

    @torch.no_grad()
    def measure(
        self,
        objective: Objective,
        predict: Predict,
        world: World,
        prepare: Callable[[Batch], None] = lambda _: None,
    ) -> dict[str, Any]:
        """{"held_out": mean flow loss, "held_out_by_sigma": {sigma: loss}}, on every process.

        prepare: called with each batch before it is predicted.
        """
        sums = torch.zeros(2, len(self._centres), device=world.device)
        rounds = -(-len(self._jobs) // world.data_size)
        for turn in range(rounds):
            number = turn * world.data_size + world.data_rank
            # Every process must take part in every forward pass; a surplus one does not count.
            position, place = self._jobs[number % len(self._jobs)]
            batch = self._batch(position, place).to(world.device)
            prepare(batch)
            if number < len(self._jobs):
                sums[0, place] += objective(predict, batch).flow_B[0]
                sums[1, place] += 1
            else:
                objective(predict, batch)
        total, count = world.mean(sums).cpu()
        losses = total / count
        return {
            "held_out": losses.mean().item(),
            "held_out_by_sigma": by_sigma(self._centres, losses),
        }

    def _batch(self, position: int, place: int) -> Batch:
        """One sample with its own caption, its sigma and a noise of its own."""
        sample = self._reader.read(position)
        batch = self._collate([(0, sample)], keep_captions=True)
        random = np.random.default_rng([self._cfg.train.seed, position, place])
        shape = (1, *sample.latents["latents"].shape)
        noise_BCTHW = torch.from_numpy(random.standard_normal(shape, dtype=np.float32))
        batch.noise_BCTHW = self._collate.context.cut(noise_BCTHW).contiguous()
        batch.sigma_B = self._centres[place : place + 1].float()
        return batch
