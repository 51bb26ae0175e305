"""The whole of calibration: a float model, images and a recipe in; a simulated model and a ModelState out."""

from __future__ import annotations

import time
from contextlib import nullcontext
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from vitq_kernels.nn import QModule

from . import parallel
from .data.clouds import is_cloud_model
from .devices import checked
from .models import Family, adapter_for, state_data
from .propagation import IMAGES, propagation
from .recipes import Recipe, load_recipe
from .simulate import SimModel
from .stages.base import Calibration, Progress
from .state import ModelState
from .workdir import WorkDir, tensor_digest


@dataclass(frozen=True)
class CalibratedModel:
    """What :func:`calibrate` returns.

    Attributes:
        sim: the simulated model; computes what the integer model of ``state`` computes.
        seconds: wall time by step.
        fields: of the state, besides what the model itself is.
    """

    sim: SimModel
    seconds: dict[str, float]
    fields: dict[str, Any]

    @property
    def refusals(self) -> dict[str, str]:
        """Module path -> why there is no integer kernel; empty for a deployable model."""
        return self.sim.refusals()

    @cached_property
    def state(self) -> ModelState:
        """Everything that the integer model is. Raises: ValueError with the reason if there is none."""
        return self.sim.export(**self.fields)


def calibrate(
    model: nn.Module,
    images: Tensor,
    recipe: Recipe | str | Path,
    *,
    seed: int = 0,
    work_dir: str | Path | None = None,
    progress: Progress | None = None,
    architecture: str | None = None,
    device: torch.device | str | None = None,
    **fields: Any,
) -> CalibratedModel:
    """Quantize ``model`` by ``recipe``.

    Args:
        model: float model of timm or transformers (see ``vitq.models.adapter_for``); left untouched.
        images ([B, C, H, W] float32): preprocessed calibration images; of a point-cloud model clouds [B, N, C].
        recipe: a Recipe, a shipped recipe's name or a YAML file.
        seed: of every random choice; the same seed, model, images and thread count give the same state, bit for bit.
        work_dir: keep finished units here; a later call with the same arguments goes on where this one stopped and
            gives the identical result.
        progress: called with (step, units done, units in all).
        device: where to calibrate, default where the model is. Random choices are drawn on the CPU, where sim and
            state end up, too.
        architecture: timm name for the state; default the model's own.
        fields: further fields of ModelState: kwargs, the arguments that ``timm.create_model`` made ``model`` with, and
            ``vitq.load`` will; data, default what timm's model says of its images; metrics.

    Raises:
        TypeError: a model of no known family, images that are no tensor.
        ValueError: images that are no finite batch of the model's, a device that is not there, a model without a layer
            to quantize, a bad recipe, a work_dir of another calibration, or one that another process calibrates into.
    """
    recipe = recipe if isinstance(recipe, Recipe) else load_recipe(recipe)
    if not isinstance(images, Tensor):
        raise TypeError(f"images is {type(images).__name__}, expected a torch.Tensor")
    clouds = is_cloud_model(model)
    if images.dim() != 4 - clouds or not images.is_floating_point() or images.shape[0] == 0:
        wanted = "[B, N, C]" if clouds else "[B, C, H, W]"
        raise ValueError(f"images is {images.dtype} {tuple(images.shape)}, expected a float batch {wanted}")
    if not bool(images.isfinite().all()):
        raise ValueError("images has NaN or Inf, expected finite values")
    if any(isinstance(module, QModule) for module in model.modules()):
        raise ValueError(f"model is a {type(model).__name__} of integer modules, expected a float model")
    family = adapter_for(model)
    _check_size(family, images)
    if not family.linears():
        raise ValueError(f"model is a {type(model).__name__} without a layer that can be quantized, expected some")
    device = next(model.parameters()).device if device is None else checked(device)
    sim = SimModel(family).to(device)
    kept = work_dir is not None and parallel.rank() == 0
    work = WorkDir(work_dir, identity(model, images, recipe, seed)) if kept else None
    calibration = Calibration(
        sim, images.float().to(device), recipe, seed, work, progress or (lambda what, done, total: None)
    )
    seconds: dict[str, float] = {}
    held = nullcontext() if work is None else work.locked()
    with held, sim.family.holding(sim.model, calibration.images, calibration.batch):
        _run(calibration, seconds)
    sim.requires_grad_(False).cpu()
    name = architecture or getattr(model, "pretrained_cfg", {}).get("architecture") or type(model).__name__
    metrics = calibration.metrics | fields.pop("metrics", {})
    if "data" not in fields and getattr(model, "pretrained_cfg", None):
        fields["data"] = state_data(model)
    fields |= {"architecture": name, "recipe": recipe.plain(), "metrics": metrics}
    return CalibratedModel(sim, seconds, fields)


def _run(calibration: Calibration, seconds: dict[str, float]) -> None:
    """The recipe's steps, then a diagnosis; leaves the wall time of each step in ``seconds``."""
    sim = calibration.sim
    for index, (stage, method, options) in enumerate(calibration.recipe.steps()):
        if stage != "transform" and calibration.reference is None:
            # After the transforms, before the first quantizer.
            calibration.reference = sim.twin()
        calibration.step = f"{index}.{stage}.{method.name}"
        calibration.progress(calibration.step, 0, 1)
        start = time.perf_counter()
        method.run(calibration, options)
        calibration.agree()
        seconds[calibration.step] = time.perf_counter() - start
        calibration.progress(calibration.step, 1, 1)
    if calibration.reference is not None:
        calibration.metrics["errors"] = propagation(calibration.reference, sim, calibration.images[:IMAGES])


def _check_size(family: Family, images: Tensor) -> None:
    shape = family.input_shape()
    if shape is not None and any(want not in (None, got) for want, got in zip(shape, images.shape[1:])):
        wanted = ", ".join("any" if want is None else str(want) for want in ("B", *shape))
        raise ValueError(f"images has shape {tuple(images.shape)}, expected [{wanted}]")


def identity(model: nn.Module, images: Tensor, recipe: Recipe, seed: int) -> dict[str, Any]:
    """What a work directory is of."""
    return {
        "recipe": recipe.plain(),
        "model": tensor_digest(dict(model.state_dict())),
        "images": tensor_digest({"images": images}),
        "seed": seed,
    }
