"""LayerNorm and the quantization of its output in one pass."""

from __future__ import annotations

from torch import Tensor

from ... import backends
from ...formats import ActQuant, QTensor
from .. import _schema
from . import ref


def _fake(x, weight, bias, eps, scale, zero_point, qmin, qmax, groups, row_qmax, lut, lora_down, subspace):
    return _schema.fake_quant_outputs(x, x.shape, scale, groups, lora_down)


_schema.define(
    "layer_norm_quantize",
    f"Tensor x, Tensor? weight, Tensor? bias, float eps, {_schema.QUANT_ARGS}",
    "(Tensor, Tensor, Tensor)",
    ref.layer_norm_quantize,
    _fake,
)
_schema.define_triton("layer_norm_quantize", "layer_norm_quantize")


def layer_norm_quantize(x: Tensor, weight: Tensor | None, bias: Tensor | None, eps: float, quant: ActQuant) -> QTensor:
    """q = quantize(LayerNorm(x)·γ + β); the normalized floats are never written.

    Notation: M rows, K columns, R rank.
    Math:     y = (x − mean)/√(var + eps)·γ + β over the last dimension (biased variance), then as :func:`quantize`.
    Args:     x ([..., K] float); weight γ, bias β ([K] float or None); eps ≥ 0; quant: see :class:`ActQuant`.
    Returns:  QTensor of y: codes [..., K], scale, t = y·Dᵀ [M, R] float32.
    Raises:   TypeError for a dtype, ValueError for a shape, device or eps that does not fit.
    Numerics: statistics in two passes, accumulated in float32 or better; the rest as :func:`quantize`.
    Backends: ref any | cpu | triton >= sm_80
    """
    _schema.expect("x", x, dtype=_schema.FLOATS)
    if x.dim() == 0 or x.shape[-1] == 0:
        raise ValueError(f"x has shape {tuple(x.shape)}, expected [..., K] with K >= 1")
    k = x.shape[-1]
    for name, p in (("weight", weight), ("bias", bias)):
        if p is not None:
            _schema.expect(name, p, dtype=_schema.FLOATS, shape=(k,), device=x.device)
    if not eps >= 0:
        raise ValueError(f"eps is {eps}, expected a number >= 0")
    _schema.check_quant(quant, _schema.rows(x), k, x.device)
    impl = backends.resolve("layer_norm_quantize", x.device.type)
    return _schema.wrap(quant, impl.fn(x, weight, bias, eps, *_schema.flatten(quant)))
