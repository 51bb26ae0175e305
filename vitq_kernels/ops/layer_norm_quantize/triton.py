"""Triton back end of ``layer_norm_quantize``: the kernels of ``quantize`` with their LayerNorm part switched on."""

from __future__ import annotations

from torch import Tensor

from ..quantize.triton import quantize_rows


def layer_norm_quantize(
    x: Tensor, weight: Tensor | None, bias: Tensor | None, eps: float, *quant
) -> tuple[Tensor, Tensor, Tensor]:
    *quant, gather, tokens = quant
    return quantize_rows(x, (weight, bias, eps), *quant, gather, tokens)
