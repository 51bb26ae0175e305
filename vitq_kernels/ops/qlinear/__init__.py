"""Integer linear layers with a low-rank side branch and fused epilogues."""

from __future__ import annotations

import torch
from torch import Tensor

from ... import backends
from ...formats import ActQuant, PackedWeight, QTensor
from ...packing import LAYOUT_IDS
from .. import _schema
from ..layer_norm_quantize import expect_norm
from . import ref

ACTIVATIONS = ref.ACTIVATIONS
_ACTIVATION_IDS = {name: i for i, name in enumerate(ACTIVATIONS)}
_LAYOUTS = ("int8", "int4")
_TRITON_LAYOUTS = ("int4_k64x2", "int8")
_INT4_BY_INT4 = ("int4_k64x2_s4",)  # Triton reads it, and multiplies by way of int8

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


def _fake_norm_quantize(x, x_scale, x_zero_point, lora_t, weight, layout, n, *rest):
    y = x.new_empty((*x.shape[:-1], n), dtype=rest[-13])
    return y, *_fake_quantize(x, x_scale, x_zero_point, lora_t, weight, layout, n, *rest)


def _norm_quantize(*args):
    y = _qlinear(*args[:-12])
    return y, *_layer_norm_quantize(y, *args[-12:], None, 0)


def _fake_weight_only(x, lora_t, weight, layout, n, *rest):
    return x.new_empty((*x.shape[:-1], n), dtype=rest[-1])


_schema.define("qlinear", f"{_INPUT_ARGS}, ScalarType out_dtype", "Tensor", ref.qlinear, _fake_linear, _LAYOUTS)
_qlinear, _layer_norm_quantize = torch.ops.vitq.qlinear.default, torch.ops.vitq.layer_norm_quantize.default
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
_schema.define(
    "qlinear_norm_quantize",
    f"{_INPUT_ARGS}, ScalarType out_dtype, Tensor? norm_weight, Tensor? norm_bias, float eps, {_schema.QUANT_ARGS}",
    "(Tensor, Tensor, Tensor, Tensor)",
    ref.qlinear_norm_quantize,
    _fake_norm_quantize,
    _LAYOUTS,
    _norm_quantize,
)
for _op in ("qlinear", "qlinear_quantize", "qlinear_norm_quantize"):
    _schema.define_triton(_op, "qlinear", _TRITON_LAYOUTS + _INT4_BY_INT4, lambda device: _INT4_BY_INT4)
    _schema.define_cuda(_op, _INT4_BY_INT4 + _TRITON_LAYOUTS)
_schema.define_triton("qlinear_weight_only", "qlinear", _TRITON_LAYOUTS)
_schema.define_cuda("qlinear_weight_only", _TRITON_LAYOUTS)


def _codes(x: QTensor) -> Tensor:
    if not isinstance(x, QTensor):
        raise TypeError(f"x is {type(x).__name__}, expected a QTensor (see quantize)")
    _schema.expect("x.q", x.q, dtype=torch.int8)
    return x.q


