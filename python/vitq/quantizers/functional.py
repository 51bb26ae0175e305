"""The numerics contract of the integer kernels, differentiable: straight-through rounding, scales factored out.

Every function computes what ``vitq_kernels.ops.*.ref`` computes, on integer-valued floats, in the same order. Codes
are *centred*: they hold ``q − zero_point``, which is what enters an integer product.

Where no gradient is recorded, what feeds a rounding comes from ``vitq_kernels.ops.float_stages`` of the current back
end: the simulated codes then are those of the integer model on that back end, every one.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from vitq_kernels.ops import float_stages

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


class _Codes(torch.autograd.Function):
    """rne(clamp(x·(1/scale), qmin − z, qmax − z)), with its gradient in as few operators as there are: on a GPU the
    time of a learning step is that of launching them."""

    @staticmethod
    def forward(ctx, x: Tensor, scale: Tensor, zero_point: Tensor | float, qmin: int, qmax: int) -> Tensor:
        inverse = 1.0 / scale
        ratio = x * inverse
        clamped = ratio.clamp(qmin - zero_point, qmax - zero_point)
        ctx.save_for_backward(ratio, inverse, clamped == ratio)
        return clamped.round_()

    @staticmethod
    def backward(ctx, grad: Tensor) -> tuple[Tensor | None, ...]:
        ratio, inverse, inside = ctx.saved_tensors
        passed = grad * inside
        of_x = passed * inverse if ctx.needs_input_grad[0] else None
        of_scale = of_zero = None
        if ctx.needs_input_grad[1]:
            of_scale = (passed * ratio).sum_to_size(inverse.shape) * -inverse
        if ctx.needs_input_grad[2]:
            of_zero = (passed - grad).sum().reshape(1)
        return of_x, of_scale, of_zero, None, None


def look_up(table: Tensor, index: Tensor) -> Tensor:
    """table[index] of an integer-valued float ``index``; on a CPU in a seventh of the time of table[index.long()]."""
    return table.index_select(0, index.int().reshape(-1)).view_as(index)


class _Snap(torch.autograd.Function):
    @staticmethod
    def forward(ctx, code: Tensor, lut: Tensor) -> Tensor:
        return look_up(lut.to(code.dtype), code + 128.0)

    @staticmethod
    def backward(ctx, grad: Tensor) -> tuple[Tensor, None]:
        return grad, None


def integer_product(a: Tensor, b: Tensor, limit_a: float, limit_b: float) -> Tensor:
    """Σ_k a[..., m, k]·b[..., n, k] of integer-valued floats, exact in float32 but for gradients.

    Args:
        limit_a, limit_b: largest magnitudes that the formats of a and b allow.

    Numerics: every partial sum is bounded by K·limit_a·limit_b and by the product of the rows' norms
        (Cauchy-Schwarz); where one of these is below 2^24 float32 is exact in any order of summation, else the sum
        runs in float64. Where it is differentiated, an error of one part in 2^24 matters to nobody.
    """
    exact = a.shape[-1] * limit_a * limit_b <= EXACT_IN_FLOAT32
    exact |= torch.is_grad_enabled() and (a.requires_grad or b.requires_grad)
    if not exact and a.numel() and b.numel():
        with torch.no_grad():
            norms = a.norm(dim=-1).amax() * b.norm(dim=-1).amax()
        # The norms are themselves rounded; one part in 10^4 covers it.
        exact = float(norms) * 1.0001 <= EXACT_IN_FLOAT32
    if exact or a.dtype == torch.float64:
        return a @ b.transpose(-1, -2)
    return (a.double() @ b.double().transpose(-1, -2)).float()


def arithmetic() -> tuple[Callable, Callable]:
    """mul(a, b) and add(a, b) of a tensor that nothing else refers to: in place where no gradient is recorded."""
    return (torch.mul, torch.add) if torch.is_grad_enabled() else (Tensor.mul_, Tensor.add_)


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


def project(x: Tensor, lora_down: Tensor) -> Tensor:
    """t = x·Dᵀ of rows [M, K] and D [R, K]."""
    return x @ lora_down.T if torch.is_grad_enabled() else float_stages.project(x, lora_down)


def expand(t: Tensor, basis: Tensor) -> Tensor:
    """t·B of t [M, R] and B [R, N]."""
    return t @ basis if torch.is_grad_enabled() else float_stages.expand(t, basis)


def dynamic_scale(x: Tensor, qmax: Tensor | float) -> Tensor:
    """absmax/qmax over the last dimension (kept), 1 for rows of zeros; not differentiated.

    Not differentiated: with straight-through rounding the scale's gradient is the mean of rounding errors, noise.
    """
    x = x.detach()
    # On a CPU aminmax over the last dimension takes seven times as long as the two.
    absmax = torch.maximum(-x.amin(-1, keepdim=True), x.amax(-1, keepdim=True))
    scale = absmax / qmax
    return torch.where(scale == 0, torch.ones_like(scale), scale)


def quantize(
    x: Tensor,
    scale: Tensor,
    zero_point: Tensor | float,
    qmin: Tensor | int,
    qmax: Tensor | int,
    lut: Tensor | None,
) -> Tensor:
    """Centred codes: clamp(rne(x·(1/scale)), qmin − z, qmax − z), through the level table if any.

    Args: x, scale, qmin, qmax broadcast against each other; zero_point an integer (float tensor [1] or number).
    Gradients: straight through the rounding, zero to x and ±1 to scale·code outside the clamp: with the scale
        multiplied back this is LSQ (Esser et al. 2020), without its heuristic gradient factor.
    """
    # Clamping to integers before rounding gives the same codes as after it, and LSQ's gradient at the extreme ones.
    if torch.is_grad_enabled():
        code = _Codes.apply(x, scale, zero_point, qmin, qmax)
    else:
        code = (x * (1.0 / scale)).clamp_(qmin - zero_point, qmax - zero_point).round_()
    return code if lut is None else _Snap.apply(code + zero_point, lut) - zero_point


class Drop:
    """QDrop (Wei et al. 2022): elements stay float at random while something is learned.

    Args: rate: chance of each element; generator: on the CPU.
    """

    def __init__(self, rate: float, generator: torch.Generator) -> None:
        self.rate, self.generator = rate, generator

    def __call__(self, code: Tensor, exact: Tensor) -> Tensor:
        """``exact`` (what is rounded and clamped to ``code``) in its place, where drawn."""
        drawn = torch.rand(code.shape, generator=self.generator, device="cpu").to(code.device) < self.rate
        return torch.where(drawn, exact, code)


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
