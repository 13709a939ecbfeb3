"""A LoRA that can be limited to the time rows of attention, as PEFT layers inside the model.

Wan has no temporal layers; what it knows of time are the first channels of each attention head,
which RoPE turns from latent frame to latent frame. The `temporal` target keeps B to those rows of
self-attention's q and k and stores no others. `add_lora` puts the adapters in, training works on
`lora_parameters`, and `standard_lora` widens the result for files that any tool can load
(results/export.py).

Shapes: L token, D width, R rank, head_dim = 128 in every published Wan.
"""

import functools
import hashlib
import math
import re
from collections.abc import Iterator
from contextlib import contextmanager

import peft
import torch
from peft.tuners import lora as peft_lora
from torch import Tensor, nn
from torch.nn import functional as F

from tempolora.config import LoraConfig
from tempolora.model.targets import adapter_rows, scaling, target_modules
from tempolora.timebase import TimeBase

ADAPTER = "default"  # PEFT's own default name: its state-dict functions then need no argument
_WRAPPERS = re.compile(r"(_checkpoint_wrapped_module|_orig_mod|_fsdp_wrapped_module)\.")


class AdapterLinear(nn.Linear):
    """A bias-free linear layer that computes in its input's dtype.

    The weight stays fp32 for the optimizer; casting it is cheaper than casting the activations up,
    which is what PEFT does. Under autocast the autocast dtype rules as everywhere. It is a module
    of its own because ZeRO-3 gathers partitioned weights when a module is called.
    """

    def __init__(self, weight: Tensor) -> None:
        out_features, in_features = weight.shape
        super().__init__(in_features, out_features, bias=False, device="meta")
        self.weight = nn.Parameter(weight)

    def forward(self, x: Tensor) -> Tensor:
        return F.linear(x, self.weight.to(x.dtype))


