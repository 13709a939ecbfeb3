"""The commands: each reads one configuration, checks what can be checked, and does one thing.

Nothing heavy is imported until a command's arguments and configuration have been found good.
Exit code 0: done. 2, with one line on stderr: the user's mistake. 1: anything else.
"""

import argparse
import logging
import signal
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path

from tempolora.config import Config, ConfigError, load_config
from tempolora.files import NO_ROOM
from tempolora.launched import check_engine, place

log = logging.getLogger("tempolora.cli")  # also as `python -m tempolora.cli`

TOY_WAIT_S = 600
MOST_GPUS, MOST_GIB = 4096, 65536


def main(arguments: Sequence[str] | None = None) -> int:
    """Run one command; the exit code."""
    options = _parser().parse_args(arguments)
    _set_up_logging(all_ranks=options.run is _precompute)
    try:
        return options.run(options) or 0
    except ConfigError as error:
        print(f"tempolora: {error}", file=sys.stderr)
        return 2
    except (PermissionError, FileExistsError, NotADirectoryError, IsADirectoryError) as error:
        print(f"tempolora: {error.filename}: {error.strerror}", file=sys.stderr)
        return 2
    except (FloatingPointError, TimeoutError) as error:
        print(f"tempolora: stopped: {error}", file=sys.stderr)
        return 1
    except OSError as error:
        if error.errno not in NO_ROOM:
            raise
        where = f"{error.filename}: " if error.filename else ""
        print(f"tempolora: {where}{error.strerror}; make room first", file=sys.stderr)
        return 2


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="tempolora", description="LoRAs for Wan 2.2 whose videos move in natural tempo."
    )
    commands = parser.add_subparsers(required=True, metavar="COMMAND")

    def command(name: str, run, text: str) -> argparse.ArgumentParser:
        sub = commands.add_parser(name, help=text, description=text)
        sub.set_defaults(run=run)
        sub.add_argument("--config", type=Path, help="JSON file; without it the toy configuration")
        sub.add_argument(
            "--set",
            action="append",
            default=[],
            metavar="SECTION.KEY=VALUE",
            help="override one setting; may be given often",
        )
        return sub

    command("demo", _demo, "Draw toy clips and train, sample and report on the embedded TinyWan.")
    command("precompute", _precompute, "Turn the clips of data.source into shards.")
    train = command("train", _train, "Train on data.shards; LoRA files, videos and a report.")
    train.add_argument(
        "--resume",
        default="auto",
        metavar="auto|none|FOLDER",
        help="go on from the newest checkpoint in output.dir (default), start over, or go on "
        "from a checkpoint folder",
    )
    # The deepspeed launcher adds it; the environment says the same.
    train.add_argument("--local_rank", type=int, help=argparse.SUPPRESS)
    sample = command("sample", _sample, "Write one video with the base model and LoRA files.")
    sample.add_argument("--prompt", required=True, help="what the video shows")
    sample.add_argument("--negative", help="what it shall not show; Wan's own by default")
    sample.add_argument(
        "--lora", type=Path, action="append", default=[], help="LoRA file or output folder"
    )
    sample.add_argument("--image", type=Path, help="first frame, for image to video")
    sample.add_argument("--seed", type=int, default=0)
    sample.add_argument("--steps", type=int, help="sampler steps; output.sample_steps by default")
    sample.add_argument("--out", type=Path, default=Path("sample.mp4"), help="mp4 to write")
    sample.add_argument(
        "--tempo-lora",
        type=Path,
        action="append",
        default=[],
        help="tempo LoRA file, or output folder of a run with lora.kind tempo",
    )
    sample.add_argument(
        "--tempo",
        type=float,
        metavar="SPEED",
        help="how fast: 2 is twice the tempo that the video would have, 0.5 half of it; by the "
        "adapter of --tempo-lora, or without one by sampling twice and guidance",
    )
    _add_rhythm_options(sample)
    export = command("export", _export, "Write a checkpoint's LoRA as a file that tools load.")
    export.add_argument("--checkpoint", type=Path, required=True, help="checkpoint folder")
    export.add_argument("--out", type=Path, help="folder for the file; by default as trained")
    evaluate = command("evaluate", _evaluate, "Measure the flicker and motion of a folder of mp4s.")
    evaluate.add_argument("--videos", type=Path, required=True, help="folder of mp4s to measure")
    evaluate.add_argument(
        "--reference", type=Path, help="folder of real clips that excess is relative to"
    )
    evaluate.add_argument("--truth", type=Path, help="truth.json of drawn clips, by file name")
    evaluate.add_argument(
        "--audio", action="store_true", help="match motion with the videos' own soundtracks"
    )
    evaluate.add_argument("--out", type=Path, required=True, help="folder for the results")
    beats = command("beats", _beats, "Draw how clips move against what is heard in them.")
    beats.add_argument(
        "clips", type=Path, metavar="CLIPS", help="a clip, a folder of clips, or one of shards"
    )
    beats.add_argument("--out", type=Path, default=Path("beats.png"), help="PNG to write")
    plan = command("plan", _plan, "Predict memory and time of training, without a GPU.")
    plan.add_argument("--gpus", type=int, default=1, help="how many GPUs train; 1 by default")
    plan.add_argument(
        "--gpu-memory", type=float, required=True, metavar="GIB", help="memory of each GPU"
    )
    plan.add_argument(
        "--host-memory", type=float, metavar="GIB", help="memory of the host that all GPUs share"
    )
    plan.add_argument(
        "--gpu", metavar="NAME", help="whose speed to assume, H200, A100 and others; H200 if none"
    )
    plan.add_argument(
        "--dry-run",
        action="store_true",
        help="build the first and the last process's shards of the base, without memory, and count",
    )
    plan.add_argument("--json", type=Path, metavar="FILE", help="write the same for machines")
    command("report", _report, "Write report.html in output.dir again.")
    command("verify", _verify, "Check shards and checkpoints against their checksums.")
    return parser


