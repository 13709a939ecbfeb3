"""Clips become shards once, by any number of processes, and a run that was cut short goes on.

The encoders are TinyWan's own; where a test asks what was encoded or decoded again, they count.
"""

import json
import logging
import re
import shutil
from functools import partial

import av
import numpy as np
import pytest
import torch
from conftest import SMALL
from scipy.signal import detrend

from tempolora.cli import default_config
from tempolora.config import ConfigError, load_config
from tempolora.data import fit_readout, pipeline
from tempolora.data.clips import WindowSpec, read_clip
from tempolora.data.precompute import precompute
from tempolora.data.readout import BANK, READOUT, load_bank, load_readout, read_checked
from tempolora.data.shards import (
    PROMPTS,
    ShardReader,
    load_prompt,
    read_manifest,
    sample_key,
    verify_shards,
    write_shard,
)
from tempolora.data.toy import scene
from tempolora.data.toy_set import click_track, draw_frames
from tempolora.data.video import write_mp4
from tempolora.model import wan
from tempolora.model.encoders import WanEncoders, batches_by_length
from tempolora.rhythm.tempo import LUMA
from tempolora.variants import NEGATIVE_PROMPT

CPU = torch.device("cpu")


class CountingEncoders(WanEncoders):
    """TinyWan's encoders, which count what they encode and decode and can be made to die."""

    def __init__(self, cfg, die_after=None, die_after_decoding=None):
        super().__init__(cfg, CPU)
        self.windows, self.die_after = 0, die_after
        self.decoded, self.die_after_decoding = 0, die_after_decoding

    def encode_frames(self, frames_FHW3):
        if self.windows == self.die_after:
            raise KeyboardInterrupt
        self.windows += 1
        return super().encode_frames(frames_FHW3)

    def decode_frames(self, latents_CTHW):
        if self.decoded == self.die_after_decoding:
            raise KeyboardInterrupt
        self.decoded += 1
        return super().decode_frames(latents_CTHW)


@pytest.fixture
def data(toy_data, tmp_path):
    """A copy of the drawn clips that a test may change."""
    return shutil.copytree(toy_data, tmp_path / "clips")


def by_twos(data, shards, *more):
    """A config with two samples a shard."""
    paths = (f"data.source={data}", f"data.shards={shards}")
    return load_config(default_config(), [*SMALL, "data.samples_per_shard=2", *paths, *more])


@pytest.fixture
def config(data, tmp_path, toy_shards):
    """A config over `data`; toy_shards has left the readout of TinyWan's VAE in the cache."""
    return partial(by_twos, data, tmp_path / "shards")


@pytest.fixture(scope="module")
def once(toy_data, toy_shards, tmp_path_factory):
    """Shards that one run has made of the drawn clips."""
    folder = tmp_path_factory.mktemp("once") / "shards"
    assert run(by_twos(toy_data, folder)) == (True, 6)
    return folder


@pytest.fixture
def finished(once, config, tmp_path):
    """A copy of them where `config` has its own, which a test may change."""
    return shutil.copytree(once, tmp_path / "shards")


def run(cfg, rank=0, world=1, die_after=None):
    encoders = CountingEncoders(cfg, die_after)
    return precompute(cfg, encoders, rank, world), encoders.windows


@pytest.fixture
def no_readout_yet(tinywan, tmp_path, monkeypatch):
    """A cache that holds TinyWan and no readout."""
    cache, folder = tmp_path / "cache", tinywan("t2v_a14b")
    cache.mkdir()
    (cache / folder.name).symlink_to(folder)
    monkeypatch.setenv("TEMPOLORA_CACHE", str(cache))
    return cache


def samples(folder):
    reader = ShardReader(folder, read_manifest(folder)["fingerprint"])
    return {key: reader.read(position) for position, key in enumerate(reader.keys)}


