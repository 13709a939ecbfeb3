"""What precompute costs: the VAE by variant, the text encoder, and the whole of it on drawn clips.

    python -m tempolora.bench precompute [--variants eager all ...] [--config configs/a14b.json]
        [--clips 4] [--captions 256] [--pipeline] [--json F]

Encoding, seconds a clip: `eager` is diffusers as it comes, `channels_last` the same in that layout;
`walk` is `model/fast_vae.py` by four frames at a time, `chunk16` by sixteen, `compile` the walk
compiled, `all` both, `benchmark` both with cuDNN choosing its kernels by trial. Differences are the
largest of the normalised latents, over the largest value, to eager and to fp32. Decoding: eager and
channels_last; neither where `--variants` names none. `--pipeline` precomputes `--clips` mp4s, which
are copies of four of smooth moving noise. Weights are random, but for TinyWan's.
"""

import argparse
import logging
import shutil
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from tempolora.config import Config, load_config
from tempolora.data.video import write_mp4
from tempolora.files import write_json
from tempolora.model import fast_vae, wan
from tempolora.model.encoders import WanEncoders, batches_by_length
from tempolora.model.memory import free_memory
from tempolora.variants import TEXT_TOKENS

GIB = 2**30
DISTINCT = 4  # clips of a drawn folder


@dataclass(frozen=True)
class Variant:
    """One way to encode. frames: of a chunk of ours; None: diffusers' own encoder."""

    frames: int | None = None
    channels_last: bool = True
    compiled: bool = False
    benchmark: bool = False


VARIANTS = {
    "eager": Variant(channels_last=False),
    "channels_last": Variant(),
    "walk": Variant(frames=4),
    "chunk16": Variant(frames=16),
    "compile": Variant(frames=4, compiled=True),
    "all": Variant(frames=16, compiled=True),
    "benchmark": Variant(frames=16, compiled=True, benchmark=True),
}
DECODED = ("eager", "channels_last")


