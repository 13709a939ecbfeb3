"""WebDataset shards: the one thing that precompute and training both know.

A shard is a plain tar that any WebDataset reader opens. Beside each lies an index, `NAME.json`,
with the place and SHA-256 of every member, so that training reads any sample directly, in an
order of its own, and notices a damaged byte. `manifest.json` is written last: without it the
folder is unfinished. Nothing here is ever unpickled; members other than these four are not read:

    latents.safetensors  latents (C, T, H, W) bf16 normalised; i2v A14B also condition, same shape
    text.safetensors     text (L, D) bf16 at the caption's true length
    rhythm.safetensors   motion_energy (F,); where sound is heard onset (F,) and beats_s (K,)
    meta.json            key, caption, source file and SHA-256, window, rates, size, sound and
                         tempo, fingerprints
"""

import json
import os
import re
import tarfile
from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass, field
from hashlib import sha256
from pathlib import Path
from typing import Any

import webdataset
from safetensors import SafetensorError, safe_open
from safetensors.torch import load as safetensors_from_bytes
from safetensors.torch import load_file
from safetensors.torch import save as safetensors_to_bytes
from torch import Tensor

from tempolora.config import Config, ConfigError
from tempolora.files import replacing, sha256_of, write_json

FORMAT = 2  # 1: beats, tempo and the kind of silence were not kept
MOST_OPEN = 128  # shards of a reader at a time: a process may open 1024 files on many systems
MANIFEST = "manifest.json"
PROMPTS = "prompts.safetensors"
HEARD, SILENT, ABSENT, BROKEN = "heard", "silent", "absent", "broken"  # a sample's sound
MEMBERS = ("latents.safetensors", "text.safetensors", "rhythm.safetensors", "meta.json")


@dataclass(frozen=True)
class Sample:
    """One window of one clip, ready to train on; shapes in the module's docstring."""

    key: str
    latents: dict[str, Tensor]
    text: Tensor
    rhythm: dict[str, Tensor]
    meta: dict[str, Any]

    def members(self) -> dict[str, bytes]:
        """The sample as the bytes of its shard members."""
        return {
            "latents.safetensors": safetensors_to_bytes(self.latents),
            "text.safetensors": safetensors_to_bytes({"text": self.text}),
            "rhythm.safetensors": safetensors_to_bytes(self.rhythm),
            "meta.json": json.dumps(self.meta, ensure_ascii=False).encode(),
        }


@dataclass
class ShardIndex:
    """What one shard holds, and what became of the clips it was made from.

    samples: key -> member -> [offset, bytes, SHA-256]. clips: file -> what `clip_identity` gave.
    rejected: file -> reason; such clips are in `clips` too, so that they are not tried again.
    failed: file -> reason, where the decoder did not finish; tried again by the next run.
    left_out: file -> reasons, of windows that could not be used. frames: counts of frames that
    are not source frames: made in between, or taken from the nearest for want of a good one.
    speeds: key -> speed, 1 being the clip's own. sound: key -> heard, silent, absent or broken, as
    meta.json has it.
    """

    fingerprint: dict[str, Any]
    sha256: str = ""
    samples: dict[str, dict[str, list[Any]]] = field(default_factory=dict)
    clips: dict[str, dict[str, Any]] = field(default_factory=dict)
    rejected: dict[str, str] = field(default_factory=dict)
    failed: dict[str, str] = field(default_factory=dict)
    left_out: dict[str, list[str]] = field(default_factory=dict)
    speeds: dict[str, float] = field(default_factory=dict)
    frames: dict[str, int] = field(default_factory=lambda: {"inbetween": 0, "nearest_fallback": 0})
    sound: dict[str, str] = field(default_factory=dict)


