"""The benchmark harness: checks before figures, rows that add up, absent peers named, verdicts above the noise."""

import json
import os
import sys
from pathlib import Path

import extra_benchmarks  # noqa: F401  registers "tiny" and its peers
import pytest
import torch
from vitq.bench.latency import interleave

from bench import (
    PATHS,
    harness,
    instructions,
    ops,  # noqa: F401  (registers)
    pages,
    peers,
    registry,
    run,
    update_docs,
    whole,
)
from bench.compare import compare, differences, main, verdict
from vitq_kernels.testing import isas


def test_turns_alternate_and_a_turns_first_call_does_not_count():
    seen = []
    samples = interleave({"a": lambda: seen.append("a"), "b": lambda: seen.append("b")}, seconds=0.0, most=3)
    assert "".join(seen) == "ab" + "ab" * 3
    assert {name: len(values) for name, values in samples.items()} == {"a": 3, "b": 3}
    seen.clear()
    interleave({"a": lambda: seen.append("a"), "b": lambda: seen.append("b")}, seconds=0.0, most=1, turn=1e-9)
    assert "".join(seen) == "ab" + "aabb"


def test_rows_add_up():
    prepared = registry.Prepared({}, {"ours": {"sqnr_db": 40.0}, "peer": {"sqnr_db": 20.0}})
    samples = {"base": [8.0, 8.0, 16.0], "peer": [4.0, 4.0, 8.0], "ours": [2.0, 2.0, 4.0]}
    key = {"bench": "b", "case": "c", "threads": 1}
    (row,) = harness.rows_of(key, prepared, samples, "peer")
    assert (row["ours_ms"], row["baseline"], row["baseline_ms"], row["ratio"]) == (2.0, "peer", 4.0, 2.0)
    assert (row["ratio_p20"], row["ratio_p80"], row["rounds"]) == (2.0, 2.0, 3)
    assert (row["baseline_speedup"], row["ours_sqnr_db"], row["baseline_sqnr_db"]) == (2.0, 40.0, 20.0)
    rows = harness.rows_of(key, prepared, {**samples, "other": [1.0, 1.0, 2.0]}, None)
    assert [(r["ours"], r["baseline"], r["ratio"]) for r in rows[1:]] == [("ours", "base", 4.0), ("other", "base", 8.0)]
    assert all("baseline_speedup" not in r for r in rows)


def test_a_wrong_result_is_not_timed():
    with pytest.raises(AssertionError, match="the sum is off"):
        harness.measure(registry.benchmarks["tiny"], "wrong", 1, 0.01)


@pytest.mark.parametrize("bench", ["linear", "attention", "norm"])
@pytest.mark.skipif(not isas(), reason="the native extension was not built")
def test_every_op_passes_its_check_and_a_wrong_one_does_not(bench, monkeypatch):
    case = {"linear": "5x24x40", "attention": "1x2x9", "norm": "5x40"}[bench]
    rows = harness.measure(registry.benchmarks[bench], case, 1, 0.0, rounds=2)
    assert len(rows) >= 3
    assert all(row["bench"] == bench and row["case"] == case and row["ratio"] > 0 for row in rows)
    import vitq_kernels as vk

    name = {"linear": "qlinear", "attention": "qattention", "norm": "layer_norm_quantize"}[bench]
    right = getattr(vk, name)

    def wrong(*args, **kwargs):
        out = right(*args, **kwargs)
        if isinstance(out, torch.Tensor):
            return out * 1.01
        return vk.QTensor(out.q.flip(-1), out.scale, out.zero_point, out.t)

    monkeypatch.setattr(vk, name, wrong)
    with pytest.raises(AssertionError):
        harness.measure(registry.benchmarks[bench], case, 1, 0.0, rounds=2)