def test_a_sample_holds_what_vae_text_encoder_and_clip_say(toy_data, toy_shards):
    cfg = load_config(default_config(), [*SMALL])
    lines = (toy_data / "prompts.txt").read_text().splitlines()
    found = samples(toy_shards)
    assert len(found) == len(lines) == 6
    file, caption = lines[0].split("|")
    sample = found[sample_key(file, 0)]
    spec = WindowSpec(16.0, 17, 64, 64, "first", 1, "auto")
    clip = read_clip(toy_data / file, spec, toy_shards.parent / "again", 60)
    frames = torch.tensor(clip.windows[0].frames[:])
    latents = wan.encode_video(wan.load_vae(cfg.model, CPU), frames[None])[0]
    assert torch.equal(sample.latents["latents"], latents.bfloat16())
    text = wan.encode_prompts(*wan.load_text(cfg.model, CPU), [caption])[0]
    assert torch.equal(sample.text, text.bfloat16())
    assert (sample.meta["caption"], sample.meta["file"]) == (caption, file)
    assert (sample.meta["source_fps"], sample.meta["fps"], sample.meta["speed"]) == (16, 16, 1)
    assert sample.meta["sound"] == "heard"
    assert sample.rhythm["onset"].max() == 1
    assert sample.rhythm["motion_energy"].shape == (17,)


def test_beats_and_tempo_of_the_clip_are_in_the_sample(toy_data, toy_shards):
    truth = json.loads((toy_data / "truth.json").read_text())
    for key, sample in samples(toy_shards).items():
        beats_s = np.array(truth[sample.meta["file"]]["beats_s"])
        found_s = sample.rhythm["beats_s"].numpy()
        assert sample.rhythm["onset"].shape == (17,)
        if len(found_s):  # a second of sound may be too short to be sure of
            assert np.abs(found_s[:, None] - beats_s).min(1).max() < 0.02, key
        tempo = sample.meta["tempo"]
        assert tempo is None or (40 <= tempo["bpm"] <= 240 and 0 <= tempo["confidence"] <= 1)
    assert any(len(sample.rhythm["beats_s"]) for sample in samples(toy_shards).values())


def test_each_kind_of_sound_is_told_apart_and_each_window_has_its_own(
    config, data, tmp_path, caplog
):
    frames = np.random.default_rng(0).integers(0, 255, (34, 64, 64, 3), np.uint8)
    clicks = click_track(np.array([0.5, 1.5]), 34 / 16, 22_050)
    half = clicks * (np.arange(len(clicks)) < 22_050)  # silent in its second window
    for name, sound in (("heard", clicks), ("half", half), ("silent", 0 * clicks), ("none", None)):
        write_mp4(data / f"{name}.mp4", frames, 16, sound, None if sound is None else 22_050)
    with av.open(data / "heard.mp4") as container:
        packets = [(p.pos, p.size) for p in container.demux(audio=0) if p.size]
    content = bytearray((data / "heard.mp4").read_bytes())
    for start, size in packets[10:]:
        content[start : start + size] = bytes(byte ^ 255 for byte in content[start : start + size])
    (data / "broken.mp4").write_bytes(content)
    names = ("heard", "half", "silent", "none", "broken")
    (data / "prompts.txt").write_text("".join(f"{name}.mp4|noise\n" for name in names))
    with caplog.at_level(logging.INFO, logger="tempolora"):
        assert run(config("data.windows=all")) == (True, 10)
    assert "broken.mp4: its sound track does not decode" in caplog.text
    assert (
        "sound: heard in 3 of 10 samples (3 silent, 2 without a sound track, 2 with a broken one)"
    ) in caplog.text
    folder = tmp_path / "shards"
    reader = ShardReader(folder, read_manifest(folder)["fingerprint"])
    found = {(s.meta["file"][:-4], s.meta["window"]): s for s in samples(folder).values()}
    for (name, window), sample in found.items():
        state = {"none": "absent"}.get(name, name)
        if name == "half":
            state = ("heard", "silent")[window]
        assert sample.meta["sound"] == reader.sound[sample.key] == state
        assert ({"onset", "beats_s"} <= set(sample.rhythm)) == (state == "heard")
    assert found["heard", 0].rhythm["onset"].argmax() == 8
    assert found["heard", 1].rhythm["onset"].argmax() == 24 - 17


