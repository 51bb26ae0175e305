"""transform.reparameterize: per-channel ranges after LayerNorm become one range; the model computes what it did.

RepQ-ViT (Li et al. 2023): a LayerNorm's output channel c with range centre m_c and half width h_c is mapped to
(x_c − m_c)/r_c, r_c = (h_c / h̄)^strength; γ and β absorb it, and the next layer takes W·diag(r) and bias + W·m. With
``strength`` 1 every channel has the same range, as in the paper (there, of the arithmetic mean of the widths and about
the mean zero point; here h̄ is their geometric mean and the centre 0); below 1 part of the spread stays with the
activations instead of moving into the weight's columns (as SmoothQuant does).
"""

from __future__ import annotations

from typing import Literal

import torch
from pydantic import Field
from torch import Tensor, nn

from ..models.sites import LinearSite
from ..observers import InputStats
from .base import Calibration, Options, method


class ReparameterizeOptions(Options):
    """
    Args:
        strength: see the module; 0 only shifts.
        width: half width of a channel: ``range`` (max − min)/2, or ``deviation`` its standard deviation.
        clip: share of a channel's values left outside its ``range``, half at each end: outliers neither widen nor
            shift their channel (LRP-QViT).
        shift: take the centre out (where windows are not padded, since padding must stay 0).
        keys: take the mean key of each head out of the keys' bias: softmax does not see it.
    """

    strength: float = Field(1.0, ge=0.0, le=1.0)
    width: Literal["range", "deviation"] = "range"
    clip: float = Field(0.0, ge=0.0, lt=1.0)
    shift: bool = True
    keys: bool = False


@method("transform", "reparameterize")
def reparameterize(calibration: Calibration, options: ReparameterizeOptions) -> None:
    sim, seen = calibration.sim, calibration.observations()
    windows = {site.qkv.path: site.window for site in sim.attention_sites.values() if site.window is not None}
    padded = {path for path, window in windows.items() if window.padded or window.dynamic}
    for path, site in sim.sites.items():
        if foldable(site):
            shift, factor = channel_map(seen.inputs[path], options)
            if path in padded or sim.linears[path].bias is None:
                shift = torch.zeros_like(shift)
            fold(sim.model.get_submodule(site.norm.path), sim.linears[path], shift, factor)
    calibration.discard_observations()
    if options.keys:
        for path, attention in sim.attentions.items():
            # Norms and rotations do not keep a bias common to all keys.
            if attention.qkv.bias is not None and sim.attention_sites[path].stage is None:
                k = attention.qkv.shape[0] // 3
                attention.qkv.bias.data[k : 2 * k] -= seen.qkv[path].flatten(0, 1)[:, k : 2 * k].mean(0)


def foldable(site: LinearSite) -> bool:
    """True where a LayerNorm with γ and β feeds this layer only."""
    return site.norm is not None and site.norm.weight is not None and site.norm.bias is not None


def channel_map(stats: InputStats, options: ReparameterizeOptions) -> tuple[Tensor, Tensor]:
    """shift m and factor r ([K] each)."""
    rows = stats.rows
    if options.width == "range":
        low, high = stats.low, stats.high
        if options.clip:
            low, high = (rows.quantile(q, 0) for q in (options.clip / 2, 1 - options.clip / 2))
        centre, half = (high + low) / 2, (high - low) / 2
    else:
        centre, half = rows.mean(0), rows.std(0)
    half = half.clamp_min(1e-5 * float(half.max()) + 1e-12)
    factor = (half / half.log().mean().exp()) ** options.strength
    return centre if options.shift else torch.zeros_like(centre), factor


@torch.no_grad()
def fold(norm: nn.LayerNorm, linear: nn.Module, shift: Tensor, factor: Tensor) -> None:
    """LN(x) -> (LN(x) − shift)/factor, undone by the linear layer behind: the composition stays what it was."""
    if linear.bias is not None:
        linear.bias += linear.weight @ shift
    norm.bias.copy_((norm.bias - shift) / factor)
    norm.weight.div_(factor)
    linear.weight.mul_(factor)
