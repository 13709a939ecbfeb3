"""Noise and a prompt -> an mp4: the trained model at work, with the sampler Wan itself uses.

Comes after training: the loop takes its before and after videos from `sample_video` with text
that was embedded at precompute, the command `tempolora sample` starts from a prompt. Text
encoder, experts and VAE follow each other in memory and never meet there.
"""

import logging
import math
import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from diffusers import UniPCMultistepScheduler
from PIL import Image, ImageOps
from torch import Tensor, nn

from tempolora.config import Config, ConfigError
from tempolora.data.soundtrack import RATE_HZ
from tempolora.data.video import write_mp4
from tempolora.model.memory import free_memory
from tempolora.model.wan import (
    condition_channels,
    decode_video,
    encode_condition,
    encode_prompts,
    encode_video,
    load_text,
    load_transformer,
    load_vae,
    meta_transformer,
    pad_text,
    predict_velocity,
)
from tempolora.progress import progress
from tempolora.results.export import apply_lora_file, check_lora_file, read_metadata
from tempolora.results.guide import Retime, Rhythm, heard, prepare
from tempolora.results.names import EXPERTS, lora_file_name
from tempolora.rhythm.guidance import Guide
from tempolora.variants import NEGATIVE_PROMPT, Variant

logger = logging.getLogger(__name__)

TRAIN_TIMESTEPS = 1000


@dataclass(frozen=True)
class Tempo:
    """Tempo adapters, expert -> LoRA file, and the speed they are asked for; 1 changes nothing."""

    loras: Mapping[str, Path]
    speed: float


def expert_at(variant: Variant, timestep: int) -> tuple[str, float]:
    """The expert that works at a timestep of 0..1000, and its guidance scale."""
    low_guidance, high_guidance = variant.guidance
    if variant.boundary is None:
        return "single", high_guidance
    if timestep >= variant.boundary * TRAIN_TIMESTEPS:
        return "high", high_guidance
    return "low", low_guidance


def draw_noise(shape: Sequence[int], seed: int) -> Tensor:
    """Standard normal fp32 of `shape`, drawn on the CPU: a seed means the same on every device."""
    return torch.randn(tuple(shape), generator=torch.Generator().manual_seed(seed))


@torch.no_grad()
def sample_latents(
    load_expert: Callable[[str], nn.Module],
    variant: Variant,
    noise_BCTHW: Tensor,
    text_BLD: Tensor,
    negative_BLD: Tensor,
    *,
    steps: int,
    condition_BCTHW: Tensor | None = None,
    first_BC1HW: Tensor | None = None,
    guide: Callable[[Tensor, float], Tensor] | None = None,
) -> Tensor:
    """Integrate the flow from noise to normalised latents (B, C, T, H, W), fp32.

    UniPC (arXiv 2302.04867) on Wan's shifted sigmas, in `steps` steps, with classifier-free
    guidance in two forward passes one after the other, so that memory stays that of one. The
    history of the solver passes over the change of expert, as in Wan's own sampler.

    load_expert: name -> transformer on the device of the noise. It is called once per expert in
    order of use, after the one before was dropped; it must keep no reference of its own.
    condition_BCTHW: the 20 further input channels of I2V-A14B. first_BC1HW: the clean first
    latent frame of image to video with the 5B. guide: (x0_hat, sigma) -> the x0_hat to go on with,
    as `tempolora.rhythm.guidance.Guide`; asked in each step but the last, whose x0_hat is the
    video: the transformer has to answer to every push.
    """
    device = noise_BCTHW.device
    scheduler = _scheduler(variant, steps, device)
    scheduler.set_begin_index(0)  # whole timesteps may repeat: count them, do not look them up
    latents = noise_BCTHW.float()
    given = {
        "condition_BCTHW": condition_BCTHW,
        "clean_first_frame": first_BC1HW is not None,
        "per_token_time": variant.per_token_time,
    }
    current, expert = None, None
    timesteps, sigmas = scheduler.timesteps.tolist(), scheduler.sigmas.tolist()
    for step, timestep in enumerate(progress(timesteps, what="sampling")):
        wanted, guidance = expert_at(variant, timestep)
        if wanted != current:
            expert = None
            free_memory(device)
            current, expert = wanted, load_expert(wanted)
        # Wan gives its model the timestep cut to a whole number, the solver the exact sigma.
        sigma_B = torch.full((len(latents),), timestep / TRAIN_TIMESTEPS, device=device)
        inputs = _with_first(latents, first_BC1HW)
        v_BCTHW = predict_velocity(expert, inputs, sigma_B, text_BLD, **given).float()
        if guidance > 1:
            unguided = predict_velocity(expert, inputs, sigma_B, negative_BLD, **given).float()
            v_BCTHW = unguided + guidance * (v_BCTHW - unguided)
        if guide is not None and step + 1 < len(timesteps):
            x0_hat = _with_first(inputs - sigmas[step] * v_BCTHW, first_BC1HW)
            v_BCTHW = v_BCTHW + (x0_hat - guide(x0_hat, sigmas[step])) / sigmas[step]
        latents = scheduler.step(v_BCTHW, timestep, latents, return_dict=False)[0]
    return _with_first(latents, first_BC1HW)


