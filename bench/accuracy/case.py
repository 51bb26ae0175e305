"""One cell of the accuracy table: a model, a recipe, a seed; a process of its own, so that its peak memory shows.

Usage: `python -m bench.accuracy.case FILE`, where FILE holds a :class:`Case` as JSON; the rows replace it.
"""

from __future__ import annotations

import hashlib
import json
import os
import resource
import sys
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import timm
import torch
from torch import nn
from torch.utils.data import Dataset
from vitq import checkpoint, jobs, parallel
from vitq.data import load_data, refuse_leak, splits
from vitq.recipes import Recipe, parse
from vitq.simulate import SimModel
from vitq.sources import ModelSource, load_float

from bench.accuracy import code

VARIANTS = ("plain", "outlier")


@dataclass(frozen=True)
class Case:
    """What is run, in plain JSON values.

    Attributes:
        model: its name in the table. source: a ModelSource's record. data: as in `load_data`. recipe: resolved.
        limit: images per split, or None for all. threads: of torch.
        cache: folder that keeps the float model's logits, the same for every recipe, or None.
    """

    model: str
    source: dict[str, Any]
    data: str
    recipe: dict[str, Any]
    seed: int
    limit: int | None
    threads: int = 1
    cache: str | None = None

    @classmethod
    def of(cls, model: str, source: ModelSource, data: str, recipe: Recipe, seed: int, *rest: Any, **more: Any) -> Case:
        return cls(model, source.record(), data, recipe.plain(), seed, *rest, **more)

    @property
    def key(self) -> dict[str, Any]:
        """What names the rows: results of the same key and another digest are out of date."""
        variant = VARIANTS[self.source["outlier"]]
        return {
            "model": self.model,
            "variant": variant,
            "recipe": self.recipe["name"],
            "seed": self.seed,
            "data": self.data,
        }

    def digest(self) -> str:
        """Of everything but the code that decides the figures: recipe, model, weights, images, seed."""
        return _digest(self._floats(), self.recipe, self.seed)

    def _floats(self) -> list[Any]:
        """Everything that decides the float model's logits."""
        source = dict(self.source)
        path = source.pop("weights") or timm.get_pretrained_cfg_value(source["name"], "file")
        weights = hashlib.sha256(Path(path).read_bytes()).hexdigest() if path else "timm"
        return [source, weights, self.data, self.limit]

    def floats(self, model: nn.Module, data: dict[str, Dataset]) -> dict[str, jobs.Prediction]:
        """Logits and labels of the float `model` by split of `data`, from the cache where they are there."""
        if self.cache is None:
            return jobs.predict_splits(model, data)
        path = Path(self.cache) / f"{_digest(self._floats())}.pt"
        if path.exists():
            return torch.load(path, weights_only=True)
        found = jobs.predict_splits(model, data)
        path.parent.mkdir(parents=True, exist_ok=True)
        partial = path.with_suffix(f".{os.getpid()}")
        torch.save(found, partial)
        os.replace(partial, path)
        return found


def _digest(*what: Any) -> str:
    return hashlib.sha256(json.dumps(what, sort_keys=True).encode()).hexdigest()[:16]


def run(case: Case) -> list[dict[str, Any]]:
    """Calibrate and evaluate: one row per split."""
    torch.set_num_threads(case.threads)
    source, recipe = ModelSource(**case.source), parse(case.recipe)
    model = load_float(source)
    refuse_leak(case.data, model)
    data = {name: load_data(case.data, name, model, case.limit) for name in splits(case.data)}
    with parallel.launched() as device:
        done = jobs.quantize(model, source, recipe, case.data, seed=case.seed, device=device)
    peak = _peak_mb(device)
    for each in filter(None, (model, done.calibrated.sim, done.integer)):
        each.to(device)
    start = time.perf_counter()
    rows = jobs.evaluate(case.floats(model, data), done.calibrated.sim, done.integer, data)
    weight_bits, act_bits = jobs.average_bits(done.calibrated.sim)
    refusals = done.calibrated.refusals
    common = {
        **case.key,
        "digest": case.digest(),
        "code": code.digest(),
        "weight_bits": recipe.bits.weights,
        "act_bits": recipe.bits.activations,
        "average_weight_bits": weight_bits,
        "average_act_bits": act_bits,
        "average_weight_bits_with_branch": weight_bits + branch_bits(done.calibrated.sim),
        "deployable": not refusals,
        "reason": next(iter(refusals.values()), None),
        "effort": recipe.effort,
        "calibration_images": recipe.calibration.images,
        "calibration_s": done.seconds,
        "evaluation_s": time.perf_counter() - start,
        "threads": case.threads,
        "device": device.type,
        "peak_mb": peak,
        "size_bytes": None if refusals else _size(done),
    }
    return [{**common, **row, "agreement": row.pop("agreement_float_quantized")} for row in rows]


def branch_bits(sim: SimModel) -> float:
    """Bits of the side branches, 16 a number, per weight of the quantized linear layers."""
    layers = [linear for linear in sim.linears.values() if linear.quant.spec is not None]
    numbers = sum(linear.lora.rank * sum(linear.shape) for linear in layers if linear.side_branch() is not None)
    return 16 * numbers / max(1, sum(n * k for n, k in (linear.shape for linear in layers)))


def _peak_mb(device: torch.device) -> float:
    """Of the process, or on a GPU of torch's allocator there."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) / 1e6
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / (1e6 if sys.platform == "darwin" else 1e3)


def _size(done: jobs.Quantized) -> int:
    """Bytes of the checkpoint."""
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "checkpoint"
        checkpoint.save(path, done.state)
        return checkpoint.disk_bytes(path)


def main() -> None:
    path = Path(sys.argv[1])
    case = Case(**json.loads(path.read_text()))
    path.write_text(json.dumps(run(case), indent=1))


if __name__ == "__main__":
    main()
