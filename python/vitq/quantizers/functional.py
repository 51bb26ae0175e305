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
    def forward(ctx, x: Tensor, kept: Tensor | None) -> Tensor:
        return x.round() if kept is None else torch.lerp(x, x.round(), kept)

    @staticmethod
    def backward(ctx, grad: Tensor) -> tuple[Tensor, None]:
        return grad, None


def round_ste(x: Tensor, kept: Tensor | None = None) -> Tensor:
    """rne(x) with the identity as gradient (x + (rne(x) − x) would not be an integer exactly).

    Args: kept: 1 where x is rounded and 0 where it stays, None for 1.
    """
    return _Round.apply(x, kept)


class _Codes(torch.autograd.Function):
    """What :func:`quantize` says, with its gradient in as few operators as there are: on a GPU the time of a learning
    step is that of launching them, on a CPU that of passing over memory.

    ``lerp`` at weights 0 and 1 is exact, and on a CPU takes a sixth of the time of ``where``; masks are floats, since
    there a product with booleans takes six times that of a product.
    """

    @staticmethod
    def forward(
        ctx,
        x: Tensor,
        scale: Tensor,
        zero_point: Tensor | float,
        qmin: Tensor | int,
        qmax: Tensor | int,
        lut: Tensor | None,
        kept: Tensor | None,
    ) -> Tensor:
        inverse = 1.0 / scale
        ratio = x * inverse
        code = ratio.clamp(*_bounds(zero_point, qmin, qmax))
        passed = code if kept is None else torch.lerp(ratio, code, kept)
        ctx.save_for_backward(ratio, inverse, torch.eq(passed, ratio, out=torch.empty_like(ratio)))
        code = snap(code.round_(), zero_point, lut)
        return code if kept is None else torch.lerp(ratio, code, kept)

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
        return of_x, of_scale, of_zero, None, None, None, None


def look_up(table: Tensor, index: Tensor) -> Tensor:
    """table[index] of an integer-valued float ``index``; on a CPU in a seventh of the time of table[index.long()]."""
    return table.index_select(0, index.int().reshape(-1)).view_as(index)


def _bounds(
    zero_point: Tensor | float, qmin: Tensor | int, qmax: Tensor | int
) -> tuple[Tensor | float, Tensor | float]:
    """Of centred codes, as numbers where that costs no synchronization: a CPU clamps to them four times as fast."""
    zero_point = zero_point.item() if isinstance(zero_point, Tensor) and zero_point.is_cpu else zero_point
    return qmin - zero_point, qmax - zero_point


def snap(code: Tensor, zero_point: Tensor | float, lut: Tensor | None) -> Tensor:
    """Centred codes by way of a level table, if any."""
    return code if lut is None else look_up(lut.to(code.dtype), code + (zero_point + 128.0)) - zero_point


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


class Drop:
    """QDrop (Wei et al. 2022): elements stay float at random while something is learned.

    Args: rate: chance of each element, taken to one part in 65536; generator: on the CPU.
    """

    def __init__(self, rate: float, generator: torch.Generator) -> None:
        self.generator = generator
        self._last = max(0, round(rate * 2**16) - 1) - 2**15

    def __call__(self, x: Tensor) -> Tensor:
        """1 where x is to be quantized and 0 where it is to stay, drawn anew."""
        # Four to a draw of 64 bits; torch.rand takes three times as long.
        words = torch.empty(-(-x.numel() // 4), dtype=torch.int64, device="cpu")
        drawn = words.random_(-(2**63), None, generator=self.generator).view(torch.int16)[: x.numel()]
        return torch.gt(drawn.to(x.device).view(x.shape), self._last, out=x.new_empty(x.shape))


def quantize(
    x: Tensor,
    scale: Tensor,
    zero_point: Tensor | float,
    qmin: Tensor | int,
    qmax: Tensor | int,
    lut: Tensor | None,
    drop: Drop | None = None,
) -> Tensor:
    """Centred codes: clamp(rne(x·(1/scale)), qmin − z, qmax − z), through the level table if any.

    Args:
        x, scale, qmin, qmax: broadcast against each other. zero_point: an integer (float tensor [1] or number).
        drop: draws, where gradients are recorded, the elements that are x/scale instead.
    Gradients: straight through the rounding and the table, zero to x and ±1 to scale·code outside the clamp: with the
        scale multiplied back this is LSQ (Esser et al. 2020), without its heuristic gradient factor.
    """
    # Clamping to integers before rounding gives the same codes as after it, and LSQ's gradient at the extreme ones.
    if torch.is_grad_enabled():
        return _Codes.apply(x, scale, zero_point, qmin, qmax, lut, None if drop is None else drop(x))
    return snap((x * (1.0 / scale)).clamp_(*_bounds(zero_point, qmin, qmax)).round_(), zero_point, lut)


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
