"""`tempolora evaluate`: real mp4s in, numbers that tell clean, flickering and frozen apart out."""

import json
from fractions import Fraction
from itertools import pairwise
from pathlib import Path

import av
import numpy as np
import pytest
from test_metrics import discs, swing
from test_report import Page

from tempolora import cli
from tempolora.data.video import write_mp4
from tempolora.results.evaluate import METRICS, Settings, evaluate

FPS, FRAMES, RATE = 16, 49, 22_050
HZ = {"slow.mp4": 0.9, "fast.mp4": 2.2}
COLOUR, GROUND = np.array([214, 60, 40.0]), np.array([60, 70, 90.0])
SETTINGS = Settings(6.0, (0.5, 6.0), 60.0)


def disc(hz: float) -> np.ndarray:
    """A red disc that swings on grey, uint8 (F, H, W, 3)."""
    weight = discs(swing(hz))[..., None]
    return np.rint(weight * COLOUR + (1 - weight) * GROUND).astype(np.uint8)


def rests(hz: float) -> np.ndarray:
    """When it is at either end, s."""
    times = (np.arange(1, 20) / 2 - 0.4 / (2 * np.pi)) / hz
    return times[times < FRAMES / FPS - 0.1]


def clicks(times_s: np.ndarray) -> np.ndarray:
    audio = np.zeros(round(FRAMES / FPS * RATE), np.float32)
    for start in (times_s * RATE).astype(int):
        t = np.arange(min(600, len(audio) - start)) / RATE
        audio[start : start + 600] += 0.6 * np.sin(2 * np.pi * 1000 * t) * np.exp(-t / 0.006)
    return audio


def truth_of(hz: float) -> dict:
    return {
        "kind": "slide",
        "hz": hz,
        "phase": 0.4,
        "amplitude_px": 8.0,
        "fps": FPS,
        "beats_s": rests(hz).tolist(),
        "track_px": swing(hz).tolist(),
        "colour": COLOUR.tolist(),
        "caption": "a red disc",
    }


@pytest.fixture(scope="module")
def folders(tmp_path_factory) -> Path:
    """clean/, flickering/ and frozen/ with the same two names, and truth.json."""
    root = tmp_path_factory.mktemp("evaluate")
    rng = np.random.default_rng(0)
    for name, hz in HZ.items():
        clean = disc(hz)
        shaken = np.clip(clean + rng.normal(0, 12, (FRAMES, 1, 1, 1)), 0, 255)
        versions = {
            "clean": clean,
            "flickering": shaken.astype(np.uint8),
            "frozen": np.repeat(clean[:1], FRAMES, axis=0),
        }
        for version, frames in versions.items():
            (root / version).mkdir(exist_ok=True)
            write_mp4(root / version / name, frames, FPS, clicks(rests(hz)), RATE, crf=1)
    truth = {name: truth_of(hz) for name, hz in HZ.items()}
    (root / "truth.json").write_text(json.dumps(truth))
    return root


@pytest.fixture(scope="module")
def results(folders: Path) -> dict[str, dict]:
    """metrics.json of each version, against the clean one."""
    found = {}
    for version in ("clean", "flickering", "frozen"):
        out = folders / f"out_{version}"
        arguments = ["--videos", version, "--reference", "clean"]
        paths = [str(folders / a) if not a.startswith("--") else a for a in arguments]
        more = ["--truth", str(folders / "truth.json"), "--audio", "--out", str(out)]
        assert cli.main(["evaluate", *paths, *more]) == 0
        found[version] = json.loads((out / "metrics.json").read_text())
    return found


def test_every_metric_is_there_and_has_a_mean_with_an_interval(results):
    found = results["flickering"]
    assert set(found["clips"]) == set(HZ)
    for values in found["clips"].values():
        assert set(values) == set(METRICS)
    assert found["not_computed"] == [] == found["skipped"] and found["paired"]
    for name, mean in found["mean"].items():
        values = [clip[name] for clip in found["clips"].values()]
        assert mean["mean"] == pytest.approx(np.mean(values))
        assert min(values) - 1e-9 <= mean["low"] <= mean["high"] <= max(values) + 1e-9
        assert mean["videos"] == 2


