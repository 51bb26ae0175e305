"""Handwritten digits: 1797 real 8x8 scans bundled with scikit-learn, as an image-classification data set.

The scans are split once, class by class, into 1097 training and 700 test images; calibration draws from the
training images only. Each is enlarged to 32x32 (bicubic) and repeated over three channels, the smallest size
at which a patch-4 transformer sees a token count (64) like that of real windows and patch grids.

Source: E. Alpaydin, C. Kaynak, "Optical Recognition of Handwritten Digits", UCI repository, 1998.
"""

from functools import cache

import torch
from torch import Tensor

from .bundled import SIZE, Bundled, resize
from .distort import Distortion, distort, to_grid

COUNTS = {"train": 1097, "test": 700, "hard": 700}

#: What a `hard` test image undergoes: 1.5 to 2.5 times what a training image does, so that low bit-widths are told
#: apart.
HARD = Distortion(shift=0.12, rotate=20.0, scale=0.1, blur=0.05, noise=0.25)

_SPLIT_SEED, _HARD_SEED = 1797, 700


def images(split: str, index: Tensor) -> tuple[Tensor, Tensor]:
    """Scans of a split, enlarged; `hard` are the test images shifted, rotated, blurred and noised under a fixed seed.

    Args:
        split: "train", "test" or "hard".
        index ([N] int64): positions in the split.
    Returns:
        Images [N, 3, 32, 32] float32 in [0, 1], multiples of 1/255, and labels [N] int64.
    Raises:
        ImportError: scikit-learn is missing.
    """
    pixels, labels = _pixels("train" if split == "train" else "test")
    if split == "hard":
        pixels = distort(pixels, HARD, torch.Generator().manual_seed(_HARD_SEED))
    return pixels[index], labels[index]


DIGITS = Bundled("digits", COUNTS, 10, images)
load_digits, calibration_images = DIGITS.load, DIGITS.calibration


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
    return to_grid(resize(scans, SIZE)).expand(-1, 3, -1, -1).contiguous(), labels[index]


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
    return {"test": order[: COUNTS["test"]].sort().values, "train": order[COUNTS["test"] :].sort().values}
