"""How fast a transformer is loaded, against the disk, and the host memory that it takes meanwhile.

    python -m tempolora.bench load [--config configs/a14b.json] [--folder F] [--layers 8]
        [--cases gpu fp8 nf4 host] [--json FILE]

F: a diffusers folder; without one a transformer of --layers blocks is drawn, in fp32 shards, and
removed afterwards (it goes to $TMPDIR). Each case is a process of its own, once with its files
dropped from the page cache and once again right after. Disk: the same files read by one plain loop,
dropped before too. Memory is the peak over what the process had before it began to load.
"""

import argparse
import json
import os
import sys
import tempfile
import threading
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

from tempolora.bench.alone import figures_of
from tempolora.config import Config, load_config
from tempolora.files import sync_file, write_json
from tempolora.model.architectures import architecture
from tempolora.model.location import PART_OF, local_folder, part_files

GIB = 2**30
CASES = {
    "gpu": ("model.base=bf16", "model.placement=gpu"),
    "fp8": ("model.base=fp8", "model.placement=gpu"),
    "nf4": ("model.base=nf4", "model.placement=gpu"),
    "host": ("model.base=bf16", "model.placement=host", "train.checkpointing=full"),
}
SHARD = 5 * 10**9  # bytes, as large as published ones
BLOCK = 2**24
SAMPLED_S = 0.002


def main(arguments: list[str]) -> None:
    parser = argparse.ArgumentParser(
        prog="python -m tempolora.bench load",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--config", type=Path, default=Path("configs/a14b.json"))
    parser.add_argument("--set", action="append", default=[], metavar="KEY=VALUE", dest="settings")
    parser.add_argument("--folder", type=Path, help="a diffusers folder to read from")
    parser.add_argument("--layers", type=int, default=8, help="blocks of a drawn transformer")
    parser.add_argument("--cases", nargs="+", choices=CASES, default=list(CASES))
    parser.add_argument("--json", type=Path, help="write the figures here too")
    parser.add_argument("--case", choices=CASES, help="one case in this process, printed as JSON")
    options = parser.parse_args(arguments)
    cfg = load_config(options.config, options.settings)
    if options.case:
        print(json.dumps(load(settled(options, options.case))))
        return
    with ExitStack() as stack:
        if options.folder is None:
            drawn = tempfile.TemporaryDirectory(prefix="bench-load-")
            options.folder = Path(stack.enter_context(drawn))
            part = PART_OF[cfg.experts[0]]
            config = architecture(cfg.model.variant, part) | {"num_layers": options.layers}
            draw_transformer(options.folder / part, config)
        results = measure(options)
    if options.json:
        write_json(options.json, results)


def settled(options: argparse.Namespace, case: str) -> Config:
    settings = [*options.settings, *CASES[case], f"model.id={options.folder}"]
    return load_config(options.config, settings)


def measure(options: argparse.Namespace) -> dict[str, Any]:
    """Reads the files plainly, then each case; prints a line for each."""
    files = files_of(settled(options, options.cases[0]))
    size = sum(path.stat().st_size for path in files)
    drop(files)
    begin = time.perf_counter()
    read_plainly(files)
    disk = size / 1e9 / (time.perf_counter() - begin)
    results: dict[str, Any] = {"file_gb": size / 1e9, "disk_gb_s": disk}
    print(f"{size / 1e9:.2f} GB in {len(files)} files; the disk alone {disk:.2f} GB/s")
    print("case | files | seconds | GB/s | of the disk | GiB anonymous, page-locked, on the GPU")
    for case in options.cases:
        drop(files)
        for cache in ("dropped", "cached"):
            found = run_alone(options, case)
            results[f"{case} {cache}"] = found
            if "error" in found:
                print(f"{case} | {cache} | {found['error']}", flush=True)
                break
            found["gb_s"] = size / 1e9 / found["seconds"]
            memory = [found[f"{kind}_gib"] for kind in ("anonymous", "pinned", "gpu")]
            print(
                f"{case} | {cache} | {found['seconds']:.1f} | {found['gb_s']:.2f} | "
                f"{found['gb_s'] / disk:.2f} | " + ", ".join(f"{gib:.2f}" for gib in memory),
                flush=True,
            )
    return results


def run_alone(options: argparse.Namespace, case: str) -> dict[str, Any]:
    """A case in a process of its own: its figures, or {"error": its last line}."""
    command = [sys.executable, "-m", "tempolora.bench", "load", "--config", str(options.config)]
    command += ["--case", case, "--folder", str(options.folder)]
    for setting in options.settings:
        command += ["--set", setting]
    return figures_of(command)


def load(cfg: Config) -> dict[str, float]:
    """Seconds and memory of loading the first expert."""
    import torch

    from tempolora.model import wan
    from tempolora.train.world import pick_device

    device = pick_device(0)
    on_gpu = device.type == "cuda"
    torch.zeros(1, device=device)  # the context takes time and memory of its own
    with anonymous_peak() as peak:
        begin = time.perf_counter()
        transformer = wan.load_transformer(cfg.model, cfg.experts[0], device)
        if on_gpu:
            torch.cuda.synchronize(device)
        seconds = time.perf_counter() - begin
    stats = torch.cuda.host_memory_stats() if on_gpu else {"allocated_bytes.peak": 0}
    return {
        "seconds": seconds,
        "weights_gib": sum(p.nbytes for p in transformer.parameters()) / GIB,
        "anonymous_gib": peak[0] / GIB,
        "pinned_gib": stats["allocated_bytes.peak"] / GIB,
        "gpu_gib": torch.cuda.max_memory_reserved(device) / GIB if on_gpu else 0,
    }


@contextmanager
def anonymous_peak() -> Iterator[list[int]]:
    """[the most anonymous memory, in bytes, that the process came to hold over what it had]."""
    before, peak, over = _anonymous(), [0], threading.Event()

    def watch() -> None:
        while not over.wait(SAMPLED_S):
            peak[0] = max(peak[0], _anonymous() - before)

    thread = threading.Thread(target=watch, daemon=True)
    thread.start()
    try:
        yield peak
    finally:
        over.set()
        thread.join()
        peak[0] = max(peak[0], _anonymous() - before)


def _anonymous() -> int:
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith("RssAnon:"):
            return int(line.split()[1]) * 1024
    raise RuntimeError("this system does not say how much memory is anonymous")


def files_of(cfg: Config) -> list[Path]:
    """The first expert's files."""
    return part_files(local_folder(cfg.model) / PART_OF[cfg.experts[0]])


def drop(files: list[Path]) -> None:
    """Take files out of the page cache, as far as the file system does that."""
    for path in files:
        sync_file(path)  # pages that are not on the disk yet stay
        with path.open("rb") as file:
            os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)


