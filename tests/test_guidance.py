"""Guidance: its gradient, what it does to latents and to TinyWan's videos, and what is heard."""

import logging
import re
from functools import partial

import av
import numpy as np
import pytest
import torch
from PIL import Image
from scipy import ndimage

from tempolora.cli import main
from tempolora.config import ConfigError, load_config
from tempolora.data import toy
from tempolora.data.readout import load_readout
from tempolora.data.soundtrack import RATE_HZ, read_soundtrack
from tempolora.data.toy_set import click_track, draw_frames
from tempolora.results import guide
from tempolora.results.guide import FREQUENCY, SOUNDTRACK, SPEED, Rhythm, heard, own_beats
from tempolora.results.sample import sample_latents
from tempolora.rhythm.guidance import (
    Guide,
    at_frequency,
    change_times,
    motion_curve,
    on_beat,
    score_and_gradient,
)
from tempolora.rhythm.readout import Readout
from tempolora.timebase import TimeBase

FPS, FRAMES, SAMPLES, LATENT_FRAMES = 16, 49, 48, 13
BEATS_S = np.arange(0.3, 3, 0.5)


@pytest.fixture(scope="module")
def readout() -> Readout:
    """Any linear map of four channels: guidance must raise the score of whatever it is given."""
    generator = torch.Generator().manual_seed(0)
    weight_GKJC = torch.randn(3, 4, 3, 4, generator=generator, dtype=torch.float64) / 8
    ones = torch.ones(3, 4, dtype=torch.float64)
    return Readout(weight_GKJC, ones / 2, ones, torch.ones(SAMPLES // 2 + 1).double(), FRAMES)


def latents(batch: int, seed: int = 1) -> torch.Tensor:
    shape = (batch, 4, LATENT_FRAMES, 3, 2)
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def onset() -> torch.Tensor:
    """An envelope of one at the change nearest to each beat."""
    times_s = change_times(SAMPLES, FPS)
    envelope_G = np.zeros(SAMPLES - 1)
    envelope_G[np.abs(times_s[:, None] - BEATS_S).argmin(axis=0)] = 1
    return torch.from_numpy(envelope_G)


SCORES = {
    "hit": on_beat(onset()),
    "rest": on_beat(onset(), rest=True),
    "hz": at_frequency(SAMPLES, FPS, 2.2),
}


@pytest.mark.parametrize("name", SCORES)
def test_gradient_is_that_of_finite_differences(readout, name):
    x0_hat, score, step = latents(2), SCORES[name], 1e-6
    _, gradient = score_and_gradient(x0_hat, readout, score)
    chosen = np.random.default_rng(0).choice(x0_hat.numel(), 12, replace=False)
    for index in chosen.tolist():
        there, back = x0_hat.clone(), x0_hat.clone()
        there.view(-1)[index] += step
        back.view(-1)[index] -= step
        scores = [score(readout.luminance(x)).sum() for x in (there, back)]
        expected = (scores[0] - scores[1]) / (2 * step)
        assert gradient.flatten()[index].item() == pytest.approx(expected.item(), abs=1e-8)


@pytest.mark.parametrize("name", SCORES)
def test_a_push_raises_each_samples_score_and_is_as_long_as_asked(readout, name):
    x0_hat, score = latents(3), SCORES[name]
    guide = Guide(readout, score, strength=0.05, sigma=(0.0, 1.0))
    pushed = guide(x0_hat, 0.7)
    assert (score(readout.luminance(pushed)) > score(readout.luminance(x0_hat)) + 0.01).all()
    share_B = (pushed - x0_hat).flatten(1).norm(dim=1) / x0_hat.flatten(1).norm(dim=1)
    torch.testing.assert_close(share_B, torch.full_like(share_B, 0.05))
    alone = torch.cat([guide(one[None], 0.7) for one in x0_hat])
    torch.testing.assert_close(pushed, alone)


def smoothed(values: np.ndarray, axis: int) -> np.ndarray:
    """A Gaussian 0.7 frames wide; beside the ends what is missing counts nothing."""
    blur = partial(ndimage.gaussian_filter1d, sigma=0.7, axis=axis, mode="constant", truncate=20)
    return blur(values) / blur(np.ones_like(values))


def test_scores_are_numpys_correlation_and_share_of_variance():
    luma = torch.rand(2, SAMPLES, 3, 2, generator=torch.Generator().manual_seed(4)).double()
    smooth_luma = smoothed(luma.numpy(), axis=1)
    moved_BG = np.sqrt(np.square(np.diff(smooth_luma, axis=1)).mean(axis=(2, 3)))
    smooth_G = smoothed(onset().numpy(), axis=0)
    expected = [np.corrcoef(moved_G, smooth_G)[0, 1] for moved_G in moved_BG]
    np.testing.assert_allclose(SCORES["hit"](luma), expected, atol=1e-6)
    np.testing.assert_allclose(SCORES["rest"](luma), [-value for value in expected], atol=1e-6)
    np.testing.assert_allclose(motion_curve(torch.from_numpy(smooth_luma)), moved_BG, rtol=1e-5)

    time_S = np.arange(SAMPLES) / FPS
    waves = [f(2 * np.pi * 2.2 * time_S) for f in (np.cos, np.sin)]
    line_SK = np.stack([np.ones(SAMPLES), time_S], axis=1)
    shares = []
    for clip in luma.numpy().reshape(2, SAMPLES, -1):
        error = [
            np.square(clip - basis @ np.linalg.lstsq(basis, clip, rcond=None)[0]).sum()
            for basis in (line_SK, np.column_stack([line_SK, *waves]))
        ]
        shares.append(1 - error[1] / error[0])
    np.testing.assert_allclose(SCORES["hz"](luma), shares, rtol=1e-6)


def test_a_moving_block_at_the_frequency_scores_one_at_any_phase():
    time_S = torch.arange(SAMPLES).double() / FPS
    phase_HW = torch.rand(1, 1, 4, 5).double() * 6
    luma = 0.5 + 0.3 * (2 * torch.pi * 2.2 * time_S[None, :, None, None] + phase_HW).sin()
    assert SCORES["hz"](luma).item() == pytest.approx(1, abs=1e-9)
    assert at_frequency(SAMPLES, FPS, 4.4)(luma).item() < 0.05


def test_still_and_black_estimates_stay_finite(readout):
    still = torch.zeros(1, 4, LATENT_FRAMES, 3, 2)
    for score in SCORES.values():
        assert Guide(readout, score, 0.1, (0, 1))(still, 0.5).isfinite().all()


def test_outside_its_range_of_sigma_a_guide_returns_the_estimate_itself(readout):
    guide, x0_hat = Guide(readout, SCORES["hz"], 0.1, (0.5, 0.9)), latents(1)
    assert guide(x0_hat, 0.91) is x0_hat and guide(x0_hat, 0.49) is x0_hat
    assert not torch.equal(guide(x0_hat, 0.5), x0_hat) and not torch.equal(
        guide(x0_hat, 0.9), x0_hat
    )


def test_constant_envelope_and_unheard_frequency_are_refused():
    with pytest.raises(ValueError, match="no beat to follow"):
        on_beat(torch.ones(SAMPLES - 1) * 0)
    for hz in (0.2, 7.9, 100.0, float("nan")):
        with pytest.raises(ValueError, match=r"carry 0\.33 to 7\.84 Hz"):
            at_frequency(SAMPLES, FPS, hz)


# --- In the sampler, with TinyWan -----------------------------------------------------------------


@pytest.fixture(scope="module")
def cfg(toy_shards):
    sets = [
        f"data.shards={toy_shards}",
        "data.num_frames=17",
        "model.id=tinywan",
        "model.base=fp32",
    ]
    return load_config(None, [*sets, "data.height=64", "data.width=64"])


@pytest.fixture(scope="module")
def song(tmp_path_factory):
    """Four clicks a second, at 22.05 kHz in one channel, four seconds long."""
    path = tmp_path_factory.mktemp("song") / "song.wav"
    return write_wav(path, click_track(np.arange(0.1, 4, 0.25), 4.0, 22_050), 22_050)


def write_wav(path, audio: np.ndarray, rate: int):
    """16-bit PCM by PyAV; audio (samples,) or (samples, 2) in [-1, 1]."""
    planes = np.atleast_2d((audio.T * 32767).astype(np.int16))
    layout = "mono" if len(planes) == 1 else "stereo"
    with av.open(path, "w") as container:
        stream = container.add_stream("pcm_s16le", rate=rate, layout=layout)
        packed = np.ascontiguousarray(planes.T).reshape(1, -1)
        frame = av.AudioFrame.from_ndarray(packed, format="s16", layout=layout)
        frame.sample_rate = rate
        container.mux(stream.encode(frame))
        container.mux(stream.encode())
    return path


def streams(path) -> tuple[int, float | None, np.ndarray | None]:
    """Frames of an mp4, its seconds of sound, and the sound (samples,), as PyAV decodes them."""
    with av.open(path) as container:
        frames = sum(1 for _ in container.decode(video=0))
    with av.open(path) as container:
        if not container.streams.audio:
            return frames, None, None
        sound = container.streams.audio[0]
        heard = np.concatenate([f.to_ndarray().mean(0) for f in container.decode(sound)])
        return frames, len(heard) / sound.rate, heard


def sampled_latents(cfg, guide, steps=4):
    from tempolora.model.wan import load_transformer
    from tempolora.results.sample import draw_noise

    text_BLD = torch.zeros(1, 512, 32)
    noise = draw_noise((1, *cfg.latent_shape), 3)
    return sample_latents(
        lambda name: load_transformer(cfg.model, name, "cpu").eval(),
        cfg.variant,
        noise,
        text_BLD,
        text_BLD,
        steps=steps,
        guide=guide,
    )


def test_guide_that_never_works_leaves_the_samples_bits_alone(cfg):
    asked = []

    def idle(x0_hat, sigma):
        asked.append(sigma)
        return x0_hat

    assert torch.equal(sampled_latents(cfg, idle), sampled_latents(cfg, None))
    # the last step's estimate is the video: what is pushed there has no answer
    assert len(asked) == 3 and asked == sorted(asked, reverse=True) and asked[0] > 0.99


def test_guided_video_has_the_asked_correlation_and_the_unguided_has_not(cfg, toy_shards):
    readout = load_readout(toy_shards)
    onset_G = torch.zeros(cfg.timebase.samples - 1)
    onset_G[2::4] = 1
    base = sampled_latents(cfg, None, steps=6)
    for rest in (False, True):
        score = on_beat(onset_G, rest=rest)
        guide = Guide(readout, score, strength=1.0, sigma=(0.3, 1.0))
        latents = (base, sampled_latents(cfg, guide, steps=6))
        base_score, guided = (score(readout.luminance(x)) for x in latents)
        assert guided.item() > base_score.item() + 0.2


@pytest.fixture
def cfg_5b(tinywan, tmp_path, monkeypatch):
    """Image to video of the 5B, in a cache without a readout of its VAE."""
    from tempolora.data import fit_readout

    cache, folder = tmp_path / "cache", tinywan("ti2v_5b")
    cache.mkdir()
    (cache / folder.name).symlink_to(folder)
    monkeypatch.setenv("TEMPOLORA_CACHE", str(cache))
    monkeypatch.setattr(fit_readout, "DRAWN_ALONE", 2)
    sizes = ["data.num_frames=17", "data.height=128", "data.width=128"]
    model = ["model.id=tinywan", "model.base=fp32", "model.variant=ti2v_5b", "model.task=i2v"]
    return load_config(None, [*sizes, *model, f"data.shards={tmp_path / 'none'}"])


def test_image_to_video_of_the_5b_is_guided_and_its_image_stays_to_the_bit(
    cfg_5b, tmp_path, monkeypatch
):
    from tempolora.results import sample

    seen, encode = {}, sample.encode_video

    def keep_first(vae, frames):
        seen["first"] = encode(vae, frames)
        return seen["first"]

    def keep_latents(vae, latents_BCTHW):
        seen["latents"] = latents_BCTHW
        return torch.zeros(1, 17, 128, 128, 3, dtype=torch.uint8)  # decoding is slow

    monkeypatch.setattr(sample, "encode_video", keep_first)
    monkeypatch.setattr(sample, "decode_video", keep_latents)
    Image.linear_gradient("L").convert("RGB").save(tmp_path / "first.png")
    videos = []
    for rhythm in (None, Rhythm(hz=3.0)):
        given = {"image": tmp_path / "first.png", "prompt": "a bell", "loras": {}, "seed": 1}
        sample.sample_from_prompt(
            cfg_5b, tmp_path / "out.mp4", steps=4, device="cpu", rhythm=rhythm, **given
        )
        assert torch.equal(seen["latents"][:, :, :1], seen["first"])
        videos.append(seen["latents"])
    assert not torch.allclose(*videos, atol=0.1)


def test_no_part_of_a_push_is_spent_on_an_image_that_stays(cfg_5b):
    """Half of the score's gradient lies on the image's latent frame; it goes to the others."""
    from tempolora.data.fit_readout import readout_of_vae
    from tempolora.model.encoders import WanEncoders

    readout = readout_of_vae(cfg_5b, WanEncoders(cfg_5b, torch.device("cpu")))
    score = at_frequency(cfg_5b.timebase.samples, cfg_5b.timebase.fps, 3.0)
    x0_hat = torch.randn(1, *cfg_5b.latent_shape, generator=torch.Generator().manual_seed(0))
    reached = []
    for given in (0, 1):
        pushed = Guide(readout, score, 0.1, (0.0, 1.0), given)(x0_hat, 0.7)
        assert (pushed - x0_hat).norm().item() == pytest.approx(0.1 * x0_hat.norm().item(), 1e-3)
        reached.append(pushed)
    assert torch.equal(reached[1][:, :, :1], x0_hat[:, :, :1])
    reached[0][:, :, :1] = x0_hat[:, :, :1]  # as the sampler does
    base, wasted, whole = (score(readout.luminance(x)).item() for x in (x0_hat, *reached))
    assert whole > wasted > base


# --- The command, and what is heard ---------------------------------------------------------------


def sample_command(out, shards, *options, frames=17) -> list[str]:
    sets = [f"data.shards={shards}", f"data.num_frames={frames}"]
    sets = [part for setting in sets for part in ("--set", setting)]
    said = ["--prompt", "a red disc moves from side to side", "--steps", "4", "--out", str(out)]
    return ["sample", *sets, *said, *options]


def test_soundtrack_is_heard_from_the_first_frame_and_cut_to_the_videos_length(
    tmp_path, toy_shards, song, caplog
):
    out = tmp_path / "out.mp4"
    assert main(sample_command(out, toy_shards, "--soundtrack", str(song))) == 0
    frames, seconds, sound = streams(out)
    assert frames == 17
    assert seconds == pytest.approx(17 / 16, abs=1024 / RATE_HZ)  # a packet of AAC
    given = read_soundtrack(song, 17 / 16, 60).mean(axis=1)
    shared = min(len(given), len(sound))
    assert np.corrcoef(given[:shared], sound[:shared])[0, 1] > 0.95
    assert "readout comes from" in caplog.text


def test_shorter_soundtrack_is_neither_stretched_nor_repeated():
    frames = np.zeros((17, 16, 16, 3), np.uint8)
    short = np.full((RATE_HZ // 4, 2), 0.5, np.float32)
    np.testing.assert_array_equal(heard(frames, 16, short, click=False), short)
    long = np.full((RATE_HZ * 2, 2), 0.5, np.float32)
    assert len(heard(frames, 16, long, click=False)) == RATE_HZ * 17 // 16
    assert heard(frames, 16, None, click=False) is None


def test_clicks_fall_on_the_beats_of_a_drawn_swing(caplog):
    """A slide at f rests 2 f times a second, where cos(2 pi f t + phase) is 1 or -1."""
    hz, phase, frames = 1.25, 1.0, 49
    scene = toy.scene("slide", hz, phase, texture="flat", ground_texture="flat")
    video = draw_frames(scene, fps=16, num_frames=frames, height=64, width=64)
    turns = np.arange(0, 10) / 2
    rests_s = (turns - phase / (2 * np.pi)) / hz
    rests_s = rests_s[(rests_s > 0.1) & (rests_s < frames / 16 - 0.1)]
    with caplog.at_level("INFO", "tempolora"):
        sound = heard(video, 16, None, click=True)
    assert len(sound) == round(frames / 16 * RATE_HZ)
    loud = np.flatnonzero(np.abs(sound[:, 0]) > 0.3) / RATE_HZ
    starts_s = loud[np.diff(loud, prepend=-1) > 0.1]
    np.testing.assert_allclose(starts_s, rests_s, atol=0.04)
    assert "motion at 1.2" in caplog.text and "confidence 0." in caplog.text


def test_clicks_are_laid_over_a_soundtrack_at_half_its_loudness():
    scene = toy.scene("slide", 1.25, 1.0)
    video = draw_frames(scene, fps=16, num_frames=17, height=64, width=64)
    song = np.full((RATE_HZ // 2, 2), 0.4, np.float32)
    clicks, both = heard(video, 16, None, click=True), heard(video, 16, song, click=True)
    np.testing.assert_allclose((both - clicks)[: len(song)], 0.2, atol=0.3)
    np.testing.assert_array_equal(both[len(song) :], clicks[len(song) :])


def test_a_frozen_video_has_no_clicks(caplog):
    with caplog.at_level("INFO", "tempolora"):
        assert len(own_beats(np.full((17, 16, 16, 3), 90, np.uint8), 16)) == 0
    assert "nothing moves" in caplog.text


@pytest.mark.parametrize("rate", [8_000, 44_100, 96_000])
@pytest.mark.parametrize("channels", [1, 2])
def test_sound_of_any_rate_and_channels_is_read_at_its_own_time(tmp_path, rate, channels):
    click = click_track(np.array([0.5]), 1.0, rate)
    audio = click if channels == 1 else np.stack([click, click], axis=1)
    read = read_soundtrack(write_wav(tmp_path / "a.wav", audio, rate), 2.0, 60)
    assert read.shape[1] == 2 and len(read) == pytest.approx(RATE_HZ, abs=100)
    assert np.abs(read).sum(axis=1).argmax() / RATE_HZ == pytest.approx(0.5, abs=0.003)


def bad_sound(tmp_path, kind: str):
    path = tmp_path / "bad.wav"
    if kind == "missing":
        return path
    if kind == "folder":
        path.mkdir()
    elif kind == "no sound":
        path.write_text("this is no sound\n" * 100)
    elif kind == "silent":
        write_wav(path, np.zeros(8000), 8000)
    elif kind == "video":
        from tempolora.data.video import write_mp4

        path = tmp_path / "mute.mp4"
        write_mp4(path, np.zeros((5, 16, 16, 3), np.uint8), 16)
    elif kind == "playlist":
        path = tmp_path / "list.m3u8"
        path.write_text("#EXTM3U\n#EXTINF:1,\nhttp://127.0.0.1:9/a.ts\n")
    return path


@pytest.mark.parametrize(
    ("kind", "words"),
    [
        ("missing", "there is no file"),
        ("folder", "there is no file"),
        ("no sound", "does not decode"),
        ("silent", "are silent"),
        ("video", "has no sound track"),
        ("playlist", "does not decode"),
    ],
)
def test_sound_that_cannot_guide_is_a_user_mistake(tmp_path, kind, words):
    with pytest.raises(ConfigError, match=rf"^--soundtrack: .*{words}"):
        read_soundtrack(bad_sound(tmp_path, kind), 1.0, 60)


def test_decoding_that_takes_too_long_is_stopped(song):
    with pytest.raises(ConfigError, match=r"^--soundtrack: .*longer than 0\.01 s"):
        read_soundtrack(song, 1.0, 0.01)


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (["--guide-hz", "2", "--soundtrack", "a.wav"], "--guide-hz: --soundtrack guides already"),
        (["--guide-hz", "0.1"], "--guide-hz: 0.1 cannot be asked for"),
        (["--guide-hz", "6.1"], "--guide-hz: 6.1 cannot be asked for"),
        (["--guide-hz", "2", "--tempo", "2"], "--tempo: --guide-hz guides already"),
        (["--tempo", "5"], "--tempo: given 5; allowed: 0.25 to 4"),
        (["--tempo", "nan"], "--tempo: given nan"),
        (["--tempo", "1", "--guide-strength", "0.1"], "--guide-strength: nothing is guided"),
        (["--tempo-lora", "."], "--tempo-lora: at which speed"),
        (["--guide-hz", "2", "--steps", "3"], "--guide-sigma: of 3 steps none but the last"),
        (["--guide-hz", "nan"], "--guide-hz: nan cannot be asked for"),
        (["--guide-hz", "2", "--guide-strength", "0"], "--guide-strength: 0 is not above 0"),
        (["--guide-hz", "2", "--guide-strength", "nan"], "--guide-strength: nan is not above 0"),
        (["--guide-hz", "2", "--guide-sigma", "0.9", "0.5"], "--guide-sigma: 0.9 0.5 is no range"),
        (["--guide-strength", "0.1"], "--guide-strength: nothing is guided"),
        (["--readout", "a.safetensors"], "--readout: nothing is guided"),
        (["--guide-hz", "2", "--readout", "gone.safetensors"], "--readout: there is no gone"),
        (["--soundtrack", "gone.wav"], "--soundtrack: there is no file gone.wav"),
    ],
)
def test_options_that_cannot_work_are_one_sentence(
    tmp_path, monkeypatch, capsys, toy_shards, options, words
):
    monkeypatch.setattr("tempolora.results.sample.load_text", None)  # nothing large is loaded
    assert main(sample_command(tmp_path / "out.mp4", toy_shards, *options)) == 2
    said = capsys.readouterr().err.strip().splitlines()[-1]
    assert said.startswith(f"tempolora: {words}")


def test_readout_of_another_vae_or_damaged_is_refused(tmp_path, monkeypatch, capsys, toy_shards):
    from tempolora.data.readout import READOUT, read_checked, write_checked

    monkeypatch.setattr("tempolora.results.sample.load_text", None)
    tensors, facts = read_checked(toy_shards / READOUT)
    write_checked(tmp_path / "other.safetensors", tensors, {**facts, "vae": "0" * 64})
    (tmp_path / "torn.safetensors").write_bytes((toy_shards / READOUT).read_bytes()[:-9])
    for name, words in (("other", "of another VAE"), ("torn", "cannot be read")):
        given = ["--guide-hz", "2", "--readout", str(tmp_path / f"{name}.safetensors")]
        assert main(sample_command(tmp_path / "out.mp4", toy_shards, *given)) == 2
        assert words in capsys.readouterr().err


def test_without_shards_a_readout_is_fitted_once(tmp_path, monkeypatch, caplog):
    from tempolora.data import fit_readout

    monkeypatch.setenv("TEMPOLORA_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(fit_readout, "DRAWN_ALONE", 2)
    out, gone = tmp_path / "out.mp4", tmp_path / "no_shards"
    command = sample_command(out, gone, "--guide-hz", "1.9", "--click")
    assert main(command) == 0 and "fitting one to 2 drawn clips" in caplog.text
    caplog.clear()
    assert main(command) == 0 and "fitting" not in caplog.text
    assert streams(out)[:2] == (17, pytest.approx(17 / 16, abs=1024 / RATE_HZ))


def test_tempo_without_an_adapter_makes_a_video_again_at_its_own_frequency_times_it(
    tmp_path, toy_shards, caplog
):
    caplog.set_level(logging.INFO, "tempolora")
    plain, fast, again = (tmp_path / name for name in ("plain.mp4", "fast.mp4", "again.mp4"))
    assert main(sample_command(plain, toy_shards, "--tempo", "1", "--click")) == 0
    assert "sampled again" not in caplog.text
    assert main(sample_command(fast, toy_shards, "--tempo", "1.5", "--click")) == 0
    own, asked = map(float, re.search(r"at ([\d.]+) Hz .* at ([\d.]+) Hz", caplog.text).groups())
    assert asked == pytest.approx(min(1.5 * own, 6.0), abs=0.02)
    assert streams(fast)[:2] == (17, pytest.approx(17 / 16, abs=1024 / RATE_HZ))
    assert main(sample_command(again, toy_shards, "--click")) == 0
    assert plain.read_bytes() == again.read_bytes() != fast.read_bytes()


def test_a_video_that_stands_still_stays_as_it_is(readout, caplog):
    caplog.set_level(logging.INFO, "tempolora")
    still_FHW3 = np.full((FRAMES, 16, 16, 3), 90, np.uint8)
    clock = TimeBase(FPS, FRAMES)
    retime = guide.Retime(clock, readout, Rhythm(speed=2.0))
    assert retime.guide(still_FHW3) is None
    assert "nothing moves" in caplog.text


def test_a_video_that_keeps_its_tempo_is_said_to(readout, caplog):
    caplog.set_level(logging.INFO, "tempolora")
    retime = guide.Retime(TimeBase(FPS, FRAMES), readout, Rhythm(speed=2.0))
    slow, fast = (
        draw_frames(toy.scene("slide", hz, 1.0), fps=FPS, num_frames=FRAMES, height=64, width=64)
        for hz in (1.5, 3.0)
    )
    assert retime.guide(slow).hold is False
    retime.check(fast)
    assert "moves at 3.0" in caplog.text and not caplog.records[-1].levelno > logging.INFO
    retime.check(slow)
    assert caplog.records[-1].levelno == logging.WARNING
    assert "the video keeps to its own" in caplog.text


def test_a_held_push_turns_what_changes_and_keeps_its_length(readout):
    """The mean over time moves as pushed; what deviates from it is as long as before."""
    x0_hat, score = latents(2), SCORES["hz"]
    free, held = (
        Guide(readout, score, 0.5, (0.0, 1.0), hold=hold)(x0_hat, 0.7) for hold in (False, True)
    )
    mean = free.mean(dim=2, keepdim=True)
    torch.testing.assert_close(held.mean(dim=2, keepdim=True), mean)
    before, kept = ((x - x.mean(dim=2, keepdim=True)).flatten(1) for x in (x0_hat, held))
    torch.testing.assert_close(kept.norm(dim=1), before.norm(dim=1))
    along = torch.nn.functional.cosine_similarity(kept, (free - mean).flatten(1))
    torch.testing.assert_close(along, torch.ones_like(along))
    assert (score(readout.luminance(held)) > score(readout.luminance(x0_hat))).all()


def test_defaults_in_the_help_are_the_defaults(capsys):
    with pytest.raises(SystemExit):
        main(["sample", "--help"])
    said = " ".join(capsys.readouterr().out.split())
    assert SOUNDTRACK == SPEED
    strengths = f"by default {SOUNDTRACK:g} for a soundtrack or --tempo and {FREQUENCY:g} for"
    assert strengths in said
    assert "by default {:g} {:g}".format(*Rhythm().sigma) in said