class RowLora(peft_lora.Linear):
    """PEFT's LoRA layer, where an adapter's B may be limited to the first rows of each head.

    Such a B is stored as (heads * rows, R) and told by its shape; adapters of full width may be
    loaded beside it. The output has the dtype of the base layer's output.
    """

    def __init__(self, base_layer, adapter_name, *, num_heads, **kwargs) -> None:
        super().__init__(base_layer, adapter_name, **kwargs)
        self.num_heads = num_heads

    def get_delta_weight(self, adapter):
        delta = super().get_delta_weight(adapter)
        if len(delta) == self.out_features:
            return delta
        return _widen(delta, self.num_heads, self.out_features // self.num_heads)

    def forward(self, x, *args, **kwargs):
        if self.disable_adapters or self.merged:
            return super().forward(x, *args, **kwargs)
        result = self.base_layer(x, *args, **kwargs)
        for name in self.active_adapters:
            if name in self.lora_A:
                # scaled where it is R wide, not D wide
                low = self.lora_A[name](x)
                scale = self.scaling[name]
                if isinstance(scale, Tensor):  # of each sample
                    scale = scale.to(low.dtype)
                delta = self.lora_B[name](low * scale)
                result = self._add(result, delta.to(result.dtype))
        return result

    def _add(self, result, delta):
        if delta.shape[-1] == self.out_features:
            return result + delta
        # The sum is written into the padded delta, our own tensor: one buffer, and a backward
        # that hands the gradient on uncopied. Writing into a slice of `result` would have autograd
        # copy its gradient, and is an error where a full backward hook watches the base layer.
        result = result.unflatten(-1, (self.num_heads, -1))
        delta = delta.unflatten(-1, (self.num_heads, -1))
        total = F.pad(delta, (0, result.shape[-1] - delta.shape[-1]))
        total += result
        return total.flatten(-2)


def add_lora(transformer: nn.Module, lora: LoraConfig, timebase: TimeBase, seed: int) -> None:
    """Put trainable adapters into a diffusers Wan transformer, before it is wrapped or compiled.

    Afterwards only the adapters, in fp32 on the device of their layer, require a gradient. A is
    Kaiming-uniform as in PEFT, B is zero. A depends on (seed, module name) alone, whatever the
    rank, device or order of construction.

    Raises ConfigError where `lora` does not fit the model.
    """
    assert ADAPTER not in getattr(transformer, "peft_config", {}), "add_lora called twice"
    config = transformer.config
    names = target_modules(lora, config.num_layers)
    rows = adapter_rows(lora, timebase, config.attention_head_dim)
    peft_config = peft.LoraConfig(
        r=lora.rank,
        lora_alpha=lora.rank if lora.alpha is None else lora.alpha,
        target_modules=names,
    )
    layer = functools.partial(RowLora, num_heads=config.num_attention_heads)
    peft_config._register_custom_module({nn.Linear: layer})
    peft.inject_adapter_in_model(peft_config, transformer, adapter_name=ADAPTER)
    layers = _layers(transformer)
    assert set(layers) == set(names), "PEFT adapted other layers than it was asked to"
    for name, layer in layers.items():
        width = layer.out_features if rows is None else config.num_attention_heads * rows
        device = layer.lora_A[ADAPTER].weight.device
        a_RD = _kaiming_uniform(lora.rank, layer.in_features, f"{seed}/{name}")
        b_DR = torch.zeros(width, lora.rank)
        layer.lora_A[ADAPTER] = AdapterLinear(a_RD.to(device))
        layer.lora_B[ADAPTER] = AdapterLinear(b_DR.to(device))


def lora_parameters(transformer: nn.Module) -> dict[str, nn.Parameter]:
    """The adapters' weights, in block order, under the names PEFT saves them by:
    `blocks.0.attn1.to_q.lora_A.weight`, whatever wrappers the model has since been put in."""
    found = {
        _clean(name).replace(f".{ADAPTER}.", "."): parameter
        for name, parameter in transformer.named_parameters()
        if ".lora_" in name and f".{ADAPTER}." in name
    }
    return dict(sorted(found.items(), key=lambda item: _natural(item[0])))


@torch.no_grad()
def load_lora_state(transformer: nn.Module, state: dict[str, Tensor]) -> None:
    """Copy weights, named and shaped as in `lora_parameters`, into an unsharded model's adapters.

    Raises ValueError, naming the keys, if any is missing, unexpected or of another shape; then
    nothing has been copied.
    """
    parameters = lora_parameters(transformer)
    problems = [f"missing {name}" for name in parameters if name not in state]
    problems += [f"unexpected {name}" for name in state if name not in parameters]
    problems += [
        f"{name} has shape {tuple(state[name].shape)}, not {tuple(parameter.shape)}"
        for name, parameter in parameters.items()
        if name in state and state[name].shape != parameter.shape
    ]
    if problems:
        more = f" and {len(problems) - 4} more" if len(problems) > 4 else ""
        raise ValueError(f"LoRA weights do not fit the model: {'; '.join(problems[:4])}{more}")
    for name, parameter in parameters.items():
        parameter.copy_(state[name])


def set_lora_scale(transformer: nn.Module, scale: float | Tensor) -> None:
    """Set the adapters' strength relative to alpha / rank: 1 as trained, 0 the base exactly.

    A tensor (B,) gives each sample of the batches that follow its own.
    """
    if isinstance(scale, Tensor):
        scale = scale.view(-1, 1, 1)
    for layer in _layers(transformer).values():
        layer.set_scale(ADAPTER, scale)


@contextmanager
def without_lora(transformer: nn.Module) -> Iterator[None]:
    """The base itself, within the block: strength 0, and then whatever it was."""
    layers = list(_layers(transformer).values())
    before = [layer.scaling[ADAPTER] for layer in layers]
    set_lora_scale(transformer, 0.0)
    try:
        yield
    finally:
        for layer, scale in zip(layers, before, strict=True):
            layer.scaling[ADAPTER] = scale


def standard_lora(
    state: dict[str, Tensor],
    lora: LoraConfig,
    *,
    num_heads: int,
    head_dim: int,
    rows: int | None,
) -> dict[str, Tensor]:
    """The same adapters as a standard LoRA of scale 1: B at full width, alpha / rank folded in.

    `state` is named as in `lora_parameters`; keys, dtypes and devices are kept. `rows` is what
    `adapter_rows` gave in training. Raises ValueError where B does not have num_heads * rows rows.
    """
    out = {}
    for name, weight in state.items():
        if not name.endswith(".lora_B.weight"):
            out[name] = weight
            continue
        weight = weight * scaling(lora)
        if rows is not None:
            if weight.shape[0] != num_heads * rows:
                raise ValueError(
                    f"{name} has {weight.shape[0]} rows, not {num_heads} heads * {rows}"
                )
            weight = _widen(weight, num_heads, head_dim)
        out[name] = weight
    return out


def _widen(weight: Tensor, num_heads: int, head_dim: int) -> Tensor:
    """(heads * rows, N) -> (heads * head_dim, N), zero outside the first rows of each head."""
    weight = weight.unflatten(0, (num_heads, -1))
    return F.pad(weight, (0, 0, 0, head_dim - weight.shape[1])).flatten(0, 1)


def _kaiming_uniform(rank: int, width: int, key: str) -> Tensor:
    """PEFT's initial A (R, D), drawn from a generator seeded with `key`."""
    digest = hashlib.sha256(key.encode()).digest()
    generator = torch.Generator().manual_seed(int.from_bytes(digest[:8], "big") >> 1)
    return nn.init.kaiming_uniform_(torch.empty(rank, width), a=math.sqrt(5), generator=generator)


def _layers(transformer: nn.Module) -> dict[str, RowLora]:
    return {
        _clean(name): module
        for name, module in transformer.named_modules()
        if isinstance(module, RowLora)
    }


def _clean(name: str) -> str:
    return _WRAPPERS.sub("", name)


def _natural(name: str) -> list[tuple[int, str]]:
    """Sorts block 2 before block 10."""
    return [(int(part), "") if part.isdigit() else (-1, part) for part in name.split(".")]
