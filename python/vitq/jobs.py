"""The main job: a float model, images and a recipe become an integer model that is evaluated and timed on the spot."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable
from dataclasses import asdict, dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.data import Dataset

from vitq_kernels.formats import TokenBits

from .bench.latency import compare_models, tensor_bytes
from .calibrate import CalibratedModel, calibrate
from .convert import to_integer
from .data import load_calibration
from .data.coco import DetectionData
from .detect import compare, detect
from .evaluate import Comparison, predict
from .models import state_data
from .models.detection.rcnn import Found
from .quantizers import SimBlocks, SimLinear
from .recipes import Recipe
from .simulate import SimModel
from .sources import ModelSource
from .state import ModelState

Prediction = tuple[Tensor, Tensor] | list[Found]  # logits [N, C], labels [N]; what a detector finds


@dataclass(frozen=True)
class Quantized:
    """A finished job.

    Attributes: calibrated: simulated model, state, seconds by step. integer: the model that runs, or None where the
    recipe has quantizers that exist in simulation only. seconds: in all.
    """

    calibrated: CalibratedModel
    integer: nn.Module | None
    seconds: float

    @property
    def state(self) -> ModelState:
        return self.calibrated.state


def quantize(
    model: nn.Module,
    source: ModelSource,
    recipe: Recipe,
    images: Tensor | str,
    *,
    seed: int = 0,
    work_dir: Path | None = None,
    progress: Callable[[str, int, int], None] | None = None,
    device: torch.device | None = None,
) -> Quantized:
    """Calibrate ``model`` and build its integer form, if it has one.

    Args:
        images: [B, C, H, W] preprocessed calibration images (clouds: [B, N, C]), or where to take the recipe's number
            of them from (see ``vitq.data.load_data``).
        work_dir: keeps progress for resuming.
        device: where to calibrate, default where the model is.
    """
    if isinstance(images, str):
        wanted = recipe.calibration
        images = load_calibration(images, model, wanted.images, seed=seed, augment=wanted.augment)
    start = time.perf_counter()
    calibrated = calibrate(
        model,
        images,
        recipe,
        seed=seed,
        work_dir=work_dir,
        progress=progress,
        device=device,
        architecture=source.name,
        kwargs=dict(source.kwargs),
        data=state_data(model),
        source=source.record(),
    )
    seconds = time.perf_counter() - start
    return Quantized(calibrated, None if calibrated.refusals else to_integer(model, calibrated.state), seconds)


def average_bits(sim: SimModel) -> tuple[float, float]:
    """Bits per weight and per activation of the quantized linear layers, averaged over weights and over in-features.

    Layers with float inputs count 16 bits for those, layers with token-wise bits the mean over the patches.
    """
    ruled = _token_bits(sim)
    weights = bits_w = inputs = bits_a = 0
    for linear in sim.linears.values():
        if linear.quant.spec is not None:
            n, k = linear.shape
            quantizer = linear.act.spec if linear.simulated is None else linear.simulated
            weights, bits_w = weights + n * k, bits_w + n * k * linear.quant.spec.bits
            bits = 16 if quantizer is None else quantizer.bits
            if (own := ruled.get(linear)) is not None:
                bits = own.share * bits + (1.0 - own.share) * min(bits, own.low)
            inputs, bits_a = inputs + k, bits_a + k * bits
    return bits_w / max(weights, 1), bits_a / max(inputs, 1)


def _token_bits(sim: SimModel) -> dict[SimLinear, TokenBits]:
    """Layers whose inputs have token-wise bits: those behind the attention that decides, and the next block's qkv."""
    out: dict[SimLinear, TokenBits] = {}
    for attention in sim.attentions.values():
        if attention.token_bits is not None:
            out |= dict.fromkeys((attention.proj, *(attention.mlp or ())), attention.token_bits)
    for run in (module for module in sim.model.modules() if isinstance(module, SimBlocks)):
        for before, attention in pairwise(run.attentions):
            if before is not None and attention is not None and before.token_bits is not None:
                out[attention.qkv] = before.token_bits
    return out


def predict_splits(model: nn.Module, splits: dict[str, Dataset], batch_size: int = 64) -> dict[str, Prediction]:
    """(logits, labels) of ``model`` per split, or what a detector finds."""
    return {name: predictions(model, data, batch_size) for name, data in splits.items()}


def predictions(
    model: nn.Module, data: Dataset, batch_size: int = 64, advance: Callable[[int], None] = lambda n: None
) -> Prediction:
    """(logits, labels) of ``model``, or what it finds in each image."""
    if isinstance(data, DetectionData):
        return detect(model, data, advance)
    return predict(model, data, batch_size, advance)


def evaluate(
    floating: dict[str, Prediction],
    simulated: nn.Module,
    integer: nn.Module | None,
    splits: dict[str, Dataset],
    batch_size: int = 64,
) -> list[dict[str, Any]]:
    """One row per split: top-1 of the three models (two if there is no integer one), their agreement, logit SQNR; of
    detectors their average precisions (see ``vitq.detect.compare``).

    Args: floating: :func:`predict_splits` of the float model, which many quantized ones are compared with.
    """
    rows = []
    for name, data in splits.items():
        if isinstance(data, DetectionData):
            models = (simulated, integer)
            found = compare(floating[name], *(None if m is None else detect(m, data) for m in models), data)
            rows.append({"split": name, "images": len(data), **found})
            continue
        logits, labels = floating[name]
        others = (None if m is None else predict(m, data, batch_size)[0] for m in (simulated, integer))
        comparison = Comparison.of(labels, logits, *others)
        rows.append({"split": name, "images": len(data), **asdict(comparison)})
    return rows


def time_models(models: dict[str, nn.Module], batches: Iterable[int], seconds: float) -> list[dict[str, Any]]:
    """``compare_models`` on random images for the first model, at torch's current number of threads."""
    rows = []
    for batch in batches:
        rows += compare_models(models, random_images(models, batch), torch.get_num_threads(), seconds)
    return rows


def random_images(models: dict[str, nn.Module], batch: int) -> Tensor:
    """Images (or clouds) of the first model's input size, dtype and device, always the same; clouds' category is the
    first."""
    model = next(iter(models.values()))
    images = torch.randn(batch, *state_data(model)["input_size"], generator=torch.Generator().manual_seed(0))
    if hasattr(model, "categories"):
        images[..., -1] = 0.0
    return images.to(next(model.parameters()))


def summarize(recipe: Recipe, done: Quantized, floating: nn.Module, size: int, splits: list[dict], times: list[dict]):
    """The rows of a run, one per split: what ``summary.json`` and the tables hold.

    Args: size: bytes of the checkpoint on disk; splits: rows of :func:`evaluate`; times: rows of :func:`time_models`
          for one batch size, float first.
    """
    weight_bits, act_bits = average_bits(done.calibrated.sim)
    base, integer = times
    common = {
        "recipe": recipe.name,
        "weight_bits": recipe.bits.weights,
        "act_bits": recipe.bits.activations,
        "average_weight_bits": weight_bits,
        "average_act_bits": act_bits,
        "calibration_s": done.seconds,
        "batch": base["batch"],
        "device": base["device"],
        "threads": base["threads"],
        "latency_ms_float": base["latency_ms"],
        "latency_ms_integer": integer["latency_ms"],
        "speedup": integer["speedup"],
        "size_bytes_float": tensor_bytes(floating),
        "size_bytes_integer": size,
    }
    return [{**common, **split} for split in splits]
