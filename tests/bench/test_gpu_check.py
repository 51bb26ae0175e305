"""make gpu-check without a GPU: the same steps in the interpreter, wrong kernels found, failures and gaps reported."""

import copy
import json
import os
import stat
import subprocess
import sys
import threading
from pathlib import Path

import pytest
import torch

from bench import update_docs
from bench.gpu import RESULTS, ROOT, environment, goals, report, roofline, sanitize, shapes, suite
from vitq_kernels import ActQuant, backend, backends, quantize
from vitq_kernels.ops.quantize import ref
from vitq_kernels.testing import offloaded
from vitq_kernels.triton import host
from vitq_kernels.tuning import serving

pytestmark = pytest.mark.skipif(not host.INSTALLED, reason="triton is not installed")


@pytest.fixture(scope="module")
def emulated() -> str:
    """The emulated C++ kernels, which stand in for the real ones."""
    import emulation  # beside the kernels' tests, whose folder bench.gpu puts on the path

    if reason := emulation.problem():
        pytest.skip(reason)
    return str(emulation.build())


def python(*arguments: str, **variables: str) -> subprocess.CompletedProcess:
    env = environment() | {"OMP_NUM_THREADS": "1"} | variables
    env.pop("VITQ_BACKEND", None)
    return subprocess.run(
        [sys.executable, "-W", "ignore", *arguments], cwd=ROOT, env=env, capture_output=True, text=True, timeout=900
    )


def both(names: set[str]) -> set[str]:
    """Of both back ends."""
    return names | {f"{name} cuda" for name in names}


def test_every_step_runs_without_a_gpu(tmp_path, emulated):
    before = sorted(RESULTS.iterdir())
    command = "-m", "bench.gpu.check", "--dry-run", "--minutes", "14", "--output", str(tmp_path)
    run = python(*command, VITQ_EMULATED_CUDA=emulated)
    assert run.returncode == 0, run.stdout[-4000:] + run.stderr[-4000:]
    assert run.stdout.strip().splitlines()[-1].startswith("interpreter: all checks passed")
    assert sorted(RESULTS.iterdir()) == before
    assert sorted(p.name for p in tmp_path.iterdir()) == ["interpreter.json", "interpreter.md"]
    record = json.loads((tmp_path / "interpreter.json").read_text())
    assert record["dry_run"] is True
    assert not record["wrong"]
    assert set(record["step_seconds"]) == {"build", "ceilings", "tests", "ops", "calibration", "models"}
    checks = record["checks"]
    for kind in ("kernel tests", "learning ops", "ViT shapes", "own paths, C++"):
        assert checks[kind].endswith("passed")
    for case in ("float16", "bfloat16 cuda"):
        assert checks[f"the same bits in every call, {case}"] == "ok"
        assert checks[f"CUDA graph equals eager, {case}"] == "missing: needs a GPU"
    assert "compute-sanitizer memcheck" in checks
    assert len(record["products"]) == 3
    assert len(record["attention"]) == len(record["rows"]) == len(record["models"]) == 1
    kernels = {"w8", goals.ALONE, goals.WHOLE, "w4", "w4 rank 32", "w4a4 rank 32"}
    assert record["products"][0]["ms"].keys() == {"bf16", "_int_mm"} | both(kernels)
    assert record["products"][1]["ms"].keys() >= both({"w4 rank 32, GELU + quantize"})
    assert record["products"][2]["ms"].keys() >= both({"w8 rank 32, LayerNorm + quantize"})
    assert record["attention"][0]["ms"].keys() >= both({"int8", "int8 + quantize"})
    assert record["models"][0]["ms"].keys() == {"bf16"} | both({"int8 W8A8 static", "int8 W4A8 dynamic"})
    assert [row["ms"].keys() for row in record["learning"]] == [{"torch", "ours"}] * 2
    assert [row["learning"] for row in record["calibration"]] == ["float32", "bfloat16"]
    for row in record["calibration"]:
        assert row["ms"].keys() == row["steps"].keys() == {"allocate.rank_search", "reconstruct.blocks"}
        assert min(row["estimated_ms"].values()) > 0
    assert "C++ kernels over Triton's" in (tmp_path / "interpreter.md").read_text()
    goal_rows = [row for row in report.goal_rows(record) if not row["goal"].startswith("AIQViT")]
    assert {row["met"] for row in goal_rows} == {"unmeasured"}


