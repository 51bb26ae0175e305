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

``qattention_quantize`` is one launch for static scales (not per row and group) and for dynamic ones of each head,
without ``lora_down``; otherwise the float32 result goes through ``quantize``. Levels need no table where they are the
codes or, with b1 = 0, follow the square law; other tables are read through the first-level cache, a byte a score.
"""

from __future__ import annotations

from functools import lru_cache

import torch
import triton
import triton.language as tl
from torch import Tensor

from ... import tuning
from ...triton import host
from ...triton.device import narrow
from ...triton.host import ceil_div, power_of_2
from ..qlinear.triton import _store_codes
from ..quantize import triton as quantize_triton
from .tiles import (
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


@triton.jit(do_not_specialize=["G", "windows", "tokens", "M", "zero_point"])
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
    k_scale,
    v_scale,
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
    scale,  # the quantizing epilogue: see _store_codes
    row_qmax,
    lut,
    out_scale,
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
    row_factor = load_scale(q_scale, b, h, i, H, Nq, Q_SCALES) * factor
    if K_SCALES != 2:
        row_factor *= load_scale(k_scale, b, h, 0, H, Nk, K_SCALES)
    row_factor = tl.broadcast_to(positive(row_factor), (BLOCK_M,))
    if not PRODUCT:
        q = load_codes(q + b.to(tl.int64) * q_image + h.to(tl.int64) * q_head, i, q_row, Nq, col, d)
    tile = (q, k, k_row, i, col, Nq, Nk, d)
    scaling = (k_scale, b, h, H, row_factor)
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
        largest = largest_scale(v_scale, b, h, H, Nk, V_SCALES, BLOCK_N)
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
            values = load_values(v, v_row, v_scale, largest, b, h, H, first, Nk, col, d, V_SCALES, BLOCK_N, BLOCK_D)
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

        row = i
        if scatter is not None:
            row = tl.load(scatter + b % windows * Nq + i, mask=i < Nq, other=-1)
        m = tl.where((i < Nq) & (row >= 0), b // windows * tokens + row, M)
        N = H * d
        c = tl.where(col < d, h * d + col, N)
        if QUANTIZE:
            _store_codes(
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


def _dense(p: Tensor | None) -> Tensor | None:
    return None if p is None else p.contiguous()


def _scales(scale: Tensor) -> tuple[Tensor, int]:
    """``scale`` and its form as the kernel knows it: 0 per tensor, 1 per head, 2 per token."""
    return scale.contiguous(), 2 if scale.dim() == 3 else 0 if scale.numel() == 1 else 1


_PLAIN = (None, 0, 0, 0, None, 0, 0, 0, 1)


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
    epilogue: tuple = (None, None, None, None),
    sizes: tuple = (0, 1, 0),
    clamp: tuple = (0.0, 0.0, 0),
) -> None:
    """One ``_attention``; ``shape`` is (B, H, Nq, Nk, d), ``sizes`` are (M, groups, their width)."""
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
    tensors, kinds = zip(*map(_scales, scales))
    (exponent, *floats), constants = focus
    scale = epilogue[0]
    arguments = (
        *operands,
        *tensors,
        levels,
        *additive,
        *windows,
        out,
        total,
        *epilogue,
        *sizes[:1],
        h,
        nq,
        nk,
        *sizes[1:],
        softmax_scale * exponent,
        exponent,
        *floats,
        *clamp,
        total is not None,
        out.dtype == torch.int8,
        *kinds,
        *constants,
        0 if scale is None or scale.numel() == 1 else 1 if scale.dim() == 2 else 2,
        whole,
        block_m,
        block_n,
        d,
        power_of_2(d, 32),
    )
    grid = (ceil_div(nq, block_m) * h * b,)
    warps = max(1, config.num_warps * block_m // config.block_m)
    host.launch(_attention, grid, arguments, out.device, num_warps=warps, num_stages=config.num_stages)


def _attend(arguments: tuple, dtype: torch.dtype, epilogue: tuple = (), groups: int = 1, clamp: tuple = ()) -> Tensor:
    """Output rows of the flat ``arguments`` up to ``tokens``: floats, or int8 codes made by the rest."""
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
            epilogue or (None,) * 4,
            (images * tokens, groups, h * d // groups),
            clamp or (0.0, 0.0, 0),
        )
    return out


def _with_windows(arguments: tuple) -> tuple:
    """The flat arguments up to ``tokens`` for a caller that ends at ``mask``."""
    return arguments if len(arguments) == 19 else (*arguments, None, 0)


def qattention(*arguments) -> Tensor:
    *arguments, out_dtype = arguments
    return _attend(_with_windows(tuple(arguments)), out_dtype)


def qattention_quantize(*arguments) -> tuple[Tensor, Tensor, Tensor]:
    arguments, quant = _with_windows(arguments[:-9]), arguments[-9:]
    scale, zero_point, qmin, qmax, groups, row_qmax, lut, lora_down, _ = quant
    q, k = arguments[:2]
    # A head's program has what it takes for static scales, and for dynamic ones that are the head's own.
    whole = groups == q.shape[1] if scale is None else scale.dim() == 1 or groups == 1
    if lora_down is not None or not whole or q.numel() == 0 or k.shape[2] == 0:
        return quantize_triton.quantize(_attend(arguments, torch.float32), *quant)
    scatter, tokens = arguments[17:]
    rows = q.shape[0] * q.shape[2]
    if scatter is not None:
        rows = rows // scatter.numel() * tokens
    absent = torch.empty(0, dtype=torch.float32, device=q.device)
    out_scale = torch.empty((rows, groups), dtype=torch.float32, device=q.device) if scale is None else absent
    epilogue = (_dense(scale), _dense(row_qmax), _dense(lut), out_scale)
    clamp = (float(qmin - zero_point), float(qmax - zero_point), zero_point)
    return _attend(arguments, torch.int8, epilogue, groups, clamp), out_scale, absent


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
