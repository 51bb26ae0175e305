"""Images with boxes and masks to calibrate and to evaluate detectors with: the bundled shapes, or files in COCO's form.

A source is ``shapes`` or ``coco:<folder>``: ``annotations/instances_<name>.json`` beside a folder of images ``<name>``,
where ``<name>`` is ``train2017`` or ``train`` for the split "train", ``val2017``, ``val`` or ``test`` for "test".
``write_shapes`` writes the shapes in this form.
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor, nn
from torch.utils.data import Dataset

from . import shapes
from .bundled import augment_fraction, draw
from .folder import read_image

SHAPES = "shapes"
#: Names of files and folders by split.
NAMES = {"train": ("train2017", "train"), "test": ("val2017", "val", "test")}


def coco_tools() -> ModuleType:
    """pycocotools. Raises: ImportError that says how to get it."""
    try:
        import pycocotools.coco
        import pycocotools.cocoeval
        import pycocotools.mask
    except ImportError as error:
        raise ImportError("boxes and masks need pycocotools: pip install 'vitq-kernels[detection]'") from error
    return pycocotools


def is_detector(model: nn.Module) -> bool:
    """Whether ``model`` finds boxes in images."""
    return hasattr(model, "roi_heads")


def is_source(source: object) -> bool:
    """Whether ``source`` names images with boxes."""
    return isinstance(source, str) and (source == SHAPES or source.startswith("coco:"))


def splits(source: str) -> tuple[str, ...]:
    """The splits of ``source`` to evaluate on."""
    return ("test", "hard") if source == SHAPES else ("test",)


class DetectionData(Dataset):
    """Images of a split, as (image [3, H, W] float32, its position) pairs, normalized as the model expects.

    Attributes:
        truth: images, annotations and categories in COCO's form (masks as RLE or polygons), of exactly these images.
        categories: their identifiers in the order of the model's labels 1, 2, ...
    """

    def __init__(
        self, truth: dict[str, Any], read: Callable[[int], Tensor], model: nn.Module, fit: bool, title: str
    ) -> None:
        self.truth, self.read, self.title = truth, read, title
        self.categories = sorted(category["id"] for category in truth["categories"])
        config = model.vitq_data
        if len(self.categories) != config["num_classes"]:
            found = len(self.categories)
            raise ValueError(f"{title} has {found} categories, the model tells {config['num_classes']} classes apart")
        self.canvas = config["input_size"][1:] if fit else None
        self.mean, self.std = (torch.tensor(config[name]).view(3, 1, 1) for name in ("mean", "std"))

    def __len__(self) -> int:
        return len(self.truth["images"])

    def __getitem__(self, i: int) -> tuple[Tensor, int]:
        image, canvas = self.read(i), self.canvas
        if canvas is not None:
            # As published: an upright image has an upright canvas.
            upright = (image.shape[1] > image.shape[2]) != (canvas[0] > canvas[1])
            image = fitted(image, canvas[::-1] if upright else canvas)
        return (image - self.mean) / self.std, i

    def size(self, i: int) -> tuple[int, int]:
        """(H, W) of image i as it is stored: what its annotations refer to."""
        return self.truth["images"][i]["height"], self.truth["images"][i]["width"]


def load_detection(source: str, split: str, model: nn.Module, limit: int | None = None, *, seed: int = 0):
    """A split as DetectionData.

    Stored images are resized (bilinear) to the largest size that fits the model's input size, or the same upright; the
    shapes keep theirs.

    Args:   as of ``load_data``.
    Raises: ImportError: without pycocotools. ValueError: a source or a split that is none, files that are missing or
            malformed (the message names file and place), other categories than the model's, ``limit`` outside what
            there is.
    """
    what = f"split {split!r} of '{source}'"
    if source == SHAPES:
        if split not in shapes.COUNTS:
            raise ValueError(f"split must be one of {tuple(shapes.COUNTS)}, got {split!r}")
        return _shapes(split, draw(shapes.COUNTS[split], limit, seed, what).tolist(), model)
    layout, colon, folder = str(source).partition(":")
    if layout != "coco" or not colon:
        raise ValueError(f"data is {str(source)!r}, expected {SHAPES} or coco:<folder>")
    if split not in NAMES:
        raise ValueError(f"split must be one of {tuple(NAMES)} for coco, got {split!r}")
    for name in NAMES[split]:
        file = Path(folder) / "annotations" / f"instances_{name}.json"
        if file.is_file():
            truth = read_annotations(file)
            chosen = draw(len(truth["images"]), limit, seed, what).tolist()
            return _stored(truth, chosen, Path(folder) / name, model, str(file))
    expected = " or ".join(f"instances_{name}.json" for name in NAMES[split])
    raise ValueError(f"'{Path(folder) / 'annotations'}' lacks {expected}")


def calibration_images(source: str, model: nn.Module, n: int, seed: int = 0, augment: float = 0.0) -> Tensor:
    """``n`` training images [n, 3, H, W] of the model's input size in random order, zeros at the lower right.

    Args:   augment: share of them under the mild distortion of the other image sets.
    Raises: ValueError: as of :func:`load_detection`, or ``augment`` outside [0, 1].
    """
    data = load_detection(source, "train", model, n, seed=seed)
    canvas = tuple(model.vitq_data["input_size"][1:])
    generator = torch.Generator().manual_seed(seed)
    out = []
    for i in torch.randperm(n, generator=generator).tolist():
        image = data.read(i)
        image = image if data.canvas is None else fitted(image, canvas)
        # Padding is zero behind normalization: the mean before it.
        padded = data.mean.expand(3, *canvas).clone()
        padded[:, : image.shape[1], : image.shape[2]] = image
        out.append(padded)
    return (augment_fraction(torch.stack(out), augment, generator) - data.mean) / data.std


def fitted(image: Tensor, canvas: tuple[int, int]) -> Tensor:
    """[3, H, W] resized, its shape kept, to the largest size within ``canvas``."""
    h, w = image.shape[1:]
    scale = min(canvas[0] / h, canvas[1] / w)
    size = [min(most, max(1, round(side * scale))) for side, most in zip((h, w), canvas)]
    return F.interpolate(image.unsqueeze(0), size=size, mode="bilinear", align_corners=False)[0]


def _shapes(split: str, chosen: list[int], model: nn.Module) -> DetectionData:
    scenes = {position: shapes.scene(split, i) for position, i in enumerate(chosen)}
    truth = {"images": [], "annotations": [], "categories": _CATEGORIES}
    for position, scene in scenes.items():
        _describe(truth, scene, chosen[position])
    return DetectionData(truth, lambda i: scenes[i].image, model, False, "shapes")


_CATEGORIES = [{"id": i, "name": name} for i, name in enumerate(shapes.CLASSES, 1)]


def _describe(truth: dict[str, Any], scene: shapes.Scene, image_id: int) -> None:
    """Add ``scene`` to annotations in COCO's form."""
    h, w = scene.image.shape[1:]
    truth["images"].append({"id": image_id, "file_name": f"{image_id:06d}.png", "height": h, "width": w})
    for box, label, pixels in zip(scene.boxes.tolist(), scene.labels.tolist(), scene.masks.numpy()):
        rle = coco_tools().mask.encode(np.asfortranarray(pixels))
        truth["annotations"].append(
            {
                "id": len(truth["annotations"]) + 1,
                "image_id": image_id,
                "category_id": label,
                "bbox": [box[0], box[1], box[2] - box[0], box[3] - box[1]],
                "area": float(pixels.sum()),
                "iscrowd": 0,
                "segmentation": {"size": [h, w], "counts": rle["counts"].decode()},
            }
        )


