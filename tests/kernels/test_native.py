"""The native build: instruction sets, index maps, sanitizers, and what happens without a compiler."""

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch

import vitq_kernels as vk
from vitq_kernels import _native, packing, testing

ROOT = Path(__file__).resolve().parents[2]
EXTENSION = _native.extension()
needs_native = pytest.mark.skipif(EXTENSION is None, reason=str(_native.unavailable("cpu")))


def run_python(code: str, **environment) -> subprocess.CompletedProcess:
    env = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path), **environment}
    return subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=env, cwd=ROOT)


@needs_native
def test_instruction_sets():
    names = EXTENSION.available_isas()
    assert names[0] == "portable"
    assert set(names) <= set(EXTENSION.build_info()["isas"])
    assert {"avx2", "fma", "f16c"} <= set(EXTENSION.cpu_features()) or "avx2" not in names
    before = EXTENSION.cpu_isa()
    with testing.cpu_isa("portable"):
        assert EXTENSION.cpu_isa() == "portable"
        with pytest.raises(ValueError, match=r"isa is 'sse9', expected one of auto, portable"):
            EXTENSION.set_cpu_isa("sse9")
        assert EXTENSION.cpu_isa() == "portable"
        EXTENSION.set_cpu_isa("auto")
        assert EXTENSION.cpu_isa() == names[-1]
    assert EXTENSION.cpu_isa() == before


@needs_native
def test_isa_from_the_environment():
    code = "from vitq_kernels import _native; print(_native.extension().cpu_isa())"
    assert run_python(code, VITQ_CPU_ISA="portable").stdout.strip() == "portable"
    bad = run_python(code, VITQ_CPU_ISA="mmx")
    assert bad.returncode != 0
    assert "VITQ_CPU_ISA is 'mmx', expected one of auto, portable" in bad.stderr


@needs_native
def test_set_cpu_isa_steers_the_operators():
    """_C and the operators share one library: sums of floats differ between vector widths, so the switch shows."""
    g = torch.Generator().manual_seed(0)
    x = torch.randn(4, 400, generator=g)
    a = vk.ActQuant(lora_down=torch.randn(3, 400, generator=g))
    results = []
    for isa in testing.isas():
        with testing.cpu_isa(isa), vk.backend("cpu"):
            results.append(vk.quantize(x, a).t)
    assert len(results) == 1 or not all(torch.equal(r, results[0]) for r in results)


@needs_native
@pytest.mark.parametrize(("n", "k"), [(1, 1), (16, 8), (17, 9), (40, 23)])
def test_index_maps_are_the_packing(n, k):
    codes = torch.randint(-8, 8, (n, k), dtype=torch.int8)
    int8 = packing.pack_weight(codes, 8, "int8_n16k4").data.flatten()
    int4 = packing.pack_weight(codes, 4, "int4_n16k4").data.flatten()
    for i in range(n):
        for j in range(k):
            assert int8[EXTENSION.int8_n16k4_offset(i, j, k)] == codes[i, j]
            nibble = int(int4[EXTENSION.int4_n16k4_offset(i, j, k)]) >> EXTENSION.int4_n16k4_shift(j) & 15
            assert nibble - 8 == codes[i, j]


def _sanitizer_problem(tmp_path: Path) -> str | None:
    compiler = os.environ.get("CXX", "").split() or [shutil.which("c++") or shutil.which("g++") or ""]
    if not compiler[0]:
        return "no C++ compiler"
    if shutil.which("cmake") is None and not (Path(sys.executable).parent / "cmake").exists():
        return "no cmake"
    source = tmp_path / "probe.cpp"
    source.write_text("int main() { return 0; }\n")
    flags = ["-fsanitize=address,undefined", str(source), "-o", str(tmp_path / "probe")]
    probe = subprocess.run([*compiler, *flags], capture_output=True, text=True)
    return None if probe.returncode == 0 else f"no sanitizers: {probe.stderr.strip()[-200:]}"


@pytest.mark.slow
def test_kernels_under_sanitizers(tmp_path):
    """tests/native/driver.cpp: every kernel on every instruction set under ASan and UBSan, without torch."""
    if problem := _sanitizer_problem(tmp_path):
        pytest.skip(problem)
    beside = Path(sys.executable).parent
    path = os.pathsep.join([str(beside), os.environ["PATH"]])
    cmake, ninja = (shutil.which(name, path=path) for name in ("cmake", "ninja"))
    build = ROOT / "build" / "native-tests"
    options = ["-DVITQ_BUILD_OPS=OFF", "-DVITQ_BUILD_NATIVE_TESTS=ON", "-DVITQ_SANITIZE=ON"]
    generator = ["-G", "Ninja", f"-DCMAKE_MAKE_PROGRAM={ninja}"] if ninja else []
    for command in (
        [cmake, "-S", str(ROOT), "-B", str(build), *generator, *options],
        [cmake, "--build", str(build), "-j", "2"],
        [str(build / "vitq_native_tests")],
    ):
        done = subprocess.run(command, capture_output=True, text=True)
        assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    for isa in testing.isas():
        assert f"{isa}: " in done.stdout


