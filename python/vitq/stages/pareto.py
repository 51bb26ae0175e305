"""allocate.pareto: bits per layer from the exact frontier of measured sensitivity against size, BitOps or latency.

PMQ (arXiv 2305.06559), all of it reconstructed from the abstract [R]: forward-only global sensitivity per component
(qkv, proj, fc1, fc2 of each block) and candidate bits, min ΣΩ_i(b_i) under the budget by a Pareto frontier. Measured
kernel latency as a cost is this package's addition, as is probing with the low-rank branch that the recipe will add.
"""

from __future__ import annotations

import string
from collections.abc import Callable
from dataclasses import replace
from fractions import Fraction
from itertools import product
from typing import Any, Literal

import torch
from pydantic import Field, field_validator, model_validator

from .. import lowrank
from ..allocation.costs import Layer, latency, layers_of
from ..allocation.frontier import MOST, Component, Frontier, pareto_frontier
from ..allocation.sensitivity import Metric, block_sensitivities, make_float
from ..models.sites import BlockSite
from ..quantizers import SimLinear
from ..scales import Search, set_activation, set_weight
from ..simulate import SimModel
from .base import Calibration, Options, method

Choice = tuple[int, int]  # bits of weights, of activations


class Budget(Options):
    """Upper limits, as fractions of what the components cost in float32: one or two of them.

    ``size``: bytes of codes, scales and branches. ``bitops``: MAC·b_w·b_a per image. ``latency``: milliseconds of the
    components one by one, measured on the machine that calibrates: the choice is that machine's, and only a
    ``work_dir`` repeats it bit for bit.
    """

    size: float | None = Field(None, gt=0.0)
    bitops: float | None = Field(None, gt=0.0)
    latency: float | None = Field(None, gt=0.0)

    @model_validator(mode="after")
    def _one_or_two(self) -> Budget:
        if len(self.axes) not in (1, 2):
            raise ValueError(f"budget limits {', '.join(self.axes) or 'nothing'}, expected one or two of {COSTS}")
        return self

    @property
    def axes(self) -> list[str]:
        return [name for name in type(self).model_fields if getattr(self, name) is not None]


COSTS = "size, bitops, latency"
# One for each of the 7 x 7 pairs of bit-widths that there are at most.
DIGITS = string.digits + string.ascii_letters


class ParetoOptions(Options):
    """
    Args:
        budget: what may be spent.
        bits: candidates for weights.
        activation_bits: ``tied`` to the weight's, ``fixed`` at the recipe's, ``free`` among ``bits``.
        metric: Ω on the logits, ``l2`` relative squared error or ``kl``.
        images: of the calibration images, that Ω is measured on.
        weights, activations: range searches, while probing and for the bits chosen.
        latency_batch, latency_seconds: images per measured call, seconds per measurement.
        most: points at which a frontier is refused.
    """

    budget: Budget
    bits: tuple[int, ...] = (4, 6, 8)
    activation_bits: Literal["tied", "fixed", "free"] = "tied"
    metric: Metric = "l2"
    images: int = Field(64, ge=1)
    weights: Search = Search()
    activations: Search = Search()
    latency_batch: int = Field(8, ge=1)
    latency_seconds: float = Field(0.5, gt=0.0)
    most: int = Field(MOST, ge=1)

    @field_validator("bits")
    @classmethod
    def _sorted(cls, value: tuple[int, ...]) -> tuple[int, ...]:
        if not value or min(value) < 2 or max(value) > 8:
            raise ValueError(f"bits is {value}, expected bit-widths in [2, 8]")
        return tuple(sorted(set(value)))

    def choices(self, act_bits: int) -> list[Choice]:
        """Candidate bits of a layer; ``act_bits`` are the recipe's."""
        if self.activation_bits == "free":
            return list(product(self.bits, self.bits))
        return [(b, b if self.activation_bits == "tied" else act_bits) for b in self.bits]


