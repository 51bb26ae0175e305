"""What calibration images do at each site: streaming statistics, and the searches that turn them into scales."""

from __future__ import annotations

from dataclasses import dataclass, field
from functools import cached_property
from math import gcd

import torch
from torch import Tensor

from vitq_kernels.formats import QuantSpec

from . import lowrank
from .simulate import SimModel, recording

BINS = 2048


@dataclass(frozen=True)
class Histogram:
    """Values and how often they occur: what scale searches run on.

    Args: values [..., B], weights [..., B] float32; leading dimensions are independent histograms.
    """

    values: Tensor
    weights: Tensor

    @classmethod
    def of(cls, x: Tensor, bins: int = BINS) -> Histogram:
        """Of each row of x ([..., S]): bin centres over its range."""
        low, high = x.amin(-1, keepdim=True), x.amax(-1, keepdim=True)
        width = ((high - low) / bins).clamp_min(1e-12)
        index = ((x - low) / width).long().clamp_(0, bins - 1)
        weights = x.new_zeros(*x.shape[:-1], bins).scatter_add_(-1, index, torch.ones_like(x))
        centres = low + width * (torch.arange(bins, dtype=x.dtype, device=x.device) + 0.5)
        # The outermost bins keep the exact extremes of x: a min-max range is theirs, x itself often being a sample.
        centres[..., :1], centres[..., -1:] = low, high
        return cls(centres, weights)


