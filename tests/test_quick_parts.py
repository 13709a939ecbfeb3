"""The quick parts of a block compute what diffusers' own compute, forward and backward.

Without a GPU the kernel's own code runs in Triton's interpreter (tests/conftest.py).
"""

import copy

import pytest
import torch
import torch.nn.functional as F

from tempolora.model.quick_parts import attend, gelu_tanh, query_gradient, use_quick_parts

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
HALF = (torch.bfloat16, torch.float16)
# Triton's interpreter multiplies the bit patterns of bfloat16 matrices.
OF_THE_KERNEL = HALF if DEVICE == "cuda" else (torch.float16,)
UNIT = {torch.bfloat16: 2.0**-9, torch.float16: 2.0**-12}
"""Half the distance of neighbouring numbers."""


def draw(seed, *shape, dtype=torch.float32):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)).to(DEVICE, dtype)


def relative(got, wanted):
    return ((got.double() - wanted.double()).norm() / wanted.double().norm()).item()


def inputs(dtype, queries, keys, width, offset=0.0, batch=2, heads=3):
    """Gradient, query, key, value as a block has them: heads side by side within a token."""
    shapes = [(batch, n, heads, width) for n in (queries, queries, keys, keys)]
    drawn = [draw(seed, *shape, dtype=dtype) for seed, shape in enumerate(shapes)]
    drawn[3] += offset
    return [x.transpose(1, 2) for x in drawn]


def expected(gradient, query, key, value):
    """In float64, by torch's own differentiation."""
    query = query.detach().double().requires_grad_()
    out = F.scaled_dot_product_attention(query, key.double(), value.double())
    return torch.autograd.grad(out, query, gradient.double())[0]


def by_kernel(*given):
    pytest.importorskip("triton")
    from tempolora.model.query_gradient import launch

    return launch(*given)


@pytest.mark.parametrize(
    ("how", "dtype"),
    [*((query_gradient, dtype) for dtype in HALF), *((by_kernel, d) for d in OF_THE_KERNEL)],
)
@pytest.mark.parametrize(
    ("queries", "keys", "width"), [(128, 64, 64), (131, 512, 128), (40, 7, 16), (300, 77, 32)]
)
def test_the_queries_gradient_is_attentions_own(how, dtype, queries, keys, width):
    given = inputs(dtype, queries, keys, width)
    found = how(*given)
    assert found.dtype == dtype
    assert found.stride() == given[1].stride()
    assert relative(found, expected(*given)) < 2 * UNIT[dtype]


@pytest.mark.parametrize("dtype", OF_THE_KERNEL)
def test_what_all_values_have_in_common_takes_nothing_from_its_precision(dtype):
    """It changes the gradient by nothing, and what is taken away for it is large."""
    given = inputs(dtype, 64, 512, 64, offset=30.0)
    assert relative(by_kernel(*given), expected(*given)) < 2 * UNIT[dtype]


def test_one_key_that_outweighs_all_leaves_numbers():
    given = inputs(torch.float16, 64, 256, 64)
    given[2][:, :, 200] *= 300
    assert by_kernel(*given).isfinite().all()


def test_keys_that_are_trained_have_their_gradients():
    _, query, key, value = inputs(torch.bfloat16, 32, 16, 16)
    key.requires_grad_()
    attend(query, key, value).float().square().sum().backward()
    assert key.grad.norm() > 0


@pytest.mark.parametrize("dtype", [torch.float32, *HALF])
def test_gelu_is_torchs_and_so_is_its_gradient(dtype):
    x = (8 * draw(0, 4000)).to(dtype).requires_grad_()
    y = gelu_tanh(x)
    (gradient,) = torch.autograd.grad(y.sum(), x)
    wide = x.detach().double().requires_grad_()
    wanted = F.gelu(wide, approximate="tanh")
    (wanted_gradient,) = torch.autograd.grad(wanted.sum(), wide)
    unit = UNIT.get(dtype, 2.0**-22)
    assert y.dtype == dtype
    assert relative(y, wanted) < unit
    assert relative(gradient, wanted_gradient) < 2 * unit


@pytest.mark.slow
@pytest.mark.parametrize("variant", ["t2v_a14b", "i2v_a14b", "ti2v_5b"])
def test_a_block_with_quick_parts_is_the_block(variant, tinywan):
    """In fp32 on both sides but for the text attention's backward pass, which goes through the
    operator where its inputs are half precision; so the block is taken in bf16 too."""
    from diffusers import WanTransformer3DModel

    folder = "transformer"
    model = WanTransformer3DModel.from_pretrained(tinywan(variant), subfolder=folder)
    for dtype, tolerance in ((torch.float32, 1e-5), (torch.bfloat16, 2e-2)):
        plain = model.requires_grad_(False).to(DEVICE, dtype)
        quick = copy.deepcopy(plain)
        use_quick_parts(quick, compiled=True)
        size = 2 * plain.config.patch_size[1]
        found = []
        for transformer in (plain, quick):
            x = draw(0, 1, plain.config.in_channels, 3, size, size, dtype=dtype).requires_grad_()
            text = draw(1, 1, 40, plain.config.text_dim, dtype=dtype)
            out = transformer(x, torch.tensor([500.0], device=DEVICE), text).sample
            found.append((out.detach(), torch.autograd.grad(out.float().square().sum(), x)[0]))
        assert relative(found[1][0], found[0][0]) < tolerance
        assert relative(found[1][1], found[0][1]) < tolerance
