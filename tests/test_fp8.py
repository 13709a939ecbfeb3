"""8-bit layers against float64, in training, sharded, and sampled from.

Bounds follow from e4m3's 3 mantissa bits: a value moves by at most 2^-4 of itself, or by 2^-10 of
its row's scale where that is more.
"""

import copy
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn

from tempolora.config import ConfigError, ModelConfig, load_config
from tempolora.launched import check_engine
from tempolora.model import fp8, wan
from tempolora.model.location import PART_OF
from tempolora.model.lora import add_lora, lora_parameters
from tempolora.results.export import apply_lora_file, export_lora
from tempolora.train.engine import build_engine
from tempolora.train.spread import spread_of
from tempolora.train.world import World

TOY = Path(__file__).parents[1] / "configs" / "toy.json"
CPU = torch.device("cpu")


def moved(x):
    """The most that rounding may move each value of x, by its row."""
    scale = x.abs().amax(dim=-1, keepdim=True) / 448
    return torch.maximum(2**-4 * x.abs(), 2**-10 * scale)


def rows(M, K, seed):
    """Rows whose sizes differ by 10^6, one of zeros, and a few large values, as activations are."""
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(M, K, generator=generator, dtype=torch.float64)
    x[:, 3] *= 30
    x *= torch.logspace(-3, 3, M, dtype=torch.float64)[:, None]
    x[M // 2] = 0
    return x


def test_rounding_stays_within_three_mantissa_bits():
    x = rows(40, 256, 0)
    values, scale = fp8.quantise_rows(x.float())
    assert values.dtype == torch.float8_e4m3fn
    restored = values.double() * scale.double()
    assert ((restored - x).abs() <= moved(x) * (1 + 1e-5)).all()
    assert (values.double().abs().amax(dim=1) == 448).sum() == 39  # all but the row of zeros


def product_bound(a_MK, b_NK):
    """How far |a b^T| may be off when both are rounded, and summed in fp32."""
    a_off, b_off = moved(a_MK), moved(b_NK)
    bound = a_off @ b_NK.abs().T + a_MK.abs() @ b_off.T + a_off @ b_off.T
    return bound + 1e-4 * a_MK.abs() @ b_NK.abs().T


def test_output_and_gradient_are_those_of_float64_within_the_rounding():
    weight, x, grad = rows(48, 256, 1), rows(24, 256, 2), rows(24, 48, 3)
    linear = nn.Linear(256, 48)
    linear.weight.data, bias = weight.float(), linear.bias.detach().double()
    layer = fp8.Fp8Linear.of(linear, CPU)
    inputs = x.float().view(2, 12, 256).requires_grad_()
    y = layer(inputs)
    y.backward(grad.float().view(2, 12, 48))
    off = (y.detach().double().view(24, 48) - (x @ weight.T + bias)).abs()
    assert (off <= product_bound(x, weight) + 1e-6 * (1 + off)).all()

    # backward rounds the gradient times the weight's row scales, against rows of rounded values
    scale = layer.scale.double().T
    values = layer.weight.double()
    exact = grad @ weight
    rounded = moved(grad * scale) @ values.abs() + grad.abs() @ moved(weight)
    off = (inputs.grad.double().view(24, 256) - exact).abs()
    assert (off <= rounded * (1 + 1e-4) + 1e-5 * grad.abs() @ weight.abs()).all()
    assert off.max() > 0  # it was rounded at all


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("size", [1.0, 1e-13])
def test_the_gradient_is_there_when_compiled_and_however_small_it_is(dtype, size):
    """torch 2.11 drops the gradient of some functions that end in a cast to the type they have."""
    layer = fp8.Fp8Linear.of(nn.Linear(64, 48), CPU)
    x = rows(24, 64, 2).to(dtype)
    found = []
    for run in (layer, torch.compile(layer, backend="aot_eager", dynamic=False)):
        inputs = x.clone().requires_grad_()
        (run(inputs).float().square().sum() * size).backward()
        found.append(inputs.grad.double() / size)
    eager, compiled = found
    torch.testing.assert_close(compiled, eager, rtol=1e-3, atol=0)
    weight = layer.weight.double() * layer.scale.double()
    exact = 2 * layer(x).double() @ weight
    assert (eager - exact).norm() <= 0.05 * exact.norm()


def one_run(base, steps=6):
    """Losses of a TinyWan that learns one batch."""
    cfg = load_config(TOY, [f"model.base={base}", "data.num_frames=17", "train.optimizer=adamw"])
    transformer = wan.load_transformer(cfg.model, "high", CPU)
    add_lora(transformer, cfg.lora, cfg.timebase, 0)
    engine = build_engine("plain", cfg, transformer, World(0, 1, CPU))
    generator = torch.Generator().manual_seed(0)
    x, goal = torch.randn(2, 1, *cfg.latent_shape, generator=generator)
    text = torch.randn(1, 512, transformer.config.text_dim, generator=generator)
    losses = []
    for _ in range(steps):
        v_hat = wan.predict_velocity(transformer, x, torch.tensor([0.95]), text)
        loss = (v_hat - goal).square().mean()
        engine.backward(loss)
        engine.step(4e-3)
        losses.append(loss.item())
    return losses


def test_training_on_8_bits_follows_training_on_16():
    ours, theirs = one_run("fp8"), one_run("bf16")
    learned = theirs[0] - theirs[-1]
    assert learned > 0.05 * theirs[0]
    assert all(abs(a - b) < 0.05 * learned for a, b in zip(ours, theirs, strict=True))


@pytest.fixture(scope="module")
def model():
    return ModelConfig(id="tinywan", base="fp8")


def test_only_the_linear_layers_of_blocks_are_8_bit_and_the_size_is_known(model):
    transformer = wan.load_transformer(model, "high", "cpu")
    plain = wan.load_transformer(model.model_copy(update={"base": "bf16"}), "high", "cpu")
    for name, module in plain.named_modules():
        if isinstance(module, nn.Linear):
            ours = transformer.get_submodule(name)
            assert isinstance(ours, fp8.Fp8Linear) == name.startswith("blocks.")
            if name.startswith("blocks."):
                expected = fp8.quantise_rows(module.weight)[0]
                assert torch.equal(ours.weight.view(torch.uint8), expected.view(torch.uint8))
    assert not any(p.requires_grad for p in transformer.parameters())
    kept_fp32 = sum(2 * p.numel() for p in plain.parameters() if p.dtype == torch.float32)
    size = sum(p.nbytes for p in transformer.parameters())
    assert size == wan.transformer_bytes(model, "high") + kept_fp32


def test_folder_single_file_and_random_weights_round_alike(model, tinywan, tmp_path):
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
    models = (ModelConfig(init="random", base=base) for base in ("fp8", "bf16"))
    ours, plain = (wan.load_transformer(model, "high", "cpu") for model in models)
    weight, scale = fp8.quantise_rows(plain.blocks[0].ffn.net[2].weight)
    layer = ours.blocks[0].ffn.net[2]
    assert torch.equal(layer.weight.float(), weight.float()) and torch.equal(layer.scale, scale)
    assert torch.equal(ours.patch_embedding.weight, plain.patch_embedding.weight)


def test_a_lora_file_over_8_bits_gives_what_was_trained(model, tmp_path):
    cfg = load_config(TOY, ["model.base=fp8"])
    trained, fresh = (wan.load_transformer(model, "high", "cpu") for _ in range(2))
    add_lora(trained, cfg.lora, cfg.timebase, 0)
    for name, parameter in lora_parameters(trained).items():
        if "lora_B" in name:
            nn.init.normal_(parameter, std=0.05, generator=torch.Generator().manual_seed(0))
    path = tmp_path / "lora.safetensors"
    state = lora_parameters(trained)
    sizes = {"rows": None, "num_heads": 2, "head_dim": 128}
    export_lora(state, path, lora=cfg.lora, **sizes, metadata={})
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


def test_deepspeed_and_old_gpus_are_refused(monkeypatch):
    cfg = load_config(TOY, ["model.base=fp8", "parallel.engine=deepspeed"])
    with pytest.raises(ConfigError, match=r"fp8.*does not go with DeepSpeed"):
        check_engine(cfg, 2)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (8, 0))
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "A100")
    with pytest.raises(ConfigError, match=r"fp8.*8\.9 or newer, and A100 is older"):
        fp8.check_device(torch.device("cuda"))
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (8, 9))
    fp8.check_device(torch.device("cuda"))


