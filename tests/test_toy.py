"""The drawn world moves as it says, on any clock and at any size, and its truth is what is seen."""

from dataclasses import fields, replace

import numpy as np
import pytest
import torch
from torch.nn.functional import grid_sample

from tempolora.data import toy
from tempolora.data.toy import COLOURS, KINDS, SHAPES, TEXTURES, scene

SIZE = {"height": 48, "width": 64}
CLIP = {"fps": 16, "num_frames": 33, **SIZE}


def drawn(scenes, **options):
    """(N, F, H, W, 3) whole numbers."""
    return toy.render(scenes, **{**CLIP, **options}).int()


def centroid(weight_NFHW):
    """(N, F, 2) px of the pixels' middles."""
    weight = weight_NFHW.double()
    x = torch.arange(weight.shape[3]) + 0.5
    y = torch.arange(weight.shape[2])[:, None] + 0.5
    return (
        torch.stack([(weight * axis).sum((2, 3)) for axis in (x, y)], -1)
        / (weight.sum((2, 3))[..., None])
    )


def power(signals_FX, fps=16):
    """(frequencies in Hz, power (F', X)) by a Hann window."""
    signals = np.asarray(signals_FX, np.float64)
    window = np.hanning(len(signals) + 1)[:-1, None]
    spectrum = np.fft.rfft((signals - signals.mean(0)) * window, axis=0)
    return np.fft.rfftfreq(len(signals), 1 / fps), np.abs(spectrum) ** 2


@pytest.mark.parametrize("kind", KINDS)
def test_the_picture_repeats_after_one_period_and_not_after_half(kind):
    frames = drawn(scene(kind, 2.0, 0.4, shape="star"), num_frames=9)[0]
    assert (frames[8] - frames[0]).abs().max() <= 1  # rounding
    assert (frames[4] - frames[0]).abs().max() > 20


@pytest.mark.parametrize("style", toy.STYLES)
def test_the_same_motion_is_drawn_at_any_rate_and_from_any_start(style):
    scenes = toy.draw_scenes(18, np.random.default_rng(1))
    fast = drawn(scenes, fps=24, num_frames=25, style=style)
    later = drawn(scenes, fps=24, num_frames=13, start_s=0.5, style=style)
    assert (fast[:, 12:] - later).abs().max() <= 1
    if style == "clean":
        slow = drawn(scenes, fps=8, num_frames=9)
        assert (fast[:, ::3] - slow).abs().max() <= 1


def test_the_square_is_where_the_cosine_says_to_a_fiftieth_of_a_pixel():
    flat = {"texture": "flat", "ground_texture": "flat", "tint": (255,) * 3, "ground": (0,) * 3}
    seen = centroid(drawn(scene("slide", 1.7, 0.9, 9 / 48, **flat))[..., 0])[0, :, 0]
    told = 32 + 9 * np.cos(2 * np.pi * 1.7 * np.arange(33) / 16 + 0.9)
    np.testing.assert_allclose(seen, told, atol=0.02)  # edges are 8-bit


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("kind", [kind for kind in KINDS if kind != "walk"])
def test_the_tint_is_where_the_track_says_to_a_tenth_of_a_pixel(kind, shape):
    """What changes with the tint alone, in the picture itself; of a face, its mask."""
    one = scene(kind, 1.7, 0.9, 0.11, shape=shape, texture="stripes", size=0.15)
    if shape == "face":
        weight = toy.mask(one, **CLIP, region="face")
    else:
        other = replace(one, tint_N3=one.tint_N3 * 0.5)
        frames = [toy.render(each, **CLIP, dtype=torch.float64) for each in (one, other)]
        weight = frames[0][..., 0] - frames[1][..., 0]
        lit = toy.brightness(one, fps=16, num_frames=33)[..., None, None]
        assert (weight / (one.tint_N3[0, 0] / 2) / lit - toy.mask(one, **CLIP)).abs().max() < 1e-4
    assert (centroid(weight) - toy.tracks(one, **CLIP)).abs().max() < 0.1


