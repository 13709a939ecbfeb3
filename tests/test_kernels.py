"""Flow loss and probe energies, in torch and in the fused kernel, against float64 formulas.

Without a GPU the kernel's own code runs in Triton's interpreter (tests/conftest.py).
"""

import math
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor

from tempolora.rhythm.kernels import flow_and_probe, probe_energy

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
# Triton's interpreter cuts off what a bfloat16 has no room for, where a GPU rounds to nearest.
BF16_SLACK = 1.0 if DEVICE == "cuda" else 2.3
HALF = (torch.bfloat16, torch.float16)


@pytest.fixture(scope="module")
def fused():
    """The fused kernel, on CPU tensors too."""
    pytest.importorskip("triton")
    from tempolora.rhythm import triton_launch

    return triton_launch


def draw(shape, seed, dtype=torch.float32, device="cpu") -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(shape, generator=generator).to(dtype).to(device)


def relative(got: Tensor, wanted: Tensor) -> float:
    """Norm of the difference over the norm of what is wanted; NaN is never close."""
    got, wanted = got.detach().double(), wanted.detach().double()
    scale = wanted.norm().item()
    error = (got - wanted).norm().item()
    return error / scale if scale else error


def formula(x, v, probe, flow_rate, row_rate, first):
    """Flow (B,), energies (B, P) and the gradient of sum_b flow_rate_b flow_b + sum_p row_rate_bp
    energy_bp, in float64 and written out."""
    e = x.detach().double() - (0 if v is None else v.double())
    samples, channels, frames, height, width = e.shape
    pixels = height * width
    columns = e.movedim(2, 1).flatten(3).flatten(1, 2)  # (B, T C, HW)
    k = probe.double()
    if probe.ndim == 2:  # one copy of each row for every channel, blind to the others
        k = k[:, None, None, :] * torch.eye(channels, device=e.device)[None, :, :, None]
        k = k[None]
    else:
        k = (k if probe.ndim == 4 else k[None])[:, :, None]
    k = k.transpose(-1, -2).flatten(-2)  # (B or 1, P, copies, T C)
    seen = torch.einsum("bpkd,bdn->bpkn", k.expand(samples, -1, -1, -1), columns)
    energy = seen.square().sum(dim=(2, 3)) / pixels
    shown = torch.einsum(
        "bpkd,bpkn->bdn", k.expand(samples, -1, -1, -1), seen * row_rate[:, :, None, None]
    )
    gradient = shown.view(samples, frames, channels, height, width).movedim(1, 2) * (2 / pixels)
    learned = e.clone()
    learned[:, :, :first] = 0
    count = channels * (frames - first) * pixels
    flow = learned.square().sum(dim=(1, 2, 3, 4)) / count
    gradient += learned * flow_rate.view(-1, 1, 1, 1, 1) * (2 / count)
    return flow, energy, gradient


def spectral_power(e, window, kept):
    """Windowed power of the kept bins of each sample by torch.fft, summed over channels."""
    power = torch.fft.rfft(e.double() * window.view(1, 1, -1, 1, 1), dim=2).abs().square()
    return power[:, :, kept].sum(dim=(1, 2)).mean(dim=(1, 2))


def spectral_rows(window, kept):
    """The probe (P, T) whose energy is `spectral_power`."""
    time = torch.arange(len(window), dtype=torch.float64)
    angle = 2 * math.pi * torch.tensor(kept, dtype=torch.float64)[:, None] * time / len(window)
    return torch.cat([angle.cos() * window, angle.sin() * window])


def random_case(seed: int) -> dict:
    """Sizes, form, dtypes and strides of one case on the CPU."""
    rng = np.random.default_rng(seed)
    channels, frames = int(rng.integers(1, 20)), int(rng.integers(1, 24))
    return {
        "shape": (int(rng.integers(1, 4)), channels, frames, *map(int, rng.integers(1, 8, 2))),
        "rows": int(rng.integers(1, 12)),
        "form": str(rng.choice(["PCT", "BPCT", "PT"])),
        "dtype": rng.choice([torch.float32, torch.float64, *HALF]),
        "v_dtype": rng.choice([torch.float32, torch.float64, *HALF]),
        "each": bool(rng.integers(2)),
        "first": int(rng.integers(0, min(2, frames))),
        "layout": str(rng.choice(["plain", "permuted", "sliced", "expanded"])),
    }


