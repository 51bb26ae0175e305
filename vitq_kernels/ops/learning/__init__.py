"""Quantizers with straight-through gradients, in one pass over memory each way: what calibration learns with.

Composed of torch's operators a quantizer and its derivative read and write memory about ten times, a focused softmax
thirty; they, not the products, were most of a learning step. Nothing here has to round as a deployed kernel does: where
no gradient is recorded the simulation takes the kernels' own float stages (see ``float_stages``).
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import lru_cache

import torch
from torch import Tensor

from ... import backends
from ...formats import FocusSpec
from .. import _schema
from . import ref

_FAKE_QUANTIZE = (
    "Tensor x, Tensor scale, Tensor? zero_point, int qmin, int qmax, Tensor? row_qmax, Tensor? lut, int? key, int last"
)
_FOCUS = "float b1, float b2, float power, bool row_anchor, Tensor table, int? key, int last"

_schema.define(
    "fake_quantize",
    _FAKE_QUANTIZE,
    "Tensor",
    ref.fake_quantize,
    lambda x, *rest: torch.empty_like(x, memory_format=torch.contiguous_format),
)
_schema.define(
    "fake_quantize_backward",
    f"Tensor grad, {_FAKE_QUANTIZE}",
    "(Tensor, Tensor, Tensor)",
    ref.fake_quantize_backward,
    lambda grad, x, *rest: (
        torch.empty_like(x, memory_format=torch.contiguous_format),
        x.new_empty(x.shape[0]),
        x.new_empty(x.shape[0]),
    ),
)
_schema.define(
    "mix",
    "Tensor x, Tensor other, int key, int last",
    "Tensor",
    ref.mix,
    lambda x, *rest: torch.empty_like(x, memory_format=torch.contiguous_format),
)
_schema.define(
    "focused_softmax",
    f"Tensor scores, {_FOCUS}",
    "(Tensor, Tensor, Tensor)",
    ref.focused_softmax,
    lambda scores, *rest: (
        torch.empty_like(scores, memory_format=torch.contiguous_format),
        torch.empty_like(scores, memory_format=torch.contiguous_format),
        scores.new_empty(scores.shape[0]),
    ),
)
_schema.define(
    "focused_softmax_backward",
    f"Tensor grad, Tensor? grad_total, Tensor u, {_FOCUS}",
    "(Tensor, Tensor)",
    ref.focused_softmax_backward,
    lambda grad, grad_total, u, *rest: (
        torch.empty_like(u, memory_format=torch.contiguous_format),
        u.new_empty(3, u.shape[0]),
    ),
)


_schema.define(
    "soft_round",
    "Tensor alpha, Tensor weight, Tensor scale, int qmin, int qmax",
    "Tensor",
    ref.soft_round,
    lambda alpha, *rest: torch.empty_like(alpha, memory_format=torch.contiguous_format),
)
_schema.define(
    "soft_round_backward",
    "Tensor grad, Tensor alpha, Tensor weight, Tensor scale, int qmin, int qmax",
    "(Tensor, Tensor)",
    ref.soft_round_backward,
    lambda grad, alpha, *rest: (
        torch.empty_like(alpha, memory_format=torch.contiguous_format),
        alpha.new_empty(alpha.shape[0]),
    ),
)
_schema.define(
    "rounding_penalty",
    "Tensor alpha, float beta",
    "Tensor",
    ref.rounding_penalty,
    lambda alpha, beta: alpha.new_empty(alpha.shape[0]),
)
_schema.define(
    "rounding_penalty_backward",
    "Tensor grad, Tensor alpha, float beta",
    "Tensor",
    ref.rounding_penalty_backward,
    lambda grad, alpha, beta: torch.empty_like(alpha, memory_format=torch.contiguous_format),
)

_DIFFERENTIABLE = ("fake_quantize", "focused_softmax", "soft_round", "rounding_penalty")
for _op_name in ("mix", *_DIFFERENTIABLE, *(f"{name}_backward" for name in _DIFFERENTIABLE)):
    _schema.define_triton(_op_name, "learning")


@dataclass(frozen=True)
class Dropped:
    """Elements that stay float (QDrop, Wei et al. 2022): at random, the same ones on every device.

    Args: key: of the draw, in [0, 2^63); rate: chance of each element, in [0, 1].
    """

    key: int
    rate: float

    def __post_init__(self) -> None:
        if not (0 <= self.key < 1 << 63):
            raise ValueError(f"key is {self.key}, expected an int in [0, 2^63)")
        if not (0.0 <= self.rate <= 1.0):
            raise ValueError(f"rate is {self.rate}, expected a number in [0, 1]")

    @property
    def last(self) -> int:
        """Hashes, uniform int32, up to this one are dropped."""
        return max(round(self.rate * 2**32) - 1, 0) - 2**31


def _op(name: str, x: Tensor) -> Callable:
    """What serves float32 on x's device; other dtypes take the oracle."""
    return backends.resolve(name, x.device.type).fn if x.dtype is torch.float32 else getattr(ref, name)


