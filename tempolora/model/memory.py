"""Memory of this process: what dropped models give back, and the most that it held."""

import gc
import resource
import sys

import torch


def free_memory(device: torch.device) -> None:
    """Give back what dropped models held: hooks and parametrisations leave reference cycles."""
    gc.collect()
    if device.type == "cuda":
        torch.cuda.empty_cache()


def host_peak() -> int:
    """The most host memory that this process has held so far, bytes."""
    unit = 1 if sys.platform == "darwin" else 1024
    return unit * resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
