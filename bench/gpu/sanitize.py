"""Small launches of every op under compute-sanitizer: ``python -m bench.gpu.sanitize`` is what runs inside it."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import tempfile
import threading
import time

from . import ROOT, environment

TOOLS = ("memcheck", "racecheck")
FOUND = 9  # the exit code by which the tool says that it found an error


def run(seconds: float, stop: threading.Event) -> dict[str, str]:
    """Tool → "no errors", or why it says nothing (as when the time is up or ``stop`` is set).

    Raises: AssertionError with the end of the report if a tool found an error, or the launches themselves failed.
    """
    tool = shutil.which("compute-sanitizer")
    if tool is None:
        return dict.fromkeys(TOOLS, "not available: compute-sanitizer is not on the PATH")
    # Without a cache each tensor is an allocation of its own, beyond which any access is one out of bounds.
    env = environment() | {"PYTORCH_NO_CUDA_MEMORY_CACHING": "1"}
    found = {}
    for name in TOOLS:
        command = [tool, "--tool", name, "--error-exitcode", str(FOUND), sys.executable, "-m", "bench.gpu.sanitize"]
        found[name] = _outcome(name, command, env, time.monotonic() + seconds / len(TOOLS), stop)
    return found


def _outcome(name: str, command: list[str], env: dict[str, str], deadline: float, stop: threading.Event) -> str:
    with tempfile.TemporaryFile("w+") as file:
        process = subprocess.Popen(command, cwd=ROOT, env=env, stdout=file, stderr=subprocess.STDOUT)
        try:
            while process.poll() is None:
                if stop.is_set() or time.monotonic() > deadline:
                    return "out of time: stopped before its end"
                time.sleep(0.2)
        finally:
            process.kill()
            process.wait()
        file.seek(0)
        text = file.read()
    if process.returncode == 0:
        return "no errors"
    # A sandbox may refuse the tool the device: that says nothing about the kernels.
    refusal = next((x for x in text.splitlines() if "not supported" in x.lower()), None)
    if process.returncode != FOUND and refusal is not None:
        return f"not available: {refusal.strip()}"
    raise AssertionError(f"compute-sanitizer {name} exited with {process.returncode}\n{text[-6000:]}")


def main() -> None:
    """One small, ragged launch of everything on every back end, checked. VITQ_CHECK_DEVICE=cpu: without a GPU."""
    import torch
    from vitq.convert import to_integer

    import vitq_kernels as vk

    from . import models, ops
    from .machine import Machine

    machine = Machine(os.environ.get("VITQ_CHECK_DEVICE", "cuda"))
    with torch.no_grad(), vk.backend("triton"):
        # Fused with what is behind them, of a long K, which the C++ kernels split, and enough tiles for sm_90a's.
        more = [(19, 16, 64), (9, 80, 80), (5, 2064, 24), (1500, 64, 1416), (2600, 2048, 1700)]
        products = [(19, 72, 56)] + ([] if machine.dry else more)
        heads = [(2, 2, 17, 32, 2)] + ([] if machine.dry else [(1, 1, 300, 64, 0)])
        kinds = [ops.product_variants(machine, *shape) for shape in products]
        kinds += [ops.row_variants(machine, 7, k) for k in (72, 80)]
        kinds += [ops.attention_variants(machine, *shape) for shape in heads]
        for variants in kinds:
            for name in ops.check(ops.on_back_ends(machine, variants)):
                machine.synchronize()
                print(name, flush=True)
    model = models.minmax.vit(depth=1).to(machine.device)
    images = models.images_of(machine, model, 1)
    state = models.random_state(model, images, 4, True, 4, "subspace")
    for backend in ops.served(machine):
        with torch.no_grad():
            logits = to_integer(model, state, backend)(images)
        if not logits.isfinite().all():
            raise AssertionError(f"logits of the small model on {backend} are {logits.tolist()}")
        print(f"small model, {backend}", flush=True)


if __name__ == "__main__":
    main()
