"""What every calibration method is given and how it is found by name."""

from __future__ import annotations

import inspect
import zlib
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from itertools import pairwise
from typing import TYPE_CHECKING, Any, get_type_hints

import torch
from pydantic import BaseModel, ConfigDict
from torch import Tensor, nn

from .. import parallel
from ..losses import standing_in, undefined
from ..lowrank import kernel_rank
from ..models.sites import BlockSite, LinearSite
from ..observers import Observations, observe
from ..quantizers import SimLinear
from ..simulate import SimModel, inputs_of, recording
from ..workdir import WorkDir, apply_snapshot, snapshot

if TYPE_CHECKING:
    from ..recipes import Recipe

STAGES = ("transform", "initialise", "allocate", "compensate", "reconstruct", "refine")


@dataclass(frozen=True)
class Pack:
    """Consecutive blocks, each of which reads what the one before wrote: one unit."""

    blocks: tuple[BlockSite, ...]

    @property
    def path(self) -> str:
        """Of the first block: where the pack's input enters."""
        return self.blocks[0].path


Unit = LinearSite | BlockSite | Pack
Progress = Callable[[str, int, int], None]


class Options(BaseModel):
    """Options of one method; unknown fields are errors."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    @property
    def refusal(self) -> str | None:
        """Why a model that the method made cannot become integer; None if it can."""
        return None

    @property
    def own_bits(self) -> str | None:
        """What decides the bits of layers in place of the recipe's ``bits``, and how to set it; None if those do."""
        return None


@dataclass(frozen=True)
class Method:
    """One way to do a stage."""

    stage: str
    name: str
    options: type[Options]
    run: Callable[[Calibration, Options], None]


_methods: dict[tuple[str, str], Method] = {}


def method(stage: str, name: str) -> Callable:
    """Register ``run(calibration, options: SomeOptions) -> None`` as ``name`` of ``stage``."""
    if stage not in STAGES:
        raise ValueError(f"stage is {stage!r}, expected one of {', '.join(STAGES)}")

    def register(run: Callable) -> Callable:
        if (stage, name) in _methods:
            raise ValueError(f"method {name!r} of {stage} is registered already")
        hints = get_type_hints(run)
        options = hints[list(inspect.signature(run).parameters)[1]]
        _methods[stage, name] = Method(stage, name, options, run)
        return run

    return register


def find(stage: str, name: str) -> Method:
    """The registered method. Raises: ValueError listing what there is."""
    if (stage, name) not in _methods:
        known = sorted(n for s, n in _methods if s == stage)
        raise ValueError(f"{stage}.method is {name!r}, expected one of {', '.join(known) or '(none yet)'}")
    return _methods[stage, name]


def _successors(seen: dict[str, tuple[Tensor, Tensor]]) -> dict[str, str]:
    """Unit -> the one that reads its output, of what enters and leaves them in their order of execution."""
    return {a: b for a, b in pairwise(seen) if seen[b][0] is seen[a][1]}


