"""Triton back end of the learning ops.

Bound by memory: 8 bytes an element forward and 12 back, 12 for a focused softmax each way. A program takes whole rows,
as many as fill a tile; quantizers pass over wide ones in steps, a softmax keeps its row in registers.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from ...triton import host
from ...triton.device import round_half_even
from ...triton.host import ceil_div, power_of_2

TILE = 1024
DRAW = ["key_low", "key_high", "last"]  # anew in every call: nothing to specialize for


@triton.jit
def _quantized(at, key_low, key_high, last, DROP: tl.constexpr):
    """Where the hash of an element's index, an int32, is above ``last``: see ``ref``."""
    if DROP:
        h = at.to(tl.uint32) + key_low.to(tl.uint32)
        h = ((h ^ (h >> 16)) * 0x7FEB352D) ^ key_high.to(tl.uint32)
        h = (h ^ (h >> 15)) * 0x846CA68B
        return (h ^ (h >> 16)).to(tl.int32, bitcast=True) > last
    else:
        return at == at


@triton.jit
def _bounded(x, low, high):
    """x within [low, high]; NaN stays."""
    return tl.clamp(x, low, high, propagate_nan=tl.PropagateNan.ALL)


@triton.jit
def _row_scale(scale, zero_point, qmin, qmax, row_qmax, row, valid, scales):
    """Scale, its reciprocal and the bounds of rows [BLOCK_R, 1]; the zero point, and whether the clamp holds it."""
    s = tl.load(scale + row % scales, mask=valid, other=1.0)[:, None]
    if zero_point is None:
        zero, held = 0.0, False
    else:
        nearest = round_half_even(tl.load(zero_point))
        zero = _bounded(nearest, qmin, qmax)
        held = zero != nearest
    if row_qmax is None:
        least, most = qmin - zero, qmax - zero
    else:
        most = tl.load(row_qmax + row, mask=valid, other=0).to(tl.float32)[:, None]
        least, most = -most - zero, most - zero
    return s, tl.div_rn(1.0, s), least, most, zero, held


@triton.jit
def _code(within, zero, lut):
    code = round_half_even(within)
    if lut is not None:
        index = round_half_even(code + (zero + 128.0)).to(tl.int32) & 255
        code = tl.load(lut + index).to(tl.float32) - zero
    return tl.where(within == within, code, within)


@triton.jit(do_not_specialize=DRAW)
def _fake_quantize(
    x,  # [R, L]
    scale,  # [scales]
    zero_point,  # [1] or None
    qmin,  # as a float, which Triton never makes a constant of: an integer 1 it does
    qmax,
    row_qmax,  # [R] int32 or None
    lut,  # [256] int8 or None
    y,  # [R, L]
    R,
    L,
    scales,
    key_low,
    key_high,
    last,
    DROP: tl.constexpr,
    BLOCK_R: tl.constexpr,
    BLOCK_L: tl.constexpr,
):
    row = tl.program_id(0) * BLOCK_R + tl.arange(0, BLOCK_R)
    s, inverse, least, most, zero, _ = _row_scale(scale, zero_point, qmin, qmax, row_qmax, row, row < R, scales)
    for start in range(0, L, BLOCK_L):
        col = start + tl.arange(0, BLOCK_L)
        mask = (row < R)[:, None] & (col < L)[None, :]
        at = row[:, None].to(tl.int64) * L + col[None, :]
        v = tl.load(x + at, mask=mask, other=0.0)
        quantized = _code(_bounded(v * inverse, least, most), zero, lut) * s
        tl.store(y + at, tl.where(_quantized(at, key_low, key_high, last, DROP), quantized, v), mask=mask)


