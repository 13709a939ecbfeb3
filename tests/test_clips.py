"""The caption list names every mistake, and no file can take the run with it."""

import json
import resource
from fractions import Fraction

import numpy as np
import pytest

from tempolora.config import ConfigError
from tempolora.data import clips
from tempolora.data.audio import has_sound
from tempolora.data.clips import ClipRejected, Whole, WindowSpec, list_clips, read_clip
from tempolora.data.toy import scene
from tempolora.data.toy_set import click_track, draw_frames
from tempolora.data.video import write_mp4

SPEC = WindowSpec(16, 9, 32, 48, "first", 2, "auto")
TIMEOUT_S = 60


def folder_with(tmp_path, listing, name="prompts.txt", files=("a.mp4", "b.mp4")):
    for file in files:
        (tmp_path / file).write_bytes(b"x")
    data = listing if isinstance(listing, bytes) else listing.encode()
    (tmp_path / name).write_bytes(data)
    return tmp_path


def test_a_bom_comments_blank_lines_and_bars_in_the_prompt_are_understood(tmp_path):
    source = folder_with(tmp_path, "\ufeff# mine\n\na.mp4|left | right\r\n b.mp4 | café\n")
    found = [(clip.file, clip.caption) for clip in list_clips(source)]
    assert found == [("a.mp4", "left | right"), ("b.mp4", "café")]


def test_metadata_jsonl_is_read_as_well(tmp_path):
    line = json.dumps({"file_name": "a.mp4", "text": "a cat"})
    source = folder_with(tmp_path, line, "metadata.jsonl")
    assert [(c.path, c.caption) for c in list_clips(source)] == [(source / "a.mp4", "a cat")]


@pytest.mark.parametrize(
    ("listing", "says"),
    [
        ("", "lists no clip"),
        ("# only a comment\n", "lists no clip"),
        ("a.mp4|fine\nb.mp4 no bar\n", "line 2: no |"),
        ("a.mp4|  \n", "line 1: a.mp4 has an empty caption"),
        ("|words\n", "line 1: no file name"),
        ("gone.mp4|words\n", "line 1: gone.mp4 is not there"),
        ("../a.mp4|words\n", "leads out of"),
        ("/etc/hostname|words\n", "leads out of"),
        ("a.mp4|one\nsub/../a.mp4|two\n", "line 2: sub/../a.mp4 is listed twice"),
        (b"a.mp4|fine\nb.mp4|caf\xe9\n", "line 2: not UTF-8"),
    ],
)
def test_each_mistake_in_prompts_txt_is_one_sentence_naming_the_place(tmp_path, listing, says):
    (tmp_path / "sub").mkdir()
    with pytest.raises(ConfigError) as error:
        list_clips(folder_with(tmp_path, listing))
    assert says in str(error.value)
    assert "prompts.txt" in str(error.value)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    "line", ["{", "[1]", '{"file_name": "a.mp4"}', '{"file_name": 1, "text": 2}']
)
def test_a_bad_metadata_line_is_named(tmp_path, line):
    with pytest.raises(ConfigError, match=r"metadata\.jsonl, line 1"):
        list_clips(folder_with(tmp_path, line, "metadata.jsonl"))


def test_a_missing_folder_no_list_and_two_lists_are_refused(tmp_path):
    with pytest.raises(ConfigError, match="no such folder"):
        list_clips(tmp_path / "none")
    with pytest.raises(ConfigError, match="neither"):
        list_clips(tmp_path)
    folder_with(tmp_path, "a.mp4|x")
    with pytest.raises(ConfigError, match="remove"):
        list_clips(folder_with(tmp_path, "{}", "metadata.jsonl"))


def test_a_symlink_out_of_the_folder_is_refused(tmp_path):
    (tmp_path / "secret.mp4").write_bytes(b"x")
    inner = tmp_path / "data"
    inner.mkdir()
    (inner / "link.mp4").symlink_to(tmp_path / "secret.mp4")
    with pytest.raises(ConfigError, match="leads out of"):
        list_clips(folder_with(inner, "link.mp4|x"))


def drawn(path, fps, seconds, audio=None, rate=None, height=48, width=64):
    motion = scene("slide", 1.5, 0.3, 8 / min(height, width))
    num = round(seconds * fps)
    frames = draw_frames(motion, fps=float(fps), num_frames=num, height=height, width=width)
    write_mp4(path, frames, fps, audio, rate)
    return frames


