"""Triton kernel of ``qattention``, ``qattention_quantize`` and the float stage ``focus_position``.

Roofline of a head: 4·Nq·Nk·d integer operations (6 where levels exceed 127: the sums of V come from the tensor core,
too), Nq·Nk exponentials (twice that in two passes with Σ e), d·(Nq + 2·Nk) bytes of codes and d·Nq·b of output. Floor:
the largest of operations / 1979 TOPS, exponentials / 16 a clock and processor, and bytes / 4.3 TB/s. B=32, H=12, N=197,
d=64: 5.7 G operations, 2.9 µs; 14.9 M exponentials, 4 µs; 20 MB, 4.7 µs. None of these binds: quantizing a score takes
about 30 ordinary instructions (ahead-of-time builds), and tiles pad 197 to 256 both ways, 25 M scores: 25 to 30 µs of
issue at 128 lanes a clock and processor. Instructions per score, and rows not padded, are what there is to gain.

One kernel, ``_attention``: BLOCK_M queries of a head per program. Up to ``WHOLE_KEYS`` keys a row of scores stays in
registers; beyond, a first pass over blocks of keys finds the row's maximum and Σ e, a second one does the products
again and accumulates P·V in int32. Products leave the tensor core as floats (see ``score_values``), codes leave a float
addition as bytes. Levels above 127 go in less 128, and 128·Σ V' is added back.

int8 tensor cores want both operands with keys side by side. V is turned by words of four keys on its way to shared
memory: ``tl.dot(p, v)`` of V as loaded stores single bytes on sm_90 (255 registers and spills at 64 rows; now 204 to
231) and loads them on sm_80 (520 loads of a byte a thread; now 34 ldmatrix). P is operand A straight from its registers
on sm_90, which the transposed product would have to pass through shared memory.

``qattention_quantize`` is one launch, too. A head's tile has what it takes for static scales (not per row and group)
and for dynamic ones of each head; scales over all heads, t and ``subspace`` need whole rows, which go to a float32
workspace and are finished by the last head of a block of queries to arrive (see ``fixup``). Levels need no table
where they are the codes or, with b1 = 0, follow the square law; other tables are read through the first-level cache,
a byte a score.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from functools import lru_cache

import torch
import triton
import triton.language as tl
from torch import Tensor

from ... import tuning
from ...triton import host
from ...triton.device import narrow
from ...triton.fixup import COUNTERS, arrive, leave, take
from ...triton.host import ceil_div, power_of_2
from ..quantize import triton as quantize_triton
from ..quantize.triton import UNIT, WIDE_ROW, chunk_columns, chunked_rows, rank_of, store_codes
from .triton_tile import (
    exponents,
    finite,
    larger,
    largest_scale,
    load_codes,
    load_scale,
    load_values,
    look_up,
    mass,
    place,
    positive,
    row_max,
    score_values,
)

WHOLE_KEYS = 256
"""Longest row of scores held in registers: half of it for d > 64, a quarter with bias or mask, which come beside it."""
MAX_HEAD_DIM = 128
"""Largest d whose tiles fit; products then stay below 2^22, which ``score_values`` counts on."""

_LOG2_E = 1.4426950408889634
CODES, SQUARES, TABLE = range(3)
"""What the level of code c is: c, rne(grid·(c/n)²), levels[c]."""


@triton.jit
def _output_row(i, b, scatter, windows, tokens, Nq, M):
    """The rows of the result that queries i of image (or window) b go to; M: nowhere."""
    row = i
    if scatter is not None:
        row = tl.load(scatter + b % windows * Nq + i, mask=i < Nq, other=-1)
    return tl.where((i < Nq) & (row >= 0), b // windows * tokens + row, M)


@triton.jit(do_not_specialize=["query_image", "key_image", "G", "windows", "tokens", "M", "zero_point", "patient"])
def _attention(
    q,  # [B, H, Nq, d] int8, or None
    q_image,
    q_head,
    q_row,
    k,  # [B, H, Nk, d] int8, or [B, H, Nq, Nk] int32 products q·kᵀ
    k_image,
    k_head,
    k_row,
    v,  # [B, H, Nk, d] int8
    v_image,
    v_head,
    v_row,
    q_scale,  # [1], [H] or [B, H, Nq] float32 (Q_SCALES = 0, 1, 2)
    query_image,  # strides of the third form
    query_head,
    query_token,
    k_scale,
    v_scale,
    key_image,
    key_head,
    key_token,
    levels,  # [n + 1] uint8
    bias,  # [H, Nq, Nk] or None
    bias_head,
    bias_row,
    bias_col,
    mask,  # [G, 1 or Nq, Nk] or None
    mask_image,
    mask_row,
    mask_col,
    G,
    scatter,  # [windows·Nq] int32 or None
    windows,
    tokens,
    out,  # [M, H·d] floats or int8 codes, or [B, H, Nq, Nk] float32 positions
    total_out,  # [B, H, Nq] float32, with positions
    scale,  # the quantizing epilogue: see store_codes, and chunked_rows for FINISH
    row_qmax,
    lut,
    out_scale,
    lora_down,  # [R, H·d] or None
    t_out,  # [M, R] float32
    codes,  # [M, H·d] int8, of FINISH
    counters,  # [B·tiles of queries, COUNTERS] int32; None without FINISH
    M,
    H,
    Nq,
    Nk,
    groups,
    width,
    factor,  # softmax_scale in units of the exponent of 2
    exponent,  # log2 e, over the power if DIRECT
    gain,
    shift,
    power,
    inverse_power,
    level_gain,
    step,
    offset,
    low,
    high,
    zero_point,
    R,
    patient,  # the first program that no other is queued behind
    PRODUCT: tl.constexpr,  # ``k`` is the product, results are positions
    QUANTIZE: tl.constexpr,
    Q_SCALES: tl.constexpr,
    K_SCALES: tl.constexpr,
    V_SCALES: tl.constexpr,
    ROW: tl.constexpr,
    RENORMALIZE: tl.constexpr,
    TOP: tl.constexpr,  # n, the largest code
    POWER: tl.constexpr,
    DIRECT: tl.constexpr,  # b1 = 0
    CUT: tl.constexpr,  # b2 < 1
    OFFSET: tl.constexpr,
    DECODE: tl.constexpr,
    SHIFT: tl.constexpr,
    SCALES: tl.constexpr,
    FINISH: tl.constexpr,
    SUBSPACE: tl.constexpr,
    RANK: tl.constexpr,
    FINISH_K: tl.constexpr,
    FINISH_WIDE_K: tl.constexpr,
    WHOLE: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    d: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    tiles = (Nq + BLOCK_M - 1) // BLOCK_M
    i = (tl.program_id(0) % tiles) * BLOCK_M + tl.arange(0, BLOCK_M)
    h = tl.program_id(0) // tiles % H
    b = tl.program_id(0) // tiles // H
    col = tl.arange(0, BLOCK_D)
    k += b.to(tl.int64) * k_image + h.to(tl.int64) * k_head
    ADDITIVE: tl.constexpr = bias is not None or mask is not None
    TOTAL: tl.constexpr = PRODUCT or not (ROW and RENORMALIZE)  # Σ e is asked for
    MASS: tl.constexpr = POWER if DIRECT else 1
    strides = (key_image, key_head, key_token)
    row_factor = load_scale(q_scale, (query_image, query_head, query_token), b, h, i, Nq, Q_SCALES) * factor
    if K_SCALES != 2:
        row_factor *= load_scale(k_scale, strides, b, h, 0, Nk, K_SCALES)
    row_factor = tl.broadcast_to(positive(row_factor), (BLOCK_M,))
    if not PRODUCT:
        q = load_codes(q + b.to(tl.int64) * q_image + h.to(tl.int64) * q_head, i, q_row, Nq, col, d)
    tile = (q, k, k_row, i, col, Nq, Nk, d)
    scaling = (k_scale, key_image, key_head, key_token, b, h, row_factor)
    additive = (bias, bias_head, bias_row, bias_col, mask, mask_image, mask_row, mask_col, G, exponent)

    total = tl.zeros((BLOCK_M,), tl.float32)
    if WHOLE:
        value = score_values(0, tile, scaling, additive, PRODUCT, K_SCALES, BLOCK_N)
        top = row_max(value)
        if TOTAL:
            x = exponents(value, finite(top)[:, None], row_factor[:, None], ADDITIVE)
            total = tl.sum(mass(x, power, MASS), 1)
    else:
        top = tl.full((BLOCK_M,), -float("inf"), tl.float32)
        for first in range(0, Nk, BLOCK_N):
            seen = score_values(first, tile, scaling, additive, PRODUCT, K_SCALES, BLOCK_N)
            higher = larger(top, row_max(seen))
            if TOTAL:
                base = finite(higher)
                x = exponents(seen, base[:, None], row_factor[:, None], ADDITIVE)
                total *= mass(exponents(top, base, row_factor, ADDITIVE), power, MASS)
                total += tl.sum(mass(x, power, MASS), 1)
            top = higher
    base = finite(top)[:, None]

    if PRODUCT:
        row = (b.to(tl.int64) * H + h) * Nq + i
        tl.store(total_out + row, total, mask=i < Nq)
    else:
        v += b.to(tl.int64) * v_image + h.to(tl.int64) * v_head
        largest = largest_scale(v_scale, strides, b, h, Nk, V_SCALES, BLOCK_N)
        acc = tl.zeros((BLOCK_M, BLOCK_D), tl.int32)
        valid_acc = tl.zeros((BLOCK_M, BLOCK_D), tl.int32)
        level_sum = tl.zeros((BLOCK_M,), tl.int32)
        count = tl.full((BLOCK_M,), 0 if ADDITIVE else Nk, tl.int32)
    for first in range(0, BLOCK_N if WHOLE else Nk, BLOCK_N):
        if not WHOLE:
            value = score_values(first, tile, scaling, additive, PRODUCT, K_SCALES, BLOCK_N)
        t = tl.exp2(exponents(value, base, row_factor[:, None], ADDITIVE))
        position = place(t, total, gain, shift, inverse_power, TOP, POWER, DIRECT, CUT, ROW)
        if PRODUCT:
            j = first + tl.arange(0, BLOCK_N)
            tl.store(out + row[:, None] * Nk + j[None, :], position, mask=(i < Nq)[:, None] & (j < Nk)[None, :])
        else:
            level = look_up(position, levels, level_gain, TOP, DECODE, SHIFT)
            if DECODE == 2 and not DIRECT:  # anywhere else a key that does not count has level 0 already
                level = tl.where(value != -float("inf"), level, -SHIFT)
            if RENORMALIZE:
                level_sum += tl.sum(level, 1) + SHIFT * BLOCK_N
            values = load_values(
                v, v_row, v_scale, strides, largest, b, h, first, Nk, col, d, V_SCALES, BLOCK_N, BLOCK_D
            )
            if SHIFT != 0 or (OFFSET and not ADDITIVE):
                ones = tl.full((BLOCK_M, BLOCK_N), 1, tl.int8)
                column_sums = tl.dot(ones, values, out_dtype=tl.int32)
                acc += SHIFT * column_sums
            acc = tl.dot(level.to(tl.int8), values, acc, out_dtype=tl.int32)
            if OFFSET:
                if ADDITIVE:
                    valid = (value != -float("inf")).to(tl.int8)
                    valid_acc = tl.dot(valid, values, valid_acc, out_dtype=tl.int32)
                    count += tl.sum(valid.to(tl.int32), 1)
                else:
                    valid_acc += column_sums

    if not PRODUCT:
        y = acc.to(tl.float32) * step
        if OFFSET:
            y += valid_acc.to(tl.float32) * offset
        if RENORMALIZE:
            denominator = level_sum.to(tl.float32) * step
            if OFFSET:
                denominator += count.to(tl.float32) * offset
        elif ROW:
            denominator = total
        else:
            denominator = tl.full((BLOCK_M,), 1.0, tl.float32)
        scale_back = tl.where(denominator == 0.0, 0.0, tl.div_rn(largest, denominator))
        # A score of +inf makes NaN, too: inf − inf.
        scale_back = tl.where((top < float("inf")) & (row_factor < float("inf")), scale_back, float("nan"))
        y = tl.where((top == -float("inf"))[:, None], 0.0, y * scale_back[:, None])

        m = _output_row(i, b, scatter, windows, tokens, Nq, M)
        N = H * d
        c = tl.where(col < d, h * d + col, N)
        if QUANTIZE:
            store_codes(
                y,
                m,
                c,
                h,
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
                BLOCK_D,
                1,
                SCALES,
            )
        else:
            inside = (m < M)[:, None] & (c < N)[None, :]
            tl.store(out + m.to(tl.int64)[:, None] * N + c[None, :], narrow(y, out.dtype.element_ty), mask=inside)
        if FINISH:
            first_query = (tl.program_id(0) % tiles) * BLOCK_M
            counters += (b * tiles + tl.program_id(0) % tiles) * COUNTERS
            if arrive(counters, H, tl.program_id(0) >= patient):
                units = tl.cdiv(tl.minimum(Nq - first_query, BLOCK_M), UNIT)
                unit = take(counters)
                while unit < units:
                    query = first_query + unit * UNIT + tl.arange(0, UNIT)
                    rows = _output_row(query, b, scatter, windows, tokens, Nq, M)
                    chunked_rows(
                        out,
                        rows,
                        rows < M,
                        rows.to(tl.int64) * N,
                        rows < M,
                        1,
                        None,
                        None,
                        scale,
                        groups if SCALES == 1 else 0,
                        row_qmax,
                        lut,
                        lora_down,
                        codes,
                        out_scale,
                        t_out,
                        N,
                        R,
                        groups,
                        width,
                        0.0,
                        0.0,
                        low,
                        high,
                        zero_point,
                        False,
                        SUBSPACE,
                        RANK,
                        UNIT,
                        FINISH_K,
                        FINISH_WIDE_K,
                    )
                    unit = take(counters)
            leave(counters, H)


@lru_cache(maxsize=256)
def _focus(
    n: int, step: float, offset: float, b1: float, b2: float, power: float, row_anchor: bool, renormalize: bool
) -> tuple[tuple[float, ...], tuple]:
    """What a FocusSpec comes to: the kernel's arguments exponent .. offset, and its constants ROW .. SHIFT."""
    direct = b1 == 0.0
    exponent = _LOG2_E / (power if direct else 1.0)
    inside = {1.0: n, 2.0: n * n}.get(power, 1)  # n^power, as far as it goes inside the root
    gain = n * b2 ** (-1.0 / power) if direct else inside / (b2 - b1)
    shift = 0.0 if direct else -b1 / (b2 - b1) * inside
    affine = power == 1.0 and offset == b1
    grid = n if affine else round(b2 / step)
    decode = CODES if affine else SQUARES if power == 2.0 and direct else TABLE
    floats = (exponent, gain, shift, power, 1.0 / power, grid / n**2, step, offset)
    known = int(power) if power in (1.0, 2.0) else 0
    law = (known, direct, b2 < 1.0)
    constants = (row_anchor, renormalize, n, *law, offset != 0.0, decode, 0 if grid <= 127 else 128)
    return tuple(map(float, floats)), constants


