"""Which adapter describes a float model."""

from __future__ import annotations

from torch import nn

from . import timm_family, transformers_family
from .sites import Family


def adapter_for(model: nn.Module) -> Family:
    """The adapter of ``model``'s family.

    Raises: TypeError for a model of no known family.
    """
    for kind, family in timm_family.FAMILIES.items():
        if isinstance(model, kind):
            return family(model)
    if transformers_family.is_transformers(model):
        return transformers_family.TransformersViT(model)
    known = ", ".join(kind.__name__ for kind in timm_family.FAMILIES)
    raise TypeError(f"model is {type(model).__name__}, expected one of timm's {known}, or a vision model of transformers")
