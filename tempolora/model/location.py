"""Where the parts of a model lie on disk, and the mistakes in that which cost no time to find.

Nothing heavy is imported here: a wrong path is reported before torch is loaded.
"""

import json
import re
from pathlib import Path

from tempolora.config import ConfigError, ModelConfig
from tempolora.model.architectures import architecture
from tempolora.variants import VARIANTS

PART_OF = {"high": "transformer", "single": "transformer", "low": "transformer_2"}
"""The subfolder that holds each expert."""

TINYWAN = "tinywan"
_HUB_ID = re.compile(r"[\w.-]+/[\w.-]+")
_CONFIG_FILE = {"tokenizer": "tokenizer_config.json"}


def check_model(model: ModelConfig) -> None:
    """Raise ConfigError if the folder or a named single file cannot be what `model` says it is.

    Looks at names and config.json files only. A hub id is taken at its word until it is loaded.
    """
    files = {part: path for part, path in model.files if path is not None}
    if files and model.init == "random":
        raise ConfigError(f"model.files.{next(iter(files))}: has no meaning with model.init random")
    for part, path in files.items():
        _check_file(f"model.files.{part}", Path(path).expanduser())
    if model.init == "random" or model.id == TINYWAN:
        return
    folder = local_folder(model)
    if folder is not None:
        _check_folder(model, folder)
    elif not _HUB_ID.fullmatch(model.id):
        raise ConfigError(
            f'model.id: {model.id!r} is no folder here, no hub id (owner/name) and not "{TINYWAN}"'
        )


def local_folder(model: ModelConfig) -> Path | None:
    """The diffusers folder of `model`, or None where model.id is a hub id.

    "tinywan" is built on first use. Raises ConfigError for a path that is not a folder.
    """
    if model.id == TINYWAN:
        from tempolora.model.tinywan import tinywan_folder  # builds with torch: only when asked for

        return tinywan_folder(model.variant)
    path = Path(model.id).expanduser()
    if path.is_dir():
        return path
    if path.exists() or model.id.startswith((".", "~", "/")):
        raise ConfigError(f"model.id: {model.id} is not a folder")
    return None


def single_file(model: ModelConfig, part: str) -> Path | None:
    """The single-file checkpoint that stands for `part`, or None where the folder holds it."""
    path = getattr(model.files, part, None)
    return Path(path).expanduser() if path else None


def part_config(model: ModelConfig, part: str) -> dict:
    """Architecture of `part`: from the local folder if there is one, else as published."""
    folder = local_folder(model)
    if model.init == "random" or folder is None or not (folder / part / "config.json").is_file():
        return architecture(model.variant, part)
    return _read_config(folder / part / "config.json")


def weight_files(folder: Path) -> list[Path]:
    """The safetensors files of one part, by name."""
    return sorted(folder.glob("*.safetensors"))


def part_files(folder: Path) -> list[Path]:
    """The files of one part: those that its index names, else the one of diffusers' usual name.

    Raises ConfigError where one is missing.
    """
    for stem in ("diffusion_pytorch_model", "model"):
        index = folder / f"{stem}.safetensors.index.json"
        if index.is_file():
            return _indexed(folder, index)
        if (folder / f"{stem}.safetensors").is_file():
            return [folder / f"{stem}.safetensors"]
    raise ConfigError(
        f"model.id: {folder} holds no model.safetensors or diffusion_pytorch_model.safetensors, "
        "nor an index of shards"
    )


def _indexed(folder: Path, index: Path) -> list[Path]:
    """The shards that an index names: all of them lie beside it."""
    try:
        shards = set(_read_config(index)["weight_map"].values())
    except (KeyError, TypeError, AttributeError):
        raise ConfigError(f"model.id: {index} is no index of shards") from None
    missing = shards - {file.name for file in weight_files(folder)}
    if missing:
        raise ConfigError(
            f"model.id: {folder} lacks {min(map(str, missing))}, which {index.name} names"
        )
    return [folder / name for name in sorted(shards)]


def _check_file(key: str, path: Path) -> None:
    if path.suffix != ".safetensors":
        raise ConfigError(f"{key}: {path} is not a .safetensors file; pickled files are not read")
    if not path.is_file():
        raise ConfigError(f"{key}: there is no file {path}")


def _check_folder(model: ModelConfig, folder: Path) -> None:
    experts = [PART_OF[expert] for expert in VARIANTS[model.variant].experts]
    for part in (*experts, "vae", "text_encoder", "tokenizer"):
        if single_file(model, part):
            continue
        if not (folder / part / _CONFIG_FILE.get(part, "config.json")).is_file():
            raise ConfigError(
                f"model.id: {folder} holds no {part}; model.variant {model.variant} needs one"
            )
        if part != "tokenizer":
            _check_weights(folder / part)
    for part, key in ((experts[0], "in_channels"), ("vae", "z_dim")):
        if single_file(model, part):
            continue
        found = _read_config(folder / part / "config.json").get(key)
        wanted = architecture(model.variant, part)[key]
        if found != wanted:
            raise ConfigError(
                f"model.variant: {model.variant} has {key} {wanted} in its {part}, "
                f"but {folder} has {found}"
            )


def _check_weights(folder: Path) -> None:
    if not weight_files(folder):
        raise ConfigError(f"model.id: {folder} holds no .safetensors file")
    part_files(folder)


def _read_config(path: Path) -> dict:
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise ConfigError(f"model.id: cannot read {path}: {error}") from None
