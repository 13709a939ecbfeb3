"""One arm with one seed: trained, sampled, measured, and left as a JSON file that is never redone.

Beside it lie the adapters, which the filtered videos are made with again, and a few clips for the
page. All arms of a seed share clips, captions and noise.
"""

import json
import logging
import math
import time
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from tempolora.config import Config, ConfigError
from tempolora.data.fit_readout import drawn_readout
from tempolora.files import replacing, write_json
from tempolora.model import lora, wan
from tempolora.model.encoders import WanEncoders
from tempolora.model.memory import free_memory
from tempolora.rhythm.readout import Readout
from tempolora.study import clips, measure, videos
from tempolora.study.arms import BASE, FILTERED, OURS, PRIMARY, Arm, arm, arm_config, matched_ranks
from tempolora.study.finetune import finetune, training_batches, with_adapters
from tempolora.train.step import Batch
from tempolora.variants import NEGATIVE_PROMPT

log = logging.getLogger(__name__)

FORMAT = 1
STRENGTHS = (-0.5, 0.0, 0.5, 1.0, 1.5)
SHOWN = (27, 1, 11, 23, 6, 17)  # a face that slides, a walker, a pan, a float, a stalk, a pendulum


@dataclass(frozen=True)
class Settings:
    """Where from, where to, how many. overrides: as `--set`, of every arm."""

    out: Path
    device: torch.device
    overrides: tuple[str, ...] = ()
    clips: int = 64
    samples: int = 256
    ours: str = OURS
    """The arm whose motion the filtered videos keep."""

    @cached_property
    def any_config(self) -> Config:
        return arm_config(Arm(BASE), 0, 1, self.overrides)

    def path(self, of: Arm, seed: int, suffix: str = ".json") -> Path:
        """Where results of an arm and a seed lie."""
        return record_path(self.out, self.any_config.model.id, of, seed, suffix)


class Seed:
    """What the arms of one seed share. Everything is made when it is first asked for."""

    def __init__(self, settings: Settings, seed: int) -> None:
        self.settings, self.seed = settings, seed
        self.cfg = arm_config(Arm(BASE), seed, 1, settings.overrides)
        self.device = settings.device
        self._batches: dict[str, list[Batch]] = {}

    @cached_property
    def vae(self) -> nn.Module:
        return wan.load_vae(self.cfg.model, self.device)

    @cached_property
    def text_parts(self) -> tuple[Any, nn.Module]:
        return wan.load_text(self.cfg.model, torch.device("cpu"))

    @cached_property
    def scenes(self) -> clips.toy.Scenes:
        return clips.unseen_scenes(self.settings.samples, self.seed)

    @cached_property
    def text(self) -> tuple[Tensor, Tensor]:
        """`embedded` captions, as the study says them."""
        return self.embedded(clips.said(self.scenes))

    def embedded(self, captions: list[str]) -> tuple[Tensor, Tensor]:
        """Padded embeddings of captions, and of the negative prompt as often."""
        prompts = [*captions, NEGATIVE_PROMPT]
        *said, negative = wan.encode_prompts(*self.text_parts, prompts)
        many = wan.pad_text(said), wan.pad_text([negative]).expand(len(said), -1, -1)
        return tuple(part.to(self.device) for part in many)

    @cached_property
    def noise(self) -> Tensor:
        return clips.paired_noise(self.cfg, len(self.scenes), self.seed).to(self.device)

    @cached_property
    def training(self) -> clips.TrainingClips:
        count = self.settings.clips
        return clips.training_clips(
            self.cfg, self.vae, self.text_parts, count, self.seed, self.device
        )

    def batches(self, expert: str) -> list[Batch]:
        """Of this expert's training; kept for the next arm."""
        if expert not in self._batches:
            args = self.cfg, expert, self.training, self.device
            self._batches[expert] = training_batches(*args)
        return self._batches[expert]

    @cached_property
    def asked(self) -> measure.Asked:
        return measure.Asked.of(self.scenes, self.drawn("decoded"), self.cfg.timebase)

    @cached_property
    def base(self) -> tuple[Tensor, Tensor]:
        """The base's videos and single frames."""
        experts = {
            name: wan.load_transformer(self.cfg.model, name, self.device)
            for name in self.cfg.experts
        }
        return self.sample(experts), self.sample(experts, first_only=True)

    @cached_property
    def guiding_readout(self) -> Readout:
        """What `tempolora sample` guides through where there is no data set."""
        coder = WanEncoders(self.cfg, self.device)
        readout = drawn_readout(self.cfg, coder)
        del coder
        free_memory(self.device)
        return readout

    def sample(
        self,
        experts: dict[str, nn.Module],
        strength: float | None = None,
        first_only: bool = False,
    ) -> Tensor:
        """Videos of the paired noise; first_only: single frames, of its first latent frame."""
        noise = self.noise[:, :, :1] if first_only else self.noise
        return videos.sample(self.cfg, experts, self.vae, noise, self.text, strength)

    def drawn(self, name: str) -> Tensor:
        """What was asked for, as drawn in a style, or "decoded": that through the VAE."""
        style = "flickering" if name.endswith("flickering") else "clean"
        drawn = clips.draw(self.cfg, self.scenes, self.device, style)
        if name.startswith("decoded"):
            return clips.decode(self.vae, clips.encode(self.vae, drawn))
        return drawn


