"""Pack-PTQ's packs and PMQ's frontier as pictures: the same ones for files and for the report."""

from __future__ import annotations

import re
from typing import Any

from .. import plots
from ..plots import Axis, Picture, Series

LABELS = {
    "size": "bytes of the block layers / float32",
    "bitops": "BitOps of the block layers / float32",
    "latency": "measured time of the block layers / float32",
}


def draw_frontier(record: dict[str, Any], title: str = "") -> Picture:
    """Σ Ω against every budgeted cost, and the bits of every component at the point picked.

    Args: record: ``metrics["frontier"]`` as ``allocate.pareto`` leaves it.
    """
    axes, points = list(record["budget"]), record["points"]
    picked = points[record["picked"]]
    y = Axis("Σ Ω at the logits", log=min(p["error"] for p in points) > 0)
    pictures = []
    for axis in axes:
        curve = [(p[axis], p["error"]) for p in points]
        # With two axes each curve is a projection, no staircase.
        series = [Series("frontier", curve, line=len(axes) == 1), Series("picked", [(picked[axis], picked["error"])])]
        marks = [(record["budget"][axis], "budget")]
        pictures.append(plots.plot(series, Axis(LABELS[axis]), y, f"Σ Ω against {axis}", marks=marks))
    picked_bits = {name: record["picked_bits"][name] for name in record["sensitivity"]}
    bits = {name: chosen[:2] for name, chosen in picked_bits.items()}
    pictures.append(plots.bars(bits, ["weight bits", "activation bits"], "Bits of every layer at the point picked"))
    if ranks := {name: chosen[2:] for name, chosen in picked_bits.items() if chosen[2:]}:
        pictures.append(plots.bars(ranks, ["rank"], "Rank of every layer at the point picked"))
    return plots.stack(pictures, title)


def draw_packs(packs: list[dict[str, Any]], title: str = "") -> Picture:
    """S and Ω of every block, and the packs: a band each, under its bits.

    Args: packs: ``metrics["packs"]`` as ``allocate.packs`` leaves it.
    """
    blocks = [block for pack in packs for block in pack["blocks"]]
    names = [".".join(re.findall(r"\d+", block["path"])) or block["path"] for block in blocks]
    ends = [sum(len(pack["blocks"]) for pack in packs[: i + 1]) - 0.5 for i in range(len(packs))]
    unit = " bits" if len(blocks) < 10 else ""
    bands = [(low, high, f"{pack['bits']}{unit}") for low, high, pack in zip([-0.5, *ends], ends, packs)]
    every = -(-len(blocks) // 16)
    x, ticks = Axis("block", low=-0.5, high=len(blocks) - 0.5), list(enumerate(names))[::every]
    pictures = []
    for key, label in (("curvature", "score S"), ("sensitivity", "sensitivity Ω")):
        values = [block[key] for block in blocks]
        y = Axis(label, log=min(values) > 0)
        pictures.append(
            plots.plot([Series("", list(enumerate(values)))], x, y, f"{label} of every block", bands=bands, ticks=ticks)
        )
    return plots.stack(pictures, title)
