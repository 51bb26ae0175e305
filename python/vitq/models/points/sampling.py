"""Sampling, neighbours and interpolation of point clouds in plain torch: any device, no compiled extension."""

from __future__ import annotations

import torch
from torch import Tensor


def squared_distances(a: Tensor, b: Tensor) -> Tensor:
    """[B, M, N], Σ_c (a[m, c] − b[n, c])² of a [B, M, C] and b [B, N, C].

    Summed coordinate by coordinate: |a|² + |b|² − 2·a·b would cancel for neighbours, and points could be at a negative
    distance.
    """
    return sum((x.unsqueeze(2) - y.unsqueeze(1)).square() for x, y in zip(a.unbind(-1), b.unbind(-1)))


def farthest_points(points: Tensor, count: int) -> Tensor:
    """Farthest-point sampling: the first point, then always the one farthest from all that are chosen.

    Args:    points ([B, N, C] float); count: how many.
    Returns: [B, count] int64. Of points equally far the first is taken, so that a cloud has one result; a point is
             taken twice only where fewer than ``count`` points differ.
    Raises:  ValueError: other than three dimensions, or ``count`` outside 1..N.
    """
    _check_cloud("points", points)
    (b, n, _), device = points.shape, points.device
    if not 1 <= count <= n:
        raise ValueError(f"count is {count}, expected 1 to {n}, the points of a cloud")
    batch = torch.arange(b, device=device)
    # Coordinates first: every step walks rows of N.
    rows = points.transpose(1, 2).contiguous()
    chosen = torch.zeros(b, count, dtype=torch.int64, device=device)
    least = torch.full((b, n), torch.inf, dtype=points.dtype, device=device)
    for i in range(1, count):
        last = points[batch, chosen[:, i - 1]]
        least = torch.minimum(least, (rows - last.unsqueeze(-1)).square().sum(1))
        chosen[:, i] = least.argmax(1)
    return chosen


def nearest(queries: Tensor, points: Tensor, k: int) -> tuple[Tensor, Tensor]:
    """The k nearest points of each query, the nearest first; of points equally near any may come.

    Args:    queries [B, M, C]; points [B, N, C].
    Returns: squared distances [B, M, k] and positions [B, M, k] int64.
    Raises:  ValueError: other than three dimensions, or ``k`` outside 1..N.
    """
    _check_cloud("queries", queries)
    _check_cloud("points", points)
    if not 1 <= k <= points.shape[1]:
        raise ValueError(f"k is {k}, expected 1 to {points.shape[1]}, the points of a cloud")
    return squared_distances(queries, points).topk(k, largest=False, sorted=True)


def take(values: Tensor, index: Tensor) -> Tensor:
    """[B, ..., C], rows ``index`` [B, ...] of ``values`` [B, N, C]."""
    flat = index.flatten(1)
    rows = values.gather(1, flat.unsqueeze(-1).expand(-1, -1, values.shape[-1]))
    return rows.reshape(*index.shape, values.shape[-1])


def interpolate(queries: Tensor, points: Tensor, features: Tensor, power: int = 2) -> Tensor:
    """[B, M, F], features [B, N, F] of the three nearest ``points``, weighted by 1 / (distance^power + 1e-8).

    Source: PointNet++'s feature propagation (arXiv 1706.02413) with power 2, Point Transformer's with power 1.
    """
    distance, index = nearest(queries, points, min(3, points.shape[1]))
    weight = 1.0 / ((distance.sqrt() if power == 1 else distance) + 1e-8)
    weight = weight / weight.sum(-1, keepdim=True)
    return (take(features, index) * weight.unsqueeze(-1)).sum(2)


def check_clouds(x: Tensor, channels: int, points: int) -> None:
    """Raises ValueError unless x is [B, N, ``channels``] with N ≥ ``points`` and, on the CPU, finite.

    On a GPU the last would wait for the device: NaN comes out as NaN there. Neither does a traced program ask.
    """
    if x.dim() != 3 or x.shape[-1] != channels:
        raise ValueError(f"clouds have shape {tuple(x.shape)}, expected [B, N, {channels}]")
    if x.shape[1] < points:
        raise ValueError(f"clouds have {x.shape[1]} points, expected at least {points}")
    if x.device.type == "cpu" and not torch.compiler.is_compiling() and not bool(x.isfinite().all()):
        raise ValueError("clouds have NaN or Inf, expected finite coordinates")


def check_categories(column: Tensor, categories: int) -> Tensor:
    """[B] int64 of a channel [B] that holds categories, checked as :func:`check_clouds` checks coordinates."""
    category = column.long()
    if column.device.type == "cpu" and not torch.compiler.is_compiling() and len(category):
        low, high = int(category.min()), int(category.max())
        if low < 0 or high >= categories:
            raise ValueError(f"categories of clouds are {low} to {high}, expected 0 to {categories - 1}")
    return category


def _check_cloud(name: str, x: Tensor) -> None:
    if x.dim() != 3:
        raise ValueError(f"{name} has shape {tuple(x.shape)}, expected [B, N, C]")