def test_a_walker_sways_at_its_rate_bobs_at_twice_and_swings_its_limbs():
    walker = scene("walk", 1.5, 0.3, 0.2, shape="face")
    head = centroid(toy.mask(walker, **CLIP | {"num_frames": 32}, region="face"))
    track = toy.tracks(walker, **CLIP | {"num_frames": 32})
    assert (head - track).abs().max() < 0.1
    hertz, spectrum = power(track[0])
    assert list(hertz[spectrum.argmax(0)]) == [1.5, 3.0]
    legs = toy.mask(walker, **CLIP | {"num_frames": 32})[:, :, 40:]
    spread = legs.sum(2).gt(0.5).double()[0]  # columns with a foot in them
    hertz, spectrum = power(spread)
    assert hertz[spectrum.sum(1).argmax()] in (1.5, 3.0)


def test_a_walker_that_travels_crosses_the_picture_and_comes_back_on_the_other_side():
    going = scene("walk", 1.5, shape="face", travel=0.5)
    x = toy.tracks(going, **CLIP | {"num_frames": 161})[0, :, 0]
    assert ((x > -0.4 * 48) & (x < 64 + 0.4 * 48)).all()
    assert (x.diff() < -60).sum() == 3  # 46 + 240 px on a way of 93


@pytest.mark.parametrize("kind", [kind for kind in KINDS if kind != "pulse"])
@pytest.mark.parametrize("hz", [0.5, 1.5, 5.75])
def test_the_track_has_its_frequency_and_amplitude(kind, hz):
    one = scene(kind, hz, 0.7, 0.13)
    track = toy.tracks(one, fps=64, num_frames=256, **SIZE)[0]
    axis = track.std(0).argmax()
    hertz, spectrum = power(track[:, axis : axis + 1], fps=64)
    assert hertz[spectrum[:, 0].argmax()] == hz
    half = (track[:, axis].max() - track[:, axis].min()) / 2
    assert half.item() == pytest.approx(toy.amplitude_px(one, **SIZE).item(), rel=0.05)


def test_a_pulse_changes_brightness_and_not_place():
    lamp = scene("pulse", 2.0, 0.5, 0.15, texture="flat", shape="disc")
    assert toy.tracks(lamp, **CLIP).diff(dim=1).abs().max() == 0
    middle = drawn(lamp)[0, :, 24, 32].double() / torch.tensor(COLOURS["red"])
    wanted = 1 - 0.3 * (1 - np.cos(2 * np.pi * 2.0 * np.arange(33) / 16 + 0.5))
    np.testing.assert_allclose(middle, np.tile(wanted[:, None], 3), atol=0.02)
    np.testing.assert_allclose(toy.brightness(lamp, fps=16, num_frames=33)[0], wanted)


@pytest.mark.parametrize("texture", TEXTURES)
@pytest.mark.parametrize("kind", ["slide", "pan"])
def test_patterns_keep_to_what_they_are_painted_on(kind, texture):
    """One pixel on is one pixel on, at a position between pixels."""
    look = {"texture": texture, "ground_texture": texture, "shape": "disc", "size": 0.2}
    look["amplitude"] = 0.0
    here, there = (
        drawn(scene(kind, 1.0, place=(0.3 / 48 + n / 48, 0.2 / 48), **look))[..., 1] for n in (0, 1)
    )
    assert (here[..., :-1] - there[..., 1:]).abs().max() <= 1
    middle = here[0, 0, 20:28, 28:36]
    assert (middle.max() - middle.min() > 10) == (texture != "flat")


def test_drawing_adds_no_power_above_the_motion():
    """Slow swings of all shapes: position and mean luminance above 6 Hz."""
    swings = [scene("slide", 0.7, n, shape=s, texture="stripes") for n, s in enumerate(SHAPES)]
    scenes = toy.Scenes.cat(swings)
    clip = CLIP | {"num_frames": 64}
    x_FN = centroid(toy.mask(scenes, **clip))[..., 0].T
    hertz, spectrum = power(x_FN)
    assert (spectrum[hertz > 6].sum(0) / spectrum.sum(0)).max() < 3e-6
    mean_FN = 255 * toy.render(scenes, **clip, dtype=torch.float64).mean((2, 3, 4)).T
    spectrum = power(mean_FN)[1]
    rms = np.sqrt(2 * spectrum[hertz > 6].sum(0) / (64 * 24))  # 24: the window's squares
    assert rms.max() < 0.03  # levels of 255