class PreparedLinear:
    """A layer's share of ``qlinear``, ``qlinear_quantize``, ``qlinear_norm_quantize`` and ``qlinear_weight_only``.

    Args:   weight, weight_scale, bias, lora_up, layer_scale: as :func:`qlinear`.
            device: that of the inputs; None takes the weight's.
    Raises: TypeError, ValueError: a tensor whose dtype, shape or device does not fit.

    The methods are the public functions without what was checked here; ``backend`` wins over an outer pin.
    """

    __slots__ = (
        "_col_sum",
        "_device",
        "_device_type",
        "_layer_scale",
        "_layout",
        "_normed",
        "_packed",
        "_passed",
        "_rank",
        "_scaled",
    )

    def __init__(
        self,
        weight: PackedWeight,
        weight_scale: Tensor,
        bias: Tensor | None = None,
        lora_up: Tensor | None = None,
        layer_scale: Tensor | None = None,
        device: torch.device | None = None,
    ) -> None:
        n, k = weight.n, weight.k
        device = weight.data.device if device is None else device
        if weight.data.device != device:
            raise ValueError(f"weight is on {weight.data.device}, expected {device}")
        _schema.expect("weight_scale", weight_scale, dtype=torch.float32, shape=(n,), device=device)
        for name, p in (("bias", bias), ("layer_scale", layer_scale)):
            if p is not None:
                _schema.expect(name, p, dtype=_schema.FLOATS, shape=(n,), device=device)
        if lora_up is not None:
            _schema.expect("lora_up", lora_up, dtype=_schema.FLOATS, shape=(n, None), device=device)
        self._layout, self._device, self._device_type = weight.layout, device, device.type
        self._rank = None if lora_up is None else lora_up.shape[1]
        self._packed = (weight.data, LAYOUT_IDS[weight.layout], n, k)
        self._col_sum, self._layer_scale = weight.col_sum, layer_scale
        self._scaled = (weight.lut, weight_scale, bias, lora_up)
        self._passed = None  # metadata of the last call that was checked, and its M
        self._normed = None  # the LayerNorm behind that was checked last

    def _check(self, x: Tensor, t: Tensor | None, activation: str, residual: Tensor | None) -> int:
        """M. Everything but the dtype of ``x`` and its scale, which not all ops share."""
        shape, device, (_, _, n, k) = x.shape, self._device, self._packed
        if not shape or shape[-1] != k:
            raise ValueError(f"x has shape {tuple(shape)}, expected [..., {k}]")
        if x.device != device:
            raise ValueError(f"x is on {x.device}, expected {device}")
        if activation not in _ACTIVATION_IDS:
            raise ValueError(f"activation is {activation!r}, expected one of {', '.join(ACTIVATIONS)}")
        m = _schema.rows(x)
        if self._rank is not None:
            if t is None:
                raise ValueError("lora_up is given but the input carries no t, expected t [M, R]")
            _schema.expect("t", t, dtype=torch.float32, shape=(m, self._rank), device=device)
        if residual is not None:
            _schema.expect("residual", residual, dtype=_schema.FLOATS, shape=(*shape[:-1], n), device=device)
        return m

    def _flat(self, x: QTensor, activation: str, residual: Tensor | None) -> tuple[tuple, int]:
        """The flat arguments up to ``residual``, and M."""
        if not isinstance(x, QTensor):
            _codes(x)
        q, scale, t = x.q, x.scale, None if self._rank is None else x.t
        describe, passed = _schema.metadata, self._passed
        case = describe(q), describe(scale), describe(t), describe(residual), activation
        if passed is None or passed[0] != case:
            _codes(x)
            m = self._check(q, t, activation, residual)
            if self._packed[3] > _schema.MAX_TERMS:
                k = self._packed[3]
                raise ValueError(f"weight has {k} in features, expected at most {_schema.MAX_TERMS}: sums are int32")
            if scale.numel() not in (1, m):
                raise ValueError(f"x.scale has shape {tuple(scale.shape)}, expected 1 or M = {m} values")
            _schema.expect("x.scale", scale, dtype=torch.float32, device=self._device)
            passed = self._passed = case, m
        tail = (_ACTIVATION_IDS[activation], self._layer_scale, residual)
        return (q, scale, x.zero_point, t, *self._packed, self._col_sum, *self._scaled, *tail), passed[1]

    def qlinear(
        self,
        x: QTensor,
        activation: str = "none",
        residual: Tensor | None = None,
        out_dtype: torch.dtype = torch.float32,
        backend: str | None = None,
    ) -> Tensor:
        _schema.expect_float("out_dtype", out_dtype)
        args, m = self._flat(x, activation, residual)
        return self._serving("qlinear", m, backend).fn(*args, out_dtype)

    def _serving(self, op: str, m: int, backend: str | None) -> backends.Implementation:
        return backends.resolve(op, self._device_type, self._layout, backend, (m, *self._packed[2:]))

    def qlinear_quantize(
        self,
        x: QTensor,
        out: _schema.Epilogue,
        activation: str = "none",
        residual: Tensor | None = None,
        backend: str | None = None,
    ) -> QTensor:
        args, m = self._flat(x, activation, residual)
        quant = out.fit(m, self._packed[2], self._device)
        return out.wrap(self._serving("qlinear_quantize", m, backend).fn(*args, *quant))

    def qlinear_norm_quantize(
        self,
        x: QTensor,
        norm_weight: Tensor | None,
        norm_bias: Tensor | None,
        eps: float,
        out: _schema.Epilogue,
        residual: Tensor | None = None,
        out_dtype: torch.dtype = torch.float32,
        backend: str | None = None,
    ) -> tuple[Tensor, QTensor]:
        """y = :meth:`qlinear`, and :func:`layer_norm_quantize` of it: bit for bit the two ops on ``cpu`` and ``ref``,
        one launch on ``triton``."""
        _schema.expect_float("out_dtype", out_dtype)
        args, m = self._flat(x, "none", residual)
        n, device, passed = self._packed[2], self._device, self._normed
        if passed is None or passed[0] is not norm_weight or passed[1] is not norm_bias or passed[2] != eps:
            if n == 0:
                raise ValueError("weight has 0 out features, expected at least 1 in front of a LayerNorm")
            expect_norm(norm_weight, norm_bias, eps, n, device)
            self._normed = norm_weight, norm_bias, eps
        quant = out.fit(m, n, device)
        impl = self._serving("qlinear_norm_quantize", m, backend)
        y, *coded = impl.fn(*args, out_dtype, norm_weight, norm_bias, eps, *quant)
        return y, out.wrap(coded)

    def qlinear_weight_only(
        self,
        x: Tensor,
        lora_t: Tensor | None = None,
        activation: str = "none",
        residual: Tensor | None = None,
        out_dtype: torch.dtype | None = None,
        backend: str | None = None,
    ) -> Tensor:
        describe, passed = _schema.metadata, self._passed
        case = describe(x), describe(lora_t), describe(residual), activation
        if passed is None or passed[0] != case:
            _schema.expect("x", x, dtype=_schema.FLOATS)
            passed = self._passed = case, self._check(x, lora_t, activation, residual)
        tail = (_ACTIVATION_IDS[activation], self._layer_scale, residual)
        impl = self._serving("qlinear_weight_only", passed[1], backend)
        out_dtype = x.dtype if out_dtype is None else out_dtype
        _schema.expect_float("out_dtype", out_dtype)
        return impl.fn(x, lora_t, *self._packed, *self._scaled, *tail, out_dtype)


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
    Backends: ref any (any layout) | cpu (int8_n16k4, int4_n16k4) | triton, cuda >= sm_80 (int8, int4_k64x2,
              int4_k64x2_s4 for codes of x within [−8, 7])
    """
    layer = PreparedLinear(weight, weight_scale, bias, lora_up, layer_scale, _codes(x).device)
    return layer.qlinear(x, activation, residual, out_dtype)


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
    Backends: ref any | cpu | triton, cuda >= sm_80
    """
    layer = PreparedLinear(weight, weight_scale, bias, lora_up, layer_scale, _codes(x).device)
    return layer.qlinear_quantize(x, _schema.Epilogue(out), activation, residual)


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
    Backends: ref any | cpu | triton, cuda >= sm_80
    """
    _schema.expect("x", x, dtype=_schema.FLOATS)
    layer = PreparedLinear(weight, weight_scale, bias, lora_up, layer_scale, x.device)
    return layer.qlinear_weight_only(x, lora_t, activation, residual, out_dtype)
