"""Tables of a results record: the summary on the terminal, the Markdown beside the record, docs/gpu.md, and the file
that dispatch reads."""

from __future__ import annotations

import itertools
import statistics
from typing import Any

from bench.tables import json_rows, table

from . import roofline
from .goals import ALONE, GOALS, WHOLE
from .roofline import H200, Work

Record = dict[str, Any]
UNMEASURED = "Unmeasured: no results file of a GPU is in bench/results."


def roofline_rows() -> list[dict[str, Any]]:
    """Every kernel at shapes of ViT-B: batch 32 (M = 6304), and those where another unit is the bound."""
    cases: list[tuple[str, str, Work]] = []
    for images in (32, 1):
        block = roofline.block(197, images, 768, 12, 32)
        cases += [(name, f"ViT-B, M = {197 * images}, rank 32", work) for name, work in block.items()]
    cases += [
        ("fc1, 4-bit weights, GELU + quantize", "ViT-B, M = 197, rank 32",
         roofline.linear(197, 3072, 768, 32, bits=4, out_bytes=1, rank_down=32)),
        ("quantize, per token", "M = 6304, K = 768", roofline.quantize(6304, 768)),
        ("quantize, t, subspace", "M = 6304, K = 768, rank 32", roofline.quantize(6304, 768, 32, subspace=True)),
        ("attention", "B = 16, H = 12, N = 1024, d = 64", roofline.attention(16, 12, 1024, 64)),
        ("attention, windows", "B = 4096, H = 4, N = 49, d = 32",
         roofline.attention(4096, 4, 49, 32, bias=True, mask=64)),
    ]  # fmt: skip
    return [
        {
            "kernel": name,
            "shape": shape,
            "mb": work.bytes / 1e6,
            "int8": work.int8 / 1e9,
            "half": work.half / 1e9,
            "exp2": work.exp2 / 1e6,
            "floor": work.floor(H200) * 1e6,
            "bound": work.bound(H200),
        }
        for name, shape, work in cases
    ]


def roofline_table() -> str:
    columns = {"kernel": "kernel", "shape": "shape", "mb": "MB", "int8": "int8 Gop", "half": "16-bit Gop",
               "exp2": "M exp2", "floor": "floor µs", "bound": "bound by"}  # fmt: skip
    return table(roofline_rows(), columns)


def goal_rows(record: Record | None) -> list[dict[str, Any]]:
    """Goal, target, measured, and whether it was met ("unmeasured" where there is no figure)."""
    rows = []
    for goal in GOALS:
        figure = goal.measure(record)
        state = "unmeasured" if figure is None else "yes" if goal.met(figure) else "no"
        measured = None if figure is None else f"{figure:.2f}{goal.unit}"
        rows.append({"goal": goal.name, "target": goal.target, "measured": measured, "met": state})
    return rows


def goal_table(record: Record | None) -> str:
    return table(goal_rows(record), {"goal": "goal", "target": "target", "measured": "measured", "met": "met"})


def _speedup(row: Record, name: str, against: str) -> float | None:
    ours, theirs = row["ms"].get(name), row["ms"].get(against)
    return None if ours is None or theirs is None else theirs / ours


def product_table(record: Record) -> str:
    rows = []
    for row in record.get("products", ()):
        ratios = {name: _speedup(row, name, "bf16") for name in (ALONE, WHOLE, "w4 rank 32", "_int_mm")}
        cost = _speedup(row, "w8", ALONE)
        rows.append({
            **{key: row[key] for key in ("M", "K", "N")},
            "us": row["ms"][ALONE] * 1e3,
            "tops": row["tops"],
            **ratios,
            "cost": None if cost is None else f"{100 * (cost - 1):.1f} %",
            "of_floor": row["of_floor"][ALONE],
        })  # fmt: skip
    columns = {"M": "M", "K": "K", "N": "N", "us": "µs", "tops": "TOPS", ALONE: "× bf16", WHOLE: "× with quantize",
               "w4 rank 32": "× W4A8", "_int_mm": "_int_mm × bf16", "cost": "rank 32 costs",
               "of_floor": "of floor"}  # fmt: skip
    return table(rows, columns)


