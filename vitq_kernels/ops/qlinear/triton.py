"""Triton kernels of ``qlinear``, ``qlinear_quantize``, ``qlinear_norm_quantize`` and ``qlinear_weight_only``.

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

Everything is one launch. A tile quantizes itself where nothing of its epilogue needs a whole row: static scales, and
dynamic ones whose group of columns fits the tile (a head of 2^i ≤ ``WHOLE_N`` columns, or N ≤ ``WHOLE_N``). Otherwise
the last program of a row tile to arrive finishes it (see ``fixup``), bitwise repeatable as all else:

``SHARES``  the next layer's t where N takes several tiles: the tiles' shares are summed in the order of the tiles.
            4·M·R·tiles bytes more each way: 19 MB at M=6304, N=3072, R=32, 128 columns a tile.
``ROWS``    dynamic scales over more columns than a tile, ``subspace``, which needs all of t before the first code,
            scales per row and group, and the LayerNorm of ``qlinear_norm_quantize``: ``quantize``'s pass over the rows
            that the tiles have just stored, from the second-level cache: as floats in a workspace, 8·M·N bytes more,
            or, behind a residual, the output itself, 2·M·N bytes more to read.

Estimated, not measured: finishing 16 rows of N=768 takes a processor two microseconds, a tile of 128 rows eight times
that, while the others multiply; the row tiles that end the launch are shared among the programs that have nothing else
to do. A second launch would use all processors at once, but costs its start and, behind a large product, its reads from
memory instead of cache.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace

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
    float_dot,
    load_float,
    narrow,
)
from ...triton.fixup import COUNTERS, arrive, leave, take
from ...triton.host import ceil_div, power_of_2
from ..quantize import triton as quantize_triton
from ..quantize.triton import UNIT, WIDE_ROW, chunk_columns, chunked_rows, store_codes
from .triton_tile import accumulate, add_low_rank, tile_of

LAYOUTS = ("int4_k64x2", "int8", "int4_k64x2_s4")  # the third holds the first's bytes
_INT4 = (LAYOUT_IDS["int4_k64x2"], LAYOUT_IDS["int4_k64x2_s4"])
WHOLE_N = 256
"""Widest row that one program holds for a dynamic scale of its own."""
MAX_RANK_DOWN = 128
"""Largest rank of the next layer's lora_down that a tile's epilogue takes along."""

SHARES, ROWS = tl.constexpr(1), tl.constexpr(2)
"""What the last program of a row tile finishes; 0 for nothing."""


@triton.jit
def _add_shares(shares, t_out, row, row_mask, parts, M, R, RANK: tl.constexpr):
    """t[m, r] = Σ_p shares[p, m, r], in the order of p."""
    rank = tl.arange(0, RANK)
    offset = row[:, None].to(tl.int64) * R + rank[None, :]
    total = tl.zeros((UNIT, RANK), tl.float32)
    shares += offset
    for part in range(0, parts, 8):
        for i in tl.static_range(8):  # eight loads in flight
            ranks = tl.where(part + i < parts, R, 0)
            total += tl.load(shares, mask=row_mask[:, None] & (rank < ranks)[None, :], other=0.0)
            shares += tl.cast(M, tl.int64) * R
    tl.store(t_out + offset, total, mask=row_mask[:, None] & (rank < R)[None, :])


@triton.jit(do_not_specialize=["x_zero_point", "zero_point", "patient"])
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
    scale,  # the quantizing epilogue: see store_codes, and chunked_rows for ROWS
    row_qmax,
    lut,
    out_scale,
    lora_down,  # [R_DOWN, N] or None
    t_out,  # [M, R_DOWN] float32
    shares,  # [column tiles, M, R_DOWN] float32: each tile's share of t (t itself where there is one tile)
    codes,  # [M, N] int8, of ROWS
    norm_weight,  # [N] or None
    norm_bias,  # [N] or None
    counters,  # [row tiles, COUNTERS] int32; None where nothing is left to finish
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
    eps,
    patient,  # the first program that no other is queued behind
    ACTIVATION: tl.constexpr,
    QUANTIZE: tl.constexpr,
    PACKED: tl.constexpr,
    SWAP: tl.constexpr,
    EVEN_K: tl.constexpr,
    RANK: tl.constexpr,
    RANK_DOWN: tl.constexpr,
    TILE_GROUPS: tl.constexpr,
    SCALES: tl.constexpr,
    FINISH: tl.constexpr,
    NORM: tl.constexpr,
    SUBSPACE: tl.constexpr,
    FINISH_K: tl.constexpr,
    FINISH_WIDE_K: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    GROUP_M: tl.constexpr,
):
    tile_m, tile_n = tile_of(M, N, BLOCK_M, BLOCK_N, GROUP_M)
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
    acc = accumulate(x, x_row, weight, w_row, w_lut, K, acc, PACKED, SWAP, BLOCK_K, EVEN_K)

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
            tl.store(shares + t_offset, t, mask=(m < M)[:, None] & (rank < R_DOWN)[None, :])
        store_codes(
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

    if FINISH != 0:
        counters += tile_m * COUNTERS
        parts = tl.cdiv(N, BLOCK_N)
        if arrive(counters, parts, tl.program_id(0) >= patient):
            units = tl.cdiv(tl.minimum(M - tile_m * BLOCK_M, BLOCK_M), UNIT)
            unit = take(counters)
            while unit < units:
                rows = tile_m * BLOCK_M + unit * UNIT + tl.arange(0, UNIT)
                if FINISH == SHARES:
                    _add_shares(shares, t_out, rows, rows < M, parts, M, R_DOWN, RANK_DOWN)
                else:
                    chunked_rows(
                        out,
                        rows,
                        rows < M,
                        rows.to(tl.int64) * N,
                        rows < M,
                        1,
                        norm_weight,
                        norm_bias,
                        scale,
                        groups if SCALES == 1 else 0,
                        row_qmax,
                        lut,
                        lora_down,
                        codes,
                        out_scale,
                        t_out,
                        N,
                        R_DOWN,
                        groups,
                        width,
                        N * 1.0,
                        eps,
                        low,
                        high,
                        zero_point,
                        NORM,
                        SUBSPACE,
                        RANK_DOWN,
                        UNIT,
                        FINISH_K,
                        FINISH_WIDE_K,
                    )
                unit = take(counters)
        leave(counters, parts)


def _configure(device: torch.device, kind: str, m: int, n: int, k: int) -> tuning.Config:
    """The table's tiles, cut down to what the shape can fill."""
    config = tuning.lookup(device, kind, m, n)
    block_m, block_n, block_k = min(config.block_m, power_of_2(m, 16)), config.block_n, config.block_k
    if k % 16 and not host.INTERPRETED:  # no loads of 16 bytes: addresses take the registers of a large tile
        block_m, block_n, block_k = min(block_m, 16), min(block_n, 32), min(block_k, 64)
    block_k = 128 if kind.startswith("w4") else min(block_k, power_of_2(k, 32))
    return replace(config, block_m=block_m, block_n=block_n, block_k=block_k)


