"""One training step in its variants, against what the machine can do and against each other.

    python -m tempolora.bench step [--variants full selective fp8-selective ...] [--json FILE]

No data and no weights are needed: random latents and text of the configured shape go through the
trainer's own model, adapters, engine and flow loss. First the ceilings are measured: matrix
products of the model's own shapes in bf16 and 8 bits, attention by backend, a copy. From the
counted FLOPs follows the time that no implementation of a variant can beat at these rates. Then
every variant takes its steps, each with a fresh model of the same seed. Losses and LoRA gradients
are compared with those of the variant `full-eager`, if it ran.

A variant may carry settings of its own: `selective+train.kept_blocks=20`.
"""

import argparse
import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from tempolora.bench import ceilings, kernel_profile
from tempolora.config import Config, load_config
from tempolora.files import write_json
from tempolora.model import architectures, wan
from tempolora.model.lora import lora_parameters
from tempolora.model.memory import free_memory
from tempolora.train.blocks import choose_levels
from tempolora.train.engine import build_engine
from tempolora.train.flow import interpolate, velocity
from tempolora.train.loop import load_with_adapters
from tempolora.train.work import Work, work_of
from tempolora.train.world import World
from tempolora.variants import TEXT_TOKENS

REFERENCE = "full-eager"
_LEVELS = {
    "full-eager": ("train.checkpointing=full", "train.compile=false"),
    "full": ("train.checkpointing=full",),
    "attention": ("train.checkpointing=selective", "train.kept_blocks=0"),
    "selective": ("train.checkpointing=selective",),
    "none": ("train.checkpointing=none",),
}
VARIANTS = _LEVELS | {
    f"{base}-{name}": (f"model.base={base}", *sets)
    for base in ("fp8", "nf4")
    for name, sets in _LEVELS.items()
}
LORA_B_STD = 0.01  # of the adapters' B, which starts at zero and would keep A's gradient there
SIGMA = 0.6
SEED = 0


# --- A variant ----------------------------------------------------------------------------------


@dataclass
class Row:
    """seconds: of each step. profile: milliseconds and launches of each kernel in one more step.
    gradients: of the first, float32 on the CPU."""

    seconds: list[float]
    reserved_gib: float | None
    allocated_gib: float | None
    levels: dict[str, int]
    flops: float
    floor_s: tuple[float, float] | None
    loss: float
    profile: dict[str, tuple[float, int]]
    gradients: dict[str, Tensor]


def run_variant(cfg: Config, rates: dict[str, Any], options: argparse.Namespace) -> Row:
    """Build the model of a variant, take the steps, and let it go."""
    device, work = options.device, work_of(cfg, cfg.experts[0])
    transformer = load_with_adapters(cfg, cfg.experts[0], device, None)
    generator = torch.Generator().manual_seed(SEED)
    for name, parameter in lora_parameters(transformer).items():
        if "lora_B" in name:
            noise = torch.randn(parameter.shape, generator=generator)
            parameter.data.copy_(LORA_B_STD * noise)
    levels = choose_levels(cfg, transformer, device)
    engine = build_engine("plain", cfg, transformer, World(0, 1, device))
    step = _step_of(cfg, engine, device)
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats()
    seconds = []
    for number in range(options.steps):
        start = time.perf_counter()
        loss = step()
        if number == 0:
            gradients = {
                name: p.grad.detach().float().cpu()
                for name, p in lora_parameters(transformer).items()
            }
            first_loss = loss.item()
        engine.step(1e-6)
        _wait(device)
        seconds.append(time.perf_counter() - start)
    peaks = (None, None)
    if device.type == "cuda":
        peaks = (torch.cuda.max_memory_reserved(), torch.cuda.max_memory_allocated())
    profile = {}
    if options.profile:
        profile = kernel_profile.profiled(lambda: (step(), engine.step(1e-6)), device)
    return Row(
        seconds,
        *(peak and peak / 2**30 for peak in peaks),
        {level: levels.count(level) for level in dict.fromkeys(levels)},
        work.flops.total,
        ceilings.floor_seconds(work, rates, cfg, levels),
        first_loss,
        profile,
        gradients,
    )