def test_the_prompts_that_training_needs_are_embedded(toy_shards):
    assert load_prompt(toy_shards, "").shape[0] >= 1
    assert load_prompt(toy_shards, NEGATIVE_PROMPT).shape[0] > 10
    with pytest.raises(ConfigError, match=r"'a cat' was not embedded; run `tempolora precompute`"):
        load_prompt(toy_shards, "a cat")


def test_prompts_added_later_are_embedded_without_touching_the_samples(config, finished):
    assert run(config('output.prompts=["a cat"]')) == (True, 0)
    assert load_prompt(finished, "a cat").shape[0] >= 1


def test_two_processes_make_what_one_makes_and_the_last_writes_the_manifest(
    config, toy_shards, tmp_path
):
    cfg, folder = config(), tmp_path / "shards"
    assert run(cfg, rank=1, world=2) == (False, 3)
    with pytest.raises(ConfigError, match="unfinished"):
        read_manifest(folder)
    assert run(cfg, rank=0, world=2) == (True, 3)
    assert verify_shards(folder) == 6
    one, two = samples(toy_shards), samples(folder)
    assert list(one) == list(two)
    for key in one:
        assert torch.equal(one[key].latents["latents"], two[key].latents["latents"])


def test_a_run_that_was_cut_short_goes_on_where_it_was(config, tmp_path):
    cfg, folder = config(), tmp_path / "shards"
    with pytest.raises(KeyboardInterrupt):
        run(cfg, die_after=5)
    assert not (folder / "manifest.json").exists()
    assert run(cfg) == (True, 2)  # two shards of two were whole
    assert verify_shards(folder) == 6
    assert not list(folder.glob(".*")), "scratch files are left behind"


def test_a_run_says_its_pace_and_a_second_does_nothing(config, tmp_path, caplog):
    with caplog.at_level(logging.INFO, logger="tempolora"):
        assert run(config()) == (True, 6)
    said = re.search(r"6 clips, ([\d.]+) clips/s; the VAE was busy (\d+)% of the time", caplog.text)
    assert float(said[1]) > 0 and 0 < int(said[2]) <= 100
    before = (tmp_path / "shards" / BANK).stat().st_mtime_ns
    assert run(config()) == (True, 0)
    assert (tmp_path / "shards" / BANK).stat().st_mtime_ns == before


def test_a_changed_caption_is_made_again_with_its_shard_and_no_other(config, data, finished):
    listing = data / "prompts.txt"
    lines = listing.read_text().splitlines()
    lines[5] = lines[5].split("|")[0] + "|a new caption"
    listing.write_text("\n".join(lines))
    assert run(config()) == (True, 2)
    assert "a new caption" in {s.meta["caption"] for s in samples(finished).values()}


def test_a_clip_that_leaves_the_list_leaves_the_shards(config, data, finished):
    listing = data / "prompts.txt"
    listing.write_text("\n".join(listing.read_text().splitlines()[1:]))
    assert run(config()) == (True, 1)
    assert len(samples(finished)) == 5
    assert len(load_bank(finished)[1]) == 5


def test_a_copied_data_set_with_new_times_is_not_made_again(config, data, finished):
    for path in data.glob("*.mp4"):
        path.touch()
    assert run(config()) == (True, 0)


def test_rejected_clips_are_listed_with_their_reasons_and_not_tried_again(
    config, data, tmp_path, caplog
):
    slow = draw_frames(scene("slide", 1.0), fps=8, num_frames=20, height=64, width=64)
    write_mp4(data / "slow.mp4", slow, 8)
    (data / "torn.mp4").write_bytes(next(data.glob("slide*")).read_bytes()[:900])
    with (data / "prompts.txt").open("a") as file:
        file.write("slow.mp4|too slow\ntorn.mp4|torn\n")
    with caplog.at_level(logging.INFO):
        assert run(config()) == (True, 6)
    rejected = {r["file"]: r["reason"] for r in read_manifest(tmp_path / "shards")["rejected"]}
    assert set(rejected) == {"slow.mp4", "torn.mp4"}
    assert "8 fps are slower than the 16 fps" in rejected["slow.mp4"]
    assert "6 samples from 8 clips, 2 clips rejected" in caplog.text
    assert run(config()) == (True, 0)


