"""Drop-in integer modules: what a converted model is made of."""

from .attention import QAttention
from .base import QModule, Quantizer, prepack
from .linear import QLinear, QPatchEmbed
from .mlp import FloatBranch, QBlock, QBlocks, QMlp
from .window import Window, WindowMap

__all__ = [
    "FloatBranch",
    "QAttention",
    "QBlock",
    "QBlocks",
    "QLinear",
    "QMlp",
    "QModule",
    "QPatchEmbed",
    "Quantizer",
    "Window",
    "WindowMap",
    "prepack",
]
