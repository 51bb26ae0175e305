"""Float modules that a fused kernel computes: simulated with the stages of the back end."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from vitq_kernels.ops import float_stages

from .linear import SimLinear


class _Fused(nn.Module):
    """A float module inside the kernel of ``layer``: its own forward until ``layer`` is integer, or for gradients."""

    def __init__(self, layer: SimLinear) -> None:
        super().__init__()
        # Not a submodule: the layer has its own place in the model.
        self.__dict__["layer"] = layer

    def _exact(self) -> bool:
        return not torch.is_grad_enabled() and self.layer.integer


class SimLayerNorm(_Fused):
    """The LayerNorm in front of ``layer``, whose kernel normalizes and quantizes in one pass."""

    def __init__(self, norm: nn.LayerNorm, layer: SimLinear) -> None:
        super().__init__(layer)
        self.normalized_shape, self.eps = norm.normalized_shape, norm.eps
        self.weight, self.bias = norm.weight, norm.bias

    def forward(self, x: Tensor) -> Tensor:
        if self._exact():
            return float_stages.layer_norm(x, self.weight, self.bias, self.eps)
        return nn.functional.layer_norm(x, self.normalized_shape, self.weight, self.bias, self.eps)


class SimGelu(_Fused):
    """The GELU behind ``layer``, whose kernel ends in it."""

    def __init__(self, approximate: str, layer: SimLinear) -> None:
        super().__init__(layer)
        self.approximate = approximate

    def forward(self, x: Tensor) -> Tensor:
        if self._exact():
            return float_stages.gelu(x, self.approximate)
        return nn.functional.gelu(x, approximate=self.approximate)
