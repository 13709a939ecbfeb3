"""LoRA files: written so that every tool for Wan loads them, read whoever wrote them.

A file holds one transformer's adapters under ComfyUI's names, at scale 1 (alpha / rank is folded
into B, so nothing hangs on an `.alpha`), and its header says what it was trained from. Diffusers
converts the same names (`comfy/lora.py`; diffusers `loaders/lora_conversion_utils.py`).
"""

import json
import logging
import re
from pathlib import Path

import safetensors
import safetensors.torch
from peft.tuners.tuners_utils import BaseTunerLayer
from torch import Tensor, nn

from tempolora.config import ConfigError, LoraConfig
from tempolora.files import replacing
from tempolora.model import wan
from tempolora.model.lora import standard_lora

logger = logging.getLogger(__name__)

_DIFFUSERS_METADATA = "lora_adapter_metadata"  # where diffusers keeps rank and alpha, as JSON
_ORIGINAL_NAMES = {
    "attn1.to_q": "self_attn.q",
    "attn1.to_k": "self_attn.k",
    "attn1.to_v": "self_attn.v",
    "attn1.to_out.0": "self_attn.o",
    "attn2.to_q": "cross_attn.q",
    "attn2.to_k": "cross_attn.k",
    "attn2.to_v": "cross_attn.v",
    "attn2.to_out.0": "cross_attn.o",
    "ffn.net.0.proj": "ffn.0",
    "ffn.net.2": "ffn.2",
}
_KEY = re.compile(r"(blocks\.\d+)\.(.+)\.(lora_[AB]\.weight)")
_LOADED_KEY = re.compile(r"transformer\.(.+)\.(lora_A\.weight|lora_B\.weight|lora_B\.bias)")


def export_lora(
    state: dict[str, Tensor],
    path: Path,
    *,
    lora: LoraConfig,
    rows: int | None,
    num_heads: int,
    head_dim: int,
    metadata: dict[str, str],
) -> None:
    """Write one transformer's LoRA file, in the dtype of `state`; an old file is replaced whole.

    `state` is named as in `model.lora.lora_parameters`; `rows` is what `adapter_rows` gave in
    training. `metadata` goes into the file's header. Raises ValueError for a state that does not
    fit `rows` or holds a name no tool would load.
    """
    standard = standard_lora(state, lora, num_heads=num_heads, head_dim=head_dim, rows=rows)
    tensors = {
        _original_key(name): weight.detach().cpu().contiguous() for name, weight in standard.items()
    }
    path.parent.mkdir(parents=True, exist_ok=True)
    with replacing(path) as temporary:
        temporary.write_bytes(safetensors.torch.save(tensors, metadata))


def read_metadata(path: Path) -> dict[str, str]:
    """The header metadata of a LoRA file; empty where its writer left none.

    Raises ConfigError for a missing file or one that is not safetensors.
    """
    if not path.is_file():
        raise ConfigError(f"{path}: there is no such LoRA file")
    try:
        with safetensors.safe_open(path, framework="pt") as file:
            return file.metadata() or {}
    except (OSError, safetensors.SafetensorError) as error:
        raise ConfigError(f"{path}: not a whole safetensors file: {error}") from None


def apply_lora_file(transformer: nn.Module, path: Path, strength: float = 1.0) -> None:
    """Load a LoRA file for Wan, ours or another's, into a diffusers transformer.

    strength: 1 as trained. LoRAs that were loaded before stay, each at its own. Raises ConfigError,
    naming the file, if it cannot be read, is not a LoRA for Wan, or does not fit this model in
    every tensor; the model is then unchanged.
    """
    settings = read_metadata(path).get(_DIFFUSERS_METADATA)
    state, lost = _read_fitting(transformer, path)
    if lost > 0:
        logger.warning("%s: %d tensors that are no LoRA pairs are left out", path, lost)
    earlier = list(getattr(transformer, "peft_config", {}))
    transformer.load_lora_adapter(
        state, prefix="transformer", metadata=json.loads(settings) if settings else None
    )
    (added,) = set(transformer.peft_config) - set(earlier)
    for module in transformer.modules():
        if isinstance(module, BaseTunerLayer):
            module.set_scale(added, strength)
            if earlier:  # PEFT has switched them off
                module.set_adapter(list(transformer.peft_config))


def check_lora_file(transformer: nn.Module, path: Path) -> None:
    """Raise the ConfigError that `apply_lora_file` would; a transformer on meta shows as much."""
    read_metadata(path)
    _read_fitting(transformer, path)


def _original_key(name: str) -> str:
    match = _KEY.fullmatch(name)
    if match is None or match[2] not in _ORIGINAL_NAMES:
        raise ValueError(f"{name}: no LoRA consumer knows this layer")
    return f"diffusion_model.{match[1]}.{_ORIGINAL_NAMES[match[2]]}.{match[3]}"


def _read_fitting(transformer: nn.Module, path: Path) -> tuple[dict[str, Tensor], int]:
    """A file's LoRA by diffusers' names, and how many of its tensors are no part of that."""
    given = safetensors.torch.load_file(path)
    try:
        state = wan.convert_lora_keys(given)
    except (KeyError, ValueError) as error:
        raise ConfigError(f"{path}: not a LoRA for Wan that can be converted: {error}") from None
    _check_fit(transformer, state, path)
    return state, sum(not key.endswith(".alpha") for key in given) - len(state)


def _check_fit(transformer: nn.Module, state: dict[str, Tensor], path: Path) -> None:
    """Diffusers only logs keys it finds no place for, so each is checked before any is loaded."""
    layers: dict[str, dict[str, Tensor]] = {}
    modules = dict(transformer.named_modules())
    for key, tensor in state.items():
        match = _LOADED_KEY.fullmatch(key)
        if match is None or match[1] not in modules:
            raise ConfigError(f"{path}: this model has no place for {key}")
        layers.setdefault(match[1], {})[match[2]] = tensor
    if not layers:
        raise ConfigError(f"{path}: holds no LoRA weights")
    for name, parts in layers.items():
        a, b = parts.get("lora_A.weight"), parts.get("lora_B.weight")
        if a is None or b is None:
            raise ConfigError(f"{path}: {name} has lora_A or lora_B but not both")
        base = getattr(modules[name], "base_layer", modules[name])
        linear = isinstance(base, nn.Linear)  # whose weight may be packed
        shape = (base.out_features, base.in_features) if linear else tuple(base.weight.shape)
        if a.shape[0] != b.shape[1]:
            raise ConfigError(
                f"{path}: {name} has rank {a.shape[0]} in lora_A and {b.shape[1]} in lora_B"
            )
        if (b.shape[0], *a.shape[1:]) != shape:
            raise ConfigError(
                f"{path}: made for another model: {name} is {(b.shape[0], *a.shape[1:])} there "
                f"and {shape} here"
            )