SIZES = ("M", "K", "N", "B", "H", "d")
TIMED = {"products": "Products", "rows": "Quantizing passes", "attention": "Attention"}


def versus(record: Record, key: str) -> list[dict[str, Any]]:
    """Of every shape: the speed-ups of the C++ kernels over Triton's, by the kernel's name."""
    found = []
    for row in record.get(key, ()):
        ratios = {name: _speedup(row, f"{name} cuda", name) for name in row["ms"]}
        sizes = {name: size for name, size in row.items() if name in SIZES}
        found.append(sizes | {name: ratio for name, ratio in ratios.items() if ratio is not None})
    return found


def versus_tables(record: Record) -> str:
    """Speed-up of the C++ kernels over Triton's, shape by shape, and what that makes of them."""
    from vitq_kernels.tuning import serving  # not before a dry run chose the interpreter

    parts = []
    for key, title in TIMED.items():
        rows = versus(record, key)
        names = [name for name in dict.fromkeys(itertools.chain(*rows)) if name not in SIZES]
        if not names:
            continue
        ratios = [row[name] for row in rows for name in names if name in row]
        won = f"{sum(x >= serving.LEAST for x in ratios)} of {len(ratios)}"
        middle = f"median {statistics.median(ratios):.2f}×, worst {min(ratios):.2f}×, best {max(ratios):.2f}×"
        sizes = {name: name for name in rows[0] if name in SIZES}
        parts += [f"{title}: the C++ kernels win {won}; {middle}.", table(rows, sizes | {name: name for name in names})]
    return "\n\n".join(parts)


def serving_table(record: Record) -> str:
    """The file by which dispatch knows where the C++ kernels won (``vitq_kernels/tuning/serving.py``); "" if only one
    back end was timed."""
    least: dict[tuple, float] = {}
    for key in TIMED:
        for row in record.get(key, ()):
            for name, (op, layout, sizes) in row["calls"].items():
                if (speedup := _speedup(row, f"{name} cuda", name)) is not None:
                    at = op, layout, tuple(sizes)
                    least[at] = min(least.get(at, speedup), speedup)
    if not least:
        return ""
    about = {key: record["environment"][key] for key in ("gpu", "commit")}
    rows = [[op, layout, *sizes, round(speedup, 3)] for (op, layout, sizes), speedup in sorted(least.items())]
    return json_rows(about | {"date": record["date"], "rows": rows}) + "\n"


def row_table(record: Record) -> str:
    """Achieved GB/s of the quantizing passes."""
    rows = [{"M": row["M"], "K": row["K"], **row["gb_per_s"]} for row in record.get("rows", ())]
    names = list(rows[0])[2:] if rows else []
    return table(rows, {"M": "M", "K": "K"} | {name: f"{name}, GB/s" for name in names})


def attention_table(record: Record) -> str:
    rows = []
    for row in record.get("attention", ()):
        best = min((ms, name) for name, ms in row["ms"].items() if name.startswith("sdpa "))[1]
        shape = {key: row[key] for key in ("B", "H", "N", "d")}
        rows.append(shape | {
            "us": row["ms"]["int8"] * 1e3,
            "ratio": _speedup(row, "int8", "sdpa"),
            "best": best.removeprefix("sdpa "),
            "of_floor": row["of_floor"]["int8"],
        })  # fmt: skip
    columns = {"B": "B", "H": "H", "N": "N", "d": "d", "us": "µs", "ratio": "× SDPA", "best": "its best back end",
               "of_floor": "of floor"}  # fmt: skip
    return table(rows, columns)


