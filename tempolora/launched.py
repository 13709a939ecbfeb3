"""Which process of how many this is, as the launcher's environment says; nothing heavy imported."""

import os


def launched_by_deepspeed() -> bool:
    """Whether the deepspeed launcher started this process: only it sets these names."""
    return "CROSS_RANK" in os.environ and "LOCAL_SIZE" in os.environ


def place() -> tuple[int, int, int]:
    """(rank, number of processes, rank on this host) from torchrun, deepspeed or srun."""

    for rank, size, local in (
        ("RANK", "WORLD_SIZE", "LOCAL_RANK"),
        # set by srun for its tasks; a batch script's own shell has no SLURM_STEP_NUM_TASKS
        ("SLURM_PROCID", "SLURM_STEP_NUM_TASKS", "SLURM_LOCALID"),
    ):
        if rank in os.environ and size in os.environ:
            return int(os.environ[rank]), int(os.environ[size]), int(os.environ.get(local, "0"))
    return 0, 1, 0