def test_a_clip_at_the_target_rate_comes_through_frame_for_frame_with_its_sound(tmp_path):
    audio = click_track(np.array([0.5]), 1.25, 48_000)
    frames = drawn(tmp_path / "a.mp4", 16, 1.25, np.stack([audio, audio], 1), 48_000, 32, 64)
    spec = WindowSpec(16, 9, 32, 64, "first", 1, "auto")
    clip = read_clip(tmp_path / "a.mp4", spec, tmp_path / "w", TIMEOUT_S)
    (window,) = clip.windows
    assert isinstance(window.frames, np.memmap)
    assert window.frames.shape == (9, 32, 64, 3)
    assert window.frames.dtype == np.uint8
    assert (window.inbetween, window.nearest_fallback) == (0, 0)
    # H.264 at crf 12 keeps luminance to a few levels; a frame off would differ by far more
    assert np.abs(window.frames.mean(-1) - frames[:9].mean(-1)).mean() < 3
    assert clip.source_fps == pytest.approx(16)
    assert clip.audio_rate == 22_050
    # AAC's encoder delay is taken out by the container: the click is where it was put
    click_s = np.flatnonzero(np.abs(clip.audio) > 0.2)[0] / clip.audio_rate + clip.audio_start_s
    assert click_s == pytest.approx(0.5, abs=0.01)


def test_a_file_that_decord_misreads_is_decoded_by_pyav_and_said_so(tmp_path):
    """decord 0.6 takes the padding of a 48 px row for a fourth channel."""
    pytest.importorskip("decord")
    frames = drawn(tmp_path / "a.mp4", 16, 1, height=32, width=48)
    clip = read_clip(tmp_path / "a.mp4", SPEC, tmp_path / "w", TIMEOUT_S)
    assert clip.decoder == "pyav"
    assert clip.decoder_note == "decord gives another first frame; PyAV decodes it instead"
    assert np.abs(clip.windows[0].frames.mean(-1) - frames[:9].mean(-1)).mean() < 3


def test_without_decord_pyav_decodes_and_that_is_said(tmp_path, monkeypatch):
    hidden = tmp_path / "hidden"
    hidden.mkdir()
    (hidden / "decord.py").write_text("raise ImportError('no wheel for this platform')")
    monkeypatch.syspath_prepend(hidden)  # the worker looks where this process looks
    frames = drawn(tmp_path / "a.mp4", 16, 1, height=32, width=64)
    spec = WindowSpec(16, 9, 32, 64, "first", 1, "auto")
    clip = read_clip(tmp_path / "a.mp4", spec, tmp_path / "w", TIMEOUT_S)
    assert clip.decoder == "pyav"
    assert clip.decoder_note == "decord is not installed; PyAV decodes instead"
    assert np.abs(clip.windows[0].frames.mean(-1) - frames[:9].mean(-1)).mean() < 3


@pytest.mark.parametrize(("rate", "channels"), [(8_000, 1), (44_100, 2), (96_000, 1)])
def test_any_sound_comes_out_mono_at_one_rate_with_its_click_in_time(tmp_path, rate, channels):
    audio = click_track(np.array([0.5]), 0.75, rate)  # shorter than the 1.25 s of pictures
    drawn(tmp_path / "a.mp4", 16, 1.25, np.stack([audio] * channels, 1), rate, 32, 64)
    spec = WindowSpec(16, 17, 32, 64, "first", 1, "auto")
    clip = read_clip(tmp_path / "a.mp4", spec, tmp_path / "w", TIMEOUT_S)
    assert len(clip.windows) == 1
    assert clip.audio.ndim == 1
    assert clip.audio_rate == 22_050
    heard_s = len(clip.audio) / clip.audio_rate
    assert 0.75 <= heard_s < 0.75 + 2 * 1024 / rate + 0.01  # AAC fills up its last frame
    click_s = np.flatnonzero(np.abs(clip.audio) > 0.2)[0] / clip.audio_rate + clip.audio_start_s
    assert click_s == pytest.approx(0.5, abs=0.01)  # a video frame lasts 0.0625 s
    assert has_sound(clip.audio)


