"""A base that is read in shares is the base, at a share of the memory, and stays it; also where
groups of processes hold a copy each.

One launch of four forked processes finds out everything. The reference is the same transformer
loaded whole by one process, and its plain engine.
"""

import json
from functools import cache, partial
from pathlib import Path

import pytest
import torch
import torch.distributed as dist

from tempolora.config import ConfigError, load_config
from tempolora.launched import check_engine
from tempolora.train.plan import Settings, predict
from tempolora.train.split import shares
from tempolora.train.spread import in_runs, sharers, spread_of
from tempolora.train.world import World

ROOT = Path(__file__).parents[1]
CPU = torch.device("cpu")
PROCESSES = 4
TOLERANCE = 1e-5  # of a gradient's norm: only the order of sums differs
PIECES = 4 * 2**24  # bytes in which four threads read
SLACK = 2**26  # what malloc keeps

a14b = partial(load_config, ROOT / "configs" / "a14b.json")


# --- In one process -------------------------------------------------------------------------------


def test_what_cannot_share_a_copy_is_refused():
    with pytest.raises(ConfigError, match=r"shard_over: has no meaning with parallel.engine 'ddp'"):
        a14b(["parallel.shard_over=2", "parallel.engine=ddp"])
    cfg = a14b(["parallel.shard_over=4", "parallel.engine=fsdp"])
    with pytest.raises(ConfigError, match=r"6 cannot be divided into groups of 4; start a mult"):
        check_engine(cfg, 6)
    check_engine(cfg, 8)
    hpz = '{"zero_optimization": {"zero_hpz_partition_size": 2}}'
    cfg = a14b(["parallel.engine=deepspeed", f"parallel.deepspeed={hpz}"])
    with pytest.raises(ConfigError, match="zero_hpz_partition_size holds weights twice"):
        spread_of("deepspeed", cfg, World(0, 2, CPU))


def test_expert_groups_hold_whole_copies():
    cfg = a14b(["parallel.shard_over=4", "parallel.engine=fsdp", "model.expert=both"])
    assert shares(cfg, 12, None) == {"high": 4, "low": 8}
    assert shares(cfg, 4, None) == {}


def test_hosts_are_told_by_runs_of_equal_length():
    assert in_runs([7, 7, 3, 3]) == 2
    assert in_runs([5, 5, 5]) == 3
    assert in_runs([7, 7, 7, 3]) is None
    assert in_runs([7, 3, 7, 3]) is None
    assert in_runs([1, 2, 3]) is None


@pytest.mark.parametrize(
    ("asked", "memory_gib", "size"),
    [("null", 139, 8), ("null", 24, 16), ("node", 24, 8), (4, 24, 4)],
)
def test_by_default_a_host_holds_a_copy_where_its_part_fits(asked, memory_gib, size, monkeypatch):
    from tempolora.train import spread

    monkeypatch.setattr(spread, "_each_hosts", lambda world: 8)
    monkeypatch.setattr(World, "free_bytes", lambda world: memory_gib * 2**30)
    keys = ["parallel.engine=fsdp", "model.placement=gpu", "train.checkpointing=full"]
    cfg = a14b([*keys, f"parallel.shard_over={asked}"])
    assert sharers(cfg, World(0, 16, CPU)) == size


def test_the_planner_counts_those_that_share_a_copy():
    full = Settings("fsdp", "bf16", "gpu", "full")
    weights = {
        over: predict(
            a14b([f"parallel.shard_over={over}", "parallel.engine=fsdp"]), full, gpus=16
        ).parts["weights"]
        for over in ("null", "node", 4)
    }
    whole = predict(a14b(["parallel.engine=plain"]), Settings("plain", "bf16", "gpu", "full"))
    whole = whole.parts["weights"]
    two_blocks = weights["null"] - whole / 16
    assert weights["node"] == pytest.approx(whole / 8 + two_blocks)
    assert weights[4] == pytest.approx(whole / 4 + two_blocks)


# --- In four --------------------------------------------------------------------------------------

