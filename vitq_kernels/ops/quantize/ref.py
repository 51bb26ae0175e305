"""Plain torch oracle of ``quantize``. Runs in the dtype of x: float64 in, float64 arithmetic throughout."""

from __future__ import annotations

import math

import torch
from torch import Tensor


def _float(x: Tensor) -> Tensor:
    return x if x.dtype == torch.float64 else x.float()


def quantize(
    x: Tensor,
    q_scale: Tensor | None,
    q_zero_point: int,
    qmin: int,
    qmax: int,
    groups: int,
    row_qmax: Tensor | None,
    q_lut: Tensor | None,
    lora_down: Tensor | None,
    subspace: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    shape = x.shape
    k = shape[-1]
    m = math.prod(shape[:-1])
    x = _float(x).reshape(m, k)
    t = x.new_empty(0)
    if lora_down is not None:
        down = lora_down.to(x.dtype)
        t = x @ down.T
        if subspace:
            x = x - t @ down
    x = x.reshape(m, groups, k // groups)
    low, high = float(qmin - q_zero_point), float(qmax - q_zero_point)
    if row_qmax is not None:
        high = row_qmax.to(x.dtype).reshape(m, 1, 1)
        low = -high
    out_scale = x.new_empty(0)
    if q_scale is None:
        absmax = x.abs().amax(-1, keepdim=True) if k else x.new_zeros(m, groups, 1)
        top = high if row_qmax is not None else float(qmax)
        scale = torch.where(absmax == 0, torch.ones_like(absmax), absmax / top)
        scale = torch.where(scale.isfinite(), scale, torch.full_like(scale, float("nan")))
        # absmax/qmax of a subnormal row underflows to 0: its reciprocal would be infinite.
        scale = torch.where(scale == 0, torch.ones_like(scale), scale)
        out_scale = scale.reshape(m, groups).contiguous()
    else:
        scale = q_scale.to(x.dtype).reshape(-1, groups, 1)
    inverse = 1.0 / scale
    code = torch.round(x * inverse)
    code = torch.nan_to_num(code, nan=0.0, posinf=float("inf"), neginf=float("-inf"))
    if row_qmax is None:
        code = code.clamp(low, high)
    else:
        code = torch.maximum(torch.minimum(code, high), low)
    q = (code + q_zero_point).to(torch.int8)
    if q_lut is not None:
        q = q_lut[q.long() + 128]
    return q.reshape(shape), out_scale, t
