"""allocate.pareto: bits per layer from the exact frontier of measured sensitivity against size, BitOps or latency.

PMQ (arXiv 2305.06559), all of it reconstructed from the abstract [R]: forward-only global sensitivity per component
(qkv, proj, fc1, fc2 of each block) and candidate bits, min ΣΩ_i(b_i) under the budget by a Pareto frontier. Measured
kernel latency as a cost is this package's addition, as are probing with the low-rank branch that the recipe will add,
and ranks of that branch as choices beside the bits: what a branch gains then competes with bits for one budget.
"""

from __future__ import annotations

import string
from typing import Any

from pydantic import Field, field_validator

from ..allocation.frontier import MOST, Frontier
from .base import Calibration, method
from .bits import Allocation, Choice, ProbeOptions, sensitivities

# One for each of the 7 x 7 pairs of bit-widths that there are at most.
DIGITS = string.digits + string.ascii_letters


class ParetoOptions(ProbeOptions):
    """
    Args:
        ranks: candidates for the rank of each layer's branch; None leaves what the recipe says.
        latency_batch, latency_seconds: images per measured call, seconds per measurement.
        most: points at which a frontier is refused.
    """

    bits: tuple[int, ...] = (4, 6, 8)
    ranks: tuple[int, ...] | None = None
    latency_batch: int = Field(8, ge=1)
    latency_seconds: float = Field(0.5, gt=0.0)
    most: int = Field(MOST, ge=1)

    @field_validator("ranks")
    @classmethod
    def _rising(cls, value: tuple[int, ...] | None) -> tuple[int, ...] | None:
        if value is not None and (not value or min(value) < 0):
            raise ValueError(f"ranks is {value}, expected ranks >= 0, or none to leave them alone")
        return value and tuple(sorted(set(value)))

    def choices(self, act_bits: int) -> list[Choice]:
        choices = [c._replace(rank=r) for c in super().choices(act_bits) for r in self.ranks or (None,)]
        if len(choices) > len(DIGITS):
            raise ValueError(f"bits and ranks make {len(choices)} choices a layer, expected at most {len(DIGITS)}")
        return choices


@method("allocate", "pareto")
def pareto(calibration: Calibration, options: ParetoOptions) -> None:
    """Leaves the choice in the layers' formats and the whole frontier as ``metrics["frontier"]`` and in the work dir.

    Layers outside blocks (patch embedding, head, patch merging) keep the recipe's bits.
    """
    kind = calibration.recipe.low_rank.kind
    if options.ranks is not None and kind not in ("subspace", "error"):
        raise ValueError(
            f"allocate.pareto has ranks {options.ranks} and low_rank.kind {kind!r}, expected a kept branch"
        )
    allocation = Allocation(calibration, options)
    probe = calibration.reference.twin()
    omega = sensitivities(allocation, probe)
    if options.budget is not None and options.budget.latency is not None:
        allocation.measure(probe, options.latency_batch, options.latency_seconds)
    frontier, picked = allocation.best(allocation.components(omega), options.most)
    allocation.give(dict(zip(omega, frontier.chosen[picked])))
    record = _record(allocation, omega, frontier, picked)
    calibration.metrics["frontier"] = record
    if calibration.work is not None:
        calibration.work.note("frontier", record)


def _record(allocation: Allocation, omega: dict[str, list[float]], frontier: Frontier, picked: int) -> dict[str, Any]:
    """The frontier as plain JSON values.

    ``points``: by rising cost, each with Σ Ω, its cost on every axis as a fraction of float32's and, for each component
    in the order of ``sensitivity``, one character of ``0..9a..zA..Z`` that counts into ``choices``. ``picked``: index
    of the point, ``picked_bits``: component -> bits of weights and activations there, and the rank where ``ranks``
    offers any. ``latency_ms``: the measured table, component -> one time per choice.
    """
    options, choices, costs = allocation.options, allocation.choices, allocation.costs
    points = []
    for error, chosen in zip(frontier.errors.tolist(), frontier.chosen.tolist()):
        share = {
            axis: sum(own[j] for own, j in zip(cost["layers"].values(), chosen)) / cost["float"]
            for axis, cost in costs.items()
        }
        points.append({"error": error, **share, "chosen": "".join(DIGITS[j] for j in chosen)})
    record = {
        "budget": {axis: float(limit / costs[axis]["float"]) for axis, limit in allocation.limits().items()},
        "metric": options.metric,
        "choices": [choice.plain() for choice in choices],
        "sensitivity": omega,
        "points": points,
        "picked": picked,
        "picked_bits": {path: choices[j].plain() for path, j in zip(omega, frontier.chosen[picked])},
    }
    if "latency" in costs:
        record["latency_ms"] = {path: [t / 1e6 for t in own] for path, own in costs["latency"]["layers"].items()}
        record["latency_ms_float"] = costs["latency"]["float"] / 1e6
    return record
