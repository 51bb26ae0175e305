"""The main job on the shipped model and real handwriting: every demo recipe, on the plain and the outlier model."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from . import checkpoint, jobs
from .bench.environment import environment
from .data import load_data
from .evaluate import top1
from .files import write_text
from .models.digits_vit import NAME
from .recipes import load_recipe
from .sources import ModelSource, load_float

RECIPES = (
    "minmax-w4a4",
    "aiqvit-w8a8",
    "aiqvit-w4a8",
    "aiqvit-w4a4",
    "aiqvit-w3a3",
    "vitq-w8a8",
    "vitq-w4a8",
    "vitq-w4a4",
    "vitq-w3a4",
)
SPLITS = ("test", "hard")
COLUMNS = {
    "variant": "model",
    "recipe": "recipe",
    "split": "split",
    "top1_float": "float %",
    "top1_simulated": "sim %",
    "top1_integer": "int %",
    "agreement_simulated_integer": "sim = int",
    "logit_sqnr_db": "SQNR dB",
    "speedup": "speed-up",
    "megabytes": "MB",
    "calibration_s": "calib. s",
}


def run(
    output: Path,
    progress: Callable[[str, int, int], None],
    recipes: tuple[str, ...] = RECIPES,
    limit: int | None = None,
) -> dict[str, Any]:
    """Calibrate, save, load, evaluate and time every recipe; write ``summary.json``, ``demo.png`` and the checkpoints.

    Args:
        output: folder, created if need be.
        progress: called with (what, done, total).
        recipes: names of shipped recipes; limit: images per split (default all).
    Returns:
        The summary as written: ``float`` (per model variant), ``runs`` (one row per variant, recipe and split),
        ``environment``.
    """
    output.mkdir(parents=True, exist_ok=True)
    floats: dict[str, Any] = {}
    runs: list[dict[str, Any]] = []
    for variant in ("plain", "outlier"):
        source = ModelSource(NAME, outlier=variant == "outlier")
        model = load_float(source)
        splits = {name: load_data("digits", name, model, limit) for name in SPLITS}
        reference = jobs.predict_splits(model, splits)
        floats[variant] = {name: top1(*prediction) for name, prediction in reference.items()}
        for name in recipes:
            title = f"{variant} {name}"
            runs += [
                {"variant": variant, **row}
                for row in _run(model, source, name, splits, reference, output / f"{variant}-{name}", title, progress)
            ]
            summary = {"float": floats, "runs": runs, "environment": environment()}
            write_text(output / "summary.json", json.dumps(summary, indent=1) + "\n")
    summary = {"float": floats, "runs": runs, "environment": environment()}
    picture(summary, output / "demo.png")
    return summary


def _run(model, source, name, splits, reference, folder, title, progress) -> list[dict[str, Any]]:
    recipe = load_recipe(name, fast=True)
    done = jobs.quantize(
        model, source, recipe, "digits", progress=lambda step, i, n: progress(f"{title}: {step}", i, n)
    )
    state = replace(done.state, metrics=done.state.metrics | {"calibration_s": done.seconds})
    checkpoint.save(folder, state, overwrite=True)
    # What is evaluated and timed is what a user loads.
    integer = checkpoint.load(folder)
    progress(f"{title}: evaluating", 0, 1)
    rows = jobs.evaluate(reference, done.calibrated.sim, integer, splits)
    times = jobs.time_models({"float": model, "integer": integer}, [1], 0.5)
    rows = jobs.summarize(recipe, done, model, checkpoint.disk_bytes(folder), rows, times)
    return [{**row, "megabytes": row["size_bytes_integer"] / 1e6} for row in rows]


def picture(summary: dict[str, Any], path: Path) -> None:
    """Logit SQNR and top-1 of every recipe, on both splits and both models, as a PNG."""
    from matplotlib.figure import Figure

    names = list(dict.fromkeys(run["recipe"] for run in summary["runs"]))
    series = [(variant, split) for variant in summary["float"] for split in SPLITS]
    colours = ("#1b6ca8", "#7fb3d5", "#b9501b", "#e3a57c")
    figure = Figure(figsize=(11, 6.5), layout="constrained")
    above, below = figure.subplots(2, 1, sharex=True)
    position = torch.arange(len(names), dtype=torch.float64)
    for i, ((variant, split), colour) in enumerate(zip(series, colours)):
        rows = {r["recipe"]: r for r in summary["runs"] if (r["variant"], r["split"]) == (variant, split)}
        x = (position + (i - 1.5) * 0.2).tolist()
        label = f"{variant} model, {split} split"
        above.bar(x, [rows[n]["logit_sqnr_db"] for n in names], 0.19, color=colour, label=label)
        below.bar(x, [rows[n]["top1_integer"] for n in names], 0.19, color=colour)
        below.axhline(summary["float"][variant][split], color=colour, linewidth=0.8, linestyle="--")
    above.set_ylabel("logit SQNR of the\ninteger model, dB")
    above.legend(ncols=4, fontsize=8, loc="lower left", bbox_to_anchor=(0.0, 1.0), frameon=False)
    below.set_ylabel("top-1 of the integer\nmodel, % (dashed: float)")
    # Bars start at zero unless all are high: then the differences are what matters.
    lowest = min(run["top1_integer"] for run in summary["runs"])
    below.set_ylim(max(0.0, lowest - 10), 101)
    below.set_xticks(position.tolist(), [_label(n, summary) for n in names], fontsize=8)
    figure.savefig(path, dpi=130)


def _label(name: str, summary: dict[str, Any]) -> str:
    row = next(r for r in summary["runs"] if r["recipe"] == name)
    method, _, bits = name.rpartition("-")
    return f"{method}\n{bits}\n{row['megabytes']:.2f} MB, {row['speedup']:.2f}x"
