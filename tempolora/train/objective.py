"""The training loss: flow matching plus the weighted energies of the rhythm probes.

    loss = mean_b [ flow_b + sum_i weight_i c_i(sigma_b) energy_i,b ]

c_i(sigma) = flow / energy_i of the base, gathered in the first steps (the adapters are still near
zero) and then frozen: weight_i is a share of the flow loss at every sigma.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from tempolora.config import Config
from tempolora.model.wan import condition_channels
from tempolora.rhythm.kernels import flow_and_probe, probe_energy
from tempolora.rhythm.probes import sound_probe
from tempolora.rhythm.readout import Readout
from tempolora.train.context import WHOLE, Context
from tempolora.train.flow import interpolate, velocity
from tempolora.train.normaliser import SigmaFit
from tempolora.train.step import Batch
from tempolora.train.terms import build_probes, term_weights
from tempolora.train.world import World

LEAST_CALIBRATION_STEPS = 10
MOTION = "motion"  # the fit beside those of the terms: motion of x0_hat over the clip's
TINY = 1e-20

Predict = Callable[..., Tensor]


@dataclass(frozen=True)
class Outcome:
    """What one microstep gave, (B,) each; only `loss` carries a gradient.

    energies: of the terms, neither weighted nor normalised. scale: c(sigma) of each term.
    """

    loss: Tensor
    v_hat_BCTHW: Tensor
    flow_B: Tensor
    energies: dict[str, Tensor]
    scale: dict[str, Tensor]

    def terms(self) -> dict[str, Tensor]:
        """Means over the batch: loss, flow, and each term as a multiple of the base's flow loss."""
        means = {"loss": self.loss.detach(), "flow": self.flow_B.mean()}
        return means | {
            name: (self.scale[name] * energy).mean() for name, energy in self.energies.items()
        }


