"""One microstep: a batch of samples with its noise in, the loss and its terms out."""

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from tempolora.config import Config
from tempolora.data.shards import Sample
from tempolora.model.wan import condition_channels, pad_text
from tempolora.rhythm.kernels import probe_energy
from tempolora.rhythm.probes import spectral_probe, tv_probe
from tempolora.train.flow import interpolate, sample_sigma, velocity

EXPERT_STREAM = {"single": 0, "high": 1, "low": 2}  # so that experts see different noise


@dataclass
class Batch:
    """Samples with everything random about them already drawn."""

    keys: list[str]
    latents_BCTHW: Tensor
    noise_BCTHW: Tensor
    sigma_B: Tensor
    text_BLD: Tensor
    condition_BCTHW: Tensor | None

    def to(self, device: torch.device) -> "Batch":
        """The same batch on another device."""

        def move(value):
            return value.to(device, non_blocking=True) if isinstance(value, Tensor) else value

        return Batch(**{name: move(value) for name, value in vars(self).items()})


@dataclass(frozen=True)
class Collate:
    """Draws noise, sigma and caption dropout for each sample; runs in the loader's processes.

    All of it follows from (seed, expert, draw), so neither the number of processes nor a resume
    changes what a sample meets.
    """

    cfg: Config
    expert: str
    empty_text_LD: Tensor

    def __call__(self, drawn: list[tuple[int, Sample]]) -> Batch:
        train, noise, sigma, texts = self.cfg.train, [], [], []
        for draw, sample in drawn:
            # numpy: torch's CPU generator keeps only the low 32 bits of a seed
            random = np.random.default_rng([train.seed, EXPERT_STREAM[self.expert], draw])
            u = torch.tensor(random.random())
            sigma.append(sample_sigma(u, self.cfg.variant, self.expert, train.sigma_sampling))
            dropped = random.random() < train.caption_dropout
            texts.append(self.empty_text_LD if dropped else sample.text)
            shape = sample.latents["latents"].shape
            noise.append(torch.from_numpy(random.standard_normal(shape, dtype=np.float32)))
        conditions = [s.latents["condition"] for _, s in drawn if "condition" in s.latents]
        return Batch(
            keys=[sample.key for _, sample in drawn],
            latents_BCTHW=torch.stack([s.latents["latents"] for _, s in drawn]).float(),
            noise_BCTHW=torch.stack(noise),
            sigma_B=torch.stack(sigma),
            text_BLD=pad_text(texts),
            condition_BCTHW=torch.stack(conditions).float() if conditions else None,
        )


Predict = Callable[..., Tensor]


class Objective:
    """The training loss: flow matching plus the weighted energies of the rhythm probes."""

    def __init__(self, cfg: Config, device: torch.device) -> None:
        rhythm, channels = cfg.rhythm, cfg.variant.latent_channels
        self._clean_first_frame = cfg.task == "i2v" and cfg.variant.per_token_time
        self._per_token_time = cfg.variant.per_token_time
        self._probes: dict[str, tuple[float, Tensor]] = {}
        if rhythm.spec_weight:
            probe = spectral_probe(cfg.timebase, channels, rhythm.spec_cutoff_hz, rhythm.band_hz)
            self._probes["spectral"] = (rhythm.spec_weight, probe.to(device))
        if rhythm.tv_weight:
            self._probes["tv"] = (rhythm.tv_weight, tv_probe(cfg.timebase, channels).to(device))

    def __call__(self, predict: Predict, batch: Batch) -> tuple[Tensor, dict[str, Tensor]]:
        """The loss, (), and its terms by name, detached, each unweighted: flow, spectral, tv.

        predict: (x_BCTHW, sigma_B, text_BLD, condition, clean_first_frame, per_token_time) -> v.
        """
        x_BCTHW = interpolate(batch.latents_BCTHW, batch.noise_BCTHW, batch.sigma_B)
        condition = batch.condition_BCTHW
        if self._clean_first_frame:
            x_BCTHW[:, :, 0] = batch.latents_BCTHW[:, :, 0]
        v_hat_BCTHW = predict(
            x_BCTHW,
            batch.sigma_B,
            batch.text_BLD,
            condition_BCTHW=None if condition is None else condition_channels(condition),
            clean_first_frame=self._clean_first_frame,
            per_token_time=self._per_token_time,
        )
        residual_BCTHW = v_hat_BCTHW.float() - velocity(batch.latents_BCTHW, batch.noise_BCTHW)
        # A clean first frame is given, not predicted. The probes leave latent frame 0 out anyway.
        learned = residual_BCTHW[:, :, 1:] if self._clean_first_frame else residual_BCTHW
        terms = {"flow": learned.square().mean()}
        loss = terms["flow"]
        for name, (weight, probe_PCT) in self._probes.items():
            terms[name] = probe_energy(residual_BCTHW, probe_PCT).mean()
            loss = loss + weight * terms[name]
        return loss, {name: term.detach() for name, term in terms.items()}
