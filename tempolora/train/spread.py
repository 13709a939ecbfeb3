"""How a frozen transformer is shared out among processes before its weights are read.

What `spread_of` returns is for `tempolora.model.wan.load_transformer`: given the transformer on
meta it shards it, with memory for this process's part alone, and the loader then reads that part
and no more. FSDP2 gives each process some rows of every weight, ZeRO-3 some of its elements.
Adapters come later, and are nobody's but the engine's.
"""

import logging
import socket
import zlib
from datetime import timedelta
from functools import partial

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp import fully_shard

from tempolora.config import Config, ConfigError
from tempolora.model.wan import Here, Spread
from tempolora.train.auto import card_here
from tempolora.train.engine import deepspeed_config
from tempolora.train.heartbeat import LOADING
from tempolora.train.plan import changed, fitting, with_engine
from tempolora.train.world import World

log = logging.getLogger(__name__)


def spread_of(kind: str, cfg: Config, world: World) -> Spread | None:
    """How engine `kind` shares the base out; None where each process holds it whole.

    Every process must call it. Raises ConfigError where `parallel.shard_over` does not go with the
    processes, or DeepSpeed is to hold weights in a way that cannot be read into.
    """
    if kind == "fsdp":
        return partial(_by_rows, mesh=_mesh(cfg, world, sharers(cfg, world)))
    if kind == "deepspeed" and cfg.parallel.zero_stage != 2:
        _check_partitions(cfg)
        return partial(_by_elements, config=deepspeed_config(cfg, world), world=world)
    return None


# --- FSDP2 ----------------------------------------------------------------------------------------


def sharers(cfg: Config, world: World) -> int:
    """How many processes in a row share one copy of the base under FSDP2.

    Where `parallel.shard_over` is null and there are several hosts, those of a host if a part of
    that size is predicted to fit: weights then cross no network. Else all.
    """
    asked = cfg.parallel.shard_over
    if isinstance(asked, int):
        return asked
    near = _each_hosts(world)
    if asked == "node":
        if near is None:
            raise ConfigError(
                'parallel.shard_over: "node" needs as many processes of a run, at least 2, on each '
                "host; give a number, or leave it out"
            )
        return near
    if near in (None, world.size):
        return world.size
    fits = bool(
        fitting(changed(with_engine(cfg, "fsdp"), {"parallel.shard_over": near}), card_here(world))
    )
    size = near if fits else world.size
    why = "one host's part is" if fits else "one host's part is not"
    log.info("parallel.shard_over: null chose %d: %s predicted to fit", size, why)
    return size


def _each_hosts(world: World) -> int | None:
    """Processes on each host; None where hosts have not the same number of them, or only one."""
    name = zlib.crc32(socket.gethostname().encode())
    names = torch.tensor([name], dtype=torch.int64, device=world.device)
    parts = [torch.empty_like(names) for _ in range(world.size)]
    dist.all_gather(parts, names)
    return in_runs([part.item() for part in parts])


def in_runs(names: list[int]) -> int | None:
    """Length of the runs of equal names, if all are as long and longer than one."""
    count = len(names) // len(set(names))
    runs = [names[at : at + count] for at in range(0, len(names), count)]
    alike = all(len(run) == count and len(set(run)) == 1 for run in runs)
    return count if alike and count > 1 else None


def _mesh(cfg: Config, world: World, size: int) -> DeviceMesh:
    """The processes that share our copy. The base is frozen, so that copies have nothing to tell
    each other, and one dimension is enough."""
    if size == world.size:
        return init_device_mesh(world.device.type, (size,))
    timeout = timedelta(minutes=LOADING * cfg.parallel.timeout_minutes)
    group, _ = dist.new_subgroups(group_size=size, timeout=timeout)
    return DeviceMesh.from_group(group, world.device.type)


def _by_rows(transformer: nn.Module, mesh: DeviceMesh) -> Here:
    for block in transformer.blocks:
        fully_shard(block, mesh=mesh)
    fully_shard(transformer, mesh=mesh)
    if next(transformer.parameters()).is_meta:
        transformer.to_empty(device=_device(mesh.device_type))

    def here(weight: Tensor) -> tuple[Tensor, int]:
        rows = -(-weight.shape[0] // mesh.size())  # of each process but the last ones
        begin = rows * mesh.get_local_rank() * (weight.numel() // weight.shape[0])
        return weight.to_local().detach().view(-1), begin

    return here


def _device(kind: str) -> torch.device:
    return torch.device(kind, torch.cuda.current_device()) if kind == "cuda" else torch.device(kind)


# --- ZeRO-3 ---------------------------------------------------------------------------------------

_ELSEWHERE = (
    "zero_hpz_partition_size",
    "zero_quantized_weights",
    "zero_quantized_nontrainable_weights",
    "mics_shard_size",
)


def _check_partitions(cfg: Config) -> None:
    zero = cfg.parallel.deepspeed.get("zero_optimization", {})
    for key in _ELSEWHERE:
        if zero.get(key):
            raise ConfigError(
                f"parallel.deepspeed: {key} holds weights twice or rounded, which they cannot be "
                "read into; leave it out"
            )
    if (zero.get("offload_param") or {}).get("device") == "nvme":
        raise ConfigError(
            'parallel.deepspeed: offload_param to "nvme" cannot be read into; offload to "cpu"'
        )


def _by_elements(transformer: nn.Module, config: dict, world: World) -> Here:
    import deepspeed

    # DeepSpeed shares out weights that each process holds whole. Their values are read later, so
    # that all can lie in the same memory, that of the largest.
    metas = [weight for weight in transformer.parameters() if weight.is_meta]
    bytes_ = max((weight.nbytes for weight in metas), default=0)
    common = torch.empty(bytes_, dtype=torch.uint8, device=world.device)
    for module in transformer.modules():
        for name, weight in module.named_parameters(recurse=False):
            if weight.is_meta:
                whole = common[: weight.nbytes].view(weight.dtype).view(weight.shape)
                setattr(module, name, nn.Parameter(whole, requires_grad=False))
    deepspeed.zero.Init(module=transformer, config_dict_or_path=config)

    def here(weight: Tensor) -> tuple[Tensor, int]:
        begin = world.rank * weight.ds_tensor.ds_numel
        count = min(weight.ds_tensor.ds_numel, max(0, weight.ds_numel - begin))
        return weight.ds_tensor[:count], begin

    return here
