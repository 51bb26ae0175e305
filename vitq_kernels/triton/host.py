"""Launching Triton kernels: where they can run, how tensors are seen as rows, and a record of what was launched."""

from __future__ import annotations

import contextlib
import importlib.util
import os
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from functools import cache
from typing import Any

import torch
from torch import Tensor

INSTALLED = importlib.util.find_spec("triton") is not None
INTERPRETED = INSTALLED and os.environ.get("TRITON_INTERPRET", "0").lower() in ("1", "true", "yes", "on", "y")
"""Triton reads the variable when a kernel is decorated, hence once per process."""

MIN_CAPABILITY = 80

_gpu: list[str | None] = []


def unavailable(device: str) -> str | None:
    """None if Triton kernels can serve ``device`` ("cuda" or "cpu"), else the reason."""
    if not INSTALLED:
        return "triton is not installed"
    if INTERPRETED:
        return None
    if device != "cuda":
        return f"runs on cuda tensors, not {device} (TRITON_INTERPRET=1 interprets its kernels on the CPU)"
    if _assumed:
        return _too_old(_assumed[-1])
    if _gpu:
        return _gpu[0]
    reason = _gpu_reason()
    if not torch.compiler.is_compiling():
        _gpu.append(reason)
    return reason


def _gpu_reason() -> str | None:
    if not torch.cuda.is_available():
        return "no CUDA device"
    if torch.compiler.is_compiling():  # tracers see no device properties; a module was resolved before it is traced
        return None
    return _too_old(_properties(torch.device("cuda", torch.cuda.current_device())))


@dataclass(frozen=True)
class Gpu:
    """What decides which kernels run: compute capability (90 for 9.0), name as the driver gives it, and streaming
    multiprocessors."""

    capability: int
    name: str
    processors: int

    @property
    def shared(self) -> int:
        """Bytes of shared memory that a program may have."""
        return 1024 * {80: 163, 87: 163, 90: 227, 100: 227, 103: 227}.get(self.capability, 99)


def _too_old(gpu: Gpu) -> str | None:
    if gpu.capability >= MIN_CAPABILITY:
        return None
    need, has = (f"{version // 10}.{version % 10}" for version in (MIN_CAPABILITY, gpu.capability))
    return f"needs compute capability {need}, {gpu.name} has {has}"


_assumed: list[Gpu] = []


@contextlib.contextmanager
def assuming(gpu: Gpu) -> Iterator[None]:
    """Every choice of a kernel inside is the one for ``gpu``, which need not be there. For one thread at a time."""
    _assumed.append(gpu)
    try:
        yield
    finally:
        _assumed.pop()


def gpu(device: torch.device) -> Gpu:
    """The properties of the CUDA ``device``, or those that are assumed for it."""
    return _assumed[-1] if _assumed else _properties(device)


def assumed() -> bool:
    """Whether kernels are chosen for a GPU that need not be there."""
    return bool(_assumed)


def name() -> str | None:
    """The current GPU's as the driver gives it, or None without one."""
    return _properties(torch.device("cuda", torch.cuda.current_device())).name if torch.cuda.is_available() else None


@cache
def _properties(device: torch.device) -> Gpu:
    found = torch.cuda.get_device_properties(device)
    return Gpu(10 * found.major + found.minor, found.name, found.multi_processor_count)


def processors(device: torch.device) -> int:
    """Streaming multiprocessors of ``device``: how many programs fill it once. 1 where kernels are interpreted."""
    return gpu(device).processors if device.type == "cuda" else 1


def shared_memory(device: torch.device) -> int:
    """Bytes of shared memory that a program on ``device`` may have; where kernels are interpreted, those of an H200."""
    return gpu(device).shared if device.type == "cuda" else 227 * 1024


_RESERVE = 1 << 16
_counters: dict[tuple[torch.device, int], Tensor] = {}
_reserve: dict[torch.device, Tensor] = {}
_captured: list[Tensor] = []
_lock = threading.Lock()


def counters(n: int, device: torch.device) -> Tensor:
    """[n] int32 zeros for a kernel that leaves them zero again.

    Calls on one stream run one after the other and share a buffer. A graph may be replayed beside anything: what it
    captures gets counters that nothing else ever uses, out of a reserve (256 KB) which calls outside of captures keep
    ready; a graph captured before any such call zeroes them itself.
    """
    if _assumed or torch.compiler.is_compiling():  # nothing runs, and what has no memory is not to be kept
        return torch.zeros(n, dtype=torch.int32, device=device)
    if device.type == "cuda" and _capturing(device):
        return _taken(n, device)
    stream = torch._C._cuda_getCurrentRawStream(device.index) if device.type == "cuda" else 0
    found = _counters.get((device, stream))
    if found is None or found.numel() < n:
        found = _counters[device, stream] = _kept_zeros(max(n, 1024), device)
    reserve = _reserve.get(device)
    if reserve is None or reserve.numel() < _RESERVE // 2:
        _reserve[device] = _kept_zeros(_RESERVE, device)
    return found[:n]


