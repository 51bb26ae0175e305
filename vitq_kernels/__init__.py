"""Integer kernels for vision transformers: int4/int8 GEMM with a low-rank branch, focusing attention."""

from .backends import backend, status
from .formats import ActQuant, FocusSpec, LevelTable, LowRankSpec, PackedWeight, QTensor, QuantSpec
from .ops import (
    layer_norm_quantize,
    qattention,
    qattention_quantize,
    qlinear,
    qlinear_quantize,
    qlinear_weight_only,
    quantize,
)
from .packing import pack_weight, unpack_weight

__version__ = "0.1.0"

__all__ = [
    "ActQuant",
    "FocusSpec",
    "LevelTable",
    "LowRankSpec",
    "PackedWeight",
    "QTensor",
    "QuantSpec",
    "backend",
    "layer_norm_quantize",
    "pack_weight",
    "qattention",
    "qattention_quantize",
    "qlinear",
    "qlinear_quantize",
    "qlinear_weight_only",
    "quantize",
    "status",
    "unpack_weight",
]
