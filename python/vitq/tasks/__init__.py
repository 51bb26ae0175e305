"""Vision tasks: a float model, its data and its metrics, and what each recipe makes of them."""

from __future__ import annotations

import time
from abc import ABC, abstractmethod
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from .. import checkpoint, jobs
from ..data import load_data, primitives, splits
from ..detect import as_tensor, detect, logits_on, precisions
from ..evaluate import predict, sqnr_db, top1
from ..models import digits_vit
from ..models.detection.family import ROIS
from ..recipes import Recipe, load_recipe
from ..sources import ModelSource, load_float
from .metrics import mean_class_accuracy, part_miou

#: What every task is measured at, and the recipes whose name takes those bits.
BITS = ("w8a8", "w6a6", "w4a8", "w4a4")
COLUMNS = {
    "task": "task",
    "recipe": "recipe",
    "split": "split",
    "metric": "metric",
    "float": "float",
    "simulated": "simulated",
    "integer": "integer",
    "identical": "simulated = integer",
    "sqnr_db": "SQNR dB",
}

Progress = Callable[[str, int, int], None]


@dataclass(frozen=True)
class Outcome:
    """A model on a split.

    Attributes:
        metrics: in percent, by name.
        outputs: raw ones, which those of another model are compared with (signal to noise); a detector's are class
            logits on the float model's regions of the first images, since its own regions are not another model's.
        exact: everything that the metrics were made of; default ``outputs``.
    """

    metrics: dict[str, float]
    outputs: Tensor
    exact: Tensor | None = None

    @property
    def bits(self) -> Tensor:
        return self.outputs if self.exact is None else self.exact


@dataclass(frozen=True)
class Task(ABC):
    """One task.

    Attributes:
        name: as on the command line; source: the float model; data: as in ``load_data``.
        methods: recipes to compare, without their bits.
    """

    name: str
    source: ModelSource
    data: str
    methods: tuple[str, ...]

    @property
    def recipes(self) -> tuple[str, ...]:
        """Every method at every bit-width."""
        return tuple(f"{method}-{bits}" for bits in BITS for method in self.methods)

    def load(self) -> nn.Module:
        """The float model."""
        return load_float(self.source)

    def recipe(self, name: str, effort: float | None = None) -> Recipe:
        """The shipped recipe, calibrated on clean training data; ``effort``: None for its ``fast_effort``."""
        more = {} if effort is None else {"effort": effort}
        return load_recipe(name, fast=effort is None, calibration={"augment": 0.0}, **more)

    @abstractmethod
    def evaluate(self, model: nn.Module, limit: int | None = None) -> dict[str, Outcome]:
        """``model`` on every split, or on ``limit`` samples of each."""


@dataclass(frozen=True)
class PredictionTask(Task):
    """A label per image, cloud or point; ``measure``: (logits, labels) to metrics in percent."""

    measure: Callable[[Tensor, Tensor], dict[str, float]]

    def evaluate(self, model: nn.Module, limit: int | None = None) -> dict[str, Outcome]:
        out = {}
        for split in splits(self.data):
            logits, labels = predict(model, load_data(self.data, split, self.load(), limit), 32)
            out[split] = Outcome(self.measure(logits, labels), logits)
        return out


#: Images of a split whose class logits are compared.
COMPARED = 32


@dataclass(frozen=True)
class DetectionTask(Task):
    """Boxes, and masks of models that have a mask head."""

    def evaluate(self, model: nn.Module, limit: int | None = None) -> dict[str, Outcome]:
        out, floating = {}, self.load()
        for split in splits(self.data):
            data = load_data(self.data, split, floating, limit)
            found = detect(model, data)
            few = range(min(COMPARED, len(data)))
            with floating.hold(([data[i][0]] for i in few), ROIS):
                logits = torch.cat([logits_on(floating.held, model, data[i][0]) for i in few])
            out[split] = Outcome(precisions(found, data), logits, as_tensor(found))
        return out


def _top1(logits: Tensor, labels: Tensor) -> dict[str, float]:
    return {"top-1": top1(logits, labels)}


def _classes(logits: Tensor, labels: Tensor) -> dict[str, float]:
    return {"OA": top1(logits, labels), "mAcc": mean_class_accuracy(logits, labels)}


def _parts(logits: Tensor, labels: Tensor) -> dict[str, float]:
    return dict(zip(("class mIoU", "instance mIoU"), part_miou(logits, labels, primitives.parts_of())))


def _methods(aiqvit: str) -> tuple[str, ...]:
    return ("minmax", "repq-vit", "repq-vit-tables", aiqvit, "vitq")


_IMAGES, _POINTS, _COCO = _methods("aiqvit"), _methods("aiqvit-points"), _methods("aiqvit-coco")
TASKS: dict[str, Task] = {
    task.name: task
    for task in (
        PredictionTask("image-classification", ModelSource(digits_vit.NAME), "digits", _IMAGES, _top1),
        PredictionTask("cloud-classification", ModelSource("point_mae_primitives"), "primitives", _POINTS, _classes),
        PredictionTask("part-segmentation", ModelSource("point_mae_parts"), "primitives", _POINTS, _parts),
        DetectionTask("detection", ModelSource("faster_rcnn_shapes"), "shapes", _COCO),
        DetectionTask("instance-segmentation", ModelSource("mask_rcnn_shapes"), "shapes", _COCO),
    )
}


def run(
    task: Task,
    recipe: Recipe,
    folder: Path,
    floating: dict[str, Outcome],
    progress: Progress = lambda what, done, total: None,
    limit: int | None = None,
) -> list[dict[str, Any]]:
    """Calibrate, save, load and evaluate: a row per split and metric.

    Args:    folder: the checkpoint to write (none for a recipe that exists in simulation only); floating: what
             ``task.evaluate`` says of the float model; limit: samples per split.
    Returns: rows of task, model, recipe, bits, split, metric and its value ``float``, ``simulated`` and ``integer``
             (None without an integer form); ``identical``: whether the two models' outputs are the same bits.
    """
    model = task.load()
    start = time.perf_counter()
    done = jobs.quantize(model, task.source, recipe, task.data, progress=progress)
    seconds = time.perf_counter() - start
    progress("evaluating", 0, 1)
    simulated, integer = task.evaluate(done.calibrated.sim, limit), None
    if done.integer is not None:
        checkpoint.save(folder, done.state, overwrite=True)
        # What is evaluated is what a user loads.
        integer = task.evaluate(checkpoint.load(folder), limit)
    common = {
        "task": task.name,
        "model": task.source.name,
        "data": task.data,
        "recipe": recipe.name,
        "weight_bits": recipe.bits.weights,
        "act_bits": recipe.bits.activations,
        "effort": recipe.effort,
        "calibration_images": recipe.calibration.images,
        "calibration_s": seconds,
    }
    rows = []
    for split, outcome in floating.items():
        shared = {"split": split, "samples": len(outcome.bits)}
        shared["sqnr_db"] = sqnr_db(outcome.outputs, simulated[split].outputs)
        same = None if integer is None else torch.equal(simulated[split].bits, integer[split].bits)
        for metric, value in outcome.metrics.items():
            row = {**common, **shared, "metric": metric, "float": value, "identical": same}
            row |= {"simulated": simulated[split].metrics[metric]}
            row |= {"integer": None if integer is None else integer[split].metrics[metric]}
            rows.append(row)
    return rows