# Rows that four processes cannot share equally: 190, and the single one of the modulation tables.
UNEVEN = {
    "num_attention_heads": 6,
    "attention_head_dim": 40,
    "ffn_dim": 190,
    "num_layers": 2,
    "text_dim": 30,
}
LARGE = {
    "num_attention_heads": 8,
    "attention_head_dim": 128,
    "ffn_dim": 4096,
    "num_layers": 6,
    "text_dim": 64,
}
WAYS = {
    "fsdp": ("parallel.engine=fsdp",),
    "fsdp by twos": ("parallel.engine=fsdp", "parallel.shard_over=2"),
    "fsdp, random": ("parallel.engine=fsdp", "model.init=random"),
    "fsdp, fp8": ("parallel.engine=fsdp", "model.base=fp8"),
    "deepspeed": ("parallel.engine=deepspeed",),
    "deepspeed, offloaded": (
        "parallel.engine=deepspeed",
        'parallel.deepspeed={"zero_optimization": {"offload_param": {"device": "cpu"}}}',
    ),
    "deepspeed 2": ("parallel.engine=deepspeed", "parallel.zero_stage=2"),
}


@pytest.fixture(scope="module")
def found(ranks, tmp_path_factory):
    """What the four processes found."""
    from tempolora.bench.load import draw_transformer
    from tempolora.model.architectures import TRANSFORMER

    out = tmp_path_factory.mktemp("spread")
    draw_transformer(out / "uneven" / "transformer", TRANSFORMER["t2v_a14b"] | UNEVEN, 10**6)
    draw_transformer(out / "large" / "transformer", TRANSFORMER["t2v_a14b"] | LARGE, 10**8)
    ranks.call("test_hybrid:process", PROCESSES, [out], out / "log")
    return json.loads((out / "found.json").read_text())


@pytest.mark.slow
@pytest.mark.parametrize("way", WAYS)
def test_shares_make_up_the_base_that_one_process_loads_and_training_leaves_it(way, found):
    """Every weight, bit for bit, before the first step and after the second."""
    assert found[way]["weights"] > 50
    assert found[way]["loaded"] == []
    assert found[way]["trained"] == []
    assert found[way]["rounded"] == (16 if "fp8" in way else 0)  # what is wide enough for it


@pytest.mark.slow
@pytest.mark.parametrize("way", [way for way in WAYS if "fp8" not in way])
def test_gradients_are_those_of_one_process(way, found):
    errors = found[way]["gradients"]
    assert len(errors) > 10
    for name, error in errors.items():
        assert error < TOLERANCE, name


@pytest.mark.slow
@pytest.mark.parametrize("engine", ["fsdp", "deepspeed"])
def test_no_process_holds_more_than_its_share_and_a_weight(engine, found):
    memory = found[f"{engine} memory"]
    assert memory["whole"] > 400e6
    most = memory["whole"] / PROCESSES + memory["largest"]
    for peak in memory["peaks"]:
        assert memory["whole"] / PROCESSES < peak < most + PIECES + SLACK < memory["whole"]


# --- What each of the four does -------------------------------------------------------------------


def config(out, way):
    id_ = [] if "model.init=random" in way else [f"model.id={out / 'uneven'}"]
    sizes = ("data.num_frames=17", "data.height=64", "data.width=64")
    fixed = ("model.base=fp32", "model.placement=gpu", "train.checkpointing=full")
    fixed += ("train.optimizer=adamw", "lora.target=all_linear", "model.expert=high")
    return load_config(None, [*fixed, *sizes, *id_, *way])


def with_adapters(cfg, spread):
    from tempolora.model import lora, wan

    transformer = wan.load_transformer(cfg.model, "high", CPU, spread)
    loaded = whole_state(transformer)
    lora.add_lora(transformer, cfg.lora, cfg.timebase, 0)
    generator = torch.Generator().manual_seed(0)
    for name, parameter in lora.lora_parameters(transformer).items():
        if "lora_B" in name:  # so that gradients reach A as well
            parameter.data.normal_(0, 0.1, generator=generator)
    return transformer, loaded


def whole_state(transformer):
    """The frozen weights, gathered, by their names before adapters came."""
    state = {}
    for name, weight in transformer.named_parameters():
        if hasattr(weight, "ds_id"):
            import deepspeed

            with deepspeed.zero.GatheredParameters([weight]):
                value = weight.detach().clone()
        else:
            value = gathered(weight) if hasattr(weight, "full_tensor") else weight
        if ".lora_" not in name:
            state[name.replace(".base_layer", "")] = value.detach().clone()
    return state


def gathered(weight):
    """A DTensor's whole; gloo carries 8-bit floats as bytes alone."""
    if weight.element_size() > 1:
        return weight.full_tensor()
    bytes_ = weight.to_local().view(torch.uint8)
    shares = [torch.empty_like(bytes_) for _ in range(PROCESSES)]
    dist.all_gather(shares, bytes_)
    return torch.cat(shares).view(weight.dtype)


def differing(a, b):
    assert a.keys() == b.keys()
    same = {n: a[n].dtype == b[n].dtype and torch.equal(a[n].float(), b[n].float()) for n in a}
    return [name for name, equal in same.items() if not equal]


