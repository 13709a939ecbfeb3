"""Checkpoints: adapter-sized folders of safetensors and JSON, whole or not there.

    checkpoints/<expert>/step-000100/
        lora.safetensors            the adapters, fp32, named as PEFT names them
        ema.safetensors             their moving average, where one is kept
        optimizer-00000.safetensors what the optimizer remembers; one per process where sharded
        state.json                  step, resolved configuration, processes, shapes for export
        manifest.json               SHA-256 of every file above, written last

The folder is filled under a temporary name and renamed.
"""

import json
import logging
import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from safetensors.torch import load_file, save_file
from torch import Tensor

from tempolora.config import ConfigError
from tempolora.files import sha256_of, sync_folder, write_json

log = logging.getLogger(__name__)

MANIFEST = "manifest.json"


@dataclass(frozen=True)
class Checkpoint:
    """A whole checkpoint on disk, its checksums verified."""

    folder: Path
    state: dict[str, Any]

    def lora(self) -> dict[str, Tensor]:
        """The adapters as trained."""
        return load_file(self.folder / "lora.safetensors")

    def ema(self) -> dict[str, Tensor] | None:
        """The adapters' moving average, or None where none was kept."""
        path = self.folder / "ema.safetensors"
        return load_file(path) if path.is_file() else None

    def optimizer(self, part: int = 0) -> dict[str, Tensor]:
        """Optimizer state; part: the process where it is sharded, else 0."""
        return load_file(self.folder / f"optimizer-{part:05d}.safetensors")


def begin(root: Path, step: int) -> Path:
    """The temporary folder that a checkpoint is filled in; every process may write into it."""
    folder = root / f".step-{step:06d}.tmp"
    folder.mkdir(parents=True, exist_ok=True)
    return folder


def write_tensors(folder: Path, name: str, tensors: dict[str, Tensor]) -> None:
    """One tensor file of a checkpoint under way."""
    save_file({key: value.cpu().contiguous() for key, value in tensors.items()}, folder / name)


def commit(root: Path, step: int, state: dict[str, Any], keep: int) -> Path:
    """Seal the temporary folder, give it its name, and drop all but the newest `keep`."""
    folder = begin(root, step)
    write_json(folder / "state.json", state)
    files = sorted(path for path in folder.iterdir())
    write_json(folder / MANIFEST, {path.name: sha256_of(path) for path in files})
    final = root / f"step-{step:06d}"
    if final.exists():
        shutil.rmtree(final)
    folder.rename(final)
    sync_folder(root)
    for old in _folders(root)[:-keep]:
        shutil.rmtree(old)
    return final


def open_checkpoint(folder: Path) -> Checkpoint:
    """Verify a checkpoint and read its state. Raises ConfigError naming what is damaged."""
    try:
        manifest = json.loads((folder / MANIFEST).read_bytes())
        for name, digest in manifest.items():
            if sha256_of(folder / name) != digest:
                raise ConfigError(f"{folder / name}: not what was written; use another checkpoint")
        return Checkpoint(folder, json.loads((folder / "state.json").read_bytes()))
    except (OSError, ValueError, AttributeError) as error:
        raise ConfigError(f"{folder}: not a whole checkpoint ({error})") from None


def latest(root: Path) -> Checkpoint | None:
    """The newest whole checkpoint; damaged ones are passed over with a warning."""
    for folder in reversed(_folders(root)):
        try:
            return open_checkpoint(folder)
        except ConfigError as error:
            log.warning("%s; trying the one before", error)
    return None


def _folders(root: Path) -> list[Path]:
    return sorted(root.glob("step-*"))
