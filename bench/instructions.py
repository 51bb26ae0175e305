"""Instructions that each CPU kernel executes, by valgrind: the same number on a busy machine and on an idle one.

    make instructions      # counts, and what changed against bench/results/instructions.json
    python -m bench.instructions [--json PATH]

Kernels run on AVX2, the widest set that valgrind knows, without torch (``bench/native/instructions.cpp``), one thread.
A change of a kernel that this does not show may still be faster or slower; one that it shows is real.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

from . import ROOT

BUILD = ROOT / "build" / "instructions"
ISA = "avx2"


class Unavailable(Exception):
    """Nothing can be counted here; the message says why."""


def _run(command: list[str], **variables: str) -> subprocess.CompletedProcess:
    done = subprocess.run(command, capture_output=True, text=True, env={**os.environ, **variables})
    if done.returncode:
        raise RuntimeError(f"{' '.join(command)}: {(done.stdout + done.stderr)[-2000:]}")
    return done


def build() -> Path:
    """The program with the cases. Raises: Unavailable without valgrind, compiler or cmake; RuntimeError."""
    path = os.pathsep.join([str(Path(sys.executable).parent), os.environ["PATH"]])
    cmake, ninja = (shutil.which(name, path=path) for name in ("cmake", "ninja"))
    needed = {"valgrind": shutil.which("valgrind"), "a C++ compiler": shutil.which("c++"), "cmake": cmake}
    if missing := [name for name, found in needed.items() if found is None]:
        raise Unavailable(f"no {' and no '.join(missing)}")
    generator = ["-G", "Ninja", f"-DCMAKE_MAKE_PROGRAM={ninja}"] if ninja else []
    options = ["-DVITQ_BUILD_OPS=OFF", "-DVITQ_BUILD_INSTRUCTIONS=ON"]
    _run([cmake, "-S", str(ROOT), "-B", str(BUILD), *generator, *options])
    _run([cmake, "--build", str(BUILD), "--target", "vitq_instructions", "-j", "2"])
    return BUILD / "vitq_instructions"


def count(cases: list[str] | None = None) -> dict[str, int]:
    """Case → instructions of one call; default: every case. Raises: Unavailable; RuntimeError."""
    program = build()
    counts = {}
    # The compiler makes copies of the measured function, each with a suffix.
    for case in cases or _run([str(program)]).stdout.splitlines():
        tool = ["valgrind", "--tool=callgrind", "--callgrind-out-file=/dev/null", "--toggle-collect=vitq_measured*"]
        said = _run([*tool, str(program), case], VITQ_CPU_ISA=ISA).stderr
        counts[case] = int(re.search(r"Collected : (\d+)", said).group(1))
    return counts


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", type=Path, help="write the counts here, as bench.compare reads them")
    args = parser.parse_args()
    try:
        counts = count()
    except Unavailable as error:
        raise SystemExit(f"nothing counted: {error}") from error
    for case, instructions in counts.items():
        print(f"{instructions:>14,}  {case}")
    if args.json:
        compiler = _run(["c++", "--version"]).stdout.splitlines()[0]  # another one makes other instructions
        record = {"environment": {"compiler": compiler}, "instructions": counts}
        args.json.write_text(json.dumps(record, indent=1) + "\n")


if __name__ == "__main__":
    main()
