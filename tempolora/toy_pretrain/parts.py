"""The file that a trained part of TinyWan is kept in; `tempolora.model.tinywan` reads it."""

import json
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import nn

from tempolora.files import replacing


def write_part(
    part: nn.Module,
    architecture: dict[str, Any],
    path: Path,
    training: dict[str, Any],
    dtype: torch.dtype,
) -> None:
    """Write weights as safetensors; architecture and `training` go into the header as JSON."""
    state = {
        name: value.to("cpu", dtype, copy=True).contiguous()
        for name, value in part.state_dict().items()
    }
    header = {"architecture": json.dumps(architecture), "training": json.dumps(training)}
    with replacing(path) as partial:
        save_file(state, partial, header)
