"""The accuracy harness: what a case measures, that finished ones stay, and how rows become tables."""

import json
import statistics
from dataclasses import replace

import pytest
import torch
from torchvision.transforms import functional as TF
from vitq import jobs
from vitq.data import load_data, load_digits
from vitq.evaluate import agreement, predict, sqnr_db, top1
from vitq.models.digits_vit import NAME, WEIGHTS
from vitq.recipes import load_recipe
from vitq.sources import ModelSource, load_float

from bench.accuracy import __main__ as command
from bench.accuracy import case as cases
from bench.accuracy import code, report
from bench.accuracy.case import Case
from bench.models import MODELS

#: Asked for in the documentation of the table.
FIELDS = {
    "model", "variant", "split", "recipe", "seed", "weight_bits", "act_bits", "average_weight_bits", "average_act_bits",
    "average_weight_bits_with_branch", "top1_float", "top1_simulated", "top1_integer", "agreement", "logit_sqnr_db",
    "deployable", "calibration_s", "peak_mb", "size_bytes",
}  # fmt: skip
ARGUMENTS = ["--models", "digits", "--variants", "plain", "--seeds", "1", "--limit", "32"]


def case(recipe="minmax-w4a4", seed=0, **source):
    return Case.of("digits", replace(MODELS["digits"].source, **source), "digits", load_recipe(recipe), seed, 32)


@pytest.fixture
def here(monkeypatch):
    """Cases run in this process; returns the list of those that did."""
    done = []

    def perform(case):
        done.append(case)
        return cases.run(case)

    monkeypatch.setattr(command, "perform", perform)
    return done


@pytest.fixture(scope="module")
def rows(tmp_path_factory):
    """What the command writes for a deployable recipe, in a process of its own, and rows of a simulated-only one."""
    path = tmp_path_factory.mktemp("accuracy") / "accuracy.json"
    recipes = ["--recipes", "minmax", "--bits", "w4a4", "--output", str(path), "--cache", str(path.parent)]
    assert command.main([*ARGUMENTS, *recipes]) == 0
    return json.loads(path.read_text())["rows"] + cases.run(case("repq-vit-w4a4"))


def test_rows_hold_what_an_evaluation_by_hand_gives(rows):
    assert [(row["recipe"], row["split"]) for row in rows[:2]] == [("minmax-w4a4", "hard"), ("minmax-w4a4", "test")]
    source, recipe = MODELS["digits"].source, load_recipe("minmax-w4a4")
    model = load_float(source)
    done = jobs.quantize(model, source, recipe, "digits", seed=0)
    for row in rows[:2]:
        assert row.keys() >= FIELDS
        data = load_data("digits", row["split"], model, 32)
        floats, labels = predict(model, data)
        logits, _ = predict(done.integer, data)
        assert row["top1_float"] == top1(floats, labels)
        assert row["top1_integer"] == row["top1_simulated"] == top1(logits, labels)
        assert row["agreement"] == agreement(floats, logits)
        assert row["logit_sqnr_db"] == pytest.approx(sqnr_db(floats, logits), abs=1e-3)
        assert (row["weight_bits"], row["act_bits"]) == (4, 4)
        # First and last layer have 8: 192·48 and 10·192 of all weights.
        interior = 6 * (192 * 576 + 192 * 192 + 2 * 192 * 384)
        edge = 192 * 48 + 10 * 192
        assert row["average_weight_bits"] == pytest.approx((4 * interior + 8 * edge) / (interior + edge))
        assert row["average_weight_bits_with_branch"] == row["average_weight_bits"]
        assert row["deployable"] is True
        assert row["reason"] is None
        assert 200 < row["peak_mb"] < 20_000
        assert 0.9e6 < row["size_bytes"] < 1.3e6


def test_what_has_no_integer_model_says_why(rows):
    for row in rows[2:]:
        assert row["deployable"] is False
        assert row["reason"]
        assert row["top1_integer"] is None
        assert row["size_bytes"] is None
        assert 0 <= row["top1_simulated"] <= 100
        assert 0 < row["agreement"] <= 1


