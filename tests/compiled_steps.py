"""Three steps with and without compiled blocks under an engine; started by torchrun.

    torchrun --standalone --nproc-per-node 2 tests/compiled_steps.py ENGINE OUT.json

Dynamo and the partitioner without inductor, which is slow on a CPU.
"""

import json
import sys
from functools import partial
from pathlib import Path

import torch

from tempolora.config import load_config
from tempolora.model import wan
from tempolora.model.lora import lora_parameters
from tempolora.train import blocks
from tempolora.train.engine import build_engine
from tempolora.train.loop import load_with_adapters
from tempolora.train.spread import spread_of
from tempolora.train.world import World, join_world, leave_world

TOY = Path(__file__).parents[1] / "configs" / "toy.json"


def steps(engine: str, world: World, compiled: bool) -> list[tuple[float, float]]:
    """(loss, gradient norm) of three steps."""
    sets = ("model.expert=high", "train.optimizer=adamw", "lora.target=self_attention")
    more = (f"train.compile={str(compiled).lower()}", f"parallel.engine={engine}")
    cfg = load_config(TOY, [*sets, "train.checkpointing=full", *more])
    spread = spread_of(engine, cfg, world)
    transformer = load_with_adapters(cfg, "high", world.device, None, spread)
    generator = torch.Generator().manual_seed(0)
    for parameter in lora_parameters(transformer).values():
        parameter.data.normal_(0, 0.02, generator=generator)
    built = build_engine(engine, cfg, transformer, world)
    found = []
    for step in range(3):
        generator.manual_seed(10 * step + world.rank)
        latents = torch.randn(1, *cfg.latent_shape, generator=generator)
        text = torch.randn(1, 512, transformer.config.text_dim, generator=generator)
        v_hat = wan.predict_velocity(built.transformer, latents, torch.tensor([0.7]), text)
        loss = v_hat.square().mean()
        built.backward(loss)
        found.append((loss.item(), built.step(1e-3).item()))
    built.close()
    return found


if __name__ == "__main__":
    name, out = sys.argv[1:]
    blocks.torch.compile = partial(torch.compile, backend="aot_eager_decomp_partition")
    world = join_world(name == "deepspeed")
    taken = [steps(name, world, compiled) for compiled in (False, True)]
    if world.is_main:
        graphs = torch._dynamo.utils.counters["stats"]["unique_graphs"]
        breaks = len(torch._dynamo.utils.counters["graph_break"])
        record = {"eager": taken[0], "compiled": taken[1], "graphs": graphs, "breaks": breaks}
        Path(out).write_text(json.dumps(record))
    leave_world()