def laid_out(x: Tensor, layout: str) -> Tensor:
    """The same values with other strides; expanded: the first row of pixels everywhere."""
    if layout == "permuted":
        return x.permute(4, 1, 3, 0, 2).contiguous().permute(3, 1, 4, 2, 0)
    if layout == "sliced":
        roomy = x.new_full([size + 2 for size in x.shape], torch.nan)
        inner = roomy[1:-1, 1:-1, 1:-1, :-2, 1:-1]
        inner.copy_(x)
        return inner
    if layout == "expanded":
        return x[:, :, :, :1].expand_as(x)
    return x


def make_probe(form, samples, rows, channels, frames, seed, device="cpu"):
    shape = {"PCT": (channels, frames), "PT": (frames,), "BPCT": (channels, frames)}[form]
    shape = (samples, rows, *shape) if form == "BPCT" else (rows, *shape)
    return draw(shape, seed, device=device) / math.sqrt(channels * frames)


# the torch path


@pytest.mark.parametrize("seed", range(0, 240, 8))
def test_torch_equals_the_float64_formula(seed):
    for case in range(seed, seed + 8):
        c = random_case(case)
        samples, channels, frames = c["shape"][:3]
        x = laid_out(draw(c["shape"], case, c["dtype"]), c["layout"]).requires_grad_()
        v = draw(c["shape"], case + 1, c["v_dtype"])
        probe = make_probe(c["form"], samples, c["rows"], channels, frames, case + 2)
        weight = draw((samples, c["rows"]) if c["each"] else (samples,), case + 3).abs() + 0.1
        flow, energy = flow_and_probe(x, v, probe.to(x.dtype).float(), weight, c["first"])
        probe = probe.to(x.dtype)
        flow_rate, row_rate = draw((samples,), case + 4), draw(energy.shape, case + 5)
        (flow @ flow_rate.to(flow) + (row_rate * energy).sum()).backward()
        rates = row_rate if c["each"] else row_rate[:, None].expand(-1, c["rows"])
        want = formula(x, v, probe, flow_rate.double(), rates.double(), c["first"])
        wanted_energy = want[1] if c["each"] else want[1].sum(dim=1)
        wide = torch.float64 in (c["dtype"], c["v_dtype"])
        assert flow.dtype == energy.dtype == (torch.float64 if wide else torch.float32)
        bound = 1e-12 if wide else 1e-6
        assert relative(flow, want[0]) < bound
        assert relative(energy, wanted_energy) < bound
        assert x.grad.dtype == c["dtype"]
        assert relative(x.grad, want[2]) < 1e-6 + 1.01 * relative(want[2].to(c["dtype"]), want[2])
        alone = probe_energy(x.detach(), probe)
        assert relative(alone, formula(x, None, probe, flow_rate, rates, 0)[1].sum(1)) < 1e-6


