"""Compiles what will be timed, into the caches on disk, while the tests run: ``python -m bench.gpu.warm products 0/2``.

Nothing here is measured. What Inductor found to be its fastest configurations is dropped before timing starts, because
it was found on a busy GPU: the timed process compares them again, without compiling.
"""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

from . import ROOT, environment, shapes

PRODUCTS = 3
"""Processes for the single kernels."""


def jobs() -> list[list[str]]:
    products = [["products", f"{i}/{PRODUCTS}"] for i in range(PRODUCTS)]
    return products + [["model", name] for name in shapes.MODELS if name != "ViT-S"]  # the same as DeiT-S


class Warming:
    """The jobs as background processes, from construction to :meth:`stop`."""

    def __init__(self) -> None:
        command = [sys.executable, "-m", "bench.gpu.warm"]
        quiet = {"stdout": subprocess.DEVNULL, "stderr": subprocess.DEVNULL}
        self._processes = {
            " ".join(job): subprocess.Popen([*command, *job], cwd=ROOT, env=environment(), **quiet) for job in jobs()
        }

    def stop(self) -> dict[str, str]:
        """Ends what still runs. Returns: job → "done", "stopped" or its exit code."""
        outcome = {}
        for name, process in self._processes.items():
            code = process.poll()
            if code is None:
                process.kill()
                process.wait()
            outcome[name] = "stopped" if code is None else "done" if code == 0 else f"exit code {code}"
        if folder := os.environ.get("TORCHINDUCTOR_CACHE_DIR"):
            for path in Path(folder).rglob("*.best_config"):
                path.unlink()
        return outcome


def main(arguments: list[str]) -> None:
    import torch

    import vitq_kernels as vk

    from . import models, ops
    from .machine import Machine

    machine = Machine("cuda")
    with torch.no_grad(), vk.backend("triton"):
        if arguments[0] == "products":
            index, count = map(int, arguments[1].split("/"))
            for m, k, n in shapes.products(False)[index::count]:
                for variant in ops.product_variants(machine, m, k, n).values():
                    variant.run_once()
            for m, k in shapes.rows(False)[index::count]:
                for variant in ops.row_variants(machine, m, k).values():
                    variant.run_once()
            for shape in shapes.attentions(False)[index::count]:
                for quantized in (False, True):
                    ops.attention(machine, *shape, quantized).run_once()
        else:
            model = models.build(machine, shapes.MODELS[arguments[1]], torch.bfloat16)
            run = models.compiled(model)
            for batch in shapes.BATCHES[:2]:
                run(models.images_of(machine, model, batch, torch.bfloat16))


if __name__ == "__main__":
    main(sys.argv[1:])
