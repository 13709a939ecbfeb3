"""Whatever the sound track of a user's file is, its clip is read and its sound is in time.

Every file is really encoded here, and read by the worker process as any user's is.
"""

from fractions import Fraction

import av
import numpy as np
import pytest

from tempolora.data.audio import Track
from tempolora.data.clips import ClipRejected, Outline, WindowSpec, read_clip
from tempolora.data.toy_set import click_track
from tempolora.data.video import write_mp4

SPEC = WindowSpec(16, 17, 32, 32, "first", 1, "nearest")
TIMEOUT_S = 60
FPS, RATE = 16, 48_000
CLICKS_S = np.array([0.3, 0.8, 1.4])


def record(path, parts, *, codec="pcm_s16le", seconds=2.0, shown_from_s=0.0):
    """A video of `seconds` whose sound is `parts`: (start in s, samples (n,) or (n, ch), rate)."""
    frames = np.random.default_rng(0).integers(0, 255, (round(seconds * FPS), 32, 32, 3), np.uint8)
    with av.open(path, "w") as container:
        video = container.add_stream("libx264", rate=FPS, options={"bf": "0"})  # no negative times
        video.width = video.height = 32
        video.pix_fmt = "yuv420p"
        first = parts[0][1]
        sound = container.add_stream(codec, rate=parts[0][2])
        sound.layout = "mono" if first.ndim == 1 else "stereo"
        packets = []
        for k, rgb in enumerate(frames):
            frame = av.VideoFrame.from_ndarray(rgb, format="rgb24")
            frame.pts, frame.time_base = k + round(shown_from_s * FPS), Fraction(1, FPS)
            packets += video.encode(frame)
        packets += video.encode()
        wanted = sound.codec_context.format.name
        for start_s, samples, rate in parts:
            planar = np.atleast_2d(samples.T)
            layout = "mono" if len(planar) == 1 else "stereo"
            for at in range(0, planar.shape[1], 1024):
                block = np.ascontiguousarray(planar[:, at : at + 1024])
                if wanted == "s16":
                    block = (block * 32767).astype(np.int16).T.reshape(1, -1)
                elif wanted == "flt":
                    block = block.astype(np.float32).T.reshape(1, -1)
                frame = av.AudioFrame.from_ndarray(
                    np.ascontiguousarray(block), format=wanted, layout=layout
                )
                frame.sample_rate = rate
                frame.pts, frame.time_base = round(start_s * rate) + at, Fraction(1, rate)
                packets += sound.encode(frame)
        packets += sound.encode()
        for packet in sorted(packets, key=lambda p: float(p.dts * p.time_base)):
            container.mux(packet)


def heard(path, tmp_path):
    """The clip, and when in it something is struck."""
    clip = read_clip(path, SPEC, tmp_path / "work", TIMEOUT_S)
    assert len(clip.windows) == 1
    if clip.audio is None:
        return clip, None
    track = Track(clip.audio, clip.audio_rate, clip.audio_start_s)
    strong = np.flatnonzero(track.strength_S > 0.5 * track.strength_S.max())
    groups = np.split(strong, 1 + np.flatnonzero(np.diff(strong) > 10))
    peaks = [group[track.strength_S[group].argmax()] for group in groups]
    return clip, track.start_s + np.array(peaks) / track.rate_hz


@pytest.mark.parametrize("rate", [8_000, 22_050, 44_100, 48_000, 96_000])
@pytest.mark.parametrize("channels", [1, 2])
def test_sound_of_any_rate_and_channels_is_in_time(rate, channels, tmp_path):
    clicks = click_track(CLICKS_S, 2.0, rate)
    sound = clicks if channels == 1 else np.stack([clicks, clicks], 1)
    write_mp4(tmp_path / "a.mp4", np.zeros((32, 32, 32, 3), np.uint8), FPS, sound, rate)
    _, struck_s = heard(tmp_path / "a.mp4", tmp_path)
    np.testing.assert_allclose(struck_s, CLICKS_S, atol=0.012)  # AAC at 8 kHz: 128 ms a frame


@pytest.mark.parametrize("name", ["a.mkv", "a.mov"])
@pytest.mark.parametrize(("sound_s", "picture_s"), [(0.25, 0.0), (0.0, 0.5)])
def test_streams_that_start_apart_stay_as_far_apart(name, sound_s, picture_s, tmp_path):
    clicks = click_track(CLICKS_S, 1.8, RATE)
    record(tmp_path / name, [(sound_s, clicks, RATE)], shown_from_s=picture_s)
    _, struck_s = heard(tmp_path / name, tmp_path)
    expected_s = CLICKS_S + sound_s - picture_s
    np.testing.assert_allclose(struck_s, expected_s[expected_s > 0], atol=0.01)


def test_what_sounds_after_a_gap_in_the_sound_is_where_its_timestamps_say(tmp_path):
    first, second = click_track(np.array([0.3]), 0.5, RATE), click_track(np.array([0.1]), 0.6, RATE)
    record(tmp_path / "a.mkv", [(0.0, first, RATE), (1.2, second, RATE)])
    _, struck_s = heard(tmp_path / "a.mkv", tmp_path)
    np.testing.assert_allclose(struck_s, [0.3, 1.3], atol=0.01)


