"""What nvcc made of the GPU kernels: instructions, registers, spills. Needs the library and cuobjdump, not a GPU."""

import os
import re
import shutil
import subprocess
from functools import cache
from pathlib import Path

import pytest

from vitq_kernels import _cuda, backends
from vitq_kernels.triton import host

LIBRARY = Path(_cuda.__file__).with_name("libvitq_cuda.so")


def _cuobjdump() -> str | None:
    if not host.INSTALLED:
        return None
    import triton

    path = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "cuobjdump"
    return str(path) if path.exists() else None


pytestmark = pytest.mark.skipif(
    not LIBRARY.exists() or _cuobjdump() is None, reason="the GPU kernels were not built, or cuobjdump is missing"
)
# Product, rows and columns of a tile, warps down and across, stages, aligned: the arguments of QLinear.
QLINEAR = r"QLinearILNS0_7ProductE(\d)ELi(\d+)ELi(\d+)ELi(\d+)ELi(\d+)ELi(\d+)ELb(\d)E"
S8, W4, W4_TABLE, S4 = range(4)
# Product, warpgroups that share a tile: the arguments of QLinearSm90.
QLINEAR_SM90 = r"QLinearSm90ILNS0_7ProductE(\d)ELi(\d)E"


def _objdump(*arguments: str, path: Path = LIBRARY) -> str:
    return subprocess.run([_cuobjdump(), *arguments, str(path)], capture_output=True, text=True, check=True).stdout


@cache
def _dump(what: str, architecture: str) -> dict[str, str]:
    """Kernel -> its part of cuobjdump's text (ten seconds for all of SASS)."""
    if not re.search(rf"\.{architecture}?\.cubin", _objdump("-lelf")):  # an older one says sm_90 of sm_90a
        pytest.skip(f"the library was not built for {architecture}")
    parts = re.split(r"Function ?:? ", _objdump(what, "-arch", architecture))[1:]
    return {part.split(maxsplit=1)[0].rstrip(":"): part for part in parts}


@pytest.mark.parametrize("architecture", ["sm_80", "sm_90a"])
def test_nothing_spills(architecture):
    resources = _dump("-res-usage", architecture)
    assert len(resources) >= 17
    for kernel, usage in resources.items():
        found = dict(re.findall(r"(REG|STACK|LOCAL):(\d+)", usage))
        assert found["STACK"] == "0", kernel
        assert found["LOCAL"] == "0", kernel
        if match := re.search(QLINEAR, kernel):
            threads = 32 * int(match[4]) * int(match[5])
            assert int(found["REG"]) * threads <= 65536, kernel
            assert int(found["REG"]) <= 208, kernel


def _step(sass: str) -> list[str]:
    """The instructions of the smallest loop around a product."""
    code = [(int(at, 16), line) for at, line in re.findall(r"^\s+/\*([0-9a-f]{4,})\*/\s+(.*?);", sass, re.MULTILINE)]
    products = [at for at, line in code if "IMMA" in line]
    jumps = [(int(to[1], 16), at) for at, line in code if (to := re.search(r"BRA.* 0x([0-9a-f]+)", line))]
    start, end = min(
        ((to, at) for to, at in jumps if any(to <= x <= at for x in products)), key=lambda loop: loop[1] - loop[0]
    )
    return [line for at, line in code if start <= at <= end]


