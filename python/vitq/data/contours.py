"""Textured figures on cluttered ground: 40 classes of rendered images, each a function of its split and index.

A class is a contour together with a fill. The ten contours are closed curves with fixed Fourier descriptors, in five
pairs of near ones; the four fills are coarse and fine stripes, checks and rings. What else an image shows is nuisance:
pose, shear, deformation, colours, contrast, clutter and strokes, an occluding disc, uneven light, blur, noise.
Near contours overlap under deformation and faint fills drown in noise, so that trained float models err on some images
and come close to it on many: quantization then moves top-1, which on the digits it hardly does.

Every image is drawn from a generator of its own. Any selection costs only itself, and the training split is the
beginning of an endless stream. The arithmetic is float64 and the result rounded to the 8-bit grid, as in `distort`.
"""

from __future__ import annotations

from dataclasses import dataclass, fields, replace

import torch
from torch import Tensor

from .bundled import SIZE, Bundled
from .distort import blur, to_grid

#: Of the pixels, by channel, as a model trained on them expects to be told.
MEAN, STD = (0.5, 0.5, 0.5), (0.22, 0.22, 0.22)
#: Images by split. `hard` shows the scenes of `test` under stronger nuisances.
COUNTS = {"train": 50_000, "test": 2_000, "hard": 2_000}

CONTOURS, FILLS = 10, 4
CLASSES = CONTOURS * FILLS

_ORDERS = range(2, 7)
#: Generators tell seeds apart by 32 bits.
_FIRST_SEED = {"train": 0, "test": 1 << 31, "hard": 1 << 31}
_DRAWS = 64


@dataclass(frozen=True)
class Nuisance:
    """Strength of what does not belong to the class; each image draws its own values, uniformly up to these limits.

    shift: of the figure along each axis; scale: of its size, relative; rotate: either way, in radians; shear: slope;
    deform: of the real and the imaginary part of every Fourier descriptor; clutter: amplitude of the ground's waves;
    stroke: half width of the two strokes; occlude: radius of the disc; light: slope of the illumination; blur:
    standard deviation in pixels; noise: standard deviation; phase: of the fill's waves, in radians; fade: of the least
    contrast of figure and fill, 1 / (1 + fade) is left.
    Lengths are in units of half the image, intensities of the [0, 1] pixel range.
    """

    shift: float = 0.085
    scale: float = 0.1
    rotate: float = 0.17
    shear: float = 0.1
    deform: float = 0.025
    clutter: float = 0.07
    stroke: float = 0.05
    occlude: float = 0.25
    light: float = 0.25
    blur: float = 0.75
    noise: float = 0.07
    phase: float = 0.4
    fade: float = 0.85

    @property
    def remains(self) -> float:
        """Of the least contrast, at full fade."""
        return 1 / (1 + self.fade)

    def times(self, factor: float) -> Nuisance:
        """All limits multiplied by `factor`."""
        return replace(self, **{f.name: factor * getattr(self, f.name) for f in fields(self)})


CLEAN = Nuisance()
HARD = CLEAN.times(1.5)


def images(split: str, index: Tensor, limits: Nuisance | None = None) -> tuple[Tensor, Tensor]:
    """The images of `split` at any positions; those of "train" go on beyond its nominal length.

    Args:
        split: "train", "test" or "hard".
        index ([N] int64): positions from 0 to 2³¹ − 1; class i % 40 stands at position i.
        limits: other nuisances than the split's.
    Returns:
        Images [N, 3, 32, 32] float32 in [0, 1], multiples of 1/255, and labels [N] int64.
    """
    limits = limits or (HARD if split == "hard" else CLEAN)
    batches = [_batch(split, part, limits) for part in index.split(64)]  # more at a time is slower: the cache
    return torch.cat(batches), index % CLASSES


CONTOUR_SET = Bundled("contours", COUNTS, CLASSES, images)


def _batch(split: str, index: Tensor, limits: Nuisance) -> Tensor:
    """Images [N, 3, 32, 32] of few positions [N]."""
    uniform = torch.empty(len(index), _DRAWS, dtype=torch.float64)
    normal = torch.empty(len(index), 3, SIZE, SIZE, dtype=torch.float64)
    for i, position in enumerate(index.tolist()):
        generator = torch.Generator().manual_seed(_FIRST_SEED[split] + position)
        uniform[i].uniform_(generator=generator)
        normal[i].normal_(generator=generator)
    return _render(index % CLASSES, uniform, normal, limits)


