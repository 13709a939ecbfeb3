"""What a machine does at best with the model's own shapes, and the floor of a step at that."""

import statistics
import time
from collections.abc import Callable
from typing import Any

import torch
from torch.nn import functional as F
from torch.nn.attention import SDPBackend, sdpa_kernel

from tempolora.config import Config
from tempolora.model.fp8 import CAPABILITY, quantise_rows
from tempolora.model.memory import free_memory
from tempolora.train.work import Work

BACKENDS = {
    "cudnn": SDPBackend.CUDNN_ATTENTION,
    "flash": SDPBackend.FLASH_ATTENTION,
    "efficient": SDPBackend.EFFICIENT_ATTENTION,
}


def products(work: Work) -> dict[tuple[int, int, int], int]:
    """(M, K, N) -> how often in one block's forward, and as often in its backward, which swaps
    K and N: q, k, v, o, the cross-attention's q and o, and the feed-forward's two."""
    L, D, F_ = work.all_tokens, work.width, work.ffn
    return {(L, D, D): 6, (L, D, F_): 1, (L, F_, D): 1}


def milliseconds(call: Callable[[], Any], device: torch.device, repeats: int = 5) -> float:
    """Median time of a call, after one to warm up."""
    call()
    times = []
    for _ in range(repeats):
        if device.type == "cuda":
            begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
            begin.record()
            call()
            end.record()
            end.synchronize()
            times.append(begin.elapsed_time(end))
        else:
            start = time.perf_counter()
            call()
            times.append(1e3 * (time.perf_counter() - start))
    return statistics.median(times)


def measure(work: Work, dtype: torch.dtype, device: torch.device) -> dict[str, Any]:
    """Milliseconds of the model's own products and attention, GB/s of a copy."""
    has_fp8 = device.type == "cuda" and torch.cuda.get_device_capability(device) >= CAPABILITY
    found: dict[str, Any] = {"plain": {}, "fp8": {}, "attention": {}}
    for M, K, N in products(work):
        a, b = (torch.randn(*size, device=device).to(dtype) for size in ((M, K), (N, K)))
        name = f"{M}x{K}x{N}"
        found["plain"][name] = milliseconds(lambda a=a, b=b: F.linear(a, b), device)
        if has_fp8:
            (a8, sa), (b8, sb) = quantise_rows(a), quantise_rows(b)
            found["fp8"][name] = milliseconds(
                lambda a8=a8, sa=sa, b8=b8, sb=sb: torch._scaled_mm(
                    a8,
                    b8.t(),
                    scale_a=sa,
                    scale_b=sb.view(1, -1),
                    out_dtype=torch.bfloat16,
                    use_fast_accum=True,
                ),
                device,
            )
            del a8, sa, b8, sb
        del a, b
    for name, backend in (BACKENDS if device.type == "cuda" else {"math": SDPBackend.MATH}).items():
        try:
            found["attention"][name] = _attention_times(work, dtype, device, backend)
        except RuntimeError as error:  # this backend takes other shapes, or another GPU
            print(f"attention {name}: {str(error).splitlines()[0]}", flush=True)
    found["copy_gb_s"] = _copy_rate(device)
    free_memory(device)
    return found


def _copy_rate(device: torch.device) -> float:
    x = torch.empty(2**28 if device.type == "cuda" else 2**24, device=device)
    y = torch.empty_like(x)
    return 2 * x.nbytes / milliseconds(lambda: y.copy_(x), device) / 1e6


def _attention_times(
    work: Work, dtype: torch.dtype, device: torch.device, backend: SDPBackend
) -> dict[str, float]:
    """Of one self-attention, laid out in memory as the model's: token, head, channel."""
    sizes = (work.batch, work.tokens, work.heads, work.width // work.heads)
    q, k, v, grad = (torch.randn(sizes, device=device).to(dtype).transpose(1, 2) for _ in range(4))
    inputs = [x.requires_grad_() for x in (q, k, v)]
    with sdpa_kernel(backend):
        forward = milliseconds(lambda: F.scaled_dot_product_attention(q, k, v), device)
        out = F.scaled_dot_product_attention(q, k, v)
    backward = milliseconds(
        lambda: torch.autograd.grad(out, inputs, grad, retain_graph=True), device
    )
    return {"forward": forward, "backward": backward}


def floor_seconds(
    work: Work, ceilings: dict[str, Any], cfg: Config, levels: list[str]
) -> tuple[float, float] | None:
    """(seconds of a step at these rates, the same with what the levels recompute).

    Products and self-attention alone; None where the rate of the base's number format is unknown.
    """
    times = ceilings["fp8" if cfg.model.base == "fp8" else "plain"]
    attention = ceilings["attention"]
    if not times or not attention:
        return None
    best = min(attention.values(), key=lambda t: t["forward"] + t["backward"])
    linear = sum(times[f"{M}x{K}x{N}"] * n for (M, K, N), n in products(work).items())
    # the feed-forward's second product is read by nothing that the backward needs
    again = linear - times[f"{work.all_tokens}x{work.ffn}x{work.width}"]
    repeated = {
        "none": 0,
        "matmuls": 0,
        "hosted": 0,
        "attention": again,
        "offload": again,
        "full": again + best["forward"],
    }
    model = work.blocks * (2 * linear + best["forward"] + best["backward"])
    return model / 1e3, (model + sum(repeated.get(level, 0) for level in levels)) / 1e3


def show(work: Work, ceilings: dict[str, Any]) -> None:
    """The machine's own rates as a table."""
    print("| ceiling | ms | TFLOP/s |\n| --- | --- | --- |")
    for kind in ("plain", "fp8"):
        for name, ms in ceilings[kind].items():
            M, K, N = map(int, name.split("x"))
            print(f"| {kind} product {name} | {ms:.3f} | {2 * M * K * N / ms / 1e9:.0f} |")
    flops = 4 * work.all_tokens * work.tokens * work.width
    for name, times in ceilings["attention"].items():
        # a backward computes five products where the forward computes two
        for way, factor in (("forward", 1.0), ("backward", 2.5)):
            rate = factor * flops / times[way] / 1e9
            print(f"| attention {name} {way} | {times[way]:.2f} | {rate:.0f} |")
    print(f"| copy, read and written | | {ceilings['copy_gb_s']:.0f} GB/s |", flush=True)
