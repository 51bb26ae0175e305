"""What ONNX Runtime makes of a QDQ export beside the integer model: logits, top-1, time and size.

python -m bench.onnx_runtime                # writes bench/results/onnx.json; update_docs.py makes the table

Needs `pip install .[onnx]`. Times are medians of one thread, in turns. `sqnr_float64_db` is the yardstick for
`sqnr_db`: the graph in float32 against itself in float64, by torch. Both are codes that fall on the other side.
"""

from __future__ import annotations

import argparse
import copy
import json
import tempfile
import time
from pathlib import Path
from statistics import median
from typing import Any

import onnxruntime
import torch
from torch import Tensor, nn
from vitq import checkpoint, jobs, qdq
from vitq.bench.environment import environment
from vitq.data import load_data, splits
from vitq.evaluate import agreement, predict, sqnr_db, top1
from vitq.recipes import load_recipe
from vitq.restore import to_simulated
from vitq.sources import load_float

from bench.models import MODELS

RESULT = Path(__file__).resolve().parent / "results" / "onnx.json"
RECIPES = ("minmax-w8a8", "aiqvit-w8a8", "vitq-w4a8", "vitq-w4a4")


class Session(nn.Module):
    """The model in the file, on the CPU with one thread, at ONNX Runtime's own settings otherwise."""

    def __init__(self, path: Path) -> None:
        super().__init__()
        options = onnxruntime.SessionOptions()
        options.intra_op_num_threads = 1
        self.session = onnxruntime.InferenceSession(path, options, providers=["CPUExecutionProvider"])

    def forward(self, x: Tensor) -> Tensor:
        return torch.from_numpy(self.session.run(None, {qdq.INPUT: x.contiguous().numpy()})[0])


class _Double(nn.Module):
    """The graph in float64, by torch."""

    def __init__(self, graph: nn.Module) -> None:
        super().__init__()
        self.graph = copy.deepcopy(graph).double()

    def forward(self, x: Tensor) -> Tensor:
        return self.graph(x.double())


def milliseconds(runs: dict[str, nn.Module], x: Tensor, repeats: int) -> dict[str, float]:
    """Medians, each run in turn ``repeats`` times."""
    times: dict[str, list[float]] = {name: [] for name in runs}
    for _ in range(repeats):
        for name, run in runs.items():
            start = time.perf_counter()
            run(x)
            times[name].append(1e3 * (time.perf_counter() - start))
    return {name: median(values[1:]) for name, values in times.items()}


def compare(name: str, recipe_name: str, batch: int, repeats: int, limit: int | None) -> list[dict[str, Any]]:
    """One row per split."""
    entry = MODELS[name]
    model = load_float(entry.source)
    done = jobs.quantize(model, entry.source, load_recipe(recipe_name, fast=True), entry.data)
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "checkpoint"
        checkpoint.save(path, done.state)
        state, config = checkpoint.load_state(path)
        file = Path(folder) / "model.onnx"
        sim = to_simulated(checkpoint.build_float(path, config), state)
        written = qdq.write(sim, file, config.data.input_size)
        other = Session(file)
        size = checkpoint.disk_bytes(path)
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(batch, *config.data.input_size, generator=generator)
    with torch.inference_mode():
        spent = milliseconds({"float": model, "ours": done.integer, "onnx": other}, x, repeats)
    graph = qdq.to_qdq(sim)
    rows = []
    for split in splits(entry.data):
        data = load_data(entry.data, split, model, limit)
        (ours, labels), (theirs, _) = predict(done.integer, data), predict(other, data)
        single, double = (predict(model, data)[0] for model in (graph, _Double(graph)))
        rows.append(
            {
                "model": name,
                "recipe": recipe_name,
                "split": split,
                "images": len(labels),
                "top1_integer": top1(ours, labels),
                "top1_onnx": top1(theirs, labels),
                "agreement": agreement(ours, theirs),
                "sqnr_db": sqnr_db(ours, theirs),
                "sqnr_float64_db": sqnr_db(double, single),
                "quantize": written.quantize,
                "dequantize": written.dequantize,
                "products": written.products,
                "int4": written.int4,
                "int8": written.int8,
                "onnx_bytes": written.bytes,
                "checkpoint_bytes": size,
                "batch": batch,
                "float_ms": spent["float"],
                "integer_ms": spent["ours"],
                "onnx_ms": spent["onnx"],
            }
        )
    return rows


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--models", nargs="+", choices=list(MODELS), default=["digits", "vit", "swin"])
    parser.add_argument("--recipes", nargs="+", default=list(RECIPES))
    parser.add_argument("--batch", type=int, default=8)
    parser.add_argument("--repeats", type=int, default=21)
    parser.add_argument("--limit", type=int, default=300, help="images per split (default: 300)")
    parser.add_argument("--output", type=Path, default=RESULT)
    args = parser.parse_args(argv)
    torch.set_num_threads(1)
    rows = []
    for name in args.models:
        for recipe in args.recipes:
            found = compare(name, recipe, args.batch, args.repeats, args.limit)
            rows += found
            for row in found:
                print({k: round(v, 3) if isinstance(v, float) else v for k, v in row.items()}, flush=True)
    record = {"environment": environment() | {"onnxruntime": onnxruntime.__version__}, "rows": rows}
    args.output.write_text(json.dumps(record, indent=1) + "\n")


if __name__ == "__main__":
    main()
