"""Loads the compiled GPU kernels (``vitq_cuda::*``), and says why if there are none.

``VITQ_EMULATED_CUDA=<library>`` loads the same sources built for the host instead (CMake: ``VITQ_BUILD_EMULATION``):
their kernels then run on CPU tensors, a thread of a block after the other. For tests.
"""

from __future__ import annotations

import os
from functools import cache
from pathlib import Path

import torch

EMULATED = os.environ.get("VITQ_EMULATED_CUDA")
MIN_CAPABILITY = (8, 0)
INT4_CAPABILITIES = ((8, 0), (8, 6), (8, 7), (8, 9))
#: Of the operators that the library implements, past the dispatcher's choice of ``vitq::*``: that is Triton's.
library = torch.library.Library("vitq_cuda", "DEF")


def _load() -> str | None:
    path = Path(EMULATED) if EMULATED else Path(__file__).with_name("libvitq_cuda.so")
    if not path.exists():
        if EMULATED:
            raise ValueError(f"VITQ_EMULATED_CUDA is '{EMULATED}', expected a library")
        return "the GPU kernels were not built (no nvcc at install time, or VITQ_BUILD_CUDA=0)"
    try:
        torch.ops.load_library(str(path))
    except OSError as error:
        return f"the GPU kernels do not load: {error.__cause__ or error}"
    return None


_reason = _load()


@cache
def _gpu_reason() -> str | None:
    if not torch.cuda.is_available():
        return "no CUDA device"
    has = torch.cuda.get_device_capability()
    if has >= MIN_CAPABILITY:
        return None
    need, has = (f"{major}.{minor}" for major, minor in (MIN_CAPABILITY, has))
    return f"needs compute capability {need}, {torch.cuda.get_device_name()} has {has}"


def slow_layouts(device: torch.device) -> tuple[str, ...]:
    """Int4 products where the hardware takes two int8 ones for each: everywhere but on sm_80, 86, 87 and 89."""
    if EMULATED or (device.type == "cuda" and torch.cuda.get_device_capability(device) in INT4_CAPABILITIES):
        return ()
    return ("int4_k64x2_s4",)


def unavailable(device: str) -> str | None:
    """None if the C++ GPU kernels can serve ``device``, else the reason."""
    if _reason is not None:
        return _reason
    if EMULATED:
        return None if device == "cpu" else f"emulated on cpu tensors, not {device}"
    return _gpu_reason() if device == "cuda" else f"runs on cuda tensors, not {device}"
