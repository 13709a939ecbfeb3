"""How fast are the fused rhythm kernels? Measured against the machine's own rates and two rivals.

Times are medians of CUDA graph replays over several sets of inputs, so that neither launches nor
the L2 cache count. The floor of a shape is the larger of its bytes (prediction and target read,
gradient written) over the measured copy rate and its FLOPs over the measured matmul rate of the
precision used: float16 products for 16-bit inputs, three of them for float32.
"""

import argparse
import dataclasses
import functools
import itertools
import os
import statistics
import sys
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from multiprocessing import get_context

import torch
from torch import Tensor

from tempolora.rhythm.kernels import flow_and_probe

SHAPES = ((8, 16, 21, 90, 160), (8, 16, 13, 72, 128), (16, 16, 21, 90, 160), (4, 48, 31, 44, 80))
ROWS = {"readout": {13: 36, 21: 66, 31: 110}, "channel": {13: 10, 21: 16, 31: 26}}
"""Probe rows by latent frames: cosine and sine of each bin that is kept, seen through a readout at
the full frame rate, or in each channel by itself."""
DTYPES = {"bf16": torch.bfloat16, "fp32": torch.float32}
SETS = 4
REPLAYS = 20


@dataclass(frozen=True)
class Job:
    """form: "readout", a probe (P, C, T); "channel", one of (P, T)."""

    shape: tuple[int, int, int, int, int]
    form: str
    dtype: str

    @property
    def rows(self) -> int:
        return ROWS[self.form][self.shape[2]]

    @property
    def bytes(self) -> int:
        return 3 * torch.Size(self.shape).numel() * DTYPES[self.dtype].itemsize

    @property
    def flops(self) -> int:
        columns = self.rows * (1 if self.form == "channel" else self.shape[1])
        seen = columns * torch.Size(self.shape).numel() // self.shape[1]
        return 4 * seen * (self.shape[1] if self.form == "channel" else 1)


@dataclass(frozen=True)
class Times:
    """Microseconds: the forward pass with its gradient, and forward and backward of all three."""

    forward: float
    both: float
    fft: float
    matmuls: float


def main(argv: list[str]) -> None:
    parser = argparse.ArgumentParser(prog="python -m tempolora.bench kernels", description=__doc__)
    parser.add_argument("--cuts", action="store_true", help="try ways to cut a problem instead")
    chosen = parser.parse_args(argv)
    if not torch.cuda.is_available():
        sys.stderr.write("this measurement needs a CUDA device, and there is none\n")
        sys.exit(2)
    if chosen.cuts:
        try_cuts()
        return
    jobs = [Job(*job) for job in itertools.product(SHAPES, ROWS, DTYPES)]
    in_processes(functools.partial(measure, sets=1, replays=1), jobs)
    copy, halves, tf32 = copy_rate(), matmul_rate(torch.float16), matmul_rate(torch.float32)
    sys.stdout.write(
        f"{torch.cuda.get_device_name()}: copy {copy / 1e12:.2f} TB/s; "
        f"matmul float16 {halves / 1e12:.0f}, tf32 {tf32 / 1e12:.0f} TFLOP/s\n\n"
    )
    head = "shape | form | dtype | us | TB/s | of copy rate | of floor | us with backward"
    sys.stdout.write(f"| {head} | x torch.fft | x two matmuls |\n|{' --- |' * 10}\n")
    for job in jobs:
        times = measure(job)
        rate = halves / (3 if job.dtype == "fp32" else 1)
        floor = max(job.bytes / copy, job.flops / rate) * 1e6
        cells = [
            "x".join(map(str, job.shape)),
            f"{job.form} P={job.rows}",
            job.dtype,
            f"{times.forward:.1f}",
            f"{job.bytes / times.forward / 1e6:.2f}",
            f"{job.bytes / copy * 1e6 / times.forward:.0%}",
            f"{floor / times.forward:.0%}",
            f"{times.both:.1f}",
            f"{times.fft / times.both:.1f}",
            f"{times.matmuls / times.both:.1f}",
        ]
        sys.stdout.write(f"| {' | '.join(cells)} |\n")
        sys.stdout.flush()


def in_processes(work: Callable, items: list) -> list:
    """Do the work for each item in processes of its own: kernels are compiled side by side."""
    with ProcessPoolExecutor(os.cpu_count(), mp_context=get_context("spawn")) as pool:
        return list(pool.map(work, items))