def _step_of(cfg: Config, engine: Any, device: torch.device) -> Callable[[], Tensor]:
    """Forward and backward of the flow loss on one random batch, the same in every variant."""
    generator = torch.Generator().manual_seed(SEED)
    batch = cfg.train.batch_size
    sizes = (batch, *cfg.latent_shape)
    bare = engine.transformer
    x0, noise, given = (torch.randn(sizes, generator=generator).to(device) for _ in range(3))
    text = torch.randn(batch, TEXT_TOKENS, bare.config.text_dim, generator=generator).to(device)
    sigma = torch.full((batch,), SIGMA, device=device)
    condition = None
    if bare.config.in_channels != bare.config.out_channels:  # image to video beside the latents
        condition = wan.condition_channels(given)

    def step() -> Tensor:
        v_hat = wan.predict_velocity(
            bare,
            interpolate(x0, noise, sigma),
            sigma,
            0.1 * text,
            condition,
            per_token_time=cfg.variant.per_token_time,
        )
        loss = (v_hat - velocity(x0, noise)).square().mean()
        engine.backward(loss)
        return loss.detach()

    return step


def _wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize()


def compare(row: Row, reference: Row) -> dict[str, float]:
    """Relative error of loss and gradients, and the least cosine over blocks."""
    ours, theirs = (_by_block(r.gradients) for r in (row, reference))
    difference = sum((ours[n] - theirs[n]).square().sum() for n in ours).sqrt()
    norm = sum(theirs[n].square().sum() for n in theirs).sqrt()
    cosines = [F.cosine_similarity(ours[n], theirs[n], dim=0).item() for n in ours]
    return {
        "loss_error": abs(row.loss - reference.loss) / abs(reference.loss),
        "gradient_error": (difference / norm).item(),
        "least_cosine": min(cosines),
    }


def _by_block(gradients: dict[str, Tensor]) -> dict[str, Tensor]:
    blocks: dict[str, list[Tensor]] = {}
    for name, gradient in gradients.items():
        blocks.setdefault(name.split(".")[1], []).append(gradient.flatten().double())
    return {number: torch.cat(parts) for number, parts in blocks.items()}


# --- The command --------------------------------------------------------------------------------


def main(arguments: list[str]) -> None:
    options = _parse(arguments)
    device = options.device
    base = [
        "train.optimizer=adamw",
        f"lora.target={options.target}",
        "rhythm.spec_weight=0",
        "rhythm.tv_weight=0",
        *(f"data.{key}={getattr(options, key)}" for key in SIZES if getattr(options, key)),
    ]
    cfg = load_config(options.config, base)
    if cfg.model.id != "tinywan":
        base.append("model.init=random")
        if options.layers:
            known = architectures.TRANSFORMER
            shorter = {**known[cfg.model.variant], "num_layers": options.layers}
            known[cfg.model.variant] = shorter
    elif options.layers:
        raise SystemExit("--layers: TinyWan has the layers it was trained with; leave it out")
    if len(cfg.variant.experts) == 2:
        base.append("model.expert=high")
    cfgs = {name: load_config(options.config, [*base, *_overrides(name)]) for name in options.names}
    cfg = load_config(options.config, base)
    work = work_of(cfg, cfg.experts[0])
    shape = {name: getattr(work, name) for name in SHAPE}
    machine = torch.cuda.get_device_name() if device.type == "cuda" else "CPU"
    print(f"{machine}, torch {torch.__version__}; {shape}", flush=True)
    dtype = torch.float32 if cfg.model.base == "fp32" else torch.bfloat16
    rates = ceilings.measure(work, dtype, device)
    ceilings.show(work, rates)
    if options.memory_gib:  # not before: the ceilings are the card's
        whole = torch.cuda.get_device_properties(device).total_memory
        torch.cuda.set_per_process_memory_fraction(options.memory_gib * 2**30 / whole, device)
    records = run_all(cfgs, work, rates, options)
    if options.json:
        about = {"machine": machine, "torch": torch.__version__, "shape": shape}
        write_json(options.json, about | {"ceilings": rates, "variants": records})


SHAPE = ("batch", "tokens", "width", "ffn", "heads", "blocks")
SIZES = ("num_frames", "height", "width")