def _draw(dropped: Dropped | None) -> tuple[int | None, int]:
    return (None, 0) if dropped is None or not dropped.rate else (dropped.key, dropped.last)


def _expect_rows(name: str, x: Tensor) -> None:
    _schema.expect(name, x, dtype=(*_schema.FLOATS, torch.float64))
    if x.dim() == 0 or x.shape[-1] == 0:
        raise ValueError(f"{name} has shape {tuple(x.shape)}, expected [..., L] with L >= 1")


def _wide(x: Tensor) -> Tensor:
    return x.float() if x.dtype in (torch.float16, torch.bfloat16) else x


class _FakeQuantize(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, scale, zero_point, qmin, qmax, row_qmax, lut, dropped):
        ctx.save_for_backward(x, scale, zero_point, row_qmax, lut)
        ctx.bounds, ctx.draw = (qmin, qmax), _draw(dropped)
        return _op("fake_quantize", x)(x, scale.reshape(-1), zero_point, qmin, qmax, row_qmax, lut, *ctx.draw)

    @staticmethod
    def backward(ctx, grad):
        x, scale, zero_point, row_qmax, lut = ctx.saved_tensors
        arguments = x, scale.reshape(-1), zero_point, *ctx.bounds, row_qmax, lut, *ctx.draw
        of_x, of_scale, of_zero = _op("fake_quantize_backward", x)(grad, *arguments)
        needed = ctx.needs_input_grad
        return (
            of_x if needed[0] else None,
            of_scale.view(-1, scale.numel()).sum(0).view(scale.shape) if needed[1] else None,
            of_zero.sum(0, keepdim=True) if needed[2] else None,
            *[None] * 5,
        )


def fake_quantize(
    x: Tensor,
    scale: Tensor,
    zero_point: Tensor | None,
    qmin: int,
    qmax: int,
    row_qmax: Tensor | None = None,
    lut: Tensor | None = None,
    dropped: Dropped | None = None,
) -> Tensor:
    """scale·clamp(rne(x/scale), qmin − z, qmax − z), by way of the level table if any, differentiable.

    Args:
        x: float [..., L]: rows R = all dimensions but the last.
        scale: x's dtype, S elements with S a divisor of R; row r takes scale[r mod S].
        zero_point: x's dtype [1], z is its nearest integer within [qmin, qmax]; None for 0.
        qmin, qmax: of codes, within [−128, 127]. row_qmax: int32 [R], ±row_qmax instead of them, or None.
        lut: int8 [256], level of each code + 128, or None. dropped: elements that stay x, or None for none.
    Returns: x's shape; float32 for 16-bit floats.
    Raises: TypeError for a dtype, ValueError for a shape or device that does not fit.
    Gradients: straight through the rounding and the table: to x that of y inside the clamp, else 0; to the scale
        code − x/scale inside and the code outside (LSQ, Esser et al. 2020, without its heuristic factor); to the zero
        point, straight through its own rounding, −scale outside.
    Backends: cpu (float32) | triton >= sm_80 | any, as plain torch
    """
    _expect_rows("x", x)
    rows = _wide(x).reshape(-1, x.shape[-1])
    if not len(rows):
        return rows.view(x.shape)
    _schema.expect("scale", scale, dtype=rows.dtype, device=x.device)
    if not scale.numel() or len(rows) % scale.numel():
        raise ValueError(f"scale has {scale.numel()} elements, expected a divisor of the {len(rows)} rows")
    if zero_point is not None:
        _schema.expect("zero_point", zero_point, dtype=rows.dtype, shape=(1,), device=x.device)
    if not -128 <= qmin <= 0 <= qmax <= 127:
        raise ValueError(f"(qmin, qmax) is ({qmin}, {qmax}), expected a range around 0 within [-128, 127]")
    if row_qmax is not None:
        _schema.expect("row_qmax", row_qmax, dtype=torch.int32, shape=(len(rows),), device=x.device)
    if lut is not None:
        _schema.expect("lut", lut, dtype=torch.int8, shape=(256,), device=x.device)
    return _FakeQuantize.apply(rows, scale, zero_point, qmin, qmax, row_qmax, lut, dropped).view(x.shape)


