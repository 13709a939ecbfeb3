"""The demo: what the rhythm terms change, on six captions whose looks are in no training clip.

Two LoRAs are trained on the same clips, in as many steps, from the same seed: ours with the rhythm
terms and plain with their weights at 0. Base, plain and ours then make a video of each caption from
the same noise, and these are measured beside the scene itself, drawn clean and passed through the
VAE, which blurs at this size.
"""

import json
import logging
from collections.abc import Mapping
from pathlib import Path

import torch
from torch import Tensor, nn

from tempolora.config import Config, ConfigError
from tempolora.data import toy
from tempolora.data.video import write_mp4
from tempolora.model import wan
from tempolora.results.compare import check_measurable, measure_arms
from tempolora.results.compare_page import ARMS, COMPARED
from tempolora.results.export import apply_lora_file
from tempolora.results.report import write_report
from tempolora.results.sample import draw_noise, loras_in, sample_latents
from tempolora.run import train_and_report
from tempolora.train.auto import resolve_beside
from tempolora.train.terms import KEYS
from tempolora.train.world import pick_device
from tempolora.variants import NEGATIVE_PROMPT

log = logging.getLogger(__name__)

PLAIN = "plain"
"""The folder in output.dir with the run without rhythm terms."""

SCENES = (
    toy.scene("slide", 1.5, shape="disc", texture="flat", tint=toy.COLOURS["red"], seed=1),
    toy.scene("walk", 1.6, shape="disc", texture="flat", tint=toy.COLOURS["green"], seed=2),
    toy.scene("pan", 0.8, shape="square", texture="flat", tint=toy.COLOURS["yellow"], seed=3),
    toy.scene("pulse", 1.6, shape="face", tint=toy.COLOURS["white"], seed=4),
    toy.scene("water", 1.0, shape="square", texture="flat", tint=toy.COLOURS["orange"], seed=5),
    toy.scene("pendulum", 1.0, shape="disc", texture="flat", tint=toy.COLOURS["blue"], seed=6),
)


def captions() -> dict[str, str]:
    """File name -> what is asked for, with its tempo."""
    scenes = toy.Scenes.cat(SCENES)
    return dict(zip(_file_names(), toy.captions(scenes, tempo_words=True), strict=True))


def check_demo(cfg: Config) -> None:
    """Raise ConfigError for what the demo cannot show, before anything is drawn or loaded."""
    if cfg.task != "t2v":
        raise ConfigError(
            f"model.task: the demo's videos start from words alone, not {cfg.task}; set it to t2v, "
            "or use `tempolora train`"
        )
    if cfg.output.sample_steps:
        check_measurable(cfg)


def demo(cfg: Config) -> None:
    """Train plain LoRA and ours, sample and measure the captions; all of it into output.dir.

    What was trained before is not trained again. With output.sample_steps 0 nothing is compared,
    and plain LoRA not trained. Raises as `train_and_report`.
    """
    out = Path(cfg.output.dir)
    if cfg.output.sample_steps:
        log.info("plain LoRA, without the rhythm terms:")
        train_and_report(without_rhythm(cfg), "auto")
    log.info("ours:")
    train_and_report(cfg, "auto")
    if cfg.output.sample_steps:
        device = pick_device(0, cfg.parallel.gpu_memory_gib)
        _write_videos(resolve_beside(cfg, device, "sampling"), out / COMPARED, device)
        measure_arms(cfg, out / COMPARED, captions())
        log.info("wrote %s with the comparison", write_report(out))


def without_rhythm(cfg: Config) -> Config:
    """The same training with the flow loss alone, in a folder of its own and without videos."""
    settings = cfg.model_dump(mode="json")
    settings["rhythm"] |= {f"{key}_weight": 0.0 for key in KEYS.values()} | {"rollout_every": 0}
    settings["output"] |= {"dir": str(Path(cfg.output.dir) / PLAIN), "sample_steps": 0}
    return Config.model_validate_json(json.dumps(settings))


@torch.no_grad()
def _write_videos(cfg: Config, folder: Path, device: torch.device) -> None:
    """One folder an arm, in it a video for each caption."""
    out, experts = Path(cfg.output.dir), cfg.variant.experts
    loras = {"base": {}, "plain": loras_in(out / PLAIN, experts), "ours": loras_in(out, experts)}
    tokenizer, encoder = wan.load_text(cfg.model, device)
    text = wan.encode_prompts(tokenizer, encoder, [*captions().values(), NEGATIVE_PROMPT])
    del tokenizer, encoder
    vae = wan.load_vae(cfg.model, device)
    for arm in ARMS:
        latents = _drawn(cfg, vae) if arm == "clean" else _sampled(cfg, text, loras[arm], device)
        (folder / arm).mkdir(parents=True, exist_ok=True)
        for name, frames_FHW3 in zip(_file_names(), wan.decode_video(vae, latents), strict=True):
            write_mp4(folder / arm / name, frames_FHW3.cpu().numpy(), cfg.timebase.fps)
        log.info("wrote %d videos into %s", len(SCENES), folder / arm)


def _drawn(cfg: Config, vae: nn.Module) -> Tensor:
    """Latents of the scenes that the captions ask for, (B, C, T, H, W)."""
    data = cfg.data
    frames_BFHW3 = toy.render(
        toy.Scenes.cat(SCENES),
        fps=cfg.timebase.fps,
        num_frames=data.num_frames,
        height=data.height,
        width=data.width,
    )
    return wan.encode_video(vae, frames_BFHW3)


def _sampled(
    cfg: Config, text: list[Tensor], loras: Mapping[str, Path], device: torch.device
) -> Tensor:
    """Latents (B, C, T, H, W) of all captions at once; text: theirs, then the negative prompt's."""

    def load_expert(name: str) -> nn.Module:
        transformer = wan.load_transformer(cfg.model, name, device)
        if name in loras:
            apply_lora_file(transformer, loras[name])
        return transformer.eval()

    *asked, negative = text
    return sample_latents(
        load_expert,
        cfg.variant,
        draw_noise((len(asked), *cfg.latent_shape), cfg.output.sample_seed).to(device),
        wan.pad_text(asked).to(device),
        wan.pad_text([negative] * len(asked)).to(device),
        steps=cfg.output.sample_steps,
    )


def _file_names() -> list[str]:
    return [f"{scene.kinds[0]}.mp4" for scene in SCENES]