def _add_rhythm_options(sample: argparse.ArgumentParser) -> None:
    rhythm = sample.add_argument_group("rhythm of the video and its sound (docs/sampling.md)")
    rhythm.add_argument(
        "--soundtrack",
        type=Path,
        metavar="FILE",
        help="any file with sound: motion is guided to its onsets, and it is heard in the mp4, cut "
        "to the video's length",
    )
    rhythm.add_argument(
        "--guide-beat",
        choices=("hit", "rest"),
        help="what falls on an onset of the soundtrack: motion is fastest (hit, the default), or "
        "comes to rest, as dancers do and as `tempolora evaluate` counts beats",
    )
    rhythm.add_argument(
        "--guide-hz", type=float, metavar="HZ", help="guide motion towards this frequency, in Hz"
    )
    rhythm.add_argument(
        "--guide-strength",
        type=float,
        metavar="SHARE",
        help="how far guidance pushes the clean estimate in each step, as a share of its own norm, "
        "above 0 and up to 1; by default 0.5 for a soundtrack or --tempo and 1 for --guide-hz",
    )
    rhythm.add_argument(
        "--guide-sigma",
        type=float,
        nargs=2,
        metavar=("LOW", "HIGH"),
        help="noise levels between which guidance works, 0 (clean) to 1 (noise); by default "
        "0.5 0.95",
    )
    rhythm.add_argument(
        "--readout",
        type=Path,
        metavar="FILE",
        help="readout.safetensors of precompute to guide through; by default that of data.shards, "
        "or else one is fitted to drawn clips",
    )
    rhythm.add_argument(
        "--click",
        action="store_true",
        help="let a click be heard on each beat of the video's own motion, and say its tempo",
    )


def _set_up_logging(all_ranks: bool) -> None:
    """Lines on stderr, with the rank in front. Training says the same on every rank: one speaks."""
    rank, size, _ = place()
    prefix = f"[{rank}/{size}] " if size > 1 else ""
    logging.basicConfig(level=logging.WARNING, format=f"{prefix}%(message)s", stream=sys.stderr)
    if rank == 0 or all_ranks:
        logging.getLogger("tempolora").setLevel(logging.INFO)
    # On some CPUs it asks, at every import, for a package that it can do without.
    logging.getLogger("bitsandbytes.backends.cpu.ops").setLevel(logging.ERROR)


def default_config() -> Path:
    """The toy configuration, in a checkout or in an installed package."""
    package = Path(__file__).parent
    for folder in (package.parent / "configs", package / "configs"):
        if (folder / "toy.json").is_file():
            return folder / "toy.json"
    raise FileNotFoundError("configs/toy.json is neither in the checkout nor in the package")


def _load(options: argparse.Namespace) -> Config:
    """The configuration, and the mistakes in paths that it shows."""
    from tempolora.model.location import check_model

    cfg = load_config(options.config or default_config(), options.set)
    check_model(cfg.model)
    return cfg


def _demo(options: argparse.Namespace) -> None:
    if options.config is not None:
        raise ConfigError("--config: the demo has its own; use `tempolora train` for yours")
    cfg = _load(options)
    from tempolora.demo import check_demo, demo

    check_demo(cfg)
    _make_missing_shards(cfg)
    _until_stopped(demo, cfg)


def _precompute(options: argparse.Namespace) -> None:
    cfg = _load(options)
    _check_source(cfg)
    _run_precompute(cfg)