PLANT = """
import os, sys
os.environ["TRITON_INTERPRET"] = "1"
from bench.gpu import check
from vitq_kernels.ops.qlinear import triton as kernels
right = kernels.qlinear
def wrong(*arguments):
    y = right(*arguments)
    y[3, 5] += 1.0
    return y
kernels.qlinear = wrong
sys.exit(check.main(["--dry-run", "--only", "ceilings", "ops", "--output", sys.argv[1]]))
"""


def test_a_wrong_kernel_stops_the_run_with_its_coordinates(tmp_path):
    run = python("-c", PLANT, str(tmp_path))
    assert run.returncode == 1, run.stdout[-4000:] + run.stderr[-4000:]
    assert (
        "WRONG in ops: product of M=17, K=64, N=48, w8 rank 32: result: 1 of 816 elements off; first at (3, 5)"
        in run.stdout
    )
    assert "SOMETHING IS WRONG" in run.stdout
    assert [p.name for p in tmp_path.iterdir()] == ["interpreter.wrong.json"]


def test_without_pydantic_the_steps_of_a_calibration_are_left_out(tmp_path):
    """It is no package that a machine with torch, triton and timm has."""
    text = """
import sys
sys.modules["pydantic"] = None
from bench.gpu import check
sys.exit(check.main(["--dry-run", "--only", "calibration", "--output", sys.argv[1]]))
"""
    run = python("-c", text, str(tmp_path))
    assert run.returncode == 0, run.stdout[-4000:] + run.stderr[-4000:]
    assert "left out: calibration: pydantic, which reads recipes, is not installed" in run.stdout
    assert len(json.loads((tmp_path / "interpreter.json").read_text())["learning"]) == 2


HANG = """
import os, sys, time
os.environ["TRITON_INTERPRET"] = "1"
from bench.gpu import check
from vitq_kernels.ops.qlinear import triton as kernels
kernels.qlinear = lambda *arguments: time.sleep(600)
check.LATE = float(sys.argv[2])
sys.exit(check.main(["--dry-run", "--minutes", "1", "--only", "ops", "--output", sys.argv[1]]))
"""


def test_a_kernel_that_never_returns_does_not_keep_the_run_or_what_it_found(tmp_path):
    run = python("-c", HANG, str(tmp_path), "0.5")
    assert run.returncode == 2, run.stdout[-4000:] + run.stderr[-4000:]
    assert "not finished: ops: ended after" in run.stdout
    assert "lambda" in run.stderr  # where it was
    (path,) = tmp_path.iterdir()
    assert path.name == "interpreter.partial.json"
    assert len(json.loads(path.read_text())["attention"]) == 1


def test_who_keeps_going_times_what_comes_after_a_wrong_kernel(tmp_path):
    text = PLANT.replace('"ops",', '"ops", "--keep-going",')
    run = python("-c", text, str(tmp_path))
    assert run.returncode == 1, run.stdout[-4000:] + run.stderr[-4000:]
    record = json.loads((tmp_path / "interpreter.wrong.json").read_text())
    assert len(record["wrong"]) == 1
    assert not record["products"]
    assert len(record["rows"]) == 1


def test_nothing_is_checked_without_a_gpu_or_into_the_results_of_one():
    if not torch.cuda.is_available():
        run = python("-m", "bench.gpu.check")
        assert run.returncode == 1
        assert "nothing to check: device is 'cuda'" in run.stderr
    run = python("-m", "bench.gpu.check", "--dry-run", "--output", str(RESULTS))
    assert run.returncode == 2
    assert "times of a dry run mean nothing" in run.stderr


def _selected(monkeypatch, tmp_path, text: str, processes: int = 2):
    (tmp_path / "test_planted.py").write_text(text)
    chosen = suite.Selection("planted", (str(tmp_path / "test_planted.py"),), processes, device=False)
    monkeypatch.setattr(suite, "selections", lambda dry: [chosen])


def test_suite_stops_at_a_failing_test(monkeypatch, tmp_path):
    _selected(monkeypatch, tmp_path, "def test_a():\n    pass\ndef test_b():\n    assert 17 == 18\n")
    with pytest.raises(AssertionError, match=r"planted: (?s:.*)assert 17 == 18"):
        suite.run("cpu", True, 60, threading.Event())


