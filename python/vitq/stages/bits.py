"""What the methods of ``allocate`` share: candidate bits, budgets, measuring, and giving a layer the bits it got."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from fractions import Fraction
from functools import partial
from itertools import product
from typing import Any, Literal, NamedTuple

import torch
from pydantic import Field, field_validator, model_validator
from torch import Tensor

from .. import lowrank
from ..allocation.costs import Layer, latency, layers_of
from ..allocation.frontier import MOST, Component, Frontier, pareto_frontier
from ..allocation.sensitivity import Metric, block_sensitivities, make_float
from ..models.sites import BlockSite
from ..quantizers import SimLinear
from ..scales import Search, set_activation, set_weight
from ..simulate import SimModel
from .base import Calibration, Options

COSTS = "size, bitops, latency"


class Choice(NamedTuple):
    """Bits of weights and of activations; rank of the branch, or None for what the recipe says."""

    weights: int
    activations: int
    rank: int | None = None

    def plain(self) -> list[int]:
        return [value for value in self if value is not None]


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


class BitsOptions(Options):
    """
    Args:
        budget: what may be spent; None is the size that the recipe's own bits take everywhere: the same bits per
            weight on average.
        bits: candidates for weights.
        activation_bits: ``tied`` to the weight's, ``fixed`` at the recipe's, ``free`` among ``bits``.
        weights, activations: range searches, while probing and for the bits chosen.
        weight_importance: what a weight's squared error counts: ``input`` E x_k² of its column, or ``none`` one.
    """

    budget: Budget | None = None
    bits: tuple[int, ...] = (2, 3, 4, 5, 6, 7, 8)
    activation_bits: Literal["tied", "fixed", "free"] = "tied"
    weights: Search = Search()
    activations: Search = Search()
    weight_importance: Literal["input", "none"] = "input"

    @field_validator("bits")
    @classmethod
    def _sorted(cls, value: tuple[int, ...]) -> tuple[int, ...]:
        if not value or min(value) < 2 or max(value) > 8:
            raise ValueError(f"bits is {value}, expected bit-widths in [2, 8]")
        return tuple(sorted(set(value)))

    @property
    def own_bits(self) -> str | None:
        return None if self.budget is None else f"its budget does (--budget {self.budget.axes[0]}=...)"

    def choices(self, act_bits: int) -> list[Choice]:
        """Candidate bits of a layer; ``act_bits`` are the recipe's."""
        if self.activation_bits == "free":
            return [Choice(*pair) for pair in product(self.bits, self.bits)]
        return [Choice(b, b if self.activation_bits == "tied" else act_bits) for b in self.bits]


class ProbeOptions(BitsOptions):
    """
    Args:
        metric: Ω on the logits, ``l2`` relative squared error or ``kl``.
        images: of the calibration images, that Ω is measured on.
    """

    metric: Metric = "l2"
    images: int = Field(64, ge=1)


def set_bits(
    calibration: Calibration,
    linear: SimLinear,
    path: str,
    choice: Choice,
    weights: Search,
    activations: Search,
    weight_importance: Literal["input", "none"] = "input",
    branch: bool = False,
) -> None:
    """Quantize a layer anew in the recipe's formats at ``choice``, with ``branch`` also start its branch.

    Args:
        linear, path: the layer, of the model being quantized or of a probe.
        weights, activations, weight_importance: range searches, as in BitsOptions.

    Raises: ValueError for a layer whose input has a quantizer, of the simulation only, without other bits.
    """
    simulated = calibration.sim.linears[path].simulated
    recipe, stats = calibration.recipe, calibration.observations().inputs[path]
    kind, rank = recipe.low_rank.kind, calibration.rank(path, choice.rank) if branch else 0
    weight_spec = replace(recipe.weight_spec(False), bits=choice.weights)
    act_spec = replace(recipe.activation_spec(False), bits=choice.activations)
    rows = stats.rows
    if rank and kind == "subspace":
        down = stats.directions[:rank].half().float()
        linear.set_low_rank(kind, down, linear.weight @ down.T)
        rows = rows - rows @ down.T @ down
    importance = rows.square().mean(0) if weight_importance == "input" else None
    set_weight(linear, linear.weight, weight_spec, weights, importance, recipe.weight_levels == "table")
    set_activation(linear, rows, act_spec, activations, recipe.activation_levels == "table")
    linear.simulated = None if simulated is None else simulated.at(choice.activations)
    if rank and kind == "error":
        with torch.no_grad():
            lost = (linear.weight - linear.codes() * linear.quant.scale.unsqueeze(1)).double()
        up, down = lowrank.whitened(lost, lowrank.damped(stats.second_moment(), 0.01), rank)
        linear.set_low_rank(kind, down.float(), up.float())


