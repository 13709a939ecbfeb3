"""Checkpoints: adapter-sized folders of safetensors and JSON, whole or not there.

    checkpoints/<expert>/step-000100/
        lora.safetensors            the adapters, fp32, named as PEFT names them
        ema.safetensors             their moving average, where one is kept
        optimizer.safetensors       what the optimizer remembers of each adapter
        state.json                  step, resolved configuration, processes, shapes for export
        manifest.json               SHA-256 of every file above, written last

The folder is filled under a temporary name, `.step-000100.tmp`, and renamed. Checksums are of the
bytes in memory, not of what came back from the disk.
"""

import json
import logging
import os
import shutil
from dataclasses import dataclass
from hashlib import sha256
from pathlib import Path
from typing import Any

from safetensors.torch import load_file
from safetensors.torch import save as to_bytes
from torch import Tensor

from tempolora.config import ConfigError
from tempolora.files import sha256_of, sync_folder, write_json

log = logging.getLogger(__name__)

MANIFEST = "manifest.json"
NEEDED = {"lora.safetensors", "optimizer.safetensors", "state.json"}


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

    def optimizer(self) -> dict[str, Tensor]:
        """What the optimizer remembers."""
        return load_file(self.folder / "optimizer.safetensors")


# --- Writing, in this order -----------------------------------------------------------------------


def begin(root: Path, step: int) -> Path:
    """The temporary folder that a checkpoint is filled in; what killed runs left is gone."""
    folder = _temporary(root, step)
    _clear(root)
    folder.mkdir(parents=True)
    sync_folder(root)
    sync_folder(root.parent)
    return folder


def write_tensors(root: Path, step: int, name: str, tensors: dict[str, Tensor]) -> dict[str, str]:
    """One tensor file of the checkpoint under way; {name: its SHA-256}.

    tensors: on the CPU, each with storage of its own.
    """
    content = to_bytes(tensors)
    with open(_temporary(root, step) / name, "wb") as file:
        file.write(content)
        file.flush()
        os.fsync(file.fileno())
    return {name: sha256(content).hexdigest()}


def seal(
    root: Path, step: int, digests: dict[str, str], state: dict[str, Any], keep: int, every: int
) -> Path:
    """Write state and manifest, give the folder its name, and then drop older checkpoints.

    keep: the newest that stay. every: those whose step is a multiple stay too; 0: none.
    """
    folder = _temporary(root, step)
    write_json(folder / "state.json", state)
    digests = digests | {"state.json": sha256_of(folder / "state.json")}
    write_json(folder / MANIFEST, dict(sorted(digests.items())))
    final = root / f"step-{step:06d}"
    if final.exists():  # damaged, or of a run that went back: out of the way, but not gone yet
        final.rename(_old(final))
    folder.rename(final)
    sync_folder(root)
    for old in _folders(root)[:-keep]:
        if not every or _step_of(old) % every:
            old.rename(_old(old))  # at once: a removal cut short leaves no half checkpoint
    _clear(root)
    return final


def abandon(root: Path, step: int) -> None:
    """Take away a checkpoint that could not be written whole."""
    shutil.rmtree(_temporary(root, step), ignore_errors=True)


# --- Finding --------------------------------------------------------------------------------------


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
        if missing := NEEDED - manifest.keys():
            raise ValueError(f"{MANIFEST} does not name {', '.join(sorted(missing))}")
        for name, digest in manifest.items():
            if Path(name).name != name:
                raise ValueError(f"{name!r} is not a file of its own")
            if sha256_of(folder / name) != digest:
                raise ConfigError(f"{folder / name}: not what was written; use another checkpoint")
        return Checkpoint(folder, json.loads((folder / "state.json").read_bytes()))
    except OSError as error:
        why = f"{Path(error.filename).name}: {error.strerror}" if error.filename else error.strerror
        raise ConfigError(f"{folder}: not a whole checkpoint ({why})") from None
    except (ValueError, AttributeError) as error:
        raise ConfigError(f"{folder}: not a whole checkpoint ({error})") from None


def latest(root: Path) -> Checkpoint | None:
    """The newest whole checkpoint, None where there is none at all; damaged ones are passed over
    with a warning. Raises ConfigError where all are: what was trained must not be lost in silence.
    """
    folders = _folders(root)
    for folder in reversed(folders):
        try:
            return open_checkpoint(folder)
        except ConfigError as error:
            log.warning("%s; trying the one before", error)
    if folders:
        raise ConfigError(
            f"--resume: no checkpoint in {root} is whole, as said above; bring one back, or start "
            "over with --resume none, which keeps what is there in previous-1"
        )
    return None


def _clear(root: Path) -> None:
    """Remove what has no name of its own: nothing is under way when this is called."""
    for left in root.glob(".step-*"):
        shutil.rmtree(left)


def _temporary(root: Path, step: int) -> Path:
    return root / f".step-{step:06d}.tmp"


def _old(folder: Path) -> Path:
    """The name under which a folder waits to be removed, free of what a killed run left there."""
    old = folder.with_name(f".{folder.name}.old")
    if old.exists():
        shutil.rmtree(old)
    return old


def _step_of(folder: Path) -> int:
    return int(folder.name.removeprefix("step-"))


def _folders(root: Path) -> list[Path]:
    """The checkpoints of a folder by step; a copy that a user named otherwise is not one."""
    found = [path for path in root.glob("step-*") if path.name[5:].isdecimal()]
    return sorted(found, key=_step_of)