def test_suite_counts_what_all_processes_passed(monkeypatch, tmp_path):
    _selected(monkeypatch, tmp_path, "def test_a():\n    pass\ndef test_b():\n    pass\n", processes=3)
    assert suite.run("cpu", True, 60, threading.Event()) == {"planted": "2 passed"}


def test_suite_says_what_did_not_finish(monkeypatch, tmp_path):
    _selected(monkeypatch, tmp_path, "import time\ndef test_a():\n    time.sleep(600)\n", processes=1)
    assert suite.run("cpu", True, 1, threading.Event())["planted"].startswith("out of time: 1 of 1")


@pytest.mark.parametrize(
    ("script", "outcome"),
    [
        ("exit 0", "no errors"),
        ("echo 'Invalid __global__ write'; exit 9", None),
        ("echo Traceback; exit 1", None),
        ("echo 'Error: Device not supported'; exit 1", "not available: Error: Device not supported"),
        ("sleep 60", "out of time: stopped before its end"),
    ],
)
def test_sanitizer(monkeypatch, tmp_path, script, outcome):
    tool = tmp_path / "compute-sanitizer"
    tool.write_text(f"#!/bin/sh\n{script}\n")
    tool.chmod(tool.stat().st_mode | stat.S_IXUSR)
    monkeypatch.setenv("PATH", f"{tmp_path}{os.pathsep}{os.environ['PATH']}")
    if outcome is None:
        with pytest.raises(AssertionError, match="compute-sanitizer memcheck exited with"):
            sanitize.run(20.0, threading.Event())
    else:
        seconds = 1.0 if "sleep" in script else 20.0
        assert sanitize.run(seconds, threading.Event()) == dict.fromkeys(sanitize.TOOLS, outcome)


def test_what_the_sanitizer_runs(emulated):
    run = python("-m", "bench.gpu.sanitize", VITQ_EMULATED_CUDA=emulated, VITQ_CHECK_DEVICE="cpu", TRITON_INTERPRET="1")
    assert run.returncode == 0, run.stdout[-2000:] + run.stderr[-4000:]
    launched = run.stdout.splitlines()
    assert {"small model, triton", "small model, cuda"} <= set(launched)
    assert len([line for line in launched if line.endswith(" cuda")]) == len(launched) // 2


def test_sanitizer_is_not_there(monkeypatch, tmp_path):
    monkeypatch.setenv("PATH", str(tmp_path))
    assert all(x.startswith("not available") for x in sanitize.run(1.0, threading.Event()).values())


# --- kernels on another device behind CPU tensors --------------------------------------------------------------------


def _quantize_with(monkeypatch, fn):
    monkeypatch.setitem(backends._table["quantize"], "triton", backends.Implementation("triton", fn, lambda _: None))
    backends._resolved.clear()


def test_offloaded_arguments_lie_as_they_did(monkeypatch):
    seen = []

    def kernel(x, *rest):
        seen.append((x.stride(), x.storage_offset()))
        return ref.quantize(x, *rest)

    _quantize_with(monkeypatch, kernel)
    x = torch.randn(7, 5, 12)[1::2, :, 3:9].transpose(0, 1)
    with offloaded("cpu"), backend("triton"):
        got = quantize(x, ActQuant())
    assert seen == [(x.stride(), x.storage_offset())] * 2
    with backend("ref"):
        assert torch.equal(got.q, quantize(x, ActQuant()).q)
    assert backends.table()["quantize"]["triton"].fn is kernel


@pytest.mark.parametrize("bug", ["not repeatable", "not written"])
def test_offloaded_finds(monkeypatch, bug):
    calls = []

    def kernel(x, *rest):
        q, scale, t = ref.quantize(x, *rest)
        calls.append(0)
        if bug == "not repeatable":
            q[2, 1] += len(calls)
        else:
            scale = torch.empty_like(scale)  # holds NaN in the first run
            if len(calls) == 2:
                scale.fill_(1.0)
        return q, scale, t

    _quantize_with(monkeypatch, kernel)
    expected = (
        r"result 0 of quantize: 1 of 24 .* first at \(2, 1\)" if bug == "not repeatable" else "result 1 of quantize"
    )
    with offloaded("cpu"), backend("triton"), pytest.raises(AssertionError, match=expected):
        quantize(torch.randn(4, 6), ActQuant())