def sharded_gradients(rank, out):
    """One process of two; each writes the averaged LoRA gradients."""
    torch.distributed.init_process_group("gloo")
    save_file(gradients("fsdp", World(rank, 2, CPU)), f"{out}.{rank}")
    torch.distributed.destroy_process_group()


def gradients(kind, world):
    cfg = load_config(TOY, ["model.base=fp8", "train.checkpointing=full", "data.num_frames=17"])
    transformer = wan.load_transformer(cfg.model, "high", CPU, spread_of(kind, cfg, world))
    add_lora(transformer, cfg.lora, cfg.timebase, 0)
    engine = build_engine(kind, cfg, transformer, world)
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(1, *cfg.latent_shape, generator=generator)
    text = torch.randn(1, 512, transformer.config.text_dim, generator=generator)
    v_hat = wan.predict_velocity(transformer, x, torch.tensor([0.5]), text)
    engine.backward(v_hat.square().mean())
    return {name: copy.deepcopy(p.grad) for name, p in lora_parameters(transformer).items()}


@pytest.mark.slow
def test_sharded_8_bit_weights_give_the_same_gradients(model, ranks, tmp_path):
    wan.load_transformer(model, "high", CPU)  # TinyWan is in the cache
    ranks.call("test_fp8:sharded_gradients", 2, [tmp_path / "out"], tmp_path / "log")
    whole = gradients("plain", World(0, 1, CPU))
    for rank in range(2):
        ours = load_file(f"{tmp_path / 'out'}.{rank}")
        assert all(torch.equal(ours[name], whole[name]) for name in whole)
