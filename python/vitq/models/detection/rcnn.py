"""Mask R-CNN and Cascade Mask R-CNN of torchvision's parts."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torchvision.models.detection.image_list import ImageList
from torchvision.models.detection.roi_heads import RoIHeads, fastrcnn_loss, maskrcnn_inference
from torchvision.models.detection.rpn import RegionProposalNetwork
from torchvision.ops import boxes as box_ops

from .backbones import Backbone

Found = dict[str, Tensor]
#: RoIs of one image, one tensor [R, 4] per stage.
Rois = tuple[Tensor, ...]


class HeldRois:
    """RoIs by image while calibration holds them (see :meth:`Detector.hold`), else None; copies of a model share it."""

    def __init__(self, of_image: dict[str, Rois] | None = None) -> None:
        self.of_image = of_image

    def __deepcopy__(self, memo: dict) -> HeldRois:
        return self


class Detector(nn.Module):
    """Images to detections.

    Args:
        backbone: maps of a batch; rpn: torchvision's; roi_heads: its RoIHeads (Mask R-CNN) or CascadeHeads.
        num_classes: without background, which is class 0 of what the heads tell apart.
        data: ``ModelState.data`` of the model, whose input size is that of calibration and timing.

    Images are [3, H, W], normalized. A batch is padded with zeros, at the lower right, to one size, a multiple of
    ``backbone.divisor``; attention sees the padding as it sees any ground, in float as in integers (the published
    detectors do not mask it), while boxes are clipped to the image itself.
    """

    def __init__(
        self, backbone: Backbone, rpn: RegionProposalNetwork, roi_heads: nn.Module, num_classes: int, data: dict
    ) -> None:
        super().__init__()
        self.backbone, self.rpn, self.roi_heads = backbone, rpn, roi_heads
        self.num_classes, self.vitq_data = num_classes, data
        self.held = HeldRois()

    @property
    def stages(self) -> list[RoIHeads]:
        """The box heads one after another: one, or those of a cascade."""
        return list(getattr(self.roi_heads, "stages", [self.roi_heads]))

    def forward(self, images: Tensor | list[Tensor], targets: list[Found] | None = None) -> Any:
        """Images [B, 3, H, W], or a list of [3, H, W] of any sizes.

        Args:    targets: for training, per image ``boxes`` [N, 4] (x1, y1, x2, y2), ``labels`` [N] int64 from 1 and
                 ``masks`` [N, H, W] uint8.
        Returns: per image ``boxes`` [D, 4] in its pixels, ``labels`` [D] from 1, ``scores`` [D] in falling order, and
                 ``masks`` [D, 1, 28, 28], probabilities within the boxes; in training, the losses by name; while RoIs
                 are held, class logits [B, S·R, 1 + num_classes] of the S stages' R RoIs.
        Raises:  ValueError for images of another form.
        """
        batch = self.batched(images)
        maps = self.backbone(batch.tensors)
        if self.held.of_image is not None:
            return self._logits_of_held(batch, maps)
        proposals, losses = self.rpn(batch, maps, targets)
        found, more = self.roi_heads(maps, proposals, batch.image_sizes, targets)
        return losses | more if self.training else found

    def batched(self, images: Tensor | list[Tensor]) -> ImageList:
        """Images padded to one size."""
        shapes = [tuple(image.shape) for image in images]
        if not shapes or any(len(s) != 3 or s[0] != 3 or min(s) < 1 for s in shapes):
            raise ValueError(f"images have shapes {shapes}, expected at least one [3, H, W]")
        sizes = [(h, w) for _, h, w in shapes]
        wide = [-(-max(side) // self.backbone.divisor) * self.backbone.divisor for side in zip(*sizes)]
        padded = [F.pad(image, (0, wide[1] - w, 0, wide[0] - h)) for image, (h, w) in zip(images, sizes)]
        return ImageList(torch.stack(padded), sizes)

    @contextmanager
    def hold(self, batches: Iterable[Tensor], rois: int) -> Iterator[None]:
        """Within: keep the RoIs that this model has on these images; copies made within have the same, quantized too.

        Without this, rows of the heads' layers would be of other RoIs in a quantized model than in the float one.

        Args: rois: kept per image and stage, drawn evenly from its proposals by score.
        """
        if self.held.of_image is not None:
            raise ValueError("RoIs are held already, expected one calibration at a time")
        found: dict[str, Rois] = {}
        with torch.no_grad():
            for images in batches:
                batch = self.batched(images)
                maps = self.backbone(batch.tensors)
                proposals = [_spread(p, rois, size) for p, size in zip(self.rpn(batch, maps)[0], batch.image_sizes)]
                stages = [proposals]
                for stage in self.stages[:-1]:
                    deltas = predicted(stage, maps, stages[-1], batch.image_sizes)[1]
                    stages.append(refined(stage, deltas, stages[-1], batch.image_sizes))
                found |= dict(zip(map(_digest, batch.tensors), zip(*stages)))
        # Not that of models which this one is a copy of.
        self.held = held = HeldRois(found)
        try:
            yield
        finally:
            held.of_image = None

    def _logits_of_held(self, batch: ImageList, maps: dict[str, Tensor]) -> Tensor:
        keys = [_digest(image) for image in batch.tensors]
        if unknown := sum(key not in self.held.of_image for key in keys):
            raise ValueError(f"{unknown} images have no RoIs, expected those that RoIs are held of")
        stages = zip(self.stages, zip(*(self.held.of_image[key] for key in keys)))
        logits = [predicted(stage, maps, list(rois), batch.image_sizes)[0] for stage, rois in stages]
        return torch.cat([part.unflatten(0, (len(keys), -1)) for part in logits], 1)


def _digest(image: Tensor) -> str:
    return hashlib.sha1(image.detach().cpu().contiguous().numpy().tobytes()).hexdigest()


def _spread(proposals: Tensor, count: int, size: tuple[int, int]) -> Tensor:
    """``count`` of the proposals [P, 4], evenly by rank; without any, the whole image."""
    if len(proposals) == 0:
        proposals = proposals.new_tensor([[0, 0, size[1], size[0]]])
    return proposals[torch.linspace(0, len(proposals) - 1, count, device=proposals.device).round().long()]


def predicted(
    stage: RoIHeads, maps: dict[str, Tensor], rois: list[Tensor], sizes: list[tuple[int, int]]
) -> tuple[Tensor, Tensor]:
    """Class logits [ΣR, C] and box deltas [ΣR, 4C] of RoIs [R, 4] per image."""
    return stage.box_predictor(stage.box_head(stage.box_roi_pool(maps, rois, sizes)))


def refined(stage: RoIHeads, deltas: Tensor, rois: list[Tensor], sizes: list[tuple[int, int]]) -> list[Tensor]:
    """RoIs [R, 4] per image moved by class-agnostic deltas, within the image."""
    moved = stage.box_coder.decode(deltas[:, :4].detach(), rois)[:, 0].split([len(r) for r in rois])
    return [box_ops.clip_boxes_to_image(boxes, size) for boxes, size in zip(moved, sizes)]


class AgnosticPredictor(nn.Module):
    """Class logits [R, C] and one box for all classes, as torchvision's heads read it: [R, 4C]."""

    def __init__(self, width: int, classes: int) -> None:
        super().__init__()
        self.cls_score = nn.Linear(width, classes)
        self.bbox_pred = nn.Linear(width, 4)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        scores = self.cls_score(x)
        return scores, self.bbox_pred(x).repeat(1, scores.shape[-1])


