"""Plain torch oracles of the integer linear layers.

The integer sum is evaluated in float64, where it is exact (|sum| < 2^53); the epilogue follows in float32, or float64
if ``x_scale`` is float64, in the order of the contract.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from ...packing import LAYOUTS, unpack_codes
from ..layer_norm_quantize import ref as layer_norm_ref
from ..quantize import ref as quantize_ref

ACTIVATIONS = ("none", "gelu_erf", "gelu_tanh")


def epilogue(
    y: Tensor,
    lora_t: Tensor | None,
    bias: Tensor | None,
    lora_up: Tensor | None,
    activation: int,
    layer_scale: Tensor | None,
    residual: Tensor | None,
) -> Tensor:
    """The float part after the product, [M, N], in the order low rank, bias, activation, LayerScale, residual."""
    if lora_up is not None:
        y = y + lora_t.to(y.dtype) @ lora_up.to(y.dtype).T
    if bias is not None:
        y = y + bias.to(y.dtype)
    name = ACTIVATIONS[activation]
    if name != "none":
        y = torch.nn.functional.gelu(y, approximate="tanh" if name == "gelu_tanh" else "none")
    if layer_scale is not None:
        y = y * layer_scale.to(y.dtype)
    if residual is not None:
        y = y + residual.to(y.dtype).reshape(y.shape)
    return y


def _linear(x, x_scale, x_zero_point, lora_t, weight, layout, n, k, col_sum, w_lut, w_scale, *rest) -> Tensor:
    codes = unpack_codes(weight, LAYOUTS[layout], n, k, w_lut)
    acc = x.reshape(math.prod(x.shape[:-1]), k).double() @ codes.double().T - x_zero_point * col_sum.double()
    dtype = torch.float64 if x_scale.dtype == torch.float64 else torch.float32
    scale = x_scale.to(dtype).reshape(-1, 1) * w_scale.to(dtype)
    bias, lora_up, activation, layer_scale, residual = rest
    return epilogue(acc.to(dtype) * scale, lora_t, bias, lora_up, activation, layer_scale, residual)


def qlinear(x: Tensor, *args) -> Tensor:
    *args, out_dtype = args
    y = _linear(x, *args)
    return y.to(y.dtype if y.dtype == torch.float64 else out_dtype).reshape(*x.shape[:-1], args[5])


def qlinear_quantize(x: Tensor, *args) -> tuple[Tensor, Tensor, Tensor]:
    args, quant = args[:-9], args[-9:]
    q, scale, t = quantize_ref.quantize(_linear(x, *args), *quant)
    return q.reshape(*x.shape[:-1], args[5]), scale, t


def qlinear_norm_quantize(*args) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    args, norm_and_quant = args[:-12], args[-12:]
    y = qlinear(*args)
    return y, *layer_norm_ref.layer_norm_quantize(y, *norm_and_quant, None, 0)


def qlinear_weight_only(x: Tensor, *args) -> Tensor:
    lora_t, weight, layout, n, k, w_lut, w_scale, *rest, out_dtype = args
    codes = unpack_codes(weight, LAYOUTS[layout], n, k, w_lut)
    f = x.reshape(math.prod(x.shape[:-1]), k)
    f = f if f.dtype == torch.float64 else f.float()
    y = (f @ codes.to(f.dtype).T) * w_scale.to(f.dtype)
    bias, lora_up, activation, layer_scale, residual = rest
    y = epilogue(y, lora_t, bias, lora_up, activation, layer_scale, residual)
    return y.to(y.dtype if y.dtype == torch.float64 else out_dtype).reshape(*x.shape[:-1], n)
