"""What a clip is: the caption list, and the safe side of decoding.

First stage of the road: a folder becomes `Clip`s, and each is read by a worker process
(`data/decode.py`) that may crash or hang on a bad file without taking the run with it.
"""

import json
import logging
import os
import signal
import subprocess
import sys
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np

from tempolora import ConfigError

log = logging.getLogger(__name__)

FULL = 28  # exit code of a worker that has no room for its frames: no fault of the clip


@dataclass(frozen=True)
class Clip:
    """One line of the caption list: `file` as written there, its resolved `path`, its caption."""

    file: str
    path: Path
    caption: str


class ClipRejected(Exception):
    """A clip that cannot be used: one sentence a person can act on."""


class DecoderFailed(ClipRejected):
    """The decoder did not finish: out of time or memory. Another run may succeed."""


def list_clips(source: Path) -> list[Clip]:
    """The clips of a folder, in the order of its `prompts.txt` or `metadata.jsonl`.

    prompts.txt holds `clip.mp4|a prompt` lines (UTF-8, blank lines and # comments allowed; further
    | belong to the prompt); metadata.jsonl holds objects with file_name and text. Raises
    ConfigError naming file and line.
    """
    source = Path(source)
    if not source.is_dir():
        raise ConfigError(f"{source}: no such folder; put the clips and a prompts.txt there")
    found = [
        source / name for name in ("prompts.txt", "metadata.jsonl") if (source / name).exists()
    ]
    if not found:
        raise ConfigError(
            f"{source}: neither prompts.txt nor metadata.jsonl is there; "
            "write prompts.txt with lines like clip.mp4|a prompt"
        )
    if len(found) == 2:
        raise ConfigError(
            f"{source}: both prompts.txt and metadata.jsonl are there; remove metadata.jsonl "
            "(or prompts.txt, if metadata.jsonl is the list you mean)"
        )
    listing = found[0]
    parse = _prompt_line if listing.suffix == ".txt" else _metadata_line
    clips: dict[Path, Clip] = {}
    for number, line in enumerate(_text_of(listing).split("\n"), start=1):
        where = f"{listing}, line {number}"
        if not line.strip() or (listing.suffix == ".txt" and line.lstrip().startswith("#")):
            continue
        file, caption = (part.strip() for part in parse(line, where))
        if not file:
            raise ConfigError(f"{where}: no file name before the caption")
        if not caption:
            raise ConfigError(f"{where}: {file} has an empty caption; describe what it shows")
        path = _inside(source, file, where)
        if path in clips:
            raise ConfigError(f"{where}: {file} is listed twice; keep one of its lines")
        clips[path] = Clip(file, path, caption)
    if not clips:
        raise ConfigError(f"{listing}: lists no clip; add lines like clip.mp4|a prompt")
    return list(clips.values())


def _text_of(listing: Path) -> str:
    try:
        return listing.read_bytes().decode("utf-8-sig")
    except UnicodeDecodeError as error:
        line = error.object[: error.start].count(b"\n") + 1
        raise ConfigError(f"{listing}, line {line}: not UTF-8; save the file as UTF-8") from None


def _prompt_line(line: str, where: str) -> tuple[str, str]:
    file, bar, caption = line.partition("|")
    if not bar:
        raise ConfigError(f"{where}: no | in {line.strip()!r}; write clip.mp4|a prompt")
    return file, caption


def _metadata_line(line: str, where: str) -> tuple[str, str]:
    try:
        entry = json.loads(line)
    except json.JSONDecodeError as error:
        raise ConfigError(f"{where}: not JSON ({error.msg})") from None
    keys = ("file_name", "text")
    if not isinstance(entry, dict) or not all(isinstance(entry.get(key), str) for key in keys):
        raise ConfigError(f'{where}: needs an object like {{"file_name": "a.mp4", "text": "..."}}')
    return entry["file_name"], entry["text"]


def _inside(source: Path, file: str, where: str) -> Path:
    """The resolved path of `file`, which must be a file under `source` after symlinks."""
    if "\0" in file:
        raise ConfigError(f"{where}: the file name holds a NUL byte")
    path, root = (source / file).resolve(), source.resolve()
    if not path.is_relative_to(root):
        raise ConfigError(f"{where}: {file} leads out of {source}; keep the clips inside it")
    if not path.is_file():
        raise ConfigError(f"{where}: {file} is not there; add the clip or remove its line")
    return path


@dataclass(frozen=True)
class WindowSpec:
    """What to cut from a clip: `num_frames` at `fps` Hz, `height` x `width` px.

    windows: "first", "all" (end to end) or "spaced" (evenly, at most `max_windows`; the others
    ignore it). resample: "auto" (motion-compensated), "nearest" or "blend". speeds: at each of
    which the windows are cut anew, 2 being twice as fast.
    """

    fps: float
    num_frames: int
    height: int
    width: int
    windows: str
    max_windows: int
    resample: str
    speeds: tuple[float, ...] = (1.0,)


@dataclass(frozen=True)
class Whole:
    """All of a clip as it is, at its own size and rate: from `least_frames` to `most_pixels`.

    The latter are summed over frames; what is longer is cut off there. A clip whose frames are not
    evenly spaced in time is rejected: nothing of it is to be made up.
    """

    least_frames: int
    most_pixels: int


@dataclass(frozen=True)
class Outline:
    """All frames of a clip at their own times, up to `most_s` seconds, to look at how it moves.

    Scaled so that the longer side has no more than `most_px` pixels.
    """

    most_px: int
    most_s: float


