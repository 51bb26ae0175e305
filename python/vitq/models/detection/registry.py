"""Detectors by name, registered with timm: what ``timm.create_model`` and ``vitq quantize`` take."""

from __future__ import annotations

from typing import Any

from safetensors.torch import load_file
from timm.models import register_model
from torch import nn
from torchvision.models.detection.anchor_utils import AnchorGenerator
from torchvision.models.detection.faster_rcnn import FastRCNNPredictor, TwoMLPHead
from torchvision.models.detection.mask_rcnn import MaskRCNNHeads, MaskRCNNPredictor
from torchvision.models.detection.roi_heads import RoIHeads
from torchvision.models.detection.rpn import RegionProposalNetwork, RPNHead
from torchvision.ops import MultiScaleRoIAlign

from vitq.data import shapes

from ..points.registry import ASSETS, built
from .backbones import SwinFeatures, ViTFeatures
from .rcnn import AgnosticPredictor, CascadeHeads, Detector

_MEAN, _STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
_CASCADE = ((0.5, (10.0, 10.0, 5.0, 5.0)), (0.6, (20.0, 20.0, 10.0, 10.0)), (0.7, (30.0, 30.0, 15.0, 15.0)))


_BODIES = {"swin": SwinFeatures, "vit": ViTFeatures, "deit": ViTFeatures}


