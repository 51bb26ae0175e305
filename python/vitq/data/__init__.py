"""Images to calibrate and to evaluate with: the bundled digits or any image folder."""

from pathlib import Path

import torch
from torch import Tensor, nn
from torch.utils.data import Dataset, Subset

from . import digits
from .digits import calibration_images, load_digits
from .folder import data_config, evaluation_transform, load_folder

__all__ = [
    "calibration_images",
    "data_config",
    "evaluation_transform",
    "load_calibration",
    "load_data",
    "load_digits",
    "load_folder",
]


def load_data(source: str | Path, split: str, model: nn.Module, limit: int | None = None, *, seed: int = 0) -> Dataset:
    """A split as a data set of (image [C, H, W] float32, label) pairs, preprocessed as `model` expects.

    Args:
        source: "digits", or the path of an image folder (see `load_folder` for its layout).
        split: "train", "test", or for the digits also "hard".
        model: a timm model; its configuration decides image size and normalisation.
        limit: how many images, drawn without repetition under `seed` and kept in the split's order; None
            takes them all.
        seed: chooses the images when `limit` is given.
    Returns:
        Map-style data set with a length; feed it to a DataLoader.
    Raises:
        ValueError: what `load_digits` and `load_folder` refuse, or `limit` below 1 or above what there is.
        ImportError: the digits without scikit-learn.
    """
    if source == "digits":
        return load_digits(split, limit=limit, seed=seed, **_digits_format(model))
    data = load_folder(source, split, model)
    return Subset(data, digits.draw(len(data), limit, seed, f"split {split!r} of '{source}'").tolist())


def load_calibration(source: str | Path, model: nn.Module, n: int, *, seed: int = 0, augment: float = 0.0) -> Tensor:
    """`n` training images in random order, preprocessed as `model` expects, a fraction of them augmented.

    Args:
        source: as for `load_data`; only its training split is read.
        model: a timm model.
        n: number of images.
        seed: chooses images and augmentation.
        augment: fraction of images, in [0, 1], under the mild shift, rotation, blur and noise of
            `digits.TRAIN`.
    Returns:
        [n, C, H, W] float32.
    Raises:
        ValueError: as for `load_data`, or `augment` outside [0, 1].
    """
    if source == "digits":
        return calibration_images(n, seed, augment, **_digits_format(model))
    images = torch.stack([image for image, _ in load_data(source, "train", model, n, seed=seed)])
    config = data_config(model)
    mean, std = (torch.tensor(config[name]).view(1, -1, 1, 1) for name in ("mean", "std"))
    generator = torch.Generator().manual_seed(seed)
    images = images[torch.randperm(n, generator=generator)]
    return (digits.augment_fraction(images * std + mean, augment, generator) - mean) / std


def _digits_format(model: nn.Module) -> dict:
    """`load_digits`' keyword arguments for `model`."""
    config = data_config(model)
    channels, height, width = config["input_size"]
    if channels != 3 or height != width:
        raise ValueError(f"the digits are square 3-channel images, the model expects {config['input_size']}")
    return {"size": height, "mean": config["mean"], "std": config["std"]}
