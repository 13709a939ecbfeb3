"""`train.deterministic`: the same bits again on the same GPUs.

torch takes deterministic kernels, or refuses where there is none. Attention goes to flash, whose
backward pass then adds up in a fixed order: torch leaves cuDNN's out in this mode. Nothing is tuned
by the clock, which could choose other kernels in another process.
"""

import os

import torch
import torch._inductor.config as inductor


def make_deterministic() -> None:
    """For the whole process; to be called before anything lies on a GPU."""
    os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
    torch.use_deterministic_algorithms(True)
    torch.utils.deterministic.fill_uninitialized_memory = False  # we read none
    torch.backends.cudnn.benchmark = False
    if hasattr(inductor, "deterministic"):  # from torch 2.9 on
        inductor.deterministic = True
