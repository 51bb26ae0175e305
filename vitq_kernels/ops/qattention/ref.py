"""Plain torch oracle of ``qattention``. float64 scales in, float64 arithmetic out; the integer sums are exact."""

from __future__ import annotations

import torch
from torch import Tensor

from ..quantize import ref as quantize_ref


def spread(scale: Tensor, b: int, h: int, n: int) -> Tensor:
    """A scale of 1, [H] or [B, H, N] values as [B, H, N] (a view)."""
    if scale.numel() == 1 and scale.dim() < 3:
        return scale.reshape(1, 1, 1).expand(b, h, n)
    return scale.reshape(1, h, 1).expand(b, h, n) if scale.dim() == 1 else scale


def position(u: Tensor, b1: float, b2: float, power: float, n: int) -> Tensor:
    """Where u in [0, 1] lies among the codes 0..n: n·clamp((u − b1)/(b2 − b1), 0, 1)^(1/power)."""
    x = ((u - b1) * (1.0 / (b2 - b1))).clamp(0.0, 1.0)
    if power != 1.0:
        x = x.sqrt() if power == 2.0 else x.pow(1.0 / power)
    return x * n


def scores(
    acc: Tensor, q_scale: Tensor, k_scale: Tensor, softmax_scale: float, bias: Tensor | None, mask: Tensor | None
) -> Tensor:
    """[B, H, Nq, Nk] softmax inputs of the products ``acc``, in the float dtype of the scales."""
    b, h, nq, nk = acc.shape
    dtype = q_scale.dtype
    qs, ks = spread(q_scale, b, h, nq), spread(k_scale, b, h, nk)
    s = acc.to(dtype) * (qs * softmax_scale).unsqueeze(-1) * ks.unsqueeze(-2)
    if bias is not None:
        s = s + bias.to(dtype)
    if mask is not None:
        g = mask.shape[0]
        s = (s.reshape(b // g, g, h, nq, nk) + mask.to(dtype).unsqueeze(1)).reshape(b, h, nq, nk)
    return s


def exponentials(s: Tensor) -> tuple[Tensor, Tensor]:
    """e = exp(s − max_j s) and Σ_j e (kept); a row of −inf alone is a row of zeros."""
    top = s.amax(-1, keepdim=True)
    e = torch.exp(s - torch.where(top == -torch.inf, torch.zeros_like(top), top))
    return e, e.sum(-1, keepdim=True)


def align_values(v: Tensor, v_scale: Tensor) -> tuple[Tensor, Tensor]:
    """Codes of V on one scale per (image, head), the largest of its tokens': (v' [B, H, N, d], S [B, H, 1])."""
    top = v_scale.amax(-1, keepdim=True)
    return torch.round(v.to(v_scale.dtype) * (v_scale / top).unsqueeze(-1)), top


def scattered(y: Tensor, scatter: Tensor | None, tokens: int) -> Tensor:
    """Windows [B, Nq, C] as the images [B/nW, tokens, C] that ``scatter`` names; as they are without one."""
    if scatter is None:
        return y
    b, n, c = y.shape
    rows = y.reshape(b * n // scatter.shape[0], scatter.shape[0], c)
    out = rows.new_empty(rows.shape[0], tokens + 1, c)
    out[:, scatter.long()] = rows  # -1 is the row behind the last
    return out[:, :tokens].contiguous()


def qattention_heads(
    q,
    k,
    v,
    q_scale,
    k_scale,
    v_scale,
    softmax_scale,
    levels,
    step,
    offset,
    b1,
    b2,
    power,
    row_anchor,
    renormalize,
    bias,
    mask,
    scatter=None,
    tokens=0,
) -> Tensor:
    """[B, Nq, H·d] in the float dtype of the scales; with ``scatter``, [B/nW, tokens, H·d]."""
    (b, h, nq, d), nk = q.shape, k.shape[2]
    if nk == 0:
        return scattered(q_scale.new_zeros(b, nq, h * d), scatter, tokens)
    dtype = q_scale.dtype
    s = scores(q.double() @ k.double().transpose(-1, -2), q_scale, k_scale, softmax_scale, bias, mask)
    valid = s != -torch.inf
    e, total = exponentials(s)
    code = torch.round(position(e if row_anchor else e / total, b1, b2, power, levels.numel() - 1))
    level = levels.double()[torch.nan_to_num(code).long()] * valid
    value, v_top = align_values(v, spread(v_scale, b, h, nk))
    value = torch.nan_to_num(value).double()
    out = (level @ value).to(dtype) * step
    if offset != 0.0:
        out = out + (valid.double() @ value).to(dtype) * offset
    if renormalize:
        denom = level.sum(-1, keepdim=True).to(dtype) * step + valid.sum(-1, keepdim=True).to(dtype) * offset
    else:
        denom = total if row_anchor else torch.ones_like(total)
    out = torch.where(denom == 0, torch.zeros_like(out), out * (v_top.unsqueeze(-1) / denom))
    empty = ~valid.any(-1, keepdim=True)
    out = torch.where(total.isnan() & ~empty, torch.full_like(out, torch.nan), out)
    out = torch.where(empty, torch.zeros_like(out), out)
    return scattered(out.transpose(1, 2).reshape(b, nq, h * d), scatter, tokens)


def qattention(*args) -> Tensor:
    *args, out_dtype = args
    y = qattention_heads(*args)
    return y if y.dtype == torch.float64 else y.to(out_dtype)


def qattention_quantize(*args) -> tuple[Tensor, Tensor, Tensor]:
    return quantize_ref.quantize(qattention_heads(*args[:-9]), *args[-9:])
