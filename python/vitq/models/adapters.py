"""Which adapter describes a float model."""

from __future__ import annotations

from torch import nn

from . import timm_family, transformers_family
from .points import PointMAE, PointMAEFamily, PointTransformer, PointTransformerFamily
from .sites import Family

#: Classes of models -> adapters, beside those of transformers.
FAMILIES = timm_family.FAMILIES | {PointMAE: PointMAEFamily, PointTransformer: PointTransformerFamily}


def adapter_for(model: nn.Module) -> Family:
    """The adapter of ``model``'s family.

    Raises: TypeError for a model of no known family, naming what no adapter knows.
    """
    for kind, family in FAMILIES.items():
        if isinstance(model, kind):
            return family(model)
    if transformers_family.is_transformers(model):
        return transformers_family.TransformersViT(model)
    known = ", ".join(kind.__name__ for kind in FAMILIES)
    raise TypeError(
        f"model is {type(model).__name__}, expected one of {known}, or a vision model of transformers; {unknown(model)}"
    )


def unknown(model: nn.Module) -> str:
    """What of a model without an adapter would have to be described."""
    kinds = [type(module).__name__ for module in model.modules()]
    attentions = sorted({kind for kind in kinds if "attn" in kind.lower() or "attention" in kind.lower()})
    # One convolution embeds the patches.
    beside = {"Conv2d": ("convolutions", 1), "BatchNorm": ("batch norms", 0)}
    found = ["attention " + ", ".join(attentions)] if attentions else []
    found += [what for name, (what, usual) in beside.items() if sum(name in kind for kind in kinds) > usual]
    return f"no adapter for its {', '.join(found) or 'layers'}"
