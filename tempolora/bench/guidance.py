"""Does guidance move TinyWan's videos to a soundtrack or to a frequency, and what does it cost?

16 captions of the drawn world, each with noise and a click track or a frequency of its own, are
sampled unguided and guided. Beats and frequencies are measured on the decoded pixels, not through
the readout that guided. `python -m tempolora.bench guidance --what soundtrack`, or `--what hz`.
"""

import argparse
import math
import sys
from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

from tempolora.config import load_config
from tempolora.data import toy
from tempolora.data.audio import onset_envelope
from tempolora.data.fit_readout import readout_of_vae
from tempolora.data.toy_set import AUDIO_RATE_HZ, click_track
from tempolora.model import wan
from tempolora.model.encoders import WanEncoders
from tempolora.results.guide import FREQUENCY, SOUNDTRACK, Rhythm
from tempolora.results.sample import draw_noise, sample_latents
from tempolora.rhythm import metrics
from tempolora.rhythm.guidance import Guide, at_frequency, change_times, each, on_beat
from tempolora.variants import NEGATIVE_PROMPT

CLIPS = 16
KINDS = ("slide", "pan", "pulse", "water", "ball", "pendulum", "grass", "spin")
TINYWAN = (
    "model.id=tinywan",
    "model.base=fp32",
    "data.height=64",
    "data.width=64",
    "data.shards=tempolora_demo/shards",
)
PULSE_HZ, ASKED_HZ = (1.2, 3.5), (1.0, 4.0)


def main(arguments: Sequence[str]) -> None:
    parser = argparse.ArgumentParser(prog="python -m tempolora.bench guidance", description=__doc__)
    parser.add_argument("--what", choices=("soundtrack", "hz"), required=True)
    parser.add_argument("--steps", type=int, default=12)
    parser.add_argument("--seed", type=int, default=0, help="of captions, noise and what is asked")
    parser.add_argument("--strength", type=float, nargs="+", help="as in the command")
    parser.add_argument("--sigma", type=float, nargs=2, default=Rhythm().sigma)
    options = parser.parse_args(arguments)
    torch.set_num_threads(1)
    bench = Bench(options.seed, options.steps)
    measure, usual = bench.frequencies, FREQUENCY
    if options.what == "soundtrack":
        measure, usual = bench.soundtracks, SOUNDTRACK
    rows = measure(options.strength or [usual], tuple(options.sigma))
    print("\n".join(["", *rows]), file=sys.stdout)


