"""4-bit layers against NF4 as it was published, in training, and where they do not go.

The reference unpacks what bitsandbytes keeps, in float64 and by the table of Dettmers et al. 2023
(QLoRA, appendix E).
"""

import functools
import json
from pathlib import Path

import pytest
import torch
from conftest import SMALL, overrides
from safetensors.torch import load_file, save_file
from torch import nn
from torch._dynamo.utils import counters
from torch.utils.checkpoint import CheckpointPolicy

from tempolora import cli
from tempolora.config import ConfigError, ModelConfig, load_config
from tempolora.launched import check_engine
from tempolora.model import nf4, wan
from tempolora.model.location import PART_OF
from tempolora.model.lora import add_lora, lora_parameters
from tempolora.results.export import apply_lora_file, export_lora
from tempolora.train import auto, blocks, engine
from tempolora.train.engine import build_engine, choose_engine
from tempolora.train.plan import Card, Settings, candidates, card_of, next_setting, predict
from tempolora.train.plan_text import Report
from tempolora.train.rates import GIB
from tempolora.train.work import work_of
from tempolora.train.world import World

ROOT = Path(__file__).parents[1]
TOY, A14B = ROOT / "configs" / "toy.json", ROOT / "configs" / "a14b.json"
CPU = torch.device("cpu")
NF4 = "model.base=nf4"
TABLE = torch.tensor(
    [
        -1.0,
        -0.6961928009986877,
        -0.5250730514526367,
        -0.39491748809814453,
        -0.28444138169288635,
        -0.18477343022823334,
        -0.09105003625154495,
        0.0,
        0.07958029955625534,
        0.16093020141124725,
        0.24611230194568634,
        0.33791524171829224,
        0.44070982933044434,
        0.5626170039176941,
        0.7229568362236023,
        1.0,
    ],
    dtype=torch.float64,
)


class Block(nn.Module):
    def __init__(self):
        super().__init__()
        self.blocks = nn.ModuleList([nn.Linear(256, 192)])


def layer_of(weight_NK, bias_N):
    """A 4-bit layer as the loader makes them."""
    with torch.device("meta"):
        module = Block()
    assert nf4.swap_on_meta(module) == {"blocks.0.weight"}
    layer = module.blocks[0]
    layer.weight = nn.Parameter(torch.empty(layer.weight.shape, dtype=torch.uint8), False)
    layer.bias = nn.Parameter(bias_N, False)
    nf4.put(layer, weight_NK)
    return module.eval().blocks[0]


def levels_of(layer):
    """Which of the 16 each value is, (N, K): two to a byte, the first in the upper half."""
    packed = layer.weight.detach().view(-1)
    return torch.stack([packed >> 4, packed & 15], dim=1).view(layer.out_features, -1).long()


def magnitudes_of(layer):
    """What is kept of the largest magnitudes: float64, one for each 64 values."""
    state = layer.weight.quant_state
    codes = state.state2.code.double()[state.absmax.long()]
    scales = state.state2.absmax.double().repeat_interleave(nf4.MAGNITUDES)[: len(codes)]
    return codes * scales + state.offset.double()


@pytest.fixture
def drawn():
    """(layer, its weight before) with rows whose sizes differ by 100."""
    generator = torch.Generator().manual_seed(0)
    weight = torch.randn(192, 256, generator=generator)
    weight *= torch.logspace(-1, 1, 192)[:, None]
    weight = weight.bfloat16()
    bias = torch.randn(192, generator=generator).bfloat16()
    return layer_of(weight, bias), weight.double()


def test_values_are_the_nearest_levels_times_magnitudes_in_8_bits(drawn):
    layer, weight = drawn
    groups = weight.view(-1, nf4.BLOCK)
    largest = groups.abs().amax(dim=1)
    distance = (groups / largest[:, None] - TABLE[levels_of(layer)].view_as(groups)).abs()
    nearest = (groups[..., None] / largest[:, None, None] - TABLE).abs().amin(dim=-1)
    assert (distance <= nearest + 1e-6).all()  # ties may fall either way
    # 8 bits, of which the highest decade has 64 levels of a sign: steps of 0.9 / 64 of the
    # greatest distance from the mean among 256
    far = (largest - largest.mean()).abs()
    step = torch.stack([part.amax() for part in far.split(nf4.MAGNITUDES)]) * 0.9 / 64
    off = (magnitudes_of(layer) - largest).abs()
    assert (off <= 0.51 * step.repeat_interleave(nf4.MAGNITUDES)[: len(off)] + 1e-6).all()
    assert off.max() > 0