def _scheduler(
    variant: Variant, steps: int, device: torch.device | str = "cpu"
) -> UniPCMultistepScheduler:
    scheduler = UniPCMultistepScheduler(
        num_train_timesteps=TRAIN_TIMESTEPS,
        prediction_type="flow_prediction",
        use_flow_sigmas=True,
        flow_shift=variant.shift,
    )
    scheduler.set_timesteps(steps, device=device)
    return scheduler


def _check_guided(variant: Variant, steps: int, rhythm: Rhythm) -> None:
    """Raise ConfigError where no step would be guided."""
    low, high = rhythm.sigma
    answered = _scheduler(variant, steps).sigmas[: steps - 1]
    asked = (rhythm.soundtrack, rhythm.hz, rhythm.speed)
    guided = any(value is not None for value in asked)
    if guided and not ((answered >= low) & (answered <= high)).any():
        raise ConfigError(
            f"--guide-sigma: of {steps} steps none but the last has a sigma from {low:g} to "
            f"{high:g}, and the last is not guided; give more --steps or a wider range"
        )


def _with_first(latents_BCTHW: Tensor, first_BC1HW: Tensor | None) -> Tensor:
    if first_BC1HW is None:
        return latents_BCTHW
    return torch.cat([first_BC1HW.to(latents_BCTHW), latents_BCTHW[:, :, 1:]], dim=2)


