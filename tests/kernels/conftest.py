"""Every kernel test runs on every implementation that this machine has: the oracle, and the C++ kernels per ISA.

Under TRITON_INTERPRET=1 it is the Triton kernels instead, on CPU tensors (see test_triton.py, which starts that run);
under VITQ_TEST_DEVICE=cuda they, or the C++ GPU kernels (VITQ_TEST_BACKEND=cuda), on the GPU, behind the same CPU
tensors (bench/gpu/suite.py starts those);
under VITQ_EMULATED_CUDA the C++ GPU kernels on the host (test_cuda_emulated.py).
"""

import contextlib

import pytest
from selected import BACKEND, CUDA, DEVICE, TRITON

import vitq_kernels as vk
from vitq_kernels import testing

CPU = ("ref", *(f"cpu/{isa}" for isa in testing.isas()))
IMPLEMENTATIONS = ("triton",) if TRITON else ("cuda",) if CUDA else CPU


@pytest.fixture(scope="session", autouse=True)
def _device():
    with testing.offloaded(DEVICE, BACKEND) if DEVICE else contextlib.nullcontext():
        yield


@pytest.fixture(params=IMPLEMENTATIONS)
def implementation(request):
    """Pins the back end (and instruction set) for one test; its name."""
    name, _, isa = request.param.partition("/")
    with vk.backend(name):
        if isa:
            with testing.cpu_isa(isa):
                yield request.param
        else:
            yield request.param
