"""The last stage of precompute: decode a few stored latents, fit the readout to them, judge it.

The readout belongs to the VAE and not to the data set, so few clips do: at most 64 of the data set,
topped up with drawn ones where there are fewer than 16, and a readout once fitted is kept in the
cache by the VAE's fingerprint. Processes do not talk: each leaves the sums of its own clips as part
files, and whoever finds all of them fits. Nothing is encoded here but drawn clips.
"""

import json
import logging
import shutil
from dataclasses import dataclass
from hashlib import sha256
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import torch
from torch import Tensor

from tempolora.config import Config
from tempolora.data.clips import Clip
from tempolora.data.readout import BANK, READOUT, read_checked, write_checked
from tempolora.data.shards import read_indexes, read_latents, sample_key
from tempolora.data.toy import KINDS, draw_scenes, render
from tempolora.files import cache_folder, replacing, sha256_of
from tempolora.progress import progress
from tempolora.rhythm.probes import LEAST_COHERENCE
from tempolora.rhythm.readout import Part, Readout, draw, fit, group_of
from tempolora.rhythm.tempo import block_luminance, motion, power_spectrum

log = logging.getLogger(__name__)

FORMAT = 2  # 1: topped up with clips of other kinds, shapes and textures
PARTS = ".readout"
PLOT = "readout.png"
MOST_CLIPS = 64
FEWEST_CLIPS = 16  # fewer usable ones are topped up with drawn ones
DRAWN_ALONE = 8  # where there is no data set and only a video is to be guided
CROP = 64  # latent pixels of height and width that are decoded
DRAWN_PX = 192  # height and width of drawn clips
BANK_SAMPLES = 512
BAND_HZ = (0.5, 6.0)


class VaeCoder(Protocol):
    """The VAE of a configuration's model."""

    def fingerprints(self) -> dict[str, str]: ...

    def encode_frames(self, frames_FHW3: Tensor) -> dict[str, Tensor]:
        """uint8 frames to {"latents": (C, T, H, W)} and, for i2v A14B, "condition" beside it."""
        ...

    def decode_frames(self, latents_CTHW: Tensor) -> Tensor:
        """Latents to RGB (F, 3, H, W) float in 0..1, on any device."""
        ...


@dataclass(frozen=True)
class _Stored:
    """A sample in a finished shard."""

    key: str
    shard: Path
    members: dict[str, list[Any]]

    def latents(self) -> Tensor:
        return read_latents(self.shard, self.members)

    @property
    def digest(self) -> str:
        """SHA-256 of the latents' bytes."""
        return self.members["latents.safetensors"][2]


def write_parts(
    cfg: Config, folder: Path, vae: VaeCoder, clips: list[Clip], rank: int, world: int
) -> None:
    """Decode those of the chosen clips that are this process's; a part file for each.

    Nothing is decoded where the readout is there, or in the cache, from where it is copied.
    """
    if _is_readout(cfg, vae, folder / READOUT):
        return
    cached = _cached(cfg, vae)
    if _is_readout(cfg, vae, cached):
        log.info("the readout of this VAE comes from %s", cached)
        _copy(cached, folder / READOUT)
        return
    mine = clips[rank::world]
    todo = [
        (path, facts, stored)
        for path, facts, stored in _parts(folder, vae, clips, mine)
        if _read_part(path, facts) is None
    ]
    for path, facts, stored in progress(todo, what="readout", unit="clip"):
        path.parent.mkdir(exist_ok=True)
        part = _part_of(vae, stored.latents(), stored.key)
        write_checked(path, part.tensors(), facts)


def finish_readout(
    cfg: Config, folder: Path, vae: VaeCoder, clips: list[Clip]
) -> dict[str, str] | None:
    """Fit, draw and write what the rhythm terms need; the SHA-256 of each file by its name.

    None where parts are missing that another process makes.
    """
    if not _is_readout(cfg, vae, folder / READOUT):
        parts = [_read_part(path, facts) for path, facts, _ in _parts(folder, vae, clips, clips)]
        if None in parts:
            return None
        _fit(cfg, folder, vae, parts)
    shutil.rmtree(folder / PARTS, ignore_errors=True)
    tensors, facts = read_checked(folder / READOUT)
    readout = Readout.from_tensors(tensors)
    _say(cfg, readout, facts)
    with replacing(folder / PLOT) as temporary:
        draw(readout, cfg.timebase).savefig(temporary, format="png", dpi=120)
    _write_bank(folder, readout)
    return {name: sha256_of(folder / name) for name in (READOUT, BANK)}