def test_a_silent_track_is_read_and_known_to_be_silent(tmp_path):
    drawn(tmp_path / "a.mp4", 16, 1, np.zeros(16_000, np.float32), 16_000, 32, 64)
    clip = read_clip(tmp_path / "a.mp4", SPEC, tmp_path / "w", TIMEOUT_S)
    assert clip.no_audio is None
    assert not has_sound(clip.audio)


def test_a_broken_sound_track_leaves_the_pictures_and_says_why_there_is_no_sound(tmp_path):
    import av

    drawn(tmp_path / "a.mp4", 16, 1, click_track(np.arange(0.1, 1, 0.1), 1.0), 44_100, 32, 64)
    data = bytearray((tmp_path / "a.mp4").read_bytes())
    with av.open(tmp_path / "a.mp4") as container:
        packets = [(p.pos, p.size) for p in container.demux(audio=0) if p.size]
    for start, size in packets[10:]:
        data[start : start + size] = bytes(byte ^ 255 for byte in data[start : start + size])
    (tmp_path / "a.mp4").write_bytes(data)
    clip = read_clip(tmp_path / "a.mp4", SPEC, tmp_path / "w", TIMEOUT_S)
    assert len(clip.windows) == 1
    assert clip.audio is clip.audio_rate is clip.audio_start_s is None
    assert clip.no_audio == (
        "its sound track does not decode (Invalid data found when processing input)"
    )


def test_all_windows_lie_end_to_end_and_spaced_ones_span_the_clip(tmp_path):
    drawn(tmp_path / "a.mp4", 24, 2.2)
    starts = {}
    for windows in ("all", "spaced"):
        spec = WindowSpec(16, 9, 32, 48, windows, 2, "nearest")
        clip = read_clip(tmp_path / "a.mp4", spec, tmp_path / windows, TIMEOUT_S)
        starts[windows] = [w.start_s for w in clip.windows]
    assert starts["all"] == pytest.approx([0, 9 / 16, 18 / 16], abs=1e-6)
    assert starts["spaced"] == pytest.approx([0, 26 / 16], abs=1e-6)


def test_frames_of_a_later_window_equal_those_of_a_straight_decode(tmp_path):
    import av

    pytest.importorskip("decord")

    drawn(tmp_path / "a.mp4", 16, 4, height=32, width=64)
    spec = WindowSpec(16, 9, 32, 64, "spaced", 3, "auto")
    clip = read_clip(tmp_path / "a.mp4", spec, tmp_path / "w", TIMEOUT_S)
    with av.open(tmp_path / "a.mp4") as container:
        straight = np.stack([f.to_ndarray(format="rgb24") for f in container.decode(video=0)])
    assert clip.decoder == "decord"
    for window in clip.windows:
        first = round(window.start_s * 16)
        gap = np.abs(window.frames.astype(int) - straight[first : first + 9])
        assert gap.mean() < 2  # the two decoders round colours differently


def test_too_slow_and_too_short_clips_are_rejected_with_the_numbers(tmp_path):
    drawn(tmp_path / "slow.mp4", 8, 2)
    with pytest.raises(ClipRejected, match=r"slow\.mp4: its 8 fps are slower than the 16 fps"):
        read_clip(tmp_path / "slow.mp4", SPEC, tmp_path / "w", TIMEOUT_S)
    drawn(tmp_path / "short.mp4", 16, 7 / 16)
    with pytest.raises(
        ClipRejected, match="gives 7 frames at 16 fps and 9 are needed; num_frames 5"
    ):
        read_clip(tmp_path / "short.mp4", SPEC, tmp_path / "w", TIMEOUT_S)


def test_damaged_streams_and_other_files_are_rejected(tmp_path):
    drawn(tmp_path / "a.mp4", 16, 2)
    data = bytearray((tmp_path / "a.mp4").read_bytes())
    start = data.index(b"mdat") + 1200
    # Fixed noise: by luck a decoder can take noise for a picture, in about one file of six.
    data[start : start + 600] = np.random.default_rng(0).bytes(600)
    (tmp_path / "torn.mp4").write_bytes(data)
    (tmp_path / "text.mp4").write_text("not a video")
    with pytest.raises(ClipRejected, match=r"torn\.mp4: .*damaged"):
        spec = WindowSpec(16, 29, 32, 48, "first", 1, "auto")
        read_clip(tmp_path / "torn.mp4", spec, tmp_path / "w", TIMEOUT_S)
    with pytest.raises(ClipRejected, match="cannot be opened as a video"):
        read_clip(tmp_path / "text.mp4", SPEC, tmp_path / "w", TIMEOUT_S)


