"""The picture of motion against sound shows what is in the clips, and says so in figures."""

import json
import re

import numpy as np
import pytest

from tempolora.cli import main
from tempolora.data.toy_set import click_track, draw_toy_set
from tempolora.data.video import write_mp4
from tempolora.results.beats import MOST_CLIPS, _caption, _figure, _reader


def flashing(path, sound_later_s=0.0, seconds=6.0):
    """A square that jumps at odd times, with a click at each jump; when it jumps."""
    rng = np.random.default_rng(0)
    jumps_s = np.cumsum(rng.uniform(0.3, 0.7, 10))
    jumps_s = np.round(jumps_s[jumps_s < seconds - 0.5] * 16) / 16
    frames = np.zeros((round(seconds * 16), 64, 64, 3), np.uint8)
    for k, frame in enumerate(frames):
        x = 40 * (np.count_nonzero(jumps_s <= k / 16) % 2)
        frame[20:40, x : x + 20] = 255
    clicks = click_track(jumps_s + sound_later_s, seconds, 44_100)
    write_mp4(path, frames, 16, clicks, 44_100)
    return jumps_s


@pytest.mark.parametrize("later_s", [0.0, 0.125])
def test_motion_and_sound_of_a_clip_are_found_as_far_apart_as_they_are(later_s, tmp_path):
    jumps_s = flashing(tmp_path / "a.mp4", later_s)
    strip = _reader(tmp_path / "a.mp4", 60)()
    moved_s = strip.moving_s[strip.moving > 0.3 * strip.moving.max()]
    np.testing.assert_allclose(moved_s, jumps_s - 0.5 / 16, atol=0.01)  # on the way to that frame
    struck_s = strip.heard_s[strip.heard > 0.5]
    np.testing.assert_allclose(struck_s, jumps_s + later_s, atol=0.02)
    said = _caption(strip)
    ms, side = re.search(r"motion is most (\d+) ms (after|before) the onsets", said).groups()
    assert int(ms) * (1 if side == "after" else -1) == pytest.approx(
        -1000 * (later_s + 0.5 / 16), abs=35
    )
    drawn = _figure([strip]).axes[0]
    assert drawn.get_title("left") == "a.mp4"
    assert drawn.get_title("right") == said


def test_tempo_and_beats_of_drawn_clips_are_drawn(tmp_path, caplog):
    draw_toy_set(tmp_path / "t", fps=16, num_frames=65, height=64, width=64, clips=1, seed=1)
    (truth,) = json.loads((tmp_path / "t" / "truth.json").read_text()).values()
    (name,) = [path.name for path in (tmp_path / "t").glob("*.mp4")]
    strip = _reader(tmp_path / "t" / name, 60)()
    bpm = 60 / np.diff(truth["beats_s"]).mean()
    assert strip.tempo.bpm == pytest.approx(bpm, rel=0.02)
    np.testing.assert_allclose(strip.beats_s, truth["beats_s"], atol=0.02)
    lines = [line for line in _figure([strip]).axes[0].lines if line.get_linestyle() == "--"]
    assert len(lines) == len(truth["beats_s"])


def test_shards_are_drawn_as_they_are_stored(toy_shards, tmp_path, caplog):
    assert main(["beats", str(toy_shards), "--out", str(tmp_path / "b.png")]) == 0
    assert (tmp_path / "b.png").read_bytes().startswith(b"\x89PNG")
    assert len([r for r in caplog.records if ", window 0: " in r.getMessage()]) == 6


def test_clips_without_sound_or_motion_are_drawn_too_and_bad_ones_left_out(tmp_path, caplog):
    frames = np.full((64, 32, 32, 3), 90, np.uint8)
    write_mp4(tmp_path / "silent.mp4", frames, 16, np.zeros(4 * 22_050, np.float32), 22_050)
    write_mp4(tmp_path / "mute.mp4", frames, 16)
    write_mp4(tmp_path / "still.mp4", frames, 16, click_track(np.arange(0.2, 4, 0.5), 4.0), 44_100)
    (tmp_path / "bad.mp4").write_bytes(b"no video at all")
    assert main(["beats", str(tmp_path), "--out", str(tmp_path / "out" / "b.png")]) == 0
    assert "left out: bad.mp4: it cannot be opened as a video" in caplog.text
    assert "silent.mp4: its sound track is silent" in caplog.text
    assert "mute.mp4: the file has no sound track" in caplog.text
    assert "still.mp4: 120 bpm (confidence 1.00); too short or too still to align" in caplog.text
    assert (tmp_path / "out" / "b.png").is_file()
    assert MOST_CLIPS >= 4


@pytest.mark.parametrize(
    ("make", "out", "sentence"),
    [
        (lambda p: p / "nowhere", "b.png", "no such file or folder"),
        (lambda p: p, "b.png", "holds no clip"),
        (lambda p: p, "b.jpg", "name a file that ends in .png"),
    ],
)
def test_mistakes_are_one_sentence(make, out, sentence, tmp_path, capsys):
    assert main(["beats", str(make(tmp_path)), "--out", str(tmp_path / out)]) == 2
    said = capsys.readouterr().err
    assert sentence in said
    assert said.count("\n") == 1


def test_a_clip_that_cannot_be_read_ends_in_one_sentence(tmp_path, capsys):
    (tmp_path / "bad.mp4").write_bytes(b"no video at all")
    assert main(["beats", str(tmp_path / "bad.mp4"), "--out", str(tmp_path / "b.png")]) == 2
    assert "nothing to draw; the last clip: bad.mp4: it cannot be opened" in capsys.readouterr().err
    assert not (tmp_path / "b.png").exists()
