"""Gradient of attention to its queries alone, in one walk over the keys, in Triton.

With p = softmax(s), s = q k^T / sqrt(E), dp = g v^T and delta = sum_j p_j dp_j, the gradient is

    dq = sum_j p_j (dp_j - delta) k_j / sqrt(E)

delta is known only at the end of the walk. So two sums are carried, of p_j (dp_j - c) k_j and of
p_j k_j, and the second is taken from the first delta - c times at the end. That is right for every
c; with the mean of the first tile little is left to take away, and little is lost to bf16.

Shapes: B batch, N head, L query, S key, E channel of a head; M queries of a program, K keys of a
tile.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

QUERIES, KEYS, WARPS, STAGES = 128, 64, 8, 3
LOG2_E = 1.4426950408889634


@triton.jit
def _kernel(
    gradient_ptr,
    query_ptr,
    key_ptr,
    value_ptr,
    out_ptr,
    gradient_strides,
    query_strides,
    key_strides,
    value_strides,
    out_strides,
    heads,
    queries,
    keys,
    scale,
    to_log2,
    E: tl.constexpr,
    M: tl.constexpr,
    K: tl.constexpr,
):
    batch, head = (tl.program_id(1) // heads).to(tl.int64), tl.program_id(1) % heads
    row_M = tl.program_id(0) * M + tl.arange(0, M)
    there_M1 = (row_M < queries)[:, None]
    row_M1, e_1E = row_M.to(tl.int64)[:, None], tl.arange(0, E)[None, :]
    query_ptr += batch * query_strides[0] + head * query_strides[1]
    gradient_ptr += batch * gradient_strides[0] + head * gradient_strides[1]
    key_ptr += batch * key_strides[0] + head * key_strides[1]
    value_ptr += batch * value_strides[0] + head * value_strides[1]
    out_ptr += batch * out_strides[0] + head * out_strides[1]
    q_ME = tl.load(query_ptr + row_M1 * query_strides[2] + e_1E, there_M1, 0.0)
    g_ME = tl.load(gradient_ptr + row_M1 * gradient_strides[2] + e_1E, there_M1, 0.0)

    top_M = tl.full((M,), float("-inf"), tl.float32)
    sum_M = tl.zeros((M,), tl.float32)  # of p
    rest_M = tl.zeros((M,), tl.float32)  # of p (dp - c)
    c_M = tl.zeros((M,), tl.float32)
    with_ME = tl.zeros((M, E), tl.float32)  # of p (dp - c) k
    without_ME = tl.zeros((M, E), tl.float32)  # of p k
    for first in range(0, keys, K):
        row_K = first + tl.arange(0, K)
        there_K1 = (row_K < keys)[:, None]
        k_KE = tl.load(key_ptr + row_K[:, None] * key_strides[2] + e_1E, there_K1, 0.0)
        v_KE = tl.load(value_ptr + row_K[:, None] * value_strides[2] + e_1E, there_K1, 0.0)
        s_MK = tl.dot(q_ME, tl.trans(k_KE)) * to_log2
        s_MK = tl.where((row_K < keys)[None, :], s_MK, float("-inf"))
        dp_MK = tl.dot(g_ME, tl.trans(v_KE))
        higher_M = tl.maximum(top_M, tl.max(s_MK, 1))
        shrink_M = tl.exp2(top_M - higher_M)
        p_MK = tl.exp2(s_MK - higher_M[:, None])
        p_M = tl.sum(p_MK, 1)
        if first == 0:
            c_M = tl.sum(p_MK * dp_MK, 1) / p_M
        pdp_MK = p_MK * (dp_MK - c_M[:, None])
        sum_M = sum_M * shrink_M + p_M
        rest_M = rest_M * shrink_M + tl.sum(pdp_MK, 1)
        with_ME = tl.dot(pdp_MK.to(k_KE.dtype), k_KE, with_ME * shrink_M[:, None])
        without_ME = tl.dot(p_MK.to(k_KE.dtype), k_KE, without_ME * shrink_M[:, None])
        top_M = higher_M
    dq_ME = (with_ME - (rest_M / sum_M)[:, None] * without_ME) * (scale / sum_M)[:, None]
    out_ptr += row_M1 * out_strides[2] + e_1E
    tl.store(out_ptr, dq_ME.to(out_ptr.dtype.element_ty), there_M1)


def launch(gradient: Tensor, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
    """dq (B, N, L, E), laid out as `query`. All the same half-precision dtype, on one device;
    channels lie side by side, or are copied so."""
    gradient, query, key, value = (
        x if x.stride(-1) == 1 else x.contiguous() for x in (gradient, query, key, value)
    )
    out = torch.empty_like(query)
    batch, heads, queries, width = query.shape
    scale = width**-0.5
    with torch.cuda.device_of(query):
        _kernel[(triton.cdiv(queries, QUERIES), batch * heads)](
            *(gradient, query, key, value, out),
            *(x.stride()[:3] for x in (gradient, query, key, value, out)),
            *(heads, queries, key.shape[2], scale, scale * LOG2_E),
            *(width, QUERIES, KEYS),
            num_warps=WARPS,
            num_stages=STAGES,
        )
    return out
