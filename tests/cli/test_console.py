"""Tables are read on terminals of 80 characters and in logs."""

import io

import pytest
from rich.console import Console
from vitq import console, demo

ROW = dict.fromkeys(demo.COLUMNS, 99.43) | {"variant": "outlier", "recipe": "aiqvit-w4a4", "split": "test"}
CELLS = ["outlier", "aiqvit-w4a4", "test", *["99.43"] * (len(demo.COLUMNS) - 3)]


def test_the_demos_table_fits_80_characters():
    file = io.StringIO()
    console.print_rows(Console(file=file, force_terminal=True, color_system=None, width=80), "t", [ROW], demo.COLUMNS)
    assert CELLS in [line.split() for line in file.getvalue().splitlines()]


@pytest.mark.parametrize("json", [False, True])
def test_what_is_no_terminal_gets_whole_lines(capsys, monkeypatch, json):
    monkeypatch.delenv("COLUMNS", raising=False)
    wide = {"recipe": "recipe"} | {f"column{i}": f"heading{i}" for i in range(30)}
    row = {key: f"value-of-{key}" for key in wide}
    console.print_rows(console.make(json), "t", [row], wide)
    out = capsys.readouterr()
    lines = (out.err if json else out.out).splitlines()
    assert list(row.values()) in [line.split() for line in lines]
    assert not any(line.endswith(" ") for line in lines)
