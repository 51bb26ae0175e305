"""What the estimate of calibration's cost counts, on operators of known cost and on a tiny model."""

import json
import sys

import pytest
import torch
from vitq.bench.latency import threads
from vitq.recipes import load_recipe

from bench import calibration_cost
from bench.calibration_cost import BYTES_PER_SECOND, FLOPS_PER_SECOND, HOST_SECONDS, counted, with_iterations


def test_a_product_counts_once():
    a, b = torch.randn(6, 5), torch.randn(5, 7)
    with counted() as work:
        assert (a @ b).T.shape == (7, 6)
    assert (work.operators, work.flops, work.bytes) == (1, 2 * 6 * 5 * 7, 4 * (30 + 35 + 42)), "a view costs nothing"
    assert work.device_float32 == max(work.bytes / BYTES_PER_SECOND, work.flops / FLOPS_PER_SECOND["float32"])
    assert work.h200("float32") == HOST_SECONDS, "so small a product waits for the host"


def test_a_large_product_waits_for_its_arithmetic():
    meta = torch.empty(4096, 4096, device="meta")
    with counted() as work:
        meta @ meta
    assert work.h200("float32") == pytest.approx(2 * 4096**3 / FLOPS_PER_SECOND["float32"])
    assert work.h200("bfloat16") < work.h200("float32")


def test_one_method_is_left_to_learn():
    recipe = with_iterations(load_recipe("aiqvit-w4a4"), "blocks", 3)
    learning = [(m.name, o.iterations) for _, m, o in recipe.steps() if getattr(o, "iterations", 0)]
    assert learning == [("blocks", 3)]


def test_the_command(tmp_path, monkeypatch, capsys):
    """On a model so small that it takes seconds: the minutes are the rows' steps times their estimates."""
    path = tmp_path / "cost.json"
    small = {"img_size": 32, "patch_size": 8, "embed_dim": 32, "num_heads": 2}
    measure = calibration_cost.measure
    monkeypatch.setattr(calibration_cost, "measure", lambda *args: measure(*args, **small))
    monkeypatch.setattr(sys, "argv", ["calibration_cost", "--steps", "2", "--output", str(path)])
    with threads(2):
        calibration_cost.main()
    record = json.loads(path.read_text())
    assert record["environment"]["threads"] == 1  # as the table's heading says
    assert {row["method"] for row in record["rows"]} == {"allocate.rank_search", "reconstruct.blocks"}
    for row in record["rows"]:
        assert row["operators"] > 100
        assert row["h200_ms_float32"] >= 1e3 * HOST_SECONDS * row["operators"] * (1 - 1e-12)
    total = sum(row["steps"] * row["h200_ms_float32"] for row in record["rows"]) / 60e3
    assert record["h200_minutes"]["float32"] == pytest.approx(total)
    assert "reconstruct.blocks" in capsys.readouterr().out
