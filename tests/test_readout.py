"""The readout recovers a decoder that is linear, and says honestly what it cannot read.

References: decoders written out frame by frame, scipy's coherence, numpy's FFT and least squares.
"""

import numpy as np
import pytest
import scipy.signal
import torch

from tempolora.config import ConfigError
from tempolora.data.readout import (
    BANK,
    READOUT,
    load_bank,
    load_readout,
    read_checked,
    write_checked,
)
from tempolora.rhythm.readout import COLUMNS, NormalEquations, Part, Readout, coherence, draw, fit
from tempolora.rhythm.tempo import LUMA, block_luminance, motion, power_spectrum
from tempolora.timebase import TimeBase

CHANNELS, LATENT_FRAMES = 16, 13
SAMPLES = 4 * (LATENT_FRAMES - 1)
TIMEBASE = TimeBase(16.0, SAMPLES + 1)


def generator(seed):
    return torch.Generator().manual_seed(seed)


@pytest.fixture(scope="module")
def truth():
    """Weights [group][frame in the group][lag] (C,) and biases of a linear decoder."""
    weight = 0.1 * torch.randn(3, 4, 3, CHANNELS, generator=generator(1), dtype=torch.float64)
    weight[0, :, 2] = 0  # latent frame 1 has one frame before it
    return weight, torch.rand(3, 4, generator=generator(2), dtype=torch.float64)


def latents(seed, frames=LATENT_FRAMES, size=16):
    return torch.randn(CHANNELS, frames, size, size, generator=generator(seed))


def decode(truth, latents_CTHW):
    """What that decoder makes of latents, frame by frame: (S, H, W) float64."""
    weight, bias = truth
    z = latents_CTHW.double().numpy()
    luma = []
    for frame in range(1, 4 * (z.shape[1] - 1) + 1):
        t, k = (frame - 1) // 4 + 1, (frame - 1) % 4
        group = {1: 0, 2: 1}.get(t, 2)
        y = np.full(z.shape[2:], bias[group, k].item())
        for lag in range(3):
            if t - lag >= 0:
                y += np.tensordot(weight[group, k, lag].numpy(), z[:, t - lag], axes=1)
        luma.append(y)
    return torch.tensor(np.stack(luma))


@pytest.fixture(scope="module")
def fitted(truth):
    clips = [latents(seed) for seed in range(8)]
    return fit([Part.of(z, decode(truth, z), seed=0) for z in clips])[0]


# --- Fitting --------------------------------------------------------------------------------------


def test_a_linear_decoder_is_recovered_with_its_first_groups(truth, fitted):
    weight, bias = truth
    assert (fitted.weight_GKJC - weight).abs().max() < 1e-6
    assert (fitted.bias_GK - bias).abs().max() < 1e-6
    assert torch.equal(fitted.weight_GKJC[0, :, 2], torch.zeros(4, CHANNELS).double())
    assert fitted.r2_GK.min() > 1 - 1e-9
    assert fitted.g2_F.min() > 1 - 1e-6


def test_it_reads_new_latents_of_any_length_as_the_decoder_does(truth, fitted):
    for frames in (2, 3, 4, 21):
        z = latents(99, frames, size=3)
        read = fitted.luminance(z[None])
        assert read.dtype == torch.float32
        assert torch.allclose(read[0].double(), decode(truth, z), atol=1e-5)


def test_its_matrix_and_bias_are_the_same_map_and_its_gradient(fitted):
    z_BCTHW = latents(98, size=2)[None].requires_grad_()
    matrix, bias = fitted.matrix(LATENT_FRAMES), fitted.bias(LATENT_FRAMES)
    column = z_BCTHW[0, :, :, 1, 0].detach().double()
    expected = (matrix * column).sum(dim=(1, 2)) + bias
    read = fitted.luminance(z_BCTHW)
    assert torch.allclose(read[0, :, 1, 0].double(), expected, atol=1e-5)
    read[0, 7, 1, 0].backward()
    assert torch.allclose(z_BCTHW.grad[0, :, :, 1, 0], matrix[7].float())
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert torch.equal(fitted.luminance(z_BCTHW), read)


