"""Which speeds of a clip an adapter is trained on, and how strong it is there.

A rhythm adapter sees clips at their own speed. A tempo adapter sees them faster and slower, in
turns, at strength log2(speed): at strength 0, the clip's own speed, it is the base model whatever
its weights, so there is nothing to learn there.
"""

from torch import nn

from tempolora.config import ConfigError
from tempolora.data.shards import ShardReader
from tempolora.model.lora import set_lora_scale
from tempolora.train.step import Batch

TEMPO = "tempo"
GROUPS = {"rhythm": ("at its own speed",), TEMPO: ("faster", "slower")}


def speed_groups(kind: str, reader: ShardReader, positions: list[int]) -> list[list[int]]:
    """Positions to draw from in turns: those at speed 1, or the faster and the slower ones.

    kind: lora.kind. Raises ConfigError where a group is empty.
    """
    groups = {name: [p for p in positions if _group(reader, p) == name] for name in GROUPS[kind]}
    for name, group in groups.items():
        if not group:
            raise ConfigError(
                f"data.shards: no clip to train on is there {name}; give longer clips for faster "
                "ones, clips of a higher frame rate for slower ones, and precompute again"
            )
    return list(groups.values())


def of_each_group(kind: str, reader: ShardReader, clips: list[list[int]]) -> list[int]:
    """To measure the loss on: the first sample of each clip in each group, where it has one."""
    return [
        position
        for clip in clips
        for name in GROUPS[kind]
        for position in [p for p in clip if _group(reader, p) == name][:1]
    ]


def _group(reader: ShardReader, position: int) -> str:
    speed = reader.speed(position)
    return "at its own speed" if speed == 1 else "faster" if speed > 1 else "slower"


def follow_speed(kind: str, transformer: nn.Module, batch: Batch) -> None:
    """Give a tempo adapter the strength that the batch's speeds ask for."""
    if kind == TEMPO:
        set_lora_scale(transformer, batch.speed_B.log2())