@triton.jit(do_not_specialize=DRAW)
def _fake_quantize_backward(
    grad,  # [R, L]
    x,
    scale,
    zero_point,
    qmin,
    qmax,
    row_qmax,
    lut,
    of_x,  # [R, L]
    of_scale,  # [R]
    of_zero,  # [R]
    R,
    L,
    scales,
    key_low,
    key_high,
    last,
    DROP: tl.constexpr,
    BLOCK_R: tl.constexpr,
    BLOCK_L: tl.constexpr,
):
    row = tl.program_id(0) * BLOCK_R + tl.arange(0, BLOCK_R)
    s, inverse, least, most, zero, held = _row_scale(scale, zero_point, qmin, qmax, row_qmax, row, row < R, scales)
    scale_sum = tl.zeros((BLOCK_R, BLOCK_L), tl.float32)
    zero_sum = tl.zeros((BLOCK_R, BLOCK_L), tl.float32)
    for start in range(0, L, BLOCK_L):
        col = start + tl.arange(0, BLOCK_L)
        mask = (row < R)[:, None] & (col < L)[None, :]
        at = row[:, None].to(tl.int64) * L + col[None, :]
        g = tl.load(grad + at, mask=mask, other=0.0)
        ratio = tl.load(x + at, mask=mask, other=0.0) * inverse
        within = _bounded(ratio, least, most)
        inside = within == ratio
        kept = _quantized(at, key_low, key_high, last, DROP)
        error = _code(within, zero, lut) - tl.where(inside, ratio, 0.0)
        scale_sum += tl.where(kept & mask, g * error, 0.0)
        zero_sum -= tl.where(kept & ~inside, g, 0.0)
        tl.store(of_x + at, tl.where(inside | ~kept, g, 0.0), mask=mask)
    tl.store(of_scale + row, tl.sum(scale_sum, 1), mask=row < R)
    tl.store(of_zero + row, tl.where(held, 0.0, tl.sum(zero_sum * s, 1)), mask=row < R)


@triton.jit(do_not_specialize=DRAW)
def _mix(
    x,  # [R, L]
    other,
    out,
    R,
    L,
    key_low,
    key_high,
    last,
    BLOCK_R: tl.constexpr,
    BLOCK_L: tl.constexpr,
):
    row = tl.program_id(0) * BLOCK_R + tl.arange(0, BLOCK_R)
    for start in range(0, L, BLOCK_L):
        col = start + tl.arange(0, BLOCK_L)
        mask = (row < R)[:, None] & (col < L)[None, :]
        at = row[:, None].to(tl.int64) * L + col[None, :]
        kept = _quantized(at, key_low, key_high, last, True)
        tl.store(out + at, tl.load(x + at, mask=mask & kept, other=0.0), mask=mask & kept)
        tl.store(out + at, tl.load(other + at, mask=mask & ~kept, other=0.0), mask=mask & ~kept)


@triton.jit
def _root(x, exponent, POWER: tl.constexpr):
    """x^(1/power): POWER 1 or 2, or 0 for any."""
    if POWER == 1:
        return x
    elif POWER == 2:
        return tl.sqrt_rn(x)
    else:
        return tl.exp2(tl.log2(x) * exponent)


@triton.jit(do_not_specialize=DRAW)
def _focused_softmax(
    scores,  # [R, L]
    table,  # [3, top + 1]
    level,  # [R, L]
    u_out,  # [R, L]
    total_out,  # [R]
    R,
    L,
    top,
    b1,
    inverse,
    least,
    exponent,
    key_low,
    key_high,
    last,
    DROP: tl.constexpr,
    ROW_ANCHOR: tl.constexpr,
    POWER: tl.constexpr,
    BLOCK_R: tl.constexpr,
    BLOCK_L: tl.constexpr,
):
    row = tl.program_id(0) * BLOCK_R + tl.arange(0, BLOCK_R)
    col = tl.arange(0, BLOCK_L)
    mask = (row < R)[:, None] & (col < L)[None, :]
    at = row[:, None].to(tl.int64) * L + col[None, :]
    s = tl.load(scores + at, mask=mask, other=-float("inf"))
    s = tl.where((row < R)[:, None], s, 0.0)
    e = tl.exp(s - tl.max(s, 1)[:, None])
    total = tl.sum(e, 1)
    # NaN anywhere is NaN everywhere.
    u = (
        e + (total - total)[:, None]
        if ROW_ANCHOR
        else tl.div_rn(e, tl.broadcast_to(total[:, None], (BLOCK_R, BLOCK_L)))
    )
    position = _root(_bounded((u - b1) * inverse, least, 1.0), exponent, POWER) * top
    found = tl.load(table + (round_half_even(position).to(tl.int32) & 255), mask=mask & (u == u), other=0.0)
    kept = _quantized(at, key_low, key_high, last, DROP) & (u == u)
    tl.store(level + at, tl.where(kept, found, position), mask=mask)
    tl.store(u_out + at, u, mask=mask)
    tl.store(total_out + row, total, mask=row < R)