@pytest.mark.slow
def test_whole_models_and_a_peer(tmp_path, monkeypatch):
    monkeypatch.setenv("VITQ_BENCH_CACHE", str(tmp_path))
    monkeypatch.setattr(whole, "OURS", {"W4A8 static": whole.OURS["W4A8 static"]})
    model, block = registry.benchmarks["model"], registry.benchmarks["block"]
    whole._folder.cache_clear()
    whole._states.cache_clear()
    monkeypatch.setattr(whole, "PACKAGED", "W4A8 static")
    monkeypatch.setattr(whole, "TURN", 1e-9)
    row, packaged = harness.measure(model, "digits b2", 1, 0.0, rounds=2)
    assert packaged["ours"] == "W4A8 static, AOTInductor"
    assert packaged["ours_sqnr_db"] == pytest.approx(row["ours_sqnr_db"], abs=0.01)
    assert packaged["ours_mb"] == row["ours_mb"]
    assert [path.name for path in tmp_path.glob("*.pt2")] == ["digits W4A8 static b2 t1.pt2"]
    assert (row["ours"], row["baseline"]) == ("W4A8 static", whole.EAGER)
    assert row["baseline_sqnr_db"] is None  # the float model itself
    assert row["ours_sqnr_db"] > 10
    assert row["ours_agreement"] > 0.8
    assert row["ours_mb"] < row["baseline_mb"] / 4
    registry.peers["eager again"] = registry.Peer("eager again", lambda model, *_: model)
    try:
        beside, ahead = harness.measure(model, "digits b2", 1, 0.0, "eager again", rounds=2)
        turns = {model.prepare("digits b2", peer).turn for peer in (None, "eager again")}
    finally:
        del registry.peers["eager again"]
    assert turns == {1e-9}  # figures with and without a peer are taken alike
    assert beside["baseline"] == ahead["baseline"] == "eager again"
    assert ahead["ours"] == packaged["ours"]
    assert beside["baseline_agreement"] == 1.0
    assert beside["ours_sqnr_db"] == pytest.approx(row["ours_sqnr_db"], abs=0.01)
    assert harness.measure(block, "digits b1", 1, 0.0, rounds=2)[0]["ratio"] > 0
    found = whole.profiles("digits b1", 1)
    found.pop("ceilings", None)
    assert set(found) == {whole.EAGER, "W4A8 static"}
    record = {"rows": [row], "profiles": found}
    assert "| W4A8 static | qattention_quantize | 6 |" in pages.profile_table(record)
    assert {"accuracy"} <= set(pages.pictures({**record, "rows": [{**row, "case": "digits b1"}]}))
    monkeypatch.setattr(whole, "to_simulated", lambda model, state: model)
    with pytest.raises(AssertionError, match="dB of the simulation, expected 80"):
        harness.measure(model, "digits b2", 1, 0.0, rounds=2)


def start(tmp_path: Path, *argv: str) -> tuple[int, dict]:
    target = tmp_path / "out.json"
    peers = "fake,refusing,dying,not installed,wide"
    words = ["--only", "tiny", "--threads", "1,4096", "--quick", "--peers", peers, "--import", "extra_benchmarks"]
    code = run.main([*words, "--output", str(target), *argv])
    return code, json.loads(target.read_text())


@pytest.fixture
def importable(monkeypatch):
    """Processes that a run starts find ``extra_benchmarks``, too."""
    here = str(Path(__file__).parent)
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join(filter(None, [here, os.environ.get("PYTHONPATH")])))