class Objective:
    """The loss of one expert; `state` and `load_state` carry c(sigma) through a checkpoint.

    readout: of the shards, or None with rhythm.signal "latent". context: the part of the picture
    that batches hold; everything is a mean over pixels, and that of the whole is what comes back.
    """

    def __init__(
        self,
        cfg: Config,
        expert: str,
        readout: Readout | None,
        device: torch.device,
        context: Context = WHOLE,
    ) -> None:
        self._cfg, self._readout, self.context = cfg, readout, context
        self._clean_first_frame = cfg.task == "i2v" and cfg.variant.per_token_time
        self._first_frame = int(self._clean_first_frame)
        self.weights = term_weights(cfg, expert)
        if "sound" in self.weights:
            self.weights.setdefault("tv", 0.0)  # whose scale it takes
        probes = build_probes(cfg, expert, readout)
        self._probes = {name: probe.to(device) for name, probe in probes.items()}
        self._absolute = cfg.rhythm.spec_form == "absolute" and "spectral" in self.weights
        fused = [n for n in ("spectral", "tv") if n in self.weights]
        self._fused = [n for n in fused if not (n == "spectral" and self._absolute)]
        fitted = [name for name in self.weights if name != "sound"]
        self._fits = {name: SigmaFit() for name in (*fitted, MOTION)}
        self._calibration_steps = max(cfg.train.warmup_steps, LEAST_CALIBRATION_STEPS)
        self._pending: list[Tensor] = []

    @property
    def uncalibrated(self) -> bool:
        """Whether nothing is known yet of c(sigma): the terms would have no scale."""
        return bool(self.weights) and not any(fit.points for fit in self._fits.values())

    def __call__(self, predict: Predict, batch: Batch) -> Outcome:
        """One microstep. predict: as `tempolora.model.wan.predict_velocity`, transformer bound."""
        v_hat_BCTHW = self.denoise(predict, batch, self.noised(batch), batch.sigma_B)
        return self.compare(batch, v_hat_BCTHW)

    def compare(self, batch: Batch, v_hat_BCTHW: Tensor) -> Outcome:
        """The loss of a predicted velocity."""
        v_BCTHW = velocity(batch.latents_BCTHW, batch.noise_BCTHW)
        scale = {name: self._scale(name, batch.sigma_B) for name in self.weights}
        energies = {}
        names, probe = self._stacked(batch)
        if names:
            rows = [self._rows(name) for name in names]
            weight_BP = torch.cat(
                [
                    (self.weights[n] * scale[n])[:, None].expand(-1, count)
                    for n, count in zip(names, rows, strict=True)
                ],
                dim=1,
            )
            flow_B, energy_BP = flow_and_probe(
                v_hat_BCTHW, v_BCTHW, probe, weight_BP, first_frame=self._first_frame
            )
            flow_B, energy_BP = map(self.context.mean, (flow_B, energy_BP))
            total_B = flow_B + (weight_BP * energy_BP).sum(dim=1)
            parts = energy_BP.detach().split(rows, dim=1)
            energies = {n: part.sum(dim=1) for n, part in zip(names, parts, strict=True)}
        else:
            residual = (v_hat_BCTHW - v_BCTHW)[:, :, self._first_frame :]
            total_B = flow_B = self.context.mean(residual.square().mean(dim=(1, 2, 3, 4)))
        if self._absolute:
            x0_hat = self._x0_hat(batch, v_hat_BCTHW)
            energy_B = self.context.mean(probe_energy(x0_hat, self._probes["spectral"]))
            total_B = total_B + self.weights["spectral"] * scale["spectral"] * energy_B
            energies["spectral"] = energy_B.detach()
        return Outcome(total_B.mean(), v_hat_BCTHW.detach(), flow_B.detach(), energies, scale)

    def noised(self, batch: Batch) -> Tensor:
        """x_t of the batch; a clean first frame stays clean."""
        return self.with_first_frame(
            batch, interpolate(batch.latents_BCTHW, batch.noise_BCTHW, batch.sigma_B)
        )

    def with_first_frame(self, batch: Batch, x_BCTHW: Tensor) -> Tensor:
        """x with the clip's own first latent frame where the model is given it (5B, i2v)."""
        if self._clean_first_frame:
            x_BCTHW[:, :, 0] = batch.latents_BCTHW[:, :, 0]
        return x_BCTHW

    def denoise(self, predict: Predict, batch: Batch, x_BCTHW: Tensor, sigma_B: Tensor) -> Tensor:
        """The velocity predicted at x and sigma for the batch's captions and conditions."""
        condition = batch.condition_BCTHW
        return predict(
            x_BCTHW,
            sigma_B,
            batch.text_BLD,
            condition_BCTHW=None if condition is None else condition_channels(condition),
            clean_first_frame=self._clean_first_frame,
            per_token_time=self._cfg.variant.per_token_time,
        )

    # --- c(sigma) ---------------------------------------------------------------------------------

    @torch.no_grad()
    def calibrate(self, predict: Predict, batches: list[Batch], world: World) -> None:
        """Look at a step's batches without learning from them, so that the first has a scale."""
        for batch in batches:
            batch = batch.to(world.device)
            self.note(batch, self(predict, batch))
        self.settle(world)

    def note(self, batch: Batch, outcome: Outcome) -> None:
        """Keep what a microstep says about c(sigma) until `settle`."""
        ratios = [
            outcome.flow_B.clamp(min=TINY).log() - outcome.energies[name].log()
            for name in self._fits
            if name != MOTION
        ]
        motion_B = self.motion_log_ratio(batch, outcome.v_hat_BCTHW)
        self._pending.append(torch.stack([batch.sigma_B, *ratios, motion_B], dim=1).float())

    def settle(self, world: World) -> None:
        """End of a step: every process takes in what all of them have noted."""
        if not self._pending:
            return
        seen = world.gather(torch.cat(self._pending)).cpu()
        self._pending = []
        for column, fit in enumerate(self._fits.values(), start=1):
            fit.add(seen[:, 0], seen[:, column])

    def calibrating(self, step: int) -> bool:
        """Whether c(sigma) is still being gathered at this step."""
        return step <= self._calibration_steps

    def _scale(self, name: str, sigma_B: Tensor) -> Tensor:
        """c(sigma). Sound has that of tv, which it equals where the envelope is one throughout: a
        clip with few onsets counts little, and one without sound nothing."""
        fit = self._fits["tv" if name == "sound" else name]
        return fit(sigma_B).exp() if fit.points else torch.zeros_like(sigma_B)

    def state(self) -> dict[str, Any]:
        """What a checkpoint keeps, as JSON."""
        return {name: fit.points for name, fit in self._fits.items()}

    def load_state(self, state: dict[str, Any]) -> None:
        """Take up what `state` gave."""
        for name in self._fits:
            self._fits[name] = SigmaFit(state.get(name, []))

    # --- watching ---------------------------------------------------------------------------------

    def motion_log_ratio(self, batch: Batch, v_hat_BCTHW: Tensor) -> Tensor:
        """log of the motion energy of x0_hat over the clip's, (B,); NaN where nothing tells.

        Motion energy: the tv probe's, squared first differences in time.
        """
        if "tv" not in self._probes:
            return torch.full_like(batch.sigma_B, torch.nan)
        moved, moving = (
            self.context.mean(probe_energy(x, self._probes["tv"]))
            for x in (self._x0_hat(batch, v_hat_BCTHW), batch.latents_BCTHW)
        )
        return (moved / moving).log()

    def motion_change(self, batch: Batch, outcome: Outcome) -> tuple[Tensor, Tensor]:
        """The log ratio above against the base's at the same sigma, and the ratio itself, (B,)."""
        now_B, fit = self.motion_log_ratio(batch, outcome.v_hat_BCTHW), self._fits[MOTION]
        base_B = fit(batch.sigma_B) if fit.points else torch.full_like(now_B, torch.nan)
        return now_B - base_B, now_B

    def gradient_shares(self, batch: Batch, outcome: Outcome) -> dict[str, Tensor]:
        """Norm of each weighted term's gradient over that of the flow term, at the prediction.

        One more read of the residual a term and no further pass through the network; the ratio of
        the adapters' own gradients would cost a backward pass for each.
        """
        v_hat = outcome.v_hat_BCTHW.detach().requires_grad_()
        residual = v_hat - velocity(batch.latents_BCTHW, batch.noise_BCTHW)
        flow = residual[:, :, self._first_frame :].square().mean(dim=(1, 2, 3, 4))
        terms = {"flow": flow.mean()}
        for name, weight in self.weights.items():
            absolute = name == "spectral" and self._absolute
            seen = self._x0_hat(batch, v_hat) if absolute else residual
            energy_B = probe_energy(seen, self._probe(name, batch))
            terms[name] = (weight * outcome.scale[name] * energy_B).mean()
        squares = {
            name: torch.autograd.grad(term, v_hat, retain_graph=True)[0].square().sum()
            for name, term in terms.items()
        }
        norms = {name: self.context.mean(square).sqrt() for name, square in squares.items()}
        return {name: norms[name] / norms["flow"].clamp(min=TINY) for name in self.weights}

    def _x0_hat(self, batch: Batch, v_hat_BCTHW: Tensor) -> Tensor:
        """The clean estimate x_t - sigma v_hat, written as x0 + sigma (v - v_hat)."""
        v_BCTHW = velocity(batch.latents_BCTHW, batch.noise_BCTHW)
        change = batch.sigma_B.view(-1, 1, 1, 1, 1) * (v_BCTHW - v_hat_BCTHW)
        if self._clean_first_frame:
            change = torch.cat([torch.zeros_like(change[:, :, :1]), change[:, :, 1:]], dim=2)
        return batch.latents_BCTHW + change

    # --- probes -----------------------------------------------------------------------------------

    def _probe(self, name: str, batch: Batch) -> Tensor:
        """The probe of a term; of the residual, a given first frame has no error to look at."""
        if name == "sound":
            probe = sound_probe(self._cfg.timebase, self._readout, batch.onset_BF)
        else:
            probe = self._probes[name]
        if self._clean_first_frame and not (name == "spectral" and self._absolute):
            probe = torch.cat([torch.zeros_like(probe[..., :1]), probe[..., 1:]], dim=-1)
        return probe

    def _rows(self, name: str) -> int:
        return len(self._probes["tv" if name == "sound" else name])  # a sound row a difference

    def _stacked(self, batch: Batch) -> tuple[list[str], Tensor | None]:
        """The terms that one kernel takes together, and their rows under each other."""
        names = [*self._fused, *(["sound"] if "sound" in self.weights else [])]
        probes = [self._probe(name, batch) for name in names]
        if "sound" in names:
            probes = [p if p.ndim == 4 else p.expand(len(batch.keys), *p.shape) for p in probes]
            return names, torch.cat(probes, dim=1)
        return names, torch.cat(probes) if probes else None
