"""Integer linear layers with a low-rank side branch and fused epilogues."""

from __future__ import annotations

import torch
from torch import Tensor

from ... import backends
from ...formats import ActQuant, PackedWeight, QTensor
from ...packing import LAYOUT_IDS
from .. import _schema
from . import ref

ACTIVATIONS = ref.ACTIVATIONS
_ACTIVATION_IDS = {name: i for i, name in enumerate(ACTIVATIONS)}
_LAYOUTS = ("int8", "int4")
_TRITON_LAYOUTS = ("int4_k64x2", "int8")

_WEIGHT_ARGS = "Tensor weight, int layout, int n, int k"
_TAIL_ARGS = "Tensor? bias, Tensor? lora_up, int activation, Tensor? layer_scale, Tensor? residual"
_INPUT_ARGS = (
    f"Tensor x, Tensor x_scale, int x_zero_point, Tensor? lora_t, {_WEIGHT_ARGS}, Tensor col_sum, "
    f"Tensor? w_lut, Tensor w_scale, {_TAIL_ARGS}"
)


def _fake_linear(x, x_scale, x_zero_point, lora_t, weight, layout, n, *rest):
    return x.new_empty((*x.shape[:-1], n), dtype=rest[-1])


def _fake_quantize(x, x_scale, x_zero_point, lora_t, weight, layout, n, *rest):
    q_scale, _, _, _, groups, _, _, lora_down, _ = rest[-9:]
    return _schema.fake_quant_outputs(x, (*x.shape[:-1], n), q_scale, groups, lora_down)


def _fake_weight_only(x, lora_t, weight, layout, n, *rest):
    return x.new_empty((*x.shape[:-1], n), dtype=rest[-1])


_schema.define("qlinear", f"{_INPUT_ARGS}, ScalarType out_dtype", "Tensor", ref.qlinear, _fake_linear, _LAYOUTS)
_schema.define(
    "qlinear_quantize",
    f"{_INPUT_ARGS}, {_schema.QUANT_ARGS}",
    "(Tensor, Tensor, Tensor)",
    ref.qlinear_quantize,
    _fake_quantize,
    _LAYOUTS,
)
_schema.define(
    "qlinear_weight_only",
    f"Tensor x, Tensor? lora_t, {_WEIGHT_ARGS}, Tensor? w_lut, Tensor w_scale, {_TAIL_ARGS}, ScalarType out_dtype",
    "Tensor",
    ref.qlinear_weight_only,
    _fake_weight_only,
    _LAYOUTS,
)
for _op in ("qlinear", "qlinear_quantize", "qlinear_weight_only"):
    _schema.define_triton(_op, "qlinear", _TRITON_LAYOUTS)


def _check_weight(x: Tensor, weight: PackedWeight, w_scale: Tensor) -> None:
    if x.dim() == 0 or x.shape[-1] != weight.k:
        raise ValueError(f"x has shape {tuple(x.shape)}, expected [..., {weight.k}]")
    if weight.data.device != x.device:
        raise ValueError(f"weight is on {weight.data.device}, expected {x.device}")
    _schema.expect("weight_scale", w_scale, dtype=torch.float32, shape=(weight.n,), device=x.device)


def _tail(x, m, n, lora_t, bias, lora_up, activation, layer_scale, residual) -> tuple:
    if activation not in _ACTIVATION_IDS:
        raise ValueError(f"activation is {activation!r}, expected one of {', '.join(ACTIVATIONS)}")
    for name, p in (("bias", bias), ("layer_scale", layer_scale)):
        if p is not None:
            _schema.expect(name, p, dtype=_schema.FLOATS, shape=(n,), device=x.device)
    if lora_up is not None:
        if lora_t is None:
            raise ValueError("lora_up is given but the input carries no t, expected t [M, R]")
        _schema.expect("lora_up", lora_up, dtype=_schema.FLOATS, shape=(n, None), device=x.device)
        _schema.expect("t", lora_t, dtype=torch.float32, shape=(m, lora_up.shape[1]), device=x.device)
    if residual is not None:
        _schema.expect("residual", residual, dtype=_schema.FLOATS, shape=(*x.shape[:-1], n), device=x.device)
    return bias, lora_up, _ACTIVATION_IDS[activation], layer_scale, residual


def _flat(x, weight, weight_scale, bias, lora_up, activation, layer_scale, residual) -> tuple:
    if not isinstance(x, QTensor):
        raise TypeError(f"x is {type(x).__name__}, expected a QTensor (see quantize)")
    _schema.expect("x.q", x.q, dtype=torch.int8)
    _check_weight(x.q, weight, weight_scale)
    m = _schema.rows(x.q)
    if x.scale.numel() not in (1, m):
        raise ValueError(f"x.scale has shape {tuple(x.scale.shape)}, expected 1 or M = {m} values")
    _schema.expect("x.scale", x.scale, dtype=torch.float32, device=x.q.device)
    t = x.t if lora_up is not None else None
    tail = _tail(x.q, m, weight.n, t, bias, lora_up, activation, layer_scale, residual)
    packed = (weight.data, LAYOUT_IDS[weight.layout], weight.n, weight.k, weight.col_sum)
    return (x.q, x.scale, x.zero_point, t, *packed, weight.lut, weight_scale, *tail)


