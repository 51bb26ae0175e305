"""Packages from two roots, and a native build that CMake drives (see CMakeLists.txt).

``VITQ_BUILD_NATIVE=auto|0|1``: auto builds the C++ back end wherever there is a C++ compiler, and otherwise installs
the plain-torch ``ref`` back end with a message; 1 insists on it; 0 leaves it out. A compile error is never hidden.
``VITQ_BUILD_CUDA=auto|0|1``: auto builds the GPU kernels wherever there is nvcc (``CUDACXX``, ``CUDA_HOME``, the PATH)
and the installed torch is one for CUDA, of nvcc's major version or later; 1 insists on it. A GPU is not needed.
``TORCH_CUDA_ARCH_LIST`` ("8.0;8.9+PTX") says for which architectures, default "8.0+PTX;9.0a": the PTX runs on all later
ones, 9.0a adds kernels of Hopper's own.
Rebuild in place after a change to csrc/: ``python setup.py build_ext --inplace``.
"""

import importlib.util
import os
import re
import shutil
import subprocess
import sys
from functools import cache
from pathlib import Path

from setuptools import Extension, find_packages, setup
from setuptools.command.build_ext import build_ext

ROOT = Path(__file__).resolve().parent


def switch(name: str) -> str:
    value = os.environ.get(name, "auto")
    if value not in ("auto", "0", "1"):
        raise SystemExit(f"{name} is {value!r}, expected auto, 0 or 1")
    return value


def compiler() -> str | None:
    names = [os.environ["CXX"].split()[0]] if os.environ.get("CXX") else ["c++", "g++", "clang++"]
    return next((path for name in names if (path := shutil.which(name))), None)


def native() -> bool:
    want, insists_on_cuda = switch("VITQ_BUILD_NATIVE"), switch("VITQ_BUILD_CUDA") == "1"
    cuda_architectures()
    if insists_on_cuda:
        cuda()
    if want == "0":
        if insists_on_cuda:
            raise SystemExit("VITQ_BUILD_CUDA is 1 and VITQ_BUILD_NATIVE is 0, expected GPU kernels beside native ones")
        return False
    if compiler() is None:
        problem = f"no C++ compiler found (CXX={os.environ.get('CXX', '')!r}, PATH searched for c++, g++, clang++)"
        if want == "1":
            raise SystemExit(f"VITQ_BUILD_NATIVE is 1, but {problem}")
        print(
            f"vitq: {problem}; installing without the C++ kernels, on the plain-torch back end 'ref'", file=sys.stderr
        )
        return False
    return True


def nvcc() -> str | None:
    home = os.environ.get("CUDA_HOME") or os.environ.get("CUDA_PATH")
    names = [os.environ.get("CUDACXX"), home and os.path.join(home, "bin", "nvcc"), "nvcc"]
    return next((path for name in names if name and (path := shutil.which(name))), None)


def nvcc_major() -> int:
    """Of which CUDA the compiler is."""
    said = subprocess.run([nvcc(), "--version"], capture_output=True, text=True).stdout
    match = re.search(r"release (\d+)\.", said)
    if match is None:
        raise SystemExit(f"{nvcc()} --version says {said!r}, expected 'release' and a version")
    return int(match[1])


@cache
def cuda() -> bool:
    """Whether the GPU kernels are built."""
    want = switch("VITQ_BUILD_CUDA")
    if want == "0":
        return False
    import torch

    problem = None
    if nvcc() is None:
        problem = "nvcc was not found (CUDACXX, CUDA_HOME, the PATH)"
    elif torch.version.cuda is None:
        problem = f"torch {torch.__version__} is built without CUDA"
    elif want == "auto" and nvcc_major() > int(torch.version.cuda.split(".")[0]):
        # They carry nvcc's runtime, which refuses a driver that knows no more than torch needs.
        problem = (
            f"nvcc is of CUDA {nvcc_major()}, torch of {torch.version.cuda} (VITQ_BUILD_CUDA=1 builds for drivers of "
            f"CUDA {nvcc_major()}; CUDACXX names another nvcc)"
        )
    if problem and want == "1":
        raise SystemExit(f"VITQ_BUILD_CUDA is 1, but {problem}")
    if problem:
        print(f"vitq: {problem}; installing without the C++ GPU kernels", file=sys.stderr)
    return problem is None


