"""Shifted windows as index maps: one gather of int8 codes there, one back."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

_OUTSIDE = -100.0  # additive score between regions that a cyclic shift made neighbours: Swin's own value


@dataclass(frozen=True)
class Window:
    """Non-overlapping windows over a token grid, cyclically shifted, padded at the lower right where it does not fit.

    Args:
        size: (h, w) of a window.
        shift: (h, w) of the cyclic shift, each in [0, size).
        resolution: (H, W) of the token grid.

    Source: Swin (arXiv 2103.14030).
    """

    size: tuple[int, int]
    shift: tuple[int, int]
    resolution: tuple[int, int]

    def __post_init__(self) -> None:
        for name in ("size", "shift", "resolution"):
            value = tuple(int(v) for v in getattr(self, name))
            object.__setattr__(self, name, value)
            if len(value) != 2 or min(value) < (name != "shift"):
                raise ValueError(f"{name} is {value}, expected two ints >= {int(name != 'shift')}")
        if any(s >= w for s, w in zip(self.shift, self.size)):
            raise ValueError(f"shift is {self.shift}, expected less than size {self.size}")

    @property
    def grid(self) -> tuple[int, int]:
        """Windows along (h, w)."""
        return tuple(-(-r // s) for r, s in zip(self.resolution, self.size))

    @property
    def count(self) -> int:
        """nW, windows per image."""
        return self.grid[0] * self.grid[1]

    @property
    def tokens(self) -> int:
        """N, tokens per window."""
        return self.size[0] * self.size[1]

    @property
    def padded(self) -> bool:
        """True if some window slots hold no token."""
        return self.count * self.tokens != self.resolution[0] * self.resolution[1]

    def _slots(self, padded_grid: Tensor) -> Tensor:
        (gh, gw), (h, w) = self.grid, self.size
        return padded_grid.reshape(gh, h, gw, w).transpose(1, 2).reshape(self.count, self.tokens)

    def partition_index(self) -> Tensor:
        """[nW·N] int64: the token (row-major in H·W) in each window slot; H·W where the slot is padding."""
        (height, width), (dh, dw) = self.resolution, self.shift
        grid = torch.full([g * s for g, s in zip(self.grid, self.size)], height * width)
        tokens = torch.arange(height * width).reshape(height, width)
        grid[:height, :width] = tokens.roll((-dh, -dw), (0, 1))
        return self._slots(grid).flatten()

    def reverse_index(self) -> Tensor:
        """[H·W] int64: the window slot of each token, the inverse of :meth:`partition_index`."""
        index = self.partition_index()
        slots = torch.arange(index.numel())
        real = index < self.resolution[0] * self.resolution[1]
        reverse = torch.empty(self.resolution[0] * self.resolution[1], dtype=torch.int64)
        reverse[index[real]] = slots[real]
        return reverse

    def mask(self) -> Tensor | None:
        """[nW, N, N] float32 additive scores that keep shifted regions apart; None without a shift."""
        if not any(self.shift):
            return None
        region = [self._regions(axis) for axis in (0, 1)]
        slots = self._slots(region[0].unsqueeze(1) * 3 + region[1])
        apart = slots.unsqueeze(1) != slots.unsqueeze(2)
        return torch.zeros(apart.shape).masked_fill(apart, _OUTSIDE)

    def _regions(self, axis: int) -> Tensor:
        length = self.grid[axis] * self.size[axis]
        region = torch.zeros(length, dtype=torch.int64)
        if self.shift[axis]:
            region[length - self.size[axis] :] = 1
            region[length - self.shift[axis] :] = 2
        return region
