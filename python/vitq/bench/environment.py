"""What figures depend on, recorded beside them."""

from __future__ import annotations

import math
import os
import platform
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import timm
import torch

from vitq_kernels import _native

from .. import __version__


def cores() -> int:
    """Processors that this process may run on, or fewer where control groups (a container's limit) give it the time of
    fewer: threads beyond that are stopped until the next period."""
    allowed = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    return max(1, min(allowed, math.ceil(min(_quotas(), default=allowed))))


def _quotas(own: Path = Path("/proc/self/cgroup"), mount: Path = Path("/sys/fs/cgroup")) -> Iterator[float]:
    """The time that every control group around this process has, in processors."""
    for line in own.read_text().splitlines() if own.exists() else ():
        _, controllers, path = line.split(":", 2)
        if controllers and "cpu" not in controllers.split(","):
            continue
        root = mount / controllers if controllers else mount
        folder = root / path.lstrip("/")
        # In a container the path may be that of the host, of which nothing but the root is to be seen.
        for group in (folder, *folder.parents):
            try:
                if controllers:
                    quota, period = ((group / f"cpu.cfs_{what}_us").read_text() for what in ("quota", "period"))
                else:
                    quota, period = (group / "cpu.max").read_text().split()
                if quota != "max" and int(quota) > 0:
                    yield int(quota) / int(period)
            except (OSError, ValueError):
                pass
            if group == root:
                break


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
