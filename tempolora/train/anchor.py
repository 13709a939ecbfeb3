"""The anchor: on single frames the adapters shall change nothing.

What a video looks like is what its frames look like alone. Each step also predicts the first latent
frame of its clips by itself, with adapters and without, and adds the square of the difference. That
is one latent frame beside the whole clip: two forward passes and one backward pass of it.
"""

from dataclasses import replace

import torch
from torch import nn

from tempolora.config import Config
from tempolora.model.lora import without_lora
from tempolora.train.objective import Objective, Outcome, Predict
from tempolora.train.step import Batch


class Anchor:
    """The term of one expert. transformer: with its adapters, as `predict` calls it."""

    def __init__(self, cfg: Config, transformer: nn.Module) -> None:
        self._weight, self._transformer = cfg.train.anchor_weight, transformer

    def due(self, step: int) -> bool:
        """Every step has it."""
        return True

    def join(
        self, outcome: Outcome, objective: Objective, predict: Predict, batch: Batch
    ) -> Outcome:
        """The microstep's outcome with this term in its loss, under the name "anchor".

        Its energy is the mean square of the change in velocity, in the flow term's unit.
        """
        still = replace(
            batch,
            latents_BCTHW=batch.latents_BCTHW[:, :, :1],
            noise_BCTHW=batch.noise_BCTHW[:, :, :1],
        )
        x_BC1HW = objective.noised(still)
        with torch.no_grad(), without_lora(self._transformer):
            base = objective.denoise(predict, still, x_BC1HW, still.sigma_B)
        change = objective.denoise(predict, still, x_BC1HW, still.sigma_B) - base
        change_B = objective.context.mean(change.square().mean(dim=(1, 2, 3, 4)))
        return replace(
            outcome,
            loss=outcome.loss + self._weight * change_B.mean(),
            energies=outcome.energies | {"anchor": change_B.detach()},
            scale=outcome.scale | {"anchor": torch.ones_like(change_B)},
        )
