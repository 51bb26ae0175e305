"""Float activations to integer codes."""

from __future__ import annotations

from torch import Tensor

from ... import backends
from ...formats import ActQuant, QTensor
from .. import _schema
from . import ref


def _fake(x, scale, zero_point, qmin, qmax, groups, row_qmax, lut, lora_down, subspace):
    return _schema.fake_quant_outputs(x, x.shape, scale, groups, lora_down)


_schema.define("quantize", f"Tensor x, {_schema.QUANT_ARGS}", "(Tensor, Tensor, Tensor)", ref.quantize, _fake)
_schema.define_triton("quantize", "quantize")
_schema.define_cuda("quantize")


def quantize(x: Tensor, quant: ActQuant) -> QTensor:
    """q = lut[clamp(round(x / scale), qmin − z, qmax − z) + z].

    Notation: M rows (product of the leading dimensions), K columns in G groups, R rank.
    Math:     t = x·Dᵀ; x' = x − t·D if subspace else x;
              static: scale[g] (or [m, g]) given; dynamic: scale[m, g] = max|x'[m, group g]| / qmax[m];
              q = clamp(rne(x'·(1/scale)), qmin − z, qmax − z) + z, then through ``quant.lut`` if given.
    Args:     x ([..., K] float32, float16 or bfloat16): any strides; read once.
              quant: the quantizing epilogue, see :class:`ActQuant`.
    Returns:  QTensor: q [..., K] int8 contiguous; scale float32 [G] as given, or [M, G] dynamic; t [M, R] float32.
    Raises:   TypeError for a dtype, ValueError for a shape or device that does not fit (before any launch).
    Numerics: the reciprocal of the scale is rounded to float32 once, the product once; ties to even. A row of zeros has
              scale 1. NaN becomes the code of 0, ±Inf saturates under static scales; a row with NaN or Inf has a NaN
              dynamic scale, so that what follows is NaN rather than silently wrong.
    Backends: ref any | cpu | triton, cuda >= sm_80
    """
    return run_quantize(x, _schema.Epilogue(quant))


def run_quantize(x: Tensor, epilogue: _schema.Epilogue, backend: str | None = None) -> QTensor:
    """:func:`quantize` under a prepared epilogue; ``backend`` wins over an outer pin."""
    case, passed = _schema.metadata(x), epilogue.passed
    if passed is None or passed[0] != case:
        _schema.expect("x", x, dtype=_schema.FLOATS)
        if x.dim() == 0:
            raise ValueError("x has shape (), expected [..., K]")
        sizes = _schema.rows(x), x.shape[-1]
        epilogue.fit(*sizes, x.device)
        passed = epilogue.passed = case, x.device.type, sizes
    return epilogue.wrap(backends.resolve("quantize", passed[1], None, backend, passed[2]).fn(x, *epilogue.args))
