"""Triton kernels of ``qlinear``, ``qlinear_quantize`` and ``qlinear_weight_only``.

Roofline of one product: 2·M·N·K integer operations and 2·M·N·R of the branch in 16 bits (which count twice); reads
M·K + N·K·(1 or ½) bytes of codes, 4·M·R of t, b·M·N of a residual, writes b·M·N floats or M·N codes. Floor: the larger
of operations / peak and bytes / bandwidth, at 1979 TOPS and 4.3 TB/s:

* M=6304, K=768, N=3072 to codes, R=32: 29.7 G operations, 15 µs, and 1.2 G of the branch, 1.3 µs; 27 MB, 6 µs. Bound by
  operations.
* M=197, K=N=768: 0.23 G operations, 0.1 µs; 1.2 MB, 0.3 µs. Bound by latency.

``qlinear_weight_only`` reads b·M·K bytes of floats instead of codes and does its operations in 16 bits.

One kernel, ``_product``: a tile of [BLOCK_M, BLOCK_N] outputs per program, K in a pipelined loop, then the whole
epilogue in registers. Its parts are compiled in or out by which pointers are None. Tiles are walked in groups of
GROUP_M row tiles under one another, so that a wave of programs shares both operands in the second-level cache. Neither
persistent programs nor a split of K: the former would hide only the epilogue's tail (8 or more waves of tiles at
M=6304, N=3072), the latter needs another pass over int32 partial sums; at M=197, 64×64 tiles give 48 to 192 programs.

Launches of ``qlinear_quantize``:

1   static scales, any groups, zero point, row_qmax, table; dynamic ones whose group of columns fits one tile (a head of
    2^i ≤ ``WHOLE_N`` columns, or N ≤ ``WHOLE_N``), which is then held whole by one program;
2   the same with the next layer's t where N takes several tiles: each tile writes its share of t, the second launch
    adds the shares in order. Atomic additions would save it and cost the bitwise repeatability of results;
2   dynamic scales over more columns than a tile, ``subspace``, which needs all of t before the first code, and scales
    per row and group: the product in float32, then ``quantize``. 8·M·N bytes more, mostly within the second-level cache
    up to M ≈ 1500 at N=3072; calibrated (static) scales for such layers avoid it.
"""

from __future__ import annotations

from dataclasses import replace

import torch
import triton
import triton.language as tl
from torch import Tensor

from ... import tuning
from ...packing import LAYOUT_IDS
from ...triton import host
from ...triton.device import (
    activate,
    dot_operand,
    dynamic_scale,
    encode,
    float_dot,
    load_float,
    magnitude,
    narrow,
    static_inverse,
    unpack_int4,
)
from ...triton.host import ceil_div, power_of_2
from ..quantize import triton as quantize_triton

