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
from tempolora.files import sha256_of, sync_file, sync_folder, write_json

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
    """The temporary folder that a checkpoint is filled in, emptied of what a killed run left."""
    folder = _temporary(root, step)
    if folder.exists():
        shutil.rmtree(folder)
    folder.mkdir(parents=True)
    return folder


def write_tensors(root: Path, step: int, name: str, tensors: dict[str, Tensor]) -> None:
    """One tensor file of the checkpoint under way; any process, after `begin` on one of them."""
    path = _temporary(root, step) / name
    save_file({key: value.cpu().contiguous() for key, value in tensors.items()}, path)
    sync_file(path)


def commit(root: Path, step: int, state: dict[str, Any], keep: int) -> Path:
    """Seal the temporary folder, give it its name, and drop all but the newest `keep`."""
    folder = _temporary(root, step)
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


def set_newer_aside(root: Path, step: int) -> None:
    """Move checkpoints after `step` to `superseded/`: a run that goes back must not find them."""
    for folder in _folders(root):
        if _step_of(folder) > step:
            aside = root / "superseded" / folder.name
            aside.parent.mkdir(exist_ok=True)
            if aside.exists():
                shutil.rmtree(aside)
            folder.rename(aside)
            log.info("%s is now %s", folder, aside)


def open_checkpoint(folder: Path) -> Checkpoint:
    """Verify a checkpoint and read its state. Raises ConfigError naming what is damaged."""
    try:
        manifest = json.loads((folder / MANIFEST).read_bytes())
        for name, digest in manifest.items():
            if Path(name).name != name:
                raise ValueError(f"{name!r} is not a file of its own")
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


def _temporary(root: Path, step: int) -> Path:
    return root / f".step-{step:06d}.tmp"


def _step_of(folder: Path) -> int:
    return int(folder.name.removeprefix("step-"))


def _folders(root: Path) -> list[Path]:
    """The checkpoints of a folder by step; a copy that a user named otherwise is not one."""
    found = [path for path in root.glob("step-*") if path.name[5:].isdecimal()]
    return sorted(found, key=_step_of)
