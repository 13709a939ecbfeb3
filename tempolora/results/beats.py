"""How clips move against what is heard in them, as a picture: `tempolora beats`.

Of clips, decoded at their own frame rate, or of the samples in a folder of shards, as stored.
"""

import logging
import tempfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch

from tempolora.config import ConfigError
from tempolora.data.audio import Track
from tempolora.data.clips import ClipRejected, Outline, list_clips, read_clip
from tempolora.data.shards import HEARD, MANIFEST, Sample, ShardReader, read_manifest
from tempolora.files import replacing
from tempolora.rhythm.beat import SURE, Tempo, align
from tempolora.rhythm.tempo import motion_energy

log = logging.getLogger(__name__)

VIDEOS = {".avi", ".m4v", ".mkv", ".mov", ".mp4", ".webm"}
MOST_CLIPS = 12  # in one picture
OUTLINE = Outline(most_px=256, most_s=60.0)
MOTION, SOUND, BEAT = "#2a6f97", "#e07a1f", "#444444"


@dataclass(frozen=True)
class Strip:
    """One clip. `moving` (G,) at times `moving_s`, `heard` (E,) at `heard_s`, in s and any unit.

    `heard_there` (G,) is the onset envelope in the steps of `moving`. No sound: both are None, and
    `silence` says why.
    """

    name: str
    fps: float
    moving_s: np.ndarray
    moving: np.ndarray
    silence: str | None = None
    heard_s: np.ndarray | None = None
    heard: np.ndarray | None = None
    heard_there: np.ndarray | None = None
    beats_s: np.ndarray | None = None
    tempo: Tempo | None = None


def draw_beats(source: Path, out: Path, timeout_s: float) -> Path:
    """Draw a clip, a folder of clips, or one of shards into the PNG `out`; returns that.

    Of more than twelve clips the first twelve. timeout_s: for decoding one clip. Raises ConfigError
    where there is no clip, or none that can be read.
    """
    if out.suffix.lower() != ".png":
        raise ConfigError(f"--out: {out} is drawn as a PNG; name a file that ends in .png")
    if (source / MANIFEST).is_file():
        readers = _samples(source)
    else:
        readers = [_reader(path, timeout_s) for path in _clips(source)]
    if len(readers) > MOST_CLIPS:
        log.info("%s: %d clips, the first %d are drawn", source, len(readers), MOST_CLIPS)
    strips, reason = [], ""
    for read in readers[:MOST_CLIPS]:
        try:
            strips.append(read())
        except ClipRejected as error:
            reason = str(error)
            log.warning("left out: %s", reason)
        else:
            log.info("%s: %s", strips[-1].name, _caption(strips[-1]))
    if not strips:
        raise ConfigError(f"{source}: nothing to draw; the last clip: {reason}")
    out.parent.mkdir(parents=True, exist_ok=True)
    with replacing(out) as temporary:
        _figure(strips).savefig(temporary, format="png", dpi=120)
    return out


def _clips(source: Path) -> list[Path]:
    """The clip itself, those that a list names, or all video files of a folder."""
    if source.is_file():
        return [source]
    if not source.is_dir():
        raise ConfigError(f"{source}: no such file or folder; name a clip, or a folder of clips")
    if (source / "prompts.txt").exists() or (source / "metadata.jsonl").exists():
        return [clip.path for clip in list_clips(source)]
    found = sorted(p for p in source.iterdir() if p.suffix.lower() in VIDEOS and p.is_file())
    if not found:
        raise ConfigError(f"{source}: holds no clip ({', '.join(sorted(VIDEOS))}) and no shards")
    return found


def _reader(path: Path, timeout_s: float) -> Callable[[], Strip]:
    def read() -> Strip:
        with tempfile.TemporaryDirectory() as scratch:
            clip = read_clip(path, OUTLINE, Path(scratch), timeout_s)
            frames_FHW3 = torch.from_numpy(np.array(clip.windows[0].frames))
        times_s = np.array(clip.windows[0].times_s)
        if clip.duration_s > times_s[-1] + 2 / clip.source_fps:
            log.info("%s: its first %g s are drawn", path.name, OUTLINE.most_s)
        name, fps = path.name, clip.source_fps
        # per frame of the mean rate, where frames are not evenly spaced
        moving = motion_energy(frames_FHW3)[1:].numpy() / (np.diff(times_s) * fps)
        strip = Strip(name, fps, (times_s[1:] + times_s[:-1]) / 2, moving, clip.no_audio)
        if clip.audio is None:
            return strip
        track = Track(clip.audio, clip.audio_rate, clip.audio_start_s)
        if not track.is_heard(times_s):
            return Strip(name, fps, strip.moving_s, moving, "its sound track is silent")
        return Strip(
            name,
            fps,
            strip.moving_s,
            moving,
            heard_s=times_s,
            heard=track.envelope(times_s),
            heard_there=track.envelope(strip.moving_s),
            beats_s=track.beats_s[(track.beats_s >= 0) & (track.beats_s <= times_s[-1])],
            tempo=track.tempo,
        )

    return read