@dataclass(frozen=True)
class Window:
    """One training sample's frames, still on disk; the `index`-th at its `speed`.

    `times_s` (F,): when the clip itself shows what each frame shows, from its first frame. Of the
    frames, `inbetween` were synthesised and `nearest_fallback` taken from the nearest source frame
    because no in-between was trustworthy.
    """

    index: int
    speed: float
    times_s: list[float]
    path: Path
    inbetween: int
    nearest_fallback: int

    @property
    def start_s(self) -> float:
        """When the window begins, from the clip's first frame."""
        return self.times_s[0]

    @property
    def frames(self) -> np.ndarray:
        """uint8 RGB (F, H, W, 3), memory-mapped: nothing is read before it is looked at."""
        return np.load(self.path, mmap_mode="r", allow_pickle=False)


@dataclass(frozen=True)
class DecodedClip:
    """A clip on the model's clock. Times are in seconds from its first video frame.

    `audio` is mono float32 at `audio_rate` Hz, its first sample at `audio_start_s`, or None with
    the reason in `no_audio`; `audio_broken` where there is a track that does not decode.
    `left_out` says which windows were dropped, and why. `decoder` is decord, or pyav with the
    reason in `decoder_note`; `rotation` (degrees, clockwise) is already applied.
    """

    sha256: str
    source_fps: float
    duration_s: float
    rotation: int
    decoder: str
    decoder_note: str | None
    windows: list[Window]
    left_out: list[str]
    audio: np.ndarray | None
    audio_rate: int | None
    audio_start_s: float | None
    audio_broken: bool
    no_audio: str | None


def read_clip(
    path: Path, spec: WindowSpec | Whole | Outline, workdir: Path, timeout_s: float
) -> DecodedClip:
    """Decode `path` in a process of its own, which leaves its frames in the folder `workdir`.

    Raises ClipRejected with the reason that the worker found, and DecoderFailed where it crashed
    or took longer than `timeout_s` seconds, ConfigError where the disk is full.
    """
    path, workdir = Path(path), Path(workdir)
    workdir.mkdir(parents=True, exist_ok=True)
    answer = workdir / "clip.json"
    answer.unlink(missing_ok=True)  # an answer of an earlier run must not stand for this one
    kind = type(spec).__name__
    request = {"path": str(path), "workdir": str(workdir), kind: asdict(spec)}
    said = run_worker("tempolora.data.decode", json.dumps(request), path.name, timeout_s)
    try:
        found = json.loads(answer.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        raise DecoderFailed(f"{path.name}: the decoder left no answer{said}") from None
    if "rejected" in found:
        raise ClipRejected(f"{path.name}: {found['rejected']}")
    if found["left_out"]:
        first, *others = found["left_out"]
        more = f" (and {len(others)} more like it)" if others else ""
        log.warning("%s: %s%s", path.name, first, more)
    if found["decoder_note"]:
        log.info("%s: %s", path.name, found["decoder_note"])
    has_audio = found["audio_rate"] is not None
    return DecodedClip(
        sha256=found["sha256"],
        source_fps=found["source_fps"],
        duration_s=found["duration_s"],
        rotation=found["rotation"],
        decoder=found["decoder"],
        decoder_note=found["decoder_note"],
        windows=[
            Window(
                w["index"],
                w["speed"],
                w["times_s"],
                workdir / w["file"],
                w["inbetween"],
                w["nearest_fallback"],
            )
            for w in found["windows"]
        ],
        left_out=found["left_out"],
        audio=np.load(workdir / "audio.npy", allow_pickle=False) if has_audio else None,
        audio_rate=found["audio_rate"],
        audio_start_s=found["audio_start_s"],
        audio_broken=found["audio_broken"],
        no_audio=found["no_audio"],
    )


def run_worker(module: str, request: str, name: str, timeout_s: float) -> str:
    """Run `python -m module` with `request` on its stdin, in a process that may crash or hang.

    Returns the last line of its stderr, as an ending for a sentence. Raises DecoderFailed about
    the file called `name` where it fails or takes longer than `timeout_s` seconds, and ConfigError
    where it exits with FULL.
    """
    worker = subprocess.Popen(
        [sys.executable, "-m", module],
        stdin=subprocess.PIPE,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
        text=True,
        errors="replace",
        env=os.environ | {"PYTHONPATH": os.pathsep.join(entry for entry in sys.path if entry)},
        start_new_session=True,  # a group of its own, so that nothing it started outlives it
    )
    try:
        _, stderr = worker.communicate(request, timeout=timeout_s)
    except subprocess.TimeoutExpired:
        raise DecoderFailed(
            f"{name}: decoding took longer than {timeout_s:g} s and was stopped"
        ) from None
    finally:
        if worker.poll() is None:  # out of time, or this process is being interrupted
            os.killpg(worker.pid, signal.SIGKILL)
            worker.communicate()
    lines = stderr.strip().splitlines()
    said = f" ({lines[-1][:300]})" if lines else ""
    if worker.returncode < 0:
        cause = signal.Signals(-worker.returncode).name
        raise DecoderFailed(f"{name}: the decoder crashed with {cause}{said}")
    if worker.returncode == FULL:
        raise ConfigError(
            f"{name}: no room for its decoded frames{said}; make room and give the command again"
        )
    if worker.returncode:
        raise DecoderFailed(f"{name}: the decoder failed{said}")
    return said
