"""Triton kernels of ``quantize`` and ``layer_norm_quantize``: memory-bound passes over rows.

Roofline: reads M·K·b bytes (b of the float), writes M·K codes and 4·M·(G + R) bytes of scales and t; 2·M·K·R operations
for t (twice that with ``subspace``), a few per element besides. Floor: bytes / bandwidth. M=6304, K=768, bf16, R=32:
14.5 + 0.8 MB, 3.6 µs at 4.3 TB/s; the 0.3 G operations of the branch are under 1 µs on 16-bit tensor cores.
``gather`` (windows) adds 4 bytes a row, most of them from the cache: all images share one map.

``_whole``: BLOCK_M rows (of one column group) in registers, read once. ``_chunked``: 16 rows in chunks of K, for rows
too long for registers, for t (what the tensor core multiplies comes in chunks) and for LayerNorm with several groups.
Each pass after the first, one for LayerNorm's variance, one for a dynamic scale, one for ``subspace``, reads the cache,
where 16 rows of K=768 in bf16 take 24 KB; codes and t come out of the last pass together.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from ...triton import host
from ...triton.device import (
    branch_value,
    dot_operand,
    dynamic_scale,
    encode,
    float_dot,
    load_float,
    magnitude,
    static_inverse,
)

WHOLE_ROW = 8192
"""Longest row (or column group) kept in registers: 64 floats a thread at 4 warps and one row."""
MAX_RANK = 256
"""Largest rank whose t stays in registers."""
ROWS = 16
"""Rows that are quantized at a time in chunks: the least that the tensor core takes."""
UNIT = tl.constexpr(ROWS)
"""The same in kernels: rows that are finished at a time."""
WIDE_ROW = 64
"""Columns of such rows at a time, per warp: 32 values a thread; kernels that are short of registers take half."""


@triton.jit
def _row_offset(row, inner, outer_stride, row_stride):
    row = row.to(tl.int64)
    if inner is None:
        return row * row_stride
    else:
        return (row // inner) * outer_stride + (row % inner) * row_stride


@triton.jit
def _source(row, row_mask, gather, slots, tokens):
    """The rows of x that these rows of the result come from, and which of them come from any."""
    if gather is None:
        return row, row_mask
    else:
        token = tl.load(gather + row % slots, mask=row_mask, other=-1)
        return (row // slots) * tokens + token, token >= 0


@triton.jit
def _affine(x, gamma, beta, col, col_mask, mask):
    """x·γ + β, columns along the last dimension; zero outside ``mask``."""
    if gamma is not None:
        x = x * load_float(gamma + col, col_mask)[None, :]
    if beta is not None:
        x = x + load_float(beta + col, col_mask)[None, :]
    return tl.where(mask, x, 0.0)


@triton.jit
def _reciprocal_deviation(square_sum, mean, count, eps):
    """1/√(variance + eps) of values whose mean is ``mean`` (all but zero: the values are centred)."""
    return tl.div_rn(1.0, tl.sqrt_rn(square_sum / count - mean * mean + eps))


@triton.jit
def normalized(v, gamma, beta, col, col_mask, mask, count, eps):
    """LayerNorm of whole rows in registers, columns along the last dimension; zero outside ``mask``."""
    # The first mean only centres; what it is off by, the second one takes out (a mean of small numbers).
    v = tl.where(col_mask[None, :], v - (tl.sum(v, 1) / count)[:, None], 0.0)
    mean = tl.sum(v, 1) / count
    rstd = _reciprocal_deviation(tl.sum(v * v, 1), mean, count, eps)
    return _affine((v - mean[:, None]) * rstd[:, None], gamma, beta, col, col_mask, mask)


@triton.jit(do_not_specialize=["zero_point"])
def _whole(
    x,  # [M, groups·K], any strides
    inner,
    outer_stride,
    row_stride,
    col_stride,
    gather,  # [slots] int32 or None: M rows are slots of images that have ``tokens`` rows in x
    slots,
    tokens,
    gamma,  # [K] or None
    beta,  # [K] or None
    scale,  # [groups] or [M, groups] (scale_stride = groups); None: dynamic
    scale_stride,
    row_qmax,  # [M] int32 or None
    lut,  # [256] int8 or None
    q,  # [M, groups·K] int8
    out_scale,  # [M, groups], written where scale is None
    M,
    K,
    groups,
    count,  # K as a float
    eps,
    low,
    high,
    zero_point,
    NORM: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    row = tl.program_id(0) * BLOCK_M + tl.arange(0, BLOCK_M)
    group = tl.program_id(1)
    col = tl.arange(0, BLOCK_K)
    row_mask, col_mask = row < M, col < K
    mask = row_mask[:, None] & col_mask[None, :]
    source, present = _source(row, row_mask, gather, slots, tokens)
    present = present[:, None] & col_mask[None, :]
    offset = _row_offset(source, inner, outer_stride, row_stride)
    v = load_float(x + offset[:, None] + (group * K + col)[None, :].to(tl.int64) * col_stride, present)
    if NORM:
        v = normalized(v, gamma, beta, col, col_mask, present, count, eps)
    if row_qmax is not None:
        high = tl.load(row_qmax + row, mask=row_mask, other=1).to(tl.float32)[:, None]
        low = -high
    if scale is None:
        absmax = tl.max(magnitude(v), 1)[:, None]
        s = dynamic_scale(absmax, high)
        tl.store(out_scale + row[:, None] * groups + group, s, mask=row_mask[:, None])
        inverse = tl.div_rn(1.0, s)
    else:
        inverse = static_inverse(scale, row[:, None] * scale_stride + group, row_mask[:, None])
    codes = encode(v, inverse, low, high, zero_point, lut)
    tl.store(q + (row.to(tl.int64) * (groups * K) + group * K)[:, None] + col[None, :], codes, mask=mask)


@triton.jit
def _chunk(x, offset, row_mask, col, col_mask, col_stride, gamma, beta, centre, mean, rstd):
    """Some columns of the values to quantize (before the subspace is taken out), or of x where centre is None."""
    mask = row_mask[:, None] & col_mask[None, :]
    v = load_float(x + offset[:, None] + col[None, :].to(tl.int64) * col_stride, mask)
    if centre is not None:
        v = _affine((v - centre[:, None] - mean[:, None]) * rstd[:, None], gamma, beta, col, col_mask, mask)
    return v


@triton.jit
def _directions(lora_down, rank, col, col_mask, K, R):
    """[RANK, BLOCK_K] of lora_down, zero outside."""
    mask = (rank < R)[:, None] & col_mask[None, :]
    return tl.load(lora_down + rank[:, None] * K + col[None, :], mask=mask, other=0.0)


@triton.jit
def _add_projection(t, v, lora_down, rank, col, col_mask, K, R):
    """t + v·Dᵀ over these columns."""
    d = dot_operand(_directions(lora_down, rank, col, col_mask, K, R), lora_down.dtype.element_ty)
    return float_dot(dot_operand(v, lora_down.dtype.element_ty), tl.trans(d), t)


@triton.jit
def _without_subspace(v, t, lora_down, rank, col, col_mask, K, R):
    d = _directions(lora_down, rank, col, col_mask, K, R)
    d = dot_operand(d, lora_down.dtype.element_ty)
    return v - float_dot(dot_operand(t, lora_down.dtype.element_ty), d, tl.zeros(v.shape, tl.float32))


@triton.jit
def chunked_rows(
    x,  # column 0 of row r at offset[r], columns col_stride apart
    row,  # [BLOCK_M] int32
    row_mask,
    offset,  # [BLOCK_M] int64
    present,  # [BLOCK_M]: rows that are in x; the others hold 0
    col_stride,
    gamma,  # [K] or None
    beta,  # [K] or None
    scale,  # [groups] or [M, groups] (scale_stride = groups); None: dynamic
    scale_stride,
    row_qmax,  # [M] int32 or None
    lut,  # [256] int8 or None
    lora_down,  # [R, K] or None
    q,  # [M, K] int8
    out_scale,  # [M, groups], written where scale is None
    t_out,  # [M, R] float32
    K,
    R,
    groups,
    width,  # K / groups
    count,  # K as a float
    eps,
    low,
    high,
    zero_point,
    NORM: tl.constexpr,
    SUBSPACE: tl.constexpr,
    RANK: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_K: tl.constexpr,  # columns that the tensor core takes at a time
    WIDE_K: tl.constexpr,  # columns that everything else takes at a time
):
    """Quantizes some whole rows, BLOCK_M = 16 of them: what ``_chunked`` does, and what finishes a product's rows."""
    rank = tl.arange(0, RANK)
    zeros = tl.zeros((BLOCK_M,), tl.float32)
    centre, mean, rstd = zeros, zeros, zeros
    if NORM:
        for k in range(0, K, WIDE_K):
            col = k + tl.arange(0, WIDE_K)
            centre += tl.sum(_chunk(x, offset, present, col, col < K, col_stride, None, None, None, None, None), 1)
        centre = centre / count
        squares = zeros
        for k in range(0, K, WIDE_K):
            col = k + tl.arange(0, WIDE_K)
            v = _chunk(x, offset, present, col, col < K, col_stride, None, None, None, None, None)
            v = tl.where((col < K)[None, :], v - centre[:, None], 0.0)
            mean += tl.sum(v, 1)
            squares += tl.sum(v * v, 1)
        mean = mean / count
        rstd = _reciprocal_deviation(squares, mean, count, eps)
    else:
        centre = None

    t = tl.zeros((BLOCK_M, RANK), tl.float32)
    if SUBSPACE:
        for k in range(0, K, BLOCK_K):
            col = k + tl.arange(0, BLOCK_K)
            v = _chunk(x, offset, present, col, col < K, col_stride, gamma, beta, centre, mean, rstd)
            t = _add_projection(t, v, lora_down, rank, col, col < K, K, R)
        # What is subtracted here and what lora_up multiplies later is one and the same number.
        t = branch_value(t, lora_down.dtype.element_ty).to(tl.float32)

    if row_qmax is not None:
        high = tl.load(row_qmax + row, mask=row_mask, other=1).to(tl.float32)[:, None]
        low = -high
    measured: tl.constexpr = BLOCK_K if SUBSPACE else WIDE_K
    encoded: tl.constexpr = WIDE_K if lora_down is None else BLOCK_K
    for group in range(groups):
        begin = group * width
        end = begin + width
        if scale is None:
            absmax = zeros
            for k in range(begin, end, measured):
                col = k + tl.arange(0, measured)
                v = _chunk(x, offset, present, col, col < end, col_stride, gamma, beta, centre, mean, rstd)
                if SUBSPACE:
                    v = _without_subspace(v, t, lora_down, rank, col, col < end, K, R)
                absmax = tl.maximum(absmax, tl.max(magnitude(v), 1))
            s = dynamic_scale(absmax[:, None], high)
            tl.store(out_scale + row[:, None] * groups + group, s, mask=row_mask[:, None])
            inverse = tl.div_rn(1.0, s)
        else:
            inverse = static_inverse(scale, row[:, None] * scale_stride + group, row_mask[:, None])
        for k in range(begin, end, encoded):
            col = k + tl.arange(0, encoded)
            v = _chunk(x, offset, present, col, col < end, col_stride, gamma, beta, centre, mean, rstd)
            if SUBSPACE:
                v = _without_subspace(v, t, lora_down, rank, col, col < end, K, R)
            elif lora_down is not None:
                t = _add_projection(t, v, lora_down, rank, col, col < end, K, R)
            codes = encode(v, inverse, low, high, zero_point, lut)
            mask = row_mask[:, None] & (col < end)[None, :]
            tl.store(q + row[:, None].to(tl.int64) * K + col[None, :], codes, mask=mask)
    if lora_down is not None:
        t_mask = row_mask[:, None] & (rank < R)[None, :]
        tl.store(t_out + row[:, None].to(tl.int64) * R + rank[None, :], t, mask=t_mask)