def _check_source(cfg: Config) -> None:
    """Find the mistakes in the clip list before anything is loaded; draw the toy set if asked."""
    from tempolora.data.clips import list_clips
    from tempolora.data.toy_set import draw_toy_set

    source = Path(cfg.data.source)
    if cfg.data.draw_toy and place()[0] > 0:
        _wait_for(source)
    elif cfg.data.draw_toy and not source.exists():
        log.info("no data found: drawing the toy set into %s", source)
        size = {"height": cfg.data.height, "width": cfg.data.width}
        frames = cfg.data.num_frames
        draw_toy_set(
            source, fps=cfg.timebase.fps, num_frames=frames, **size, clips=12, seed=cfg.train.seed
        )
    list_clips(source)


def _wait_for(folder: Path) -> None:
    """Until process 0 has drawn the toy set, which appears as a whole."""
    for _ in range(TOY_WAIT_S):
        if folder.exists():
            return
        time.sleep(1)
    raise ConfigError(f"data.source: {folder} was not drawn by process 0 in {TOY_WAIT_S} s")


def _run_precompute(cfg: Config) -> None:
    from tempolora.data.precompute import precompute
    from tempolora.model.encoders import WanEncoders
    from tempolora.train.auto import resolve_beside
    from tempolora.train.world import pick_device

    # Unwind, so that scratch files and decoders go with us.
    signal.signal(signal.SIGTERM, lambda number, _: sys.exit(128 + number))
    rank, size, local_rank = place()
    device = pick_device(local_rank, cfg.parallel.gpu_memory_gib)
    cfg = resolve_beside(cfg, device, "precompute")
    precompute(cfg, WanEncoders(cfg, device), rank, size)


def _train(options: argparse.Namespace) -> None:
    cfg = _load(options)
    _make_missing_shards(cfg)
    from tempolora.train.stop import StopSignal

    with StopSignal() as stop:  # the imports below take long
        from tempolora.run import train_and_report

        _until_stopped(train_and_report, cfg, options.resume, stop)


def _make_missing_shards(cfg: Config) -> None:
    """On one process; several could not wait for each other here."""
    from tempolora.data.shards import MANIFEST

    if place()[1] == 1 and not (Path(cfg.data.shards) / MANIFEST).is_file():
        _check_source(cfg)
        _run_precompute(cfg)


def _until_stopped(train: Callable[..., None], *arguments) -> None:
    """Train; where a signal ended it after a step, say so: that is no error."""
    from tempolora.train.groups import GroupFailed
    from tempolora.train.stop import Stopped

    try:
        train(*arguments)
    except GroupFailed as failed:
        sys.exit(f"tempolora: {failed}")
    except Stopped as stopped:
        log.info("%s", stopped)


def _sample(options: argparse.Namespace) -> None:
    cfg = _load(options)
    steps = cfg.output.sample_steps if options.steps is None else options.steps
    if steps < 1:
        raise ConfigError("--steps: must be at least 1 (output.sample_steps is the default)")
    for flag, paths in (("--lora", options.lora), ("--tempo-lora", options.tempo_lora)):
        for path in paths:
            if not path.exists():
                raise ConfigError(f"{flag}: there is no {path}")
    if options.tempo_lora and options.tempo is None:
        raise ConfigError("--tempo-lora: at which speed? Give --tempo as well")
    if options.tempo is not None and not 0.25 <= options.tempo <= 4:
        raise ConfigError(f"--tempo: given {options.tempo:g}; allowed: 0.25 to 4")
    rhythm = _rhythm(options)
    from tempolora.results.sample import Tempo, loras_in, sample_from_prompt
    from tempolora.train.auto import resolve_beside
    from tempolora.train.world import pick_device
    from tempolora.variants import NEGATIVE_PROMPT

    experts, tempo = cfg.variant.experts, None
    if options.tempo_lora:
        tempo = Tempo(loras_in(options.tempo_lora, experts, "tempo"), options.tempo)
    device = pick_device(0, cfg.parallel.gpu_memory_gib)
    sample_from_prompt(
        resolve_beside(cfg, device, "sampling"),
        options.out,
        prompt=options.prompt,
        negative=NEGATIVE_PROMPT if options.negative is None else options.negative,
        loras=loras_in(options.lora, experts),
        tempo=tempo,
        image=options.image,
        seed=options.seed,
        steps=steps,
        device=device,
        rhythm=rhythm,
    )