def test_output_and_gradient_are_those_of_float64(drawn):
    """The weight is restored in bf16, and so is what comes out: each moves by 2^-9 of itself."""
    layer, _ = drawn
    weight = TABLE[levels_of(layer)] * magnitudes_of(layer).view(192, -1).repeat_interleave(64, 1)
    generator = torch.Generator().manual_seed(1)
    x = torch.randn(2, 12, 256, generator=generator).bfloat16().requires_grad_()
    grad = torch.randn(2, 12, 192, generator=generator).bfloat16()
    y = layer(x)
    y.backward(grad)
    for ours, a, b, c in (
        (y, x.double(), weight.T, layer.bias.double()),
        (x.grad, grad.double(), weight, torch.zeros(256)),
    ):
        exact = a @ b + c
        bound = 2**-9 * (a.abs() @ b.abs() + exact.abs()) + 1e-4 * a.abs() @ b.abs()
        off = (ours.double() - exact).abs()
        assert ours.dtype == torch.bfloat16 and (off <= bound).all()
        assert off.max() > 0  # it was rounded at all


def test_a_pass_without_gradient_leaves_the_weight_for_a_backward(drawn, monkeypatch):
    """bitsandbytes packs weights anew on CPUs that multiply bf16, for a product of no backward."""
    import bitsandbytes.nn.modules as theirs

    monkeypatch.setattr(theirs, "has_avx512bf16", lambda: True)
    before, _ = drawn
    layer = layer_of(drawn[1].bfloat16(), before.bias.detach())
    kept = layer.weight.detach().clone()
    x = torch.randn(1, 3, 256, generator=torch.Generator().manual_seed(0)).bfloat16()
    with torch.no_grad():
        first = layer(x)
    assert torch.equal(layer.weight, kept)
    second = layer(x.requires_grad_())
    second.sum().backward()
    assert torch.equal(first, second) and x.grad.any()


# --- Loading --------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def model():
    return ModelConfig(id="tinywan", base="nf4")


def bytes_kept(transformer):
    """Of weights, and of what stands beside them."""
    size = sum(p.nbytes for p in transformer.parameters())
    for module in transformer.modules():
        state = getattr(module, "quant_state", None)
        if state is not None:
            kept = (state.absmax, state.code, state.offset, state.state2.absmax, state.state2.code)
            size += sum(tensor.nbytes for tensor in kept)
    return size


def test_only_the_linear_layers_of_blocks_are_4_bit_and_the_size_is_known(model):
    from bitsandbytes.nn import Linear4bit

    transformer = wan.load_transformer(model, "high", "cpu")
    plain = wan.load_transformer(model.model_copy(update={"base": "bf16"}), "high", "cpu")
    for name, module in plain.named_modules():
        if isinstance(module, nn.Linear):
            ours = transformer.get_submodule(name)
            assert isinstance(ours, Linear4bit) == name.startswith("blocks.")
            if name.startswith("blocks."):
                assert torch.equal(ours.bias, module.bias)
                expected = layer_like(ours, module.weight)
                assert torch.equal(levels_of(ours), levels_of(expected))
                assert torch.equal(magnitudes_of(ours), magnitudes_of(expected))
    assert not any(p.requires_grad for p in transformer.parameters())
    kept_fp32 = sum(2 * p.numel() for p in plain.parameters() if p.dtype == torch.float32)
    assert bytes_kept(transformer) == wan.transformer_bytes(model, "high") + kept_fp32
    tables = len(nf4.quantised_layers(plain)) * nf4.TABLES
    work = work_of(load_config(TOY, [NF4]), "high")
    assert bytes_kept(transformer) - tables == pytest.approx(work.weights("nf4"), rel=1e-4)


def layer_like(layer, weight_NK):
    """Its like of another weight."""
    with torch.device("meta"):
        module = Block()
        module.blocks[0] = nn.Linear(layer.in_features, layer.out_features)
    nf4.swap_on_meta(module)
    made = module.blocks[0]
    made.weight = nn.Parameter(torch.empty_like(layer.weight.data), False)
    nf4.put(made, weight_NK)
    return made


