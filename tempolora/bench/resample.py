"""Does resampling keep motion smooth and edges sharp? Drawn clips at known rates give the answer.

The same motion is drawn and encoded at a source rate and at 16 fps; the source is resampled to 16
fps in each mode and compared with the clip that was 16 fps all along. The tables are printed and
go into docs/resampling.md, below its marker line.
"""

import argparse
import sys
import tempfile
from dataclasses import dataclass
from fractions import Fraction
from functools import lru_cache
from pathlib import Path

import av
import cv2
import numpy as np

from tempolora.data import resample
from tempolora.data.toy import COLOURS, Scenes, scene
from tempolora.data.toy_set import draw_frames
from tempolora.data.video import write_mp4

FPS = 16
NUM_FRAMES = 49
HIGH_HZ = 6.0
RATES = (Fraction(24000, 1001), Fraction(25), Fraction(30))
FREQUENCIES_HZ = (1.0, 2.0, 3.0, 4.0)
MODES = ("auto", "nearest", "blend")
# At exactly 4 Hz a 16 fps clip has four different pictures, and how much of it lies above 6 Hz
# hangs on where in the swing they fall; two phases an eighth of a turn apart even that out.
PHASES = (0.0, np.pi / 4)
HEIGHT, WIDTH = 96, 128
PAN = {"kind": "pan", "size": 0.0, "ground": COLOURS["red"]}  # an empty plane with waves
MOVERS = {
    "plain square": {"kind": "slide", "texture": "flat", "ground_texture": "flat"},
    "textured square on texture": {"kind": "slide", "waves": (6 / HEIGHT, 1.0)},
    "pan, waves of 6 to 96 px": {**PAN, "waves": (6 / HEIGHT, 1.0)},
    "pan, waves of 6 to 24 px": {**PAN, "waves": (6 / HEIGHT, 24 / HEIGHT)},
}
SQUARES, PANS = list(MOVERS)[:2], list(MOVERS)[2:]
MARKER = "<!-- written by python -m tempolora.bench resample -->"
LUMA = np.float32([0.2126, 0.7152, 0.0722])


@dataclass(frozen=True)
class Cell:
    """One mode of one row. `power` (luminance, above 6 Hz) and `sharpness` (edges) are ratios to
    the clip drawn at 16 fps directly; `fallbacks` counts frames taken for want of an in-between.

    The part of the tracked position's power above 6 Hz (NaN but for the plain square): in this
    clip, `position_direct` in the direct one, and `position_coded` in the true track when it
    carries nothing but the coding error of the nearest source frames.
    """

    mover: str
    source_fps: float
    hz: float
    mode: str
    power: float
    sharpness: float
    position: float
    position_direct: float
    position_coded: float
    psnr_db: float
    fallbacks: int


def main(argv: list[str]) -> None:
    parser = argparse.ArgumentParser(prog="python -m tempolora.bench resample", description=__doc__)
    parser.add_argument("--out", type=Path, default=Path("docs/resampling.md"))
    chosen = parser.parse_args(argv)
    cv2.setNumThreads(1)
    squares, pans = (
        [measure(mover, rate, hz) for mover in movers for rate in RATES for hz in frequencies]
        for movers, frequencies in ((SQUARES, FREQUENCIES_HZ), (PANS, FREQUENCIES_HZ[-1:]))
    )
    tables = "\n".join([*square_table(squares), "", *pan_table(pans)])
    sys.stdout.write(tables + "\n")
    above = chosen.out.read_text(encoding="utf-8").partition(MARKER)[0]
    chosen.out.write_text(f"{above}{MARKER}\n\n{tables}\n", encoding="utf-8")


