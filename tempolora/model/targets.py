"""Which layers and rows a LoRA adapts, by their names and sizes alone.

Nothing heavy is imported here: the planner counts adapters without building any.
"""

from typing import Any

from tempolora.config import ConfigError, LoraConfig
from tempolora.timebase import TimeBase

ROPE_THETA = 10000.0
MIN_TURN_RAD = 0.5  # a RoPE pair that turns less over the clip carries content rather than time

ATTENTION = ("to_q", "to_k", "to_v", "to_out.0")
TARGETS = {
    "temporal": ("attn1.to_q", "attn1.to_k"),
    "qk": ("attn1.to_q", "attn1.to_k"),
    "self_attention": tuple(f"attn1.{name}" for name in ATTENTION),
    "all_linear": (
        *(f"{attention}.{name}" for attention in ("attn1", "attn2") for name in ATTENTION),
        "ffn.net.0.proj",
        "ffn.net.2",
    ),
}


def time_channels(head_dim: int) -> int:
    """Channels of each head that RoPE turns with time; they come first, in interleaved pairs.

    The split is that of diffusers' WanRotaryPosEmbed: 44 of 128.
    """
    return head_dim - 2 * (2 * (head_dim // 6))


def time_rows(timebase: TimeBase, head_dim: int = 128) -> int:
    """Rows per head whose RoPE pair turns by more than 0.5 rad from the first latent frame to the
    last: 16 at 13 latent frames, 18 at 21, 20 at 31."""
    channels = time_channels(head_dim)
    steps = timebase.latent_frames - 1
    turns = [steps * ROPE_THETA ** (-2 * pair / channels) for pair in range(channels // 2)]
    return 2 * sum(turn > MIN_TURN_RAD for turn in turns)


def adapter_rows(lora: LoraConfig, timebase: TimeBase, head_dim: int = 128) -> int | None:
    """Rows per head that the adapters write, or None where they write whole layers."""
    if lora.target != "temporal":
        return None
    if lora.time_rows == "auto":
        return time_rows(timebase, head_dim)
    if lora.time_rows > time_channels(head_dim):
        raise ConfigError(
            f"lora.time_rows: given {lora.time_rows}, but this model's heads have "
            f"{time_channels(head_dim)} time channels"
        )
    return lora.time_rows


def scaling(lora: LoraConfig) -> float:
    """The factor on B A: alpha / rank, where alpha is the rank unless set."""
    return 1.0 if lora.alpha is None else lora.alpha / lora.rank


def target_modules(lora: LoraConfig, num_blocks: int) -> list[str]:
    """Full names of the linear layers to adapt, block by block.

    Only layers that every consumer of Wan LoRA files can load. Raises ConfigError where
    lora.blocks reaches past the model.
    """
    first, end = lora.blocks or (0, num_blocks)
    if end > num_blocks:
        raise ConfigError(
            f"lora.blocks: given {[first, end]} (first, end), but this model has {num_blocks} "
            f"blocks; the end may be at most {num_blocks}"
        )
    return [f"blocks.{n}.{name}" for n in range(first, end) for name in TARGETS[lora.target]]


def check_lora(lora: LoraConfig, timebase: TimeBase, architecture: dict[str, Any]) -> None:
    """Raise ConfigError where `lora` does not fit a transformer's config.json, unloaded."""
    target_modules(lora, architecture["num_layers"])
    adapter_rows(lora, timebase, architecture["attention_head_dim"])
