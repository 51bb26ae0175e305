"""initialise.log_levels: logarithmic levels of probabilities and of what leaves GELU.

[C] ``two``: log2 (FQ-ViT, Lin et al. 2022, arXiv 2111.13824), scale 1. ``sqrt2``: log√2 (RepQ-ViT, Li et al. 2023,
arXiv 2212.08254), whose scale is one of a few high percentiles. ``adaptive``: any base 2^(q/37) (AdaLog, Wu et al.
2024, arXiv 2407.12951), after GELU with the shift that makes every value positive. ``shifted``: uniform in
log2(x + η) (I&S-ViT, Zhong et al. 2023, arXiv 2311.10126), η searched.
[R] All are chosen by one criterion, the squared error of the attention's (of the layer's) output on the calibration
images, over a plain grid: AdaLog's progressive search and I&S-ViT's own grid only get to such a grid's optimum sooner.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from typing import Literal

import torch
from pydantic import Field
from torch import Tensor

from vitq_kernels.formats import FocusSpec

from ..levels import snapped
from ..observers import thinned
from ..quantizers import FocusQuantizer, LogLevels, ShiftedLog, SimLinear, SimulationOnly
from ..scales import put_probabilities, search_probabilities
from .base import Calibration, Options, method

# AdaLog's denominator r, and the numerators q that are tried.
DENOMINATOR, NUMERATORS = 37, range(5, 75, 5)
PERCENTILES = (0.999, 0.9999, 0.99999, 1.0)
ETAS = [2.0**-k for k in range(1, 15)]
# The powers that stand in for logarithms where kernels must run.
POWERS = (1.0, 1.5, 2.0, 3.0, 4.0, 6.0, 8.0)
# GELU's least value is −0.16997.
GELU_SHIFT = 0.17


class LogOptions(Options):
    """
    Args:
        softmax: of probabilities, see the module; None leaves the focusing quantizer.
        gelu: of inputs of fc2: ``adaptive``, or None for what there is.
        rows: of a layer's input, at most, that levels are chosen on.
        tables: the nearest levels that kernels have, instead: after GELU a level table on the int8 grid, after softmax
            the best power of the recipe's focusing quantizer.
    """

    softmax: Literal["two", "sqrt2", "adaptive", "shifted"] | None = "sqrt2"
    gelu: Literal["adaptive"] | None = None
    rows: int = Field(1024, ge=16)
    tables: bool = False

    @property
    def refusal(self) -> str | None:
        if self.tables or (self.softmax is None and self.gelu is None):
            return None
        return ShiftedLog.reason if self.softmax == "shifted" and self.gelu is None else LogLevels.reason


@method("initialise", "log_levels")
def log_levels(calibration: Calibration, options: LogOptions) -> None:
    """After ``initialise.scales``. Raises: ValueError for ``gelu`` with scales per token: its levels have one scale."""
    sim, recipe = calibration.sim, calibration.recipe
    if options.gelu is not None and recipe.activations == "dynamic":
        raise ValueError(f"activations is 'dynamic', expected 'static' for log_levels with gelu {options.gelu!r}")
    if options.softmax is not None:
        for path, attention in sim.attentions.items():
            qkv, mask = calibration.observations().qkv[path], calibration.attention_mask(path)
            if options.tables:
                candidates = _powers(recipe.focus_spec())
            else:
                candidates = _probabilities(options.softmax, recipe.bits.softmax, _largest(attention, qkv, mask))
            put_probabilities(attention, search_probabilities(attention, candidates, qkv, mask))
    if options.gelu is not None:
        for block in sim.family.blocks():
            if block.mlp is not None and sim.linears[block.mlp.fc2.path].act.scale is not None:
                path = block.mlp.fc2.path
                rows = calibration.observations().inputs[path].rows
                _behind_gelu(sim.linears[path], thinned(rows, options.rows), options)


@torch.no_grad()
def _largest(attention, qkv: Tensor, mask: Tensor | None) -> list[float]:
    """The percentiles of the float probabilities."""
    p = attention.probabilities(qkv, mask).flatten()
    return torch.quantile(thinned(p, 1 << 20), p.new_tensor(PERCENTILES)).clamp_min(1e-6).tolist()


def _probabilities(kind: str, bits: int, largest: list[float]) -> Iterator[SimulationOnly]:
    if kind == "two":
        yield LogLevels(bits, 2.0)
    elif kind == "sqrt2":
        yield from (LogLevels(bits, 2.0**0.5, scale) for scale in largest)
    elif kind == "adaptive":
        yield from (LogLevels(bits, 2.0 ** (q / DENOMINATOR), scale) for q in NUMERATORS for scale in largest)
    else:
        yield from (ShiftedLog(bits, eta, high) for eta in ETAS for high in largest)


def _powers(spec: FocusSpec) -> Iterator[FocusQuantizer]:
    yield from (FocusQuantizer(replace(spec, power=power)) for power in POWERS)


@torch.no_grad()
def _behind_gelu(linear: SimLinear, x: Tensor, options: LogOptions) -> None:
    """The levels of fc2's input [T, K] with the least squared error of its output."""
    spec, weight, top = linear.act.spec, linear.weight, float(x.max()) + GELU_SHIFT
    least = float("inf"), None
    for numerator in NUMERATORS:
        for share in (0.4, 0.6, 0.8, 1.0):
            candidate = LogLevels(spec.bits, 2.0 ** (numerator / DENOMINATOR), top * share, GELU_SHIFT)
            error = float(((candidate(x) - x) @ weight.T).square().sum())
            least = min(least, (error, candidate), key=lambda pair: pair[0])
    if options.tables:
        table, step = snapped(least[1].levels())
        linear.act.set(replace(spec, symmetric=True, table=table), x.new_tensor([step]))
    else:
        linear.simulated = least[1]
