"""The numerics contract of the integer kernels: scales factored out, products of integers.

Every function computes what ``vitq_kernels.ops.*.ref`` computes, on integer-valued floats, in the same order. Codes
are *centred*: they hold ``q − zero_point``, which is what enters an integer product.

What feeds a rounding comes from ``vitq_kernels.ops.float_stages`` of the current back end: the simulated codes then are
those of the integer model on that back end, every one. Where a gradient is recorded, that would cost much and matter to
nobody: quantizers give values there instead of codes, by ``vitq_kernels.ops.learning``.
"""

from __future__ import annotations

import torch
from torch import Tensor

from vitq_kernels.ops.learning import Dropped

EXACT_IN_FLOAT32 = float(1 << 24)


class _Round(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x: Tensor) -> Tensor:
        return x.round()

    @staticmethod
    def backward(ctx, grad: Tensor) -> Tensor:
        return grad


def round_ste(x: Tensor) -> Tensor:
    """rne(x) with the identity as gradient (x + (rne(x) − x) would not be an integer exactly)."""
    return _Round.apply(x)


def look_up(table: Tensor, index: Tensor) -> Tensor:
    """table[index] of an integer-valued float ``index``; on a CPU in a seventh of the time of table[index.long()]."""
    return table.index_select(0, index.int().reshape(-1)).view_as(index)


def _bounds(
    zero_point: Tensor | float, qmin: Tensor | int, qmax: Tensor | int
) -> tuple[Tensor | float, Tensor | float]:
    """Of centred codes, as numbers where that costs no synchronization: a CPU clamps to them four times as fast."""
    zero_point = zero_point.item() if isinstance(zero_point, Tensor) and zero_point.is_cpu else zero_point
    return qmin - zero_point, qmax - zero_point


def integer_product(a: Tensor, b: Tensor, limit_a: float, limit_b: float) -> Tensor:
    """Σ_k a[..., m, k]·b[..., n, k] of integer-valued floats, exactly.

    Args:
        limit_a, limit_b: largest magnitudes that the formats of a and b allow.

    Numerics: every partial sum is bounded by K·limit_a·limit_b and by the product of the rows' norms
        (Cauchy-Schwarz); where one of these is below 2^24 float32 is exact in any order of summation, else the sum
        runs in float64.
    """
    exact = a.shape[-1] * limit_a * limit_b <= EXACT_IN_FLOAT32
    if not exact and a.numel() and b.numel():
        norms = a.norm(dim=-1).amax() * b.norm(dim=-1).amax()
        # The norms are themselves rounded; one part in 10^4 covers it.
        exact = float(norms) * 1.0001 <= EXACT_IN_FLOAT32
    if exact or a.dtype == torch.float64:
        return a @ b.transpose(-1, -2)
    return (a.double() @ b.double().transpose(-1, -2)).float()


class _Half(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x: Tensor) -> Tensor:
        return x.half().to(x.dtype)

    @staticmethod
    def backward(ctx, grad: Tensor) -> Tensor:
        return grad


def half_ste(x: Tensor) -> Tensor:
    """x on the grid of float16, in its own dtype, with the identity as gradient."""
    return _Half.apply(x)


def dynamic_scale(x: Tensor, qmax: Tensor | float) -> Tensor:
    """absmax/qmax over the last dimension (kept), 1 for rows of zeros; not differentiated.

    Not differentiated: with straight-through rounding the scale's gradient is the mean of rounding errors, noise.
    """
    x = x.detach()
    # On a CPU aminmax over the last dimension takes seven times as long as the two.
    absmax = torch.maximum(-x.amin(-1, keepdim=True), x.amax(-1, keepdim=True))
    scale = absmax / qmax
    return torch.where(scale == 0, torch.ones_like(scale), scale)


class Drop:
    """QDrop (Wei et al. 2022): elements stay float at random while something is learned.

    Args: rate: chance of each element; generator: on the CPU.
    """

    def __init__(self, rate: float, generator: torch.Generator) -> None:
        self.rate, self.generator = rate, generator

    def __call__(self) -> Dropped:
        """What stays float in one pass, drawn anew."""
        key = torch.empty((), dtype=torch.int64, device="cpu").random_(2**63 - 1, generator=self.generator)
        return Dropped(int(key), self.rate)


def quantize(
    x: Tensor,
    scale: Tensor,
    zero_point: Tensor | float,
    qmin: Tensor | int,
    qmax: Tensor | int,
    lut: Tensor | None,
) -> Tensor:
    """Centred codes: clamp(rne(x·(1/scale)), qmin − z, qmax − z), through the level table if any; not differentiable.

    Args: x, scale, qmin, qmax: broadcast against each other. zero_point: an integer (float tensor [1] or number).
    """
    # Clamping to integers before rounding gives the same codes as after it.
    code = (x * (1.0 / scale)).clamp_(*_bounds(zero_point, qmin, qmax)).round_()
    return code if lut is None else look_up(lut.to(code.dtype), code + (zero_point + 128.0)) - zero_point


def focus_position(u: Tensor, b1: Tensor, b2: Tensor, power: float, n: int) -> Tensor:
    """Where u in [0, 1] lies among the codes 0..n: n·clamp((u − b1)/(b2 − b1), 0, 1)^(1/power).

    ``b1`` and ``b2`` are float64 scalars: the kernel's reciprocal is taken in float64 and rounded once.
    """
    x = (u - b1) * (1.0 / (b2 - b1))
    if power == 1.0:
        x = x.clamp(0.0, 1.0)
    else:
        # A floor of 1e-30 leaves code 0 a 0 (n·1e-30^(1/power) < ½ for power < 12) and the root differentiable.
        x = x.clamp(1e-30, 1.0)
        x = x.sqrt() if power == 2.0 else x.pow(1.0 / power)
    return x * n
