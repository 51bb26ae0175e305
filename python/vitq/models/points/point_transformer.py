"""Point Transformer: vector attention among the nearest points, on five resolutions of a cloud.

Source: Point Transformer (arXiv 2012.09164). Arrangement and key names are those of github.com/POSTECH-CVLab/
point-transformer, model/pointtransformer/pointtransformer_seg.py, over batches of clouds of one size instead of
concatenated clouds. [R] The head of the classifier (mean over points, the published segmentation head's layers) and the
category of part segmentation (one-hot beside every point's channels) are ours: neither is in the published code.
"""

from __future__ import annotations

from collections.abc import Sequence
from math import prod
from typing import Any

import torch
from torch import Tensor, nn

from .point_mae import RowNorm, cloud_data
from .sampling import check_categories, check_clouds, farthest_points, interpolate, nearest, take


class VectorAttention(nn.Module):
    """y_i = Σ_j softmax_j(γ(k_j − q_i + δ_ij)) ⊙ (v_j + δ_ij) over i's neighbours j, δ of their relative positions.

    ``share`` channels have one weight.
    """

    def __init__(self, width: int, share: int) -> None:
        super().__init__()
        self.share = share
        self.linear_q, self.linear_k, self.linear_v = (nn.Linear(width, width) for _ in range(3))
        self.linear_p = nn.Sequential(nn.Linear(3, 3), RowNorm(3), nn.ReLU(), nn.Linear(3, width))
        narrow = width // share
        self.linear_w = nn.Sequential(
            *(RowNorm(width), nn.ReLU(), nn.Linear(width, narrow)),
            *(RowNorm(narrow), nn.ReLU(), nn.Linear(narrow, narrow)),
        )

    def forward(self, points: Tensor, x: Tensor, near: Tensor) -> Tensor:
        """[B, N, 3], [B, N, C] and neighbours [B, N, k] to [B, N, C]."""
        q, k, v = self.linear_q(x), take(self.linear_k(x), near), take(self.linear_v(x), near)
        delta = self.linear_p(take(points, near) - points.unsqueeze(2))
        weight = self.linear_w(k - q.unsqueeze(2) + delta).softmax(2)
        values = (v + delta).unflatten(-1, (self.share, -1))
        return (values * weight.unsqueeze(3)).sum(2).flatten(2)


class PointBlock(nn.Module):
    """relu(x + norm(linear(attention(linear(x))))), each with a BatchNorm and ReLU behind it."""

    def __init__(self, width: int, share: int) -> None:
        super().__init__()
        self.linear1 = nn.Linear(width, width, bias=False)
        self.bn1 = RowNorm(width)
        self.transformer2 = VectorAttention(width, share)
        self.bn2 = RowNorm(width)
        self.linear3 = nn.Linear(width, width, bias=False)
        self.bn3 = RowNorm(width)

    def forward(self, points: Tensor, x: Tensor, near: Tensor) -> Tensor:
        y = torch.relu(self.bn1(self.linear1(x)))
        y = torch.relu(self.bn2(self.transformer2(points, y, near)))
        return torch.relu(self.bn3(self.linear3(y)) + x)


