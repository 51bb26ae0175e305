"""Packages from two roots, and a native build that CMake drives (see CMakeLists.txt)."""

from setuptools import find_packages, setup

setup(
    packages=find_packages(".", include=["vitq_kernels*"]) + find_packages("python"),
    package_dir={"vitq_kernels": "vitq_kernels", "vitq": "python/vitq"},
    package_data={"vitq": ["recipes/*.yaml", "assets/*"], "vitq_kernels": ["*.so", "tuning/*.json"]},
)