@pytest.mark.parametrize(
    ("does", "says"),
    [
        ("import os; os.kill(os.getpid(), 11)", "crashed with SIGSEGV"),
        ("raise SystemExit('out of disk')", r"failed \(out of disk\)"),
        ("pass", "left no answer"),
        ("import time; time.sleep(60)", "longer than 1 s"),
    ],
)
def test_a_worker_that_crashes_fails_or_hangs_rejects_only_its_clip(
    tmp_path, monkeypatch, does, says
):
    popen = clips.subprocess.Popen

    def other_worker(command, **options):
        return popen([command[0], "-c", does], **options)

    monkeypatch.setattr(clips.subprocess, "Popen", other_worker)
    with pytest.raises(ClipRejected, match=says):
        read_clip(tmp_path / "a.mp4", SPEC, tmp_path / "w", 1 if "sleep" in does else TIMEOUT_S)


def test_a_full_disk_is_no_fault_of_the_clip(tmp_path, monkeypatch):
    """Rejected, it would be missing from a data set that looks whole."""
    drawn(tmp_path / "a.mp4", 16, 2)
    popen = clips.subprocess.Popen

    def limited(command, **options):
        limit = (resource.RLIMIT_FSIZE, (8192, 8192))
        return popen(command, preexec_fn=lambda: resource.setrlimit(*limit), **options)

    monkeypatch.setattr(clips.subprocess, "Popen", limited)
    with pytest.raises(
        ConfigError, match=r"a\.mp4: no room for its decoded .*\(File too large: .*w\)"
    ):
        read_clip(tmp_path / "a.mp4", SPEC, tmp_path / "w", TIMEOUT_S)


def test_a_playlist_is_no_video_whatever_its_name(tmp_path):
    frames = draw_frames(scene("slide", 1.0), fps=16, num_frames=12, height=32, width=48)
    write_mp4(tmp_path / "real.mp4", frames, 16)
    (tmp_path / "list.mp4").write_text("ffconcat version 1.0\nfile real.mp4\n")
    with pytest.raises(ClipRejected, match="playlist"):
        read_clip(tmp_path / "list.mp4", SPEC, tmp_path / "work", TIMEOUT_S)


def test_a_rotation_flag_is_applied_exactly_once(tmp_path):
    """Against a reference turned by numpy; the flag is the matrix of ISO/IEC 14496-12 8.3.2."""
    frames = drawn(tmp_path / "a.mp4", 16, 1, height=32, width=64)
    data = (tmp_path / "a.mp4").read_bytes()
    one, root = (1 << 16).to_bytes(4, "big"), (1 << 30).to_bytes(4, "big")
    nil, minus = bytes(4), (-(1 << 16)).to_bytes(4, "big", signed=True)
    plain = one + nil * 3 + one + nil * 3 + root
    place = data.index(plain, data.index(b"tkhd"))
    turned = nil + one + nil + minus + nil * 4 + root  # 90 degrees clockwise
    (tmp_path / "r.mp4").write_bytes(data[:place] + turned + data[place + len(plain) :])
    spec = WindowSpec(16, 9, 64, 32, "first", 1, "nearest")
    clip = read_clip(tmp_path / "r.mp4", spec, tmp_path / "w", TIMEOUT_S)
    assert clip.rotation == 90
    upright = np.rot90(frames[:9], -1, axes=(1, 2)).astype(float)
    gap = np.abs(clip.windows[0].frames.mean(-1) - upright.mean(-1))
    assert gap.mean() < 3
    whole = read_clip(tmp_path / "r.mp4", Whole(9, 2**20), tmp_path / "all", TIMEOUT_S)
    assert whole.windows[0].frames.shape == (16, 64, 32, 3)
    assert np.array_equal(whole.windows[0].frames[:9], clip.windows[0].frames)