def _strides(x: Tensor, dims: int) -> tuple[int, ...]:
    """The first ``dims`` strides, 0 along a single entry: any other number would be as right, and compiled anew."""
    return tuple(0 if size == 1 else stride for size, stride in zip(x.shape[:dims], x.stride()))


def _codes(x: Tensor) -> tuple:
    """(x, its strides but the last), copied only where the last is not 1."""
    if x.stride(-1) != 1 and x.shape[-1] > 1:
        x = x.contiguous()
    return (x, *_strides(x, 3))


def _form(scale: Tensor) -> int:
    """Of a scale: 0 per tensor, 1 per head, 2 per token."""
    return 2 if scale.dim() == 3 else 0 if scale.numel() == 1 else 1


def _scales(scales: Iterable[Tensor]) -> tuple[tuple, list[int]]:
    """The kernel's arguments q_scale .. key_token for scales of q, k and v, and their forms.

    Views of one fused result are read where they are; k's and v's are copied where their strides differ.
    """
    q, k, v = (s if s.dim() == 3 else s.contiguous() for s in scales)
    if k.dim() == v.dim() == 3 and _strides(k, 3) != _strides(v, 3):
        k, v = k.contiguous(), v.contiguous()
    per_key = k if k.dim() == 3 else v
    own, keys = (_strides(s, 3) if s.dim() == 3 else (0, 0, 0) for s in (q, per_key))
    return (q, *own, k, v, *keys), [_form(s) for s in (q, k, v)]


