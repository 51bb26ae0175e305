"""Pack-PTQ's packs and PMQ's frontier as figures: the same ones for files and for the report. Needs matplotlib."""

from __future__ import annotations

import re
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

BLUE, LIGHT, RED = "#1b6ca8", "#7fb3d5", "#b9501b"
LABELS = {
    "size": "bytes of the block layers / float32",
    "bitops": "BitOps of the block layers / float32",
    "latency": "measured time of the block layers / float32",
}
# More points than this are one picture within the SVG: a mark each would be megabytes.
MARKS = 2000


def _panels(heights: list[float], title: str, stacked: bool) -> tuple[Figure, list[Axes]]:
    """Panels beside each other, or below each other at their ``heights`` in inches."""
    from matplotlib.figure import Figure

    count = len(heights)
    figure = Figure(figsize=(5.2, sum(heights)) if stacked else (4.5 * count, 4.5), layout="constrained")
    figure.suptitle(title, fontsize=10)
    if stacked:
        return figure, list(figure.subplots(count, 1, squeeze=False, height_ratios=heights).flat)
    return figure, list(figure.subplots(1, count, squeeze=False).flat)


def draw_frontier(record: dict[str, Any], title: str = "", stacked: bool = False) -> Figure:
    """Σ Ω against every budgeted cost, and the bits of every component at the point picked.

    Args: record: ``metrics["frontier"]`` as ``allocate.pareto`` leaves it; stacked: panels below each other.
    """
    axes, points = list(record["budget"]), record["points"]
    picked = points[record["picked"]]
    names = list(record["sensitivity"])
    tall = max(3.4, 0.17 * len(names))
    figure, (*curves, bars) = _panels([3.4] * len(axes) + [tall], title, stacked)
    for plot, axis in zip(curves, axes):
        # With two axes each curve is a projection, no staircase.
        style = "." if len(axes) > 1 else ".-"
        costs, errors = [p[axis] for p in points], [p["error"] for p in points]
        plot.plot(costs, errors, style, color=BLUE, rasterized=len(points) > MARKS)
        plot.plot(picked[axis], picked["error"], "o", color=RED, label="picked")
        plot.axvline(record["budget"][axis], color=RED, linewidth=0.8, linestyle="--", label="budget")
        plot.set_xlabel(LABELS[axis])
        plot.set_ylabel("Σ Ω at the logits")
        if min(errors) > 0:
            plot.set_yscale("log")
        plot.legend(frameon=False, fontsize=8)
    chosen = list(record["picked_bits"].values())
    rows = list(range(len(names)))
    bars.barh([r - 0.2 for r in rows], [c[0] for c in chosen], 0.4, color=BLUE, label="weights")
    bars.barh([r + 0.2 for r in rows], [c[1] for c in chosen], 0.4, color=LIGHT, label="activations")
    bars.set_yticks(rows, names, fontsize=8 if stacked else max(3, min(8, 200 // len(names))))
    bars.invert_yaxis()
    bars.set_xlabel("bits")
    bars.legend(frameon=False, fontsize=8, ncols=2, loc="lower left", bbox_to_anchor=(0.0, 1.0))
    return figure


def draw_packs(packs: list[dict[str, Any]], title: str = "", stacked: bool = False) -> Figure:
    """S and Ω of every block, and the packs: a band each, under its bits.

    Args: packs: ``metrics["packs"]`` as ``allocate.packs`` leaves it; stacked: panels below each other.
    """
    blocks = [block for pack in packs for block in pack["blocks"]]
    places = list(range(len(blocks)))
    names = [".".join(re.findall(r"\d+", block["path"])) or block["path"] for block in blocks]
    figure, panels = _panels([3.4, 3.4], title, stacked)
    quantities = {"curvature": "score S", "sensitivity": "sensitivity Ω"}
    for plot, (key, label) in zip(panels, quantities.items()):
        plot.bar(places, [block[key] for block in blocks], 0.6, color=BLUE)
        start = 0
        for i, pack in enumerate(packs):
            end = start + len(pack["blocks"])
            plot.axvspan(start - 0.5, end - 0.5, color=LIGHT if i % 2 else RED, alpha=0.15, linewidth=0, zorder=0)
            plot.annotate(
                f"{pack['bits']} bits" if len(blocks) < 10 else str(pack["bits"]),
                ((start + end - 1) / 2, 1.0),
                xycoords=("data", "axes fraction"),
                xytext=(0, 3),
                textcoords="offset points",
                ha="center",
                fontsize=8,
            )
            start = end
        plot.set_xlim(-0.5, len(blocks) - 0.5)
        plot.set_xticks(places, names, fontsize=max(5, min(9, 150 // len(blocks))))
        plot.set_xlabel("block")
        plot.set_ylabel(label)
        if min(block[key] for block in blocks) > 0:
            plot.set_yscale("log")
    return figure
