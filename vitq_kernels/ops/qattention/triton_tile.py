"""Device functions of the attention kernel, in the order in which a tile goes through them: scores, exponentials,
positions, levels, and the V that these multiply.
"""

from __future__ import annotations

import triton
import triton.language as tl

from ...triton.device import INTERPRET, magnitude, round_half_even

_MAGIC = tl.constexpr(0x4B400000)
"""The bits of 1.5·2^23: an int32 below 2^22 added to them makes the float of that much more, exactly."""
_MAGIC_FLOAT = tl.constexpr(12582912.0)
_MINUS_INF = tl.constexpr(-0x800000)  # 0xff800000
_TINY = tl.constexpr(2.0**-126)  # the least normal number


@triton.jit
def load_scale(scale, strides, b, h, i, N, KIND: tl.constexpr):
    """Scales per tensor, per head (KIND 0, 1: a scalar) or of each of the tokens i (2: 0 past the end)."""
    if KIND == 0:
        return tl.load(scale)
    elif KIND == 1:
        return tl.load(scale + h)
    else:
        image, head, token = strides
        return tl.load(scale + b.to(tl.int64) * image + h * head + i * token, mask=i < N, other=0.0)


@triton.jit
def larger(a, b):
    return tl.maximum(a, b, propagate_nan=tl.PropagateNan.ALL)


@triton.jit
def row_max(x):
    """max_j x[:, j]; NaN or Inf where the row has NaN."""
    if INTERPRET:
        return tl.max(tl.where(x == x, x, float("inf")), 1)
    else:
        return tl.reduce(x, 1, larger)


@triton.jit
def load_codes(x, row, row_stride, N, col, d: tl.constexpr):
    """[rows, cols] int8, 0 outside."""
    mask = (row < N)[:, None] & (col < d)[None, :]
    return tl.load(x + row.to(tl.int64)[:, None] * row_stride + col[None, :], mask=mask, other=0)


@triton.jit
def positive(scale):
    """``scale``, but the least normal number for 0, whose product with the −inf of a key past the end would be NaN."""
    return tl.maximum(scale, _TINY, propagate_nan=tl.PropagateNan.ALL)


@triton.jit
def _load_additive(x, outer, outer_stride, row_stride, col_stride, i, j, Nq, Nk):
    """[queries, keys] of bias or mask, 0 outside."""
    at = outer.to(tl.int64) * outer_stride + i.to(tl.int64)[:, None] * row_stride + (j * col_stride)[None, :]
    return tl.load(x + at, mask=(i < Nq)[:, None] & (j < Nk)[None, :], other=0.0).to(tl.float32)


@triton.jit
def score_values(first, tile, scaling, additive, PRODUCT: tl.constexpr, K_SCALES: tl.constexpr, BLOCK_N: tl.constexpr):
    """Scores of BLOCK_N keys from ``first`` on, in units of the exponent of 2; −inf for keys past the end.

    Without bias and mask they lack the row's factor and may be shifted by 1.5·2^23: differences to the row's maximum,
    multiplied by the factor, are then those of exact numbers.
    """
    q, k, k_row, i, col, Nq, Nk, d = tile
    k_scale, image, head, token, b, h, factor = scaling  # flat: triton 3.6 unpacks no tuples in tuples
    strides = (image, head, token)
    bias, bias_head, bias_row, bias_col, mask, mask_image, mask_row, mask_col, G, exponent = additive
    j = first + tl.arange(0, BLOCK_N)
    if PRODUCT:
        inside = (i < Nq)[:, None] & (j < Nk)[None, :]
        product = tl.load(k + i.to(tl.int64)[:, None] * k_row + j[None, :], mask=inside, other=0)
        # A product of zeros is added so that rows lie in registers, and are summed up, as in the attention itself.
        left, right = tl.zeros((i.shape[0], 32), tl.int8), tl.zeros((32, BLOCK_N), tl.int8)
        product = tl.dot(left, right, product, out_dtype=tl.int32).to(tl.float32)
        value = tl.where((j < Nk)[None, :], product + _MAGIC_FLOAT, -float("inf"))
    else:
        # Added to these bits, integers are floats already: nothing to convert, and nothing to mask, for the zeros that
        # are read past the end leave the bits of −inf alone.
        bits = tl.broadcast_to(tl.where(j < Nk, _MAGIC, _MINUS_INF)[None, :], (i.shape[0], BLOCK_N))
        keys = load_codes(k, j, k_row, Nk, col, d)
        value = tl.dot(q, tl.trans(keys), bits, out_dtype=tl.int32).to(tl.float32, bitcast=True)
    if K_SCALES == 2:
        value = (value - _MAGIC_FLOAT) * positive(load_scale(k_scale, strides, b, h, j, Nk, K_SCALES))[None, :]
    if bias is not None or mask is not None:
        if K_SCALES != 2:
            value -= _MAGIC_FLOAT
        value *= factor[:, None]
        if bias is not None:
            added = _load_additive(bias, h, bias_head, bias_row, bias_col, i, j, Nq, Nk)
            value = tl.fma(added, exponent, value)
        if mask is not None:
            added = _load_additive(mask, b % G, mask_image, mask_row, mask_col, i, j, Nq, Nk)
            value = tl.fma(added, exponent, value)
    return value


@triton.jit
def mass(x, power, POWER: tl.constexpr):
    """e, where 2^x is e^(1/power)."""
    t = tl.exp2(x)
    if POWER == 1:
        return t
    elif POWER == 2:
        return t * t
    else:
        return tl.exp2(x * power)


@triton.jit
def finite(top):
    """What is subtracted along a row: its maximum, 0 where that is −inf (a row without keys)."""
    return tl.where(top == -float("inf"), 0.0, top)


