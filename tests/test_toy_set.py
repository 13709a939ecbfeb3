"""The toy set is a whole, readable folder that has the rhythm it says it has, in its sound too."""

import json
from fractions import Fraction

import av
import numpy as np
import pytest

from tempolora.config import ConfigError
from tempolora.data import toy
from tempolora.data.clips import list_clips
from tempolora.data.toy_set import draw_frames, draw_toy_set
from tempolora.data.video import write_mp4

SIZE = {"height": 48, "width": 64}


def test_the_set_is_whole_readable_and_clicks_on_the_beat(tmp_path):
    kinds = len(toy.KINDS)
    draw_toy_set(tmp_path / "toy", fps=16, num_frames=33, **SIZE, clips=kinds, seed=1)
    clips = list_clips(tmp_path / "toy")
    truth = json.loads((tmp_path / "toy" / "truth.json").read_text())
    assert [clip.file for clip in clips] == list(truth)
    assert {entry["kind"] for entry in truth.values()} == set(toy.KINDS)
    for clip in clips:
        told = truth[clip.file]
        assert 1 <= told["hz"] <= 4
        assert clip.caption == told["caption"]
        with av.open(clip.path) as container:
            assert container.streams.video[0].frames == 33
            assert container.streams.video[0].average_rate == 16
            samples = [f.to_ndarray().mean(0) for f in container.decode(audio=0)]
            rate = container.streams.audio[0].rate
        audio = np.abs(np.concatenate(samples))
        for beat in told["beats_s"]:
            first = int((beat - 0.02) * rate)
            if first > 0 and beat < 2:
                near = audio[first : first + int(0.04 * rate)]
                assert near.max() > 0.3
                loudest = (first + np.flatnonzero(near > 0.3)[0]) / rate
                assert loudest == pytest.approx(beat, abs=0.003)
    assert not list(tmp_path.glob(".toy*"))


def test_the_told_colour_stands_at_the_told_place(tmp_path):
    """In the decoded mp4 of each clip whose mover carries no pattern and no face at its middle."""
    draw_toy_set(tmp_path / "toy", fps=16, num_frames=17, **SIZE, clips=27, seed=2)
    truth = json.loads((tmp_path / "toy" / "truth.json").read_text())
    checked = set()
    for file, told in truth.items():
        plain = told["shape"] != "face" and told["kind"] != "pulse"
        if not plain or any(w in told["caption"] for w in ("striped", "checked", "mottled")):
            continue
        with av.open(tmp_path / "toy" / file) as container:
            frames = [f.to_ndarray(format="rgb24") for f in container.decode(video=0)]
        assert len(told["track_px"]) == len(frames) == 17
        for frame, (x, y) in zip(frames, told["track_px"]):
            if 0 <= x < 64 and 0 <= y < 48:
                seen = frame[int(y), int(x)].astype(int)
                assert np.abs(seen - told["colour"]).max() < 40, file  # H.264 and 4:2:0
        checked.add(told["kind"])
    assert len(checked) >= 3


def test_the_same_seed_draws_the_same_set_and_no_folder_is_overwritten(tmp_path):
    for name in ("a", "b"):
        draw_toy_set(tmp_path / name, fps=16, num_frames=5, **SIZE, clips=2, seed=7)
    told = [(tmp_path / name / "truth.json").read_bytes() for name in ("a", "b")]
    assert told[0] == told[1]
    with pytest.raises(ConfigError, match="exists already"):
        draw_toy_set(tmp_path / "a", fps=16, num_frames=5, **SIZE, clips=1, seed=7)


def test_frames_drawn_a_few_at_a_time_are_those_of_the_whole_clip(monkeypatch):
    scene = toy.draw_scenes(1, np.random.default_rng(3))
    whole = toy.render(scene, fps=24, num_frames=17, **SIZE)[0].numpy()
    monkeypatch.setattr(toy, "CHUNK_PX", 5 * 48 * 64)
    parts = draw_frames(scene, fps=24, num_frames=17, **SIZE)
    assert np.abs(parts.astype(int) - whole).max() <= 1  # k / fps is rounded in two ways


def test_the_same_frames_give_the_same_mp4_each_time(tmp_path):
    # Clouds, other ones in each frame: with x264's defaults their files mostly differ.
    x_FHW3 = np.random.default_rng(0).random((17, 64, 64, 3))
    for axis in (1, 2) * 3:
        x_FHW3 = sum(np.roll(x_FHW3, by, axis) for by in range(-3, 4))
    frames_FHW3 = (255 * (x_FHW3 - x_FHW3.min()) / np.ptp(x_FHW3)).astype(np.uint8)
    for number in range(8):
        write_mp4(tmp_path / f"{number}.mp4", frames_FHW3, 16)
    assert len({path.read_bytes() for path in tmp_path.iterdir()}) == 1


def test_colours_come_back_from_an_mp4_in_both_decoders(tmp_path):
    decord = pytest.importorskip("decord")
    colours = [(214, 48, 49), (46, 170, 87), (52, 101, 220), (236, 196, 50), (240, 240, 236)]
    frames = np.stack([np.full((48, 64, 3), c, np.uint8) for c in colours])
    write_mp4(tmp_path / "c.mp4", frames, Fraction(24000, 1001))
    with av.open(tmp_path / "c.mp4") as container:
        assert container.streams.video[0].average_rate == Fraction(24000, 1001)
        by_av = np.stack([f.to_ndarray(format="rgb24") for f in container.decode(video=0)])
    by_decord = decord.VideoReader(str(tmp_path / "c.mp4")).get_batch(range(5)).asnumpy()
    for seen in (by_av, by_decord):  # 8-bit limited-range YUV rounds by up to 3 levels of RGB
        assert np.abs(seen.astype(int) - frames).max() <= 4


def test_a_failed_write_leaves_nothing_behind(tmp_path):
    with pytest.raises(ValueError, match="even"):
        write_mp4(tmp_path / "odd.mp4", np.zeros((2, 33, 48, 3), np.uint8), 16)
    assert not list(tmp_path.iterdir())
