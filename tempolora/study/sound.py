"""Soundtracks: do videos follow clicks that guide them, and what does the sound term add to it?

The base model, a plain LoRA and one with the sound term sample the same captions from the same
noise, unguided and guided, each sample by a click track of its own. Both are matched with that
track, and with one half a beat later. Beats are found in the pixels, not through the readout that
guides.
"""

import logging
import math
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
from torch import Tensor

from tempolora.config import Config, ConfigError
from tempolora.data import toy
from tempolora.data.audio import Track, onset_envelope
from tempolora.data.shards import Sample
from tempolora.data.toy_set import AUDIO_RATE_HZ, click_track
from tempolora.files import write_json
from tempolora.model import wan
from tempolora.results.guide import SOUNDTRACK, Rhythm
from tempolora.rhythm import metrics
from tempolora.rhythm.guidance import Guide, change_times, each, on_beat
from tempolora.study import clips, measure, videos
from tempolora.study.arms import TARGETS, Arm, Loss, arm_config
from tempolora.study.experiment import (
    Seed,
    Settings,
    numbers,
    refuse_other_settings,
    settings_ranks,
)
from tempolora.study.finetune import finetune_all
from tempolora.timebase import TimeBase

log = logging.getLogger(__name__)

FORMAT = 1
FOLDER = "sound"
TARGET = "all_linear"
TRAINED_HZ = (0.75, 1.5)  # beats of the clips trained on
CLICKS_HZ = (1.6, 3.5)  # of the soundtracks that are asked for
WAYS: dict[str, Loss | None] = {
    "base": None,
    "plain": Loss(),
    "sound": Loss(("rhythm.sound_weight=0.2",)),
}
KEPT = ("jitter_log2", "flicker", "amplitude_log2", "band_log2", "hz_share")


@dataclass(frozen=True)
class Clicks:
    """A click track: `hz` clicks a second, the first at `first_s`, within the first period."""

    hz: float
    first_s: float

    def times(self, duration_s: float, late_beats: float = 0.0) -> np.ndarray:
        """Times in s of all clicks in [0, duration_s), of the track moved by this many beats."""
        period_s = 1 / self.hz
        return np.arange((self.first_s + late_beats * period_s) % period_s, duration_s, period_s)


def soundtracks(count: int, seed: int) -> list[Clicks]:
    """What the samples of a seed are asked to follow: rates log-uniform, phases uniform."""
    rng = np.random.default_rng([seed, clips.ASKED_FOR, 1])
    low, high = (math.log(hz) for hz in CLICKS_HZ)
    rates = np.exp(rng.uniform(low, high, count)).tolist()
    return [Clicks(hz, turn / hz) for hz, turn in zip(rates, rng.random(count).tolist())]


def ways(names: list[str]) -> list[str]:
    """The names themselves, each once. Raises ConfigError for one that there is not."""
    for name in names:
        if name not in WAYS:
            raise ConfigError(f"--ways: there is no {name!r}; give {', '.join(WAYS)}")
    return [*dict.fromkeys(names)]


def run(settings: Settings, chosen: list[str], seeds: list[int]) -> int:
    """Measure what is not measured yet; the number of files written."""
    written = 0
    for seed in seeds:
        shared = guide = None
        for way in chosen:
            path = settings.path(_arm(way), seed)
            path = path.parent / FOLDER / path.name
            cfg = config_of(settings, way, seed)
            if path.is_file():
                refuse_other_settings(path, _settings_of(settings, cfg))
                continue
            path.parent.mkdir(parents=True, exist_ok=True)
            shared = shared or Seed(settings, seed)
            guide = guide or guide_of(shared)
            write_json(path, record(settings, way, cfg, shared, guide))
            log.info("%s, seed %d: measured", way, seed)
            written += 1
    return written


def config_of(settings: Settings, way: str, seed: int) -> Config:
    """The whole configuration of a way and seed."""
    made = _arm(way)
    rank = settings_ranks(settings)[TARGET] if made.is_tuned else 1
    return arm_config(made, seed, rank, settings.overrides)


