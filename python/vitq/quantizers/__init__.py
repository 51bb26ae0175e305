"""Differentiable simulation of the integer layers."""

from .activation import ActivationQuantizer
from .attention import FocusQuantizer, SimAttention, SimBlocks
from .floats import SimGelu, SimLayerNorm
from .linear import SimLinear, SimPatchConv
from .weight import WeightQuantizer

__all__ = [
    "ActivationQuantizer",
    "FocusQuantizer",
    "SimAttention",
    "SimBlocks",
    "SimGelu",
    "SimLayerNorm",
    "SimLinear",
    "SimPatchConv",
    "WeightQuantizer",
]
