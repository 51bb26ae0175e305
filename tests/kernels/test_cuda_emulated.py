"""The C++ GPU kernels without a GPU: their sources on the emulation, which itself must catch what it claims to."""

import os
import subprocess

import emulation
import pytest

pytestmark = pytest.mark.skipif(emulation.problem() is not None, reason=str(emulation.problem()))


@pytest.fixture(scope="module")
def library():
    return emulation.build()


@pytest.mark.parametrize("seed", ["0", "1", "2"])
@pytest.mark.parametrize("name", ["emulation", "emulation_sm90"])
def test_the_emulation_catches_what_is_wrong(tmp_path, name, seed):
    """Copies not waited for, divergence, deadlock, missing barriers and fences; conversions; the manual's layouts."""
    program = tmp_path / name
    sources = [str(emulation.ROOT / file) for file in (f"tests/emulated/{name}.cpp", "csrc/common/gpu/emulation.cpp")]
    flags = ["-std=c++20", "-O1", "-DVITQ_EMULATED=1", "-I", str(emulation.ROOT / "csrc")]
    subprocess.run([os.environ.get("CXX", "c++"), *flags, *sources, "-o", str(program)], check=True)
    done = subprocess.run([program], capture_output=True, text=True, env={**os.environ, "VITQ_EMULATION_SEED": seed})
    assert done.returncode == 0, done.stdout[:2000]


def test_kernels(library):
    """Every kernel test of the other back ends that is about ops that this one has."""
    emulation.run(library, "test_qlinear.py", "test_quantize.py", "test_layer_norm_quantize.py", least=70)
    emulation.run(library, "test_qattention.py", "test_scatter.py", least=80)


def test_what_is_its_own(library):
    """int4 products, split K, orders of threads, refusals."""
    emulation.run(
        library, "emulated_cuda.py", "emulated_cuda_quantize.py", "emulated_cuda_attention.py", select="", least=20
    )


def test_sm_90a(library):
    """Its own paths, and the tests of every back end again, wherever its kernels take the call."""
    emulation.run(library, "emulated_cuda_hopper.py", select="", least=45)
    hopper = {"VITQ_EMULATED_CAPABILITY": "90", "VITQ_EMULATED_PROCESSORS": "1"}
    emulation.run(library, "test_qlinear.py", least=40, **hopper)


def test_kernels_under_sanitizers():
    """Address and undefined behaviour: no access outside what the glue was given, or what a block shares."""
    runtimes = [
        subprocess.run(["gcc", f"-print-file-name=lib{name}.so"], capture_output=True, text=True).stdout.strip()
        for name in ("asan", "ubsan")
    ]
    if not all(os.path.isabs(path) for path in runtimes):
        pytest.skip("gcc has no sanitizer runtimes")
    library = emulation.build(sanitize=True)
    environment = {"LD_PRELOAD": " ".join(runtimes), "ASAN_OPTIONS": "detect_leaks=0"}
    emulation.run(library, "test_qlinear.py", select="cuda and (gelu or extreme)", least=5, **environment)
    emulation.run(library, "emulated_cuda_attention.py", select="not_aligned and 17", least=2, **environment)
    refusals = "ties or what_addresses_memory"  # exceptions, with fibers before them
    emulation.run(library, "emulated_cuda_quantize.py", select=refusals, least=2, **environment)