def fingerprint(cfg: Config, models: dict[str, str]) -> dict[str, Any]:
    """The settings and models that shape a sample; shards made with others are refused.

    models: the fingerprints of the VAE and the text encoder. The weights count, not their path.
    """
    data = cfg.data
    return {
        "format": FORMAT,
        "model.variant": cfg.model.variant,
        "model.task": cfg.task,
        "data.num_frames": data.num_frames,
        "data.height": data.height,
        "data.width": data.width,
        "data.fps": cfg.timebase.fps,
        "data.windows": data.windows,
        "data.max_windows": data.max_windows,
        "data.resample": data.resample,
        "data.speeds": list(data.speeds),
        **models,
    }


def refuse_other_fingerprint(folder: Path, found: dict[str, Any], wanted: dict[str, Any]) -> None:
    """Raise ConfigError naming the first setting in which two fingerprints differ."""
    for key, value in wanted.items():
        if found.get(key) != value:
            raise ConfigError(
                f"{key}: the shards in {folder} were made with {found.get(key)!r}, this config "
                f"means {value!r}; set data.shards to another folder and precompute again"
            )


def write_shard(path: Path, samples: Iterable[Sample], index: ShardIndex) -> None:
    """Write a tar and then its index; until the index is there the shard does not count."""
    samples = list(samples)
    with replacing(path) as temporary:
        with open(temporary, "wb") as file:
            writer = webdataset.TarWriter(file, encoder=False, mtime=0, user="", group="")
            for sample in samples:
                writer.write({"__key__": sample.key, **sample.members()})
            writer.close()
        index.samples = _locate_members(temporary)
        index.sound = {sample.key: sample.meta["sound"] for sample in samples}
        index.speeds = {sample.key: sample.meta["speed"] for sample in samples}
        index.sha256 = sha256_of(temporary)
    write_json(index_path(path), vars(index))


def _locate_members(path: Path) -> dict[str, dict[str, list[Any]]]:
    located: dict[str, dict[str, list[Any]]] = {}
    with tarfile.open(path) as tar, open(path, "rb") as file:
        for entry in tar:
            key, _, member = entry.name.partition(".")
            file.seek(entry.offset_data)
            digest = sha256(file.read(entry.size)).hexdigest()
            located.setdefault(key, {})[member] = [entry.offset_data, entry.size, digest]
    return located


def index_path(shard: Path) -> Path:
    """Where the index of a shard lies."""
    return shard.with_name(shard.name + ".json")


def read_indexes(folder: Path) -> dict[str, ShardIndex]:
    """All finished shards of a folder, by name. Raises ConfigError where an index is damaged."""
    indexes = {}
    for path in sorted(folder.glob("*.tar.json")):
        try:
            indexes[path.name.removesuffix(".json")] = ShardIndex(**json.loads(path.read_bytes()))
        except FileNotFoundError:
            continue  # another process took a stale shard away
        except (ValueError, TypeError) as error:
            raise ConfigError(
                f"{path}: damaged index ({error}); delete it with its shard and precompute again"
            ) from None
    return indexes


def write_manifest(folder: Path, indexes: dict[str, ShardIndex], facts: dict[str, Any]) -> None:
    """Declare the folder finished.

    facts: further entries; "rhythm" maps the files made of all shards to their SHA-256.
    """
    first = next(iter(indexes.values()))
    shards = [
        {
            "name": name,
            "sha256": index.sha256,
            "count": len(index.samples),
            "index_sha256": sha256_of(index_path(folder / name)),
        }
        for name, index in sorted(indexes.items())
    ]
    every = indexes.values()
    made = {file for index in every for file in index.clips}
    rejected = {file: why for index in every for file, why in index.rejected.items()}
    rejected |= {f: why for index in every for f, why in index.failed.items() if f not in made}
    manifest = {
        "format": FORMAT,
        "fingerprint": first.fingerprint,
        "samples": sum(shard["count"] for shard in shards),
        "shards": shards,
        "prompts_sha256": sha256_of(folder / PROMPTS),
        "rejected": [{"file": file, "reason": why} for file, why in sorted(rejected.items())],
        "left_out": {file: why for index in every for file, why in index.left_out.items()},
        "frames": {
            kind: sum(index.frames[kind] for index in every)
            for kind in ("inbetween", "nearest_fallback")
        },
        "sound": Counter(state for index in every for state in index.sound.values()),
        "speeds": Counter(f"{speed:g}" for index in every for speed in index.speeds.values()),
        **facts,
    }
    write_json(folder / MANIFEST, manifest)


