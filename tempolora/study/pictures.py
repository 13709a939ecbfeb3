"""The page's pictures: spectra, flicker against motion, and clips side by side."""

from pathlib import Path

import numpy as np
from matplotlib.figure import Figure
from PIL import Image
from safetensors.numpy import load_file

from tempolora.config import ConfigError
from tempolora.data.video import write_mp4
from tempolora.files import replacing
from tempolora.study import compare
from tempolora.study.compare import REFERENCE, Runs
from tempolora.study.measure import CUTOFF_HZ

COLUMNS, MARGIN_PX = 3, 2
SCALES = (4, 3, 2, 1)  # of a pixel; the largest that keeps the file small
MOST_BYTES = 1_500_000
FRAME_MS = 60  # gifs count in 10 ms, and 16 fps are 62.5
COLOURS = 128
SPEED_SCALE = 2  # of a pixel in the video of speeds


def draw_spectra(runs: Runs, arms: list[str], path: Path) -> None:
    """Geometric mean over samples and seeds of each arm's power in each bin."""
    figure = Figure(figsize=(8, 4.2), layout="constrained")
    axes = figure.add_subplot()
    for arm in arms:
        if arm not in runs:
            continue
        spectra = [record["spectrum"] for record in runs[arm].values()]
        hz_K = spectra[0]["hz"]
        mean_K = np.mean([spectrum["log2"] for spectrum in spectra], axis=0)
        axes.plot(hz_K[1:], mean_K[1:], label=arm, linestyle="--" if arm == REFERENCE else "-")
    axes.axvline(CUTOFF_HZ, color="0.6", linestyle=":", linewidth=1)
    axes.set(xlabel="frequency, Hz", ylabel="log2 of luma's variance in the bin")
    figure.legend(loc="outside right center", frameon=False)
    _save(figure, path)


def draw_scatter(runs: Runs, path: Path) -> None:
    """Excess power above the cutoff against motion amplitude, both over clean data's."""
    figure = Figure(figsize=(8, 5), layout="constrained")
    axes = figure.add_subplot()
    for number, arm in enumerate(runs):
        pair = [
            compare.combine(runs, {arm: 1, REFERENCE: -1}, metric)
            for metric in ("amplitude_log2", "jitter_log2")
        ]
        if arm == REFERENCE or None in pair:
            continue
        x, y = pair
        axes.errorbar(
            x.mean,
            y.mean,
            xerr=[[x.mean - x.low], [x.high - x.mean]],
            yerr=[[y.mean - y.low], [y.high - y.mean]],
            marker="osD^v<>pP*X"[number % 11],
            label=arm,
            linestyle="",
        )
    axes.axhline(0, color="0.7", linewidth=1)
    axes.axvline(0, color="0.7", linewidth=1)
    axes.set(
        xlabel="motion amplitude, log2 over clean data through the VAE",
        ylabel="power above 6 Hz, log2 over the same",
    )
    figure.legend(loc="outside right center", frameon=False, fontsize="small")
    _save(figure, path)


def write_gif(clips_path: Path, path: Path) -> None:
    """The clips of a run in a grid. Raises ConfigError where they are missing or too large."""
    if not clips_path.is_file():
        raise ConfigError(
            f"--out: {clips_path} is not there; run that arm, as a primary one or with --ours"
        )
    clips_NFHW3 = load_file(clips_path)["clips"]
    grid_FHW3 = _grid(clips_NFHW3)
    for scale in SCALES:
        frames = [_enlarged(frame, scale) for frame in _quantized(grid_FHW3)]
        with replacing(path) as temporary:
            frames[0].save(
                temporary,
                format="GIF",
                save_all=True,
                append_images=frames[1:],
                duration=FRAME_MS,
                loop=0,
            )
            small = temporary.stat().st_size <= MOST_BYTES
            if not small and scale == SCALES[-1]:
                raise ConfigError(f"{path}: larger than {MOST_BYTES} bytes even at scale 1")
        if small:
            return


def draw_speeds(clips_path: Path, speeds: list[float], fps: float, docs: Path) -> None:
    """One video at several speeds: `knob.png`, a line of pixels over time, and `knob.mp4`.

    clips_path: uint8 (A, N, F, H, W, 3), of A speeds. A row of either has one noise and caption.
    """
    clips_ANFHW3 = load_file(clips_path)["clips"]
    speed_count, rows, frames = clips_ANFHW3.shape[:3]
    figure = Figure(figsize=(2 * speed_count, 1.6 * rows), layout="constrained")
    grid = figure.subplots(rows, speed_count, sharex=True, squeeze=False)
    for n in range(rows):
        line = clips_ANFHW3[:, n].astype(np.float64).var(axis=1).sum(axis=(0, 2, 3)).argmax()
        for axes, speed, clip_FHW3 in zip(grid[n], speeds, clips_ANFHW3[:, n], strict=True):
            axes.imshow(
                clip_FHW3[:, line].transpose(1, 0, 2),
                aspect="auto",
                extent=(0, frames / fps, 0, 1),
                interpolation="nearest",
            )
            axes.set_yticks([])
            if n == 0:
                axes.set_title(f"speed {speed:.2g}")
            if n + 1 == rows:
                axes.set_xlabel("s")
    _save(figure, docs / "knob.png")
    columns = [_grid(clips_NFHW3, columns=1) for clips_NFHW3 in clips_ANFHW3]
    video_FHW3 = np.concatenate(columns, axis=2).repeat(SPEED_SCALE, 1).repeat(SPEED_SCALE, 2)
    write_mp4(docs / "knob.mp4", video_FHW3, fps)


def _grid(clips_NFHW3: np.ndarray, columns: int = COLUMNS) -> np.ndarray:
    """Clips beside and below each other with white margins, (F, H, W, 3)."""
    margins = ((0, 0), (MARGIN_PX, MARGIN_PX), (MARGIN_PX, MARGIN_PX), (0, 0))
    framed = [np.pad(clip, margins, constant_values=255) for clip in clips_NFHW3]
    empty = np.full_like(framed[0], 255)
    framed += [empty] * (-len(framed) % columns if len(framed) > columns else 0)
    rows = [framed[n : n + columns] for n in range(0, len(framed), columns)]
    return np.concatenate([np.concatenate(row, axis=2) for row in rows], axis=1)


def _quantized(grid_FHW3: np.ndarray) -> list[Image.Image]:
    """The frames in one palette and without dithering: neither may flicker of itself."""
    palette = Image.fromarray(np.concatenate(grid_FHW3)).quantize(COLOURS)
    return [
        Image.fromarray(frame).quantize(palette=palette, dither=Image.Dither.NONE)
        for frame in grid_FHW3
    ]


def _enlarged(image: Image.Image, scale: int) -> Image.Image:
    return image.resize((image.width * scale, image.height * scale), Image.Resampling.NEAREST)


def _save(figure: Figure, path: Path) -> None:
    with replacing(path) as temporary:
        figure.savefig(temporary, format="png", dpi=100)
