"""The parts of AIQViT and of the deployment recipes, one at a time, on the shipped model.

python -m vitq.bench.ablation --output bench/results/ablation.json --markdown docs/ablation.md
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from .. import jobs
from ..data import load_data
from ..evaluate import predict, sqnr_db, top1
from ..models.digits_vit import NAME
from ..recipes import load_recipe
from ..sources import ModelSource, load_float
from .environment import environment

PAPER_FOCUS = {"anchor": "absolute", "power": 1.0, "below": "floor", "renormalize": False}
FIXED = {"b1": 0.0, "b2": 1.0}
NO_BRANCH = {"kind": "none", "rank": 0}


@dataclass(frozen=True)
class Case:
    """One row: a recipe with overrides."""

    group: str
    label: str
    recipe: str
    overrides: dict[str, Any] = field(default_factory=dict)
    seed: int = 0


def _bits(weights: int, activations: int, operands: int = 8, softmax: int = 8) -> dict[str, int]:
    return {"weights": weights, "activations": activations, "operands": operands, "softmax": softmax}


def aiqvit_cases() -> list[Case]:
    """The paper's ablation: parts added one by one at W4A4, static, the paper's quantizer of the softmax."""
    group = "AIQViT at W4A4, part by part"

    def case(label: str, branch: bool, focus: bool, curriculum: float) -> Case:
        overrides = {
            "fast_effort": 0.02,  # 120 steps a block
            "focus": {**PAPER_FOCUS, **FIXED},
            "low_rank": {"kind": "error", "rank": 32} if branch else NO_BRANCH,
            "initialise": [{"method": "scales", "focus_search": 12 if focus else 0}],
            "allocate": [],
            "reconstruct": [{"method": "blocks", "curriculum": curriculum, "lr_focus": 1e-2 if focus else 0.0}],
        }
        return Case(group, label, "aiqvit-w4a4", overrides)

    return [
        case("reconstruction alone", False, False, 1.0),
        case("+ low-rank branch", True, False, 1.0),
        case("+ focusing quantizer", False, True, 1.0),
        case("+ both", True, True, 1.0),
        case("+ both + curriculum", True, True, 0.5),
    ]


def branch_cases() -> list[Case]:
    """Kinds of low-rank branch at equal rank, closed form only."""
    out = []
    for bits, recipe in ((_bits(4, 4), "vitq-w4a4"), (_bits(3, 8), "vitq-w4a8")):
        group = f"Low-rank branch, rank 32, W{bits['weights']}A{bits['activations']} per token"
        for label, kind, start in (
            ("none", "none", "whitened"),
            ("merged", "merged", "whitened"),
            ("error, plain SVD", "error", "plain"),
            ("error, whitened SVD", "error", "whitened"),
            ("error, whole output error", "error", "output"),
            ("subspace", "subspace", "whitened"),
        ):
            low_rank = {"kind": kind, "rank": 0 if kind == "none" else 32}
            steps = [{"method": "closed_form", "start": start}]
            out.append(Case(group, label, recipe, {"bits": bits, "low_rank": low_rank, "compensate": steps}))
    return out


def deployment_cases() -> list[Case]:
    """vitq-mixed built up part by part, then what its uniform form loses or gains by one part less, other or more."""
    fold = {"method": "reparameterize", "strength": 0.5, "width": "deviation", "keys": True}
    solve = {"method": "closed_form", "rounding": "compensated"}
    plain = {"transform": [], "compensate": [], "low_rank": NO_BRANCH, "activation_levels": "uniform"}
    parts = (
        ("scales alone", {}),
        ("+ folded scales", {"transform": [fold]}),
        ("+ refitted biases", {"compensate": [{"method": "closed_form", "rounding": "nearest"}]}),
        ("+ compensated rounding", {"compensate": [solve]}),
        ("+ level tables (activations)", {"activation_levels": "table"}),
        ("+ subspace branch, rank 32: vitq-w4a4", {"low_rank": {"kind": "subspace", "rank": 32}}),
    )
    out, so_far = [], plain
    for label, part in parts:
        so_far = so_far | part
        out.append(Case("Deployment at W4A4, part by part", label, "vitq-w4a4", so_far))
    out.append(Case("Deployment at W4A4, part by part", "+ bits from the frontier: vitq-mixed", "vitq-mixed"))
    least = {"least_iterations": 0}
    block = {"method": "blocks", "iterations": 300, "lr_scale": 0.0, "lr_focus": 0.0, **least}
    learned = {"effort": 1.0, "reconstruct": [block]}
    packed = {"allocate": [{"method": "packs", "cap": 3}], "reconstruct": [block | {"unit": "pack"}], "effort": 1.0}
    ranks = {"method": "rank_search", "candidates": [0, 16, 32, 48], "iterations": 200, "cost_weight": 0.02, **least}
    both = {"method": "pareto", "bits": [2, 3, 4, 5, 6, 8], "ranks": [0, 16, 32]}
    evolved = {"method": "evolution", "passes": 1, "epsilon": 0.02, "relative": True, "mlp": True, "codes": "kept"}
    others = (
        ("vitq-w4a4", {}),
        ("without folded scales", {"transform": []}),
        ("without compensated rounding", {"compensate": [{**solve, "rounding": "nearest"}]}),
        ("without level tables", {"activation_levels": "uniform"}),
        ("without the branch", {"low_rank": NO_BRANCH}),
        ("error branch instead", {"low_rank": {"kind": "error", "rank": 32}}),
        ("error branch of the whole error", {"low_rank": {"kind": "error", "rank": 32},
                                             "compensate": [{**solve, "start": "output"}]}),
        ("+ level tables of weights", {"weight_levels": "table"}),
        ("+ ridge before rounding", {"compensate": [{**solve, "ridge": True}]}),
        ("+ ranks searched under a price", {"allocate": [ranks], "effort": 1.0}),
        ("+ bits and ranks from the frontier, as many bytes", {"allocate": [both]}),
        ("+ reconstruction, 300 steps a block", learned),
        ("+ reconstruction, 300 steps a pack", packed),
        ("+ scales evolved, 1 pass", {"refine": [evolved]}),
    )  # fmt: skip
    return out + [Case("vitq-w4a4, one part less, other or more", what, "vitq-w4a4", part) for what, part in others]


def focus_cases() -> list[Case]:
    """The softmax quantizer alone: everything else at 8 bits, no learning but the interval's grid search."""
    forms = (
        ("AIQViT: absolute, floor", {**PAPER_FOCUS}, 12),
        ("absolute, zero", {**PAPER_FOCUS, "below": "zero"}, 12),
        ("absolute, renormalized", {**PAPER_FOCUS, "renormalize": True}, 12),
        ("absolute, power 2, renormalized", {**PAPER_FOCUS, "power": 2.0, "renormalize": True}, 12),
        ("absolute, power 3, renormalized", {**PAPER_FOCUS, "power": 3.0, "renormalize": True}, 12),
        ("row, power 1", {**PAPER_FOCUS, **FIXED, "anchor": "row"}, 0),
        ("row, power 2", {**PAPER_FOCUS, **FIXED, "anchor": "row", "power": 2.0}, 0),
        ("row, power 2, renormalized", {**PAPER_FOCUS, **FIXED, "anchor": "row", "power": 2.0, "renormalize": True}, 0),
    )
    return [
        Case(
            f"Softmax quantizer alone, {bits} bits",
            label,
            "vitq-w8a8",
            {
                "bits": _bits(8, 8, 8, bits),
                "focus": focus,
                "initialise": [{"method": "scales", "focus_search": search}],
            },
        )
        for bits in (8, 4, 3, 2)
        for label, focus, search in forms
    ]