# --- goals and documents ---------------------------------------------------------------------------------------------


def _record(speedup: float) -> dict:
    """A record in which everything is ``speedup`` times bf16."""
    ms = {
        "bf16": 1.0,
        "w8": 0.99 / speedup,
        goals.ALONE: 1 / speedup,
        goals.WHOLE: 1 / speedup,
        "w4 rank 32": 1 / speedup,
    }
    model_ms = {"bf16 compiled": 1.0, "int8 static": 1 / speedup}
    figures = {
        "products": {"ms": ms},
        "attention": {"ms": {"int8": 1 / speedup, "sdpa": 1.0}},
        "models": {"ms": model_ms},
        "calibration": {"minutes": 10 / speedup},
    }
    return {key: [planned | copy.deepcopy(figures[key]) for planned in rows] for key, rows in goals.PLANNED.items()}


def test_goals_are_met_missed_or_unmeasured():
    rates = {"int8 rate, M ≥ 6304, K ≥ 768, N ≥ 2304"}  # absolute
    fast, slow = report.goal_rows(_record(2.0)), report.goal_rows(_record(0.9))
    assert {row["met"] for row in fast if row["goal"] not in rates} == {"yes"}
    missed = {row["goal"] for row in slow if row["met"] == "no"}
    assert len(missed) > 15
    assert not any("rank 32 costs" in goal or "W4A8" in goal for goal in missed)
    assert {row["met"] for row in report.goal_rows(None)} == {"unmeasured"}
    partial = _record(2.0)
    last = next(row for row in partial["products"] if (row["M"], row["K"], row["N"]) == (6304, 768, 2304))
    del last["ms"][goals.ALONE]
    figures = {row["goal"]: row["met"] for row in report.goal_rows(partial)}
    assert figures["product, rank 32, M ≥ 6304, K ≥ 768, N ≥ 2304: worst"] == "unmeasured"
    assert figures["product, rank 32, M = 197: median"] == "yes"


@pytest.mark.parametrize("table", goals.PLANNED)
def test_a_goal_whose_rows_did_not_all_fit_is_unmeasured(table):
    """As when time ran out before the largest layers, which are last and slowest."""
    record = _record(2.0)
    covered = [g.name for g in goals.GOALS if g.table == table and g.covers(record[table][-1])]
    del record[table][-1]
    met = {row["goal"]: row["met"] for row in report.goal_rows(record)}
    assert {met[name] for name in covered} <= {"unmeasured"}
    assert "yes" in met.values()


def test_goals_are_those_of_the_faster_back_end():
    record = _record(0.5)
    for row in record["products"]:
        row["ms"] |= {f"{name} cuda": ms / 4 for name, ms in row["ms"].items() if name != "bf16"}
    figures = {row["goal"]: row["measured"] for row in report.goal_rows(record)}
    assert figures["product, rank 32, M = 197: median"] == "2.00×"
    assert figures["W4A8 over W8A8, M ≥ 1576"] == "1.00×"
    assert figures["attention over the best SDPA, N = 197"] == "0.50×"


def test_one_slow_shape_misses_a_goal_of_the_worst():
    record = _record(2.0)
    record["products"][0]["ms"][goals.ALONE] = 1 / 0.94
    figures = {row["goal"]: row["met"] for row in report.goal_rows(record)}
    assert figures["product, rank 32, M = 197: never below"] == "no"
    assert figures["product, rank 32, M = 197: median"] == "yes"


