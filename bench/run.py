"""Everything on the CPU that is a time, beside what a user would pick instead: one file per machine.

    python -m bench.run [--quick] [--threads 1,2] [--only linear --only model:CASE] [--peers none] [--isa avx2]

Every figure is a ratio within one process, taken in turns, after the result passed its check. One process per
benchmark, thread count and peer, pinned to as many cores as it has threads. Run it on an otherwise idle machine, then
``python -m bench.update_docs``. ``--isa avx2`` holds everybody to AVX2, as a stand-in for a machine without VNNI.

The file is written after every process; ``--resume`` runs what it still lacks. Each row is a ratio of one process, so
that a run in parts loses nothing but the machine's mood in common. With ``--quick`` or ``--only`` it is one in
``build/bench``: a part does not replace the results of all.
"""

from __future__ import annotations

import argparse
import datetime
import importlib
import importlib.util
import json
import os
import re
import subprocess
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

from vitq.bench.environment import cores, environment

from . import RESULTS, ROOT, registry
from . import environment as child_environment

MODULES = ("bench.ops", "bench.whole", "bench.peers")
AVX2 = {
    "VITQ_CPU_ISA": "avx2",
    "ATEN_CPU_CAPABILITY": "avx2",
    "MKL_ENABLE_INSTRUCTIONS": "AVX2",
    "ONEDNN_MAX_CPU_ISA": "AVX2",
}
TIMEOUT = 3600.0  # of one process
PARTS = ROOT / "build" / "bench"
PROFILED = "ViT-S/16 b1"


def machine(about: dict[str, Any]) -> str:
    """A file name: processor, cores, instruction set."""
    name = re.sub(r"\((r|tm)\)|\b(cpu|processor)\b", " ", about["cpu"].lower())
    slug = "-".join(re.findall(r"[a-z0-9.]+", name))
    return f"{slug}-{about['cores']}-cores-{about['cpu_isa'] or 'ref'}"


def commit() -> str:
    found = subprocess.run(["git", "-C", str(ROOT), "describe", "--always", "--dirty"], capture_output=True, text=True)
    return found.stdout.strip() or "no git checkout"


class Run:
    """A run in progress.

    Attributes: record: what the result file will hold. cache: a folder that its processes share.
    """

    def __init__(self, record: dict[str, Any], modules: list[str], isa: str | None, cache: Path, quick: bool) -> None:
        self.record, self.modules, self.isa, self.cache, self.quick = record, modules, isa, cache, quick

    def job(self, bench: registry.Benchmark, cases: list[str], threads: int, peer: str | None = None) -> None:
        """Adds what one process found, or why it found nothing."""
        if peer is not None and (reason := self.refusal(registry.peers[peer])):
            self.record["absent"][peer] = reason
            return
        seconds, rounds = (0.1, 9) if self.quick else (3.0 if bench.peers else 1.0, 200)
        job = {"bench": bench.name, "cases": cases, "threads": threads, "seconds": seconds, "rounds": rounds}
        job |= {"peer": peer, "modules": self.modules}
        found = self.process(job)
        self.record["rows"] += found["rows"]
        self.record["wrong"] |= {f"{bench.name} {case}": reason for case, reason in found["wrong"].items()}
        for case, reason in found["absent"].items():
            self.record["absent"][f"{peer}, {bench.name} {case}, {threads} threads"] = reason

    def refusal(self, peer: registry.Peer) -> str | None:
        """Why a peer cannot even be tried."""
        if missing := [name for name in peer.needs if importlib.util.find_spec(name) is None]:
            return f"{', '.join(missing)} not installed (pip install .[bench])"
        if self.isa and peer.overrides is None:
            return f"nothing holds it to {self.isa}"
        return None

    def process(self, job: dict[str, Any]) -> dict[str, Any]:
        out, source = self.cache / "out.json", self.cache / "job.json"
        out.unlink(missing_ok=True)
        source.write_text(json.dumps(job))
        env = child_environment() | {"OMP_NUM_THREADS": str(job["threads"]), "VITQ_BENCH_CACHE": str(self.cache)}
        if self.isa:
            env |= AVX2 | ((registry.peers[job["peer"]].overrides or {}) if job["peer"] else {})
        command = [sys.executable, "-W", "ignore", "-m", "bench.worker", str(source), str(out)]
        errors = self.cache / "stderr"
        try:
            with errors.open("w") as stderr:
                done = subprocess.run(
                    command, cwd=ROOT, env=env, stderr=stderr, timeout=TIMEOUT, preexec_fn=_pinned(job["threads"])
                )
            why = f"exit status {done.returncode}"
        except subprocess.TimeoutExpired:
            why = f"took longer than {TIMEOUT:.0f} s"
        if out.exists():
            return json.loads(out.read_text())
        last = (errors.read_text().strip().splitlines() or [""])[-1][:200]
        if job["peer"] is None:
            raise RuntimeError(f"{job['bench']} with {job['threads']} threads: {why}: {last}")
        return {"rows": [], "wrong": {}, "absent": dict.fromkeys(job["cases"], f"{why}: {last}")}


