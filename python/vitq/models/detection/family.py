"""Adapter of detectors: the backbone's as it is, and the heads' linear layers."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from contextlib import AbstractContextManager
from dataclasses import fields, is_dataclass, replace
from typing import Any

from torch import Tensor, nn

from ..block_family import BlockFamily
from ..sites import AttentionSite, BlockSite, LinearSite
from ..timm_family import FAMILIES
from .rcnn import CascadeHeads, Detector, padded_detections

BODY = "backbone.body"
#: RoIs per calibration image and box head.
ROIS = 32
#: Fields of sites that are strings but no paths.
_WORDS = ("role", "activation")
_FLOAT = {
    "backbone.norms": "LayerNorms that several layers read: computed in float",
    "backbone.fpn": "convolutions over neighbourhoods, for which there is no integer kernel",
    "rpn": "convolutions over neighbourhoods; anchors and non-maximum suppression are computed in float",
}
_FLOAT_HEADS = {
    "box_roi_pool": "RoIAlign interpolates in float",
    "box_head": "its linear layers are integer; ReLU between them is float",
    "mask_head": "convolutions over neighbourhoods, for which there is no integer kernel",
    "mask_predictor": "convolutions, for which there is no integer kernel",
}


class DetectionFamily(BlockFamily):
    """Detectors: the backbone as timm's adapters describe it, and every linear layer of the box heads.

    First layer (boundary bits) is the patch embedding; last are the class scores and the box deltas.
    """

    def __init__(self, model: Detector) -> None:
        body = model.get_submodule(BODY)
        self.body = next(family(body) for kind, family in FAMILIES.items() if isinstance(body, kind))
        if self.body.model is not body:
            # Rewritten: see BlockFamily.
            model = copy.deepcopy(model)
            model.set_submodule(BODY, self.body.model)
        self._inner: dict[str, AttentionSite] = {f"{BODY}.{site.path}": site for site in self.body.attentions()}
        super().__init__(model)

    def _enumerate(self) -> Iterator[LinearSite | BlockSite]:
        self.refused += [(f"{BODY}.{path}", reason) for path, reason in self.body.refused]
        yield from (_below(site) for site in self.body.sequence())
        for path, reason in _FLOAT.items():
            if any(name == path for name, _ in self.model.named_modules()):
                self._refuse(path, reason)
        for stage in self._stages():
            for part, reason in _FLOAT_HEADS.items():
                if getattr(self.model.get_submodule(stage), part, None) is not None:
                    self._refuse(f"{stage}.{part}", reason)
            for part in ("box_head", "box_predictor"):
                for name, module in self.model.get_submodule(f"{stage}.{part}").named_modules():
                    if isinstance(module, nn.Linear):
                        role = "head" if part == "box_predictor" else "other"
                        yield self._linear(f"{stage}.{part}.{name}", role)

    def _stages(self) -> Iterator[str]:
        """Module paths of the box heads."""
        heads = self.model.roi_heads
        if isinstance(heads, CascadeHeads):
            yield from (f"roi_heads.stages.{i}" for i in range(len(heads.stages)))
        else:
            yield "roi_heads"

    def attention_bias(self, site: AttentionSite) -> Tensor | None:
        return self.body.attention_bias(self._inner[site.path])

    def output(self, y: Any) -> Tensor:
        """Class logits of held RoIs as they are; detections as one tensor (see ``padded_detections``)."""
        return y if isinstance(y, Tensor) else padded_detections(y, self.model.stages[0].detections_per_img)

    def holding(self, model: nn.Module, images: Tensor, batch: int) -> AbstractContextManager:
        """See ``Family.holding``. Raises: ValueError for images of another size than windows are laid out for."""
        size = tuple(self.model.vitq_data["input_size"])
        if tuple(images.shape[1:]) != size:
            got = tuple(images.shape[1:])
            raise ValueError(f"images are {got}, expected {size}: a detector is calibrated at its own input size")
        return model.hold(images.split(batch), ROIS)


def _below(site: Any) -> Any:
    """``site`` of the body as one of the detector."""
    if isinstance(site, tuple) and any(is_dataclass(part) for part in site):
        return tuple(map(_below, site))
    if not is_dataclass(site) or not hasattr(site, "__dataclass_fields__"):
        return site
    changes = {}
    for field in fields(site):
        value = getattr(site, field.name)
        if isinstance(value, str) and value and field.name not in _WORDS:
            changes[field.name] = f"{BODY}.{value}"
        elif field.name != "window":
            changes[field.name] = _below(value)
    return replace(site, **changes)
