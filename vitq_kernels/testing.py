"""What a test of a kernel needs: bounds that are derived, comparisons that print the coordinate, dirty memory.

Public: use it on back ends of your own. Nothing here is imported by the package itself.
"""

from __future__ import annotations

import contextlib
import ctypes
from collections.abc import Iterator

import torch
from torch import Tensor

from . import _native

ROUNDOFF = {torch.float64: 2.0**-53, torch.float32: 2.0**-24, torch.float16: 2.0**-11, torch.bfloat16: 2.0**-8}
"""u of each dtype: one operation, rounded to nearest, has relative error at most u."""


def gamma(operations: int, dtype: torch.dtype = torch.float32) -> float:
    """γ_n = n·u / (1 − n·u): relative error bound of n roundings in a row."""
    nu = operations * ROUNDOFF[dtype]
    return nu / (1.0 - nu)


def _first_bad(bad: Tensor) -> tuple[int, ...]:
    return tuple(int(i) for i in bad.nonzero()[0])


def assert_within(actual: Tensor, exact: Tensor, bound: Tensor | float, name: str = "result") -> None:
    """|actual − exact| ≤ bound element by element; NaN and ±Inf must match exactly.

    Args:     actual: any float dtype; exact, bound: float64 (bound broadcasts).
    Raises:   AssertionError with the number of bad elements and the first bad coordinate.
    """
    actual, exact = actual.double(), exact.double()
    if actual.shape != exact.shape:
        raise AssertionError(f"{name} has shape {tuple(actual.shape)}, expected {tuple(exact.shape)}")
    bound = torch.as_tensor(bound, dtype=torch.float64).expand(exact.shape)
    error = (actual - exact).abs()
    same = (actual == exact) | (actual.isnan() & exact.isnan())
    bad = ~(same | (error <= bound))
    if bad.any():
        at = _first_bad(bad)
        raise AssertionError(
            f"{name}: {int(bad.sum())} of {bad.numel()} elements off; first at {at}: {actual[at].item():.9g}, "
            f"expected {exact[at].item():.9g} ± {bound[at].item():.3g}"
        )


def assert_codes_match(
    codes: Tensor,
    exact: Tensor,
    tolerance: Tensor | float,
    low: Tensor | float,
    high: Tensor | float,
    zero_point: int = 0,
) -> None:
    """codes = clamp(rne(exact), low, high) + zero_point, or another one that lies within ``tolerance`` of ``exact``.

    That is ±1 where ``exact`` is within ``tolerance`` of a tie; more only where the tolerance itself exceeds a code, as
    for a residual that is nothing but rounding error.

    Args:     codes: int8; exact: float64 x/scale before rounding; tolerance: rounding error of that quotient, in code
              units (broadcasts). NaN in ``exact`` stands for code 0.
    Raises:   AssertionError with the number of bad codes and the first bad coordinate.
    """
    exact = torch.nan_to_num(exact.double(), nan=0.0, posinf=1e30, neginf=-1e30)
    if codes.shape != exact.shape:
        raise AssertionError(f"codes have shape {tuple(codes.shape)}, expected {tuple(exact.shape)}")
    low = torch.as_tensor(low, dtype=torch.float64)
    high = torch.as_tensor(high, dtype=torch.float64)
    inside = torch.minimum(torch.maximum(exact, low - 1), high + 1)  # far outside, no tolerance is in play
    expected = torch.minimum(torch.maximum(torch.round(inside), low), high) + zero_point
    tolerance = torch.as_tensor(tolerance, dtype=torch.float64).expand(exact.shape)
    least, most = (
        torch.minimum(torch.maximum(torch.round(bound), low), high) + zero_point
        for bound in (exact - tolerance, exact + tolerance)
    )
    bad = (codes < least) | (codes > most)
    if bad.any():
        at = _first_bad(bad)
        raise AssertionError(
            f"{int(bad.sum())} of {bad.numel()} codes off; first at {at}: {int(codes[at])}, expected "
            f"{int(expected[at])} (exact {exact[at].item():.9g}, tolerance {tolerance[at].item():.3g})"
        )


def isas() -> tuple[str, ...]:
    """Instruction sets of the C++ kernels that this machine runs, weakest first; () without the extension."""
    extension = _native.extension()
    return () if extension is None else tuple(extension.available_isas())


@contextlib.contextmanager
def cpu_isa(name: str) -> Iterator[None]:
    """Run the C++ kernels on one instruction set: ``with cpu_isa("avx2"): ...``."""
    extension = _native.extension()
    if extension is None:
        raise RuntimeError(f"cpu_isa({name!r}): {_native.unavailable('cpu')}")
    before = extension.cpu_isa()
    extension.set_cpu_isa(name)
    try:
        yield
    finally:
        extension.set_cpu_isa(before)


@contextlib.contextmanager
def poison(byte: int) -> Iterator[None]:
    """Every allocation starts out as this byte repeated (glibc), so that unwritten results show.

    Run a kernel under two different bytes and compare: results that differ were never written, or depend on memory that
    was not.
    """
    if not 0 <= byte <= 254:
        raise ValueError(f"byte is {byte}, expected an int in [0, 254]")
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
    if mallopt is None:
        raise RuntimeError("poison needs glibc's mallopt")
    perturb = -6  # M_PERTURB: new memory holds the complement of the low byte
    mallopt(perturb, byte ^ 0xFF)
    try:
        yield
    finally:
        mallopt(perturb, 0)
