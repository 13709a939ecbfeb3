"""Clips shared by several processes: every gradient, loss and result is that of one process.

One launch of four processes checks all of it, as launchers would start them but forked. The
reference is the plain engine with diffusers' own attention on whole clips, in fp32. Only the
order of sums differs: 1e-5 of a gradient's norm.
"""

import json
import os
import shutil
import subprocess
import sys
from functools import partial
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from conftest import SMALL, overrides

from tempolora.config import ConfigError, load_config
from tempolora.launched import check_engine
from tempolora.model import wan
from tempolora.train import blocks
from tempolora.train.context import Context, share_attention
from tempolora.train.loop import load_with_adapters
from tempolora.train.plan import Settings, predict
from tempolora.train.work import check_heads

ROOT = Path(__file__).parents[1]
TOY = ROOT / "configs" / "toy.json"
LORA = "wan22_temporal_lora_high_noise.safetensors"
CPU = torch.device("cpu")
PROCESSES = 4
TOLERANCE = 1e-5

TERMS = ("rhythm.sound_weight=0.1", "rhythm.tv_weight=0.1", "rhythm.spec_weight=0.2")
CASES = {
    "t2v, anchor, rollout": (
        "model.expert=low",
        "train.anchor_weight=1",
        "rhythm.rollout_every=1",
        "rhythm.rollout_steps=2",
        "rhythm.rollout_weight=0.01",
        "lora.target=temporal",
        "train.checkpointing=full",
    ),
    "t2v, absolute": (
        "model.expert=high",
        "rhythm.spec_form=absolute",
        "lora.target=all_linear",
        "train.checkpointing=selective",
    ),
    "i2v": ("model.variant=i2v_a14b", "model.expert=low", "train.checkpointing=none"),
    "5b": ("model.variant=ti2v_5b", "train.checkpointing=selective", "train.kept_blocks=1"),
    "5b, i2v": ("model.variant=ti2v_5b", "model.task=i2v", "train.checkpointing=full"),
    "offload": ("model.expert=high", "train.checkpointing=offload"),
}


WAYS = {  # engine and processes that share a clip; FSDP2 shards weights, by which no case differs
    "t2v, anchor, rollout": (("fsdp", 2), ("ddp", 4)),
    "t2v, absolute": (("ddp", 4),),
    "i2v": (("ddp", 2),),
    "5b": (("ddp", 4),),
    "5b, i2v": (("fsdp", 4),),
    "offload": (("ddp", 2),),
}


def config(*more):
    """Tokens of a frame: 4 x 6, of the 5B 2 x 4: four processes take 2 x 2 or 1 x 4 parts."""
    width = 128 if "model.variant=ti2v_5b" in more else 96
    sizes = ("data.num_frames=49", "data.height=64", f"data.width={width}")
    return load_config(None, [*sizes, "train.optimizer=adamw", *TERMS, *more])


# --- In one process -------------------------------------------------------------------------------


@pytest.mark.parametrize(("rows", "columns"), [(1, 2), (2, 1), (2, 2), (1, 1)])
def test_the_parts_of_a_picture_are_all_of_it_and_each_pixel_once(rows, columns):
    whole = torch.arange(2 * 4 * 6).view(2, 4, 6)
    parts = [Context(rows, columns, n).cut(whole) for n in range(rows * columns)]
    assert len({part.shape for part in parts}) == 1
    seen = torch.cat([part.flatten(1) for part in parts], dim=1).sort().values
    assert torch.equal(seen, whole.flatten(1))


@pytest.mark.parametrize(
    ("name", "context", "grid"),
    [("a14b", 2, (1, 2)), ("a14b", 8, (1, 8)), ("ti2v_5b", 8, (1, 8)), ("a14b", 20, (5, 4))],
)
def test_pictures_are_cut_between_tokens_into_equal_parts(name, context, grid):
    sizes = ["data.height=480", "data.width=832"] if context == 20 else []
    cfg = load_config(ROOT / "configs" / f"{name}.json", [f"parallel.context={context}", *sizes])
    assert cfg.context_grid == grid