@method("allocate", "pareto")
def pareto(calibration: Calibration, options: ParetoOptions) -> None:
    """Leaves the choice in the layers' formats and the whole frontier as ``metrics["frontier"]`` and in the work dir.

    Layers outside blocks (patch embedding, head, patch merging) keep the recipe's bits.
    """
    choices = options.choices(calibration.recipe.bits.activations)
    probe = calibration.reference.twin()
    omega = _sensitivities(calibration, options, probe, choices)
    merged = calibration.recipe.low_rank.kind == "merged"
    ranks = {path: 0 if merged else calibration.rank(path) for path in omega}
    layers = layers_of(calibration.reference, calibration.images[:1], ranks)
    costs = _costs(calibration, options, probe, choices, layers)
    spent = list(zip(*(costs[axis]["layers"].values() for axis in options.budget.axes)))
    components = [
        Component(path, tuple(omega[path]), tuple(zip(*per_axis))) for path, per_axis in zip(omega, spent, strict=True)
    ]
    frontier = pareto_frontier(components, options.most)
    limits = {axis: Fraction(str(getattr(options.budget, axis))) * costs[axis]["float"] for axis in options.budget.axes}
    try:
        picked = frontier.pick([int(limit) for limit in limits.values()])
    except ValueError as error:
        least = {a: float(c / costs[a]["float"]) for a, c in zip(limits, frontier.costs.min(0))}
        raise ValueError(f"budget is {_said(limits, costs)}, expected at least {_listed(least)}") from error
    for component, j in zip(components, frontier.chosen[picked]):
        path = component.name
        _quantize(calibration, options, calibration.sim.linears[path], path, choices[j])
    record = _record(options, choices, omega, costs, frontier, picked)
    calibration.metrics["frontier"] = record
    if calibration.work is not None:
        calibration.work.note("frontier", record)


def _listed(values: dict[str, float]) -> str:
    return ", ".join(f"{name}={value:.4g}" for name, value in values.items())


def _said(limits: dict[str, Fraction], costs: dict[str, Any]) -> str:
    return _listed({a: float(limit / costs[a]["float"]) for a, limit in limits.items()})


def _sensitivities(
    calibration: Calibration, options: ParetoOptions, probe: SimModel, choices: list[Choice]
) -> dict[str, list[float]]:
    """Ω of every component in execution order and every choice; finished blocks come from the work dir."""
    images = calibration.images[: options.images]
    with torch.no_grad():
        logits = torch.cat([probe(part) for part in calibration.batches(images)])
    blocks = [unit for unit in calibration.sim.sequence if isinstance(unit, BlockSite)]
    omega: dict[str, list[float]] = {}
    for index, block in enumerate(blocks):
        calibration.progress(calibration.step, index, len(blocks))
        note = f"{calibration.step}.{block.path}"
        values = None if calibration.work is None else calibration.work.noted(note)
        if values is None:
            settings = {site.path: _settings(calibration, options, site.path, choices) for site in block.linears}
            values = block_sensitivities(probe, block, images, logits, settings, options.metric, calibration.batch)
            if calibration.work is not None:
                calibration.work.note(note, values)
        omega.update(values)
    return omega


def _settings(
    calibration: Calibration, options: ParetoOptions, path: str, choices: list[Choice]
) -> list[Callable[[SimLinear], None]]:
    return [
        lambda linear, choice=choice: _quantize(calibration, options, linear, path, choice, branch=True)
        for choice in choices
    ]


def _quantize(
    calibration: Calibration, options: ParetoOptions, linear: SimLinear, path: str, choice: Choice, branch: bool = False
) -> None:
    """Give a layer the formats of ``choice``, with ``branch`` also the start of the recipe's side branch."""
    recipe, stats = calibration.recipe, calibration.observations().inputs[path]
    kind, rank = recipe.low_rank.kind, calibration.rank(path) if branch else 0
    weight_spec = replace(recipe.weight_spec(False), bits=choice[0])
    act_spec = replace(recipe.activation_spec(False), bits=choice[1])
    rows = stats.rows
    if rank and kind == "subspace":
        down = lowrank.principal_directions(stats.second_moment(), rank).half().float()
        linear.set_low_rank(kind, down, linear.weight @ down.T)
        rows = rows - rows @ down.T @ down
    importance = rows.square().mean(0)
    set_weight(linear, linear.weight, weight_spec, options.weights, importance, recipe.weight_levels == "table")
    set_activation(linear, rows, act_spec, options.activations, recipe.activation_levels == "table")
    if rank and kind == "error":
        with torch.no_grad():
            lost = (linear.weight - linear.codes() * linear.quant.scale.unsqueeze(1)).double()
        up, down = lowrank.whitened(lost, lowrank.damped(stats.second_moment(), 0.01), rank)
        linear.set_low_rank(kind, down.float(), up.float())


