"""Memory between two models: the one that was dropped gives all of its own back."""

import gc

import torch


def free_memory(device: torch.device) -> None:
    """Give back what dropped models held: hooks and parametrisations leave reference cycles."""
    gc.collect()
    if device.type == "cuda":
        torch.cuda.empty_cache()
