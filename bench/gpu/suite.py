"""The kernel tests on the GPU: the same files, checkers and hypothesis cases as without one, in parallel processes.

Most of their time is spent compiling one kernel after the other, each on one core: hence several processes, and hence
tests of their own for real ViT shapes (tests/kernels/test_vit_shapes.py) rather than a loop here.
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

from vitq_kernels import _cuda

from . import ROOT, environment

FILES = {
    "kernel tests": (
        "test_quantize.py",
        "test_layer_norm_quantize.py",
        "test_qlinear.py",
        "test_qattention.py",
        "test_scatter.py",
    ),
    "learning ops": ("test_learning.py",),
    "ViT shapes": ("test_vit_shapes.py",),
    "own paths": ("emulated_cuda.py", "emulated_cuda_quantize.py", "emulated_cuda_attention.py"),
}
QUICK = {
    "kernel tests": "hand_computed or special",
    "learning ops": "nan or largest",
    "ViT shapes": "rows and static and 384",
    "own paths": "any_order",
}
"""What a dry run selects from the first file of each."""
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
            if self.backend == "cuda":  # an interpreter would be preferred
                base.pop("TRITON_INTERPRET", None)
        shares = range(self.processes)
        return [([*command, *self.files], base | {"VITQ_TEST_SHARE": f"{i}/{self.processes}"}) for i in shares]


def selections(dry: bool) -> list[Selection]:
    """What is run on a GPU, or a handful of quick tests of each kind, interpreted and emulated."""
    cores = os.cpu_count() or 1
    # Processes are for what Triton compiles.
    plan = [("kernel tests", "triton", cores // 2), ("learning ops", "triton", 1), ("ViT shapes", "triton", cores // 4)]
    if _cuda.unavailable("cpu" if dry else "cuda") is None:
        plan += [("own paths", "cuda", 1)]
        plan += [] if dry else [("kernel tests", "cuda", cores // 4), ("ViT shapes", "cuda", 1)]
    chosen = []
    for kind, backend, processes in plan:
        files = tuple(str(ROOT / "tests" / "kernels" / name) for name in FILES[kind])
        wanted = [backend] * (kind == "kernel tests") + [f"({QUICK[kind]})"] * dry
        chosen.append(
            Selection(
                kind + ", C++" * (backend == "cuda"),
                files[:1] if dry else files,
                1 if dry else max(1, processes),
                " and ".join(wanted),
                backend=backend,
            )
        )
    gpu = Selection("tests for a GPU", (str(ROOT / "tests" / "kernels"),), 1, marker="gpu", device=False)
    return chosen if dry else [*chosen, gpu]


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