@torch.no_grad()
def sample_video(
    cfg: Config,
    out: Path,
    *,
    text_LD: Tensor,
    negative_LD: Tensor,
    loras: Mapping[str, Path],
    tempo: Tempo | None = None,
    seed: int,
    steps: int,
    device: torch.device | str,
    condition: Tensor | None = None,
    first_latent: Tensor | None = None,
    guide: Guide | None = None,
    retime: Retime | None = None,
    soundtrack: np.ndarray | None = None,
    click: bool = False,
) -> Path:
    """Sample one video of the config's size and write it to `out` at the config's frame rate.

    text_LD, negative_LD: embeddings at their true length. loras: expert -> LoRA file; without an
    entry the expert is the base model. tempo: adapters beside them, and the speed. condition:
    (C, T, H, W) encoded condition of I2V-A14B; first_latent: (C, 1, H, W) clean first latent frame
    of 5B image to video, both normalised. retime: the video is sampled again with its guide.
    soundtrack: float (samples, 2) at RATE_HZ, heard from the first frame on. click: a click on each
    beat of the video's own motion is heard too.
    Raises ConfigError, before anything large is loaded, for a LoRA of an expert that the model does
    not have, one that does not fit it, or an `out` that cannot be written.
    """
    if steps < 1:
        raise ValueError(f"steps must be at least 1, not {steps}")
    device, variant, out = torch.device(device), cfg.variant, Path(out)
    _check(cfg, out, loras, tempo)
    needs_first = cfg.task == "i2v" and variant.per_token_time
    needs_condition = cfg.task == "i2v" and not variant.per_token_time
    assert (first_latent is not None) == needs_first, "first_latent goes with 5B i2v alone"
    assert (condition is not None) == needs_condition, "condition goes with A14B i2v alone"

    def load_expert(name: str) -> nn.Module:
        transformer = load_transformer(cfg.model, name, device)
        if name in loras:
            apply_lora_file(transformer, loras[name])
        if tempo is not None and name in tempo.loras:
            apply_lora_file(transformer, tempo.loras[name], math.log2(tempo.speed))
        return transformer.eval()

    def frames_with(guide: Guide | None) -> np.ndarray:
        latents_BCTHW = sample_latents(
            load_expert,
            variant,
            draw_noise((1, *cfg.latent_shape), seed).to(device),
            pad_text([text_LD]).to(device),
            pad_text([negative_LD]).to(device),
            steps=steps,
            condition_BCTHW=None
            if condition is None
            else condition_channels(condition[None]).to(device),
            first_BC1HW=None if first_latent is None else first_latent[None].to(device),
            guide=guide,
        )
        free_memory(device)
        vae = load_vae(cfg.model, device)
        if cfg.model.placement == "host":
            vae.enable_tiling()  # a quarter of a frame at a time, blended where tiles overlap
        frames_FHW3 = decode_video(vae, latents_BCTHW)[0].cpu().numpy()
        del vae
        free_memory(device)
        return frames_FHW3

    frames_FHW3 = frames_with(guide)
    guide = retime and retime.guide(frames_FHW3)
    if guide is not None:
        frames_FHW3 = frames_with(guide)
        retime.check(frames_FHW3)
    sound = heard(frames_FHW3, cfg.timebase.fps, soundtrack, click)
    write_mp4(out, frames_FHW3, cfg.timebase.fps, *([] if sound is None else [sound, RATE_HZ]))
    logger.info("wrote %s", out)
    return out


@torch.no_grad()
def sample_from_prompt(
    cfg: Config,
    out: Path,
    *,
    prompt: str,
    negative: str = NEGATIVE_PROMPT,
    loras: Mapping[str, Path],
    tempo: Tempo | None = None,
    image: Path | None = None,
    seed: int,
    steps: int,
    device: torch.device | str,
    rhythm: Rhythm | None = None,
) -> Path:
    """`sample_video` for words, and for i2v an image file: loads the text encoder itself.

    rhythm: what the video shall move to and sound like. Raises ConfigError if an image is missing
    for i2v, given for t2v, or unreadable, and what `sample_video` and `prepare` raise; all of it
    before anything large is loaded.
    """
    device = torch.device(device)
    if cfg.task == "i2v" and image is None:
        raise ConfigError("--image: model.task i2v starts from an image; give one")
    if cfg.task == "t2v" and image is not None:
        raise ConfigError(
            f"--image: {cfg.model.variant} with model.task t2v takes no image; leave it out"
        )
    first_frame_HW3 = read_image(image, cfg.data.height, cfg.data.width) if image else None
    _check(cfg, Path(out), loras, tempo)
    moved = {}
    if rhythm is not None:
        _check_guided(cfg.variant, steps, rhythm)
        moved = prepare(cfg, rhythm, device)

    tokenizer, encoder = load_text(cfg.model, device)
    text_LD, negative_LD = encode_prompts(tokenizer, encoder, [prompt, negative])
    del tokenizer, encoder
    free_memory(device)
    given = {} if first_frame_HW3 is None else _encode_first_frame(cfg, first_frame_HW3, device)
    return sample_video(
        cfg,
        out,
        text_LD=text_LD,
        negative_LD=negative_LD,
        loras=loras,
        tempo=tempo,
        seed=seed,
        steps=steps,
        device=device,
        **given,
        **moved,
    )