def test_an_affine_fit_is_that_of_least_squares():
    """Where the decoder is not linear the result is still the best map, by numpy's own account."""
    clips = [latents(seed, frames=5, size=12) for seed in range(6)]
    lumas = [z[:4].sum(dim=0)[1:].sigmoid().repeat_interleave(4, dim=0) for z in clips]
    readout, ridges = fit([Part.of(z, y, seed=0) for z, y in zip(clips, lumas, strict=True)])
    rows, targets = [], []
    for z, y in zip(clips, lumas, strict=True):
        for t in (3, 4):
            lags = torch.cat([z[:, t], z[:, t - 1], z[:, t - 2]]).flatten(1).T
            rows.append(np.column_stack([lags.numpy(), np.ones(len(lags))]))
            targets.append(y[4 * (t - 1)].flatten().numpy())
    best = np.linalg.lstsq(np.concatenate(rows).astype(float), np.concatenate(targets))[0]
    found = torch.cat([readout.weight_GKJC[2, 0].flatten(), readout.bias_GK[2, :1]])
    # the ridge shrinks by its share of a variance of one
    assert np.abs(found.numpy() - best).max() < 2 * ridges[2] * np.abs(best).max() + 1e-6


def test_what_it_says_of_itself_is_of_clips_it_has_not_seen():
    """Few pixels and many regressors fit any luminance; that of another clip they do not."""
    clips = [latents(seed, frames=4, size=2) for seed in range(4)]
    lumas = [torch.rand(12, 2, 2, generator=generator(50 + seed)) for seed in range(4)]
    readout, _ = fit([Part.of(z, y, seed=0) for z, y in zip(clips, lumas, strict=True)])
    assert readout.r2_GK.max() < 0.5
    assert readout.g2_F[1:].max() < 0.5
    regressors = torch.stack([torch.cat([z[:, 3], z[:, 2], z[:, 1]]) for z in clips])
    columns = regressors.flatten(2).mT.flatten(0, 1).numpy()
    targets = torch.stack([y[8] for y in lumas]).flatten().numpy()
    best = np.linalg.lstsq(columns, targets)[0]
    assert np.abs(columns @ best - targets).max() < 1e-4  # what it was fitted on, it would explain


def test_r2_falls_as_noise_grows(truth):
    def judged(amplitude):
        parts = []
        for seed in range(8):
            z = latents(seed)
            y = decode(truth, z)
            noise = torch.randn(y.shape, generator=generator(200 + seed), dtype=torch.float64)
            parts.append(Part.of(z, y + amplitude * y.std() * noise, seed=0))
        return fit(parts)[0].r2_GK[2].mean().item()

    # of a variance of 1 + amplitude^2 the map explains 1
    assert judged(0.5) == pytest.approx(1 / 1.25, abs=0.02)
    assert judged(2.0) == pytest.approx(1 / 5, abs=0.03)


def test_coherence_falls_where_the_signal_is_weak(truth):
    """White noise over a luminance with little above 4 Hz: g2 = signal / (signal + noise)."""
    b, a = scipy.signal.butter(4, 4.0, fs=16.0)
    slow, noise = [], []
    for seed in range(300):
        rng = np.random.default_rng(seed)
        slow.append(scipy.signal.lfilter(b, a, rng.normal(size=SAMPLES + 200))[200:])
        noise.append(0.3 * rng.normal(size=SAMPLES))
    slow, noise = torch.tensor(np.stack(slow)), torch.tensor(np.stack(noise))
    g2_F = coherence(slow + noise, slow)
    expected = 1 / (1 + 0.09 / np.abs(scipy.signal.freqz(b, a, TIMEBASE.bins_hz, fs=16.0)[1]) ** 2)
    bins = np.array(TIMEBASE.bins_hz)
    assert (g2_F[1 : np.argmax(bins > 3)] > 0.85).all()
    assert (g2_F[bins > 6.5] < 0.1).all()
    assert np.abs(g2_F.numpy() - expected)[2:-1].max() < 0.12


def test_coherence_is_scipys():
    rng = np.random.default_rng(0)
    for samples in (8, 16, 48, 80):
        y = rng.normal(size=(60, samples))
        y_hat = 0.5 * y + rng.normal(size=y.shape) + np.arange(samples)
        expected = scipy.signal.coherence(
            y.ravel(), y_hat.ravel(), nperseg=samples, noverlap=0, detrend="linear"
        )[1]
        assert np.allclose(coherence(torch.tensor(y), torch.tensor(y_hat)), expected, atol=1e-12)


def test_coherence_of_something_that_stands_still_is_zero():
    still = torch.full((5, SAMPLES), 0.3)
    moving = torch.rand(5, SAMPLES, generator=generator(0))
    assert not coherence(still, moving).any()
    assert not coherence(moving, still).any()


def test_latents_of_another_clip_or_in_another_order_are_found_useless(truth):
    """A readout that reads nothing has a coherence below 0.5 at every frequency, the comb too."""
    clips = [latents(seed) for seed in range(8)]
    lumas = [decode(truth, z) for z in clips]
    orders = [torch.randperm(LATENT_FRAMES, generator=generator(seed)) for seed in range(8)]
    for shown in (
        [*clips[1:], clips[0]],
        [z[:, order] for z, order in zip(clips, orders, strict=True)],
    ):
        readout, _ = fit([Part.of(z, y, seed=0) for z, y in zip(shown, lumas, strict=True)])
        assert readout.g2_F.max() < 0.5
        assert readout.r2_GK[2].max() < 0.5