@triton.jit(do_not_specialize=DRAW)
def _focused_softmax_backward(
    grad,  # [R, L]
    grad_total,  # [R] or None
    u_in,  # [R, L]
    table,  # [3, top + 1]
    of_scores,  # [R, L]
    sums,  # [3, R]
    R,
    L,
    entries,  # top + 1
    top,
    b1,
    inverse,
    least,
    exponent,
    key_low,
    key_high,
    last,
    DROP: tl.constexpr,
    ROW_ANCHOR: tl.constexpr,
    POWER: tl.constexpr,
    BLOCK_R: tl.constexpr,
    BLOCK_L: tl.constexpr,
):
    row = tl.program_id(0) * BLOCK_R + tl.arange(0, BLOCK_R)
    col = tl.arange(0, BLOCK_L)
    mask = (row < R)[:, None] & (col < L)[None, :]
    at = row[:, None].to(tl.int64) * L + col[None, :]
    g, u = tl.load(grad + at, mask=mask, other=0.0), tl.load(u_in + at, mask=mask, other=0.0)
    place = (u - b1) * inverse
    x = _bounded(place, least, 1.0)
    rooted = _root(x, exponent, POWER)
    index = table + entries + (round_half_even(rooted * top).to(tl.int32) & 255)
    known = mask & (u == u)
    kept = _quantized(at, key_low, key_high, last, DROP)
    of_position = tl.where(kept, g * tl.load(index, mask=known, other=0.0), g)
    slope = top if POWER == 1 else top * exponent * rooted / x
    of_x = tl.where(x == place, of_position * slope, 0.0)
    lifted = tl.where(kept, g * tl.load(index + entries, mask=known, other=0.0), 0.0)
    tl.store(sums + row, tl.sum(of_x, 1), mask=row < R)
    tl.store(sums + R + row, tl.sum(of_x * x, 1), mask=row < R)
    tl.store(sums + 2 * R + row, tl.sum(lifted, 1), mask=row < R)
    of_u = of_x * inverse
    if grad_total is not None:
        of_u += tl.load(grad_total + row, mask=row < R, other=0.0)[:, None]
    weighted = of_u * u
    whole = tl.sum(weighted, 1)[:, None]
    if ROW_ANCHOR:
        # exp(s − max s): what all of them lose goes to the largest, in equal parts.
        largest = tl.where(u == 1.0, 1.0, 0.0)
        share = whole / tl.maximum(tl.sum(largest, 1)[:, None], 1.0)
        result = weighted - tl.where(u == 1.0, share, 0.0)
    else:
        result = weighted - u * whole
    tl.store(of_scores + at, result, mask=mask)


@triton.jit
def _rectified(alpha):
    """h(alpha) and its derivative."""
    sigmoid = tl.sigmoid(alpha)
    stretched = sigmoid * 1.2 - 0.1
    h = _bounded(stretched, 0.0, 1.0)
    return h, tl.where(h == stretched, 1.2 * sigmoid * (1.0 - sigmoid), 0.0)


