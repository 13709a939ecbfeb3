"""What docs/scaling.md counts: against the collectives of real engines, and against the page."""

from pathlib import Path

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from tempolora.bench import traffic
from tempolora.config import ConfigError, load_config
from tempolora.model.lora import add_lora
from tempolora.model.wan import load_transformer, predict_velocity
from tempolora.train.context import context_of
from tempolora.train.dry_run import pretended_world
from tempolora.train.engine import build_engine
from tempolora.train.spread import spread_of
from tempolora.train.work import work_of

ROOT = Path(__file__).parents[1]
SIZE = 4


class Counted(TorchDispatchMode):
    """Bytes that collectives bring to this process, by kind."""

    def __init__(self):
        super().__init__()
        self.gathered = self.averaged = self.exchanged = 0.0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        name = function.name()
        if "allgather_base" in name:
            self.gathered += (SIZE - 1) * args[1].nbytes
        elif "allreduce" in name:
            self.averaged += sum(2 * (SIZE - 1) / SIZE * tensor.nbytes for tensor in args[0])
        elif name == "tempolora::exchange":
            self.exchanged += (args[1] - 1) / args[1] * args[0].nbytes
        return function(*args, **kwargs or {})


def count_a_step(kind, *overrides):
    """A step of TinyWan as one of four processes, the others of which are pretended."""
    settings = ("model.base=bf16", "train.checkpointing=full", "train.optimizer=adamw")
    settings += (
        "rhythm.spec_weight=0",
        "data.num_frames=9",
        "train.batch_size=1",
        f"parallel.engine={kind}",
        # nobody is there to say whose host is whose
        *([f"parallel.shard_over={SIZE}"] if kind == "fsdp" else []),
        *overrides,
    )
    cfg = load_config(ROOT / "configs" / "toy.json", list(settings))
    with pretended_world(1, SIZE, cfg.parallel.context) as world:
        transformer = load_transformer(cfg.model, "high", "cpu", spread_of(kind, cfg, world))
        add_lora(transformer, cfg.lora, cfg.timebase, 0)
        engine = build_engine(kind, cfg, transformer, world)
        latents = context_of(cfg, world).cut(torch.randn(1, *cfg.latent_shape))
        text = torch.randn(1, 512, transformer.config.text_dim)
        with Counted() as counted:
            sigma = torch.full((1,), 0.5)
            velocity = predict_velocity(engine.transformer, latents.contiguous(), sigma, text)
            engine.backward(velocity.square().mean())
            engine.step(1e-3)
    return counted, work_of(cfg, "high")


@pytest.mark.parametrize("blocks", ["null", "[1,2]", "[2,3]"])
def test_fsdp_gathers_what_is_counted(blocks):
    counted, work = count_a_step("fsdp", f"lora.blocks={blocks}")
    # the few tensors outside of the blocks with fewer rows than processes are padded
    assert counted.gathered == pytest.approx(traffic.gathered(work, SIZE), rel=1e-2)
    assert counted.averaged == traffic.averaged(work, SIZE)


def test_ddp_moves_the_gradients_of_the_adapters_alone():
    counted, work = count_a_step("ddp")
    assert counted.averaged == traffic.averaged(work, SIZE)
    assert counted.gathered == counted.exchanged == 0


def test_a_shared_clip_exchanges_twelve_tensors_a_block():
    counted, work = count_a_step("ddp", "parallel.context=2")
    assert counted.exchanged == traffic.exchanged(work, 2)


def test_the_wire_of_the_a14b_is_what_is_counted_by_hand():
    """28.6 GB of weights, forward and backward; 7.37 M adapters; 48,360 tokens of 5120."""
    assert traffic.gathered(traffic.A14B.work, 2) == pytest.approx(28.6e9, rel=0.01)
    assert traffic.averaged(traffic.A14B.work, 2) == pytest.approx(4 * 7.37e6, rel=1e-3)
    assert traffic.exchanged(traffic.LONG.work, 2) == 40 * 12 * 48360 // 2 * 5120 * 2 / 2
    zero, fsdp = (count(traffic.A14B.work, 8) for count in (traffic.partitioned, traffic.gathered))
    assert zero == pytest.approx(fsdp, rel=0.01)


def test_computation_waits_only_for_what_does_not_hide():
    case = traffic.A14B
    gather = traffic.gather_s(case.work, 8, 8)
    assert traffic.exposed_s(case, 8, 8) == gather < case.forward_s / 40
    slow = traffic.Case("", case.config, case.overrides, case.step_s / 100)
    assert traffic.exposed_s(slow, 8, 8) > 40 * (gather - slow.forward_s / 40)
    two = traffic.engine_s(case, "fsdp", 2, 8)
    assert two == pytest.approx(9.368, rel=0.005)  # as measured


def test_the_tables_of_the_page_are_those_of_the_script(monkeypatch):
    monkeypatch.chdir(ROOT)
    page = (ROOT / "docs" / "scaling.md").read_text("utf-8")
    assert traffic.renewed(page) == page
    assert traffic.renewed(page.replace("9.368", "9.300")) == page


def test_a_page_that_lacks_a_table_is_refused():
    with pytest.raises(ConfigError, match="the page has the tables"):
        traffic.renewed("<!-- traffic: use -->\n")
