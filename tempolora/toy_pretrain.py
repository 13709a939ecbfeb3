"""How TinyWan's shipped weights were trained, and what they can do.

`python -m tempolora.toy_pretrain vae --variant t2v_a14b --out FILE` trains a small causal VAE on
drawn clips, and on crops of real ones with --clips; `measure` prints how well such a file, or the
shipped one, passes a picture and its rhythm.

Shapes: B clip of a batch, N clip of the pool, F video frame, H, W in pixels, T, h, w latent frame,
height and width, C latent channel.
"""

import argparse
import json
import logging
import math
import multiprocessing
import sys
import tempfile
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, nullcontext
from dataclasses import replace
from functools import partial
from pathlib import Path

import numpy as np
import torch
from einops import rearrange, reduce
from safetensors.torch import save_file
from torch import Tensor, nn
from tqdm import tqdm

from tempolora.config import ConfigError
from tempolora.data.clips import ClipRejected, WindowSpec, list_clips, read_clip
from tempolora.data.toy import KINDS, Scenes, draw_scenes, render, scene
from tempolora.files import replacing
from tempolora.model import tinywan, wan
from tempolora.variants import TEMPORAL_STRIDE, VARIANTS

log = logging.getLogger(__name__)

POOL_FRAMES, POOL_SIZE = 33, 96
PHASES = ((0.8, 32, 17, 4), (0.2, 16, 33, 8))  # share of steps, batch, frames, latent pixels across
MIN_HZ, MAX_HZ = 0.5, 6.0
REAL_FPS, REAL_FRAMES, REAL_HEIGHT, REAL_WIDTH = 16.0, 49, 144, 256
REAL_SHARE = 0.3  # of the pool, where there are real clips
HELD_OUT = 3  # every third real clip is only measured
LUMA = (0.299, 0.587, 0.114)  # BT.601
LEARNING_RATE, WARMUP_STEPS = 2e-3, 200
KL_WEIGHT = 1e-4  # per latent value, against an L1 per pixel value
READ_WEIGHT = 0.5  # of what a linear map misses of the luminance
MEASURE_FPS, MEASURE_FRAMES, MEASURE_SIZE = 16.0, 49, 64
MEASURE_HZ = (0.5, 1.0, 2.0, 3.0, 4.0, 5.0, 6.0)
# 16 px are whole latents, where a grating looks the same in all of them: the hardest case.
PITCHES_PX = (16, 64 / 3, 32)


# --- Clips ----------------------------------------------------------------------------------------


def draw_pool(count: int, seed: int, workers: int) -> np.ndarray:
    """Drawn clips for training: uint8 (N, F, H, W, 3), the same for the same seed."""
    pool = np.empty((count, POOL_FRAMES, POOL_SIZE, POOL_SIZE, 3), np.uint8)
    seeds = [(seed, index) for index in range(count)]
    with (
        multiprocessing.get_context("spawn").Pool(workers, torch.set_num_threads, (1,))
        if workers > 1
        else nullcontext() as many
    ):
        clips = many.imap(draw_one, seeds, chunksize=8) if many else map(draw_one, seeds)
        for index, clip in enumerate(tqdm(clips, "drawing", count, disable=None)):
            pool[index] = clip
    return pool