def main(arguments: list[str]) -> None:
    parser = argparse.ArgumentParser(
        prog="python -m tempolora.bench precompute",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--config", type=Path, default=Path("configs/a14b.json"))
    parser.add_argument("--set", action="append", default=[], metavar="KEY=VALUE")
    parser.add_argument("--variants", nargs="*", choices=VARIANTS, default=list(VARIANTS))
    parser.add_argument("--clips", type=int, default=4)
    parser.add_argument("--batch", type=int, default=1, help="clips encoded together")
    parser.add_argument("--captions", type=int, default=256, help="0: leave the text encoder out")
    parser.add_argument("--pipeline", action="store_true", help="also precompute --clips clips")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--json", type=Path, help="write the figures there")
    options = parser.parse_args(arguments)
    cfg = load_config(options.config, options.set)
    if not cfg.model.id.startswith("tinywan"):
        cfg = load_config(options.config, [*options.set, "model.init=random"])
    device = torch.device(options.device)
    figures: dict[str, Any] = {"device": _name(device), "torch": torch.__version__}
    print(f"{figures['device']}, torch {torch.__version__}, {cfg.model.variant}, {cfg.data}")
    with torch.no_grad():
        if options.variants:
            figures["encode"], latents = measure_encoding(cfg, options, device)
            figures["decode"] = measure_decoding(cfg, options, latents, device)
            del latents
            free_memory(device)
        if options.captions:
            figures["captions"] = measure_text(cfg, options.captions, device)
            free_memory(device)
        if options.pipeline:
            figures["pipeline"] = measure_pipeline(cfg, options.clips, device)
    if options.json:
        write_json(options.json, figures)


def measure_encoding(
    cfg: Config, options: argparse.Namespace, device: torch.device
) -> tuple[dict[str, Any], Tensor]:
    """A line for every variant, eager among them as the rule; and the latents of one batch."""
    clips = [drawn_frames(cfg, options.batch, seed).to(device) for seed in range(options.clips)]
    exact = _exact_latents(cfg, clips[0], device)
    print("encode | s/clip | eager / this | GiB | first call s | difference to eager, to fp32")
    rows: dict[str, Any] = {}
    eager = exact
    names = list(dict.fromkeys(["eager", *options.variants]))
    for name in names:
        variant = VARIANTS[name]
        vae = load_vae(cfg, device, variant.channels_last)

        def encode(frames: Tensor, vae: Any = vae, variant: Variant = variant) -> Tensor:
            return normalised(vae, moments(vae, variant, frames))

        cudnn = torch.backends.cudnn
        with cudnn.flags(enabled=True, benchmark=variant.benchmark, allow_tf32=cudnn.allow_tf32):
            row, latents = timed(encode, clips, device)
        row["s"] /= options.batch
        if name == "eager":
            eager = latents
        row["ratio"] = rows["eager"]["s"] / row["s"] if rows else 1.0
        row["to_eager"], row["to_fp32"] = difference(latents, eager), difference(latents, exact)
        rows[name] = row
        print(
            f"{name} | {row['s']:.3f} | {row['ratio']:.2f} | {row['gib']:.1f} | "
            f"{row['first_s']:.1f} | {row['to_eager']:.1e}, {row['to_fp32']:.1e}",
            flush=True,
        )
        del vae, encode
        torch._dynamo.reset()
        fast_vae._compiled.cache_clear()
        free_memory(device)
    return rows, eager


def measure_decoding(
    cfg: Config, options: argparse.Namespace, latents: Tensor, device: torch.device
) -> dict[str, Any]:
    """diffusers' decoder as it comes and with channels last, seconds a clip."""
    print("decode | s/clip | GiB")
    rows = {}
    for name in DECODED:
        vae = load_vae(cfg, device, channels_last=name == "channels_last")
        row, _ = timed(
            lambda latents, vae=vae: wan.decode_frames(vae, latents),
            [latents] * options.clips,
            device,
        )
        row["s"] /= options.batch
        rows[name] = row
        print(f"{name} | {row['s']:.3f} | {row['gib']:.1f}", flush=True)
        del vae
        free_memory(device)
    return rows


def measure_text(cfg: Config, count: int, device: torch.device) -> dict[str, float]:
    """Captions a second, padded to 512 tokens by eights, and by length as precompute does."""
    tokenizer, encoder = wan.load_text(cfg.model, device)
    prompts = drawn_captions(count)
    lengths = wan.padded_lengths(tokenizer, prompts)

    def padded() -> None:
        for start in range(0, count, 8):
            ids = torch.zeros(len(prompts[start : start + 8]), TEXT_TOKENS, dtype=torch.long)
            mask = torch.zeros_like(ids)
            for row, length in enumerate(lengths[start : start + 8]):
                mask[row, :length] = 1
            encoder(ids.to(device), mask.to(device)).last_hidden_state.cpu()

    def by_length() -> None:
        for batch in batches_by_length(prompts, lengths):
            for text_LD in wan.encode_prompts(tokenizer, encoder, batch):
                text_LD.cpu()

    rates = {}
    for name, run in (("padded to 512", padded), ("by length", by_length)):
        wan.encode_prompts(tokenizer, encoder, prompts[:8])
        began = time.perf_counter()
        run()
        rates[name] = count / (time.perf_counter() - began)
    said = ", ".join(f"{name} {rate:.1f}/s" for name, rate in rates.items())
    print(f"captions of {min(lengths)} to {max(lengths)} tokens: {said}", flush=True)
    return rates


class _TimedEncoders(WanEncoders):
    """Encoders that note when the device began and ended each window."""

    def __init__(self, cfg: Config, device: torch.device) -> None:
        super().__init__(cfg, device, compile_after=0)
        self.spans: list[tuple[float, float, float]] = []  # began, ended, s on the device

    def encode_frames(self, frames_FHW3: Tensor) -> dict[str, Tensor]:
        began = time.perf_counter()
        if self._device.type != "cuda":
            encoded = super().encode_frames(frames_FHW3)
            ended = time.perf_counter()
            self.spans.append((began, ended, ended - began))
            return encoded
        marks = [torch.cuda.Event(enable_timing=True) for _ in range(2)]
        marks[0].record()
        encoded = super().encode_frames(frames_FHW3)
        marks[1].record()
        marks[1].synchronize()
        self.spans.append((began, time.perf_counter(), marks[0].elapsed_time(marks[1]) / 1000))
        return encoded


def measure_pipeline(cfg: Config, count: int, device: torch.device) -> dict[str, float]:
    """Precompute of a folder of clips: clips a second and the VAE's share, once it is warm."""
    from tempolora.data.pipeline import num_decoders
    from tempolora.data.precompute import precompute

    logging.basicConfig(level=logging.WARNING)
    data = cfg.data
    with tempfile.TemporaryDirectory(prefix="bench-precompute-") as folder:
        source, shards = Path(folder, "clips"), Path(folder, "shards")
        draw_clips(cfg, source, count)
        changes = {"source": str(source), "shards": str(shards)}
        cfg = cfg.model_copy(update={"data": data.model_copy(update=changes)})
        encoders = _TimedEncoders(cfg, device)
        began = time.perf_counter()
        precompute(cfg, encoders)
        whole_s = time.perf_counter() - began
    spans = encoders.spans[:count]  # what follows is drawn for the readout
    warm = spans[1:]
    wall_s = spans[-1][1] - spans[0][1]
    figures = {
        "clips": count,
        "decoders": num_decoders(data.workers),
        "whole_s": whole_s,
        "clips_per_s": len(warm) / wall_s if warm else float("nan"),
        "vae_share": sum(busy for *_, busy in warm) / wall_s if warm else float("nan"),
    }
    print(
        f"pipeline: {count} clips in {whole_s:.1f} s, text and readout among it; from the second "
        f"on {figures['clips_per_s']:.2f} clips/s, the device encoding for "
        f"{figures['vae_share']:.1%} of the time; {figures['decoders']} decoders",
        flush=True,
    )
    return figures


def load_vae(cfg: Config, device: torch.device, channels_last: bool) -> Any:
    """The VAE in one layout."""
    vae = wan.load_vae(cfg.model, device)
    if channels_last:
        fast_vae.to_channels_last(vae)
    else:
        for parameter in vae.parameters():
            parameter.data = parameter.data.contiguous()
    return vae


def moments(vae: Any, variant: Variant, frames_BFHW3: Tensor) -> Tensor:
    """(B, 2 C, T, H, W) as this variant computes it."""
    video_BFHW3 = (frames_BFHW3.float() / 127.5 - 1).to(vae.dtype)
    if variant.frames is not None:
        return fast_vae.encode(vae, video_BFHW3, variant.frames, variant.compiled)
    video_BCFHW = video_BFHW3.permute(0, 4, 1, 2, 3)  # channels last as it is
    return vae._encode(video_BCFHW if variant.channels_last else video_BCFHW.contiguous())


def normalised(vae: Any, moments_BCTHW: Tensor) -> Tensor:
    mean, std = wan._statistics(vae)
    return (moments_BCTHW.chunk(2, dim=1)[0].float() - mean) / std


def _exact_latents(cfg: Config, frames_BFHW3: Tensor, device: torch.device) -> Tensor:
    """diffusers' latents in fp32, without TF32."""
    fp32 = cfg.model_copy(update={"model": cfg.model.model_copy(update={"base": "fp32"})})
    vae = load_vae(fp32, device, channels_last=False)
    # the weights of the others, rounded as theirs
    for ours, theirs in zip(
        vae.parameters(), load_vae(cfg, device, False).parameters(), strict=True
    ):
        ours.data = theirs.data.float()
    with torch.backends.cudnn.flags(enabled=True, benchmark=False, allow_tf32=False):
        latents = normalised(vae, moments(vae, VARIANTS["eager"], frames_BFHW3))
    del vae
    free_memory(device)
    return latents


def timed(
    call: Callable[[Tensor], Tensor], inputs: list[Tensor], device: torch.device
) -> tuple[dict[str, float], Tensor]:
    """Seconds a call after the first, GiB reserved by it, seconds of the first; its result."""
    cuda = device.type == "cuda"
    if cuda:
        torch.cuda.reset_peak_memory_stats(device)
    began = time.perf_counter()
    result = call(inputs[0])
    wait(device)
    first_s = time.perf_counter() - began
    began = time.perf_counter()
    for one in inputs:
        call(one)
    wait(device)
    seconds = (time.perf_counter() - began) / len(inputs)
    gib = torch.cuda.max_memory_reserved(device) / GIB if cuda else float("nan")
    return {"s": seconds, "gib": gib, "first_s": first_s}, result


def wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def difference(a: Tensor, b: Tensor) -> float:
    """Largest difference over the largest value."""
    return ((a - b).abs().max() / b.abs().max()).item()


def drawn_frames(cfg: Config, batch: int, seed: int) -> Tensor:
    """uint8 (B, F, H, W, 3) of the configured size: smooth noise that moves."""
    data = cfg.data
    random = np.random.default_rng(seed)
    coarse = torch.from_numpy(
        random.random((batch, 3, data.num_frames // 4 + 1, 9, 16), dtype=np.float32)
    )
    size = (data.num_frames, data.height, data.width)
    video = torch.nn.functional.interpolate(coarse, size, mode="trilinear", align_corners=True)
    return (video * 255).round().to(torch.uint8).permute(0, 2, 3, 4, 1).contiguous()


def draw_clips(cfg: Config, folder: Path, count: int) -> None:
    """A data set of `count` mp4s, four of them distinct, each with a caption of its own."""
    folder.mkdir()
    for number in range(count):
        path = folder / f"{number:04d}.mp4"
        if number < DISTINCT:
            write_mp4(path, drawn_frames(cfg, 1, number)[0].numpy(), cfg.timebase.fps)
        else:
            shutil.copy(folder / f"{number % DISTINCT:04d}.mp4", path)
    captions = enumerate(drawn_captions(count))
    lines = [f"{number:04d}.mp4|{caption}\n" for number, caption in captions]
    (folder / "prompts.txt").write_text("".join(lines), encoding="utf-8")


def drawn_captions(count: int) -> list[str]:
    """Of 20 to 200 signs, which TinyWan's tokenizer makes as many tokens of."""
    random = np.random.default_rng(0)
    lengths = random.integers(20, 200, count)
    return ["".join(chr(97 + sign) for sign in random.integers(0, 26, n)) for n in lengths]


def _name(device: torch.device) -> str:
    return torch.cuda.get_device_name(device) if device.type == "cuda" else "CPU"
