"""Runs test files on Triton's interpreter, in a process of their own: Triton looks at TRITON_INTERPRET once, when it
decorates a kernel."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

from vitq_kernels.triton import host

HERE = Path(__file__).parent


def run(*files: str, least: int) -> None:
    """The ``triton`` cases of test files beside this one.

    Raises: AssertionError where one fails or is skipped, or fewer than ``least`` pass.
    """
    environment = {**os.environ, "TRITON_INTERPRET": "1", "OMP_NUM_THREADS": "1"}
    environment.pop("VITQ_BACKEND", None)
    command = [sys.executable, "-m", "pytest", "-k", "triton", "-p", "no:cacheprovider", "-p", "no:xdist"]
    command += ["-W", "ignore::RuntimeWarning", *(str(HERE / name) for name in files)]
    run = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=1200)
    assert run.returncode == 0, run.stdout[-20_000:] + run.stderr[-2000:]
    assert int(re.search(r"(\d+) passed", run.stdout)[1]) >= least, run.stdout[-2000:]
    assert "skipped" not in run.stdout, run.stdout[-2000:]


def spoiled_launch(change):
    """``host.launch`` whose arguments ``change(name of the kernel, arguments by name)`` has spoiled."""
    launch = host.launch

    def spoiled(kernel, grid, arguments, device, **options):
        named = dict(zip(kernel.arg_names, arguments, strict=True))
        change(kernel.__name__, named)
        launch(kernel, grid, tuple(named.values()), device, **options)

    return spoiled
