"""Images to calibrate and to evaluate with: bundled ones (digits, contours) or any image folder. Clouds and images with
boxes likewise."""

from pathlib import Path

import torch
from torch import Tensor, nn
from torch.utils.data import Dataset, Subset

from . import clouds, coco
from .bundled import augment_fraction, draw
from .contours import CONTOUR_SET
from .digits import DIGITS, calibration_images, load_digits
from .folder import data_config, evaluation_transform, load_folder, refuse_shared

__all__ = [
    "BUNDLED",
    "calibration_images",
    "data_config",
    "evaluation_transform",
    "load_calibration",
    "load_data",
    "load_digits",
    "load_folder",
    "refuse_leak",
    "splits",
]

#: Image sets that a name stands for.
BUNDLED = {images.name: images for images in (DIGITS, CONTOUR_SET)}


def splits(source: str | Path) -> tuple[str, ...]:
    """The splits of `source` to evaluate on."""
    if clouds.is_source(source):
        return clouds.splits(source)
    if coco.is_source(source):
        return coco.splits(source)
    return tuple(name for name in BUNDLED[source].counts if name != "train") if source in BUNDLED else ("test",)


def refuse_leak(source: str | Path, model: nn.Module) -> None:
    """Raises: ValueError if `source` is an image folder whose images would both calibrate and test."""
    if source not in BUNDLED and not clouds.is_cloud_model(model) and not coco.is_detector(model):
        refuse_shared(source)


def load_data(source: str | Path, split: str, model: nn.Module, limit: int | None = None, *, seed: int = 0) -> Dataset:
    """A split as a data set of (image [C, H, W] float32, label) pairs, preprocessed as `model` expects.

    Args:
        source: "digits", "contours", or the path of an image folder (see `load_folder` for its layout); for a
            point-cloud model "primitives" or a data set (see `clouds`), and what is said of images holds of clouds; for
            a detector "shapes" or files in COCO's form (see `coco`), with positions in place of labels.
        split: "train", "test", or for the bundled ones also "hard".
        model: a timm model; its configuration decides image size and normalisation.
        limit: how many images, drawn without repetition under `seed` and kept in the split's order; None
            takes them all.
        seed: chooses the images when `limit` is given.
    Returns:
        Map-style data set with a length; feed it to a DataLoader.
    Raises:
        ValueError: what `Bundled.load` and `load_folder` refuse, or `limit` below 1 or above what there is.
        ImportError: the digits without scikit-learn.
    """
    if clouds.is_cloud_model(model):
        return clouds.load_clouds(source, split, model, limit, seed=seed)
    if coco.is_detector(model):
        return coco.load_detection(source, split, model, limit, seed=seed)
    if source in BUNDLED:
        return BUNDLED[source].load(split, limit=limit, seed=seed, **_square_format(source, model))
    data = load_folder(source, split, model)
    return Subset(data, draw(len(data), limit, seed, f"split {split!r} of '{source}'").tolist())


def load_calibration(source: str | Path, model: nn.Module, n: int, *, seed: int = 0, augment: float = 0.0) -> Tensor:
    """`n` training images in random order, preprocessed as `model` expects, a fraction of them augmented.

    Args:
        source: as for `load_data`; only its training split is read.
        model: a timm model.
        n: number of images.
        seed: chooses images and augmentation.
        augment: fraction of images, in [0, 1], under the mild shift, rotation, blur and noise of
            `distort.TRAIN`.
    Returns:
        [n, C, H, W] float32.
    Raises:
        ValueError: as for `load_data`, or `augment` outside [0, 1].
    """
    if clouds.is_cloud_model(model):
        return clouds.calibration_clouds(source, model, n, seed, augment)
    if coco.is_detector(model):
        return coco.calibration_images(source, model, n, seed, augment)
    if source in BUNDLED:
        return BUNDLED[source].calibration(n, seed, augment, **_square_format(source, model))
    images = torch.stack([image for image, _ in load_data(source, "train", model, n, seed=seed)])
    config = data_config(model)
    mean, std = (torch.tensor(config[name]).view(1, -1, 1, 1) for name in ("mean", "std"))
    generator = torch.Generator().manual_seed(seed)
    images = images[torch.randperm(n, generator=generator)]
    return (augment_fraction(images * std + mean, augment, generator) - mean) / std


def _square_format(source: str, model: nn.Module) -> dict:
    """The keyword arguments of `Bundled.load` for `model`, which has as many classes or none."""
    known, classes = getattr(model, "num_classes", 0), BUNDLED[source].classes
    if known not in (0, classes):
        raise ValueError(f"the {source} have {classes} classes, the model tells {known} classes apart")
    config = data_config(model)
    channels, height, width = config["input_size"]
    if channels != 3 or height != width:
        raise ValueError(f"the {source} are square 3-channel images, the model expects {config['input_size']}")
    return {"size": height, "mean": config["mean"], "std": config["std"]}