@pytest.mark.slow
def test_a_run_names_what_is_absent_and_what_is_wrong(tmp_path, importable, capsys):
    code, record = start(tmp_path)
    assert code == 1
    assert record["wrong"] == {"tiny wrong": "the sum is off"}
    absent = record["absent"]
    assert absent["not installed"] == "no_such_module not installed (pip install .[bench])"
    assert absent["refusing, tiny 4, 1 threads"] == "Absent: takes no tensors of four"
    assert absent["dying, tiny 4, 1 threads"] == "exit status 7: out of everything"
    assert absent["4096 threads"].endswith("cores to run on")
    assert [(r["ours"], r["baseline"], r["case"]) for r in record["rows"]] == [
        ("ours", "base", "4"), ("ours", "fake", "4"), ("ours", "wide", "4")
    ]  # fmt: skip
    for row in record["rows"]:
        assert {"bench", "case", "threads", "ours_ms", "baseline", "baseline_ms", "ratio", "p20", "p80"} <= set(row)
    assert record["rows"][1]["baseline_sqnr_db"] == 12.5
    assert {"cpu", "cores", "cpu_isa", "torch", "commit", "date"} <= set(record["environment"])
    said = capsys.readouterr().out
    assert "absent: not installed" in said
    assert "WRONG: tiny wrong" in said


@pytest.mark.slow
def test_an_interrupted_run_goes_on(tmp_path, importable, monkeypatch, capsys):
    job = run.Run.job

    def interrupted(self, bench, cases, threads, peer=None):
        if peer == "refusing":
            raise KeyboardInterrupt
        job(self, bench, cases, threads, peer)

    with monkeypatch.context() as patch:
        patch.setattr(run.Run, "job", interrupted)
        with pytest.raises(KeyboardInterrupt):
            start(tmp_path)
    unfinished = json.loads((tmp_path / "out.json").read_text())
    peers = ["refusing", "dying", "not installed", "wide"]
    assert unfinished["missing"] == [["tiny", 1, peer] for peer in peers]
    assert [row["baseline"] for row in unfinished["rows"]] == ["base", "fake"]
    with pytest.raises(SystemExit):
        run.main(["--resume", "--quick", "--only", "attention", "--output", str(tmp_path / "out.json")])
    assert "--resume finds tiny missing" in capsys.readouterr().err
    _, record = start(tmp_path, "--resume")
    assert record["rows"][:2] == unfinished["rows"]
    assert [row["baseline"] for row in record["rows"]] == ["base", "fake", "wide"]
    assert set(peers[:3]) <= {name.partition(",")[0] for name in record["absent"]}
    assert "missing" not in record
    with pytest.raises(SystemExit):
        start(tmp_path, "--resume")
    assert "--resume finds nothing unfinished" in capsys.readouterr().err


@pytest.mark.slow
@pytest.mark.skipif(len(isas()) < 2, reason="no x86 kernels here")
def test_held_to_avx2_whoever_cannot_be_is_absent(tmp_path, importable):
    _, record = start(tmp_path, "--isa", "avx2")
    assert record["absent"]["wide"] == "nothing holds it to avx2"
    assert record["environment"]["cpu_isa"] == "avx2"


