"""The tempo knob: what speed comes out where one is asked for, and what else changes with it.

Asked for in four ways: by the strength of a tempo adapter, trained on faster and slower versions
of few clean clips; by the caption's word for the tempo; by a stretched time axis of RoPE; by
guidance to the video's own frequency times the speed. Only the first needs training. Every way
starts from the same noise at every speed. An adapter may also be asked beside the study's own LoRA,
as users put the two together.
"""

import logging
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.torch import save_file
from torch import Tensor, nn

from tempolora.config import ConfigError
from tempolora.data import toy
from tempolora.data.shards import Sample
from tempolora.files import replacing, write_json
from tempolora.model import lora, wan
from tempolora.results.guide import speed_guide
from tempolora.study import clips, measure, videos
from tempolora.study.arms import TARGETS, Arm, Loss, arm, arm_config
from tempolora.study.experiment import Seed, Settings, numbers, settings_ranks, stored_experts
from tempolora.study.finetune import finetune_all

log = logging.getLogger(__name__)

FORMAT = 1
FOLDER = "knob"
BASE_HZ = (1.0, 3.0)  # of the samples that are judged
TRAINED_HZ = (0.75, 4.0)  # of the clips trained on: at twice the speed no more than 8 Hz
LOOKS = {key: value for key, value in clips.NARROW.items() if key != "kinds"}
BESIDE = "+ours"
SPEEDS = (0.5, 0.71, 1.41, 2.0)
ASKED = (-1.0, -0.5, 0.0, 0.5, 1.0)  # log2 of the speed
UNTRAINED = ("words", "rope", "guide")
SHOWN = 3
THETA = 10_000.0  # of Wan's RoPE
WORDS_HZ = {"slow": 0.75, "steady": 1.73, "fast": 4.0}  # the middles of the thirds they name
KEPT = (
    "hz_log2",
    "hz_share",
    "amplitude_log2",
    "jitter_log2",
    "colour_error",
    "area_error",
    "shape_error",
    "drift_colour",
    "drift_shape",
)


@dataclass(frozen=True)
class Way:
    """A way to ask for a speed. target: of a tempo adapter, and the experts that have one."""

    name: str
    target: str | None = None
    experts: tuple[str, ...] = ()
    beside: bool = False
    """Whether the adapters of `Settings.ours` are there too, at full strength."""


def ways(names: list[str]) -> list[Way]:
    """By name: one of UNTRAINED, or TARGET/EXPERT (high, low or both); each may end in "+ours".

    Raises ConfigError for what is none.
    """
    found = []
    for name in names:
        plain, beside = name.removesuffix(BESIDE), name.endswith(BESIDE)
        target, _, expert = plain.partition("/")
        experts = {"high": ("high",), "low": ("low",), "both": ("high", "low")}.get(expert, ())
        if plain in UNTRAINED:
            found.append(Way(name, beside=beside))
        elif target in TARGETS and not TARGETS[target].rows and experts:
            found.append(Way(name, target, experts, beside))
        else:
            raise ConfigError(
                f"--ways: there is no {name!r}; give {', '.join(UNTRAINED)}, or TARGET/high, "
                f"/low or /both, each with {BESIDE} behind it or without"
            )
    return found


def run(settings: Settings, chosen: list[Way], seeds: list[int]) -> int:
    """Measure what is not measured yet; the number of files written."""
    written = 0
    for seed in seeds:
        shared = None
        for way in chosen:
            path = settings.path(Arm(way.name), seed)
            path = path.parent / FOLDER / path.name.replace("/", "-")
            if path.is_file():
                continue
            path.parent.mkdir(parents=True, exist_ok=True)
            shared = shared or Seed(settings, seed)
            ours = settings.path(arm(settings.ours), seed, ".safetensors")
            if way.beside and not ours.is_file():
                raise ConfigError(f"--ways: {way.name} needs {ours}; `study run` that arm first")
            numbers_of, clips_ANFHW3 = record(settings, way, shared)
            with replacing(clips_path(path)) as temporary:
                save_file({"clips": clips_ANFHW3}, temporary)
            write_json(path, numbers_of)
            log.info("%s, seed %d: measured", way.name, seed)
            written += 1
    return written


def clips_at_speeds(settings: Settings, shared: Seed) -> clips.TrainingClips:
    """Clean clips of narrow looks, each drawn at every speed: exactly warped, nothing made up."""
    rng = np.random.default_rng([shared.seed, clips.TRAINED_ON, 1])
    count = settings.clips // len(SPEEDS)
    scenes = toy.draw_scenes(count, rng, **LOOKS, hz=TRAINED_HZ)
    texts = wan.encode_prompts(*shared.text_parts, toy.captions(scenes))
    sizes = clips.sizes(shared.cfg)
    samples = []
    for speed in SPEEDS:
        warped = sizes | {"fps": sizes["fps"] / speed}
        videos_NFHW3 = toy.render(scenes.to(shared.device), style="clean", **warped)
        for n, latents in enumerate(clips.encode(shared.vae, videos_NFHW3)):
            key, meta = f"{n:04d}-{speed:g}", {"speed": speed}
            samples.append(Sample(key, {"latents": latents.cpu()}, texts[n].cpu(), {}, meta))
    return replace(shared.training, samples=samples)


