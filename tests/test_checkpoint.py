"""Checkpoints: whole or not there, and any damage noticed."""

import random

import pytest
import torch

from tempolora.config import ConfigError
from tempolora.train import checkpoint


def write(root, step, keep=2):
    checkpoint.begin(root, step)
    tensors = {"blocks.0.attn1.to_q.lora_A.weight": torch.full((4, 8), float(step))}
    checkpoint.write_tensors(root, step, "lora.safetensors", tensors)
    moments = {"0.exp_avg": torch.ones(3)}
    checkpoint.write_tensors(root, step, "optimizer-00000.safetensors", moments)
    return checkpoint.commit(root, step, {"step": step}, keep)


def test_what_was_written_comes_back(tmp_path):
    found = checkpoint.open_checkpoint(write(tmp_path, 7))
    assert found.state == {"step": 7}
    assert found.lora()["blocks.0.attn1.to_q.lora_A.weight"].eq(7).all()
    assert found.optimizer()["0.exp_avg"].eq(1).all()
    assert found.ema() is None


def test_the_newest_are_kept_and_found(tmp_path):
    for step in (2, 4, 10):
        write(tmp_path, step)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["step-000004", "step-000010"]
    assert checkpoint.latest(tmp_path).state["step"] == 10


def test_an_unsealed_checkpoint_does_not_count_and_is_taken_up_again(tmp_path):
    write(tmp_path, 2)
    checkpoint.begin(tmp_path, 4)
    checkpoint.write_tensors(tmp_path, 4, "optimizer-00007.safetensors", {"x": torch.ones(1)})
    assert checkpoint.latest(tmp_path).state["step"] == 2
    folder = write(tmp_path, 4)
    assert not (folder / "optimizer-00007.safetensors").exists()
    assert checkpoint.latest(tmp_path).state["step"] == 4


def test_checkpoints_are_ordered_by_number_and_a_users_copy_is_not_one(tmp_path):
    for step in (999_999, 1_000_000):
        write(tmp_path, step, keep=1)
    (tmp_path / "step-1000000-backup").mkdir()
    assert checkpoint.latest(tmp_path).state["step"] == 1_000_000


def test_a_run_that_goes_back_finds_its_own_checkpoints_newest(tmp_path):
    for step in (2, 4, 6):
        write(tmp_path, step, keep=3)
    checkpoint.set_newer_aside(tmp_path, 2)
    assert checkpoint.latest(tmp_path).state["step"] == 2
    write(tmp_path, 3, keep=1)
    assert checkpoint.latest(tmp_path).state["step"] == 3
    assert (tmp_path / "superseded" / "step-000006" / "lora.safetensors").is_file()


def test_every_flipped_byte_and_missing_file_is_noticed_and_the_one_before_taken(tmp_path):
    draw = random.Random(0)
    for _ in range(40):
        write(tmp_path, 2)
        folder = write(tmp_path, 4)
        path = draw.choice(sorted(folder.iterdir()))
        content = bytearray(path.read_bytes())
        if draw.random() < 0.3:
            path.unlink()
        else:
            content[draw.randrange(len(content))] ^= 1 << draw.randrange(8)
            path.write_bytes(content)
        with pytest.raises(ConfigError):
            checkpoint.open_checkpoint(folder)
        assert checkpoint.latest(tmp_path).state["step"] == 2


def test_a_folder_that_is_none_is_one_sentence(tmp_path):
    with pytest.raises(ConfigError, match="not a whole checkpoint"):
        checkpoint.open_checkpoint(tmp_path / "nothing")
    assert checkpoint.latest(tmp_path / "nothing") is None
