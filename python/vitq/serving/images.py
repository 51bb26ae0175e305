"""Image files to what a model takes, and its logits to labels."""

from __future__ import annotations

import io
import math
from collections.abc import Callable
from typing import Any

from PIL import Image, ImageOps
from torch import Tensor

from ..checkpoint import DataConfig
from ..data.folder import image_transform, rgb
from .protocol import Refused

FORMATS = ("JPEG", "PNG")


def transform(data: DataConfig, pixels: int | None = None) -> Callable[[Image.Image], Tensor]:
    """timm's evaluation transform for ``data``: an RGB image to [C, H, W] float32.

    Raises: Refused, 400, for data that are no images of files; when called, 413 for an image that resizing would
            enlarge beyond ``pixels``.
    """
    keys = {"input_size", "mean", "std", "interpolation", "crop_pct", "crop_mode"}
    try:
        steps = image_transform(data.model_dump(include=keys))
    except ValueError as error:
        raise Refused(400, str(error)) from error
    if pixels is None or data.crop_mode in ("squash", "border"):
        return steps
    height, width = (math.floor(side / data.crop_pct) for side in data.input_size[1:])
    most = max(pixels, height * width)  # which a square image always takes

    def bounded(image: Image.Image) -> Tensor:
        # The short side is resized before the middle is cut out: a thin image would be enlarged without bounds.
        ratio = min(image.width / width, image.height / height)
        if image.width * image.height > most * ratio**2:
            raise Refused(
                413,
                f"the image has {image.width}x{image.height} pixels and, with its short side resized to that of "
                f"{width}x{height}, more than {most}, expected up to that",
            )
        return steps(image)

    return bounded


def warm(pixels: Callable[[Image.Image], Tensor]) -> Callable[[Image.Image], Tensor]:
    """``pixels``, a :func:`transform`, after one run per format: decoders are loaded on first use."""
    for format in FORMATS:
        file = io.BytesIO()
        Image.new("RGB", (8, 8)).save(file, format)
        pixels(decode(bytearray(file.getvalue()), 64))
    return pixels


def decode(body: bytearray, pixels: int) -> Image.Image:
    """The image in ``body`` in RGB, upright as its EXIF orientation has it.

    Raises: Refused: 413 if it has more than ``pixels``, before any is decoded; 415 if it is no JPEG or PNG; 400 if it
            cannot be decoded to its end.
    """
    try:
        image = Image.open(io.BytesIO(body), formats=FORMATS)
    except Image.DecompressionBombError as error:
        raise Refused(413, f"the image has too many pixels, expected up to {pixels}") from error
    except Exception as error:  # decoders raise anything from OSError to SyntaxError
        raise Refused(415, f"the body is no {' or '.join(FORMATS)} image") from error
    with image:
        if image.width * image.height > pixels:
            raise Refused(413, f"the image has {image.width}x{image.height} pixels, expected up to {pixels}")
        try:
            ImageOps.exif_transpose(image, in_place=True)
            image.load()
            return image if image.mode == "RGB" else rgb(image)  # no copies: one may have hundreds of megabytes
        except Exception as error:
            raise Refused(400, f"the image cannot be decoded: {' '.join(str(error).split())[:100]}") from error


def top(logits: Tensor, k: int, names: tuple[str, ...] | None) -> list[dict[str, Any]]:
    """The ``k`` likeliest classes of logits [classes], the likeliest first."""
    probabilities = logits.double().softmax(0)
    values, classes = probabilities.topk(k)
    return [
        {"class": i, "label": names[i] if names else str(i), "probability": p, "logit": logits[i].item()}
        for p, i in zip(values.tolist(), classes.tolist())
    ]