def clips_path(record: Path) -> Path:
    """Where the clips of a record lie: uint8 (A, SHOWN, F, H, W, 3), of A asked speeds."""
    return record.with_suffix(".clips.safetensors")


def record(settings: Settings, way: Way, shared: Seed) -> tuple[dict[str, Any], Tensor]:
    """The numbers of one way: per metric a list per asked speed, of a value per sample; and clips.

    The clips are of those samples in BASE_HZ whose own motion is most clearly at one frequency.
    """
    cfg, facts = shared.cfg, {}
    experts = {name: wan.load_transformer(cfg.model, name, shared.device) for name in cfg.experts}
    asked: tuple[float, ...] = ASKED
    sample: Callable[[float], Tensor]
    kind = way.name.removesuffix(BESIDE)
    if kind == "words":
        asked = tuple(float(np.log2(hz / WORDS_HZ["steady"])) for hz in WORDS_HZ.values())

        def sample(step: float) -> Tensor:
            hz = WORDS_HZ["steady"] * 2**step
            scenes = replace(shared.scenes, hz_N=torch.full_like(shared.scenes.hz_N, hz))
            return _sample(shared, experts, toy.captions(scenes, tempo_words=True))

    elif kind == "rope":

        def sample(step: float) -> Tensor:
            with stretched(list(experts.values()), 2**step):
                return _sample(shared, experts)

    elif kind == "guide":
        own = cache(lambda: _sample(shared, experts))

        def sample(step: float) -> Tensor:
            if not step:
                return own()
            own_hz_N = 2 ** measure.log2_hz(own(), cfg.timebase.fps)[0]
            guide = speed_guide(cfg.timebase, shared.guiding_readout, own_hz_N, 2**step)
            return _sample(shared, experts, guide=guide)

    else:
        experts |= _trained(settings, way, shared, facts)

        def sample(step: float) -> Tensor:
            return _sample(shared, experts, strength=step)

    if way.beside:
        add_deltas(experts, stored_experts(settings, arm(settings.ours), shared))
    shown = {step: sample(step) for step in asked}
    middle = shown[min(asked, key=abs)]
    values = [measure.measure(shared.asked, shown[step], middle)[0] for step in asked]
    own = values[asked.index(0.0)]
    low, high = (np.log2(hz) for hz in BASE_HZ)
    fits_N = (own["hz_log2"] >= low) & (own["hz_log2"] <= high)
    clearest = (own["hz_share"] * fits_N).nan_to_num().argsort(descending=True)[:SHOWN]
    clips_ANFHW3 = torch.stack([shown[step][clearest].cpu() for step in asked])
    return {
        "format": FORMAT,
        "way": way.name,
        "seed": shared.seed,
        "model": cfg.model.id,
        "asked": list(asked),
        **facts,
        "kind": shared.scenes.kinds,
        "metrics": {name: [numbers(value[name]) for value in values] for name in KEPT},
    }, clips_ANFHW3


def _trained(
    settings: Settings, way: Way, shared: Seed, facts: dict[str, Any]
) -> dict[str, nn.Module]:
    made = Arm(way.name, TARGETS[way.target], Loss())
    more = ("lora.kind=tempo", f"data.speeds={list(SPEEDS)}")
    ranks = settings_ranks(settings)
    cfg = arm_config(made, shared.seed, ranks[way.target], (*settings.overrides, *more))
    training = clips_at_speeds(settings, shared)
    experts, flow = finetune_all(cfg, made, way.experts, training, shared.device)
    facts |= {"rank": cfg.lora.rank, "flow": flow}
    return experts


@torch.no_grad()
def add_deltas(experts: dict[str, nn.Module], tuned: dict[str, nn.Module]) -> None:
    """Add to the weights what the adapters of `tuned` change in them, at full strength."""
    for name, expert in experts.items():
        for path, layer in tuned[name].named_modules():
            if isinstance(layer, lora.RowLora):
                base = expert.get_submodule(path)
                base = base.base_layer if isinstance(base, lora.RowLora) else base
                base.weight += layer.get_delta_weight(lora.ADAPTER)


def _sample(
    shared: Seed,
    experts: dict[str, nn.Module],
    captions: list[str] | None = None,
    **more: Any,
) -> Tensor:
    text = shared.embedded(captions or toy.captions(shared.scenes))
    return videos.sample(shared.cfg, experts, shared.vae, shared.noise, text, **more)


@contextmanager
def stretched(experts: list[nn.Module], factor: float) -> Iterator[None]:
    """Within the block frame t of these transformers stands where frame factor * t stood."""
    before = [(expert.rope.freqs_cos, expert.rope.freqs_sin) for expert in experts]
    try:
        for expert in experts:
            rope = expert.rope
            places = torch.arange(len(rope.freqs_cos), dtype=torch.float64) * factor
            turns = THETA ** -(torch.arange(0, rope.t_dim, 2, dtype=torch.float64) / rope.t_dim)
            angle = torch.outer(places, turns).repeat_interleave(2, dim=1)
            for name, wave in (("freqs_cos", angle.cos()), ("freqs_sin", angle.sin())):
                table = getattr(rope, name).clone()
                table[:, : rope.t_dim] = wave.to(table)
                setattr(rope, name, table)
        yield
    finally:
        for expert, (cos, sin) in zip(experts, before, strict=True):
            expert.rope.freqs_cos, expert.rope.freqs_sin = cos, sin
