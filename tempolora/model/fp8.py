"""Frozen linear layers in 8 bits: e4m3 weights, activations and gradients, one scale per row.

A frozen layer needs no gradient of its weight, so a forward and a backward to the input are all
there is, and both are products of 8-bit numbers, at twice the rate of bf16 on a GPU of compute
capability 8.9 or newer. Everything around the products is plain PyTorch, so that torch.compile
fuses the rounding into whatever makes the input; inputs shared by several layers are rounded once.
Elsewhere the same rounding is followed by a product in fp32.

Gradients are e4m3 too, not e5m2: a scale per row takes up the differences between tokens that
e5m2 has its range for, and its two mantissa bits round twice as coarsely as three.

Shapes: M token, N output channel, K input channel.
"""

import torch
from torch import Tensor, nn

from tempolora.config import ConfigError

E4M3 = torch.float8_e4m3fn
E4M3_MAX = 448.0
CAPABILITY = (8, 9)  # the first GPUs with 8-bit matrix units
MULTIPLE = 16  # their products take dimensions in 16s
# A scale for rows of zeros. Gradients of a large model are tiny, 1e-13 and less, and no row of them
# may be rounded to zero for that.
_SMALLEST = torch.finfo(torch.float32).tiny


def quantise_rows(x_MK: Tensor) -> tuple[Tensor, Tensor]:
    """x as (e4m3 (M, K), fp32 scale (M, 1)): their product is x to 3 mantissa bits of e4m3.

    The scale takes each row's largest magnitude to e4m3's, 448. The error is at most 2^-4 of a
    value, or 2^-10 of the scale where that is more; below 2^-19 of the largest it is zero.
    """
    x = x_MK.float()
    scale_M1 = (x.abs().amax(dim=-1, keepdim=True) / E4M3_MAX).clamp(min=_SMALLEST)
    # The cast to e4m3 does not saturate, and x / scale may exceed 448 by a rounding.
    return (x / scale_M1).clamp(-E4M3_MAX, E4M3_MAX).to(E4M3), scale_M1


class Fp8Linear(nn.Linear):
    """A frozen linear layer of e4m3 weights; bf16 activations in, the same out.

    weight: e4m3 (N, K); scale: fp32 (N, 1), of each row; bias as in the layer it was made from.
    One copy of the weight serves both directions: its row scales belong to the channels that the
    backward sums over, so they go into the gradient before that is rounded.
    """

    compute_dtype = torch.bfloat16  # by this name PEFT asks what dtype adapters beside it get

    def __init__(self, in_features: int, out_features: int, bias: bool = True) -> None:
        super().__init__(in_features, out_features, bias, device="meta")
        self.weight = _frozen(torch.empty(out_features, in_features, dtype=E4M3, device="meta"))
        self.scale = _frozen(torch.empty(out_features, 1, device="meta"))

    @classmethod
    def of(cls, linear: nn.Linear, device: torch.device) -> "Fp8Linear":
        """A layer's weights, rounded on `device`."""
        module = cls(linear.in_features, linear.out_features, linear.bias is not None)
        weight, scale = quantise_rows(linear.weight.detach().to(device))
        module.weight, module.scale = _frozen(weight), _frozen(scale)
        if linear.bias is not None:
            module.bias = _frozen(linear.bias.detach().to(device))
        return module

    def forward(self, x: Tensor) -> Tensor:
        y = _Fp8Product.apply(x.flatten(0, -2), self.weight, self.scale)
        y = y.unflatten(0, x.shape[:-1])
        # Not within the product: compiled, the addition costs nothing in what reads y.
        return y if self.bias is None else y + self.bias.to(y.dtype)


class _Fp8Product(torch.autograd.Function):
    """x W^T of an e4m3 W, with a gradient for x alone."""

    @staticmethod
    def forward(ctx, x_MK: Tensor, weight_NK: Tensor, scale_N1: Tensor) -> Tensor:
        ctx.save_for_backward(weight_NK, scale_N1)
        x8_MK, scale_M1 = quantise_rows(x_MK)
        return _product(x8_MK, scale_M1, weight_NK, scale_N1.view(1, -1), x_MK.dtype)

    @staticmethod
    def backward(ctx, grad_MN: Tensor) -> tuple[Tensor, None, None]:
        weight_NK, scale_N1 = ctx.saved_tensors
        grad8_MN, scale_M1 = quantise_rows(grad_MN.float() * scale_N1.view(1, -1))
        # Matrix units want the summed dimension last in memory: a transposed copy, 1 byte a weight,
        # which lives as long as the product.
        weight_KN = weight_NK.t().contiguous()
        ones = torch.ones(1, weight_KN.shape[0], device=grad_MN.device)
        return _product(grad8_MN, scale_M1, weight_KN, ones, grad_MN.dtype), None, None


def _product(
    a8_MK: Tensor, scale_M1: Tensor, b8_NK: Tensor, scale_1N: Tensor, dtype: torch.dtype
) -> Tensor:
    """(a * scale) (b * scale^T)^T, (M, N)."""
    if a8_MK.is_cuda:
        y_MN = torch._scaled_mm(
            a8_MK,
            b8_NK.t(),
            scale_a=scale_M1,
            scale_b=scale_1N,
            out_dtype=torch.bfloat16,  # the only one that scales per row allow
            use_fast_accum=True,
        )
    else:
        y_MN = a8_MK.float() @ b8_NK.float().t() * scale_M1 * scale_1N
    # torch 2.11 compiles a Function whose last step is a `to` that does nothing to no gradient.
    return y_MN if y_MN.dtype == dtype else y_MN.to(dtype)


def quantised_layers(transformer: nn.Module) -> dict[str, nn.Linear]:
    """The layers that become Fp8Linear, by name: those of the blocks. What lies outside (patches,
    time, text, head) is small and sets the scale of everything else, and stays as it is."""
    return {
        name: module
        for name, module in transformer.named_modules()
        if name.startswith("blocks.")
        and isinstance(module, nn.Linear)
        and not module.in_features % MULTIPLE
        and not module.out_features % MULTIPLE
    }


def swap_on_meta(transformer: nn.Module) -> set[str]:
    """Give a transformer without memory its Fp8Linear layers; the names of their weights."""
    layers = quantised_layers(transformer)
    for name, linear in layers.items():
        empty = Fp8Linear(linear.in_features, linear.out_features, linear.bias is not None)
        transformer.set_submodule(name, empty)
    return {f"{name}.weight" for name in layers}


def quantised_bytes(transformer: nn.Module) -> tuple[int, int]:
    """(values that are rounded, bytes of all that is kept of them)."""
    layers = quantised_layers(transformer).values()
    values = sum(layer.weight.numel() for layer in layers)
    return values, values + sum(4 * layer.out_features for layer in layers)


def check_device(device: torch.device) -> None:
    """Raise ConfigError for a GPU without 8-bit products."""
    if device.type == "cuda" and torch.cuda.get_device_capability(device) < CAPABILITY:
        raise ConfigError(
            f'model.base: "fp8" needs a GPU of compute capability {CAPABILITY[0]}.{CAPABILITY[1]} '
            f'or newer, and {torch.cuda.get_device_name(device)} is older; use "bf16"'
        )


def _frozen(tensor: Tensor) -> nn.Parameter:
    return nn.Parameter(tensor, requires_grad=False)
