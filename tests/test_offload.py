"""Weights and inputs that come and go change no number: losses, gradients and videos to the bit.

The reference is the model that lies on the device as a whole, with full checkpointing.
"""

import json
from collections import Counter
from contextlib import contextmanager
from math import prod
from pathlib import Path

import pytest
import torch
from conftest import SMALL, overrides
from safetensors.torch import load_file
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils._python_dispatch import TorchDispatchMode

from tempolora.config import ConfigError, load_config
from tempolora.launched import check_engine
from tempolora.model import wan
from tempolora.model.offload import HostMemory, Lane, StreamedWeights
from tempolora.model.parts import in_parts, whole
from tempolora.train import recompute
from tempolora.train.attended import Attended
from tempolora.train.engine import build_engine, choose_engine
from tempolora.train.recompute import KeptInputs
from tempolora.train.world import World

ROOT = Path(__file__).parents[1]
CPU = torch.device("cpu")
ALONE = World(0, 1, CPU)
FULL = ("train.checkpointing=full",)
HOST = ("model.placement=host", "train.checkpointing=full")
OFFLOAD = ("train.checkpointing=offload",)
BOTH = ("model.placement=host", "train.checkpointing=offload")


def toy(*more: str):
    return load_config(ROOT / "configs" / "toy.json", [*SMALL, "lora.target=all_linear", *more])


class LateLane(Lane):
    """A GPU's slowest copy engine: nothing is copied until it is waited for.

    Sources are read then, so a buffer that was given away too early shows.
    """

    def __init__(self, device=CPU) -> None:
        super().__init__(device)
        self.waited = 0

    def copy(self, pairs, after):
        pairs = list(pairs)
        done = []

        def run() -> None:
            if not done:
                done.append(True)
                for event in after:
                    if event is not None:
                        event()
                for destination, source in pairs:
                    destination.copy_(source)

        return run

    def wait(self, event) -> None:
        if event is not None:
            self.waited += 1
            event()


def trained(cfg):
    """(engine, its adapters) with B drawn too, so that gradients reach A."""
    from tempolora.model.lora import lora_parameters
    from tempolora.train.loop import load_with_adapters

    transformer = load_with_adapters(cfg, "high", CPU, None)
    generator = torch.Generator().manual_seed(0)
    for name, parameter in lora_parameters(transformer).items():
        if "lora_B" in name:
            parameter.data.normal_(0, 0.02, generator=generator)
    return build_engine("plain", cfg, transformer, ALONE), lora_parameters(transformer)


def inputs(cfg, frames: int = 5, seed: int = 0):
    generator = torch.Generator().manual_seed(seed)
    latents = torch.randn(1, 16, frames, 8, 8, generator=generator)
    return latents, torch.tensor([0.7]), torch.randn(1, 512, 32, generator=generator)


def gradients(cfg, *frames: int):
    """Losses and adapter gradients of forwards of so many latent frames, then one backward."""
    engine, adapters = trained(cfg)
    losses = [
        wan.predict_velocity(engine.transformer, *inputs(cfg, count, n)).square().mean()
        for n, count in enumerate(frames)
    ]
    engine.backward(sum(losses))
    return [loss.item() for loss in losses], {n: p.grad.clone() for n, p in adapters.items()}


def assert_same(ours, reference) -> None:
    assert ours[0] == reference[0]
    assert ours[1].keys() == reference[1].keys()
    for name, gradient in reference[1].items():
        assert gradient.any(), name
        assert torch.equal(ours[1][name], gradient), name


@pytest.fixture(scope="module")
def reference(tinywan):
    return gradients(toy(*FULL), 5, 1)


@pytest.mark.parametrize("settings", [HOST, OFFLOAD, BOTH], ids=["host", "offload", "both"])
@pytest.mark.parametrize("lane", [Lane, LateLane])
def test_two_forwards_and_a_backward_have_the_gradients_of_plain_checkpointing(
    settings, lane, reference, monkeypatch
):
    monkeypatch.setattr("tempolora.model.offload.Lane", lane)
    monkeypatch.setattr(recompute, "Lane", lane)
    assert_same(gradients(toy(*settings), 5, 1), reference)


