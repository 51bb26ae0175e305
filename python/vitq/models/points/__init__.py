"""Point-cloud models: Point-MAE's arrangement and Point Transformer, registered with timm by being imported."""

from .family import PointMAEFamily
from .point_mae import PointMAE, PointMAEClassifier, PointMAEPartSegmenter
from .registry import (
    point_mae_modelnet40,
    point_mae_parts,
    point_mae_primitives,
    point_mae_scanobjectnn,
    point_mae_shapenetpart,
)

__all__ = [
    "PointMAE",
    "PointMAEClassifier",
    "PointMAEFamily",
    "PointMAEPartSegmenter",
    "point_mae_modelnet40",
    "point_mae_parts",
    "point_mae_primitives",
    "point_mae_scanobjectnn",
    "point_mae_shapenetpart",
]