def read_plainly(files: list[Path]) -> None:
    buffer = bytearray(BLOCK)
    for path in files:
        with path.open("rb", buffering=0) as file:
            while file.readinto(buffer):
                pass


def draw_transformer(folder: Path, config: dict[str, Any], shard: int = SHARD) -> None:
    """A transformer's folder of drawn fp32 weights in shards of at most `shard` bytes."""
    import torch
    from safetensors.torch import save_file

    from tempolora.model.wan import new_transformer

    with torch.device("meta"):
        meta = new_transformer(config).state_dict()
    groups: list[list[str]] = [[]]
    size = 0
    for name, tensor in meta.items():
        size += 4 * tensor.numel()
        if groups[-1] and size > shard:
            groups.append([])
            size = 4 * tensor.numel()
        groups[-1].append(name)
    folder.mkdir(parents=True)
    (folder / "config.json").write_text(json.dumps(config))
    # Drawing takes longer than writing: every weight is cut from this, each at another place.
    drawn = 0.02 * torch.randn(2**22, generator=torch.Generator().manual_seed(0))
    weight_map, seed = {}, 0
    for number, names in enumerate(groups, start=1):
        file = f"diffusion_pytorch_model-{number:05d}-of-{len(groups):05d}.safetensors"
        state = {}
        for name in names:
            seed += 1
            pieces = -(-meta[name].numel() // len(drawn))
            values = drawn.roll(seed).repeat(pieces)[: meta[name].numel()]
            state[name] = values.view(meta[name].shape)
            weight_map[name] = file
        save_file(state, folder / file, metadata={"format": "pt"})
    index = {"metadata": {}, "weight_map": weight_map}
    (folder / "diffusion_pytorch_model.safetensors.index.json").write_text(json.dumps(index))
