"""Builds the emulated GPU kernels and runs test files on them, in a process of their own: the library that serves is
settled when vitq_kernels is imported."""

from __future__ import annotations

import fcntl
import os
import re
import shutil
import subprocess
import sys
from functools import cache
from pathlib import Path

import torch

HERE = Path(__file__).parent
ROOT = HERE.parents[1]


def _tool(name: str) -> str | None:
    return shutil.which(name, path=os.pathsep.join([str(Path(sys.executable).parent), os.environ.get("PATH", "")]))


@cache
def problem() -> str | None:
    """None, or what is missing to build them."""
    tools = {"cmake": _tool("cmake"), "ninja": _tool("ninja"), "a C++ compiler": _tool("c++") or _tool("g++")}
    missing = [name for name, path in tools.items() if path is None]
    return f"needs {' and '.join(missing)}" if missing else None


def build(sanitize: bool = False) -> Path:
    """libvitq_emulated.so, built where it was before: nothing is compiled twice, in one test run or the next.

    Raises: AssertionError with the compiler's output.
    """
    folder = ROOT / "build" / ("emulated-sanitized" if sanitize else "emulated")
    folder.mkdir(parents=True, exist_ok=True)
    options = {
        "CMAKE_MAKE_PROGRAM": _tool("ninja"),
        "VITQ_BUILD_OPS": "OFF",
        "VITQ_BUILD_EMULATION": "ON",
        "VITQ_SANITIZE": "ON" if sanitize else "OFF",
        "VITQ_TORCH_DIR": Path(torch.__file__).parent,
        "VITQ_OUTPUT_DIR": folder,
    }
    define = [f"-D{name}={value}" for name, value in options.items()]
    configure = [_tool("cmake"), "-S", str(ROOT), "-B", str(folder / "build"), "-G", "Ninja", *define]
    make = [_tool("cmake"), "--build", str(folder / "build"), "--target", "vitq_emulated", "-j", "2"]
    with (folder / "lock").open("w") as lock:  # of the processes of one test run the first builds
        fcntl.flock(lock, fcntl.LOCK_EX)
        for command in (configure, make):
            done = subprocess.run(command, capture_output=True, text=True)
            assert done.returncode == 0, done.stdout[-5000:] + done.stderr[-5000:]
    return folder / "libvitq_emulated.so"


def run(library: Path, *files: str, least: int, select: str = "cuda", **environment: str) -> None:
    """The ``select`` cases of test files beside this one, on ``library``.

    Raises: AssertionError where one fails or is skipped, or fewer than ``least`` pass.
    """
    env = {**os.environ, "VITQ_EMULATED_CUDA": str(library), "OMP_NUM_THREADS": "1", **environment}
    env.pop("VITQ_BACKEND", None)
    command = [sys.executable, "-m", "pytest", "-k", select, "-p", "no:cacheprovider", "-p", "no:xdist"]
    done = subprocess.run(
        [*command, *(str(HERE / name) for name in files)], env=env, capture_output=True, text=True, timeout=1200
    )
    assert done.returncode == 0, done.stdout[-20_000:] + done.stderr[-5000:]
    assert int(re.search(r"(\d+) passed", done.stdout)[1]) >= least, done.stdout[-2000:]
    assert "skipped" not in done.stdout, done.stdout[-2000:]


if __name__ == "__main__":
    print(build())
