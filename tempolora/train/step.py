"""A microstep's input: samples with everything random about them drawn."""

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from tempolora.config import Config
from tempolora.data.shards import Sample
from tempolora.model.wan import pad_text
from tempolora.train.context import WHOLE, Context
from tempolora.train.flow import sample_sigma

EXPERT_STREAM = {"single": 0, "high": 1, "low": 2}  # so that experts see different noise


@dataclass
class Batch:
    """Samples with everything random about them already drawn.

    onset_BF: onset envelope at each video frame, 0..1; zero for a clip without sound.
    """

    keys: list[str]
    latents_BCTHW: Tensor
    noise_BCTHW: Tensor
    sigma_B: Tensor
    text_BLD: Tensor
    condition_BCTHW: Tensor | None
    onset_BF: Tensor
    speed_B: Tensor

    def to(self, device: torch.device) -> "Batch":
        """The same batch on another device."""

        return self._each(lambda value: value.to(device, non_blocking=True))

    def pin_memory(self) -> "Batch":
        """The same batch in pinned memory, whence `to` does not wait; the loader asks for it."""
        return self._each(Tensor.pin_memory)

    def share_memory(self) -> "Batch":
        """The same batch in memory that processes share; the loader asks for it."""
        return self._each(Tensor.share_memory_)

    def _each(self, change: Callable[[Tensor], Tensor]) -> "Batch":
        values = vars(self).items()
        return Batch(**{n: change(v) if isinstance(v, Tensor) else v for n, v in values})


@dataclass(frozen=True)
class Collate:
    """Draws noise, sigma and caption dropout for each sample; runs in the loader's processes.

    All of it follows from (seed, expert, draw), so neither the number of processes nor a resume
    changes what a sample meets; nor does the part of the picture that this process takes.
    """

    cfg: Config
    expert: str
    empty_text_LD: Tensor
    context: Context = WHOLE

    def __call__(self, drawn: list[tuple[int, Sample]], keep_captions: bool = False) -> Batch:
        train, noise, sigma, texts = self.cfg.train, [], [], []
        for draw, sample in drawn:
            # numpy: torch's CPU generator keeps only the low 32 bits of a seed
            random = np.random.default_rng([train.seed, EXPERT_STREAM[self.expert], draw])
            u = torch.tensor(random.random())
            sigma.append(sample_sigma(u, self.cfg.variant, self.expert, train.sigma_sampling))
            dropped = random.random() < train.caption_dropout and not keep_captions
            texts.append(self.empty_text_LD if dropped else sample.text)
            shape = sample.latents["latents"].shape
            noise.append(torch.from_numpy(random.standard_normal(shape, dtype=np.float32)))
        cut = self.context.cut
        conditions = [cut(s.latents["condition"]) for _, s in drawn if "condition" in s.latents]
        return Batch(
            keys=[sample.key for _, sample in drawn],
            latents_BCTHW=torch.stack([cut(s.latents["latents"]) for _, s in drawn]).float(),
            noise_BCTHW=torch.stack([cut(whole) for whole in noise]),
            sigma_B=torch.stack(sigma),
            text_BLD=pad_text(texts),
            condition_BCTHW=torch.stack(conditions).float() if conditions else None,
            onset_BF=torch.stack([_onset(sample, self.cfg.data.num_frames) for _, sample in drawn]),
            speed_B=torch.tensor([sample.meta["speed"] for _, sample in drawn]),
        )


def _onset(sample: Sample, num_frames: int) -> Tensor:
    return sample.rhythm.get("onset", torch.zeros(num_frames)).float()
