"""reconstruct.blocks: learn branches, scales, focusing intervals and rounding so that each unit does what it did.

AIQViT's block-wise reconstruction with curriculum [P], and what the rest of the family adds to it, as options: losses
(see :mod:`vitq.losses`), learned rounding, QDrop's mixing and dropping.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from functools import partial
from typing import Literal

import torch
from pydantic import Field
from torch import Tensor, nn

from vitq_kernels.ops import learning

from .. import parallel
from ..losses import KLGradients, LossName, LowRankLoss, UnitLoss, perturbation_weights
from ..models.sites import BlockSite
from ..quantizers import SimLinear
from ..quantizers.functional import Drop
from ..simulate import SimModel
from .base import Calibration, Options, Unit, adam, members, method


class BlockOptions(Options):
    """
    Args:
        unit: what is learned together: a ``block``, or a ``pack`` of blocks that ``allocate`` made. Memory grows with
            the longest pack.
        layers: learn the linear layers before, between and after the blocks, too, one by one (Pack-PTQ).
        loss: what the error of a unit's output counts for. temperature: of the probabilities in it; rank: of
            ``fisher_low_rank``.
        iterations: steps per unit; batch: images per step.
        least_iterations: with fewer steps (a recipe at reduced effort) nothing is learned: the first steps of Adam are
            larger than what they find, and closed forms are a better start than that.
        lr_branch, lr_scale, lr_focus, lr_bias, lr_rounding, lr_weight_scale: Adam's rates, 0 freezes. Branches, scales
            and biases are learned relative to their own size. At reduced effort roundings, which have a way to go, take
            larger steps: see :func:`rounding_rate`.
        curriculum: λ0; step t of T draws from the easiest min(1, λ0 + (1 − λ0)·t/T) of the images, by their last
            known loss. 1 draws from all.
        mixing: chance that an image (or, as QDrop has it, an element) enters as the float instead of the quantized
            prefix makes it; mixing_unit: which of the two.
        dropping: chance that an element of a quantized activation inside the unit, too, stays float while learning (the
            rest of QDrop); of probabilities where the focus is affine.
        holdout: share of the images that are not learned from but decide, unit by unit, whether what was learned
            replaces the start. 0 decides on the images learned from.
        rounding_weight: of AdaRound's regulariser, with β from 20 to 2 after ``rounding_warmup`` of the steps. In
            units of the mean squared error it counts rounding_weight/batch; Pack-PTQ's code sums errors over tokens,
            beside which its own is tokens/batch times as weak.
    """

    unit: Literal["block", "pack"] = "block"
    layers: bool = False
    loss: LossName = "output"
    temperature: float = Field(1.0, gt=0.0)
    rank: int = Field(5, ge=1)
    iterations: int = Field(6000, ge=0)
    batch: int = Field(24, ge=1)
    least_iterations: int = Field(0, ge=0)
    lr_branch: float = Field(3e-3, ge=0.0)
    lr_scale: float = Field(1e-3, ge=0.0)
    lr_weight_scale: float = Field(0.0, ge=0.0)
    lr_focus: float = Field(3e-3, ge=0.0)
    lr_bias: float = Field(3e-3, ge=0.0)
    lr_rounding: float = Field(0.0, ge=0.0)
    curriculum: float = Field(0.5, gt=0.0, le=1.0)
    mixing: float = Field(0.0, ge=0.0, le=1.0)
    mixing_unit: Literal["image", "element"] = "image"
    dropping: float = Field(0.0, ge=0.0, lt=1.0)
    holdout: float = Field(0.25, ge=0.0, lt=1.0)
    rounding_weight: float = Field(0.01, ge=0.0)
    rounding_warmup: float = Field(0.2, ge=0.0, lt=1.0)


@method("reconstruct", "blocks")
def blocks(calibration: Calibration, options: BlockOptions) -> None:
    if calibration.iterations(options.iterations) < options.least_iterations:
        return
    gradients = None
    if options.loss != "output":
        gradients = KLGradients(calibration.reference, calibration.images, calibration.batch, options.temperature)
    for unit, x_ref, x_sim in calibration.units(chosen_units(calibration, options)):
        target = calibration.run(calibration.reference, unit, x_ref)
        loss = unit_loss(calibration, options, gradients, unit, x_ref, x_sim, target)
        reconstruct(calibration, unit, x_ref, x_sim, target, options, loss)


def unit_loss(
    calibration: Calibration,
    options: BlockOptions,
    gradients: KLGradients | None,
    unit: Unit,
    x_ref: Tensor,
    x_sim: Tensor,
    target: Tensor,
) -> UnitLoss:
    """``options.loss`` of one unit: x_ref is what enters it in the float model and makes ``target``, x_sim in ours."""
    if gradients is None:
        return UnitLoss()
    last = members(unit)[-1].path
    module, unread = calibration.reference.model.get_submodule(last), calibration.unread(last)
    at = partial(gradients, module, unread=unread)
    output = partial(calibration.run, calibration.sim, unit)
    if options.loss == "fisher_diagonal":
        return UnitLoss(at(output(x_sim)).square())
    if options.loss == "perturbation":
        return UnitLoss(perturbation_weights(at, target, calibration.generator(unit.path, options.loss)))
    return LowRankLoss(target, partial(output, x_ref), at, options.rank)


def chosen_units(calibration: Calibration, options: BlockOptions) -> list[Unit]:
    """In execution order. Raises: ValueError if packs are wanted and there are none."""
    packs: dict[str, Unit] = {pack.path: pack for pack in calibration.packs}
    if options.unit == "pack" and not packs:
        raise ValueError("reconstruct.blocks has unit 'pack' and there are no packs, expected allocate.packs before it")
    out: list[Unit] = []
    for unit in calibration.sim.sequence:
        if not isinstance(unit, BlockSite):
            out += [unit] if options.layers else []
        elif options.unit == "block":
            out.append(unit)
        elif unit.path in packs:
            out.append(packs[unit.path])
    return out


def easy_fraction(step: int, steps: int, start: float) -> float:
    """λ(t) = min(1, λ0 + (1 − λ0)·t/T)."""
    return min(1.0, start + (1.0 - start) * step / max(1, steps))


def rounding_rate(rate: float, effort: float) -> float:
    """Adam's rate for learned rounding at an effort below 1: rate/effort, up to 0.03. [R]

    Adam moves α by its rate in every step, and h(α) turns from 0 to 1 within 4.8: at 3e-3 nothing turns in 100 steps.
    """
    return rate if effort >= 1.0 else min(rate / effort, max(rate, 0.03))


def losses(
    module: nn.Module, x: Tensor, target: Tensor, batch: int, loss: UnitLoss | None = None, images: Tensor | None = None
) -> Tensor:
    """[b] loss of each image's output without gradients, squared error by default.

    Args: x, target [B, ...]; images [b]: indices of those wanted, None for all.
    """
    loss, images = loss or UnitLoss(), torch.arange(len(x), device=x.device) if images is None else images
    with torch.no_grad():
        return torch.cat([loss(module(x[part]) - target[part], part) for part in images.split(batch)])


class _Learner:
    """Parameters of a unit under Adam, each group at a rate of its own, with a cosine to zero."""

    def __init__(
        self,
        sim: SimModel,
        units: Sequence[Unit],
        options: BlockOptions,
        steps: int,
        effort: float,
        generator: torch.Generator,
    ) -> None:
        self.focuses, self.linears, self.scales, self.dropped = [], [], [], []
        groups: list[dict] = []

        def learn(parameters: Iterator[nn.Parameter | None], rate: float, relative: bool) -> None:
            for p in parameters:
                if p is not None and rate > 0.0:
                    size = float(p.detach().double().square().mean().sqrt()) if relative else 1.0
                    p.requires_grad_(True)
                    groups.append({"params": [p], "lr": rate * (size if size > 0.0 else 1e-3)})

        for unit in units:
            sim.model.get_submodule(unit.path).requires_grad_(False)
            for linear in sim.linears_of(unit).values():
                self.linears.append(linear)
                if options.lr_rounding > 0.0 and linear.quant.lut is None:
                    linear.quant.learn_rounding(linear.effective_weight())
                    linear.quant.soft = True
                    learn([linear.quant.alpha], rounding_rate(options.lr_rounding, effort), False)
                directions = None if linear.lora.kind == "subspace" else linear.lora_down
                learn([linear.lora_up, directions], options.lr_branch, True)
                learn([linear.bias], options.lr_bias, True)
                learn([linear.quant.scale], options.lr_weight_scale, True)
                self._activation(learn, linear.act, options.lr_scale)
                self.dropped.append(linear.act)
            attention = sim.attention_of(unit)
            if attention is not None:
                self._activation(learn, attention.operands, options.lr_scale)
                self.dropped += [attention.operands] + ([attention.focus] if attention.focus is not None else [])
                if attention.focus is not None and options.lr_focus > 0.0:
                    self.focuses.append(attention.focus)
                    learn([attention.focus.b1, attention.focus.b2], options.lr_focus, False)
        for linear in self.linears:
            linear.hold()
        self.optimizer = adam(groups)
        self.schedule = torch.optim.lr_scheduler.CosineAnnealingLR(self.optimizer, max(1, steps))
        self.parameters = [p for g in groups for p in g["params"]]
        if options.dropping > 0.0:
            for quantizer in self.dropped:
                quantizer.drop = Drop(options.dropping, generator)
        self.bounds = [(s, float(s.detach().min()) * 0.05) for s in self.scales]

    def _activation(self, learn, quantizer, rate: float) -> None:
        if quantizer.scale is not None:
            self.scales.append(quantizer.scale)
            learn([quantizer.scale], rate, True)
            if not quantizer.spec.symmetric:
                # In code units: a zero point moves by fractions of a code.
                learn([quantizer.zero_point], 10.0 * rate, False)

    def step(self, loss: Tensor) -> None:
        self.optimizer.zero_grad(set_to_none=True)
        loss.backward(inputs=self.parameters)
        parallel.add_gradients(self.parameters)
        self.optimizer.step()
        self.schedule.step()
        with torch.no_grad():
            for scale, least in self.bounds:
                scale.clamp_(min=least)
        for focus in self.focuses:
            focus.project()

    def state(self) -> list[Tensor]:
        return [p.detach().clone() for p in self.parameters]

    def load(self, state: list[Tensor]) -> None:
        with torch.no_grad():
            for p, value in zip(self.parameters, state):
                p.copy_(value)

    def finish(self) -> None:
        for p in self.parameters:
            p.requires_grad_(False)
        for linear in self.linears:
            linear.quant.soft = False
            linear.held = None
        for quantizer in self.dropped:
            quantizer.drop = None


def _rounding_penalty(linears: list[SimLinear], beta: float) -> Tensor:
    return sum(linear.quant.undecided(beta) for linear in linears if linear.quant.alpha is not None)


def reconstruct(
    calibration: Calibration,
    unit: Unit,
    x_ref: Tensor,
    x_sim: Tensor,
    target: Tensor,
    options: BlockOptions,
    loss: UnitLoss,
) -> None:
    """Learn ``unit`` to map x_sim to ``target``; keep the start if the judges prefer it.

    Subspace directions stay: they must remain orthonormal.
    """
    sim, steps = calibration.sim, calibration.iterations(options.iterations)
    if steps == 0:
        return
    units = members(unit)
    module = nn.Sequential(*(sim.model.get_submodule(member.path) for member in units))
    generator = calibration.generator(unit.path)
    # Of each process's own: what it draws depends on its share of the images.
    dropping = calibration.generator(unit.path, "drop", parallel.rank())
    mixed = Drop(options.mixing, generator)
    kept = min(len(x_sim) - 1, int(options.holdout * len(x_sim)))
    order = torch.randperm(len(x_sim), generator=generator, device="cpu").to(x_sim.device)
    judges, learned = (order[:kept] if kept else order), order[kept:]
    known = parallel.same(losses(module, x_sim, target, calibration.batch, loss).cpu()).to(x_sim.device)
    learner = _Learner(sim, units, options, steps, calibration.recipe.effort, dropping)
    start = learner.state()
    scale = 1.0 / float(target.square().mean())
    for step in range(steps):
        loss.refresh(step, steps)
        easy = round(easy_fraction(step, steps, options.curriculum) * len(learned))
        count = max(min(options.batch, len(learned)), easy)
        pool = learned[known[learned].argsort()[:count]]
        drawn = torch.randperm(count, generator=generator, device="cpu")[: options.batch]
        chosen = pool[drawn.to(pool.device)]
        mine = parallel.share(chosen)
        if options.mixing > 0.0 and options.mixing_unit == "element":
            x = parallel.share(learning.mix(x_sim[chosen], x_ref[chosen], mixed()))
        else:
            x = x_sim[mine]
            if options.mixing > 0.0:
                drawn = torch.rand((len(chosen), *[1] * (x.dim() - 1)), generator=generator, device="cpu")
                x = torch.where(parallel.share(drawn).to(x.device) < options.mixing, x_ref[mine], x)
        with calibration.learning():
            output = module(x)
        error = loss(output - target[mine], mine)
        known[chosen] = parallel.spread(error.detach(), chosen)
        total = error.sum() / len(chosen) * scale
        if options.lr_rounding > 0.0 and step >= options.rounding_warmup * steps:
            done = (step / steps - options.rounding_warmup) / (1.0 - options.rounding_warmup)
            total = total + options.rounding_weight * scale * _rounding_penalty(learner.linears, 20.0 - 18.0 * done) / (
                len(chosen) * parallel.size()
            )
        learner.step(total)
    learner.finish()
    # Both ends by the same loss: that of the low-rank Fisher matrix has changed on the way.
    end, after = learner.state(), losses(module, x_sim, target, calibration.batch, loss, judges)
    learner.load(start)
    if parallel.same(
        float(after.mean()) <= float(losses(module, x_sim, target, calibration.batch, loss, judges).mean())
    ):
        learner.load(end)