def readout_of_vae(cfg: Config, vae: VaeCoder) -> Readout:
    """A readout of this VAE and length where there may be no shards, for guidance.

    That of data.shards or of the cache; else `drawn_readout`.
    """
    for path in (Path(cfg.data.shards) / READOUT, _cached(cfg, vae)):
        if _is_readout(cfg, vae, path):
            return _read(path)
    return drawn_readout(cfg, vae)


def drawn_readout(cfg: Config, vae: VaeCoder) -> Readout:
    """One fitted to drawn clips alone, and kept in the cache apart: no data set is given it."""
    drawn = _cached(cfg, vae, "-drawn")
    if _is_readout(cfg, vae, drawn):
        return _read(drawn)
    log.info("no readout of this VAE is there yet: fitting one to %d drawn clips", DRAWN_ALONE)
    readout, ridges = fit(_drawn_parts(cfg, vae, DRAWN_ALONE))
    facts = {"clips": 0, "drawn": DRAWN_ALONE, "ridge": ridges}
    facts |= {"format": FORMAT, "vae": vae.fingerprints()["vae"]}
    _say(cfg, readout, facts)
    try:
        drawn.parent.mkdir(parents=True, exist_ok=True)
        write_checked(drawn, readout.tensors(), facts)
    except OSError as error:
        log.warning("%s: the readout cannot be kept there (%s)", drawn, error.strerror)
    return readout


def _read(path: Path) -> Readout:
    log.info("the readout comes from %s", path)
    return Readout.from_tensors(read_checked(path)[0])


def _is_readout(cfg: Config, vae: VaeCoder, path: Path) -> bool:
    """Whether a whole readout of this VAE and length is there."""
    try:
        tensors, facts = read_checked(path)
        readout = Readout.from_tensors(tensors)
    except FileNotFoundError:
        return False
    except ValueError as error:
        log.warning("%s: damaged (%s); it is made again", path, error)
        return False
    wanted = (FORMAT, vae.fingerprints()["vae"], cfg.data.num_frames)
    return (facts["format"], facts["vae"], readout.num_frames) == wanted


def _copy(source: Path, path: Path) -> None:
    with replacing(path) as temporary:
        shutil.copyfile(source, temporary)


def _cached(cfg: Config, vae: VaeCoder, which: str = "") -> Path:
    fingerprint = vae.fingerprints()["vae"][:16]
    name = f"readout-{fingerprint}-{cfg.data.num_frames}-v{FORMAT}{which}.safetensors"
    return cache_folder() / name


def _parts(
    folder: Path, vae: VaeCoder, clips: list[Clip], of: list[Clip]
) -> list[tuple[Path, dict[str, Any], _Stored]]:
    """Part file, the facts it must state and the sample, for each chosen clip among `of`.

    Chosen are the first windows of the MOST_CLIPS clips whose names have the smallest SHA-256, so
    that every process chooses alike; those that were rejected drop out.
    """
    chosen = sorted(clips, key=lambda clip: _hash(clip.file))[:MOST_CLIPS]
    mine = {clip.file for clip in of}
    stored = _stored_samples(folder)
    found = []
    for clip in chosen:
        windows = sample_key(clip.file, 0).removesuffix("0000")
        first = min((key for key in stored if key.startswith(windows)), default=None)
        if first is not None and clip.file in mine:
            sample = stored[first]
            facts = {
                "format": FORMAT,
                "vae": vae.fingerprints()["vae"],
                "latents": sample.digest,
            }
            found.append((folder / PARTS / f"{first}.safetensors", facts, sample))
    return found


def _stored_samples(folder: Path) -> dict[str, _Stored]:
    return {
        key: _Stored(key, folder / shard, members)
        for shard, index in read_indexes(folder).items()
        for key, members in index.samples.items()
    }


def _read_part(path: Path, wanted: dict[str, Any]) -> Part | None:
    """A part, or None where it is not there, not whole, or of other latents."""
    try:
        tensors, facts = read_checked(path)
    except (FileNotFoundError, ValueError):
        return None
    return Part.from_tensors(tensors) if facts == wanted else None


def _part_of(vae: VaeCoder, latents_CTHW: Tensor, name: str) -> Part:
    """The sums of a clip's middle, decoded; the whole picture might not fit into memory."""
    latents_CTHW = _middle(latents_CTHW)
    frames_F3HW = vae.decode_frames(latents_CTHW)
    luma_SHW = block_luminance(frames_F3HW[1:], *latents_CTHW.shape[2:]).cpu()
    return Part.of(latents_CTHW, luma_SHW, seed=int(_hash(name)[:8], 16))