def test_folder_and_single_file_round_alike(model, tinywan, tmp_path):
    folder = tinywan("t2v_a14b") / PART_OF["high"]
    save_file(load_file(next(folder.glob("*.safetensors"))), tmp_path / "one.safetensors")
    ours = wan.load_transformer(model, "high", "cpu").state_dict()
    files = {"files": {"transformer": str(tmp_path / "one.safetensors")}}
    single = wan.load_transformer(
        ModelConfig.model_validate(model.model_dump() | files), "high", "cpu"
    ).state_dict()
    assert ours.keys() == single.keys()
    assert all(torch.equal(ours[n].view(torch.uint8), single[n].view(torch.uint8)) for n in ours)


def test_random_weights_are_those_of_bf16_rounded(monkeypatch):
    from tempolora.model import architectures

    small = {**architectures.TRANSFORMER["t2v_a14b"], "num_layers": 1, "num_attention_heads": 1}
    monkeypatch.setitem(architectures.TRANSFORMER, "t2v_a14b", {**small, "ffn_dim": 256})
    models = (ModelConfig(init="random", base=base) for base in ("nf4", "bf16"))
    ours, plain = (wan.load_transformer(model, "high", "cpu") for model in models)
    layer = ours.blocks[0].ffn.net[2]
    expected = layer_like(layer, plain.blocks[0].ffn.net[2].weight)
    assert torch.equal(levels_of(layer), levels_of(expected))
    assert torch.equal(ours.patch_embedding.weight, plain.patch_embedding.weight)


# --- Training -------------------------------------------------------------------------------------


def one_step(*sets):
    """Loss and LoRA gradients of one forward and backward."""
    cfg = load_config(TOY, ["data.num_frames=17", "train.optimizer=adamw", *sets])
    transformer = wan.load_transformer(cfg.model, "high", CPU)
    add_lora(transformer, cfg.lora, cfg.timebase, 0)
    generator = torch.Generator().manual_seed(0)
    for name, parameter in lora_parameters(transformer).items():
        if "lora_B" in name:  # so that gradients reach A as well
            parameter.data.normal_(0, 0.02, generator=generator)
    built = build_engine("plain", cfg, transformer, World(0, 1, CPU))
    latents = torch.randn(1, *cfg.latent_shape, generator=generator)
    text = torch.randn(1, 512, transformer.config.text_dim, generator=generator)
    loss = wan.predict_velocity(transformer, latents, torch.tensor([0.5]), text).square().mean()
    built.backward(loss)
    return loss.item(), {name: p.grad for name, p in lora_parameters(transformer).items()}


def error(ours, theirs):
    """Relative difference of all gradients together."""
    ours, theirs = (torch.cat([g[n].flatten() for n in theirs]) for g in (ours, theirs))
    return ((ours - theirs).norm() / theirs.norm()).item()


def test_no_checkpointing_changes_a_gradient_and_bf16s_is_near():
    loss, kept = one_step(NF4, "train.checkpointing=none")
    for level in ("selective", "full", "offload"):
        again, ours = one_step(NF4, f"train.checkpointing={level}")
        assert again == loss
        assert all(torch.equal(ours[name], kept[name]) for name in kept)
    plain_loss, plain = one_step("train.checkpointing=none")
    assert 0 < abs(loss - plain_loss) < 0.05 * plain_loss
    assert 0.01 < error(kept, plain) < 0.5


@pytest.mark.slow
def test_compiled_blocks_are_whole_graphs_of_the_same_gradients(monkeypatch):
    """Dynamo and the partitioner without inductor. What is compiled is rounded to bf16 less often:
    gradients of a bf16 base move by 0.5 % of themselves."""
    compiler = functools.partial(torch.compile, backend="aot_eager_decomp_partition")
    monkeypatch.setattr(blocks.torch, "compile", compiler)
    torch._dynamo.reset()
    counters.clear()
    sets = (NF4, "train.checkpointing=full")
    loss, eager = one_step(*sets)
    again, compiled = one_step(*sets, "train.compile=true")
    assert counters["stats"]["unique_graphs"] == 2  # the first block's input has no gradient
    assert not counters["graph_break"]
    torch._dynamo.reset()
    assert again == pytest.approx(loss, rel=1e-3)
    assert error(compiled, eager) < 0.02


def test_their_products_are_kept_as_others_are():
    import bitsandbytes  # noqa: F401 the operator is there from now on

    keep, again = CheckpointPolicy.MUST_SAVE, CheckpointPolicy.PREFER_RECOMPUTE
    product, rank = torch.empty(600, 256), torch.empty(600, 16)
    ours, plain = torch.ops.bitsandbytes.gemm_4bit.default, torch.ops.aten.mm.default
    policy = blocks._policy(worth=blocks.WORTH_KEEPING)
    for op in (ours, plain):
        assert policy(None, op, product, product.T) == keep
        assert policy(None, op, rank, rank.T) == again