def level_cases() -> list[Case]:
    """Uniform codes against level tables on the int8 grid, no branch."""
    out = []
    for what, bits in (("activation", _bits(8, 4)), ("activation", _bits(8, 3)), ("weight", _bits(4, 8)),
                       ("weight", _bits(3, 8))):  # fmt: skip
        for levels in ("uniform", "table"):
            overrides = {
                "bits": bits,
                "low_rank": NO_BRANCH,
                f"{what}_levels": levels,
                "compensate": [{"method": "closed_form"}],
            }
            group = f"Levels, W{bits['weights']}A{bits['activations']} per token, no branch"
            out.append(Case(group, f"{what}s {levels}", "vitq-w8a8", overrides))
    return out


def run(cases: list[Case], limit: int | None = None, progress: Callable[[str, int, int], None] | None = None):
    """One row per case: top-1 and logit SQNR of the integer model on both splits, calibration seconds."""
    source = ModelSource(NAME)
    model = load_float(source)
    splits = {name: load_data("digits", name, model, limit) for name in ("test", "hard")}
    reference = jobs.predict_splits(model, splits)
    rows = []
    for i, case in enumerate(cases):
        if progress is not None:
            progress(f"{case.group}: {case.label}", i, len(cases))
        recipe = load_recipe(case.recipe, fast="effort" not in case.overrides, **case.overrides)
        done = jobs.quantize(model, source, recipe, "digits", seed=case.seed)
        row: dict[str, Any] = {"group": case.group, "case": case.label, "calibration_s": done.seconds}
        if "token_bits" in done.state.metrics:
            row["bitops"] = done.state.metrics["token_bits"]["bitops"]
        for name, data in splits.items():
            floats, labels = reference[name]
            logits, _ = predict(done.integer, data)
            row[f"{name}_top1"], row[f"{name}_sqnr_db"] = top1(logits, labels), sqnr_db(floats, logits)
        rows.append(row)
    return rows