def run(settings: Settings, arms: list[Arm], seeds: list[int], minutes: float, slot: str) -> int:
    """Measure what is not measured yet of this slot's share; the number of files written.

    slot: "k/n" takes every n-th of arms x seeds. No arm is begun that is not likely to be done in
    time, going by the longest so far.
    """
    share, shares = _slot(slot)
    (settings.out / Path(settings.any_config.model.id).name).mkdir(parents=True, exist_ok=True)
    started, longest, written = time.monotonic(), 0.0, 0
    shared: Seed | None = None
    for of, seed in [(of, seed) for seed in seeds for of in arms][share::shares]:
        if not _is_due(settings, of, seed):
            continue
        begun = time.monotonic()
        if begun + longest > started + 60 * minutes:
            log.info("time is up; the same command goes on")
            break
        if shared is None or shared.seed != seed:
            shared = None
            free_memory(settings.device)
            shared = Seed(settings, seed)
        record = run_arm(settings, of, shared)
        took = time.monotonic() - begun
        write_json(settings.path(of, seed), record | {"seconds": round(took, 1)})
        log.info("%s, seed %d: %.0f s", of.name, seed, took)
        longest, written = max(longest, took), written + 1
    return written


def run_arm(settings: Settings, of: Arm, shared: Seed) -> dict[str, Any]:
    """The record of one arm; writes its adapters and clips."""
    cfg, facts = _config(settings, of, shared.seed), {}
    experts = _tuned(settings, of, cfg, shared, facts) if of.is_tuned else {}
    if of.is_tuned:
        shown = shared.sample(experts, 1.0)
    elif of.name == BASE:
        shown = shared.base[0]
    elif of.name in FILTERED:
        shown = _filtered(settings, of, shared, facts)
    else:
        shown = shared.drawn(of.name)
    of_model = of.is_tuned or of.name in (BASE, *FILTERED)
    values, power_NK = measure.measure(shared.asked, shown, shared.base[0] if of_model else None)
    if of.is_tuned:
        single = shared.sample(experts, 1.0, first_only=True)
        values |= measure.stills(shared.asked, single, shared.base[1])
    elif of.name == BASE:
        values |= measure.stills(shared.asked, shared.base[1], shared.base[1])
    elif not of_model:
        values["warping_error"] = measure.warping_error(shared.asked, shown, clips.sizes(cfg))
    if of.is_tuned and of.name in PRIMARY:
        facts["knob"] = _knob(shared, experts, values["hz_log2"])
    if of.name in (*PRIMARY, settings.ours):
        with replacing(settings.path(of, shared.seed, ".clips.safetensors")) as path:
            chosen = [n for n in SHOWN if n < len(shown)] or [0]
            save_file({"clips": shown[chosen].cpu().contiguous()}, path)
    scenes = shared.scenes
    return {
        "format": FORMAT,
        "arm": of.name,
        "seed": shared.seed,
        "config": _settings_of(settings, of, shared.seed),
        **facts,
        "scenes": {
            "kind": scenes.kinds,
            "shape": [clips.toy.SHAPES[n] for n in scenes.shape_N.tolist()],
            "texture": [clips.toy.TEXTURES[n] for n in scenes.texture_N.tolist()],
            "hz": scenes.hz_N.tolist(),
            "caption": clips.said(scenes),
        },
        "metrics": {name: numbers(value_N) for name, value_N in values.items()},
        "spectrum": {
            "hz": list(cfg.timebase.bins_hz),
            "log2": numbers(power_NK.clamp(min=1e-12).log2().mean(0)),
        },
    }


def record_path(out: Path, model: str, of: Arm, seed: int, suffix: str = ".json") -> Path:
    """Where results of an arm and a seed lie: a folder for each model."""
    return out / Path(model).name / f"{of.file}-{seed}{suffix}"


def read_records(out: Path) -> Iterator[dict[str, Any]]:
    """Every record of a folder. Raises ConfigError for one that is none."""
    for path in sorted(out.glob("*/*.json")):
        try:
            record = json.loads(path.read_text("utf-8"))
            if record["format"] != FORMAT:
                raise ValueError
        except (ValueError, KeyError, TypeError):
            raise ConfigError(f"--out: {path} is no record of this study; move it away") from None
        yield record


def _slot(slot: str) -> tuple[int, int]:
    share, _, shares = slot.partition("/")
    if share.isdecimal() and shares.isdecimal() and int(share) < int(shares):
        return int(share), int(shares)
    raise ConfigError(f"--slot: given {slot!r}; give k/n with k from 0 to n - 1, such as 0/4")


