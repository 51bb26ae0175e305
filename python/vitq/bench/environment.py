"""What figures depend on, recorded beside them."""

from __future__ import annotations

import platform
from typing import Any

import timm
import torch

from vitq_kernels import _native

from .. import __version__


def environment() -> dict[str, Any]:
    """Versions, instruction set and threads of this process."""
    extension = _native.extension()
    return {
        "vitq": __version__,
        "torch": torch.__version__,
        "timm": timm.__version__,
        "python": platform.python_version(),
        "machine": platform.machine(),
        "cpu_isa": None if extension is None else extension.cpu_isa(),
        "threads": torch.get_num_threads(),
    }
