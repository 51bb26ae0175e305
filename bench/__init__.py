"""Benchmarks: ``python -m bench.run`` on the CPU, ``python -m bench.gpu.check`` on a GPU. Runs from a checkout.

``registry``      what can be timed: a function per benchmark, found by being imported
``ops, models``   the benchmarks themselves
``peers``         what a user would pick instead, each optional
``harness``       one case: checked, then timed in turn with its baseline
``worker, run``   one process per benchmark, thread count and peer; ``bench/results/<machine>.json``
``instructions``  instruction counts of the kernels, repeatable to the last digit
``compare``       two result files, and what of their difference is more than noise
``pages``         tables and pictures of a result file
"""

import os
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
RESULTS = ROOT / "bench" / "results"
# The tests' own checkers are the oracles here, too.
PATHS = [str(ROOT / part) for part in (".", "python", "tests/kernels", "tests/calibration")]
sys.path[:0] = [path for path in PATHS if path not in sys.path]


def environment() -> dict[str, str]:
    """The environment of a child process that sees what this one sees."""
    inherited = os.environ.get("PYTHONPATH")
    return {**os.environ, "PYTHONPATH": os.pathsep.join([*PATHS, *([inherited] if inherited else [])])}
