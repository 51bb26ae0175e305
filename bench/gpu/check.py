"""Verifies, then times, everything that needs a GPU: one command, eight minutes, no network.

    python -m bench.gpu.check [--minutes 8] [--output bench/results] [--only tests ops ...] [--keep-going]
    python -m bench.gpu.check --dry-run           # the same code on tiny shapes in Triton's interpreter: no GPU needed

Stops at the first wrong result with its coordinates. Each step has a share of the time; what does not fit is left out
and listed; what still runs after 1.15 times the time is ended, with a traceback. Exit code: 0 all checks passed, 1
something is wrong, 2 nothing is wrong but a check did not finish. Writes <output>/<gpu>.json and .md (<gpu>.wrong.json
if something is wrong; <gpu>.partial.json after each row, until then), with --only into build/gpu-check unless told
otherwise; bench/update_docs.py makes the tables of docs/gpu.md from the first.
"""

from __future__ import annotations

import argparse
import datetime
import faulthandler
import importlib.util
import itertools
import json
import os
import subprocess
import sys
import threading
import time
import traceback
from collections.abc import Callable, Iterator
from concurrent.futures import FIRST_EXCEPTION, ThreadPoolExecutor, wait
from dataclasses import asdict
from pathlib import Path
from typing import Any

from . import RESULTS, ROOT, environment, report

TIMED_RESERVE = 0.5
"""Share of the time that is kept for timing, whatever the checks would take."""
LATE = 1.15
"""Share of the time after which a run is ended wherever it is: a kernel that never returns would keep it for ever."""
FIRST_MODEL = 60.0
"""Seconds that a model is taken to need as long as none was timed."""


class Check:
    """One run: what was found, what was left out, how much time there is.

    Attributes: machine; record: what is written; wrong, incomplete: what failed, and what did not finish; step: the
    current one; stop: set when processes in the background are to end.
    """

    def __init__(self, machine, seconds: float, keep_going: bool = False, folder: Path | None = None) -> None:
        self.machine, self.keep_going, self.folder = machine, keep_going, folder
        self.begin = time.monotonic()
        self.seconds = seconds
        self.wrong: list[str] = []
        self.incomplete: list[str] = []
        self.warming, self.step, self.stop = None, "start", threading.Event()
        now = datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds")
        self.record: dict[str, Any] = {"date": now, "dry_run": machine.dry, "environment": machine.environment()}
        self.record |= {"checks": {}, "left_out": [], "step_seconds": {}}

    def save(self, ending: str, text: str | None = None) -> None:
        """Writes ``text``, or the record, to <folder>/<gpu>.<ending>: all of it or nothing."""
        if self.folder is None:
            return
        self.folder.mkdir(parents=True, exist_ok=True)
        path = self.folder / f"{self.machine.slug}.{ending}"
        part = path.with_name(f".{path.name}.part")
        part.write_text(json.dumps(self.record, indent=1) + "\n" if text is None else text)
        part.replace(path)
        if not ending.startswith("partial"):
            self.folder.joinpath(f"{self.machine.slug}.partial.json").unlink(missing_ok=True)
            print(f"wrote {path}")

    @property
    def elapsed(self) -> float:
        return time.monotonic() - self.begin

    def left(self, share: float = 1.0, reserve: float = 0.0) -> float:
        """Seconds for a step: at most this share of the whole, leaving ``reserve`` of it to those that follow."""
        return max(0.0, min(share * self.seconds, (1 - reserve) * self.seconds - self.elapsed))

    def say(self, line: str) -> None:
        print(f"[{self.elapsed:5.0f} s] {line}", flush=True)

    @property
    def over(self) -> bool:
        """Whether a wrong result was the last."""
        return bool(self.wrong) and not self.keep_going

    def attempt(self, work: Callable[[], None]) -> None:
        """Does ``work``, a step or a part of one; what it raises is wrong."""
        try:
            work()
        except Exception as error:
            # What is expected here is a wrong result; anything else is as wrong, and needs its traceback.
            if not isinstance(error, AssertionError):
                traceback.print_exc()
            self.wrong.append(f"{self.step}: {error or type(error).__name__}")
            self.say(f"WRONG in {self.wrong[-1]}")

    def checked(self, name: str, outcome: str) -> None:
        self.record["checks"][name] = outcome
        if outcome.startswith("out of time"):
            self.incomplete.append(name)
        self.say(f"{name}: {outcome}")

    def leave_out(self, what: str) -> None:
        self.record["left_out"].append(what)
        self.say(f"LEFT OUT: {what}")

    def rows(
        self, key: str, rows: Iterator[dict], seconds: float, expected: int, describe: Callable[[dict], str]
    ) -> None:
        """Collects ``rows`` until the time is up."""
        table = self.record.setdefault(key, [])
        deadline = time.monotonic() + seconds
        for row in rows:
            table.append(row)
            self.say(describe(row))
            self.save("partial.json")
            if len(table) < expected and time.monotonic() > deadline:
                self.leave_out(f"{key}: {len(table)} of {expected} rows fit in {seconds:.0f} s")
                return


