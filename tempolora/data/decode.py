"""The decoding worker, `python -m tempolora.data.decode`: one video file in, windows of frames out.

It runs in a process of its own (`clips.read_clip` starts it) because a bad file can crash or hang
a decoder. A JSON request on stdin, an answer in `clip.json`, frames in .npy files. PyAV demuxes
(timestamps, rotation, sound) and checks that the stream is whole; decord reads the frames, or
PyAV where decord is not installed or misreads the file.
"""

import json
import logging
import os
import sys
from collections.abc import Callable
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path

import av
import cv2
import numpy as np

from tempolora.data import resample
from tempolora.data.clips import FULL, ClipRejected, Outline, Whole, WindowSpec
from tempolora.files import NO_ROOM, sha256_of

try:
    import decord
except ImportError:  # its wheels cover few platforms; PyAV reads the frames elsewhere
    decord = None

AUDIO_RATE_HZ = 22_050  # librosa's own rate, which its onset settings are tuned for
LEAD_S = 0.1  # of sound kept on both sides of the pictures
JUMP_S = 0.05  # by which a sound frame may be off what its samples say: more is a gap
LOUDEST = 1e3  # 1 is full scale, and float tracks may go beyond; noughts and ones may not
MOST_SOUND_S = 3600.0
MAX_THREADS = 2
PLAYLISTS = {"concat", "dash", "hls", "imf"}  # would read files outside the folder
STRIDE = 4  # Wan's clips have 4 k + 1 frames
SAME_TIME_S = 0.002  # decord and PyAV agree on a timestamp
SAME_PICTURE = 6.0  # ... and on a picture: mean difference in levels, for colour rounding


@dataclass(frozen=True)
class Stream:
    """The video stream before it is read: sorted times (N,) in s, clockwise rotation in degrees,
    and the first frame, upright (H, W, 3)."""

    pts_s: np.ndarray
    rotation: int
    first: np.ndarray


KINDS = {kind.__name__: kind for kind in (WindowSpec, Whole, Outline)}


def main() -> None:
    logging.basicConfig(stream=sys.stderr, level=logging.WARNING)
    cv2.setNumThreads(MAX_THREADS)
    request = json.loads(sys.stdin.read())
    workdir = Path(request["workdir"])
    (kind,) = KINDS.keys() & request.keys()
    spec = KINDS[kind](**request[kind])
    try:
        answer = decode(Path(request["path"]), spec, workdir)
    except ClipRejected as reason:
        answer = {"rejected": str(reason)}
    except OSError as error:
        if error.errno not in NO_ROOM:
            raise
        sys.stderr.write(f"{error.strerror}: {workdir}\n")
        sys.exit(FULL)
    partial = workdir / "clip.json.part"
    partial.write_text(json.dumps(answer), encoding="utf-8")
    os.replace(partial, workdir / "clip.json")


def decode(path: Path, spec: WindowSpec | Whole | Outline, workdir: Path) -> dict:
    """Write the windows of `path` and its sound into `workdir`; the answer for clip.json.

    Raises ClipRejected where the file or its timing will not do.
    """
    stream = read_stream(path)
    found = (
        outline(path, stream, spec, workdir)
        if isinstance(spec, Outline)
        else cut(path, stream, spec, workdir)
    )
    rate = resample.source_fps(stream.pts_s)
    return {
        "sha256": sha256_of(path),
        "source_fps": rate,
        "duration_s": float(stream.pts_s[-1] - stream.pts_s[0]) + 1 / rate,
        "rotation": stream.rotation,
        **found,
        **save_audio(path, stream.pts_s, workdir / "audio.npy"),
    }


