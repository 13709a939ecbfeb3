"""Base, plain LoRA and ours: the figures are those of the files, and the page says so."""

import json
import re
from pathlib import Path

import numpy as np
import pytest
from test_report import Page, write_run, write_video

from tempolora.config import Config, ConfigError
from tempolora.data.video import write_mp4
from tempolora.results.compare import check_measurable, measure_arms
from tempolora.results.compare_page import ARMS, COMPARED
from tempolora.results.report import write_report

FPS, FRAMES = 16, 49
BAND_HZ, JITTER_HZ = 4 / 3, 7.0  # bins of 48 samples at 16 fps, away from the comb
SWING, SHAKE = 24.0, 12.0  # levels
CAPTIONS = {"one.mp4": "a <b>lamp</b> dims", "two.mp4": "a lamp dims again"}


def brightness(swing: float, shake: float) -> np.ndarray:
    """Levels of gray in each frame."""
    t = np.arange(FRAMES) / FPS
    waves = swing * np.cos(2 * np.pi * BAND_HZ * t) + shake * np.cos(2 * np.pi * JITTER_HZ * t)
    return np.round(120 + waves)


WAVES = {  # arm -> what it does to swing and shake
    "clean": (1, 1),
    "base": (1, 4),
    "plain": (1, 2),
    "ours": (0.5, 1),
}


@pytest.fixture(scope="module")
def compared(tmp_path_factory) -> tuple[Path, dict]:
    folder = write_run(tmp_path_factory.mktemp("compare") / "out")
    write_video(folder / "sample_before_lora.mp4", moving_row=12)
    for arm, (swing, shake) in WAVES.items():
        (folder / COMPARED / arm).mkdir(parents=True)
        for name in CAPTIONS:
            frames = np.zeros((FRAMES, 32, 32, 3), np.uint8)
            frames[:] = brightness(swing * SWING, shake * SHAKE)[:, None, None, None]
            write_mp4(folder / COMPARED / arm / name, frames, FPS)
    path = measure_arms(Config(), folder / COMPARED, CAPTIONS)
    return folder, json.loads(path.read_text())["arms"]


@pytest.mark.parametrize("arm", ARMS)
def test_power_is_relative_to_the_clean_video_of_the_same_name(compared, arm):
    swing, shake = WAVES[arm]
    for found in compared[1][arm].values():
        # n times the amplitude is n^2 the power; rounding and H.264 cost a few per cent
        assert found["jitter_log2"] == pytest.approx(2 * np.log2(shake), abs=0.15)
        assert found["band_log2"] == pytest.approx(2 * np.log2(swing), abs=0.15)


@pytest.mark.parametrize("arm", ARMS)
def test_flicker_and_motion_are_in_levels(compared, arm):
    swing, shake = WAVES[arm]
    drawn = brightness(swing * SWING, shake * SHAKE)
    for found in compared[1][arm].values():
        assert found["flicker"] == pytest.approx(np.abs(np.diff(drawn)).mean(), rel=0.05)
        assert found["motion"] == pytest.approx(swing * SWING / 2**0.5, rel=0.05)


def test_the_table_shows_the_means_and_power_as_multiples(compared):
    folder, arms = compared
    html = write_report(folder).read_text(encoding="utf-8")
    section = html.split("<h2>Base, plain LoRA, ours</h2>")[1].split("<h2>")[0]
    rows = [re.findall(r"<td[^>]*>(.*?)</td>", row) for row in section.split("<tr>")[2:6]]
    assert [row[0] for row in rows] == ["Clean", "Base", "Plain LoRA", "Ours"]
    for row, arm in zip(rows, ARMS, strict=True):
        swing, shake = WAVES[arm]
        flicker = np.mean([found["flicker"] for found in arms[arm].values()])
        assert float(row[1]) == pytest.approx(flicker, rel=1e-3)
        assert float(row[2]) == pytest.approx(shake**2, rel=0.1)
        assert float(row[3]) == pytest.approx(swing**2, rel=0.1)
    assert "Means over 2 videos" in section
    assert "docs/evidence.md" in section


def test_every_video_stands_in_the_page_under_its_prompt(compared):
    folder, _ = compared
    page = Page(write_report(folder).read_text(encoding="utf-8"))
    shown = [attrs["src"] for attrs in page.all("video")]
    assert shown[:-1] == [f"{COMPARED}/{arm}/{name}" for name in CAPTIONS for arm in ARMS]
    assert all((folder / source).is_file() for source in shown)
    assert "a <b>lamp</b> dims" in page.text
    assert len(page.all("button")) == 1


def test_a_missing_video_or_unreadable_figures_are_said(compared, tmp_path):
    folder = write_run(tmp_path / "out")
    (folder / COMPARED).mkdir()
    source = compared[0] / COMPARED / "compare.json"
    path = folder / COMPARED / "compare.json"
    path.write_text(source.read_text())
    assert "compared/ours/two.mp4 is not in the folder." in write_report(folder).read_text()
    for broken in ('{"arms": ', '{"arms": {}}', "[]", '{"band_hz": 1, "cutoff_hz": 2}'):
        path.write_text(broken)
        assert "compare.json cannot be read" in write_report(folder).read_text()


def test_a_run_without_a_comparison_has_no_such_section(tmp_path):
    assert "plain LoRA" not in write_report(write_run(tmp_path / "out")).read_text()


def test_videos_too_short_to_be_measured_are_refused():
    cfg = Config.model_validate({"data": {"num_frames": 9}, "rhythm": {"spec_weight": 0}})
    with pytest.raises(ConfigError, match=r"data\.num_frames: 9 frames at 16 fps have no bin"):
        check_measurable(cfg)
