"""Plain torch oracle of ``layer_norm_quantize``."""

from __future__ import annotations

import torch
from torch import Tensor

from ..quantize import ref as quantize_ref


def layer_norm_quantize(
    x: Tensor, weight: Tensor | None, bias: Tensor | None, eps: float, *quant
) -> tuple[Tensor, Tensor, Tensor]:
    *quant, gather, tokens = quant
    x = x if x.dtype == torch.float64 else x.float()
    weight = None if weight is None else weight.to(x.dtype)
    bias = None if bias is None else bias.to(x.dtype)
    y = torch.nn.functional.layer_norm(x, x.shape[-1:], weight, bias, eps)
    if gather is not None:
        y = y.reshape(x.shape[0], tokens, x.shape[-1])
        y = torch.nn.functional.pad(y, (0, 0, 0, 1))[:, gather.long()]  # -1 is the row behind the last: zeros
    return quantize_ref.quantize(y, *quant)