def cut(path: Path, stream: Stream, spec: WindowSpec | Whole, workdir: Path) -> dict:
    """Write windows of frames on the model's clock; the pictures' part of the answer."""
    if isinstance(spec, Whole):
        spec = window_of_all(spec, stream)
    takes, left_out = plan(stream, spec)
    last = max(
        take.picks[start + spec.num_frames - 1].right for take in takes for start in take.starts
    )
    last = min(last + 1, len(stream.pts_s) - 1)  # motion compensation looks one frame further
    check_whole(path, stream.pts_s[: last + 1])
    windows = []
    for take in takes:
        get, decoder, decoder_note = open_frames(path, stream)  # which may only go forwards

        @lru_cache(maxsize=6)
        def fitted(index: int, get: Callable = get) -> np.ndarray:
            return fit(get(index), spec.height, spec.width)

        make = resample.frame_maker(fitted, take.clock_s, spec.resample)
        if take.speed > 1:
            make = resample.smooth_maker(fitted, take.clock_s, spec.fps)
        for index, start in enumerate(take.starts):
            file = f"window_{len(windows):03d}.npy"
            chosen = take.picks[start : start + spec.num_frames]
            origins = write_window(workdir / file, make, chosen, spec)
            shown_s = np.arange(start, start + spec.num_frames) / spec.fps
            own_s = np.interp(shown_s, take.clock_s, stream.pts_s - stream.pts_s[0])
            windows.append(
                {
                    "index": index,
                    "speed": take.speed,
                    "times_s": own_s.tolist(),
                    "file": file,
                    "inbetween": origins.count("inbetween"),
                    "nearest_fallback": origins.count("nearest") if spec.resample == "auto" else 0,
                }
            )
    return {
        "decoder": decoder,
        "decoder_note": decoder_note,
        "windows": windows,
        "left_out": left_out,
    }


@dataclass(frozen=True)
class Take:
    """A clip at one speed: its frames' times (N,) in s on the output's clock, all output frames,
    and which of these begin a window."""

    speed: float
    clock_s: np.ndarray
    picks: list[resample.Pick]
    starts: list[int]


def plan(stream: Stream, spec: WindowSpec) -> tuple[list[Take], list[str]]:
    """The takes that the clip can give, and why it cannot give others.

    Raises ClipRejected where it can give none.
    """
    takes, left_out, refused = [], [], []
    timed = len(stream.pts_s) > 1
    slow = [v for v in spec.speeds if timed and resample.is_too_slow(stream.pts_s / v, spec.fps)]
    for speed in spec.speeds:
        if speed in slow[1:]:
            continue  # one sentence does for all of these
        at = "" if speed == 1 else f"at speed {speed:g}: "
        pts_s = stream.pts_s / speed
        try:
            check_rate(pts_s, spec.fps)
            clock_s = resample.clock(pts_s, spec.fps)
            picks = resample.plan_picks(clock_s, spec.fps)
            starts, holes = choose_windows(picks, clock_s, spec)
        except ClipRejected as reason:
            others = ", ".join(f"{v:g}" for v in slow[1:]) if speed in slow else ""
            refused.append(f"{at}{reason}" + (f" (so it is at {others})" if others else ""))
            continue
        takes.append(Take(speed, clock_s, picks, starts))
        left_out += [f"{at}{hole}" for hole in holes]
    if not takes:
        raise ClipRejected(refused[0])
    return takes, [*refused, *left_out]


def outline(path: Path, stream: Stream, spec: Outline, workdir: Path) -> dict:
    """Write all frames, small, at their own times; the pictures' part of the answer."""
    times_s = stream.pts_s - stream.pts_s[0]
    times_s = times_s[times_s <= spec.most_s]
    if len(times_s) < 3:
        raise ClipRejected(f"it has {len(stream.pts_s)} frames, which is no motion to look at")
    check_whole(path, stream.pts_s[: len(times_s)])
    get, decoder, decoder_note = open_frames(path, stream)
    height, width, _ = stream.first.shape
    scale = min(1.0, spec.most_px / max(height, width))
    height, width = max(1, round(scale * height)), max(1, round(scale * width))
    shape = (len(times_s), height, width, 3)
    file = "window_000.npy"
    frames = _frames_on_disk(workdir / file, shape)
    for index in range(len(times_s)):
        frames[index] = fit(get(index), height, width)
    frames.flush()
    window = {
        "index": 0,
        "speed": 1.0,
        "times_s": times_s.tolist(),
        "file": file,
        "inbetween": 0,
        "nearest_fallback": 0,
    }
    return {
        "decoder": decoder,
        "decoder_note": decoder_note,
        "windows": [window],
        "left_out": [],
    }


