"""The dependency rules of the design, checked on the sources; a planted violation must be found."""

import ast
import re
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
OPS = sorted(p.parent for p in (ROOT / "vitq_kernels" / "ops").glob("*/ref.py"))
INCLUDE = re.compile(r'^\s*#\s*include\s*[<"]([^">]+)[">]', re.MULTILINE)


def imports(path: Path) -> set[str]:
    """Absolute dotted names of everything that a module imports; relative imports start with dots."""
    return _imports(ast.parse(path.read_text()))


def _imports(tree: ast.AST) -> set[str]:
    names = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            base = "." * node.level + (node.module or "")
            names |= {base} if node.module else {base + alias.name for alias in node.names}
    return names


def includes(path: Path) -> list[str]:
    return INCLUDE.findall(path.read_text())


def torch_headers(names) -> list[str]:
    return [name for name in names if name.split("/")[0] in ("torch", "ATen", "c10", "pybind11", "Python.h")]


def is_glue(path: Path) -> bool:
    """Only csrc/<op>/<op>.cpp (or .cu), headers named glue, and csrc/module.cpp may see torch or Python."""
    if path.parent.name == "csrc" or path.stem.endswith("_glue"):
        return True
    return "common" not in path.parts and path.suffix in (".cpp", ".cu") and not path.stem.endswith("_cpu")


NATIVE = [p for p in sorted((ROOT / "csrc").rglob("*")) if p.suffix in (".h", ".cuh", ".cpp", ".cu")]


@pytest.mark.parametrize("path", [p for p in NATIVE if not is_glue(p)], ids=lambda p: str(p.relative_to(ROOT)))
def test_kernels_and_common_headers_are_torch_free(path):
    names = includes(path)
    assert not torch_headers(names)
    assert "glue.h" not in names


@pytest.mark.parametrize("path", [p for p in NATIVE if "common" in p.parts], ids=lambda p: p.name)
def test_common_depends_on_no_operator(path):
    allowed = ("common/", "sanitizer/", "sys/")
    assert all(name.startswith(allowed) or "/" not in name for name in includes(path))


# Standard headers whose inline functions a kernel may not use: compiled with AVX-512 flags in one translation unit and
# without in another, the linker keeps either copy.
INLINE_HEADERS = {"algorithm", "vector", "string", "memory", "functional", "cmath", "utility", "map", "optional"}


@pytest.mark.parametrize(
    "path",
    [p for p in NATIVE if p.stem.endswith("_cpu") and p.suffix == ".cpp"],
    ids=lambda p: p.name,
)
def test_kernels_share_no_inline_functions_across_instruction_sets(path):
    assert not INLINE_HEADERS & set(includes(path))


def test_formats_import_only_torch():
    allowed = {"torch", "__future__", "math", "collections.abc", "dataclasses", "itertools", "typing"}
    assert imports(ROOT / "vitq_kernels" / "formats.py") <= allowed


@pytest.mark.parametrize("op", OPS, ids=lambda p: p.name)
def test_oracles_import_only_torch_formats_and_each_other(op):
    oracles = {f"..{other.name}" for other in OPS}
    assert imports(op / "ref.py") <= {"torch", "__future__", "math", "...formats", "...packing"} | oracles


def test_kernel_package_imports_nothing_above_it():
    above = {"vitq", "timm", "transformers", "torchvision"}
    for path in (ROOT / "vitq_kernels").rglob("*.py"):
        assert not {name.split(".")[0] for name in imports(path)} & above, path


def test_ops_do_not_import_modules():
    for path in (ROOT / "vitq_kernels" / "ops").rglob("*.py"):
        assert not any(name.lstrip(".").split(".")[0] == "nn" for name in imports(path) if name.startswith(".")), path


def test_library_does_not_import_its_test_helpers():
    for path in (ROOT / "vitq_kernels").rglob("*.py"):
        assert not any(name.lstrip(".") == "testing" for name in imports(path) if name.startswith(".")), path


@pytest.mark.parametrize("op", OPS, ids=lambda p: p.name)
def test_every_operator_is_complete(op):
    """Oracle, native source and tests under the same stem; quantize holds layer_norm_quantize's native code."""
    stem = op.name
    native = {"layer_norm_quantize": "quantize"}.get(stem, stem)
    assert (op / "__init__.py").exists()
    assert (ROOT / "csrc" / native / f"{native}_cpu.cpp").exists()
    assert (ROOT / "csrc" / native / f"{native}.cpp").exists()
    assert (ROOT / "tests" / "kernels" / f"test_{stem}.py").exists()


def test_files_stay_readable():
    sources = [p for d in ("vitq_kernels", "python", "csrc", "tests") for p in (ROOT / d).rglob("*")]
    for path in sources:
        if path.suffix in (".py", ".h", ".cpp"):
            assert len(path.read_text().splitlines()) <= 600, path


def test_planted_violations_are_found():
    assert torch_headers(INCLUDE.findall('#include "common/simd.h"\n#include <torch/extension.h>\n'))
    assert torch_headers(INCLUDE.findall("  # include <ATen/ATen.h>"))
    assert _imports(ast.parse("def f():\n    import timm.models")) == {"timm.models"}
    assert _imports(ast.parse("from ...nn import linear\nfrom .. import testing")) == {"...nn", "..testing"}
    assert is_glue(ROOT / "csrc/qlinear/qlinear.cpp")
    assert not is_glue(ROOT / "csrc/qlinear/qlinear_cpu.cpp")
    assert not is_glue(ROOT / "csrc/qlinear/epilogue.h")