def test_what_cannot_be_shared_equally_is_refused():
    a14b = partial(load_config, ROOT / "configs" / "a14b.json")
    with pytest.raises(ConfigError, match=r"36 x 64 tokens of a frame cannot be cut into 5 equal"):
        a14b(["parallel.context=5"])
    with pytest.raises(ConfigError, match=r"40 attention heads cannot be shared by 16 processes"):
        check_heads(a14b(["parallel.context=16"]), "high")
    check_heads(a14b(["parallel.context=8"]), "high")
    with pytest.raises(ConfigError, match=r"6 cannot be divided into groups of 4; start a mult"):
        check_engine(a14b(["parallel.context=4"]), 6)
    check_engine(a14b(["parallel.context=4"]), 8)


def test_the_planner_shares_out_activations_and_time_but_not_weights():
    full = Settings("fsdp", "bf16", "gpu", "full")
    one, two = (
        predict(load_config(ROOT / "configs/a14b.json", [f"parallel.context={n}"]), full, gpus=2)
        for n in (1, 2)
    )
    for name in ("activations kept", "activations in flight", "latents and loss"):
        assert two.parts[name] == pytest.approx(one.parts[name] / 2)
    assert two.parts["weights"] == one.parts["weights"]
    assert one.seconds / 2 < two.seconds < 0.55 * one.seconds


@pytest.mark.slow
def test_compiled_full_checkpointing_keeps_nothing_that_was_exchanged(monkeypatch):
    """In a group of one process: what autograd saves is as many bytes as without exchanges."""
    backend = "aot_eager_decomp_partition"
    monkeypatch.setattr(blocks.torch, "compile", partial(torch.compile, backend=backend))
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    try:
        sizes = ("data.num_frames=33", "data.height=128", "data.width=128")
        sets = (*sizes, "model.expert=high", "train.checkpointing=full", "train.compile=true")
        saved = []
        for context in (None, Context(group=dist.group.WORLD)):
            torch._dynamo.reset()
            cfg = load_config(TOY, sets)
            transformer = load_with_adapters(cfg, "high", CPU, None)
            if context:
                share_attention(transformer, context)
            blocks.prepare_blocks(cfg, transformer, CPU, compiled=True)
            saved.append(saved_bytes(cfg, transformer))
    finally:
        torch._dynamo.reset()
        dist.destroy_process_group()
    assert saved[0] > 2**20
    assert saved[1] == pytest.approx(saved[0], rel=0.02)