def mix(x: Tensor, other: Tensor, dropped: Dropped) -> Tensor:
    """x, with ``other``, of its shape, in the place of dropped elements; not differentiable.

    Raises: TypeError for a dtype, ValueError for a shape or device that does not fit.
    Backends: cpu (float32) | triton >= sm_80 | any, as plain torch
    """
    _schema.expect("x", x)
    _schema.expect("other", other, dtype=x.dtype, shape=x.shape, device=x.device)
    return _op("mix", x)(x, other, *_draw(dropped)) if dropped.rate else x


class _FocusedSoftmax(torch.autograd.Function):
    @staticmethod
    def forward(ctx, scores, b1, b2, spec, dropped):
        table = _table(spec, scores.device, scores.dtype)
        focus = float(spec.b1), float(spec.b2), spec.power, spec.anchor == "row", table
        level, u, total = _op("focused_softmax", scores)(scores, *focus, *_draw(dropped))
        ctx.save_for_backward(u, table)
        ctx.focus, ctx.draw, ctx.spec = focus[:-1], _draw(dropped), spec
        ctx.set_materialize_grads(False)
        if spec.anchor != "row":
            ctx.mark_non_differentiable(total)
        return level, total

    @staticmethod
    def backward(ctx, grad, grad_total):
        u, table = ctx.saved_tensors
        grad = torch.zeros_like(u) if grad is None else grad
        arguments = grad, grad_total, u, *ctx.focus, table, *ctx.draw
        of_scores, sums = _op("focused_softmax_backward", u)(*arguments)
        of_b1 = of_b2 = None
        if ctx.needs_input_grad[1] or ctx.needs_input_grad[2]:
            first, second, lifted = sums.double().sum(1).cpu()
            b1, b2, grid = ctx.spec.b1, ctx.spec.b2, ctx.spec.grid
            # Of (u − b1)/(b2 − b1), and of a level (b1 + (b2 − b1)·w)/b2·grid, whose table holds 1 − w.
            of_b1 = (second - first) / (b2 - b1) + lifted * grid / b2
            of_b2 = -second / (b2 - b1) - lifted * grid * b1 / b2**2
        return of_scores, of_b1, of_b2, None, None


@lru_cache(maxsize=256)
@torch.inference_mode(False)
def _table(spec: FocusSpec, device: torch.device, dtype: torch.dtype) -> Tensor:
    """[3, n + 1]: integer levels, derivatives of the unsnapped levels by the code, and 1 − (code/n)^power, which says
    how they move with the interval (0 where levels are codes).

    Kept: while the interval is not learned no step computes it, or copies it to a GPU, again.
    """
    levels, step, _ = spec.decode()
    levels = levels.double()
    if spec.affine:
        return torch.stack([levels, torch.ones_like(levels), torch.zeros_like(levels)]).to(device, dtype)
    share = torch.arange(spec.n + 1, dtype=torch.float64, device="cpu") / spec.n
    slopes = (spec.b2 - spec.b1) / step * spec.power / spec.n * share ** (spec.power - 1.0)
    lifts = 1.0 - share**spec.power
    if spec.below == "zero":
        slopes[0] = lifts[0] = 0.0
    return torch.stack([levels, slopes, lifts]).to(device, dtype)