def descriptors() -> Tensor:
    """Fourier descriptors [10, 5] complex128 of the contours r(θ) = 1 + Σ_k Re(c_k e^{ikθ}), k = 2..6.

    Contours 2j and 2j + 1 are near each other.
    """
    generator = torch.Generator().manual_seed(40)
    order = torch.tensor(list(_ORDERS), dtype=torch.float64)

    def directions() -> Tensor:
        return torch.randn(CONTOURS // 2, len(order), dtype=torch.complex128, generator=generator)

    base, away = directions() / order.sqrt(), directions()
    base = 0.4 * base / base.abs().square().sum(1, keepdim=True).sqrt()
    away = 0.09 * away / away.abs().square().sum(1, keepdim=True).sqrt()
    return torch.stack([base - away, base + away], 1).flatten(0, 1)


def _render(labels: Tensor, uniform: Tensor, normal: Tensor, limits: Nuisance) -> Tensor:
    """Images [N, 3, S, S] of `labels` [N] from `uniform` [N, 64] in [0, 1) and standard `normal` [N, 3, S, S]."""
    columns = iter(uniform.unbind(1))

    def draw(low: float = -1.0, high: float = 1.0) -> Tensor:
        return (low + (high - low) * next(columns))[:, None, None]

    def turn() -> Tensor:
        return draw(0.0, 2 * torch.pi)

    def colour(low: float, high: float) -> Tensor:
        return torch.stack([draw(low, high) for _ in range(3)], 1)

    axis = (torch.arange(SIZE, dtype=torch.float64) + 0.5) * (2 / SIZE) - 1
    x, y = axis[None, None, :], axis[None, :, None]

    # Ground: a colour and two waves.
    ground = colour(0.15, 0.55)
    for _ in range(2):
        angle, frequency = turn(), draw(1.0, 9.0)
        wave = torch.cos(frequency * (angle.cos() * x + angle.sin() * y) + turn())
        ground = ground + (limits.clutter * draw(0.0) * wave)[:, None]

    # Figure: its own coordinates (u, v), inside where the radius is below the contour's.
    fill, contour = labels % FILLS, labels // FILLS
    centre = [limits.shift * draw() for _ in range(2)]
    radius, angle = 0.58 * (1 + limits.scale * draw(-1.0, 0.5)), limits.rotate * draw()
    dx, dy = x - centre[0], y - centre[1]
    u, v = (angle.cos() * dx + angle.sin() * dy) / radius, (angle.cos() * dy - angle.sin() * dx) / radius
    u = u + limits.shear * draw() * v
    rho = torch.hypot(u, v)
    phasor = torch.complex(u, v) / rho
    edge, power = torch.ones_like(rho), phasor
    for coefficient in descriptors()[contour].unbind(1):
        power = power * phasor
        jitter = torch.complex(limits.deform * draw(), limits.deform * draw())
        edge = edge + ((coefficient[:, None, None] + jitter) * power).real
    inside = _coverage((edge - rho) * radius)

    def of_fill(*values: float) -> Tensor:
        return torch.tensor(values, dtype=torch.float64)[fill][:, None, None]

    along = torch.where(of_fill(0, 0, 0, 1) > 0, rho, u)
    frequency = 2 * torch.pi * of_fill(1.1, 1.8, 1.25, 1.4)
    texture = torch.cos(frequency * along + limits.phase * draw())
    texture = texture * torch.where(of_fill(0, 0, 1, 0) > 0, torch.cos(frequency * v + limits.phase * draw()), 1.0)
    # Figures are brighter than the ground: a model finds them before it knows anything else, which saves training.
    contrast = draw(0.3 * limits.remains, 0.4) + draw(0.25 * limits.remains, 0.35) * torch.tanh(2 * texture)
    figure = ground.mean((2, 3), keepdim=True) + colour(-0.12, 0.12) + contrast[:, None]
    image = torch.lerp(ground, figure, inside[:, None])

    # Before the figure: two strokes, a disc at its rim.
    for _ in range(2):
        px, py, angle, length = draw(), draw(), turn(), draw(0.3, 0.8)
        s = ((x - px) * angle.cos() + (y - py) * angle.sin()).clamp(-length, length)
        distance = torch.hypot(x - px - s * angle.cos(), y - py - s * angle.sin())
        image = torch.lerp(image, colour(0.1, 0.9), _coverage(limits.stroke * draw(0.2) - distance)[:, None])
    angle = turn()
    distance = torch.hypot(dx - radius * angle.cos(), dy - radius * angle.sin())
    image = torch.lerp(image, colour(0.1, 0.9), _coverage(limits.occlude * draw(0.2) - distance)[:, None])

    angle = turn()
    image = image * (1 + limits.light * draw(0.0) * (angle.cos() * x + angle.sin() * y))[:, None]
    image = blur(image, [limits.blur * draw(0.0)[:, 0]] * 2)
    return to_grid(image + limits.noise * draw(0.3)[:, None] * normal)


def _coverage(distance: Tensor) -> Tensor:
    """Share of a pixel that lies inside, from the signed distance of its centre to the edge (half image = 1)."""
    return (distance * (SIZE / 2) + 0.5).clamp(0, 1)
