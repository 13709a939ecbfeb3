"""What training on 4 to 512 GPUs moves, and what that takes: the tables of docs/scaling.md.

    python -m tempolora.bench traffic [--write docs/scaling.md]

Bytes follow from the shapes, by the planner's functions; seconds from the measured steps and the
rates below, each with where it comes from. Nothing is run. A table stands in the document behind a
line `<!-- traffic: NAME -->`; --write renews all of them.

GPUs form nodes of eight. Collectives are counted as rings: of an all-gather of S bytes over N
processes each receives S (N-1) / N, of an all-reduce twice that, and as much enters each node.
"""

import argparse
import re
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property
from math import ceil
from pathlib import Path

from tempolora.config import Config, ConfigError, load_config
from tempolora.files import replacing
from tempolora.train.plan import BACKWARD_PRODUCTS, Settings, predict
from tempolora.train.rates import H200
from tempolora.train.work import BF16, FP32, Work, work_of

NODE = 8
SIZES = (4, 8, 16, 32, 64, 128, 256, 512)
PERSISTENT = 100_000
"""Elements up to which ZeRO-3 keeps a tensor whole (its param_persistence_threshold)."""
CLIPS, TEXT_TOKENS = 10_000, 128  # of an assumed data set
SHORT = 6400
"""Samples of the run that is spread: the default 800 steps on eight GPUs."""
LONG_ALONE_S, LONG_SHARED_S = 20.656, 10.927  # 121x480x832 on one H200, and shared by two
FIRST_STEP_S = 42.0  # the longest of those measured: compilation
FSDP_SHARE = 9.290 / 9.473

MEASURED = (  # machine, engine, GPUs, clip, seconds, one GPU's seconds, GiB reserved, allocated
    ("A", "plain", 1, "49x576x1024", 9.194, None, 45.6, 44.6),
    ("A", "ddp", 2, "49x576x1024", 9.189, 9.194, 45.6, 44.6),
    ("B", "plain", 1, "49x576x1024", 9.290, None, 46.2, 44.6),
    ("B", "fsdp", 2, "49x576x1024", 9.473, 9.290, 36.2, 33.3),
    ("B", "deepspeed, ZeRO-3", 2, "49x576x1024", 9.737, 9.290, 49.2, 35.4),
    ("A", "plain", 1, "121x480x832", LONG_ALONE_S, None, 57.1, 55.9),
    ("B", "ddp, `parallel.context` 2", 2, "121x480x832", LONG_SHARED_S, LONG_ALONE_S, 42.7, 41.2),
)


@dataclass(frozen=True)
class Rate:
    """A value in its unit, and where it comes from."""

    value: float
    unit: str
    source: str


@dataclass(frozen=True)
class Case:
    """A model and clip. measured_s: of a step on one GPU, compiled, checkpointing full."""

    name: str
    config: str
    overrides: tuple[str, ...] = ()
    measured_s: float | None = None

    @cached_property
    def cfg(self) -> Config:
        common = ("train.compile=true", "train.checkpointing=full", "model.placement=gpu")
        return load_config(Path(self.config), [*common, *self.overrides])

    @cached_property
    def work(self) -> Work:
        return work_of(self.cfg, self.cfg.experts[0])

    @cached_property
    def step_s(self) -> float:
        """Measured, or the planner's."""
        return (
            self.measured_s or predict(self.cfg, Settings("plain", "bf16", "gpu", "full")).seconds
        )

    @property
    def forward_s(self) -> float:
        """Of a step, its first pass forward: by the rates of products and attention."""
        flops = self.work.flops
        forward = (
            flops.linear_forward / H200.matmul + flops.attention_forward / H200.attention_forward
        )
        backward = flops.linear_backward / H200.matmul
        backward += BACKWARD_PRODUCTS * flops.attention_forward / H200.attention_backward
        return self.step_s * forward / (2 * forward + backward)

    @property
    def sample_bytes(self) -> int:
        """Of a stored sample: latents and the caption's embedding."""
        C, T, H, W = self.cfg.latent_shape
        return BF16 * (C * T * H * W + TEXT_TOKENS * self.work.text_dim)


A14B = Case("A14B, 49x576x1024", "configs/a14b.json", ("model.expert=high",), 9.194)
TI2V = Case("5B, 49x704x1280", "configs/ti2v_5b.json")
LONG = Case(
    "A14B, 121x480x832",
    "configs/a14b.json",
    ("model.expert=high", "data.num_frames=121", "data.height=480", "data.width=832"),
    LONG_ALONE_S,
)


# --- Bytes ----------------------------------------------------------------------------------------


