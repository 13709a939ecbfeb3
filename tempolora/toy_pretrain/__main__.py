"""`python -m tempolora.toy_pretrain`: train TinyWan's parts, and measure them.

`vae --variant t2v_a14b --out FILE` trains a small causal VAE on drawn clips, and on crops of real
ones with --clips; `measure` prints how well such a file, or the shipped one, passes a picture and
its rhythm; `text --out FILE` draws the text encoder; `experts --expert high --out FILE` trains a
text-to-video expert on latents of the VAE; `folder --high FILE --low FILE --out FOLDER` makes a
model folder of the two.
"""

import argparse
import logging
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch

from tempolora.config import ConfigError
from tempolora.model import tinywan
from tempolora.toy_pretrain.clips import draw_pool, drawn_clips, real_pool, real_windows
from tempolora.toy_pretrain.experts import encode_pool, train_expert
from tempolora.toy_pretrain.measure import measure_vae
from tempolora.toy_pretrain.parts import write_part
from tempolora.toy_pretrain.vae import scale_latents, train_vae
from tempolora.variants import VARIANTS

log = logging.getLogger(__name__)

REAL_SHARE = 0.3  # of the pool, where there are real clips
HELD_OUT = 3  # every third real clip is only measured


def main(argv: list[str] | None = None) -> int:
    options = _parser().parse_args(argv)
    logging.basicConfig(stream=sys.stderr, level=logging.INFO, format="%(message)s")
    try:
        options.command(options)
    except ConfigError as error:
        sys.stderr.write(f"toy_pretrain: {error}\n")
        return 2
    return 0


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m tempolora.toy_pretrain", description=__doc__)
    commands = parser.add_subparsers(required=True)

    vae = _subcommand(commands, "vae", _vae)
    vae.add_argument("--out", type=Path, required=True, help="the .safetensors file to write")
    vae.add_argument("--steps", type=int, default=6000)
    vae.add_argument("--drawn", type=int, default=1536, help="clips to draw")
    vae.add_argument("--seed", type=int, default=0)
    vae.add_argument("--workers", type=int, default=2, help="processes that draw")

    experts = _subcommand(commands, "experts", _experts)
    experts.add_argument("--expert", choices=VARIANTS[tinywan.TRAINED].experts, required=True)
    experts.add_argument("--out", type=Path, required=True, help="the .safetensors file to write")
    experts.add_argument("--vae", type=Path, help="by default what is shipped")
    experts.add_argument("--steps", type=int, default=15_000)
    experts.add_argument("--drawn", type=int, default=32_768, help="clips to draw and encode")
    experts.add_argument("--seed", type=int, default=0)

    text = _subcommand(commands, "text", _text)
    text.add_argument("--out", type=Path, required=True, help="the .safetensors file to write")

    folder = _subcommand(commands, "folder", _folder)
    for name in ("high", "low"):
        folder.add_argument(f"--{name}", type=Path, required=True, help="what `experts` wrote")
    folder.add_argument("--vae", type=Path, help="the one they were trained on, if not shipped")
    folder.add_argument("--out", type=Path, required=True, help="the folder to make")

    measure = _subcommand(commands, "measure", _measure)
    measure.add_argument("--weights", type=Path, help="by default what is shipped")

    for sub in (vae, measure):
        sub.add_argument("--variant", choices=VARIANTS, default="t2v_a14b")
        sub.add_argument("--clips", type=Path, help="folder of real clips with its prompts.txt")
    return parser


def _subcommand(
    commands: Any, name: str, command: Callable[[argparse.Namespace], None]
) -> argparse.ArgumentParser:
    sub = commands.add_parser(name)
    sub.set_defaults(command=command)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    sub.add_argument("--device", type=torch.device, default=device)
    return sub


def _check(options: argparse.Namespace, *counts: str) -> None:
    """Raise ConfigError for a count below 1, or a folder of --out that is not there."""
    for name in counts:
        if getattr(options, name) < 1:
            raise ConfigError(f"--{name}: must be at least 1")
    if not options.out.parent.is_dir():
        raise ConfigError(f"--out: there is no folder {options.out.parent}")


def _vae(options: argparse.Namespace) -> None:
    _check(options, "steps", "drawn", "workers")
    pool = draw_pool(options.drawn, options.seed, options.workers)
    clips = real_windows(options.clips) if options.clips else []
    seen = [window for n, windows in enumerate(clips) if (n + 1) % HELD_OUT for window in windows]
    if seen:
        count = round(len(pool) * REAL_SHARE / (1 - REAL_SHARE))
        pool = np.concatenate([pool, real_pool(seen, count, np.random.default_rng(options.seed))])
    pool = torch.from_numpy(pool).to(options.device)
    vae = train_vae(options.variant, pool, options.steps, options.seed)
    with torch.no_grad():  # the latents are scaled for what is shipped
        for parameter in vae.parameters():
            parameter.copy_(parameter.half())
    scale_latents(vae, torch.from_numpy(drawn_clips(min(48, options.drawn), seed=0)))
    training = {key: getattr(options, key) for key in ("steps", "seed", "drawn")}
    training["real_windows"] = len(seen)
    write_part(vae, tinywan.plain_config(vae), options.out, training, torch.float16)
    log.info("wrote %s (%s)", options.out, training)


def _experts(options: argparse.Namespace) -> None:
    _check(options, "steps", "drawn")
    vae = tinywan.read_vae(options.vae or tinywan.vae_file(tinywan.TRAINED)).to(options.device)
    architecture = tinywan.expert_architecture()
    pool = encode_pool(vae, options.drawn, options.seed)
    expert = train_expert(options.expert, pool, options.steps, options.seed, architecture)
    training = {key: getattr(options, key) for key in ("expert", "steps", "seed", "drawn")}
    write_part(expert, architecture, options.out, training, torch.bfloat16)
    log.info("wrote %s (%s)", options.out, training)


def _text(options: argparse.Namespace) -> None:
    _check(options)
    encoder, architecture = tinywan.drawn_text_encoder()
    write_part(encoder, architecture, options.out, {"seed": tinywan.SEED}, torch.float32)
    log.info("wrote %s", options.out)


def _folder(options: argparse.Namespace) -> None:
    _check(options)
    files = {"high": options.high, "low": options.low, "vae": options.vae}
    for name, path in files.items():
        if path is not None and not path.is_file():
            raise ConfigError(f"--{name}: there is no file {path}")
    if options.out.exists():
        raise ConfigError(f"--out: {options.out} is there already")
    with tempfile.TemporaryDirectory(dir=options.out.parent, prefix=".model-") as holder:
        aside = Path(holder) / "model"
        aside.mkdir()
        vae = files.pop("vae")
        tinywan.build_tinywan("t2v_a14b", aside, vae, files)
        aside.rename(options.out)
    log.info("wrote %s", options.out)


def _measure(options: argparse.Namespace) -> None:
    path = options.weights or tinywan.vae_file(options.variant)
    vae = tinywan.read_vae(path).to(options.device)
    clips = real_windows(options.clips) if options.clips else []
    held_out = [window for windows in clips[HELD_OUT - 1 :: HELD_OUT] for window in windows]
    for name, value in measure_vae(vae, held_out).items():
        sys.stdout.write(f"{name:24} {value:.3f}\n")


if __name__ == "__main__":
    sys.exit(main())
