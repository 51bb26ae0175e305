"""Give a simulated layer its formats: specs, searched scales, level tables."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from typing import Literal

import torch
from pydantic import BaseModel, ConfigDict, Field
from torch import Tensor

from vitq_kernels.formats import FocusSpec, QuantSpec

from .levels import activation_table, weight_table
from .observers import Histogram, even_stride, search_range, weight_scale
from .quantizers import FocusQuantizer, SimAttention, SimLinear, SimulationOnly

SAMPLE = 1 << 19


class Search(BaseModel):
    """How a static range is found: ``minmax``, ``percentile``, or ``mse``: the least Σ|x − Q(x)|^norm.

    Of activations all of them see a sample: rows that :func:`observe` kept, of these about SAMPLE values. Hence
    ``minmax`` spans the sample's extremes, and the rarest values of all images may lie outside.
    ``margin`` widens what was found: images unlike those of calibration reach beyond it.
    """

    model_config = ConfigDict(extra="forbid", frozen=True)

    method: Literal["minmax", "percentile", "mse"] = "mse"
    percentile: float = Field(0.999, gt=0.5, le=1.0)
    norm: float = Field(2.0, gt=0.0)
    steps: int = Field(50, ge=2)
    margin: float = Field(1.0, ge=1.0, le=4.0)

    def range(self, h: Histogram, spec: QuantSpec) -> tuple[Tensor, Tensor]:
        scale, zero = search_range(h, spec, self.method, percentile=self.percentile, norm=self.norm, steps=self.steps)
        return scale * self.margin, zero


def _sample(x: Tensor) -> Tensor:
    """About SAMPLE values of the last dimension, or more, evenly drawn."""
    return x[..., :: even_stride(x.shape[-1], SAMPLE)]


def set_weight(
    linear: SimLinear,
    weight: Tensor,
    spec: QuantSpec,
    search: Search,
    importance: Tensor | None = None,
    table: bool = False,
) -> None:
    """Quantize ``linear``'s weight by ``spec`` with scales searched for ``weight`` ([N, K], usually its own).

    Args: importance [K] of the columns' squared errors; table: replace uniform levels by a table fitted to the weight.
    """
    if table and spec.bits < 8:  # 8-bit levels are the whole grid
        spec = weight_table(weight, spec, importance)
    linear.quant.set(spec, weight_scale(weight, spec, importance, search.method, search.norm, search.steps))


def set_activation(
    linear: SimLinear, rows: Tensor, spec: QuantSpec | None, search: Search, table: bool = False
) -> None:
    """Quantize what enters ``linear`` by ``spec``, static ranges from ``rows`` [T, K] (after the subspace, if any)."""
    if spec is not None and table and spec.bits < 8:
        spec = activation_table(rows, spec)
    if spec is None or spec.dynamic:
        linear.act.set(spec)
        linear.act.to(linear.weight.device)  # a table of levels
        return
    scale, zero = search.range(Histogram.of(_sample(rows.reshape(1, -1))), spec)
    linear.act.set(spec, scale, float(zero))


def set_operands(attention: SimAttention, qkv: Tensor, spec: QuantSpec, search: Search) -> None:
    """Quantize Q, K, V by ``spec``; static scales from fused outputs ``qkv`` [B, N, 3·H·d]."""
    operands = attention.operands
    operands.groups = 3 if spec.granularity == "per_tensor" else 3 * attention.heads
    if spec.dynamic:
        operands.set(spec)
        return
    values = qkv.reshape(-1, operands.groups, qkv.shape[-1] // operands.groups).transpose(0, 1)
    scale, _ = search.range(Histogram.of(_sample(values.reshape(operands.groups, -1))), spec)
    operands.set(spec, scale)


@contextmanager
def attention_error(
    attention: SimAttention, qkv: Tensor, mask: Tensor | None, importance: Tensor | None = None
) -> Iterator[Callable[[], float]]:
    """A function for the squared error of the attention's output over ``qkv`` [B, N, 3·H·d] under the quantizer of
    probabilities that it then has; operands are float meanwhile, and all is as before at the end.

    Args: importance [B, N, H·d]: what an output's squared error counts, or None for one.
    """
    before = attention.focus, attention.simulated, attention.operands.spec
    attention.focus = attention.simulated = attention.operands.spec = None

    @torch.no_grad()
    def error() -> float:
        square = (attention.attend(qkv, mask) - target).square()
        return float((square if importance is None else square * importance).sum())

    try:
        with torch.no_grad():
            target = attention.attend(qkv, mask)
        yield error
    finally:
        attention.focus, attention.simulated, attention.operands.spec = before


def search_focus(attention: SimAttention, spec: FocusSpec, qkv: Tensor, mask: Tensor | None, steps: int) -> FocusSpec:
    """b1 and b2 with the least squared error of the attention's output over ``qkv`` [B, N, 3·H·d] (float operands).

    A grid of ``steps`` upper ends, spaced evenly in the logarithm, then of lower ends below the best one. [R]
    """
    with attention_error(attention, qkv, mask) as squared:

        def error(b1: float, b2: float) -> float:
            attention.focus = FocusQuantizer(replace(spec, b1=b1, b2=b2))
            return squared()

        uppers = torch.logspace(-2, 0, steps, device="cpu").tolist()
        b2 = min(uppers, key=lambda b: error(0.0, b))
        lowers = [0.0, *(b2 * f for f in torch.logspace(-3, -0.5, steps // 2, device="cpu").tolist())]
        b1 = min(lowers, key=lambda b: error(b, b2))
    return replace(spec, b1=b1, b2=b2)


def search_probabilities(
    attention: SimAttention,
    candidates: Iterable[SimulationOnly | FocusQuantizer],
    qkv: Tensor,
    mask: Tensor | None,
    importance: Tensor | None = None,
) -> SimulationOnly | FocusQuantizer:
    """The quantizer of probabilities with the least (weighted) squared error of the attention's output."""
    with attention_error(attention, qkv, mask, importance) as squared:

        def error(quantizer: SimulationOnly | FocusQuantizer) -> float:
            put_probabilities(attention, quantizer)
            return squared()

        return min(candidates, key=error)


def put_probabilities(attention: SimAttention, quantizer: SimulationOnly | FocusQuantizer) -> None:
    """Let ``attention`` quantize its probabilities by ``quantizer``."""
    deployable = isinstance(quantizer, FocusQuantizer)
    attention.simulated = None if deployable else quantizer
    if deployable:
        attention.focus = quantizer