def _parse(arguments: list[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="python -m tempolora.bench step",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--config", type=Path, default=Path("configs/a14b.json"))
    parser.add_argument(
        "--variants",
        dest="names",
        nargs="+",
        default=["full-eager", "full", "attention", "selective", "fp8-selective"],
        help=f"{', '.join(VARIANTS)}; each with +section.key=value as often as wanted",
    )
    parser.add_argument("--layers", type=int, help="fewer transformer blocks than the model has")
    parser.add_argument("--frames", type=int, dest="num_frames")
    parser.add_argument("--height", type=int)
    parser.add_argument("--width", type=int)
    parser.add_argument("--target", default="self_attention", help="lora.target")
    parser.add_argument("--steps", type=int, default=4)
    parser.add_argument("--json", type=Path, help="write everything measured to this file")
    parser.add_argument("--memory-gib", type=float, help="use no more of the GPU than this")
    parser.add_argument("--profile", action="store_true", help="time by class of kernel, one step")
    options = parser.parse_args(arguments)
    options.device = torch.device("cuda", 0) if torch.cuda.is_available() else torch.device("cpu")
    for name in options.names:
        if name.split("+")[0] not in VARIANTS:
            parser.error(f"--variants: no {name.split('+')[0]!r}; known: {', '.join(VARIANTS)}")
    if options.memory_gib and options.device.type != "cuda":
        parser.error("--memory-gib: there is no GPU")
    if options.steps < 2:
        parser.error("--steps: the first step compiles; give at least 2")
    return options


def _overrides(name: str) -> list[str]:
    variant, *more = name.split("+")
    return [*VARIANTS[variant], *more]


def run_all(
    cfgs: dict[str, Config], work: Work, rates: dict[str, Any], options: argparse.Namespace
) -> dict[str, dict[str, Any]]:
    """Every variant in turn, a line for each; running out of memory is a line too."""
    print(
        "| variant | first s | median s | lowest s | GiB reserved | allocated | levels | TFLOP/s | "
        "of the matmul rate | floor s | floor s with recomputation | ratio | loss error | "
        "gradient error | least cosine |\n|" + " --- |" * 15
    )
    records: dict[str, dict[str, Any]] = {}
    reference, baseline = None, None
    top = max(
        2 * M * K * N / rates["plain"][f"{M}x{K}x{N}"] / 1e9 for M, K, N in ceilings.products(work)
    )
    for name, cfg in cfgs.items():
        torch._dynamo.reset()
        free_memory(options.device)
        try:
            row = run_variant(cfg, rates, options)
        except Exception as error:  # the other variants' figures are wanted all the same
            row, kind = None, type(error).__name__
            records[name] = {"failed": f"{kind}: {str(error).strip().splitlines()[0]}"}
        if row is None:  # the error's traceback, which holds the model, is gone only here
            print(f"| {name} | {records[name]['failed']} |" + " |" * 13, flush=True)
            continue
        if name.split("+")[0] == REFERENCE and reference is None:
            reference = row
        median = statistics.median(row.seconds[1:])
        baseline = baseline or median
        rate = row.flops / median / 1e12
        errors = compare(row, reference) if reference else {}
        records[name] = {
            **{key: value for key, value in vars(row).items() if key != "gradients"},
            "median_s": median,
            "tflop_s": rate,
            "of_matmul_rate": rate / top,
            "ratio": median / baseline,
            **errors,
        }
        _print_row(name, records[name])
    for name, record in records.items():
        if record.get("profile"):
            kernel_profile.show(name, record["profile"])
    return records


def _print_row(name: str, record: dict[str, Any]) -> None:
    def show(value: float | None, form: str) -> str:
        return "" if value is None else format(value, form)

    floors = record["floor_s"] or (None, None)
    cells = [
        name,
        *(show(s, ".3f") for s in (record["seconds"][0], record["median_s"])),
        show(min(record["seconds"][1:]), ".3f"),
        *(show(record[key], ".1f") for key in ("reserved_gib", "allocated_gib")),
        ", ".join(f"{count} {level}" for level, count in record["levels"].items()),
        show(record["tflop_s"], ".4g"),
        show(100 * record["of_matmul_rate"], ".0f") + " %",
        *(show(floor, ".3f") for floor in floors),
        show(record["ratio"], ".3f"),
        *(show(record.get(key), ".1e") for key in ("loss_error", "gradient_error")),
        show(record.get("least_cosine"), ".6f"),
    ]
    print("| " + " | ".join(cells) + " |", flush=True)
