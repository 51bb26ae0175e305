"""Models of our own; importing this package registers them with timm."""

from .digits_vit import vit_digits_patch4_32
from .outlier import outlier_variant

__all__ = ["outlier_variant", "vit_digits_patch4_32"]
