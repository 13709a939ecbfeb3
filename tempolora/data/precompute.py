"""Clips in, shards out: every frame and prompt goes through VAE and text encoder exactly once.

Any number of processes share the work, clip by clip, without talking to each other: each takes
every `world`-th clip, skips what finished shards already hold, and whoever finds everything done
fits the readout and writes the manifest. A run that was killed is started again and goes on.
"""

import logging
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import closing
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from tempolora.config import Config, ConfigError
from tempolora.data.clips import (
    Clip,
    ClipRejected,
    DecodedClip,
    DecoderFailed,
    list_clips,
)
from tempolora.data.fit_readout import VaeCoder, finish_readout, write_parts
from tempolora.data.pipeline import LoadedWindow, Pace, ShardWriter, load_ahead
from tempolora.data.shards import (
    MANIFEST,
    PROMPTS,
    Sample,
    ShardIndex,
    describe_sound,
    fingerprint,
    has_prompts,
    index_path,
    prompt_name,
    read_indexes,
    read_manifest,
    refuse_other_fingerprint,
    sample_key,
    write_manifest,
)
from tempolora.files import replacing, sha256_of
from tempolora.progress import progress
from tempolora.variants import NEGATIVE_PROMPT

log = logging.getLogger(__name__)


class Encoders(VaeCoder, Protocol):
    """What precompute needs of the models; the text encoder is gone before the VAE comes."""

    def encode_texts(self, prompts: list[str]) -> Iterator[tuple[str, Tensor]]:
        """Each prompt and its (L, D) embedding, in any order."""
        ...


@dataclass(frozen=True)
class _Job:
    """This process's share of the work."""

    cfg: Config
    folder: Path
    fingerprint: dict[str, Any]
    clips: list[Clip]
    rank: int


def precompute(cfg: Config, encoders: Encoders, rank: int = 0, world: int = 1) -> bool:
    """Fill `data.shards` with this process's share; True where all shares are now done.

    rank, world: this process among those that share the work. Raises ConfigError for mistakes in
    the clip list and for a folder that holds shards of another configuration.
    """
    folder = Path(cfg.data.shards)
    clips = list_clips(Path(cfg.data.source))
    wanted = fingerprint(cfg, encoders.fingerprints())
    folder.mkdir(parents=True, exist_ok=True)
    done = _finished_clips(folder, clips, wanted)
    share = [clip for clip in clips[rank::world] if clip.file not in done]
    log.info("%d clips, %d of them done before, %d to do here", len(clips), len(done), len(share))
    for left_by_a_killed_run in folder.glob(f".work-{rank}-*"):
        shutil.rmtree(left_by_a_killed_run)
    with tempfile.TemporaryDirectory(dir=folder, prefix=f".work-{rank}-") as scratch:
        job = _Job(cfg, folder, wanted, share, rank)
        texts = _spool_texts(job, encoders, Path(scratch))
        _write_shards(job, encoders, texts, Path(scratch))
    write_parts(cfg, folder, encoders, clips, rank, world)
    return _finish(cfg, folder, clips, encoders)


def _finished_clips(folder: Path, clips: list[Clip], wanted: dict[str, Any]) -> set[str]:
    """Files that finished shards hold; a shard with a clip that has changed since is removed."""
    current = {clip.file: clip for clip in clips}
    finished: set[str] = set()
    for name, index in read_indexes(folder).items():
        refuse_other_fingerprint(folder, index.fingerprint, wanted)
        stale = [
            file
            for file, identity in index.clips.items()
            if file not in current or not _is_same(current[file], identity)
        ]
        if not index.clips:  # nothing but clips whose decoder failed
            stale = list(index.failed)
        if stale:
            why = "changed or left the list" if index.clips else "could not be decoded"
            log.info("%s is made again: %s %s", name, ", ".join(stale), why)
            (folder / MANIFEST).unlink(missing_ok=True)
            index_path(folder / name).unlink(missing_ok=True)
            (folder / name).unlink(missing_ok=True)
        else:
            finished |= set(index.clips)
    return finished


def _identity(clip: Clip, digest: str) -> dict[str, Any]:
    """What tells whether a clip is still the one that was read; digest: SHA-256 of its bytes."""
    stat = clip.path.stat()
    return {
        "caption": clip.caption,
        "size": stat.st_size,
        "mtime_ns": stat.st_mtime_ns,
        "sha256": digest,
    }


def _is_same(clip: Clip, identity: dict[str, Any]) -> bool:
    stat = clip.path.stat()
    if clip.caption != identity["caption"] or stat.st_size != identity["size"]:
        return False
    # A copied data set has new times and the same bytes.
    return stat.st_mtime_ns == identity["mtime_ns"] or sha256_of(clip.path) == identity["sha256"]


def _spool_texts(job: _Job, encoders: Encoders, scratch: Path) -> dict[str, Path]:
    """Embed every caption to a file, so that memory holds neither all of them nor two models."""
    captions = sorted({clip.caption for clip in job.clips})
    prompts = _stored_prompts(job.cfg) if job.rank == 0 else []
    if has_prompts(job.folder, prompts, job.fingerprint["text_encoder"]):
        prompts = []
    wanted = captions + [prompt for prompt in prompts if prompt not in captions]
    texts = {}
    if wanted:
        with progress(what="captions", total=len(wanted), unit="") as bar:
            for prompt, text_LD in encoders.encode_texts(wanted):
                texts[prompt] = scratch / f"{prompt_name(prompt)}.safetensors"
                save_file({"text": text_LD.to(torch.bfloat16).contiguous()}, texts[prompt])
                bar.update()
    if prompts:
        stored = {prompt_name(p): load_file(texts[p])["text"] for p in prompts}
        with replacing(job.folder / PROMPTS) as temporary:
            save_file(stored, temporary, {"text_encoder": job.fingerprint["text_encoder"]})
    return texts


