"""The toy set: drawn clips whose rhythm is known exactly, for the demo, the tests and the bench.

Motion is a function of real time in seconds, so the same clip can be drawn at any frame rate;
shapes are drawn with sub-pixel coverage, so that no jitter comes from the drawing itself.
"""

import json
import os
import tempfile
from dataclasses import asdict, dataclass, replace
from pathlib import Path

import numpy as np

from tempolora.config import ConfigError
from tempolora.data.video import write_mp4

KINDS = ("square", "ball", "bar", "disc", "pan", "pendulum")
AUDIO_RATE_HZ = 44_100
CLICK_S = 0.03
SENTENCES = {
    "square": "a {colour} square slides from side to side",
    "ball": "a {colour} ball bounces on the floor",
    "bar": "a {colour} bar turns like a propeller",
    "disc": "a {colour} disc swells and shrinks",
    "pan": "the camera pans from side to side over a {colour} pattern",
    "pendulum": "a {colour} pendulum swings",
}
COLOURS = {
    "red": (214, 48, 49),
    "green": (46, 170, 87),
    "blue": (52, 101, 220),
    "yellow": (236, 196, 50),
    "purple": (142, 68, 190),
    "white": (240, 240, 236),
}


@dataclass(frozen=True)
class Motion:
    """What moves and how: displacement = amplitude_px * cos(2 pi hz t + phase), t in seconds.

    `hz` is the rate at which the picture repeats, `phase` is in radians and a beat falls wherever
    hz * t + phase / 2 pi is whole: the mover at its extreme, the ball on the floor, the bar level.
    `textured` gives mover and background a pattern with waves of 6 to `longest_wave_px`; `seed`
    chooses it. `tint` and `ground` are RGB.
    """

    kind: str
    hz: float
    phase: float
    amplitude_px: float
    tint: tuple[int, int, int] = COLOURS["red"]
    ground: tuple[int, int, int] = (70, 74, 84)
    textured: bool = True
    longest_wave_px: float = 96.0
    seed: int = 0


def draw_clip(
    motion: Motion, *, fps: float, num_frames: int, height: int, width: int, start_s: float = 0.0
) -> np.ndarray:
    """Draw `motion` at the times start_s + k / fps: uint8 RGB (F, H, W, 3)."""
    if motion.kind not in KINDS:
        raise ValueError(f"unknown kind {motion.kind!r}, choose from {', '.join(KINDS)}")
    y, x = np.mgrid[0:height, 0:width].astype(np.float32) + np.float32(0.5)
    ground = _paint(motion.ground, motion, x, y, 1)
    frames = np.empty((num_frames, height, width, 3), np.uint8)
    for k in range(num_frames):
        turn = 2 * np.pi * motion.hz * (start_s + k / fps) + motion.phase
        if motion.kind == "pan":
            shift = np.float32(motion.amplitude_px * np.cos(turn))
            picture = _paint(motion.tint, replace(motion, textured=True), x - shift, y, 2)
        else:
            inside, u, v = _shape(motion, turn, x, y)
            cover = np.clip(inside + 0.5, 0, 1)[..., None]
            picture = ground * (1 - cover) + _paint(motion.tint, motion, u, v, 2) * cover
        frames[k] = np.clip(np.rint(picture), 0, 255).astype(np.uint8)
    return frames


def draw_toy_set(
    folder: Path, *, fps: float, num_frames: int, height: int, width: int, clips: int, seed: int
) -> None:
    """Write `clips` mp4s with click soundtracks, `prompts.txt` and `truth.json` into `folder`.

    truth.json maps each file to its kind, hz, phase (rad), amplitude_px, fps and beats_s. The
    folder appears only once it is whole. Raises ConfigError if it exists already.
    """
    folder = Path(folder)
    if folder.exists():
        raise ConfigError(f"{folder} exists already: the toy set is never drawn over a folder")
    folder.parent.mkdir(parents=True, exist_ok=True)
    rng = np.random.default_rng(seed)
    prompts, truth = [], {}
    with tempfile.TemporaryDirectory(dir=folder.parent, prefix=f".{folder.name}.") as holder:
        partial = Path(holder) / "set"  # inside the holder, which is removed whatever happens
        partial.mkdir()
        for index in range(clips):
            motion, colour = random_motion(KINDS[index % len(KINDS)], height, width, rng)
            name = f"{motion.kind}_{index:03d}.mp4"
            size = {"height": height, "width": width}
            frames = draw_clip(motion, fps=fps, num_frames=num_frames, **size)
            beats = beat_times(motion, num_frames / fps)
            audio = click_track(beats, num_frames / fps)
            write_mp4(partial / name, frames, fps, audio, AUDIO_RATE_HZ)
            prompts.append(f"{name}|{SENTENCES[motion.kind].format(colour=colour)}\n")
            truth[name] = asdict(motion) | {"fps": fps, "beats_s": beats.tolist()}
        (partial / "prompts.txt").write_text("".join(prompts), encoding="utf-8")
        (partial / "truth.json").write_text(json.dumps(truth, indent=1), encoding="utf-8")
        os.rename(partial, folder)