def draw_one(seed: tuple[int, int]) -> np.ndarray:
    """A training clip (F, H, W, 3): one motion on a canvas that is cropped, or four small ones."""
    rng = np.random.default_rng(seed)
    fps = float(rng.choice([16.0, 24.0]))
    if rng.random() < 0.25:
        rows = [
            np.concatenate([_draw(POOL_SIZE // 2, fps, rng) for _ in range(2)], 2) for _ in range(2)
        ]
        return np.concatenate(rows, 1)
    size = int(rng.integers(POOL_SIZE, 2 * POOL_SIZE))
    top, left = rng.integers(size - POOL_SIZE + 1, size=2)
    return _draw(size, fps, rng)[:, top : top + POOL_SIZE, left : left + POOL_SIZE]


def _draw(size: int, fps: float, rng: np.random.Generator) -> np.ndarray:
    drawn = replace(
        draw_scenes(1, rng, hz=(MIN_HZ, MAX_HZ)),
        waves_N2=torch.tensor([[6, rng.uniform(24, 128)]]) / size,
        tint_N3=torch.from_numpy(rng.uniform(20, 236, (1, 3))).float() / 255,
        ground_N3=torch.from_numpy(rng.uniform(20, 236, (1, 3))).float() / 255,
    )
    return render(drawn, fps=fps, num_frames=POOL_FRAMES, height=size, width=size)[0].numpy()


def real_windows(folder: Path) -> list[list[np.ndarray]]:
    """The windows (F, H, W, 3) at 16 fps of each usable clip of `folder`, a list per clip."""
    spec = WindowSpec(REAL_FPS, REAL_FRAMES, REAL_HEIGHT, REAL_WIDTH, "spaced", 3, "auto")

    def read(path: Path) -> list[np.ndarray]:
        with tempfile.TemporaryDirectory() as workdir:
            try:
                decoded = read_clip(path, spec, Path(workdir), timeout_s=600)
            except ClipRejected as reason:
                log.warning("left out: %s", reason)
                return []
            return [np.array(window.frames) for window in decoded.windows]

    with ThreadPoolExecutor() as threads:  # each decoder is a process of its own
        found = list(threads.map(read, [clip.path for clip in list_clips(folder)]))
    return [windows for windows in found if windows]


def real_pool(windows: list[np.ndarray], count: int, rng: np.random.Generator) -> np.ndarray:
    """Crops (N, F, H, W, 3) of real windows, half of them stills that a swinging camera sees."""
    pool = np.empty((count, POOL_FRAMES, POOL_SIZE, POOL_SIZE, 3), np.uint8)
    for clip in pool:
        window = windows[rng.integers(len(windows))]
        frames, height, width, _ = window.shape
        first = int(rng.integers(frames - POOL_FRAMES + 1))
        room = np.array([height - POOL_SIZE, width - POOL_SIZE])
        middle = rng.uniform(0.25, 0.75, 2) * room
        if rng.random() < 0.5:
            top, left = middle.astype(int)
            clip[:] = window[first : first + POOL_FRAMES, top:, left:][:, :POOL_SIZE, :POOL_SIZE]
            continue
        hz = np.exp(rng.uniform(np.log(MIN_HZ), np.log(MAX_HZ)))
        turn = 2 * np.pi * (hz * np.arange(POOL_FRAMES) / REAL_FPS + rng.random())
        angle, reach = rng.uniform(0, np.pi), rng.uniform(0, 10)
        path = middle + np.outer(reach * np.cos(turn), [np.sin(angle), np.cos(angle)])
        for frame, (y, x) in zip(clip, path):
            frame[:] = _shifted_crop(window[first], y, x)
    return pool


def _shifted_crop(picture: np.ndarray, y: float, x: float) -> np.ndarray:
    """The POOL_SIZE square whose corner lies at (y, x), between pixels too (bilinear)."""
    top, left = int(y), int(x)
    part = picture[top : top + POOL_SIZE + 1, left : left + POOL_SIZE + 1].astype(np.float32)
    part = part[:-1] + np.float32(y - top) * (part[1:] - part[:-1])
    part = part[:, :-1] + np.float32(x - left) * (part[:, 1:] - part[:, :-1])
    return np.rint(part).astype(np.uint8)


def draw_batch(pool_NFHW3: Tensor, batch: int, frames: int, size: int) -> Tensor:
    """Random crops with random colours and pulses: (B, 3, F, H, W) in -1..1.

    Crops are turned and run backwards, colours mixed, contrast and brightness changed; half of the
    clips pulse at 0.5 to 6 Hz (at 16 fps), one in ten stands still.
    """
    device = pool_NFHW3.device

    def uniform(low: float, high: float, *shape: int) -> Tensor:
        return low + (high - low) * torch.rand(shape, device=device)

    def run(length: int, whole: int) -> Tensor:  # (B, length), forwards or backwards
        start = (uniform(0, 1, batch, 1) * (whole - length + 1)).long()
        steps = torch.arange(length, device=device)
        return start + torch.where(uniform(0, 1, batch, 1) < 0.5, steps, length - 1 - steps)

    clip = (uniform(0, 1, batch, 1, 1, 1) * len(pool_NFHW3)).long()
    frame = run(frames, POOL_FRAMES)
    frame = torch.where(uniform(0, 1, batch, 1) < 0.1, frame[:, :1], frame)
    y, x = run(size, POOL_SIZE)[:, None, :, None], run(size, POOL_SIZE)[:, None, None, :]
    lying = uniform(0, 1, batch, 1, 1, 1) < 0.5
    y, x = torch.where(lying, y.mT, y), torch.where(lying, x.mT, x)
    video = pool_NFHW3[clip, frame[:, :, None, None], y, x].float() / 127.5 - 1
    mix = torch.eye(3, device=device)[uniform(0, 1, batch, 3).argsort(1)]
    mix = mix + 0.2 * torch.randn(batch, 3, 3, device=device)
    video = torch.einsum("B F H W C, B D C -> B D F H W", video, mix)
    video = uniform(0.1, 1.1, batch, 1, 1, 1, 1) * video + uniform(-0.3, 0.3, batch, 1, 1, 1, 1)
    hz = torch.exp(uniform(math.log(MIN_HZ), math.log(MAX_HZ), batch, 1))
    seconds = torch.arange(frames, device=device) / MEASURE_FPS
    turn = 2 * torch.pi * (hz * seconds + uniform(0, 1, batch, 1))
    depth = uniform(0, 0.5, batch, 1) * (uniform(0, 1, batch, 1) < 0.5)
    pulse = 1 + depth * torch.cos(turn)
    return ((video + 1) * pulse[:, None, :, None, None] - 1).clamp(-1, 1)


# --- Training -------------------------------------------------------------------------------------


@contextmanager
def whole_clips(vae: nn.Module) -> Iterator[None]:
    """Let encoder and decoder take whole clips instead of a frame and then fours of frames.

    Diffusers' VAE resamples time only in its chunked passes; these hooks do it for all frames at
    once, with the same result in a fifth of the launches.
    """

    def upsample(resample: nn.Module, args: tuple) -> tuple:
        x = args[0]
        later = resample.time_conv(x[:, :, 1:])
        later = rearrange(later, "B (two C) T H W -> B C (T two) H W", two=2)
        return (torch.cat([x[:, :, :1], later], dim=2), *args[1:])

    def downsample(resample: nn.Module, args: tuple, x: Tensor) -> Tensor:
        return torch.cat([x[:, :, :1], resample.time_conv(x)], dim=2)

    handles = []
    for module in vae.modules():
        if getattr(module, "mode", None) == "upsample3d":
            handles.append(module.register_forward_pre_hook(upsample))
        elif getattr(module, "mode", None) == "downsample3d":
            handles.append(module.register_forward_hook(downsample))
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def encode_whole(vae: nn.Module, video_BCFHW: Tensor) -> tuple[Tensor, Tensor]:
    """Mean and log variance (B, C, T, h, w) of the raw latents; inside `whole_clips`."""
    patch = vae.config.patch_size or 1
    x = rearrange(video_BCFHW, "B C F (H a) (W b) -> B (C b a) F H W", a=patch, b=patch)
    mean, log_variance = vae.quant_conv(vae.encoder(x)).float().chunk(2, dim=1)
    return mean, log_variance.clamp(-30, 20)


def decode_whole(vae: nn.Module, latents_BCTHW: Tensor) -> Tensor:
    """Video (B, 3, F, H, W) of raw latents, not clamped; inside `whole_clips`."""
    patch = vae.config.patch_size or 1
    x = vae.decoder(vae.post_quant_conv(latents_BCTHW), first_chunk=True).float()
    return rearrange(x, "B (C b a) F H W -> B C F (H a) (W b)", a=patch, b=patch)


def picture_loss(video: Tensor, wanted: Tensor) -> Tensor:
    """L1 of the pixels, of their change from frame to frame, and of the slopes of the picture."""
    error = video - wanted
    slopes = error.diff(dim=3).abs().mean() + error.diff(dim=4).abs().mean()
    return error.abs().mean() + 0.5 * error.diff(dim=2).abs().mean() + 0.25 * slopes


def block_luminance(video_B3FHW: Tensor, stride: int) -> Tensor:
    """Mean luminance of each latent pixel's block, without the first frame: (B, 4, T-1, h, w)."""
    luma = sum(weight * colour for weight, colour in zip(LUMA, video_B3FHW[:, :, 1:].unbind(1)))
    blocks = "B (T k) (h a) (w b) -> B k T h w"
    return reduce(luma, blocks, "mean", k=TEMPORAL_STRIDE, a=stride, b=stride)


def new_vae(variant_name: str) -> nn.Module:
    """TinyWan's VAE at weights that keep the variance of what goes through.

    PyTorch's own are a third of that and let the picture fade out on the way: there is no path
    around the resampling layers.
    """
    vae = wan.new_vae(tinywan.vae_architecture(variant_name))
    for module in vae.modules():
        if isinstance(module, nn.Conv2d | nn.Conv3d):
            nn.init.kaiming_normal_(module.weight, nonlinearity="linear")
            nn.init.zeros_(module.bias)
    return vae


def train_vae(variant_name: str, pool_NFHW3: Tensor, steps: int, seed: int) -> nn.Module:
    """A VAE trained on crops of the pool, on the pool's device; its latents are not yet scaled.

    Beside it a linear map learns to read the luminance of each latent's block at its four frames
    from the latents, which keeps them readable; it is dropped.
    """
    device = pool_NFHW3.device
    torch.manual_seed(seed)
    vae = new_vae(variant_name).to(device)
    stride = vae.config.scale_factor_spatial
    reader = nn.Conv3d(vae.config.z_dim, TEMPORAL_STRIDE, (3, 1, 1)).to(device)
    for module in vae.modules():
        if isinstance(module, nn.Conv3d):
            module.to(memory_format=torch.channels_last_3d)
        elif isinstance(module, nn.Conv2d):
            module.to(memory_format=torch.channels_last)
    cuda = device.type == "cuda"
    weights = [*vae.parameters(), *reader.parameters()]
    rate = torch.tensor(0.0, device=device)  # where a captured step reads it
    optimizer = torch.optim.AdamW(weights, rate, betas=(0.9, 0.99), fused=True, capturable=cuda)

    def step(batch: int, frames: int, size: int) -> tuple[Tensor, ...]:
        video = draw_batch(pool_NFHW3, batch, frames, size)
        with torch.autocast(device.type, torch.bfloat16, enabled=cuda):
            mean, log_variance = encode_whole(vae, video)
            latents = mean + (0.5 * log_variance).exp() * torch.randn_like(mean)
            decoded = decode_whole(vae, latents)
        picture = picture_loss(decoded, video)
        kl = 0.5 * (mean**2 + log_variance.exp() - 1 - log_variance).mean()
        luma = block_luminance(video, stride)[:, :, 2:]
        read = (reader(latents[:, :, 1:]) - luma).abs().mean()
        optimizer.zero_grad()
        (picture + KL_WEIGHT * kl + READ_WEIGHT * read).backward()
        norm = nn.utils.clip_grad_norm_(weights, 1.0)
        optimizer.step()
        return picture.detach(), kl.detach(), read.detach(), norm

    done = 0
    with whole_clips(vae):
        for share, batch, frames, blocks in PHASES:
            size = min(blocks * stride, POOL_SIZE)
            do_step = repeated(partial(step, batch, frames, size), device)
            for _ in tqdm(range(round(share * steps)), f"{frames} frames", disable=None):
                optimizer.param_groups[0]["lr"].fill_(LEARNING_RATE * _rate(done, steps))
                figures = do_step()
                done += 1
                if done % 200 == 0 or done == steps:
                    _log_figures(done, figures)
    return vae.requires_grad_(False).eval()


def repeated(step: Callable[[], tuple[Tensor, ...]], device: torch.device) -> Callable:
    """`step`, on a GPU as one CUDA graph: a small model's thousands of launches become one.

    Three steps are taken before the capture.
    """
    if device.type != "cuda":
        return step
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for _ in range(3):
            step()
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        figures = step()

    def replay() -> tuple[Tensor, ...]:
        graph.replay()
        return figures

    return replay


def _log_figures(step: int, figures: tuple[Tensor, ...]) -> None:
    picture, kl, read, norm = (figure.item() for figure in figures)
    if not math.isfinite(norm):
        raise FloatingPointError(f"step {step}: the gradient is not finite")
    log.info("step %d: picture %.4f kl %.2f read %.4f", step, picture, kl, read)


def _rate(step: int, steps: int) -> float:
    """Share of the learning rate: a short rise, then a cosine down to 0."""
    return min((step + 1) / WARMUP_STEPS, 1) * 0.5 * (1 + math.cos(math.pi * step / steps))


# --- Shipping -------------------------------------------------------------------------------------


def write_vae(vae: nn.Module, path: Path, training: dict) -> None:
    """Write the VAE as float16 safetensors, architecture and `training` in the header as JSON."""
    metadata = {
        "architecture": json.dumps(tinywan.plain_config(vae)),
        "training": json.dumps(training),
    }
    state = {name: tensor.half().cpu().contiguous() for name, tensor in vae.state_dict().items()}
    with replacing(path) as temporary:
        save_file(state, temporary, metadata)


def scale_latents(vae: nn.Module, clips_BFHW3: Tensor) -> None:
    """Set latents_mean and latents_std so that latents of these clips are standard per channel."""
    channels = vae.config.z_dim
    vae.register_to_config(latents_mean=[0.0] * channels, latents_std=[1.0] * channels)
    latents = torch.cat([wan.encode_video(vae, part).cpu() for part in clips_BFHW3.split(8)])
    std_C, mean_C = torch.std_mean(latents, dim=(0, 2, 3, 4))
    vae.register_to_config(
        latents_mean=[round(value, 4) for value in mean_C.tolist()],
        latents_std=[round(value, 4) for value in std_C.tolist()],
    )


def drawn_clips(count: int, seed: int) -> np.ndarray:
    """Clips of the toy set as the demo draws them, 49 frames of 64x64: uint8 (N, F, H, W, 3)."""
    rng = np.random.default_rng([seed, 1])
    kinds = [KINDS[n % len(KINDS)] for n in range(count)]
    return _measured([draw_scenes(1, rng, kinds=(kind,), hz=(1.0, 4.0)) for kind in kinds])


def _measured(scenes: list[Scenes]) -> np.ndarray:
    size = {"height": MEASURE_SIZE, "width": MEASURE_SIZE}
    together = Scenes.cat(scenes)
    return render(together, fps=MEASURE_FPS, num_frames=MEASURE_FRAMES, **size).numpy()


# --- Measuring ------------------------------------------------------------------------------------


def measure_vae(vae: nn.Module, real: list[np.ndarray]) -> dict[str, float]:
    """What the VAE passes: PSNR (dB), gains, comb (levels of 255), R^2 of a linear readout.

    Everything goes through the uint8 pictures that users see. Clips are none of those it saw.
    """
    drawn = torch.from_numpy(drawn_clips(48, seed=1))
    latents, decoded = _through(vae, drawn)
    figures = {"PSNR drawn": _psnr(decoded, drawn)}
    if real:
        clips = torch.from_numpy(np.stack(real))[:, :, :128, :128]
        figures["PSNR real"] = _psnr(_through(vae, clips)[1], clips)
    figures |= _readout_figures(latents, _luma(decoded), vae.config.scale_factor_spatial)
    movers = {"brightness": (pulsing_clips(MEASURE_HZ), track_brightness)}
    for pitch in PITCHES_PX:
        track = partial(track_grating, pitch_px=pitch)
        movers[f"grating {pitch:.0f} px"] = swinging_gratings(MEASURE_HZ, pitch), track
    movers["square"] = swinging_squares(MEASURE_HZ), track_square
    for name, (clips, track) in movers.items():
        seen = track(_luma(_through(vae, torch.from_numpy(clips))[1]).numpy())
        true = track(_luma(torch.from_numpy(clips)).numpy())
        for hz, a, b in zip(MEASURE_HZ, seen, true):
            figures[f"gain {name} {hz:g} Hz"] = amplitude(a, hz) / amplitude(b, hz)
    figures |= _comb_figures(vae)
    figures["latent mean"] = latents.mean((0, 2, 3, 4)).abs().max().item()
    figures["latent std"] = latents.std().item()
    return figures


def pulsing_clips(frequencies_hz: tuple[float, ...]) -> np.ndarray:
    """A textured picture whose brightness swings by 30 %, at each frequency: (N, F, H, W, 3)."""
    still = _textured_still()
    seconds = np.arange(MEASURE_FRAMES) / MEASURE_FPS
    gains = [1 + 0.3 * np.cos(2 * np.pi * hz * seconds + 0.7) for hz in frequencies_hz]
    clips = np.stack(gains)[..., None, None, None] * still
    return np.rint(clips.clip(0, 255)).astype(np.uint8)


def swinging_gratings(frequencies_hz: tuple[float, ...], pitch_px: float) -> np.ndarray:
    """A grey grating that swings by 3 px, at each frequency: (N, F, H, W, 3)."""
    seconds = np.arange(MEASURE_FRAMES) / MEASURE_FPS
    x = np.arange(MEASURE_SIZE)
    clips = []
    for hz in frequencies_hz:
        shift = 3 * np.cos(2 * np.pi * hz * seconds + 0.7)
        rows = 128 + 60 * np.cos(2 * np.pi * (x - shift[:, None]) / pitch_px)
        clips.append(np.broadcast_to(rows[:, None, :, None], (len(rows), len(x), len(x), 3)))
    return np.rint(np.stack(clips)).astype(np.uint8)


def swinging_squares(frequencies_hz: tuple[float, ...]) -> np.ndarray:
    """A light square on dark ground that swings by 6 px, at each frequency: (N, F, H, W, 3)."""
    look = {"tint": (230, 230, 230), "ground": (40, 40, 40)}
    look |= {"texture": "flat", "ground_texture": "flat"}
    swing = 6 / MEASURE_SIZE
    return _measured([scene("slide", hz, 0.7, swing, **look) for hz in frequencies_hz])


def track_brightness(luma_NFHW: np.ndarray) -> np.ndarray:
    """Mean luminance of each frame: (N, F)."""
    return luma_NFHW.mean((2, 3))


def track_grating(luma_NFHW: np.ndarray, pitch_px: float) -> np.ndarray:
    """Position in px of `swinging_gratings`, from the phase of the wave: (N, F)."""
    wave = np.exp(-2j * np.pi * np.arange(MEASURE_SIZE) / pitch_px)
    return -np.unwrap(np.angle(luma_NFHW.mean(2) @ wave)) * pitch_px / (2 * np.pi)


def track_square(luma_NFHW: np.ndarray) -> np.ndarray:
    """Horizontal centre in px of what is lighter than the ground of `swinging_squares`: (N, F)."""
    light = (luma_NFHW - 60).clip(0)
    return (light * np.arange(MEASURE_SIZE)).sum((2, 3)) / light.sum((2, 3))


def amplitude(track_F: np.ndarray, hz: float) -> float:
    """Amplitude of the oscillation at `hz` in a track at 16 fps, without its first frame."""
    seconds = np.arange(MEASURE_FRAMES) / MEASURE_FPS
    turn = 2 * np.pi * hz * seconds
    basis = np.stack([np.cos(turn), np.sin(turn), np.ones_like(turn), seconds - 1.5], 1)
    fit = np.linalg.lstsq(basis[1:], track_F[1:], rcond=None)[0]
    return float(np.hypot(fit[0], fit[1]))


def _through(vae: nn.Module, clips_BFHW3: Tensor) -> tuple[Tensor, Tensor]:
    """Normalised latents and reconstruction of the clips, on the CPU."""
    latents = [wan.encode_video(vae, part) for part in clips_BFHW3.split(8)]
    decoded = [wan.decode_video(vae, part).cpu() for part in latents]
    return torch.cat(latents).cpu(), torch.cat(decoded)


def _luma(video_BFHW3: Tensor) -> Tensor:
    return video_BFHW3.double() @ torch.tensor(LUMA, dtype=torch.float64)


def _psnr(video: Tensor, wanted: Tensor) -> float:
    """Mean over clips of the PSNR in dB."""
    error = (video.double() - wanted.double()).square().mean((1, 2, 3, 4))
    return (10 * torch.log10(255**2 / error)).mean().item()


def _readout_figures(latents_BCTHW: Tensor, luma_BFHW: Tensor, stride: int) -> dict[str, float]:
    """R^2 of the reconstruction's block luminance, and of its change from frame to frame, by least
    squares on z[t], z[t-1], z[t-2]: fitted on one half of the clips, measured on the other."""
    z = rearrange(latents_BCTHW.double(), "B C T H W -> B T H W C").numpy()
    inputs = np.concatenate([z[:, 3:], z[:, 2:-1], z[:, 1:-2], np.ones_like(z[:, 3:, ..., :1])], -1)
    wanted = reduce(
        luma_BFHW[:, 1:].numpy(),
        "B (T k) (H a) (W b) -> B T H W k",
        "mean",
        k=TEMPORAL_STRIDE,
        a=stride,
        b=stride,
    )[:, 2:]
    half = len(z) // 2
    flat = [rearrange(part, "B T H W X -> (B T H W) X") for part in (inputs[:half], wanted[:half])]
    found = inputs[half:] @ np.linalg.lstsq(*flat, rcond=None)[0]
    figures = {"readout R2": _r_squared(found, wanted[half:])}
    steps = [rearrange(part, "B T H W k -> B (T k) H W") for part in (found, wanted[half:])]
    figures["readout R2 of change"] = _r_squared(*(np.diff(part, axis=1) for part in steps))
    return figures


def _r_squared(found: np.ndarray, wanted: np.ndarray) -> float:
    return float(1 - ((found - wanted) ** 2).sum() / ((wanted - wanted.mean()) ** 2).sum())


def _comb_figures(vae: nn.Module) -> dict[str, float]:
    """What the decoder's groups of four frames leave on a still: rms over pixels of the amplitude,
    in levels of 255, at fps/4 and fps/2, over the last 40 frames."""
    still = torch.from_numpy(np.rint(_textured_still()).astype(np.uint8))
    luma = _luma(_through(vae, still.expand(1, MEASURE_FRAMES, -1, -1, -1))[1])[0, -40:]
    wave = torch.fft.rfft(luma, dim=0).abs() / 40
    return {
        "comb fps/4": 2 * wave[10].square().mean().sqrt().item(),
        "comb fps/2": wave[20].square().mean().sqrt().item(),
    }


def _textured_still() -> np.ndarray:
    """(H, W, 3) floats around a middle brightness, nowhere near black or white."""
    still = scene("pan", 1.0, amplitude=0.0, size=0.0, ground=(120, 110, 100), seed=5)
    return 110 + 0.6 * (_measured([still])[0, 0].astype(np.float64) - 110)


# --- Commands -------------------------------------------------------------------------------------


def main(argv: list[str] | None = None) -> int:
    options = _parser().parse_args(argv)
    logging.basicConfig(stream=sys.stderr, level=logging.INFO, format="%(message)s", force=True)
    try:
        options.command(options)
    except ConfigError as error:
        sys.stderr.write(f"toy_pretrain: {error}\n")
        return 2
    return 0


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m tempolora.toy_pretrain", description=__doc__)
    commands = parser.add_subparsers(required=True)
    for name, command in (("vae", _vae), ("measure", _measure)):
        sub = commands.add_parser(name)
        sub.set_defaults(command=command)
        sub.add_argument("--variant", choices=VARIANTS, default="t2v_a14b")
        sub.add_argument("--clips", type=Path, help="folder of real clips with its prompts.txt")
        device = "cuda" if torch.cuda.is_available() else "cpu"
        sub.add_argument("--device", type=torch.device, default=device)
        if name == "measure":
            sub.add_argument("--weights", type=Path, help="by default what is shipped")
            continue
        sub.add_argument("--out", type=Path, required=True, help="the .safetensors file to write")
        sub.add_argument("--steps", type=int, default=6000)
        sub.add_argument("--drawn", type=int, default=1536, help="clips to draw")
        sub.add_argument("--seed", type=int, default=0)
        sub.add_argument("--workers", type=int, default=2, help="processes that draw")
    return parser


def _vae(options: argparse.Namespace) -> None:
    for name in ("steps", "drawn", "workers"):
        if getattr(options, name) < 1:
            raise ConfigError(f"--{name}: must be at least 1")
    if not options.out.parent.is_dir():
        raise ConfigError(f"--out: there is no folder {options.out.parent}")
    pool = draw_pool(options.drawn, options.seed, options.workers)
    clips = real_windows(options.clips) if options.clips else []
    seen = [window for n, windows in enumerate(clips) if (n + 1) % HELD_OUT for window in windows]
    if seen:
        count = round(len(pool) * REAL_SHARE / (1 - REAL_SHARE))
        pool = np.concatenate([pool, real_pool(seen, count, np.random.default_rng(options.seed))])
    pool = torch.from_numpy(pool).to(options.device)
    vae = train_vae(options.variant, pool, options.steps, options.seed)
    with torch.no_grad():  # the latents are scaled for what is shipped
        for parameter in vae.parameters():
            parameter.copy_(parameter.half())
    scale_latents(vae, torch.from_numpy(drawn_clips(min(48, options.drawn), seed=0)))
    training = {key: getattr(options, key) for key in ("steps", "seed", "drawn")}
    training["real_windows"] = len(seen)
    write_vae(vae, options.out, training)
    log.info("wrote %s (%s)", options.out, training)


def _measure(options: argparse.Namespace) -> None:
    path = options.weights or tinywan.vae_file(options.variant)
    vae = tinywan.read_vae(path).to(options.device)
    clips = real_windows(options.clips) if options.clips else []
    held_out = [window for windows in clips[HELD_OUT - 1 :: HELD_OUT] for window in windows]
    for name, value in measure_vae(vae, held_out).items():
        sys.stdout.write(f"{name:24} {value:.3f}\n")


if __name__ == "__main__":
    sys.exit(main())