def test_blocks_below_the_first_adapter_do_no_gradient_work(reference):
    above = ("lora.blocks=[1, 2]",)
    assert_same(gradients(toy(*BOTH, *above), 5), gradients(toy(*FULL, *above), 5))


@pytest.mark.parametrize(
    ("settings", "terms"),
    [
        (HOST, "train.gradient_accumulation=2"),
        (BOTH, "train.anchor_weight=1"),  # not with the other: sums of four have another order
    ],
    ids=["host-accumulation", "both-anchor"],
)
def test_a_run_with_validation_between_its_steps_is_the_same_to_the_bit(
    settings, terms, toy_shards, tmp_path
):
    from tempolora.cli import main

    more = (
        f"data.shards={toy_shards}",
        "model.expert=high",
        "data.held_out=1",
        "train.validate_every=2",
        terms,
        "train.max_steps=2",
    )
    runs = {}
    for name, chosen in (("plain", FULL), ("streamed", settings)):
        out = tmp_path / name
        assert main(["train", *overrides(*SMALL, *more, *chosen, f"output.dir={out}")]) == 0
        lines = [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]
        values = [{k: line.get(k) for k in ("loss", "anchor", "held_out")} for line in lines]
        folder = out / "checkpoints" / "high" / "step-000002"
        runs[name] = values, load_file(folder / "lora.safetensors")
    assert runs["streamed"][0] == runs["plain"][0]
    for name, weight in runs["plain"][1].items():
        assert torch.equal(runs["streamed"][1][name], weight), name


@pytest.mark.slow
@pytest.mark.parametrize(
    "settings", [pytest.param(HOST, marks=pytest.mark.soak), BOTH], ids=["host", "both"]
)
def test_compiled_parts_are_compiled_once_for_all_blocks(settings, reference):
    from torch._dynamo.utils import counters

    torch._dynamo.reset()
    counters.clear()
    losses, compiled = gradients(toy(*settings, "train.compile=true"), 5)
    parts = 6 if settings is BOTH else 1
    # one graph without and one with a gradient; weights that are swapped compile nothing anew
    assert counters["stats"]["unique_graphs"] == 2 * parts
    assert not counters["graph_break"]
    want = gradients(toy(*FULL), 5)
    assert losses == pytest.approx(want[0], rel=1e-5)
    for name, gradient in want[1].items():
        assert (compiled[name] - gradient).norm() <= 1e-4 * gradient.norm(), name


class Operators(TorchDispatchMode):
    """Counts operators by name."""

    def __init__(self) -> None:
        super().__init__()
        self.counts = Counter()

    def __torch_dispatch__(self, op, types, args=(), kwargs=None):
        self.counts[op.__name__.split(".")[0]] += 1
        return op(*args, **(kwargs or {}))


@pytest.mark.parametrize("settings", [OFFLOAD, BOTH], ids=["offload", "both"])
def test_self_attention_goes_forward_once_and_backward_once(settings, tinywan):
    """Its output and the sums of its rows are in host memory; that to the text is repeated."""
    cfg = toy(*settings)
    engine, _ = trained(cfg)
    blocks, forward = len(engine.transformer.blocks), "_scaled_dot_product_flash_attention_for_cpu"
    with Operators() as seen:
        loss = wan.predict_velocity(engine.transformer, *inputs(cfg)).mean()
        assert seen.counts[forward] == 2 * blocks
        engine.backward(loss)
    assert seen.counts[forward] == 3 * blocks
    assert seen.counts[f"{forward}_backward"] == 2 * blocks


def test_an_attention_between_its_passes_holds_none_of_its_tensors():
    given = [torch.randn(1, 20, 2, 64).transpose(1, 2) for _ in range(3)]
    attended = Attended(given)
    out = attended.out_of(attended.kept)
    held = [StorageWeakRef(t.untyped_storage()) for t in (*given, *attended.kept)]
    assert len(held) == 5  # with the sums of the rows
    attended.kept = None
    del given, out
    assert all(ref.expired() for ref in held)


