"""compensate.closed_form: low-rank branches, weights, rounding and biases by least squares, layer after layer.

Each linear layer sees what the quantized layers before it make of the calibration images and is solved for the float
model's output: what can be undone of the errors so far is undone here. No gradient, one pass.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Literal

import torch
from pydantic import Field
from torch import Tensor

from .. import lowrank
from ..models.sites import BlockSite
from ..observers import moment, thinned
from ..quantizers import SimLinear
from ..quantizers.functional import half_ste
from ..scales import Search, set_activation, set_weight
from ..simulate import entering, recording
from .base import Calibration, Options, Unit, method


class ClosedFormOptions(Options):
    """
    Args:
        start: what the ``error`` branch fits. ``plain``: SVD of W − W_q. ``whitened``: the optimum of
            E‖(W − W_q − UD)x‖². ``output``: the optimum of E‖Wx − W_q·Q(x) − UDx‖², reduced-rank regression of the
            whole error on the input: what activation quantization did in proportion to x is undone, too.
        ridge: replace W by the ridge regression (towards W) of the float output on the quantized input before rounding
            (as ERQ does), or not.
        rounding: ``nearest``, or ``compensated`` (GPTQ's column by column).
        refit: least-squares bias (and lora_up of a subspace) after rounding.
        damping: of every second moment, relative to its mean diagonal.
        activations: search of the static ranges, repeated on what this pass sees; None keeps those there are.
        weights: search of weight scales.
    """

    start: Literal["plain", "whitened", "output"] = "whitened"
    ridge: bool = False
    rounding: Literal["nearest", "compensated"] = "nearest"
    refit: bool = True
    damping: float = Field(0.01, gt=0.0)
    activations: Search | None = Search()
    weights: Search = Search()


@method("compensate", "closed_form")
def closed_form(calibration: Calibration, options: ClosedFormOptions) -> None:
    for unit, x_ref, x_sim in calibration.units():
        outputs = _reference_outputs(calibration, unit, x_ref)
        for path, linear in calibration.sim.linears_of(unit).items():
            if linear.quant.spec is None:
                continue
            x = linear_input(calibration, unit, path, x_sim)
            _solve(calibration, options, path, linear, x, outputs.pop(path))


def _reference_outputs(calibration: Calibration, unit: Unit, x: Tensor) -> dict[str, Tensor]:
    """[T, N] outputs of every linear layer of the float unit."""
    out: dict[str, list[Tensor]] = {}
    linears = calibration.reference.linears_of(unit)

    def record(path: str, inputs: tuple, output: Tensor) -> None:
        out.setdefault(path, []).append(linears[path].compute(linears[path].rows(inputs[0])))

    with recording(linears, record):
        calibration.run(calibration.reference, unit, x)
    return {path: torch.cat(parts) for path, parts in out.items()}


def linear_input(calibration: Calibration, unit: Unit, path: str, x: Tensor) -> Tensor:
    """[T, K] rows that enter one layer of the quantized unit as it now is."""
    linear = calibration.sim.linears[path]
    if not isinstance(unit, BlockSite):
        return linear.rows(x)
    block = calibration.sim.model.get_submodule(unit.path)
    return torch.cat([linear.rows(part) for part in entering(linear, calibration.batches(x), block)])


@dataclass
class _Moments:
    """Means of products over rows, with what bias and subspace explain taken out (a Schur complement).

    The side's last column is the bias's. ``least``: what must be added to the diagonal of xx where the side explains
    all of it (fewer rows than its columns, a class token that has seen no image) and rounding errors are left.
    """

    xx: Tensor
    yx: Tensor
    side_x: Tensor
    side_y: Tensor
    least: float

    def damping(self, wanted: float) -> float:
        """``wanted``, relative to the mean diagonal of xx as ``lowrank.damped`` takes it, or what ``least`` asks."""
        value = max(wanted, self.least / max(float(self.xx.diagonal().mean()), 1e-12))
        # Float32 moments of nearly constant inputs may leave a complement that is not even definite; NaN never is.
        while value < 1e12 and int(torch.linalg.cholesky_ex(lowrank.damped(self.xx, value)).info):
            value *= 10.0
        return value

    @classmethod
    def of(cls, x: Tensor, y: Tensor, side: Tensor) -> _Moments:
        s = lowrank.damped(moment(side, side), 1e-6)
        side_x = torch.linalg.solve(s, moment(side, x))
        side_y = torch.linalg.solve(s, moment(side, y))
        xs, ys = moment(x, side), moment(y, side)
        xx = moment(x, x)
        least = 1e-6 * xx.diagonal().mean() + 1e-8 * side[:, :-1].double().square().sum(1).mean() / len(xx)
        return cls(xx - xs @ side_x, moment(y, x) - ys @ side_x, side_x, side_y, float(least))


def _solve(
    calibration: Calibration, options: ClosedFormOptions, path: str, linear: SimLinear, x: Tensor, y: Tensor
) -> None:
    """Choose branch, scales, codes and bias of one layer for inputs x [T, K] and wanted outputs y [T, N]."""
    recipe, boundary = calibration.recipe, calibration.boundary(path)
    reference = calibration.reference.linears[path]
    kind, rank = recipe.low_rank.kind, calibration.rank(path)
    weight = reference.weight.double()
    ones = x.new_ones(x.shape[0], 1)
    side, residual = ones, x
    if kind == "subspace" and rank:
        down = half_ste(lowrank.principal_directions(moment(x, x), rank).float())
        t = x @ down.T
        side, residual = torch.cat([t, ones], 1), x - t @ down
        linear.set_low_rank(kind, down, reference.weight @ down.T)
    spec = linear.act.spec
    if spec is not None and linear.simulated is None and options.activations is not None:
        sample = thinned(residual, 4096)
        table = recipe.activation_levels == "table" and not boundary
        # What was allocated to this layer, in the recipe's form.
        wanted = replace(recipe.activation_spec(boundary), bits=spec.bits)
        set_activation(linear, sample, wanted, options.activations, table)
    with torch.no_grad():
        seen = linear.decoded(residual)
    m = _Moments.of(seen, y, side)
    damping = m.damping(options.damping)
    target = lowrank.regress(weight, m.yx, m.xx, damping) if options.ridge else weight
    if kind == "merged" and rank:
        up, down = _merged(target - weight, m.xx, rank, damping)
        linear.set_low_rank(kind, down.float(), up.float())
        target = weight
    _round(recipe, options, linear, target, m.xx, boundary, damping)
    with torch.no_grad():
        error = y - seen @ (linear.codes() * linear.quant.scale.unsqueeze(1)).T
    if kind == "error" and rank:
        up, down = _error_branch(options, linear, weight, error, x, rank)
        linear.set_low_rank(kind, down.float(), up.float())
        with torch.no_grad():
            down, up = linear.side_branch()
            error = error - x @ down.T @ up.T
    if options.refit and linear.bias is not None:
        s = lowrank.damped(moment(side, side), 1e-6)
        solution = torch.linalg.solve(s, moment(side, error)).T.float()
        linear.bias.data = solution[:, -1].contiguous()
        if side is not ones:
            linear.lora_up.data = solution[:, :-1].contiguous()


def _merged(delta: Tensor, c: Tensor, rank: int, damping: float) -> tuple[Tensor, Tensor]:
    """Low-rank part of the ridge step; where there is none, the usual zero start with random directions."""
    if float(delta.abs().max()) > 0.0:
        return lowrank.whitened(delta, lowrank.damped(c, damping), rank)
    n, k = delta.shape
    generator = torch.Generator().manual_seed(0)
    return delta.new_zeros(n, rank), torch.randn(rank, k, generator=generator, dtype=delta.dtype, device="cpu").to(
        delta
    ) * k**-0.5


def _round(
    recipe, options: ClosedFormOptions, linear: SimLinear, target: Tensor, c: Tensor, boundary: bool, damping: float
) -> None:
    spec = replace(recipe.weight_spec(boundary), bits=linear.quant.spec.bits)
    table = recipe.weight_levels == "table" and not boundary
    linear.weight.data = target.float()
    with torch.no_grad():
        effective = linear.effective_weight()
    set_weight(linear, effective, spec, options.weights, c.diagonal().float(), table)
    if options.rounding == "compensated":
        quant = linear.quant
        _, latent = lowrank.compensated_rounding(effective.double(), c, quant.scale.double(), quant.spec, damping)
        linear.weight.data += latent.float() - effective


def _error_branch(options: ClosedFormOptions, linear: SimLinear, weight: Tensor, error: Tensor, x: Tensor, rank: int):
    """lora_up, lora_down of what rounding (and, for ``output``, activation quantization) left in ``error`` [T, N]."""
    lost = weight - (linear.codes() * linear.quant.scale.unsqueeze(1)).detach().double()
    if options.start == "plain":
        return lowrank.truncated(lost, rank)
    c = lowrank.damped(moment(x, x), options.damping)
    if options.start == "whitened":
        return lowrank.whitened(lost, c, rank)
    m = _Moments.of(x, error, x.new_ones(x.shape[0], 1))
    c = lowrank.damped(m.xx, options.damping)
    return lowrank.whitened(torch.linalg.solve(c, m.yx.T).T, c, rank)
