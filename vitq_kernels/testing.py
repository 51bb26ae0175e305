"""What a test of a kernel needs: bounds that are derived, comparisons that print the coordinate, dirty memory.

Public: use it on back ends of your own. Nothing here is imported by the package itself.
"""

from __future__ import annotations

import contextlib
import ctypes
from collections.abc import Callable, Iterator
from dataclasses import replace

import torch
from torch import Tensor

from . import _native, backends

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
    bound = torch.as_tensor(bound, dtype=torch.float64, device=exact.device).expand(exact.shape)
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
    low, high, tolerance = (
        torch.as_tensor(x, dtype=torch.float64, device=exact.device) for x in (low, high, tolerance)
    )
    inside = torch.minimum(torch.maximum(exact, low - 1), high + 1)  # far outside, no tolerance is in play
    expected = torch.minimum(torch.maximum(torch.round(inside), low), high) + zero_point
    tolerance = tolerance.expand(exact.shape)
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


@contextlib.contextmanager
def offloaded(device: str, backend: str = "triton") -> Iterator[None]:
    """Inside, ``backend`` runs on ``device`` for tensors of any: tests on CPU tensors try a GPU.

    Arguments are copied as they lie, with their strides, gaps and misalignment, and results to where arguments were.
    Each call runs twice: with outputs whose memory held NaN (the largest value, for integers), and on a stream of its
    own.

    Raises: AssertionError where the two runs differ in a bit, with the op, the result and the first coordinate.
    """
    rows = {op: row[backend] for op, row in backends.table().items() if backend in row}
    for op, found in rows.items():
        backends.replace(op, replace(found, fn=_remote(op, found.fn, device), unavailable=lambda _: None))
    try:
        yield
    finally:
        for op, found in rows.items():
            backends.replace(op, found)


def _remote(op: str, fn: Callable, device: str) -> Callable:
    def call(*arguments):
        home = next(x.device for x in arguments if isinstance(x, Tensor))
        moved = [_move(x, device) if isinstance(x, Tensor) else x for x in arguments]
        deterministic = torch.are_deterministic_algorithms_enabled()
        torch.use_deterministic_algorithms(True, warn_only=True)  # fills what is allocated
        try:
            result = fn(*moved)
        finally:
            torch.use_deterministic_algorithms(deterministic)
        if device == "cpu":
            again = fn(*moved)
        else:
            torch.cuda.synchronize()
            with torch.cuda.stream(torch.cuda.Stream()):
                again = fn(*moved)
            torch.cuda.synchronize()
        alone = isinstance(result, Tensor)
        for i, (a, b) in enumerate(zip((result,) if alone else result, (again,) if alone else again, strict=True)):
            _assert_same_bits(a, b, f"result {i} of {op}")
        return result.to(home) if alone else tuple(x.to(home) for x in result)

    return call


def _move(x: Tensor, device: str) -> Tensor:
    """A copy with the strides and the offset of ``x``."""
    storage = torch.empty(0, dtype=x.dtype, device=x.device).set_(x.untyped_storage())
    return storage.to(device).as_strided(x.shape, x.stride(), x.storage_offset())


def _assert_same_bits(a: Tensor, b: Tensor, name: str) -> None:
    bits = {1: torch.int8, 2: torch.int16, 4: torch.int32}[a.element_size()]
    differ = a.contiguous().view(bits) != b.contiguous().view(bits)
    if differ.any():
        at = _first_bad(differ)
        raise AssertionError(
            f"{name}: {int(differ.sum())} of {differ.numel()} elements differ between two runs; first at {at}: "
            f"{a[at].item()}, then {b[at].item()}"
        )
