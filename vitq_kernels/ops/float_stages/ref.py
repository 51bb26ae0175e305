"""Plain torch oracles of the float stages: the same formulas as in the oracles of the fused ops."""

from __future__ import annotations

import torch
from torch import Tensor

from ..qattention import ref as attention


def layer_norm(x: Tensor, weight: Tensor | None, bias: Tensor | None, eps: float) -> Tensor:
    return torch.nn.functional.layer_norm(x, x.shape[-1:], weight, bias, eps)


def project(x: Tensor, basis: Tensor) -> Tensor:
    return x @ basis.T


def expand(t: Tensor, basis: Tensor) -> Tensor:
    return t @ basis


def gelu(x: Tensor, tanh: bool) -> Tensor:
    return torch.nn.functional.gelu(x, approximate="tanh" if tanh else "none")


def focus_position(
    product, q_scale, k_scale, softmax_scale, n, b1, b2, power, row_anchor, renormalize, bias, mask
) -> tuple[Tensor, Tensor]:
    s = attention.scores(product, q_scale, k_scale, softmax_scale, bias, mask)
    e, total = attention.exponentials(s)
    return attention.position(e if row_anchor else e / total, b1, b2, power, n), total.squeeze(-1)
