"""Runs interpreted_models.py in a process of its own: Triton looks at TRITON_INTERPRET when it decorates a kernel."""

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from vitq_kernels.triton import host


@pytest.mark.skipif(not host.INSTALLED, reason="triton is not installed")
def test_models_under_the_interpreter():
    environment = {**os.environ, "TRITON_INTERPRET": "1", "OMP_NUM_THREADS": "1"}
    environment.pop("VITQ_BACKEND", None)
    file = Path(__file__).with_name("interpreted_models.py")
    command = [sys.executable, "-m", "pytest", "-p", "no:cacheprovider", "-p", "no:xdist"]
    command += ["-W", "ignore::RuntimeWarning", str(file)]
    run = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=1200)
    assert run.returncode == 0, run.stdout[-20_000:] + run.stderr[-2000:]
    assert int(re.search(r"(\d+) passed", run.stdout)[1]) >= 20, run.stdout[-2000:]
