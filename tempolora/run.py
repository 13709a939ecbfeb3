"""One training run from shards to report: its experts, then files, videos and the page."""

import json
import logging
from collections.abc import Callable, Iterator
from contextlib import nullcontext
from functools import partial
from pathlib import Path

import torch
from torch import Tensor

from tempolora import __version__
from tempolora.config import Config
from tempolora.data.shards import ShardReader, fingerprint, load_prompt
from tempolora.files import write_json
from tempolora.launched import check_engine, place, uses_deepspeed
from tempolora.model import wan
from tempolora.model.location import PART_OF, part_config
from tempolora.model.targets import check_lora
from tempolora.results.export import export_lora
from tempolora.results.names import lora_file_name, video_file_name
from tempolora.results.report import write_report
from tempolora.results.sample import loras_in, sample_video
from tempolora.train.auto import card_of_this_run, resolve, resolve_beside
from tempolora.train.checkpoint import Checkpoint, open_checkpoint, set_newer_aside
from tempolora.train.deterministic import make_deterministic
from tempolora.train.groups import Group
from tempolora.train.heartbeat import LOADING, Heartbeat, record_flights
from tempolora.train.loop import check_objective, check_sound, train_expert
from tempolora.train.metrics import join_metrics
from tempolora.train.plan import changed
from tempolora.train.resume import checkpoint_root, find_resume
from tempolora.train.speeds import speed_groups
from tempolora.train.split import shares
from tempolora.train.stop import Stopped, StopSignal
from tempolora.train.validate import split_clips
from tempolora.train.work import check_heads
from tempolora.train.world import join_world, leave_world
from tempolora.variants import NEGATIVE_PROMPT

log = logging.getLogger(__name__)


def train_and_report(cfg: Config, resume: str, stop: StopSignal | None = None) -> None:
    """Train all experts of the configuration and leave the results in output.dir.

    resume: "auto", "none" or a checkpoint folder. stop: as entered before the imports. All mistakes
    that settings and files show are raised, as ConfigError, before a model is loaded. Raises
    Stopped where a signal asked for it; the checkpoint is then written, LoRA files, videos and
    report are not. Raises TimeoutError naming a process that the others waited for in vain, and
    GroupFailed where the other of two expert groups failed.
    """
    with stop or StopSignal() as stop:
        finish = _train(cfg, resume, stop)
    finish()


def _train(cfg: Config, resume: str, stop: StopSignal) -> Callable[[], None]:
    """The part that signals do not interrupt; what is left to do on this process."""
    out = Path(cfg.output.dir)
    rank, processes, local_rank = place()
    check_engine(cfg, processes)
    for expert in cfg.experts:
        check_lora(cfg.lora, cfg.timebase, part_config(cfg.model, PART_OF[expert]))
        check_heads(cfg, expert)
    # The VAE tells models apart; training has no other need of the text encoder's files.
    vae = {"vae": wan.fingerprint(cfg.model, "vae")}
    reader = ShardReader(Path(cfg.data.shards), fingerprint(cfg, vae))
    speed_groups(cfg.lora.kind, reader, split_clips(reader.keys, cfg.data.held_out)[0])
    for expert in cfg.experts:
        log.info("%s: %s", expert, check_objective(cfg, expert))
    if any(cfg.rhythm.weight("sound", expert) for expert in cfg.experts):
        log.info("%s", check_sound(cfg, reader))
    videos = list(_video_inputs(cfg, reader)) if cfg.output.sample_steps else []
    sizes = shares(cfg, processes, card_of_this_run(cfg, processes, local_rank))
    starts = find_resume(cfg, resume, sizes or dict.fromkeys(cfg.experts, processes))
    if cfg.train.deterministic:
        make_deterministic()
    if processes > 1 and torch.cuda.is_available():
        record_flights(out / "flight_recorder")
    with Group(sizes) if sizes else nullcontext() as group:
        trained, device = _train_experts(cfg, resume, reader, starts, group, stop)
    return partial(_finish, cfg, trained, videos, device) if rank == 0 else lambda: None


def _train_experts(
    cfg: Config,
    resume: str,
    reader: ShardReader,
    starts: dict[str, Checkpoint],
    group: Group | None,
    stop: StopSignal,
) -> tuple[Config, torch.device]:
    """Train the group's expert, or without groups one after the other, and write their LoRA files.

    Returns the configuration as it was resolved, and this process's device.
    """
    out, minutes = Path(cfg.output.dir), cfg.parallel.timeout_minutes
    seat = group and group.seat
    world = join_world(
        uses_deepspeed(cfg),
        cfg.parallel.gpu_memory_gib,
        cfg.parallel.context,
        seat,
        timeout_minutes=LOADING * minutes,
    )
    experts = (group.expert,) if group else cfg.experts
    ours = {expert: start for expert, start in starts.items() if expert in experts}
    cfg = resolve(cfg, world, ours, uses_deepspeed(cfg))
    check_engine(cfg, world.size)  # with what auto has become
    if group.is_first if group else world.is_main:
        _prepare_folder(cfg, out, resume, starts)
    if group:
        group.await_folder()
    else:
        world.barrier()
    try:
        with Heartbeat(world, minutes) as heart:
            for expert in experts:
                last = train_expert(cfg, expert, reader, world, starts.get(expert), stop, heart)
                if world.is_main:
                    log.info("wrote %s", export_checkpoint(open_checkpoint(last), out))
    except Stopped:
        leave_world()
        raise
    leave_world()
    return cfg, world.device