def cuda_architectures() -> str:
    """``TORCH_CUDA_ARCH_LIST`` as CMake says it: 80-real is machine code alone, 80 machine code and PTX."""
    names = re.split(r"[;, ]+", os.environ.get("TORCH_CUDA_ARCH_LIST", "").strip() or "8.0+PTX;9.0a")
    found = []
    for name in names:
        match = re.fullmatch(r"(\d+)\.(\d)(a?)(\+PTX)?", name)
        if match is None or int(match[1]) < 8:
            raise SystemExit(f"TORCH_CUDA_ARCH_LIST has {name!r}, expected such as 8.0, 9.0a or 8.9+PTX, from 8.0 on")
        found.append(match[1] + match[2] + match[3] + ("" if match[4] else "-real"))
    return ";".join(found)


def tool(name: str) -> str:
    """The program beside this interpreter (pip's cmake and ninja) or on the PATH."""
    path = shutil.which(name, path=os.pathsep.join([str(Path(sys.executable).parent), os.environ.get("PATH", "")]))
    if path is None:
        raise SystemExit(f"{name} was not found: pip install {name}")
    return path


def package_dir(name: str) -> Path:
    spec = importlib.util.find_spec(name)
    if spec is None or spec.origin is None:
        raise SystemExit(f"{name} was not found: it is needed to build the C++ kernels (pip install {name})")
    return Path(spec.origin).parent


class CMakeBuild(build_ext):
    """Writes libvitq_ops.so and _C beside the package: in the source tree when editable, else in build_lib."""

    def _output(self) -> Path:
        in_tree = self.inplace or self.editable_mode
        return (ROOT if in_tree else Path(self.build_lib).resolve()) / "vitq_kernels"

    def _files(self) -> list[Path]:
        names = ["libvitq_ops.so", Path(self.get_ext_filename("_C")).name] + ["libvitq_cuda.so"] * cuda()
        return [self._output() / name for name in names]

    def run(self) -> None:
        if not self.extensions:
            return
        build = Path(self.build_temp).resolve() / "cmake"
        ninja = tool("ninja")
        options = {
            "CMAKE_BUILD_TYPE": "Debug" if self.debug else "Release",
            "CMAKE_MAKE_PROGRAM": ninja,  # an isolated build's ninja is gone at the next run
            "CMAKE_CXX_COMPILER": compiler(),
            "VITQ_OUTPUT_DIR": self._output(),
            "VITQ_TORCH_DIR": package_dir("torch"),
            "pybind11_DIR": package_dir("pybind11") / "share/cmake/pybind11",
            "Python_EXECUTABLE": sys.executable,
            "VITQ_BUILD_CUDA": "OFF",
        }
        jobs = os.environ.get("MAX_JOBS") or str(os.cpu_count() or 1)
        if cuda():
            options |= {
                "VITQ_BUILD_CUDA": "ON",
                "VITQ_NVCC_THREADS": jobs,
                "CMAKE_CUDA_COMPILER": nvcc(),
                "VITQ_CUDA_ARCHITECTURES": cuda_architectures(),
            }
        define = [f"-D{name}={value}" for name, value in options.items()]
        cmake = tool("cmake")
        subprocess.run([cmake, "-S", str(ROOT), "-B", str(build), "-G", "Ninja", *define], check=True)
        subprocess.run([cmake, "--build", str(build), "-j", jobs], check=True)

    def get_outputs(self) -> list[str]:
        return [str(path) for path in self._files()] if self.extensions else []

    def get_output_mapping(self) -> dict[str, str]:
        return {}


setup(
    packages=find_packages(".", include=["vitq_kernels*"]) + find_packages("python"),
    package_dir={"vitq_kernels": "vitq_kernels", "vitq": "python/vitq"},
    package_data={"vitq": ["recipes/*.yaml", "assets/*"], "vitq_kernels": ["tuning/*.json"]},
    ext_modules=[Extension("vitq_kernels._C", [])] if native() else [],
    cmdclass={"build_ext": CMakeBuild},
)
