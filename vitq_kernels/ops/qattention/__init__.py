"""Integer attention with a dynamic-focusing softmax quantizer."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from ... import backends
from ...formats import ActQuant, FocusSpec, QTensor
from .. import _schema
from . import ref

_ARGS = (
    "Tensor q, Tensor k, Tensor v, Tensor q_scale, Tensor k_scale, Tensor v_scale, float softmax_scale, "
    "Tensor levels, float step, float offset, float b1, float b2, float power, bool row_anchor, bool renormalize, "
    "Tensor? bias, Tensor? mask, Tensor? scatter, int tokens"
)


def _out_shape(q, scatter, tokens):
    (b, h, n, d) = q.shape
    return (b, n, h * d) if scatter is None else (b * n // scatter.shape[0], tokens, h * d)


def _fake(q, *rest):
    *_, scatter, tokens, dtype = rest
    return q.new_empty(_out_shape(q, scatter, tokens), dtype=dtype)


def _fake_quantize(q, *rest):
    scatter, tokens, q_scale, _, _, _, groups, _, _, lora_down, _ = rest[-11:]
    return _schema.fake_quant_outputs(q, _out_shape(q, scatter, tokens), q_scale, groups, lora_down)


_schema.define("qattention", f"{_ARGS}, ScalarType out_dtype", "Tensor", ref.qattention, _fake)
_schema.define(
    "qattention_quantize",
    f"{_ARGS}, {_schema.QUANT_ARGS}",
    "(Tensor, Tensor, Tensor)",
    ref.qattention_quantize,
    _fake_quantize,
)
for _name in ("qattention", "qattention_quantize"):
    _schema.define_triton(_name, "qattention")
    _schema.define_cuda(_name)

_levels_cache: dict[tuple[FocusSpec, torch.device], Tensor] = {}


def focus_levels(focus: FocusSpec, device: torch.device) -> Tensor:
    """``focus``'s integer levels as the kernels take them: [2^bits] uint8 on ``device``."""
    return focus.decode()[0].to(device=device, dtype=torch.uint8)


def focus_args(focus: FocusSpec, device: torch.device, levels: Tensor | None = None) -> tuple:
    """``focus`` as the flat arguments levels .. renormalize."""
    if levels is None and torch.compiler.is_compiling():
        levels = focus_levels(focus, device)  # a traced tensor must not outlive its trace
    elif levels is None:
        levels = _levels_cache.get((focus, device))
        if levels is None:
            levels = _levels_cache[focus, device] = focus_levels(focus, device)
    return levels, *focus.step_offset, focus.b1, focus.b2, focus.power, focus.anchor == "row", focus.renormalize


_ANY = (None,) * 4


def check_scale(name: str, scale: Tensor, b: int, h: int, n: int, device: torch.device) -> None:
    """TypeError/ValueError unless ``scale`` is float32 of 1, [H] or [B, H, N] values on ``device``."""
    _schema.expect(name, scale, dtype=torch.float32, device=device)
    # The number of dimensions first: a tracer that compares b with H guards on it, and the batch is no longer dynamic.
    fits = scale.shape == (b, h, n) if scale.dim() == 3 else scale.dim() < 2 and scale.numel() in (1, h)
    if not fits:
        raise ValueError(f"{name} has shape {tuple(scale.shape)}, expected (1), ({h}) or ({b}, {h}, {n})")


def check_mask(mask: Tensor, b: int, nq: int, nk: int, device: torch.device) -> None:
    """TypeError/ValueError unless ``mask`` is float [G, 1 or Nq, Nk] on ``device`` and G divides B."""
    _schema.expect("mask", mask, dtype=_schema.FLOATS, shape=(None, None, nk), device=device)
    if mask.shape[0] == 0 or b % mask.shape[0] or mask.shape[1] not in (1, nq):
        raise ValueError(f"mask has shape {tuple(mask.shape)}, expected (a divisor of {b}, 1 or {nq}, {nk})")


