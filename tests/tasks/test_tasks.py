"""Tasks end to end on a handful of samples, and the rows that the table is made of."""

import json
from dataclasses import replace

import pytest
from vitq.cli import main
from vitq.recipes import names
from vitq.tasks import TASKS, DetectionTask, run

from bench.tasks.__main__ import merged

METRICS = {
    "image-classification": {"top-1"},
    "cloud-classification": {"OA", "mAcc"},
    "part-segmentation": {"class mIoU", "instance mIoU"},
}
METRICS |= {"detection": {"box AP"}, "instance-segmentation": {"box AP", "mask AP"}}


def unlearned(name: str):
    task = TASKS[name]
    return replace(task, source=replace(task.source, pretrained=False))


@pytest.mark.parametrize("name", METRICS)
def test_rows(name, tmp_path):
    task = unlearned(name)
    recipe = task.recipe("minmax-w8a8")
    few = recipe.calibration.model_copy(update={"images": 8})
    recipe = recipe.model_copy(update={"name": "minmax-w8a8", "calibration": few})
    # Unlearned detectors find a hundred things in every image.
    n = 1 if isinstance(task, DetectionTask) else 6
    rows = run(task, recipe, tmp_path / "c", task.evaluate(task.load(), n), limit=n)
    assert {(row["split"], row["metric"]) for row in rows} == {(s, m) for s in ("test", "hard") for m in METRICS[name]}
    for row in rows:
        assert row["identical"] is True
        assert row["simulated"] == row["integer"]
        assert row["sqnr_db"] > 15
        assert (row["recipe"], row["weight_bits"], row["samples"]) == ("minmax-w8a8", 8, n)
    assert (tmp_path / "c" / "config.json").exists()


def test_a_recipe_without_an_integer_form(tmp_path):
    task = unlearned("cloud-classification")
    rows = run(task, task.recipe("repq-vit-w8a8"), tmp_path / "c", task.evaluate(task.load(), 4), limit=4)
    assert all(row["integer"] is None and row["identical"] is None for row in rows)
    assert not (tmp_path / "c").exists()


def test_every_recipe_of_every_task_loads():
    for task in TASKS.values():
        assert len(set(task.recipes)) == 4 * len(task.methods)
        for name in task.recipes:
            recipe = task.recipe(name)
            assert recipe.name == name
            assert recipe.calibration.augment == 0.0
            assert f"w{recipe.bits.weights}a{recipe.bits.activations}" == name.rpartition("-")[2]
    aiqvit = task.recipe("aiqvit-points-w4a4")
    assert (aiqvit.calibration.images, aiqvit.calibration.batch) == (512, 32)
    assert "aiqvit-points" in names()
    assert task.recipe("aiqvit-points-w4a4", effort=1.0).effort == 1.0


def test_merged_rows():
    a, b = ({"task": "cloud-classification", "recipe": f"minmax-{bits}", "integer": 1} for bits in ("w8a8", "w6a6"))
    newer = a | {"integer": 2}
    assert merged([b, a], [newer]) == [newer, b]
    assert merged([a | {"recipe": "gone"}], [b]) == [b]


def test_demo_of_a_task(tmp_path, capsys):
    arguments = ["demo", "--task", "cloud-classification", "--output", str(tmp_path / "d"), "--limit", "4"]
    assert main([*arguments, "--recipes", "minmax-w4a4", "--json"]) == 0
    written = json.loads((tmp_path / "d" / "summary.json").read_text())
    assert json.loads(capsys.readouterr().out)["rows"] == written["rows"]
    assert {row["recipe"] for row in written["rows"]} == {"minmax-w4a4"}
    assert main(["demo", "--task", "nothing"]) == 2
    assert "--task is 'nothing', expected" in capsys.readouterr().err


@pytest.mark.parametrize("model", ["point_mae_primitives", "point_mae_parts"])
def test_command_line_on_clouds(model, tmp_path, capsys):
    out = str(tmp_path / "c")
    quantize = ["quantize", model, out, "--recipe", "minmax-w8a8"]
    assert main([*quantize, "--images", "4", "--eval-images", "4", "--json"]) == 0
    runs = json.loads(capsys.readouterr().out)["runs"]
    assert [run["split"] for run in runs] == ["test", "hard"]
    assert all(run["logit_difference_simulated_integer"] == 0 for run in runs)
    assert main(["eval", out, "--split", "hard", "--limit", "4", "--json"]) == 0
    rows = json.loads(capsys.readouterr().out)["rows"]
    assert rows[2]["agreement_simulated"] == 1.0
    assert rows[0]["top1"] > 50
    assert main(["quantize", model, out, "--force", "--recipe", "minmax-w8a8", "--no-eval", "--data", "digits"]) == 2
    assert "data is 'digits', expected primitives" in capsys.readouterr().err


def test_command_line_on_shapes(tmp_path, capsys):
    out = str(tmp_path / "c")
    quantize = ["quantize", "faster_rcnn_shapes", out, "--recipe", "minmax-w8a8", "--data", "shapes"]
    assert main([*quantize, "--images", "4", "--eval-images", "6", "--json"]) == 0
    runs = json.loads(capsys.readouterr().out)["runs"]
    assert [run["split"] for run in runs] == ["test", "hard"]
    for row in runs:
        assert row["identical"] is True
        assert row["box AP simulated"] == row["box AP integer"]
        assert row["mask AP float"] is None
    assert runs[0]["box AP float"] > 30
    assert abs(runs[0]["box AP float"] - runs[0]["box AP integer"]) < 10
    evaluate = ["eval", out, "--data", "shapes", "--modes", "simulated,integer", "--limit", "3"]
    assert main([*evaluate, "--json"]) == 0
    rows = json.loads(capsys.readouterr().out)["rows"]
    assert [row["agreement_simulated"] for row in rows] == [True, True]
    assert rows[0]["box AP"] == rows[1]["box AP"]
    assert main(["report", out, "--output", str(tmp_path / "page.html")]) == 0
    assert "box AP integer" in (tmp_path / "page.html").read_text()
    capsys.readouterr()
    assert main(["export", out, "--output", str(tmp_path / "m.pt2")]) == 2
    assert "regions and boxes depend on the image" in capsys.readouterr().err
    assert main([*quantize[:3], "--force", "--recipe", "minmax-w8a8", "--no-eval", "--data", "digits"]) == 2
    assert "data is 'digits', expected shapes or coco:<folder>" in capsys.readouterr().err
