"""Which process of how many this is, as the launcher's environment says, and which engine goes with
that; nothing heavy imported."""

import os

from tempolora.config import Config, ConfigError


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


def uses_deepspeed(cfg: Config) -> bool:
    """Whether this run's engine is DeepSpeed: by configuration, or by its launcher."""
    engine = cfg.parallel.engine
    return engine == "deepspeed" or (engine == "auto" and launched_by_deepspeed())


def needs_whole_model(cfg: Config) -> bool:
    """Whether weights or inputs come and go by our own hand, which sharding engines cannot bear."""
    return cfg.model.placement == "host" or cfg.train.checkpointing == "offload"


def check_engine(cfg: Config, processes: int) -> None:
    """Raise ConfigError where `parallel.engine`, `context` or `shard_over` does not go with the
    number of processes, or DeepSpeed with the base or its place."""
    engine, context = cfg.parallel.engine, cfg.parallel.context
    if processes % context:
        raise ConfigError(
            f"parallel.context: {context} processes share each clip, and {processes} cannot be "
            f"divided into groups of {context}; start a multiple of {context}"
        )
    shared = cfg.parallel.shard_over
    if isinstance(shared, int) and processes % shared:
        raise ConfigError(
            f"parallel.shard_over: {shared} processes share one copy of the base, and {processes} "
            f"cannot be divided into groups of {shared}; start a multiple of {shared}"
        )
    if cfg.model.base == "fp8" and uses_deepspeed(cfg):
        raise ConfigError(
            'model.base: "fp8" does not go with DeepSpeed, whose ZeRO partitions no 8-bit weights; '
            'use "bf16", or parallel.engine "fsdp" or "ddp" under torchrun'
        )
    if cfg.model.base == "nf4" and uses_deepspeed(cfg):
        raise ConfigError(
            'model.base: "nf4" weights are whole on every GPU, and DeepSpeed shards them; start '
            'with torchrun, or use "bf16"'
        )
    if cfg.train.host_blocks and (uses_deepspeed(cfg) or engine == "fsdp"):
        raise ConfigError(
            "train.host_blocks: has only been made for bases that are whole on every GPU; leave it "
            'out, or use parallel.engine "ddp"'
        )
    if engine == "plain" and processes > 1:
        raise ConfigError(
            f'parallel.engine: "plain" runs on one process, {processes} were started; '
            'use "auto", "ddp", "fsdp" or "deepspeed"'
        )
    if engine in ("ddp", "fsdp") and processes == 1:
        raise ConfigError(
            f'parallel.engine: "{engine}" has nothing to share with one process; start several '
            'with torchrun, or use "auto"'
        )
    if uses_deepspeed(cfg) and needs_whole_model(cfg):
        raise ConfigError(
            "parallel.engine: under the deepspeed launcher model.placement host and "
            "train.checkpointing offload do not work; start with torchrun, or leave them to "
            "parallel.deepspeed's offload_param"
        )
