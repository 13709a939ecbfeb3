"""Checkpoints: whole or not there, and any damage noticed."""

import random

import pytest
import torch

from tempolora.config import ConfigError
from tempolora.train import checkpoint


def write(root, step, keep=2, every=0):
    checkpoint.begin(root, step)
    tensors = {"blocks.0.attn1.to_q.lora_A.weight": torch.full((4, 8), float(step))}
    digests = checkpoint.write_tensors(root, step, "lora.safetensors", tensors)
    moments = {"0.exp_avg": torch.ones(3)}
    digests |= checkpoint.write_tensors(root, step, "optimizer.safetensors", moments)
    return checkpoint.seal(root, step, digests, {"step": step}, keep, every)


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


def test_every_nth_is_kept_for_ever(tmp_path):
    for step in (2, 3, 4, 6, 8, 9, 10):
        write(tmp_path, step, keep=1, every=3)
    assert sorted(int(path.name[5:]) for path in tmp_path.iterdir()) == [3, 6, 9, 10]


def test_what_killed_runs_left_is_swept_up_and_never_taken_for_a_checkpoint(tmp_path):
    write(tmp_path, 2)
    checkpoint.begin(tmp_path, 4)
    (tmp_path / "step-000002").rename(tmp_path / ".step-000002.old")
    assert checkpoint.latest(tmp_path) is None
    write(tmp_path, 6)
    assert [path.name for path in tmp_path.iterdir()] == ["step-000006"]


def test_a_damaged_checkpoint_makes_way_for_the_same_step_again(tmp_path):
    write(tmp_path, 2)
    (write(tmp_path, 4) / "lora.safetensors").unlink()
    assert checkpoint.latest(tmp_path).state["step"] == 2
    write(tmp_path, 4)
    assert checkpoint.latest(tmp_path).state["step"] == 4


def test_the_checksum_is_of_what_was_meant_not_of_what_reached_the_disk(tmp_path):
    checkpoint.begin(tmp_path, 2)
    digests = {}
    for name in ("lora.safetensors", "optimizer.safetensors"):
        digests |= checkpoint.write_tensors(tmp_path, 2, name, {"x": torch.ones(100)})
    path = tmp_path / ".step-000002.tmp" / "lora.safetensors"
    path.write_bytes(path.read_bytes()[:-7])  # a write cut short before the seal
    checkpoint.seal(tmp_path, 2, digests, {"step": 2}, 2, 0)
    with pytest.raises(ConfigError, match=r"lora.safetensors: not what was written"):
        checkpoint.open_checkpoint(tmp_path / "step-000002")


def test_an_unsealed_checkpoint_does_not_count_and_is_taken_up_again(tmp_path):
    write(tmp_path, 2)
    checkpoint.begin(tmp_path, 4)
    checkpoint.write_tensors(tmp_path, 4, "ema.safetensors", {"x": torch.ones(1)})
    assert checkpoint.latest(tmp_path).state["step"] == 2
    folder = write(tmp_path, 4)
    assert not (folder / "ema.safetensors").exists()
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


def test_100_flipped_bits_and_missing_files_are_noticed_and_the_one_before_is_taken(
    tmp_path, caplog
):
    draw = random.Random(0)
    for _ in range(100):
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
        caplog.clear()
        assert checkpoint.latest(tmp_path).state["step"] == 2
        assert "step-000004" in caplog.text
        assert "trying the one before" in caplog.text


def test_a_folder_that_is_none_is_one_sentence(tmp_path):
    with pytest.raises(ConfigError, match="not a whole checkpoint") as caught:
        checkpoint.open_checkpoint(tmp_path / "nothing")
    assert str(caught.value).endswith("(manifest.json: No such file or directory)")
    assert checkpoint.latest(tmp_path / "nothing") is None


def test_where_no_checkpoint_is_whole_a_run_does_not_start_over_by_itself(tmp_path):
    for step in (2, 4):
        (write(tmp_path, step) / "lora.safetensors").unlink()
    with pytest.raises(ConfigError, match=r"no checkpoint in .* is whole.*--resume none"):
        checkpoint.latest(tmp_path)
