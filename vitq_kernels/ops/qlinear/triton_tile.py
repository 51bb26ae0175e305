"""What the Triton kernel of the products does before its epilogue: which tile, the loop over K, the side branch."""

from __future__ import annotations

import triton
import triton.language as tl

from ...triton.device import dot_operand, float_dot, unpack_int4


@triton.jit
def _dot(a, b, acc, SWAP: tl.constexpr):
    """acc + a·bᵀ, or its transpose b·aᵀ: integers exactly, floats as ``float_dot``."""
    if SWAP:
        a, b = b, a
    if acc.dtype == tl.int32:
        return tl.dot(a, tl.trans(b), acc, out_dtype=tl.int32)
    else:
        return float_dot(a, tl.trans(b), acc)


@triton.jit
def _like(codes, x):
    """Weight codes as operands beside x: exact in every float type."""
    if x.dtype == tl.int8:
        return codes
    else:
        return codes.to(x.dtype)


@triton.jit
def _load_x(pointers, k, K, EVEN_K: tl.constexpr):
    if EVEN_K:
        x = tl.load(pointers)
    else:
        x = tl.load(pointers, mask=(k < K)[None, :], other=0)
    if x.dtype == tl.bfloat16:
        x = dot_operand(x, tl.bfloat16)
    return x


@triton.jit
def accumulate(
    x,
    x_row,
    weight,
    w_row,
    w_lut,
    K,
    acc,
    PACKED: tl.constexpr,
    SWAP: tl.constexpr,
    BLOCK_K: tl.constexpr,
    EVEN_K: tl.constexpr,
):
    """acc + Σ_k x[m, k]·w[n, k]; x_row, w_row are the int64 offsets of the tile's rows."""
    if PACKED:
        half: tl.constexpr = BLOCK_K // 2  # 64: a run of the layout
        col = tl.arange(0, half)
        x += x_row[:, None] + col[None, :]
        weight += w_row[:, None] + col[None, :]
        for k in range(0, K, BLOCK_K):
            low, high = unpack_int4(tl.load(weight), w_lut)
            first = _load_x(x, k + col, K, EVEN_K)
            second = _load_x(x + half, k + half + col, K, EVEN_K)
            acc = _dot(first, _like(low, first), acc, SWAP)
            acc = _dot(second, _like(high, second), acc, SWAP)
            x += BLOCK_K
            weight += half
        if w_lut is None:  # codes were 16 times as large
            if acc.dtype == tl.int32:
                acc = acc >> 4
            else:
                acc *= 0.0625
    else:
        col = tl.arange(0, BLOCK_K)
        x += x_row[:, None] + col[None, :]
        weight += w_row[:, None] + col[None, :]
        for k in range(0, K, BLOCK_K):
            a = _load_x(x, k + col, K, EVEN_K)
            if EVEN_K:
                b = tl.load(weight)
            else:
                b = tl.load(weight, mask=(k + col < K)[None, :], other=0)
            acc = _dot(a, _like(b, a), acc, SWAP)
            x += BLOCK_K
            weight += BLOCK_K
    return acc


@triton.jit
def add_low_rank(y, lora_t, lora_up, m, n, M, N, R, SWAP: tl.constexpr, RANK: tl.constexpr):
    """y + t·Uᵀ (or its transpose), RANK ranks at a time, in the dtype of U with float32 sums."""
    dtype: tl.constexpr = lora_up.dtype.element_ty
    for r in range(0, R, RANK):
        rank = r + tl.arange(0, RANK)
        t = tl.load(
            lora_t + m[:, None].to(tl.int64) * R + rank[None, :],
            mask=(m < M)[:, None] & (rank < R)[None, :],
            other=0.0,
        )
        u = tl.load(lora_up + n[:, None] * R + rank[None, :], mask=(n < N)[:, None] & (rank < R)[None, :], other=0.0)
        y = _dot(dot_operand(t, dtype), dot_operand(u, dtype), y, SWAP)
    return y


@triton.jit
def tile_of(M, N, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, GROUP_M: tl.constexpr):
    """This program's row tile and column tile: GROUP_M row tiles share a column tile in time."""
    tiles_m, tiles_n = tl.cdiv(M, BLOCK_M), tl.cdiv(N, BLOCK_N)
    program = tl.program_id(0)
    group = program // (GROUP_M * tiles_n)
    first = group * GROUP_M
    height = tl.minimum(tiles_m - first, GROUP_M)
    within = program % (GROUP_M * tiles_n)
    return first + within % height, within // height
