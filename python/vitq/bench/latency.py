"""Timing and memory of whole models, side by side."""

from __future__ import annotations

import contextlib
import statistics
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
from torch import Tensor, nn

from vitq_kernels import graphs


@dataclass(frozen=True)
class Timing:
    """Milliseconds per call: median, 20th and 80th percentile over ``calls``."""

    median: float
    p20: float
    p80: float
    calls: int

    @classmethod
    def of(cls, samples: list[float]) -> Timing:
        """Of at least two samples."""
        p20, *_, p80 = statistics.quantiles(samples, n=5, method="inclusive")
        return cls(statistics.median(samples), p20, p80, len(samples))

    def record(self) -> dict[str, float]:
        return asdict(self)


@contextlib.contextmanager
def threads(n: int) -> Iterator[None]:
    """torch's intra-op threads inside the block."""
    if n < 1:
        raise ValueError(f"threads is {n}, expected at least 1")
    before = torch.get_num_threads()
    torch.set_num_threads(n)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def interleave(
    calls: dict[str, Callable[[], object]], seconds: float = 2.0, most: int = 200, turn: float = 0.0
) -> dict[str, list[float]]:
    """Milliseconds of several callables in turn, A B C A B C …, so that drift of the machine meets all of them alike.

    Args:     calls: name → callable; seconds: about how long each may take in all; most: at most this many rounds.
              turn: seconds that one callable goes on before the next: callables with thread pools of their own disturb
              whoever comes right after them. A turn's first call is not counted, its sample the median of the others.
    Returns:  name → a sample per round. The first round warms up and is not counted.
    """
    samples: dict[str, list[float]] = {name: [] for name in calls}
    for call in calls.values():
        call()
    deadline = time.perf_counter() + seconds * len(calls)
    while True:
        for name, call in calls.items():
            samples[name].append(_turn(call, turn))
        rounds = len(next(iter(samples.values())))
        if rounds >= most or (rounds >= 5 and time.perf_counter() > deadline):
            return samples


def _turn(call: Callable[[], object], seconds: float) -> float:
    """Milliseconds per call."""
    if seconds:
        call()
    times, start = [], time.perf_counter()
    deadline = start + seconds
    while True:
        call()
        end = time.perf_counter()
        times.append((end - start) * 1e3)
        if end >= deadline:
            return statistics.median(times)
        start = end


def compare(calls: dict[str, Callable[[], object]], seconds: float = 2.0, most: int = 200) -> dict[str, Timing]:
    """Name → Timing of callables that take turns (see :func:`interleave`)."""
    return {name: Timing.of(values) for name, values in interleave(calls, seconds, most).items()}


def peak_memory(call: Callable[[], object]) -> int | None:
    """Bytes by which the resident set peaks above its level before ``call``; None where the system cannot say."""
    clear, status = Path("/proc/self/clear_refs"), Path("/proc/self/status")
    if not status.exists():
        return None
    try:
        clear.write_text("5")  # resets the high-water mark
    except OSError:
        return None
    before = _status_kib(status, "VmRSS")
    call()
    return max(0, _status_kib(status, "VmHWM") - before) * 1024


def _timed(model: nn.Module, images: Tensor) -> Callable[[], object]:
    """A call that lasts until its result is there: on a GPU, of models that return one tensor, a replayed CUDA graph,
    as they are served."""
    if images.device.type != "cuda":
        return lambda: model(images)
    run = graphs.capture(model, images, (len(images),)) if isinstance(model(images), Tensor) else model

    def call() -> None:
        run(images)
        torch.cuda.synchronize(images.device)

    return call


def _peak(model: nn.Module, images: Tensor) -> int | None:
    """Bytes in use at most in a call, beyond those before it."""
    if images.device.type != "cuda":
        return peak_memory(lambda: model(images))
    model(images)
    torch.cuda.reset_peak_memory_stats(images.device)
    before = torch.cuda.memory_allocated(images.device)
    model(images)
    return torch.cuda.max_memory_allocated(images.device) - before


def _status_kib(status: Path, key: str) -> int:
    line = next(x for x in status.read_text().splitlines() if x.startswith(key + ":"))
    return int(line.split()[1])


def tensor_bytes(model: nn.Module) -> int:
    """Bytes of all distinct parameters and buffers."""
    seen: dict[int, int] = {}
    for tensor in [*model.parameters(), *model.buffers()]:
        seen[tensor.data_ptr()] = tensor.numel() * tensor.element_size()
    return sum(seen.values())


def compare_models(models: dict[str, nn.Module], images: Tensor, n_threads: int, seconds: float = 2.0) -> list[dict]:
    """One row per model on one batch: latency, throughput, memory, size, and the ratio to the first model.

    Args:     models: name → module in eval mode, the baseline first; images [B, C, H, W], where the models are;
              n_threads; seconds as in compare.
    Returns:  rows of plain JSON values.
    """
    with torch.inference_mode(), threads(n_threads):
        memory = {name: _peak(model, images) for name, model in models.items()}
        timings = compare({name: _timed(model, images) for name, model in models.items()}, seconds)
    baseline = next(iter(timings.values())).median
    return [
        {
            "model": name,
            "batch": images.shape[0],
            "device": images.device.type,
            "threads": n_threads,
            "latency_ms": timing.median,
            "p20": timing.p20,
            "p80": timing.p80,
            "calls": timing.calls,
            "images_per_second": images.shape[0] / timing.median * 1e3,
            "speedup": baseline / timing.median,
            "activation_peak_bytes": memory[name],
            "model_bytes": tensor_bytes(models[name]),
        }
        for name, timing in timings.items()
    ]
