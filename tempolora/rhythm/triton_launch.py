"""The fused kernel cut to a problem, given its probe, launched, and put into autograd.

Legend: as in triton_kernels.py; K the probe, D rows of a column.
"""

import math
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.utils.weak import WeakTensorKeyDictionary
from triton.tools.tensor_descriptor import TensorDescriptor

from tempolora.rhythm.triton_kernels import WARPS, fused_kernel


@dataclass(frozen=True)
class Cut:
    """How a problem is cut into tiles, chunks and pieces, and how many programs run at a time."""

    group: int
    """Channels of a tile: all of them, or where a probe sees them one by one, a few."""
    copies: int
    """How often the probe's rows are repeated: for each channel of a group, or once."""
    sizes: tuple[int, ...]
    """Probe rows of each piece."""
    halves: int
    """Float16 numbers that stand for one number: two where the inputs are float32."""
    kind: str
    """One of the kinds in CUTS."""
    rows: int
    pixels: int
    ahead: int
    """Chunks of the next tile that are fetched while a resident one is worked on."""
    stages: int
    """Depth of the pipeline that fetches chunks where the column does not stay on the chip."""
    per_sm: int
    """Programs for each multiprocessor."""

    @property
    def starts(self) -> tuple[int, ...]:
        return tuple(sum(self.sizes[:j]) for j in range(len(self.sizes)))

    @property
    def width(self) -> int:
        return sum(self.sizes)


CUTS = {
    ("channel", 1): (32, 128, 0, 3, 4),
    ("channel", 2): (32, 64, 0, 3, 4),
    ("frames", 1): (32, 64, 2, 1, 3),
    ("frames", 2): (64, 64, 1, 1, 2),
    ("short", 1): (32, 64, 2, 1, 3),
    ("short", 2): (64, 64, 1, 1, 1),
    ("long", 1): (64, 64, 1, 1, 2),
    ("streamed", 1): (64, 64, 1, 3, 2),
    ("streamed", 2): (32, 64, 1, 3, 2),
}
"""Rows, pixels, ahead, stages and per_sm for each kind of column and number of halves: the fastest
that `python -m tempolora.bench kernels --cuts` found on an H200. channel: a tile is one channel,
fetched and stored through descriptors, stages ahead; frames: one chunk; short, long: up to four
chunks or eight, all on the chip; streamed: the rest."""