@triton.jit
def _soft_round(
    grad,  # [N, K], or None: forward
    alpha,  # [N, K]
    weight,
    scale,  # [N]
    out,  # [N, K]: values, or the gradient of alpha
    of_scale,  # [N] or None
    N,
    K,
    qmin,
    qmax,
    BLOCK_R: tl.constexpr,
    BLOCK_L: tl.constexpr,
):
    row = tl.program_id(0) * BLOCK_R + tl.arange(0, BLOCK_R)
    s = tl.load(scale + row, mask=row < N, other=1.0)[:, None]
    scale_sum = tl.zeros((BLOCK_R, BLOCK_L), tl.float32)
    for start in range(0, K, BLOCK_L):
        col = start + tl.arange(0, BLOCK_L)
        mask = (row < N)[:, None] & (col < K)[None, :]
        at = row[:, None].to(tl.int64) * K + col[None, :]
        h, slope = _rectified(tl.load(alpha + at, mask=mask, other=0.0))
        w = tl.load(weight + at, mask=mask, other=0.0)
        whole = tl.floor(tl.div_rn(w, tl.broadcast_to(s, (BLOCK_R, BLOCK_L)))) + h
        code = _bounded(whole, qmin, qmax)
        if grad is None:
            tl.store(out + at, code * s, mask=mask)
        else:
            g = tl.load(grad + at, mask=mask, other=0.0)
            scale_sum += g * code
            tl.store(out + at, tl.where(code == whole, g * s * slope, 0.0), mask=mask)
    if grad is not None:
        tl.store(of_scale + row, tl.sum(scale_sum, 1), mask=row < N)


@triton.jit(do_not_specialize=["beta"])
def _rounding_penalty(
    grad,  # [N], or None: forward
    alpha,  # [N, K]
    out,  # [N] sums, or the gradient of alpha [N, K]
    N,
    K,
    beta,
    BLOCK_R: tl.constexpr,
    BLOCK_L: tl.constexpr,
):
    row = tl.program_id(0) * BLOCK_R + tl.arange(0, BLOCK_R)
    total = tl.zeros((BLOCK_R, BLOCK_L), tl.float32)
    for start in range(0, K, BLOCK_L):
        col = start + tl.arange(0, BLOCK_L)
        mask = (row < N)[:, None] & (col < K)[None, :]
        at = row[:, None].to(tl.int64) * K + col[None, :]
        h, slope = _rectified(tl.load(alpha + at, mask=mask, other=0.0))
        side = 2.0 * h - 1.0
        log = tl.log2(tl.maximum(tl.abs(side), 1e-30))
        if grad is None:
            total += tl.where(mask, 1.0 - tl.exp2(beta * log), 0.0)
        else:
            g = tl.load(grad + row, mask=row < N, other=0.0)[:, None]
            steep = tl.exp2((beta - 1.0) * log)
            tl.store(out + at, g * -2.0 * beta * tl.where(side < 0.0, -steep, steep) * slope, mask=mask)
    if grad is None:
        tl.store(out + row, tl.sum(total, 1), mask=row < N)


def _quantizer(scale, zero_point, qmin, qmax, row_qmax, lut) -> tuple:
    return scale.contiguous(), zero_point, float(qmin), float(qmax), host.dense(row_qmax), host.dense(lut)


def fake_quantize(x, scale, zero_point, qmin, qmax, row_qmax, lut, key, last) -> Tensor:
    x, quantizer = x.contiguous(), _quantizer(scale, zero_point, qmin, qmax, row_qmax, lut)
    y = torch.empty_like(x)
    _launch(_fake_quantize, (x, *quantizer, y, *x.shape, scale.numel(), *_draw(key, last)), x)
    return y


def fake_quantize_backward(
    grad, x, scale, zero_point, qmin, qmax, row_qmax, lut, key, last
) -> tuple[Tensor, Tensor, Tensor]:
    grad, x = grad.contiguous(), x.contiguous()
    quantizer = _quantizer(scale, zero_point, qmin, qmax, row_qmax, lut)
    out = torch.empty_like(x), x.new_empty(x.shape[0]), x.new_empty(x.shape[0])
    arguments = (grad, x, *quantizer, *out, *x.shape, scale.numel(), *_draw(key, last))
    _launch(_fake_quantize_backward, arguments, x)
    return out


def mix(x, other, key, last) -> Tensor:
    x, other = x.contiguous(), other.contiguous()
    out = torch.empty_like(x)
    rows = x.view(-1, x.shape[-1])
    _launch(_mix, (x, other, out, *rows.shape, *_draw(key, last)[:3]), rows)
    return out


