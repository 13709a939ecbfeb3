"""What is drawn for the study: few clips of narrow looks to train on, wide ones to be asked for.

Shapes: N clip, C channel, T latent frame, F video frame, H, W height and width, L token, D width.
"""

from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor, nn

from tempolora.config import Config
from tempolora.data import toy
from tempolora.data.shards import Sample
from tempolora.model import wan
from tempolora.rhythm.bank import Bank
from tempolora.rhythm.readout import Part, Readout, fit
from tempolora.rhythm.tempo import block_luminance, motion, power_spectrum

TRAINED_ON, ASKED_FOR, NOISE = 1, 2, 3  # streams of random numbers
TOGETHER = 32  # clips in the VAE at a time
NARROW = {
    "kinds": ("slide", "walk", "pan"),
    "shapes": ("disc", "square"),
    "textures": ("flat",),
    "ground_textures": ("flat",),
    "colours": ("red", "blue"),
}
UNSEEN_SHAPES = tuple(shape for shape in toy.SHAPES if shape not in NARROW["shapes"])
UNSEEN_COLOURS = tuple(colour for colour in toy.COLOURS if colour not in NARROW["colours"])


@dataclass(frozen=True)
class TrainingClips:
    """Encoded clips as the trainer's samples, and what the rhythm terms need."""

    samples: list[Sample]
    empty_text_LD: Tensor
    readout: Readout
    bank: Bank


def narrow_scenes(count: int, seed: int) -> toy.Scenes:
    """Scenes to train on: three kinds of motion, discs and squares in two colours, no pattern."""
    return toy.draw_scenes(count, np.random.default_rng([seed, TRAINED_ON]), **NARROW)


def unseen_scenes(count: int, seed: int) -> toy.Scenes:
    """Scenes whose captions are sampled: every kind, in shapes and colours not trained on.

    Kind, shape and pattern of the n-th are the same for every seed, so that what can be measured
    of it is too.
    """
    rng = np.random.default_rng([seed, ASKED_FOR])
    scenes = []
    for n in range(count):
        row, kind = divmod(n, len(toy.KINDS))
        scenes.append(
            toy.draw_scenes(
                1,
                rng,
                kinds=(toy.KINDS[kind],),
                shapes=(UNSEEN_SHAPES[row % len(UNSEEN_SHAPES)],),
                textures=(toy.TEXTURES[row // len(UNSEEN_SHAPES) % len(toy.TEXTURES)],),
                colours=UNSEEN_COLOURS,
            )
        )
    return toy.Scenes.cat(scenes)


def says_tempo(n: int) -> bool:
    """Whether the n-th caption names its tempo: every other one, as in pretraining."""
    return n % 2 == 1


def said(scenes: toy.Scenes) -> list[str]:
    """The caption of each scene."""
    pairs = zip(toy.captions(scenes), toy.captions(scenes, tempo_words=True), strict=True)
    return [pair[says_tempo(n)] for n, pair in enumerate(pairs)]


def draw(cfg: Config, scenes: toy.Scenes, device: torch.device, style: str = "clean") -> Tensor:
    """The scenes as videos of the configured size, uint8 (N, F, H, W, 3)."""
    return toy.render(scenes.to(device), style=style, **sizes(cfg))


def sizes(cfg: Config) -> dict[str, float]:
    """What the drawn world needs to know of a configuration."""
    data = cfg.data
    return {
        "fps": cfg.timebase.fps,
        "num_frames": data.num_frames,
        "height": data.height,
        "width": data.width,
    }


def encode(vae: nn.Module, videos_NFHW3: Tensor) -> Tensor:
    """Normalised latents (N, C, T, H, W)."""
    return torch.cat([wan.encode_video(vae, some) for some in videos_NFHW3.split(TOGETHER)])


def decode(vae: nn.Module, latents_NCTHW: Tensor) -> Tensor:
    """Videos, uint8 (N, F, H, W, 3)."""
    return torch.cat([wan.decode_video(vae, some) for some in latents_NCTHW.split(TOGETHER)])


def training_clips(
    cfg: Config, vae: nn.Module, text: tuple, count: int, seed: int, device: torch.device
) -> TrainingClips:
    """Draw, encode and read; the readout is fitted to what the VAE makes of these clips.

    text: tokenizer and encoder.
    """
    scenes = narrow_scenes(count, seed)
    latents_NCTHW = encode(vae, draw(cfg, scenes, device))
    embedded = [text_LD.cpu() for text_LD in wan.encode_prompts(*text, [*said(scenes), ""])]
    parts = []
    for some in latents_NCTHW.split(TOGETHER):
        for latents, frames_3FHW in zip(some, wan.decode_frames(vae, some), strict=True):
            luma_SHW = block_luminance(frames_3FHW[:, 1:].movedim(1, 0), *latents.shape[2:])
            parts.append(Part.of(latents.cpu(), luma_SHW.cpu(), seed=len(parts)))
    readout, _ = fit(parts)
    luma_NSHW = readout.luminance(latents_NCTHW.cpu())
    samples = [
        Sample(f"{n:04d}", {"latents": latents.cpu()}, text_LD, {}, {"speed": 1.0})
        for n, (latents, text_LD) in enumerate(zip(latents_NCTHW, embedded[:-1], strict=True))
    ]
    bank = Bank(power_spectrum(luma_NSHW), motion(luma_NSHW))
    return TrainingClips(samples, embedded[-1], readout, bank)


def paired_noise(cfg: Config, count: int, seed: int) -> Tensor:
    """The noise that every arm of a seed starts from, float32 (N, C, T, H, W)."""
    random = np.random.default_rng([seed, NOISE])
    return torch.from_numpy(random.standard_normal((count, *cfg.latent_shape), dtype=np.float32))
