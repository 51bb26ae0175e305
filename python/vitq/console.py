"""Tables and progress bars of the command line."""

from __future__ import annotations

import os
from typing import Any

from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn
from rich.table import Table

UNLIMITED = 1000
"""Characters of a line where nothing has to fit."""
_LEFT = ("recipe", "split", "model", "mode", "variant", "what", "")


def make(json: bool) -> Console:
    """Where people read: stdout, or stderr when stdout is to hold JSON alone. What is no terminal has lines of any
    length.
    """
    console = Console(stderr=json)
    if not console.is_terminal and "COLUMNS" not in os.environ:
        console.width = UNLIMITED
    return console


def print_rows(console: Console, title: str, rows: list[dict[str, Any]], columns: dict[str, str]) -> None:
    """A table of ``rows``; ``columns`` maps keys to headings in order."""
    table = Table(title=title, title_justify="left", box=SIMPLE_HEAD, padding=0)
    cells = [[cell(row.get(key)) for key in columns] for row in rows]
    for i, heading in enumerate(columns.values()):
        justify = "left" if heading in _LEFT else "right"
        if len(heading) > max((len(line[i]) for line in cells), default=0):
            heading = heading.replace(" ", "\n")
        table.add_column(heading, justify=justify, overflow="fold")
    for line in cells:
        table.add_row(*line)
    if console.is_terminal:
        console.print(table)
        return
    with console.capture() as captured:
        console.print(table)
    # Every line has the width of the longest.
    console.file.write("".join(f"{line.rstrip()}\n" for line in captured.get().splitlines()))


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
