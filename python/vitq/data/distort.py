"""Seeded image distortions: the training augmentation and the harder test split share one function."""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor


@dataclass(frozen=True)
class Distortion:
    """Upper limits of a random distortion; each image draws its own values, uniformly.

    shift: translation along each axis, as a fraction of the image side.
    rotate: rotation either way, in degrees.
    scale: relative magnification or reduction.
    blur: standard deviation of the Gaussian blur, as a fraction of the image side.
    noise: standard deviation of the additive Gaussian noise, in units of the [0, 1] pixel range.
    """

    shift: float = 0.0
    rotate: float = 0.0
    scale: float = 0.0
    blur: float = 0.0
    noise: float = 0.0


#: What a training digit undergoes, and the augmented part of any calibration set.
TRAIN = Distortion(shift=0.08, rotate=12.0, scale=0.1, blur=0.02, noise=0.1)


def distort(images: Tensor, limits: Distortion, generator: torch.Generator) -> Tensor:
    """Move, blur and add noise to every image, then round to the 8-bit grid that real images live on.

    The arithmetic is float64 and the result is rounded to multiples of 1/255, so that a seed gives the same
    bits whatever the number of threads and, but for ties, the machine.

    Args:
        images ([N, C, H, W] floating point in [0, 1]): left untouched. Uncovered borders become 0.
        limits: the largest distortion.
        generator: CPU generator; drawn from in a fixed order.
    Returns:
        [N, C, H, W] float32 in [0, 1], multiples of 1/255.
    Raises:
        ValueError: `images` is not a floating-point [N, C, H, W] batch.
    """
    if images.ndim != 4 or not images.is_floating_point():
        raise ValueError(f"images must be floating point [N, C, H, W], got {images.dtype} {list(images.shape)}")
    n = images.shape[0]

    def draw(limit: float, count: int = 1, low: float = -1.0) -> Tensor:
        return limit * torch.empty(n, count, dtype=torch.float64).uniform_(low, 1.0, generator=generator)

    shift, angle, scale = draw(2 * limits.shift, 2), draw(limits.rotate), 1 + draw(limits.scale)
    sigma = draw(limits.blur, low=0.0)
    noise = draw(limits.noise, low=0.0)[..., None, None]
    cos, sin = angle.deg2rad().cos() / scale, angle.deg2rad().sin() / scale
    matrix = torch.stack([cos, -sin, shift[:, :1], sin, cos, shift[:, 1:]], -1).view(n, 2, 3)
    grid = F.affine_grid(matrix, list(images.shape), align_corners=False)
    out = F.grid_sample(images.double(), grid, mode="bilinear", align_corners=False)
    out = blur(out, [sigma * side for side in images.shape[2:]])
    out = out + noise * torch.randn(out.shape, dtype=torch.float64, generator=generator)
    return to_grid(out)


def to_grid(images: Tensor) -> Tensor:
    """Clamp to [0, 1] and round to multiples of 1/255. Any shape, returns float32."""
    return images.double().mul(255).round().clamp(0, 255).div(255).float()


def blur(images: Tensor, sigma: Sequence[Tensor]) -> Tensor:
    """Gaussian blur of `images` [N, C, H, W] float64, normalised at the border.

    Args: sigma: standard deviation in pixels down the columns and along the rows, [N, 1] each.
    """
    rows, columns = (_blur_matrix(side, s) for side, s in zip(images.shape[2:], sigma))
    return rows @ images @ columns.mT


def _blur_matrix(side: int, sigma: Tensor) -> Tensor:
    """[N, 1, side, side] row-stochastic Gaussian matrices for `sigma` ([N, 1], pixels): blur as a product."""
    position = torch.arange(side, dtype=torch.float64)
    square = (position[:, None] - position).square()
    # A sigma under 0.1 pixel weighs the nearest neighbour below 1e-21, that is, the identity.
    weight = torch.exp(-square / (2 * sigma.clamp(min=0.1).square()[..., None]))
    return (weight / weight.sum(-1, keepdim=True)).unsqueeze(1)