def focused_softmax(scores, b1, b2, power, row_anchor, table, key, last) -> tuple[Tensor, Tensor, Tensor]:
    scores, table = scores.contiguous(), table.contiguous()
    level, u, total = torch.empty_like(scores), torch.empty_like(scores), scores.new_empty(scores.shape[0])
    focus = _focus(b1, b2, power, table)
    arguments = (scores, table, level, u, total, *scores.shape, *focus, *_draw(key, last), row_anchor, _power(power))
    _launch(_focused_softmax, arguments, scores, whole=True)
    return level, u, total


def focused_softmax_backward(grad, grad_total, u, b1, b2, power, row_anchor, table, key, last) -> tuple[Tensor, Tensor]:
    grad, u, table = grad.contiguous(), u.contiguous(), table.contiguous()
    grad_total = host.dense(grad_total) if row_anchor else None
    out = torch.empty_like(u), u.new_empty(3, u.shape[0])
    tensors = (grad, grad_total, u, table, *out, *u.shape, table.shape[1])
    arguments = (*tensors, *_focus(b1, b2, power, table), *_draw(key, last), row_anchor, _power(power))
    _launch(_focused_softmax_backward, arguments, u, whole=True)
    return out


def soft_round(alpha, weight, scale, qmin, qmax) -> Tensor:
    alpha, weight, scale = alpha.contiguous(), weight.contiguous(), scale.contiguous()
    values = torch.empty_like(alpha)
    _launch(_soft_round, (None, alpha, weight, scale, values, None, *alpha.shape, float(qmin), float(qmax)), alpha)
    return values


def soft_round_backward(grad, alpha, weight, scale, qmin, qmax) -> tuple[Tensor, Tensor]:
    grad, alpha, weight, scale = grad.contiguous(), alpha.contiguous(), weight.contiguous(), scale.contiguous()
    out = torch.empty_like(alpha), alpha.new_empty(alpha.shape[0])
    _launch(_soft_round, (grad, alpha, weight, scale, *out, *alpha.shape, float(qmin), float(qmax)), alpha)
    return out


def rounding_penalty(alpha, beta) -> Tensor:
    alpha = alpha.contiguous()
    sums = alpha.new_empty(alpha.shape[0])
    _launch(_rounding_penalty, (None, alpha, sums, *alpha.shape, beta), alpha)
    return sums


def rounding_penalty_backward(grad, alpha, beta) -> Tensor:
    grad, alpha = grad.contiguous(), alpha.contiguous()
    out = torch.empty_like(alpha)
    _launch(_rounding_penalty, (grad, alpha, out, *alpha.shape, beta), alpha)
    return out


def _launch(kernel, arguments: tuple, rows: Tensor, whole: bool = False) -> None:
    """Over ``rows`` [R, L] in tiles, which follow the arguments."""
    (r, length), widest = rows.shape, 1 << 30
    if rows.numel() == 0:
        return
    block_l = power_of_2(length, 16, widest if whole else TILE)
    block_r = max(1, TILE // block_l)
    warps = min(max(block_r * block_l // 128, 4), 16)
    host.launch(kernel, (ceil_div(r, block_r),), (*arguments, block_r, block_l), rows.device, num_warps=warps)


def _draw(key: int | None, last: int) -> tuple[int, int, int, bool]:
    """The halves of the key as int32, the last hash that is dropped, and whether any is."""
    halves = [(k ^ 1 << 31) - (1 << 31) for k in ((key or 0) & 0xFFFFFFFF, (key or 0) >> 32 & 0xFFFFFFFF)]
    return *halves, last, key is not None


def _focus(b1: float, b2: float, power: float, table: Tensor) -> tuple[float, ...]:
    """top, b1, 1/(b2 − b1), the least x, 1/power."""
    return float(table.shape[1] - 1), b1, 1.0 / (b2 - b1), 0.0 if power == 1.0 else 1e-30, 1.0 / power


def _power(power: float) -> int:
    return int(power) if power in (1.0, 2.0) else 0
