"""refine.evolution: CPT-V / Evol-Q's search for better weight scales by a contrastive loss on the logits.

[P] Starts from any finished calibration. Block by block, last to first, the weight scales of qkv and proj (one per
output channel) are perturbed and what lowers the loss survives: quantized logits must be nearer to the float logits of
their own image than to those of the other images. No gradient.
[C] The numbers: T = 3, batches of 100 images, 10 passes, a population of 15, 3 cycles of 10 draws per block and pass; a
changed scale rounds the weight anew; the vector of a block joins both layers.
[R] Candidates are judged by the calibration images alone, all of them, against the untouched float model. Weights with
learned rounding keep their codes (there is no rounding them anew without losing what was learned), so that a scale is a
gain of its output channel; ``codes: kept`` does that everywhere. Scales may move relative to their size, and those of
the MLP may move, too.

What enters a block does not depend on the blocks behind it, and these are searched first: one forward pass at the start
of a pass holds for all its blocks, and a candidate costs the blocks from the searched one on. A block starts with the
loss that the previous one ended with, so a pass costs cycles·blocks evaluations and the search one more.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Collection
from itertools import takewhile
from operator import itemgetter
from typing import Literal

import torch
from pydantic import Field, model_validator
from torch import Tensor, nn

from ..models.sites import BlockSite
from ..quantizers import SimLinear
from ..simulate import SimModel, recording
from .base import Calibration, Options, method

Scales = tuple[Tensor, ...]


class EvolutionOptions(Options):
    """
    Args:
        passes: over the blocks, scaled by the recipe's effort.
        population, cycles, sample: the start's copies, children per block and pass, draws for each parent.
        epsilon: a child's scales are |s + U(−ε, ε)|; None takes the paper's: 1e-3 up to 4 bits, 1e-4 above.
        relative: |s·(1 + U(−ε, ε))| instead; needs ``epsilon``.
        mlp: the scales of fc1 and fc2 join the block's vector.
        codes: ``nearest`` rounds the weight anew for every scale, ``kept`` changes nothing but the scale.
        temperature: T of the loss; batch: images contrasted with each other.
    """

    passes: int = Field(10, ge=0)
    population: int = Field(15, ge=1)
    cycles: int = Field(3, ge=1)
    sample: int = Field(10, ge=1)
    epsilon: float | None = Field(None, gt=0.0)
    relative: bool = False
    mlp: bool = False
    codes: Literal["nearest", "kept"] = "nearest"
    temperature: float = Field(3.0, gt=0.0)
    batch: int = Field(100, ge=2)

    @model_validator(mode="after")
    def _sized(self) -> EvolutionOptions:
        if self.relative and self.epsilon is None:
            raise ValueError("epsilon is None, expected a number where relative is true: the paper's are absolute")
        if self.relative and self.epsilon >= 1.0:
            raise ValueError(f"epsilon is {self.epsilon}, expected less than 1 where relative is true")
        return self


@method("refine", "evolution")
def evolution(calibration: Calibration, options: EvolutionOptions) -> None:
    sim, images = calibration.sim, calibration.images
    calibration.refuse_token_bits()
    if len(images) < 2:
        raise ValueError(f"images holds {len(images)}, expected at least 2: the loss contrasts images with each other")
    roles = ("qkv", "proj", "fc1", "fc2") if options.mlp else ("qkv", "proj")
    blocks = [(unit, linears) for unit in sim.sequence if (linears := _searched(sim, unit, roles))]
    if not blocks:
        raise ValueError(f"no {' or '.join(roles)} layer of a block is quantized, expected a finished calibration")
    # Neither transforms nor compensation have touched the family's own model.
    target = _logits(SimModel(sim.family).to(images.device), calibration)
    # Before the first pass: holding a layer's codes ends its learned rounding.
    kept = {linear for linear in sim.linears.values() if options.codes == "kept" or linear.quant.alpha is not None}
    passes = calibration.iterations(options.passes)
    known: float | None = None
    for index in range(passes):
        step, suffixes = f"{calibration.step}.{index}", None
        for done, (unit, linears) in enumerate(reversed(blocks)):
            calibration.progress(calibration.step, index * len(blocks) + done, passes * len(blocks))
            if calibration.work is not None and calibration.work.restore(step, unit.path, sim) is not None:
                continue
            if suffixes is None:
                suffixes = Suffixes(calibration, [block for block, _ in blocks])

            def loss(path: str = unit.path, suffixes: Suffixes = suffixes) -> float:
                return contrastive_loss(suffixes.logits(path), target, options.temperature, options.batch)

            if known is None:
                known = loss()
            generator = calibration.generator(index, unit.path)
            known = refine(linears, kept, loss, known, options, generator)
            if calibration.work is not None:
                calibration.work.keep(step, unit.path, sim, {})
    calibration.progress(calibration.step, passes * len(blocks), passes * len(blocks))


def _searched(sim: SimModel, unit: object, roles: tuple[str, ...]) -> list[SimLinear]:
    sites = unit.linears if isinstance(unit, BlockSite) else ()
    linears = [sim.linears[site.path] for site in sites if site.role in roles]
    return [linear for linear in linears if linear.quant.spec is not None]


@torch.no_grad()
def _logits(model: nn.Module, calibration: Calibration) -> Tensor:
    return torch.cat([model(part) for part in calibration.batches(calibration.images)])


def contrastive_loss(actual: Tensor, wanted: Tensor, temperature: float = 3.0, batch: int = 100) -> float:
    """2T·mean_i −log( exp(q_i·k_i/T) / Σ_j exp(q_i·k_j/T) ) of L2-normalized logits q (actual) and k (wanted).

    Args: actual, wanted [B, C]; batch: largest number of images j that are contrasted; B images are split as evenly as
    can be, since the loss of a batch grows with the logarithm of its size.
    Numerics: float64; q·k/T lies within ±1/T, and the differences that matter are many orders below the loss.
    """
    parts = math.ceil(len(actual) / batch)
    total = 0.0
    for q, k in zip(actual.double().tensor_split(parts), wanted.double().tensor_split(parts)):
        q, k = nn.functional.normalize(q, dim=1), nn.functional.normalize(k, dim=1)
        total -= float((q @ k.T / temperature).log_softmax(1).diagonal().sum())
    return 2.0 * temperature * total / len(actual)


class Suffixes:
    """The quantized model on the calibration images from any of its blocks on, without the blocks before.

    Memory: what enters every block, for all images, is kept. It holds until a block changes that is before the one
    asked for.

    Args: blocks: the blocks that will be asked for.
    """

    def __init__(self, calibration: Calibration, blocks: list[BlockSite]) -> None:
        self._calibration = calibration
        sim = calibration.sim
        self._blocks = {u.path: sim.model.get_submodule(u.path) for u in sim.sequence if isinstance(u, BlockSite)}
        self._entering: dict[str, list[Tensor]] = {unit.path: [] for unit in blocks}
        with recording(
            {path: self._blocks[path] for path in self._entering},
            lambda path, inputs, output: self._entering[path].append(inputs[0]),
        ):
            _logits(sim, calibration)

    def logits(self, path: str) -> Tensor:
        """[B, C] logits of the model as it now is from the block at ``path`` on.

        The blocks before pass their input through (blocks map the residual stream to itself) and the block at ``path``
        is handed what was recorded; patch embedding and patch merging in front of it run for their shapes only.
        """
        entering = iter(self._entering[path])
        before = [self._blocks[p] for p in takewhile(lambda p: p != path, self._blocks)]
        handle = self._blocks[path].register_forward_pre_hook(lambda _, inputs: (next(entering), *inputs[1:]))
        for block in before:
            block.forward = _pass_through
        try:
            return _logits(self._calibration.sim, self._calibration)
        finally:
            handle.remove()
            for block in before:
                del block.forward


def _pass_through(x: Tensor, *args: object, **kwargs: object) -> Tensor:
    return x


def refine(
    linears: list[SimLinear],
    kept: Collection[SimLinear],
    loss: Callable[[], float],
    known: float,
    options: EvolutionOptions,
    generator: torch.Generator,
) -> float:
    """Evolve the weight scales of ``linears`` and leave the best there.

    Args: kept: layers that keep their codes; loss: of the model as it now is; known: what it is at the start.
    Returns: the loss of what is left, at most ``known``.
    """
    held = [_hold(linear) if linear in kept else None for linear in linears]
    widths = [options.epsilon or default_epsilon(linear.quant.spec.bits) for linear in linears]

    def mutate(parent: Scales) -> Scales:
        return tuple(_moved(s, e, options.relative, generator) for s, e in zip(parent, widths))

    def put(scales: Scales) -> None:
        for linear, codes, scale in zip(linears, held, scales):
            linear.quant.scale.data = scale
            if codes is not None:
                _set_codes(linear, codes)

    def evaluate(scales: Scales) -> float:
        put(scales)
        return loss()

    start = tuple(linear.quant.scale.detach().clone() for linear in linears)
    best, least = evolve(start, known, evaluate, mutate, options, generator)
    put(best)
    return least


def evolve(
    start: Scales,
    known: float,
    evaluate: Callable[[Scales], float],
    mutate: Callable[[Scales], Scales],
    options: EvolutionOptions,
    generator: torch.Generator,
) -> tuple[Scales, float]:
    """The best individual and its loss after ``cycles``: draw with replacement, mutate the best drawn, drop the worst.

    The best never is the worst of more than one, so what is returned is no worse than ``start``.
    """
    members = [(known, start)] * options.population
    for _ in range(options.cycles):
        drawn = torch.randint(len(members), (options.sample,), generator=generator, device="cpu").tolist()
        _, parent = min((members[i] for i in drawn), key=itemgetter(0))
        child = mutate(parent)
        members.append((evaluate(child), child))
        members.pop(max(range(len(members)), key=lambda i: members[i][0]))
    # By loss alone: of equal ones tuples would go on to compare tensors.
    least, best = min(members, key=itemgetter(0))
    return best, least


def default_epsilon(bits: int) -> float:
    """[P] 1e-3 for 3 and 4 bits, 1e-4 for 8; [R] the boundary between them."""
    return 1e-3 if bits <= 4 else 1e-4


def _moved(scale: Tensor, epsilon: float, relative: bool, generator: torch.Generator) -> Tensor:
    step = (2.0 * torch.rand(scale.shape, generator=generator, device="cpu").to(scale) - 1.0) * epsilon
    moved = scale + (scale * step if relative else step)
    # A scale must be positive, and its reciprocal finite.
    return moved.abs().clamp_min(torch.finfo(scale.dtype).tiny)


@torch.no_grad()
def _hold(linear: SimLinear) -> Tensor:
    """The codes [N, K], made independent of the scale and of learned rounding."""
    codes = linear.codes()
    linear.quant.alpha = None
    _set_codes(linear, codes)
    return codes


@torch.no_grad()
def _set_codes(linear: SimLinear, codes: Tensor) -> None:
    """Make ``codes`` what the weight rounds to under its present scale."""
    wanted = codes * linear.quant.scale.unsqueeze(1)
    linear.weight.data += wanted - linear.effective_weight()
