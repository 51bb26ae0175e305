"""compensate.erq: ERQ, error reduction for activations, then for weights, layer by layer (arXiv 2407.06794, ICML 2024).

With x what enters the float layer, x̄ = Q(x), and a 1 appended to both where there is a bias (it stays float):

Activation error [C]: W becomes the ridge regression of the float output on x̄, towards W itself.
Weight error [C]: scales are searched for that W; then, until no column is float, the first half of the float columns is
rounded with error δ, roundings are refined to lower δ·C₁₁·δᵀ (C = E[x̄·x̄ᵀ], the paper's mean and covariance in one), and
the float rest moves by the ridge solution −δ·C₁₂·(C₂₂ + λI)⁻¹.

Refinement [P, C]: of a row's weights whose δ has the sign of its gradient 2·δ·C₁₁, the one with the largest gradient is
rounded to the other side, at most ``flips`` times, until that lowers the row's proxy no more.

[R] The reference code flips only where a step of length one along the gradient lands nearer the other side, which
depends on the unit of x; here the proxy alone decides. Weights outside the grid, which have no other side, are passed
over. λ is relative to the mean diagonal of C: the code's (0.1·10⁴ for sums over 32·197 rows in its example) has
units. Symmetric codes; the journal version's second scale for outlying columns is left out, kernels have one per row.
"""

from __future__ import annotations

import torch
from pydantic import Field
from torch import Tensor

from vitq_kernels.formats import QuantSpec

from .. import lowrank
from ..observers import moment
from ..quantizers import SimLinear
from ..scales import Search, set_weight
from .base import Calibration, Options, method


class ErqOptions(Options):
    """
    Args:
        activation_damping, weight_damping: λ of the two ridge regressions, relative to the mean diagonal of C.
        flips: most refinement steps of a row in each half.
        weights: search of the scales for the weights that the first ridge regression leaves.
    """

    activation_damping: float = Field(0.1, gt=0.0)
    weight_damping: float = Field(0.1, gt=0.0)
    flips: int = Field(100, ge=0)
    weights: Search = Search()


@method("compensate", "erq")
def erq(calibration: Calibration, options: ErqOptions) -> None:
    """Raises: ValueError for a recipe with a low-rank branch or with level tables for weights."""
    recipe = calibration.recipe
    if recipe.low_rank.kind != "none":
        raise ValueError(f"low_rank.kind is {recipe.low_rank.kind!r}, expected 'none' with compensate.erq")
    if recipe.weight_levels != "uniform":
        raise ValueError(f"weight_levels is {recipe.weight_levels!r}, expected 'uniform': ERQ rounds up or down")
    calibration.refuse_token_bits()
    seen = calibration.observations()
    for index, (path, linear) in enumerate(calibration.sim.linears.items()):
        calibration.progress(calibration.step, index, len(calibration.sim.linears))
        if linear.quant.spec is not None:
            _solve(linear, calibration.reference.linears[path], seen.inputs[path].rows, options)


@torch.no_grad()
def _solve(linear: SimLinear, reference: SimLinear, x: Tensor, options: ErqOptions) -> None:
    """Weight, scales and bias of one layer from rows x [T, K] of its float input."""
    weight, k = reference.weight.double(), x.shape[1]
    seen = linear.decoded(x)
    if reference.bias is not None:
        weight = torch.cat([weight, reference.bias.double().unsqueeze(1)], 1)
        x, seen = (torch.cat([rows, rows.new_ones(len(rows), 1)], 1) for rows in (x, seen))
    c = moment(seen, seen)
    target = lowrank.regress(weight, weight @ moment(x, seen), c, options.activation_damping)
    set_weight(linear, target[:, :k].float(), linear.quant.spec, options.weights)
    scale = linear.quant.scale.double()
    rounded = reduce_error(target, k, c, scale, linear.quant.spec, options.weight_damping, options.flips)
    linear.weight.data = rounded[:, :k].float()
    if linear.bias is not None:
        linear.bias.data = rounded[:, k].float()


def reduce_error(
    weight: Tensor, k: int, c: Tensor, scale: Tensor, spec: QuantSpec, damping: float, flips: int
) -> Tensor:
    """Round half of the float columns at a time, refine, and let the rest make up for the error.

    Args:
        weight: [N, K] float64, or [N, K + 1] with a bias; k: K, the columns to be rounded.
        c: [K, K] or [K + 1, K + 1], second moment of what the weight multiplies.
        scale: [N] of ``spec``'s uniform codes. damping, flips: as in ErqOptions.
    Returns: as ``weight``, the first K columns on the grid.
    """
    w = weight.clone()
    start = 0
    while start < k:
        end = min(k, start + max(1, (w.shape[1] - start) // 2))
        now, rest = slice(start, end), slice(end, None)
        error = refine(w[:, now], c[now, now], scale, spec, flips)
        w[:, now] += error
        if end < w.shape[1]:
            # E[y·xᵀ] of what the rest has to give: its own part and the opposite of the error.
            wanted = w[:, rest] @ c[rest, rest] - error @ c[now, rest]
            w[:, rest] = lowrank.regress(w[:, rest], wanted, c[rest, rest], damping)
        start = end
    return w


def refine(weight: Tensor, c: Tensor, scale: Tensor, spec: QuantSpec, flips: int) -> Tensor:
    """Errors δ [N, K] of rounding ``weight`` up or down: nearest at first, then flipped while that lowers δ·C·δᵀ.

    Args: c: [K, K]; scale: [N]; flips: most of them in a row.
    """
    s = scale.unsqueeze(1)
    ratio = weight / s
    nearest = ratio.round()
    other = torch.where(nearest > ratio, ratio.floor(), ratio.ceil())
    nearest, other = (code.clamp(spec.qmin, spec.qmax) for code in (nearest, other))
    error, step = nearest * s - weight, (other - nearest) * s
    gradient = 2 * error @ c
    for _ in range(flips):
        able = (step != 0) & (error * gradient > 0)
        column = torch.where(able, gradient.abs(), -1.0).argmax(1, keepdim=True)
        move = step.gather(1, column)
        change = move * (gradient.gather(1, column) + move * c.diagonal()[column])
        # A row whose best flip fails would try the same one again: it is done.
        flip = (change < 0) & able.gather(1, column)
        if not flip.any():
            break
        move = move * flip
        error.scatter_add_(1, column, move)
        step.scatter_add_(1, column, -2 * move)
        gradient += 2 * move * c[column.squeeze(1)]
    return error
