"""The toy set has the rhythm it says it has, in the picture and in the sound."""

import json
from fractions import Fraction

import av
import numpy as np
import pytest

from tempolora.config import ConfigError
from tempolora.data.clips import list_clips
from tempolora.data.toy import KINDS, Motion, beat_times, draw_clip, draw_toy_set
from tempolora.data.video import write_mp4

SIZE = {"height": 48, "width": 64}


@pytest.mark.parametrize("kind", KINDS)
def test_the_picture_repeats_after_one_period_and_not_after_half(kind):
    motion = Motion(kind, 2.0, 0.4, 8)
    frames = draw_clip(motion, fps=16, num_frames=9, **SIZE).astype(int)
    assert np.abs(frames[8] - frames[0]).max() <= 1  # rounding
    assert np.abs(frames[4] - frames[0]).max() > 20


@pytest.mark.parametrize("kind", KINDS)
def test_the_same_motion_is_drawn_at_any_rate(kind):
    motion = Motion(kind, 1.3, 0.4, 8)
    slow = draw_clip(motion, fps=8, num_frames=5, **SIZE).astype(int)
    fast = draw_clip(motion, fps=24, num_frames=13, **SIZE).astype(int)
    assert np.abs(fast[::3] - slow).max() <= 1


def test_the_square_is_where_the_cosine_says_to_a_fiftieth_of_a_pixel():
    motion = Motion("square", 1.7, 0.9, 9.0, (255, 255, 255), (0, 0, 0), textured=False)
    cover = draw_clip(motion, fps=16, num_frames=17, **SIZE)[..., 0] / 255
    x = np.arange(64) + 0.5
    seen = (cover * x).sum((1, 2)) / cover.sum((1, 2))
    told = 32 + 9.0 * np.cos(2 * np.pi * 1.7 * np.arange(17) / 16 + 0.9)
    np.testing.assert_allclose(seen, told, atol=0.02)  # edges are 8-bit


def test_beats_fall_on_whole_turns_of_the_phase():
    motion = Motion("ball", 2.5, 1.0, 8)
    turns = 2.5 * beat_times(motion, 3.0) + 1.0 / (2 * np.pi)
    np.testing.assert_allclose(turns, np.round(turns), atol=1e-9)
    assert len(turns) == 7  # turns 0.16 to 7.66


def test_the_set_is_whole_readable_and_clicks_on_the_beat(tmp_path):
    draw_toy_set(tmp_path / "toy", fps=16, num_frames=33, **SIZE, clips=6, seed=1)
    clips = list_clips(tmp_path / "toy")
    truth = json.loads((tmp_path / "toy" / "truth.json").read_text())
    assert [clip.file for clip in clips] == list(truth)
    assert {entry["kind"] for entry in truth.values()} == set(KINDS)
    for clip in clips:
        told = truth[clip.file]
        assert 1 <= told["hz"] <= 4
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


def test_the_same_seed_draws_the_same_set_and_no_folder_is_overwritten(tmp_path):
    for name in ("a", "b"):
        draw_toy_set(tmp_path / name, fps=16, num_frames=5, **SIZE, clips=2, seed=7)
    told = [(tmp_path / name / "truth.json").read_bytes() for name in ("a", "b")]
    assert told[0] == told[1]
    with pytest.raises(ConfigError, match="exists already"):
        draw_toy_set(tmp_path / "a", fps=16, num_frames=5, **SIZE, clips=1, seed=7)


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
