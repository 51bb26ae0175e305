"""One process of a run: ``python -m bench.worker JOB OUT``, both JSON files. Started by ``bench.run``.

A process of its own gives a peer its own thread pool, settings and memory, and keeps its failure to itself. Cores and
environment variables are set by who starts it, before torch is loaded.
"""

from __future__ import annotations

import importlib
import json
import sys
from pathlib import Path
from typing import Any

import torch

from . import harness, registry, whole


def work(job: dict[str, Any]) -> dict[str, Any]:
    """Rows of the job's cases; what was wrong and what the peer could not do, case → reason.

    Args: job: bench, cases, threads, seconds, rounds, peer (or None), modules to import.
    """
    bench, out = registry.benchmarks[job["bench"]], {"rows": [], "wrong": {}, "absent": {}}
    for case in job["cases"]:
        try:
            rows = harness.measure(bench, case, job["threads"], job["seconds"], job["peer"], job["rounds"])
        except AssertionError as error:
            out["wrong"][case] = str(error).strip().splitlines()[0]
            continue
        except Exception as error:
            # Whatever third-party code makes of a model is a reason for the report; ours has no such excuse.
            if job["peer"] is None:
                raise
            out["absent"][case] = f"{type(error).__name__}: {' '.join(str(error).split())[:200]}"
            continue
        out["rows"] += rows
        for row in rows:
            spread = f"({row['ratio_p20']:.2f}–{row['ratio_p80']:.2f})"
            print(
                f"{row['bench']} {case} t{job['threads']}  {row['ours']} {row['ours_ms']:.3f} ms, {row['baseline']} "
                f"{row['baseline_ms']:.3f} ms, ×{row['ratio']:.2f} {spread}",
                flush=True,
            )
    return out


def main() -> None:
    source, target = map(Path, sys.argv[1:])
    job = json.loads(source.read_text())
    torch.set_num_threads(job["threads"])
    for name in job["modules"]:
        importlib.import_module(name)
    # A profile is of one case: where its time goes, not how it compares.
    found = whole.profiles(*job["cases"], job["threads"]) if job["bench"] == "profile" else work(job)
    target.write_text(json.dumps(found, allow_nan=False))


if __name__ == "__main__":
    main()
