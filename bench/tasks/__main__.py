"""Every task at every bit-width with every method: `python -m bench.tasks`, writes bench/results/tasks.json.

Rows that the file has of a task and a recipe are replaced, others stay: a run may be interrupted, and parts of the
table may be made anew. `bench/update_docs.py` makes the table of the documentation.
"""

from __future__ import annotations

import argparse
import json
import os
import tempfile
from pathlib import Path

import torch
from vitq.bench.environment import environment
from vitq.tasks import TASKS, run

RESULTS = Path(__file__).resolve().parents[1] / "results" / "tasks.json"


def merged(old: list[dict], new: list[dict]) -> list[dict]:
    """Rows with those of the same task and recipe replaced, in the order of the tasks' own lists."""
    fresh = {(row["task"], row["recipe"]) for row in new}
    rows = [row for row in old if (row["task"], row["recipe"]) not in fresh] + new
    order = [(task.name, recipe) for task in TASKS.values() for recipe in task.recipes]
    known = [row for row in rows if (row["task"], row["recipe"]) in order]
    return sorted(known, key=lambda row: order.index((row["task"], row["recipe"])))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tasks", nargs="+", choices=list(TASKS), default=list(TASKS))
    parser.add_argument("--recipes", nargs="+", help="only these (default: all)")
    parser.add_argument("--missing", action="store_true", help="only what the file lacks")
    parser.add_argument("--effort", type=float, help="of what is learned (default: the recipe's fast_effort)")
    parser.add_argument("--limit", type=int, help="samples per split (default: all)")
    parser.add_argument("--output", type=Path, default=RESULTS)
    parser.add_argument("--threads", type=int, default=1)
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    for name in options.tasks:
        task, floating = TASKS[name], None
        for recipe in task.recipes:
            rows = json.loads(options.output.read_text())["rows"] if options.output.exists() else []
            if options.recipes and recipe not in options.recipes:
                continue
            if options.missing and any((row["task"], row["recipe"]) == (name, recipe) for row in rows):
                continue
            floating = floating or task.evaluate(task.load(), options.limit)
            with tempfile.TemporaryDirectory() as folder:
                new = run(task, task.recipe(recipe, options.effort), Path(folder) / "c", floating, limit=options.limit)
            for row in new:
                integer = "none" if row["integer"] is None else f"{row['integer']:.2f}"
                print(f"{name} {recipe} {row['split']} {row['metric']}: float {row['float']:.2f}, simulated "
                      f"{row['simulated']:.2f}, integer {integer}, same {row['identical']}, "
                      f"{row['sqnr_db']:.1f} dB, {row['calibration_s']:.0f} s", flush=True)  # fmt: skip
            partial = options.output.with_suffix(".partial")
            result = {"environment": environment(), "rows": merged(rows, new)}
            partial.write_text(json.dumps(result, indent=1) + "\n")
            os.replace(partial, options.output)


if __name__ == "__main__":
    main()
