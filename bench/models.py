"""The models that accuracy is measured on: timm architectures at 32x32, with weights trained by `bench.train`."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from vitq.data.bundled import SIZE
from vitq.data.contours import CLASSES, MEAN, STD
from vitq.models import digits_vit
from vitq.sources import ModelSource

ASSETS = Path(__file__).resolve().parent / "assets"


@dataclass(frozen=True)
class Trained:
    """A model of the bench and how its weights came about.

    Attributes:
        source: architecture, arguments and weights.
        data: the images it knows, by their name in `load_data`.
        images: how many it was trained on, with repetition; batch: at a time.
        stream: what it was trained on, by its name in `bench.train.STREAMS`, where that is another.
        drop_path: largest rate of stochastic depth.
    """

    source: ModelSource
    data: str
    images: int
    batch: int = 64
    drop_path: float = 0.0
    learning_rate: float = 1e-3
    stream: str | None = None


def _contours(name: str, architecture: str, images: int, learning_rate: float = 1e-3, **kwargs) -> Trained:
    overlay = {"input_size": (3, SIZE, SIZE), "mean": MEAN, "std": STD, "crop_pct": 1.0}
    kwargs |= {"img_size": SIZE, "num_classes": CLASSES, "pretrained_cfg_overlay": overlay}
    source = ModelSource(architecture, pretrained=False, weights=str(ASSETS / f"{name}.safetensors"), kwargs=kwargs)
    return Trained(source, "contours", images, batch=32, learning_rate=learning_rate)


#: Models of point clouds, by name.
CLOUDS = {
    "clouds": Trained(ModelSource("point_mae_primitives"), "primitives", 16_000, batch=32, stream="clouds"),
    "parts": Trained(ModelSource("point_mae_parts"), "primitives", 9_600, batch=32, stream="parts"),
}

#: By name. Tokens: 65, 65, 65, and 256 in windows of 16.
MODELS = {
    "digits": Trained(ModelSource(digits_vit.NAME), "digits", 90 * 1088, drop_path=0.1),
    "vit": _contours(
        "vit", "vit_tiny_patch16_224", 76_800, patch_size=4, embed_dim=128, depth=9, num_heads=4, mlp_ratio=3
    ),
    "deit": _contours("deit", "deit_tiny_patch16_224", 115_200, learning_rate=7e-4, patch_size=4),
    "swin": _contours(
        "swin", "swin_tiny_patch4_window7_224", 64_000,
        patch_size=2, window_size=4, embed_dim=48, depths=[2, 2, 4], num_heads=[2, 4, 8],
    ),
}  # fmt: skip