def _pinned(threads: int) -> Callable[[], None] | None:
    """What gives a child process its cores, where the system can."""
    if not hasattr(os, "sched_setaffinity"):
        return None
    own = sorted(os.sched_getaffinity(0))[:threads]
    return lambda: os.sched_setaffinity(0, own)


def _short(value: Any) -> Any:
    """Numbers to six digits: more is noise, and bytes in the repository."""
    if isinstance(value, dict):
        return {key: _short(v) for key, v in value.items()}
    if isinstance(value, list):
        return [_short(v) for v in value]
    return float(f"{value:.6g}") if isinstance(value, float) else value


def selection(only: list[str] | None, quick: bool) -> dict[str, list[str]]:
    """Benchmark → cases, of "name" and "name:case" words. Raises: ValueError for what there is not."""
    known = registry.benchmarks
    if not only:
        return {name: list(bench.quick if quick else bench.cases) for name, bench in known.items()}
    chosen: dict[str, list[str]] = {}
    for word in only:
        name, _, case = word.partition(":")
        if name not in known:
            raise ValueError(f"--only has {name!r}, expected one of {', '.join(known)}")
        cases = [case] if case else list(known[name].quick if quick else known[name].cases)
        chosen.setdefault(name, []).extend(cases)
    return chosen


def resumed(target: Path, fresh: dict[str, Any], chosen: set[str]) -> tuple[dict[str, Any], list[list[Any]]]:
    """The record in ``target`` and what it lacks. Raises: ValueError unless it is an unfinished one of this machine."""
    record = json.loads(target.read_text()) if target.exists() else {}
    if not record.get("missing"):
        raise ValueError(f"--resume finds nothing unfinished in '{target}', expected a run that was interrupted")
    for key, now in fresh["environment"].items():
        if key not in ("commit", "date") and record["environment"].get(key) != now:
            raise ValueError(f"--resume finds {key} {record['environment'].get(key)!r} in '{target}', expected {now!r}")
    if record["quick"] != fresh["quick"]:
        raise ValueError(f"--resume finds quick {record['quick']} in '{target}', expected {fresh['quick']}")
    if other := sorted({name for name, _, _ in record["missing"]} - chosen - {"profile"}):
        raise ValueError(f"--resume finds {', '.join(other)} missing in '{target}', expected --only as it was")
    commits = [*record["environment"]["commit"].split(", "), fresh["environment"]["commit"]]
    record["environment"]["commit"] = ", ".join(dict.fromkeys(commits))
    return record, record.pop("missing")