def describe_sound(count: dict[str, int]) -> str:
    """Of how many samples sound is heard, and why not of the others; count: as in the manifest."""
    said = f"heard in {count.get(HEARD, 0)} of {sum(count.values())} samples"
    why = {SILENT: "silent", ABSENT: "without a sound track", BROKEN: "with a broken one"}
    others = [f"{count[state]} {words}" for state, words in why.items() if count.get(state)]
    return f"{said} ({', '.join(others)})" if others else said


def read_manifest(folder: Path) -> dict[str, Any]:
    """Raises ConfigError where there is no manifest or it is not whole."""
    path = folder / MANIFEST
    try:
        manifest = json.loads(path.read_bytes())
    except FileNotFoundError:
        state = "unfinished" if folder.is_dir() else "not there"
        raise ConfigError(
            f"data.shards: {folder} is {state} (no {MANIFEST}); run `tempolora precompute` first"
        ) from None
    except ValueError as error:
        raise ConfigError(f"{path}: damaged ({error}); run `tempolora precompute` again") from None
    if manifest.get("format") != FORMAT:
        raise ConfigError(
            f"{path}: format {manifest.get('format')!r}, this version reads {FORMAT}; "
            "run `tempolora precompute` into a new folder"
        )
    return manifest


def sample_key(file: str, window: int, speed: float = 1.0) -> str:
    """A WebDataset key: no dot, no slash, unique by the file's hash, readable by its stem."""
    stem = re.sub(r"[^A-Za-z0-9_-]+", "_", Path(file).stem)[:40]
    at_speed = "" if speed == 1 else f"-x{round(1000 * speed):04d}"
    return f"{stem}-{sha256(file.encode()).hexdigest()[:10]}-w{window:04d}{at_speed}"


class ShardReader:
    """Random access to the samples of a finished folder, in the order of their keys.

    The order does not depend on how many processes wrote the shards. Every member read is checked
    against its SHA-256. `sound` is each sample's, by key: heard, silent, absent or broken. wanted:
    the fingerprint the shards must have. Raises ConfigError for an unfinished folder, for one made
    with other settings, and for damage.
    """

    def __init__(self, folder: Path, wanted: dict[str, Any]) -> None:
        manifest = read_manifest(folder)
        refuse_other_fingerprint(folder, manifest["fingerprint"], wanted)
        self._folder = folder
        self.sound: dict[str, str] = {}
        self._files: dict[str, int] = {}
        self._places: dict[str, tuple[str, dict[str, list[Any]]]] = {}
        self._speeds: dict[str, float] = {}
        for shard in manifest["shards"]:
            if Path(shard["name"]).name != shard["name"]:
                raise ConfigError(f"{folder / MANIFEST}: {shard['name']!r} is not in this folder")
            path = index_path(folder / shard["name"])
            content = path.read_bytes() if path.is_file() else b""
            if sha256(content).hexdigest() != shard["index_sha256"]:
                raise _damaged(path, "does not fit the manifest")
            index = json.loads(content)
            self._speeds |= index["speeds"]
            self.sound |= index["sound"]
            for key, members in index["samples"].items():
                if missing := set(MEMBERS) - set(members):
                    raise _damaged(path, f"sample {key} lacks {', '.join(sorted(missing))}")
                self._places[key] = (shard["name"], members)
        self.keys = sorted(self._places)
        if not self.keys:
            raise ConfigError(
                f"data.shards: {folder} holds no sample: every clip was rejected; "
                f"the reasons are in {folder / MANIFEST}"
            )

    def __len__(self) -> int:
        return len(self.keys)

    def speed(self, position: int) -> float:
        """How fast the sample at a position in key order runs; 1 is the clip's own speed."""
        return self._speeds[self.keys[position]]

    def read(self, position: int) -> Sample:
        """The sample at a position in key order."""
        key = self.keys[position]
        shard, places = self._places[key]
        latents, text, rhythm, meta = (self._member(shard, places[name]) for name in MEMBERS)
        return Sample(
            key=key,
            latents=safetensors_from_bytes(latents),
            text=safetensors_from_bytes(text)["text"],
            rhythm=safetensors_from_bytes(rhythm),
            meta=json.loads(meta),
        )

    def _member(self, shard: str, place: list[Any]) -> bytes:
        path = self._folder / shard
        descriptor = self._files.pop(shard, None)
        if descriptor is None:
            descriptor = _open(path)
            if len(self._files) == MOST_OPEN:
                os.close(self._files.pop(next(iter(self._files))))
        self._files[shard] = descriptor  # the last used stands last
        return _read(path, descriptor, place)


