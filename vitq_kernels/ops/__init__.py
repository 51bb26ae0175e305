"""Integer operators for vision transformers. Each folder: schema, checks and docs (``__init__``), oracle (``ref``)."""

from . import float_stages, learning
from .layer_norm_quantize import layer_norm_quantize
from .qattention import qattention, qattention_quantize
from .qlinear import qlinear, qlinear_quantize, qlinear_weight_only
from .quantize import quantize

__all__ = [
    "float_stages",
    "layer_norm_quantize",
    "learning",
    "qattention",
    "qattention_quantize",
    "qlinear",
    "qlinear_quantize",
    "qlinear_weight_only",
    "quantize",
]
