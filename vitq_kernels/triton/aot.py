"""Ahead-of-time compilation of recorded launches, for any GPU and without one.

``with host.recorded(run=False) as launches: ...`` collects what the calls inside would launch; ``build`` puts it into
Triton's cache; ``compile_launch`` also says, as a ``Binary``, what it needs and which instructions it consists of.
"""

from __future__ import annotations

import re
import subprocess
import tempfile
from dataclasses import dataclass
from functools import cache
from pathlib import Path

import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource, CompiledKernel
from triton.runtime.driver import driver

from .host import Launch


@dataclass(frozen=True)
class Binary:
    """One compiled kernel.

    Attributes: registers: per thread; stack: bytes of local memory per thread (spills and arrays); shared: bytes per
        program, dynamic included; ptx, cubin: the artefacts.
    """

    registers: int
    stack: int
    shared: int
    ptx: str
    cubin: bytes

    def count(self, pattern: str) -> int:
        """Instructions of the PTX that match ``pattern`` (a regular expression)."""
        return len(re.findall(pattern, self.ptx))

    @property
    def local(self) -> int:
        """Instructions that touch local memory."""
        return self.count(r"\b(?:ld|st)\.local\b")


class _Target:
    """Stands in for Triton's driver: a GPU that compiles and never runs. Its device name keeps what is built for it
    apart from what this process launches."""

    def __init__(self, capability: int) -> None:
        self.capability = capability

    def get_current_device(self) -> str:
        return f"sm_{self.capability}"

    def get_current_stream(self, device: str) -> int:
        return 0

    def get_current_target(self) -> GPUTarget:
        return GPUTarget("cuda", self.capability, 32)


class _Pointer:
    """A tensor as specialization sees it: its dtype, and its address under the alignment of allocations."""

    def __init__(self, tensor: torch.Tensor) -> None:
        self.dtype, self._offset = tensor.dtype, tensor.storage_offset() * tensor.element_size()

    def data_ptr(self) -> int:
        return self._offset


def build(launch: Launch, capability: int) -> CompiledKernel:
    """``launch`` compiled into Triton's cache as the launch itself would on such a GPU, under the same key.

    Not while another thread launches kernels.
    """
    arguments = (_Pointer(a) if isinstance(a, torch.Tensor) else a for a in launch.arguments)
    before, driver._active = driver._active, _Target(capability)
    try:
        return launch.kernel.warmup(*arguments, grid=launch.grid, **launch.options, enable_fp_fusion=False)
    finally:
        driver._active = before


def source(launch: Launch, capability: int = 90) -> ASTSource:
    """``launch`` as the compiler would take it, specialized as a call with these arguments is: on None, on 1, on
    multiples of 16, and on the dtype and 16-byte alignment of every tensor (as allocations are aligned)."""
    seen = []

    def instead(*, compile, **_) -> bool:
        seen.append(ASTSource(launch.kernel, compile["signature"], compile["constants"], compile["configs"][0]))
        return True

    with triton.knobs.runtime.scope():
        triton.knobs.runtime.jit_cache_hook = instead
        built = build(launch, capability)
    return seen[0] if seen else built.src  # the hook is not asked where the kernel is there already


def compile_launch(launch: Launch, capability: int) -> Binary:
    """``launch`` compiled for compute capability ``capability`` (80, 89, 90, 100, 120)."""
    built = build(launch, capability)
    usage = _usage(built.asm["cubin"])
    return Binary(
        registers=int(re.search(r"REG:(\d+)", usage)[1]),
        stack=int(re.search(r"STACK:(\d+)", usage)[1]),
        shared=built.metadata.shared,
        ptx=built.asm["ptx"],
        cubin=built.asm["cubin"],
    )


@cache
def _cuobjdump() -> str:
    """Triton brings its own."""
    return str(Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "cuobjdump")


def _usage(cubin: bytes) -> str:
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        command = [_cuobjdump(), "-res-usage", file.name]
        return subprocess.run(command, check=True, capture_output=True, text=True).stdout
