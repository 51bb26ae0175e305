"""Point-cloud models by name, registered with timm: what ``timm.create_model`` and ``vitq quantize`` take."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from safetensors.torch import load_file
from timm.models import register_model
from torch import nn

from vitq.data.primitives import CATEGORIES, CLASSES, PARTS, POINTS

from .point_mae import PointMAEClassifier, PointMAEPartSegmenter
from .point_transformer import PointTransformerClassifier, PointTransformerPartSegmenter

ASSETS = Path(__file__).parents[2] / "assets"
TINY = {"num_points": POINTS, "num_group": 32, "group_size": 16, "trans_dim": 96, "depth": 6, "num_heads": 3}
TINY |= {"mlp_ratio": 3.0, "encoder_width": 24}


def _built(name: str, cls: type[nn.Module], pretrained: bool, arguments: dict[str, Any], timm: dict[str, Any]):
    """The model, with shipped weights if ``pretrained``. ``timm``: what ``create_model`` hands on besides."""
    own = {k: v for k, v in timm.items() if k not in ("pretrained_cfg", "pretrained_cfg_overlay", "cache_dir")}
    model = cls(**(arguments | own))
    model.pretrained_cfg = {"architecture": name}
    if pretrained:
        file = ASSETS / f"{name}.safetensors"
        if not file.is_file():
            raise OSError("no weights of it are shipped")
        model.load_state_dict({k: v.float() for k, v in load_file(file).items()})
    return model


@register_model
def point_mae_modelnet40(pretrained: bool = False, **kwargs) -> PointMAEClassifier:
    """Point-MAE's classifier of ModelNet40: 1024 points, 64 groups of 32, width 384, 12 blocks."""
    return _built("point_mae_modelnet40", PointMAEClassifier, pretrained, {"num_classes": 40}, kwargs)


@register_model
def point_mae_scanobjectnn(pretrained: bool = False, **kwargs) -> PointMAEClassifier:
    """Point-MAE's classifier of ScanObjectNN: 2048 points, 128 groups of 32, width 384, 12 blocks."""
    arguments = {"num_classes": 15, "num_points": 2048, "num_group": 128}
    return _built("point_mae_scanobjectnn", PointMAEClassifier, pretrained, arguments, kwargs)


@register_model
def point_mae_shapenetpart(pretrained: bool = False, **kwargs) -> PointMAEPartSegmenter:
    """Point-MAE's part segmentation of ShapeNetPart: 2048 points, 128 groups of 32, width 384, 12 blocks."""
    arguments = {"num_classes": 50, "categories": 16, "num_points": 2048, "num_group": 128}
    return _built("point_mae_shapenetpart", PointMAEPartSegmenter, pretrained, arguments, kwargs)


@register_model
def point_mae_primitives(pretrained: bool = False, **kwargs) -> PointMAEClassifier:
    """Classifier of ``vitq.data.primitives``: 512 points, 32 groups of 16, width 96, 6 blocks; weights shipped."""
    arguments = TINY | {"num_classes": len(CLASSES), "head_width": 96, "class_names": list(CLASSES)}
    return _built("point_mae_primitives", PointMAEClassifier, pretrained, arguments, kwargs)


@register_model
def point_mae_parts(pretrained: bool = False, **kwargs) -> PointMAEPartSegmenter:
    """Part segmentation of ``vitq.data.primitives``, otherwise as ``point_mae_primitives``."""
    arguments = TINY | {"num_classes": len(PARTS), "categories": len(CATEGORIES), "propagation": (96, 96)}
    arguments |= {"class_names": list(PARTS)}
    return _built("point_mae_parts", PointMAEPartSegmenter, pretrained, arguments, kwargs)


@register_model
def point_transformer_modelnet40(pretrained: bool = False, **kwargs) -> PointTransformerClassifier:
    """Point Transformer's encoder on ModelNet40: 1024 points, widths 32 to 512, 13 blocks of vector attention."""
    return _built("point_transformer_modelnet40", PointTransformerClassifier, pretrained, {"num_classes": 40}, kwargs)


@register_model
def point_transformer_shapenetpart(pretrained: bool = False, **kwargs) -> PointTransformerPartSegmenter:
    """Point Transformer on ShapeNetPart: 2048 points, encoder as for ModelNet40, a decoder of 5 blocks."""
    arguments = {"num_classes": 50, "categories": 16, "num_points": 2048}
    return _built("point_transformer_shapenetpart", PointTransformerPartSegmenter, pretrained, arguments, kwargs)
