"""Where the time of a step goes: its kernels by class, and the longest of them."""

import json
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

CLASSES = (  # class of a kernel, and what its name contains; the first that fits
    ("attention backward", ("bprop", "bwd", "attention_backward", "attention_for_cpu_backward")),
    ("attention forward", ("sdpa", "fmha", "flash", "scaled_dot_product")),
    ("copy", ("memcpy", "memset", "aten::copy_", "aten::clone")),
    ("product", ("gemm", "nvjet", "cutlass", "cublas", "xmma", "aten::mm", "addmm", "aten::bmm")),
    ("fused elementwise (triton)", ("triton",)),
    ("optimizer", ("multi_tensor", "adam", "foreach")),
    ("elementwise", ("elementwise", "reduce", "norm", "aten::")),
    ("other", ("",)),
)


def kernel_class(name: str) -> str:
    """What kind of work a kernel does, by its name."""
    return next(kind for kind, parts in CLASSES if any(part in name.lower() for part in parts))


def profiled(step: Callable[[], Any], device: torch.device) -> dict[str, tuple[float, int]]:
    """Milliseconds and launches of each kernel (on a CPU, operator) of one step."""
    activity = getattr(torch.profiler.ProfilerActivity, device.type.upper())
    with torch.profiler.profile(activities=[activity]) as profiler:
        step()
        if device.type == "cuda":
            torch.cuda.synchronize()
    if device.type == "cpu":
        found = profiler.key_averages()
        return {event.key: (event.self_cpu_time_total / 1e3, event.count) for event in found}
    # The trace tells kernels from annotations that span many of them.
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "trace.json"
        profiler.export_chrome_trace(str(path))
        events = json.loads(path.read_text())["traceEvents"]
    kernels: dict[str, tuple[float, int]] = {}
    for event in events:
        if event.get("cat") in ("kernel", "gpu_memcpy", "gpu_memset"):
            ms, count = kernels.get(event["name"], (0.0, 0))
            kernels[event["name"]] = (ms + event["dur"] / 1e3, count + 1)
    return kernels


def show(name: str, kernels: dict[str, tuple[float, int]]) -> None:
    """A variant's time by class of kernel, and the dozen kernels that take longest."""
    classes: dict[str, tuple[float, int]] = {}
    for kernel, (ms, count) in kernels.items():
        before = classes.get(kernel_class(kernel), (0.0, 0))
        classes[kernel_class(kernel)] = (before[0] + ms, before[1] + count)
    whole = sum(ms for ms, _ in kernels.values())
    print(f"\n| {name}: kernels | ms | share | launches |\n| --- | --- | --- | --- |")
    for rows in (classes, kernels):
        for kind, (ms, count) in sorted(rows.items(), key=lambda row: -row[1][0])[:12]:
            label = kind.replace("|", " ")[:90]
            print(f"| {label} | {ms:.1f} | {100 * ms / whole:.1f} % | {count} |", flush=True)
