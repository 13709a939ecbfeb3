"""The demo: three arms that differ in one thing, on captions that nothing was trained on."""

import json
from collections.abc import Iterator
from pathlib import Path

import pytest
from conftest import SMALL, overrides
from safetensors.numpy import load_file
from test_cli import frames_of, refuse

from tempolora import cli, demo
from tempolora.config import load_config
from tempolora.data import toy
from tempolora.data.toy_set import draw_toy_set
from tempolora.demo import SCENES, captions, without_rhythm
from tempolora.results.compare_page import ARMS
from tempolora.train.terms import term_weights

TOY = Path(__file__).parents[1] / "configs" / "toy.json"


def test_captions_are_of_different_kinds_and_in_no_training_clip(tmp_path):
    draw_toy_set(tmp_path / "t", fps=16, num_frames=5, height=16, width=16, clips=12, seed=0)
    prompts = (tmp_path / "t" / "prompts.txt").read_text().splitlines()
    trained = {line.split("|")[1] for line in prompts}
    assert len({scene.kinds[0] for scene in SCENES}) == len(SCENES) == len(captions())
    assert trained.isdisjoint(toy.captions(toy.Scenes.cat(SCENES)))


def test_plain_lora_differs_from_ours_in_the_terms_and_where_it_is_kept():
    cfg = load_config(TOY, ["rhythm.sound_weight=0.1", "rhythm.rollout_every=5"])
    plain = without_rhythm(cfg)
    assert [term_weights(plain, expert) for expert in plain.experts] == [{}, {}]
    ours, other = cfg.model_dump(), plain.model_dump()
    assert [key for key in ours if ours[key] != other[key]] == ["rhythm", "output"]
    changed = {key for key in ours["rhythm"] if ours["rhythm"][key] != other["rhythm"][key]}
    assert changed == {"spec_weight", "tv_weight", "sound_weight", "rollout_every"}
    assert Path(plain.output.dir).parent == Path(cfg.output.dir)


@pytest.fixture(scope="module")
def shown(toy_shards, tmp_path_factory) -> Iterator[tuple[Path, list[str]]]:
    """output.dir of a demo of two captions whose own rhythm terms are off too, and the command."""
    out = tmp_path_factory.mktemp("demo") / "out"
    off = ("rhythm.spec_weight=0", "rhythm.tv_weight=0")
    steps = ("train.max_steps=1", "output.sample_steps=1", "train.lr=0.01", "model.expert=high")
    where = (f"data.shards={toy_shards}", f"output.dir={out}")
    command = ["demo", *overrides(*SMALL, *off, *steps, *where)]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(demo, "SCENES", SCENES[:2])
        assert cli.main(command) == 0
        yield out, command


def test_with_its_terms_off_ours_is_plain_lora_and_neither_is_the_base(shown):
    out, _ = shown
    for path in out.glob("*.safetensors"):
        ours, plain = load_file(path), load_file(out / "plain" / path.name)
        assert all((ours[name] == plain[name]).all() for name in ours)
    arms = json.loads((out / "compared" / "compare.json").read_text())["arms"]
    assert arms["ours"] == arms["plain"]
    assert arms["ours"] != arms["base"]


def test_every_arm_has_a_video_for_each_caption_and_the_report_shows_them(shown):
    out, _ = shown
    html = (out / "report.html").read_text()
    for arm in ARMS:
        assert {p.name for p in (out / "compared" / arm).glob("*")} == set(captions())
        for name in captions():
            assert frames_of(out / "compared" / arm / name) == (17, 16.0)
            assert f'src="compared/{arm}/{name}"' in html
    assert frames_of(out / "sample_after_lora.mp4") == (17, 16.0)


def test_a_demo_that_is_repeated_trains_nothing_again(shown):
    out, command = shown
    logs = [out / "metrics.jsonl", out / "plain" / "metrics.jsonl"]
    before = [path.read_bytes() for path in logs]
    assert cli.main(command) == 0
    assert [path.read_bytes() for path in logs] == before


@pytest.mark.parametrize(
    ("settings", "sentence"),
    [
        (["model.variant=i2v_a14b"], "model.task: the demo's videos start from words alone"),
        (["data.num_frames=9", "rhythm.spec_weight=0"], "data.num_frames: 9 frames at 16 fps"),
    ],
)
def test_what_the_demo_cannot_show_is_refused_before_anything_is_drawn(
    settings, sentence, tmp_path, capsys
):
    where = [f"data.{key}={tmp_path / key}" for key in ("source", "shards")]
    assert sentence in refuse(capsys, "demo", *overrides(*settings, *where))
    assert not list(tmp_path.iterdir())