@dataclass(frozen=True)
class _Quant:
    """The quantizing epilogue of a launch: tensors of ``_product`` by their names, and what the tiles do about them."""

    tensors: dict[str, Tensor | None]
    rank: int = 0
    groups: int = 1
    clamp: tuple[float, float, int] = (0.0, 0.0, 0)
    tile_groups: int = 1
    finish: int = 0
    norm_eps: float | None = None
    subspace: bool = False


_NO_QUANT = _Quant({})
_TILE_TENSORS = ("scale", "row_qmax", "lut", "out_scale", "lora_down", "t_out", "shares")
_QUANT_TENSORS = (*_TILE_TENSORS, "codes", "norm_weight", "norm_bias")


def _launch(
    x: Tensor,
    scales: tuple[Tensor, int, Tensor] | None,
    weight: tuple[Tensor, int, Tensor | None, Tensor],
    tail: tuple,
    out: Tensor,
    config: tuning.Config,
    n: int,
    quant: _Quant = _NO_QUANT,
) -> None:
    """One ``_product``: ``scales`` are (x_scale, x_zero_point, col_sum)."""
    rows = host.rows_of(x, contiguous_columns=True)
    m, k = rows.m, rows.k
    x_scale, x_zero_point, col_sum = scales or (None, 0, None)
    data, layout, w_lut, w_scale = weight
    lora_t, bias, lora_up, activation, layer_scale, residual = tail
    packed = layout in _INT4
    scale = quant.tensors.get("scale")
    rank = 0 if lora_up is None else lora_up.shape[1]
    if rank == 0:
        lora_t = lora_up = None
    row_tiles = ceil_div(m, config.block_m)
    programs = row_tiles * ceil_div(n, config.block_n)
    counters = host.counters(row_tiles * COUNTERS.value, x.device) if quant.finish else None
    arguments = (
        *rows.arguments[:4],
        None if x_scale is None else x_scale.reshape(-1).contiguous(),
        0 if x_scale is None or x_scale.numel() == 1 else 1,
        x_zero_point,
        data,
        data.stride(0),
        None if x_zero_point == 0 else host.dense(col_sum),
        _words(w_lut),
        w_scale.contiguous(),
        host.dense(lora_t),
        host.dense(lora_up),
        host.dense(bias),
        host.dense(layer_scale),
        host.dense(residual),
        out,
        *map(quant.tensors.get, _QUANT_TENSORS),
        counters,
        m,
        n,
        k,
        rank,
        quant.rank,
        quant.groups,
        n // quant.groups,
        *quant.clamp,
        quant.norm_eps or 0.0,
        max(0, programs - host.processors(x.device)),
    )
    # A float32 branch multiplies three times: a slice of 16 ranks is what fits beside the accumulators.
    most = 16 if lora_up is not None and lora_up.dtype == torch.float32 else 64
    by_rows = quant.finish == ROWS
    constants = (
        activation,
        out.dtype == torch.int8,
        packed,
        bool(config.swap),
        k % config.block_k == 0,
        power_of_2(rank, 16, most),
        power_of_2(quant.rank, 16),
        quant.tile_groups,
        0 if scale is None or scale.numel() == 1 else 1 if scale.dim() == 2 else 2,
        quant.finish,
        quant.norm_eps is not None,
        quant.subspace,
        chunk_columns(quant.rank) if by_rows else 0,
        power_of_2(n, 16, WIDE_ROW * config.num_warps >> quant.subspace) if by_rows else 0,
        config.block_m,
        config.block_n,
        config.block_k,
        config.group_m,
    )
    options = {"num_warps": config.num_warps, "num_stages": config.num_stages}
    host.launch(_product, (programs,), (*arguments, *constants), x.device, **options)