class Bench:
    """TinyWan with captions, their text and noise."""

    def __init__(self, seed: int, steps: int) -> None:
        self.cfg = load_config(None, TINYWAN)
        self.clock, self.steps = self.cfg.timebase, steps
        self.rng = np.random.default_rng(seed)
        scenes = toy.draw_scenes(CLIPS, self.rng, kinds=KINDS)
        tokenizer, encoder = wan.load_text(self.cfg.model, "cpu")
        texts = wan.encode_prompts(tokenizer, encoder, [*toy.captions(scenes), NEGATIVE_PROMPT])
        self.text_BLD = wan.pad_text(texts[:-1])
        self.negative_BLD = wan.pad_text([texts[-1]] * CLIPS)
        self.noise = draw_noise((CLIPS, *self.cfg.latent_shape), seed)
        self.readout = readout_of_vae(self.cfg, WanEncoders(self.cfg, torch.device("cpu")))
        self.vae = wan.load_vae(self.cfg.model, "cpu")

    def luma(self, guide: Guide | None) -> Tensor:
        """Luma of the decoded videos, (N, F, H, W)."""
        latents = sample_latents(
            lambda name: wan.load_transformer(self.cfg.model, name, "cpu").eval(),
            self.cfg.variant,
            self.noise,
            self.text_BLD,
            self.negative_BLD,
            steps=self.steps,
            guide=guide,
        )
        return metrics.luminance(wan.decode_frames(self.vae, latents).movedim(1, 2))

    def soundtracks(self, strengths: list[float], sigma: tuple[float, float]) -> list[str]:
        """Beats against the clip's own clicks, and against those half a beat later."""
        duration_s, fps = self.clock.duration_s, self.clock.fps
        hz_N = log_uniform(self.rng, PULSE_HZ)
        onsets = [np.arange(self.rng.uniform(0, 1 / hz), duration_s, 1 / hz) for hz in hz_N]
        late = [beats + 0.5 / hz for beats, hz in zip(onsets, hz_N, strict=True)]
        times_s = change_times(self.clock.samples, fps)
        envelopes = [
            torch.from_numpy(onset_envelope(click_track(t, duration_s), AUDIO_RATE_HZ, times_s))
            for t in onsets
        ]

        def row(name: str, luma: Tensor) -> str:
            curves = metrics.motion_curve(luma).double().numpy()
            cells = [name]
            for find in (metrics.fastest, metrics.motion_beats):
                beats = [find(curve, fps) for curve in curves]
                matches = [metrics.beat_match(b, o, duration_s) for b, o in zip(beats, onsets)]
                halves = [metrics.beat_match(b, o, duration_s) for b, o in zip(beats, late)]
                gain, low, high = metrics.bootstrap_interval(np.array([m.gain for m in matches]))
                cells.append(f"{np.mean([m.f1 for m in matches]):.2f}")
                cells.append(f"{gain:+.2f} ({low:+.2f} to {high:+.2f})")
                cells.append(f"{np.mean([m.gain for m in halves]):+.2f}")
            return " | ".join([*cells, *self.costs(luma)])

        base = self.luma(None)
        self.base = self.powers(base)
        rows = [
            "guide | fastest: F1 | gain | half a beat late | at rest: F1 | gain | "
            "half a beat late | log2 power above 6 Hz | log2 power in the band | flicker",
            row("none", base),
        ]
        for rest in (False, True):
            score = each([on_beat(envelope, rest=rest) for envelope in envelopes])
            for strength in strengths:
                luma = self.luma(Guide(self.readout, score, strength, sigma))
                rows.append(row(f"{'rest' if rest else 'hit'} {strength:g}", luma))
        return rows

    def frequencies(self, strengths: list[float], sigma: tuple[float, float]) -> list[str]:
        """Dominant frequency of the pixels over the one that was asked for, in octaves."""
        asked_N = log_uniform(self.rng, ASKED_HZ)
        score = each([at_frequency(self.clock.samples, self.clock.fps, hz) for hz in asked_N])

        def row(name: str, luma: Tensor) -> str:
            hz_N, share_N = metrics.dominant_hz(luma.flatten(2).double(), self.clock.fps)
            cells = [name]
            for chosen in (asked_N < np.inf, asked_N < self.clock.latent_nyquist_hz):
                asked, got = np.log2(asked_N[chosen]), hz_N.log2().numpy()[chosen]
                slope = np.polyfit(asked, got, 1)[0]
                cells.append(f"{slope:+.2f}, {np.corrcoef(asked, got)[0, 1] ** 2:.2f}")
                cells.append(f"{np.median(np.abs(asked - got)):.2f}")
            return " | ".join([*cells, f"{share_N.mean():.2f}", *self.costs(luma)])

        base = self.luma(None)
        self.base = self.powers(base)
        rows = [
            "guide | slope, R^2 | median octaves off | slope, R^2 below 2 Hz | octaves | share | "
            "log2 power above 6 Hz | log2 power in the band | flicker",
            row("none", base),
        ]
        for strength in strengths:
            luma = self.luma(Guide(self.readout, score, strength, sigma))
            rows.append(row(f"{strength:g}", luma))
        return rows

    def powers(self, luma: Tensor) -> list[Tensor]:
        """log2 of the power above the cutoff and in the band, (N,) each."""
        rhythm = self.cfg.rhythm
        bins = metrics.bins_of(self.clock, rhythm.spec_cutoff_hz, rhythm.band_hz)
        power_NK = metrics.spectral_power(luma, self.clock)
        return [metrics.pooled(power_NK, k).log2() for k in (bins.jitter, bins.band)]

    def costs(self, luma: Tensor) -> list[str]:
        """Power against the unguided videos, and flicker in levels."""
        pairs = zip(self.powers(luma), self.base, strict=True)
        return [f"{(a - b).mean():+.2f}" for a, b in pairs] + [
            f"{metrics.flicker(luma).mean():.1f}"
        ]


def log_uniform(rng: np.random.Generator, hz: tuple[float, float]) -> np.ndarray:
    return np.exp(rng.uniform(math.log(hz[0]), math.log(hz[1]), CLIPS))