def _kept_zeros(n: int, device: torch.device) -> Tensor:
    """Zeros that outlive the call, made by another thread: this one's memory may be meant for a graph.

    torch.compile's "reduce-overhead" takes all that a thread allocates while it warms up from the pool of the graph to
    come, and nothing but outputs may be left there.
    """
    if device.type != "cuda":
        return torch.zeros(n, dtype=torch.int32, device=device)

    def make() -> Tensor:
        with torch.cuda.device(device):
            made = torch.zeros(n, dtype=torch.int32, device=device)
            torch.cuda.current_stream().synchronize()
        return made

    with ThreadPoolExecutor(1) as other:
        return other.submit(make).result()


def _capturing(device: torch.device) -> bool:
    if device.index == torch.cuda.current_device():
        return torch.cuda.is_current_stream_capturing()
    with torch.cuda.device(device):
        return torch.cuda.is_current_stream_capturing()


def _taken(n: int, device: torch.device) -> Tensor:
    """Counters that a graph keeps for itself: kept alive for as long as the process, as its replays are not known."""
    with _lock:
        reserve = _reserve.get(device)
        if reserve is None or reserve.numel() < n:
            return torch.zeros(n, dtype=torch.int32, device=device)
        _reserve[device] = reserve[n:]
        _captured.append(reserve[:n])
        return _captured[-1]


def ceil_div(a: int, b: int) -> int:
    return -(-a // b)


def power_of_2(n: int, low: int = 1, high: int = 1 << 30) -> int:
    """The least power of two that is ≥ n, within [low, high]."""
    return min(max(1 << max(n - 1, 0).bit_length(), low), high)


def dense(x: Tensor | None) -> Tensor | None:
    """``x`` contiguous, copied only where it is not."""
    return None if x is None else x.contiguous()


@dataclass(frozen=True)
class Rows:
    """A [..., K] tensor as M rows: row m starts at (m // inner)·outer_stride + (m % inner)·row_stride.

    inner and outer_stride are None where one stride serves all rows.
    """

    tensor: Tensor
    m: int
    k: int
    inner: int | None
    outer_stride: int | None
    row_stride: int
    col_stride: int

    @property
    def arguments(self) -> tuple:
        return (self.tensor, self.inner, self.outer_stride, self.row_stride, self.col_stride)


def rows_of(x: Tensor, contiguous_columns: bool = False) -> Rows:
    """``x`` as rows without a copy where at most two strides describe them (and, if asked, columns are contiguous)."""
    k = x.shape[-1]
    dims: list[tuple[int, int]] = []
    for size, stride in zip(x.shape[:-1], x.stride()[:-1]):
        if size == 1:
            continue
        if dims and dims[-1][1] == size * stride:
            dims[-1] = (dims[-1][0] * size, stride)
        else:
            dims.append((size, stride))
    m = 1
    for size in x.shape[:-1]:
        m *= size
    col_stride = x.stride(-1) if k > 1 else 1
    if m * k and (len(dims) > 2 or (contiguous_columns and col_stride != 1)):
        return rows_of(x.contiguous())
    if len(dims) == 2:
        return Rows(x, m, k, dims[1][0], dims[0][1], dims[1][1], col_stride)
    return Rows(x, m, k, None, None, dims[0][1] if dims else k, col_stride)


@dataclass(frozen=True)
class Launch:
    """One kernel launch: what ``aot`` compiles."""

    kernel: Any
    grid: tuple[int, ...]
    arguments: tuple
    options: dict = field(default_factory=dict)


_record: list[Launch] | None = None


@contextlib.contextmanager
def recorded(run: bool = True) -> Iterator[list[Launch]]:
    """Collects the launches inside; with ``run=False`` they are only collected and results stay unwritten."""
    global _record, _run
    before = (_record, _run)
    _record, _run = [], run
    try:
        yield _record
    finally:
        _record, _run = before


_run = True


def launch(kernel: Any, grid: tuple[int, ...], arguments: tuple, device: torch.device, **options) -> None:
    """``kernel[grid](*arguments)`` on ``device``, never contracting a·b + c (see ``device``)."""
    if _record is not None:
        _record.append(Launch(kernel, grid, arguments, options))
        if not _run:
            return
    if device.type == "cuda" and device.index != torch.cuda.current_device():
        with torch.cuda.device(device):
            kernel[grid](*arguments, **options, enable_fp_fusion=False)
    else:
        kernel[grid](*arguments, **options, enable_fp_fusion=False)


kernels: dict[str, Callable] = {}
"""The Triton function of every op that has one, by the op's qualified name."""


def implementation(op: str, module: str) -> Callable:
    """``ops.<module>.triton.<op>``, imported (with Triton) at its first call; noted in ``kernels``."""
    path = f"{__package__.rpartition('.')[0]}.ops.{module}.triton"
    found: list[Callable] = []

    def call(*arguments):
        if not found:
            found.append(getattr(importlib.import_module(path), op))
        return found[0](*arguments)

    kernels[f"vitq::{op}"] = call
    return call