def _words(lut: Tensor | None) -> Tensor | None:
    """The table of levels where kernels can read it as words of four bytes."""
    lut = host.dense(lut)
    return lut.clone() if lut is not None and lut.data_ptr() % 4 else lut


def _kind(layout: int, weight_only: bool) -> str:
    if layout not in (*_INT4, LAYOUT_IDS["int8"]):
        raise ValueError(f"layout is {layout}, expected that of {' or '.join(LAYOUTS)}")
    return ("w4" if layout in _INT4 else "w8") + ("_float" if weight_only else "")


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


def _hold_groups(config: tuning.Config, n: int, groups: int, shared: int) -> tuple[tuning.Config, int] | None:
    """Tiles that each hold whole column groups, and how many; None if no tile can.

    ``shared``: bytes that a program may have for the stages of its pipeline (of which one is in registers).
    """
    width = n // groups
    if width & (width - 1) == 0 and width <= WHOLE_N:
        wide = max(config.block_n, width)
    elif groups == 1 and n <= WHOLE_N:
        wide = width = power_of_2(n, 16)
    else:
        return None
    if wide > config.block_n:  # the same number of outputs per program, and as many stages as then fit
        block_m = max(16, config.block_m * config.block_n // wide)
        stages = min(config.num_stages, 1 + shared // ((block_m + wide) * config.block_k))
        config = replace(config, block_m=block_m, block_n=wide, num_stages=max(2, stages))
    return config, config.block_n // width


def _quantized(
    product: tuple, norm: tuple[Tensor | None, Tensor | None, float] | None, out: Tensor | None, quant: tuple
) -> tuple[Tensor, Tensor, Tensor]:
    """(codes, scales, t) of the flat arguments ``product``, or of the LayerNorm (γ, β, eps) of their ``out``."""
    x, x_scale, x_zero_point, lora_t, weight, layout, n, k, col_sum, w_lut, w_scale, *tail = product
    scale, zero_point, qmin, qmax, groups, row_qmax, lut, lora_down, subspace = quant
    device, f32 = x.device, torch.float32
    m = math.prod(x.shape[:-1])
    rank = quantize_triton.rank_of(lora_down)
    codes = torch.empty((*x.shape[:-1], n), dtype=torch.int8, device=device)
    out_scale = torch.empty((m, groups) if scale is None else (0,), dtype=f32, device=device)
    t = torch.empty((m, rank) if lora_down is not None else (0,), dtype=f32, device=device)
    if m == 0:
        return codes, out_scale, t
    config, tile_groups = _configure(device, _kind(layout, False), m, n, k), 1
    held = None if scale is not None else _hold_groups(config, n, groups, host.shared_memory(device))
    by_tile = held is not None if scale is None else scale.dim() == 1 or groups == 1
    shares, finish = None, ROWS.value
    if by_tile and norm is None and not subspace and rank <= MAX_RANK_DOWN:
        config, tile_groups = held or (config, 1)
        parts = ceil_div(n, config.block_n)
        finish = SHARES.value if rank and parts > 1 else 0
        shares = torch.empty((parts, m, rank), dtype=f32, device=device) if finish else t
        out = codes
    elif out is None:
        out = torch.empty((m, n), dtype=f32, device=device)
    gamma, beta, eps = norm or (None, None, None)
    tensors = {
        "scale": host.dense(scale),
        "row_qmax": host.dense(row_qmax),
        "lut": host.dense(lut),
        "out_scale": out_scale,
        "lora_down": host.dense(lora_down) if rank else None,
        "t_out": t,
        "shares": shares,
        "codes": codes if finish == ROWS else None,
        "norm_weight": host.dense(gamma),
        "norm_bias": host.dense(beta),
    }
    clamp = (float(qmin - zero_point), float(qmax - zero_point), zero_point)
    prepared = _Quant(tensors, rank, groups, clamp, tile_groups, finish, eps, subspace and rank > 0)
    scales = (x_scale, x_zero_point, col_sum)
    _launch(x, scales, (weight, layout, w_lut, w_scale), (lora_t, *tail), out, config, n, prepared)
    return codes, out_scale, t


def qlinear_quantize(*args) -> tuple[Tensor, Tensor, Tensor]:
    product, quant = args[:-9], args[-9:]
    if product[6] == 0:
        return quantize_triton.quantize(qlinear(*product, torch.float32), *quant)
    return _quantized(product, None, None, quant)


def qlinear_norm_quantize(*args) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    *product, out_dtype, norm_weight, norm_bias, eps = args[:-9]
    x, n = product[0], product[6]
    y = torch.empty((*x.shape[:-1], n), dtype=out_dtype, device=x.device)
    return y, *_quantized(tuple(product), (norm_weight, norm_bias, eps), y, args[-9:])