@pytest.mark.parametrize("frames", [5, 12, 21, 31, 81])
def test_the_energy_of_dft_rows_is_the_windowed_power_that_torch_fft_gives(frames, fused):
    window = torch.hann_window(frames, periodic=True, dtype=torch.float64)
    kept = list(range(1, frames // 2 + 1, 2))
    rows = spectral_rows(window, kept)
    x = draw((2, 3, frames, 3, 4), frames, torch.float64)
    assert relative(probe_energy(x, rows), spectral_power(x, window, kept)) < 1e-12
    x = x.float()
    wanted = spectral_power(x, window, kept)
    assert relative(probe_energy(x, rows.float()), wanted) < 1e-6
    got = fused.probe_energy(x.to(DEVICE), rows.float().to(DEVICE)).cpu()
    assert relative(got, wanted) < 1e-6


@pytest.mark.parametrize("form", ["PCT", "BPCT", "PT"])
@pytest.mark.parametrize("first", [0, 1])
def test_gradients_are_right(form, first):
    x, v = draw((2, 2, 4, 2, 1), 1).double().requires_grad_(), draw((2, 2, 4, 2, 1), 2).double()
    probe = make_probe(form, 2, 3, 2, 4, 3).double()
    weight = torch.ones(2, 3)

    def sums(x):
        flow, energy = flow_and_probe(x, v, probe, weight, first)
        return 0.3 * flow - energy[:, 1] + 2 * energy[:, 0], probe_energy(x, probe)

    assert torch.autograd.gradcheck(sums, x)
    assert torch.autograd.gradgradcheck(lambda x: probe_energy(x, probe), x)


def test_autocast_changes_nothing():
    x, v = draw((2, 4, 5, 3, 3), 1), draw((2, 4, 5, 3, 3), 2)
    probe = make_probe("PCT", 2, 3, 4, 5, 3)
    plain = flow_and_probe(x, v, probe, torch.ones(2))
    with torch.autocast("cpu", torch.bfloat16):
        cast = flow_and_probe(x, v, probe, torch.ones(2))
        energy = probe_energy(x, probe)
    assert torch.equal(plain[0], cast[0]) and torch.equal(plain[1], cast[1])
    assert energy.dtype == torch.float32


def test_what_does_not_fit_is_refused():
    x, probe, weight = draw((2, 4, 5, 3, 3), 1), draw((3, 4, 5), 2), torch.ones(2)
    for bad in (draw((3, 5, 4), 1), draw((3, 4), 1), draw((3, 3, 4, 5), 1), draw((5,), 1)):
        with pytest.raises(ValueError, match="a probe of shape"):
            probe_energy(x, bad)
    with pytest.raises(ValueError, match="a residual is"):
        probe_energy(x[0], probe)
    with pytest.raises(ValueError, match="weight has shape"):
        flow_and_probe(x, x, probe, torch.ones(2, 4))
    with pytest.raises(ValueError, match="v has shape"):
        flow_and_probe(x, x[:, :, :4], probe, weight)
    with pytest.raises(ValueError, match="first_frame 5"):
        flow_and_probe(x, x, probe, weight, first_frame=5)
    with pytest.raises(ValueError, match="v is the target"):
        flow_and_probe(x, x.clone().requires_grad_(), probe, weight)
    with pytest.raises(ValueError, match="a probe is fixed"):
        probe_energy(x, probe.clone().requires_grad_())


# the fused kernel


@dataclass(frozen=True)
class Case:
    """kind: the way through the kernel that the case must take."""

    kind: str
    shape: tuple[int, int, int, int, int]
    rows: int
    form: str = "PCT"
    dtype: torch.dtype = torch.float32
    v_dtype: torch.dtype | None = None
    each: bool = False
    first: int = 0
    layout: str = "plain"
    scale: float = 1.0


CASES = [
    Case("frames", (2, 3, 5, 4, 8), 7),
    Case("channel", (2, 7, 21, 2, 4), 16, "PT"),
    Case("channel", (3, 5, 13, 9, 8), 4, "PT", torch.float16, each=True, first=1),
    Case("channel", (1, 2, 31, 2, 4), 20, "PT", torch.bfloat16),
    Case("channel", (2, 3, 21, 10, 32), 16, "PT", torch.bfloat16, torch.float32, first=1),
    Case("frames", (1, 7, 40, 2, 4), 20, "PT", torch.bfloat16),
    Case("streamed", (2, 7, 21, 3, 5), 16, "PT"),  # three channels a tile, and one left over
    Case("frames", (2, 4, 16, 2, 4), 70, "BPCT", each=True),
    Case("frames", (2, 4, 16, 16, 8), 5, "BPCT", torch.float16, torch.float32),
    Case("short", (2, 16, 5, 4, 8), 7),
    Case("short", (2, 16, 13, 4, 4), 36, dtype=torch.float16),
    Case("short", (1, 16, 13, 10, 8), 33, dtype=torch.bfloat16, each=True, first=1),
    Case("short", (2, 48, 5, 2, 4), 6, "BPCT", torch.float16, first=1),
    Case("long", (1, 16, 21, 4, 4), 66, dtype=torch.float16),
    Case("long", (2, 16, 17, 2, 4), 18, dtype=torch.float16, each=True, first=1),
    Case("long", (1, 48, 7, 2, 4), 9, "BPCT", torch.float16),
    Case("streamed", (1, 16, 21, 2, 4), 66),
    Case("streamed", (1, 48, 31, 2, 4), 40, dtype=torch.float16, first=1),
    Case("streamed", (1, 16, 81, 1, 8), 17, dtype=torch.float16, each=True),
    Case("streamed", (2, 3, 5, 3, 5), 7, first=1),  # 15 pixels: nothing lies on 16 bytes
    Case("streamed", (2, 3, 9, 5, 13), 7, "PT", torch.float16, each=True),
    Case("streamed", (2, 4, 6, 5, 14), 7, layout="permuted"),
    Case("streamed", (2, 4, 6, 3, 4), 7, "BPCT", torch.float16, layout="sliced", first=1),
    Case("streamed", (2, 4, 6, 3, 4), 7, layout="expanded"),
    Case("frames", (2, 3, 5, 4, 8), 7, scale=1e-6, first=1),  # by the careful way, each of these
    Case("short", (2, 16, 5, 4, 8), 7, scale=1e5, each=True),
    Case("short", (2, 16, 5, 4, 8), 7, dtype=torch.bfloat16, scale=1e-7),
    Case("streamed", (2, 3, 5, 3, 5), 7, scale=1e8),
    Case("streamed", (2, 3, 5, 3, 5), 7, scale=1e-8, dtype=torch.bfloat16),
]


def check(fused, case: Case, seed: int, combination: str = "training") -> None:
    """One case against the formula; the combination is the one of training, or any other."""
    samples, channels, frames = case.shape[:3]
    x = draw(case.shape, seed, device=DEVICE) * case.scale
    v = draw(case.shape, seed + 1, device=DEVICE) * case.scale
    x = laid_out(x.to(case.dtype), case.layout).requires_grad_()
    v = laid_out(v.to(case.v_dtype or case.dtype), "plain")
    probe = make_probe(case.form, samples, case.rows, channels, frames, seed + 2, DEVICE)
    weight = draw((samples, case.rows) if case.each else (samples,), seed + 3, device=DEVICE)
    weight = weight.abs() + 0.2
    aligned = case.layout == "plain" and case.shape[3] * case.shape[4] % 8 == 0
    halves = 2 if torch.float32 in (x.dtype, v.dtype) else 1
    kind = fused.cut(channels, frames, case.rows, case.form == "PT", halves, aligned).kind
    assert kind == case.kind

    flow, energy = fused.flow_and_probe(x, v, probe, weight, case.first)
    if combination == "training":
        flow_rate = draw((samples,), seed + 4, device=DEVICE)
        row_rate = weight * (flow_rate[:, None] if case.each else flow_rate)
    else:
        flow_rate = draw((samples,), seed + 4, device=DEVICE) * (combination != "no flow")
        row_rate = draw(weight.shape, seed + 5, device=DEVICE) * (combination != "no energy")
        if combination == "mixed":  # the first sample as in training, the others not
            row_rate[0] = weight[0] * flow_rate[0]
    (flow @ flow_rate + (row_rate * energy).sum()).backward()

    each_rate = row_rate if case.each else row_rate[:, None].expand(-1, case.rows)
    want = formula(x, v, probe, flow_rate.double(), each_rate.double(), case.first)
    # A GPU's matrix units cut off what they add, Triton's interpreter rounds.
    bound = 1e-3 if halves == 1 else 1e-5 if DEVICE == "cuda" else 1e-6
    assert flow.dtype == energy.dtype == torch.float32
    assert relative(flow, want[0]) < 1e-6
    assert relative(energy, want[1] if case.each else want[1].sum(dim=1)) < bound
    rounding = relative(want[2].to(case.dtype), want[2])
    slack = BF16_SLACK if case.dtype == torch.bfloat16 else 1.0
    assert x.grad.dtype == case.dtype and x.grad.shape == x.shape
    # Beside the rounding to its own dtype, which happens once.
    assert relative(x.grad, want[2]) < (1e-3 if case.dtype in HALF else bound) + slack * rounding


@pytest.mark.parametrize("case", CASES, ids=lambda c: f"{c.kind}-{c.form}-{c.layout}-{c.scale:g}")
def test_the_kernel_equals_the_float64_formula(case, fused):
    check(fused, case, seed=CASES.index(case))


@pytest.mark.parametrize(
    ("number", "combination"),
    [(4, "other"), (6, "mixed"), (6, "no flow"), (6, "no energy"), (11, "mixed"), (16, "no flow")],
)
def test_any_combination_of_flow_and_energy_has_its_gradient(number, combination, fused):
    check(fused, CASES[number], seed=7, combination=combination)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_the_energy_alone_and_its_gradient(dtype, fused):
    for shape, form in (((2, 3, 5, 4, 4), "PCT"), ((2, 5, 21, 2, 4), "PT")):
        x = draw(shape, 1, dtype, DEVICE).requires_grad_()
        probe = make_probe(form, 2, 6, *shape[1:3], 2, DEVICE)
        rate = torch.tensor([0.3, -2.0], device=DEVICE)
        energy = fused.probe_energy(x, probe)
        (energy @ rate).backward()
        _, want, gradient = formula(
            x, None, probe, torch.zeros(2, device=DEVICE), rate[:, None].expand(-1, 6).double(), 0
        )
        bound = 1e-6 if dtype == torch.float32 else 1e-3
        assert relative(energy, want.sum(dim=1)) < bound
        assert relative(x.grad, gradient) < bound + relative(gradient.to(dtype), gradient)


def training_case(fused, scale=1.0, shape=(2, 3, 5, 4, 8), dtype=torch.float32):
    x, v = (scale * draw(shape, seed, device=DEVICE) for seed in (1, 2))
    probe = make_probe("PCT", shape[0], 6, *shape[1:3], 3, DEVICE)
    weight = torch.tensor([0.5, 2.0], device=DEVICE)
    x = x.to(dtype).requires_grad_()
    return x, v.to(dtype), probe, weight, fused.flow_and_probe(x, v.to(dtype), probe, weight, 0)


def test_in_training_the_residual_is_read_once(fused):
    x, v, probe, weight, (flow, energy) = training_case(fused)
    rates = weight[:, None].expand(-1, 6).double()
    want = formula(x, v, probe, torch.ones(2, device=DEVICE), rates, 0)[2]
    x.data.fill_(torch.nan)
    (flow + weight * energy).sum().backward()
    assert relative(x.grad, want) < 1e-6
    x, v, probe, weight, (flow, energy) = training_case(fused)
    x.data.fill_(torch.nan)  # any other combination needs the residual again
    (flow + 1.001 * weight * energy).sum().backward()
    assert x.grad.isnan().all()


def test_what_needs_no_gradient_writes_none(fused):
    x, v, probe, weight, wanted = training_case(fused)
    before = x.detach().clone()
    with torch.no_grad():
        flow, energy = fused.flow_and_probe(x, v, probe, weight, 0)
    assert torch.equal(flow, wanted[0]) and torch.equal(energy, wanted[1])
    assert not flow.requires_grad and torch.equal(x, before)


def test_small_gradients_of_float16_do_not_vanish_under_a_loss_scale(fused):
    """A mean over many numbers has gradients below float16's least number until they are scaled."""
    x, v, probe, weight, (flow, energy) = training_case(fused, dtype=torch.float16)
    rate = torch.tensor([2.0**14, 2.0**12], device=DEVICE)
    small = 2.0**-24
    ((small * flow + small * weight * energy) @ rate * 2.0**12).backward()
    rates = small * 2.0**12 * rate.double()
    want = formula(x, v, probe, rates, (rates * weight)[:, None].expand(-1, 6), 0)[2]
    assert relative(x.grad, want) < 2e-3


@pytest.mark.parametrize("dtype", HALF)
def test_what_a_16_bit_gradient_is_scaled_with_is_a_power_of_two(dtype, fused):
    """So scaling does not round it a second time."""
    x, v, probe, weight, _ = training_case(fused, dtype=dtype)
    unit = fused.launch(x.detach(), v, probe, weight, 0, True)[3].double().log2()
    assert relative(unit, unit.round()) < 1e-7


def test_a_sample_of_zeros_and_a_broken_one_stay_apart(fused):
    x, v = draw((3, 3, 5, 2, 4), 1, device=DEVICE), draw((3, 3, 5, 2, 4), 2, device=DEVICE)
    x[0] = v[0]
    x[1, 0, 0, 0, 0] = torch.nan
    x.requires_grad_()
    probe, weight = make_probe("PCT", 3, 6, 3, 5, 3, DEVICE), torch.ones(3, device=DEVICE)
    flow, energy = fused.flow_and_probe(x, v, probe, weight, 0)
    (flow + weight * energy).sum().backward()
    assert flow[0] == energy[0] == 0 and not x.grad[0].any()
    assert flow[1].isnan() and energy[1].isnan()
    assert flow[2].isfinite() and x.grad[2].isfinite().all()


def test_a_few_strong_pixels_do_not_spoil_the_rest(fused):
    """Numbers that float16 cannot hold side by side: the careful way takes tile by tile."""
    x = draw((1, 3, 5, 16, 8), 1, device=DEVICE) * 1e-3
    x[:, 1, 2, :1, :3] *= 1e9
    probe = make_probe("PCT", 1, 6, 3, 5, 3, DEVICE)
    rates = torch.zeros(1, device=DEVICE), torch.ones(1, 6).double().to(DEVICE)
    wanted = formula(x, None, probe, *rates, 0)
    x.requires_grad_()
    fused.probe_energy(x, probe).sum().backward()
    quiet = (slice(None), slice(None), slice(None), slice(8, None))
    assert relative(x.grad[quiet], wanted[2][quiet]) < 1e-5
    assert relative(x.grad, wanted[2]) < 1e-5


def test_the_counters_are_left_at_zero_and_repeated_runs_are_equal(fused):
    runs = []
    for _ in range(3):
        x, _, _, weight, (flow, energy) = training_case(fused, shape=(2, 3, 5, 16, 12))
        (flow + weight * energy).sum().backward()
        runs.append((flow.detach(), energy.detach(), x.grad))
        assert not fused._counter(x.device, 2).any()
    for got in runs[1:]:
        assert all(torch.equal(a, b) for a, b in zip(got, runs[0]))


def test_a_probe_is_prepared_once_and_anew_when_it_changes(fused):
    probe = make_probe("PCT", 2, 6, 3, 5, 3, DEVICE)
    shape = fused.cut(3, 5, 6, False, 2)
    first = fused.prepare(probe, shape)
    assert fused.prepare(probe, shape)[0] is first[0]
    x = draw((2, 3, 5, 2, 4), 1, device=DEVICE)
    before = fused.probe_energy(x, probe)
    probe *= 3
    assert relative(fused.probe_energy(x, probe), 9 * before) < 1e-6


def test_probe_rows_of_any_size_are_seen_alike_well(fused):
    """Rows are brought to one size before they are rounded to float16, and weights are not small
    or large to it either."""
    x, v = draw((2, 3, 5, 2, 4), 1, device=DEVICE).requires_grad_(), torch.zeros(1, device=DEVICE)
    v = v.expand(2, 3, 5, 2, 4).contiguous()
    size = 10.0 ** torch.arange(-9, 9, 3, device=DEVICE)
    probe = make_probe("PCT", 2, 6, 3, 5, 3, DEVICE) * size[:, None, None]
    weight = (1 / size**2).expand(2, -1).contiguous()
    flow, energy = fused.flow_and_probe(x, v, probe, weight, 0)
    (flow + (weight * energy).sum(dim=1)).sum().backward()
    want = formula(x, v, probe, torch.ones(2, device=DEVICE), weight.double(), 0)
    assert ((energy / want[1]) - 1).abs().max() < 2e-6
    assert relative(x.grad, want[2]) < 2e-6


def test_every_kind_of_column_has_a_cut(fused):
    for frames in range(1, 82):
        for channels in (1, 3, 16, 48, 64):
            for rows in (1, 16, 66, 145):
                for halves in (1, 2):
                    for by_channel in (False, True):
                        shape = fused.cut(channels, frames, rows, by_channel, halves)
                        assert shape.width >= rows * shape.copies
                        assert shape.width - rows * shape.copies < 16
                        assert shape.group * shape.copies <= channels**2


@pytest.mark.soak
def test_planted_bugs_are_noticed():
    script = Path(__file__).with_name("mutate_kernels.py")
    ran = subprocess.run([sys.executable, script], capture_output=True, text=True)
    assert ran.returncode == 0, ran.stdout + ran.stderr


# the fused kernel on a GPU

gpu = pytest.mark.gpu

FUZZ = {
    "a": Case("long", (0, 16, 21, 0, 0), 66, dtype=torch.bfloat16),
    "b": Case("long", (0, 16, 21, 0, 0), 70, dtype=torch.bfloat16, each=True, first=1),
    "c": Case("short", (0, 16, 13, 0, 0), 36, dtype=torch.float16),
    "d": Case("short", (0, 16, 13, 0, 0), 36, "BPCT", dtype=torch.float32),
    "e": Case("channel", (0, 16, 21, 0, 0), 16, "PT", torch.bfloat16),
    "f": Case("channel", (0, 48, 31, 0, 0), 28, "PT", torch.float32, each=True),
    "g": Case("frames", (0, 3, 5, 0, 0), 9, "BPCT", torch.bfloat16, torch.float32, first=1),
    "h": Case("streamed", (0, 48, 31, 0, 0), 110, dtype=torch.bfloat16),
    "i": Case("streamed", (0, 16, 21, 0, 0), 66, dtype=torch.float32),
    "j": Case("streamed", (0, 16, 81, 0, 0), 145, dtype=torch.float16, each=True, first=1),
    "k": Case("streamed", (0, 16, 21, 0, 0), 66, dtype=torch.bfloat16, layout="ragged"),
    "l": Case("streamed", (0, 16, 13, 0, 0), 12, "PT", torch.float16, layout="ragged", first=1),
    "m": Case("streamed", (0, 48, 13, 0, 0), 42, "BPCT", torch.float32, layout="ragged"),
    "n": Case("streamed", (0, 16, 13, 0, 0), 36, dtype=torch.bfloat16, layout="permuted"),
    "o": Case("streamed", (0, 5, 9, 0, 0), 8, "PT", torch.float16, layout="sliced"),
    "p": Case("streamed", (0, 16, 5, 0, 0), 20, dtype=torch.float32, layout="expanded", each=True),
    "q": Case("frames", (0, 6, 40, 0, 0), 18, "PT", torch.float32, first=1),
}
FUZZ_CASES = 2176


@gpu
@pytest.mark.parametrize("name", FUZZ)
def test_fuzz(name, fused):
    """2,176 cases in all: sizes, strides, values, scales, combinations of seventeen kernels."""
    model = FUZZ[name]
    for number in range(FUZZ_CASES // len(FUZZ)):
        rng = np.random.default_rng([ord(name), number])
        height, width = (int(n) for n in rng.integers(1, 40, 2))
        if model.layout == "plain":
            width = 8 * math.ceil(width / 8)
        elif height * width % 8 == 0:
            height, width = height | 1, width | 1
        samples = int(rng.integers(1, 5))
        scale = float(10.0 ** rng.integers(-3, 3)) if number % 4 == 0 else 1.0
        case = Case(
            model.kind,
            (samples, *model.shape[1:3], height, width),
            model.rows,
            model.form,
            model.dtype,
            model.v_dtype,
            model.each,
            model.first,
            model.layout,
            scale,
        )
        kinds = ["training", "other", "mixed", "no flow", "no energy"]
        check(fused, case, int(rng.integers(2**31)), kinds[number % len(kinds)])


def large_case(seed, shape=(8, 16, 21, 72, 128), dtype=torch.bfloat16):
    generator = torch.Generator("cuda").manual_seed(seed)
    x, v = (torch.randn(shape, generator=generator, device="cuda").to(dtype) for _ in range(2))
    return x.requires_grad_(), v


@gpu
@pytest.mark.parametrize("form", ["PCT", "PT"])
def test_runs_on_a_gpu_are_equal_to_the_bit(form):
    probe = make_probe(form, 8, 30, 16, 21, 1, "cuda")
    weight = torch.rand(8, 30, device="cuda")
    first = None
    for _ in range(30):
        x, v = large_case(3)
        flow, energy = flow_and_probe(x, v, probe, weight)
        (flow + (weight * energy).sum(dim=1)).mean().backward()
        got = (flow.detach(), energy.detach(), x.grad)
        first = first or got
        assert all(torch.equal(a, b) for a, b in zip(got, first))


@gpu
def test_streams_that_run_side_by_side_do_not_meet():
    probe = make_probe("PCT", 2, 30, 16, 13, 1, "cuda")
    weight = torch.rand(2, device="cuda")
    inputs = [large_case(seed, (2, 16, 13, 40, 64)) for seed in range(4)]
    wanted = [flow_and_probe(x, v, probe, weight) for x, v in inputs]
    streams = [torch.cuda.Stream() for _ in inputs]
    torch.cuda.synchronize()
    got = []
    for _ in range(50):
        for stream, (x, v) in zip(streams, inputs):
            with torch.cuda.stream(stream):
                got.append(flow_and_probe(x, v, probe, weight))
    torch.cuda.synchronize()
    for number, (flow, energy) in enumerate(got):
        assert torch.equal(flow, wanted[number % 4][0])
        assert torch.equal(energy, wanted[number % 4][1])


@gpu
def test_offsets_past_two_to_the_31_are_right(fused):
    x = torch.empty(33, 16, 21, 448, 448, dtype=torch.bfloat16, device="cuda")  # 2.2e9 numbers
    generator = torch.Generator("cuda").manual_seed(1)
    for sample in (x[-1], x[0]):
        sample.copy_(torch.randn(sample.shape, generator=generator, device="cuda"))
    x[1:-1] = 0
    probe = make_probe("PCT", 1, 30, 16, 21, 1, "cuda")
    energy = fused.probe_energy(x.requires_grad_(), probe)
    energy.sum().backward()
    alone = x[-1:].detach().clone().requires_grad_()
    energy_alone = fused.probe_energy(alone, probe)
    energy_alone.sum().backward()
    assert relative(energy[-1:], energy_alone) < 1e-6
    assert relative(x.grad[-1:], alone.grad) < 1e-6
    assert not x.grad[5].any()
    # one sample whose channels lie 2^31 numbers apart
    roomy = torch.zeros(2**31 + 4096, dtype=torch.bfloat16, device="cuda")
    wide = roomy.as_strided((1, 2, 5, 8, 8), (0, 2**31, 64, 8, 1))
    wide.copy_(torch.randn(wide.shape, generator=generator, device="cuda"))
    probe = make_probe("PCT", 1, 6, 2, 5, 1, "cuda")
    want = formula(wide, None, probe, torch.zeros(1).cuda(), torch.ones(1, 6).double().cuda(), 0)
    assert relative(fused.probe_energy(wide, probe), want[1].sum(dim=1)) < 1e-3


@gpu
def test_on_a_gpu_the_public_functions_run_the_kernel_and_float64_runs_torch():
    x, v = large_case(1, (2, 16, 13, 8, 8))
    probe = make_probe("PCT", 2, 30, 16, 13, 1, "cuda")
    with torch.autocast("cuda", torch.bfloat16):
        flow, energy = flow_and_probe(x, v, probe, torch.ones(2, device="cuda"))
    assert type(flow.grad_fn).__name__ == "_FlowAndProbeBackward"
    assert flow.dtype == energy.dtype == torch.float32
    exact = flow_and_probe(x.double(), v, probe, torch.ones(2, device="cuda"))
    assert exact[0].dtype == torch.float64
    assert relative(flow, exact[0]) < 1e-6 and relative(energy, exact[1]) < 1e-3
