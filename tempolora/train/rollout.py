"""The rollout term: a short run of the sampler whose rhythm must lie where real clips' lies.

The flow loss sees one step at a time; this term sees what the sampler makes of many. All steps but
the last run without a gradient, so it costs `rollout_steps` forward passes and one backward pass,
and the memory of one training step.
"""

from dataclasses import replace
from itertools import pairwise

import torch
from torch import Tensor

from tempolora.config import Config, ConfigError
from tempolora.rhythm.bank import LEAST_CLIPS, Bank, bands_of, hinge, log_bands
from tempolora.rhythm.probes import LEAST_COHERENCE
from tempolora.rhythm.readout import Readout
from tempolora.rhythm.tempo import motion, power_spectrum
from tempolora.train.context import WHOLE, Context
from tempolora.train.flow import interpolate, shift_sigma, u_range
from tempolora.train.objective import Objective, Outcome, Predict
from tempolora.train.step import Batch


class Rollout:
    """The term of one expert. Raises ConfigError where the bank holds too few clips."""

    def __init__(
        self, cfg: Config, expert: str, readout: Readout, bank: Bank, device: torch.device
    ) -> None:
        if len(bank.motion_N) < LEAST_CLIPS:
            raise ConfigError(
                f"rhythm.rollout_every: {len(bank.motion_N)} samples are too few to know what is "
                f"usual; it needs {LEAST_CLIPS}, or set it to 0"
            )
        rhythm = cfg.rhythm
        readable = {
            k: hz
            for k, hz in cfg.timebase.usable_bins_hz("readout").items()
            if readout.g2_F[k] >= LEAST_COHERENCE
        }
        if not readable:
            raise ConfigError("rhythm.rollout_every: the readout can read no frequency")
        self._bands_QF = bands_of(readable, rhythm.band_hz, rhythm.spec_cutoff_hz).to(device)
        self._bank = Bank(bank.power_NF.to(device), bank.motion_N.to(device))
        self._readout = readout
        self._every, self._weight = rhythm.rollout_every, rhythm.rollout_weight
        high = u_range(cfg.variant, expert)[1]
        u = torch.linspace(high, 0, rhythm.rollout_steps + 1, dtype=torch.float64)
        self.sigmas = shift_sigma(u, cfg.variant.shift).tolist()

    def due(self, step: int) -> bool:
        """Whether this step has a rollout."""
        return step % self._every == 0

    def join(
        self, outcome: Outcome, objective: Objective, predict: Predict, batch: Batch
    ) -> Outcome:
        """The microstep's outcome with this term in its loss, under the name "rollout"."""
        x_BCTHW = self.sample(objective, predict, batch)
        outside_B = self.outside(x_BCTHW, batch.latents_BCTHW, objective.context)
        return replace(
            outcome,
            loss=outcome.loss + self._weight * outside_B.mean(),
            energies=outcome.energies | {"rollout": outside_B.detach()},
            scale=outcome.scale | {"rollout": torch.ones_like(outside_B)},
        )

    def sample(self, objective: Objective, predict: Predict, batch: Batch) -> Tensor:
        """Clean latents made in `rollout_steps` Euler steps; the last one carries a gradient.

        Starts at the expert's highest sigma: from noise, or for the low-noise expert from the
        batch's own clips noised that far.
        """
        start_B = torch.full_like(batch.sigma_B, self.sigmas[0])
        x = interpolate(batch.latents_BCTHW, batch.noise_BCTHW, start_B)
        for sigma, following in pairwise(self.sigmas):
            sigma_B = torch.full_like(batch.sigma_B, sigma)
            with torch.set_grad_enabled(following == self.sigmas[-1]):
                x = objective.with_first_frame(batch, x)
                x = x + (following - sigma) * objective.denoise(predict, batch, x, sigma_B)
        return x

    def outside(self, x_BCTHW: Tensor, clip_BCTHW: Tensor, context: Context = WHOLE) -> Tensor:
        """How far log band power lies outside of real clips that move as `clip` does, (B,).

        context: the part of the picture that x and clip are.
        """
        read = self._readout.luminance
        low, high = self._bank.log_range(self._bands_QF, context.mean(motion(read(clip_BCTHW))))
        power_BF = context.mean(power_spectrum(read(x_BCTHW)))
        return hinge(log_bands(power_BF, self._bands_QF), low, high)