def test_products_are_those_of_the_tensor_cores():
    """As many instructions as a stage of 128 codes of K has tiles; 4-bit codes take half as many."""
    sass = _dump("-sass", "sm_80")
    kernels = {match.groups(): text for name, text in sass.items() if (match := re.search(QLINEAR, name))}
    assert {int(key[0]) for key in kernels} == {S8, W4, W4_TABLE, S4}
    for key, text in kernels.items():
        product, rows, columns, down, across, _, aligned = map(int, key)
        tiles = rows // down // 16 * (columns // across // 8)
        found = re.findall(r"IMMA\.[.A-Z0-9]+", text)
        wide, count = ("IMMA.16864.S4.S4", 2) if product == S4 else ("IMMA.16832.S8.S8", 4)
        assert found == [wide] * (count * tiles), key
        assert ("LDGSTS" in text) == (aligned or product != S8), "asynchronous copies"
        loads = (2 if product == S8 else 1) * (columns // across // 8) + 4 * (rows // down // 16)
        assert text.count("LDSM.16.M88.4") == loads, key
        step = _step(text)
        assert sum(wide in line for line in step) == len(found)
        # Loads, products and what widens the weight: addresses and fragments take next to nothing.
        if aligned:
            assert len(step) <= 2 * len(found) + (320 if product == W4_TABLE else 80 if product == S8 else 150), key


def test_hopper_multiplies_by_warpgroups():
    """Four steps of K a stage, two of ranks in either type; no wait between them, and all of it from bulk copies."""
    sass = _dump("-sass", "sm_90a")
    kernels = {match.groups(): text for name, text in sass.items() if (match := re.search(QLINEAR_SM90, name))}
    assert {tuple(map(int, key)) for key in kernels} == {(p, team) for p in (S8, W4, W4_TABLE) for team in (1, 2)}
    for (product, team), text in kernels.items():
        parts, columns = (1, 256) if team == "2" else (2, 128)
        assert re.findall(r"IGMMA\.[.A-Z0-9x]+", text) == [f"IGMMA.64x{columns}x32.S8.S8"] * (4 * parts)
        assert len(re.findall(rf"HGMMA\.64x{columns}x16\.F32", text)) == 4 * parts
        # As the source waits: after a stage (its halves, where weights pass through registers), at the end of K, and
        # after the ranks of a stage in either type.
        waits = 4 + (int(product) != S8)
        assert len(re.findall(r"WARPGROUP\.DEPBAR", text)) == waits
        assert "UTMALDG.2D" in text
        assert "USETMAXREG" in text


def test_attention_multiplies_levels_from_registers():
    """A tile's products of both kinds, V by transposed loads; sums over the keys that count only with an offset."""
    sass = _dump("-sass", "sm_80")
    attention = r"QAttentionILi(\d+)ELi(\d+)ELb(\d)ELb(\d)E"  # width, chunks of 32 keys, whole rows, offset
    kernels = {match.groups(): text for name, text in sass.items() if (match := re.search(attention, name))}
    assert {int(key[0]) for key in kernels} == {32, 64, 96, 128}
    for key, text in kernels.items():
        width, chunks, _, offset = map(int, key)
        found = re.findall(r"IMMA\.[.A-Z0-9]+", text)
        assert found.count("IMMA.16832.S8.S8") == chunks * 4 * (width // 32), key
        assert found.count("IMMA.16832.U8.S8") == chunks * (width // 8 + 1) * (1 + offset), key
        assert len(re.findall(r"LDSM\.16\.MT88\.4", text)) == chunks * (width // 16) * (1 + offset), key
        assert "LDGSTS" in text


@pytest.mark.parametrize(("architecture", "kernels", "instructions"), [("sm_80", 56, 420_000), ("sm_90a", 56, 480_000)])
def test_compile_time_is_in_bounds(architecture, kernels, instructions):
    """By what it grows with: how many kernels there are, and how long. A ceiling is raised by who needs the kernel."""
    sass = _dump("-sass", architecture)
    assert len(sass) <= kernels
    assert sum(len(re.findall(r"^\s+/\*[0-9a-f]{4,}\*/", text, re.M)) for text in sass.values()) <= instructions


def test_int4_products_of_sm_89(tmp_path):
    """Where the library has machine code of sm_80 alone, whose int4 products are those of sm_89, too."""
    home = os.environ.get("CUDA_HOME")
    nvcc = os.environ.get("CUDACXX") or shutil.which(os.path.join(home, "bin", "nvcc") if home else "nvcc")
    if nvcc is None:
        pytest.skip("nvcc was not found (CUDACXX, CUDA_HOME, the PATH)")
    source, binary = tmp_path / "s4.cu", tmp_path / "s4.cubin"
    source.write_text(
        '#include "qlinear/qlinear_sm80.cuh"\n'
        "using namespace vitq::gpu;\n"
        "template __global__ void vitq::gpu::entry<QLinear<Product::s4, 64, 64, 2, 2, 4, true>>(\n"
        "    const __grid_constant__ LinearParams);\n"
    )
    flags = ["-std=c++20", "-O3", "--fmad=false", "--expt-relaxed-constexpr", "-arch=sm_89", "-cubin"]
    include = Path(__file__).parents[2] / "csrc"
    subprocess.run([nvcc, *flags, "-I", str(include), str(source), "-o", str(binary)], check=True)
    assert set(re.findall(r"IMMA\.[.A-Z0-9]+", _objdump("-sass", path=binary))) == {"IMMA.16864.S4.S4"}


def test_the_library_loads_and_says_why_it_does_not_serve():
    reason = _cuda.unavailable("cpu")
    assert reason == "runs on cuda tensors, not cpu" or (_cuda.EMULATED and reason is None)
    assert backends.status()["cuda"] in (None, "no CUDA device")
