"""What this machine can do at best: operations and bytes a second, measured by a small C program."""

from __future__ import annotations

import ctypes
import os
import platform
import shutil
import subprocess
import tempfile
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass
from functools import cache
from importlib import resources
from pathlib import Path
from typing import Any

from vitq_kernels import _native

#: Instruction set → loop of peaks.c per operand: float32; 8-bit weights; 4-bit weights, whose products fit 16-bit sums.
KINDS = {
    "avx2": {"float32": "fma_avx2", "int8": "words_avx2", "int4": "bytes_avx2"},
    "avx_vnni": {"float32": "fma_avx2", "int8": "dot_avx2", "int4": "dot_avx2"},
    "avx512_vnni": {"float32": "fma_avx512", "int8": "dot_avx512", "int4": "dot_avx512"},
    "avx512_amx": {"float32": "fma_avx512", "int8": "dot_amx", "int4": "dot_amx"},
}
#: Working sets whose bandwidth is measured: about those of the caches, and memory.
SETS = (1 << 18, 1 << 21, 1 << 24, 1 << 28)
SECONDS = 0.1  # of each probe


class Unmeasured(Exception):
    """The ceilings of this machine cannot be measured; the message says why."""


@dataclass(frozen=True)
class Host:
    """Ceilings of so many threads together.

    Attributes:
        isa: instruction set of the C++ kernels. peak: operations (a multiplication or an addition each) a second by
            operand, "float32", "int8", "int4".
        bandwidth: working set in bytes → bytes read and written a second, where copies stay within it.
    """

    isa: str
    threads: int
    peak: dict[str, float]
    bandwidth: dict[int, float]

    def bytes_per_second(self, moved: int) -> float:
        """Of the smallest working set that holds ``moved`` bytes."""
        fits = [size for size in self.bandwidth if size >= moved]
        return self.bandwidth[min(fits) if fits else max(self.bandwidth)]

    def times(self, moved: int, operations: dict[str, float]) -> dict[str, float]:
        """Seconds at least: to move the bytes, and to compute (operands share the units, so their times add up)."""
        return {
            "memory": moved / self.bytes_per_second(moved),
            "compute": sum(count / self.peak[operand] for operand, count in operations.items()),
        }

    def record(self) -> dict[str, Any]:
        return asdict(self)


@cache
def _library() -> ctypes.CDLL:
    compiler = shutil.which(os.environ.get("CC") or "cc")
    if compiler is None:
        raise Unmeasured("no C compiler")
    folder = Path(tempfile.mkdtemp(prefix="vitq-peaks-"))
    try:
        with resources.as_file(resources.files("vitq") / "assets" / "peaks.c") as source:
            command = [compiler, "-O2", "-shared", "-fPIC", str(source), "-o", str(folder / "peaks.so")]
            done = subprocess.run(command, capture_output=True, text=True)
        if done.returncode:
            raise Unmeasured(f"{compiler} does not compile peaks.c: {done.stderr.strip()[-200:]}")
        library = ctypes.CDLL(str(folder / "peaks.so"))
    finally:
        shutil.rmtree(folder)
    library.peak.restype = library.copy.restype = ctypes.c_double
    library.peak.argtypes = [ctypes.c_char_p, ctypes.c_double]
    library.copy.argtypes = [ctypes.c_size_t, ctypes.c_double]
    return library


def measure(threads: int, seconds: float = SECONDS) -> Host:
    """The ceilings of ``threads`` threads on the selected instruction set. Raises: Unmeasured."""
    extension = _native.extension()
    isa = None if extension is None else extension.cpu_isa()
    if platform.machine().lower() not in ("x86_64", "amd64") or isa not in KINDS:
        raise Unmeasured(f"there is no probe for {platform.machine()}, instruction set {isa}")
    library = _library()

    def together(probe, *arguments) -> float:
        """The sum over as many threads, each of which releases the interpreter."""
        with ThreadPoolExecutor(threads) as pool:
            return sum(pool.map(lambda _: probe(*arguments, seconds), range(threads)))

    peak = {operand: together(library.peak, kind.encode()) for operand, kind in KINDS[isa].items()}
    bandwidth = {size: together(library.copy, size // threads) for size in SETS}
    if min(bandwidth.values()) < 0:
        raise Unmeasured(f"there is no memory for copies of {max(SETS)} bytes")
    return Host(isa, threads, peak, bandwidth)
