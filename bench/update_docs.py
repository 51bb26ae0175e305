"""Write the measured tables into the documentation: every figure there comes from a file that a command made.

python bench/update_docs.py [--demo build/demo/summary.json]
"""

from __future__ import annotations

import argparse
import json
import re
import shutil
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
RESULTS = ROOT / "bench" / "results"


def table(rows: list[dict], columns: dict[str, str]) -> str:
    """A Markdown table; ``columns`` maps keys to headings."""
    lines = ["| " + " | ".join(columns.values()) + " |", "|" + "---|" * len(columns)]
    return "\n".join(lines + ["| " + " | ".join(cell(row.get(k)) for k in columns) + " |" for row in rows])


def cell(value) -> str:
    if value is None:
        return "–"
    return f"{value:.2f}" if isinstance(value, float) else str(value)


def replace(text: str, name: str, body: str) -> str:
    """``text`` with what stands between the markers of table ``name`` replaced. Raises: ValueError without markers."""
    pattern = re.compile(rf"(<!-- table {name}:[^>]*-->\n).*?(<!-- end -->)", re.S)
    if not pattern.search(text):
        raise ValueError(f"there are no markers of table {name!r}")
    return pattern.sub(lambda m: m.group(1) + body + "\n" + m.group(2), text)


def demo_table(summary: dict) -> str:
    """One row per recipe and model variant, the two splits side by side."""
    rows: dict[tuple[str, str], dict] = {}
    for run in summary["runs"]:
        row = rows.setdefault((run["variant"], run["recipe"]), {"variant": run["variant"], "recipe": run["recipe"]})
        split = run["split"]
        row[f"{split}_top1"] = f"{run['top1_integer']:.2f} ({run['top1_float']:.2f})"
        row[f"{split}_sqnr"] = run["logit_sqnr_db"]
        row["parity"] = min(row.get("parity", 1.0), run["agreement_simulated_integer"])
        row["mb"] = f"{run['size_bytes_integer'] / 1e6:.2f} ({run['size_bytes_float'] / 1e6:.2f})"
        row["speedup"] = run["speedup"]
    columns = {
        "variant": "model",
        "recipe": "recipe",
        "test_top1": "clean top-1 (float)",
        "test_sqnr": "SQNR dB",
        "hard_top1": "hard top-1 (float)",
        "hard_sqnr": "SQNR dB ",
        "parity": "simulated = integer",
        "mb": "MB (float)",
        "speedup": "speed-up b1",
    }
    return table(list(rows.values()), columns)


def bench_tables(result: dict) -> str:
    """Models and single layers."""
    columns = {"model": "model", "batch": "batch", "threads": "threads", "latency_ms": "ms", "speedup": "speed-up",
               "model_mb": "MB"}  # fmt: skip
    rows = [{**r, "model_mb": r["model_bytes"] / 1e6} for r in result["models"]]
    return table(rows, columns)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--demo", type=Path, help="summary.json of make demo; kept as bench/results/demo.json")
    args = parser.parse_args()
    if args.demo:
        shutil.copy(args.demo, RESULTS / "demo.json")
    readme = ROOT / "README.md"
    text = readme.read_text()
    text = replace(text, "demo", demo_table(json.loads((RESULTS / "demo.json").read_text())))
    text = replace(text, "bench", bench_tables(json.loads((RESULTS / "cpu.json").read_text())))
    readme.write_text(text)


if __name__ == "__main__":
    main()