def _stored_prompts(cfg: Config) -> list[str]:
    """Prompts that training and its videos need without a text encoder."""
    return list(dict.fromkeys(["", NEGATIVE_PROMPT, *cfg.output.prompts]))


def _write_shards(job: _Job, encoders: Encoders, texts: dict[str, Path], scratch: Path) -> None:
    """Windows through the VAE; all else is done by others, before and behind it."""
    samples: list[Sample] = []
    index = ShardIndex(job.fingerprint)
    pace = Pace()
    bar = progress(what="clips", total=len(job.clips), unit="clip")
    # whatever ends this, what is being decoded and written comes to its end first
    ahead = closing(load_ahead(job.cfg, job.clips, scratch))
    with bar, ShardWriter(job.folder, job.rank) as writer, ahead as ready:
        for clip, found, window in ready:
            if window is not None:
                text_LD = load_file(texts[clip.caption])["text"]
                with pace:
                    latents = encoders.encode_frames(window.frames_FHW3)
                samples.append(_sample(job.cfg, encoders, clip, found, window, latents, text_LD))
                continue
            _enter(index, clip, found)
            bar.update()
            if len(samples) >= job.cfg.data.samples_per_shard:
                writer.write(samples, index)
                samples, index = [], ShardIndex(job.fingerprint)
        if index.clips or index.failed:
            writer.write(samples, index)
    if job.clips:
        log.info("%d clips, %s", len(job.clips), pace.describe(len(job.clips)))


def _enter(index: ShardIndex, clip: Clip, found: DecodedClip | ClipRejected) -> None:
    """What became of a clip."""
    if isinstance(found, DecoderFailed):
        log.warning("%s; the next run tries it again", found)
        index.failed[clip.file] = str(found)
    elif isinstance(found, ClipRejected):
        index.clips[clip.file] = _identity(clip, sha256_of(clip.path))
        log.warning("rejected: %s", found)
        index.rejected[clip.file] = str(found)
    else:
        index.clips[clip.file] = _identity(clip, found.sha256)
        if found.left_out:
            index.left_out[clip.file] = found.left_out
        for window in found.windows:
            index.frames["inbetween"] += window.inbetween
            index.frames["nearest_fallback"] += window.nearest_fallback


def _sample(
    cfg: Config,
    encoders: Encoders,
    clip: Clip,
    decoded: DecodedClip,
    window: LoadedWindow,
    latents: dict[str, Tensor],
    text_LD: Tensor,
) -> Sample:
    of = window.of
    key = sample_key(clip.file, of.index, of.speed)
    return Sample(
        key=key,
        latents={name: value.to(torch.bfloat16) for name, value in latents.items()},
        text=text_LD,
        rhythm=window.rhythm,
        meta={
            "key": key,
            "caption": clip.caption,
            "file": clip.file,
            "sha256": decoded.sha256,
            "window": of.index,
            "start_s": of.start_s,
            "source_fps": decoded.source_fps,
            "fps": cfg.timebase.fps,
            "speed": of.speed,
            "num_frames": cfg.data.num_frames,
            "height": cfg.data.height,
            "width": cfg.data.width,
            "inbetween_frames": of.inbetween,
            "nearest_fallback_frames": of.nearest_fallback,
            "decoder": decoded.decoder,
            "decoder_note": decoded.decoder_note,
            "rotation": decoded.rotation,
            **window.sound,
            "no_audio": decoded.no_audio,
            **encoders.fingerprints(),
        },
    )


def _finish(cfg: Config, folder: Path, clips: list[Clip], encoders: Encoders) -> bool:
    """Write readout and manifest if every clip is accounted for and the prompts are embedded."""
    indexes = read_indexes(folder)
    held = {file for index in indexes.values() for file in (*index.clips, *index.failed)}
    missing = [clip for clip in clips if clip.file not in held]
    if missing or not (folder / PROMPTS).is_file():
        log.info("this share is done; %d clips remain with other processes", len(missing))
        return False
    rhythm: dict[str, str] | None = {}
    if any(index.samples for index in indexes.values()):
        rhythm = finish_readout(cfg, folder, encoders, clips)
    if rhythm is None:
        log.info("this share is done; what the readout is fitted on remains with other processes")
        return False
    write_manifest(folder, indexes, {"clips": len(clips), "rhythm": rhythm})
    manifest = read_manifest(folder)
    log.info(
        "%s: %d samples from %d clips, %d clips rejected; %d frames made between source frames, "
        "%d taken from the nearest because none could be made; sound: %s%s",
        folder,
        manifest["samples"],
        len(clips),
        len(manifest["rejected"]),
        manifest["frames"]["inbetween"],
        manifest["frames"]["nearest_fallback"],
        describe_sound(manifest["sound"]),
        _describe_speeds(cfg, manifest["speeds"]),
    )
    if not manifest["samples"]:
        reason = manifest["rejected"][0]["reason"]
        raise ConfigError(
            f"{cfg.data.source}: none of its {len(clips)} clips can be used, so there is nothing "
            f"to train on; the first: {reason}"
        )
    return True


def _describe_speeds(cfg: Config, counts: dict[str, int]) -> str:
    if len(cfg.data.speeds) == 1:
        return ""
    each = (f"{counts.get(f'{speed:g}', 0)} at {speed:g}" for speed in cfg.data.speeds)
    return f"; samples by speed: {', '.join(each)}"