def block_shard(work: Work, ranks: int) -> float:
    """Bytes of a bf16 block on each of so many processes under FSDP2, which cuts tensors by rows:
    the modulation table, of one row, takes its whole size everywhere."""
    table = FP32 * 6 * work.width
    return (work.block_weights("bf16") - table) / ranks + table


def gathered(work: Work, ranks: int) -> float:
    """Bytes that FSDP2 brings to each process in a microstep: every block forward, from the first
    with adapters on backward, and what lies outside of the blocks once."""
    first = work.adapted[0]
    passes = 2 * work.blocks - first + (first > 0)  # the block below is fetched ahead, in vain
    outer = work.outer_weights("bf16") / ranks
    return (ranks - 1) * (passes * block_shard(work, ranks) + outer)


def averaged(work: Work, ranks: int) -> float:
    """Bytes to each process for the mean of the adapters' fp32 gradients, once a step."""
    return 2 * (ranks - 1) / ranks * FP32 * sum(work.adapters)


def partitioned(work: Work, ranks: int) -> float:
    """Bytes that ZeRO-3 brings to each process: large tensors twice as under FSDP2, small ones and
    the new adapters after the step, and the reduced gradients."""
    large = BF16 * sum(a * b for a, b in work.linears.values() if a * b > PERSISTENT)
    small = work.blocks * (work.block_weights("bf16") - large)
    passes = 2 * work.blocks - work.adapted[0]
    whole = passes * large + small + work.outer_weights("bf16")
    return (ranks - 1) / ranks * whole + averaged(work, ranks)


def exchanged(work: Work, context: int) -> float:
    """Bytes to each process for self-attention over shared clips: in each block q, k, v and the
    output, forward, again where recomputed, and backward."""
    tensor = BF16 * work.batch * work.tokens * work.width / context
    return work.blocks * 12 * tensor * (context - 1) / context


# --- Rates ----------------------------------------------------------------------------------------


def rates() -> dict[str, Rate]:
    """What seconds are made of."""
    lost = LONG_SHARED_S - LONG_ALONE_S / 2
    link = exchanged(LONG.work, 2) / lost
    return {
        "NVLink": Rate(
            link / 1e9,
            "GB/s into each GPU",
            "estimated: the measured context of 2 has all it loses put down to its exchanges; the "
            "data sheet says 450",
        ),
        "InfiniBand": Rate(
            40.0, "GB/s for each 400 Gb/s adapter", "assumed: 80 % of the data sheet's 50"
        ),
        "hop": Rate(10.0, "us for each hop of a ring", "assumed"),
        "file system": Rate(10.0, "GB/s for all nodes together", "assumed"),
        "node": Rate(5.0, "GB/s from the file system into one node", "assumed"),
        "metadata": Rate(10_000.0, "opened files a second, all nodes together", "assumed"),
        "store": Rate(
            30_000.0,
            "requests a second that torch's TCPStore answers",
            "measured: `check` called 20,000 times by one client on the same host",
        ),
        "failures": Rate(
            50_000.0,
            "GPU hours between failures",
            "published: 419 unexpected interruptions in 54 days of 16,384 GPUs (Llama 3)",
        ),
    }


def link_rate(ranks: int, adapters: int) -> float:
    """Bytes/s of a ring. adapters: InfiniBand's in each node."""
    known = rates()
    link = known["NVLink"].value
    return 1e9 * (link if ranks <= NODE else min(link, adapters * known["InfiniBand"].value))


def ring_s(size: float, ranks: int, adapters: int) -> float:
    """Seconds for bytes that reach each process in one collective."""
    return size / link_rate(ranks, adapters) + (ranks - 1) * rates()["hop"].value * 1e-6


def averaging_s(work: Work, ranks: int, adapters: int) -> float:
    """Seconds of the mean of gradients, under which nothing else runs."""
    return (
        ring_s(averaged(work, ranks), ranks, adapters) + (ranks - 1) * rates()["hop"].value * 1e-6
    )


def gather_s(work: Work, ranks: int, adapters: int) -> float:
    """Seconds to gather one block."""
    return ring_s((ranks - 1) * block_shard(work, ranks), ranks, adapters)


def exposed_s(case: Case, ranks: int, adapters: int) -> float:
    """Seconds that a step waits for blocks, each of which is gathered under the one before."""
    work, gather = case.work, gather_s(case.work, ranks, adapters)
    forward = case.forward_s / work.blocks
    trained = work.blocks - work.adapted[0]
    backward = (case.step_s - case.forward_s) / trained
    waits = work.blocks * max(0.0, gather - forward) + trained * max(0.0, gather - backward)
    return gather + waits


