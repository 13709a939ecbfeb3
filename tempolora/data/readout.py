"""The readout's files beside the shards: what precompute leaves there for the rhythm terms.

    readout.safetensors       the map from latents to luminance, see tempolora.rhythm.readout
    rhythm_bank.safetensors   power spectrum and motion of up to 512 real samples, read through it

Each holds, beside its tensors, one JSON entry of facts and the SHA-256 of both, so that a damaged
file is noticed by whoever reads it.
"""

import json
from hashlib import sha256
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from tempolora.config import ConfigError
from tempolora.files import replacing
from tempolora.rhythm.readout import Readout

READOUT = "readout.safetensors"
BANK = "rhythm_bank.safetensors"


def load_readout(shards: Path) -> Readout:
    """The readout of a folder of shards. Raises ConfigError where it is missing or damaged."""
    return _load(Path(shards) / READOUT, Readout.from_tensors)


def load_bank(shards: Path) -> tuple[Tensor, Tensor]:
    """(power_NF, motion_N) of real samples, float32: `power_spectrum` and `motion` of R z.

    Raises ConfigError where the file is missing or damaged.
    """
    return _load(Path(shards) / BANK, lambda tensors: (tensors["power"], tensors["motion"]))


def _load(path: Path, build: Any) -> Any:
    try:
        return build(read_checked(path)[0])
    except FileNotFoundError:
        raise ConfigError(
            f"data.shards: {path} is not there; run `tempolora precompute` again, which makes it "
            "without encoding the clips again"
        ) from None
    except ValueError as error:
        raise ConfigError(f"{path}: damaged ({error}); run `tempolora precompute` again") from None


def write_checked(path: Path, tensors: dict[str, Tensor], facts: dict[str, Any]) -> None:
    """Write tensors and facts; the same content gives the same bytes."""
    # one entry: safetensors writes several in any order
    entry = json.dumps({**facts, "sha256": _digest(tensors, facts)}, sort_keys=True)
    with replacing(path) as temporary:
        save_file(tensors, temporary, {"tempolora": entry})


def read_checked(path: Path) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """What `write_checked` wrote. Raises FileNotFoundError, and ValueError for damage."""
    try:
        with safe_open(path, framework="pt") as stored:
            facts = json.loads((stored.metadata() or {})["tempolora"])
            tensors = {name: stored.get_tensor(name) for name in stored.keys()}  # noqa: SIM118
    except FileNotFoundError:
        raise
    except (OSError, SafetensorError, KeyError, ValueError) as error:
        raise ValueError(f"it cannot be read: {error}") from None
    if facts.pop("sha256", None) != _digest(tensors, facts):
        raise ValueError("its content is not what was written")
    return tensors, facts


def _digest(tensors: dict[str, Tensor], facts: dict[str, Any]) -> str:
    digest = sha256(json.dumps(facts, sort_keys=True).encode())
    for name, tensor in sorted(tensors.items()):
        digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}".encode())
        digest.update(tensor.contiguous().numpy().tobytes())
    return digest.hexdigest()