def write_shapes(folder: Path, split: str, count: int) -> None:
    """The first ``count`` scenes of "train" or "test" as files in COCO's form: annotations, and PNG images."""
    truth = {"images": [], "annotations": [], "categories": _CATEGORIES}
    images = folder / NAMES[split][-1]
    for part in (images, folder / "annotations"):
        part.mkdir(parents=True, exist_ok=True)
    for i in range(count):
        scene = shapes.scene(split, i)
        _describe(truth, scene, i)
        pixels = (scene.image * 255).round().byte().permute(1, 2, 0).numpy()
        Image.fromarray(pixels).save(images / truth["images"][-1]["file_name"])
    (folder / "annotations" / f"instances_{images.name}.json").write_text(json.dumps(truth))


def _stored(truth: dict[str, Any], chosen: list[int], images: Path, model: nn.Module, title: str) -> DetectionData:
    listed = [truth["images"][i] for i in chosen]
    kept = {image["id"] for image in listed}
    # Numbered anew: pycocotools takes what is matched with an annotation 0 for unmatched.
    annotations = [a | {"id": n} for n, a in enumerate((a for a in truth["annotations"] if a["image_id"] in kept), 1)]

    def read(i: int) -> Tensor:
        image = read_image(str(images / listed[i]["file_name"]))
        if image.size != (listed[i]["width"], listed[i]["height"]):
            want = (listed[i]["width"], listed[i]["height"])
            raise ValueError(f"image '{images / listed[i]['file_name']}' is {image.size}, its annotations say {want}")
        return torch.from_numpy(np.array(image)).permute(2, 0, 1).float() / 255

    return DetectionData(truth | {"images": listed, "annotations": annotations}, read, model, True, title)