def engine_s(case: Case, engine: str, ranks: int, adapters: int) -> float:
    """Seconds of a step. hybrid: fsdp within nodes, replicated across them."""
    mean = averaging_s(case.work, ranks, adapters)
    if engine == "ddp":
        return case.step_s + mean
    over = min(ranks, NODE) if engine == "hybrid" else ranks
    return case.step_s / FSDP_SHARE + exposed_s(case, over, adapters) + mean


# --- Tables ---------------------------------------------------------------------------------------

Rows = Iterator[list[str]]


def measured() -> Rows:
    yield [
        "machine",
        "engine",
        "GPUs",
        "clip",
        "s/step",
        "of one GPU's speed",
        "GiB reserved",
        "allocated",
    ]
    for machine, engine, gpus, clip, seconds, alone, reserved, allocated in MEASURED:
        sharing = 2 if "context" in engine else 1
        said = f"{alone / seconds / sharing:.1%}" if alone else ""
        row = [machine, engine, gpus, clip, f"{seconds:.3f}", said, reserved, allocated]
        yield [str(cell) for cell in row]


def stated() -> Rows:
    yield ["rate", "value", "from"]
    for name, rate in rates().items():
        yield [name, f"{rate.value:,.0f} {rate.unit}", rate.source]


def wire(case: Case) -> Rows:
    yield ["GPUs", "ddp, MB", "fsdp, GB", "ZeRO-3, GB", "hybrid: in the node, GB; across, MB"]
    for ranks in SIZES:
        mean = averaged(case.work, ranks)
        node = gathered(case.work, min(ranks, NODE)) / 1e9
        yield [
            f"{ranks}",
            f"{mean / 1e6:.1f}",
            f"{(gathered(case.work, ranks) + mean) / 1e9:.1f}",
            f"{partitioned(case.work, ranks) / 1e9:.1f}",
            f"{node:.1f}; {mean / 1e6 if ranks > NODE else 0:.1f}",
        ]


def steps(case: Case) -> Rows:
    yield [
        "GPUs",
        "a block: forward; gathered with 8, 1 adapters, ms",
        "ddp, s",
        "fsdp, 8 adapters, s",
        "fsdp, 1 adapter, s",
        "hybrid, 1 adapter, s",
    ]
    forward = 1e3 * case.forward_s / case.work.blocks
    for ranks in SIZES:
        gathers = [1e3 * gather_s(case.work, ranks, adapters) for adapters in (8, 1)]
        runs = (("ddp", 1), ("fsdp", 8), ("fsdp", 1), ("hybrid", 1))
        seconds = [engine_s(case, engine, ranks, adapters) for engine, adapters in runs]
        yield [
            f"{ranks}",
            f"{forward:.1f}; {gathers[0]:.1f}, {gathers[1]:.1f}",
            *(f"{s:.2f} ({case.step_s / s:.1%})" for s in seconds),
        ]


def enough() -> Rows:
    yield ["", "a block, MB", "its forward pass, ms", "GB/s that hide it"]
    for case, context in ((A14B, 1), (TI2V, 1), (LONG, 1), (LONG, 8)):
        size, work = case.work.block_weights("bf16"), case.work
        forward = case.forward_s / context / work.blocks
        shared = f", shared by {context}" if context > 1 else ""
        cells = f"{size / 1e6:.0f}", f"{1e3 * forward:.1f}", f"{size / forward / 1e9:.0f}"
        yield [case.name + shared, *cells]


def contexts(case: Case) -> Rows:
    yield [
        "`parallel.context`",
        "GB to each GPU a step",
        "s of exchanges",
        "s/step",
        "times as fast",
        "a block: forward; gathered over 8, ms",
    ]
    gather = 1e3 * gather_s(case.work, NODE, NODE)
    for context in (1, 2, 4, 8):
        size = exchanged(case.work, context)
        hops = 12 * case.work.blocks * (context - 1) * rates()["hop"].value * 1e-6
        moved_s = size / link_rate(NODE, NODE) + hops
        seconds = case.step_s / context + moved_s
        forward = 1e3 * case.forward_s / context / case.work.blocks
        yield [
            f"{context}",
            f"{size / 1e9:.1f}",
            f"{moved_s:.2f}",
            f"{seconds:.2f}",
            f"{case.step_s / seconds:.2f}",
            f"{forward:.1f}; {gather:.1f}",
        ]


def loading() -> Rows:
    yield [
        "GPUs",
        "files opened at the start; s",
        *(f"{c.name}: samples/s; GB/s" for c in (A14B, TI2V)),
    ]
    for ranks in SIZES:
        opened = ranks * (1 + ceil(CLIPS / A14B.cfg.data.samples_per_shard))
        wants = [
            f"{ranks / c.step_s:.1f}; {ranks / c.step_s * c.sample_bytes / 1e9:.3f}"
            for c in (A14B, TI2V)
        ]
        yield [f"{ranks}", f"{opened:,}; {opened / rates()['metadata'].value:.1f}", *wants]