def test_shuffled_weights_are_found_useless(truth, fitted):
    """Mixed channels everywhere; mixed frames of a group from 2 Hz up, as a slow wave is the same
    in any order."""
    weight, bias = fitted.weight_GKJC, fitted.bias_GK
    order = torch.randperm(CHANNELS, generator=generator(0))
    z_BCTHW = torch.stack([latents(seed) for seed in range(4)])
    true = torch.stack([decode(truth, z) for z in z_BCTHW])

    def judged(weight, bias):
        shuffled = Readout(weight, bias, fitted.r2_GK, fitted.g2_F, fitted.num_frames)
        read = shuffled.luminance(z_BCTHW)
        return coherence(*(x.flatten(2).mT.flatten(0, 1) for x in (true, read)))

    assert judged(weight, bias).min() > 0.99
    assert judged(weight[..., order], bias).max() < 0.5
    hz = torch.tensor(TIMEBASE.bins_hz)
    assert judged(weight.flip(1), bias.flip(1))[(hz >= 2) & (hz <= 6)].max() < 0.5


def test_parts_are_counted_in_any_order_and_number(truth):
    clips = [latents(seed, size=4) for seed in range(3)]
    together = NormalEquations.empty(CHANNELS)
    for z in clips:
        together.add(z, decode(truth, z))
    merged = NormalEquations.empty(CHANNELS)
    for z in reversed(clips):
        merged.merge(Part.of(z, decode(truth, z), seed=0).sums)
    for name, sums in vars(together).items():
        assert torch.allclose(sums, getattr(merged, name), rtol=1e-12), name
    x = np.concatenate([np.r_[z[:, 1, 0, 0], z[:, 0, 0, 0]] for z in clips[:1]])
    assert np.isclose(NormalEquations.empty(CHANNELS).yty_GK.sum(), 0)
    one = NormalEquations.empty(CHANNELS)
    one.add(clips[0][:, :2, :1, :1], decode(truth, clips[0])[:4, :1, :1])
    assert np.allclose(one.xtx_GII[0, : 2 * CHANNELS, : 2 * CHANNELS], np.outer(x, x))
    assert one.xtx_GII[:, -1, -1].tolist() == [1, 0, 0]


def test_a_part_keeps_whole_columns_and_the_same_ones_each_time(truth):
    z = latents(0, size=20)
    y = decode(truth, z)
    part, again = Part.of(z, y, seed=5), Part.of(z, y, seed=5)
    assert part.luma_NS.shape == (COLUMNS, SAMPLES)
    assert torch.equal(part.latents_NCT, again.latents_NCT)
    columns = z.flatten(2).permute(2, 0, 1)
    for latent_CT, luma_S in zip(part.latents_NCT[:9], part.luma_NS[:9], strict=True):
        place = (columns == latent_CT).all(dim=(1, 2)).nonzero().item()
        assert torch.equal(luma_S, y.flatten(1)[:, place].float())


@pytest.mark.parametrize(("num_frames", "groups"), [(5, 1), (9, 2), (13, 3)])
def test_short_clips_leave_the_later_groups_out(truth, num_frames, groups):
    frames = (num_frames - 1) // 4 + 1
    clips = [latents(seed, frames) for seed in range(4)]
    readout, ridges = fit([Part.of(z, decode(truth, z), seed=0) for z in clips])
    assert len(ridges) == groups
    assert (readout.weight_GKJC[:groups] - truth[0][:groups]).abs().max() < 1e-6
    assert not readout.weight_GKJC[groups:].any()
    assert readout.matrix(frames).shape == (num_frames - 1, CHANNELS, frames)
    if groups < 3:
        with pytest.raises(ValueError, match=f"fitted on {num_frames} frames and cannot read"):
            readout.matrix(frames + 1)
    draw(readout, TimeBase(16.0, num_frames))


def test_luminance_that_stands_still_gives_zeros_and_no_nan():
    parts = [
        Part.of(latents(seed, size=4), torch.full((SAMPLES, 4, 4), 0.5), 0) for seed in range(4)
    ]
    readout, _ = fit(parts)
    assert not readout.r2_GK.any()
    assert not readout.g2_F.any()
    assert torch.allclose(readout.bias_GK, torch.tensor(0.5).double())


