"""Quantizer of activations: static (scale and zero point learnable) or dynamic per token, with or without a table."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from vitq_kernels.formats import QuantSpec
from vitq_kernels.nn.token_bits import RowBits
from vitq_kernels.ops import learning

from . import functional as fq


class ActivationQuantizer(nn.Module):
    """Rows of floats to centred codes and scales, as ``vitq_kernels.quantize`` does it, or to their values.

    Args:
        groups: number of equal column groups with scales of their own.

    Attributes:
        spec: QuantSpec, or None for operands that stay float.
        scale: Parameter float32 [groups] for static specs, else None.
        zero_point: Parameter float32 [1] in code units, rounded where it is used; 0 unless the spec is asymmetric.
        bits: RowBits of the next rows (of M, or of M·groups, elements), taken once; None for the spec's own.
        drop: what leaves elements float where gradients are recorded, or None.
    """

    def __init__(self, groups: int = 1) -> None:
        super().__init__()
        self.groups = groups
        self.spec: QuantSpec | None = None
        self.bits: RowBits | None = None
        self.drop: fq.Drop | None = None
        self.register_parameter("scale", None)
        self.register_parameter("zero_point", None)
        self.register_buffer("lut", None, persistent=False)

    def set(self, spec: QuantSpec | None, scale: Tensor | None = None, zero_point: float = 0.0) -> None:
        """Take ``spec``; static ones with their ``scale`` ([groups], positive) and ``zero_point``.

        Raises: ValueError for a scale where the spec is dynamic, none where it is static, or one that is not positive.
        """
        if spec is None or spec.dynamic:
            if scale is not None:
                raise ValueError("scale is given for a dynamic or absent spec, expected None")
            self.scale = self.zero_point = None
        else:
            if scale is None or tuple(scale.shape) != (self.groups,):
                raise ValueError(f"scale is {None if scale is None else tuple(scale.shape)}, expected ({self.groups},)")
            if not bool(((scale > 0) & scale.isfinite()).all()):
                raise ValueError(f"scale spans [{scale.min():.3g}, {scale.max():.3g}], expected positive finite values")
            self.scale = nn.Parameter(scale.detach().float().clone())
            self.zero_point = nn.Parameter(scale.new_full((1,), float(zero_point)), requires_grad=not spec.symmetric)
        self.spec = spec
        lut = None if spec is None or spec.table is None else spec.table.lut()
        self.lut = lut if lut is None or scale is None else lut.to(scale.device)

    @property
    def integer_zero_point(self) -> int:
        return 0 if self.zero_point is None else int(self._zero_point())

    def _zero_point(self) -> Tensor:
        return fq.round_ste(self.zero_point).clamp(self.spec.qmin, self.spec.qmax)

    @property
    def limit(self) -> float:
        """Largest magnitude of a centred code."""
        spec = self.spec
        return float(max(spec.qmax, -spec.qmin) if spec.symmetric else spec.qmax - spec.qmin)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """[M, K] floats to centred codes [M, K] and scales [M or 1, groups]; not differentiable."""
        spec, (grouped, scale, row_qmax) = self.spec, self._rows(x)
        if row_qmax is not None:
            code = fq.quantize(grouped, scale, 0.0, -row_qmax, row_qmax, self.lut)
        else:
            zero_point = 0.0 if spec.symmetric else self._zero_point()
            code = fq.quantize(grouped, scale, zero_point, spec.qmin, spec.qmax, self.lut)
        return code.reshape(x.shape), scale.squeeze(-1)

    def values(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """[M, K] floats to what their codes stand for, [M, K], and scales; differentiable."""
        spec, (grouped, scale, row_qmax) = self.spec, self._rows(x)
        if row_qmax is not None:
            row_qmax = row_qmax.int().expand(scale.shape).flatten()
        zero_point = None if spec.symmetric else self.zero_point
        dropped = self.drop() if self.drop is not None and torch.is_grad_enabled() else None
        y = learning.fake_quantize(grouped, scale, zero_point, spec.qmin, spec.qmax, row_qmax, self.lut, dropped)
        return y.reshape(x.shape), scale.squeeze(-1)

    def _rows(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor | None]:
        """x [M, groups, K/groups], scales [M or 1, groups, 1], and the largest codes [M, 1 or groups, 1] of rows with
        bits of their own, or None."""
        spec, (m, k) = self.spec, x.shape
        bits, self.bits = self.bits, None
        grouped = x.reshape(m, self.groups, k // self.groups)
        if not spec.dynamic:
            return grouped, self.scale.reshape(1, self.groups, 1), None
        row_qmax = None if bits is None else bits.qmax(spec.qmax).reshape(m, -1, 1).to(x.dtype)
        return grouped, fq.dynamic_scale(grouped, spec.qmax if row_qmax is None else row_qmax), row_qmax
