"""Level tables fitted to data: the best 2^k points of the int8 grid for a distribution of 8-bit codes."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import torch
from torch import Tensor

from vitq_kernels.formats import LevelTable, QuantSpec

_GRID = np.arange(-127, 128)


def optimal_levels(mass: Tensor, count: int) -> LevelTable:
    """The ``count`` levels in [−127, 127] with the least Σ mass[q]·(q − level)², by dynamic programming.

    Args: mass [255], how often (or how costly) each code −127..127 is; count: a power of two, 2..128.
    Numerics: exact but for the levels' own rounding to the grid; unused levels fill the gaps.
    """
    m = mass.double().cpu().numpy() + 1e-12 * float(mass.sum())
    s0, s1, s2 = (np.concatenate([[0.0], np.cumsum(m * _GRID.astype(float) ** p)]) for p in (0, 1, 2))
    n = len(_GRID)
    i, j = np.triu_indices(n + 1, 1)
    weight = np.full((n + 1, n + 1), np.inf)
    total, first = s0[j] - s0[i], s1[j] - s1[i]
    centre = np.round(first / total)
    # Cost of codes i..j−1 with one integer level.
    weight[i, j] = (s2[j] - s2[i]) - 2 * centre * first + centre**2 * total
    cost, cut = weight[0].copy(), []
    for _ in range(count - 1):
        candidates = cost[:, None] + weight
        cut.append(candidates.argmin(0))
        cost = candidates.min(0)
    end, levels = n, []
    for back in [*reversed(cut), None]:
        start = 0 if back is None else int(back[end])
        levels.append(int(np.round((s1[end] - s1[start]) / (s0[end] - s0[start]))))
        end = start
    return LevelTable(tuple(_distinct(sorted(levels))))


def snapped(values: Tensor) -> tuple[LevelTable, float]:
    """The table nearest to ``values`` ([2^k], ascending) on the int8 grid up to the largest, and the grid's step."""
    step = float(values.abs().max()) / 127
    return LevelTable(tuple(_distinct([int(v) for v in (values / step).round()]))), step


def _distinct(levels: list[int]) -> list[int]:
    """Levels moved apart where rounding made two of them meet."""
    for k in range(1, len(levels)):
        levels[k] = max(levels[k], levels[k - 1] + 1)
    for k in range(len(levels) - 1, -1, -1):
        levels[k] = min(levels[k], 127 - (len(levels) - 1 - k))
    return levels


def _mass(codes: Tensor, weights: Tensor | None) -> Tensor:
    flat = codes.long().clamp(-127, 127).reshape(-1) + 127
    return torch.bincount(flat, None if weights is None else weights.reshape(-1), minlength=255)


def activation_table(rows: Tensor, spec: QuantSpec) -> QuantSpec:
    """``spec`` with the table that suits ``rows`` [T, K] on its own 8-bit grid (per row if dynamic).

    Static tables are symmetric: the grid spans ± the largest magnitude.
    """
    absmax = rows.abs().amax(1, keepdim=True) if spec.dynamic else rows.abs().amax()
    scale = (absmax / 127).clamp_min(1e-12)
    # Errors count in units of the data, not of each row's grid.
    weights = (scale.square().expand_as(rows)).float() if spec.dynamic else None
    mass = _mass((rows / scale).round(), weights)
    return replace(spec, symmetric=True, table=optimal_levels(mass, 1 << spec.bits))


def weight_table(weight: Tensor, spec: QuantSpec, importance: Tensor | None) -> QuantSpec:
    """``spec`` with the one table that suits all rows of ``weight`` [N, K], each on its own absmax grid."""
    scale = (weight.abs().amax(1, keepdim=True) / 127).clamp_min(1e-12)
    cost = scale.square() if importance is None else scale.square() * importance
    mass = _mass((weight / scale).round(), cost.expand_as(weight).contiguous().float())
    return replace(spec, table=optimal_levels(mass, 1 << spec.bits))
