"""Handwritten digits: 1797 real 8x8 scans bundled with scikit-learn, as an image-classification data set.

The scans are split once, class by class, into 1097 training and 700 test images; calibration draws from the
training images only. Each is enlarged to 32x32 (bicubic) and repeated over three channels, the smallest size
at which a patch-4 transformer sees a token count (64) like that of real windows and patch grids.

Source: E. Alpaydin, C. Kaynak, "Optical Recognition of Handwritten Digits", UCI repository, 1998.
"""

from functools import cache

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils.data import TensorDataset

from .distort import Distortion, distort, to_grid

SIZE = 32
MEAN = STD = (0.5, 0.5, 0.5)
SPLITS = ("train", "test", "hard")
TEST_IMAGES = 700

#: What a training image undergoes, and the augmented part of a calibration set.
TRAIN = Distortion(shift=0.08, rotate=12.0, scale=0.1, blur=0.02, noise=0.1)
#: What a `hard` test image undergoes: 1.5 to 2.5 times as much, so that low bit-widths are told apart.
HARD = Distortion(shift=0.12, rotate=20.0, scale=0.1, blur=0.05, noise=0.25)

_SPLIT_SEED, _HARD_SEED = 1797, 700


def load_digits(
    split: str,
    *,
    limit: int | None = None,
    seed: int = 0,
    size: int = SIZE,
    mean: tuple[float, ...] = MEAN,
    std: tuple[float, ...] = STD,
) -> TensorDataset:
    """One split of the digits as (image, label) pairs; `.tensors` holds the whole of it.

    Args:
        split: "train" (1097 images), "test" (700) or "hard" (the test images shifted, rotated, blurred and
            noised under a fixed seed).
        limit: how many images, drawn without repetition under `seed` and kept in order; None takes them all.
        seed: chooses the images when `limit` is given.
        size: side of the images in pixels; other sizes than 32 are resampled from 32 (bicubic).
        mean, std: three per-channel constants; a pixel p in [0, 1] becomes (p − mean) / std.
    Returns:
        TensorDataset of images [N, 3, size, size] float32 and labels [N] int64, the same bits at every call.
    Raises:
        ValueError: unknown split, or limit, size, mean or std out of range.
        ImportError: scikit-learn is missing.
    """
    if split not in SPLITS:
        raise ValueError(f"split must be one of {SPLITS}, got {split!r}")
    images, labels = _pixels("train" if split == "train" else "test")
    if split == "hard":
        images = distort(images, HARD, torch.Generator().manual_seed(_HARD_SEED))
    index = draw(len(labels), limit, seed, f"split {split!r} of the digits")
    return TensorDataset(_normalise(images[index], size, mean, std), labels[index])


def calibration_images(
    n: int,
    seed: int = 0,
    augment: float = 0.0,
    *,
    size: int = SIZE,
    mean: tuple[float, ...] = MEAN,
    std: tuple[float, ...] = STD,
) -> Tensor:
    """Training images for calibration, part of them under the training augmentation.

    Args:
        n: how many; without repetition, at most 1097.
        seed: chooses the images, which of them are augmented, and how. The images chosen do not depend on
            `augment`.
        augment: fraction of augmented images in [0, 1]; round(n · augment) images at random positions.
        size, mean, std: as for `load_digits`.
    Returns:
        [n, 3, size, size] float32.
    Raises:
        ValueError: n, augment, size, mean or std out of range.
    """
    images, _ = _pixels("train")
    if not 1 <= n <= len(images):
        raise ValueError(f"n must be between 1 and {len(images)} (the training images), got {n}")
    generator = torch.Generator().manual_seed(seed)
    chosen = images[torch.randperm(len(images), generator=generator)[:n]]
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


def training_pixels() -> tuple[Tensor, Tensor]:
    """The training split before normalisation: images [1097, 3, 32, 32] float32 in [0, 1], labels [1097]."""
    images, labels = _pixels("train")
    return images.clone(), labels.clone()


@cache
def _pixels(part: str) -> tuple[Tensor, Tensor]:
    """Images [N, 3, 32, 32] float32 in [0, 1] on the 8-bit grid, labels [N]; shared, so never written to."""
    try:
        from sklearn import datasets
    except ImportError as error:
        raise ImportError("the digits need scikit-learn: pip install 'vitq-kernels[demo]'") from error
    bundle = datasets.load_digits()
    labels = torch.from_numpy(bundle.target).long()
    index = split_indices(labels)[part]
    scans = torch.from_numpy(bundle.images)[index, None] / 16
    return to_grid(_resize(scans, SIZE)).expand(-1, 3, -1, -1).contiguous(), labels[index]


def split_indices(labels: Tensor) -> dict[str, Tensor]:
    """Class-stratified "train" and "test" positions of `labels` ([N] int64), disjoint and ascending.

    Every class is shuffled, then all are interleaved by relative rank: any prefix of that order holds the
    classes in their overall proportions to within one image; the first 700 are the test set.
    """
    generator = torch.Generator().manual_seed(_SPLIT_SEED)
    rank = torch.empty(len(labels), dtype=torch.float64)
    for label in labels.unique():
        members = (labels == label).nonzero().squeeze(1)
        shuffled = torch.randperm(len(members), generator=generator)
        rank[members] = (shuffled.double() + 0.5) / len(members)
    order = rank.argsort(stable=True)
    return {"test": order[:TEST_IMAGES].sort().values, "train": order[TEST_IMAGES:].sort().values}


def _resize(images: Tensor, size: int) -> Tensor:
    return F.interpolate(images.double(), size=(size, size), mode="bicubic", antialias=True)


def _normalise(images: Tensor, size: int, mean: tuple[float, ...], std: tuple[float, ...]) -> Tensor:
    if size < 8:
        raise ValueError(f"size must be at least 8 pixels, got {size}")
    if len(mean) != 3 or len(std) != 3 or min(std) <= 0:
        raise ValueError(f"mean and std must hold three numbers, std positive, got {mean} and {std}")
    if size != SIZE:
        images = torch.cat([to_grid(_resize(batch, size)) for batch in images.split(64)])  # float64 is large
    mean, std = (torch.tensor(c, dtype=torch.float32).view(1, 3, 1, 1) for c in (mean, std))
    return (images - mean) / std
