"""Which implementations this run of the kernel tests is about (see conftest.py)."""

import os

import pytest

from vitq_kernels import _cuda
from vitq_kernels.triton import host

DEVICE = os.environ.get("VITQ_TEST_DEVICE")
"""Where Triton kernels run behind the tests' CPU tensors: "cuda", or "cpu" for the interpreter; None: no such run."""
BACKEND = os.environ.get("VITQ_TEST_BACKEND", "triton")
"""Whose: "triton" or "cuda"."""
TRITON = host.INTERPRETED or (DEVICE is not None and BACKEND == "triton")
CUDA = _cuda.EMULATED is not None or (DEVICE is not None and BACKEND == "cuda")
"""The C++ GPU kernels on CPU tensors: emulated (see test_cuda_emulated.py) or on a GPU."""
GPU = TRITON or CUDA
"""Kernels of a GPU: their layouts, and branches multiplied in the dtype of their matrices."""
needs_emulation = pytest.mark.skipif(_cuda.EMULATED is None, reason="calls the emulation's operators on CPU tensors")
