"""Shards: readable by any WebDataset tool, refused when damaged or made for something else."""

import json
import os
import tarfile
from pathlib import Path

import pytest
import torch
import webdataset
from safetensors.torch import save_file

from tempolora.config import ConfigError, load_config
from tempolora.data import shards
from tempolora.data.shards import (
    MEMBERS,
    PROMPTS,
    Sample,
    ShardIndex,
    ShardReader,
    describe_sound,
    fingerprint,
    read_indexes,
    verify_shards,
    write_manifest,
    write_shard,
)

CFG = load_config(None)
WANTED = fingerprint(CFG, {"vae": "v", "text_encoder": "t"})


def sample(key: str, seed: int) -> Sample:
    generator = torch.Generator().manual_seed(seed)
    latents = torch.randn(16, 3, 4, 4, generator=generator).bfloat16()
    text = torch.randn(7, 32, generator=generator).bfloat16()
    meta = {"key": key, "speed": 1.0, "sound": "heard" if key == "a" else "absent"}
    return Sample(key, {"latents": latents}, text, {"motion_energy": torch.ones(9)}, meta)


@pytest.fixture
def folder(tmp_path):
    for number, keys in enumerate((["b", "d"], ["a", "c", "e"])):
        index = ShardIndex(WANTED, clips={key: {} for key in keys})
        samples = [sample(key, ord(key)) for key in keys]
        write_shard(tmp_path / f"0000{number}-000000.tar", samples, index)
    save_file({"p": torch.ones(1)}, tmp_path / PROMPTS)
    write_manifest(tmp_path, read_indexes(tmp_path), {"clips": 5})
    return tmp_path


def test_a_sample_comes_back_bit_for_bit(folder):
    reader = ShardReader(folder, WANTED)
    assert reader.keys == ["a", "b", "c", "d", "e"]
    for position, key in enumerate(reader.keys):
        found, wanted = reader.read(position), sample(key, ord(key))
        assert torch.equal(found.latents["latents"], wanted.latents["latents"])
        assert torch.equal(found.text, wanted.text)
        assert found.text.dtype == torch.bfloat16
        assert torch.equal(found.rhythm["motion_energy"], wanted.rhythm["motion_energy"])
        assert found.meta == wanted.meta


def test_no_more_shards_are_open_than_a_process_may_have(folder, monkeypatch):
    monkeypatch.setattr(shards, "MOST_OPEN", 1)
    reader = ShardReader(folder, WANTED)
    for position in (0, 1, 2, 3, 1, 0):  # from one shard to the other and back
        assert reader.read(position).key == reader.keys[position]
        opened = [os.readlink(f"/proc/self/fd/{fd}") for fd in reader._files.values()]
        assert len(opened) == 1 and opened[0].startswith(str(folder))
    shards_open = [p for p in map(_target, Path("/proc/self/fd").iterdir()) if str(folder) in p]
    assert len(shards_open) == 1


def _target(link: Path) -> str:
    try:
        return os.readlink(link)
    except OSError:  # the folder's own listing
        return ""


def test_what_is_heard_in_each_sample_is_known_without_reading_it(folder):
    reader = ShardReader(folder, WANTED)
    assert reader.sound == {"a": "heard", **dict.fromkeys("bcde", "absent")}
    manifest = json.loads((folder / "manifest.json").read_text())
    assert manifest["sound"] == {"heard": 1, "absent": 4}
    told = describe_sound({**manifest["sound"], "silent": 2, "broken": 1})
    assert told == (
        "heard in 1 of 8 samples (2 silent, 4 without a sound track, 1 with a broken one)"
    )


def test_webdataset_reads_the_same_samples(folder):
    urls = [str(path) for path in sorted(folder.glob("*.tar"))]
    seen = {s["__key__"]: s for s in webdataset.WebDataset(urls, shardshuffle=False)}
    assert sorted(seen) == ["a", "b", "c", "d", "e"]
    for found in seen.values():
        assert set(MEMBERS) <= set(found)
        assert json.loads(found["meta.json"])["key"] == found["__key__"]


def test_the_same_samples_make_the_same_shard(tmp_path):
    for name in ("a.tar", "b.tar"):
        write_shard(tmp_path / name, [sample("a", 1)], ShardIndex(WANTED))
    assert (tmp_path / "a.tar").read_bytes() == (tmp_path / "b.tar").read_bytes()


def test_shards_hold_nothing_that_could_be_unpickled(folder):
    for path in folder.glob("*.tar"):
        with tarfile.open(path) as tar:
            assert {name.partition(".")[2] for name in tar.getnames()} <= set(MEMBERS)


@pytest.mark.parametrize("place", [0.1, 0.5, 0.9])
def test_a_flipped_bit_is_noticed_by_reading_and_by_verify(folder, place):
    path = folder / "00001-000000.tar"
    with tarfile.open(path) as tar:
        entry = next(e for e in tar if e.name == "c.latents.safetensors")
    content = bytearray(path.read_bytes())
    content[entry.offset_data + int(place * entry.size)] ^= 1
    path.write_bytes(content)
    with pytest.raises(ConfigError, match=r"00001-000000\.tar: bytes .* delete"):
        ShardReader(folder, WANTED).read(2)
    with pytest.raises(ConfigError, match=r"00001-000000\.tar: differs from what was written"):
        verify_shards(folder)


def test_a_truncated_and_a_missing_shard_are_noticed(folder):
    path = folder / "00001-000000.tar"
    path.write_bytes(path.read_bytes()[:700])
    with pytest.raises(ConfigError, match="not what was written"):
        ShardReader(folder, WANTED).read(4)
    path.unlink()
    with pytest.raises(ConfigError, match="No such file"):
        ShardReader(folder, WANTED).read(4)
    with pytest.raises(ConfigError, match="is missing"):
        verify_shards(folder)


def test_an_index_that_was_changed_is_noticed(folder):
    path = folder / "00000-000000.tar.json"
    path.write_text(path.read_text().replace('"b"', '"x"'))
    with pytest.raises(ConfigError, match="does not fit the manifest"):
        ShardReader(folder, WANTED)


def test_a_folder_without_a_manifest_is_unfinished(folder):
    (folder / "manifest.json").unlink()
    with pytest.raises(ConfigError, match=r"is unfinished .* run `tempolora precompute` first"):
        ShardReader(folder, WANTED)


@pytest.mark.parametrize(
    ("override", "named"),
    [
        ("data.num_frames=17", "data.num_frames: the shards"),
        ("data.height=288", "data.height"),
        ("data.fps=24", "data.fps"),
        ("data.windows=all", "data.windows"),
        ("data.resample=nearest", "data.resample"),
    ],
)
def test_shards_of_another_config_are_refused_and_the_setting_named(folder, override, named):
    other = load_config(None, [override])
    wanted = fingerprint(other, {"vae": "v", "text_encoder": "t"})
    with pytest.raises(ConfigError, match=named):
        ShardReader(folder, wanted)


def test_shards_of_another_vae_are_refused(folder):
    with pytest.raises(ConfigError, match="vae: the shards"):
        ShardReader(folder, fingerprint(CFG, {"vae": "other", "text_encoder": "t"}))


def test_verify_counts_the_samples(folder):
    assert verify_shards(folder) == 5