def test_flicker_is_that_of_the_frames_as_decoded(results, folders):
    for name in HZ:
        with av.open(folders / "flickering" / name) as container:
            frames = [f.to_ndarray(format="rgb24").astype(float) for f in container.decode(video=0)]
        expected = np.mean([np.abs(b - a).mean() for a, b in pairwise(frames)])
        found = results["flickering"]["clips"][name]
        assert found["flicker"] == pytest.approx(expected, abs=0.15)
        assert found["vbench_flickering"] == pytest.approx((255 - found["flicker"]) / 255)


def test_clean_videos_are_as_they_were_drawn(results):
    for name, hz in HZ.items():
        found = results["clean"]["clips"][name]
        assert found["dominant_hz"] == pytest.approx(hz, rel=0.02)
        assert abs(found["hz_log2"]) < 0.03
        assert abs(found["amplitude_log2"]) < 0.02
        assert abs(found["jerk_log2"]) < 1  # 0.05 px of noise are as much jerk as the slow swing
        assert found["track_jitter_px"] < 0.1
        assert found["colour_error"] < 9  # the edge of a small disc, with the chroma of 4:2:0
        assert found["shape_overlap"] > 0.99 and abs(found["area_log2"]) < 0.01
        assert found["beat_recall"] > 0.6 and found["beat_gain"] > 0.25
        for score in ("flicker_score", "visible_flicker_score", "warping_score"):
            assert found[score] == pytest.approx(1)
        for power in ("band_log2", "jitter_log2", "comb_log2"):
            assert found[power] == pytest.approx(0, abs=1e-5)


def test_flickering_videos_are_told_from_clean_ones_at_the_same_motion(results):
    for name in HZ:
        clean, found = (results[v]["clips"][name] for v in ("clean", "flickering"))
        assert found["jitter_log2"] > 1 and found["warping_error"] > 3 * clean["warping_error"]
        assert found["visible_flicker"] > 1.3 * clean["visible_flicker"]
        assert found["flicker_score"] < 0.7 and found["warping_score"] < 0.4
        assert abs(found["amplitude_log2"]) < 0.05 and found["motion_retained"] > 0.9


def test_frozen_videos_have_the_best_defects_and_lose_every_score(results):
    for name in HZ:
        clean, found = (results[v]["clips"][name] for v in ("clean", "frozen"))
        for defect in ("flicker", "visible_flicker", "warping_error", "track_jitter_px"):
            assert found[defect] < 0.2 * clean[defect] + 0.01
        for score in [name for name in METRICS if name.endswith("_score")]:
            assert found[score] < 0.05
        assert found["motion_retained"] < 0.05 and found["band_log2"] < -5
        assert found["amplitude_log2"] < -5 and found["beat_gain"] < 0.1
        assert found["shape_overlap"] > 0.9  # looks are not what it fails by


def test_the_page_stands_alone_and_says_what_it_is_relative_to(results, folders):
    html = (folders / "out_flickering" / "evaluate.html").read_text("utf-8")
    page = Page(html)
    assert f"relative to the clips of the same names in {folders / 'clean'}" in page.text
    assert "http" not in html and not page.all("img") and not page.all("link")
    for name, (title, _, _) in METRICS.items():
        assert name in page.text and title in page.text
    dots = [attrs["d"] for attrs in page.all("path")]
    assert [d.count("M") for d in dots] == [2, 2]  # videos and reference


# --- What is missing ------------------------------------------------------------------------------


def test_what_cannot_be_computed_is_said_with_the_reason(folders, tmp_path):
    page = Page(evaluate(folders / "clean", tmp_path, SETTINGS).read_text("utf-8"))
    found = json.loads((tmp_path / "metrics.json").read_text())
    for entry in found["not_computed"]:
        assert set(entry["videos"]) == set(HZ)
        (needs,) = {METRICS[name][2] for name in entry["metrics"]}
        assert entry["why"] == f"{needs} was not given" and entry["why"] in page.text
    missing = {name for entry in found["not_computed"] for name in entry["metrics"]}
    assert missing == {name for name, (_, _, needs) in METRICS.items() if needs != "the videos"}
    assert "relative to nothing: no --reference" in page.text