def test_each_block_keeps_three_tensors_and_the_sums_of_its_attention(tinywan):
    cfg = toy(*OFFLOAD)
    engine, _ = trained(cfg)
    latents, *rest = inputs(cfg)
    loss = wan.predict_velocity(engine.transformer, latents, *rest).mean()
    config = engine.transformer.config
    tokens = latents[0, 0].numel() // prod(config.patch_size)
    heads = config.num_attention_heads
    width = heads * config.attention_head_dim
    kept = [one() for group in engine.transformer.kept_inputs._stack for one in group]
    sizes = [sum(map(len, one._spans)) for one in kept]
    each = 4 * tokens * (3 * width + heads)
    assert sum(sizes) == each * len(engine.transformer.blocks)
    del loss


# --- What is where, and when ----------------------------------------------------------------------


class Watched(StreamedWeights):
    """Notes each fetch, and looks at what is resident."""

    def __init__(self, units, device, lane=None) -> None:
        super().__init__(units, device, lane)
        self.fetched: list[int] = []

    def _fetch(self, unit, keep):
        if all(slot.holds != unit for slot in self._held):
            self.fetched.append(unit)
        return super()._fetch(unit, keep)


@pytest.fixture
def watched(monkeypatch):
    monkeypatch.setattr("tempolora.model.offload.StreamedWeights", Watched)


def test_a_step_fetches_each_third_twice_at_most_and_none_that_is_still_there(watched, tinywan):
    cfg = toy(*BOTH)
    engine, _ = trained(cfg)
    weights = engine.transformer.streamed
    last = len(weights) - 1
    assert len(weights) == 3 * len(engine.transformer.blocks)
    loss = wan.predict_velocity(engine.transformer, *inputs(cfg)).mean()
    assert weights.fetched == [*range(last + 1)]
    weights.fetched.clear()
    engine.backward(loss)
    assert weights.fetched == [*range(last - 3, -1, -1)]  # three were left by the forward pass
    weights.fetched.clear()
    wan.predict_velocity(engine.transformer, *inputs(cfg))
    assert weights.fetched == [*range(3, last + 1)]  # and three by the backward pass


@pytest.mark.parametrize(("settings", "slots"), [(BOTH, 3), (HOST, 6)], ids=["both", "host"])
def test_no_more_units_than_slots_are_ever_resident_and_the_rest_are_nan(settings, slots, tinywan):
    cfg = toy(*settings)
    engine, _ = trained(cfg)
    weights, seen = engine.transformer.streamed, []
    matrices = [m.tensor for unit in weights._packed for m in unit.matrices]
    resident, bound = weights.resident, []

    @contextmanager
    def looking(wanted, then):
        with resident(wanted, then):
            bound.append(sum(not t.isnan().any() for t in matrices))
            seen.append(sorted(wanted))
            yield

    weights.resident = looking
    wan.predict_velocity(engine.transformer, *inputs(cfg)).mean().backward()
    assert len(weights._held) == slots
    share = 1 if settings is BOTH else 3
    assert {len(units) for units in seen} == {share}
    per_unit = [len(unit.matrices) for unit in weights._packed]
    assert bound == [sum(per_unit[unit] for unit in units) for units in seen]
    assert all(t.isnan().all() and t.untyped_storage().nbytes() <= 8 for t in matrices)


def test_matrices_of_any_type_come_back_as_they_were_and_at_aligned_places():
    unit = torch.nn.Module()
    want = {}
    generator = torch.Generator().manual_seed(0)
    for n, dtype in enumerate((torch.bfloat16, torch.float8_e4m3fn, torch.float32, torch.uint8)):
        tensor = torch.randint(0, 100, (3 + n, 5), generator=generator).to(dtype)
        want[f"t{n}"] = tensor.clone()
        unit.register_buffer(f"t{n}", tensor)
    unit.register_buffer("turned", torch.arange(6.0).view(2, 3).t())
    want["turned"] = unit.turned.clone()
    unit.register_buffer("vector", torch.ones(3))
    weights = StreamedWeights([unit], CPU)
    assert torch.equal(unit.vector, torch.ones(3))  # small ones stay
    assert unit.t0.isnan().all() and unit.t0.shape == (3, 5) and unit.t1.dtype == want["t1"].dtype
    with weights.resident([0]):
        for name, tensor in want.items():
            assert torch.equal(getattr(unit, name).float(), tensor.float()), name
            assert getattr(unit, name).storage_offset() * tensor.element_size() % 256 == 0
    assert unit.t0.isnan().all()