LAYOUTS = ("int4_k64x2", "int8")
WHOLE_N = 256
"""Widest row that one program holds for a dynamic scale of its own."""
MAX_RANK_DOWN = 128
"""Largest rank of the next layer's lora_down that the epilogue takes along."""


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
def _accumulate(
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
def _tile(M, N, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, GROUP_M: tl.constexpr):
    """This program's row tile and column tile: GROUP_M row tiles share a column tile in time."""
    tiles_m, tiles_n = tl.cdiv(M, BLOCK_M), tl.cdiv(N, BLOCK_N)
    program = tl.program_id(0)
    group = program // (GROUP_M * tiles_n)
    first = group * GROUP_M
    height = tl.minimum(tiles_m - first, GROUP_M)
    within = program % (GROUP_M * tiles_n)
    return first + within % height, within // height


@triton.jit
def _store_codes(
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


@triton.jit(do_not_specialize=["x_zero_point", "zero_point"])
def _product(
    x,  # [M, K] int8 codes, or floats (weight-only); contiguous columns
    inner,
    outer_stride,
    row_stride,
    x_scale,  # [1] (x_scale_stride = 0) or [M] float32; None: weight-only
    x_scale_stride,
    x_zero_point,
    weight,  # [N, K] int8, or [N, K/128·64] uint8
    w_stride,
    col_sum,  # [N] int32; None without a zero point
    w_lut,  # [16] int8 or None
    w_scale,  # [N] float32
    lora_t,  # [M, R] float32
    lora_up,  # [N, R] or None
    bias,  # [N] or None
    layer_scale,  # [N] or None
    residual,  # [M, N] or None
    out,  # [M, N], floats or int8 codes
    scale,  # the quantizing epilogue: see _store_codes
    row_qmax,
    lut,
    out_scale,
    lora_down,  # [R_DOWN, N] or None
    t_out,  # [column tiles, M, R_DOWN] float32: each tile's share of t
    M,
    N,
    K,
    R,
    R_DOWN,
    groups,
    width,
    low,
    high,
    zero_point,
    ACTIVATION: tl.constexpr,
    QUANTIZE: tl.constexpr,
    PACKED: tl.constexpr,
    SWAP: tl.constexpr,
    EVEN_K: tl.constexpr,
    RANK: tl.constexpr,
    RANK_DOWN: tl.constexpr,
    TILE_GROUPS: tl.constexpr,
    SCALES: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    GROUP_M: tl.constexpr,
):
    tile_m, tile_n = _tile(M, N, BLOCK_M, BLOCK_N, GROUP_M)
    m = tile_m * BLOCK_M + tl.arange(0, BLOCK_M)
    n = tile_n * BLOCK_N + tl.arange(0, BLOCK_N)
    # Rows past the end read the last one: no mask in the loop, and nothing of theirs is stored.
    x_row = tl.minimum(m, M - 1).to(tl.int64)
    if inner is None:
        x_row = x_row * row_stride
    else:
        x_row = (x_row // inner) * outer_stride + (x_row % inner) * row_stride
    w_row = tl.minimum(n, N - 1).to(tl.int64) * w_stride
    shape: tl.constexpr = (BLOCK_N, BLOCK_M) if SWAP else (BLOCK_M, BLOCK_N)
    acc = tl.zeros(shape, tl.float32 if x_scale is None else tl.int32)
    acc = _accumulate(x, x_row, weight, w_row, w_lut, K, acc, PACKED, SWAP, BLOCK_K, EVEN_K)

    # Everything below sees the tile as it lies: rows and columns are [BLOCK, 1] or [1, BLOCK] as SWAP says.
    if SWAP:
        row, col = m[None, :], n[:, None]
    else:
        row, col = m[:, None], n[None, :]
    if col_sum is not None:
        acc -= x_zero_point * tl.load(col_sum + col, mask=col < N, other=0)
    factor = load_float(w_scale + col, col < N)
    if x_scale is not None:
        factor = load_float(x_scale + row * x_scale_stride, row < M) * factor
    y = acc.to(tl.float32) * factor
    if lora_up is not None:
        y = add_low_rank(y, lora_t, lora_up, m, n, M, N, R, SWAP, RANK)
    if bias is not None:
        y += load_float(bias + col, col < N)
    y = activate(y, ACTIVATION)
    if layer_scale is not None:
        y *= load_float(layer_scale + col, col < N)
    offset = row.to(tl.int64) * N + col
    mask = (row < M) & (col < N)
    if residual is not None:
        y += load_float(residual + offset, mask)
    if not QUANTIZE:
        tl.store(out + offset, narrow(y, out.dtype.element_ty), mask=mask)
    else:
        if SWAP:
            y = tl.trans(y)
        if lora_down is not None:
            dtype: tl.constexpr = lora_down.dtype.element_ty
            rank = tl.arange(0, RANK_DOWN)
            d_mask = (rank < R_DOWN)[:, None] & (n < N)[None, :]
            d = tl.load(lora_down + rank[:, None].to(tl.int64) * N + n[None, :], mask=d_mask, other=0.0)
            known = dot_operand(tl.where((n < N)[None, :], y, 0.0), dtype)
            t = float_dot(known, tl.trans(dot_operand(d, dtype)), tl.zeros((BLOCK_M, RANK_DOWN), tl.float32))
            t_offset = (tile_n.to(tl.int64) * M + m)[:, None] * R_DOWN + rank[None, :]
            tl.store(t_out + t_offset, t, mask=(m < M)[:, None] & (rank < R_DOWN)[None, :])
        _store_codes(
            y,
            m,
            n,
            tile_n,
            out,
            scale,
            row_qmax,
            lut,
            out_scale,
            low,
            high,
            zero_point,
            M,
            N,
            groups,
            width,
            BLOCK_M,
            BLOCK_N,
            TILE_GROUPS,
            SCALES,
        )


@triton.jit
def _add_shares(shares, t, parts, count, BLOCK: tl.constexpr):
    """t[i] = Σ_p shares[p, i], in the order of p."""
    at = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    total = tl.zeros((BLOCK,), tl.float32)
    shares += at
    for _ in range(parts):
        total += tl.load(shares, mask=at < count, other=0.0)
        shares += count
    tl.store(t + at, total, mask=at < count)


def _dense(p: Tensor | None) -> Tensor | None:
    return None if p is None else p.contiguous()


def _configure(device: torch.device, kind: str, m: int, n: int, k: int) -> tuning.Config:
    """The table's tiles, cut down to what the shape can fill."""
    config = tuning.lookup(device, kind, m, n)
    block_m, block_n, block_k = min(config.block_m, power_of_2(m, 16)), config.block_n, config.block_k
    if k % 16 and not host.INTERPRETED:  # no loads of 16 bytes: addresses take the registers of a large tile
        block_m, block_n, block_k = min(block_m, 16), min(block_n, 32), min(block_k, 64)
    block_k = 128 if kind.startswith("w4") else min(block_k, power_of_2(k, 32))
    return replace(config, block_m=block_m, block_n=block_n, block_k=block_k)


def _launch(
    x: Tensor,
    scales: tuple[Tensor, int, Tensor] | None,
    weight: tuple[Tensor, int, Tensor | None, Tensor],
    tail: tuple,
    out: Tensor,
    config: tuning.Config,
    n: int,
    epilogue: tuple = (None, None, None, None, None, None),
    sizes: tuple = (0, 1, 0),
    clamp: tuple = (0.0, 0.0, 0),
    tile_groups: int = 1,
) -> None:
    """One ``_product``: ``scales`` are (x_scale, x_zero_point, col_sum); ``epilogue`` the quantizing one's tensors."""
    rows = host.rows_of(x, contiguous_columns=True)
    m, k = rows.m, rows.k
    x_scale, x_zero_point, col_sum = scales or (None, 0, None)
    data, layout, w_lut, w_scale = weight
    lora_t, bias, lora_up, activation, layer_scale, residual = tail
    packed = layout == LAYOUT_IDS["int4_k64x2"]
    scale = epilogue[0]
    rank = 0 if lora_up is None else lora_up.shape[1]
    if rank == 0:
        lora_t = lora_up = None
    arguments = (
        *rows.arguments[:4],
        None if x_scale is None else x_scale.reshape(-1).contiguous(),
        0 if x_scale is None or x_scale.numel() == 1 else 1,
        x_zero_point,
        data,
        data.stride(0),
        None if x_zero_point == 0 else col_sum,
        w_lut,
        w_scale.contiguous(),
        _dense(lora_t),
        _dense(lora_up),
        _dense(bias),
        _dense(layer_scale),
        _dense(residual),
        out,
        *epilogue,
        m,
        n,
        k,
        rank,
        *sizes,
        *clamp,
    )
    # A float32 branch multiplies three times: a slice of 16 ranks is what fits beside the accumulators.
    most = 16 if lora_up is not None and lora_up.dtype == torch.float32 else 64
    rank_down = power_of_2(sizes[0], 16)
    constants = (
        activation,
        out.dtype == torch.int8,
        packed,
        bool(config.swap),
        k % config.block_k == 0,
        power_of_2(rank, 16, most),
        rank_down,
        tile_groups,
        0 if scale is None or scale.numel() == 1 else 1 if scale.dim() == 2 else 2,
        config.block_m,
        config.block_n,
        config.block_k,
        config.group_m,
    )
    grid = (ceil_div(m, config.block_m) * ceil_div(n, config.block_n),)
    options = {"num_warps": config.num_warps, "num_stages": config.num_stages}
    host.launch(_product, grid, (*arguments, *constants), x.device, **options)


def _kind(layout: int, weight_only: bool) -> str:
    if layout not in (LAYOUT_IDS["int4_k64x2"], LAYOUT_IDS["int8"]):
        raise ValueError(f"layout is {layout}, expected that of {' or '.join(LAYOUTS)}")
    return ("w4" if layout == LAYOUT_IDS["int4_k64x2"] else "w8") + ("_float" if weight_only else "")


def qlinear(x, x_scale, x_zero_point, lora_t, weight, layout, n, k, col_sum, w_lut, w_scale, *tail_and_dtype) -> Tensor:
    *tail, out_dtype = tail_and_dtype
    out = torch.empty((*x.shape[:-1], n), dtype=out_dtype, device=x.device)
    if out.numel():
        config = _configure(x.device, _kind(layout, False), out.numel() // n, n, k)
        scales = (x_scale, x_zero_point, col_sum)
        _launch(x, scales, (weight, layout, w_lut, w_scale), (lora_t, *tail), out, config, n)
    return out


def qlinear_weight_only(x, lora_t, weight, layout, n, k, w_lut, w_scale, *tail_and_dtype) -> Tensor:
    *tail, out_dtype = tail_and_dtype
    out = torch.empty((*x.shape[:-1], n), dtype=out_dtype, device=x.device)
    if out.numel():
        config = _configure(x.device, _kind(layout, True), out.numel() // n, n, k)
        if x.dtype == torch.float32:  # twice the bytes per operand, and two TF32 parts of each
            config = replace(config, block_m=min(config.block_m, 32), block_n=min(config.block_n, 64))
        _launch(x, None, (weight, layout, w_lut, w_scale), (lora_t, *tail), out, config, n)
    return out


def _hold_groups(config: tuning.Config, n: int, groups: int) -> tuple[tuning.Config, int] | None:
    """Tiles that each hold whole column groups, and how many; None if no tile can."""
    width = n // groups
    if width & (width - 1) == 0 and width <= WHOLE_N:
        wide = max(config.block_n, width)
    elif groups == 1 and n <= WHOLE_N:
        wide = width = power_of_2(n, 16)
    else:
        return None
    if wide > config.block_n:  # the same number of outputs per program
        config = replace(config, block_m=max(16, config.block_m * config.block_n // wide), block_n=wide)
    return config, config.block_n // width


def qlinear_quantize(
    x, x_scale, x_zero_point, lora_t, weight, layout, n, k, col_sum, w_lut, w_scale, *tail_and_quant
) -> tuple[Tensor, Tensor, Tensor]:
    tail, quant = tail_and_quant[:-9], tail_and_quant[-9:]
    scale, zero_point, qmin, qmax, groups, row_qmax, lut, lora_down, subspace = quant
    product = (x, x_scale, x_zero_point, lora_t, weight, layout, n, k, col_sum, w_lut, w_scale, *tail)
    device, f32 = x.device, torch.float32
    m = x.numel() // k if k else x.shape[:-1].numel()
    q = torch.empty((*x.shape[:-1], n), dtype=torch.int8, device=device)
    config, tile_groups = _configure(device, _kind(layout, False), m, n, k), 1
    rank = 0 if lora_down is None else lora_down.shape[0]
    held = None if scale is not None or not q.numel() else _hold_groups(config, n, groups)
    whole = held is not None if scale is None else scale.dim() == 1 or groups == 1
    if not q.numel() or subspace or rank > MAX_RANK_DOWN or not whole:
        return quantize_triton.quantize(qlinear(*product, f32), *quant)
    if held is not None:
        config, tile_groups = held
    out_scale = torch.empty((m, groups) if scale is None else (0,), dtype=f32, device=device)
    t = torch.empty((m, rank) if lora_down is not None else (0,), dtype=f32, device=device)
    parts = ceil_div(n, config.block_n)
    shares = t if parts == 1 or not rank else torch.empty((parts, m, rank), dtype=f32, device=device)
    down = _dense(lora_down) if rank else None
    epilogue = (_dense(scale), _dense(row_qmax), _dense(lut), out_scale, down, shares)
    clamp = (float(qmin - zero_point), float(qmax - zero_point), zero_point)
    sizes = (rank, groups, n // groups)
    scales = (x_scale, x_zero_point, col_sum)
    weights = (weight, layout, w_lut, w_scale)
    _launch(x, scales, weights, (lora_t, *tail), q, config, n, epilogue, sizes, clamp, tile_groups)
    if shares is not t:
        block = 1024
        grid = (ceil_div(m * rank, block),)
        host.launch(_add_shares, grid, (shares, t, parts, m * rank, block), device, num_warps=4)
    return q, out_scale, t
