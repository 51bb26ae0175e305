"""What nvcc made of the GPU kernels: instructions, registers, spills. Needs the library and cuobjdump, not a GPU."""

import re
import subprocess
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


def _dump(what: str) -> dict[str, str]:
    """Kernel -> its part of cuobjdump's text."""
    text = subprocess.run([_cuobjdump(), what, str(LIBRARY)], capture_output=True, text=True, check=True).stdout
    parts = re.split(r"Function ?:? ", text)[1:]
    return {part.split(maxsplit=1)[0].rstrip(":"): part for part in parts}


@pytest.fixture(scope="module")
def sass():
    return _dump("-sass")


@pytest.fixture(scope="module")
def resources():
    return _dump("-res-usage")


def test_nothing_spills(resources):
    assert len(resources) >= 17
    for kernel, usage in resources.items():
        found = dict(re.findall(r"(REG|STACK|LOCAL):(\d+)", usage))
        assert found["STACK"] == found["LOCAL"] == "0", kernel
        if match := re.search(QLINEAR, kernel):
            threads = 32 * int(match[4]) * int(match[5])
            assert int(found["REG"]) * threads <= 65536, kernel
            assert int(found["REG"]) <= 192, kernel


def test_products_are_those_of_the_tensor_cores(sass):
    """As many instructions as a stage of 128 codes of K has tiles; 4-bit codes take half as many."""
    kernels = {match.groups(): text for name, text in sass.items() if (match := re.search(QLINEAR, name))}
    assert {int(key[0]) for key in kernels} == {S8, W4, W4_TABLE, S4}
    for key, text in kernels.items():
        product, rows, columns, down, across, _, aligned = map(int, key)
        tiles = rows // down // 16 * (columns // across // 8)
        found = re.findall(r"IMMA\.[.A-Z0-9]+", text)
        wide, count = ("IMMA.16864.S4.S4", 2) if product == S4 else ("IMMA.16832.S8.S8", 4)
        assert found == [wide] * (count * tiles), key
        assert ("LDGSTS" in text) == (aligned or product != S8), "asynchronous copies"
        assert "LDS.128" in text
        assert "LDSM" not in text


def test_attention_multiplies_levels_from_registers(sass):
    """A tile's products of both kinds, V by transposed loads; sums over the keys that count only with an offset."""
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


def test_the_library_loads_and_says_why_it_does_not_serve():
    reason = _cuda.unavailable("cpu")
    assert reason == "runs on cuda tensors, not cpu" or (_cuda.EMULATED and reason is None)
    assert backends.status()["cuda"] in (None, "no CUDA device")
