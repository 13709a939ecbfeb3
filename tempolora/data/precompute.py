"""Clips in, shards out: every frame and prompt goes through VAE and text encoder exactly once.

Any number of processes share the work, clip by clip, without talking to each other: each takes
every `world`-th clip, skips what finished shards already hold, and whoever finds everything done
fits the readout and writes the manifest. A run that was killed is started again and goes on.
"""

import logging
import shutil
import tempfile
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor
from tqdm import tqdm

from tempolora.config import Config, ConfigError
from tempolora.data.audio import Track
from tempolora.data.clips import (
    Clip,
    ClipRejected,
    DecodedClip,
    DecoderFailed,
    WindowSpec,
    list_clips,
    read_clip,
)
from tempolora.data.fit_readout import VaeCoder, finish_readout, write_parts
from tempolora.data.shards import (
    ABSENT,
    BROKEN,
    HEARD,
    MANIFEST,
    PROMPTS,
    SILENT,
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
    write_shard,
)
from tempolora.files import replacing, sha256_of
from tempolora.rhythm.tempo import motion_energy
from tempolora.variants import NEGATIVE_PROMPT

log = logging.getLogger(__name__)

DECODED_AHEAD = 2  # clips being decoded while the VAE works on another
CAPTION_BATCH = 8
SPACED_WINDOWS = 4  # where data.max_windows is not set


class Encoders(VaeCoder, Protocol):
    """What precompute needs of the models; the text encoder is gone before the VAE comes."""

    def encode_texts(self, batches: Iterator[list[str]]) -> Iterator[list[Tensor]]:
        """Prompts to (L, D) embeddings, batch by batch."""
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
    batches = [wanted[i : i + CAPTION_BATCH] for i in range(0, len(wanted), CAPTION_BATCH)]
    texts = {}
    if batches:
        bar = tqdm(total=len(wanted), desc="captions", unit="", disable=None)
        for batch, embedded in zip(batches, encoders.encode_texts(iter(batches)), strict=True):
            for prompt, text_LD in zip(batch, embedded, strict=True):
                texts[prompt] = scratch / f"{prompt_name(prompt)}.safetensors"
                save_file({"text": text_LD.to(torch.bfloat16).contiguous()}, texts[prompt])
            bar.update(len(batch))
        bar.close()
    if prompts:
        stored = {prompt_name(p): load_file(texts[p])["text"] for p in prompts}
        with replacing(job.folder / PROMPTS) as temporary:
            save_file(stored, temporary, {"text_encoder": job.fingerprint["text_encoder"]})
    return texts


def _stored_prompts(cfg: Config) -> list[str]:
    """Prompts that training and its videos need without a text encoder."""
    return list(dict.fromkeys(["", NEGATIVE_PROMPT, *cfg.output.prompts]))


def _write_shards(job: _Job, encoders: Encoders, texts: dict[str, Path], scratch: Path) -> None:
    samples: list[Sample] = []
    index = ShardIndex(job.fingerprint)
    for clip, decoded in _decode_ahead(job, scratch):
        if isinstance(decoded, DecoderFailed):
            log.warning("%s; the next run tries it again", decoded)
            index.failed[clip.file] = str(decoded)
            continue
        if isinstance(decoded, ClipRejected):
            index.clips[clip.file] = _identity(clip, sha256_of(clip.path))
            log.warning("rejected: %s", decoded)
            index.rejected[clip.file] = str(decoded)
        else:
            index.clips[clip.file] = _identity(clip, decoded.sha256)
            if decoded.left_out:
                index.left_out[clip.file] = decoded.left_out
            for window in decoded.windows:
                index.frames["inbetween"] += window.inbetween
                index.frames["nearest_fallback"] += window.nearest_fallback
            text_LD = load_file(texts[clip.caption])["text"]
            samples += _samples_of(job.cfg, encoders, clip, decoded, text_LD)
        if len(samples) >= job.cfg.data.samples_per_shard:
            write_shard(_next_shard(job), samples, index)
            samples, index = [], ShardIndex(job.fingerprint)
    if index.clips or index.failed:
        write_shard(_next_shard(job), samples, index)