def take_steps(cfg, kind, world, draws, transformer, steps=2):
    """The averaged gradients of the first step."""
    from tempolora.model.lora import lora_parameters
    from tempolora.model.wan import predict_velocity
    from tempolora.train.engine import build_engine

    engine = build_engine(kind, cfg, transformer, world)
    for step in range(steps):
        for draw in draws:
            random = torch.Generator().manual_seed(10 * step + draw)
            x = torch.randn(1, *cfg.latent_shape, generator=random)
            text = torch.randn(1, 512, transformer.config.text_dim, generator=random)
            v = predict_velocity(engine.transformer, x, torch.tensor([0.5]), text)
            engine.backward((v - x).square().mean())
        if not step:
            before = engine.lora_state()
            before = {name: value.clone() for name, value in before.items()}
        engine.step(1e-2)
        if not step:  # Adam's first moment is (1 - beta) times the gradient
            after = engine.lora_state()
            moved = any(not torch.equal(after[name], before[name]) for name in after)
            state = {name: value.clone() for name, value in engine.optimizer_state().items()}
            names = lora_parameters(transformer)
            moments = {name: state[f"{n}.exp_avg"].clone() for n, name in enumerate(names)}
            engine.load_optimizer_state({name: value + 1 for name, value in state.items()})
            engine.load_optimizer_state({name: value.clone() for name, value in state.items()})
            again = engine.optimizer_state()
            assert state.keys() == again.keys()
            assert all(torch.equal(again[name], state[name]) for name in state)
    assert moved
    return moments, engine


@cache
def alone(out, plain):
    """(weights, averaged gradients) of one process that takes all draws; none in 8 bits."""
    keys = (*plain, "train.max_grad_norm=1e9", "parallel.engine=plain")
    cfg = config(out, (*keys, f"train.gradient_accumulation={PROCESSES}"))
    transformer, weights = with_adapters(cfg, None)
    if "model.base=fp8" in plain:
        return weights, {}
    one = World(0, 1, CPU)
    return weights, take_steps(cfg, "plain", one, range(PROCESSES), transformer, steps=1)[0]


def compare(out, world):
    """{way: what differs from one process}, which the first of the four is beside."""
    found = {}
    for way, keys in WAYS.items():
        kind = way.split()[0].strip(",")
        cfg = config(out, (*keys, "train.max_grad_norm=1e9"))
        transformer, loaded = with_adapters(cfg, spread_of(kind, cfg, world))
        moments, engine = take_steps(cfg, kind, world, [world.rank], transformer)
        trained = whole_state(transformer)
        engine.close()
        if not world.is_main:
            continue
        expected, theirs = alone(out, tuple(key for key in keys if key.startswith("model.")))
        found[way] = {
            "weights": len(expected),
            "loaded": differing(loaded, expected),
            "trained": differing(trained, expected),
            "rounded": sum(w.dtype == torch.float8_e4m3fn for w in loaded.values()),
            "gradients": {
                name: ((moments[name] - value).norm() / value.norm()).item()
                for name, value in theirs.items()
            },
        }
    return found


def memory(out, kind, world):
    from tempolora.bench.load import anonymous_peak
    from tempolora.model import wan

    cfg = config(out, (f"parallel.engine={kind}", f"model.id={out / 'large'}"))
    meta = wan.meta_transformer(cfg.model, "high")
    sizes = [4 * p.numel() for p in meta.parameters()]
    world.barrier()
    with anonymous_peak() as peak:
        transformer = wan.load_transformer(cfg.model, "high", CPU, spread_of(kind, cfg, world))
    del transformer
    peaks = world.gather(torch.tensor([peak[0]])).tolist()
    return {"whole": sum(sizes), "largest": max(sizes), "peaks": peaks}


def process(rank, out):
    import deepspeed

    from tempolora.model import wan

    # drawn weights have published widths; not here
    out, drawn = Path(out), wan.new_transformer
    small = json.loads((out / "uneven" / "transformer" / "config.json").read_text())
    wan.new_transformer = lambda given: drawn(given if given["num_layers"] < 30 else small)
    deepspeed.init_distributed(dist_backend="gloo")
    world = World(rank, PROCESSES, CPU)
    found = {f"{kind} memory": memory(out, kind, world) for kind in ("fsdp", "deepspeed")}
    found |= compare(out, world)
    if rank == 0:
        (out / "found.json").write_text(json.dumps(found))
    dist.barrier()
    dist.destroy_process_group()
