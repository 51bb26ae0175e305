"""Tables and progress bars of the command line."""

from __future__ import annotations

from typing import Any

from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn
from rich.table import Table

_LEFT = ("recipe", "split", "model", "mode", "variant", "what", "")


def make(json: bool) -> Console:
    """Where people read: stdout, or stderr when stdout is to hold JSON alone."""
    return Console(stderr=json)


def print_rows(console: Console, title: str, rows: list[dict[str, Any]], columns: dict[str, str]) -> None:
    """A table of ``rows``; ``columns`` maps keys to headings in order."""
    table = Table(title=title, title_justify="left")
    for heading in columns.values():
        table.add_column(heading, justify="left" if heading in _LEFT else "right", overflow="fold")
    for row in rows:
        table.add_row(*(cell(row.get(key)) for key in columns))
    console.print(table)


def cell(value: Any) -> str:
    if value is None:
        return "–"
    return f"{value:.4g}" if isinstance(value, float) else str(value)


def progress(disable: bool = False) -> Progress:
    """A bar on stderr that vanishes when it is done, or nothing at all."""
    return Progress(
        TextColumn("{task.description}"),
        BarColumn(),
        TextColumn("{task.percentage:>3.0f}%"),
        TimeElapsedColumn(),
        console=Console(stderr=True),
        transient=True,
        disable=disable,
    )
