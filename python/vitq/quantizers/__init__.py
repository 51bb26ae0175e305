"""Differentiable simulation of the integer layers."""

from .activation import ActivationQuantizer
from .attention import FocusQuantizer, SimAttention, SimBlocks
from .floats import SimGelu, SimLayerNorm
from .linear import SimLinear, SimPatchConv
from .simulated import LogLevels, ShiftedLog, SimulationOnly, TwinUniform
from .weight import WeightQuantizer

__all__ = [
    "ActivationQuantizer",
    "FocusQuantizer",
    "LogLevels",
    "ShiftedLog",
    "SimAttention",
    "SimBlocks",
    "SimGelu",
    "SimLayerNorm",
    "SimLinear",
    "SimPatchConv",
    "SimulationOnly",
    "TwinUniform",
    "WeightQuantizer",
]
