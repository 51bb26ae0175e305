"""Plain torch oracles of the learning ops, and their kernels wherever there is no compiled one."""

from __future__ import annotations

import torch
from torch import Tensor

# AdaRound's stretch of the sigmoid (Nagel et al. 2020).
ZETA, GAMMA = 1.1, -0.1


def fake_quantize(x, scale, zero_point, qmin, qmax, row_qmax, lut, key, last) -> Tensor:
    _, scale, _, code = _codes(x, scale, zero_point, qmin, qmax, row_qmax, lut)
    y = code * scale
    return y if key is None else torch.where(_quantized(key, x, last), y, x)


def fake_quantize_backward(
    grad, x, scale, zero_point, qmin, qmax, row_qmax, lut, key, last
) -> tuple[Tensor, Tensor, Tensor]:
    ratio, scale, within, code = _codes(x, scale, zero_point, qmin, qmax, row_qmax, lut)
    inside = within == ratio
    of_scale, of_zero = grad * (code - torch.where(inside, ratio, 0.0)), torch.where(inside, 0.0, -grad)
    if key is not None:
        kept = _quantized(key, x, last)
        inside, of_scale, of_zero = inside | ~kept, of_scale * kept, of_zero * kept
    of_zero = of_zero.sum(1) * scale.squeeze(1)
    if zero_point is not None:
        of_zero = of_zero * (zero_point.round() == zero_point.round().clamp(qmin, qmax))
    return grad * inside, of_scale.sum(1), of_zero


def mix(x, other, key, last) -> Tensor:
    return torch.where(_quantized(key, x, last), x, other)


def focused_softmax(scores, b1, b2, power, row_anchor, table, key, last) -> tuple[Tensor, Tensor, Tensor]:
    e = torch.exp(scores - scores.amax(1, keepdim=True))
    total = e.sum(1, keepdim=True)
    u = e if row_anchor else e / total
    _, _, position = _place(u, b1, b2, power, table)
    level = _entries(table[0], position)
    if key is not None:
        level = torch.where(_quantized(key, u, last), level, position)
    return level, u, total.squeeze(1)


def focused_softmax_backward(grad, grad_total, u, b1, b2, power, row_anchor, table, key, last) -> tuple[Tensor, Tensor]:
    place, x, position = _place(u, b1, b2, power, table)
    n = table.shape[1] - 1
    of_position, lifted = grad * _entries(table[1], position), grad * _entries(table[2], position)
    if key is not None:
        kept = _quantized(key, u, last)
        of_position, lifted = torch.where(kept, of_position, grad), lifted * kept
    slope = n if power == 1.0 else position / (power * x)
    g = torch.where(x == place, of_position * slope, 0.0)
    sums = torch.stack([g.sum(1), (g * x).sum(1), lifted.sum(1)])
    of_u = g * (1.0 / (b2 - b1))
    if not row_anchor:
        weighted = of_u * u
        return weighted - u * weighted.sum(1, keepdim=True), sums
    weighted = (of_u if grad_total is None else of_u + grad_total.unsqueeze(1)) * u
    largest = (u == 1.0).to(u.dtype)
    part = weighted.sum(1, keepdim=True) / largest.sum(1, keepdim=True)
    return weighted - largest * part, sums


def _codes(x, scale, zero_point, qmin, qmax, row_qmax, lut) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """x/scale, the scale of each row [R, 1], x/scale clamped, and its centred codes."""
    scale = scale.repeat(x.shape[0] // scale.numel()).unsqueeze(1)
    ratio = x * (1.0 / scale)
    zero = 0.0 if zero_point is None else zero_point.round().clamp(qmin, qmax)
    low, high = qmin + x.new_zeros(1), qmax + x.new_zeros(1)
    if row_qmax is not None:
        high = row_qmax.to(x.dtype).unsqueeze(1)
        low = -high
    within = ratio.clamp(low - zero, high - zero)
    code = within.round()
    if lut is not None:
        code = _entries(lut.to(code.dtype), code + (zero + 128.0)) - zero
    return ratio, scale, within, code


def _quantized(key: int, x: Tensor, last: int) -> Tensor:
    """Where the hash of an element's index, an int32, is above ``last``."""
    word = (1 << 32) - 1
    h = torch.arange(x.numel(), device=x.device) + (key & word) & word
    h = ((h ^ (h >> 16)) * 0x7FEB352D & word) ^ (key >> 32 & word)
    h = (h ^ (h >> 15)) * 0x846CA68B & word
    return ((h ^ (h >> 16)).to(torch.int32) > last).view_as(x)


def _place(u: Tensor, b1: float, b2: float, power: float, table: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """(u − b1)/(b2 − b1), the same clamped, and the position among the codes."""
    place = (u - b1) * (1.0 / (b2 - b1))
    x = place.clamp(0.0 if power == 1.0 else 1e-30, 1.0)
    root = x if power == 1.0 else x.sqrt() if power == 2.0 else x.pow(1.0 / power)
    return place, x, root * (table.shape[1] - 1)


def _entries(table: Tensor, position: Tensor) -> Tensor:
    """table[rne(position)]; NaN of NaN."""
    index = position.round().nan_to_num().int().clamp(0, len(table) - 1).reshape(-1)
    entries = table.to(position.dtype).index_select(0, index).view_as(position)
    return torch.where(position.isnan(), position, entries)


def soft_round(alpha, weight, scale, qmin, qmax) -> Tensor:
    return _soft_codes(alpha, weight, scale, qmin, qmax)[1] * scale.unsqueeze(1)


def soft_round_backward(grad, alpha, weight, scale, qmin, qmax) -> tuple[Tensor, Tensor]:
    whole, code, slope = _soft_codes(alpha, weight, scale, qmin, qmax)
    return torch.where(code == whole, grad * scale.unsqueeze(1) * slope, 0.0), (grad * code).sum(1)


def rounding_penalty(alpha, beta) -> Tensor:
    return (1.0 - (2.0 * rectified_sigmoid(alpha)[0] - 1.0).abs().pow(beta)).sum(1)


def rounding_penalty_backward(grad, alpha, beta) -> Tensor:
    h, slope = rectified_sigmoid(alpha)
    side = 2.0 * h - 1.0
    return grad.unsqueeze(1) * (-2.0 * beta) * side.abs().pow(beta - 1.0) * side.sign() * slope


def rectified_sigmoid(alpha: Tensor) -> tuple[Tensor, Tensor]:
    """AdaRound's h(alpha) and its derivative."""
    sigmoid = alpha.sigmoid()
    stretched = sigmoid * (ZETA - GAMMA) + GAMMA
    h = stretched.clamp(0.0, 1.0)
    return h, torch.where(h == stretched, (ZETA - GAMMA) * sigmoid * (1.0 - sigmoid), 0.0)


def _soft_codes(alpha, weight, scale, qmin, qmax) -> tuple[Tensor, Tensor, Tensor]:
    h, slope = rectified_sigmoid(alpha)
    whole = (weight / scale.unsqueeze(1)).floor() + h
    return whole, whole.clamp(qmin, qmax), slope
