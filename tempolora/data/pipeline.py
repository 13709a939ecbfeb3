"""Around the VAE: clips decoded and windows loaded before it needs them, shards written behind it.

Decoders are subprocesses that spool frames to disk, as many as there are processors for; a thread
takes windows from there into page-locked memory; another writes shards. Whatever ends the work,
what is being decoded and written comes to its end first.
"""

import logging
import os
import queue
import shutil
import threading
import time
from collections import deque
from collections.abc import Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import closing
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
import torch
from torch import Tensor

from tempolora.config import Config
from tempolora.data.audio import Track
from tempolora.data.clips import Clip, ClipRejected, DecodedClip, Window, WindowSpec, read_clip
from tempolora.data.shards import ABSENT, BROKEN, HEARD, SILENT, Sample, ShardIndex, write_shard
from tempolora.rhythm.tempo import motion_energy

log = logging.getLogger(__name__)

T = TypeVar("T")

LOADED_AHEAD = 2  # windows in memory while the VAE works on another
DECODERS = (2, 16)  # processes: fewest, most
SPOOL_BYTES = 2**34  # of decoded frames on disk
SPACED_WINDOWS = 4  # where data.max_windows is not set


@dataclass(frozen=True)
class LoadedWindow:
    """One window in memory, with what is known of its motion and sound."""

    of: Window
    frames_FHW3: Tensor
    rhythm: dict[str, Tensor]
    sound: dict[str, Any]


_Heard = list[tuple[dict[str, Tensor], dict[str, Any]]]  # rhythm and sound of each window


def load_ahead(
    cfg: Config, clips: Sequence[Clip], scratch: Path
) -> Iterator[tuple[Clip, DecodedClip | ClipRejected, LoadedWindow | None]]:
    """Each clip's windows in memory, and then the clip with None; made before they are asked for.

    scratch: a folder for frames, of which each clip's are gone when it is done with. To be closed.
    """
    return _in_background(_load(cfg, clips, scratch))


def _load(
    cfg: Config, clips: Sequence[Clip], scratch: Path
) -> Iterator[tuple[Clip, DecodedClip | ClipRejected, LoadedWindow | None]]:
    """Each clip's windows, and then the clip with None."""
    pinned = torch.cuda.is_available()  # whence the GPU copies without waiting
    with closing(_decode_ahead(cfg, clips, scratch)) as decoded:
        for clip, found, heard in decoded:
            for position, (rhythm, sound) in enumerate(heard):
                window = found.windows[position]
                stored = window.frames
                frames_FHW3 = torch.empty(stored.shape, dtype=torch.uint8, pin_memory=pinned)
                frames_FHW3.numpy()[...] = stored
                yield clip, found, LoadedWindow(window, frames_FHW3, rhythm, sound)
            yield clip, found, None