def _costs(
    calibration: Calibration,
    options: ParetoOptions,
    probe: SimModel,
    choices: list[Choice],
    layers: dict[str, Layer],
) -> dict[str, dict[str, Any]]:
    """Per axis (latency only where it is budgeted): what the float components cost, and each layer at each choice."""
    costs: dict[str, dict[str, Any]] = {
        "size": {
            "float": sum(layer.float_size for layer in layers.values()),
            "layers": {path: [layer.size(w) for w, _ in choices] for path, layer in layers.items()},
        },
        "bitops": {
            "float": sum(layer.float_bitops for layer in layers.values()),
            "layers": {path: [layer.bitops(*choice) for choice in choices] for path, layer in layers.items()},
        },
    }
    if options.budget.latency is not None:
        measured = None if calibration.work is None else calibration.work.noted(f"{calibration.step}.latency")
        if measured is None:
            measured = _measure(calibration, options, probe, choices, layers)
            if calibration.work is not None:
                calibration.work.note(f"{calibration.step}.latency", measured)
        costs["latency"] = measured
    return costs


def _measure(
    calibration: Calibration,
    options: ParetoOptions,
    probe: SimModel,
    choices: list[Choice],
    layers: dict[str, Layer],
) -> dict[str, Any]:
    """Nanoseconds per call of ``latency_batch`` images; layers of one shape share their measurement."""
    times: dict[Layer, tuple[list[int], int]] = {}
    for path, layer in layers.items():
        if layer in times:
            continue
        linear, states = probe.linears[path], []
        for choice in choices:
            _quantize(calibration, options, linear, path, choice, branch=layer.rank > 0)
            states.append(linear.export())
            make_float(linear)
        times[layer] = latency(layer, states, options.latency_batch, options.latency_seconds)
    return {
        "float": sum(times[layer][1] for layer in layers.values()),
        "layers": {path: times[layer][0] for path, layer in layers.items()},
    }


def _record(
    options: ParetoOptions,
    choices: list[Choice],
    omega: dict[str, list[float]],
    costs: dict[str, dict[str, Any]],
    frontier: Frontier,
    picked: int,
) -> dict[str, Any]:
    """The frontier as plain JSON values.

    ``points``: by rising cost, each with Σ Ω, its cost on every axis as a fraction of float32's and, for each component
    in the order of ``sensitivity``, one character of ``0..9a..zA..Z`` that counts into ``choices``. ``picked``: index
    of the point, ``picked_bits``: component -> bits of weights and activations there. ``latency_ms``: the measured
    table, component -> one time per choice.
    """
    points = []
    for error, chosen in zip(frontier.errors.tolist(), frontier.chosen.tolist()):
        share = {
            axis: sum(own[j] for own, j in zip(cost["layers"].values(), chosen)) / cost["float"]
            for axis, cost in costs.items()
        }
        points.append({"error": error, **share, "chosen": "".join(DIGITS[j] for j in chosen)})
    record = {
        "budget": {axis: getattr(options.budget, axis) for axis in options.budget.axes},
        "metric": options.metric,
        "choices": [list(choice) for choice in choices],
        "sensitivity": omega,
        "points": points,
        "picked": picked,
        "picked_bits": {path: list(choices[j]) for path, j in zip(omega, frontier.chosen[picked])},
    }
    if "latency" in costs:
        record["latency_ms"] = {path: [t / 1e6 for t in own] for path, own in costs["latency"]["layers"].items()}
        record["latency_ms_float"] = costs["latency"]["float"] / 1e6
    return record
