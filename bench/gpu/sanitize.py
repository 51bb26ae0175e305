"""The smallest launches of every op under compute-sanitizer: ``python -m bench.gpu.sanitize`` is what runs inside it."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys

from . import ROOT, environment

TOOLS = ("memcheck", "racecheck")
FOUND = 9  # the exit code by which the tool says that it found an error


def run(seconds: float, tool: str | None = None) -> dict[str, str]:
    """Tool → "no errors", or why it says nothing.

    Raises: AssertionError with the end of the report if a tool found an error, or the launches themselves failed.
    """
    tool = shutil.which("compute-sanitizer") if tool is None else tool
    if tool is None:
        return dict.fromkeys(TOOLS, "not available: compute-sanitizer is not on the PATH")
    # Without a cache each tensor is an allocation of its own, beyond which any access is one out of bounds.
    env = environment() | {"PYTORCH_NO_CUDA_MEMORY_CACHING": "1"}
    found = {}
    for name in TOOLS:
        command = [tool, "--tool", name, "--error-exitcode", str(FOUND), sys.executable, "-m", "bench.gpu.sanitize"]
        try:
            done = subprocess.run(
                command, cwd=ROOT, env=env, capture_output=True, text=True, timeout=seconds / len(TOOLS)
            )
        except subprocess.TimeoutExpired:
            found[name] = f"out of time: not done within {seconds / len(TOOLS):.0f} s"
            continue
        report = done.stdout + done.stderr
        if done.returncode and ("not supported" in report or "Unable to" in report) and "Invalid" not in report:
            found[name] = f"not available: {next(x for x in report.splitlines() if 'support' in x or 'Unable' in x)}"
        elif done.returncode:
            raise AssertionError(f"compute-sanitizer {name} exited with {done.returncode}\n{report[-6000:]}")
        else:
            found[name] = "no errors"
    return found


def main() -> None:
    """One small, ragged launch of everything, checked. VITQ_CHECK_DEVICE=cpu: in the interpreter."""
    import torch

    import vitq_kernels as vk

    from . import models, ops
    from .machine import Machine

    machine = Machine(os.environ.get("VITQ_CHECK_DEVICE", "cuda"))
    with torch.no_grad(), vk.backend("triton"):
        for variants in (ops.product_variants(machine, 19, 72, 56), ops.row_variants(machine, 7, 72)):
            for name, variant in variants.items():
                if variant.check is not None:
                    variant.check(variant.run(variant.inputs))
                    machine.synchronize()
                    print(name, flush=True)
        if ops.attention_missing() is None:
            for shape in ((2, 2, 17, 32, 2), (1, 1, 300, 64, 0)):
                variant = ops.attention_variants(machine, *shape)["int8"]
                variant.check(variant.run(variant.inputs))
                machine.synchronize()
                print("attention", shape, flush=True)
    model = models.minmax.vit(depth=1).to(machine.device)
    images = models.images_of(machine, model, 1)
    with torch.no_grad():
        state = models.random_state(model, images, 4, True, 4, "subspace")
        logits = models.integer(model, state)[0](images)
    if not logits.isfinite().all():
        raise AssertionError(f"logits of the small model are {logits.tolist()}")
    print("small model", flush=True)


if __name__ == "__main__":
    main()
