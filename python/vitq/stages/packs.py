"""allocate.packs: Pack-PTQ's Hessian-guided scores, packs of blocks, and bit-widths of packs (arXiv 2505.00259).

Score [C]. With only block b quantized: L = KL(P_q ‖ P_fp) of the logits, g = ∂L/∂z_fp at the float block's output with
P_q held fixed, d = z_fp − z_q:

    S = (L − mean(g⊙d)) / (½·mean d²),    Ω = S·mean|d|.

L is a mean over images and the other two are means over elements, hence: the gradient's term is smaller than L by the
number of elements (summed like L it would be 2·L to second order, and turn the sign), and S grows with the size of the
block's output. ``normalise`` [R] divides S by the elements of one image's output, which makes it the curvature along d,
2·L/‖d‖²: the same order where all blocks are of one size (ViT, DeiT), and none of the bias between stages where they
are not (Swin). It is the default.

Packing [C]. From the end of the model: a pack starts at the lowest S that is left and ends where the one behind it
starts. [R] With a cap the lowest S is sought among the last ``cap`` blocks only. [R] Packs stay within runs of blocks
that read each other's output: what lies between Swin's stages is reconstructed by itself.

Bits [C]. One width for all of a pack (weights, activations, attention operands, probabilities) out of (low, mid, high);
N_j counts the pack's weights and, for one image, activations. ``greedy``: all at mid, then in descending mean Ω of the
pack's blocks to high while the budget holds. ``optimal`` [R]: max Σ Ω_j·b_j under the same budget, exactly. [R] Instead
of bits per element, the budget may limit bytes, BitOps or measured latency of the blocks' linear layers.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import asdict, dataclass, replace
from itertools import chain
from typing import Any, Literal

import torch
from pydantic import Field, SerializerFunctionWrapHandler, field_validator, model_serializer, model_validator
from torch import Tensor

from ..allocation.frontier import Component, pareto_frontier
from ..losses import hooked, kl_gradient, log_probabilities
from ..models.sites import BlockSite
from ..quantizers import FocusQuantizer
from ..scales import Search, set_operands
from ..simulate import recording
from .base import Calibration, Options, Pack, method
from .bits import Allocation, BitsOptions, Budget, Choice, set_bits

CANDIDATES = {3: (2, 3, 4), 4: (3, 4, 6), 6: (4, 6, 8)}


class PackOptions(Options):
    """
    Args:
        normalise: curvature per unit of ‖d‖² instead of the published S, see the module.
        cap: most blocks in a pack, which bounds the memory of reconstruction; 0 is the published no bound.
        precision: ``uniform`` keeps the recipe's bits; ``greedy`` and ``optimal`` choose among ``candidates``.
        candidates: (low, mid, high) bits, mid being the recipe's; None takes the published triple of the recipe's bits.
        average: bits per element of the whole model that may be spent; None is the published (mid + high)/2.
        budget: what may be spent instead, as fractions of what the blocks' linear layers cost in float32.
        latency_batch, latency_seconds: as in allocate.pareto, for a budget of latency.
        weights, activations, operands: range searches of what gets other bits than the recipe's.
        weight_importance: as in allocate's other methods, for those weights.
    """

    normalise: bool = True
    cap: int = Field(0, ge=0)
    precision: Literal["uniform", "greedy", "optimal"] = "uniform"
    candidates: tuple[int, int, int] | None = None
    average: float | None = Field(None, ge=2.0, le=8.0)
    budget: Budget | None = None
    latency_batch: int = Field(8, ge=1)
    latency_seconds: float = Field(0.5, gt=0.0)
    weights: Search = Search()
    activations: Search = Search()
    operands: Search = Search(method="minmax")
    weight_importance: Literal["input", "none"] = "input"

    @model_serializer(mode="wrap")
    def _plain(self, plain: SerializerFunctionWrapHandler) -> dict[str, Any]:
        """Without the default weight_importance: such a recipe reads as before there was a choice."""
        return {k: v for k, v in plain(self).items() if (k, v) != ("weight_importance", "input")}

    @property
    def own_bits(self) -> str | None:
        if self.precision == "uniform":
            return None
        return (
            "packs and boundary take widths of one triple, set all of them (--set 'bits={...}', boundary the highest)"
        )

    @field_validator("candidates")
    @classmethod
    def _ascending(cls, value: tuple[int, int, int] | None) -> tuple[int, int, int] | None:
        if value is not None and not (2 <= value[0] < value[1] < value[2] <= 8):
            raise ValueError(f"candidates is {value}, expected three ascending bit-widths in [2, 8]")
        return value

    @model_validator(mode="after")
    def _one_limit(self) -> PackOptions:
        if self.budget is not None and (self.average is not None or self.precision == "uniform"):
            raise ValueError("budget is given, expected precision greedy or optimal, and no average")
        return self


@dataclass(frozen=True)
class Score:
    """Of one block: L = ``loss``, S = ``curvature``, Ω = ``sensitivity``."""

    loss: float
    curvature: float
    sensitivity: float


@method("allocate", "packs")
def packs(calibration: Calibration, options: PackOptions) -> None:
    recipe = calibration.recipe
    triple = None if options.precision == "uniform" else _candidates(calibration, options)
    runs = _runs(calibration)
    blocks = [block for run in runs for block in run]
    scores: dict[str, Score] = {}
    for index, block in enumerate(blocks):
        calibration.progress(calibration.step, index, len(blocks))
        scores[block.path] = score_block(calibration, block, options.normalise)
    calibration.packs = [
        Pack(tuple(run[first:last]))
        for run in runs
        for first, last in pack([scores[block.path].curvature for block in run], options.cap)
    ]
    sizes = elements(calibration)
    of_packs = [sum(sizes[path] for path in _paths(each)) for each in calibration.packs]
    omegas = [sum(scores[b.path].sensitivity for b in p.blocks) / len(p.blocks) for p in calibration.packs]
    bits = [recipe.bits.weights] * len(of_packs)
    if triple is not None:
        choose = greedy if options.precision == "greedy" else optimal
        spend = _on_elements if options.budget is None else _on_budget
        bits = spend(calibration, options, triple, sizes, lambda *costs: choose(omegas, triple, *costs))
        for each, b in zip(calibration.packs, bits):
            if b != recipe.bits.weights:
                for block in each.blocks:
                    _set_bits(calibration, options, block, b)
    calibration.metrics["packs"] = [
        {
            "blocks": [{"path": block.path, **asdict(scores[block.path])} for block in each.blocks],
            "sensitivity": omega,
            "elements": n,
            "bits": b,
        }
        for each, omega, n, b in zip(calibration.packs, omegas, of_packs, bits)
    ]


def _candidates(calibration: Calibration, options: PackOptions) -> tuple[int, int, int]:
    """Raises: ValueError for a recipe without one mid bit-width, or one that the candidates do not fit, and for
    probabilities whose quantizer has its bits once and for all."""
    bits = calibration.recipe.bits
    for path, attention in calibration.sim.attentions.items():
        if attention.simulated is not None:
            kind = type(attention.simulated).__name__
            raise ValueError(
                f"the softmax of {path!r} has a {kind}, expected a focusing quantizer with precision "
                f"{options.precision!r}: packs take probabilities to other bits, too"
            )
    mid = {bits.weights, bits.activations, bits.operands, bits.softmax}
    if len(mid) > 1:
        raise ValueError(
            f"bits of weights, activations, operands and softmax are {sorted(mid)}, expected one width with "
            f"precision {options.precision!r}"
        )
    triple = options.candidates or CANDIDATES.get(bits.weights)
    if triple is None:
        raise ValueError(f"bits is {bits.weights}, expected one of {', '.join(map(str, CANDIDATES))} or candidates")
    if triple[1] != bits.weights:
        raise ValueError(f"candidates is {triple}, expected the recipe's {bits.weights} bits in the middle")
    return triple


def _paths(pack: Pack) -> list[str]:
    return [site.path for block in pack.blocks for site in block.linears]


Costs = list[list[tuple[int, ...]]]  # [pack][candidate][axis]
Choose = Callable[[Costs, list[int]], list[int]]  # costs and limits -> bits per pack; TooLittle if nothing fits


class TooLittle(Exception):
    """Nothing fits: the argument is the least cost that could be, per axis."""


def _on_elements(
    calibration: Calibration, options: PackOptions, triple: tuple[int, int, int], sizes: dict[str, int], choose: Choose
) -> list[int]:
    """Bits per pack within the wanted average over all elements, notes what came out."""
    recipe, inside = calibration.recipe, [_paths(each) for each in calibration.packs]
    fixed = sum(
        n * (recipe.bits.boundary if calibration.boundary(path) else recipe.bits.weights)
        for path, n in sizes.items()
        if path not in set(chain(*inside))
    )
    of_packs = [sum(sizes[path] for path in paths) for paths in inside]
    average = (triple[1] + triple[2]) / 2 if options.average is None else options.average
    budget = math.floor(sum(sizes.values()) * average - fixed)
    try:
        bits = choose([[(n * b,) for b in triple] for n in of_packs], [budget])
    except TooLittle as error:
        least = error.args[0][0]
        raise ValueError(f"budget is {budget} bits for the packs, expected at least {least}") from error
    spent = sum(n * b for n, b in zip(of_packs, bits)) + fixed
    calibration.metrics["average_element_bits"] = spent / sum(sizes.values())
    return bits


def _on_budget(
    calibration: Calibration, options: PackOptions, triple: tuple[int, int, int], sizes: dict[str, int], choose: Choose
) -> list[int]:
    """Bits per pack within size, BitOps or latency, notes what they cost."""
    searches = {name: getattr(options, name) for name in ("weights", "activations", "weight_importance")}
    allocation = Allocation(calibration, BitsOptions(budget=options.budget, bits=triple, **searches))
    if options.budget.latency is not None:
        allocation.measure(calibration.reference.twin(), options.latency_batch, options.latency_seconds)
    limits = allocation.limits()
    layers = [allocation.costs[axis]["layers"] for axis in limits]
    inside = [_paths(each) for each in calibration.packs]
    costs = [
        [tuple(sum(layer[path][j] for path in paths) for layer in layers) for j in range(len(triple))]
        for paths in inside
    ]
    try:
        bits = choose(costs, [int(limit) for limit in limits.values()])
    except TooLittle as error:
        raise allocation.too_small(error.args[0]) from error
    allocation.note({path: triple.index(b) for paths, b in zip(inside, bits) for path in paths})
    return bits


def _runs(calibration: Calibration) -> list[list[BlockSite]]:
    """Blocks in execution order, split where one does not read just what the one before wrote."""
    successors = calibration.successors()
    runs: list[list[BlockSite]] = []
    for block in (unit for unit in calibration.sim.sequence if isinstance(unit, BlockSite)):
        if runs and successors.get(runs[-1][-1].path) == block.path:
            runs[-1].append(block)
        else:
            runs.append([block])
    return runs


class _Sums:
    """Sums over images [B, ...] of L, g⊙d (g of one image's loss), d² and |d|, in float64."""

    def __init__(self) -> None:
        self.loss = self.product = self.square = self.absolute = 0.0
        self.images = self.elements = 0

    def add(self, loss: Tensor, gradient: Tensor, difference: Tensor) -> None:
        """Args: loss [B]; gradient, difference [B, ...]."""
        d = difference.double()
        self.loss += float(loss.double().sum())
        self.product += float((gradient.double() * d).sum())
        self.square += float(d.square().sum())
        self.absolute += float(d.abs().sum())
        self.images += len(d)
        self.elements += d.numel()

    def score(self, normalise: bool) -> Score:
        """Where quantization changes nothing, both scores are 0."""
        loss = self.loss / self.images
        if self.square == 0.0:
            return Score(loss, 0.0, 0.0)
        # The gradient of the mean loss: one more division by the number of images.
        first = loss - self.product / self.images / self.elements
        half = 0.5 * self.square / (self.images if normalise else self.elements)
        return Score(loss, first / half, first / half * self.absolute / self.elements)


def score_block(calibration: Calibration, block: BlockSite, normalise: bool) -> Score:
    """The score of one block of the float model whose quantized form is the simulation's."""
    reference = calibration.reference.model
    exact, quantized = (m.model.get_submodule(block.path) for m in (calibration.reference, calibration.sim))
    sums, unread = _Sums(), calibration.unread(block.path)
    for images in calibration.batches(calibration.images):
        z: list[Tensor] = []

        def through(module, inputs: tuple, output: Tensor, z=z) -> Tensor:
            z.extend((quantized(*inputs), output))
            return z[0]

        with torch.no_grad():
            wanted = log_probabilities(hooked(reference, exact, through, images))
        loss, gradient = kl_gradient(reference, exact, z[1], images, wanted, unread=unread)
        sums.add(loss, gradient, z[1] - z[0])
    return sums.score(normalise)


def pack(scores: list[float], cap: int = 0) -> list[tuple[int, int]]:
    """Packs as [first, last) of the blocks with these S, in order; of equal scores the first counts.

    Args: cap: most blocks in one, 0 for no bound.
    """
    out: list[tuple[int, int]] = []
    end = len(scores)
    while end > 0:
        least = max(0, end - cap) if cap else 0
        first = min(range(least, end), key=scores.__getitem__)
        out.append((first, end))
        end = first
    return out[::-1]


def elements(calibration: Calibration) -> dict[str, int]:
    """Linear path -> weights and what is quantized for one image: inputs, and at qkv Q, K, V and probabilities, too."""
    sim = calibration.reference
    heads = {site.qkv.path: site.heads for site in sim.attention_sites.values()}
    out: dict[str, int] = {}

    def record(path: str, inputs: tuple, output: Tensor) -> None:
        out[path] = sim.linears[path].weight.numel() + inputs[0].numel()
        if path in heads:
            windows, tokens, _ = output.shape
            out[path] += output.numel() + windows * heads[path] * tokens**2

    with torch.no_grad(), recording(sim.linears, record):
        sim(calibration.images[:1])
    return out


def greedy(omegas: list[float], candidates: tuple[int, int, int], costs: Costs, limits: list[int]) -> list[int]:
    """Bits per pack: mid, then high in descending ``omegas`` while Σ costs ≤ ``limits`` on every axis.

    Raises: TooLittle if mid everywhere exceeds a limit.
    """
    _, mid, high = candidates
    bits = [mid] * len(costs)
    spent = [sum(axis) for axis in zip(*(cost[1] for cost in costs))]
    if any(s > limit for s, limit in zip(spent, limits)):
        raise TooLittle(spent)
    for i in sorted(range(len(costs)), key=lambda i: -omegas[i]):
        more = [s + up - now for s, up, now in zip(spent, costs[i][2], costs[i][1])]
        if all(s <= limit for s, limit in zip(more, limits)):
            bits[i], spent = high, more
    return bits


def optimal(omegas: list[float], candidates: tuple[int, ...], costs: Costs, limits: list[int]) -> list[int]:
    """Bits per pack with the greatest Σ omegas·bits for which Σ costs ≤ ``limits``, exactly; the cheapest of equals.

    Raises: TooLittle if no choice of candidates fits.
    """
    frontier = pareto_frontier(
        [Component(str(i), tuple(-o * b for b in candidates), tuple(c)) for i, (o, c) in enumerate(zip(omegas, costs))]
    )
    try:
        return [candidates[j] for j in frontier.chosen[frontier.pick(limits)]]
    except ValueError as error:
        raise TooLittle([int(c) for c in frontier.costs.min(0)]) from error


def _set_bits(calibration: Calibration, options: PackOptions, block: BlockSite, bits: int) -> None:
    """Quantize everything of a block anew at ``bits``."""
    sim, searches = calibration.sim, (options.weights, options.activations, options.weight_importance)
    for path, linear in sim.linears_of(block).items():
        set_bits(calibration, linear, path, Choice(bits, bits), *searches)
    attention = sim.attention_of(block)
    if attention is not None:
        operand = replace(calibration.recipe.operand_spec(), bits=bits)
        attention.focus = FocusQuantizer(replace(attention.focus.spec, bits=bits))
        set_operands(attention, calibration.observations().qkv[block.attention.path], operand, options.operands)