def saved_bytes(cfg, transformer):
    """What one forward keeps for its backward, without parameters."""
    kept = {}

    def keep(tensor):
        if not isinstance(tensor, torch.nn.Parameter):
            kept[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
        return tensor

    text = torch.randn(1, 512, transformer.config.text_dim)
    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        wan.predict_velocity(
            transformer, torch.randn(1, *cfg.latent_shape), torch.tensor([0.5]), text
        )
    return sum(kept.values())


# --- In four --------------------------------------------------------------------------------------


def settings(shards, out, *more):
    measured = ("data.held_out=1", "train.validate_every=4", "train.anchor_weight=1")
    paths = (f"data.shards={shards}", f"output.dir={out}", "model.expert=high")
    # gradients here have norms near 5e-4: this clips every one of them
    return overrides(*SMALL, *paths, *measured, "train.max_grad_norm=1e-4", *more)


def logged(out, key):
    """A value, or that of a group, at every step that has it."""
    lines = [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]
    return [line[key] for line in sorted(lines, key=lambda line: line["step"]) if key in line]


def in_a_process_of_its_own(command, **variables):
    path = os.pathsep.join([str(ROOT), str(Path(__file__).parent)])
    launchers = os.pathsep.join([str(Path(sys.executable).parent), os.environ["PATH"]])
    run = subprocess.run(
        [str(part) for part in command],
        env=os.environ | {"PYTHONPATH": path, "PATH": launchers} | variables,
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert run.returncode == 0, run.stdout[-3000:] + run.stderr[-6000:]


@pytest.fixture(scope="module")
def launched(ranks, toy_shards, tmp_path_factory):
    """What four processes found, and a run of one to compare theirs with."""
    from tempolora.cli import main

    out = tmp_path_factory.mktemp("context")
    sets = settings(toy_shards, out / "plain", "train.gradient_accumulation=2")
    assert main(["train", *sets]) == 0
    ranks.call("test_context:compare_steps", PROCESSES, [out], out / "log")
    more = ("parallel.engine=fsdp", "parallel.context=2")
    shared = ["train", *settings(toy_shards, out / "shared", *more)]
    assert ranks.run(PROCESSES, shared, out / "log") == [0] * PROCESSES, (out / "log").read_text()
    return out


@pytest.mark.slow
@pytest.mark.parametrize("case", CASES)
def test_gradients_loss_and_metrics_are_those_of_one_process(case, launched):
    found = json.loads((launched / "found.json").read_text())[case]
    assert found.keys() == {f"{engine} {context}" for engine, context in WAYS[case]}
    for way, errors in found.items():
        assert len(errors) > 10
        for name, error in errors.items():
            assert error < TOLERANCE, (way, name)


@pytest.mark.slow
def test_a_run_that_shares_clips_by_twos_is_that_of_one_process(launched):
    compare_runs(launched / "shared", launched / "plain")


def compare_runs(ours, theirs):
    from safetensors.torch import load_file

    for value in ("loss", "spectral", "tv", "held_out", "sigma"):
        assert len(logged(theirs, value)) == (2 if value == "held_out" else 4)
        assert logged(ours, value) == pytest.approx(logged(theirs, value), rel=1e-5), value
    for a, b in zip(logged(ours, "flow_by_sigma"), logged(theirs, "flow_by_sigma"), strict=True):
        assert a == pytest.approx(b, rel=1e-5)
    ours, theirs = (load_file(folder / LORA) for folder in (ours, theirs))
    moved = max(w.abs().max() for name, w in theirs.items() if "lora_B" in name)
    for name, weight in theirs.items():
        assert (ours[name] - weight).abs().mean() < 1e-3 * moved, name


@pytest.mark.soak
@pytest.mark.parametrize(
    ("launcher", "engine"),
    [
        (("torchrun", "--standalone", "--nproc_per_node", "4"), "ddp"),
        (("deepspeed", "--num_accelerators", "4"), "auto"),
    ],
    ids=["ddp", "deepspeed"],
)
def test_every_launcher_starts_such_runs_and_they_resume_bit_for_bit(
    launcher, engine, launched, toy_shards, tmp_path
):
    from safetensors.torch import load_file

    def launch(out):
        script = [ROOT / "launch" / "train.py", "--config", TOY]
        more = (f"parallel.engine={engine}", "parallel.context=2")
        in_a_process_of_its_own([*launcher, *script, *settings(toy_shards, out, *more)])

    whole, stopped = tmp_path / "whole", tmp_path / "stopped"
    launch(whole)
    compare_runs(whole, launched / "plain")
    shutil.copytree(whole, stopped)
    shutil.rmtree(stopped / "checkpoints" / "high" / "step-000004")
    (stopped / "metrics.jsonl").unlink()
    launch(stopped)
    assert logged(stopped, "loss") == logged(whole, "loss")[2:]
    resumed, expected = load_file(stopped / LORA), load_file(whole / LORA)
    assert all(torch.equal(resumed[name], expected[name]) for name in expected)


# --- What each of the four does -------------------------------------------------------------------


class Recorder(torch.optim.SGD):
    """Keeps the gradients that it is given to step with."""

    def step(self):
        self.seen = [p.grad.clone() for group in self.param_groups for p in group["params"]]


def transformer_of(cfg, spread):
    """A small Wan of four heads with adapters that do something; the same on every process."""
    from tempolora.model import lora, wan
    from tempolora.model.architectures import architecture
    from tempolora.train.engine import lora_parameters

    small = {"num_attention_heads": 4, "num_layers": 2, "ffn_dim": 256, "text_dim": 32}
    torch.manual_seed(0)
    transformer = wan.new_transformer(architecture(cfg.model.variant, "transformer") | small)
    transformer.requires_grad_(False)
    if spread:
        spread(transformer)
    lora.add_lora(transformer, cfg.lora, cfg.timebase, 0)
    generator = torch.Generator().manual_seed(0)
    for name, parameter in lora_parameters(transformer).items():
        if "lora_B" in name:  # so that gradients reach A as well, and the anchor holds something
            parameter.data.normal_(0, 0.1, generator=generator)
    return transformer


def drawn(cfg, expert, draw, context):
    from tempolora.data.shards import Sample
    from tempolora.train.step import Collate

    random = torch.Generator().manual_seed(draw)
    latents = {"latents": torch.randn(cfg.latent_shape, generator=random)}
    if cfg.model.variant == "i2v_a14b":
        latents["condition"] = torch.randn(cfg.latent_shape, generator=random)
    rhythm = {"onset": torch.rand(cfg.data.num_frames, generator=random)}
    text = torch.randn(300, 32, generator=random)
    sample = Sample(f"clip{draw}", latents, text, rhythm, {"speed": 1.0})
    return Collate(cfg, expert, torch.zeros(1, 32), context)([(draw, sample)])


def one_step(cfg, kind, world, draws):
    """Values by name, among them the gradient of each adapter and the metrics."""
    from test_probes import known_readout
    from test_rollout import real_bank

    from tempolora.model.lora import lora_parameters
    from tempolora.model.wan import predict_velocity
    from tempolora.train import engine as engines
    from tempolora.train.anchor import Anchor
    from tempolora.train.context import context_of
    from tempolora.train.objective import Objective
    from tempolora.train.rollout import Rollout
    from tempolora.train.spread import spread_of
    from tempolora.train.watch import Watch

    engines.build_optimizer = lambda train, parameters: Recorder(parameters, lr=0.0)
    expert, context = cfg.experts[0], context_of(cfg, world)
    readout = known_readout(channels=cfg.variant.latent_channels)
    transformer = transformer_of(cfg, spread_of(kind, cfg, world))
    engine = engines.build_engine(kind, cfg, transformer, world)
    forward = partial(predict_velocity, engine.transformer)
    objective = Objective(cfg, expert, readout, CPU, context)
    batches = [drawn(cfg, expert, draw, context) for draw in draws]
    objective.calibrate(forward, batches, world)
    watch = Watch(cfg, expert, world)
    terms = [Anchor(cfg, engine.transformer)] if cfg.train.anchor_weight else []
    if cfg.rhythm.rollout_every:
        terms.append(Rollout(cfg, expert, readout, real_bank(readout), CPU))
    for batch in batches:
        outcome = objective(forward, batch)
        for term in terms:
            outcome = term.join(outcome, objective, forward, batch)
        engine.backward(outcome.loss)
        watch.add(batch, outcome)
    norm = engine.step(1.0)
    values = watch.values(objective, 1, norm, 1.0)
    if len(draws) == 1:  # else of the last microstep alone
        values |= {f"share {name}": share for name, share in values["grad_share"].items()}
    else:
        values = {k: v for k, v in values.items() if not k.startswith("motion")}
    speed = ("seconds", "_per_s", "tflops", "data_wait")
    numbers = {
        name: torch.tensor(value)
        for name, value in values.items()
        if isinstance(value, float) and not name.endswith(speed)
    }
    return numbers | dict(
        zip(lora_parameters(engine.transformer), engine._optimizer.seen, strict=True)
    )


def largest_errors(found, expected):
    """|a - b| / |b| of everything that both name."""
    return {
        name: ((found[name] - value).norm() / value.norm().clamp(min=1e-20)).item()
        for name, value in expected.items()
        if name in found
    }


def compare_steps(rank, out):
    """In found.json {case: {engine and context: {value: largest error on any process}}}."""
    from tempolora.train.world import World

    dist.init_process_group("gloo")
    found = {}
    groups = {size: dist.new_subgroups(group_size=size)[0] for size in (2, 4)}
    for case, ways in WAYS.items():
        found[case], expected = {}, {}
        for engine, context in ways:
            replicas = PROCESSES // context
            if rank == 0 and replicas not in expected:
                whole = config(*CASES[case], f"train.gradient_accumulation={replicas}")
                expected[replicas] = one_step(whole, "plain", World(0, 1, CPU), range(replicas))
            world = World(rank, PROCESSES, CPU, None, context, groups[context])
            cfg = config(*CASES[case], f"parallel.context={context}")
            everywhere = [None] * PROCESSES
            ours = one_step(cfg, engine, world, [world.data_rank])
            dist.gather_object(ours, everywhere if rank == 0 else None)
            if rank == 0:
                errors = [largest_errors(each, expected[replicas]) for each in everywhere]
                found[case][f"{engine} {context}"] = {
                    name: max(each[name] for each in errors) for name in errors[0]
                }
    if rank == 0:
        Path(out, "found.json").write_text(json.dumps(found))
    dist.barrier()
    dist.destroy_process_group()