def losses_of(base, steps=6):
    """Losses of a TinyWan that learns one batch."""
    cfg = load_config(TOY, [f"model.base={base}", "data.num_frames=17", "train.optimizer=adamw"])
    transformer = wan.load_transformer(cfg.model, "high", CPU)
    add_lora(transformer, cfg.lora, cfg.timebase, 0)
    built = build_engine("plain", cfg, transformer, World(0, 1, CPU))
    generator = torch.Generator().manual_seed(0)
    x, goal = torch.randn(2, 1, *cfg.latent_shape, generator=generator)
    text = torch.randn(1, 512, transformer.config.text_dim, generator=generator)
    losses = []
    for _ in range(steps):
        v_hat = wan.predict_velocity(transformer, x, torch.tensor([0.95]), text)
        loss = (v_hat - goal).square().mean()
        built.backward(loss)
        built.step(4e-3)
        losses.append(loss.item())
    return losses


def test_a_batch_is_learned_as_with_16_bits():
    ours, theirs = losses_of("nf4"), losses_of("bf16")
    learned = theirs[0] - theirs[-1]
    assert learned > 0.05 * theirs[0]
    assert all(abs(a - b) < 0.05 * learned for a, b in zip(ours, theirs, strict=True))


def run_of(toy_shards, out, base, sample_steps):
    """`tempolora train`: four steps of the low-noise expert; the lines of its metrics."""
    sets = (*SMALL, "model.expert=low", f"model.base={base}", f"output.sample_steps={sample_steps}")
    paths = (f"data.shards={toy_shards}", f"output.dir={out}")
    command = ["--config", str(TOY), *overrides(*sets, *paths)]
    assert cli.main(["train", *command]) == 0
    lines = (out / "metrics.jsonl").read_text().splitlines()
    return command, [line for line in map(json.loads, lines) if line["step"]]


def test_training_on_4_bits_goes_the_whole_road_with_a_loss_near_that_of_16(
    toy_shards, tmp_path, capsys
):
    command, ours = run_of(toy_shards, tmp_path / "nf4", "nf4", 1)
    _, theirs = run_of(toy_shards, tmp_path / "bf16", "bf16", 0)
    assert len(ours) == len(theirs) == 4
    for a, b in zip(ours, theirs, strict=True):
        assert a["flow"] == pytest.approx(b["flow"], rel=0.3)  # TinyWan loses 14 to 23 %
        assert a["flow"] != b["flow"]
    assert (tmp_path / "nf4" / "sample_after_lora.mp4").stat().st_size

    loras = ["--lora", str(tmp_path / "nf4"), "--steps", "1", "--out", str(tmp_path / "v.mp4")]
    assert cli.main(["sample", *command, "--prompt", "a red square", *loras]) == 0
    steps = tmp_path / "nf4" / "checkpoints" / "low" / "step-000004"
    assert cli.main(["export", "--checkpoint", str(steps), "--out", str(tmp_path / "e")]) == 0
    assert (tmp_path / "e" / "wan22_temporal_lora_low_noise.safetensors").is_file()

    capsys.readouterr()
    assert cli.main(["train", *command, *overrides("model.base=bf16")]) == 2
    assert "model.base: the checkpoint" in capsys.readouterr().err


def test_a_lora_file_over_4_bits_gives_what_was_trained(model, tmp_path):
    cfg = load_config(TOY, [NF4])
    trained, fresh = (wan.load_transformer(model, "high", "cpu") for _ in range(2))
    add_lora(trained, cfg.lora, cfg.timebase, 0)
    for name, parameter in lora_parameters(trained).items():
        if "lora_B" in name:
            nn.init.normal_(parameter, std=0.05, generator=torch.Generator().manual_seed(0))
    path = tmp_path / "lora.safetensors"
    sizes = {"rows": None, "num_heads": 2, "head_dim": 128}
    export_lora(lora_parameters(trained), path, lora=cfg.lora, **sizes, metadata={})
    generator = torch.Generator().manual_seed(1)
    x = torch.randn(1, *cfg.latent_shape, generator=generator)
    text = torch.randn(1, 512, trained.config.text_dim, generator=generator)

    @torch.no_grad()
    def run(transformer):
        return wan.predict_velocity(transformer, x, torch.tensor([0.5]), text)

    base = run(fresh)
    apply_lora_file(fresh, path)
    ours, loaded = run(trained), run(fresh)
    assert (loaded - ours).norm() <= 0.05 * (ours - base).norm()  # bf16 adapters beside fp32 ones
    assert all(p.dtype == torch.bfloat16 for n, p in fresh.named_parameters() if "lora_" in n)