def read_annotations(file: Path) -> dict[str, Any]:
    """A file of instances in COCO's form. An image may have no annotation.

    Raises: ValueError that names the file and what is wrong: no JSON, fields missing, identifiers twice, an annotation
            of an unknown image or category, a box that is not four finite numbers of positive extent, no segmentation
            or one that is neither RLE nor polygons.
    """

    def refuse(why: str) -> None:
        raise ValueError(f"'{file}': {why}")

    try:
        truth = json.loads(file.read_text())
    except (OSError, UnicodeDecodeError, json.JSONDecodeError) as error:
        refuse(f"cannot be read: {error}")
    if not isinstance(truth, dict):
        refuse(f"holds a {type(truth).__name__}, expected an object")
    for part, fields in _FIELDS.items():
        if not isinstance(truth.get(part), list):
            refuse(f"lacks the list {part!r}")
        for i, entry in enumerate(truth[part]):
            for name, kind in fields.items():
                if not isinstance(entry, dict) or not isinstance(entry.get(name), kind):
                    refuse(f"{part}[{i}] has no {name!r} that is of {kind}")
        known = [entry["id"] for entry in truth[part]]
        if len(set(known)) < len(known):
            refuse(f"{part} have an id twice")
    images, categories = ({entry["id"] for entry in truth[part]} for part in ("images", "categories"))
    for i, entry in enumerate(truth["annotations"]):
        for name, among in (("image_id", images), ("category_id", categories)):
            if entry[name] not in among:
                refuse(f"annotations[{i}] has {name} {entry[name]}, which the file does not describe")
        box = entry["bbox"]
        numbers = len(box) == 4 and all(isinstance(v, int | float) and math.isfinite(v) for v in box)
        if not numbers or min(box[2:]) <= 0:
            refuse(f"annotations[{i}] has bbox {box}, expected x, y and a positive width and height")
        outline = entry["segmentation"]
        if isinstance(outline, dict):
            whole = outline.keys() >= {"size", "counts"}
        else:
            whole = bool(outline) and all(isinstance(p, list) and len(p) >= 6 and len(p) % 2 == 0 for p in outline)
        if not whole:
            refuse(f"annotations[{i}] has a segmentation that is neither RLE nor polygons of three points or more")
    return truth


_FIELDS = {
    "images": {"id": int, "file_name": str, "height": int, "width": int},
    "categories": {"id": int, "name": str},
    "annotations": {
        **{"id": int, "image_id": int, "category_id": int, "iscrowd": int},
        **{"bbox": list, "area": int | float, "segmentation": dict | list},
    },
}
