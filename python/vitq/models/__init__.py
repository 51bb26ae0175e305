"""Models of our own (importing this package registers them with timm) and the adapters of the model families."""

from .adapters import adapter_for
from .digits_vit import vit_digits_patch4_32
from .outlier import outlier_variant
from .points import PointMAE, PointMAEFamily, PointTransformer, PointTransformerFamily
from .sites import AttentionSite, BlockSite, Family, LinearSite, MlpSite, NormSite
from .timm_family import state_data

__all__ = [
    "AttentionSite",
    "BlockSite",
    "Family",
    "LinearSite",
    "MlpSite",
    "NormSite",
    "PointMAE",
    "PointMAEFamily",
    "PointTransformer",
    "PointTransformerFamily",
    "adapter_for",
    "outlier_variant",
    "state_data",
    "vit_digits_patch4_32",
]