def _write(target: Path, record: dict[str, Any]) -> None:
    target.parent.mkdir(parents=True, exist_ok=True)
    partial = target.with_suffix(".partial")
    partial.write_text(json.dumps(_short(record), indent=1, allow_nan=False) + "\n")
    os.replace(partial, target)


def main(argv: list[str] | None = None) -> int:
    """0, or 1 where a result was wrong."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="few cases, little time: shows that everything runs")
    parser.add_argument("--threads", default="1,2", help="comma-separated (default: 1,2)")
    parser.add_argument("--only", action="append", metavar="NAME[:CASE]", help="a benchmark or one of its cases")
    parser.add_argument("--peers", help="comma-separated; 'none' for no one (default: all)")
    parser.add_argument("--isa", choices=["avx2"], help="hold everybody to it")
    parser.add_argument("--import", dest="modules", action="append", default=[], help="module with more of either kind")
    parser.add_argument(
        "--output", type=Path, help="default: bench/results/<machine>.json, of a part build/bench/<machine>.json"
    )
    parser.add_argument(
        "--resume", action="store_true", help="run what an interrupted run's file lacks; same arguments"
    )
    args = parser.parse_args(argv)
    modules = [*MODULES, *args.modules]
    for name in modules:
        importlib.import_module(name)
    peers = list(registry.peers) if args.peers is None else [p for p in args.peers.split(",") if p != "none"]
    if unknown := [p for p in peers if p not in registry.peers]:
        parser.error(f"--peers has {unknown[0]!r}, expected a selection of {', '.join(registry.peers)}")
    try:
        chosen = selection(args.only, args.quick)
    except ValueError as error:
        parser.error(str(error))
    if args.isa and args.isa == environment()["cpu_isa"] and "VITQ_CPU_ISA" not in os.environ:
        print(f"nothing is timed: this machine has {args.isa} at best, and a run without --isa is one held to it")
        return 0
    about = environment() | {"commit": commit(), "date": datetime.date.today().isoformat()}
    if args.isa:
        about["cpu_isa"] = args.isa
    del about["threads"]
    record: dict[str, Any] = {"environment": about, "quick": args.quick, "rows": [], "wrong": {}, "absent": {}}
    counts = [int(n) for n in args.threads.split(",")]
    if left_out := [name for name in registry.peers if name not in peers]:
        record["absent"] |= dict.fromkeys(left_out, "not asked for (--peers)")
    if lacking := [n for n in counts if n > cores()]:
        record["absent"] |= {f"{n} threads": f"{cores()} cores to run on" for n in lacking}
    plan = [
        [name, threads, peer]
        for threads in [n for n in counts if n <= cores()]
        for name in chosen
        for peer in [None, *(peers if registry.benchmarks[name].peers else [])]
    ]
    if args.only is None:
        plan.append(["profile", counts[0], None])
    folder = PARTS if args.quick or args.only else RESULTS
    target = args.output or folder / f"{machine(about)}.json"
    if args.resume:
        try:
            record, plan = resumed(target, record, set(chosen))
        except ValueError as error:
            parser.error(str(error))
    with tempfile.TemporaryDirectory() as folder:
        run = Run(record, modules, args.isa, Path(folder), args.quick)
        while plan:
            name, threads, peer = plan[0]
            if name == "profile":
                case = "digits b1" if args.quick else PROFILED
                job = {"bench": name, "cases": [case], "threads": threads, "peer": None, "modules": modules}
                record["profiles"] = run.process(job)
            else:
                run.job(registry.benchmarks[name], chosen[name], threads, peer)
            del plan[0]
            if plan:
                _write(target, record | {"missing": plan})
    _write(target, record)
    for name, reason in record["absent"].items():
        print(f"absent: {name}: {reason}")
    for name, reason in record["wrong"].items():
        print(f"WRONG: {name}: {reason}")
    print(f"{len(record['rows'])} rows in {target}")
    return int(bool(record["wrong"]))


if __name__ == "__main__":
    sys.exit(main())