def _rhythm(options: argparse.Namespace):
    """What the options ask of the video's rhythm and sound; None if nothing."""
    speed = None if options.tempo_lora or options.tempo == 1 else options.tempo
    guided = (options.soundtrack, options.guide_hz, speed) != (None, None, None)
    asked = {
        "strength": options.guide_strength,
        "sigma": options.guide_sigma,
        "readout": options.readout,
        "beat": options.guide_beat,
    }
    asked = {name: value for name, value in asked.items() if value is not None}
    if asked and not guided:
        flag = "--readout" if "readout" in asked else f"--guide-{next(iter(asked))}"
        raise ConfigError(
            f"{flag}: nothing is guided; give --soundtrack, --guide-hz or --tempo as well"
        )
    if not guided and not options.click:
        return None
    from tempolora.results.guide import Rhythm

    return Rhythm(
        soundtrack=options.soundtrack,
        hz=options.guide_hz,
        speed=speed,
        click=options.click,
        **asked,
    )


def _export(options: argparse.Namespace) -> None:
    from tempolora.run import export_checkpoint
    from tempolora.train.checkpoint import open_checkpoint

    log.info("wrote %s", export_checkpoint(open_checkpoint(options.checkpoint), options.out))


def _evaluate(options: argparse.Namespace) -> None:
    cfg = load_config(options.config or default_config(), options.set)
    from tempolora.results.evaluate import Settings, evaluate

    rhythm = cfg.rhythm
    settings = Settings(rhythm.spec_cutoff_hz, rhythm.band_hz, cfg.data.decode_timeout_s)
    page = evaluate(
        options.videos,
        options.out,
        settings,
        reference=options.reference,
        truth=options.truth,
        audio=options.audio,
    )
    log.info("wrote %s", page)


def _beats(options: argparse.Namespace) -> None:
    cfg = load_config(options.config or default_config(), options.set)
    from tempolora.results.beats import draw_beats

    log.info("wrote %s", draw_beats(options.clips, options.out, cfg.data.decode_timeout_s))


def _plan(options: argparse.Namespace) -> int:
    """0 where training fits, 1 where it does not."""
    cfg = _load(options)
    from tempolora.files import write_json
    from tempolora.model.location import PART_OF, part_config
    from tempolora.model.targets import check_lora
    from tempolora.train.plan import card_of
    from tempolora.train.plan_text import Report
    from tempolora.train.rates import GIB, GPUS
    from tempolora.train.work import check_heads

    if not 1 <= options.gpus <= MOST_GPUS:
        raise ConfigError(f"--gpus: given {options.gpus}; allowed: 1 to {MOST_GPUS}")
    for flag, given in (
        ("--gpu-memory", options.gpu_memory),
        ("--host-memory", options.host_memory),
    ):
        if given is not None and not 1 <= given <= MOST_GIB:
            raise ConfigError(f"{flag}: given {given:g}; allowed: 1 to {MOST_GIB} GiB")
    name = (options.gpu or "H200").replace(" ", "").upper()
    if name not in GPUS:
        raise ConfigError(f"--gpu: nothing is known of {options.gpu!r}; known: {', '.join(GPUS)}")
    check_engine(cfg, options.gpus)
    check_lora(cfg.lora, cfg.timebase, part_config(cfg.model, PART_OF[cfg.experts[0]]))
    check_heads(cfg, cfg.experts[0])
    host = None if options.host_memory is None else options.host_memory * GIB
    memory = options.gpu_memory * GIB
    card = card_of(memory, gpus=options.gpus, host=host, gpu=GPUS[name])
    report = Report(cfg, card, memory, named=options.gpu is not None)
    lines, found = [*report.lines()], report.as_json()
    if options.dry_run:
        engine = report.plan.settings.engine
        if engine != "fsdp":
            raise ConfigError(
                f'--dry-run: the plan is "{engine}", and only "fsdp" can be built without GPUs; '
                "set parallel.engine=fsdp, and --gpus to two or more for each expert"
            )
        from tempolora.train.dry_run import dry_run

        trial = dry_run(cfg, report.plan, report.group)
        lines += ["", *trial.lines()]
        found["dry_run"] = trial.as_json()
    print("\n".join(lines))
    if options.json:
        write_json(options.json, found)
    return 0 if report.fits else 1


def _report(options: argparse.Namespace) -> None:
    cfg = _load(options)
    from tempolora.results.report import write_report

    log.info("wrote %s", write_report(Path(cfg.output.dir)))


def _verify(options: argparse.Namespace) -> None:
    cfg = _load(options)
    from tempolora.data.shards import verify_shards
    from tempolora.train.checkpoint import open_checkpoint

    samples = verify_shards(Path(cfg.data.shards))
    log.info("%s: %d samples, all as written", cfg.data.shards, samples)
    for folder in sorted(Path(cfg.output.dir).glob("checkpoints/*/step-*")):
        open_checkpoint(folder)
        log.info("%s: as written", folder)


if __name__ == "__main__":
    sys.exit(main())
