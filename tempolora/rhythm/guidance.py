"""Guidance while sampling: a clean estimate is pushed towards a rhythm, through the readout.

At each step the sampler has x0_hat, its estimate of the clean latents. A score says how well the
luminance that the readout sees in it, at the full frame rate, has the rhythm that is asked for.
x0_hat goes a short way up the score's gradient, and the sampler goes on from there. x0_hat itself
is the variable: the gradient does not pass through the transformer, which costs neither memory nor
time and needs no differentiable model; the transformer answers in the next step.

Shapes: B batch, C channel, T latent frame, S = 4 (T - 1) samples of luminance, H, W latent height
and width, G = S - 1 changes from sample to sample, R sample of what was smoothed.
"""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from tempolora.rhythm.readout import Readout
from tempolora.rhythm.tempo import detrend

Score = Callable[[Tensor], Tensor]
"""Luminance in 0..1, (B, S, H, W), to how well it has the rhythm, (B,); differentiable."""

TINY = 1e-12
STILL = 1e-4  # luminance: added to a change as noise would be, so that no change has a slope too
SMOOTHING_FRAMES = 0.7  # standard deviation, of onsets and of luminance


def change_times(samples: int, fps: float) -> np.ndarray:
    """Seconds from the first video frame to the middle of each change, (G,).

    The readout leaves frame 0 out, so the first change is from frame 1 to frame 2.
    """
    return (np.arange(samples - 1) + 1.5) / fps


def motion_curve(luma_BSHW: Tensor) -> Tensor:
    """Motion energy: rms over blocks of the change from sample to sample, (B, G)."""
    return (luma_BSHW.diff(dim=1).square().mean(dim=(2, 3)) + STILL**2).sqrt()


def on_beat(onset_G: Tensor, *, rest: bool = False) -> Score:
    """Correlation of motion energy with a soundtrack's onset envelope at `change_times`, -1..1.

    rest: of the negative energy, so that motion comes to rest on an onset in place of being
    fastest. Onsets and luminance are smoothed over time alike: what is above 6 Hz in a change is
    flicker rather than motion, and a push would make more of it. Raises ValueError if the envelope
    is constant.
    """
    smooth_G = _smoothing(len(onset_G)) @ onset_G.double()
    target_G = smooth_G - smooth_G.mean()
    if target_G.norm() <= TINY:
        raise ValueError("the onset envelope is constant: it has no beat to follow")
    target_G = target_G / target_G.norm() * (-1 if rest else 1)
    smoothing_SS = _smoothing(len(onset_G) + 1)

    def score(luma_BSHW: Tensor) -> Tensor:
        smooth_BSHW = torch.einsum("rs,bshw->brhw", smoothing_SS.to(luma_BSHW), luma_BSHW)
        moved_BG = motion_curve(smooth_BSHW)
        moved_BG = moved_BG - moved_BG.mean(dim=1, keepdim=True)
        return moved_BG @ target_G.to(moved_BG) / (moved_BG.norm(dim=1) + TINY)

    return score


def _smoothing(samples: int) -> Tensor:
    """A Gaussian of SMOOTHING_FRAMES over time as a map, rows of sum 1, float64 (S, S)."""
    time_S = torch.arange(samples, dtype=torch.float64)
    weight_SS = (-0.5 * ((time_S[:, None] - time_S) / SMOOTHING_FRAMES).square()).exp()
    return weight_SS / weight_SS.sum(dim=1, keepdim=True)


