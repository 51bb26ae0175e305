"""Point clouds that need no files: surfaces of primitives and of objects put together from them, with their parts.

Cloud i of a split is a function of the split, i and nothing else. Nuisances: unequal scale, a turn about the vertical
axis, a tilt, a side that is not seen, noise, points off the surface; the ``hard`` split has more of each.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from itertools import pairwise

import numpy as np
import torch
from torch import Tensor

POINTS = 512
COUNTS = {"train": 1 << 20, "test": 480, "hard": 480}
_SEEDS = {"train": 1, "test": 2, "hard": 3}


@dataclass(frozen=True)
class Nuisance:
    """Upper limits; each cloud draws its own values, uniformly.

    scale: of an axis, exp(±scale). tilt: of the vertical, in radians. occlude: share of the points that a random plane
    cuts off. noise: standard deviation of every coordinate, the object's radius being 1. outliers: share of the points
    that lie off the surface, by a normal draw of deviation 0.3.
    """

    scale: float = 0.25
    tilt: float = 0.35
    occlude: float = 0.3
    noise: float = 0.03
    outliers: float = 0.03


CLEAN = Nuisance(0.0, 0.0, 0.0, 0.0, 0.0)
USUAL = Nuisance()
HARD = Nuisance(scale=0.35, tilt=0.6, occlude=0.45, noise=0.06, outliers=0.08)

Surface = Callable[[np.random.Generator, int], np.ndarray]


@dataclass(frozen=True)
class Piece:
    """A surface [n, 3] of ``area``, its axes put in ``order`` and then moved, and the part that it belongs to."""

    surface: Surface
    area: float
    at: tuple[float, float, float] = (0.0, 0.0, 0.0)
    order: tuple[int, int, int] = (0, 1, 2)
    part: int = 0


def _ellipsoid(a: float, b: float, c: float, upper: bool = False, **place) -> Piece:
    """Half axes a, b, c; directions are uniform, points per area only for a sphere."""

    def surface(rng: np.random.Generator, n: int) -> np.ndarray:
        x = rng.standard_normal((n, 3))
        x /= np.linalg.norm(x, axis=1, keepdims=True)
        if upper:
            x[:, 2] = np.abs(x[:, 2])
        return x * (a, b, c)

    mean = ((a * b) ** 1.6 + (a * c) ** 1.6 + (b * c) ** 1.6) / 3
    return Piece(surface, (2 if upper else 4) * np.pi * mean ** (1 / 1.6), **place)


def _box(a: float, b: float, c: float, **place) -> Piece:
    """Half sides a, b, c."""
    sides, areas = np.array((a, b, c)), np.array((b * c, a * c, a * b))

    def surface(rng: np.random.Generator, n: int) -> np.ndarray:
        x = rng.uniform(-1, 1, (n, 3))
        axis = rng.choice(3, n, p=areas / areas.sum())
        x[np.arange(n), axis] = rng.choice((-1.0, 1.0), n)
        return x * sides

    return Piece(surface, 8 * areas.sum(), **place)


def _frustum(low: float, high: float, h: float, caps: bool = True, **place) -> Piece:
    """Radii at −h and +h: a cylinder, a cone, a disc; without caps the wall alone."""
    wall = np.pi * (low + high) * np.hypot(low - high, 2 * h)
    areas = np.array((wall, np.pi * low**2 * caps, np.pi * high**2 * caps))

    def surface(rng: np.random.Generator, n: int) -> np.ndarray:
        where, u, angle = rng.choice(3, n, p=areas / areas.sum()), rng.uniform(0, 1, n), rng.uniform(0, 2 * np.pi, n)
        # Radii on the wall are as frequent as they are long.
        radius = np.sqrt(low**2 + u * (high**2 - low**2))
        z = np.where(low == high, 2 * u - 1, 2 * (radius - low) / ((high - low) or 1.0) - 1)
        radius = np.where(where == 0, radius, np.sqrt(u) * np.where(where == 1, low, high))
        z = np.where(where == 0, z, np.where(where == 1, -1, 1))
        return np.stack([radius * np.cos(angle), radius * np.sin(angle), h * z], 1)

    return Piece(surface, float(areas.sum()), **place)


def _torus(ring: float, tube: float, arc: float = 2 * np.pi, **place) -> Piece:
    """Radii of ring and tube; ``arc`` of the ring, symmetric to the first axis."""

    def surface(rng: np.random.Generator, n: int) -> np.ndarray:
        around, along = rng.uniform(0, 2 * np.pi, n), rng.uniform(-arc / 2, arc / 2, n)
        # The inner side has less area: an angle stays as often as its radius is long, of twice the ring's.
        moved = rng.uniform(0, 1, n) > (ring + tube * np.cos(around)) / (2 * ring)
        around = np.where(moved, np.pi - around, around)
        radius = ring + tube * np.cos(around)
        return np.stack([radius * np.cos(along), radius * np.sin(along), tube * np.sin(around)], 1)

    return Piece(surface, arc * ring * 2 * np.pi * tube, **place)


def _primitive(kind: str, rng: np.random.Generator) -> list[Piece]:
    def u(low: float, high: float) -> float:
        return rng.uniform(low, high)

    if kind == "ellipsoid":
        return [_ellipsoid(1, u(0.7, 1), u(0.7, 1))]
    if kind == "box":
        return [_box(1, u(0.6, 1), u(0.5, 1))]
    if kind == "cylinder":
        return [_frustum(r := u(0.4, 0.7), r, 1)]
    if kind == "cone":
        return [_frustum(u(0.6, 0.9), 0, 1)]
    if kind == "torus":
        return [_torus(1, u(0.2, 0.4))]
    return [_box(s := u(0.3, 0.45), s, 1), *(_box(s, 0.4, s, at=(0, y, 0)) for y in (s + 0.4, -s - 0.4))]  # cross


def _lamp(u: Callable[[float, float], float]) -> list[Piece]:
    r, wide = u(0.35, 0.55), u(0.4, 0.6)
    return [
        _frustum(r, r, 0.06, at=(0, 0, -1), part=0),
        _frustum(0.06, 0.06, 0.75, at=(0, 0, -0.2), part=1),
        _frustum(wide, wide * u(0.4, 0.7), 0.3, caps=False, at=(0, 0, 0.75), part=2),
    ]


def _table(u: Callable[[float, float], float]) -> list[Piece]:
    a, b, h, w = u(0.7, 1), u(0.5, 0.9), u(0.35, 0.6), u(0.05, 0.1)
    legs = [_box(w, w, h, at=(x * (a - w), y * (b - w), -h), part=1) for x in (-1, 1) for y in (-1, 1)]
    return [_box(a, b, u(0.04, 0.1), part=0), *legs]


def _mug(u: Callable[[float, float], float]) -> list[Piece]:
    r, h = u(0.5, 0.7), u(0.6, 0.8)
    handle = _torus(h * u(0.45, 0.6), u(0.06, 0.12), np.pi, at=(r, 0, 0), order=(0, 2, 1), part=1)
    return [_frustum(r, r, h, caps=False, part=0), _frustum(r, r, 0.01, at=(0, 0, -h), part=0), handle]


def _rocket(u: Callable[[float, float], float]) -> list[Piece]:
    r, h, s = u(0.2, 0.3), u(0.5, 0.7), u(0.15, 0.3)
    ways = ((1, 0), (-1, 0), (0, 1), (0, -1))
    fins = [_box(s if x else 0.03, s if y else 0.03, s, at=(x * (r + s), y * (r + s), s - h), part=2) for x, y in ways]
    return [_frustum(r, r, h, part=0), _frustum(r, 0, 0.25, caps=False, at=(0, 0, h + 0.25), part=1), *fins]


def _dumbbell(u: Callable[[float, float], float]) -> list[Piece]:
    r, t = u(0.35, 0.55), u(0.12, 0.25)
    weights = [_frustum(r, r, t, at=(z * 0.8, 0, 0), order=(2, 1, 0), part=1) for z in (-1, 1)]
    return [_frustum(0.1, 0.1, 0.8 - t, caps=False, order=(2, 1, 0), part=0), *weights]


def _mushroom(u: Callable[[float, float], float]) -> list[Piece]:
    wide, r = u(0.7, 1), u(0.18, 0.32)
    cap = [_ellipsoid(wide, wide, u(0.4, 0.7), upper=True, part=0), _frustum(wide, wide, 0.01, part=0)]
    return [*cap, _frustum(r * u(1, 1.4), r, 0.4, at=(0, 0, -0.4), part=1)]


_OBJECTS = {
    "lamp": (_lamp, ("base", "pole", "shade")),
    "table": (_table, ("top", "leg")),
    "mug": (_mug, ("body", "handle")),
    "rocket": (_rocket, ("body", "nose", "fin")),
    "dumbbell": (_dumbbell, ("bar", "weight")),
    "mushroom": (_mushroom, ("cap", "stem")),
}
CATEGORIES = tuple(_OBJECTS)
CLASSES = ("ellipsoid", "box", "cylinder", "cone", "torus", "cross", *CATEGORIES)
PARTS = tuple(f"{name} {part}" for name, (_, parts) in _OBJECTS.items() for part in parts)


def parts_of() -> list[range]:
    """The parts of each category, as positions in ``PARTS``."""
    ends = np.cumsum([0, *(len(parts) for _, parts in _OBJECTS.values())]).tolist()
    return [range(a, b) for a, b in pairwise(ends)]


def classes(split: str, index: Tensor, limits: Nuisance | None = None) -> tuple[Tensor, Tensor]:
    """Clouds of all classes, cloud i of class i mod 12.

    Args:    split: "train", "test" or "hard"; index [B] int64: positions in it; limits: default those of the split.
    Returns: points [B, 512, 3] float32 in the unit sphere, labels [B] int64.
    """
    clouds = [_cloud(split, i, CLASSES[i % len(CLASSES)], limits)[0] for i in index.tolist()]
    return torch.stack(clouds), index % len(CLASSES)


def objects(split: str, index: Tensor, limits: Nuisance | None = None) -> tuple[Tensor, Tensor]:
    """Clouds of the objects with parts, cloud i of category i mod 6; arguments as of :func:`classes`.

    Returns: points [B, 512, 4] float32, the last channel their category, and parts [B, 512] int64.
    """
    first, points, parts = parts_of(), [], []
    for i in index.tolist():
        category = i % len(CATEGORIES)
        cloud, part = _cloud(split, i, CATEGORIES[category], limits)
        points.append(torch.nn.functional.pad(cloud, (0, 1), value=float(category)))
        parts.append(part + first[category].start)
    return torch.stack(points), torch.stack(parts)


def _cloud(split: str, index: int, kind: str, limits: Nuisance | None) -> tuple[Tensor, Tensor]:
    """Points [512, 3] float32 and the part of each, counted within its object."""
    if split not in COUNTS:
        raise ValueError(f"split must be one of {tuple(COUNTS)}, got {split!r}")
    limits = (HARD if split == "hard" else USUAL) if limits is None else limits
    rng = np.random.default_rng((_SEEDS[split], index))
    pieces = _OBJECTS[kind][0](rng.uniform) if kind in _OBJECTS else _primitive(kind, rng)
    occlude = rng.uniform(0, limits.occlude)
    # Pieces by their area, small ones seen better than they should be: every part has points.
    share = np.sqrt([piece.area for piece in pieces])
    which = rng.choice(len(pieces), round(POINTS / (1 - occlude)), p=share / share.sum())
    points = np.empty((len(which), 3))
    for i, piece in enumerate(pieces):
        mine = np.flatnonzero(which == i)
        points[mine] = piece.surface(rng, len(mine))[:, piece.order] + piece.at
    part = np.array([piece.part for piece in pieces])[which]
    points *= np.exp(rng.uniform(-limits.scale, limits.scale, 3))
    points = points @ _pose(rng, limits.tilt).T
    points = normalise(points)
    # What is farthest in one direction is not seen.
    way = rng.standard_normal(3)
    seen = rng.permutation(np.argsort(points @ way, kind="stable")[:POINTS])
    points, part = points[seen], part[seen]
    points = points + rng.uniform(0, limits.noise) * rng.standard_normal(points.shape)
    off = rng.uniform(0, 1, POINTS) < rng.uniform(0, limits.outliers)
    points = points + 0.3 * off[:, None] * rng.standard_normal(points.shape)
    return torch.from_numpy(normalise(points)).float(), torch.from_numpy(part).long()


def _pose(rng: np.random.Generator, tilt: float) -> np.ndarray:
    """A turn about the vertical axis, then a tilt about a horizontal one."""
    turn, way, tilt = rng.uniform(0, 2 * np.pi), rng.uniform(0, 2 * np.pi), rng.uniform(0, tilt)
    axis = np.array((np.cos(way), np.sin(way), 0.0))
    cross = np.array(((0, 0, axis[1]), (0, 0, -axis[0]), (-axis[1], axis[0], 0)))
    tilted = np.eye(3) + np.sin(tilt) * cross + (1 - np.cos(tilt)) * cross @ cross
    c, s = np.cos(turn), np.sin(turn)
    return tilted @ np.array(((c, -s, 0), (s, c, 0), (0, 0, 1)))


def normalise(points: np.ndarray) -> np.ndarray:
    """[N, 3] with their mean at the origin and the farthest at distance 1; a single place becomes the origin."""
    points = points - points.mean(0)
    radius = np.sqrt((points**2).sum(1).max())
    return points / radius if radius > 0 else points


def strengthened(share: float) -> Nuisance:
    """``share`` of the usual limits, for a training that begins with clean clouds."""
    return replace(USUAL, **{name: share * value for name, value in vars(USUAL).items()})