def _decode_ahead(
    cfg: Config, clips: Sequence[Clip], scratch: Path
) -> Iterator[tuple[Clip, DecodedClip | ClipRejected, _Heard]]:
    """Clips in their order, decoded in subprocesses while others work on those before.

    As many at once as there are processors for, and as have room on disk. A clip's frames are gone
    when the next one is asked for.
    """
    data = cfg.data
    spec = WindowSpec(
        fps=cfg.timebase.fps,
        num_frames=data.num_frames,
        height=data.height,
        width=data.width,
        windows=data.windows,
        max_windows=data.max_windows or SPACED_WINDOWS,
        resample=data.resample,
        speeds=data.speeds,
    )
    decoders = num_decoders(data.workers)
    room = min(SPOOL_BYTES, shutil.disk_usage(scratch).free // 2)
    windows = len(data.speeds) * (spec.max_windows if data.windows == "spaced" else 1)
    largest = windows * 3 * spec.num_frames * spec.height * spec.width  # bytes of a clip so far

    def read(position: int) -> tuple[DecodedClip, _Heard]:
        workdir = scratch / f"clip-{position}"
        clip = clips[position]
        decoded = read_clip(clip.path, spec, workdir, data.decode_timeout_s)
        return decoded, list(_motion_and_sound(decoded, spec.fps))

    pool = ThreadPoolExecutor(decoders)
    try:
        running: deque[Future[tuple[DecodedClip, _Heard]]] = deque()
        for position, clip in enumerate(clips):
            while position + len(running) < len(clips) and (
                not running
                or (len(running) < 2 * decoders and (len(running) + 1) * largest <= room)
            ):
                running.append(pool.submit(read, position + len(running)))
            workdir = scratch / f"clip-{position}"
            try:
                found, heard = running.popleft().result()
            except ClipRejected as reason:
                found, heard = reason, []
            largest = max(largest, sum(path.stat().st_size for path in workdir.glob("*.npy")))
            if isinstance(found, DecodedClip) and found.audio_broken:
                log.warning("%s: %s; it is used without", clip.file, found.no_audio)
            yield clip, found, heard
            shutil.rmtree(workdir)
    finally:
        pool.shutdown(cancel_futures=True)


def num_decoders(workers: int) -> int:
    """Clips decoded at once: two processors for each, shared by the processes of this host.

    workers: the least wanted.
    """
    processors = len(os.sched_getaffinity(0)) // int(os.environ.get("LOCAL_WORLD_SIZE", "1"))
    fewest, most = DECODERS
    return max(fewest, workers, min(most, processors // 2))


def _motion_and_sound(
    decoded: DecodedClip, fps: float
) -> Iterator[tuple[dict[str, Tensor], dict[str, Any]]]:
    """Of each window: its rhythm as the sample holds it, and what meta.json says of sound."""
    track = None
    if decoded.audio is not None:
        track = Track(decoded.audio, decoded.audio_rate, decoded.audio_start_s)
    for window in decoded.windows:
        rhythm = {"motion_energy": motion_energy(torch.from_numpy(np.array(window.frames)))}
        sound = {"sound": BROKEN if decoded.audio_broken else ABSENT}
        if track is not None:
            sound = {"sound": HEARD if track.is_heard(window.times_s) else SILENT}
        if sound["sound"] == HEARD:
            heard = track.window(window.times_s, fps)
            rhythm["onset"] = torch.from_numpy(heard.onset_F)
            rhythm["beats_s"] = torch.from_numpy(heard.beats_s)
            sound["tempo"] = heard.tempo and asdict(heard.tempo)
        yield rhythm, sound


def _in_background(items: Iterator[T]) -> Iterator[T]:
    """The items, made LOADED_AHEAD of the caller by a thread; its error is raised here."""
    made: queue.Queue[tuple[T | None, BaseException | None]] = queue.Queue(LOADED_AHEAD)
    closing_down = threading.Event()

    def make() -> None:
        error = None
        with closing(items):
            try:
                for item in items:
                    if not put((item, None)):
                        return
            except BaseException as raised:  # to be raised in the other thread
                error = raised
        put((None, error or StopIteration()))

    def put(entry: tuple[T | None, BaseException | None]) -> bool:
        while not closing_down.is_set():
            try:
                made.put(entry, timeout=0.1)
            except queue.Full:
                continue
            return True
        return False

    thread = threading.Thread(target=make, daemon=True)
    thread.start()
    try:
        while True:
            item, error = made.get()
            if isinstance(error, StopIteration):
                return
            if error is not None:
                raise error
            yield item
    finally:
        closing_down.set()
        thread.join()


class ShardWriter:
    """Writes shards behind the VAE's back, one at a time, under names no other process uses."""

    def __init__(self, folder: Path, rank: int) -> None:
        taken = [int(path.name[6:12]) for path in folder.glob(f"{rank:05d}-*.tar")]
        self._folder, self._rank, self._number = folder, rank, max(taken, default=-1) + 1
        self._pool = ThreadPoolExecutor(1)
        self._last: Future[None] | None = None

    def write(self, samples: list[Sample], index: ShardIndex) -> None:
        """Begin to write a shard, after the one before; raises what went wrong with that one."""
        self._settle()
        path = self._folder / f"{self._rank:05d}-{self._number:06d}.tar"
        self._number += 1
        self._last = self._pool.submit(write_shard, path, samples, index)

    def _settle(self) -> None:
        if self._last is not None:
            self._last.result()

    def __enter__(self) -> "ShardWriter":
        return self

    def __exit__(self, kind: type | None, *_: object) -> None:
        self._pool.shutdown()
        if kind is None:
            self._settle()


class Pace:
    """Entered while the VAE works: how fast clips go, and how much of the time that is.

    The first window's share is not counted: models are loaded and the first clips decoded then.
    """

    def __init__(self) -> None:
        self._began = time.perf_counter()
        self._first: float | None = None
        self._busy = 0.0

    def __enter__(self) -> None:
        self._entered = time.perf_counter()

    def __exit__(self, *_: object) -> None:
        self._left = time.perf_counter()
        if self._first is None:
            self._first = self._left
        else:
            self._busy += self._left - self._entered

    def describe(self, clips: int) -> str:
        seconds = time.perf_counter() - self._began
        said = f"{clips / seconds:.3g} clips/s"
        if self._first is None or self._left == self._first:
            return said
        return f"{said}; the VAE was busy {self._busy / (self._left - self._first):.0%} of the time"