def clips_with_clicks(settings: Settings, shared: Seed) -> clips.TrainingClips:
    """Clean clips of narrow looks and slow beats, each with the onsets of a click on every beat."""
    rng = np.random.default_rng([shared.seed, clips.TRAINED_ON, 2])
    scenes = toy.draw_scenes(settings.clips, rng, **clips.NARROW, hz=TRAINED_HZ)
    texts = wan.encode_prompts(*shared.text_parts, toy.captions(scenes))
    latents_NCTHW = clips.encode(shared.vae, clips.draw(shared.cfg, scenes, shared.device)).cpu()
    clock = shared.cfg.timebase
    times_s = np.arange(clock.num_frames) / clock.fps
    samples = []
    for n, latents in enumerate(latents_NCTHW):
        clicks = click_track(toy.beat_times(scenes[n], clock.duration_s), clock.duration_s)
        onset_F = Track(clicks, AUDIO_RATE_HZ).window(times_s, clock.fps).onset_F  # as precompute
        heard = {"onset": torch.from_numpy(onset_F)}
        kept = {"latents": latents}
        samples.append(Sample(f"{n:04d}", kept, texts[n].cpu(), heard, {"speed": 1.0}))
    return replace(shared.training, samples=samples)


def guide_of(shared: Seed) -> Guide:
    """What `tempolora sample --soundtrack` does by default, each sample with its own soundtrack."""
    clock = shared.cfg.timebase
    times_s = change_times(clock.samples, clock.fps)
    scores = []
    for track in soundtracks(len(shared.scenes), shared.seed):
        clicks = click_track(track.times(clock.duration_s), clock.duration_s)
        onset_G = torch.from_numpy(onset_envelope(clicks, AUDIO_RATE_HZ, times_s))
        scores.append(on_beat(onset_G, rest=False))
    return Guide(shared.guiding_readout, each(scores), SOUNDTRACK, Rhythm().sigma)


def record(settings: Settings, way: str, cfg: Config, shared: Seed, guide: Guide) -> dict[str, Any]:
    """The numbers of one way: per metric a value per sample, unguided and guided."""
    facts: dict[str, Any] = {}
    if _arm(way).is_tuned:
        training = clips_with_clicks(settings, shared)
        experts, flow = finetune_all(cfg, _arm(way), cfg.experts, training, shared.device)
        facts |= {"rank": cfg.lora.rank, "flow": flow}
    else:
        experts = {n: wan.load_transformer(cfg.model, n, shared.device) for n in cfg.experts}
    text = shared.embedded(toy.captions(shared.scenes))
    tracks = soundtracks(len(shared.scenes), shared.seed)
    found = {}
    for name, given in (("unguided", None), ("guided", guide)):
        shown = videos.sample(cfg, experts, shared.vae, shared.noise, text, guide=given)
        values, _ = measure.measure(shared.asked, shown)
        values = {metric: values[metric] for metric in KEPT} | matches(shown, tracks, cfg.timebase)
        found[name] = {metric: numbers(value_N) for metric, value_N in values.items()}
    return {
        "format": FORMAT,
        "way": way,
        "seed": shared.seed,
        "config": _settings_of(settings, cfg),
        **facts,
        "guide": {"strength": guide.strength, "sigma": list(guide.sigma)},
        "kind": shared.scenes.kinds,
        "clicks": {
            "hz": [track.hz for track in tracks],
            "first_s": [track.first_s for track in tracks],
        },
        **found,
    }


def matches(videos_NFHW3: Tensor, tracks: list[Clicks], clock: TimeBase) -> dict[str, Tensor]:
    """How motion, where it is fastest, falls on each video's clicks: (N,) each.

    gain: F1 less that of the clicks turned in a circle; gain_late: the same of the clicks half a
    beat later.
    """
    found: dict[str, list[float]] = {"gain": [], "f1": [], "gain_late": []}
    curves_NG = measure.motion_curves(videos_NFHW3).double().numpy()
    for curve_G, track in zip(curves_NG, tracks, strict=True):
        beats_s = metrics.fastest(curve_G, clock.fps)
        own, late = (
            metrics.beat_match(beats_s, track.times(clock.duration_s, shift), clock.duration_s)
            for shift in (0.0, 0.5)
        )
        for name, value in (("gain", own.gain), ("f1", own.f1), ("gain_late", late.gain)):
            found[name].append(value)
    return {name: torch.tensor(values) for name, values in found.items()}


def _arm(way: str) -> Arm:
    loss = WAYS[way]
    return Arm(way, TARGETS[TARGET] if loss else None, loss)


def _settings_of(settings: Settings, cfg: Config) -> dict[str, Any]:
    """All that a record depends on, as JSON gives it back."""
    study = {"clips": settings.clips, "samples": settings.samples}
    return cfg.model_dump(mode="json") | {"study": study}