def at_frequency(samples: int, fps: float, hz: float) -> Score:
    """Share of the luminance's variance in time that a sinusoid at `hz` explains, 0..1.

    Each block has a phase of its own, so nothing says when. Mean and slope are free, as in
    `metrics.dominant_hz`. Raises ValueError for a frequency of less than one turn in the samples or
    from 0.98 of the highest that they carry.
    """
    low, high = fps / samples, 0.98 * fps / 2
    if not low <= hz < high:
        raise ValueError(f"{samples} frames at {fps:g} fps carry {low:.2f} to {high:.2f} Hz")
    angle_S = 2 * math.pi * hz / fps * torch.arange(samples, dtype=torch.float64)
    flat_SS = detrend(samples)
    waves_SQ = flat_SS @ torch.stack([angle_S.cos(), angle_S.sin()], dim=1)
    basis_SQ = torch.linalg.qr(waves_SQ).Q

    def score(luma_BSHW: Tensor) -> Tensor:
        flat_BSHW = torch.einsum("st,bthw->bshw", flat_SS.to(luma_BSHW), luma_BSHW)
        wave_BQHW = torch.einsum("sq,bshw->bqhw", basis_SQ.to(luma_BSHW), flat_BSHW)
        power_B, total_B = (x.square().sum(dim=(1, 2, 3)) for x in (wave_BQHW, flat_BSHW))
        return power_B / (total_B + TINY)

    return score


def each(scores: Sequence[Score]) -> Score:
    """One score per sample of a batch, in its order."""
    return lambda luma_BSHW: torch.cat(
        [score(luma[None]) for score, luma in zip(scores, luma_BSHW, strict=True)]
    )


def score_and_gradient(
    x0_hat_BCTHW: Tensor, readout: Readout, score: Score
) -> tuple[Tensor, Tensor]:
    """The score of each sample, (B,), and its gradient with respect to x0_hat, (B, C, T, H, W)."""
    with torch.enable_grad():
        variable = x0_hat_BCTHW.detach().requires_grad_(True)
        score_B = score(readout.luminance(variable))
        (gradient,) = torch.autograd.grad(score_B.sum(), variable)
    return score_B.detach(), gradient


@dataclass(frozen=True)
class Guide:
    """What the sampler applies to each clean estimate: (x0_hat, sigma) -> x0_hat.

    strength: length of the push as a share of x0_hat's own norm. The gradient gives the direction
    only: its length depends on how much moves and on the readout's units, and is largest where
    almost nothing moves yet. Measured by x0_hat, one strength means the same for every size, length
    and VAE. sigma: lowest and highest noise level, 0..1, at which it pushes; elsewhere x0_hat
    itself is returned. given: first latent frames that stay as they are, as those of an image do;
    the whole push then goes to the others. hold: what the push adds to the change over time of
    these is taken back by scale, so that the tempo changes and not how much moves.
    """

    readout: Readout
    score: Score
    strength: float
    sigma: tuple[float, float]
    given: int = 0
    hold: bool = False

    def __call__(self, x0_hat_BCTHW: Tensor, sigma: float) -> Tensor:
        low, high = self.sigma
        if not low <= sigma <= high:
            return x0_hat_BCTHW
        _, gradient = score_and_gradient(x0_hat_BCTHW, self.readout, self.score)
        gradient[:, :, : self.given] = 0
        length_B, norm_B = (x.flatten(1).norm(dim=1) for x in (gradient, x0_hat_BCTHW))
        share_B = self.strength * norm_B / length_B.clamp(min=torch.finfo(length_B.dtype).tiny)
        pushed_BCTHW = x0_hat_BCTHW + share_B[:, None, None, None, None] * gradient
        if not self.hold:
            return pushed_BCTHW
        kept, free = pushed_BCTHW.tensor_split([self.given], dim=2)
        return torch.cat([kept, _as_lively(free, x0_hat_BCTHW[:, :, self.given :])], dim=2)


def _as_lively(latents_BCTHW: Tensor, model_BCTHW: Tensor) -> Tensor:
    """Latents whose distance from their own mean over time is as long as that of a model."""
    mean_BC1HW = latents_BCTHW.mean(dim=2, keepdim=True)
    change = latents_BCTHW - mean_BC1HW
    wanted = model_BCTHW - model_BCTHW.mean(dim=2, keepdim=True)
    scale_B = wanted.flatten(1).norm(dim=1) / (change.flatten(1).norm(dim=1) + TINY)
    return mean_BC1HW + scale_B[:, None, None, None, None] * change
