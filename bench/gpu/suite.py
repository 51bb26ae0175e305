"""The kernel tests on the GPU: the same files, checkers and hypothesis cases as without one, in parallel processes.

Most of their time is spent compiling one kernel after the other, each on one core: hence several processes, and hence
tests of their own for real ViT shapes (tests/kernels/test_triton_shapes.py) rather than a loop here.
"""

from __future__ import annotations

import os
import re
import subprocess
import sys
import tempfile
import threading
import time
from dataclasses import dataclass
from pathlib import Path

from vitq_kernels import backends

from . import ROOT, environment

KERNELS = (
    "test_quantize.py",
    "test_layer_norm_quantize.py",
    "test_qlinear.py",
    "test_qattention.py",
    "test_scatter.py",
)
CUDA_TESTS = tuple(str(ROOT / "tests" / "kernels" / name) for name in KERNELS[:3])
SHAPES = "test_triton_shapes.py"
PYTEST = (sys.executable, "-m", "pytest", "-x", "-p", "no:cacheprovider", "-p", "bench.gpu.share")


@dataclass(frozen=True)
class Selection:
    """Tests for ``processes`` processes: what ``pytest -k keyword -m marker files`` selects."""

    name: str
    files: tuple[str, ...]
    processes: int
    keyword: str = ""
    marker: str = ""
    device: bool = True
    backend: str = "triton"

    def commands(self, device: str) -> list[tuple[list[str], dict[str, str]]]:
        """Command and environment of each process."""
        command = [*PYTEST, "-W", "ignore::RuntimeWarning"]
        command += ["-k", self.keyword] if self.keyword else []
        command += ["-m", self.marker] if self.marker else []
        base = environment() | {"OMP_NUM_THREADS": "1"}
        base.pop("VITQ_BACKEND", None)
        if self.device:
            base |= {"VITQ_TEST_DEVICE": device, "VITQ_TEST_BACKEND": self.backend}
        shares = range(self.processes)
        return [([*command, *self.files], base | {"VITQ_TEST_SHARE": f"{i}/{self.processes}"}) for i in shares]


def selections(dry: bool) -> list[Selection]:
    """What is run on a GPU, or a handful of quick tests of each kind for the interpreter."""
    kernels = tuple(str(ROOT / "tests" / "kernels" / name) for name in KERNELS)
    shapes = (str(ROOT / "tests" / "kernels" / SHAPES),)
    if dry:
        return [
            Selection("kernel tests", kernels[:1], 1, "triton and (hand_computed or special)"),
            Selection("ViT shapes", shapes, 1, "rows and static and 384"),
        ]
    cores = os.cpu_count() or 1
    served = [Selection("kernel tests of the C++ kernels", CUDA_TESTS, max(1, cores // 4), "cuda", backend="cuda")]
    return [
        *(served if backends.status()["cuda"] is None else []),
        Selection("kernel tests", kernels, max(1, cores // 2), "triton"),
        Selection("ViT shapes", shapes, max(1, cores // 4)),
        Selection("tests for a GPU", (str(ROOT / "tests" / "kernels"),), 1, marker="gpu", device=False),
    ]


def run(device: str, dry: bool, seconds: float, stop: threading.Event) -> dict[str, str]:
    """Runs every selection at once, until all are done, the time is up or ``stop`` is set.

    Returns: selection → "N passed", or why it did not finish.
    Raises:  AssertionError at the first failure of any process, with the end of its output, and where the kernel tests
             select nothing.
    """
    chosen = selections(dry)
    with tempfile.TemporaryDirectory() as folder:
        started = []
        try:
            for selection in chosen:
                for i, (command, env) in enumerate(selection.commands(device)):
                    log = Path(folder) / f"{selection.name} {i}"
                    with log.open("w") as file:
                        process = subprocess.Popen(command, cwd=ROOT, env=env, stdout=file, stderr=subprocess.STDOUT)
                    started.append((selection, process, log))
            _wait(started, time.monotonic() + seconds, stop)
        finally:
            for _, process, _ in started:
                if process.poll() is None:
                    process.kill()
                    process.wait()
        return {
            selection.name: _outcome(selection, [(p, log) for s, p, log in started if s is selection])
            for selection in chosen
        }


def _wait(started: list, deadline: float, stop: threading.Event) -> None:
    while time.monotonic() < deadline and not stop.is_set():
        for selection, process, log in started:
            if process.poll() not in (None, 0, 5):  # 5: no test in this share
                raise AssertionError(f"{selection.name}: {' '.join(map(str, process.args))}\n{log.read_text()[-6000:]}")
        if all(process.poll() is not None for _, process, _ in started):
            return
        time.sleep(0.2)


def _outcome(selection: Selection, processes: list[tuple[subprocess.Popen, Path]]) -> str:
    stopped = sum(process.returncode not in (0, 5) for process, _ in processes)
    if stopped:
        return f"out of time: {stopped} of {len(processes)} processes did not finish"
    text = "".join(log.read_text() for _, log in processes)
    passed, skipped = (sum(map(int, re.findall(rf"(\d+) {what}", text))) for what in ("passed", "skipped"))
    if not passed and selection.device:
        raise AssertionError(f"{selection.name}: no test ran\n{text[-2000:]}")
    return f"{passed} passed" + (f", {skipped} skipped" if skipped else "")
