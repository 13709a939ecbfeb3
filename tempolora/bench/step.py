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
import json
import statistics
import tempfile
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F
from torch.nn.attention import SDPBackend, sdpa_kernel

from tempolora.config import Config, load_config
from tempolora.files import write_json
from tempolora.model import architectures, wan
from tempolora.model.fp8 import CAPABILITY, quantise_rows
from tempolora.model.location import PART_OF, part_config
from tempolora.model.lora import lora_parameters
from tempolora.model.memory import free_memory
from tempolora.train.blocks import choose_levels, num_tokens
from tempolora.train.engine import build_engine
from tempolora.train.flow import interpolate, velocity
from tempolora.train.loop import load_with_adapters
from tempolora.train.world import World
from tempolora.variants import TEXT_TOKENS

REFERENCE = "full-eager"
_FP8 = ("model.base=fp8",)
_LEVELS = {
    "full-eager": ("train.checkpointing=full", "train.compile=false"),
    "full": ("train.checkpointing=full",),
    "attention": ("train.checkpointing=selective", "train.kept_blocks=0"),
    "selective": ("train.checkpointing=selective",),
    "none": ("train.checkpointing=none",),
}
VARIANTS = _LEVELS | {f"fp8-{name}": (*_FP8, *sets) for name, sets in _LEVELS.items()}
LORA_B_STD = 0.01  # of the adapters' B, which starts at zero and would keep A's gradient there
SIGMA = 0.6
SEED = 0
BACKENDS = {
    "cudnn": SDPBackend.CUDNN_ATTENTION,
    "flash": SDPBackend.FLASH_ATTENTION,
    "efficient": SDPBackend.EFFICIENT_ATTENTION,
}


