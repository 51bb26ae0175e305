"""What "the same code" means: the syntax trees of everything that a calibration or an evaluation may run."""

from __future__ import annotations

import ast
import hashlib
from functools import cache
from pathlib import Path

import vitq

import vitq_kernels

#: Modules and folders of vitq that only present results, or measure something else than accuracy.
APART = (
    "bench", "cli.py", "commands.py", "console.py", "demo.py", "export.py", "plots.py", "pretrained.py", "qdq.py",
    "report.py", "serving", "tasks",
)  # fmt: skip


@cache
def digest() -> str:
    """Of vitq's and vitq_kernels' Python; comments, docstrings and layout do not count."""
    packages = [Path(package.__file__).parent for package in (vitq, vitq_kernels)]
    files = [(root, path) for root in packages for path in sorted(root.rglob("*.py"))]
    every = hashlib.sha256()
    for root, path in files:
        place = path.relative_to(root)
        if root.name != "vitq" or place.parts[0] not in APART:
            every.update(f"{root.name}/{place}\n{tree(path.read_text())}\n".encode())
    return every.hexdigest()[:16]


def tree(source: str) -> str:
    """The syntax tree of a module without docstrings."""
    parsed = ast.parse(source)
    for node in ast.walk(parsed):
        documented = isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef)
        if documented and ast.get_docstring(node, clean=False) is not None:
            del node.body[0]
    return ast.dump(parsed)
