"""Scenes that need no files: textured figures of six classes on cluttered ground, with their boxes and masks.

Scene i of a split is a function of the split, i and nothing else. Figures lie over each other; the mask is
what is seen of one. Height and width differ from scene to scene; some have no figure. The ``hard`` split has more and
smaller figures, less contrast, more clutter and noise.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import numpy as np
import torch
from torch import Tensor

CLASSES = ("disc", "ring", "square", "triangle", "cross", "star")
#: Heights and widths are multiples of 8 between these.
SMALLEST, LARGEST = 80, 128
COUNTS = {"train": 1 << 20, "test": 60, "hard": 60}
#: Of the pixels, by channel, as a model trained on them expects to be told.
MEAN, STD = (0.5, 0.5, 0.5), (0.22, 0.22, 0.22)
_SEEDS = {"train": 11, "test": 12, "hard": 13}
#: Share of scenes without a figure; of a figure at least so much is seen, or it is not drawn after so many attempts.
EMPTY, LEAST_SEEN, ATTEMPTS = 0.04, 0.4, 3


@dataclass(frozen=True)
class Nuisance:
    """Upper limits; each scene draws its own values, uniformly.

    figures: number of them. small: radius of the smallest, as a share of the shorter side (the largest: 0.32). tint:
    deviation of a figure's colour from its class's. faint: of the contrast of figure and ground, taken away. clutter:
    amplitude of the ground's waves; strokes: number of lines over the ground; noise: standard deviation. Intensities
    are of the [0, 1] pixel range.
    """

    figures: int = 6
    small: float = 0.09
    tint: float = 0.6
    faint: float = 0.6
    clutter: float = 0.12
    strokes: int = 4
    noise: float = 0.06


CLEAN = Nuisance(figures=3, small=0.16, tint=0.0, faint=0.0, clutter=0.0, strokes=0, noise=0.0)
USUAL = Nuisance()
HARD = Nuisance(figures=9, small=0.07, tint=0.8, faint=0.7, clutter=0.2, strokes=8, noise=0.1)


@dataclass(frozen=True)
class Scene:
    """An image [3, H, W] float32 in [0, 1], multiples of 1/255; boxes [N, 4] float32 (x1, y1, x2, y2) around the
    masks [N, H, W] uint8, labels [N] int64 from 1."""

    image: Tensor
    boxes: Tensor
    labels: Tensor
    masks: Tensor

    @property
    def target(self) -> dict[str, Tensor]:
        return {"boxes": self.boxes, "labels": self.labels, "masks": self.masks}


def scene(split: str, index: int, limits: Nuisance | None = None, size: tuple[int, int] | None = None) -> Scene:
    """Scene ``index`` of "train", "test" or "hard"; ``limits``, ``size`` (H, W): others than the split's.

    Raises: ValueError for another split.
    """
    if split not in COUNTS:
        raise ValueError(f"split must be one of {tuple(COUNTS)}, got {split!r}")
    limits = (HARD if split == "hard" else USUAL) if limits is None else limits
    rng = np.random.default_rng((_SEEDS[split], index))
    drawn = tuple(int(side) for side in rng.integers(SMALLEST // 8, LARGEST // 8 + 1, 2) * 8)
    h, w = size or drawn
    y, x = np.mgrid[0.5:h, 0.5:w]
    image = _ground(rng, x, y, limits)
    ground = image.mean((0, 1))
    labels, masks, least = [], [], []
    wanted = int(rng.integers(1, limits.figures + 1)) if rng.uniform() > EMPTY else 0
    for _ in range(wanted * ATTEMPTS):
        if len(labels) == wanted:
            break
        label, radius = int(rng.integers(len(CLASSES))), min(h, w) * rng.uniform(limits.small, 0.32)
        cx, cy = rng.uniform(0, w), rng.uniform(0, h)
        u, v = _turned((x - cx) / radius, (y - cy) / radius, rng.uniform(0, 2 * np.pi))
        inside = _inside(CLASSES[label], u, v)
        seen = [mask & ~inside for mask in masks]
        floor = LEAST_SEEN * _AREA[CLASSES[label]] * radius**2
        if all(mask.sum() >= few for mask, few in zip([*seen, inside], [*least, floor])):
            image = np.where(inside[..., None], _texture(rng, CLASSES[label], u, v, ground, limits), image)
            masks, labels, least = [*seen, inside], [*labels, label + 1], [*least, floor]
    light, _ = _turned(x / w - 0.5, y / h - 0.5, rng.uniform(0, 2 * np.pi))
    image = image * (1 + rng.uniform(0, 0.25) * light)[..., None]
    image = image + rng.uniform(0, limits.noise) * rng.standard_normal(image.shape)
    pixels = torch.from_numpy(np.round(np.clip(image, 0, 1) * 255) / 255).float().permute(2, 0, 1).contiguous()
    stacked = torch.from_numpy(np.array(masks, dtype=np.uint8).reshape(-1, h, w))
    return Scene(pixels, boxes_of(stacked), torch.tensor(labels, dtype=torch.int64), stacked)


def boxes_of(masks: Tensor) -> Tensor:
    """[N, 4] float32 (x1, y1, x2, y2) around masks [N, H, W], none of which is empty; ends are exclusive."""
    boxes = torch.zeros(len(masks), 4)
    for box, mask in zip(boxes, masks):
        rows, columns = mask.any(1).nonzero(), mask.any(0).nonzero()
        box[:] = torch.stack([columns.min(), rows.min(), columns.max() + 1, rows.max() + 1])
    return boxes


def strengthened(share: float) -> Nuisance:
    """Between clean scenes (0) and the usual ones (1), for a training that begins with clean ones."""
    between = {name: type(clean)(clean + share * (getattr(USUAL, name) - clean)) for name, clean in vars(CLEAN).items()}
    return replace(CLEAN, **between)


def _turned(x: np.ndarray, y: np.ndarray, angle: float) -> tuple[np.ndarray, np.ndarray]:
    c, s = np.cos(angle), np.sin(angle)
    return c * x + s * y, c * y - s * x


def _ground(rng: np.random.Generator, x: np.ndarray, y: np.ndarray, limits: Nuisance) -> np.ndarray:
    """[H, W, 3]: a colour, two waves and some lines."""
    image = np.broadcast_to(rng.uniform(0.2, 0.6, 3), (*x.shape, 3))
    for _ in range(2):
        along, _ = _turned(x, y, rng.uniform(0, 2 * np.pi))
        wave = np.cos(rng.uniform(0.03, 0.4) * along + rng.uniform(0, 2 * np.pi))
        image = image + rng.uniform(0, limits.clutter) * wave[..., None]
    for _ in range(int(rng.integers(0, limits.strokes + 1))):
        cx, cy = rng.uniform(0, x.shape[1]), rng.uniform(0, x.shape[0])
        along, away = _turned(x - cx, y - cy, rng.uniform(0, 2 * np.pi))
        line = (np.abs(away) < rng.uniform(0.7, 2)) & (np.abs(along) < rng.uniform(5, 40))
        image = np.where(line[..., None], rng.uniform(0.1, 0.9, 3), image)
    return image


def _texture(
    rng: np.random.Generator, kind: str, u: np.ndarray, v: np.ndarray, ground: np.ndarray, limits: Nuisance
) -> np.ndarray:
    """[H, W, 3]: plain, striped or checked, of a tint over the ground that is usual for its class."""
    tint = np.array(_TINTS[kind]) + rng.uniform(0, limits.tint) * rng.standard_normal(3)
    contrast = rng.uniform(0.3, 0.4) * (1 - rng.uniform(0, limits.faint)) * tint
    pattern, frequency = rng.integers(3), rng.uniform(4, 9)
    wave = (1.0, np.cos(frequency * u), np.cos(frequency * u) * np.cos(frequency * v))[pattern]
    return ground + contrast * (0.75 + 0.25 * np.sign(wave) * np.ones_like(u))[..., None]


def _inside(kind: str, u: np.ndarray, v: np.ndarray) -> np.ndarray:
    """[H, W] bool in the figure's own coordinates: it lies in the unit disc."""
    rho, a, b = np.hypot(u, v), np.abs(u), np.abs(v)
    if kind == "disc":
        return rho <= 1
    if kind == "ring":
        return (rho <= 1) & (rho >= 0.5)
    if kind == "square":
        return np.maximum(a, b) <= np.sqrt(0.5)
    if kind == "triangle":
        return np.maximum(-v, (np.sqrt(3) * a + v) / 2) <= 0.5
    if kind == "cross":
        return (np.minimum(a, b) <= 0.25) & (np.maximum(a, b) <= 0.95)
    # A star: one tenth of it is a triangle between the centre, a tip and the next dent.
    angle = np.abs((np.arctan2(u, v) + np.pi / 5) % (2 * np.pi / 5) - np.pi / 5)
    x, y = rho * np.cos(angle) - 1, rho * np.sin(angle)
    return (_DENT[0] - 1) * y - _DENT[1] * x >= 0


#: Of colours over the ground. Classes would be told apart by their outline alone, which takes long to learn.
_TINTS = {"disc": (1, -0.5, -0.5), "ring": (-0.5, 1, -0.5), "square": (-0.5, -0.5, 1)}
_TINTS |= {"triangle": (1, 1, -1), "cross": (1, -1, 1), "star": (-1, 1, 1)}
_DENT = 0.45 * np.cos(np.pi / 5), 0.45 * np.sin(np.pi / 5)
#: Of figures in the unit disc.
_AREA = {"disc": np.pi, "ring": 0.75 * np.pi, "square": 2.0, "triangle": 1.3, "cross": 1.65, "star": 5 * _DENT[1]}