def square_table(rows: list[list[Cell]]) -> list[str]:
    """Lines of the table of the bar: one row per mover, rate and frequency."""
    head = "power auto | nearest | blend | edges auto | nearest | blend"
    lines = [
        f"| mover | fps | Hz | {head} | position auto | nearest | blend | coded | direct |",
        "|" + " --- |" * 14,
    ]
    for row in rows:
        floors = row[0].position_coded, row[0].position_direct
        shares = [*(cell.position for cell in row), *floors]
        values = _label(row) + [f"{cell.power:.2f}" for cell in row]
        values += [f"{cell.sharpness:.2f}" for cell in row]
        values += ["" if np.isnan(share) else f"{share:.1e}" for share in shares]
        lines.append("| " + " | ".join(values) + " |")
    return lines


def pan_table(rows: list[list[Cell]]) -> list[str]:
    """Lines of the table of what fails: pans over coarse and fine texture."""
    head = "power auto | nearest | blend | edges auto | nearest | blend"
    lines = [
        f"| mover | fps | Hz | {head} | dB auto | nearest | blend | fallbacks |",
        "|" + " --- |" * 13,
    ]
    for row in rows:
        values = _label(row) + [f"{cell.power:.2f}" for cell in row]
        values += [f"{cell.sharpness:.2f}" for cell in row]
        values += [f"{cell.psnr_db:.1f}" for cell in row] + [str(row[0].fallbacks)]
        lines.append("| " + " | ".join(values) + " |")
    return lines


def _label(row: list[Cell]) -> list[str]:
    return [row[0].mover, f"{row[0].source_fps:.3f}", f"{row[0].hz:g}"]


def measure(
    mover: str,
    rate: Fraction,
    hz: float,
    height: int = HEIGHT,
    width: int = WIDTH,
    modes: tuple[str, ...] = MODES,
) -> list[Cell]:
    """Resample `mover`, swinging at `hz` and encoded at `rate`, to 16 fps in each of `modes`."""
    sums: dict[str, list] = {mode: [] for mode in modes}
    size = {"height": height, "width": width}
    plain = MOVERS[mover].get("texture") == "flat"
    for phase in PHASES:
        motion = _motion(mover, hz, phase)
        truth, direct = _at_16_fps(mover, hz, phase, height, width)
        num = int(np.ceil((NUM_FRAMES - 1) / FPS * rate)) + 2
        drawn = draw_frames(motion, fps=float(rate), num_frames=num, **size)
        source = through_mp4(drawn, rate)
        clock_s = resample.clock(np.arange(num) / float(rate), FPS)
        picks = resample.plan_picks(clock_s, FPS)[:NUM_FRAMES]
        nearest = [pick.left if pick.at <= 0.5 else pick.right for pick in picks]
        floors = (0.0,) * 4
        if plain:
            coding_error = track(source, motion) - track(drawn, motion)
            coded = track(truth, motion) + coding_error[nearest]
            floors = *track_power(coded), *track_power(track(direct, motion))
        for mode in modes:
            make = resample.frame_maker(source.__getitem__, clock_s, mode)
            made = [make(pick) for pick in picks]
            frames = np.stack([m.frame for m in made])
            fallbacks = sum(m.origin == "nearest" for m in made) if mode == "auto" else 0
            own = track_power(track(frames, motion)) if plain else (0.0, 0.0)
            sums[mode].append((*_compare(frames, direct, truth), fallbacks, *own, *floors))
    cells = []
    for mode, runs in sums.items():
        power, power_0, sharp, sharp_0, error, fallbacks, *bands = np.array(runs).sum(0)
        shares = [h / t if plain else np.nan for h, t in zip(bands[::2], bands[1::2])]
        cells.append(
            Cell(
                mover=mover,
                source_fps=float(rate),
                hz=hz,
                mode=mode,
                power=float(power / power_0),
                sharpness=float(sharp / sharp_0),
                position=float(shares[0]),
                position_coded=float(shares[1]),
                position_direct=float(shares[2]),
                psnr_db=float(10 * np.log10(255**2 * len(runs) / error)),
                fallbacks=int(fallbacks),
            )
        )
    return cells