def test_one_clip_is_too_few_and_nan_is_refused(truth):
    z = latents(0, size=4)
    y = decode(truth, z)
    with pytest.raises(ValueError, match="at least two clips"):
        fit([Part.of(z, y, seed=0)])
    y[3, 1, 1] = torch.nan
    with pytest.raises(FloatingPointError, match="not finite"):
        Part.of(z, y, seed=0)


# --- What it is fitted to, and what is made of it -------------------------------------------------


def test_block_luminance_is_the_mean_of_each_block():
    frames = torch.rand(3, 3, 16, 24, generator=generator(0))
    found = block_luminance(frames, 2, 3)
    luma = np.tensordot(LUMA, frames.numpy(), axes=(0, 1))
    for row in range(2):
        for column in range(3):
            block = luma[:, 8 * row : 8 * row + 8, 8 * column : 8 * column + 8]
            assert np.allclose(found[:, row, column], block.mean(axis=(1, 2)), atol=1e-6)


def test_power_spectrum_and_motion_are_numpys():
    luma = torch.rand(2, 20, 3, 4, generator=generator(0), dtype=torch.float64)
    flat = scipy.signal.detrend(luma.numpy(), axis=1)
    window = scipy.signal.get_window("hann", 20)[:, None, None]
    power = np.abs(np.fft.rfft(flat * window, axis=1)) ** 2
    assert np.allclose(power_spectrum(luma), power.mean(axis=(2, 3)))
    step = np.diff(luma.numpy(), axis=1)
    assert np.allclose(motion(luma), (step**2).mean(axis=(1, 2, 3)))


def test_power_spectrum_and_motion_have_true_gradients():
    luma = torch.rand(2, 8, 2, 2, generator=generator(0), dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(power_spectrum, luma)
    assert torch.autograd.gradcheck(motion, luma)


def test_the_figure_names_its_axes_and_marks_the_comb(fitted):
    left, right = draw(fitted, TIMEBASE).axes
    assert "Hz" in left.get_xlabel()
    assert right.get_ylabel()
    assert {line.get_xdata()[0] for line in left.lines} >= {4.0, 8.0}


# --- Files ----------------------------------------------------------------------------------------


@pytest.fixture
def folder(fitted, tmp_path):
    write_checked(tmp_path / READOUT, fitted.tensors(), {"clips": 8})
    write_checked(tmp_path / BANK, {"power": torch.ones(2, 25), "motion": torch.ones(2)}, {})
    return tmp_path


def test_a_readout_comes_back_as_it_was(fitted, folder):
    found = load_readout(folder)
    assert found.num_frames == fitted.num_frames == SAMPLES + 1
    for name, tensor in fitted.tensors().items():
        assert torch.equal(found.tensors()[name], tensor), name
    power_NF, motion_N = load_bank(folder)
    assert (power_NF.shape, motion_N.shape) == ((2, 25), (2,))


def test_the_same_content_is_the_same_file(fitted, tmp_path):
    for name in ("a", "b"):
        write_checked(tmp_path / name, fitted.tensors(), {"clips": 8, "drawn": 1, "ridge": 0.1})
    assert (tmp_path / "a").read_bytes() == (tmp_path / "b").read_bytes()


@pytest.mark.parametrize("place", [0, 4, 60, 150, 300, 900, 5000, -1])
def test_a_flipped_bit_is_noticed(folder, place):
    content = bytearray((folder / READOUT).read_bytes())
    content[place] ^= 1
    (folder / READOUT).write_bytes(content)
    with pytest.raises(ConfigError, match=r"readout\.safetensors: damaged .* precompute` again"):
        load_readout(folder)


def test_a_missing_torn_or_foreign_file_is_named_with_what_to_do(folder):
    content = (folder / READOUT).read_bytes()
    (folder / READOUT).write_bytes(content[:-9])
    with pytest.raises(ConfigError, match=r"damaged .* run `tempolora precompute` again"):
        load_readout(folder)
    (folder / READOUT).unlink()
    with pytest.raises(ConfigError, match="is not there; run `tempolora precompute` again"):
        load_readout(folder)
    (folder / BANK).unlink()
    with pytest.raises(ConfigError, match=r"rhythm_bank\.safetensors is not there"):
        load_bank(folder)
    write_checked(folder / READOUT, {"weight": torch.ones(3, 4, 3, 16)}, {})
    assert read_checked(folder / READOUT)[1] == {}
    with pytest.raises(ConfigError, match="damaged"):
        load_readout(folder)


def test_tensors_of_another_shape_are_no_readout(fitted):
    for name in ("weight", "bias", "r2", "g2"):
        tensors = fitted.tensors()
        tensors[name] = tensors[name][:-1]
        with pytest.raises(ValueError, match=f"{name} of a readout"):
            Readout.from_tensors(tensors)
