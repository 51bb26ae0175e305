"""Markdown tables."""

from __future__ import annotations


def table(rows: list[dict], columns: dict[str, str]) -> str:
    """A Markdown table; ``columns`` maps keys to headings."""
    lines = ["| " + " | ".join(columns.values()) + " |", "|" + "---|" * len(columns)]
    return "\n".join(lines + ["| " + " | ".join(cell(row.get(k)) for k in columns) + " |" for row in rows])


def cell(value) -> str:
    if value is None:
        return "–"
    return f"{value:.2f}" if isinstance(value, float) else str(value)