def _check(cfg: Config, out: Path, loras: Mapping[str, Path], tempo: Tempo | None = None) -> None:
    """What would else be found after minutes: LoRA files that do not fit, no place for the video.

    Makes the folder of `out`.
    """
    for files in (loras, tempo.loras if tempo else {}):
        _check_experts(files, cfg.variant.experts)
        for expert, path in files.items():
            check_lora_file(meta_transformer(cfg.model, expert), path)
    for path in tempo.loras.values() if tempo else ():
        kind = read_metadata(path).get("kind", "tempo")
        if kind != "tempo":
            raise ConfigError(f"--tempo-lora: {path} is a {kind} LoRA; give it with --lora")
    if out.is_dir():
        raise ConfigError(f"--out: {out} is a folder; name the mp4 file")
    try:
        out.parent.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise ConfigError(f"--out: there can be no {out}: {error.strerror}") from None
    if not os.access(out.parent, os.W_OK | os.X_OK):
        raise ConfigError(f"--out: no right to write into {out.parent}")


def _encode_first_frame(cfg: Config, frame_HW3: np.ndarray, device: torch.device) -> dict:
    """The argument of `sample_video` that this variant takes its first frame by."""
    frame_BHW3 = torch.from_numpy(frame_HW3)[None]
    vae = load_vae(cfg.model, device)
    if cfg.variant.per_token_time:
        given = {"first_latent": encode_video(vae, frame_BHW3[:, None])[0]}
    else:
        given = {"condition": encode_condition(vae, frame_BHW3, cfg.data.num_frames)[0]}
    del vae
    free_memory(device)
    return given


def read_image(path: Path, height: int, width: int) -> np.ndarray:
    """An image file as uint8 RGB (height, width, 3): upright, scaled to cover, cut at its centre.

    Raises ConfigError if the file cannot be read as an image.
    """
    try:
        with Image.open(path) as image:
            upright = ImageOps.exif_transpose(image).convert("RGB")
    except (OSError, SyntaxError, ValueError, Image.DecompressionBombError) as error:
        raise ConfigError(f"--image: cannot read {path} as an image: {error}") from None
    return np.array(ImageOps.fit(upright, (width, height), Image.Resampling.LANCZOS))


def loras_in(
    paths: Path | Sequence[Path], experts: Sequence[str] = EXPERTS, kind: str = "rhythm"
) -> dict[str, Path]:
    """Expert -> LoRA file, for `--lora`: output folders, or files named one by one.

    experts: those the model has. A folder gives the files that training leaves there, of this
    lora.kind. A file says
    its expert in its header's metadata, or else by "high" or "low" in its name; where the model
    has one transformer, a header that says nothing will do. Raises ConfigError if a file is no
    safetensors file, its expert cannot be told or is none of the model's, if two are for the same
    expert, or if a folder holds none.
    """
    found: dict[str, Path] = {}
    for path in [Path(paths)] if isinstance(paths, str | Path) else map(Path, paths):
        pairs = _of_folder(path, experts, kind) if path.is_dir() else [(_said(path, experts), path)]
        for expert, file in pairs:
            if expert in found:
                raise ConfigError(f"--lora: {found[expert]} and {file} are both for {expert!r}")
            found[expert] = file
    _check_experts(found, experts)
    return found


def _of_folder(folder: Path, experts: Sequence[str], kind: str) -> list[tuple[str, Path]]:
    pairs = [(expert, folder / lora_file_name(expert, kind)) for expert in experts]
    present = [(expert, file) for expert, file in pairs if file.is_file()]
    if not present:
        names = " or ".join(file.name for _, file in pairs)
        raise ConfigError(f"--lora: {folder} holds no {names}")
    return present


def _said(path: Path, experts: Sequence[str]) -> str:
    """The expert that a LoRA file says it is for."""
    expert = read_metadata(path).get("expert")
    if expert:
        return expert
    if tuple(experts) == ("single",):
        return "single"  # whatever its name: "high_contrast" is no expert here
    named = [name for name in ("high", "low") if name in path.name.lower()]
    if len(named) == 1:
        return named[0]
    raise ConfigError(
        f"--lora: cannot tell which expert {path} is for: its header has no expert, and its name "
        'does not hold one of "high" and "low"'
    )


def _check_experts(loras: Mapping[str, Path], experts: Sequence[str]) -> None:
    for expert, path in loras.items():
        if expert not in experts:
            raise ConfigError(
                f"--lora: {path} is for the expert {expert!r}; the model has {', '.join(experts)}"
            )