def markdown(rows: list[dict[str, Any]]) -> str:
    """The rows as one Markdown table per group."""
    lines = [
        "# Ablations",
        "",
        "Integer models on the shipped digits ViT; top-1 in percent and logit SQNR in dB against the float model, on",
        "the clean and the hard split. Reduced effort: closed forms as in `make demo`, and 120 steps a block where",
        "reconstruction is listed. Made by",
        "`python -m vitq.bench.ablation --output bench/results/ablation.json --markdown docs/ablation.md`.",
        "",
        "Rows alike in every figure are mostly one model: what a block's reconstruction learns is dropped where",
        "held-out images prefer its start, and a search under a price may choose no branch anywhere.",
    ]
    for group in dict.fromkeys(row["group"] for row in rows):
        lines += ["", f"## {group}", "", "| | clean top-1 | SQNR | hard top-1 | SQNR |", "|---|---|---|---|---|"]
        for row in rows:
            if row["group"] == group:
                cells = (f"{row[k]:.2f}" for k in ("test_top1", "test_sqnr_db", "hard_top1", "hard_sqnr_db"))
                lines.append(f"| {row['case']} | " + " | ".join(cells) + " |")
    return "\n".join(lines) + "\n"


Runner = Callable[[list[Case]], list[dict[str, Any]]]


def command(description: str, rows_of: Callable[[Runner], list[dict[str, Any]]], page: Callable[[list], str]) -> None:
    """The command line of a table: what ``rows_of`` makes by the runner that it is given, as JSON and as ``page``."""
    parser = argparse.ArgumentParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=Path, required=True, help="JSON file to write")
    parser.add_argument("--markdown", type=Path, help="Markdown file to write")
    parser.add_argument("--limit", type=int, help="images per split (default: all)")
    args = parser.parse_args()
    rows = rows_of(lambda cases: run(cases, args.limit, lambda what, i, n: print(f"{i + 1}/{n} {what}", flush=True)))
    args.output.write_text(json.dumps({"environment": environment(), "rows": rows}, indent=1) + "\n")
    if args.markdown:
        args.markdown.write_text(page(rows))


def main() -> None:
    cases = aiqvit_cases() + deployment_cases() + branch_cases() + focus_cases() + level_cases()
    command(__doc__, lambda runner: runner(cases), markdown)


if __name__ == "__main__":
    main()
