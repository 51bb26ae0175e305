"""Patch-wise bits against their controls at equal BitOps, on the shipped model.

python -m vitq.bench.patchwise --output bench/results/patchwise.json --markdown docs/patchwise.md
"""

from __future__ import annotations

from statistics import fmean, stdev
from typing import Any

from .ablation import Case, Runner, command

SEEDS = (0, 1, 2)
COLUMNS = ("test_top1", "test_sqnr_db", "hard_top1", "hard_sqnr_db")
LABELS = {
    "attention": "most attended patches",
    "random": "random patches",
    "inverted": "least attended patches",
    "uniform": "one width for all patches",
}


def _cases(group: str, label: str, **options: Any) -> list[Case]:
    """Everything else at 8 bits, so that token-wise bits are all that differs."""
    overrides = {"bits": {"weights": 8}, "allocate": [{"method": "patchwise", **options}]}
    return [Case(group, label, "pmq-patchwise", overrides, seed) for seed in SEEDS]


def controls() -> list[Case]:
    """Every way to rank, at a few shares and low widths."""
    return [
        case
        for share, low in ((0.5, 4), (0.25, 4), (0.5, 3))
        for rank_by, label in LABELS.items()
        for case in _cases(f"{share:.0%} of the patches at 8 bits, the others at {low}", label,
                           shares=share, low=low, rank_by=rank_by)
    ]  # fmt: skip


def budgets(rows: list[dict[str, Any]]) -> list[Case]:
    """What 4 and 8 bits buy within the BitOps of the first of ``rows`` when each block has a share of its own."""
    spent = {"bitops": rows[0]["bitops"] * (1 + 1e-6)}  # the cost itself, whatever its decimals round to
    return [
        *_cases(rows[0]["group"], "most attended, shares from the frontier", budget=spent),
        *_cases(rows[0]["group"], "random, shares from the frontier", budget=spent, rank_by="random"),
        *_cases(rows[0]["group"], "whole blocks at 8 or 4, from the frontier", budget=spent, candidates=(0.0, 1.0)),
    ]


def markdown(rows: list[dict[str, Any]]) -> str:
    """Mean ± sample deviation over the seeds, one table per group."""
    lines = [
        "# Patch-wise bits",
        "",
        "Integer models on the shipped digits ViT: activations, queries and keys of 8 bits for some patches of each",
        "image and of fewer for the others, decided by attention (`allocate.patchwise`, reconstructed from PMQ's",
        "abstract), and controls at equal BitOps. Weights and all else at 8 bits. Top-1 in percent and logit SQNR in",
        f"dB against the float model, mean ± deviation over {len(SEEDS)} seeds; BitOps in thousandths of float32's. By",
        "`python -m vitq.bench.patchwise --output bench/results/patchwise.json --markdown docs/patchwise.md`.",
        "",
        "What a ranking gains is the distance between attended, random and least attended patches. What it has to",
        "make up for is that noise grows fourfold with every bit taken away: half the patches at 4 bits and half at 8",
        "are as noisy as all at 4.5, not as all at 6.",
    ]
    for group in dict.fromkeys(row["group"] for row in rows):
        lines += ["", f"## {group}", "", "| high bits for | BitOps | clean top-1 | SQNR | hard top-1 | SQNR |"]
        lines.append("|---|---|---|---|---|---|")
        own = [row for row in rows if row["group"] == group]
        for label in dict.fromkeys(row["case"] for row in own):
            runs = [row for row in own if row["case"] == label]
            cells = [f"{1000 * fmean(row['bitops'] for row in runs):.2f}"]
            for column in COLUMNS:
                values = [row[column] for row in runs]
                cells.append(f"{fmean(values):.2f} ± {stdev(values):.2f}")
            lines.append(f"| {label} | " + " | ".join(cells) + " |")
    return "\n".join(lines) + "\n"


def rows_of(runner: Runner) -> list[dict[str, Any]]:
    rows = runner(controls())
    return rows + runner(budgets(rows))


def main() -> None:
    command(__doc__, rows_of, markdown)


if __name__ == "__main__":
    main()