def test_a_whole_clip_keeps_its_size_and_rate_and_stops_at_most_pixels(tmp_path):
    frames = drawn(tmp_path / "a.mp4", 15, 1, height=32, width=64)

    def read(least_frames, most_pixels):
        spec = Whole(least_frames, most_pixels)
        return read_clip(tmp_path / "a.mp4", spec, tmp_path / "w", TIMEOUT_S)

    clip = read(9, 12 * 32 * 64)
    assert clip.source_fps == pytest.approx(15)
    found = clip.windows[0].frames
    assert found.shape == (12, 32, 64, 3)
    assert np.abs(found.mean(-1) - frames[:12].mean(-1)).mean() < 3
    with pytest.raises(ClipRejected, match="it has 15 frames, 16 are needed"):
        read(16, 2**20)
    with pytest.raises(ClipRejected, match="64x32 is too large"):
        read(13, 12 * 32 * 64)


def test_a_gap_in_the_stream_leaves_the_window_out(tmp_path):
    import av

    drawn(tmp_path / "a.mp4", 16, 4)
    with av.open(tmp_path / "a.mp4") as container:
        frames = list(container.decode(video=0))
    with av.open(tmp_path / "gap.mp4", "w") as container:
        stream = container.add_stream("libx264", rate=Fraction(16))
        stream.width, stream.height, stream.pix_fmt = 64, 48, "yuv420p"
        for k, frame in enumerate(frames):
            if not 22 <= k < 27:
                fresh = av.VideoFrame.from_ndarray(frame.to_ndarray(format="rgb24"), format="rgb24")
                fresh.pts, fresh.time_base = k, Fraction(1, 16)
                container.mux(stream.encode(fresh))
        container.mux(stream.encode())
    spec = WindowSpec(14, 9, 32, 48, "all", 9, "nearest")
    clip = read_clip(tmp_path / "gap.mp4", spec, tmp_path / "w", TIMEOUT_S)
    assert len(clip.left_out) == 1
    assert "0.375 s without a frame" in clip.left_out[0]
    assert [round(w.start_s * 14) for w in clip.windows] == [0, 9, 27, 36, 45]


@pytest.mark.parametrize("rate", [32, 30])
def test_at_each_speed_a_clip_runs_that_much_faster(tmp_path, rate):
    """A pulse of 1 Hz comes out at 0.55, 1 and 2 Hz, and each frame knows its time in the clip."""
    time_s = np.arange(8 * rate) / rate
    level = 128 + 20 * np.cos(2 * np.pi * time_s)
    frames = np.broadcast_to(level[:, None, None, None], (len(time_s), 32, 32, 3))
    write_mp4(tmp_path / "pulse.mp4", np.rint(frames).astype(np.uint8), rate)
    speeds = (0.55, 1.0, 2.0)
    spec = WindowSpec(16, 49, 32, 32, "first", 1, "auto", speeds)
    clip = read_clip(tmp_path / "pulse.mp4", spec, tmp_path / "work", TIMEOUT_S)
    assert tuple(window.speed for window in clip.windows) == speeds
    for window in clip.windows:
        shown_s = np.arange(49) / 16
        np.testing.assert_allclose(window.times_s, shown_s * window.speed, atol=0.02)
        hz = window.speed
        basis = np.stack([np.ones(49), np.cos(2 * np.pi * hz * shown_s)], 1)
        seen = window.frames.mean(axis=(1, 2, 3))
        (_, size), *_ = np.linalg.lstsq(basis, seen, rcond=None)
        assert size == pytest.approx(20, rel=0.1)


def test_a_speed_that_a_clip_cannot_give_is_left_out_and_said(tmp_path):
    write_mp4(tmp_path / "a.mp4", np.zeros((80, 32, 32, 3), np.uint8), 24)
    spec = WindowSpec(16, 49, 32, 32, "first", 1, "auto", (0.5, 1.0, 2.0))
    clip = read_clip(tmp_path / "a.mp4", spec, tmp_path / "work", TIMEOUT_S)
    assert [window.speed for window in clip.windows] == [1.0]
    slower, faster = clip.left_out
    assert slower.startswith("at speed 0.5: its 12 fps are slower than the 16 fps")
    assert faster.startswith("at speed 2: it gives 27 frames at 16 fps and 49 are needed")
    with pytest.raises(ClipRejected, match="at speed 2: it gives 27 frames"):
        spec = WindowSpec(16, 49, 32, 32, "first", 1, "auto", (2.0,))
        read_clip(tmp_path / "a.mp4", spec, tmp_path / "work", TIMEOUT_S)
