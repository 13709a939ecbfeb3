"""What the optimizer remembers under DeepSpeed, put together as an engine without ZeRO saves it.

ZeRO gives the optimizer flat partitions: a piece of every adapter, one behind the other, another
piece on every process. Put together by adapter, a checkpoint fits any engine and any number of
processes. 8-bit state cannot be put together, since its blocks of 256 values, which share a scale,
follow the cut: it is saved as it is cut (`optimizer_cut`).
"""

from collections.abc import Iterator
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor, nn

from tempolora.config import Config
from tempolora.launched import uses_deepspeed

MOMENTS = ("exp_avg", "exp_avg_sq")


def optimizer_cut(cfg: Config, processes: int) -> int | None:
    """How many DeepSpeed processes saved optimizer state is cut for; None: it is whole."""
    return processes if uses_deepspeed(cfg) and cfg.train.optimizer == "adamw8bit" else None


def partitions(zero: Any) -> list[Tensor]:
    """This process's flat parameters, which the optimizer updates. zero: of stage 2 or 3."""
    if hasattr(zero, "fp32_partitioned_groups_flat"):  # stage 3
        return zero.fp32_partitioned_groups_flat
    return zero.single_partition_of_fp32_groups


class Piece(NamedTuple):
    """`count` values of an adapter, from `start` on, at `offset` in flat parameter `flat`."""

    flat: Tensor
    offset: int
    start: int
    count: int

    def of(self, memory: dict[Tensor, dict[str, Tensor]], key: str) -> Tensor:
        """Its values in the optimizer's memory."""
        return memory[self.flat][key].narrow(0, self.offset, self.count)


def whole_state(zero: Any, adapters: list[nn.Parameter], device: torch.device) -> dict[str, Tensor]:
    """AdamW's memory by adapter, as `engine.pack_optimizer` names it; none before the first update.

    device: where processes exchange it. Every process must call it.
    """
    memory, flats = zero.optimizer.state, partitions(zero)
    if not memory[flats[0]]:
        return {}
    sizes, shapes = [_size(p) for p in adapters], [_shape(p) for p in adapters]
    packed = {f"{n}.step": memory[flats[0]]["step"] for n in range(len(adapters))}
    for key in MOMENTS:
        # One process has a value and the others 0: as integers their sum keeps its bits.
        total = torch.zeros(sum(sizes), dtype=torch.int32, device=device)
        for mine, piece in zip(total.split(sizes), _pieces(zero, adapters), strict=True):
            if piece:
                values = piece.of(memory, key).view(torch.int32)
                mine[piece.start : piece.start + piece.count] = values.to(device)
        dist.all_reduce(total)
        for n, values in enumerate(total.view(torch.float32).split(sizes)):
            packed[f"{n}.{key}"] = values.view(shapes[n])
    return packed


def take_up_whole(zero: Any, adapters: list[nn.Parameter], packed: dict[str, Tensor]) -> None:
    """Give AdamW's memory of whole adapters to this process's partitions."""
    if not packed:
        return
    memory = zero.optimizer.state
    for flat in partitions(zero):
        memory[flat] = {key: torch.zeros_like(flat) for key in MOMENTS}
        memory[flat]["step"] = packed["0.step"].clone()
    for n, piece in enumerate(_pieces(zero, adapters)):
        if piece:
            for key in MOMENTS:
                values = packed[f"{n}.{key}"].flatten().narrow(0, piece.start, piece.count)
                piece.of(memory, key).copy_(values)


def all_parts(own: dict[str, Tensor], device: torch.device) -> dict[str, Tensor]:
    """The parts of all processes, `process.name`, from the one of each. Every process calls it."""
    parts = {}
    for name, tensor in own.items():
        of_each = [torch.empty_like(tensor, device=device) for _ in range(dist.get_world_size())]
        dist.all_gather(of_each, tensor.to(device).contiguous())
        parts |= {f"{process}.{name}": part for process, part in enumerate(of_each)}
    return parts


def own_part(parts: dict[str, Tensor]) -> dict[str, Tensor]:
    """What this process gave to `all_parts`."""
    mine = f"{dist.get_rank()}."
    return {name.removeprefix(mine): t for name, t in parts.items() if name.startswith(mine)}


def _pieces(zero: Any, adapters: list[nn.Parameter]) -> Iterator[Piece | None]:
    """What this process holds of each adapter."""
    flats = partitions(zero)
    for parameter in adapters:
        if hasattr(parameter, "ds_numel"):  # stage 3: equal pieces, the last one padded
            group, offset, count = zero.grad_position[zero.get_param_id(parameter)]
            start = dist.get_rank() * count
            count = min(count, parameter.ds_numel - start)
            yield Piece(flats[group], offset, start, count) if count > 0 else None
        elif parameter._hp_mapping is None:  # stage 2: all behind each other, cut anywhere
            yield None
        else:
            here = parameter._hp_mapping
            offset, own = here.hp_fragment_address.start, here.lp_fragment_address
            yield Piece(flats[here.param_group_index], offset, own.start, own.numel)


def _size(parameter: nn.Parameter) -> int:
    return getattr(parameter, "ds_numel", parameter.numel())


def _shape(parameter: nn.Parameter) -> torch.Size:
    return getattr(parameter, "ds_shape", parameter.shape)
