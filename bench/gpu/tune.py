"""Finds tile configurations on the GPU at hand and writes them to vitq_kernels/tuning/<gpu>.json.

    python -m bench.gpu.tune --minutes 20 [--kinds w8 w4] [--output FOLDER]

Every candidate's result is checked before it is timed. Processes first compile candidates, then this one times alone.
What was timed is kept in build/gpu-check, so that a second run goes on where the first ran out of time; the table is
written after every shape, all of it or nothing. Kinds without a timed row keep those of the GPU's compute capability.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import subprocess
import sys
import time
from dataclasses import asdict
from pathlib import Path

from bench.tables import json_rows

from . import ROOT, environment

KINDS = ("w8", "w4", "attention", "w8_float", "w4_float")
COMPILING = 0.5
"""Share of the time for compiling ahead."""


class Store:
    """Milliseconds of everything that was timed, and the table made of it."""

    def __init__(self, machine, folder: Path, table: Path) -> None:
        self.machine, self.path = machine, folder / f"tune-{machine.slug}.json"
        self.table = table / f"{machine.slug}.json"
        self.ms: dict[str, float] = json.loads(self.path.read_text()) if self.path.exists() else {}

    @staticmethod
    def key(shape, config) -> str:
        return json.dumps([asdict(shape), asdict(config)])

    def save(self, template: dict) -> None:
        """The timings, and ``template`` with the fastest configuration of every shape in the place of its rows."""
        best: dict[tuple[str, int, int], tuple[float, dict]] = {}
        for key, ms in self.ms.items():
            if ms == math.inf:
                continue
            shape, config = json.loads(key)
            at = shape["kind"], shape["m"], shape["n"]
            best[at] = min(best.get(at, (ms, config)), (ms, config), key=lambda entry: entry[0])
        record = {**template, "gpu": self.machine.name, "measured": True}
        kinds = sorted({kind for kind, _, _ in best}, key=KINDS.index)
        record["note"] = f"timed by bench/gpu/tune.py: {', '.join(kinds)}; other kinds as for the compute capability"
        for kind in kinds:
            rows = sorted((m, n, config) for (k, m, n), (_, config) in best.items() if k == kind)
            columns = record["attention_columns" if kind == "attention" else "columns"]
            record[kind] = [[m, n, *(config[c] for c in columns)] for m, n, config in rows]
        for path, text in ((self.path, json.dumps(self.ms, indent=1)), (self.table, json_rows(record))):
            path.parent.mkdir(parents=True, exist_ok=True)
            part = path.with_name(f".{path.name}.part")
            part.write_text(text + "\n")
            part.replace(path)


def template(machine) -> dict:
    """The table that serves this GPU as long as none of its own does."""
    import torch

    from vitq_kernels import tuning

    major, minor = (8, 0) if machine.dry else torch.cuda.get_device_capability()
    serving = tuning._for_capability(10 * major + minor)  # loaded once: the very object
    path = next(path for path in tuning.files() if tuning.load(path.stem) is serving)
    return json.loads(path.read_text())


def pending(store: Store, shapes: list) -> list[tuple]:
    """Shapes, with the configurations of each that were not timed yet."""
    from vitq_kernels.triton import host

    from .candidates import candidates

    processors, most = host.processors(store.machine.device), 2 if store.machine.dry else 16
    found = []
    for shape in shapes:
        left = [c for c in candidates(shape, processors, most) if store.key(shape, c) not in store.ms]
        if left:
            found.append((shape, left))
    return found


def compile_ahead(seconds: float, kinds: list[str], cache: Path) -> None:
    """Runs the candidates once, in as many processes as there are processors for it; only their disk cache matters."""
    count = max(1, (os.cpu_count() or 2) - 2)
    command = [sys.executable, "-m", "bench.gpu.tune", "--cache", str(cache), "--kinds", *kinds, "--share"]
    quiet = {"stdout": subprocess.DEVNULL, "stderr": subprocess.DEVNULL}
    children = [
        subprocess.Popen([*command, f"{i}/{count}"], cwd=ROOT, env=environment(), **quiet) for i in range(count)
    ]
    deadline = time.monotonic() + seconds
    try:
        for child in children:
            child.wait(max(0.0, deadline - time.monotonic()))
    except subprocess.TimeoutExpired:
        pass  # what is not compiled by then is compiled when it is timed
    finally:
        for child in children:
            child.kill()
            child.wait()


def tune(machine, store: Store, shapes: list, seconds: float) -> int:
    """Times what is pending until the time is up; the number of shapes that are left."""
    from .candidates import Bench

    deadline = time.monotonic() + seconds
    base, left = template(machine), pending(store, shapes)
    for done, (shape, configs) in enumerate(left):
        if time.monotonic() > deadline:
            return len(left) - done
        bench = Bench(machine, shape)
        for config in configs:
            store.ms[store.key(shape, config)] = bench.run(config, True)
        store.save(base)
        best = min(store.ms[store.key(shape, config)] for config in configs)
        print(f"{shape}: best {best:.4f} ms of {len(configs)}", flush=True)
    return 0


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--minutes", type=float, default=20.0)
    parser.add_argument("--kinds", nargs="+", choices=KINDS, default=list(KINDS))
    parser.add_argument("--output", type=Path, default=ROOT / "vitq_kernels" / "tuning", help="folder of the table")
    parser.add_argument("--cache", type=Path, default=ROOT / "build" / "gpu-check", help="folder of the timings")
    parser.add_argument("--share", help=argparse.SUPPRESS)  # index/count: compile only, every count-th candidate
    parser.add_argument("--dry-run", action="store_true", help="one tiny shape a kind, in Triton's interpreter")
    args = parser.parse_args(argv)
    if args.dry_run:
        os.environ["TRITON_INTERPRET"] = "1"
    import torch

    from .candidates import Bench, work
    from .machine import Machine

    machine = Machine("cpu" if args.dry_run else "cuda")
    store, shapes = Store(machine, args.cache, args.output), work(args.kinds, machine.dry)
    with torch.no_grad():
        if args.share:
            index, count = map(int, args.share.split("/"))
            everything = [(shape, config) for shape, configs in pending(store, shapes) for config in configs]
            for shape, config in everything[index::count]:
                Bench(machine, shape).run(config, False)
            return 0
        seconds = 60 * args.minutes
        if not machine.dry:
            compile_ahead(COMPILING * seconds, args.kinds, args.cache)
            seconds *= 1 - COMPILING
        left = tune(machine, store, shapes, seconds)
    print(f"{store.table}: {f'{left} shapes are left: run this again' if left else 'complete'}")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
