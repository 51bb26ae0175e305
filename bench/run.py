"""Every figure of the documentation that is a time: single ops and whole models, as ratios of one run.

python bench/run.py [--quick] [--threads 1 2]     # writes bench/results/cpu.json; update_docs.py makes the tables

Run it on an otherwise idle machine.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
from pathlib import Path

import torch
from vitq import jobs
from vitq.bench.environment import environment
from vitq.bench.latency import threads
from vitq.recipes import load_recipe
from vitq.sources import ModelSource, load_float

HERE = Path(__file__).resolve().parent
OPS = ("bench_qlinear", "bench_qattention")

STATIC = {"calibration": {"images": 4}, "compensate": [], "reconstruct": [], "allocate": []}


def _bits(weights: int) -> dict:
    return {"bits": {"weights": weights, "activations": 8, "operands": 8, "softmax": 8}}


# Latency depends on formats, not on how well they are calibrated: closed forms, a handful of random images.
MODELS = {
    "W4A8 static": ("minmax-w4a4", {**STATIC, **_bits(4), "focus": {"anchor": "row", "power": 2.0}}),
    "W8A8 static": ("minmax-w4a4", {**STATIC, **_bits(8), "focus": {"anchor": "row", "power": 2.0}}),
    "vitq-w4a8 (dynamic, rank 16)": ("vitq-w4a8", {}),
    "vitq-w8a8 (dynamic, rank 16)": ("vitq-w8a8", {}),
}


def models(name: str, batches: list[int], counts: list[int], seconds: float) -> list[dict]:
    """Whole models against torch float32 eager."""
    source = ModelSource(name, pretrained=False)
    model = load_float(source)
    images = torch.randn(4, *jobs.state_data(model)["input_size"], generator=torch.Generator().manual_seed(0))
    side_by_side = {"float32": model}
    for label, (recipe, overrides) in MODELS.items():
        print(f"{name}: {label}", flush=True)
        side_by_side[label] = jobs.quantize(model, source, load_recipe(recipe, fast=True, **overrides), images).integer
    rows = []
    for n in counts:
        with threads(n):
            rows += jobs.time_models(side_by_side, batches, seconds)
    return [{**row, "architecture": name} for row in rows]


def op(module: str, counts: list[int], seconds: float) -> dict:
    """One op benchmark in a process of its own; it checks its results before it times them."""
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "out.json"
        argv = ["--threads", *map(str, counts), "--seconds", str(seconds), "--json", str(file)]
        subprocess.run([sys.executable, str(HERE / f"{module}.py"), *argv], check=True)
        return json.loads(file.read_text())


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="a fifth of the time per figure")
    parser.add_argument("--threads", type=int, nargs="+", default=[1, 2])
    parser.add_argument("--output", type=Path, default=HERE / "results" / "cpu.json")
    args = parser.parse_args()
    share = 0.2 if args.quick else 1.0
    result = {"environment": environment()}
    result["models"] = models("vit_small_patch16_224", [1, 8], args.threads, 5 * share)
    for module in OPS:
        result[module] = op(module, args.threads, share)
    args.output.write_text(json.dumps(result, indent=1) + "\n")
    for row in result["models"]:
        print(f"{row['model']:32} b{row['batch']} t{row['threads']} {row['latency_ms']:8.2f} ms {row['speedup']:.2f}x")


if __name__ == "__main__":
    main()
