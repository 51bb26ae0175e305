"""Tables in Markdown and in JSON."""

from __future__ import annotations

import json


def table(rows: list[dict], columns: dict[str, str]) -> str:
    """A Markdown table; ``columns`` maps keys to headings."""
    lines = ["| " + " | ".join(columns.values()) + " |", "|" + "---|" * len(columns)]
    return "\n".join(lines + ["| " + " | ".join(cell(row.get(k)) for k in columns) + " |" for row in rows])


def cell(value) -> str:
    if value is None:
        return "–"
    return f"{value:.2f}" if isinstance(value, float) else str(value)


def json_rows(record: dict) -> str:
    """JSON with one row a line, as the tables of vitq_kernels/tuning have it."""
    parts = []
    for key, value in record.items():
        if isinstance(value, list) and value and isinstance(value[0], list):
            rows = ",\n".join(f"    {json.dumps(row)}" for row in value)
            parts.append(f'  "{key}": [\n{rows}\n  ]')
        else:
            parts.append(f'  "{key}": {json.dumps(value)}')
    return "{\n" + ",\n".join(parts) + "\n}"