def test_branch_bits_are_sixteen_a_number():
    model = load_float(MODELS["digits"].source)
    recipe = load_recipe("vitq-w4a4", fast=True, calibration={"images": 8})
    sim = jobs.quantize(model, MODELS["digits"].source, recipe, "digits").calibrated.sim
    interior = [(576, 192), (192, 192), (384, 192), (192, 384)] * 6
    weights = sum(n * k for n, k in [*interior, (192, 48), (10, 192)])
    expected = sum(16 * 32 * (n + k) for n, k in interior) / weights
    assert cases.branch_bits(sim) == pytest.approx(expected)


def test_finished_cases_stay_until_something_changes(here, tmp_path, monkeypatch, capsys):
    output = ["--output", str(tmp_path / "rows.json"), "--cache", str(tmp_path), "--recipes", "minmax-w8a8"]
    assert command.main([*ARGUMENTS, *output]) == 0
    assert len(here) == 1
    first = (tmp_path / "rows.json").read_text()
    assert command.main([*ARGUMENTS, *output]) == 0
    assert len(here) == 1
    assert (tmp_path / "rows.json").read_text() == first
    assert "1 cases, 1 of them finished" in capsys.readouterr().out
    monkeypatch.setattr(command.code, "digest", lambda: "another")
    assert command.main([*ARGUMENTS, *output, "--keep"]) == 0
    assert len(here) == 1
    assert command.main([*ARGUMENTS, *output]) == 0
    assert len(here) == 2
    # Instead of the old rows, not beside them.
    assert len(json.loads((tmp_path / "rows.json").read_text())["rows"]) == 2


def test_digest_is_of_all_that_decides_the_figures(tmp_path):
    base = case()
    assert base.digest() == case().digest()
    other = tmp_path / "other.safetensors"
    other.write_bytes(WEIGHTS.read_bytes()[:-4] + b"\0\0\0\0")
    variants = [
        case("minmax-w3a3"),
        case(seed=1),
        case(outlier=True),
        case(weights=str(other)),
        replace(base, limit=31),
        replace(base, data="contours"),
        replace(base, recipe=load_recipe("minmax-w4a4", calibration={"images": 3}).plain()),
    ]
    assert len({c.digest() for c in [base, *variants]}) == len(variants) + 1
    # Where the same weights lie, and how many threads there are, does not matter.
    copy = tmp_path / "copy.safetensors"
    copy.write_bytes(WEIGHTS.read_bytes())
    assert case(weights=str(copy)).digest() == case(weights=str(WEIGHTS)).digest()
    assert replace(base, threads=2).digest() == base.digest()


def test_code_is_what_runs_and_not_how_it_is_described():
    source = '"""Doc."""\ndef f(x):\n    """What."""\n    return x + 1  # why\n'
    assert code.tree(source) == code.tree("def f(x):\n    return (x\n            + 1)\n")
    assert code.tree(source) != code.tree(source.replace("+ 1", "+ 2"))
    assert code.digest() == code.digest.__wrapped__()


def test_float_logits_are_computed_once_for_all_recipes(tmp_path, monkeypatch):
    model = load_float(MODELS["digits"].source)
    data = {"test": load_data("digits", "test", model, 32)}
    first = replace(case(), cache=str(tmp_path)).floats(model, data)
    assert torch.equal(first["test"][0], predict(model, data["test"])[0])
    monkeypatch.setattr(jobs, "predict_splits", lambda model, data: "computed")
    again = replace(case("minmax-w3a3", seed=1), cache=str(tmp_path)).floats(model, data)
    assert all(torch.equal(a, b) for a, b in zip(first["test"], again["test"]))
    for other in (replace(case(), limit=31), case(outlier=True)):
        assert replace(other, cache=str(tmp_path)).floats(model, data) == "computed"