def test_a_clip_whose_decoder_ran_out_of_time_is_tried_again(config, data, tmp_path):
    with pytest.raises(ConfigError, match=r"none of its 6 clips can be used.* took longer than"):
        run(config("data.decode_timeout_s=0.001"))
    assert run(config()) == (True, 6)
    manifest = read_manifest(tmp_path / "shards")
    assert (manifest["samples"], manifest["rejected"]) == (6, [])


def test_what_a_killed_run_left_is_cleared_away(config, tmp_path):
    left = tmp_path / "shards" / ".work-0-abc"
    left.mkdir(parents=True)
    (left / "frames.npy").write_bytes(b"raw")
    run(config())
    assert not left.exists()


def test_damaged_prompts_are_noticed(config, finished):
    path = finished / PROMPTS
    path.write_bytes(path.read_bytes()[:-1])
    with pytest.raises(ConfigError, match="not what was written"):
        verify_shards(finished)
    with pytest.raises(ConfigError, match="cannot be read"):
        load_prompt(finished, "")
    assert run(config()) == (True, 0)
    assert verify_shards(finished) == 6


def test_image_to_video_stores_its_condition(config, tmp_path):
    cfg = config("model.variant=i2v_a14b")
    assert run(cfg)[0]
    sample = next(iter(samples(tmp_path / "shards").values()))
    assert sample.latents["condition"].shape == cfg.latent_shape


def test_a_folder_of_another_config_is_refused_before_anything_is_encoded(config, finished):
    with pytest.raises(ConfigError, match=r"data\.width: the shards in .* made with 64"):
        run(config("data.width=48"))


def test_the_manifest_and_the_prompts_are_plain_json_and_safetensors(toy_shards):
    assert json.loads((toy_shards / "manifest.json").read_text())["samples"] == 6
    kinds = {"".join(path.suffixes[-2:]) for path in toy_shards.iterdir()}
    assert kinds == {".tar", ".tar.json", ".json", ".safetensors", ".png"}
    assert (toy_shards / PROMPTS).is_file()


# --- The readout ----------------------------------------------------------------------------------