def _config(settings: Settings, of: Arm, seed: int) -> Config:
    rank = settings_ranks(settings)[of.name.split("/")[0]] if of.is_tuned else 1
    return arm_config(of, seed, rank, settings.overrides)


def settings_ranks(settings: Settings) -> dict[str, int]:
    """The rank of each target for this model."""
    return matched_ranks(wan.meta_transformer(settings.any_config.model, "high"))


def _settings_of(settings: Settings, of: Arm, seed: int) -> dict[str, Any]:
    """All that a record depends on, as JSON gives it back."""
    study = {"clips": settings.clips, "samples": settings.samples}
    if of.name in FILTERED:
        study["ours"] = settings.ours
    return _config(settings, of, seed).model_dump(mode="json") | {"study": study}


def _is_due(settings: Settings, of: Arm, seed: int) -> bool:
    """Whether this is still to be measured and what it needs is there."""
    path = settings.path(of, seed)
    if path.is_file():
        refuse_other_settings(path, _settings_of(settings, of, seed))
        return False
    if of.name in FILTERED:
        source = FILTERED[of.name][0]
        needs = [settings.ours] + [source] * (source != BASE)
        missing = [n for n in needs if not settings.path(arm(n), seed).is_file()]
        if missing:
            log.info("%s, seed %d: waits for %s", of.name, seed, " and ".join(missing))
            return False
    return True


def refuse_other_settings(path: Path, now: dict[str, Any]) -> None:
    """Raise ConfigError where a record was measured with others than these, section by section."""
    stored = json.loads(path.read_text("utf-8")).get("config", {})
    for section in now:
        if stored.get(section) != now[section]:
            raise ConfigError(
                f"--out: {path} was measured with other settings ({section}); name another "
                "folder, or move that file away"
            )


def _tuned(
    settings: Settings, of: Arm, cfg: Config, shared: Seed, facts: dict[str, Any]
) -> dict[str, nn.Module]:
    """Both experts, fine-tuned; their adapters are written."""
    experts, adapters = {}, {}
    facts |= {"rank": cfg.lora.rank, "parameters": {}, "flow": {}}
    for name in cfg.experts:
        experts[name], facts["flow"][name] = finetune(
            cfg, of, name, shared.training, shared.batches(name), shared.device
        )
        weights = lora.lora_parameters(experts[name])
        facts["parameters"][name] = sum(weight.numel() for weight in weights.values())
        adapters |= {f"{name}.{key}": w.detach().cpu() for key, w in weights.items()}
    with replacing(settings.path(of, shared.seed, ".safetensors")) as path:
        save_file(adapters, path)
    return experts


def _filtered(settings: Settings, of: Arm, shared: Seed, facts: dict[str, Any]) -> Tensor:
    """The base's or plain's videos, smoothed in time until they move or flicker as ours do."""
    name, measured = FILTERED[of.name]
    shown = shared.base[0]
    if name != BASE:
        shown = shared.sample(stored_experts(settings, arm(name), shared), 1.0)
    ours = settings.path(arm(settings.ours), shared.seed)
    wanted = json.loads(ours.read_text("utf-8"))["metrics"][measured]

    def left_at(width_frames: float) -> float:
        smooth = videos.lowpass(shown, width_frames)
        return measure.log2_power(smooth, shared.cfg.timebase)[measured].mean().item()

    width = videos.width_that_leaves(left_at, sum(wanted) / len(wanted))
    facts["filter"] = {"width_frames": width, measured: "as " + settings.ours}
    return videos.lowpass(shown, width)


def stored_experts(settings: Settings, of: Arm, shared: Seed) -> dict[str, nn.Module]:
    """Both experts with the adapters that this arm has left."""
    cfg = _config(settings, of, shared.seed)
    adapters = load_file(settings.path(of, shared.seed, ".safetensors"))
    experts = {name: with_adapters(cfg, of, name, shared.device) for name in cfg.experts}
    for name, expert in experts.items():
        own = {k.removeprefix(f"{name}."): w for k, w in adapters.items() if k.startswith(name)}
        lora.load_lora_state(expert, own)
    return experts


def _knob(shared: Seed, experts: dict[str, nn.Module], at_one_N: Tensor) -> dict[str, Any]:
    """log2 of the dominant frequency of each sample at each strength of the adapters."""
    fps = shared.cfg.timebase.fps
    found = []
    for strength in STRENGTHS:
        if strength == 1:
            found.append(at_one_N)
            continue
        shown = shared.sample(experts, strength) if strength else shared.base[0]
        found.append(measure.log2_hz(shown, fps)[0])
    return {"strength": list(STRENGTHS), "hz_log2": [numbers(value_N) for value_N in found]}


def numbers(values: Tensor) -> list[float | None]:
    """As JSON has them: six digits, and null for what is not a number."""
    return [float(f"{v:.6g}") if math.isfinite(v) else None for v in values.tolist()]