def test_host_memory_is_cut_from_pieces_with_no_gap(monkeypatch):
    monkeypatch.setattr("tempolora.model.offload.CHUNK", 16)
    memory = HostMemory(CPU)
    sizes = [[len(span) for span in memory.take(size)] for size in (10, 10, 40)]
    assert sizes == [[10], [6, 4], [12, 16, 12]]
    assert memory.taken == 64


def test_inputs_come_back_whole_and_their_buffers_are_used_again():
    pool = KeptInputs(CPU, (LateLane(), LateLane()))
    xs = [torch.randn(4, 7) for _ in range(5)]
    together = [xs[:1], xs[1:3], xs[3:]]
    kept = [pool.keep(*group) for group in together]
    buffers = {one._spans[0].data_ptr() for group in kept for one in group}
    for n in (2, 1, 0):
        for want, got in zip(together[n], pool.take_back(kept[n]), strict=True):
            assert torch.equal(got, want)
        ahead = [one._x is not None for group in kept[:n] for one in group]
        assert ahead == {2: [False, True, True], 1: [True], 0: []}[n]  # those of one before it
    with pytest.raises(AssertionError, match="second time"):
        pool.take_back(kept[0])
    dropped = pool.keep(xs[0])
    del dropped
    again = [pool.keep(x) for x in xs]
    assert {one._spans[0].data_ptr() for (one,) in again} == buffers
    for one, x in zip(reversed(again), reversed(xs), strict=True):
        assert torch.equal(*pool.take_back(one), x)


# --- Without a gradient ---------------------------------------------------------------------------


@pytest.mark.parametrize("variant", ["t2v_a14b", "ti2v_5b"])
def test_a_block_in_thirds_is_the_block_to_the_bit(variant, tinywan):
    from tempolora.config import ModelConfig
    from tempolora.variants import VARIANTS

    model = ModelConfig(id="tinywan", variant=variant, base="fp32")
    transformer = wan.load_transformer(model, VARIANTS[variant].experts[0], CPU)
    block, seen = transformer.blocks[1], []
    block.register_forward_pre_hook(lambda _, args: seen.append(args))
    channels = transformer.config.in_channels
    latents, sigma, text = inputs(None)
    latents = latents.repeat(1, 3, 1, 1, 1)[:, :channels]
    with torch.no_grad():
        wan.predict_velocity(
            transformer, latents, sigma, text, per_token_time=VARIANTS[variant].per_token_time
        )
        x, *rest = seen[0]
        want = type(block).forward(block, x, *rest)
        in_parts(block)
        assert torch.equal(whole(block, x, *rest), want)


def test_a_streamed_video_and_its_lora_and_text_are_the_same_to_the_bit(tinywan, tmp_path):
    from tempolora.results import sample

    videos = []
    for settings in (("train.checkpointing=full",), HOST):
        cfg = toy(*settings)
        texts = wan.encode_prompts(*wan.load_text(cfg.model, CPU), ["a red disc bobs", ""])
        transformer = wan.load_transformer(cfg.model, "low", CPU)
        file = tmp_path / "low.safetensors"
        if not videos:
            write_lora(cfg, transformer, file)

        def load_expert(name, cfg=cfg, file=file):
            expert = wan.load_transformer(cfg.model, name, CPU)
            if name == "low":
                sample.apply_lora_file(expert, file)
            return expert

        videos.append(
            sample.sample_latents(
                load_expert,
                cfg.variant,
                sample.draw_noise((1, *cfg.latent_shape), 0),
                *(wan.pad_text([text]) for text in texts),
                steps=4,
            )
        )
    assert torch.equal(*videos)