def reconstruction(cfg, latents_CTHW):
    """Luminance of what the VAE makes of latents, as a player shows it: (S, H, W)."""
    frames_FHW3 = wan.decode_video(wan.load_vae(cfg.model, CPU), latents_CTHW[None])[0]
    luma = frames_FHW3.numpy()[1:] / 255 @ np.array(LUMA)
    return luma.reshape(len(luma), luma.shape[1] // 8, 8, luma.shape[2] // 8, 8).mean((2, 4))


def test_the_readout_reads_what_the_vae_makes_of_the_latents(toy_shards):
    cfg = load_config(default_config(), [*SMALL])
    readout = load_readout(toy_shards)
    read, true = [], []
    for sample in list(samples(toy_shards).values())[:3]:
        latents = sample.latents["latents"]
        read.append(readout.luminance(latents[None])[0].numpy())
        true.append(reconstruction(cfg, latents))
    read, true = np.stack(read), np.stack(true)
    assert read.shape == (3, 16, 8, 8)
    assert ((read - true) ** 2).mean() < 0.1 * true.var()
    # from frame to frame as well, where brightness alone explains nothing
    assert np.corrcoef(np.diff(read, axis=1).ravel(), np.diff(true, axis=1).ravel())[0, 1] > 0.8
    facts = read_checked(toy_shards / READOUT)[1]
    assert (facts["clips"], facts["drawn"]) == (6, 10)
    assert facts["vae"] == wan.fingerprint(cfg.model, "vae")


def test_the_bank_holds_the_spectra_of_the_shards(toy_shards):
    power_NF, motion_N = load_bank(toy_shards)
    readout, found = load_readout(toy_shards), samples(toy_shards)
    assert (power_NF.shape, motion_N.shape) == ((6, 9), (6,))
    for sample, power_F, moved in zip(found.values(), power_NF, motion_N, strict=True):
        luma_SHW = readout.luminance(sample.latents["latents"][None])[0].double().numpy()
        window = (0.5 - 0.5 * np.cos(2 * np.pi * np.arange(16) / 16))[:, None, None]
        spectrum = np.fft.rfft(detrend(luma_SHW, axis=0) * window, axis=0)
        assert np.allclose(power_F, (np.abs(spectrum) ** 2).mean((1, 2)), rtol=1e-3, atol=1e-9)
        assert np.isclose(moved, (np.diff(luma_SHW, axis=0) ** 2).mean(), rtol=1e-3)


def made(folder):
    """What the rhythm terms read, byte for byte."""
    return [(folder / name).read_bytes() for name in (READOUT, BANK)]


@pytest.fixture
def encoded(toy_shards, tmp_path):
    """The shards as they are before the readout: made by one process, without a manifest."""
    folder = shutil.copytree(toy_shards, tmp_path / "shards")
    for name in (READOUT, BANK, "readout.png", "manifest.json"):
        (folder / name).unlink()
    return folder


def test_killed_and_parallel_processes_fit_the_readout_that_one_fits(
    config, toy_shards, encoded, no_readout_yet, caplog
):
    cfg, whole = config(), made(toy_shards)
    vae = read_checked(toy_shards / READOUT)[1]["vae"]
    cached = no_readout_yet / f"readout-{vae[:16]}-17-v{fit_readout.FORMAT}.safetensors"
    cached.write_bytes(whole[0][:-1])
    killed = CountingEncoders(cfg, die_after_decoding=2)
    with pytest.raises(KeyboardInterrupt):
        precompute(cfg, killed, rank=1, world=2)
    parts = sorted((encoded / ".readout").glob("*.safetensors"))
    assert len(parts) == 2
    parts[0].write_bytes(parts[0].read_bytes()[:-5])
    first, second = CountingEncoders(cfg), CountingEncoders(cfg)
    assert not precompute(cfg, first, rank=1, world=2)
    assert (first.windows, first.decoded) == (0, 2)  # the torn one and the third of its three
    assert not (encoded / READOUT).exists()
    with caplog.at_level(logging.INFO):
        assert precompute(cfg, second, rank=0, world=2)
    assert (second.windows, second.decoded) == (10, 13)  # three, and ten that are drawn
    assert made(encoded) == whole
    assert cached.read_bytes() == whole[0]
    assert f"{cached}: damaged" in caplog.text
    assert "fitted on 6 clips of a data set and 10 drawn ones" in caplog.text
    assert not (encoded / ".readout").exists()
    assert verify_shards(encoded) == 6


def test_shards_without_a_readout_take_it_from_the_cache(config, toy_shards, encoded):
    with pytest.raises(ConfigError, match="is not there; run `tempolora precompute` again"):
        load_readout(encoded)
    encoders = CountingEncoders(config())
    assert precompute(config(), encoders)
    assert (encoders.windows, encoders.decoded) == (0, 0)
    assert made(encoded) == made(toy_shards)
    assert (encoded / "readout.png").stat().st_size > 1000
    assert verify_shards(encoded) == 6


def test_a_readout_that_is_missing_or_damaged_is_noticed_and_made_again(
    config, toy_shards, encoded, caplog
):
    assert run(config()) == (True, 0)
    for name in (READOUT, BANK):
        content = bytearray((encoded / name).read_bytes())
        content[-3] ^= 4
        (encoded / name).write_bytes(content)
        with pytest.raises(ConfigError, match=f"{name}: not what was written"):
            verify_shards(encoded)
        with pytest.raises(ConfigError, match=f"{name}: damaged"):
            load_readout(encoded), load_bank(encoded)
        assert run(config()) == (True, 0)
        assert f"{encoded / name}: damaged" in caplog.text
        assert made(encoded) == made(toy_shards)
    (encoded / READOUT).unlink()
    with pytest.raises(ConfigError, match=f"{READOUT}: not what was written"):
        verify_shards(encoded)


def test_a_cache_that_cannot_be_written_costs_a_warning(
    config, encoded, no_readout_yet, monkeypatch, caplog
):
    monkeypatch.setattr(fit_readout, "FEWEST_CLIPS", 0)  # as with a data set of enough clips
    (no_readout_yet / "file").write_text("not a folder")
    cfg = config(f"model.id={next(no_readout_yet.glob('tinywan-*'))}")
    monkeypatch.setenv("TEMPOLORA_CACHE", str(no_readout_yet / "file" / "cache"))
    assert run(cfg) == (True, 0)
    assert "cannot be kept there" in caplog.text
    assert read_checked(encoded / READOUT)[1]["drawn"] == 0
    assert verify_shards(encoded) == 6


# --- Its pace -------------------------------------------------------------------------------------


def test_captions_are_encoded_by_length_and_no_caption_changes_another(tinywan):
    cfg = load_config(default_config(), [*SMALL])
    tokenizer, encoder = wan.load_text(cfg.model, CPU)
    prompts = ["a red disc bobs", "q" * 300, "z", "b" * 40, "y" * 700, "c" * 41]
    lengths = wan.padded_lengths(tokenizer, prompts)
    assert lengths == [16, 304, 16, 48, 512, 48]
    batches = list(batches_by_length(prompts, lengths))
    assert batches == [[prompts[0], "z"], [prompts[3], prompts[5]], [prompts[1]], [prompts[4]]]
    found = dict(WanEncoders(cfg, CPU).encode_texts(prompts))
    for prompt in prompts:
        # as WanPipeline feeds its encoder
        tokens = tokenizer(
            [prompt], padding="max_length", max_length=512, truncation=True, return_tensors="pt"
        )
        with torch.no_grad():
            text_LD = encoder(tokens.input_ids, tokens.attention_mask).last_hidden_state[0]
        length = int(tokens.attention_mask.sum())
        assert found[prompt].shape == (length, 32)
        assert torch.allclose(found[prompt], text_LD[:length], atol=1e-5, rtol=0)


def test_a_shard_that_cannot_be_written_ends_the_run_and_the_next_goes_on(
    config, tmp_path, monkeypatch
):
    module, whole = pipeline.__name__, []

    def full_disk(path, samples, index):
        if whole:
            raise OSError(28, "No space left on device")
        whole.append(path.name)
        write_shard(path, samples, index)

    with monkeypatch.context() as patch:
        patch.setattr(f"{module}.write_shard", full_disk)
        with pytest.raises(OSError, match="No space left"):
            run(config())
    assert not list((tmp_path / "shards").glob(".work-*"))
    assert run(config()) == (True, 4)
    assert verify_shards(tmp_path / "shards") == 6


def test_a_full_disk_of_frames_only_slows_down(config, monkeypatch):
    """With room for no clip they are decoded one by one."""
    module, at_once = pipeline.__name__, []

    def counting(*arguments):
        at_once.append(1)
        try:
            return read_clip(*arguments)
        finally:
            together.append(len(at_once))
            at_once.pop()

    together = []
    monkeypatch.setattr(f"{module}.SPOOL_BYTES", 0)
    monkeypatch.setattr(f"{module}.read_clip", counting)
    assert run(config()) == (True, 6)
    assert together == [1] * 6


def test_a_clip_too_slow_for_several_speeds_is_said_once(config, data, caplog):
    frames = draw_frames(scene("slide", 1.0), fps=20, num_frames=40, height=64, width=64)
    write_mp4(data / "slow.mp4", frames, 20)
    (data / "prompts.txt").write_text("slow.mp4|a clip\n")
    assert run(config("data.speeds=[0.5,0.6,0.7,1.0]"))[1] == 1
    (said,) = [r.getMessage() for r in caplog.records if "slow.mp4" in r.getMessage()]
    assert "at speed 0.5: its 10 fps are slower than the 16 fps" in said
    assert said.endswith("(so it is at 0.6, 0.7)")