def test_channels_may_change_on_the_way(tmp_path):
    clicks = click_track(np.array([0.3, 0.7]), 1.0, RATE)
    parts = []
    for number, sound in enumerate((clicks, np.stack([clicks, clicks], 1))):
        # two recordings one behind the other, as a broadcast has them
        path = tmp_path / f"{number}.ts"
        record(path, [(float(number), sound, RATE)], codec="aac", seconds=1, shown_from_s=number)
        parts.append(path.read_bytes())
    (tmp_path / "a.ts").write_bytes(b"".join(parts))
    with av.open(tmp_path / "a.ts") as container:
        assert {frame.layout.name for frame in container.decode(audio=0)} == {"mono", "stereo"}
    _, struck_s = heard(tmp_path / "a.ts", tmp_path)
    np.testing.assert_allclose(struck_s, [0.3, 0.7, 1.3, 1.7], atol=0.03)  # AAC's own delay


@pytest.mark.parametrize("seconds", [0.7, 6.0])
def test_sound_shorter_or_longer_than_the_pictures_is_used_as_far_as_it_goes(seconds, tmp_path):
    clicks_s = np.arange(0.2, seconds, 0.4)
    record(tmp_path / "a.mkv", [(0.0, click_track(clicks_s, seconds, RATE), RATE)])
    clip, struck_s = heard(tmp_path / "a.mkv", tmp_path)
    np.testing.assert_allclose(struck_s, clicks_s[clicks_s < 2], atol=0.01)
    assert len(clip.audio) / clip.audio_rate == pytest.approx(min(seconds, 2.1), abs=0.1)


@pytest.mark.parametrize("bad", [np.nan, np.inf, 1e30])
def test_values_that_are_no_sound_are_a_broken_track(bad, tmp_path):
    sound = click_track(CLICKS_S, 2.0, RATE).astype(np.float32)
    sound[30_000] = bad
    record(tmp_path / "a.mov", [(0.0, sound, RATE)], codec="pcm_f32le")
    clip, _ = heard(tmp_path / "a.mov", tmp_path)
    assert clip.audio is None and clip.audio_broken
    assert clip.no_audio == "its sound track holds values that are no sound"


def test_noise_bytes_in_place_of_sound_are_a_broken_track(tmp_path):
    record(tmp_path / "a.mkv", [(0.0, click_track(CLICKS_S, 2.0, RATE), RATE)], codec="flac")
    data = bytearray((tmp_path / "a.mkv").read_bytes())
    with av.open(tmp_path / "a.mkv") as container:
        packets = [bytes(p) for p in container.demux(audio=0) if p.size]
    rng = np.random.default_rng(0)
    for packet in packets[3:]:
        at = data.index(packet)
        data[at : at + len(packet)] = rng.bytes(len(packet))
    (tmp_path / "a.mkv").write_bytes(data)
    clip, _ = heard(tmp_path / "a.mkv", tmp_path)
    assert clip.audio is None and clip.audio_broken
    assert clip.no_audio.startswith("its sound track does not decode")


def test_a_file_cut_off_within_its_sound_keeps_what_came_before(tmp_path):
    record(tmp_path / "a.mkv", [(0.0, click_track(np.arange(0.2, 9, 0.4), 9.0, RATE), RATE)])
    data = (tmp_path / "a.mkv").read_bytes()
    with av.open(tmp_path / "a.mkv") as container:
        later = [p.pos for p in container.demux(audio=0) if p.size and p.pts * p.time_base > 1.5]
    (tmp_path / "a.mkv").write_bytes(data[: later[0] + 100])
    clip, struck_s = heard(tmp_path / "a.mkv", tmp_path)
    np.testing.assert_allclose(struck_s, [0.2, 0.6, 1.0, 1.4], atol=0.01)
    assert clip.no_audio is None


def test_a_track_without_a_sample_is_not_there(tmp_path):
    record(tmp_path / "a.mkv", [(5.0, click_track(CLICKS_S, 2.0, RATE), RATE)])
    clip, _ = heard(tmp_path / "a.mkv", tmp_path)
    assert clip.audio is None and not clip.audio_broken
    assert clip.no_audio == "its sound track is empty or lies outside of its pictures"


def test_an_outline_has_every_frame_at_its_own_time(tmp_path):
    frames = np.random.default_rng(0).integers(0, 255, (20, 96, 128, 3), np.uint8)
    write_mp4(tmp_path / "a.mp4", frames, 12.5)
    clip = read_clip(tmp_path / "a.mp4", Outline(64, 1.2), tmp_path / "work", TIMEOUT_S)
    assert clip.windows[0].frames.shape == (16, 48, 64, 3)
    np.testing.assert_allclose(clip.windows[0].times_s, np.arange(16) / 12.5, atol=1e-3)
    write_mp4(tmp_path / "b.mp4", frames[:2], 12.5)
    with pytest.raises(ClipRejected, match="it has 2 frames, which is no motion to look at"):
        read_clip(tmp_path / "b.mp4", Outline(64, 1.2), tmp_path / "work", TIMEOUT_S)


def test_a_window_knows_when_the_clip_shows_each_of_its_frames(tmp_path):
    frames = np.random.default_rng(0).integers(0, 255, (96, 32, 32, 3), np.uint8)
    write_mp4(tmp_path / "a.mp4", frames, Fraction(24_000, 1001))
    spec = WindowSpec(24, 33, 32, 32, "all", 1, "nearest")
    clip = read_clip(tmp_path / "a.mp4", spec, tmp_path / "work", TIMEOUT_S)
    for number, window in enumerate(clip.windows):
        expected_s = (33 * number + np.arange(33)) * 1001 / 24_000  # not a 24th of a second
        np.testing.assert_allclose(window.times_s, expected_s, atol=1e-3)