def even_stride(count: int, keep: int) -> int:
    """The largest stride that leaves ``keep`` of ``count`` values or more and has no divisor in common with ``count``.

    Values come in repeated structures (channels of a row, points of a group, tokens of a window): a stride that divides
    these would meet some places over and over and others never, such as the centre of every group.
    """
    stride = max(1, count // max(1, keep))
    while gcd(stride, count) > 1:
        stride -= 1
    return stride


def thinned(x: Tensor, keep: int) -> Tensor:
    """About ``keep`` of the rows of x [T, ...], or more, at an :func:`even_stride`."""
    return x[:: even_stride(x.shape[0], keep)]


@dataclass
class InputStats:
    """Rows [T, K] that enter a linear layer.

    Attributes: low, high [K] over all rows; rows: a sample of them, drawn evenly.
    """

    low: Tensor | None = None
    high: Tensor | None = None
    parts: list[Tensor] = field(default_factory=list)

    def update(self, x: Tensor, keep: int) -> None:
        """Add rows x [T, K] and keep about ``keep`` of them."""
        low, high = x.amin(0), x.amax(0)
        self.low = low if self.low is None else torch.minimum(self.low, low)
        self.high = high if self.high is None else torch.maximum(self.high, high)
        self.parts.append(thinned(x, keep).clone())

    @property
    def rows(self) -> Tensor:
        """[T', K] sampled rows."""
        return torch.cat(self.parts)

    def second_moment(self) -> Tensor:
        """[K, K] float64, E[x·xᵀ] of the sampled rows."""
        return moment(self.rows, self.rows)

    @cached_property
    def directions(self) -> Tensor:
        """[K, K] float64, every principal direction of the sampled rows, the strongest first."""
        return lowrank.principal_directions(self.second_moment(), len(self.low))


def moment(y: Tensor, x: Tensor) -> Tensor:
    """[N, K] float64, the mean of y·xᵀ over rows; chunks in float32, sums in float64."""
    total = x.new_zeros(y.shape[-1], x.shape[-1], dtype=torch.float64)
    for part_y, part_x in zip(y.split(4096), x.split(4096)):
        total += (part_y.T @ part_x).double()
    return total / x.shape[0]


@dataclass
class Observations:
    """What calibration images do at every site of the float model.

    Attributes:
        inputs: linear path -> InputStats.
        qkv: attention path -> [B', N, 3·H·d] what is to be quantized of the fused outputs of qkv, of the first images.
    """

    inputs: dict[str, InputStats]
    qkv: dict[str, Tensor]


@torch.no_grad()
def observe(sim: SimModel, images: Tensor, batch: int, rows: int = 4096, attention_images: int = 32) -> Observations:
    """Run ``images`` through a float ``sim``; keep about ``rows`` rows a layer and ``attention_images`` images' qkv."""
    stats = {path: InputStats() for path in sim.linears}
    qkv: dict[str, list[Tensor]] = {path: [] for path in sim.attentions}
    keep = 0
    share = 0.0

    def record(path: str, inputs: tuple, output: Tensor) -> None:
        linear = sim.linears[path]
        x = linear.rows(inputs[0])
        # A layer wider than the sample would have a singular second moment.
        stats[path].update(x, int(share * max(rows, 4 * x.shape[1])) + 1)

    def record_qkv(path: str, inputs: tuple, output: Tensor) -> None:
        if keep > 0:
            per_image = output.shape[0] // size
            qkv[path].append(output[: keep * per_image].clone())

    stages = {path: attention.stage for path, attention in sim.attentions.items()}
    with recording(sim.linears, record), recording(stages, record_qkv):
        for start in range(0, len(images), batch):
            part = images[start : start + batch]
            size, share, keep = len(part), len(part) / len(images), min(len(part), attention_images - start)
            sim(part)
    return Observations(stats, {path: torch.cat(parts) for path, parts in qkv.items()})


def affine_range(low: Tensor, high: Tensor, spec: QuantSpec) -> tuple[Tensor, Tensor]:
    """Scale and zero point (both [...], float) whose codes span [low, high] and contain 0 exactly."""
    if spec.symmetric:
        bound = torch.maximum(-low, high).clamp_min(1e-8)
        return bound / spec.scale_divisor, torch.zeros_like(bound)
    low, high = low.clamp(max=0.0), high.clamp(min=0.0)
    scale = ((high - low) / (spec.qmax - spec.qmin)).clamp_min(1e-8)
    return scale, (spec.qmin - low / scale).round().clamp(spec.qmin, spec.qmax)


def _error(h: Histogram, scale: Tensor, zero: Tensor, spec: QuantSpec, norm: float) -> Tensor:
    """Σ weight·|x − Q(x)|^norm of histograms [..., B] under scales [...]."""
    scale, zero = scale.unsqueeze(-1), zero.unsqueeze(-1)
    code = torch.clamp((h.values / scale).round() + zero, spec.qmin, spec.qmax)
    if spec.table is not None:
        code = spec.table.lut().to(code.device)[code.long() + 128].to(scale.dtype)
    error = ((code - zero) * scale - h.values).abs()
    error = error.square() if norm == 2.0 else error**norm
    return (error * h.weights).sum(-1)


def search_range(h: Histogram, spec: QuantSpec, method: str, *, percentile: float, norm: float, steps: int):
    """Static scale and zero point ([...] each) of histograms by ``minmax``, ``percentile`` or ``mse``.

    ``mse`` shrinks the two ends of the range independently (one after the other, twice) over ``steps`` factors in
    [1/steps, 1] and takes the least Σ|x − Q(x)|^norm.

    Raises: ValueError for another method.
    """
    low, high = h.values[..., 0], h.values[..., -1]
    if method == "percentile":
        mass = h.weights.cumsum(-1) / h.weights.sum(-1, keepdim=True)
        first = (mass < 1.0 - percentile).sum(-1, keepdim=True).clamp(max=h.values.shape[-1] - 1)
        last = (mass < percentile).sum(-1, keepdim=True).clamp(max=h.values.shape[-1] - 1)
        low, high = h.values.gather(-1, first)[..., 0], h.values.gather(-1, last)[..., 0]
    elif method == "mse":
        factors = torch.linspace(1.0 / steps, 1.0, steps, device=low.device)
        best = [torch.ones_like(low), torch.ones_like(high)]
        for end in (0, 1, 0, 1) if not spec.symmetric else (None,):
            trial = [f.unsqueeze(-1).expand(*f.shape, steps) for f in best]
            for i in (0, 1) if end is None else (end,):
                trial[i] = factors.expand_as(trial[i])
            wide = Histogram(h.values.unsqueeze(-2), h.weights.unsqueeze(-2))
            scale, zero = affine_range(low.unsqueeze(-1) * trial[0], high.unsqueeze(-1) * trial[1], spec)
            choice = _error(wide, scale, zero, spec, norm).argmin(-1, keepdim=True)
            best = [t.gather(-1, choice)[..., 0] for t in trial]
        low, high = low * best[0], high * best[1]
    elif method != "minmax":
        raise ValueError(f"method is {method!r}, expected 'minmax', 'percentile' or 'mse'")
    return affine_range(low, high, spec)


def weight_scale(
    weight: Tensor, spec: QuantSpec, importance: Tensor | None, method: str, norm: float, steps: int
) -> Tensor:
    """[N] scales of a weight [N, K]: absmax, or the least Σ_k importance[k]·|w − Q(w)|^norm over shrunk ranges.

    Args: importance [K] (E x_k², say) or None for ones.
    """
    absmax = weight.abs().amax(1).clamp_min(1e-8) / spec.scale_divisor
    if method == "minmax":
        return absmax
    best, chosen = torch.full_like(absmax, torch.inf), absmax.clone()
    lut = None if spec.table is None else spec.table.lut().to(weight.device)
    lowest = 0.35 if spec.grid_bits > 2 else 0.2
    for factor in torch.linspace(lowest, 1.15 if spec.table is None else 1.0, steps, device="cpu"):
        scale = (absmax * factor).unsqueeze(1)
        code = (weight / scale).round().clamp(spec.qmin, spec.qmax)
        if lut is not None:
            code = lut[code.long() + 128].to(weight.dtype)
        error = (code * scale - weight).abs()
        error = error.square() if norm == 2.0 else error**norm
        error = error.sum(1) if importance is None else error @ importance
        better = error < best
        best, chosen = torch.where(better, error, best), torch.where(better, scale.squeeze(1), chosen)
    return chosen