_PLAIN = (None, 0, 0, 0, None, 0, 0, 0, 1)


@dataclass(frozen=True)
class _Quant:
    """The quantizing epilogue of a launch; ``finish`` where it needs whole rows, which then are ``out``'s floats."""

    scale: Tensor | None = None
    row_qmax: Tensor | None = None
    lut: Tensor | None = None
    out_scale: Tensor | None = None
    lora_down: Tensor | None = None
    t: Tensor | None = None
    codes: Tensor | None = None
    groups: int = 1
    clamp: tuple[float, float, int] = (0.0, 0.0, 0)
    finish: bool = False
    subspace: bool = False

    @property
    def tensors(self) -> tuple[Tensor | None, ...]:
        return (
            self.scale, self.row_qmax, self.lut, self.out_scale, self.lora_down, self.t, self.codes
        )  # fmt: skip


_NO_QUANT = _Quant()


def _additive(bias: Tensor | None, mask: Tensor | None) -> tuple:
    if bias is None and mask is None:
        return _PLAIN
    first = _PLAIN[:4] if bias is None else (bias, *_strides(bias, 3))
    return (*first, *(_PLAIN[4:] if mask is None else (mask, *_strides(mask, 3), mask.shape[0])))


def _launch(
    shape: tuple[int, ...],
    operands: tuple,
    scales: tuple[Tensor | None, ...],
    softmax_scale: float,
    levels: Tensor | None,
    focus: tuple[tuple[float, ...], tuple],
    additive: tuple,
    windows: tuple,
    out: Tensor,
    total: Tensor | None = None,
    m: int = 0,
    quant: _Quant = _NO_QUANT,
) -> None:
    """One ``_attention``; ``shape`` is (B, H, Nq, Nk, d), ``m`` the rows of ``out``."""
    if softmax_scale < 0.0:
        raise ValueError(f"softmax_scale is {softmax_scale}, the triton back end expects a number >= 0")
    b, h, nq, nk, d = shape
    plain = additive is _PLAIN
    whole = nk <= (WHOLE_KEYS // 4 if not plain else WHOLE_KEYS // 2 if d > 64 else WHOLE_KEYS)
    config = tuning.attention(out.device, nk, d)
    # Positions come and go through shared memory, four bytes each.
    block_m = min(config.block_m if total is None else min(config.block_m, 64), power_of_2(nq, 16))
    # Bias and mask are read element by element where Nk is odd: their addresses take registers, too.
    block_n = power_of_2(nk, 32) if whole else config.block_n if plain else min(config.block_n, 32)
    scales, forms = _scales(scales)
    (exponent, *floats), constants = focus
    scale = quant.scale
    rank = 0 if quant.lora_down is None else quant.lora_down.shape[0]
    warps = max(1, config.num_warps * block_m // config.block_m)
    tiles = ceil_div(nq, block_m) * b
    counters = host.counters(tiles * COUNTERS.value, out.device) if quant.finish else None
    arguments = (
        *operands,
        *scales,
        host.dense(levels),
        *additive,
        *windows,
        out,
        total,
        *quant.tensors,
        counters,
        m,
        h,
        nq,
        nk,
        quant.groups,
        h * d // quant.groups,
        softmax_scale * exponent,
        exponent,
        *floats,
        *quant.clamp,
        rank,
        max(0, tiles * h - host.processors(out.device)),
        total is not None,
        out.dtype == torch.int8,
        *forms,
        *constants,
        0 if scale is None or scale.numel() == 1 else 1 if scale.dim() == 2 else 2,
        quant.finish,
        quant.subspace,
        power_of_2(rank, 16),
        chunk_columns(rank) if quant.finish else 0,
        power_of_2(h * d, 16, WIDE_ROW * warps >> 1) if quant.finish else 0,
        whole,
        block_m,
        block_n,
        d,
        power_of_2(d, 32),
    )
    host.launch(_attention, (tiles * h,), arguments, out.device, num_warps=warps, num_stages=config.num_stages)


def _attend(arguments: tuple, dtype: torch.dtype, quant: _Quant = _NO_QUANT) -> Tensor:
    """Output rows of the flat ``arguments`` up to ``tokens``: floats, or the int8 codes of ``quant``."""
    q, k, v, *scales, softmax_scale, levels, step, offset, b1, b2, power, row_anchor, renormalize = arguments[:15]
    bias, mask, scatter, tokens = arguments[15:]
    b, h, nq, d = q.shape
    nk, windows = k.shape[2], 1
    if d > MAX_HEAD_DIM:
        raise ValueError(f"head_dim is {d}, the triton back end serves at most {MAX_HEAD_DIM}")
    if scatter is None:
        tokens = nq
    else:
        scatter, windows = scatter.contiguous(), max(1, scatter.numel() // max(1, nq))
    images = b // windows
    out = torch.empty((images, tokens, h * d), dtype=dtype, device=q.device)
    if nk == 0:
        return out.zero_()
    if out.numel():
        _launch(
            (b, h, nq, nk, d),
            (*_codes(q), *_codes(k), *_codes(v)),
            scales,
            softmax_scale,
            levels,
            _focus(levels.numel() - 1, step, offset, b1, b2, power, row_anchor, renormalize),
            _additive(bias, mask),
            (scatter, windows, tokens),
            out,
            None,
            images * tokens,
            quant,
        )
    return out


def qattention(*arguments) -> Tensor:
    *arguments, out_dtype = arguments
    return _attend(tuple(arguments), out_dtype)


def qattention_quantize(*arguments) -> tuple[Tensor, Tensor, Tensor]:
    arguments, quant = arguments[:-9], arguments[-9:]
    scale, zero_point, qmin, qmax, groups, row_qmax, lut, lora_down, subspace = quant
    q, k, scatter, tokens = *arguments[:2], *arguments[17:]
    if q.numel() == 0 or k.shape[2] == 0:
        return quantize_triton.quantize(_attend(arguments, torch.float32), *quant)
    shape = q.shape[0], q.shape[2], q.shape[1] * q.shape[3]
    if scatter is not None:
        shape = shape[0] * shape[1] // scatter.numel(), tokens, shape[2]
    rows = shape[0] * shape[1]
    rank = rank_of(lora_down)
    # A head's tile has what it takes for static scales, and for dynamic ones that are the head's own.
    by_tile = groups == q.shape[1] if scale is None else scale.dim() == 1 or groups == 1
    finish = not by_tile or rank > 0
    device, f32 = q.device, torch.float32
    out_scale = torch.empty((rows, groups) if scale is None else (0,), dtype=f32, device=device)
    t = torch.empty((rows, rank) if lora_down is not None else (0,), dtype=f32, device=device)
    codes = torch.empty(shape, dtype=torch.int8, device=device) if finish else None
    tensors = (
        host.dense(scale),
        host.dense(row_qmax),
        host.dense(lut),
        out_scale,
        host.dense(lora_down) if rank else None,
        t,
        codes,
    )
    clamp = (float(qmin - zero_point), float(qmax - zero_point), zero_point)
    prepared = _Quant(*tensors, groups, clamp, finish, subspace and rank > 0)
    out = _attend(arguments, f32 if finish else torch.int8, prepared)
    return codes if finish else out, out_scale, t


def focus_position(
    product, q_scale, k_scale, softmax_scale, n, b1, b2, power, row_anchor, renormalize, bias, mask
) -> tuple[Tensor, Tensor]:
    """The float stage of that name: the same kernel over integer products that are known."""
    b, h, nq, nk = product.shape
    product = product if product.stride(-1) == 1 or nk == 1 else product.contiguous()
    position = torch.empty(product.shape, dtype=torch.float32, device=product.device)
    total = torch.zeros(product.shape[:-1], dtype=torch.float32, device=product.device)
    if position.numel():
        _launch(
            (b, h, nq, nk, 32),
            (None, 0, 0, 0, product, *_strides(product, 3), None, 0, 0, 0),
            (q_scale, k_scale, q_scale),
            softmax_scale,
            None,
            _focus(n, 1.0, 0.0, b1, b2, power, row_anchor, renormalize),
            _additive(bias, mask),
            (None, 1, nq),
            position,
            total,
        )
    return position, total