def test_flicker_adds_power_above_6_hz_and_leaves_the_track_in_its_place():
    scenes = toy.draw_scenes(32, np.random.default_rng(4))
    clip = {**CLIP, "num_frames": 64}
    means, tracks = {}, {}
    for style in toy.STYLES:
        video = toy.render(scenes, **clip, style=style, dtype=torch.float32)
        hertz, spectrum = power(video.mean((2, 3, 4)).T)
        means[style] = spectrum[hertz > 6].sum(0)
        tracks[style] = toy.tracks(scenes, **clip, style=style)
    assert (means["flickering"] > 10 * means["clean"]).all()
    jitter = tracks["flickering"] - tracks["clean"]
    wanted = toy.Flicker().jitter_px * 48 / 64
    assert jitter.std().item() == pytest.approx(wanted, rel=0.05)
    assert jitter.mean(1).abs().max() < 5 * wanted / 8  # 64 frames
    lag = (jitter[:, 1:] * jitter[:, :-1]).mean() / jitter.var()
    assert abs(lag) < 0.06  # white


@pytest.mark.parametrize("part", ["gain", "texture", "jitter_px"])
def test_each_part_of_the_flicker_can_be_had_alone(part):
    only = replace(toy.Flicker(0, 0, 0), **{part: 0.1})
    still = replace(
        toy.draw_scenes(6, np.random.default_rng(5)), amplitude_N=torch.zeros(6).double()
    )
    quiet = drawn(still, style="flickering", flicker=toy.Flicker(0, 0, 0))
    assert torch.equal(quiet, drawn(still))
    assert (drawn(still, style="flickering", flicker=only) - quiet).abs().max() > 5
    moved = toy.tracks(still, **CLIP, style="flickering", flicker=only) - toy.tracks(still, **CLIP)
    assert (moved.abs().max() > 0) == (part == "jitter_px")
    with pytest.raises(ValueError, match="clean"):
        drawn(still, flicker=only)


def test_masks_in_the_flickering_style_follow_the_jitter():
    one = scene("slide", 1.0, shape="disc")
    seen = centroid(toy.mask(one, **CLIP, style="flickering"))
    assert (seen - toy.tracks(one, **CLIP, style="flickering")).abs().max() < 0.05


def warped_back(video_FHW3, flow_FHW2):
    """Frame k + 1 fetched along the flow to where frame k is (bilinear)."""
    height, width = flow_FHW2.shape[1:3]
    x = torch.arange(width) + 0.5 + flow_FHW2[..., 0]
    y = torch.arange(height)[:, None] + 0.5 + flow_FHW2[..., 1]
    grid = torch.stack([2 * x / width - 1, 2 * y / height - 1], -1)
    later = video_FHW3[1:].movedim(-1, 1).float()
    return grid_sample(later, grid, align_corners=False).movedim(1, -1)


@pytest.mark.parametrize("kind", [kind for kind in KINDS if kind != "pulse"])
def test_the_flow_carries_each_frame_onto_the_one_before(kind):
    one = scene(kind, 1.5, 0.4, 0.15, shape="disc", waves=(0.3, 1.0), size=0.2, seed=2)
    frames = toy.render(one, **CLIP)[0]
    flow, valid = (part[0] for part in toy.flow(one, **CLIP))
    error = (warped_back(frames, flow) - frames[:-1].float()).abs().mean(-1)
    moves = valid & (flow.norm(dim=-1) > 1)
    standing = (frames[1:].float() - frames[:-1].float()).abs().mean(-1)
    assert valid.float().mean() > 0.5
    assert moves.float().mean() > 0.01
    assert error[valid].max() < 12  # sharp edges are out; waves between pixels are left
    assert error[moves].mean() < 1.5
    assert error[moves].mean() < 0.5 * standing[moves].mean()