def build(check: Check) -> None:
    """The C++ back end of the CPU, if this machine can build it; the checks below need Triton and ``ref`` alone.

    The C++ GPU kernels take minutes to build: where they are missing, what is left out says so.
    """
    from vitq_kernels import _cuda

    if check.machine.dry:
        return
    if reason := _cuda.unavailable("cuda"):
        check.leave_out(f"C++ GPU kernels: {reason}; python setup.py build_ext --inplace builds them")
    if (ROOT / "vitq_kernels" / "libvitq_ops.so").exists():
        return
    command, env = (
        [sys.executable, "setup.py", "-q", "build_ext", "--inplace"],
        environment() | {"VITQ_BUILD_CUDA": "0"},
    )
    try:
        run = subprocess.run(command, cwd=ROOT, env=env, capture_output=True, text=True, timeout=check.left(0.15))
        outcome = "built" if run.returncode == 0 else f"not built: {(run.stderr or run.stdout).strip()[-300:]}"
    except subprocess.TimeoutExpired:
        outcome = "not built in time"
    check.checked("C++ back end", outcome)


def _know_ceilings(check: Check) -> None:
    if check.machine.peaks is None:
        check.record["peaks"] = asdict(check.machine.measure_ceilings())


def ceilings(check: Check) -> None:
    from . import warm

    _know_ceilings(check)
    check.say(report.ceilings(check.record))
    if not check.machine.dry:
        check.warming = warm.Warming()


def tests(check: Check) -> None:
    """The test files and the sanitizer in processes of their own, whole models meanwhile in this one."""
    from . import integration, models, sanitize, suite

    machine, stop = check.machine, check.stop
    seconds = check.left(1.0, TIMED_RESERVE)
    with ThreadPoolExecutor(2) as pool:
        background = [
            pool.submit(suite.run, machine.device.type, machine.dry, seconds, stop),
            pool.submit(sanitize.run, seconds, stop),
        ]
        try:
            for name, outcome in itertools.chain(_parity(models.parity(machine)), integration.run(machine)):
                check.checked(name, outcome)
                for job in background:
                    if job.done():
                        job.result()  # a wrong result there stops this loop, too
                if not check.left(1.0, TIMED_RESERVE):
                    check.checked("whole models", "out of time: what comes after was not tried")
                    break
            wait(background, return_when=FIRST_EXCEPTION)
        finally:
            stop.set()
        for prefix, job in zip(("", "compute-sanitizer "), background):
            for name, outcome in job.result().items():
                check.checked(prefix + name, outcome)


