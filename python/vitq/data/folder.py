"""Image folders (one sub-folder per class) behind timm's own evaluation transform."""

from collections.abc import Callable
from pathlib import Path

import numpy as np
import timm.data
import torch
from PIL import Image
from torch import nn
from torchvision import transforms
from torchvision.datasets import ImageFolder

#: Of what images are read to: gray, or three colours.
CHANNELS = (1, 3)
#: Folder names that hold a split in the ImageNet layout.
SPLIT_FOLDERS = {"train": ("train",), "test": ("val", "test")}


def data_config(model: nn.Module) -> dict:
    """timm's data configuration: input_size (C, H, W), interpolation, mean, std, crop_pct, crop_mode.

    Size and channels are those of the images which `model` was built for, where its `pretrained_cfg` knows others
    (`img_size=`, `in_chans=`); the mean of gray ones is that of the three colours, and so is their std.

    Raises:
        ValueError: `model` does not carry timm's `pretrained_cfg`, so that its preprocessing is unknown.
    """
    if not getattr(model, "pretrained_cfg", None):
        raise ValueError(
            f"model must be a timm model, which carries its preprocessing in pretrained_cfg; "
            f"got {type(model).__name__} without one"
        )
    config = timm.data.resolve_model_data_config(model)
    embed = getattr(model, "patch_embed", None)
    channels, *size = config["input_size"]
    size = getattr(embed, "img_size", None) or size
    channels = getattr(getattr(embed, "proj", None), "in_channels", channels)
    config["input_size"] = (channels, *size)
    if channels == 1:
        config |= {name: (sum(config[name]) / len(config[name]),) for name in ("mean", "std")}
    return config


def image_transform(config: dict) -> Callable[[Image.Image], torch.Tensor]:
    """timm's evaluation transform for a :func:`data_config`: RGB image to normalised [C, H, W] float32.

    Raises: ValueError for images that are neither gray nor of three colours.
    """
    channels = config["input_size"][0]
    if channels not in CHANNELS:
        raise ValueError(f"the model takes images of {channels} channels, expected 3, or 1 for gray ones")
    steps = timm.data.create_transform(**config, is_training=False)
    return transforms.Compose([transforms.Grayscale(), steps]) if channels == 1 else steps


def evaluation_transform(model: nn.Module) -> Callable[[Image.Image], torch.Tensor]:
    """timm's evaluation transform of `model`: PIL image to normalised [C, H, W] float32; gray for one channel."""
    return image_transform(data_config(model))


def load_folder(root: str | Path, split: str, model: nn.Module) -> ImageFolder:
    """The images of one split as (image [C, H, W] float32, label) pairs, preprocessed as `model` expects.

    `root` holds either `train/` and `val/` (or `test/`) with one folder per class in each, or the class
    folders themselves, which then serve every split (`refuse_shared` is for those who need both of one root).

    Args:
        root: the folder.
        split: "train" or "test".
        model: a timm model; decides size, interpolation, crop and normalisation.
    Returns:
        torchvision ImageFolder. Fetching an unreadable image raises a ValueError that names its file.
    Raises:
        ValueError: unknown split, missing folder, no class folders, a class without images, or more or fewer
            classes to test than the model tells apart.
    """
    root = Path(root)
    if split not in SPLIT_FOLDERS:
        raise ValueError(f"split must be one of {tuple(SPLIT_FOLDERS)} for an image folder, got {split!r}")
    if not root.is_dir():
        raise ValueError(f"source must be an existing folder, got '{root}'")
    folder = _split_folder(root, split)
    try:
        images = ImageFolder(folder, evaluation_transform(model), loader=read_image)
    except FileNotFoundError as error:
        raise ValueError(f"'{folder}' is not an image folder: {' '.join(str(error).split())}") from error
    classes = getattr(model, "num_classes", len(images.classes))
    if split == "test" and classes != len(images.classes):
        raise ValueError(f"'{folder}' has {len(images.classes)} class folders, the model tells {classes} classes apart")
    return images


def refuse_shared(root: str | Path) -> None:
    """Raises: ValueError for a folder whose training images are those to test: figures on them would say nothing."""
    root = Path(root)
    if root.is_dir() and _split_folder(root, "train").resolve() == _split_folder(root, "test").resolve():
        raise ValueError(
            f"data is '{root}', whose images would be calibrated with and evaluated on, expected '{root / 'train'}' "
            f"and '{root / 'val'}' (or '{root / 'test'}') with a folder per class in each, or --no-eval"
        )


def rgb(image: Image.Image) -> Image.Image:
    """``image`` in RGB; gray of 16 bits by its high byte, as Pillow reads colours of 16: ``convert`` makes it white."""
    if image.mode.startswith("I"):
        image = Image.fromarray((np.asarray(image) >> 8).clip(0, 255).astype(np.uint8))
    return image.convert("RGB")


def read_image(path: str) -> Image.Image:
    """The file as an RGB image; ValueError with its path if it cannot be decoded to the end."""
    try:
        with Image.open(path) as image:
            return rgb(image)
    except Exception as error:  # decoders raise anything from OSError to SyntaxError
        raise ValueError(f"image '{path}' cannot be read: {error}") from error


def _split_folder(root: Path, split: str) -> Path:
    """The folder that holds the split's class folders."""
    names = [name for group in SPLIT_FOLDERS.values() for name in group]
    # A class may be called "train": only a folder of folders is a split.
    found = [n for n in names if (root / n).is_dir() and any(p.is_dir() for p in (root / n).iterdir())]
    wanted = [root / name for name in SPLIT_FOLDERS[split] if (root / name).is_dir()]
    if not found:
        return root
    if not wanted:
        raise ValueError(
            f"split {split!r} needs '{root / SPLIT_FOLDERS[split][0]}', '{root}' has only {', '.join(found)}"
        )
    return wanted[0]