@pytest.mark.parametrize("kind", KINDS)
def test_the_flow_at_the_middle_of_the_mover_is_the_step_of_its_track(kind):
    one = scene(kind, 1.5, 0.4, 0.15, shape="square", size=0.25)
    flow, _ = toy.flow(one, **CLIP)
    track = toy.tracks(one, **CLIP)[0]
    for k, (x, y) in enumerate(track[:-1].floor().long().tolist()):
        # the pixel's middle is up to 0.7 px from the mover's: a turn of 0.3 rad moves it by 0.3
        assert (flow[0, k, y, x] - (track[k + 1] - track[k])).abs().max() < 0.6
    if kind not in ("pan", "grass", "water", "walk"):
        assert flow[0, :, 2, 2].abs().max() == 0


def test_flow_is_not_valid_where_something_hides_or_shows():
    one = scene("slide", 2.0, 0.0, 0.2, shape="square", texture="flat", ground_texture="flat")
    flow, valid = (part[0] for part in toy.flow(one, **CLIP))
    cover = toy.mask(one, **CLIP)[0]
    hidden = (cover[:-1] < 0.001) & (cover[1:] > 0.999)  # ground that the square comes over
    assert hidden.any()
    assert not valid[hidden].any()
    inside = cover[:-1] > 0.999
    assert valid[inside].float().mean() > 0.8  # the square is 15 px wide, and its edge drops out
    assert flow[cover[:-1] < 0.4].abs().max() == 0


def test_beats_fall_on_whole_turns_of_the_phase():
    turns = 2.5 * toy.beat_times(scene("ball", 2.5, 1.0), 3.0) + 1.0 / (2 * np.pi)
    np.testing.assert_allclose(turns, np.round(turns), atol=1e-9)
    assert len(turns) == 7  # turns 0.16 to 7.66


def test_a_ball_is_on_the_floor_at_its_beats():
    ball = scene("ball", 2.5, 1.0)
    y = toy.tracks(ball, fps=1000, num_frames=2000, **SIZE)[0, :, 1]
    beats = np.rint(1000 * toy.beat_times(ball, 2.0)).astype(int)
    assert (y.max() - y[beats]).max() < 0.5


def as_table(scenes):
    """(N, columns) of all factors."""
    parts = [
        getattr(scenes, field.name).double().reshape(len(scenes), -1) for field in fields(scenes)
    ]
    return torch.cat(parts, 1)


def test_draws_follow_from_the_seed_whatever_the_batch():
    together = toy.draw_scenes(5, np.random.default_rng(9))
    rng = np.random.default_rng(9)
    singly = toy.Scenes.cat([toy.draw_scenes(1, rng) for _ in range(5)])
    assert torch.equal(as_table(together), as_table(singly))
    assert not torch.equal(
        as_table(together), as_table(toy.draw_scenes(5, np.random.default_rng(8)))
    )


@pytest.mark.parametrize("style", toy.STYLES)
def test_a_clip_is_the_same_alone_and_in_a_batch(style):
    scenes = toy.draw_scenes(20, np.random.default_rng(2))
    batch = drawn(scenes, num_frames=5, style=style)
    for n in range(20):
        assert (drawn(scenes[n], num_frames=5, style=style)[0] - batch[n]).abs().max() <= 1


def test_factors_are_drawn_independently_and_frequencies_log_uniformly():
    scenes = toy.draw_scenes(4000, np.random.default_rng(0))
    table = as_table(scenes)
    table = table[:, table.std(0) > 0]
    # The three channels of a tint belong to one named colour.
    tint = set(range(4, 7))
    found = torch.corrcoef(table.T)
    for a in range(len(found)):
        for b in range(a):
            if not {a, b} <= tint:
                assert abs(found[a, b]) < 0.08  # five standard deviations
    octaves = torch.log(scenes.hz_N / 0.5) / np.log(12)
    for share in (0.1, 0.5, 0.9):
        assert octaves.quantile(share).item() == pytest.approx(share, abs=0.04)
    assert set(scenes.kinds) == set(KINDS)