def read_stream(path: Path) -> Stream:
    """Demux `path`; decode nothing but its first frame, for the rotation."""
    try:
        with av.open(path) as container:
            if container.format.name in PLAYLISTS:
                raise ClipRejected("it is a playlist that names other files, not a video")
            if not container.streams.video:
                raise ClipRejected("it has no video stream")
            video = container.streams.video[0]
            packets = [p for p in container.demux(video) if p.size and not p.is_discard]
            untimed = sum(p.pts is None for p in packets)
            if untimed:
                raise ClipRejected(f"{untimed} of its {len(packets)} frames have no timestamp")
            pts_s = np.sort([float(p.pts * p.time_base) for p in packets])
        with av.open(path) as container:
            first = next(container.decode(video=0), None)
    except (av.error.FFmpegError, OSError) as error:
        raise ClipRejected(f"it cannot be opened as a video ({error.strerror})") from None
    if first is None:
        raise ClipRejected("not one frame of it can be decoded")
    twins = int((np.diff(pts_s) <= 0).sum())
    if twins:
        raise ClipRejected(f"{twins} of its {len(pts_s)} frames share a timestamp with another")
    rotation = -first.rotation % 360
    return Stream(pts_s, rotation, upright(first, rotation))


def upright(frame: av.VideoFrame, rotation: int) -> np.ndarray:
    """uint8 RGB (H, W, 3) turned clockwise by `rotation` degrees (to the nearest quarter turn)."""
    return np.rot90(frame.to_ndarray(format="rgb24"), -round(rotation / 90))


def check_rate(pts_s: np.ndarray, fps: float) -> None:
    """Raise ClipRejected if frames at `pts_s` (N,) are fewer than two or slower than `fps`."""
    if len(pts_s) < 2:
        raise ClipRejected(f"it has {len(pts_s)} frames, which is no motion")
    if resample.is_too_slow(pts_s, fps):
        rate = resample.source_fps(pts_s)
        raise ClipRejected(
            f"its {rate:.4g} fps are slower than the {fps:g} fps of the model; "
            "give a faster recording, motion is never invented"
        )