def _middle(latents_CTHW: Tensor) -> Tensor:
    height, width = latents_CTHW.shape[2:]
    top, left = max(0, height - CROP) // 2, max(0, width - CROP) // 2
    return latents_CTHW[:, :, top : top + CROP, left : left + CROP]


def _fit(cfg: Config, folder: Path, vae: VaeCoder, parts: list[Part]) -> None:
    """Write readout.safetensors, and keep it in the cache."""
    drawn = _drawn_parts(cfg, vae, FEWEST_CLIPS - len(parts))
    readout, ridges = fit([*parts, *drawn])
    facts = {
        "format": FORMAT,
        "vae": vae.fingerprints()["vae"],
        "clips": len(parts),
        "drawn": len(drawn),
        "ridge": ridges,
    }
    write_checked(folder / READOUT, readout.tensors(), facts)
    cached = _cached(cfg, vae)
    try:
        cached.parent.mkdir(parents=True, exist_ok=True)
        _copy(folder / READOUT, cached)
    except OSError as error:  # it only saves the next data set some minutes
        log.warning("%s: the readout cannot be kept there (%s)", cached, error.strerror)


def _drawn_parts(cfg: Config, vae: VaeCoder, count: int) -> list[Part]:
    """Parts of drawn clips, of known motion over known patterns."""
    height, width = (min(size, DRAWN_PX) for size in (cfg.data.height, cfg.data.width))
    parts = []
    for number in progress(range(count), what="drawn clips", unit="clip"):
        kinds = (KINDS[number % len(KINDS)],)
        (frames,) = render(
            draw_scenes(1, np.random.default_rng(number), kinds=kinds),
            fps=cfg.timebase.fps,
            num_frames=cfg.data.num_frames,
            height=height,
            width=width,
        )
        latents = vae.encode_frames(frames)["latents"].to(torch.bfloat16)
        parts.append(_part_of(vae, latents, f"drawn {number}"))
    return parts


def _say(cfg: Config, readout: Readout, facts: dict[str, Any]) -> None:
    """One line: how well the readout sees."""
    r2_K = readout.r2_GK[group_of(cfg.timebase.latent_frames - 1)]
    bins = list(zip(cfg.timebase.bins_hz, readout.g2_F.tolist(), strict=True))[1:]
    low, high = BAND_HZ
    lowest = min(((g2, hz) for hz, g2 in bins if low <= hz <= high), default=None)
    in_band = "" if lowest is None else f"at least {lowest[0]:.3f} from {low:g} to {high:g} Hz, "
    blind = ", ".join(f"{hz:.2f}" for hz, g2 in bins if g2 < LEAST_COHERENCE)
    log.info(
        "readout: R^2 %s in the four frames of a group; coherence %sbelow %g at %s; "
        "fitted on %d clips of a data set and %d drawn ones",
        " ".join(f"{r2:.3f}" for r2 in r2_K.tolist()),
        in_band,
        LEAST_COHERENCE,
        f"{blind} Hz" if blind else "no frequency",
        facts["clips"],
        facts["drawn"],
    )


def _write_bank(folder: Path, readout: Readout) -> None:
    """Write rhythm_bank.safetensors, unless it is there and made of these samples.

    Clips at another speed than their own say nothing of what is usual, unless there are no others.
    """
    stored = _stored_samples(folder)
    speeds = {key: v for index in read_indexes(folder).values() for key, v in index.speeds.items()}
    own = [key for key in stored if speeds[key] == 1] or list(stored)
    chosen = sorted(sorted(own, key=_hash)[:BANK_SAMPLES])
    made_of = [sha256_of(folder / READOUT), *(stored[key].digest for key in chosen)]
    facts = {"format": FORMAT, "made_of": _hash(json.dumps(made_of))}
    try:
        if read_checked(folder / BANK)[1] == facts:
            return
    except FileNotFoundError:
        pass
    except ValueError as error:
        log.warning("%s: damaged (%s); it is made again", folder / BANK, error)
    power, moved = [], []
    for key in progress(chosen, what="rhythm bank", unit="clip"):
        luma_BSHW = readout.luminance(stored[key].latents()[None])
        power.append(power_spectrum(luma_BSHW))
        moved.append(motion(luma_BSHW))
    tensors = {"power": torch.cat(power), "motion": torch.cat(moved)}
    write_checked(folder / BANK, tensors, facts)


def _hash(text: str) -> str:
    return sha256(text.encode()).hexdigest()
