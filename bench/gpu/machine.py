"""Where kernels are checked and timed: a GPU, or the interpreter in its place, on which times mean nothing."""

from __future__ import annotations

import contextlib
import gc
import math
import platform
import shutil
import subprocess
import time
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
import triton
from torch import Tensor
from vitq.bench.latency import Timing

from vitq_kernels import tuning
from vitq_kernels.triton import host

from . import ROOT
from .roofline import Peaks

MOST_SETS = 512
"""Input sets that a small kernel rotates through at most; 256 of [197, 384] and their codes lie in 60 MB of cache."""
COLD = 2.5
"""Bytes between two uses of one input set, in units of the second-level cache."""


def sets_of(size: int, cache_bytes: int) -> int:
    """How many copies of inputs of so many bytes push one another out of a cache."""
    return min(max(math.ceil(COLD * cache_bytes / max(size, 1)), 1), MOST_SETS)


@dataclass
class Peak:
    """What :meth:`Machine.peak_memory` found."""

    megabytes: float | None = None


class Machine:
    """``Machine("cuda")``, or ``Machine("cpu")`` under TRITON_INTERPRET=1.

    Attributes:
        device: torch.device.
        dry: True for the interpreter: shapes are to be tiny, times are wall clock and mean nothing.
        peaks: measured ceilings once :meth:`measure_ceilings` ran.

    Raises: ValueError if Triton kernels cannot run there.
    """

    def __init__(self, device: str) -> None:
        if reason := host.unavailable(device):
            raise ValueError(f"device is {device!r}, expected one that triton serves: {reason}")
        self.device, self.dry = torch.device(device), device == "cpu"
        self.peaks: Peaks | None = None
        if self.dry:
            self.name, self.cache_bytes = "interpreter", 0
        else:
            self.device = torch.device("cuda", torch.cuda.current_device())
            self.name = torch.cuda.get_device_name()
            self.cache_bytes = torch.cuda.get_device_properties(self.device).L2_cache_size
            self._flush = torch.empty(max(3 * self.cache_bytes, 1 << 27), dtype=torch.uint8, device=self.device)

    @property
    def slug(self) -> str:
        return tuning.slug(self.name)

    def environment(self) -> dict[str, Any]:
        """GPU, driver, versions, commit."""
        found: dict[str, Any] = {
            "gpu": self.name,
            "torch": torch.__version__,
            "triton": triton.__version__,
            "python": platform.python_version(),
            "commit": _output(["git", "-C", str(ROOT), "describe", "--always", "--dirty"]) or "no git checkout",
        }
        if not self.dry:
            properties = torch.cuda.get_device_properties(self.device)
            query = ["nvidia-smi", "--query-gpu=driver_version,clocks.max.sm,power.limit", "--format=csv,noheader"]
            found |= {
                "driver, most clock, power": _output(query),  # the clock of now is that of an idle GPU
                "capability": f"{properties.major}.{properties.minor}",
                "processors": properties.multi_processor_count,
                "memory_gb": round(properties.total_memory / 1e9, 1),
                "l2_mb": round(self.cache_bytes / 1e6, 1),
                "cuda": torch.version.cuda,
            }
        return found

    def measure_ceilings(self) -> Peaks:
        """Copy bandwidth and matrix rates on random data through torch: what "measured roofline" refers to."""
        n, size = (64, 1 << 16) if self.dry else (8192, 1 << 32)
        g = torch.Generator(device=self.device).manual_seed(0)
        source = torch.empty(size // 4, dtype=torch.int32, device=self.device).random_(generator=g)
        copy = self.time(lambda x: x["to"].copy_(x["from"]), {"from": source, "to": torch.empty_like(source)}, sets=1)
        a, b = (torch.randn(n, n, device=self.device, generator=g).bfloat16() for _ in range(2))
        half = self.time(lambda x: x["a"] @ x["b"].T, {"a": a, "b": b}, sets=1)
        a, b = (torch.randint(-127, 128, (n, n), device=self.device, generator=g, dtype=torch.int8) for _ in range(2))
        whole = self.time(lambda x: torch._int_mm(x["a"], x["b"].T), {"a": a, "b": b}, sets=1)
        self.peaks = Peaks(
            bandwidth=2 * size / copy.median * 1e3,
            int8=2 * n**3 / whole.median * 1e3,
            half=2 * n**3 / half.median * 1e3,
            exp2=16 * 1.98e9 * host.processors(self.device),
        )
        return self.peaks

    def synchronize(self) -> None:
        if not self.dry:
            torch.cuda.synchronize(self.device)

    def time(
        self,
        run: Callable[[dict], object],
        inputs: dict[str, Tensor],
        *,
        seconds: float = 0.04,
        sets: int | None = None,
    ) -> Timing:
        """Milliseconds of ``run(inputs)`` in a CUDA graph with a cold second-level cache.

        The graph holds one call for each of as many copies of ``inputs`` as it takes to push one out of the cache
        before it comes round again, and the cache is overwritten between replays.

        Args: sets: copies; None: what the size of the inputs asks for. seconds: about how long to replay.
        """
        if sets is None:
            size = sum(t.numel() * t.element_size() for t in inputs.values())
            sets = 2 if self.dry else sets_of(size, self.cache_bytes)
        copies = [inputs] + [{k: t.clone() for k, t in inputs.items()} for _ in range(sets - 1)]
        if self.dry:
            return Timing.of([_wall(run, copy) / sets for copy in copies for _ in range(2)])
        return self.time_graph(self.capture(lambda: [run(copy) for copy in copies], lambda: run(inputs)), seconds, sets)

    def capture(self, run: Callable[[], Any], warm: Callable[[], object] | None = None) -> torch.cuda.CUDAGraph:
        """A graph of ``run()``, whose results stay alive with it as ``graph.outputs``; ``warm`` runs before (default
        ``run``)."""
        side = torch.cuda.Stream()
        side.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(side):
            for _ in range(2):
                (warm or run)()
        torch.cuda.current_stream().wait_stream(side)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            outputs = run()
        graph.outputs = outputs
        return graph

    def time_graph(self, graph: torch.cuda.CUDAGraph, seconds: float, calls: int) -> Timing:
        """Milliseconds of one of ``calls`` equal parts of a graph, which starts with a cold cache."""
        events = [torch.cuda.Event(enable_timing=True) for _ in range(2)]

        def once() -> float:
            # What makes the cache cold also keeps the GPU busy while the graph is launched: on an idle one that latency
            # would lie between the events, and weigh most where there are few copies, those of the largest inputs.
            self._flush.zero_()
            events[0].record()
            graph.replay()
            events[1].record()
            events[1].synchronize()
            return events[0].elapsed_time(events[1])

        for _ in range(2):
            first = once()
        rounds = min(max(round(1e3 * seconds / max(first, 1e-3)), 7), 60)
        return Timing.of([once() / calls for _ in range(rounds)])

    def release(self) -> None:
        """Hands back what the graphs of finished timings held."""
        if not self.dry:
            torch.cuda.empty_cache()

    @contextlib.contextmanager
    def peak_memory(self) -> Iterator[Peak]:
        """Sets ``megabytes``: the most that was allocated inside beyond what was before; None without a GPU."""
        peak = Peak()
        if self.dry:
            yield peak
            return
        gc.collect()
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        yield peak
        peak.megabytes = (torch.cuda.max_memory_allocated() - before) / 1e6

    def kernels(self, variants: Iterable) -> list[str]:
        """Names of the GPU kernels that the variants' ``run_once`` launch, in order, or why they are not known."""
        if self.dry:
            return []
        try:
            with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as profile:
                for variant in variants:
                    variant.run_once()
                self.synchronize()
        except (AssertionError, RuntimeError) as error:  # no counters on this machine: nothing is wrong with a kernel
            return [f"unknown: {error}"]
        on_gpu = [e for e in profile.events() if e.device_type == torch.autograd.DeviceType.CUDA]
        return [e.name for e in sorted(on_gpu, key=lambda e: e.time_range.start)]


def _wall(run: Callable[[dict], object], inputs: dict) -> float:
    start = time.perf_counter()
    run(inputs)
    return 1e3 * (time.perf_counter() - start)


def _output(command: list[str]) -> str | None:
    if shutil.which(command[0]) is None:
        return None
    run = subprocess.run(command, capture_output=True, text=True, timeout=30)
    return run.stdout.strip() if run.returncode == 0 else None