@dataclass
class Calibration:
    """One calibration run: what methods read and write.

    Attributes:
        sim: the model being quantized. reference: its float twin, transformed alike, from ``initialise`` on.
        images: [B, C, H, W] calibration images. recipe: the validated recipe. seed: of every random choice.
        work: where finished units are kept for resuming, or None. progress: called with (what, done, total).
        ranks, packs: what ``allocate`` chose.
        metrics: plain JSON values that methods leave in the finished model's state.
    """

    sim: SimModel
    images: Tensor
    recipe: Recipe
    seed: int = 0
    work: WorkDir | None = None
    progress: Progress = lambda what, done, total: None
    reference: SimModel | None = None
    ranks: dict[str, int] = field(default_factory=dict)
    packs: list[Pack] = field(default_factory=list)
    metrics: dict[str, Any] = field(default_factory=dict)
    step: str = ""
    _observed: Observations | None = field(default=None, repr=False)

    @property
    def batch(self) -> int:
        return self.recipe.calibration.batch

    def generator(self, *what: object) -> torch.Generator:
        """A generator of its own for every purpose, so that a resumed run draws what an uninterrupted one does."""
        key = "/".join(map(str, (self.seed, self.step, *what)))
        return torch.Generator().manual_seed(zlib.crc32(key.encode()))

    def iterations(self, full: int) -> int:
        """``full`` scaled by the recipe's effort, at least 1 (0 stays 0)."""
        return 0 if full == 0 else max(1, round(full * self.recipe.effort))

    def learning(self) -> torch.autocast:
        """The arithmetic of what is learned: forward passes at the recipe's precision."""
        mixed = self.recipe.learning == "bfloat16"
        return torch.autocast(self.images.device.type, torch.bfloat16, enabled=mixed)

    def observations(self) -> Observations:
        """What the calibration images do in the float model, taken once; transforms discard it."""
        if self._observed is None:
            self._observed = observe(self.sim, self.images, self.batch)
        return self._observed

    def discard_observations(self) -> None:
        self._observed = None

    def boundary(self, path: str) -> bool:
        """True for the model's first and last layers, which keep the recipe's boundary bits."""
        return self.sim.sites[path].role in ("patch_embed", "head")

    def interior(self) -> dict[str, SimLinear]:
        """Every linear layer that is no boundary."""
        return {path: linear for path, linear in self.sim.linears.items() if not self.boundary(path)}

    def rank(self, path: str, wanted: int | None = None) -> int:
        """Rank of a layer's low-rank branch: ``wanted``, else what ``allocate`` chose, else the recipe's, as layer and
        kernels allow."""
        low_rank = self.recipe.low_rank
        if low_rank.kind == "none" or self.boundary(path):
            return 0
        wanted = self.ranks.get(path, low_rank.rank) if wanted is None else wanted
        return kernel_rank(wanted, *self.sim.linears[path].shape)

    def refuse_token_bits(self) -> None:
        """Raises: ValueError if tokens have bits of their own: a block run alone is handed none, and has others."""
        deciding = [path for path, a in self.sim.attentions.items() if a.token_bits is not None]
        if deciding:
            raise ValueError(
                f"token_bits of {deciding[0]!r} is set, expected none for {self.step or 'a step'}, which runs blocks "
                "alone: allocate.patchwise goes with no other step that does"
            )

    def batches(self, x: Tensor) -> tuple[Tensor, ...]:
        """Inputs [B, ...] of a unit in the recipe's batches."""
        return x.split(self.batch)

    def attention_mask(self, path: str) -> Tensor | None:
        """Additive mask of the windows of the attention at ``path``, or None."""
        mask = self.sim.family.attention_mask(self.sim.attention_sites[path])
        return None if mask is None else mask.to(self.images)

    def run(self, model: SimModel, unit: Unit, x: Tensor) -> Tensor:
        """The unit's module on inputs [B, ...], in batches, without gradients."""
        module = nn.Sequential(*(model.model.get_submodule(member.path) for member in members(unit)))
        with torch.no_grad():
            return torch.cat([module(part) for part in self.batches(x)])

    def walk(self, units: list[Unit] | None = None) -> Iterator[tuple[Unit, Tensor, Tensor]]:
        """Units in execution order with what enters them in the reference and in the quantized prefix.

        Whatever the consumer changes in a unit before it asks for the next one is in the next one's input.

        Raises: ValueError if tokens have bits of their own, which blocks hand to each other.
        """
        self.refuse_token_bits()
        units = self.sim.sequence if units is None else units
        previous: tuple[str, Tensor, Tensor] | None = None
        successors = self.successors()
        for unit in units:
            if previous is not None and successors.get(previous[0]) == unit.path:
                inputs = previous[1:]
            else:
                inputs = tuple(
                    inputs_of(m.model, unit.path, self.images, self.batch) for m in (self.reference, self.sim)
                )
            yield unit, *inputs
            last = members(unit)[-1].path
            if last in successors:
                outputs = (self.run(m, unit, x) for m, x in zip((self.reference, self.sim), inputs))
                previous = (last, *outputs)
            else:
                previous = None

    def successors(self) -> dict[str, str]:
        """Unit -> the unit that reads its output and nothing else, as one image shows it."""
        return _successors(self._one_image())

    def unread(self, path: str) -> dict[nn.Module, torch.Size]:
        """The float model's units whose output of an image, of this shape, serves that of the unit at ``path`` alone.

        Empty where one of those before it is read elsewhere as well, as features of several depths are.
        """
        seen = self._one_image()
        before = {b: a for a, b in _successors(seen).items()}
        module, output = self.reference.model.get_submodule(path), seen[path][1]
        out: dict[nn.Module, torch.Size] = {}
        while (path := before.get(path)) is not None:
            out[self.reference.model.get_submodule(path)] = seen[path][1].shape[1:]
        with torch.no_grad(), standing_in({**undefined(out), module: lambda *_, **__: output}):
            return {} if bool(self.reference(self.images[:1]).isnan().any()) else out

    def _one_image(self) -> dict[str, tuple[Tensor, Tensor]]:
        """Unit -> what enters and what leaves it in the float model, by its order of execution."""
        seen: dict[str, tuple[Tensor, Tensor]] = {}
        modules = {unit.path: self.reference.model.get_submodule(unit.path) for unit in self.sim.sequence}

        def keep(path: str, inputs: tuple, output: Tensor) -> None:
            seen[path] = inputs[0], output

        with torch.no_grad(), recording(modules, keep):
            self.reference(self.images[:1])
        return seen

    def units(self, units: list[Unit] | None = None) -> Iterator[tuple[Unit, Tensor, Tensor]]:
        """:meth:`walk` that skips units finished in an earlier, interrupted run and keeps every finished one."""
        total = len(self.sim.sequence if units is None else units)
        for index, (unit, x_ref, x_sim) in enumerate(self.walk(units)):
            self.progress(self.step, index, total)
            restored = parallel.same(self._restore(unit))
            if not restored:
                yield unit, x_ref, x_sim
            self._agree(members(unit))
            if self.work is not None and not restored:
                for member in members(unit):
                    ranks = {path: r for path, r in self.ranks.items() if path in self.sim.linears_of(member)}
                    self.work.keep(self.step, member.path, self.sim, ranks)
        self.progress(self.step, total, total)

    def agree(self) -> None:
        """Take over what the first of several processes has."""
        if parallel.size() == 1:
            return
        self._agree(self.sim.sequence)
        packs = parallel.same([[block.path for block in pack.blocks] for pack in self.packs])
        blocks = {site.path: site for site in self.sim.family.blocks()}
        self.packs = [Pack(tuple(blocks[path] for path in paths)) for paths in packs]
        self.metrics = parallel.same(self.metrics)

    def _agree(self, sites: Iterable[LinearSite | BlockSite]) -> None:
        if parallel.size() == 1:
            return
        self.ranks = parallel.same(self.ranks)
        for site in sites:
            module = self.sim.model.get_submodule(site.path)
            tensors, meta = snapshot(module)
            tensors, meta = parallel.same(({name: t.cpu() for name, t in tensors.items()}, meta))
            if parallel.rank():
                apply_snapshot(module, tensors, meta)

    def _restore(self, unit: Unit) -> bool:
        """Take a unit that was finished earlier: its last member is kept last, so it tells whether all were."""
        if self.work is None:
            return False
        for member in reversed(members(unit)):
            kept = self.work.restore(self.step, member.path, self.sim)
            if kept is None:
                return False
            self.ranks.update(kept)
        return True


def members(unit: Unit) -> tuple[LinearSite | BlockSite, ...]:
    """The sites of ``SimModel.sequence`` that a unit consists of."""
    return unit.blocks if isinstance(unit, Pack) else (unit,)


def adam(groups: list[dict[str, Any]]) -> torch.optim.Adam:
    """Adam of groups of ``params`` and ``lr``, as one kernel per group where that is safe.

    On the CPU the fused kernel starts a parallel region per tensor; where processes share cores, each may wait for
    seconds for threads that are not running.
    """
    device = groups[0]["params"][0].device if groups else torch.device("cpu")
    return torch.optim.Adam(groups, fused=device.type == "cuda" or torch.get_num_threads() == 1)
