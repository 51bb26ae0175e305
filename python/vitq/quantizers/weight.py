"""Quantizer of weights: symmetric per output channel, nearest or learned rounding, uniform levels or a table."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from vitq_kernels.formats import QuantSpec
from vitq_kernels.ops import learning
from vitq_kernels.ops.learning.ref import GAMMA, ZETA, rectified_sigmoid

from . import functional as fq


class WeightQuantizer(nn.Module):
    """[N, K] floats to integer codes.

    Attributes:
        spec: QuantSpec, or None for weights that stay float.
        scale: Parameter float32 [N].
        alpha: Parameter [N, K] of learned rounding, floor(W/s) + h(alpha) with h the stretched sigmoid, or None for
            nearest rounding.
        soft: use h itself (while it is being learned) instead of h ≥ ½.
    """

    def __init__(self) -> None:
        super().__init__()
        self.spec: QuantSpec | None = None
        self.register_parameter("scale", None)
        self.register_parameter("alpha", None)
        self.register_buffer("lut", None, persistent=False)
        self.soft = False

    def set(self, spec: QuantSpec | None, scale: Tensor | None = None) -> None:
        """Take ``spec`` and ``scale`` ([N], positive); rounding is nearest again."""
        if (spec is None) != (scale is None):
            raise ValueError(f"spec is {spec} and scale is {scale}, expected both or neither")
        if scale is not None and not bool(((scale > 0) & scale.isfinite()).all()):
            raise ValueError(f"scale spans [{scale.min():.3g}, {scale.max():.3g}], expected positive finite values")
        self.spec = spec
        self.scale = None if scale is None else nn.Parameter(scale.detach().float().clone())
        self.alpha = None
        self.lut = None if spec is None or spec.table is None else spec.table.lut().to(scale.device)

    @property
    def limit(self) -> float:
        """Largest magnitude of a code."""
        return float(max(self.spec.qmax, -self.spec.qmin))

    def learn_rounding(self, weight: Tensor) -> None:
        """Start learned rounding at the nearest one of ``weight`` (h(alpha) is the fraction of weight/scale)."""
        if self.lut is not None:
            raise ValueError("learned rounding needs uniform codes, the weight has a level table")
        with torch.no_grad():
            ratio = weight / self.scale.unsqueeze(1)
            fraction = ((ratio - ratio.floor()) - GAMMA) / (ZETA - GAMMA)
            self.alpha = nn.Parameter(torch.log(fraction / (1 - fraction)))

    def undecided(self, beta: float) -> Tensor:
        """Σ 1 − |2h(alpha) − 1|^beta, differentiable."""
        return learning.rounding_penalty(self.alpha, beta).sum()

    def forward(self, weight: Tensor) -> Tensor:
        """Codes [N, K] as floats; not differentiable."""
        spec, scale = self.spec, self.scale.unsqueeze(1)
        if self.alpha is None:
            return fq.quantize(weight, scale, 0.0, spec.qmin, spec.qmax, self.lut)
        up = rectified_sigmoid(self.alpha)[0] if self.soft else (self.alpha >= 0).to(weight.dtype)
        return ((weight / scale).floor() + up).clamp(spec.qmin, spec.qmax)

    def values(self, weight: Tensor) -> Tensor:
        """What the codes stand for [N, K], differentiable."""
        spec = self.spec
        if self.alpha is None:
            return learning.fake_quantize(weight, self.scale, None, spec.qmin, spec.qmax, lut=self.lut)
        if self.soft:
            return learning.soft_round(self.alpha, weight, self.scale, spec.qmin, spec.qmax)
        return self(weight) * self.scale.unsqueeze(1)
