"""The knob's study: every way of asking starts from the same noise, and asks for what it says."""

import json
from dataclasses import replace

import numpy as np
import pytest
import torch
from safetensors.torch import save_file
from test_study import TINY

from tempolora.config import ConfigError
from tempolora.model import lora, tinywan, wan
from tempolora.results import guide
from tempolora.study import clips, experiment, finetune, knob, knob_page
from tempolora.study.__main__ import main


@pytest.fixture
def settings(tmp_path):
    overrides = ("model.id=tinywan", *TINY)
    return experiment.Settings(tmp_path, torch.device("cpu"), overrides, clips=4, samples=2)


def test_a_stretched_axis_puts_frame_t_where_frame_2_t_stood_and_comes_back():
    expert = tinywan.read_expert(tinywan.expert_file("high"))
    rope, own = expert.rope, (expert.rope.freqs_cos.clone(), expert.rope.freqs_sin.clone())
    with knob.stretched([expert], 1.0):
        torch.testing.assert_close(rope.freqs_cos, own[0])
        torch.testing.assert_close(rope.freqs_sin, own[1])
    with knob.stretched([expert], 2.0):
        for table, was in zip((rope.freqs_cos, rope.freqs_sin), own, strict=True):
            torch.testing.assert_close(table[:20, : rope.t_dim], was[:40:2, : rope.t_dim])
            assert torch.equal(table[:, rope.t_dim :], was[:, rope.t_dim :])
    assert torch.equal(rope.freqs_cos, own[0]) and torch.equal(rope.freqs_sin, own[1])


def test_a_clip_at_twice_the_speed_shows_every_other_frame_of_its_own(settings):
    """Exactly warped: latents of a drawn clip at a speed are those of the frames it should show."""
    seed = experiment.Seed(settings, 0)
    made = knob.clips_at_speeds(settings, seed)
    assert [sample.meta["speed"] for sample in made.samples] == list(knob.SPEEDS)
    scenes = clips.toy.draw_scenes(
        1, np.random.default_rng([0, clips.TRAINED_ON, 1]), **knob.LOOKS, hz=knob.TRAINED_HZ
    )
    sizes = clips.sizes(seed.cfg)
    slow = clips.toy.render(scenes, **sizes | {"num_frames": 33})
    wanted = clips.encode(seed.vae, slow[:, ::2])[0]
    torch.testing.assert_close(made.samples[-1].latents["latents"], wanted, rtol=0, atol=0.05)


def test_each_way_leaves_numbers_for_every_speed_and_is_not_done_again(settings):
    command = ["knob", "--out", str(settings.out), "--ways", "rope", "time_16/high", "--seeds", "0"]
    sets = [part for override in TINY for part in ("--set", override)]
    command += ["--clips", "4", "--samples", "2", "--device", "cpu", *sets]
    assert main(command) == 0
    files = sorted(settings.out.glob(f"*/{knob.FOLDER}/*.json"))
    assert [file.stem for file in files] == ["rope-0", "time_16-high-0"]
    for file in files:
        found = json.loads(file.read_text())
        assert found["asked"] == list(knob.ASKED)
        assert {len(per_speed) for per_speed in found["metrics"].values()} == {len(knob.ASKED)}
        at_zero = found["metrics"]["drift_shape"][knob.ASKED.index(0.0)]
        assert all(drift is None or abs(drift) < 1e-6 for drift in at_zero)
    # at strength 0 and stretched by 1 both are the base, from the same noise
    first, second = (json.loads(file.read_text())["metrics"]["amplitude_log2"] for file in files)
    assert first[2] == second[2] and first[4] != second[4]
    before = {file: file.stat().st_mtime_ns for file in files}
    assert main(command) == 0
    assert before == {file: file.stat().st_mtime_ns for file in files}