def test_a_clip_too_short_for_its_cutoff_and_one_without_sound_are_told(folders, tmp_path):
    clips = tmp_path / "clips"
    clips.mkdir()
    write_mp4(clips / "short.mp4", disc(2.0)[:9], FPS)
    evaluate(clips, tmp_path / "out", SETTINGS, reference=folders / "clean", audio=True)
    found = json.loads((tmp_path / "out" / "metrics.json").read_text())
    whys = {m: entry["why"] for entry in found["not_computed"] for m in entry["metrics"]}
    assert "9 frames at 16 fps have no bin" in whys["motion"]
    assert whys["jitter_log2"] == whys["motion"]
    assert whys["beat_gain"] == "the file has no sound track"
    assert found["clips"]["short.mp4"]["flicker"] > 0 and not found["paired"]
    assert found["mean"]["flicker"]["low"] is None  # one video has no interval


def uneven(path: Path) -> None:
    """An mp4 whose frames come at irregular times."""
    with av.open(path, "w") as container:
        stream = container.add_stream("libx264", rate=16)
        stream.height = stream.width = 48
        stream.time_base = stream.codec_context.time_base = Fraction(1, 160)
        for k, array in enumerate(disc(2.0)[:20]):
            frame = av.VideoFrame.from_ndarray(array, format="rgb24")
            frame.pts, frame.time_base = 10 * k + 5 * (k % 2), Fraction(1, 160)
            container.mux(stream.encode(frame))
        container.mux(stream.encode())