@triton.jit
def store_codes(
    y,  # [BLOCK_M, BLOCK_N] float32
    m,
    n,
    tile_n,
    out,  # [M, N] int8
    scale,  # [1], [M], [groups] (SCALES = 0, 1, 2) or None: dynamic, groups within the tile
    row_qmax,  # [M] int32 or None
    lut,  # [256] int8 or None
    out_scale,  # [M, groups] float32, written where scale is None
    low,
    high,
    zero_point,
    M,
    N,
    groups,
    width,  # N / groups
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    TILE_GROUPS: tl.constexpr,
    SCALES: tl.constexpr,
):
    """The quantizing epilogue of a tile."""
    mask = (m < M)[:, None] & (n < N)[None, :]
    if row_qmax is not None:
        high = tl.load(row_qmax + m, mask=m < M, other=1).to(tl.float32)[:, None]
        low = -high
    if scale is None:
        group_width: tl.constexpr = BLOCK_N // TILE_GROUPS
        size = tl.where((n < N)[None, :], magnitude(y), 0.0)
        absmax = tl.max(tl.reshape(size, (BLOCK_M, TILE_GROUPS, group_width)), 2)
        s = dynamic_scale(absmax, high)
        group = tile_n * TILE_GROUPS + tl.arange(0, TILE_GROUPS)
        s_mask = (m < M)[:, None] & (group < groups)[None, :]
        tl.store(out_scale + m[:, None] * groups + group[None, :], s, mask=s_mask)
        inverse = tl.broadcast_to(tl.div_rn(1.0, s)[:, :, None], (BLOCK_M, TILE_GROUPS, group_width))
        inverse = tl.reshape(inverse, (BLOCK_M, BLOCK_N))
    elif SCALES == 0:
        inverse = tl.div_rn(1.0, tl.load(scale))
    elif SCALES == 1:
        inverse = static_inverse(scale, m, m < M)[:, None]
    else:
        inverse = static_inverse(scale, n // width, n < N)[None, :]
    codes = encode(y, inverse, low, high, zero_point, lut)
    tl.store(out + m[:, None].to(tl.int64) * N + n[None, :], codes, mask=mask)


@triton.jit(do_not_specialize=["zero_point"])
def _chunked(
    x,  # [M, K], any strides
    inner,
    outer_stride,
    row_stride,
    col_stride,
    gather,  # [slots] int32 or None: M rows are slots of images that have ``tokens`` rows in x
    slots,
    tokens,
    gamma,  # the others: see chunked_rows
    beta,
    scale,
    scale_stride,
    row_qmax,
    lut,
    lora_down,
    q,
    out_scale,
    t_out,
    M,
    K,
    R,
    groups,
    width,
    count,
    eps,
    low,
    high,
    zero_point,
    NORM: tl.constexpr,
    SUBSPACE: tl.constexpr,
    RANK: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_K: tl.constexpr,
    WIDE_K: tl.constexpr,
):
    row = tl.program_id(0) * BLOCK_M + tl.arange(0, BLOCK_M)
    source, present = _source(row, row < M, gather, slots, tokens)
    chunked_rows(
        x,
        row,
        row < M,
        _row_offset(source, inner, outer_stride, row_stride),
        present,
        col_stride,
        gamma,
        beta,
        scale,
        scale_stride,
        row_qmax,
        lut,
        lora_down,
        q,
        out_scale,
        t_out,
        K,
        R,
        groups,
        width,
        count,
        eps,
        low,
        high,
        zero_point,
        NORM,
        SUBSPACE,
        RANK,
        BLOCK_M,
        BLOCK_K,
        WIDE_K,
    )


def chunk_columns(rank: int) -> int:
    """Columns that the tensor core takes at a time: of lora_down, a chunk of at most 8192 entries."""
    return min(128, 8192 // host.power_of_2(rank, 16))


def rank_of(lora_down: Tensor | None) -> int:
    """R, 0 without a branch. Raises: ValueError above ``MAX_RANK``."""
    rank = 0 if lora_down is None else lora_down.shape[0]
    if rank > MAX_RANK:
        raise ValueError(f"lora_down has rank {rank}, the triton back end serves at most {MAX_RANK}")
    return rank


def _rows_per_program(m: int, most: int, programs: int, fill: int) -> int:
    """The largest power of two ≤ most that still leaves two programs per processor (``programs`` per block of rows)."""
    block = most
    while block > 1 and host.ceil_div(m, block) * programs < 2 * fill:
        block //= 2
    return block


def quantize_rows(
    x: Tensor,
    norm: tuple[Tensor | None, Tensor | None, float] | None,
    scale: Tensor | None,
    zero_point: int,
    qmin: int,
    qmax: int,
    groups: int,
    row_qmax: Tensor | None,
    lut: Tensor | None,
    lora_down: Tensor | None,
    subspace: bool,
    gather: Tensor | None = None,
    tokens: int = 0,
) -> tuple[Tensor, Tensor, Tensor]:
    """Both ops; ``norm`` is (γ, β, eps) or None. With ``gather``, result [B, S, K] of images of ``tokens`` rows.

    Raises: ValueError for a rank above ``MAX_RANK``.
    """
    rows = host.rows_of(x)
    m, k, shape = rows.m, rows.k, x.shape
    if gather is not None:
        shape = (x.shape[0], gather.shape[0], k)
        m = shape[0] * shape[1]
    rank = rank_of(lora_down)
    device, f32 = x.device, torch.float32
    q = torch.empty(shape, dtype=torch.int8, device=device)
    out_scale = torch.empty((m, groups) if scale is None else (0,), dtype=f32, device=device)
    t = torch.empty((m, rank) if lora_down is not None else (0,), dtype=f32, device=device)
    if m == 0:
        return q, out_scale, t
    gamma, beta, eps = norm or (None, None, 0.0)
    low, high = qmin - zero_point, qmax - zero_point  # dynamic scales have no zero point: absmax becomes qmax
    windows = (None, None, None) if gather is None else (host.dense(gather), gather.shape[0], tokens)
    inputs = (*rows.arguments, *windows, host.dense(gamma), host.dense(beta))
    scale_stride = groups if scale is not None and scale.dim() == 2 else 0
    epilogue = (host.dense(scale), scale_stride, host.dense(row_qmax), host.dense(lut))
    floats = (float(k), float(eps), float(low), float(high), zero_point)
    fill = host.processors(device)
    width = k // groups
    if lora_down is None and width <= WHOLE_ROW and (norm is None or groups == 1):
        block_k = host.power_of_2(width, 16)
        most = host.power_of_2(4096 // block_k, 1, 16)
        block_m = _rows_per_program(m, most, groups, fill)
        grid = (host.ceil_div(m, block_m), groups)
        arguments = (*inputs, *epilogue, q, out_scale, m, width, groups, *floats, norm is not None, block_m, block_k)
        host.launch(_whole, grid, arguments, device, num_warps=4 if block_m * block_k <= 4096 else 8)
    else:
        padded_rank = host.power_of_2(rank, 16)
        block_m, block_k = ROWS, chunk_columns(rank)
        arguments = (*inputs, *epilogue, host.dense(lora_down), q, out_scale, t, m, k, rank, groups, width, *floats)
        wide = host.power_of_2(width if norm is None else k, 16, 256)
        constants = (norm is not None, subspace, padded_rank, block_m, block_k, wide)
        warps = 4 if padded_rank <= 64 else 8
        host.launch(_chunked, (host.ceil_div(m, block_m),), (*arguments, *constants), device, num_warps=warps)
    return q, out_scale, t


def quantize(x: Tensor, *quant) -> tuple[Tensor, Tensor, Tensor]:
    return quantize_rows(x, None, *quant)