def _next_shard(job: _Job) -> Path:
    """A name no process uses: shards are numbered within the process that writes them."""
    taken = [int(path.name[6:12]) for path in job.folder.glob(f"{job.rank:05d}-*.tar")]
    return job.folder / f"{job.rank:05d}-{max(taken, default=-1) + 1:06d}.tar"


def _decode_ahead(job: _Job, scratch: Path) -> Iterator[tuple[Clip, DecodedClip | ClipRejected]]:
    """Decode the next clips in subprocesses while the caller works on this one."""
    data = job.cfg.data
    spec = WindowSpec(
        fps=job.cfg.timebase.fps,
        num_frames=data.num_frames,
        height=data.height,
        width=data.width,
        windows=data.windows,
        max_windows=data.max_windows or SPACED_WINDOWS,
        resample=data.resample,
        speeds=data.speeds,
    )

    def start(position: int) -> Future[DecodedClip]:
        workdir = scratch / f"clip-{position}"
        workdir.mkdir()
        return pool.submit(
            read_clip, job.clips[position].path, spec, workdir, data.decode_timeout_s
        )

    bar = tqdm(job.clips, desc="clips", unit="clip", disable=None)
    with ThreadPoolExecutor(DECODED_AHEAD) as pool:
        running = {i: start(i) for i in range(min(DECODED_AHEAD, len(job.clips)))}
        for position, clip in enumerate(bar):
            try:
                decoded: DecodedClip | ClipRejected = running.pop(position).result()
            except ClipRejected as reason:
                decoded = reason
            ahead = position + DECODED_AHEAD
            if ahead < len(job.clips):
                running[ahead] = start(ahead)
            yield clip, decoded
            shutil.rmtree(scratch / f"clip-{position}")


def _samples_of(
    cfg: Config, encoders: Encoders, clip: Clip, decoded: DecodedClip, text_LD: Tensor
) -> Iterator[Sample]:
    fps, num_frames = cfg.timebase.fps, cfg.data.num_frames
    track = None
    if decoded.audio is not None:
        track = Track(decoded.audio, decoded.audio_rate, decoded.audio_start_s)
    elif decoded.audio_broken:
        log.warning("%s: %s; it is used without", clip.file, decoded.no_audio)
    for window in decoded.windows:
        frames_FHW3 = torch.from_numpy(np.array(window.frames))
        latents = encoders.encode_frames(frames_FHW3)
        rhythm = {"motion_energy": motion_energy(frames_FHW3)}
        sound = {"sound": BROKEN if decoded.audio_broken else ABSENT}
        if track is not None:
            sound = {"sound": HEARD if track.is_heard(window.times_s) else SILENT}
        if sound["sound"] == HEARD:
            heard = track.window(window.times_s, fps)
            rhythm["onset"] = torch.from_numpy(heard.onset_F)
            rhythm["beats_s"] = torch.from_numpy(heard.beats_s)
            sound["tempo"] = heard.tempo and asdict(heard.tempo)
        key = sample_key(clip.file, window.index, window.speed)
        yield Sample(
            key=key,
            latents={name: value.to(torch.bfloat16) for name, value in latents.items()},
            text=text_LD,
            rhythm=rhythm,
            meta={
                "key": key,
                "caption": clip.caption,
                "file": clip.file,
                "sha256": decoded.sha256,
                "window": window.index,
                "start_s": window.start_s,
                "source_fps": decoded.source_fps,
                "fps": fps,
                "speed": window.speed,
                "num_frames": num_frames,
                "height": cfg.data.height,
                "width": cfg.data.width,
                "inbetween_frames": window.inbetween,
                "nearest_fallback_frames": window.nearest_fallback,
                "decoder": decoded.decoder,
                "decoder_note": decoded.decoder_note,
                "rotation": decoded.rotation,
                **sound,
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