def setup_py(**environment) -> subprocess.CompletedProcess:
    env = {**os.environ, **environment}
    return subprocess.run([sys.executable, "setup.py", "--name"], capture_output=True, text=True, env=env, cwd=ROOT)


def test_install_without_a_compiler_says_so():
    auto = setup_py(CXX="no-such-compiler", VITQ_BUILD_NATIVE="auto")
    assert auto.returncode == 0
    assert "no C++ compiler found" in auto.stderr
    assert "back end 'ref'" in auto.stderr
    insisting = setup_py(CXX="no-such-compiler", VITQ_BUILD_NATIVE="1")
    assert insisting.returncode != 0
    assert "VITQ_BUILD_NATIVE is 1, but no C++ compiler found" in insisting.stderr


@pytest.mark.parametrize(
    ("environment", "message"),
    [
        ({"VITQ_BUILD_NATIVE": "yes"}, "VITQ_BUILD_NATIVE is 'yes', expected auto, 0 or 1"),
        ({"VITQ_BUILD_CUDA": "on"}, "VITQ_BUILD_CUDA is 'on', expected auto, 0 or 1"),
        (
            {"VITQ_BUILD_CUDA": "1", "PATH": "/nowhere", "CUDACXX": "", "CUDA_HOME": "/nowhere"},
            "VITQ_BUILD_CUDA is 1, but nvcc was not found (CUDACXX, CUDA_HOME, the PATH)",
        ),
        (
            {"VITQ_BUILD_CUDA": "0", "TORCH_CUDA_ARCH_LIST": "7.5"},
            "TORCH_CUDA_ARCH_LIST has '7.5', expected such as 8.0",
        ),
        ({"VITQ_BUILD_CUDA": "1", "VITQ_BUILD_NATIVE": "0"}, "VITQ_BUILD_CUDA is 1"),
    ],
)
def test_bad_build_switches(environment, message):
    done = setup_py(**environment)
    assert done.returncode != 0
    assert message in done.stderr


@pytest.mark.skipif(torch.version.cuda is None, reason="torch is built without CUDA")
def test_a_compiler_of_a_later_cuda_is_not_taken_unasked(tmp_path):
    """Its runtime refuses the drivers that torch's still takes: every call would fail where Triton could serve."""
    nvcc = tmp_path / "nvcc"
    code = "import runpy, sys; sys.argv = ['setup.py', '--name']; print(runpy.run_path('setup.py')['cuda']())"

    def built(version, switch):
        nvcc.write_text(f"#!/bin/sh\necho 'Cuda compilation tools, release {version}, V{version}.1'\n")
        nvcc.chmod(0o755)
        env = {**os.environ, "CUDACXX": str(nvcc), "VITQ_BUILD_CUDA": switch}
        return subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=env, cwd=ROOT)

    later = built("99.1", "auto")
    assert later.stdout.splitlines()[-1] == "False"
    assert f"nvcc is of CUDA 99, torch of {torch.version.cuda} (VITQ_BUILD_CUDA=1 builds for drivers" in later.stderr
    assert built("99.1", "1").stdout.splitlines()[-1] == "True"
    assert built(torch.version.cuda, "auto").stdout.splitlines()[-1] == "True"


def test_without_the_library_the_reference_serves(tmp_path):
    """A copy of the package without its binaries: status says why, quantize runs, cpu is refused with the reason."""
    shutil.copytree(
        ROOT / "vitq_kernels", tmp_path / "vitq_kernels", ignore=shutil.ignore_patterns("*.so", "__pycache__")
    )
    code = (
        "import torch, vitq_kernels as vk\n"
        "print(vk.__file__)\n"
        "print(vk.status()['cpu'])\n"
        "print(vk.quantize(torch.ones(2, 4), vk.ActQuant()).q.tolist())\n"
        "with vk.backend('cpu'): vk.quantize(torch.ones(2, 4), vk.ActQuant())\n"
    )
    env = {**os.environ, "PYTHONPATH": str(tmp_path)}
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=env, cwd=tmp_path)
    where, reason, codes = done.stdout.splitlines()
    assert where.startswith(str(tmp_path))
    assert "the native extension was not built" in reason
    assert codes == str([[127] * 4] * 2)
    assert "no back end serves quantize on cpu: cpu: the native extension was not built" in done.stderr