def test_beside_our_adapters_the_weights_are_those_with_them_merged(settings):
    """Against the adapters left in place, at full strength."""
    seed = experiment.Seed(settings, 0)
    ours = experiment.arm(settings.ours)
    with pytest.raises(ConfigError, match=r"needs .*absolute_1_anchor"):
        knob.run(settings, knob.ways(["rope+ours"]), [0])
    adapters = {}
    for name in seed.cfg.experts:  # as an arm leaves them, but large enough to be seen
        fresh = finetune.with_adapters(experiment._config(settings, ours, 0), ours, name, "cpu")
        for key, weight in lora.lora_parameters(fresh).items():
            adapters[f"{name}.{key}"] = weight.detach() + 0.05
    path = settings.path(ours, 0, ".safetensors")
    path.parent.mkdir(parents=True, exist_ok=True)
    save_file(adapters, path)
    tuned = experiment.stored_experts(settings, ours, seed)
    experts = {name: wan.load_transformer(seed.cfg.model, name, "cpu") for name in tuned}
    base = seed.sample(experts)
    knob.add_deltas(experts, tuned)
    merged, beside = seed.sample(experts), seed.sample(tuned, 1.0)
    assert (merged.float() - beside.float()).abs().max() <= 1  # levels, by rounding
    assert (merged.float() - base.float()).abs().max() > 20
    assert knob.run(settings, knob.ways(["rope+ours"]), [0]) == 1


def test_guidance_is_asked_for_each_videos_own_frequency_times_the_speed(settings, monkeypatch):
    settings = replace(settings, overrides=(*settings.overrides, "output.sample_steps=4"))
    seed, asked = experiment.Seed(settings, 0), []
    clock = seed.cfg.timebase
    real = guide.at_frequency

    def noted(samples, fps, hz):
        asked.append(hz)
        return real(samples, fps, hz)

    monkeypatch.setattr(guide, "at_frequency", noted)
    (way,) = knob.ways(["guide"])
    found, clips_ANFHW3 = knob.record(settings, way, seed)
    own_N = 2 ** np.array(found["metrics"]["hz_log2"][2])
    wanted = [own_N * 2**step for step in knob.ASKED if step]
    wanted = np.clip(wanted, 1.01 * clock.fps / clock.samples, 6.0)
    np.testing.assert_allclose(np.reshape(asked, (4, 2)), wanted, rtol=1e-4)
    middle, faster = (found["metrics"]["amplitude_log2"][n] for n in (2, 4))
    assert middle != faster
    assert clips_ANFHW3.shape[:2] == (5, 2) and clips_ANFHW3.dtype == torch.uint8
    assert not torch.equal(clips_ANFHW3[2], clips_ANFHW3[4])


@pytest.mark.parametrize("name", ["time_16", "random_16/high", "nothing/high", "time_16/some"])
def test_a_way_that_there_is_not_is_refused(name):
    with pytest.raises(ConfigError, match="--ways: there is no"):
        knob.ways([name])


def test_slope_fit_and_order_of_a_known_knob(tmp_path):
    """0.9 octaves an octave with noise; half of the samples move too fast to count."""
    rng = np.random.default_rng(0)
    own_N = np.where(np.arange(400) % 2, np.log2(2.0), np.log2(5.0))
    asked_A = np.array(knob.ASKED)
    hz_AN = own_N + 0.9 * asked_A[:, None] + 0.02 * rng.standard_normal((5, 400))
    flat = {name: np.zeros((5, 400)).tolist() for name in knob_page.FLAT}
    flat["amplitude_log2"][4] = [0.25] * 400
    (tmp_path / "tinywan" / knob.FOLDER).mkdir(parents=True)
    for seed in (0, 1):
        record = {
            **{"format": 1, "way": "rope", "model": "tinywan", "seed": seed},
            **{"asked": list(knob.ASKED), "metrics": {"hz_log2": hz_AN.tolist(), **flat}},
        }
        path = tmp_path / "tinywan" / knob.FOLDER / f"rope-{seed}.json"
        path.write_text(json.dumps(record))
    asked, gap_AN = knob_page.octaves(record)
    slope_N, r2, rank = knob_page.fit(asked, gap_AN)
    assert gap_AN.shape == (5, 200)
    assert abs(slope_N.mean() - np.polyfit(asked, gap_AN.mean(1), 1)[0]) < 1e-9
    assert abs(slope_N.mean() - 0.9) < 0.01 and r2 > 0.999 and rank > 0.95
    *_, row, _ = knob_page.knob_section(tmp_path)
    assert row.startswith(
        "| `tinywan: rope` | 2 x 200 | +0.90 [+0.90, +0.90] | 1.000 | 0.98, 0.98 |"
    )
    assert "| +0.250 | +0.000 |" in row
    assert row.endswith("| slope, amplitude |")  # the interval's end is at 0.9, not beyond it
    assert knob_page.knob_section(tmp_path / "tinywan") == []


def test_a_knob_that_does_nothing_fits_nothing():
    slope_N, r2, rank = knob_page.fit(np.array(knob.ASKED), np.zeros((5, 7)))
    assert (slope_N == 0).all() and r2 == 0 and rank == 0