def _parity(rows: Iterator[dict]) -> Iterator[tuple[str, str]]:
    for row in rows:
        bits = "same bits as" if row["same_bits_as_simulated"] else f"{row['db_simulated']:.0f} dB from"
        top1 = f"top-1 agreement {100 * row['top1_as_ref']:.0f} %"
        yield f"integer model, {row['model']}", f"{bits} the simulation, {row['db_ref']:.0f} dB from ref, {top1}"


def ops(check: Check) -> None:
    from vitq_kernels import backend

    from . import ops, shapes

    machine = check.machine
    if check.warming is not None:
        check.record["warmed"] = check.warming.stop()
        check.warming = None
    _know_ceilings(check)

    def figures(row: dict) -> str:
        shape = ", ".join(f"{k}={v}" for k, v in row.items() if len(k) == 1)
        return f"{shape}: " + ", ".join(f"{name} {1e3 * ms:.1f} µs" for name, ms in row["ms"].items())

    parts = {"attention": (ops.attentions, shapes.attentions, 0.06), "products": (ops.products, shapes.products, 0.2),
             "rows": (ops.rows, shapes.rows, 0.06)}  # fmt: skip
    with backend("triton"):
        for key, (rows, cases, share) in parts.items():
            expected = len(cases(machine.dry))
            check.attempt(lambda: check.rows(key, rows(machine), check.left(share), expected, figures))  # noqa: B023
            if check.over:
                return


def calibration(check: Check) -> None:
    from vitq_kernels import backend

    from . import learning, shapes

    def figures(row: dict) -> str:
        return f"{row['what']} {row['shape']}: " + ", ".join(f"{k} {1e3 * v:.1f} µs" for k, v in row["ms"].items())

    def minutes(row: dict) -> str:
        methods = ", ".join(f"{name} {ms:.2f} ms" for name, ms in row["ms"].items())
        return f"{row['recipe']}, {row['learning']}: {methods} a step, {row['minutes']:.1f} minutes for a ViT-S"

    machine = check.machine
    _know_ceilings(check)
    cases = sum(map(len, shapes.learned(machine.dry).values()))
    check.attempt(lambda: check.rows("learning", learning.rows(machine), check.left(0.04), cases, figures))
    if check.over:
        return
    if importlib.util.find_spec("pydantic") is None:
        check.leave_out("calibration: pydantic, which reads recipes, is not installed")
        return
    with backend("triton"):
        check.rows("calibration", learning.steps(machine), check.left(0.08), len(shapes.PRECISIONS), minutes)


def models(check: Check) -> None:
    import torch

    from . import models

    def figures(row: dict) -> str:
        return f"{row['model']} b{row['batch']}: " + ", ".join(f"{name} {ms:.2f} ms" for name, ms in row["ms"].items())

    plan = models.plan(check.machine.dry)
    table = check.record.setdefault("models", [])
    longest = 0.0 if check.machine.dry else FIRST_MODEL

    def timed(name: str, architecture: str, kwargs: dict, batches: tuple[int, ...]) -> None:
        for row in models.timed(check.machine, name, architecture, kwargs, batches):
            table.append(row)
            check.say(figures(row))
            check.save("partial.json")
            for what in row["missing"]:
                check.say(f"MISSING: {what}")

    for i, planned in enumerate(plan):
        if check.left() <= longest:
            rest = "; ".join(f"{n} at batch {', '.join(map(str, b))}" for n, _, _, b in plan[i:])
            check.leave_out(f"models: {rest}")
            return
        start = time.monotonic()
        check.attempt(lambda: timed(*planned))  # noqa: B023
        if check.over:
            return
        torch.compiler.reset()
        longest = max(longest, time.monotonic() - start)


STEPS: dict[str, Callable[[Check], None]] = {
    "build": build,
    "ceilings": ceilings,
    "tests": tests,
    "ops": ops,
    "calibration": calibration,
    "models": models,
}


