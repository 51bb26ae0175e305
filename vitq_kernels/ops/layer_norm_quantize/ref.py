"""Plain torch oracle of ``layer_norm_quantize``."""

from __future__ import annotations

import torch
from torch import Tensor

from ..quantize import ref as quantize_ref


def layer_norm_quantize(
    x: Tensor, weight: Tensor | None, bias: Tensor | None, eps: float, *quant
) -> tuple[Tensor, Tensor, Tensor]:
    x = x if x.dtype == torch.float64 else x.float()
    weight = None if weight is None else weight.to(x.dtype)
    bias = None if bias is None else bias.to(x.dtype)
    y = torch.nn.functional.layer_norm(x, x.shape[-1:], weight, bias, eps)
    return quantize_ref.quantize(y, *quant)
