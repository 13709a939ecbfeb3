"""The toy set: drawn clips as a folder of mp4s with captions, their truth and a click on each beat.

It is what the demo and the tests train on: the same folder that a user brings, from `data/toy.py`.
"""

import json
import os
import tempfile
from pathlib import Path

import numpy as np

from tempolora.config import ConfigError
from tempolora.data import toy
from tempolora.data.video import write_mp4

HZ = (1.0, 4.0)
AUDIO_RATE_HZ = 44_100
CLICK_S = 0.03


def draw_toy_set(
    folder: Path, *, fps: float, num_frames: int, height: int, width: int, clips: int, seed: int
) -> None:
    """Write `clips` mp4s with click soundtracks, `prompts.txt` and `truth.json` into `folder`.

    Kinds take turns; frequencies are 1 to 4 Hz. truth.json maps each file to its `truth`. The
    folder appears only once it is whole. Raises ConfigError if it exists already.
    """
    folder = Path(folder)
    if folder.exists():
        raise ConfigError(f"{folder} exists already: the toy set is never drawn over a folder")
    folder.parent.mkdir(parents=True, exist_ok=True)
    rng = np.random.default_rng(seed)
    timing = {"fps": fps, "num_frames": num_frames, "height": height, "width": width}
    prompts, told = [], {}
    with tempfile.TemporaryDirectory(dir=folder.parent, prefix=f".{folder.name}.") as holder:
        partial = Path(holder) / "set"  # inside the holder, which is removed whatever happens
        partial.mkdir()
        for index in range(clips):
            kind = toy.KINDS[index % len(toy.KINDS)]
            scene = toy.draw_scenes(1, rng, kinds=(kind,), hz=HZ)
            name = f"{kind}_{index:03d}.mp4"
            told[name] = truth(scene, **timing)
            audio = click_track(np.array(told[name]["beats_s"]), num_frames / fps)
            frames = draw_frames(scene, **timing)
            write_mp4(partial / name, frames, fps, audio, AUDIO_RATE_HZ)
            prompts.append(f"{name}|{told[name]['caption']}\n")
        (partial / "prompts.txt").write_text("".join(prompts), encoding="utf-8")
        (partial / "truth.json").write_text(json.dumps(told, indent=1), encoding="utf-8")
        os.rename(partial, folder)


def draw_frames(
    scene: toy.Scenes, *, fps: float, num_frames: int, height: int, width: int
) -> np.ndarray:
    """A single clean scene as uint8 (F, H, W, 3); of large pictures a few frames at a time."""
    size = {"fps": fps, "height": height, "width": width}
    portion = max(1, toy.CHUNK_PX // (height * width))
    parts = [
        toy.render(scene, **size, num_frames=min(portion, num_frames - first), start_s=first / fps)
        for first in range(0, num_frames, portion)
    ]
    return np.concatenate([part[0].numpy() for part in parts])


def truth(
    scene: toy.Scenes, *, fps: float, num_frames: int, height: int, width: int
) -> dict[str, object]:
    """What is known about the clip of a single scene, as JSON has it.

    kind, shape, hz, phase (radians), amplitude_px (half of the way from end to end; 0 for a pulse),
    fps, beats_s, track_px ([x, y] of the mover's middle in each frame), colour ([r, g, b] in 0..255
    of the mover) and caption.
    """
    size = {"height": height, "width": width}
    track_F2 = toy.tracks(scene, fps=fps, num_frames=num_frames, **size)[0]
    return {
        "kind": scene.kinds[0],
        "shape": toy.SHAPES[scene.shape_N.item()],
        "hz": scene.hz_N.item(),
        "phase": scene.phase_N.item(),
        "amplitude_px": toy.amplitude_px(scene, **size).item(),
        "fps": fps,
        "beats_s": toy.beat_times(scene, num_frames / fps).tolist(),
        "track_px": [[round(axis, 3) for axis in point] for point in track_F2.tolist()],
        "colour": [round(255 * level) for level in scene.tint_N3[0].tolist()],
        "caption": toy.captions(scene)[0],
    }


def click_track(beats_s: np.ndarray, duration_s: float, rate: int = AUDIO_RATE_HZ) -> np.ndarray:
    """Mono float32 audio at `rate` Hz with a decaying 1 kHz click starting at each beat (s)."""
    audio = np.zeros(round(duration_s * rate), np.float32)
    for beat in beats_s:
        first = int(np.ceil(beat * rate))
        t = (np.arange(first, min(first + int(CLICK_S * rate), len(audio))) / rate) - beat
        audio[first : first + len(t)] += 0.7 * np.cos(2 * np.pi * 1000 * t) * np.exp(-t / 0.006)
    return np.clip(audio, -1, 1)