class TransitionDown(nn.Module):
    """1/stride of the points, each with the maximum over its neighbours of a shared layer; stride 1 is that layer."""

    def __init__(self, k: int, n: int, stride: int, neighbours: int) -> None:
        super().__init__()
        self.stride, self.neighbours = stride, neighbours
        self.linear = nn.Linear(k if stride == 1 else k + 3, n, bias=False)
        self.bn = RowNorm(n)

    def forward(self, points: Tensor, x: Tensor) -> tuple[Tensor, Tensor]:
        if self.stride == 1:
            return points, torch.relu(self.bn(self.linear(x)))
        fewer = take(points, farthest_points(points, points.shape[1] // self.stride))
        near = _neighbours(fewer, points, self.neighbours)
        x = torch.cat([take(points, near) - fewer.unsqueeze(2), take(x, near)], -1)
        return fewer, torch.relu(self.bn(self.linear(x))).amax(2)


class TransitionUp(nn.Module):
    """Features of the next finer resolution; at the coarsest (``n`` None) the cloud's mean beside each point's own."""

    def __init__(self, k: int, n: int | None) -> None:
        super().__init__()
        # In the order of execution, which calibration follows.
        if n is None:
            self.linear2 = nn.Sequential(nn.Linear(k, k), nn.ReLU())
            self.linear1 = nn.Sequential(nn.Linear(2 * k, k), RowNorm(k), nn.ReLU())
        else:
            self.linear1 = nn.Sequential(nn.Linear(n, n), RowNorm(n), nn.ReLU())
            self.linear2 = nn.Sequential(nn.Linear(k, n), RowNorm(n), nn.ReLU())

    def forward(self, points: Tensor, x: Tensor, coarse: tuple[Tensor, Tensor] | None = None) -> Tensor:
        """[B, N, 3], [B, N, C] and the coarser resolution's points and features, or None."""
        if coarse is None:
            mean = self.linear2(x.mean(1, keepdim=True))
            return self.linear1(torch.cat([x, mean.expand_as(x)], -1))
        return self.linear1(x) + interpolate(points, coarse[0], self.linear2(coarse[1]), power=1)


class PointTransformer(nn.Module):
    """What classification and part segmentation share.

    Args:
        num_classes, in_channels, num_points, class_names: as of ``PointMAE``; extra: further input channels.
        planes, blocks, strides, neighbours: of each resolution, the finest first; share: channels of one weight.

    Attributes:
        vitq_data: ``ModelState.data`` of the model.
    """

    def __init__(
        self,
        num_classes: int,
        in_channels: int = 3,
        num_points: int = 1024,
        planes: Sequence[int] = (32, 64, 128, 256, 512),
        blocks: Sequence[int] = (2, 3, 4, 6, 3),
        strides: Sequence[int] = (1, 4, 4, 4, 4),
        neighbours: Sequence[int] = (8, 16, 16, 16, 16),
        share: int = 8,
        class_names: list[str] | None = None,
        extra: int = 0,
    ) -> None:
        super().__init__()
        if len({len(planes), len(blocks), len(strides), len(neighbours)}) != 1:
            raise ValueError(f"planes has {len(planes)} entries, expected as many blocks, strides and neighbours")
        if any(width % share for width in planes):
            raise ValueError(f"planes is {tuple(planes)}, expected multiples of share, {share}")
        self.num_classes, self.in_channels = num_classes, in_channels
        self.neighbours, self.depth, self.least = tuple(neighbours), len(planes), prod(strides)
        self.vitq_data = cloud_data(num_classes, num_points, in_channels, class_names)
        width = in_channels + extra
        for i, (n, count, stride, k) in enumerate(zip(planes, blocks, strides, neighbours), 1):
            layers = [TransitionDown(width, n, stride, k), *(PointBlock(n, share) for _ in range(1, count))]
            self.add_module(f"enc{i}", nn.ModuleList(layers))
            width = n

    def encode(self, points: Tensor, x: Tensor) -> list[tuple[Tensor, Tensor]]:
        """Points and features of every resolution, the finest first."""
        out = []
        for i, k in enumerate(self.neighbours, 1):
            down, *blocks = getattr(self, f"enc{i}")
            points, x = down(points, x)
            out.append((points, self._attend(blocks, points, x, k)))
            x = out[-1][1]
        return out

    def _attend(self, blocks: Sequence[PointBlock], points: Tensor, x: Tensor, k: int) -> Tensor:
        near = _neighbours(points, points, k) if blocks else None
        for block in blocks:
            x = block(points, x, near)
        return x


class PointTransformerClassifier(PointTransformer):
    """Logits [B, num_classes] of clouds [B, N, in_channels]."""

    def __init__(self, num_classes: int = 40, **rest: Any) -> None:
        super().__init__(num_classes, **rest)
        self.cls = _head(getattr(self, f"enc{self.depth}")[0].linear.out_features, num_classes)

    def forward(self, x: Tensor) -> Tensor:
        check_clouds(x, self.in_channels, self.least)
        return self.cls(self.encode(x[..., :3], x)[-1][1].mean(1))


class PointTransformerPartSegmenter(PointTransformer):
    """Logits [B, N, num_classes] of points [B, N, in_channels + 1], the last channel their cloud's category."""

    def __init__(self, num_classes: int = 50, categories: int = 16, share: int = 8, **rest: Any) -> None:
        super().__init__(num_classes, share=share, extra=categories, **rest)
        self.categories = categories
        points, channels = self.vitq_data["input_size"]
        self.vitq_data["input_size"] = (points, channels + 1)
        widths = [getattr(self, f"enc{i}")[0].linear.out_features for i in range(1, self.depth + 1)]
        for i in range(self.depth, 0, -1):
            up = TransitionUp(widths[min(i, self.depth - 1)], None if i == self.depth else widths[i - 1])
            self.add_module(f"dec{i}", nn.ModuleList([up, PointBlock(widths[i - 1], share)]))
        self.cls = _head(widths[0], num_classes)

    def forward(self, x: Tensor) -> Tensor:
        """Raises: ValueError: a shape that does not fit, values that are not finite, a category that is none."""
        check_clouds(x, self.in_channels + 1, self.least)
        x, category = x[..., :-1], check_categories(x[:, 0, -1], self.categories)
        one_hot = torch.nn.functional.one_hot(category, self.categories).to(x.dtype)
        features = torch.cat([x, one_hot.unsqueeze(1).expand(-1, x.shape[1], -1)], -1)
        seen = self.encode(x[..., :3], features)
        coarse = None
        for i in range(self.depth, 0, -1):
            up, block = getattr(self, f"dec{i}")
            points, y = seen[i - 1]
            y = self._attend([block], points, up(points, y, coarse), self.neighbours[i - 1])
            coarse = points, y
        return self.cls(y)


def _head(width: int, classes: int) -> nn.Sequential:
    return nn.Sequential(nn.Linear(width, width), RowNorm(width), nn.ReLU(), nn.Linear(width, classes))


def _neighbours(queries: Tensor, points: Tensor, k: int) -> Tensor:
    """[B, M, k'] positions of the nearest; the coarsest resolutions may have fewer than k points."""
    return nearest(queries, points, min(k, points.shape[1]))[1]