def run(check: Check, names: list[str]) -> int:
    """The named steps in order; the exit code."""
    try:
        for name in names:
            start, check.step = time.monotonic(), name
            check.say(f"--- {name}")
            check.attempt(lambda: STEPS[name](check))  # noqa: B023
            if check.over:
                break
            check.record["step_seconds"][name] = round(time.monotonic() - start, 1)
            check.save("partial.json")
    finally:
        if check.warming is not None:
            check.warming.stop()
    return concluded(check)


def concluded(check: Check) -> int:
    """The exit code, after the last words of the record."""
    check.record["wrong"], check.record["seconds"] = check.wrong, round(check.elapsed, 1)
    return 1 if check.wrong else 2 if check.incomplete else 0


def end_late(check: Check) -> None:
    """Ends this process, whose other thread may be waiting for a GPU that never answers; <gpu>.partial.json stays."""
    check.incomplete.append(f"{check.step}: ended after {check.elapsed:.0f} s, in it or hanging")
    faulthandler.dump_traceback()
    check.stop.set()
    if check.warming is not None:
        check.warming.stop()
    time.sleep(1.0)  # until the tests' processes are killed
    code = concluded(check)
    check.save("partial.json")
    print(summary(check, code), flush=True)
    os._exit(code)


def summary(check: Check, code: int) -> str:
    """What is printed last."""
    lines = [report.goal_table(check.record), ""]
    if check.machine.dry:
        lines.append("Dry run: times are those of an interpreter and mean nothing.")
    lines += [f"left out: {line}" for line in check.record["left_out"]]
    lines += [f"not finished: {line}" for line in check.incomplete]
    lines += [f"WRONG: {line}" for line in check.wrong]
    verdict = {0: "all checks passed", 1: "SOMETHING IS WRONG", 2: "nothing is wrong, but not every check finished"}
    return "\n".join([*lines, f"{check.machine.name}: {verdict[code]} ({check.elapsed:.0f} s)"])


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--minutes", type=float, default=8.0)
    parser.add_argument("--output", type=Path, help="default: see above; a dry run writes nothing by default")
    parser.add_argument("--only", nargs="+", choices=STEPS, default=list(STEPS), help="steps to run")
    parser.add_argument("--keep-going", action="store_true", help="go on after a wrong result (and still exit with 1)")
    parser.add_argument("--dry-run", action="store_true", help="tiny shapes in Triton's interpreter")
    args = parser.parse_args(argv)
    if args.dry_run:
        os.environ["TRITON_INTERPRET"] = "1"  # read when a kernel is decorated: before anything imports one
    # A cache of its own: what was compiled for other purposes neither helps nor suffers.
    os.environ.setdefault("TORCHINDUCTOR_CACHE_DIR", str(ROOT / "build" / "gpu-check" / "inductor"))
    import torch

    from .machine import Machine

    try:
        machine = Machine("cpu" if args.dry_run else "cuda")
    except ValueError as error:
        print(f"nothing to check: {error}", file=sys.stderr)
        return 1
    if args.dry_run and args.output is not None and args.output.resolve() == RESULTS:
        parser.error(f"--output is {args.output}, expected another folder: times of a dry run mean nothing")
    # A part of the steps does not replace the results of all.
    folder = RESULTS if len(args.only) == len(STEPS) else ROOT / "build" / "gpu-check"
    check = Check(machine, 60 * args.minutes, args.keep_going, args.output or (None if args.dry_run else folder))
    late = threading.Timer(LATE * check.seconds, end_late, [check])
    late.daemon = True
    late.start()
    check.say(", ".join(f"{k} {v}" for k, v in check.record["environment"].items()))
    with torch.no_grad():
        code = run(check, [name for name in STEPS if name in args.only])
    late.cancel()
    check.save("wrong.json" if check.wrong else "json")
    if not check.wrong:
        check.save("md", report.markdown(check.record))
    print(summary(check, code), flush=True)
    return code


if __name__ == "__main__":
    raise SystemExit(main())