def focused_softmax(
    scores: Tensor, b1: Tensor, b2: Tensor, spec: FocusSpec, dropped: Dropped | None = None
) -> tuple[Tensor, Tensor]:
    """Integer levels of softmax(scores) under ``spec``, differentiable in the scores and the interval.

    Math:    u = exp(s − max s), over its sum with an absolute anchor; level of rne(n·x^(1/power)), where x is
             (u − b1)/(b2 − b1) within [0, 1].
    Args:
        scores: float [..., Nk], −inf for keys that are excluded (whose level is that of u = 0).
        b1, b2: float64 scalars on the CPU that hold the interval of ``spec`` and receive its gradient.
        dropped: elements whose level is their position before rounding (affine specs only), or None for none.
    Returns: levels of the scores' shape; total [...], Σ exp(s − max s), differentiable with row anchors.
    Gradients: straight through the rounding; levels on a grid have the derivatives of those before snapping.
    Raises: TypeError for a dtype, ValueError for a shape, or for dropped elements of levels on a grid.
    Backends: cpu (float32) | triton >= sm_80 | any, as plain torch
    """
    _expect_rows("scores", scores)
    for name, value in (("b1", b1), ("b2", b2)):
        _schema.expect(name, value, dtype=torch.float64, shape=(), device=torch.device("cpu"))
    if dropped is not None and not spec.affine:
        raise ValueError(f"dropped is given with {spec}, expected None: its levels are no positions")
    rows = _wide(scores).reshape(-1, scores.shape[-1])
    level, total = _FocusedSoftmax.apply(rows, b1, b2, spec, dropped)
    return level.view(scores.shape), total.view(scores.shape[:-1])


class _SoftRound(torch.autograd.Function):
    @staticmethod
    def forward(ctx, alpha, weight, scale, qmin, qmax):
        ctx.save_for_backward(alpha, weight, scale)
        ctx.bounds = qmin, qmax
        return _op("soft_round", alpha)(alpha, weight, scale, qmin, qmax)

    @staticmethod
    def backward(ctx, grad):
        saved = ctx.saved_tensors
        of_alpha, of_scale = _op("soft_round_backward", saved[0])(grad, *saved, *ctx.bounds)
        return of_alpha, None, of_scale if ctx.needs_input_grad[2] else None, None, None


def soft_round(alpha: Tensor, weight: Tensor, scale: Tensor, qmin: int, qmax: int) -> Tensor:
    """scale·clamp(floor(weight/scale) + h(alpha), qmin, qmax) with AdaRound's h, a sigmoid stretched to [−0.1, 1.1] and
    clamped to [0, 1]; differentiable in alpha and the scale.

    Args: alpha, weight: float [N, K]; scale: float [N].
    Gradients: the floor is a constant, as to the weight and to the scale.
    Raises: TypeError for a dtype, ValueError for a shape or device that does not fit.
    Backends: cpu (float32) | triton >= sm_80 | any, as plain torch
    Source: Nagel et al. 2020.
    """
    _schema.expect("alpha", alpha, shape=(None, None))
    _schema.expect("weight", weight, dtype=alpha.dtype, shape=alpha.shape, device=alpha.device)
    _schema.expect("scale", scale, dtype=alpha.dtype, shape=alpha.shape[:1], device=alpha.device)
    return _SoftRound.apply(alpha, weight, scale, qmin, qmax)


class _RoundingPenalty(torch.autograd.Function):
    @staticmethod
    def forward(ctx, alpha, beta):
        ctx.save_for_backward(alpha)
        ctx.beta = beta
        return _op("rounding_penalty", alpha)(alpha, beta)

    @staticmethod
    def backward(ctx, grad):
        (alpha,) = ctx.saved_tensors
        return _op("rounding_penalty_backward", alpha)(grad, alpha, ctx.beta), None


def rounding_penalty(alpha: Tensor, beta: float) -> Tensor:
    """[N] Σ_k 1 − |2h(alpha) − 1|^beta: AdaRound's regulariser, 0 where every rounding is decided.

    Args: alpha: float [N, K]; beta: ≥ 2.
    Raises: ValueError for another shape or beta.
    Backends: cpu (float32) | triton >= sm_80 | any, as plain torch
    """
    _schema.expect("alpha", alpha, shape=(None, None))
    if not beta >= 2.0:
        raise ValueError(f"beta is {beta}, expected at least 2")
    return _RoundingPenalty.apply(alpha, beta)