# --- Where it goes --------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("setting", "says"),
    [
        ("model.placement=host", r"base: \"nf4\" weights are not streamed from host memory; set"),
        ("parallel.engine=fsdp", r"base: \"nf4\" .* \"fsdp\" shards them; leave that at \"auto\""),
        ("parallel.engine=deepspeed", r"base: \"nf4\" .* \"deepspeed\" shards them; leave that"),
    ],
)
def test_what_it_does_not_go_with_is_refused_when_the_settings_are_read(setting, says):
    with pytest.raises(ConfigError, match=says):
        load_config(TOY, [NF4, setting])


def test_the_deepspeed_launcher_is_refused(monkeypatch):
    for name in ("CROSS_RANK", "LOCAL_SIZE"):
        monkeypatch.setenv(name, "1")
    with pytest.raises(ConfigError, match=r'base: "nf4" .* DeepSpeed shards them; start with'):
        check_engine(load_config(TOY, [NF4]), 2)


def test_several_processes_each_hold_all_of_it_even_where_that_does_not_fit(monkeypatch):
    monkeypatch.setattr(engine, "card_here", lambda world: card_of(4 * GIB, gpus=2))
    assert choose_engine(load_config(A14B, []), World(0, 2, CPU)) == "fsdp"
    assert choose_engine(load_config(A14B, [NF4]), World(0, 2, CPU)) == "ddp"


ALL_AUTO = ("model.placement=auto", "train.checkpointing=auto")


@pytest.mark.parametrize("gpus", [1, 2])
def test_auto_keeps_it_on_the_gpu_and_never_takes_it_by_itself(gpus):
    for memory in (8, 24, 139):
        card = card_of(memory * GIB, gpus=gpus)
        found = [plan.settings for plan in candidates(load_config(A14B, [NF4, *ALL_AUTO]), card)]
        assert {s.checkpointing for s in found} == {"none", "selective", "full", "offload"}
        assert {(s.placement, s.engine) for s in found} == {("gpu", "ddp" if gpus > 1 else "plain")}
        free = load_config(A14B, ["model.base=auto", *ALL_AUTO])
        assert not any(plan.settings.base == "nf4" for plan in candidates(free, card))


def test_the_plan_counts_half_a_byte_a_value_and_says_what_was_not_measured():
    cfg = load_config(A14B, [NF4, *ALL_AUTO])
    full, bf16 = (predict(cfg, Settings("plain", base, "gpu", "full")) for base in ("nf4", "bf16"))
    matrices = 40 * (8 * 5120**2 + 2 * 5120 * 13824)
    saved = (2 - 1 / 2 - 1 / 64 - 4 / 64 / 256) * matrices
    restored = 2 * 5120 * 13824  # the widest, in bf16, while its product is under way
    assert bf16.peak - full.peak == pytest.approx(saved - restored)
    assert full.seconds == bf16.seconds
    memory = 24 * GIB
    assert "not measured" in Report(cfg, card_of(memory), memory, named=True).rates
    assert (
        "not measured"
        not in Report(load_config(A14B, ALL_AUTO), card_of(memory), memory, named=True).rates
    )


def test_where_it_does_not_fit_the_advice_is_a_base_that_can_be_streamed():
    cfg = load_config(A14B, [NF4, "model.placement=gpu"])
    keys, plan = next_setting(cfg, card_of(10 * GIB))
    assert keys["model.base"] == "bf16" and keys["model.placement"] == "host"
    assert plan.peak <= card_of(10 * GIB).room


def test_precompute_may_stream_a_text_encoder_that_sampling_keeps_on_the_gpu(monkeypatch):
    monkeypatch.setattr(auto, "card_here", lambda world: Card(9 * GIB))
    cfg = load_config(A14B, [NF4, *ALL_AUTO])
    gpu = torch.device("cuda")
    made = auto.resolve_beside(cfg, gpu, "precompute").model
    assert (made.base, made.placement) == ("bf16", "host")
    sampled = auto.resolve_beside(cfg, gpu, "sampling").model
    assert (sampled.base, sampled.placement) == ("nf4", "gpu")