def test_any_factor_can_be_narrowed():
    narrow = toy.draw_scenes(
        50,
        np.random.default_rng(0),
        kinds=("pan", "walk"),
        shapes=("face",),
        textures=("checks",),
        ground_textures=("flat",),
        colours=("cyan",),
        hz=(2.0, 2.0),
        amplitude=(0.1, 0.1),
        size=(0.2, 0.2),
        directions=(0.0,),
    )
    assert set(narrow.kinds) == {"pan", "walk"}
    assert set(toy.captions(narrow)) == {
        "the camera pans from side to side past a face with cyan hair",
        "a figure in cyan walks on the spot",
        "a figure in cyan walks across",
    }
    for column, value in ((narrow.hz_N, 2.0), (narrow.amplitude_N, 0.1), (narrow.size_N, 0.2)):
        torch.testing.assert_close(column, torch.full_like(column, value))
    with pytest.raises(ValueError, match="unknown name 'mauve', choose from red"):
        toy.draw_scenes(1, np.random.default_rng(0), colours=("mauve",))


@pytest.mark.parametrize("colour", COLOURS)
def test_captions_name_colour_shape_and_motion_and_no_style(colour):
    rng = np.random.default_rng(6)
    scenes = toy.Scenes.cat(
        [toy.draw_scenes(1, rng, kinds=(k,), colours=(colour,), shapes=("star",)) for k in KINDS]
    )
    told = toy.captions(scenes)
    assert len(set(told)) == len(KINDS)
    assert all(colour in text and "star" in text for text in told)
    assert not any(word in text for text in told for word in ("flicker", "clean", "jitter", "pace"))


def test_tempo_words_are_the_thirds_of_the_band():
    for word, rates in {"slow": (0.5, 1.1), "steady": (1.2, 2.6), "fast": (2.7, 6.0)}.items():
        for hz in rates:
            assert toy.captions(scene("ball", hz), tempo_words=True)[0].endswith(f"a {word} pace")


def test_pictures_scale_with_their_size():
    """Half of the size is the mean over fours of pixels, but for what edges and pattern lose."""
    scenes = toy.draw_scenes(18, np.random.default_rng(7), textures=("flat",))
    scenes = replace(scenes, ground_texture_N=torch.zeros(18).long(), waves_N2=scenes.waves_N2 * 4)
    small = toy.tracks(scenes, fps=16, num_frames=9, height=64, width=64)
    large = toy.tracks(scenes, fps=16, num_frames=9, height=256, width=256)
    torch.testing.assert_close(large, 4 * small)
    frames = toy.render(scenes, fps=16, num_frames=3, height=64, width=64).float()
    fine = toy.render(scenes, fps=16, num_frames=3, height=256, width=256).float()
    fine = fine.unflatten(3, (64, 4)).unflatten(2, (64, 4)).mean((3, 5))
    assert (frames - fine).abs().mean((1, 2, 3, 4)).max() < 2.5


def test_regions_tell_faces_and_textures_apart():
    face = scene("slide", 1.0, shape="face", texture="stripes", ground_texture="flat")
    disc = scene("slide", 1.0, shape="disc", texture="stripes", ground_texture="flat")
    ground = scene("slide", 1.0, shape="disc", texture="flat", ground_texture="checks")
    scenes = toy.Scenes.cat([face, disc, ground])
    region = {name: toy.mask(scenes, **CLIP, region=name) for name in toy.REGIONS}
    assert torch.equal(region["face"][0], region["mover"][0])
    assert region["face"][1:].max() == 0
    assert region["texture"][0].max() == 0
    assert torch.equal(region["texture"][1], region["mover"][1])
    torch.testing.assert_close(region["texture"][2], 1 - region["mover"][2])
    with pytest.raises(ValueError, match="unknown name 'nose', choose from mover, face, texture"):
        toy.mask(scenes, **CLIP, region="nose")


def test_floats_are_the_bytes_before_rounding():
    scenes = toy.draw_scenes(9, np.random.default_rng(1))
    floats = toy.render(scenes, **CLIP, dtype=torch.float32)
    assert floats.shape == (9, 33, 48, 64, 3)
    assert (floats.min(), floats.max()) >= (0, 0)
    assert floats.max() <= 1
    assert (255 * floats - drawn(scenes)).abs().max() <= 0.5001
