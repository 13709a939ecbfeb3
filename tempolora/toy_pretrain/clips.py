"""What TinyWan is trained and measured on: drawn clips, crops of real ones, batches of both.

Shapes: B clip of a batch, N clip of the pool, F video frame, H, W in pixels.
"""

import logging
import math
import multiprocessing
import tempfile
from concurrent.futures import ThreadPoolExecutor
from contextlib import nullcontext
from dataclasses import replace
from pathlib import Path

import numpy as np
import torch
from torch import Tensor
from tqdm import tqdm

from tempolora.data.clips import ClipRejected, WindowSpec, list_clips, read_clip
from tempolora.data.toy import KINDS, Scenes, draw_scenes, render

log = logging.getLogger(__name__)

POOL_FRAMES, POOL_SIZE = 33, 96
FLICKERING_SHARE = 1 / 3  # of the drawn pool, so that flicker passes the VAE too
MIN_HZ, MAX_HZ = 0.5, 6.0
FPS, FRAMES, SIZE = 16.0, 49, 64  # of the clips that are measured
REAL_HEIGHT, REAL_WIDTH = 144, 256


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


def pool_scene(size: int, rng: np.random.Generator) -> tuple[Scenes, str]:
    """A scene of the drawn world in any two colours, for a canvas of `size` px; its style."""
    scenes = replace(
        draw_scenes(1, rng, hz=(MIN_HZ, MAX_HZ)),
        waves_N2=torch.tensor([[6, rng.uniform(24, 128)]]) / size,
        tint_N3=torch.from_numpy(rng.uniform(20, 236, (1, 3))).float() / 255,
        ground_N3=torch.from_numpy(rng.uniform(20, 236, (1, 3))).float() / 255,
    )
    return scenes, "flickering" if rng.random() < FLICKERING_SHARE else "clean"


def _draw(size: int, fps: float, rng: np.random.Generator) -> np.ndarray:
    scenes, style = pool_scene(size, rng)
    timing = {"fps": fps, "num_frames": POOL_FRAMES}
    return render(scenes, **timing, height=size, width=size, style=style)[0].numpy()


def real_windows(folder: Path) -> list[list[np.ndarray]]:
    """The windows (F, H, W, 3) at 16 fps of each usable clip of `folder`, a list per clip."""
    spec = WindowSpec(FPS, FRAMES, REAL_HEIGHT, REAL_WIDTH, "spaced", 3, "auto")

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
        turn = 2 * np.pi * (hz * np.arange(POOL_FRAMES) / FPS + rng.random())
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
    seconds = torch.arange(frames, device=device) / FPS
    turn = 2 * torch.pi * (hz * seconds + uniform(0, 1, batch, 1))
    depth = uniform(0, 0.5, batch, 1) * (uniform(0, 1, batch, 1) < 0.5)
    pulse = 1 + depth * torch.cos(turn)
    return ((video + 1) * pulse[:, None, :, None, None] - 1).clamp(-1, 1)


def drawn_clips(count: int, seed: int) -> np.ndarray:
    """Clips of the toy set as the demo draws them, 49 frames of 64x64: uint8 (N, F, H, W, 3)."""
    rng = np.random.default_rng([seed, 1])
    kinds = [KINDS[n % len(KINDS)] for n in range(count)]
    return render_clips([draw_scenes(1, rng, kinds=(kind,), hz=(1.0, 4.0)) for kind in kinds])


def render_clips(scenes: list[Scenes]) -> np.ndarray:
    """Scenes as clean clips of 49 frames of 64x64 at 16 fps: uint8 (N, F, H, W, 3)."""
    size = {"height": SIZE, "width": SIZE}
    return render(Scenes.cat(scenes), fps=FPS, num_frames=FRAMES, **size).numpy()