def spoil(folder: Path, good: Path) -> None:
    """Files that cannot be measured, each for its own reason."""
    (folder / "text.mp4").write_text("no video")
    (folder / "list.mp4").write_text("#EXTM3U\n#EXTINF:1,\nhttps://example.org/a.ts\n")
    (folder / "half.mp4").write_bytes(good.read_bytes()[: good.stat().st_size // 3])
    damaged = bytearray(good.read_bytes())
    middle = len(damaged) // 2
    damaged[middle : middle + 4000] = bytes(4000)
    (folder / "damaged.mp4").write_bytes(damaged)
    write_mp4(folder / "four.mp4", disc(2.0)[:4], FPS)
    uneven(folder / "uneven.mp4")


def test_bad_files_are_named_with_their_reason_and_the_others_measured(folders, tmp_path, caplog):
    clips = tmp_path / "clips"
    clips.mkdir()
    (clips / "<b>&.mp4").write_bytes((folders / "clean" / "slow.mp4").read_bytes())
    spoil(clips, folders / "clean" / "slow.mp4")
    html = evaluate(clips, tmp_path / "out", SETTINGS).read_text("utf-8")
    found = json.loads((tmp_path / "out" / "metrics.json").read_text())
    assert list(found["clips"]) == ["<b>&.mp4"]
    why = {entry["file"]: entry["why"] for entry in found["skipped"]}
    assert set(why) == {f"{n}.mp4" for n in ("text", "list", "half", "damaged", "four", "uneven")}
    assert "it has 4 frames, 9 are needed" in why["four.mp4"]
    assert "not evenly spaced" in why["uneven.mp4"]
    assert "damaged" in why["damaged.mp4"]
    page = Page(html)
    assert "Left out, 6 files" in page.text and "<b>&.mp4" in page.text and not page.all("b")
    assert page.text.count("four.mp4") == 1
    assert sum("left out" in message for message in caplog.messages) == 6


def test_rates_that_differ_are_not_compared(folders, tmp_path):
    clips = tmp_path / "clips"
    clips.mkdir()
    write_mp4(clips / "slow.mp4", disc(0.9), 24)
    out = tmp_path / "out"
    known = folders / "truth.json"
    evaluate(clips, out, SETTINGS, reference=folders / "clean", truth=known)
    found = json.loads((out / "metrics.json").read_text())
    whys = {m: entry["why"] for entry in found["not_computed"] for m in entry["metrics"]}
    assert whys["jitter_log2"] == "the video runs at 24 fps and the reference at 16"
    assert whys["jerk_log2"] == "the video runs at 24 fps and its truth at 16"
    assert found["clips"]["slow.mp4"]["dominant_hz"] == pytest.approx(0.9 * 1.5, rel=0.02)


def test_reference_clips_without_namesakes_are_brought_to_the_videos_rate_and_size(
    folders, tmp_path
):
    clips = tmp_path / "clips"
    clips.mkdir()
    wide = np.pad(disc(1.0), ((0, 0), (0, 0), (12, 12), (0, 0)), "edge")
    write_mp4(clips / "wide.mp4", np.concatenate([wide, wide]), 30)
    write_mp4(clips / "short.mp4", disc(1.0), 30)
    out = tmp_path / "out"
    evaluate(folders / "clean", out, SETTINGS, reference=clips)
    found = json.loads((out / "metrics.json").read_text())
    assert set(found["reference_clips"]) == {"wide.mp4"}  # the disc swings at 30/16 Hz there
    assert found["reference_clips"]["wide.mp4"]["dominant_hz"] == pytest.approx(30 / 16, rel=0.03)
    assert {"jitter_log2", "flicker_score"} <= set(found["clips"]["slow.mp4"])
    assert [skipped["file"] for skipped in found["skipped"]] == ["short.mp4"]


def test_a_mover_of_another_colour_is_not_found_and_wins_nothing(folders, tmp_path):
    clips = tmp_path / "clips"
    clips.mkdir()
    write_mp4(clips / "slow.mp4", disc(0.9)[..., ::-1].copy(), FPS)
    evaluate(clips, tmp_path / "out", SETTINGS, truth=folders / "truth.json")
    found = json.loads((tmp_path / "out" / "metrics.json").read_text())
    values = found["clips"]["slow.mp4"]
    assert values["jerk_score"] == 0 and "jerk_log2" not in values
    assert values["colour_error"] > 40
    whys = {m: entry["why"] for entry in found["not_computed"] for m in entry["metrics"]}
    assert whys["jerk_log2"] == "nothing of the mover's colour in 49 frames"


# --- Mistakes -------------------------------------------------------------------------------------

WRONG = {
    "no folder": (["--videos", "nowhere"], "--videos: there is no folder"),
    "no mp4": (["--videos", "empty"], "--videos: there is no .mp4 file in"),
    "no video": (["--videos", "bad"], "--videos: none of 1 videos can be read; text.mp4: it"),
    "no reference": (["--videos", "good", "--reference", "nowhere"], "--reference: there is no"),
    "bad reference": (["--videos", "good", "--reference", "bad"], "--reference: none of 1"),
    "no truth": (["--videos", "good", "--truth", "none.json"], "none.json: cannot read (No such"),
    "torn truth": (["--videos", "good", "--truth", "torn.json"], "torn.json: not JSON"),
    "other truth": (["--videos", "good", "--truth", "other.json"], "names none of the videos"),
    "list": (["--videos", "good", "--truth", "list.json"], "must hold one JSON object"),
    "wrong hz": (["--videos", "good", "--truth", "hz.json"], "a.mp4: hz must be a number above 0"),
    "short track": (["--videos", "good", "--truth", "track.json"], "a.mp4: track_px must be a"),
    "wrong band": (["--videos", "good", "--set", "rhythm.band_hz=[6,1]"], "rhythm.band_hz: 6"),
}


@pytest.fixture(scope="module")
def mistakes(tmp_path_factory) -> Path:
    root = tmp_path_factory.mktemp("mistakes")
    for name in ("empty", "bad", "good"):
        (root / name).mkdir()
    (root / "bad" / "text.mp4").write_text("no video")
    write_mp4(root / "good" / "a.mp4", disc(2.0)[:9], FPS)
    right = truth_of(2.0)
    files = {
        "torn": "{",
        "other": json.dumps({"b.mp4": right}),
        "list": "[]",
        "hz": json.dumps({"a.mp4": right | {"hz": "2"}}),
        "track": json.dumps({"a.mp4": right | {"track_px": [[1, 2]]}}),
    }
    for name, text in files.items():
        (root / f"{name}.json").write_text(text)
    return root


@pytest.mark.parametrize("case", WRONG)
def test_a_mistake_is_one_line_and_exit_2(case, mistakes, monkeypatch, capsys):
    arguments, sentence = WRONG[case]
    monkeypatch.chdir(mistakes)
    assert cli.main(["evaluate", *arguments, "--out", "out"]) == 2
    stderr = capsys.readouterr().err.strip().splitlines()
    assert sentence in stderr[-1]
    assert not [line for line in stderr[:-1] if "left out" not in line]
    assert not Path("out/metrics.json").exists()