@triton.jit
def exponents(value, base, factor, ADDITIVE: tl.constexpr):
    """log2 of what ``score_values`` stands for, over the row's largest."""
    if ADDITIVE:
        return value - base
    else:
        return (value - base) * factor


@triton.jit
def _row_gain(gain, total, inverse_power, POWER: tl.constexpr):
    """gain·total^(−1/power)"""
    if POWER == 1:
        return tl.div_rn(gain, total)
    elif POWER == 2:
        return tl.div_rn(gain, tl.sqrt_rn(total))
    else:
        return gain * tl.exp2(-tl.log2(total) * inverse_power)


@triton.jit
def place(
    t,
    total,
    gain,
    shift,
    inverse_power,
    TOP: tl.constexpr,
    POWER: tl.constexpr,
    DIRECT: tl.constexpr,
    CUT: tl.constexpr,
    ROW: tl.constexpr,
):
    """TOP·clamp((u − b1)/(b2 − b1), 0, 1)^(1/power).

    t is e = exp(score − max), or, if DIRECT, e^(1/power): where b1 = 0 the position is a multiple of that, and needs no
    root. u is e/total, or e itself if ROW.
    """
    if DIRECT:
        if not ROW:
            gain = _row_gain(gain, total, inverse_power, POWER)[:, None]
        # t ≤ 1, of which no rounding makes TOP + 1/2: without b2 nothing is cut off.
        return tl.minimum(t * gain, TOP) if CUT else t * gain
    else:
        # TOP^power inside the root: one multiplication less, and 1 maps to TOP exactly.
        high: tl.constexpr = TOP if POWER == 1 else TOP * TOP if POWER == 2 else 1.0
        if not ROW:
            gain = tl.div_rn(gain, total)[:, None]
        y = tl.minimum(tl.maximum(tl.fma(t, gain, shift), 0.0), high)
        if POWER == 1:
            return y
        elif POWER == 2:
            return tl.sqrt(y)
        else:
            root = tl.exp2(tl.minimum(tl.log2(tl.maximum(y, _TINY)) * inverse_power, 0.0))
            return tl.where(y < _TINY, 0.0, root * TOP)


@triton.jit
def look_up(position, levels, level_gain, TOP: tl.constexpr, DECODE: tl.constexpr, SHIFT: tl.constexpr):
    """Levels of the codes rne(position), less SHIFT, in int32."""
    if DECODE == 2:
        code = (position + _MAGIC_FLOAT).to(tl.int32, bitcast=True) & TOP  # NaN must not reach beyond the table
        return tl.load(levels + code).to(tl.int32) - SHIFT
    else:
        shifted = position + (_MAGIC_FLOAT - SHIFT)
        if DECODE == 1:
            code = round_half_even(position)
            shifted = tl.fma(code * level_gain, code, _MAGIC_FLOAT - SHIFT)
        return shifted.to(tl.int32, bitcast=True) - _MAGIC


@triton.jit
def largest_scale(scale, strides, b, h, N, KIND: tl.constexpr, BLOCK_N: tl.constexpr):
    """max_j scale[b, h, j]; NaN if there is a NaN."""
    if KIND == 2:
        most = tl.zeros((BLOCK_N,), tl.float32)
        for first in range(0, N, BLOCK_N):
            s = load_scale(scale, strides, b, h, first + tl.arange(0, BLOCK_N), N, KIND)
            most = tl.maximum(most, magnitude(s))
        most = tl.max(most, 0)
        return tl.where(most < float("inf"), most, float("nan"))
    else:
        return load_scale(scale, strides, b, h, 0, N, KIND)


@triton.jit
def _load_aligned(v, v_row, scale, strides, top, b, h, j, Nk, col, d, KIND: tl.constexpr):
    """[keys, d] int8 codes of V, on the scale ``top`` where tokens have their own; 0 outside."""
    codes = load_codes(v, j, v_row, Nk, col, d)
    if KIND == 2:
        ratio = tl.div_rn(load_scale(scale, strides, b, h, j, Nk, KIND), top)
        ratio = tl.where(ratio == ratio, ratio, 0.0)
        value = (codes.to(tl.int32) + _MAGIC).to(tl.float32, bitcast=True) - _MAGIC_FLOAT
        codes = (value * ratio[:, None] + _MAGIC_FLOAT).to(tl.int32, bitcast=True).to(tl.int8)
    return codes


@triton.jit
def load_values(
    v,
    v_row,
    scale,
    strides,
    top,
    b,
    h,
    first,
    Nk,
    col,
    d,
    KIND: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    """``_load_aligned`` of BLOCK_N keys, laid out with keys side by side, as int8 tensor cores want them."""
    # Four keys at a time lie side by side in registers: what goes to shared memory is their words, not bytes.
    j = first + 4 * tl.arange(0, BLOCK_N // 4)
    x0 = _load_aligned(v, v_row, scale, strides, top, b, h, j, Nk, col, d, KIND)
    x1 = _load_aligned(v, v_row, scale, strides, top, b, h, j + 1, Nk, col, d, KIND)
    x2 = _load_aligned(v, v_row, scale, strides, top, b, h, j + 2, Nk, col, d, KIND)
    x3 = _load_aligned(v, v_row, scale, strides, top, b, h, j + 3, Nk, col, d, KIND)
    y = tl.reshape(tl.join(tl.join(x0, x2), tl.join(x1, x3)), (BLOCK_N // 4, BLOCK_D, 4))
    return tl.trans(tl.reshape(tl.permute(y, (1, 0, 2)), (BLOCK_D, BLOCK_N)))
