"""What calibration costs: a ViT-S block under AIQViT's W4A4, step by step, measured here and estimated for one H200.

python -m bench.calibration_cost            # writes bench/results/calibration_cost.json; update_docs.py makes the table

Measured: seconds of one learning step on one thread of this machine, and what a step asks of any machine: operators,
floating-point operations, bytes read and written. Both are differences between runs of two lengths, so that only steps
count. Estimated: a GPU launches the operators one after the other and is done no sooner than the host has issued them,
or than each has moved its bytes or done its arithmetic. The assumptions are the constants below; no GPU was timed.
Where there is one, ``bench.gpu.check`` measures the same steps on it, beside the estimate.
"""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import flop_registry
from vitq.bench.environment import environment
from vitq.bench.latency import threads
from vitq.calibrate import calibrate
from vitq.recipes import Recipe, load_recipe, parse
from vitq.sources import ModelSource, load_float

RESULT = Path(__file__).resolve().parent / "results" / "calibration_cost.json"
DEPTH = 12
HOST_SECONDS = 8e-6
"""To issue one operator with its autograd bookkeeping from Python."""
BYTES_PER_SECOND = 3.4e12
"""70 % of an H200's 4.8 TB/s."""
FLOPS_PER_SECOND = {"float32": 40e12, "bfloat16": 400e12}
"""60 % of 67, 40 % of 989 Tflop/s."""


@dataclass
class Work:
    """Of operators: how many, their arithmetic, their traffic, and Σ max(bytes/bandwidth, flops/rate) per precision."""

    seconds: float = 0.0
    operators: float = 0.0
    flops: float = 0.0
    bytes: float = 0.0
    device_float32: float = 0.0
    device_bfloat16: float = 0.0

    def minus(self, other: Work, steps: int) -> Work:
        return Work(*((getattr(self, f.name) - getattr(other, f.name)) / steps for f in fields(self)))

    def h200(self, learning: str) -> float:
        """Estimated seconds."""
        return max(self.operators * HOST_SECONDS, getattr(self, f"device_{learning}"))


class _Counter(TorchDispatchMode):
    def __init__(self) -> None:
        super().__init__()
        self.work = Work()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        out = func(*args, **kwargs)
        tensors = [t for t in tree_leaves((args, kwargs, out)) if isinstance(t, torch.Tensor)]
        if not func.is_view:
            work, moved = self.work, sum(t.numel() * t.element_size() for t in tensors)
            counted = flop_registry.get(func.overloadpacket)
            flops = counted(*args, **kwargs, out_val=out) if counted else 0
            work.operators, work.flops, work.bytes = work.operators + 1, work.flops + flops, work.bytes + moved
            for learning, rate in FLOPS_PER_SECOND.items():
                name = f"device_{learning}"
                setattr(work, name, getattr(work, name) + max(moved / BYTES_PER_SECOND, flops / rate))
        return out


@contextmanager
def counted() -> Iterator[Work]:
    with _Counter() as counter:
        yield counter.work


def with_iterations(recipe: Recipe, method: str, iterations: int) -> Recipe:
    """``recipe`` with one learning method alone, ``iterations`` long, and as little before it as the method needs."""
    plain = recipe.plain() | {"transform": [], "initialise": [{"method": "scales"}], "refine": []}
    if method == "rank_search":
        plain["compensate"] = []
    learning = {"rank_search": "allocate", "blocks": "reconstruct"}
    for name, stage in learning.items():
        steps = [s | {"iterations": iterations, "least_iterations": 0} for s in plain[stage] if s["method"] == name]
        plain[stage] = steps if name == method else []
    return parse(plain)


def one_step(model, images, recipe: Recipe, method: str, lengths: tuple[int, int]) -> Work:
    """The mean step of ``method`` in one block."""
    recipes = [with_iterations(recipe, method, iterations) for iterations in lengths]
    ends = []
    for each in recipes:
        with counted() as work:
            calibrate(model, images, each)
        ends.append(work)
    for each, work in zip(recipes, ends):  # by now everything is compiled and allocated
        start = time.perf_counter()
        calibrate(model, images, each)
        if images.is_cuda:
            torch.cuda.synchronize(images.device)
        work.seconds = time.perf_counter() - start
    return ends[1].minus(ends[0], lengths[1] - lengths[0])


def measure(
    architecture: str,
    recipe: Recipe,
    lengths: tuple[int, int],
    device: torch.device | str = "cpu",
    count: int = 48,
    **kwargs: Any,
) -> dict[str, Any]:
    """Rows per learning method: a step on ``device`` and its estimate on an H200; the whole calibration's estimate.

    Args: lengths: of the two runs, in steps; count: of images.
    """
    model = load_float(ModelSource(architecture, pretrained=False, kwargs={"depth": 1, **kwargs})).to(device)
    size = model.pretrained_cfg["input_size"] if not kwargs else (3, *model.patch_embed.img_size)
    images = torch.randn(count, *size, generator=torch.Generator().manual_seed(0)).to(device)
    rows, totals = [], dict.fromkeys(FLOPS_PER_SECOND, 0.0)
    for stage, method, options in recipe.steps():
        if getattr(options, "iterations", 0):
            work = one_step(model, images, recipe, method.name, lengths)
            steps = options.iterations * DEPTH
            asked = {"operators": work.operators, "gflop": work.flops / 1e9, "gbytes": work.bytes / 1e9}
            row = {"method": f"{stage}.{method.name}", "batch": options.batch, "steps": steps}
            rows.append({**row, "here_ms": 1e3 * work.seconds, **asked})
            for learning in totals:
                rows[-1][f"h200_ms_{learning}"] = 1e3 * work.h200(learning)
                totals[learning] += work.h200(learning) * steps
    minutes = {learning: seconds / 60 for learning, seconds in totals.items()}
    about = {"architecture": architecture, "recipe": recipe.name, "environment": environment()}
    return {**about, "rows": rows, "h200_minutes": minutes}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="vit_small_patch16_224")
    parser.add_argument("--recipe", default="aiqvit-w4a4")
    parser.add_argument("--steps", type=int, default=4, help="steps that the longer of two runs has more")
    parser.add_argument("--output", type=Path, default=RESULT)
    args = parser.parse_args()
    with threads(1):
        record = measure(args.model, load_recipe(args.recipe), (1, 1 + args.steps))
    args.output.write_text(json.dumps(record, indent=1) + "\n")
    for row in record["rows"]:
        print({k: round(v, 2) if isinstance(v, float) else v for k, v in row.items()})
    print(record["h200_minutes"])


if __name__ == "__main__":
    main()
