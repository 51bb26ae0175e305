"""Ahead-of-time compilation of recorded launches, for any GPU and without one.

``with host.recorded(run=False) as launches: ...`` collects what the calls inside would launch; ``compile_launch``
builds it exactly as the launch itself would; ``Binary`` says what it needs and which instructions it consists of.
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
from triton.compiler import ASTSource

from .host import Launch

_TYPES = {
    torch.float32: "fp32",
    torch.float16: "fp16",
    torch.bfloat16: "bf16",
    torch.int8: "i8",
    torch.uint8: "u8",
    torch.int32: "i32",
}


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


def source(launch: Launch) -> ASTSource:
    """``launch`` as the compiler takes it, specialized as a call with these arguments is: on None, on 1, on multiples
    of 16, and on the dtype and 16-byte alignment of every tensor (as allocations are aligned)."""
    kernel = launch.kernel
    signature, constants, attributes = {}, {}, {}
    for index, (parameter, value) in enumerate(zip(kernel.params, launch.arguments, strict=True)):
        if parameter.is_constexpr or value is None or (_one(value) and not parameter.do_not_specialize):
            signature[parameter.name] = "constexpr"
            constants[(index,)] = value
        elif isinstance(value, torch.Tensor):
            signature[parameter.name] = f"*{_TYPES[value.dtype]}"
            if (value.storage_offset() * value.element_size()) % 16 == 0:
                attributes[(index,)] = [["tt.divisibility", 16]]
        elif isinstance(value, float):
            signature[parameter.name] = "fp32"
        else:
            signature[parameter.name] = "i32" if -(1 << 31) <= value < 1 << 31 else "i64"
            if value % 16 == 0 and not parameter.do_not_specialize:
                attributes[(index,)] = [["tt.divisibility", 16]]
    return ASTSource(kernel, signature, constants, attributes)


def _one(value: object) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and value == 1


def compile_launch(launch: Launch, capability: int) -> Binary:
    """``launch`` compiled for compute capability ``capability`` (80, 89, 90, 100, 120)."""
    built = triton.compile(
        source(launch),
        target=GPUTarget("cuda", capability, 32),
        options={**launch.options, "enable_fp_fusion": False},
    )
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
