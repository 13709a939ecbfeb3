"""One training run from shards to report: every expert in turn, then files, videos and the page."""

import json
import logging
from pathlib import Path

import torch
from torch import Tensor

from tempolora import __version__
from tempolora.config import Config
from tempolora.data.shards import ShardReader, fingerprint, load_prompt
from tempolora.files import write_json
from tempolora.model.encoders import encoder_fingerprints
from tempolora.results.export import export_lora, lora_file_name
from tempolora.results.report import write_report
from tempolora.results.sample import loras_in, sample_video
from tempolora.train.checkpoint import Checkpoint, open_checkpoint
from tempolora.train.engine import uses_deepspeed
from tempolora.train.loop import train_expert
from tempolora.train.resume import find_resume
from tempolora.train.world import join_world, leave_world, place
from tempolora.variants import NEGATIVE_PROMPT

log = logging.getLogger(__name__)


def train_and_report(cfg: Config, resume: str) -> None:
    """Train all experts of the configuration and leave the results in output.dir.

    resume: "auto", "none" or a checkpoint folder. All mistakes that settings and files show are
    raised, as ConfigError, before a model is loaded.
    """
    out = Path(cfg.output.dir)
    reader = ShardReader(Path(cfg.data.shards), fingerprint(cfg, encoder_fingerprints(cfg.model)))
    given = _video_inputs(cfg, reader)
    _, size, _ = place()
    starts = {expert: find_resume(cfg, expert, resume, size) for expert in cfg.experts}
    world = join_world(uses_deepspeed(cfg))
    if world.is_main:
        if resume == "none":
            _set_aside(out)
        out.mkdir(parents=True, exist_ok=True)
        write_json(out / "config.json", cfg.model_dump(mode="json"))
    world.barrier()
    for expert in cfg.experts:
        last = train_expert(cfg, expert, reader, world, starts[expert])
        if world.is_main:
            log.info("wrote %s", export_checkpoint(open_checkpoint(last), out))
    leave_world()
    if world.is_main:
        if cfg.output.sample_steps:
            _write_videos(cfg, given, world.device)
        log.info("wrote %s", write_report(out))


def export_checkpoint(found: Checkpoint, folder: Path, path: Path | None = None) -> Path:
    """Write a checkpoint's LoRA, its moving average where one was kept; the file written.

    folder: takes the file under its contracted name unless `path` names another.
    """
    state = found.state
    cfg = Config.model_validate(state["config"], strict=False)
    path = path or folder / lora_file_name(state["expert"])
    export_lora(
        found.ema() or found.lora(),
        path,
        lora=cfg.lora,
        rows=state["rows"],
        num_heads=state["num_heads"],
        head_dim=state["head_dim"],
        metadata={
            "format": "pt",
            "tempolora": __version__,
            "config": json.dumps(state["config"], ensure_ascii=False),
            "base_model": cfg.model.id,
            "variant": cfg.model.variant,
            "expert": state["expert"],
            "fps": f"{cfg.timebase.fps:g}",
            "steps": str(state["step"]),
            "data": state["data"],
        },
    )
    return path


def _set_aside(out: Path) -> None:
    """Move an earlier run's results into previous-N, so that starting over loses nothing."""
    results = [path for path in out.glob("*") if not path.name.startswith("previous-")]
    if results:
        aside = out / f"previous-{len(list(out.glob('previous-*'))) + 1}"
        aside.mkdir()
        for path in results:
            path.rename(aside / path.name)
        log.info("the earlier results are in %s", aside)


def _video_inputs(cfg: Config, reader: ShardReader) -> dict[str, Tensor]:
    """What `sample_video` needs beside the models, all of it embedded at precompute."""
    first = reader.read(0)
    shards = Path(cfg.data.shards)
    text_LD = load_prompt(shards, cfg.output.prompts[0]) if cfg.output.prompts else first.text
    given = {"text_LD": text_LD, "negative_LD": load_prompt(shards, NEGATIVE_PROMPT)}
    if cfg.task == "i2v" and cfg.variant.per_token_time:
        given["first_latent"] = first.latents["latents"][:, :1].float()
    elif cfg.task == "i2v":
        given["condition"] = first.latents["condition"].float()
    return given


def _write_videos(cfg: Config, given: dict[str, Tensor], device: torch.device) -> None:
    """The same seed without and with the LoRA files."""
    out = Path(cfg.output.dir)
    pairs = {"before": {}, "after": loras_in(out, cfg.variant.experts)}
    for name, loras in pairs.items():
        sample_video(
            cfg,
            out / f"sample_{name}_lora.mp4",
            **given,
            loras=loras,
            seed=cfg.output.sample_seed,
            steps=cfg.output.sample_steps,
            device=device,
        )
