"""Calibration on a device that is not the CPU, without having one: see elsewhere.py and on_another_device.py."""

import re
import subprocess
import sys
from pathlib import Path

import pytest
from torch.utils import backend_registration

CASES = Path(__file__).with_name("on_another_device.py")
EMULATED = hasattr(backend_registration, "_setup_privateuseone_for_python_backend")


@pytest.mark.skipif(not EMULATED, reason="this torch has no devices in Python")
def test_nothing_is_left_on_the_cpu():
    command = [sys.executable, "-m", "pytest", "-x", "-p", "no:cacheprovider", str(CASES)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=900)
    assert done.returncode == 0, done.stdout[-6000:] + done.stderr[-2000:]
    assert re.search(r"\d\d passed", done.stdout)
