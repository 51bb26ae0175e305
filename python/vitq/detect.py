"""What detectors find, and their average precision by pycocotools, in percent."""

from __future__ import annotations

import contextlib
import copy
import io
from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torchvision.models.detection.roi_heads import paste_masks_in_image

from .data.coco import DetectionData, coco_tools
from .models.detection.rcnn import Detector, Found, HeldRois, padded_detections
from .simulate import SimModel

#: pycocotools' name of what is compared.
KINDS = {"box AP": "bbox", "mask AP": "segm"}


def detector_of(model: nn.Module) -> Detector:
    """The detector that ``model`` is, or that it simulates."""
    return model.model if isinstance(model, SimModel) else model


@torch.inference_mode()
def detect(model: nn.Module, data: DetectionData, advance: Callable[[int], None] = lambda n: None) -> list[Found]:
    """What ``model`` finds in each image, by itself so that no other image decides about its padding; on the CPU.

    Boxes are in the pixels that the model has seen. ``advance(n)`` is called after every n images.
    """
    model = detector_of(model)
    device = next(model.parameters()).device
    out = []
    for i in range(len(data)):
        found = model([data[i][0].to(device)])[0]
        out.append({name: value.cpu() for name, value in found.items()})
        advance(1)
    return out


def as_tensor(found: list[Found], count: int = 100) -> Tensor:
    """[images, count, 6 + M²]: see ``padded_detections``."""
    return padded_detections(found, count)


@torch.inference_mode()
def logits_on(rois: HeldRois, model: nn.Module, image: Tensor) -> Tensor:
    """Class logits [1, S·R, C] of ``model`` on regions of the image [3, H, W] that another one chose."""
    model = detector_of(model)
    own, model.held = model.held, rois
    try:
        return model([image])
    finally:
        model.held = own


def results(found: list[Found], data: DetectionData) -> list[dict[str, Any]]:
    """Detections as COCO's results: boxes in the pixels of the stored images, masks (where there are) as RLE."""
    rows = []
    for i, image in enumerate(found):
        h, w = data.size(i)
        seen = data[i][0].shape[1:]
        boxes = image["boxes"] * torch.tensor([w / seen[1], h / seen[0]] * 2)
        parts = zip(boxes.tolist(), image["labels"].tolist(), image["scores"].tolist())
        of_image = [
            {
                "image_id": data.truth["images"][i]["id"],
                "category_id": data.categories[label - 1],
                "bbox": [x1, y1, x2 - x1, y2 - y1],
                "score": score,
            }
            for (x1, y1, x2, y2), label, score in parts
        ]
        if "masks" in image:
            pasted = paste_masks_in_image(image["masks"], boxes, (h, w))[:, 0] > 0.5
            for row, pixels in zip(of_image, pasted.numpy()):
                row["segmentation"] = coco_tools().mask.encode(np.asfortranarray(pixels.astype(np.uint8)))
        rows += of_image
    return rows


def average_precision(rows: list[dict[str, Any]], truth: dict[str, Any], kind: str) -> float:
    """AP in percent: mean over classes and over overlaps of 0.5, 0.55, ..., 0.95.

    Args:   rows: COCO's results; truth: COCO's annotations; kind: "bbox" or "segm".
    Raises: ValueError without a single annotation, where AP is not defined.
    """
    if not truth["annotations"]:
        raise ValueError("truth has no annotations, expected at least one: there is no precision without")
    if not rows:
        return 0.0
    with contextlib.redirect_stdout(io.StringIO()):
        reference = coco_tools().coco.COCO()
        # pycocotools writes into what it is given.
        reference.dataset = copy.deepcopy(truth)
        reference.createIndex()
        # The area by which a row counts as small or large is that of what is compared.
        other = "segmentation" if kind == "bbox" else "bbox"
        own = [{name: value for name, value in row.items() if name != other} for row in rows]
        judge = coco_tools().cocoeval.COCOeval(reference, reference.loadRes(own), kind)
        judge.evaluate()
        judge.accumulate()
        judge.summarize()
    return 100.0 * float(judge.stats[0])


def compare(
    found: list[Found], simulated: list[Found], integer: list[Found] | None, data: DetectionData
) -> dict[str, Any]:
    """Metrics of float, simulated and integer model (None without) side by side, and whether the last two are the same
    bits."""
    row: dict[str, Any] = {"identical": None if integer is None else torch.equal(*map(as_tensor, (simulated, integer)))}
    for kind, of in (("float", found), ("simulated", simulated), ("integer", integer)):
        for name in KINDS:
            row[f"{name} {kind}"] = None
        row |= {} if of is None else {f"{name} {kind}": value for name, value in precisions(of, data).items()}
    return row


def precisions(found: list[Found], data: DetectionData) -> dict[str, float]:
    """``box AP`` and, of detectors with a mask head, ``mask AP``."""
    rows = results(found, data)
    masks = any("masks" in image for image in found)
    return {name: average_precision(rows, data.truth, kind) for name, kind in KINDS.items() if masks or kind == "bbox"}