def random_motion(
    kind: str, height: int, width: int, rng: np.random.Generator
) -> tuple[Motion, str]:
    """A motion of `kind` at 1 to 4 Hz (log-uniform) that fits the picture; its colour's name."""
    colour = str(rng.choice(list(COLOURS)))
    motion = Motion(
        kind=kind,
        hz=float(np.exp(rng.uniform(np.log(1.0), np.log(4.0)))),
        phase=float(rng.uniform(0, 2 * np.pi)),
        amplitude_px=float(min(height, width) * rng.uniform(0.1, 0.2)),
        tint=COLOURS[colour],
        ground=tuple(int(level) for level in rng.integers(20, 110, 3)),
        textured=bool(rng.random() < 0.5),
        seed=int(rng.integers(2**31)),
    )
    return motion, colour


def beat_times(motion: Motion, duration_s: float) -> np.ndarray:
    """Times (s) in [0, duration_s) at which the motion's phase is a whole turn."""
    offset = motion.phase / (2 * np.pi)
    turns = np.arange(np.ceil(offset), np.ceil(motion.hz * duration_s + offset))
    return (turns - offset) / motion.hz


def click_track(beats_s: np.ndarray, duration_s: float, rate: int = AUDIO_RATE_HZ) -> np.ndarray:
    """Mono float32 audio at `rate` Hz with a decaying 1 kHz click starting at each beat (s)."""
    audio = np.zeros(round(duration_s * rate), np.float32)
    for beat in beats_s:
        first = int(np.ceil(beat * rate))
        t = (np.arange(first, min(first + int(CLICK_S * rate), len(audio))) / rate) - beat
        audio[first : first + len(t)] += 0.7 * np.cos(2 * np.pi * 1000 * t) * np.exp(-t / 0.006)
    return np.clip(audio, -1, 1)


def _shape(motion: Motion, turn: float, x: np.ndarray, y: np.ndarray) -> tuple[np.ndarray, ...]:
    """Signed distance (px, positive inside) and the mover's own coordinates u, v (px)."""
    height, width = x.shape
    size = 0.16 * min(height, width)
    swing = motion.amplitude_px * np.cos(turn)
    u, v = x - width / 2, y - height / 2
    if motion.kind == "square":
        u = u - swing
        return np.minimum(size - abs(u), size - abs(v)), u, v
    if motion.kind == "ball":
        rise = 2 * motion.amplitude_px * _parabola(turn)
        v = v - (height / 2 - size - 0.1 * height) + rise
        return size - np.hypot(u, v), u, v
    if motion.kind == "disc":
        return size + 0.5 * swing - np.hypot(u, v), u, v
    if motion.kind == "bar":
        u, v = _rotate(u, v, turn / 2)  # a bar looks the same after half a turn
        return np.minimum(2.2 * size - abs(u), 0.4 * size - abs(v)), u, v
    length = 0.6 * height  # the pendulum hangs from the middle of the upper edge
    u, v = _rotate(u, v + height / 2, swing / length)
    bob = size - np.hypot(u, v - length)
    rod = np.minimum(0.15 * size - abs(u), length - v)
    return np.maximum(bob, rod), u, v


def _rotate(u: np.ndarray, v: np.ndarray, angle: float) -> tuple[np.ndarray, np.ndarray]:
    c, s = np.float32(np.cos(angle)), np.float32(np.sin(angle))
    return c * u - s * v, s * u + c * v


def _parabola(turn: float) -> float:
    """Height in [0, 1] of a ball that is on the floor at each whole turn."""
    part = (turn / (2 * np.pi)) % 1.0
    return 4 * part * (1 - part)


def _paint(colour, motion: Motion, u: np.ndarray, v: np.ndarray, layer: int) -> np.ndarray:
    """(H, W, 3): the flat colour, or a pattern of 12 waves, exact at any position.

    Their pitch goes from 6 to (by default) 96 px at equal strength per octave, as in natural
    pictures.
    """
    flat = np.asarray(colour, np.float32)
    if not motion.textured:
        return np.broadcast_to(flat, (*u.shape, 3))
    rng = np.random.default_rng([motion.seed, layer])
    pattern = np.zeros_like(u)
    for pitch in np.geomspace(6, motion.longest_wave_px, 12):
        angle = rng.uniform(0, np.pi)
        start = rng.uniform(0, 2 * np.pi) if layer == 1 else 0.0  # half a turn leaves movers alike
        k = np.float32(2 * np.pi / pitch)
        pattern += np.cos(
            k * (np.float32(np.cos(angle)) * u + np.float32(np.sin(angle)) * v) + start
        )
    return flat + (8 * pattern)[..., None].astype(np.float32)
