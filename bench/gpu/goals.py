"""What the kernels must reach on an H200, as data: one row per goal, evaluated on a results record.

Ratios are speed-ups over bf16 (cuBLAS, SDPA, torch.compile) of one run on one machine, under CUDA graphs with a cold
second-level cache. A goal that covers several shapes is met when its worst shape (or, where it says so, the median) is,
and unmeasured as long as one of the shapes is. Of two back ends the faster one counts, as it is the one that serves.
"""

from __future__ import annotations

import statistics
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from . import shapes

Row = dict[str, Any]
LARGE_M = 6304
ALONE, WHOLE = "w8 rank 32", "w8 rank 32 + quantize"
SUFFIX = {"triton": "", "cuda": " cuda"}
"""Of what is ours: a figure's name by its back end."""
PLANNED: dict[str, list[Row]] = {
    "products": [dict(zip("MKN", shape)) for shape in shapes.products(False)],
    "attention": [dict(zip("BHNd", shape)) for shape in shapes.attentions(False)],
    "models": [{"model": name, "batch": batch} for name in shapes.MODELS for batch in shapes.BATCHES],
    "calibration": [{"learning": precision} for precision in shapes.PRECISIONS],
}
"""Table → what says of a row which one it is."""


@dataclass(frozen=True)
class Goal:
    """One line of the goals.

    Args:
        name: regime and figure, as printed.
        table: "products", "attention", "calibration" or "models" of the record.
        covers: row → whether the goal is about it.
        value: row → the figure, or None where it was not measured.
        bound: the least figure that meets it (the largest for ``at_most``).
        of: how the figures of several rows become one.
    """

    name: str
    table: str
    covers: Callable[[Row], bool]
    value: Callable[[Row], float | None]
    bound: float
    of: Callable[[list[float]], float] = min
    at_most: bool = False
    unit: str = "×"

    def measure(self, record: dict[str, Any] | None) -> float | None:
        """The figure of a record, or None if any row that the goal covers is missing: what there was no time for would
        have been the worst."""
        rows = [] if record is None else record.get(self.table, ())
        values = []
        for planned in filter(self.covers, PLANNED[self.table]):
            found = [row for row in rows if planned.items() <= row.items()]
            values.append(self.value(found[0]) if found else None)
        return None if None in values else self.of(values)

    def met(self, figure: float) -> bool:
        return figure <= self.bound if self.at_most else figure >= self.bound

    @property
    def target(self) -> str:
        return f"{'≤' if self.at_most else '≥'} {self.bound:g}{self.unit}"


def _ms(row: Row, name: str) -> float | None:
    """Of the fastest back end; torch's figures have a name only."""
    return min((row["ms"][name + end] for end in SUFFIX.values() if name + end in row["ms"]), default=None)


def _ratio(name: str, against: str = "bf16") -> Callable[[Row], float | None]:
    def value(row: Row) -> float | None:
        ours, theirs = _ms(row, name), _ms(row, against)
        return None if ours is None or theirs is None else theirs / ours

    return value


def _tops(row: Row) -> float | None:
    ms = _ms(row, ALONE)
    return None if ms is None else 2e-9 * row["M"] * row["N"] * row["K"] / ms


def _extra(row: Row) -> float | None:
    ratio = _ratio("w8", ALONE)(row)
    return None if ratio is None else 100 * (ratio - 1)


REGIMES = {
    "M = 197": lambda r: r["M"] == 197,
    "M = 1576, K and N ≥ 768": lambda r: r["M"] == 1576 and min(r["K"], r["N"]) >= 768,
    "M ≥ 6304, K ≥ 768, N ≥ 2304": lambda r: r["M"] >= LARGE_M and r["K"] >= 768 and r["N"] >= 2304,
    "M ≥ 6304, N = 768": lambda r: r["M"] >= LARGE_M and r["N"] == 768,
    "M ≥ 1576, K = 384": lambda r: r["M"] >= 1576 and r["K"] == 384,
}


def _products() -> list[Goal]:
    small, medium, large, narrow, thin = REGIMES
    bounds = [
        (small, "median", 1.1, 1.0, statistics.median),
        (medium, "worst", 1.4, 1.3, min),
        (large, "worst", 1.7, 1.55, min),
        (narrow, "worst", 1.5, 1.35, min),
        (thin, "worst", 1.3, 1.15, min),
    ]
    goals = []
    for regime, which, alone, whole, of in bounds:
        covers = REGIMES[regime]
        goals.append(Goal(f"product, rank 32, {regime}: {which}", "products", covers, _ratio(ALONE), alone, of))
        goals.append(Goal(f"with its quantize, {regime}: {which}", "products", covers, _ratio(WHOLE), whole, of))
    never = Goal(f"product, rank 32, {small}: never below", "products", REGIMES[small], _ratio(ALONE), 0.95)
    tops = Goal(f"int8 rate, {large}", "products", REGIMES[large], _tops, 1150, unit=" TOPS")
    wide = Goal("rank 32 costs, K and N ≥ 768", "products", lambda r: min(r["K"], r["N"]) >= 768, _extra, 5.0,
                max, True, " %")  # fmt: skip
    thin_cost = Goal("rank 32 costs, K = 384", "products", lambda r: r["K"] == 384, _extra, 10.0, max, True, " %")
    w4 = Goal("W4A8 over W8A8, M ≥ 1576", "products", lambda r: r["M"] >= 1576, _ratio("w4 rank 32", ALONE), 0.9)
    return [*goals, never, tops, wide, thin_cost, w4]


def _models() -> list[Goal]:
    bounds = {"ViT-B": 1.45, "ViT-L": 1.6, "DeiT-S": 1.2, "Swin-B": 1.25}
    goals = []
    for batch in (64, 1):
        for model, bound in bounds.items():

            def covers(row: Row, model: str = model, batch: int = batch) -> bool:
                return row["model"] == model and row["batch"] == batch

            wanted = bound if batch == 64 else 1.0
            goals.append(Goal(f"{model} b{batch} over torch.compile bf16", "models", covers, _best, wanted))
    return goals


def _best(row: Row) -> float | None:
    """The faster of the integer models over compiled bf16."""
    baseline, ours = row["ms"].get("bf16 compiled"), [v for k, v in row["ms"].items() if k.startswith("int8")]
    return None if baseline is None or not ours else baseline / min(ours)


GOALS = (
    *_products(),
    Goal("attention over the best SDPA, N = 197", "attention", lambda r: r["N"] == 197, _ratio("int8", "sdpa"), 1.0),
    Goal("attention over the best SDPA, N ≥ 1024", "attention", lambda r: r["N"] >= 1024, _ratio("int8", "sdpa"), 1.2),
    *_models(),
    Goal(
        "AIQViT W4A4 of a ViT-S calibrated",
        "calibration",
        lambda r: r["learning"] == "float32",
        lambda r: r["minutes"],
        10.0,
        max,
        True,
        " min",
    ),
)