def _samples(folder: Path) -> list[Callable[[], Strip]]:
    reader = ShardReader(folder, read_manifest(folder)["fingerprint"])
    return [lambda position=k: _stored(reader.read(position)) for k in range(len(reader))]


def _stored(sample: Sample) -> Strip:
    """A sample as training meets it."""
    meta, rhythm = sample.meta, sample.rhythm
    fps, name = meta["fps"], f"{meta['file']}, window {meta['window']}"
    moving = rhythm["motion_energy"][1:].numpy()
    moving_s = (np.arange(len(moving)) + 0.5) / fps
    if meta["sound"] != HEARD:
        why = meta["no_audio"] or "its sound track is silent here"
        return Strip(name, fps, moving_s, moving, why)
    onset = rhythm["onset"].numpy()
    return Strip(
        name,
        fps,
        moving_s,
        moving,
        heard_s=np.arange(len(onset)) / fps,
        heard=onset,
        heard_there=(onset[1:] + onset[:-1]) / 2,
        beats_s=rhythm["beats_s"].numpy(),
        tempo=meta["tempo"] and Tempo(**meta["tempo"]),
    )


def _caption(strip: Strip) -> str:
    """Tempo with its confidence, and how motion lies to the sound."""
    if strip.silence:
        return strip.silence
    if strip.tempo is None:
        said = "no tempo"
    else:
        sure = strip.tempo.confidence
        said = f"{strip.tempo.bpm:.0f} bpm" if sure >= SURE else "no steady beat"
        said += f" (confidence {sure:.2f})"
    found = align(strip.moving, strip.heard_there, strip.fps)
    if found is None:
        return f"{said}; too short or too still to align"
    side = "after" if found.lag_s >= 0 else "before"
    does = "most" if found.correlation > 0 else "least"
    return (
        f"{said}; motion is {does} {abs(found.lag_s) * 1000:.0f} ms {side} the onsets: "
        f"correlation {found.correlation:.2f}, by chance ±{found.chance:.2f}"
    )


def _figure(strips: list[Strip]):
    """A matplotlib Figure with a strip for each clip: motion upwards, sound downwards."""
    from matplotlib.figure import Figure
    from matplotlib.ticker import MaxNLocator

    figure = Figure(figsize=(12, 0.6 + 1.9 * len(strips)), layout="constrained")
    for axes, strip in zip(figure.subplots(len(strips), squeeze=False)[:, 0], strips, strict=True):
        step_s = 1 / strip.fps
        top = max(float(strip.moving.max()), 1e-9)
        axes.fill_between(strip.moving_s, strip.moving / top, color=MOTION, alpha=0.25, lw=0)
        axes.plot(strip.moving_s, strip.moving / top, color=MOTION, lw=1.2, label="motion energy")
        if strip.heard is not None:
            axes.vlines(strip.heard_s, -strip.heard, 0, color=SOUND, lw=1.6, label="onsets")
            axes.fill_between(strip.heard_s, -strip.heard, color=SOUND, alpha=0.2, lw=0)
            for beat, beat_s in enumerate(strip.beats_s):
                label = None if beat else "beats"
                axes.axvline(beat_s, color=BEAT, lw=0.8, ls=(0, (2, 2)), label=label)
        else:
            axes.text(0.5, 0.22, "no sound", transform=axes.transAxes, color="0.5", ha="center")
        axes.axhline(0, color="0.3", lw=0.6)
        axes.set_title(strip.name, loc="left", fontsize=9, fontweight="bold")
        axes.set_title(_caption(strip), loc="right", fontsize=8, color="0.25")
        axes.set(xlim=(0, strip.moving_s[-1] + step_s / 2), ylim=(-1.08, 1.08), yticks=[])
        axes.xaxis.set_major_locator(MaxNLocator(12, steps=[1, 2, 5, 10]))
        axes.tick_params(labelsize=8)
        axes.spines[["top", "left", "right"]].set_visible(False)
    axes.set_xlabel("s from the first frame", fontsize=9)
    named = {}
    for axes in figure.axes:
        for line, label in zip(*axes.get_legend_handles_labels(), strict=True):
            named.setdefault(label, line)
    figure.legend(
        named.values(),
        [f"{n} ({'up' if n == 'motion energy' else 'down'})" if n != "beats" else n for n in named],
        loc="outside upper center",
        ncols=3,
        frameon=False,
        fontsize=9,
    )
    return figure
