"""LayerNorm and the quantization of its output in one pass."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from ... import backends
from ...formats import ActQuant, QTensor
from .. import _schema
from . import ref


def _fake(x, weight, bias, eps, scale, zp, qmin, qmax, groups, row_qmax, lut, lora_down, subspace, gather, tokens):
    shape = x.shape if gather is None else (x.shape[0], gather.shape[0], x.shape[-1])
    return _schema.fake_quant_outputs(x, shape, scale, groups, lora_down)


_schema.define(
    "layer_norm_quantize",
    f"Tensor x, Tensor? weight, Tensor? bias, float eps, {_schema.QUANT_ARGS}, Tensor? gather, int tokens",
    "(Tensor, Tensor, Tensor)",
    ref.layer_norm_quantize,
    _fake,
)
_schema.define_triton("layer_norm_quantize", "layer_norm_quantize")
_schema.define_cuda("layer_norm_quantize")


def layer_norm_quantize(
    x: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    eps: float,
    quant: ActQuant,
    gather: Tensor | None = None,
) -> QTensor:
    """q = quantize(LayerNorm(x)·γ + β); the normalized floats are never written.

    Notation: M rows, K columns, R rank; B images of T tokens.
    Math:     y = (x − mean)/√(var + eps)·γ + β over the last dimension (biased variance), then as :func:`quantize`.
    Args:     x ([..., K] float); weight γ, bias β ([K] float or None); eps ≥ 0; quant: see :class:`ActQuant`.
              gather ([S] int32 or None): rows in another order, as windows take them. x is [B, ..., K] of T tokens an
              image; row s of an image's result comes from its token gather[s], and where that is −1 (padding) y is 0.
              Entries in [−1, T): a promise that a GPU does not check. Per-row parts of ``quant`` are in result order.
    Returns:  QTensor of y: codes [..., K] ([B, S, K] with ``gather``), scale, t = y·Dᵀ [M, R] float32.
    Raises:   TypeError for a dtype, ValueError for a shape, device or eps that does not fit.
    Numerics: statistics in two passes, accumulated in float32 or better; the rest as :func:`quantize`.
    Backends: ref any | cpu | triton, cuda >= sm_80
    """
    return run_layer_norm_quantize(x, weight, bias, eps, _schema.Epilogue(quant), gather)


def run_layer_norm_quantize(
    x: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    eps: float,
    epilogue: _schema.Epilogue,
    gather: Tensor | None = None,
    backend: str | None = None,
) -> QTensor:
    """:func:`layer_norm_quantize` under a prepared epilogue; ``backend`` wins over an outer pin."""
    # γ, β and eps belong to a float module, which may replace them at any time.
    case, passed = (_schema.metadata(x), eps, _schema.metadata(gather)), epilogue.passed
    if passed is None or passed[0] != case or passed[2] is not weight or passed[3] is not bias:
        _schema.expect("x", x, dtype=_schema.FLOATS)
        if x.dim() == 0 or x.shape[-1] == 0:
            raise ValueError(f"x has shape {tuple(x.shape)}, expected [..., K] with K >= 1")
        k, device = x.shape[-1], x.device
        expect_norm(weight, bias, eps, k, device)
        m, tokens = _schema.rows(x), 0
        if gather is not None:
            _schema.expect("gather", gather, dtype=torch.int32, shape=(None,), device=device)
            if x.dim() < 3:
                raise ValueError(f"x has shape {tuple(x.shape)}, expected [B, ..., K] where gather is given")
            m, tokens = x.shape[0] * gather.shape[0], math.prod(x.shape[1:-1])
        epilogue.fit(m, k, device)
        passed = epilogue.passed = case, device.type, weight, bias, tokens, (m, k)
    impl = backends.resolve("layer_norm_quantize", passed[1], None, backend, passed[5])
    return epilogue.wrap(impl.fn(x, weight, bias, eps, *epilogue.args, gather, passed[4]))


def expect_norm(weight: Tensor | None, bias: Tensor | None, eps: float, k: int, device: torch.device) -> None:
    """TypeError/ValueError unless γ, β and eps are those of a LayerNorm over k columns on ``device``."""
    for name, p in (("weight", weight), ("bias", bias)):
        if p is not None:
            _schema.expect(name, p, dtype=_schema.FLOATS, shape=(k,), device=device)
    if not eps >= 0:
        raise ValueError(f"eps is {eps}, expected a number >= 0")
