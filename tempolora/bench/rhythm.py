"""What the rhythm terms cost in a step of the full-size model at random weights, on a GPU.

    python -m tempolora.bench rhythm [--config configs/a14b.json] [--steps 4] [--runs flow ...]

Draws two clips of the configured size, encodes them, and trains a few steps without rhythm terms,
with them, and with a rollout in every other step, all in one program. A VAE of random weights can
be read by nothing, so a made-up readout and bank of the same shape take the place of the fitted
ones: they cost the same.
"""

import argparse
import json
import statistics
import tempfile
from pathlib import Path

import torch

from tempolora.config import Config, load_config

RUNS = {
    "flow": ("rhythm.spec_weight=0", "rhythm.tv_weight=0"),
    "rhythm": (),
    "rollout": ("rhythm.rollout_every=2",),
}


def main(arguments: list[str]) -> None:
    parser = argparse.ArgumentParser(prog="python -m tempolora.bench rhythm", description=__doc__)
    parser.add_argument("--config", type=Path, default=Path("configs/a14b.json"))
    parser.add_argument("--steps", type=int, default=4)
    parser.add_argument("--runs", nargs="+", choices=RUNS, default=list(RUNS))
    options = parser.parse_args(arguments)
    if not torch.cuda.is_available():
        parser.error("a full-size step needs a GPU, and there is none")
    with tempfile.TemporaryDirectory(prefix="bench-rhythm-") as folder:
        measure(options, Path(folder))


def measure(options: argparse.Namespace, folder: Path) -> None:
    """Encode, then every run in turn; a line of figures for each."""
    from tempolora.data.precompute import precompute
    from tempolora.data.toy_set import draw_toy_set
    from tempolora.model.encoders import WanEncoders
    from tempolora.run import train_and_report
    from tempolora.train.objective import Objective

    cfg = load_config(options.config)
    data, shards = cfg.data, folder / "shards"
    draw_toy_set(
        folder / "clips",
        fps=cfg.timebase.fps,
        num_frames=data.num_frames,
        height=data.height,
        width=data.width,
        clips=2,
        seed=0,
    )
    common = [
        "model.init=random",
        f"data.source={folder / 'clips'}",
        f"data.shards={shards}",
        "model.placement=gpu",
        "train.checkpointing=full",
        "train.compile=false",
        "train.optimizer=adamw",
        f"train.max_steps={options.steps}",
        "train.validate_every=0",
        "output.sample_steps=0",
        "output.trackers=[]",
    ]
    if len(cfg.variant.experts) == 2:
        common.append("model.expert=low")  # the one that can have rollouts
    encoded = load_config(options.config, common)
    precompute(encoded, WanEncoders(encoded, torch.device("cuda")))
    write_made_up_readout(cfg, shards)
    spans = time_calls(Objective)
    print(f"{torch.cuda.get_device_name()}, torch {torch.__version__}")
    print("run | s/step (last, lowest) | GiB reserved | ms in the loss, median")
    for name in options.runs:
        spans.clear()
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()
        out = folder / name
        train_and_report(
            load_config(options.config, [*common, *RUNS[name], f"output.dir={out}"]), "none"
        )
        lines = [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]
        seconds = [line["seconds"] for line in lines]
        loss_ms = statistics.median(begin.elapsed_time(end) for begin, end in spans)
        print(
            f"{name} | {seconds[-1]:.2f}, {min(seconds):.2f} | {lines[-1]['peak_gib']:.1f} | "
            f"{loss_ms:.3f}",
            flush=True,
        )


def write_made_up_readout(cfg: Config, shards: Path) -> None:
    """A readout that reads every frame and a bank of forty clips in place of the fitted ones."""
    from tempolora.data.readout import BANK, READOUT, write_checked
    from tempolora.rhythm.readout import Readout

    generator = torch.Generator().manual_seed(0)
    bins = len(cfg.timebase.bins_hz)
    weight = torch.randn(3, 4, 3, cfg.variant.latent_channels, generator=generator).double()
    bias, r2 = torch.zeros(2, 3, 4, dtype=torch.float64).unbind()
    g2 = torch.ones(bins, dtype=torch.float64)
    readout = Readout(weight, bias.clone(), r2.clone(), g2, cfg.data.num_frames)
    write_checked(shards / READOUT, readout.tensors(), {"made": "up"})
    bank = {"power": torch.rand(40, bins, generator=generator) + 0.1}
    bank["motion"] = torch.rand(40, generator=generator) + 0.1
    write_checked(shards / BANK, bank, {"made": "up"})


def time_calls(objective: type) -> list[tuple[torch.cuda.Event, torch.cuda.Event]]:
    """Have the loss note when it began and ended on the device, in the list returned."""
    spans = []
    compare = objective.compare

    def timed(self, batch, v_hat):
        begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        begin.record()
        outcome = compare(self, batch, v_hat)
        end.record()
        spans.append((begin, end))
        return outcome

    objective.compare = timed
    return spans