def _motion(mover: str, hz: float, phase: float) -> Scenes:
    return scene(hz=hz, phase=phase, amplitude=0.125, seed=3, **MOVERS[mover])


@lru_cache(maxsize=len(FREQUENCIES_HZ) * len(PHASES))
def _at_16_fps(
    mover: str, hz: float, phase: float, height: int, width: int
) -> tuple[np.ndarray, np.ndarray]:
    """The clip that was 16 fps all along, the same for every rate: as drawn, and encoded."""
    size = {"height": height, "width": width}
    truth = draw_frames(_motion(mover, hz, phase), fps=FPS, num_frames=NUM_FRAMES, **size)
    return truth, through_mp4(truth, Fraction(FPS))


def _compare(frames: np.ndarray, direct: np.ndarray, truth: np.ndarray) -> tuple[float, ...]:
    """Power above 6 Hz and edges of `frames` and of `direct`; squared error against `truth`."""
    seen, wanted = frames @ LUMA, direct @ LUMA
    moving = np.ptp(truth @ LUMA, axis=0) > 8  # pixels that the mover ever touches
    return (
        band_power(seen[:, moving])[0],
        band_power(wanted[:, moving])[0],
        edge_sharpness(seen),
        edge_sharpness(wanted),
        float(np.mean((seen - truth @ LUMA) ** 2)),
    )


def track(frames: np.ndarray, motion: Scenes) -> np.ndarray:
    """Horizontal centre (F,) in px of a plain mover."""
    ground, tint = (
        float(255 * rgb[0].numpy() @ LUMA) for rgb in (motion.ground_N3, motion.tint_N3)
    )
    return centroid_x(frames @ LUMA, ground, tint)


def track_power(track_px: np.ndarray) -> tuple[float, float]:
    return band_power(track_px[:, None])


def through_mp4(frames: np.ndarray, rate: Fraction) -> np.ndarray:
    """Encode uint8 (F, H, W, 3) at `rate` as a real mp4 and read it back."""
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "clip.mp4"
        write_mp4(path, frames, rate)
        with av.open(path) as container:
            return np.stack([f.to_ndarray(format="rgb24") for f in container.decode(video=0)])


def band_power(signal: np.ndarray, fps: float = FPS) -> tuple[float, float]:
    """Power above 6 Hz and in all (but 0 Hz) of (F, N) signals: detrended, Hann, mean over N."""
    num = len(signal)
    t = np.arange(num) - (num - 1) / 2
    signal = signal - signal.mean(0)
    signal = signal - np.outer(t, t @ signal / (t @ t))
    power = np.abs(np.fft.rfft(signal * np.hanning(num)[:, None], axis=0)) ** 2
    freq_hz = np.fft.rfftfreq(num, 1 / fps)
    return float(power[freq_hz > HIGH_HZ].sum(0).mean()), float(power[1:].sum(0).mean())


def edge_sharpness(luma: np.ndarray) -> float:
    """Mean over frames (F, H, W) of the mean of the steepest 1 % of Sobel gradients."""
    steepest = max(1, luma[0].size // 100)
    means = []
    for frame in luma:
        slope = np.hypot(cv2.Sobel(frame, -1, 1, 0), cv2.Sobel(frame, -1, 0, 1)).ravel()
        means.append(np.partition(slope, -steepest)[-steepest:].mean())
    return float(np.mean(means))


def centroid_x(luma: np.ndarray, ground: float, tint: float) -> np.ndarray:
    """Horizontal centre (F,) in px of what stands out from a plain ground, by luminance."""
    cover = np.clip((luma - ground) / (tint - ground), 0, 1)
    cover = np.where(cover > 0.2, cover, 0)  # coding noise far from the mover would weigh in
    return (cover * np.arange(luma.shape[2])).sum((1, 2)) / cover.sum((1, 2))
