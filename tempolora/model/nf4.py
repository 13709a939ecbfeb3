"""Frozen linear layers in 4 bits: bitsandbytes' Linear4bit, as it comes.

Each 64 values of a row are kept as the nearest of 16 levels, times the largest magnitude among
them, and these magnitudes in 8 bits (Dettmers et al. 2023, QLoRA: NF4 with double quantisation).
A product over many tokens restores its whole weight in bf16 first, so this saves memory and no
time. Compiled blocks stay whole graphs: to torch, the product is one operator.

Shapes: N output channel, K input channel.
"""

import torch
from torch import Tensor, nn

BLOCK = 64  # values that share a magnitude
MAGNITUDES = 256  # magnitudes that share a scale
TABLES = 4 * (16 + 256 + 1)  # bytes of each layer: levels, magnitudes' own levels and mean
_KIND = {"quant_type": "nf4", "compress_statistics": True}


def quantised_layers(transformer: nn.Module) -> dict[str, nn.Linear]:
    """The layers that become Linear4bit, by name: those of the blocks, where 64 values divide a
    row. What lies outside sets the scale of everything else, and stays as it is."""
    return {
        name: module
        for name, module in transformer.named_modules()
        if name.startswith("blocks.")
        and isinstance(module, nn.Linear)
        and not module.in_features % BLOCK
    }


def swap_on_meta(transformer: nn.Module) -> set[str]:
    """Give a transformer without memory its 4-bit layers; the names of their weights.

    Two values to a byte, (N K / 2, 1), which `put` rounds into.
    """
    from bitsandbytes.nn import Linear4bit

    layers = quantised_layers(transformer)
    for name, linear in layers.items():
        empty = Linear4bit(
            linear.in_features,
            linear.out_features,
            linear.bias is not None,
            compute_dtype=torch.bfloat16,  # which PEFT gives adapters beside it too
            device="meta",
            **_KIND,
        )
        # On CPUs with bf16 products the first forward without a gradient would pack the weight
        # anew, for a product that has no backward.
        empty.support_avx512bf16_for_cpu = False
        packed = torch.empty(linear.weight.numel() // 2, 1, dtype=torch.uint8, device="meta")
        empty.weight = nn.Parameter(packed, requires_grad=False)
        transformer.set_submodule(name, empty)
    return {f"{name}.weight" for name in layers}


def put(layer: nn.Linear, weight_NK: Tensor) -> None:
    """Round a weight into a 4-bit layer's memory; the magnitudes get theirs beside it.

    bitsandbytes takes a kernel for it on a GPU, and several fp32 copies of the weight on a CPU.
    """
    from bitsandbytes.functional import quantize_4bit
    from bitsandbytes.nn import Params4bit

    packed, state = quantize_4bit(weight_NK, blocksize=BLOCK, **_KIND)
    place = layer.weight.data.copy_(packed)
    layer.weight = Params4bit(place, quant_state=state, bnb_quantized=True, module=layer, **_KIND)
    layer.quant_state = state


def quantised_bytes(transformer: nn.Module) -> tuple[int, int]:
    """(values that are rounded, bytes of all that is kept of them)."""
    sizes = [layer.weight.numel() for layer in quantised_layers(transformer).values()]
    return sum(sizes), sum(
        size // 2 + size // BLOCK + 4 * -(-size // (BLOCK * MAGNITUDES)) + TABLES for size in sizes
    )
