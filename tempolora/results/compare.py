"""Base, plain LoRA and ours on the same captions -> compare.json: how they flicker and move.

Measured from the mp4s in one folder an arm, each against the video of the same name in `clean`, by
`rhythm/metrics.py`. These are videos that we wrote: they are read in this process.
"""

from pathlib import Path

import torch

from tempolora.config import Config, ConfigError
from tempolora.files import write_json
from tempolora.results.compare_page import ARMS, RESULT
from tempolora.results.side_by_side import read_frames
from tempolora.rhythm import metrics

PARTS = ("jitter", "band")  # of the spectrum


def check_measurable(cfg: Config) -> None:
    """Raise ConfigError where the videos are too short to have a spectrum."""
    try:
        _bins(cfg)
    except ValueError as error:
        raise ConfigError(f"data.num_frames: {error}; choose more frames") from None


def measure_arms(cfg: Config, folder: Path, captions: dict[str, str]) -> Path:
    """Measure folder/ARM/NAME.mp4 of every arm; writes folder/compare.json and returns its path.

    captions: file name -> what was asked for. The numbers of a video are named as those of
    `tempolora evaluate`: flicker and motion in levels of 255, jitter_log2 and band_log2 against the
    clean video of that name.
    """
    numbers = {arm: {name: _measure(cfg, folder / arm / name) for name in captions} for arm in ARMS}
    for videos in numbers.values():
        for name, found in videos.items():
            for part in PARTS:
                own, clean = (
                    torch.tensor([(known[f"{part}_rms"] / metrics.LEVELS) ** 2])
                    for known in (found, numbers["clean"][name])
                )
                found[f"{part}_log2"] = metrics.excess_log2(own, clean).item()
    path = folder / RESULT
    write_json(
        path,
        {
            "cutoff_hz": cfg.rhythm.spec_cutoff_hz,
            "band_hz": list(cfg.rhythm.band_hz),
            "train_steps": cfg.train.max_steps,
            "captions": captions,
            "arms": numbers,
        },
    )
    return path


def _measure(cfg: Config, path: Path) -> dict[str, float]:
    video_NF3HW = torch.from_numpy(read_frames(path)).movedim(-1, 1)[None].float() / metrics.LEVELS
    bins = _bins(cfg)
    power_NK = metrics.spectral_power(metrics.luminance(video_NF3HW), cfg.timebase)
    variance = {part: metrics.pooled(power_NK, getattr(bins, part)).item() for part in PARTS}
    return {
        "flicker": metrics.flicker(video_NF3HW).item(),
        "motion": metrics.motion_amplitude(power_NK, bins).item(),
        **{f"{part}_rms": metrics.LEVELS * value**0.5 for part, value in variance.items()},
    }


def _bins(cfg: Config) -> metrics.Bins:
    return metrics.bins_of(cfg.timebase, cfg.rhythm.spec_cutoff_hz, cfg.rhythm.band_hz)