class CascadeHeads(nn.Module):
    """Box heads one after another, each on the boxes of the one before; the last one's mask head.

    Logits are averaged over the stages. In training each stage samples anew, under its own threshold of overlap, and
    counts as its ``weights`` say.

    Source: Cascade R-CNN (arXiv 1712.00726); one mask head, as in Detectron2.
    """

    weights = (1.0, 0.5, 0.25)

    def __init__(self, stages: Iterable[RoIHeads]) -> None:
        super().__init__()
        self.stages = nn.ModuleList(stages)

    def forward(
        self,
        maps: dict[str, Tensor],
        proposals: list[Tensor],
        sizes: list[tuple[int, int]],
        targets: list[Found] | None = None,
    ) -> tuple[list[Found], dict[str, Tensor]]:
        """As torchvision's RoIHeads."""
        *first, last = self.stages
        losses, logits = {}, []
        for index, stage in enumerate(first):
            if self.training:
                proposals, _, labels, wanted = stage.select_training_samples(proposals, targets)
            scores, deltas = predicted(stage, maps, proposals, sizes)
            if self.training:
                parts = zip(("classifier", "box_reg"), fastrcnn_loss(scores, deltas, labels, wanted))
                losses |= {f"loss_{name}_{index}": self.weights[index] * loss for name, loss in parts}
            logits.append(scores)
            proposals = refined(stage, deltas, proposals, sizes)
            if self.training:
                proposals = [boxes[box_ops.remove_small_boxes(boxes, 1.0)] for boxes in proposals]
        if self.training:
            found, final = last(maps, proposals, sizes, targets)
            scale = {"loss_mask": 1.0}
            return found, losses | {name: scale.get(name, self.weights[-1]) * loss for name, loss in final.items()}
        scores, deltas = predicted(last, maps, proposals, sizes)
        mean = torch.stack([*logits, scores]).mean(0)
        boxes, scores, labels = last.postprocess_detections(mean, deltas, proposals, sizes)
        found = [{"boxes": b, "labels": c, "scores": s} for b, s, c in zip(boxes, scores, labels)]
        if last.has_mask():
            masks = last.mask_predictor(last.mask_head(last.mask_roi_pool(maps, boxes, sizes)))
            for image, probabilities in zip(found, maskrcnn_inference(masks, labels)):
                image["masks"] = probabilities
        return found, losses


def padded_detections(found: list[Found], count: int) -> Tensor:
    """Detections as one tensor [B, count, 6 + M²]: box, score, label and mask, zeros where there are fewer."""
    rows = []
    for image in found:
        parts = [image["boxes"], image["scores"].unsqueeze(1), image["labels"].unsqueeze(1).float()]
        parts += [image["masks"].flatten(1)] if "masks" in image else []
        row = torch.cat(parts, 1)
        rows.append(F.pad(row, (0, 0, 0, count - len(row))))
    return torch.stack(rows)