def test_inputs_are_cold_again_when_they_come_round():
    """Of the smallest kernels that are timed, on an H200: the bytes of all copies do not fit into its cache."""
    from bench.gpu.machine import sets_of

    cache = 60 << 20
    passes = [2 * m * k for m, k in shapes.rows(False)]
    layers = [m * k + n * k // 2 for m, k, n in shapes.products(False)]
    attentions = [3 * b * h * n * d for b, h, n, d, _ in shapes.attentions(False)]
    for size in passes + layers + attentions:
        assert size * sets_of(size, cache) > 1.15 * cache or size > cache, size


def test_floors():
    peaks = roofline.Peaks(bandwidth=10.0, int8=100.0, half=50.0, exp2=1.0)
    work = roofline.Work(bytes=10, int8=200, half=50, exp2=1)
    assert work.times(peaks) == {"memory": 1.0, "tensor cores": 3.0, "exponentials": 1.0}
    assert (work.floor(peaks), work.bound(peaks)) == (3.0, "tensor cores")
    assert work + work == roofline.Work(20, 400, 100, 2)


def test_documents_are_current():
    for path, text in update_docs.pages().items():
        assert path.read_text() == text, f"{path.relative_to(ROOT)}: run bench/update_docs.py"


def _records(monkeypatch, tmp_path, **records: dict):
    monkeypatch.setattr(update_docs, "RESULTS", tmp_path)
    for name, record in records.items():
        (tmp_path / f"{name.replace('_', '.')}.json").write_text(json.dumps(record))


def test_documents_take_the_newest_record_of_a_gpu(monkeypatch, tmp_path):
    dates = {"a": "2026-01-01", "b": "2026-03-01", "c_wrong": "2026-05-01", "c_partial": "2026-06-01"}
    records = {name: {"peaks": {}, "date": date, "name": name} for name, date in dates.items()}
    _records(monkeypatch, tmp_path, cpu={}, **records)
    assert [record["name"] for record in update_docs.gpu_records()] == ["b", "a"]


def test_measured_shapes_become_a_table_that_dispatch_reads(monkeypatch, tmp_path):
    """The least speed-up of what was timed at a shape; of a kernel that only one back end ran, nothing."""

    def row(m: int, **ms: float) -> dict:
        layouts = {"w8": "int8", "w8 rank 32": "int8", "w4": "int4_k64x2"}
        calls = {name: ["qlinear", layout, [m, 768, 384]] for name, layout in layouts.items() if name in ms}
        return {"M": m, "K": 384, "N": 768, "ms": ms, "calls": calls}

    small = {"bf16": 1.0, "w8": 0.5, "w8 cuda": 0.4, "w8 rank 32": 0.5, "w8 rank 32 cuda": 0.51, "w4": 0.5}
    rows = [row(197, **small), row(1576, **{"w8": 0.5, "w8 cuda": 0.4})]
    record = {"peaks": {}, "date": "2026-03-01", "environment": {"gpu": "Some GPU 1", "commit": "c"}}
    record |= {"products": rows}
    tables = report.versus_tables(record)
    assert "| 197 | 384 | 768 | 1.25 | 0.98 |" in tables
    assert "win 2 of 3; median 1.25×, worst 0.98×, best 1.25×" in tables
    _records(monkeypatch, tmp_path, gpu=record)
    monkeypatch.setattr(serving, "FOLDER", tmp_path)
    ((path, text),) = update_docs.serving_tables().items()
    assert path == tmp_path / "some_gpu_1.cuda.json"
    rows = json.loads(text)["rows"]
    assert rows == [["qlinear", "int8", 197, 768, 384, 0.98], ["qlinear", "int8", 1576, 768, 384, 1.25]]
    path.write_text(text)
    monkeypatch.setattr(host, "name", lambda: "Some GPU 1")
    backends.forget()
    served = [serving.cuda_serves("qlinear", "int8", (m, 768, 384)) for m in (1, 197, 1576, 9000)]
    assert served == [False, False, True, True]
    backends.forget()


def test_tuner_without_a_gpu(tmp_path):
    """Resumable, in the format of the other tables; a second run has nothing left to do."""
    command = (
        "-m",
        "bench.gpu.tune",
        "--dry-run",
        "--kinds",
        "w8",
        "attention",
        "--output",
        str(tmp_path),
        "--cache",
        str(tmp_path),
    )
    first = python(*command)
    assert first.returncode == 0, first.stderr[-3000:]
    assert "best" in first.stdout
    assert "complete" in first.stdout
    record = json.loads((tmp_path / "interpreter.json").read_text())
    shipped = json.loads((Path(host.__file__).parents[1] / "tuning" / "sm_80.json").read_text())
    assert record["measured"] is True
    assert record["columns"] == shipped["columns"]
    assert [row[:2] for row in record["w8"]] == [[17, 48]]
    assert [row[:2] for row in record["attention"]] == [[9, 16]]
    assert record["w4"] == shipped["w4"]
    assert "best" not in python(*command).stdout
