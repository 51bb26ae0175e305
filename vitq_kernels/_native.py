"""Loads the compiled operators, and says why if there are none."""

from __future__ import annotations

import importlib
from pathlib import Path

import torch

_reason: str | None = None
_C = None


def _load() -> None:
    global _C, _reason
    library = Path(__file__).with_name("libvitq_ops.so")
    if not library.exists():
        _reason = "the native extension was not built (no C++ compiler at install time, or VITQ_BUILD_NATIVE=0)"
        return
    try:
        torch.ops.load_library(str(library))
        _C = importlib.import_module("vitq_kernels._C")
    except (OSError, ImportError) as error:
        _reason = f"the native extension does not load: {error}"
        return
    _C.cpu_isa()  # a VITQ_CPU_ISA that names no instruction set of this machine is an error now, not inside an op


_load()


def extension():
    """The pybind11 module ``_C``, or None if it is not there."""
    return _C


def unavailable(device: str) -> str | None:
    """None if the C++ kernels can serve ``device``, else the reason."""
    if _reason is not None:
        return _reason
    return None if device == "cpu" else f"runs on cpu tensors, not {device}"
