"""Point-cloud models: Point-MAE's arrangement and Point Transformer, registered with timm by being imported."""

from . import registry
from .family import PointMAEFamily, PointTransformerFamily
from .point_mae import PointMAE, PointMAEClassifier, PointMAEPartSegmenter
from .point_transformer import PointTransformer, PointTransformerClassifier, PointTransformerPartSegmenter

__all__ = [
    "PointMAE",
    "PointMAEClassifier",
    "PointMAEFamily",
    "PointMAEPartSegmenter",
    "PointTransformer",
    "PointTransformerClassifier",
    "PointTransformerFamily",
    "PointTransformerPartSegmenter",
    "registry",
]
