"""Tables of a results record: the summary on the terminal, the Markdown beside the record, and docs/gpu.md."""

from __future__ import annotations

from typing import Any

from bench.tables import table

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
            "cuda": _speedup(row, f"{ALONE} cuda", ALONE),
            "cuda4": _speedup(row, "w4 rank 32 cuda", "w4 rank 32"),
            "cost": None if cost is None else f"{100 * (cost - 1):.1f} %",
            "of_floor": row["of_floor"][ALONE],
        })  # fmt: skip
    columns = {"M": "M", "K": "K", "N": "N", "us": "µs", "tops": "TOPS", ALONE: "× bf16", WHOLE: "× with quantize",
               "w4 rank 32": "× W4A8", "_int_mm": "_int_mm × bf16", "cost": "rank 32 costs",
               "of_floor": "of floor", "cuda": "C++ × Triton", "cuda4": "C++ × Triton, W4A8"}  # fmt: skip
    return table(rows, columns)


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


def markdown(record: Record) -> str:
    """The whole record: environment, goals, and a table of each kind."""
    where = ", ".join(f"{key} {value}" for key, value in record["environment"].items())
    parts = [f"# {record['environment']['gpu']}", where, ceilings(record), "## Goals", goal_table(record)]
    parts += ["## What was checked", *(f"- {name}: {what}" for name, what in record["checks"].items())]
    titles = {"products": ("Products", product_table), "rows": ("Quantizing passes", row_table),
              "attention": ("Attention", attention_table), "models": ("Models", model_table)}  # fmt: skip
    for key, (title, make) in titles.items():
        if record.get(key):
            parts += [f"## {title}", make(record)]
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
    for make, key in ((product_table, "products"), (row_table, "rows"), (attention_table, "attention"),
                      (model_table, "models")):  # fmt: skip
        if record.get(key):
            parts.append(make(record))
    return "\n\n".join(parts)
