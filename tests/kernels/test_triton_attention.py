"""Triton's attention on the interpreter: a file of its own, so that it runs beside the other kernels."""

import interpreter
import pytest

from vitq_kernels.triton import host


@pytest.mark.skipif(not host.INSTALLED, reason="triton is not installed")
def test_attention_under_the_interpreter():
    interpreter.run("test_qattention.py", "test_scatter.py", "interpreted_triton_attention.py", least=200)
