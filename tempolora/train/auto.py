"""The planner in a run: what `auto` stands for here, and advice when GPU memory ends."""

import logging
import os
from dataclasses import replace
from types import TracebackType
from typing import Any, Self

import torch

from tempolora.config import Config, ConfigError
from tempolora.train.checkpoint import Checkpoint
from tempolora.train.plan import (
    AUTO_KEYS,
    SPARE,
    Card,
    Settings,
    candidates,
    card_of,
    changed,
    fitting,
    in_words,
    key_of,
    next_setting,
    other_peaks,
    preference,
    smallest,
    with_engine,
)
from tempolora.train.rates import GIB, GPUS, H200, Gpu
from tempolora.train.world import World, pick_device

log = logging.getLogger(__name__)

WITHOUT_GPU = {"model.base": "bf16", "model.placement": "gpu", "train.checkpointing": "full"}
"""What auto stands for on a CPU, where memory is the machine's."""
FP8_SINCE = (8, 9)  # compute capability


def card_here(world: World) -> Card:
    """This run's GPUs and host, by what is free on the one that has least."""
    local = int(os.environ.get("LOCAL_WORLD_SIZE", world.size))
    host = _free_host_bytes() * world.size / local
    return Card((1 - SPARE) * world.free_bytes(), world.size, host, gpu_of(world.device))


def _free_host_bytes() -> float:
    with open("/proc/meminfo", encoding="ascii") as file:
        sizes = dict(line.split(":") for line in file)
    return 1024 * float(sizes["MemAvailable"].split()[0])


def gpu_of(device: torch.device) -> Gpu:
    """A GPU whose figures are known, or one as fast as an H200: their order is what counts here."""
    if device.type != "cuda":
        return H200
    name = torch.cuda.get_device_name(device)
    known = next((gpu for key, gpu in GPUS.items() if key in name.replace(" ", "")), H200)
    fp8 = torch.cuda.get_device_capability(device) >= FP8_SINCE
    return replace(known, name=name, fp8=fp8)


def card_of_this_run(cfg: Config, processes: int, local_rank: int) -> Card | None:
    """The GPUs of several processes, all taken to be like this one's own; None without a GPU.

    By their whole memory, not by what is free, so that all processes see the same.
    """
    if processes == 1 or not torch.cuda.is_available():
        return None
    device = pick_device(local_rank, cfg.parallel.gpu_memory_gib)
    memory = World(0, 1, device, cfg.parallel.gpu_memory_gib).gpu_bytes
    return card_of(memory, gpus=processes, gpu=gpu_of(device))


def resolve(
    cfg: Config, world: World, starts: dict[str, Checkpoint], deepspeed: bool = False
) -> Config:
    """The configuration with nothing left at "auto" but the engine.

    starts: checkpoints to go on from, whose choice is kept. deepspeed: it is the engine.
    """
    open_keys = [key for key in AUTO_KEYS if key_of(cfg, key) == "auto"]
    if not open_keys:
        return cfg
    asked = with_engine(cfg, "deepspeed") if deepspeed else cfg
    for start in starts.values():
        found = _before(start, open_keys)
        if len(found) == len(open_keys) and _goes(asked, found):
            log.info("auto: %s, as in %s", in_words(found), start.folder)
            return changed(cfg, found)
        if "model.base" in found:  # which changes numbers
            base = changed(cfg, {"model.base": found["model.base"]})
            return resolve(base, world, {}, deepspeed)
    if world.device.type != "cuda":
        found = {key: WITHOUT_GPU[key] for key in open_keys}
        log.info("auto: %s: there is no GPU", in_words(found))
        return changed(cfg, found)
    card = card_here(world)
    plans = fitting(asked, card)
    plan = plans[0] if plans else smallest(asked, card)
    found = {key: plan.settings.keys()[key] for key in open_keys}
    why = "the fastest that fits" if plans else "the smallest there is, though more than that"
    log.info(
        "auto: %s: predicted to take %.1f GiB of %.1f free, %s",
        in_words(found),
        plan.peak / GIB,
        card.room / (1 - SPARE) / GIB,
        why,
    )
    return changed(cfg, found)


def _before(start: Checkpoint, keys: list[str]) -> dict[str, Any]:
    content = start.state["config"]
    found = {key: content[key.split(".")[0]].get(key.split(".")[1]) for key in keys}
    return {key: value for key, value in found.items() if value not in (None, "auto")}


def _goes(cfg: Config, keys: dict[str, Any]) -> bool:
    """Whether another engine than the checkpoint's bears its settings too."""
    try:
        changed(cfg, keys)
    except ConfigError:
        return False
    return True


def resolve_beside(cfg: Config, device: torch.device, phase: str) -> Config:
    """As `resolve`, for what runs on one GPU without training. phase: "precompute" or "sampling".
    What is of training alone is left, or set to what goes with any placement.

    bf16 on the GPU where that fits, fp8 where only that does, else weights on the host.
    """
    open_keys = [k for k in AUTO_KEYS if k.startswith("model.") and key_of(cfg, k) == "auto"]
    if not open_keys:
        return cfg
    if device.type != "cuda":
        return changed(cfg, {key: WITHOUT_GPU[key] for key in open_keys})
    card = card_here(World(0, 1, device, cfg.parallel.gpu_memory_gib))
    level = {"train.checkpointing": "full", "train.kept_blocks": None, "train.host_blocks": 0}
    if phase == "precompute" and cfg.model.base == "nf4":
        level["model.base"] = "bf16"  # what its encoders have anyway, and can be streamed in
    one = changed(with_engine(cfg, "plain"), level)
    plans = sorted(candidates(one, card), key=preference(one))

    def peak(settings: Settings) -> float:
        peaks = other_peaks(one, settings)
        return max((size for name, size in peaks.items() if name.startswith(phase)), default=0.0)

    fits = [p.settings for p in plans if peak(p.settings) <= card.room]
    chosen = fits[0] if fits else min((p.settings for p in plans), key=peak)
    found = {key: chosen.keys()[key] for key in open_keys}
    log.info("auto: %s for %s: %.1f GiB predicted", in_words(found), phase, peak(chosen) / GIB)
    return changed(one, found)


class MemoryAdvice:
    """A context in which running out of GPU memory before the first step is done is the user's
    mistake, told together with the planner's next setting. It may be entered again."""

    def __init__(self, cfg: Config, engine: str, world: World) -> None:
        self._cfg, self._card = with_engine(cfg, engine), card_here(world)
        self._armed = True

    def passed(self) -> None:
        """The first step is done: what comes later is no matter of settings."""
        self._armed = False

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        if self._armed and isinstance(error, torch.OutOfMemoryError):
            raise ConfigError(self.sentence()) from error

    def sentence(self) -> str:
        """What happened and what to set."""
        now = min(candidates(self._cfg, self._card), key=preference(self._cfg))
        keys = {"train.checkpointing": now.settings.checkpointing}
        if now.settings.checkpointing == "selective":
            keys["train.kept_blocks"] = now.settings.kept_blocks
        begin = f"out of GPU memory in the first step with {in_words(keys)}"
        found = next_setting(self._cfg, self._card, below=now.peak)
        if found is None:
            return f"{begin}; no setting and no smaller clip is predicted to fit: use a larger GPU"
        other, plan = found
        return (
            f"{begin}, predicted at {now.peak / GIB:.1f} GiB; set {in_words(other)}, predicted at "
            f"{plan.peak / GIB:.1f} GiB"
        )
