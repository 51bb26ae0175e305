"""initialise.twin_uniform: PTQ4ViT's scales, chosen by gradient-weighted errors of outputs, and its twin ranges.

PTQ4ViT (Yuan et al. 2022, arXiv 2111.12293). [P] The scales of each layer's weight and input are searched in turn for
the least Σ g²·(Δ output)², g the gradient of the loss at the output, over 100 candidates, three rounds, 32 images.
Probabilities have 2^(k−1) codes of step 1/2^(k−1) and as many of step 2^−m of that; inputs after GELU have one step
that just covers the negative values and 2^m times it for the others; m is searched.
[R] g is of −log p_y with y drawn from the float model's prediction: the paper's KL against the model itself has no
gradient. Weights have a scale per output channel, inputs a zero point. ``ratio`` (MPTQ-ViT, Yu-Shan Tai & An-Yeu Wu
2024, arXiv 2401.14895, likewise reconstructed) searches the larger step freely instead of 2^m times the smaller.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import replace
from functools import partial
from typing import Literal

import torch
from pydantic import Field
from torch import Tensor

from ..fisher import output_gradients
from ..levels import snapped
from ..observers import affine_range, thinned
from ..quantizers import SimLinear, TwinUniform
from ..scales import put_probabilities, search_probabilities
from .base import Calibration, Options, method

# Steps of the smaller range, as powers of two below the larger one's.
SHIFTS = range(11)


class TwinOptions(Options):
    """
    Args:
        softmax, gelu: which of the two get twin ranges; ``ratio`` see the module.
        images: of the calibration images; rows: at most, of each layer; rounds: weight, then input, each time; steps:
            candidates in (0, 1.2] of the largest magnitude.
        tables: the nearest levels that kernels have, instead of the twin ranges themselves: a level table on the int8
            grid after GELU, the recipe's focusing quantizer after softmax.
    """

    softmax: bool = True
    gelu: Literal["shift", "ratio", "uniform"] = "shift"
    images: int = Field(32, ge=1)
    rows: int = Field(512, ge=16)
    rounds: int = Field(3, ge=1)
    steps: int = Field(100, ge=2)
    tables: bool = False

    @property
    def refusal(self) -> str | None:
        twin = self.softmax or self.gelu != "uniform"
        return TwinUniform.reason if twin and not self.tables else None


@method("initialise", "twin_uniform")
def twin_uniform(calibration: Calibration, options: TwinOptions) -> None:
    """After ``initialise.scales``, whose formats it keeps and whose scales it searches anew.

    Raises: ValueError for twin ranges after GELU with scales per token: the ranges are static.
    """
    sim, recipe = calibration.sim, calibration.recipe
    if options.gelu != "uniform" and recipe.activations == "dynamic":
        raise ValueError(
            f"activations is 'dynamic', expected 'static' for twin_uniform with gelu {options.gelu!r}, not 'uniform'"
        )
    batches = calibration.batches(calibration.images[: options.images])
    gradients = output_gradients(calibration.reference, batches, sim.linears, calibration.generator("labels"))
    after_gelu = {block.mlp.fc2.path for block in sim.family.blocks() if block.mlp is not None}
    for index, (path, (x, g)) in enumerate(gradients.items()):
        calibration.progress(calibration.step, index, len(gradients))
        x, g = thinned(x, options.rows), thinned(g, options.rows)
        twin = path in after_gelu and options.gelu != "uniform"
        _search(sim.linears[path], x, g.square(), options, twin)
    if options.softmax and not options.tables:
        for path, attention in sim.attentions.items():
            site, bits = sim.attention_sites[path], recipe.bits.softmax
            coarse = 2.0 ** (1 - bits)
            # The output's gradient is the one behind proj, taken through it.
            importance = (gradients[site.proj.path][1] @ attention.proj.weight).square()
            qkv = calibration.observations().qkv[path]
            count = min(len(qkv), len(importance) // qkv.shape[1])
            best = search_probabilities(
                attention,
                [TwinUniform(bits, coarse * 2.0**-m, coarse) for m in SHIFTS],
                qkv[:count],
                calibration.attention_mask(path),
                importance[: count * qkv.shape[1]].reshape(count, qkv.shape[1], -1),
            )
            put_probabilities(attention, best)


@torch.no_grad()
def _search(linear: SimLinear, x: Tensor, importance: Tensor, options: TwinOptions, twin: bool) -> None:
    """Scales of one layer, rows x [T, K], for the least Σ importance [T, N]·(Δ output)²."""
    wanted = x @ linear.weight.T
    spec, absmax = linear.quant.spec, linear.weight.abs().amax(1).clamp_min(1e-8)
    factors = torch.linspace(0.0, 1.2, options.steps + 1, device="cpu")[1:].tolist()

    def error(seen: Tensor) -> Tensor:
        """[N]"""
        output = seen @ (linear.codes() * linear.quant.scale.unsqueeze(1)).T
        return ((output - wanted).square() * importance).sum(0)

    for _ in range(options.rounds):
        seen = linear.decoded(x)
        least, best = torch.full_like(absmax, torch.inf), linear.quant.scale.detach().clone()
        for factor in factors:
            scale = absmax / spec.scale_divisor * factor
            linear.quant.scale.data = scale
            found = error(seen)
            best = torch.where(found < least, scale, best)
            least = torch.minimum(found, least)
        linear.quant.scale.data = best
        if linear.act.scale is None:
            continue

        def tried(put: Callable[[], None]) -> float:
            put()
            return float(error(linear.decoded(x)).sum())

        min(_twins(linear, x, options, factors) if twin else _ranges(linear, x, factors), key=tried)()


def _ranges(linear: SimLinear, x: Tensor, factors: list[float]) -> Iterator[Callable[[], None]]:
    """What sets a uniform input: shares of the whole range."""
    spec, low, high = linear.act.spec, x.min(), x.max()
    for factor in factors:
        scale, zero = affine_range(low * factor, high * factor, spec)
        yield partial(linear.act.set, spec, scale.reshape(1), float(zero))


def _twins(linear: SimLinear, x: Tensor, options: TwinOptions, factors: list[float]) -> Iterator[Callable[[], None]]:
    """What sets an input behind GELU: the negative values' step is fixed, the other is searched."""
    bits, spec = linear.act.spec.bits, linear.act.spec
    count = 2 ** (bits - 1)
    fine = max(-float(x.min()), 1e-8) / count
    high = max(float(x.max()), 1e-8) / (count - 1)
    for coarse in [fine * 2.0**m for m in SHIFTS] if options.gelu == "shift" else [high * f for f in factors]:
        quantizer = TwinUniform(bits, fine, coarse, signed=1)
        if options.tables:
            table, step = snapped(quantizer.levels())
            yield partial(linear.act.set, replace(spec, symmetric=True, table=table), x.new_tensor([step]))
        else:
            yield partial(setattr, linear, "simulated", quantizer)
