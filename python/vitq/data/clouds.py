"""Point clouds to calibrate and to evaluate with: the bundled primitives, ModelNet40, ScanObjectNN and ShapeNetPart.

A source is ``primitives`` or ``<layout>:<folder>``, such as ``modelnet40:/data/modelnet40_ply_hdf5_2048``. What a model
takes is its ``vitq_data``: [N, C] of a cloud; part segmentation has the category in one channel more.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.utils.data import Dataset, TensorDataset

from . import primitives
from .bundled import draw

LAYOUTS = ("modelnet40", "scanobjectnn", "shapenetpart")
PRIMITIVES = "primitives"


def is_cloud_model(model: torch.nn.Module) -> bool:
    """Whether ``model`` takes clouds [B, N, C] (it says so in ``vitq_data``) rather than images."""
    return len(getattr(model, "vitq_data", {}).get("input_size", ())) == 2


def is_source(source: object) -> bool:
    """Whether ``source`` names clouds."""
    return isinstance(source, str) and (source == PRIMITIVES or source.partition(":")[0] in LAYOUTS)


def splits(source: str) -> tuple[str, ...]:
    """The splits of ``source`` to evaluate on."""
    return ("test", "hard") if source == PRIMITIVES else ("test",)


@dataclass(frozen=True)
class CloudFormat:
    """What a model takes of a cloud: ``points`` of it, ``channels`` numbers each, the category as the last of them
    where ``parts`` are told apart; ``classes`` or parts."""

    points: int
    channels: int
    parts: bool
    classes: int

    @classmethod
    def of(cls, model: torch.nn.Module) -> CloudFormat:
        points, channels = model.vitq_data["input_size"]
        return cls(points, channels, hasattr(model, "categories"), model.num_classes)


def load_clouds(source: str, split: str, model: torch.nn.Module, limit: int | None = None, *, seed: int = 0) -> Dataset:
    """A split as a data set of (cloud [N, C] float32, label) pairs; ``.tensors`` holds the whole of it.

    Args:
        source, split, limit, seed: as in ``load_data``.
        model: a point-cloud model; decides N, C and whether labels are classes or [N] parts.
    Raises:
        ValueError: a source that is none or does not fit the model, files that are missing or malformed, ``limit``
            outside what there is. ImportError: a layout of HDF5 files without h5py.
    """
    form = CloudFormat.of(model)
    if source == PRIMITIVES:
        return _primitives(split, form, limit, seed)
    raise ValueError(f"data is {source!r}, expected {PRIMITIVES} or <layout>:<folder>, layout of {', '.join(LAYOUTS)}")


def _primitives(split: str, form: CloudFormat, limit: int | None, seed: int) -> TensorDataset:
    if (form.points, form.channels) != (primitives.POINTS, 4 if form.parts else 3):
        raise ValueError(
            f"the model takes clouds of {form.points} points and {form.channels} channels, {PRIMITIVES} have "
            f"{primitives.POINTS} and {4 if form.parts else 3}"
        )
    known = len(primitives.PARTS if form.parts else primitives.CLASSES)
    if form.classes != known:
        raise ValueError(f"the model tells {form.classes} classes apart, {PRIMITIVES} have {known}")
    if split not in primitives.COUNTS:
        raise ValueError(f"split must be one of {tuple(primitives.COUNTS)}, got {split!r}")
    index = draw(primitives.COUNTS[split], limit, seed, f"split {split!r} of the {PRIMITIVES}")
    return TensorDataset(*(primitives.objects if form.parts else primitives.classes)(split, index))