def cut(
    channels: int, frames: int, rows: int, by_channel: bool, halves: int, aligned: bool = True
) -> Cut:
    """How to cut (C, T) columns and a probe of so many rows, seen by_channel or all together.

    aligned: rows of a tile can be fetched 16 bytes at a time; what cannot is streamed, since its
    many small fetches leave no registers for a column.
    """
    if by_channel and aligned and frames <= 32 and rows <= 64:
        lines, pixels, ahead, stages, per_sm = CUTS["channel", halves]
        if frames <= lines // 2:
            lines, pixels = lines // 2, pixels * 2
        return Cut(1, 1, pieces(rows), halves, "channel", lines, pixels, ahead, stages, per_sm)
    group = min(channels, max(1, 64 // frames)) if by_channel else channels
    sizes = pieces(rows * group if by_channel else rows)
    chunks = -(-group * frames // 64)
    resident = aligned and chunks * halves <= 8 and chunks * sum(sizes) * halves <= 768
    kind = "frames" if chunks == 1 else "short" if chunks <= 4 else "long"
    kind = kind if resident else "streamed"
    lines, pixels, ahead, stages, per_sm = CUTS[kind, halves]
    ahead = min(ahead, -(-group * frames // lines))
    copies = group if by_channel else 1
    return Cut(group, copies, sizes, halves, kind, lines, pixels, ahead, stages, per_sm)


def pieces(rows: int) -> tuple[int, ...]:
    """Cut probe rows into pieces of 64, and what is left into 32 and 16."""
    left = -(-rows // 16) * 16
    sizes = []
    while left:
        sizes.append(min(64, 1 << (left.bit_length() - 1)))
        left -= sizes[-1]
    return tuple(sizes)


_prepared = WeakTensorKeyDictionary()
_counters: dict[tuple[torch.device, int], Tensor] = {}


def _stream(device: torch.device) -> int:
    return torch.cuda.current_stream(device).cuda_stream if device.type == "cuda" else 0


def prepare(probe: Tensor, shape: Cut) -> tuple[Tensor, Tensor]:
    """The probe as the kernel reads it, and the gain of each of its rows.

    (B or 1, rows of the column, halves, probe rows) float16, transposed, padded with zeros, every
    probe row brought to a norm of 8 to 16 by a power of two; and the square of that power,
    (B or 1, probe rows) float32. Kept with the probe until it changes, for the stream that made it.
    """
    key = (shape, _stream(probe.device))
    version = None if probe.is_inference() else probe._version
    kept = _prepared.get(probe, {})
    if version is not None and kept.get(key, (None,))[0] == version:
        return kept[key][1]
    k = probe.detach().float()
    if k.ndim == 2:
        eye = torch.eye(shape.group, device=k.device)
        k = torch.einsum("pt,cd->cpdt", k, eye).flatten(0, 1)
    if k.ndim == 3:
        k = k[None]
    k_BPD = k.transpose(2, 3).flatten(2)
    samples, rows, column = k_BPD.shape
    exponent_BP = (torch.frexp(k_BPD.norm(dim=2))[1] - 4).clamp(-60, 60)
    k_BDP = torch.ldexp(k_BPD, -exponent_BP[:, :, None]).transpose(1, 2)
    padded = -(-column // shape.rows) * shape.rows
    made = k.new_zeros(samples, padded, shape.halves, shape.width, dtype=torch.float16)
    made[:, :column, 0, :rows] = k_BDP.half()
    if shape.halves == 2:
        made[:, :column, 1, :rows] = (k_BDP - k_BDP.half().float()).half()
    gain_BP = k.new_zeros(samples, shape.width)
    gain_BP[:, :rows] = torch.ldexp(torch.ones_like(k_BPD[:, :, 0]), 2 * exponent_BP)
    if version is not None:
        _prepared[probe] = {**kept, key: (version, (made, gain_BP))}
    return made, gain_BP


def _counter(device: torch.device, samples: int) -> Tensor:
    """Zeros that programs count up and set back; a stream's own, since streams run side by side."""
    key = (device, _stream(device))
    if key not in _counters or len(_counters[key]) < samples:
        _counters[key] = torch.zeros(max(samples, 64), dtype=torch.int32, device=device)
    return _counters[key]


def _geometry(*tensors: Tensor) -> tuple[dict[str, int], dict[str, bool | int]]:
    """Strides and sizes for the kernel, and what they have in common.

    FLAT: pixels lie side by side, row after row. UNIT: divides every other stride. ALIKE: the
    tensors have the same strides. WIDE: offsets within a sample need 64 bits.
    """
    shape = tensors[0].shape
    strides = [
        [stride if size > 1 else 0 for size, stride in zip(shape, tensor.stride())]
        for tensor in tensors
    ]
    width, pixels = shape[4], shape[3] * shape[4]
    flat = all(w in ((1,) if width > 1 else (0, 1)) for *_, w in strides) and all(
        h == width or shape[3] == 1 for *_, h, _ in strides
    )
    aligned = flat and all(n % 8 == 0 for *outer, _, _ in strides for n in [*outer, pixels])
    aligned &= all(tensor.data_ptr() % 16 == 0 and 0 not in tensor.stride() for tensor in tensors)
    unit = 8 if aligned else 1
    runtime = {"width": width, "pixels": pixels // unit}
    for name, (b, c, t, h, w) in zip("xvg", strides):
        values = (b // unit, c // unit, t // unit, h, w)
        runtime |= {f"{name}_{axis}": value for axis, value in zip("bcthw", values)}
    span = max(sum((size - 1) * n for size, n in zip(shape[1:], own[1:])) for own in strides)
    return runtime, {
        "FLAT": flat,
        "UNIT": unit,
        "ALIKE": all(own == strides[0] for own in strides),
        "WIDE": span >= 2**31,
    }


def _descriptor(tensor: Tensor, shape: Cut) -> TensorDescriptor:
    """What the memory unit needs to fetch a tile of one channel; pixels count as one dimension."""
    samples, channels, frames, height, width = tensor.shape
    pixels = height * width
    strides = [
        stride if size > 1 else pixels for size, stride in zip(tensor.shape[:3], tensor.stride())
    ]
    size = [samples, channels, frames, pixels]
    return TensorDescriptor(tensor, size, [*strides, 1], [1, 1, shape.rows, shape.pixels])


def _programs(device: torch.device, samples: int, tiles: int, per_sm: int) -> int:
    """Programs per sample: as many as run at a time, but no more than share the tiles evenly."""
    processors = 1
    if device.type == "cuda":
        processors = torch.cuda.get_device_properties(device).multi_processor_count
    most = min(tiles, max(1, processors * per_sm // samples))
    return math.ceil(tiles / math.ceil(tiles / most))


def launch(
    x_BCTHW: Tensor,
    v_BCTHW: Tensor | None,
    probe: Tensor,
    weight: Tensor | None,
    first_frame: int,
    wants_grad: bool,
    again: tuple[Tensor, Tensor, Tensor] | None = None,
    shape: Cut | None = None,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Run the kernel: flow (B,), energy (B,) or (B, P), the gradient, and its unit (B,).

    The gradient of flow + weight * energy is the third times the fourth, a power of two. again:
    where to write the gradient, d_flow and d_energy; samples whose d_energy is weight * d_flow are
    left alone, but for 16-bit gradients with a d_flow that would round them a second time.
    """
    samples, channels, frames, height, width = x_BCTHW.shape
    rows = probe.shape[1] if probe.ndim == 4 else probe.shape[0]
    v = x_BCTHW if v_BCTHW is None else v_BCTHW
    each = weight is not None and weight.ndim == 2
    if again:
        gradient, d_flow, d_energy = again
    else:
        gradient = torch.empty_like(x_BCTHW) if wants_grad else x_BCTHW
    runtime, common = _geometry(x_BCTHW, v, gradient)
    if shape is None:
        halves = 2 if torch.float32 in (x_BCTHW.dtype, v.dtype) else 1
        shape = cut(channels, frames, rows, probe.ndim == 2, halves, common["UNIT"] > 1)
    made, gain = prepare(probe, shape)
    described = shape.kind == "channel"
    tiles = math.ceil(height * width / shape.pixels) * math.ceil(channels / shape.group)
    splits = _programs(x_BCTHW.device, samples, tiles, shape.per_sm)
    # In units of its share in a mean the flow's gradient is a power of two. A 16-bit gradient has
    # a unit that is one itself: scaling by it does not round a second time.
    share = 1.0 / (channels * (frames - first_frame)) if v_BCTHW is not None else 1.0
    exact = gradient.dtype != torch.float32
    if exact:
        share = 2.0 ** math.floor(math.log2(2 * share / (height * width))) * height * width / 2
    new = {"dtype": torch.float32, "device": x_BCTHW.device}
    flow, unit = torch.empty(samples, **new), torch.empty(samples, **new)
    energy = torch.empty((samples, rows) if each else samples, **new)
    table = torch.empty(samples * splits, shape.width + 1 if each else 2, **new)
    if not again:
        d_flow = d_energy = flow
    fused_kernel[(samples * splits,)](
        *(_descriptor(one, shape) if described else None for one in (x_BCTHW, v, gradient)),
        x_BCTHW,
        v,
        gradient,
        made,
        gain,
        flow if weight is None else weight,
        d_flow,
        d_energy,
        table,
        _counter(x_BCTHW.device, samples),
        flow,
        energy,
        unit,
        **runtime,
        splits=splits,
        probe_b=int(probe.ndim == 4),
        share=share,
        one=1.0,
        CHANNELS=channels,
        P=rows,
        COPIES=shape.copies,
        C=shape.group,
        T=frames,
        FIRST=first_frame,
        N=shape.pixels,
        R=shape.rows,
        STARTS=shape.starts,
        SIZES=shape.sizes,
        HALVES=shape.halves,
        RESIDENT=shape.kind != "streamed",
        DESCRIBED=described,
        AHEAD=shape.ahead,
        STAGES=shape.stages,
        HAS_V=v_BCTHW is not None,
        GRAD=wants_grad,
        AGAIN=again is not None,
        EXACT=exact,
        EACH=each,
        **common,
        num_warps=WARPS,
        maxnreg=min(255, 65536 // (32 * WARPS * shape.per_sm) // 8 * 8),
    )
    return flow, energy, gradient, unit


class _FlowAndProbe(torch.autograd.Function):
    @staticmethod
    def forward(ctx, v_hat, v, probe, weight, first_frame):
        wants_grad = ctx.needs_input_grad[0]
        flow, energy, gradient, unit = launch(v_hat, v, probe, weight, first_frame, wants_grad)
        if wants_grad:
            ctx.save_for_backward(v_hat, v, probe, weight, gradient, unit)
            ctx.first_frame = first_frame
        return flow, energy

    @staticmethod
    @once_differentiable
    def backward(ctx, d_flow, d_energy):
        v_hat, v, probe, weight, made, unit = ctx.saved_tensors
        gradient = _scaled(made, d_flow * unit)
        combination = (gradient, d_flow.contiguous(), d_energy.contiguous())
        launch(v_hat, v, probe, weight, ctx.first_frame, True, again=combination)
        return gradient, None, None, None, None


class _ProbeEnergy(torch.autograd.Function):
    @staticmethod
    def forward(ctx, residual, probe):
        wants_grad = ctx.needs_input_grad[0]
        _, energy, gradient, unit = launch(residual, None, probe, None, 0, wants_grad)
        if wants_grad:
            ctx.save_for_backward(residual, probe, gradient, unit)
        return energy

    @staticmethod
    @once_differentiable
    def backward(ctx, d_energy):
        residual, probe, made, unit = ctx.saved_tensors
        gradient = _scaled(made, d_energy * unit)
        if gradient.dtype != torch.float32:
            d_energy = d_energy.contiguous()
            launch(residual, None, probe, None, 0, True, again=(gradient, d_energy, d_energy))
        return gradient, None


def _scaled(gradient_BCTHW: Tensor, factor_B: Tensor) -> Tensor:
    """A new tensor of the same dtype."""
    if gradient_BCTHW.dtype == torch.bfloat16:
        # Holds any power of two, and torch multiplies two of a kind several times faster; samples
        # whose factor is none are computed anew.
        factor_B = factor_B.bfloat16()
    out = torch.empty_like(gradient_BCTHW)
    return torch.mul(gradient_BCTHW, factor_B.view(-1, 1, 1, 1, 1), out=out)


def flow_and_probe(
    v_hat: Tensor, v: Tensor, probe: Tensor, weight: Tensor, first_frame: int
) -> tuple[Tensor, Tensor]:
    """`kernels.flow_and_probe` of arguments that were checked there."""
    weight = weight.detach().to(v_hat.device, torch.float32).contiguous()
    return _FlowAndProbe.apply(v_hat, v, probe, weight, first_frame)


def probe_energy(residual: Tensor, probe: Tensor) -> Tensor:
    """`kernels.probe_energy` of arguments that were checked there."""
    return _ProbeEnergy.apply(residual, probe)