def copy_rate() -> float:
    """Bytes per second of a large copy on the device, read and written.

    Without a graph, in which it would go by the copy engine, at two thirds of the rate.
    """
    one = torch.randn(2**29, device="cuda")
    two = torch.empty_like(one)
    times = [events_us(lambda: two.copy_(one)) for _ in range(REPLAYS)]
    return 2 * one.numel() * 4 / statistics.median(times) * 1e6


def matmul_rate(dtype: torch.dtype) -> float:
    """FLOP per second of a large product of random numbers; float32 by way of tf32."""
    torch.set_float32_matmul_precision("high")
    size = 8192
    a, b = (torch.randn(size, size, device="cuda").to(dtype) for _ in range(2))
    return 2 * size**3 / replay_us(torch.mm, [(a, b)]) * 1e6


def replay_us(call: Callable, inputs: list[tuple], replays: int = REPLAYS) -> float:
    """Median microseconds of one call, from replays of a graph with one call for each input."""
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for one in inputs * 2:
            call(*one)
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph, stream=stream):
        for one in inputs:
            call(*one)
    return statistics.median(events_us(graph.replay) for _ in range(replays)) / len(inputs)


def events_us(call: Callable) -> float:
    start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    start.record()
    call()
    end.record()
    end.synchronize()
    return start.elapsed_time(end) * 1e3


def inputs(job: Job, sets: int) -> list[tuple[Tensor, Tensor]]:
    generator = torch.Generator("cuda").manual_seed(0)
    made = []
    for _ in range(sets):
        v_hat, v = (
            torch.randn(job.shape, generator=generator, device="cuda").to(DTYPES[job.dtype])
            for _ in range(2)
        )
        made.append((v_hat.requires_grad_(), v))
    return made


def draw_probe(job: Job) -> Tensor:
    """A random probe of unit norm: what is in it costs no time."""
    _, channels, frames, _, _ = job.shape
    shape = (job.rows, frames) if job.form == "channel" else (job.rows, channels, frames)
    probe = torch.randn(shape, generator=torch.Generator().manual_seed(1))
    return (probe / probe.norm()).cuda()


def measure(job: Job, sets: int = SETS, replays: int = REPLAYS) -> Times:
    torch.set_float32_matmul_precision("high")
    probe = draw_probe(job)
    weight = torch.full((job.shape[0],), 0.05, device="cuda")
    data = inputs(job, sets)

    def forward(v_hat, v):
        return flow_and_probe(v_hat, v, probe, weight)

    def both(v_hat, v, sums=forward):
        flow, energy = sums(v_hat, v)
        return torch.autograd.grad((flow + weight * energy).mean(), v_hat)

    fft = functools.partial(by_fft, probe=probe, form=job.form)
    matmuls = functools.partial(by_matmuls, probe=probe)
    torch._dynamo.reset()  # else it gives up compiling after a few shapes
    compiled = torch.compile(matmuls, dynamic=False)
    return Times(
        forward=replay_us(forward, data, replays),
        both=replay_us(both, data, replays),
        fft=replay_us(functools.partial(both, sums=fft), data, replays),
        matmuls=replay_us(functools.partial(both, sums=compiled), data, replays),
    )


