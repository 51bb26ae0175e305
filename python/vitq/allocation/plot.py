"""The Pareto frontier as a picture."""

from __future__ import annotations

from pathlib import Path
from typing import Any

LABELS = {
    "size": "bytes of the block layers / float32",
    "bitops": "BitOps of the block layers / float32",
    "latency": "measured time of the block layers / float32",
}


def draw_frontier(record: dict[str, Any], path: Path, title: str) -> None:
    """Σ Ω against every budgeted cost, and the bits of every component at the point picked, as a PNG.

    Args: record: ``metrics["frontier"]`` as ``allocate.pareto`` leaves it. Needs matplotlib.
    """
    from matplotlib.figure import Figure

    axes, points = list(record["budget"]), record["points"]
    picked = points[record["picked"]]
    figure = Figure(figsize=(4.5 * (len(axes) + 1), 4.5), layout="constrained")
    figure.suptitle(title, fontsize=10)
    *curves, bars = figure.subplots(1, len(axes) + 1)
    for plot, axis in zip(curves, axes):
        # With two axes each curve is a projection, no staircase.
        style = "." if len(axes) > 1 else ".-"
        plot.plot([p[axis] for p in points], [p["error"] for p in points], style, color="#1b6ca8")
        plot.plot(picked[axis], picked["error"], "o", color="#b9501b", label="picked")
        plot.axvline(record["budget"][axis], color="#b9501b", linewidth=0.8, linestyle="--", label="budget")
        plot.set_xlabel(LABELS[axis])
        if min(p["error"] for p in points) > 0:
            plot.set_yscale("log")
        plot.legend(frameon=False, fontsize=8)
    curves[0].set_ylabel("Σ Ω at the logits")
    names = list(record["sensitivity"])
    chosen = list(record["picked_bits"].values())
    rows = list(range(len(names)))
    bars.barh([r - 0.2 for r in rows], [w for w, _ in chosen], 0.4, color="#1b6ca8", label="weights")
    bars.barh([r + 0.2 for r in rows], [a for _, a in chosen], 0.4, color="#7fb3d5", label="activations")
    bars.set_yticks(rows, names, fontsize=max(3, min(8, 200 // len(names))))
    bars.invert_yaxis()
    bars.set_xlabel("bits")
    bars.legend(frameon=False, fontsize=8, ncols=2, loc="lower left", bbox_to_anchor=(0.0, 1.0))
    figure.savefig(path, dpi=130)
