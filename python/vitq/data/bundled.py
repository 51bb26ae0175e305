"""Image sets that need no files: what the digits and the contours share."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils.data import TensorDataset

from .distort import TRAIN, distort, to_grid

SIZE = 32
MEAN = STD = (0.5, 0.5, 0.5)


@dataclass(frozen=True)
class Bundled:
    """An image set of 32x32 pixels.

    Attributes:
        name: as in `load_data`.
        counts: number of images by split; calibration draws from "train".
        classes: number of them.
        images: (split, positions [N] int64) to pixels [N, 3, 32, 32] float32 in [0, 1] and labels [N] int64.
    """

    name: str
    counts: dict[str, int]
    classes: int
    images: Callable[[str, Tensor], tuple[Tensor, Tensor]]

    def load(
        self,
        split: str,
        *,
        limit: int | None = None,
        seed: int = 0,
        size: int = SIZE,
        mean: tuple[float, ...] = MEAN,
        std: tuple[float, ...] = STD,
    ) -> TensorDataset:
        """One split as (image, label) pairs; `.tensors` holds the whole of it.

        Args:
            split: one of `counts`.
            limit: how many images, drawn without repetition under `seed` and kept in order; None takes them all.
            seed: chooses the images when `limit` is given.
            size: side of the images in pixels; other sizes than 32 are resampled from 32 (bicubic).
            mean, std: three per-channel constants; a pixel p in [0, 1] becomes (p − mean) / std.
        Returns:
            TensorDataset of images [N, 3, size, size] float32 and labels [N] int64, the same bits at every call.
        Raises:
            ValueError: unknown split, or limit, size, mean or std out of range.
            ImportError: the digits without scikit-learn.
        """
        if split not in self.counts:
            raise ValueError(f"split must be one of {tuple(self.counts)}, got {split!r}")
        index = draw(self.counts[split], limit, seed, f"split {split!r} of the {self.name}")
        images, labels = self.images(split, index)
        return TensorDataset(_normalise(images, size, mean, std), labels)

    def calibration(
        self,
        n: int,
        seed: int = 0,
        augment: float = 0.0,
        *,
        size: int = SIZE,
        mean: tuple[float, ...] = MEAN,
        std: tuple[float, ...] = STD,
    ) -> Tensor:
        """Training images for calibration, part of them distorted.

        Args:
            n: how many, without repetition.
            seed: chooses the images, which of them are augmented, and how. The images chosen do not depend on
                `augment`.
            augment: fraction of augmented images in [0, 1]; round(n · augment) images at random positions.
            size, mean, std: as for `load`.
        Returns:
            [n, 3, size, size] float32.
        Raises:
            ValueError: n, augment, size, mean or std out of range.
        """
        count = self.counts["train"]
        if not 1 <= n <= count:
            raise ValueError(f"n must be between 1 and {count} (the training images), got {n}")
        generator = torch.Generator().manual_seed(seed)
        chosen, _ = self.images("train", torch.randperm(count, generator=generator)[:n])
        return _normalise(augment_fraction(chosen, augment, generator), size, mean, std)


def draw(count: int, limit: int | None, seed: int, what: str) -> Tensor:
    """Ascending positions [limit] int64 of a random subset of `count` images; None draws them all.

    Raises:
        ValueError: `limit` outside 1..count; the message says `what` the images are.
    """
    if limit is None:
        return torch.arange(count)
    if not 1 <= limit <= count:
        raise ValueError(f"limit must be between 1 and {count}, the images in {what}; got {limit}")
    return torch.randperm(count, generator=torch.Generator().manual_seed(seed))[:limit].sort().values


def augment_fraction(images: Tensor, fraction: float, generator: torch.Generator) -> Tensor:
    """A copy of `images` with round(N · fraction) of them, at random positions, under `TRAIN` distortion.

    Args:
        images ([N, C, H, W] float32 in [0, 1]).
        fraction: in [0, 1].
        generator: CPU generator.
    Raises:
        ValueError: fraction outside [0, 1].
    """
    if not 0.0 <= fraction <= 1.0:
        raise ValueError(f"augment must be a fraction between 0 and 1, got {fraction}")
    out = images.clone()
    where = torch.randperm(len(out), generator=generator)[: round(len(out) * fraction)]
    if len(where):
        out[where] = distort(out[where], TRAIN, generator)
    return out


def resize(images: Tensor, size: int) -> Tensor:
    """Bicubic with antialiasing, float64: [N, C, H, W] to [N, C, size, size]."""
    return F.interpolate(images.double(), size=(size, size), mode="bicubic", antialias=True)


def _normalise(images: Tensor, size: int, mean: tuple[float, ...], std: tuple[float, ...]) -> Tensor:
    if size < 8:
        raise ValueError(f"size must be at least 8 pixels, got {size}")
    if len(mean) != 3 or len(std) != 3 or min(std) <= 0:
        raise ValueError(f"mean and std must hold three numbers, std positive, got {mean} and {std}")
    if size != SIZE:
        images = torch.cat([to_grid(resize(batch, size)) for batch in images.split(64)])  # float64 is large
    mean, std = (torch.tensor(c, dtype=torch.float32).view(1, 3, 1, 1) for c in (mean, std))
    return (images - mean) / std
