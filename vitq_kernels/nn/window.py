"""Shifted windows as index maps, which kernels read and write their rows through."""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from torch import Tensor

from ..formats import QTensor
from .base import QModule

# Additive score between regions that a cyclic shift made neighbours. Swin adds −100, whose exponential is nothing; a
# key that is excluded altogether adds nothing to a quantizer's offset either, nor to the sum that renormalizes.
_OUTSIDE = float("-inf")
#: Grids besides its own that a dynamic window keeps the maps of.
_GRIDS = 8


@dataclass(frozen=True)
class Window:
    """Non-overlapping windows over a token grid, cyclically shifted, padded at the lower right where it does not fit.

    Args:
        size: (h, w) of a window.
        shift: (h, w) of the cyclic shift, each in [0, size).
        resolution: (H, W) of the token grid.
        dynamic: whether other grids are laid out in windows of the same size and shift, or refused.

    Source: Swin (arXiv 2103.14030).
    """

    size: tuple[int, int]
    shift: tuple[int, int]
    resolution: tuple[int, int]
    dynamic: bool = False

    def __post_init__(self) -> None:
        for name in ("size", "shift", "resolution"):
            value = tuple(int(v) for v in getattr(self, name))
            object.__setattr__(self, name, value)
            least = int(name != "shift")
            if len(value) != 2 or min(value) < least:
                raise ValueError(f"{name} is {value}, expected two ints >= {least}")
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


class WindowMap(QModule):
    """Tokens (or their codes, scales and low-rank parts) into windows and back.

    Attributes:
        token_of_slot: [nW·N] int32: the token in each window slot, −1 where the slot is padding. ``gather`` of
            ``layer_norm_quantize`` and ``scatter`` of ``qattention``, which then need neither method.
        mask: [nW, N, N] float32 additive scores, or None.
    """

    def __init__(self, window: Window) -> None:
        super().__init__()
        self.window = window
        partition = window.partition_index()
        self.register_buffer("partition_index", partition)
        self.register_buffer("reverse_index", window.reverse_index())
        slots = partition.masked_fill(partition == window.resolution[0] * window.resolution[1], -1)
        self.register_buffer("token_of_slot", slots.to(torch.int32))
        self.register_buffer("mask", window.mask())
        # Of other grids: made when they come up, never stored.
        self.__dict__["others"] = {}

    def at(self, x: Tensor) -> WindowMap:
        """The map of the grid of x [B, H, W, C]: this one, or where windows are dynamic another, kept for a while.

        Raises: ValueError if x is on another grid than the window's, or no grid.
        """
        grid = tuple(x.shape[1:-1])
        if grid == self.window.resolution:
            return self
        if not self.window.dynamic or len(grid) != 2:
            raise ValueError(f"x has shape {tuple(x.shape)}, expected (B, *{self.window.resolution}, C)")
        key = (grid, x.device)
        found = self.others.get(key)
        if found is None:
            with torch.inference_mode(False):
                found = WindowMap(replace(self.window, resolution=grid)).to(x.device)
            for oldest in list(self.others)[: max(0, len(self.others) + 1 - _GRIDS)]:
                self.others.pop(oldest, None)
            self.others[key] = found
        return found

    def partition(self, x: Tensor | QTensor, zero_code: int = 0) -> Tensor | QTensor:
        """[B, H, W, C] to [B·nW, N, C]; ``zero_code``: the code of 0.0, which padded slots hold.

        Raises: ValueError if x is not on the window's grid.
        """
        codes = x.q if isinstance(x, QTensor) else x
        if tuple(codes.shape[1:-1]) != self.window.resolution:
            raise ValueError(f"x has shape {tuple(codes.shape)}, expected (B, *{self.window.resolution}, C)")
        b = codes.shape[0]
        if not isinstance(x, QTensor):
            return self._gather(x, b, 0).unflatten(1, (-1, self.window.tokens)).flatten(0, 1)
        q = self._gather(x.q, b, zero_code).unflatten(1, (-1, self.window.tokens)).flatten(0, 1)
        rows = {} if x.scale.dim() < 2 else {"scale": self._gather(x.scale, b, 1).flatten(0, 1)}
        if x.t is not None:
            rows["t"] = self._gather(x.t, b, 0).flatten(0, 1)
        return replace(x, q=q, **rows)

    def _gather(self, x: Tensor, b: int, pad: float) -> Tensor:
        x = x.reshape(b, self.reverse_index.numel(), x.shape[-1])
        if self.window.padded:
            x = torch.nn.functional.pad(x, (0, 0, 0, 1), value=pad)
        return x.index_select(1, self.partition_index)

    def reverse(self, x: Tensor | QTensor) -> Tensor | QTensor:
        """[B·nW, N, C] to [B, H, W, C]."""
        back = {"q": x.q, "scale": x.scale, "t": x.t} if isinstance(x, QTensor) else {"q": x}
        for name, value in back.items():
            if value is not None and value.dim() >= 2:
                rows = value.reshape(-1, self.partition_index.numel(), value.shape[-1])
                rows = rows.index_select(1, self.reverse_index)
                back[name] = rows.unflatten(1, self.window.resolution) if name == "q" else rows.flatten(0, 1)
        return replace(x, **back) if isinstance(x, QTensor) else back["q"]

    def extra_repr(self) -> str:
        return f"size={self.window.size}, shift={self.window.shift}, resolution={self.window.resolution}"