class Allocation:
    """The components (linear layers inside blocks), what each choice costs, and what may be spent.

    Attributes:
        choices: candidates of every component.
        layers: path -> Layer with the recipe's branch, in execution order.
        costs: axis -> ``float``, what the float components cost, and ``layers``: path -> cost of each choice. Latency
            is there once it was measured.
    """

    def __init__(self, calibration: Calibration, options: BitsOptions) -> None:
        self.calibration, self.options = calibration, options
        self.choices = options.choices(calibration.recipe.bits.activations)
        self.layers = _layers(calibration)
        self.costs: dict[str, dict[str, Any]] = {
            "size": {
                "float": sum(layer.float_size for layer in self.layers.values()),
                "layers": {p: [self._layer(p, c).size(c.weights) for c in self.choices] for p in self.layers},
            },
            "bitops": {
                "float": sum(layer.float_bitops for layer in self.layers.values()),
                "layers": {p: [self._layer(p, c).bitops(*c[:2]) for c in self.choices] for p in self.layers},
            },
        }

    def _layer(self, path: str, choice: Choice) -> Layer:
        """The layer's work with the branch that ``choice`` gives it."""
        layer = self.layers[path]
        return layer if choice.rank is None else replace(layer, rank=self.calibration.rank(path, choice.rank))

    def limits(self) -> dict[str, Fraction]:
        """Axis -> what may be spent on it; measures the latency that is budgeted, unless that was done before."""
        budget = self.options.budget
        if budget is not None and budget.latency is not None and "latency" not in self.costs:
            self.measure(self.calibration.reference.twin())
        if budget is None:
            bits = self.calibration.recipe.bits.weights
            return {"size": Fraction(sum(layer.size(bits) for layer in self.layers.values()))}
        return {axis: Fraction(str(getattr(budget, axis))) * self.costs[axis]["float"] for axis in budget.axes}

    def components(
        self, errors: dict[str, list[float]], offered: dict[str, list[int]] | None = None
    ) -> list[Component]:
        """Args: errors: path -> error of each choice; offered: path -> indices of those choices, None for all."""
        axes = list(self.limits())
        out = []
        for path, own in errors.items():
            indices = range(len(self.choices)) if offered is None else offered[path]
            costs = tuple(tuple(self.costs[axis]["layers"][path][j] for axis in axes) for j in indices)
            out.append(Component(path, tuple(own), costs))
        return out

    def best(self, components: list[Component], most: int = MOST) -> tuple[Frontier, int]:
        """The exact frontier and the index of its best point within the budget.

        Raises: ValueError if nothing fits, with the least there is.
        """
        frontier = pareto_frontier(components, most)
        limits = self.limits()
        try:
            return frontier, frontier.pick([int(limit) for limit in limits.values()])
        except ValueError as error:
            raise self.too_small([int(c) for c in frontier.costs.min(0)]) from error

    def too_small(self, least: list[int]) -> ValueError:
        """The error for a budget that even the ``least`` costs (per axis) exceed."""
        limits = self.limits()
        said, wanted = (
            ", ".join(f"{axis}={float(c / self.costs[axis]['float']):.4g}" for axis, c in zip(limits, costs))
            for costs in (limits.values(), least)
        )
        return ValueError(f"budget is {said}, expected at least {wanted}")

    def measure(self, probe: SimModel, batch: int = 8, seconds: float = 0.5) -> None:
        """Add latency to the costs: nanoseconds per call of ``batch`` images; layers of one shape share a measurement.

        Args: probe: a float model, which is left as it is; seconds: per measurement.
        """
        self.costs["latency"] = noted(self.calibration, "latency", lambda: self._measured(probe, batch, seconds))

    def _measured(self, probe: SimModel, batch: int, seconds: float) -> dict[str, Any]:
        times: dict[Layer, tuple[list[int], int]] = {}
        for path, layer in self.layers.items():
            if layer in times:
                continue
            linear, states = probe.linears[path], []
            for choice in self.choices:
                self.setting(path, choice, branch=self._layer(path, choice).rank > 0)(linear)
                states.append(linear.export())
                make_float(linear)
            times[layer] = latency(layer, states, batch, seconds)
        return {
            "float": sum(times[layer][1] for layer in self.layers.values()),
            "layers": {path: times[layer][0] for path, layer in self.layers.items()},
        }

    def setting(self, path: str, choice: Choice, branch: bool = False) -> Callable[[SimLinear], None]:
        """What gives a layer at ``path`` the bits of ``choice``."""
        options = self.options
        searches = (options.weights, options.activations, options.weight_importance)
        return lambda linear: set_bits(self.calibration, linear, path, choice, *searches, branch)

    def give(self, chosen: dict[str, int]) -> None:
        """Quantize the model being calibrated at ``chosen`` (path -> index of its choice); branches start later."""
        for path, j in chosen.items():
            choice = self.choices[j]
            self.setting(path, choice)(self.calibration.sim.linears[path])
            if choice.rank is not None:
                self.calibration.ranks[path] = choice.rank

    def note(self, chosen: dict[str, int], **more: Any) -> None:
        """Leave the bits ``chosen``, what they cost as fractions of float32's, and ``more`` in the metrics."""
        spent = {
            axis: sum(cost["layers"][path][j] for path, j in chosen.items()) / cost["float"]
            for axis, cost in self.costs.items()
        }
        bits = {path: self.choices[j].plain() for path, j in chosen.items()}
        self.calibration.metrics["allocation"] = {"bits": bits, **spent, **more}