def write_lora(cfg, transformer, path) -> None:
    from tempolora.model.lora import add_lora, lora_parameters
    from tempolora.results.export import export_lora

    add_lora(transformer, cfg.lora, cfg.timebase, 0)
    state = {name: torch.full_like(p, 0.01) for name, p in lora_parameters(transformer).items()}
    config = transformer.config
    export_lora(
        state,
        path,
        lora=cfg.lora,
        rows=None,
        num_heads=config.num_attention_heads,
        head_dim=config.attention_head_dim,
        metadata={},
    )


def test_random_weights_and_single_files_are_the_same_in_host_memory(tinywan, monkeypatch):
    from tempolora.config import ModelConfig

    small = json.loads((tinywan("t2v_a14b") / "transformer" / "config.json").read_text())
    monkeypatch.setattr(wan, "architecture", lambda variant, part: small)
    for given in (
        {"init": "random"},
        {
            "id": "tinywan",
            "files": {
                "transformer": str(
                    tinywan("t2v_a14b") / "transformer" / "diffusion_pytorch_model.safetensors"
                )
            },
        },
    ):
        want, ours = (
            wan.load_transformer(ModelConfig(**given, placement=where), "high", CPU)
            for where in ("gpu", "host")
        )
        with torch.no_grad():
            a, b = (wan.predict_velocity(model, *inputs(None)) for model in (want, ours))
        assert torch.isfinite(a).all() and torch.equal(a, b)


def test_tiles_of_the_decoder_stay_near_the_whole(tinywan):
    """Tiles overlap by a quarter and are blended; what differs is what a tile's edge cannot see."""
    cfg = toy()
    vae = wan.load_vae(cfg.model, CPU)
    latents = torch.randn(1, 16, 1, 36, 24, generator=torch.Generator().manual_seed(0))
    want = wan.decode_frames(vae, latents)
    vae.enable_tiling()
    tiled = wan.decode_frames(vae, latents)
    assert not torch.equal(tiled, want)
    assert (tiled - want).abs().mean() < 0.01


# --- Refusals -------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("settings", "says"),
    [
        (("model.placement=host", "train.checkpointing=none"), '"full" or "offload"'),
        ((*HOST, "parallel.engine=fsdp"), "model.placement: host needs .* plain or ddp"),
        ((*OFFLOAD, "parallel.engine=deepspeed"), "(?s)offload needs .*offload_param"),
    ],
)
def test_what_cannot_work_is_refused(settings, says):
    with pytest.raises(ConfigError, match=says):
        toy(*settings)


def test_the_deepspeed_launcher_is_refused_and_several_processes_do_not_shard(monkeypatch):
    cfg = toy(*BOTH)
    assert choose_engine(cfg, World(0, 2, CPU)) == "ddp"
    monkeypatch.setattr("tempolora.launched.launched_by_deepspeed", lambda: True)
    with pytest.raises(ConfigError, match="deepspeed launcher"):
        check_engine(cfg, 2)


# --- Bench ----------------------------------------------------------------------------------------


@pytest.mark.soak
def test_the_bench_measures_each_row_in_a_process_of_its_own(tinywan, tmp_path, capsys):
    from tempolora.bench.memory import main

    sets = ["model.init=pretrained", "model.id=tinywan", "train.compile=false", "lora.rank=4"]
    main(
        [
            *("--config", str(ROOT / "configs/toy.json"), "--rows", "reference", "7.3"),
            *("--tasks", "copy", "step", "--steps", "2", "--json", str(tmp_path / "memory.json")),
            *(part for setting in sets for part in ("--set", setting)),
        ]
    )
    found = json.loads((tmp_path / "memory.json").read_text())
    assert found["reference"]["copy"]["in_gb_s"] > 0
    assert found["reference"]["step"]["host_gib"] == 0 < found["7.3"]["step"]["host_gib"]
    assert all(found[row]["step"]["rest_s"] > 0 for row in found)
    assert len(capsys.readouterr().out.splitlines()) == 3