def test_a_failing_case_is_reported_and_the_others_are_kept(tmp_path, monkeypatch, capsys):
    def perform(case):
        if case.recipe["name"] == "mse-w4a4":
            raise RuntimeError("out of luck")
        return [
            {
                **case.key,
                "digest": case.digest(),
                "code": "",
                "split": "test",
                "top1_simulated": 1.0,
                "top1_float": 2.0,
                "calibration_s": 3.0,
            }
        ]

    monkeypatch.setattr(command, "perform", perform)
    monkeypatch.setattr(report, "tables", lambda rows: f"{len(rows)} rows")
    output = tmp_path / "rows.json"
    recipes = ["--recipes", "mse-w4a4", "minmax-w4a4", "--output", str(output)]
    assert command.main([*ARGUMENTS, *recipes]) == 1
    assert [row["recipe"] for row in json.loads(output.read_text())["rows"]] == ["minmax-w4a4"]
    printed = capsys.readouterr()
    assert "mse-w4a4 0 FAILED\nout of luck" in printed.out
    assert "1 cases failed" in printed.err


def test_a_process_that_fails_says_why():
    with pytest.raises(RuntimeError, match="limit must be between 1 and 700"):
        command.perform(replace(case(), limit=701))


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--models", "digts"], "--models has 'digts', expected some of digits, vit, deit, swin"),
        (["--models", "digits", "--recipes", "minmx"], "recipe is 'minmx', expected a YAML file or one of"),
        (["--models", "digits", "--data", "x", "--weights", "."], r"--weights is '\.', expected a folder with digits"),
    ],
)
def test_refusals_come_before_anything_runs(here, arguments, message, capsys):
    with pytest.raises(SystemExit):
        command.main(arguments)
    assert message.replace("\\", "") in capsys.readouterr().err
    assert not here


def test_image_folder_with_weights_of_ones_own(here, tmp_path, monkeypatch, capsys):
    """The ImageNet command, on a folder of digits: published figures stand beside ours."""
    images, labels = load_digits("test", limit=40).tensors
    for i, (image, label) in enumerate(zip(images, labels)):
        for split in ("train", "val"):
            folder = tmp_path / "data" / split / str(int(label))
            folder.mkdir(parents=True, exist_ok=True)
            TF.to_pil_image(((image * 0.5 + 0.5) * 255).round().to(torch.uint8)).save(folder / f"{i:02}.png")
    (tmp_path / f"{NAME}.safetensors").write_bytes(WEIGHTS.read_bytes())
    monkeypatch.setattr(
        report, "papers", lambda: {"float": {NAME: 72.2}, "methods": {"minmax": {"w8a8": {NAME: 61.5}}}}
    )
    monkeypatch.setattr(
        command, "load_recipe", lambda name, fast: load_recipe(name, fast=fast, calibration={"images": 16})
    )
    arguments = ["--data", str(tmp_path / "data"), "--models", NAME, "--weights", str(tmp_path), "--recipes", "minmax"]
    output = tmp_path / "rows.json"
    rest = ["--bits", "w8a8", "--variants", "plain", "--seeds", "1", "--output", str(output), "--cache", str(tmp_path)]
    assert command.main([*arguments, *rest]) == 0
    (row,) = json.loads(output.read_text())["rows"]
    model = load_float(ModelSource(NAME))
    expected = top1(model(images), labels)
    assert row["split"] == "test"
    assert row["top1_float"] == pytest.approx(expected)
    printed = capsys.readouterr().out
    assert f"(float: clean {expected:.2f}; as published 72.20)" in printed
    assert "| as published |" in printed
    assert "| 61.50 |" in printed


# --- tables ----------------------------------------------------------------------------------------------------------


def row(recipe, seed, clean, sqnr, weight_bits=4, **more):
    return {
        "data": "digits", "model": "vit", "variant": "plain", "split": "test", "recipe": recipe, "seed": seed,
        "weight_bits": weight_bits, "act_bits": 4, "average_weight_bits": 4.1, "average_act_bits": 4.2,
        "average_weight_bits_with_branch": 5.5, "top1_float": 90.0, "top1_simulated": clean, "top1_integer": clean,
        "agreement": 0.5, "logit_sqnr_db": sqnr, "deployable": True, "reason": None, "calibration_s": 2.0 + seed,
        "peak_mb": 100.0 + seed, "size_bytes": 1_500_000, "digest": "", **more,
    }  # fmt: skip