def blocks(calibration: Calibration) -> list[BlockSite]:
    return [unit for unit in calibration.sim.sequence if isinstance(unit, BlockSite)]


def _layers(calibration: Calibration) -> dict[str, Layer]:
    """The work of each linear layer inside blocks on one image."""
    merged = calibration.recipe.low_rank.kind == "merged"
    paths = [site.path for block in blocks(calibration) for site in block.linears]
    ranks = {path: 0 if merged else calibration.rank(path) for path in paths}
    return layers_of(calibration.reference, calibration.images[:1], ranks)


def float_logits(calibration: Calibration, images: Tensor) -> Tensor:
    """[B, classes] of ``images`` in the float model."""
    with torch.no_grad():
        return torch.cat([calibration.reference(part) for part in calibration.batches(images)])


def sensitivities(allocation: Allocation, probe: SimModel) -> dict[str, list[float]]:
    """Ω of every component, alone, at every choice; finished blocks come from the work dir.

    Args: allocation: of ProbeOptions; probe: a float model to quantize layers of.
    """
    calibration, options = allocation.calibration, allocation.options
    images = calibration.images[: options.images]
    logits = float_logits(calibration, images)
    omega: dict[str, list[float]] = {}
    sites = blocks(calibration)
    for index, block in enumerate(sites):
        calibration.progress(calibration.step, index, len(sites))
        settings = {
            site.path: [allocation.setting(site.path, choice, branch=True) for choice in allocation.choices]
            for site in block.linears
        }
        omega |= noted(
            calibration,
            block.path,
            partial(block_sensitivities, probe, block, images, logits, settings, options.metric, calibration.batch),
        )
    return omega


def noted(calibration: Calibration, what: str, measure: Callable[[], Any]) -> Any:
    """What the work dir holds as ``what`` of this step, else what ``measure`` returns, kept there."""
    if calibration.work is None:
        return measure()
    name = f"{calibration.step}.{what}"
    values = calibration.work.noted(name)
    if values is None:
        values = measure()
        calibration.work.note(name, values)
    return values