def qlinear(
    x: QTensor,
    weight: PackedWeight,
    weight_scale: Tensor,
    bias: Tensor | None = None,
    *,
    lora_up: Tensor | None = None,
    activation: str = "none",
    layer_scale: Tensor | None = None,
    residual: Tensor | None = None,
    out_dtype: torch.dtype = torch.float32,
) -> Tensor:
    """y = γ·act(s_x[m]·s_w[n]·Σ_k (q_x[m,k] − z)·q_w[n,k] + Σ_r t[m,r]·U[n,r] + bias[n]) + residual.

    Notation: M rows, N out, K in, R rank.
    Args:     x: QTensor of [..., K] codes with scale [1] or [M], and t [M, R] if lora_up is given.
              weight: PackedWeight [N, K] in a layout of the back end; weight_scale s_w ([N] float32).
              bias ([N]), lora_up U ([N, R]), layer_scale γ ([N]), residual ([..., N]): float, or None.
              activation: "none", "gelu_erf" (exact) or "gelu_tanh".
              out_dtype: torch.float32, float16 or bfloat16.
    Returns:  [..., N] out_dtype, contiguous, newly allocated.
    Raises:   TypeError for a dtype, ValueError for a shape, device, layout or activation that does not fit.
    Numerics: Σ exact in int32 for K ≤ 65,793 (|q_x| ≤ 128 and 8-bit zero points); then float32 in the order
              product, low rank, bias, activation, γ, residual; rounded to out_dtype once. Triton rounds t to the
              dtype of lora_up first; t of a subspace branch with a lora_down of that dtype is that already.
    Backends: ref any (any layout) | cpu (int8_n16k4, int4_n16k4) | triton >= sm_80 (int8, int4_k64x2)
    """
    args = _flat(x, weight, weight_scale, bias, lora_up, activation, layer_scale, residual)
    impl = backends.resolve("qlinear", x.q.device.type, weight.layout)
    return impl.fn(*args, out_dtype)


def qlinear_quantize(
    x: QTensor,
    weight: PackedWeight,
    weight_scale: Tensor,
    bias: Tensor | None = None,
    *,
    out: ActQuant,
    lora_up: Tensor | None = None,
    activation: str = "none",
    layer_scale: Tensor | None = None,
    residual: Tensor | None = None,
) -> QTensor:
    """q = quantize(qlinear(x, …), out): the float result is never written; the next layer's t comes with it.

    Args, raises and numerics: as :func:`qlinear` and :func:`quantize`; ``out.lora_down`` is the next layer's [R', N].
    Returns:  QTensor of [..., N] codes, contiguous, newly allocated.
    Backends: ref any | cpu | triton >= sm_80
    """
    args = _flat(x, weight, weight_scale, bias, lora_up, activation, layer_scale, residual)
    _schema.check_quant(out, _schema.rows(x.q), weight.n, x.q.device)
    impl = backends.resolve("qlinear_quantize", x.q.device.type, weight.layout)
    return _schema.wrap(out, impl.fn(*args, *_schema.flatten(out)))


def qlinear_weight_only(
    x: Tensor,
    weight: PackedWeight,
    weight_scale: Tensor,
    bias: Tensor | None = None,
    *,
    lora_t: Tensor | None = None,
    lora_up: Tensor | None = None,
    activation: str = "none",
    layer_scale: Tensor | None = None,
    residual: Tensor | None = None,
    out_dtype: torch.dtype | None = None,
) -> Tensor:
    """y = γ·act(s_w[n]·Σ_k x[m,k]·q_w[n,k] + Σ_r t[m,r]·U[n,r] + bias[n]) + residual: float activations.

    Args:     x ([..., K] float); the others as :func:`qlinear`; lora_t ([M, R] float32) = x·Dᵀ.
    Returns:  [..., N] of out_dtype (default: x's), contiguous, newly allocated.
    Numerics: products and sums in float32; codes are exact in it.
    Backends: ref any | cpu | triton >= sm_80
    """
    _schema.expect("x", x, dtype=_schema.FLOATS)
    _check_weight(x, weight, weight_scale)
    m = _schema.rows(x)
    tail = _tail(x, m, weight.n, lora_t, bias, lora_up, activation, layer_scale, residual)
    impl = backends.resolve("qlinear_weight_only", x.device.type, weight.layout)
    packed = (weight.data, LAYOUT_IDS[weight.layout], weight.n, weight.k, weight.lut)
    return impl.fn(x, lora_t, *packed, weight_scale, *tail, x.dtype if out_dtype is None else out_dtype)
