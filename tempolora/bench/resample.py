"""Does resampling keep motion smooth and edges sharp? Drawn clips at known rates give the answer.

The same motion is drawn and encoded at a source rate and at 16 fps; the source is resampled to 16
fps in each mode and compared with the clip that was 16 fps all along. The table goes into
docs/resampling.md, below its marker line.
"""

import argparse
import logging
import tempfile
from dataclasses import dataclass
from fractions import Fraction
from pathlib import Path

import av
import cv2
import numpy as np

from tempolora.data import resample
from tempolora.data.toy import Motion, draw_clip
from tempolora.data.video import write_mp4

log = logging.getLogger(__name__)

FPS = 16
NUM_FRAMES = 49
HIGH_HZ = 6.0
RATES = (Fraction(24000, 1001), Fraction(25), Fraction(30))
FREQUENCIES_HZ = (1.0, 2.0, 3.0, 4.0)
MODES = ("auto", "nearest", "blend")
# At exactly 4 Hz a 16 fps clip has four different pictures, and how much of it lies above 6 Hz
# hangs on where in the swing they fall; two phases an eighth of a turn apart even that out.
PHASES = (0.0, np.pi / 4)
MARKER = "<!-- written by python -m tempolora.bench resample -->"
LUMA = np.float32([0.2126, 0.7152, 0.0722])


@dataclass(frozen=True)
class Cell:
    """One row of the table; all but psnr_db are ratios to the clip drawn at 16 fps directly.

    power: luminance power above 6 Hz; position_share: part of the tracked position's power above
    6 Hz, and position_share_direct that of the direct clip (plain squares only); sharpness: edges.
    """

    mover: str
    source_fps: float
    hz: float
    mode: str
    power: float
    sharpness: float
    position_share: float
    position_share_direct: float
    psnr_db: float
    nearest_fallback: int


def main(argv: list[str]) -> None:
    parser = argparse.ArgumentParser(prog="python -m tempolora.bench resample", description=__doc__)
    parser.add_argument("--out", type=Path, default=Path("docs/resampling.md"))
    parser.add_argument("--height", type=int, default=96)
    parser.add_argument("--width", type=int, default=128)
    chosen = parser.parse_args(argv)
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    cv2.setNumThreads(1)
    cells = []
    for textured in (False, True):
        for rate in RATES:
            for hz in FREQUENCIES_HZ:
                cells += measure(rate, hz, textured, chosen.height, chosen.width)
                log.info("%s", cells[-len(MODES)])
    write_table(cells, chosen.out)


def write_table(cells: list[Cell], page: Path) -> None:
    """Replace what follows the marker line of `page` by one row per mover, rate and frequency."""
    rows = [
        "| mover | fps | Hz | power auto | nearest | blend | edges auto | nearest | blend "
        "| position auto | nearest | blend | direct |",
        "|" + " --- |" * 13,
    ]
    for k in range(0, len(cells), len(MODES)):
        row = cells[k : k + len(MODES)]
        first = row[0]
        values = [first.mover, f"{first.source_fps:.3f}", f"{first.hz:g}"]
        values += [f"{cell.power:.2f}" for cell in row]
        values += [f"{cell.sharpness:.2f}" for cell in row]
        shares = [*(cell.position_share for cell in row), first.position_share_direct]
        values += ["" if np.isnan(share) else f"{share:.1e}" for share in shares]
        rows.append("| " + " | ".join(values) + " |")
    above = page.read_text(encoding="utf-8").partition(MARKER)[0]
    page.write_text(above + MARKER + "\n\n" + "\n".join(rows) + "\n", encoding="utf-8")


def measure(
    rate: Fraction,
    hz: float,
    textured: bool,
    height: int,
    width: int,
    modes: tuple[str, ...] = MODES,
) -> list[Cell]:
    """Resample a square swinging at `hz`, encoded at `rate`, to 16 fps in each of `modes`."""
    sums: dict[str, list] = {mode: [] for mode in modes}
    size = {"height": height, "width": width}
    for phase in PHASES:
        swing = 0.125 * min(height, width)
        motion = Motion("square", hz, phase, swing, textured=textured, seed=3)
        truth = draw_clip(motion, fps=FPS, num_frames=NUM_FRAMES, **size)
        direct = through_mp4(truth, Fraction(FPS))
        num = int(np.ceil((NUM_FRAMES - 1) / FPS * rate)) + 2
        source = through_mp4(draw_clip(motion, fps=float(rate), num_frames=num, **size), rate)
        clock_s = resample.clock(np.arange(num) / float(rate), FPS)
        picks = resample.plan_picks(clock_s, FPS)[:NUM_FRAMES]
        for mode in modes:
            make = resample.frame_maker(source.__getitem__, clock_s, mode)
            made = [make(pick) for pick in picks]
            frames = np.stack([m.frame for m in made])
            fallback = sum(m.origin == "nearest" for m in made) if mode == "auto" else 0
            sums[mode].append((_compare(frames, direct, truth, motion), fallback))
    mover = "textured square on texture" if textured else "plain square"
    cells = []
    for mode, runs in sums.items():
        parts = np.array([part for part, _ in runs]).sum(0)
        power, power_0, sharp, sharp_0, high, total, high_0, total_0, error = parts
        position = (high / total, high_0 / total_0) if not textured else (np.nan, np.nan)
        psnr = 10 * np.log10(255**2 * len(runs) / error)
        ratios = float(power / power_0), float(sharp / sharp_0), *map(float, position)
        fallbacks = sum(fallback for _, fallback in runs)
        cells.append(Cell(mover, float(rate), hz, mode, *ratios, float(psnr), fallbacks))
    return cells


def _compare(frames, direct, truth, motion) -> tuple[float, ...]:
    seen, wanted = frames @ LUMA, direct @ LUMA
    moving = np.ptp(truth @ LUMA, axis=0) > 8  # pixels that the mover ever touches
    ground = np.float32(motion.ground) @ LUMA
    tracks = [
        centroid_x(luma, ground, float(np.float32(motion.tint) @ LUMA)) for luma in (seen, wanted)
    ]
    high, total = zip(*(band_power(track[:, None]) for track in tracks), strict=True)
    return (
        band_power(seen[:, moving])[0],
        band_power(wanted[:, moving])[0],
        edge_sharpness(seen),
        edge_sharpness(wanted),
        high[0],
        total[0],
        high[1],
        total[1],
        float(np.mean((seen - truth @ LUMA) ** 2)),
    )


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