def _finish(
    asked: Config, trained: Config, videos: list[dict[str, Tensor]], device: torch.device
) -> None:
    """Videos and report, on the first process. asked: before "auto" became what was trained."""
    join_metrics(Path(asked.output.dir))
    if asked.output.sample_steps:
        # Videos are made on one GPU, with the base that was trained on.
        base = changed(asked, {"model.base": trained.model.base})
        _write_videos(resolve_beside(base, device, "sampling"), videos, device)
    log.info("wrote %s", write_report(Path(asked.output.dir)))


def _prepare_folder(cfg: Config, out: Path, resume: str, starts: dict[str, Checkpoint]) -> None:
    """Make output.dir ready: no older results in the way, this run's settings in it."""
    out.mkdir(parents=True, exist_ok=True)
    if resume == "none":
        _set_aside(out)
    join_metrics(out)
    for expert, start in starts.items():
        set_newer_aside(checkpoint_root(cfg, expert), start.state["step"])
    write_json(out / "config.json", cfg.model_dump(mode="json"))


def export_checkpoint(found: Checkpoint, folder: Path | None = None) -> Path:
    """Write a checkpoint's LoRA, its moving average where one was kept; the file written.

    folder: takes the file under its contracted name; by default the output.dir it was trained in.
    """
    state = found.state
    cfg = Config.model_validate_json(json.dumps(state["config"]))
    path = (folder or Path(cfg.output.dir)) / lora_file_name(state["expert"], cfg.lora.kind)
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
            "kind": cfg.lora.kind,
            "strength": STRENGTH[cfg.lora.kind],
            "fps": f"{cfg.timebase.fps:g}",
            "steps": str(state["step"]),
            "data": state["data"],
        },
    )
    return path


STRENGTH = {
    "rhythm": "1 as trained, 0 the base model",
    "tempo": "log2 of the speed: 1 is twice as fast, -1 half as fast, 0 the base model",
}
"""What a file's header says of the strength at which a LoRA is used."""

RESULTS = (
    "checkpoints",
    "compared",
    "config.json",
    "metrics*.jsonl",
    "report.html",
    "sample_*_lora*.mp4",
    "tensorboard",
    "wan22_*_lora*.safetensors",
)
"""What a run leaves in output.dir; anything else there is not ours to move."""


def _set_aside(out: Path) -> None:
    """Move an earlier run's results into previous-N, so that starting over loses nothing."""
    results = sorted({path for pattern in RESULTS for path in out.glob(pattern)})
    if not results:
        return
    numbers = [int(p.name[9:]) for p in out.glob("previous-*") if p.name[9:].isdecimal()]
    aside = out / f"previous-{max(numbers, default=0) + 1}"
    aside.mkdir()
    for path in results:
        path.rename(aside / path.name)
    log.info("the earlier results are in %s", aside)


def _video_inputs(cfg: Config, reader: ShardReader) -> Iterator[dict[str, Tensor]]:
    """What `sample_video` needs for each prompt beside the models, embedded at precompute."""
    first = reader.read(next((n for n in range(len(reader)) if reader.speed(n) == 1), 0))
    shards = Path(cfg.data.shards)
    given = {"negative_LD": load_prompt(shards, NEGATIVE_PROMPT)}
    if cfg.task == "i2v" and cfg.variant.per_token_time:
        given["first_latent"] = first.latents["latents"][:, :1].float()
    elif cfg.task == "i2v":
        given["condition"] = first.latents["condition"].float()
    for text_LD in [load_prompt(shards, p) for p in cfg.output.prompts] or [first.text]:
        yield {"text_LD": text_LD, **given}


def _write_videos(cfg: Config, videos: list[dict[str, Tensor]], device: torch.device) -> None:
    """Each prompt with the same seed without and with the LoRA files."""
    out = Path(cfg.output.dir)
    for name, loras in {
        "before": {},
        "after": loras_in(out, cfg.variant.experts, cfg.lora.kind),
    }.items():
        for number, given in enumerate(videos, start=1):
            sample_video(
                cfg,
                out / video_file_name(name, number),
                **given,
                loras=loras,
                seed=cfg.output.sample_seed,
                steps=cfg.output.sample_steps,
                device=device,
            )
