"""Metrics of point clouds by the customary conventions, in percent."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor


def mean_class_accuracy(logits: Tensor, labels: Tensor) -> float:
    """Mean over the classes that occur of the percentage of their clouds that are recognised.

    Args:   logits [B, C], labels [B] int64.
    Raises: ValueError: no clouds, or a label outside 0..C−1.
    """
    _check(logits, labels)
    right = logits.argmax(-1) == labels
    total = labels.bincount(minlength=logits.shape[-1])
    hits = labels[right].bincount(minlength=logits.shape[-1])
    return 100.0 * float((hits[total > 0].double() / total[total > 0]).mean())


def part_miou(logits: Tensor, labels: Tensor, parts: Sequence[range]) -> tuple[float, float]:
    """Part segmentation's class and instance mIoU.

    A cloud's IoU is the mean over the parts of its category, 1 for a part that neither it nor its prediction has; the
    instance mIoU is the mean over clouds, the class mIoU over categories that occur of the mean over their clouds. Only
    parts of the cloud's own category, which is given, are candidates.

    Args:    logits [B, N, P]; labels [B, N] int64; parts: those of each category, as positions in P.
    Returns: class mIoU, instance mIoU.
    Raises:  ValueError: no clouds, or a cloud whose labels are not of one category.
    Source:  the protocol of ShapeNetPart (Yi et al. 2016) as PointNet (arXiv 1612.00593) computes it.
    """
    _check(logits, labels)
    by_category: dict[int, list[float]] = {}
    for b, (scores, wanted) in enumerate(zip(logits, labels)):
        own = [i for i, span in enumerate(parts) if int(wanted[0]) in span]
        if not own or int(wanted.min()) not in parts[own[0]] or int(wanted.max()) not in parts[own[0]]:
            raise ValueError(f"labels of cloud {b} are {wanted.unique().tolist()}, expected parts of one category")
        span = parts[own[0]]
        found = scores[:, span.start : span.stop].argmax(-1) + span.start
        ious = []
        for part in span:
            union = int(((found == part) | (wanted == part)).sum())
            ious.append(int(((found == part) & (wanted == part)).sum()) / union if union else 1.0)
        by_category.setdefault(own[0], []).append(sum(ious) / len(ious))
    of_categories = [sum(ious) / len(ious) for ious in by_category.values()]
    instances = [iou for ious in by_category.values() for iou in ious]
    return tuple(100.0 * sum(values) / len(values) for values in (of_categories, instances))


def _check(logits: Tensor, labels: Tensor) -> None:
    if labels.shape != logits.shape[:-1] or labels.numel() == 0:
        raise ValueError(f"labels has shape {tuple(labels.shape)}, expected {tuple(logits.shape[:-1])}, not empty")
    if labels.dtype != torch.int64 or int(labels.min()) < 0 or int(labels.max()) >= logits.shape[-1]:
        raise ValueError(
            f"labels are {labels.dtype} up to {int(labels.max())}, expected int64 below {logits.shape[-1]}"
        )