def checkpoints() -> Rows:
    yield [
        "",
        "LoRA, MB",
        "its optimizer in 8 bits, in fp32, MB",
        "one every, s",
        "MB/s on average",
    ]
    for case in (A14B, TI2V):
        lora = FP32 * sum(case.work.adapters) / 1e6
        memory = [case.work.optimizer_bytes(name) / 1e6 for name in ("adamw8bit", "adamw")]
        every = case.cfg.train.checkpoint_every * case.step_s
        yield [
            case.name,
            f"{lora:.1f}",
            f"{memory[0]:.1f}, {memory[1]:.1f}",
            f"{every:.0f}",
            f"{(lora + memory[0]) / every:.3f}",
        ]


def start_s(ranks: int, base: str) -> float:
    """Seconds to read an expert, once on each node."""
    size, known = A14B.work.weights(base), rates()
    nodes = ceil(ranks / NODE)
    return max(size / known["node"].value, nodes * size / known["file system"].value) / 1e9


def starting() -> Rows:
    sizes = [A14B.work.weights(base) / 1e9 for base in ("fp32", "bf16")]
    yield [
        "GPUs",
        f"TB read, files in fp32 ({sizes[0]:.1f} GB), bf16 ({sizes[1]:.1f} GB)",
        "s, fp32, bf16",
        "requests to the store a second, of what it answers",
    ]
    from tempolora.train.groups import EVERY_S
    from tempolora.train.heartbeat import MOST_BEAT_S

    for ranks in SIZES:
        nodes = ceil(ranks / NODE)
        asked = ranks * (1 / MOST_BEAT_S + 2 / EVERY_S)
        yield [
            f"{ranks}",
            f"{nodes * sizes[0] / 1e3:.2f}, {nodes * sizes[1] / 1e3:.2f}",
            f"{start_s(ranks, 'fp32'):.0f}, {start_s(ranks, 'bf16'):.0f}",
            f"{asked:.0f}, {asked / rates()['store'].value:.1%}",
        ]


def use() -> Rows:
    yield [
        "GPUs",
        f"steps for {SHORT:,} samples",
        "minutes of steps",
        "minutes before the second step",
        "GPU hours",
        "chance of a failure",
    ]
    for ranks in SIZES:
        count = ceil(SHORT / ranks)
        training = count * engine_s(A14B, "ddp", ranks, 1) / 60
        before = (start_s(ranks, "fp32") + FIRST_STEP_S) / 60
        hours = ranks * (training + before) / 60
        yield [
            f"{ranks}",
            f"{count}",
            f"{training:.1f}",
            f"{before:.1f}",
            f"{hours:.0f}",
            f"{hours / rates()['failures'].value:.2%}",
        ]


TABLES = {
    "measured": measured,
    "rates": stated,
    "wire a14b": lambda: wire(A14B),
    "wire 5b": lambda: wire(TI2V),
    "steps a14b": lambda: steps(A14B),
    "steps 5b": lambda: steps(TI2V),
    "enough": enough,
    "contexts": lambda: contexts(LONG),
    "loading": loading,
    "checkpoints": checkpoints,
    "starting": starting,
    "use": use,
}
_PLACE = re.compile(r"(<!-- traffic: ([\w ]+) -->\n)((?:\|.*\n)*)")


def table(name: str) -> str:
    """A table in Markdown."""
    head, *rows = TABLES[name]()
    lines = [head, ["---"] * len(head), *rows]
    return "".join(f"| {' | '.join(cells)} |\n" for cells in lines)


def renewed(page: str) -> str:
    """The page, its tables made anew. Raises ConfigError where one is unknown or missing."""
    names = [name for _, name, _ in _PLACE.findall(page)]
    if sorted(names) != sorted(TABLES):
        raise ConfigError(f"--write: the page has the tables {names}, and there are {[*TABLES]}")
    return _PLACE.sub(lambda found: found[1] + table(found[2]), page)


def main(arguments: list[str]) -> None:
    parser = argparse.ArgumentParser(
        prog="python -m tempolora.bench traffic",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--write", type=Path, metavar="FILE", help="renew the tables of this page")
    options = parser.parse_args(arguments)
    if options.write is None:
        for name in TABLES:
            print(f"{name}\n\n{table(name)}")
        return
    try:
        page = renewed(options.write.read_text("utf-8"))
    except (OSError, ConfigError) as error:
        parser.error(str(error))
    with replacing(options.write) as temporary:
        temporary.write_text(page, "utf-8")
