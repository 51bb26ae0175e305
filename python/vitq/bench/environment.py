"""What figures depend on, recorded beside them."""

from __future__ import annotations

import os
import platform
import re
from pathlib import Path
from typing import Any

import timm
import torch

from vitq_kernels import _native

from .. import __version__


def cores() -> int:
    """Processors that this process may run on."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def cpu_name() -> str:
    """The processor as the system calls it."""
    file = Path("/proc/cpuinfo")
    found = re.search(r"^model name\s*:\s*(.+)$", file.read_text(), re.M) if file.exists() else None
    return found.group(1) if found else platform.processor() or platform.machine()


def environment() -> dict[str, Any]:
    """Versions, processor, instruction set and threads of this process."""
    extension = _native.extension()
    return {
        "vitq": __version__,
        "torch": torch.__version__,
        "timm": timm.__version__,
        "python": platform.python_version(),
        "machine": platform.machine(),
        "cpu": cpu_name(),
        "cores": cores(),
        "cpu_isa": None if extension is None else extension.cpu_isa(),
        "threads": torch.get_num_threads(),
    }