def window_of_all(spec: Whole, stream: Stream) -> WindowSpec:
    """The one window that is the whole clip. Raises ClipRejected where `spec` does not allow it."""
    height, width, _ = stream.first.shape
    frames = len(stream.pts_s)
    if frames < spec.least_frames:
        raise ClipRejected(f"it has {frames} frames, {spec.least_frames} are needed")
    fps = resample.source_fps(stream.pts_s)
    picks = resample.plan_picks(resample.clock(stream.pts_s, fps), fps)
    if len(picks) != frames or any(pick.at for pick in picks):
        raise ClipRejected("its frames are not evenly spaced in time")
    num_frames = min(frames, spec.most_pixels // (height * width))
    if num_frames < spec.least_frames:
        raise ClipRejected(f"{width}x{height} is too large; scale it down")
    return WindowSpec(fps, num_frames, height, width, "first", 1, "nearest")


def choose_windows(
    picks: list[resample.Pick], clock_s: np.ndarray, spec: WindowSpec
) -> tuple[list[int], list[str]]:
    """First picks of the windows that can be used, and why others cannot.

    Raises ClipRejected if the clip is shorter than one window or has holes in all of them.
    """
    room = len(picks) - spec.num_frames
    if room < 0:
        fitting = (len(picks) - 1) // STRIDE * STRIDE + 1
        raise ClipRejected(
            f"it gives {len(picks)} frames at {spec.fps:g} fps and {spec.num_frames} are needed"
            + (f"; num_frames {fitting} would fit" if fitting > 1 else "")
        )
    if spec.windows == "first":
        starts = [0]
    elif spec.windows == "all":
        starts = list(range(0, room + 1, spec.num_frames))
    else:
        assert spec.windows == "spaced", spec.windows
        num = min(spec.max_windows, len(picks) // spec.num_frames)
        starts = [round(start) for start in np.linspace(0, room, num)] if num > 1 else [0]
    usable, left_out = [], []
    for start in starts:
        hole = resample.hole_in(picks[start : start + spec.num_frames], clock_s, spec.fps)
        if hole is None:
            usable.append(start)
            continue
        left_out.append(
            f"window at {start / spec.fps:.2f} s left out: {hole:.3f} s without a frame, "
            f"{resample.HOLE / spec.fps:.3f} s can be bridged"
        )
    if not usable:
        raise ClipRejected(f"no window of it can be used: {left_out[0]}")
    return usable, left_out


def check_whole(path: Path, pts_s: np.ndarray) -> None:
    """Decode strictly up to the last of `pts_s`; raise ClipRejected at the first damage.

    decord hides damage: it repeats a frame and goes on.
    """
    due = set(np.round(pts_s, 4))
    try:
        with av.open(path) as container:
            video = container.streams.video[0]
            video.thread_type = "AUTO"
            video.codec_context.options = {"err_detect": "+crccheck+bitstream+buffer+careful"}
            for frame in container.decode(video):
                if frame.is_corrupt or frame.pts is None:
                    raise ClipRejected(f"its video stream is damaged near {frame.time or 0:.2f} s")
                due.discard(np.round(frame.time, 4))
                if not due:
                    return
    except av.error.FFmpegError as error:
        raise ClipRejected(f"its video stream is damaged ({error.strerror})") from None
    raise ClipRejected(f"its video stream is damaged: {len(due)} frames do not decode")


def open_frames(path: Path, stream: Stream) -> tuple[Callable[[int], np.ndarray], str, str | None]:
    """get(i) -> upright source frame i, the decoder's name, and why it is not decord."""
    num = len(stream.pts_s)
    if decord is None:
        return pyav_frames(path, stream), "pyav", "decord is not installed; PyAV decodes instead"
    try:
        reader = decord.VideoReader(str(path), num_threads=MAX_THREADS)
        times = reader.get_frame_timestamp(range(len(reader)))[:, 0] if len(reader) else []
    except (decord.DECORDError, RuntimeError) as error:
        why = f"cannot open it ({str(error).splitlines()[0]})"
    else:
        if len(reader) != num:
            why = f"finds {len(reader)} frames where there are {num}"
        elif np.abs((times - times[0]) - (stream.pts_s - stream.pts_s[0])).max() > SAME_TIME_S:
            why = "gives its frames other timestamps"
        elif not same_picture(reader[0].asnumpy(), stream.first):
            why = "gives another first frame"  # it does if a row of pixels is padded in memory
        else:
            return lambda index: reader[index].asnumpy(), "decord", None
    return pyav_frames(path, stream), "pyav", f"decord {why}; PyAV decodes it instead"


def same_picture(a: np.ndarray, b: np.ndarray) -> bool:
    return (
        a.shape == b.shape and float(cv2.absdiff(a, np.ascontiguousarray(b)).mean()) < SAME_PICTURE
    )


def pyav_frames(path: Path, stream: Stream) -> Callable[[int], np.ndarray]:
    """get(i) by PyAV, for i that never falls; the last few frames can be had again."""
    container = av.open(path)
    decoded = enumerate(container.decode(video=0))
    recent: dict[int, np.ndarray] = {}

    def get(index: int) -> np.ndarray:
        while index not in recent:
            position, frame = next(decoded)
            recent[position] = upright(frame, stream.rotation)
            if len(recent) > 8:
                recent.pop(min(recent))
        return recent[index]

    return get


def fit(frame: np.ndarray, height: int, width: int) -> np.ndarray:
    """Scale (H, W, 3) to cover height x width, aspect kept, and cut out the middle."""
    scale = max(height / frame.shape[0], width / frame.shape[1])
    size = max(width, round(frame.shape[1] * scale)), max(height, round(frame.shape[0] * scale))
    if size != (frame.shape[1], frame.shape[0]):
        kernel = cv2.INTER_AREA if scale < 1 else cv2.INTER_LANCZOS4
        frame = cv2.resize(frame, size, interpolation=kernel)
    top, left = (size[1] - height) // 2, (size[0] - width) // 2
    return np.ascontiguousarray(frame[top : top + height, left : left + width])


def write_window(path: Path, make: Callable, picks: list, spec: WindowSpec) -> list[str]:
    """Make the frames of `picks` and write them to `path`, one at a time; their origins."""
    shape = (spec.num_frames, spec.height, spec.width, 3)
    frames = _frames_on_disk(path, shape)
    origins = []
    for k, pick in enumerate(picks):
        made = make(pick)
        frames[k] = made.frame
        origins.append(made.origin)
    frames.flush()
    return origins


def _frames_on_disk(path: Path, shape: tuple[int, ...]) -> np.memmap:
    """A file of frames to be filled. All its room is taken at once: where the disk were full later,
    writing to memory would end the process with SIGBUS. Raises OSError."""
    frames = np.lib.format.open_memmap(path, mode="w+", dtype=np.uint8, shape=shape)
    with open(path, "r+b") as file:
        os.posix_fallocate(file.fileno(), 0, path.stat().st_size)
    return frames


def save_audio(path: Path, pts_s: np.ndarray, target: Path) -> dict:
    """Decode the sound that goes with frames at `pts_s` (N,); the sound's part of the answer.

    The first sound track, mono float32. A missing or broken one does not reject the clip:
    `no_audio` says why there is none.
    """
    first_s, last_s = float(pts_s[0]), min(float(pts_s[-1]), pts_s[0] + MOST_SOUND_S)
    none = {"audio_rate": None, "audio_start_s": None, "audio_broken": True}
    try:
        with av.open(path) as container:
            if not container.streams.audio:
                return none | {"no_audio": "the file has no sound track", "audio_broken": False}
            pieces = read_sound(container, first_s - LEAD_S, last_s + LEAD_S)
    except av.error.FFmpegError as error:
        return none | {"no_audio": f"its sound track does not decode ({error.strerror})"}
    except ValueError as error:  # the resampler's, of formats that it does not know
        return none | {"no_audio": f"its sound track does not decode ({error})"}
    if not pieces:
        why = "its sound track is empty or lies outside of its pictures"
        return none | {"no_audio": why, "audio_broken": False}
    start_s = pieces[0][0]
    ends_s = [at_s + len(samples) / AUDIO_RATE_HZ for at_s, samples in pieces]
    audio = np.zeros(round((max(ends_s) - start_s) * AUDIO_RATE_HZ), np.float32)
    for at_s, samples in pieces:
        place = round((at_s - start_s) * AUDIO_RATE_HZ)
        audio[place : place + len(samples)] = samples[: len(audio) - place]
    if not np.abs(audio).max(initial=0) < LOUDEST:  # nor is what is not a number
        return none | {"no_audio": "its sound track holds values that are no sound"}
    np.save(target, audio, allow_pickle=False)
    return {
        "audio_rate": AUDIO_RATE_HZ,
        "audio_start_s": start_s - first_s,
        "audio_broken": False,
        "no_audio": None,
    }


def read_sound(
    container: av.container.InputContainer, from_s: float, until_s: float
) -> list[tuple[float, np.ndarray]]:
    """The first sound track between two times as pieces in order: when, and mono samples.

    A new piece begins where timestamps jump, so that nothing later is out of time, and where
    sample rate or channels change. Raises ValueError for damage that the decoder only marks.
    """
    pieces: list[tuple[float, list[np.ndarray]]] = []
    setup = resampler = None
    due_s = 0.0  # when the next frame is due by the samples so far

    def finish() -> None:
        if pieces:
            pieces[-1][1].extend(out.to_ndarray()[0] for out in resampler.resample(None))

    for frame in container.decode(container.streams.audio[0]):
        if frame.is_corrupt:
            raise ValueError(f"damaged near {frame.time or 0:.2f} s")
        at_s = due_s if frame.time is None else frame.time
        if at_s >= until_s:
            break
        lasts_s = frame.samples / frame.sample_rate
        if at_s + lasts_s <= from_s:
            continue
        now = (frame.format.name, frame.layout.name, frame.sample_rate)
        if now != setup or not -JUMP_S < at_s - due_s < JUMP_S:
            finish()
            if pieces and at_s < pieces[-1][0]:
                raise ValueError(f"its time runs backwards at {at_s:.2f} s")
            pieces.append((at_s, []))
            setup, due_s = now, at_s
            resampler = av.AudioResampler(format="flt", layout="mono", rate=AUDIO_RATE_HZ)
        frame.pts = None  # its place is settled, and the resampler would fill small gaps
        pieces[-1][1].extend(out.to_ndarray()[0] for out in resampler.resample(frame))
        due_s += lasts_s
    finish()
    return [(at_s, np.concatenate(chunks)) for at_s, chunks in pieces if chunks]


if __name__ == "__main__":
    main()