def detector(
    body: str,
    num_classes: int = 80,
    *,
    cascade: bool = False,
    masks: bool = True,
    image_size: tuple[int, int] = (800, 1344),
    channels: int = 256,
    head_width: int = 1024,
    mask_layers: tuple[int, ...] = (256, 256, 256, 256),
    anchors: tuple[int, ...] = (32, 64, 128, 256, 512),
    canonical: int = 224,
    proposals: tuple[int, int] = (2000, 1000),
    samples: tuple[int, int] = (256, 512),
    batch_norm: bool = False,
    mean: tuple[float, ...] = _MEAN,
    std: tuple[float, ...] = _STD,
    class_names: list[str] | None = None,
    **body_arguments: Any,
) -> Detector:
    """A detector of torchvision's parts; the defaults are those of Mask R-CNN on COCO.

    Args:
        body: timm's name of a Swin or ViT. num_classes: without background.
        cascade: three box heads instead of one. masks: with a mask head.
        image_size: (H, W) of calibration and timing. channels: of feature maps. head_width, mask_layers: of the heads.
        anchors: sizes by map, in pixels; one more than the four maps adds a coarser one. canonical: size of an RoI that
            is pooled from the third map.
        proposals: kept before suppression (by map) and behind it (by image). samples: of a training image, by RPN and
            by heads.
        batch_norm: behind the convolutions of feature pyramid and mask head.
        body_arguments: of the timm model.
    Raises: ValueError for anchors of another number of maps, or another kind of body.
    """
    if len(anchors) not in (4, 5):
        raise ValueError(f"anchors is {anchors}, expected 4 or 5 sizes, one for each map")
    features = next((kind for prefix, kind in _BODIES.items() if body.startswith(prefix)), None)
    if features is None:
        raise ValueError(f"body is {body!r}, expected a model of timm whose name starts with {', '.join(_BODIES)}")
    backbone = features(body, tuple(image_size), channels, len(anchors) == 5, batch_norm, **body_arguments)
    generator = AnchorGenerator(tuple((size,) for size in anchors), ((0.5, 1.0, 2.0),) * len(anchors))
    rpn = RegionProposalNetwork(
        generator,
        RPNHead(channels, generator.num_anchors_per_location()[0]),
        fg_iou_thresh=0.7,
        bg_iou_thresh=0.3,
        batch_size_per_image=samples[0],
        positive_fraction=0.5,
        pre_nms_top_n={"training": proposals[0], "testing": proposals[0] // 2},
        post_nms_top_n={"training": proposals[1], "testing": proposals[1]},
        nms_thresh=0.7,
    )
    maps, classes = [str(i) for i in range(4)], 1 + num_classes
    predictor = AgnosticPredictor if cascade else FastRCNNPredictor

    def heads(overlap: float, weights: tuple[float, ...] | None, with_masks: bool) -> RoIHeads:
        mask = {
            "mask_roi_pool": MultiScaleRoIAlign(maps, 14, 2, canonical_scale=canonical),
            "mask_head": MaskRCNNHeads(channels, mask_layers, 1, nn.BatchNorm2d if batch_norm else None),
            "mask_predictor": MaskRCNNPredictor(mask_layers[-1], mask_layers[-1], classes),
        }
        return RoIHeads(
            MultiScaleRoIAlign(maps, 7, 2, canonical_scale=canonical),
            TwoMLPHead(channels * 7 * 7, head_width),
            predictor(head_width, classes),
            overlap,
            overlap,
            samples[1],
            0.25,
            weights,
            score_thresh=0.05,
            nms_thresh=0.5,
            detections_per_img=100,
            **(mask if with_masks else {}),
        )

    if cascade:
        roi_heads = CascadeHeads(heads(*stage, masks and i == 2) for i, stage in enumerate(_CASCADE))
    else:
        roi_heads = heads(0.5, None, masks)
    data = {"input_size": (3, *image_size), "mean": mean, "std": std, "num_classes": num_classes}
    if class_names is not None:
        data["class_names"] = class_names
    return Detector(backbone, rpn, roi_heads, num_classes, data)


_SHAPES = {
    "num_classes": len(shapes.CLASSES),
    "class_names": list(shapes.CLASSES),
    "image_size": (shapes.LARGEST, shapes.LARGEST),
    "channels": 48,
    "head_width": 160,
    "mask_layers": (48, 48),
    "anchors": (14, 22, 36, 60),
    "canonical": 48,
    "proposals": (300, 60),
    "samples": (96, 48),
    "batch_norm": True,
    "mean": shapes.MEAN,
    "std": shapes.STD,
}
_SMALL_SWIN = {"embed_dim": 24, "depths": (2, 2, 4, 2), "num_heads": (1, 2, 4, 8), "window_size": 6}
_SMALL_VIT = {"patch_size": 8, "embed_dim": 96, "depth": 6, "num_heads": 3, "mlp_ratio": 3.0}


@register_model
def mask_rcnn_swin_tiny(pretrained: bool = False, **kwargs) -> Detector:
    """Mask R-CNN of COCO's 80 classes on Swin-T."""
    return built("mask_rcnn_swin_tiny", detector, pretrained, {"body": "swin_tiny_patch4_window7_224"}, kwargs)


@register_model
def cascade_mask_rcnn_swin_small(pretrained: bool = False, **kwargs) -> Detector:
    """Cascade Mask R-CNN of COCO's 80 classes on Swin-S."""
    arguments = {"body": "swin_small_patch4_window7_224", "cascade": True}
    return built("cascade_mask_rcnn_swin_small", detector, pretrained, arguments, kwargs)


@register_model
def mask_rcnn_vit_base(pretrained: bool = False, **kwargs) -> Detector:
    """Mask R-CNN of COCO's 80 classes on ViT-B/16 with a simple feature pyramid."""
    arguments = {"body": "vit_base_patch16_224", "image_size": (1024, 1024)}
    return built("mask_rcnn_vit_base", detector, pretrained, arguments, kwargs)


@register_model
def mask_rcnn_shapes(pretrained: bool = False, **kwargs) -> Detector:
    """Mask R-CNN of ``vitq.data.shapes`` on a small Swin; weights shipped."""
    arguments = _SHAPES | _SMALL_SWIN | {"body": "swin_tiny_patch4_window7_224"}
    return built("mask_rcnn_shapes", detector, pretrained, arguments, kwargs)


@register_model
def faster_rcnn_shapes(pretrained: bool = False, **kwargs) -> Detector:
    """``mask_rcnn_shapes`` without its mask head, of whose weights it is."""
    arguments = _SHAPES | _SMALL_SWIN | {"body": "swin_tiny_patch4_window7_224", "masks": False}
    model = built("faster_rcnn_shapes", detector, False, arguments, kwargs)
    if pretrained:
        weights, own = load_file(ASSETS / "mask_rcnn_shapes.safetensors"), model.state_dict()
        model.load_state_dict({name: tensor.float() for name, tensor in weights.items() if name in own})
    return model


@register_model
def cascade_rcnn_shapes(pretrained: bool = False, **kwargs) -> Detector:
    """Cascade R-CNN without masks, otherwise as ``mask_rcnn_shapes``; no weights shipped."""
    arguments = _SHAPES | _SMALL_SWIN | {"body": "swin_tiny_patch4_window7_224", "cascade": True, "masks": False}
    return built("cascade_rcnn_shapes", detector, pretrained, arguments | {"head_width": 96}, kwargs)


@register_model
def mask_rcnn_shapes_vit(pretrained: bool = False, **kwargs) -> Detector:
    """Mask R-CNN of ``vitq.data.shapes`` on a small ViT with a simple feature pyramid; no weights shipped."""
    arguments = _SHAPES | _SMALL_VIT | {"body": "vit_tiny_patch16_224", "batch_norm": False}
    return built("mask_rcnn_shapes_vit", detector, pretrained, arguments, kwargs)