def test_summary_sorts_by_bits_then_top1_then_sqnr_and_shows_the_spread():
    rows = [
        row("a", 0, 70.0, 9.0),
        row("a", 1, 74.0, 9.0),
        row("a", 2, 72.0, 9.0),
        row("b", 0, 72.0, 9.5),
        row("c", 0, 10.0, 1.0, weight_bits=8),
        row("d", 0, 73.0, 1.0, top1_integer=None, deployable=False, reason="a logarithm", size_bytes=None),
    ]
    lines = report.summary(rows)
    assert [line["recipe"] for line in lines] == ["c", "d", "b", "a"]
    a = lines[-1]
    assert a["test_top1"] == f"72.00 ± {statistics.stdev([70, 74, 72]):.2f}"
    assert a["calibration_s"] == "3.00 ± 1.00"
    assert a["peak_mb"] == "102"
    assert lines[2]["test_top1"] == "72.00"
    assert [line["integer"] for line in lines] == ["=", "no", "=", "="]
    assert lines[1]["mb"] is None
    rows[0]["top1_integer"] = 70.5
    assert report.summary(rows)[-1]["integer"] == "differs by 0.50"
    assert "- d: a logarithm" in report.tables(rows)


def test_tables_show_both_splits_of_every_model():
    rows = [row("a", 0, 70.0, 9.0), row("a", 0, 51.0, 4.0, split="hard", top1_float=60.0)]
    text = report.tables([*rows, *({**r, "variant": "outlier"} for r in rows)])
    assert text.count("### ") == 2
    assert "### vit, plain (float: clean 90.00, hard 60.00)" in text
    line = next(line for line in text.splitlines() if line.startswith("| a |"))
    assert line == "| a | 4.10 / 4.20 | 5.50 | 70.00 | 50.00 | 9.00 | 51.00 | 50.00 | 4.00 | = | 2.00 | 100 | 1.50 |"


def test_leaders_are_compared_at_equal_bits_by_means_over_seeds():
    rows = [
        row("vitq-w4a4", 0, 70.0, 20.0, agreement=0.9),
        row("vitq-w4a4", 1, 70.0, 10.0, agreement=0.7),  # mean 15 dB, 80 %
        row("vitq-strict-w4a4", 0, 70.0, 12.0, agreement=0.75),
        row("a-w4a4", 0, 70.0, 14.0, agreement=0.85),
        row("b-w4a4", 0, 70.0, 13.0, agreement=0.1),
        row("a-w8a8", 0, 70.0, 50.0, weight_bits=8, act_bits=8),  # nothing of ours beside it
    ]
    text = report.leaders(rows).splitlines()
    assert text[2] == "| vit, plain | clean | W4A4 | 15.00 | 12.00 | 14.00 (a-w4a4) | 80.00 | 75.00 | 85.00 (a-w4a4) |"
    assert text[3:] == ["", text[-1]]
    assert text[-1].startswith("Highest SQNR in 1 and most images of the float model's class in 0 of 1 cells")


def test_published_figures():
    assert report.published("deit_tiny_patch16_224", "aiqvit-w4a4") == 62.33
    assert report.published("vit_base_patch16_224", "repq-vit-w4a4-dynamic") == 68.48
    assert report.published("vit_base_patch16_224", "repq-vit-w3a3") is None
    assert report.published("vit", "aiqvit-w4a4") is None
    assert report.published("deit_tiny_patch16_224", "mine") is None
    for method in report.papers()["methods"].values():
        for bits in method.keys() - {"source"}:
            for model, figure in method[bits].items():
                assert 0 < figure < report.papers()["float"][model]
