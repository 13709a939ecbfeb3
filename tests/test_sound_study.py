"""The soundtracks' study: all ways follow the same clicks, and the page applies the thresholds."""

import json

import numpy as np
import pytest
import torch
from test_study import TINY

from tempolora.config import ConfigError
from tempolora.data import toy
from tempolora.rhythm.guidance import each, on_beat
from tempolora.study import clips, experiment, sound, sound_page
from tempolora.study.__main__ import main
from tempolora.study.finetune import training_batches
from tempolora.timebase import TimeBase

CLOCK = TimeBase(16, 49)
FINE = (*TINY, "data.num_frames=49")  # overrides are laid over one another: long enough for beats


def command(out, *more: str) -> list[str]:
    few = (*TINY, "output.sample_steps=4")  # of which the third is guided
    sets = [part for override in few for part in ("--set", override)]
    sizes = ["--seeds", "0", "--clips", "3", "--samples", "2", "--device", "cpu"]
    return ["sound", "--out", str(out), *sizes, *sets, *more]


def test_soundtracks_are_faster_than_the_beats_trained_on_and_differ():
    tracks = sound.soundtracks(200, seed=0)
    rates = np.array([track.hz for track in tracks])
    assert rates.min() >= 1.6 > max(sound.TRAINED_HZ) and rates.max() <= 3.5
    assert abs(np.log(rates).mean() - np.log([1.6, 3.5]).mean()) < 0.05
    turns = np.array([track.first_s * track.hz for track in tracks])
    assert turns.min() >= 0 and turns.max() < 1 and abs(turns.mean() - 0.5) < 0.1
    assert tracks == sound.soundtracks(200, seed=0) != sound.soundtracks(200, seed=1)


def test_a_track_half_a_beat_late_strikes_between_its_clicks_and_as_far_as_the_clip():
    track = sound.Clicks(2.0, 0.4)
    assert np.allclose(track.times(1.5), [0.4, 0.9, 1.4])
    assert np.allclose(track.times(1.5, 0.5), [0.15, 0.65, 1.15])


def test_a_clip_trained_on_has_its_onsets_where_its_mover_turns(tmp_path):
    """True beats come from the scene's frequency and phase, frames from rounding them."""
    settings = experiment.Settings(tmp_path, torch.device("cpu"), FINE, clips=4, samples=2)
    shared = experiment.Seed(settings, 0)
    made = sound.clips_with_clicks(settings, shared)
    rng = np.random.default_rng([0, clips.TRAINED_ON, 2])
    scenes = toy.draw_scenes(4, rng, **clips.NARROW, hz=sound.TRAINED_HZ)
    wanted = clips.encode(shared.vae, clips.draw(shared.cfg, scenes, shared.device))
    for n, sample in enumerate(made.samples):
        assert torch.equal(sample.latents["latents"], wanted[n])
        hz, phase = scenes.hz_N[n].item(), scenes.phase_N[n].item() / (2 * np.pi)
        assert 0.75 <= hz <= 1.5
        beats_s = (np.arange(8) - phase) / hz
        beats_s = beats_s[(beats_s > 0.06) & (beats_s < 48 / 16)]
        onset_F = sample.rhythm["onset"].numpy()
        assert onset_F.shape == (49,) and onset_F.max() == 1
        peaks = np.flatnonzero(onset_F > 0.5) / 16
        assert len(peaks) - len(beats_s) in (0, 1)  # a click on the very first frame may be heard
        assert np.abs(peaks[:, None] - beats_s).min(axis=0).max() <= 0.5 / 16 + 0.01
    batch = training_batches(shared.cfg, "low", made, shared.device)[0]
    assert batch.onset_BF.shape == (2, 49) and (batch.onset_BF.amax(dim=1) == 1).all()


def test_motion_on_the_clicks_is_told_from_motion_between_them():
    """Videos that are still but for a step at the clicks; of the other, half a beat later."""
    track = sound.Clicks(2.0, 0.28125)  # half way between two frames
    shown = torch.full((2, 49, 8, 8, 3), 100, dtype=torch.uint8)
    for n, shift in enumerate((0.0, 0.5)):
        for count, time in enumerate(track.times(49 / 16, shift)):
            shown[n, int(np.ceil(time * 16)) :] = 150 - 50 * (count % 2)
    found = sound.matches(shown, [track, track], CLOCK)
    assert found["f1"].tolist() == [1, 0]
    assert found["gain"][0] > 0.5 > 0 > found["gain"][1]
    assert found["gain_late"][1] > 0.5 > 0 > found["gain_late"][0]


def test_each_sample_of_a_batch_has_a_score_of_its_own():
    luma = torch.rand(2, 48, 2, 2, generator=torch.Generator().manual_seed(0))
    scores = [on_beat(torch.rand(47, generator=torch.Generator().manual_seed(k))) for k in (1, 2)]
    found = each(scores)(luma)
    assert found.tolist() == [scores[n](luma[n : n + 1]).item() for n in (0, 1)]
    assert found.tolist() != [scores[1 - n](luma[n : n + 1]).item() for n in (0, 1)]