def by_fft(v_hat: Tensor, v: Tensor, probe: Tensor, form: str) -> tuple[Tensor, Tensor]:
    """The spectral term as one would write it: readout or not, detrend, Hann, rfft, weights."""
    e = v_hat.float() - v.float()
    frames = e.shape[2]
    if form == "readout":
        samples = 4 * (frames - 1)
        matrix = probe[torch.arange(samples, device=probe.device) % len(probe)]
        x = torch.einsum("sct,bcthw->bshw", matrix, e)[:, None]
    else:
        samples, x = frames - 1, e[:, :, 1:]
    time = torch.linspace(-1, 1, samples, device=e.device)[:, None, None]
    slope = (x * time).sum(dim=2, keepdim=True) / time.square().sum()
    x = x - x.mean(dim=2, keepdim=True) - slope * time
    window = torch.hann_window(samples, device=e.device)[:, None, None]
    power = torch.fft.rfft(x * window, dim=2).abs().square()
    kept = torch.zeros(samples // 2 + 1, device=e.device)
    kept[3:] = 1.0
    energy = (power * kept[:, None, None]).sum(dim=(1, 2)).mean(dim=(1, 2))
    return e.square().mean(dim=(1, 2, 3, 4)), energy


def by_matmuls(v_hat: Tensor, v: Tensor, probe: Tensor) -> tuple[Tensor, Tensor]:
    """y = K e as a matrix product, its gradient by autograd; compiled by the caller, in tf32."""
    e = v_hat.float() - v.float()
    if probe.ndim == 2:
        y = probe @ e.flatten(3)
    else:
        y = (probe.flatten(1) @ e.flatten(3).flatten(1, 2))[:, None]
    return e.square().mean(dim=(1, 2, 3, 4)), y.square().sum(dim=(1, 2)).mean(dim=1)


CANDIDATES = {
    ("channel", 1): [(32, 128, 0, 2, 4), (32, 128, 0, 3, 4), (32, 128, 0, 4, 3), (32, 64, 0, 3, 4),
                     (32, 256, 0, 3, 2)],
    ("channel", 2): [(32, 64, 0, 2, 4), (32, 64, 0, 3, 4), (32, 64, 0, 4, 3), (32, 128, 0, 3, 3)],
    ("frames", 1): [(64, 64, 1, 1, 2), (64, 64, 1, 1, 3), (32, 64, 2, 1, 3), (32, 64, 2, 1, 4)],
    ("frames", 2): [(64, 64, 1, 1, 2), (64, 64, 1, 1, 3), (32, 64, 2, 1, 3)],
    ("short", 1): [(64, 64, 1, 1, 2), (64, 64, 1, 1, 3), (32, 64, 2, 1, 2), (32, 64, 2, 1, 3)],
    ("short", 2): [(64, 64, 1, 1, 1), (64, 64, 1, 1, 2), (32, 64, 1, 1, 1)],
    ("long", 1): [(64, 64, 1, 1, 2), (32, 64, 1, 1, 2), (32, 64, 2, 1, 2), (32, 64, 3, 1, 2)],
    ("streamed", 1): [(64, 64, 1, 2, 2), (64, 64, 1, 3, 2), (32, 64, 1, 3, 2), (32, 64, 1, 4, 3)],
    ("streamed", 2): [(64, 64, 1, 2, 2), (32, 64, 1, 2, 2), (32, 64, 1, 3, 2)],
}  # fmt: skip
"""Rows, pixels, ahead, stages and per_sm to try for each kind of column, as in CUTS."""
TRIALS = {
    ("channel", 1): Job(SHAPES[0], "channel", "bf16"),
    ("channel", 2): Job(SHAPES[0], "channel", "fp32"),
    ("frames", 1): Job((8, 3, 21, 90, 160), "readout", "bf16"),
    ("frames", 2): Job((8, 3, 21, 90, 160), "readout", "fp32"),
    ("short", 1): Job(SHAPES[1], "readout", "bf16"),
    ("short", 2): Job(SHAPES[1], "readout", "fp32"),
    ("long", 1): Job(SHAPES[0], "readout", "bf16"),
    ("streamed", 1): Job(SHAPES[3], "readout", "bf16"),
    ("streamed", 2): Job(SHAPES[0], "readout", "fp32"),
}


def try_cuts() -> None:
    """Print the time of each candidate, and the CUTS that follow."""
    trials = [(key, candidate) for key in TRIALS for candidate in CANDIDATES[key]]
    in_processes(functools.partial(time_cut, sets=1, replays=1), trials)
    best = {}
    for key, candidate in trials:
        taken = time_cut((key, candidate))
        sys.stdout.write(f"{key} {candidate} {taken:.1f} us\n")
        if not taken > best.get(key, (float("inf"),))[0]:
            best[key] = taken, candidate
    sys.stdout.write("CUTS = {\n")
    for key, (_, candidate) in best.items():
        sys.stdout.write(f'    ("{key[0]}", {key[1]}): {candidate},\n')
    sys.stdout.write("}\n")


def time_cut(trial: tuple[tuple[str, int], tuple], sets: int = SETS, replays: int = REPLAYS):
    """Microseconds of one candidate; infinite where the device cannot hold it."""
    from triton.runtime.errors import OutOfResources

    from tempolora.rhythm import triton_launch

    (kind, halves), candidate = trial
    job = TRIALS[kind, halves]
    _, channels, frames, _, _ = job.shape
    shape = triton_launch.cut(channels, frames, job.rows, job.form == "channel", halves)
    names = ("rows", "pixels", "ahead", "stages", "per_sm")
    shape = dataclasses.replace(shape, kind=kind, **dict(zip(names, candidate)))
    probe, weight = draw_probe(job), torch.full((job.shape[0],), 0.05, device="cuda")

    def forward(v_hat, v):
        triton_launch.launch(v_hat, v, probe, weight, 0, True, shape=shape)

    try:
        return replay_us(forward, inputs(job, sets), replays)
    except OutOfResources:
        return float("inf")