@dataclass
class Shape:
    """A step's sizes. tokens: of the whole batch, in samples of tokens / batch."""

    batch: int
    tokens: int
    width: int
    ffn: int
    heads: int
    blocks: int

    @classmethod
    def of(cls, cfg: Config) -> "Shape":
        model = part_config(cfg.model, PART_OF[cfg.experts[0]])
        batch = cfg.train.batch_size
        return cls(
            batch=batch,
            tokens=batch * num_tokens(cfg, model["patch_size"]),
            width=model["num_attention_heads"] * model["attention_head_dim"],
            ffn=model["ffn_dim"],
            heads=model["num_attention_heads"],
            blocks=model["num_layers"],
        )

    def products(self) -> dict[tuple[int, int, int], int]:
        """(M, K, N) -> how often in one block's forward, and as often in its backward, which swaps
        K and N: q, k, v, o, the cross-attention's q and o, and the feed-forward's two."""
        L, D, F_ = self.tokens, self.width, self.ffn
        return {(L, D, D): 6, (L, D, F_): 1, (L, F_, D): 1}

    def flops(self, lora_values: dict[str, int]) -> dict[str, float]:
        """FLOPs of a step: the forward and the gradient to inputs; frozen weights need none.

        lora_values: values of each adapter matrix, used once forward and twice backward. The text's
        keys and values have no gradient to their input.
        """
        text = self.batch * TEXT_TOKENS
        linear = 2 * sum(2 * M * K * N * n for (M, K, N), n in self.products().items())
        linear += 2 * 2 * text * self.width**2
        pairs = self.tokens * (self.tokens // self.batch + TEXT_TOKENS)
        of_text = ("attn2.to_k.", "attn2.to_v.")
        rows = {
            name: text if any(layer in name for layer in of_text) else self.tokens
            for name in lora_values
        }
        return {
            "linear": float(linear * self.blocks),
            "attention": 3.0 * 4 * pairs * self.width * self.blocks,
            "lora": 6.0 * sum(rows[name] * count for name, count in lora_values.items()),
        }


# --- Ceilings -----------------------------------------------------------------------------------


def milliseconds(call: Callable[[], Any], device: torch.device, repeats: int = 5) -> float:
    """Median time of a call, after one to warm up."""
    call()
    times = []
    for _ in range(repeats):
        if device.type == "cuda":
            begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
            begin.record()
            call()
            end.record()
            end.synchronize()
            times.append(begin.elapsed_time(end))
        else:
            start = time.perf_counter()
            call()
            times.append(1e3 * (time.perf_counter() - start))
    return statistics.median(times)


def measure_ceilings(shape: Shape, dtype: torch.dtype, device: torch.device) -> dict[str, Any]:
    """Milliseconds of the model's own products and attention, GB/s of a copy."""
    has_fp8 = device.type == "cuda" and torch.cuda.get_device_capability(device) >= CAPABILITY
    found: dict[str, Any] = {"plain": {}, "fp8": {}, "attention": {}}
    for M, K, N in shape.products():
        a, b = (torch.randn(*size, device=device).to(dtype) for size in ((M, K), (N, K)))
        name = f"{M}x{K}x{N}"
        found["plain"][name] = milliseconds(lambda a=a, b=b: F.linear(a, b), device)
        if has_fp8:
            (a8, sa), (b8, sb) = quantise_rows(a), quantise_rows(b)
            found["fp8"][name] = milliseconds(
                lambda a8=a8, sa=sa, b8=b8, sb=sb: torch._scaled_mm(
                    a8,
                    b8.t(),
                    scale_a=sa,
                    scale_b=sb.view(1, -1),
                    out_dtype=torch.bfloat16,
                    use_fast_accum=True,
                ),
                device,
            )
            del a8, sa, b8, sb
        del a, b
    for name, backend in (BACKENDS if device.type == "cuda" else {"math": SDPBackend.MATH}).items():
        try:
            found["attention"][name] = _attention_times(shape, dtype, device, backend)
        except RuntimeError as error:  # this backend takes other shapes, or another GPU
            print(f"attention {name}: {str(error).splitlines()[0]}", flush=True)
    found["copy_gb_s"] = _copy_rate(device)
    free_memory(device)
    return found


def _copy_rate(device: torch.device) -> float:
    x = torch.empty(2**28 if device.type == "cuda" else 2**24, device=device)
    y = torch.empty_like(x)
    return 2 * x.nbytes / milliseconds(lambda: y.copy_(x), device) / 1e6


def _attention_times(
    shape: Shape, dtype: torch.dtype, device: torch.device, backend: SDPBackend
) -> dict[str, float]:
    """Of one self-attention, laid out in memory as the model's: token, head, channel."""
    sizes = (shape.batch, shape.tokens // shape.batch, shape.heads, shape.width // shape.heads)
    q, k, v, grad = (torch.randn(sizes, device=device).to(dtype).transpose(1, 2) for _ in range(4))
    inputs = [x.requires_grad_() for x in (q, k, v)]
    with sdpa_kernel(backend):
        forward = milliseconds(lambda: F.scaled_dot_product_attention(q, k, v), device)
        out = F.scaled_dot_product_attention(q, k, v)
    backward = milliseconds(
        lambda: torch.autograd.grad(out, inputs, grad, retain_graph=True), device
    )
    return {"forward": forward, "backward": backward}


def floor_seconds(
    shape: Shape, ceilings: dict[str, Any], cfg: Config, levels: list[str]
) -> tuple[float, float] | None:
    """(seconds of a step at these rates, the same with what the levels recompute).

    Products and self-attention alone; None where the rate of the base's number format is unknown.
    """
    times = ceilings["fp8" if cfg.model.base == "fp8" else "plain"]
    attention = ceilings["attention"]
    if not times or not attention:
        return None
    best = min(attention.values(), key=lambda t: t["forward"] + t["backward"])
    linear = sum(times[f"{M}x{K}x{N}"] * n for (M, K, N), n in shape.products().items())
    # the feed-forward's second product is read by nothing that the backward needs
    again = linear - times[f"{shape.tokens}x{shape.ffn}x{shape.width}"]
    repeated = {"none": 0, "matmuls": 0, "attention": again, "full": again + best["forward"]}
    model = shape.blocks * (2 * linear + best["forward"] + best["backward"])
    return model / 1e3, (model + sum(repeated.get(level, 0) for level in levels)) / 1e3


# --- A variant ----------------------------------------------------------------------------------


@dataclass
class Row:
    """seconds: of each step. profile: milliseconds and launches of each kernel in one more step.
    gradients: of the first, float32 on the CPU."""

    seconds: list[float]
    reserved_gib: float | None
    allocated_gib: float | None
    levels: dict[str, int]
    flops: dict[str, float]
    floor_s: tuple[float, float] | None
    loss: float
    profile: dict[str, tuple[float, int]]
    gradients: dict[str, Tensor]


def run_variant(
    cfg: Config, shape: Shape, ceilings: dict[str, Any], options: argparse.Namespace
) -> Row:
    """Build the model of a variant, take the steps, and let it go."""
    device = options.device
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
        profile = profiled(lambda: (step(), engine.step(1e-6)), device)
    return Row(
        seconds,
        *(peak and peak / 2**30 for peak in peaks),
        {level: levels.count(level) for level in dict.fromkeys(levels)},
        shape.flops({name: gradient.numel() for name, gradient in gradients.items()}),
        floor_seconds(shape, ceilings, cfg, levels),
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


# --- The profile --------------------------------------------------------------------------------

CLASSES = (  # class of a kernel, and what its name contains; the first that fits
    ("attention backward", ("bprop", "bwd", "attention_backward", "attention_for_cpu_backward")),
    ("attention forward", ("sdpa", "fmha", "flash", "scaled_dot_product")),
    ("copy", ("memcpy", "memset", "aten::copy_", "aten::clone")),
    ("product", ("gemm", "nvjet", "cutlass", "cublas", "xmma", "aten::mm", "addmm", "aten::bmm")),
    ("fused elementwise (triton)", ("triton",)),
    ("optimizer", ("multi_tensor", "adam", "foreach")),
    ("elementwise", ("elementwise", "reduce", "norm", "aten::")),
    ("other", ("",)),
)


def kernel_class(name: str) -> str:
    """What kind of work a kernel does, by its name."""
    return next(kind for kind, parts in CLASSES if any(part in name.lower() for part in parts))


def profiled(step: Callable[[], Any], device: torch.device) -> dict[str, tuple[float, int]]:
    """Milliseconds and launches of each kernel (on a CPU, operator) of one step."""
    activity = getattr(torch.profiler.ProfilerActivity, device.type.upper())
    with torch.profiler.profile(activities=[activity]) as profiler:
        step()
        _wait(device)
    if device.type == "cpu":
        found = profiler.key_averages()
        return {event.key: (event.self_cpu_time_total / 1e3, event.count) for event in found}
    # The trace tells kernels from annotations that span many of them.
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "trace.json"
        profiler.export_chrome_trace(str(path))
        events = json.loads(path.read_text())["traceEvents"]
    kernels: dict[str, tuple[float, int]] = {}
    for event in events:
        if event.get("cat") in ("kernel", "gpu_memcpy", "gpu_memset"):
            ms, count = kernels.get(event["name"], (0.0, 0))
            kernels[event["name"]] = (ms + event["dur"] / 1e3, count + 1)
    return kernels


def print_profile(name: str, kernels: dict[str, tuple[float, int]]) -> None:
    """A variant's time by class of kernel, and the dozen kernels that take longest."""
    classes: dict[str, tuple[float, int]] = {}
    for kernel, (ms, count) in kernels.items():
        before = classes.get(kernel_class(kernel), (0.0, 0))
        classes[kernel_class(kernel)] = (before[0] + ms, before[1] + count)
    whole = sum(ms for ms, _ in kernels.values())
    print(f"\n| {name}: kernels | ms | share | launches |\n| --- | --- | --- | --- |")
    for rows in (classes, kernels):
        for kind, (ms, count) in sorted(rows.items(), key=lambda row: -row[1][0])[:12]:
            label = kind.replace("|", " ")[:90]
            print(f"| {label} | {ms:.1f} | {100 * ms / whole:.1f} % | {count} |", flush=True)


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
    shape = Shape.of(cfg)
    machine = torch.cuda.get_device_name() if device.type == "cuda" else "CPU"
    print(f"{machine}, torch {torch.__version__}; {asdict(shape)}", flush=True)
    dtype = torch.float32 if cfg.model.base == "fp32" else torch.bfloat16
    ceilings = measure_ceilings(shape, dtype, device)
    print_ceilings(shape, ceilings)
    if options.memory_gib:  # not before: the ceilings are the card's
        whole = torch.cuda.get_device_properties(device).total_memory
        torch.cuda.set_per_process_memory_fraction(options.memory_gib * 2**30 / whole, device)
    records = run_all(cfgs, shape, ceilings, options)
    if options.json:
        about = {"machine": machine, "torch": torch.__version__, "shape": asdict(shape)}
        write_json(options.json, about | {"ceilings": ceilings, "variants": records})


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
    options.device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
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


def print_ceilings(shape: Shape, ceilings: dict[str, Any]) -> None:
    """The machine's own rates as a table."""
    print("| ceiling | ms | TFLOP/s |\n| --- | --- | --- |")
    for kind in ("plain", "fp8"):
        for name, ms in ceilings[kind].items():
            M, K, N = map(int, name.split("x"))
            print(f"| {kind} product {name} | {ms:.3f} | {2 * M * K * N / ms / 1e9:.0f} |")
    flops = 4 * shape.tokens * (shape.tokens // shape.batch) * shape.width
    for name, times in ceilings["attention"].items():
        # a backward computes five products where the forward computes two
        for way, factor in (("forward", 1.0), ("backward", 2.5)):
            rate = factor * flops / times[way] / 1e9
            print(f"| attention {name} {way} | {times[way]:.2f} | {rate:.0f} |")
    print(f"| copy, read and written | | {ceilings['copy_gb_s']:.0f} GB/s |", flush=True)


def run_all(
    cfgs: dict[str, Config], shape: Shape, ceilings: dict[str, Any], options: argparse.Namespace
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
        2 * M * K * N / ceilings["plain"][f"{M}x{K}x{N}"] / 1e9 for M, K, N in shape.products()
    )
    for name, cfg in cfgs.items():
        torch._dynamo.reset()
        free_memory(options.device)
        try:
            row = run_variant(cfg, shape, ceilings, options)
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
        rate = sum(row.flops.values()) / median / 1e12
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
            print_profile(name, record["profile"])
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