def test_every_way_is_sampled_unguided_and_guided_by_the_same_clicks_and_once(tmp_path):
    assert main(command(tmp_path)) == 0
    files = {path.stem: path for path in tmp_path.glob(f"tinywan/{sound.FOLDER}/*.json")}
    assert sorted(files) == ["base-0", "plain-0", "sound-0"]
    found = {name: json.loads(path.read_text()) for name, path in files.items()}
    wanted = {*sound.KEPT, "gain", "f1", "gain_late"}
    for record in found.values():
        assert record["clicks"] == found["base-0"]["clicks"]
        assert min(record["clicks"]["hz"]) > max(sound.TRAINED_HZ)
        for name in ("unguided", "guided"):
            assert set(record[name]) == wanted
            assert all(len(v) == 2 and None not in v for v in record[name].values())
        assert record["unguided"]["flicker"] != record["guided"]["flicker"]
    weights = {k: r["config"]["rhythm"]["sound_weight"] for k, r in found.items()}
    assert weights == {"base-0": 0, "plain-0": 0, "sound-0": 0.2}
    assert found["plain-0"]["rank"] == found["sound-0"]["rank"]
    assert found["plain-0"]["unguided"]["flicker"] != found["base-0"]["unguided"]["flicker"]
    assert found["plain-0"]["unguided"]["flicker"] != found["sound-0"]["unguided"]["flicker"]

    before = {path: path.stat().st_mtime_ns for path in files.values()}
    assert main(command(tmp_path)) == 0
    assert before == {path: path.stat().st_mtime_ns for path in files.values()}


def test_a_way_that_there_is_not_and_other_settings_are_refused(tmp_path, capsys):
    with pytest.raises(ConfigError, match="--ways: there is no 'loud'"):
        sound.ways(["base", "loud"])
    assert main(command(tmp_path, "--ways", "base")) == 0
    assert main([*command(tmp_path, "--ways", "base"), "--samples", "3"]) == 2
    assert "was measured with other settings (study)" in capsys.readouterr().err


# --- The page -------------------------------------------------------------------------------------


def write(out, way: str, seed: int, unguided: dict, guided: dict, samples: int = 50) -> None:
    """A made-up record: constants, and a spread of 0.1 that ways of five letters share."""
    rng = np.random.default_rng([len(way), seed])
    spread_N = 0.1 * rng.standard_normal(samples)

    def values(given: dict) -> dict:
        every = dict.fromkeys([*sound.KEPT, "gain", "f1", "gain_late"], 0.0) | given
        return {name: (value + spread_N).tolist() for name, value in every.items()}

    record = {
        **{"format": 1, "way": way, "seed": seed, "kind": ["slide"] * samples},
        **{"config": {"model": {"id": "models/tinywan"}}},
        **{"unguided": values(unguided), "guided": values(guided)},
    }
    path = out / "tinywan" / sound.FOLDER / f"{way}-{seed}.json"
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(record))


GOOD = {"gain": 0.3, "gain_late": -0.2, "jitter_log2": 0.1, "flicker": 10.5}


def verdicts(out) -> list[str]:
    return [found.verdict for found in sound_page.findings(sound_page.runs_of(out)["tinywan"])]


def test_figures_of_known_records_and_all_conditions_that_hold(tmp_path):
    for seed in range(3):
        write(tmp_path, "base", seed, {"gain": 0.1, "flicker": 10.0}, GOOD)
    gain, more, lead, power, flicker = sound_page.findings(sound_page.runs_of(tmp_path)["tinywan"])
    assert abs(gain.figure.mean - 0.3) < 0.02 and gain.figure.low > 0.25
    # paired: what the samples share drops out
    for found, mean in ((more, 0.2), (lead, 0.5), (power, 0.1)):
        assert abs(found.figure.mean - mean) < 1e-9
        assert found.figure.high - found.figure.low < 1e-9
    assert abs(flicker.figure.mean - (10.5 - 11)) < 0.01
    assert verdicts(tmp_path) == ["holds"] * 5


@pytest.mark.parametrize(
    ("worse", "failing"),
    [
        ({"gain": -0.05}, {0, 1}),
        ({"gain": 0.09}, {1}),
        ({"gain_late": 0.31}, {2}),
        ({"jitter_log2": 0.14}, {3}),
        ({"flicker": 11.1}, {4}),
    ],
)
def test_a_condition_on_the_wrong_side_of_its_threshold_fails(tmp_path, worse, failing):
    for seed in range(3):
        write(tmp_path, "base", seed, {"gain": 0.1, "flicker": 10.0}, GOOD | worse)
    assert {n for n, said in enumerate(verdicts(tmp_path)) if said == "fails"} == failing


def test_the_section_has_every_way_and_says_what_is_missing(tmp_path):
    assert sound_page.sound_section(tmp_path) == []
    write(tmp_path, "plain", 0, {}, {"gain": 0.1})
    text = "\n".join(sound_page.sound_section(tmp_path))
    assert text.count("not measured") == 5 and "Claim 7" not in text
    write(tmp_path, "base", 0, {"flicker": 10.0}, GOOD)
    write(tmp_path, "sound", 0, {"hz_share": 0.05}, {"gain": 0.4})
    lines = sound_page.sound_section(tmp_path)
    text = "\n".join(lines)
    assert lines == sound_page.sound_section(tmp_path)
    assert "#### tinywan" in lines and "but on 1 of 3 seeds" in text and "Claim 7" in text
    for way in sound.WAYS:
        assert f"| `{way}, guided` | 1 x 50 |" in text
        assert f"| `{way}, guided` less `{way}, unguided` |" in text
    assert "| `plain, guided` less `plain, unguided` | +0.100 [+0.100, +0.100] |" in text
    bias = next(line for line in lines if line.startswith("| `sound, unguided` less"))
    assert bias.split("|")[5].split()[0] == "+0.050"  # periodicity