def model_table(record: Record) -> str:
    rows = []
    for row in record.get("models", ()):
        for name, ms in row["ms"].items():
            memory = row["memory_mb"][name]
            rows.append({
                "model": row["model"],
                "batch": row["batch"],
                "as": name,
                "ms": f"{ms:.3f}",
                "images": row["batch"] / ms * 1e3,
                "eager": _speedup(row, name, "bf16"),
                "compiled": _speedup(row, name, "bf16 compiled"),
                "weights": memory["weights"],
                "peak": memory["peak"],
            })  # fmt: skip
    columns = {"model": "model", "batch": "batch", "as": "as", "ms": "ms", "images": "images/s",
               "eager": "× bf16 eager", "compiled": "× bf16 compiled", "weights": "weights MB",
               "peak": "peak MB"}  # fmt: skip
    return table(rows, columns)


def learning_table(record: Record) -> str:
    """Quantizers as they are learned, with their derivatives."""
    rows = []
    for row in record.get("learning", ()):
        ratio = _speedup(row, "ours", "torch")
        us = row["ms"]["ours"] * 1e3
        rows.append({k: row[k] for k in ("what", "shape")} | {"us": us, "ratio": ratio, "of": row["of_floor"]["ours"]})
    columns = {"what": "what", "shape": "shape", "us": "µs", "ratio": "× torch's", "of": "of floor"}
    return table(rows, columns)


def calibration_table(record: Record) -> str:
    """Steps of calibration, a line per method and precision."""
    rows = []
    for row in record.get("calibration", ()):
        for method, ms in row["ms"].items():
            steps, estimate = row["steps"][method], row["estimated_ms"][method]
            rows.append({"recipe": row["recipe"], "learning": row["learning"], "method": method, "steps": steps,
                         "ms": f"{ms:.3f}", "estimate": f"{estimate:.3f}", "minutes": ms * steps / 6e4})  # fmt: skip
    columns = {"recipe": "recipe", "learning": "learning", "method": "method", "steps": "steps", "ms": "ms a step",
               "estimate": "estimated", "minutes": "minutes"}  # fmt: skip
    return table(rows, columns)


TABLES = {
    "products": product_table,
    "rows": row_table,
    "attention": attention_table,
    "learning": learning_table,
    "calibration": calibration_table,
    "models": model_table,
}
TITLES = {"learning": "Learned quantizers, forward and back", "calibration": "Calibration", "models": "Models"}


def markdown(record: Record) -> str:
    """The whole record: environment, goals, and a table of each kind."""
    where = ", ".join(f"{key} {value}" for key, value in record["environment"].items())
    parts = [f"# {record['environment']['gpu']}", where, ceilings(record), "## Goals", goal_table(record)]
    parts += ["## What was checked", *(f"- {name}: {what}" for name, what in record["checks"].items())]
    for key, make in TABLES.items():
        if record.get(key):
            parts += [f"## {(TIMED | TITLES)[key]}", make(record)]
    if versus := versus_tables(record):
        parts += ["## C++ kernels over Triton's", versus]
    if record["left_out"]:
        parts += ["## Left out", *(f"- {line}" for line in record["left_out"])]
    return "\n\n".join(parts).replace("\n\n- ", "\n- ") + "\n"


def ceilings(record: Record) -> str:
    peaks = record.get("peaks")
    if peaks is None:
        return "Ceilings: not measured."
    return (
        f"Ceilings measured through torch on random data: copy {peaks['bandwidth'] / 1e12:.2f} TB/s, bf16 "
        f"{peaks['half'] / 1e12:.0f} TFLOP/s, int8 {peaks['int8'] / 1e12:.0f} TOPS. *Of floor*: the floor under these "
        "ceilings over the measured time; 1 is the roofline."
    )


def results(record: Record | None) -> str:
    """The measured part of docs/gpu.md."""
    if record is None:
        return UNMEASURED
    parts = [f"{record['environment']['gpu']}, commit {record['environment']['commit']}. {ceilings(record)}"]
    parts += [make(record) for key, make in TABLES.items() if record.get(key)]
    if versus := versus_tables(record):
        parts += ["Speed-up of the C++ kernels over Triton's, shape by shape:", versus]
    return "\n\n".join(parts)