def read_latents(shard: Path, members: dict[str, list[Any]]) -> Tensor:
    """The (C, T, H, W) latents of one sample by its entry in the shard's index, before a manifest
    is there. Raises ConfigError for damage."""
    descriptor = _open(shard)
    try:
        content = _read(shard, descriptor, members["latents.safetensors"])
    finally:
        os.close(descriptor)
    return safetensors_from_bytes(content)["latents"]


def _open(shard: Path) -> int:
    try:
        return os.open(shard, os.O_RDONLY)
    except OSError as error:
        raise _damaged(shard, error.strerror) from None


def _read(shard: Path, descriptor: int, place: list[Any]) -> bytes:
    offset, size, digest = place
    content = os.pread(descriptor, size, offset)
    if sha256(content).hexdigest() != digest:
        raise _damaged(shard, f"bytes {offset} to {offset + size} are not what was written")
    return content


def _damaged(path: Path, what: str) -> ConfigError:
    shard = path.name.removesuffix(".json")
    return ConfigError(
        f"{path}: {what}; delete {shard} and {shard}.json and run `tempolora precompute` again"
    )


def prompt_name(prompt: str) -> str:
    """The name under which `prompts.safetensors` holds a prompt's embedding."""
    return sha256(prompt.encode()).hexdigest()[:16]


def has_prompts(folder: Path, prompts: list[str], text_encoder: str) -> bool:
    """Whether all prompts are embedded there, by the text encoder of that fingerprint."""
    try:
        with safe_open(folder / PROMPTS, framework="pt") as stored:
            made_by = (stored.metadata() or {}).get("text_encoder")
            return made_by == text_encoder and {*map(prompt_name, prompts)} <= {*stored.keys()}
    except (OSError, SafetensorError):
        return False


def load_prompt(folder: Path, prompt: str) -> Tensor:
    """The stored (L, D) embedding of a prompt. Raises ConfigError where it was not embedded."""
    try:
        stored = load_file(folder / PROMPTS)
    except (OSError, SafetensorError) as error:
        raise ConfigError(
            f"{folder / PROMPTS}: cannot be read ({error}); run `tempolora precompute` again"
        ) from None
    if prompt_name(prompt) not in stored:
        raise ConfigError(
            f"output.prompts: {prompt!r} was not embedded; run `tempolora precompute` again"
        )
    return stored[prompt_name(prompt)]


def verify_shards(folder: Path) -> int:
    """Check every shard against the manifest; the number of samples. Raises ConfigError."""
    manifest = read_manifest(folder)
    for shard in manifest["shards"]:
        path = folder / shard["name"]
        if not path.is_file():
            raise _damaged(path, "is missing")
        if sha256_of(path) != shard["sha256"]:
            raise _damaged(path, "differs from what was written")
        if sha256_of(index_path(path)) != shard["index_sha256"]:
            raise _damaged(index_path(path), "does not fit the manifest")
    # shards made before there was a readout have no "rhythm"
    for name, digest in {PROMPTS: manifest["prompts_sha256"], **manifest.get("rhythm", {})}.items():
        path = folder / name
        if not path.is_file() or sha256_of(path) != digest:
            raise ConfigError(
                f"{path}: not what was written; delete it and run `tempolora precompute` again"
            )
    return manifest["samples"]
