"""The accuracy rows as Markdown: one table per model and variant, mean ± standard deviation over the seeds."""

from __future__ import annotations

import re
import statistics
from functools import cache
from pathlib import Path
from typing import Any

import yaml

from bench.tables import table

RESULTS = Path(__file__).resolve().parents[1] / "results" / "accuracy.json"
PAPERS = Path(__file__).with_name("papers.yaml")
HEADINGS = {"test": "clean", "hard": "hard"}


@cache
def papers() -> dict[str, Any]:
    """Published figures: `float` by model; `methods`, each with `source` and top-1 by bits and model."""
    return yaml.safe_load(PAPERS.read_text())


def published(model: str, recipe: str) -> float | None:
    """Top-1 that the paper of a recipe's method reports for `model` at the recipe's bits, or None."""
    found = re.fullmatch(r"(.+?)-(w\da\d)(-static|-dynamic)?", recipe)
    method = papers()["methods"].get(found[1] if found else "", {})
    return method.get(found[2], {}).get(model) if found else None


def spread(values: list[float | None]) -> str | None:
    """Mean ± sample standard deviation; only the mean of one value, None without a value."""
    present = [value for value in values if value is not None]
    if not present:
        return None
    mean = f"{statistics.fmean(present):.2f}"
    return mean if len(present) == 1 else f"{mean} ± {statistics.stdev(present):.2f}"


def summary(rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """One line per recipe of one model and variant, the best first within each pair of bit-widths.

    Best is by the clean split's top-1 of the model that runs, then by its logit SQNR.
    """
    lines = []
    for name in dict.fromkeys(row["recipe"] for row in rows):
        mine = [row for row in rows if row["recipe"] == name]
        by_split = {s: [row for row in mine if row["split"] == s] for s in dict.fromkeys(r["split"] for r in mine)}
        first = by_split["test"][0]
        bits = f"{first['average_weight_bits']:.2f} / {first['average_act_bits']:.2f}"
        line: dict[str, Any] = {
            "recipe": name,
            "bits": bits,
            "branch": first["average_weight_bits_with_branch"],
            "seeds": len(by_split["test"]),
            "integer": _integer(mine),
            "calibration_s": spread([row["calibration_s"] for row in by_split["test"]]),
            "peak_mb": f"{max(row['peak_mb'] for row in mine):.0f}",
            "mb": None if first["size_bytes"] is None else first["size_bytes"] / 1e6,
            "paper": published(first["model"], name),
        }
        for split, some in by_split.items():
            line[f"{split}_top1"] = spread([row["top1_simulated"] for row in some])
            line[f"{split}_agreement"] = spread([100 * row["agreement"] for row in some])
            line[f"{split}_sqnr"] = spread([row["logit_sqnr_db"] for row in some])
        means = [statistics.fmean(row[k] for row in by_split["test"]) for k in ("top1_simulated", "logit_sqnr_db")]
        lines.append(((-first["weight_bits"], -first["act_bits"], *(-mean for mean in means)), line))
    return [line for _, line in sorted(lines, key=lambda pair: pair[0])]


def _integer(rows: list[dict[str, Any]]) -> str:
    """Whether there is an integer model, and whether its top-1 is the simulated one's in every row."""
    if not all(row["deployable"] for row in rows):
        return "no"
    worst = max(abs(row["top1_integer"] - row["top1_simulated"]) for row in rows)
    return "=" if worst == 0 else f"differs by {worst:.2f}"


def tables(rows: list[dict[str, Any]]) -> str:
    """Every model and variant under a heading of its own, and why recipes have no integer model."""
    parts = []
    for model, variant in dict.fromkeys((row["model"], row["variant"]) for row in rows):
        mine = [row for row in rows if (row["model"], row["variant"]) == (model, variant)]
        floats = {row["split"]: row["top1_float"] for row in mine}
        names = [split for split in HEADINGS if split in floats]
        about = ", ".join(f"{HEADINGS[s]} {floats[s]:.2f}" for s in names)
        if model in papers()["float"]:
            about += f"; as published {papers()['float'][model]:.2f}"
        lines = summary(mine)
        columns = {"recipe": "recipe", "bits": "bits W / A", "branch": "W with branch"}
        for split in names:
            columns |= {
                f"{split}_top1": f"{HEADINGS[split]} top-1",
                f"{split}_agreement": "= float %" + " " * names.index(split),
                f"{split}_sqnr": "SQNR dB" + " " * names.index(split),
            }
        if any(line["paper"] is not None for line in lines):
            columns["paper"] = "as published"
        columns |= {"integer": "integer", "calibration_s": "calib. s", "peak_mb": "peak MB", "mb": "MB"}
        parts.append(f"### {model}, {variant} (float: {about})\n\n{table(lines, columns)}")
    reasons = {row["recipe"]: row["reason"] for row in rows if not row["deployable"]}
    if reasons:
        parts.append("\n".join(f"- {name}: {reason}" for name, reason in sorted(reasons.items())))
    return "\n\n".join(parts)


def _means(rows: list[dict[str, Any]], key: str) -> dict[str, float]:
    """Recipe to the mean of ``key`` over its rows."""
    names = dict.fromkeys(row["recipe"] for row in rows)
    return {name: statistics.fmean(row[key] for row in rows if row["recipe"] == name) for name in names}


def leaders(rows: list[dict[str, Any]]) -> str:
    """Our recipes beside the best of all others at the same nominal bits, per model, variant and split.

    With a branch (the best `vitq`), without one (`vitq-strict`), and whoever else is best, by logit SQNR; then the same
    for the share of images of the float model's class. A last line counts the cells that ours lead.
    """
    cells: dict[tuple, list[dict[str, Any]]] = {}
    for row in rows:
        bits = f"W{row['weight_bits']}A{row['act_bits']}"
        cells.setdefault((bits, row["model"], row["variant"], row["split"]), []).append(row)
    lines, ahead = [], {"sqnr": 0, "agreement": 0}
    for (bits, model, variant, split), mine in sorted(cells.items(), key=lambda cell: (cell[0][1:], cell[0][0])):
        if not any(_ours(r["recipe"]) for r in mine) or all(_ours(r["recipe"]) for r in mine):
            continue
        line = {"model": f"{model}, {variant}", "split": HEADINGS.get(split, split), "bits": bits}
        for key, name, factor in (("logit_sqnr_db", "sqnr", 1), ("agreement", "agreement", 100)):
            means = {recipe: factor * mean for recipe, mean in _means(mine, key).items()}
            best = max((r for r in means if not _ours(r)), key=means.__getitem__)
            own = max((r for r in means if _ours(r)), key=means.__getitem__)
            strict = [mean for recipe, mean in means.items() if recipe.startswith("vitq-strict")]
            line |= {name: means[own], f"{name}_strict": strict[0] if strict else None}
            line |= {f"{name}_other": f"{means[best]:.2f} ({best})"}
            ahead[name] += means[own] >= means[best]
        lines.append(line)
    columns = {"model": "model", "split": "split", "bits": "bits", "sqnr": "vitq dB", "sqnr_strict": "vitq-strict dB",
               "sqnr_other": "best other dB", "agreement": "vitq = float %", "agreement_strict": "vitq-strict %",
               "agreement_other": "best other %"}  # fmt: skip
    count = f"Highest SQNR in {ahead['sqnr']} and most images of the float model's class in {ahead['agreement']}"
    return f"{table(lines, columns)}\n\n{count} of {len(lines)} cells: `vitq`, `vitq-mixed` or `vitq-strict`."


def _ours(recipe: str) -> bool:
    return recipe.startswith("vitq")
