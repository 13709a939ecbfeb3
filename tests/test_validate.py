"""Held-out clips: whole clips, chosen by name, measured alike at every step."""

from pathlib import Path

import pytest
import torch
from test_objective import objective

from tempolora.config import load_config
from tempolora.data.shards import ShardReader, load_prompt, read_manifest
from tempolora.train.step import Collate
from tempolora.train.validate import Validation, split_clips
from tempolora.train.watch import bin_centres
from tempolora.train.world import World

CPU = torch.device("cpu")


def keys(clips, windows=2):
    return sorted(f"clip{c}-{c:010d}-w{w:04d}" for c in range(clips) for w in range(windows))


@pytest.mark.parametrize(
    ("clips", "asked", "spared"),
    [
        (9, None, 0),
        (10, None, 1),
        (20, None, 1),
        (21, None, 2),
        (500, None, 4),
        (6, 2, 2),
        (3, 9, 2),
    ],
)
def test_how_many_clips_are_held_out(clips, asked, spared):
    train, held_out = split_clips(keys(clips), asked)
    assert len(held_out) == spared
    assert len(train) == 2 * (clips - spared)


def test_no_window_of_a_held_out_clip_is_trained_on():
    names = keys(40, windows=3)
    train, held_out = split_clips(names, 7)
    away = {names[position].rsplit("-w", 1)[0] for clip in held_out for position in clip}
    assert len(away) == 7
    assert not away & {names[position].rsplit("-w", 1)[0] for position in train}


def test_which_clips_follows_from_their_names_alone():
    few, many = keys(40), keys(40) + ["zebra-0-w0000"]
    chosen = {few[clip[0]] for clip in split_clips(few, 4)[1]}
    assert len(chosen & {many[clip[0]] for clip in split_clips(many, 4)[1]}) >= 3


def validation(toy_shards, *settings):
    small = ("data.num_frames=17", "data.height=64", "data.width=64", "model.id=tinywan")
    cfg = load_config(None, [f"data.shards={toy_shards}", *small, *settings])
    reader = ShardReader(Path(toy_shards), read_manifest(Path(toy_shards))["fingerprint"])
    collate = Collate(cfg, "high", load_prompt(Path(toy_shards), ""))
    made = Validation(cfg, "high", reader, [c[0] for c in split_clips(reader.keys, 2)[1]], collate)
    return cfg, made


def test_it_is_measured_before_training_at_intervals_and_at_the_end(toy_shards):
    _, made = validation(toy_shards, "train.validate_every=20", "train.max_steps=50")
    assert [step for step in range(51) if made.due(step)] == [0, 20, 40, 50]
    _, never = validation(toy_shards, "train.validate_every=0")
    assert not any(never.due(step) for step in range(900))


def test_the_same_model_measures_the_same_and_a_better_one_less_at_each_sigma(toy_shards):
    cfg, made = validation(toy_shards)
    seen = []

    def predict(x, sigma_B, text_BLD, **given):
        seen.append(float(sigma_B[0]))
        return 0.1 * x

    judge, alone = objective(cfg), World(0, 1, CPU)
    first = made.measure(judge, predict, alone)
    again = made.measure(judge, predict, alone)
    assert first == again
    assert len(first["held_out_by_sigma"]) == 9
    assert sorted(set(seen)) == pytest.approx(bin_centres(cfg, "high").float().tolist())
    better = made.measure(judge, lambda x, s, t, **g: 0.9 * x, alone)  # noise is most of v up here
    assert better["held_out"] < first["held_out"]
    for sigma, loss in better["held_out_by_sigma"].items():
        assert loss < first["held_out_by_sigma"][sigma]