def check_scatter(scatter: Tensor, tokens: int, b: int, n: int, device: torch.device) -> None:
    """TypeError/ValueError unless ``scatter`` is int32 [nW·N] on ``device``, nW divides B, and T ≤ nW·N tokens."""
    _schema.expect("scatter", scatter, dtype=torch.int32, shape=(None,), device=device)
    slots = scatter.shape[0]
    if slots == 0 or n == 0 or slots % n or b % (slots // n):
        raise ValueError(f"scatter has shape ({slots}), expected {n} for each of nW windows, nW a divisor of {b}")
    if not 1 <= tokens <= slots:
        raise ValueError(f"tokens is {tokens}, expected 1 to scatter's {slots}")


class PreparedAttention:
    """An attention layer's share of ``qattention`` and ``qattention_quantize``, ready to run.

    Args:   focus, softmax_scale, bias, levels: as :func:`qattention`; device: that of the operands.
    Raises: TypeError, ValueError: a tensor whose dtype, number of dimensions or device does not fit, a softmax_scale
            that is not finite.

    The methods are the public functions without what was checked here; ``backend`` wins over an outer pin.
    """

    __slots__ = ("_bias", "_device", "_device_type", "_focus", "_passed", "_softmax_scale")

    def __init__(
        self,
        focus: FocusSpec,
        softmax_scale: float | None,
        bias: Tensor | None,
        levels: Tensor | None,
        device: torch.device,
    ) -> None:
        if bias is not None:
            _schema.expect("bias", bias, dtype=_schema.FLOATS, device=device)
        if not isinstance(focus, FocusSpec):
            raise TypeError(f"focus is {type(focus).__name__}, expected a FocusSpec")
        if levels is not None:
            _schema.expect("levels", levels, dtype=torch.uint8, shape=(focus.n + 1,), device=device)
        if softmax_scale is not None and not -math.inf < softmax_scale < math.inf:  # may be symbolic: no isfinite
            raise ValueError(f"softmax_scale is {softmax_scale}, expected a finite number")
        self._softmax_scale = None if softmax_scale is None else float(softmax_scale)
        self._focus, self._bias = focus_args(focus, device, levels), bias
        self._device, self._device_type = device, device.type
        self._passed = None  # metadata of the last call that was checked, and its softmax_scale

    def flat(
        self,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        q_scale: Tensor,
        k_scale: Tensor,
        v_scale: Tensor,
        mask: Tensor | None = None,
        scatter: Tensor | None = None,
        tokens: int = 0,
    ) -> tuple:
        """The flat arguments of both ops up to ``tokens``. Raises: as :func:`qattention`."""
        operands = (q, k, v, q_scale, k_scale, v_scale)
        case = (*map(_schema.metadata, (*operands, mask, scatter)), tokens)
        passed = self._passed
        if passed is None or passed[0] != case:
            self._check(*operands, mask)
            if scatter is not None:
                check_scatter(scatter, tokens, q.shape[0], q.shape[2], self._device)
            elif tokens != 0:
                raise ValueError(f"tokens is {tokens}, expected 0 without scatter")
            scale = q.shape[3] ** -0.5 if self._softmax_scale is None else self._softmax_scale
            passed = self._passed = case, scale
        return (*operands, passed[1], *self._focus, self._bias, mask, scatter, tokens)

    def _check(
        self,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        q_scale: Tensor,
        k_scale: Tensor,
        v_scale: Tensor,
        mask: Tensor | None,
    ) -> None:
        device = self._device
        _schema.expect("q", q, dtype=torch.int8, shape=_ANY, device=device)
        b, h, nq, d = q.shape
        _schema.expect("k", k, dtype=torch.int8, shape=(b, h, None, d), device=device)
        nk = k.shape[2]
        if nk > _schema.MAX_TERMS:
            raise ValueError(f"k has {nk} keys, expected at most {_schema.MAX_TERMS}: sums are int32")
        _schema.expect("v", v, dtype=torch.int8, shape=(b, h, nk, d), device=device)
        check_scale("q_scale", q_scale, b, h, nq, device)
        check_scale("k_scale", k_scale, b, h, nk, device)
        check_scale("v_scale", v_scale, b, h, nk, device)
        if self._bias is not None:
            _schema.expect("bias", self._bias, shape=(h, nq, nk))
        if mask is not None:
            check_mask(mask, b, nq, nk, device)

    def qattention(
        self,
        *operands: Tensor,
        mask: Tensor | None,
        out_dtype: torch.dtype,
        scatter: Tensor | None = None,
        tokens: int = 0,
        backend: str | None = None,
    ) -> Tensor:
        args = self.flat(*operands, mask, scatter, tokens)
        _schema.expect_float("out_dtype", out_dtype)
        return self._serving("qattention", args, backend).fn(*args, out_dtype)

    def _serving(self, op: str, args: tuple, backend: str | None) -> backends.Implementation:
        (b, h, nk, d) = args[1].shape
        return backends.resolve(op, self._device_type, None, backend, (b * h, nk, d))

    def qattention_quantize(
        self,
        *operands: Tensor,
        mask: Tensor | None,
        out: _schema.Epilogue,
        scatter: Tensor | None = None,
        tokens: int = 0,
        backend: str | None = None,
    ) -> QTensor:
        args = self.flat(*operands, mask, scatter, tokens)
        b, n, width = _out_shape(args[0], scatter, tokens)
        quant = out.fit(b * n, width, self._device)
        return out.wrap(self._serving("qattention_quantize", args, backend).fn(*args, *quant))


def qattention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    q_scale: Tensor,
    k_scale: Tensor,
    v_scale: Tensor,
    *,
    focus: FocusSpec,
    softmax_scale: float | None = None,
    bias: Tensor | None = None,
    mask: Tensor | None = None,
    scatter: Tensor | None = None,
    tokens: int = 0,
    levels: Tensor | None = None,
    out_dtype: torch.dtype = torch.float32,
) -> Tensor:
    """o = dequant(focus(softmax(s)))·V with s = (q·kᵀ)·s_q·s_k·softmax_scale + bias + mask.

    Notation: B images (or windows), H heads, Nq queries, Nk keys, d head_dim, n = 2^bits − 1 of ``focus``.
    Math:     e = exp(s − max_j s), Σ = Σ_j e; u = e (row anchor) or e/Σ (absolute);
              c = rne(n·clamp((u − b1)/(b2 − b1), 0, 1)^(1/power)), P = levels[c]·step + offset;
              V' = rne(V·s_v[j]/S), S = max_j s_v[j] (V' = V where all tokens share a scale);
              o = S·(step·Σ_j levels[c]·V' + offset·Σ_j V') / denom,
              denom = Σ_j P if renormalize, else Σ (row anchor) or 1 (absolute).
    Args:     q ([B, H, Nq, d] int8), k, v ([B, H, Nk, d] int8): any strides with a contiguous last dimension, so views
              of a fused QKV result need no copy. *_scale: positive float32 (1), (H) or (B, H, N); zero points are 0.
              focus: FocusSpec. softmax_scale: d^-½ if None.
              bias ([H, Nq, Nk] float): added to the scores (relative position).
              mask ([G, Nq or 1, Nk] float): added; image b uses mask[b mod G] (G divides B). A key of score −inf is
              excluded from every term (also from ``offset``); a query without keys yields 0.
              scatter ([nW·Nq] int32 or None), tokens T: rows out of windows. The nW windows of an image follow one
              another in B; query i of window w goes to row scatter[w·Nq + i] of its image, −1: nowhere. Entries in
              [−1, T), which a GPU does not check, that name every row once: one that none names is undefined.
              levels ([2^bits] uint8): ``focus_levels(focus, device)`` where the caller keeps it, else None (cached).
    Returns:  [B, Nq, H·d] ([B/nW, T, H·d] with ``scatter``) out_dtype, contiguous, newly allocated.
    Raises:   TypeError for a dtype, ValueError for a shape or device that does not fit.
    Numerics: both products exact in int32 (Nk ≤ 65,793, d ≤ 131,071); softmax in float32; NaN scores make a NaN row.
    Backends: ref any | cpu | triton, cuda >= sm_80 (d <= 128, softmax_scale >= 0)
    Source:   AIQViT (arXiv 2502.04628) for the focusing quantizer; anchors, powers, renormalization: see FocusSpec.
    """
    _schema.expect("q", q, dtype=torch.int8, shape=_ANY)
    layer = PreparedAttention(focus, softmax_scale, bias, levels, q.device)
    return layer.qattention(
        q, k, v, q_scale, k_scale, v_scale, mask=mask, scatter=scatter, tokens=tokens, out_dtype=out_dtype
    )


def qattention_quantize(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    q_scale: Tensor,
    k_scale: Tensor,
    v_scale: Tensor,
    *,
    focus: FocusSpec,
    out: ActQuant,
    softmax_scale: float | None = None,
    bias: Tensor | None = None,
    mask: Tensor | None = None,
    scatter: Tensor | None = None,
    tokens: int = 0,
    levels: Tensor | None = None,
) -> QTensor:
    """q = quantize(qattention(…), out) over rows of all heads [B·Nq, H·d]; arguments as :func:`qattention`.

    Returns:  QTensor of :func:`qattention`'s shape, with the projection's t if ``out.lora_down`` is given. Scales, t
              and per-row parts of ``out`` are in the order of the result's rows.
    Backends: ref any | cpu | triton, cuda >= sm_80 (d <= 128, softmax_scale >= 0)
    """
    _schema.expect("q", q, dtype=torch.int8, shape=_ANY)
    layer = PreparedAttention(focus, softmax_scale, bias, levels, q.device)
    out = _schema.Epilogue(out)
    return layer.qattention_quantize(
        q, k, v, q_scale, k_scale, v_scale, mask=mask, scatter=scatter, tokens=tokens, out=out
    )
