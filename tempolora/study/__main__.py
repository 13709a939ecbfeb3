"""`python -m tempolora.study run`, `knob`, `sound`, `page`, `arms`: the study of docs/evidence.md.

`run` measures what is not there yet and may be called again and again, on several GPUs at once by
--slot; `page` makes tables, figures and gifs of it; `arms` prints what there is to compare.
"""

import argparse
import logging
import sys
from pathlib import Path

import torch

from tempolora.config import ConfigError
from tempolora.model import wan
from tempolora.study import knob, sound
from tempolora.study.arms import OURS, PLAIN, PRIMARY, TARGETS, arm, arms, parameters_per_rank
from tempolora.study.experiment import Settings, run, settings_ranks
from tempolora.study.page import write_page


def main(argv: list[str] | None = None) -> int:
    options = _parser().parse_args(argv)
    logging.basicConfig(stream=sys.stderr, level=logging.INFO, format="%(message)s")
    try:
        options.command(options)
    except ConfigError as error:
        sys.stderr.write(f"study: {error}\n")
        return 2
    return 0


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m tempolora.study", description=__doc__)
    commands = parser.add_subparsers(required=True)
    run_ = _subcommand(commands, "run", _run)
    run_.add_argument("--out", type=Path, required=True, help="folder of results")
    run_.add_argument("--arms", nargs="+", default=["primary"], help="names; primary, rest, all")
    run_.add_argument("--seeds", nargs="+", type=int, default=[0, 1, 2])
    run_.add_argument("--minutes", type=float, default=9.0, help="begin no arm that ends later")
    run_.add_argument("--slot", default="0/1", help="k/n: every n-th run, from the k-th")
    run_.add_argument("--clips", type=int, default=64, help="to train on")
    run_.add_argument("--samples", type=int, default=256, help="of each arm and seed")
    run_.add_argument("--ours", default=OURS, help="arm whose motion filtered videos keep")
    device = "cuda" if torch.cuda.is_available() else "cpu"
    run_.add_argument("--device", type=torch.device, default=device)
    _model_options(run_)
    for name, command, ways, samples, clips in (
        ("knob", _knob, ["words", "rope", "time_44/high"], 256, "to train on, all speeds together"),
        ("sound", _sound, [*sound.WAYS], 64, "to train on"),
    ):
        sub = _subcommand(commands, name, command)
        sub.add_argument("--out", type=Path, required=True, help="folder of results")
        sub.add_argument("--ways", nargs="+", default=ways)
        sub.add_argument("--seeds", nargs="+", type=int, default=[0, 1, 2])
        sub.add_argument("--clips", type=int, default=64, help=clips)
        sub.add_argument("--samples", type=int, default=samples, help="of each way and seed")
        sub.add_argument("--device", type=torch.device, default=device)
        _model_options(sub)
    page = _subcommand(commands, "page", _page)
    page.add_argument("--out", type=Path, required=True, help="folder of results")
    page.add_argument("--docs", type=Path, default=Path("docs"))
    page.add_argument("--plain", default=PLAIN, help="the arm called plain LoRA")
    page.add_argument("--ours", default=OURS, help="the arm that the claims are about")
    _model_options(_subcommand(commands, "arms", _arms))
    return parser


def _model_options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--model", default="tinywan", help="diffusers folder, or tinywan")
    parser.add_argument(
        "--set",
        dest="overrides",
        action="append",
        default=[],
        metavar="SECTION.KEY=VALUE",
        help="over the study's own settings, in every arm",
    )


def _subcommand(commands, name: str, command) -> argparse.ArgumentParser:
    sub = commands.add_parser(name)
    sub.set_defaults(command=command)
    return sub


def _overrides(options: argparse.Namespace) -> tuple[str, ...]:
    return (f"model.id={options.model}", *options.overrides)


def _settings(options: argparse.Namespace, ours: str = OURS) -> Settings:
    """Raises ConfigError for what cannot be measured."""
    for name in ("clips", "samples"):
        if getattr(options, name) < 2:
            raise ConfigError(f"--{name}: must be at least 2")
    if min(options.seeds) < 0:
        raise ConfigError("--seeds: must not be below 0")
    torch.set_float32_matmul_precision("high")  # TF32 on a GPU
    return Settings(
        options.out, options.device, _overrides(options), options.clips, options.samples, ours
    )


def _run(options: argparse.Namespace) -> None:
    arm(options.ours)
    settings = _settings(options, options.ours)
    count = run(settings, arms(options.arms), options.seeds, options.minutes, options.slot)
    logging.info("%d measured", count)


def _knob(options: argparse.Namespace) -> None:
    count = knob.run(_settings(options), knob.ways(options.ways), options.seeds)
    logging.info("%d measured", count)


def _sound(options: argparse.Namespace) -> None:
    count = sound.run(_settings(options), sound.ways(options.ways), options.seeds)
    logging.info("%d measured", count)


def _page(options: argparse.Namespace) -> None:
    for name in (options.plain, options.ours):
        arm(name)
    logging.info("wrote %s", write_page(options.out, options.docs, options.plain, options.ours))


def _arms(options: argparse.Namespace) -> None:
    settings = Settings(Path(), torch.device("cpu"), _overrides(options))
    transformer = wan.meta_transformer(settings.any_config.model, "high")
    sys.stdout.write(f"{'target':16} {'rank':>4} {'parameters of an expert':>24}\n")
    for name, rank in settings_ranks(settings).items():
        count = rank * parameters_per_rank(transformer, TARGETS[name])
        sys.stdout.write(f"{name:16} {rank:4} {count:24,}\n")
    for of in arms(["all"]):
        sys.stdout.write(f"{'primary' if of.name in PRIMARY else 'rest':8} {of.name}\n")


if __name__ == "__main__":
    sys.exit(main())