def test_a_part_does_not_replace_the_results_of_all(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(run, "RESULTS", tmp_path / "all")
    monkeypatch.setattr(run, "PARTS", tmp_path / "parts")
    monkeypatch.setattr(run, "environment", lambda: {"cpu": "c", "cores": 2, "cpu_isa": "avx2", "threads": 1})
    monkeypatch.setattr(run.Run, "process", lambda self, job: {"rows": [], "wrong": {}, "absent": {}})

    def written() -> list[str]:
        return sorted(str(path.relative_to(tmp_path)) for path in tmp_path.rglob("*.json"))

    for words in (["--quick"], ["--only", "norm:197x384"]):
        assert run.main([*words, "--peers", "none"]) == 0
        assert written() == ["parts/c-2-cores-avx2.json"]
    assert run.main([]) == 0
    assert written() == ["all/c-2-cores-avx2.json", "parts/c-2-cores-avx2.json"]
    # Everything is held to AVX2 already: the same file would lose its peers.
    (tmp_path / "all" / "c-2-cores-avx2.json").write_text("kept")
    assert run.main(["--isa", "avx2", "--peers", "none"]) == 0
    assert "a run without --isa is one held to it" in capsys.readouterr().out
    assert (tmp_path / "all" / "c-2-cores-avx2.json").read_text() == "kept"


def test_peers_that_were_not_asked_for_are_named(tmp_path, monkeypatch):
    monkeypatch.setattr(run.Run, "process", lambda self, job: {"rows": [], "wrong": {}, "absent": {}})
    target = tmp_path / "out.json"
    run.main(["--only", "tiny", "--peers", "none", "--threads", "1", "--output", str(target)])
    assert json.loads(target.read_text())["absent"]["fake"] == "not asked for (--peers)"


@pytest.mark.parametrize("words", [["--only", "nothing"], ["--peers", "nobody"]])
def test_what_there_is_not_is_refused(words, capsys):
    with pytest.raises(SystemExit):
        run.main(words)
    assert "expected" in capsys.readouterr().err


def test_names_are_taken_once():
    with pytest.raises(ValueError, match="'tiny' is registered already"):
        registry.benchmark("tiny", [], [])(lambda case: None)
    with pytest.raises(ValueError, match="'fake' is registered already"):
        registry.peer("fake")(lambda *_: None)


def test_a_machine_has_a_file_name():
    about = {"cpu": "Intel(R) Core(TM) i7-8550U CPU @ 1.80GHz", "cores": 4, "cpu_isa": "avx2"}
    assert run.machine(about) == "intel-core-i7-8550u-1.80ghz-4-cores-avx2"


def test_a_16_bit_peer_leaves_the_model_as_it_was(monkeypatch):
    monkeypatch.setattr(torch, "compile", lambda model: model)
    model, x = torch.nn.Linear(8, 4), torch.randn(2, 8)
    run = peers.compiled_bf16(model, x, x, 1)
    with torch.no_grad():
        assert run(x).dtype == model(x).dtype == torch.float32
        assert torch.equal(run(x), model(x).bfloat16().float()) or (run(x) - model(x)).abs().max() < 0.05
    assert not torch.equal(run(x), model(x))


# Comparison


def row(ratio: float, low: float | None, high: float | None, **more) -> dict:
    key = {"bench": "b", "case": "c", "threads": 1, "ours": "o", "baseline": "x"}
    return {**key, "ratio": ratio, "ratio_p20": low, "ratio_p80": high, **more}


@pytest.mark.parametrize(
    ("old", "new", "found"),
    [
        ((2.0, 1.9, 2.1), (2.5, 2.4, 2.6), "faster"),
        ((2.0, 1.9, 2.1), (1.5, 1.4, 1.6), "slower"),
        ((2.0, 1.5, 2.5), (1.7, 1.2, 2.0), "same"),  # within the noise of the day
        ((2.0, 1.999, 2.001), (1.95, 1.949, 1.951), "same"),  # no noise, but nothing to speak of
        ((2.0, None, None), (1.0, 0.9, 1.1), "unclear"),
    ],
)
def test_verdicts_are_aware_of_noise(old, new, found):
    assert verdict(row(*old), row(*new)) == found


def test_two_files_are_compared(tmp_path, capsys):
    old = {"rows": [row(2.0, 1.9, 2.1), row(3.0, 2.9, 3.1, case="gone")], "environment": {"cpu": "a", "commit": "1"}}
    new = {"rows": [row(1.0, 0.9, 1.1), row(1.0, 1.0, 1.0, case="new")], "environment": {"cpu": "b", "commit": "2"}}
    old["instructions"], new["instructions"] = {"k": 1000, "l": 1000, "m": 1000}, {"k": 1011, "l": 1009, "m": 900}
    new["wrong"] = {"b d": "off"}
    assert [r["verdict"] for r in compare(old, new)] == ["slower", "gone", "new", "more", "same", "fewer", "wrong"]
    assert differences(old, new) == ["cpu: a → b"]
    for name, record in (("old", old), ("new", new)):
        (tmp_path / name).write_text(json.dumps(record))
    assert main([str(tmp_path / "old"), str(tmp_path / "new")]) == 1
    said = capsys.readouterr().out
    assert "-50.0%" in said
    assert "1 slower, 1 gone, 1 new, 1 more, 1 same, 1 fewer, 1 wrong" in said
    assert main([str(tmp_path / "old"), str(tmp_path / "old")]) == 0


# Pages


def test_a_page_holds_every_contender():
    def of(ours, baseline, ratio, **more):
        return row(ratio, ratio, ratio, bench="model", ours=ours, baseline=baseline, **more)

    common = {"ours_ms": 2.0, "ours_sqnr_db": 40.0, "ours_agreement": 1.0, "p20": 1.9, "p80": 2.1}
    rows = [
        of("W4A8 static", whole.EAGER, 3.0, case="M b1", baseline_ms=6.0, **common),
        of(
            "W4A8 static",
            "peer",
            2.0,
            case="M b1",
            baseline_ms=4.0,
            baseline_speedup=1.5,
            baseline_sqnr_db=9.0,
            **common,
        ),
    ]
    record = {"rows": rows, "absent": {"nobody": "not there"}, "environment": {"cpu": "x"}}
    text = pages.models_table(record)
    assert "| M b1 | 1 | torch eager fp32 | 6.00 | 1.00 |" in text
    assert "| M b1 | 1 | W4A8 static | 2.00 | 3.00 | 40.00 |" in text
    assert "| M b1 | 1 | peer | 4.00 | 1.50 | 9.00 |" in text
    assert "nobody: not there" in pages.absent_list(record)


def test_goals_are_held_against_what_was_measured():
    def linear(ours, ms, threads=1):
        return row(6.0 / ms, 1.0, 1.0, bench="linear", case="197x8x8", ours=ours, ours_ms=ms, baseline="F.linear",
                   baseline_ms=6.0) | {"threads": threads}  # fmt: skip

    def model(who, ratio, baseline=whole.EAGER, **more):
        return row(ratio, 1.0, 1.0, bench="model", case="ViT-S/16 b1", ours=who, ours_ms=1.0, baseline=baseline,
                   baseline_ms=2.0) | more  # fmt: skip

    held = {
        "environment": {"cpu_isa": "avx2"},
        "rows": [
            *(linear("w4a8", ms, t) for ms, t in ((2.0, 1), (3.0, 2))),
            *(linear("w4a8, rank 32", ms, t) for ms, t in ((2.1, 1), (3.6, 2))),
            model("W4A8 static", 2.5),
        ],
    }
    attention = row(2.0, 1.0, 1.0, bench="attention", case="1x6x197", ours="8 bits, row anchor")
    slow = {**attention, "case": "1x6x65", "ratio": 0.5}
    # Eager is slower in the process without peers: by speed-ups over it ours would be ahead of "quick".
    peers = [
        model("W4A8 static", 1.0, "slow", baseline_speedup=1.5),
        model("W4A8 static", 0.5, "quick", baseline_speedup=2.0),
    ]
    full = {
        "environment": {"cpu_isa": "avx512_vnni"},
        "rows": [linear("w4a8", 1.0), linear("w8a8", 1.5), attention, slow, model("W4A8 static", 3.0), *peers],
    }
    assert list(pages.nearest_peers(full)) == [(0.5, 2.0, "quick")]
    text = pages.goals_table(full, held | {"rows": [*held["rows"], linear("w8a8", 4.0)]})
    assert "| AVX2, linear, w4a8 | ≥ 3 × | 2.00 / 2.50 / 3.00 | 1 of 2 |" in text
    assert "| AVX2, ViT-S/16, W4A8 static | ≥ 2 × | 2.50 / 2.50 / 2.50 | 1 of 1 |" in text
    assert "| AVX2, w4a8, a branch of rank 32 more | ≤ 10 % | 5.00 / 12.50 / 20.00 | 1 of 2 |" in text
    assert "| AVX2, ours beside the fastest peer | ≥ 1 × | – | not timed |" in text
    assert "| avx512_vnni, ours beside the fastest peer, in its process | ≥ 1 × | 0.50 / 0.50 / 0.50 | 0 of 1 |" in text
    assert "the same by times of two processes, AOTInductor too | ≥ 1 × | 2.00 / 2.00 / 2.00 | 1 of 1 |" in text
    packaged = model("W8A8 static, AOTInductor", 1.1, "quick", baseline_speedup=2.0)
    text = pages.goals_table(full | {"rows": [*full["rows"], packaged]}, held)
    assert "in its process | ≥ 1 × | 1.00 / 1.00 / 1.00 | 1 of 1 |" in text  # now "slow" is the hardest to beat
    assert "two processes" not in text
    said = pages.ranges(full, held | {"rows": [*held["rows"], linear("w8a8", 4.0)]})
    assert (
        "batch 1 and 8, 1 threads, W4A8 runs at 6.0 to 6.0 times float32 and W8A8 at 4.0 to 4.0 times (AVX512-VNNI)"
        in said
    )
    assert "attention at 2.0 to 2.0 times" in said
    assert "W4A8 runs at 2.0 to 3.0 times" in said


def test_pages_are_of_the_newest_run_that_is_complete(tmp_path, monkeypatch):
    monkeypatch.setattr(pages, "RESULTS", tmp_path)
    common = {"rows": [], "absent": {}, "quick": False}
    for name, date, isa, more in (
        ("a", "2026-01-01", "avx512_amx", {}),
        ("b", "2026-01-02", "avx512_amx", {"missing": [["model", 1, None]]}),
        ("c", "2026-01-03", "avx512_amx", {"quick": True}),
        ("d", "2026-01-04", "avx2", {}),
    ):
        record = {**common, "environment": {"date": date, "cpu_isa": isa}, **more}
        (tmp_path / f"{name}.json").write_text(json.dumps(record))
    (tmp_path / "rows.json").write_text("[]")
    assert pages.newest()["environment"]["date"] == "2026-01-01"
    assert pages.newest("avx2")["environment"]["date"] == "2026-01-04"


def test_the_order_of_methods_is_counted():
    def of(recipe, split, metric, simulated, integer, sqnr):
        return {"task": "t", "recipe": recipe, "split": split, "metric": metric, "simulated": simulated,
                "integer": integer, "sqnr_db": sqnr}  # fmt: skip

    rows = [
        *(of("aiqvit-coco-w4a4", split, "AP", 40.0, 41.0, 20.0) for split in ("test", "hard")),
        of("minmax-w4a4", "test", "AP", 40.5, 40.5, 21.0),
        of("minmax-w4a4", "hard", "AP", 42.0, 42.0, 10.0),
        of("repq-vit-w4a4", "test", "AP", 41.0, None, 19.0),
        of("minmax-w8a8", "test", "AP", 50.0, 50.0, 30.0),
    ]
    assert "| W4A4 | 1 of 2 | 1 of 2 | 1 of 1 | 1 of 1 |" in update_docs.ordering_table(rows)


# Instruction counts


@pytest.mark.slow
def test_instruction_counts_are_repeatable():
    case = "quantize 197x384"
    try:
        first = instructions.count([case])
    except instructions.Unavailable as error:
        pytest.skip(f"nothing can be counted: {error}")
    assert first == instructions.count([case])
    # 197·384 floats in vectors of eight, a handful of instructions each.
    assert 197 * 384 / 8 < first[case] < 20 * 197 * 384 / 8


def test_without_valgrind_the_reason_is_named(monkeypatch):
    monkeypatch.setattr(instructions.shutil, "which", lambda name, path=None: None)
    with pytest.raises(instructions.Unavailable, match="no valgrind and no a C\\+\\+ compiler"):
        instructions.build()


def test_children_see_what_the_parent_sees():
    assert all(path in sys.path for path in PATHS)
