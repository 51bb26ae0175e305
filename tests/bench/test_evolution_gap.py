"""The leak of CPT-V's published selection: arithmetic by hand, and passes that are those of one longer run."""

import json

import torch
from vitq.data import load_calibration
from vitq.models import adapter_for
from vitq.recipes import load_recipe
from vitq.simulate import SimModel
from vitq.sources import load_float
from vitq.stages import Calibration

from bench import evolution_gap
from bench.models import MODELS


def test_gap_by_hand():
    # Even images: 1, 2 and 1 of 2 right; odd ones: 0, 0 and 2 of 2. The halves pick passes 1 and 2.
    right = torch.tensor([[1, 0, 0, 0], [1, 0, 1, 0], [1, 1, 0, 1]]).bool()
    found = evolution_gap.gap(right)
    assert found == {"start": 25.0, "last": 75.0, "claimed": (100 + 100) / 2, "worth": (0 + 50) / 2}


def test_passes_never_raise_the_loss_and_move_only_scales():
    trained, recipe = MODELS["digits"], load_recipe("cptv-w4a8")
    model = load_float(trained.source)
    images = load_calibration(trained.data, model, 8)
    calibration = Calibration(SimModel(adapter_for(model)), images, recipe, 0)
    states = []
    with torch.no_grad():
        for sim in evolution_gap.passes_of(calibration, 2):
            states.append({k: v.clone() for k, v in sim.state_dict().items()})
    assert len(states) == 3
    moved = {k for k in states[0] if not torch.equal(states[0][k], states[2][k])}
    assert moved
    assert all(k.endswith(("qkv.quant.scale", "proj.quant.scale")) for k in moved)
    assert any(not torch.equal(states[1][k], states[2][k]) for k in moved), "the second pass draws anew"


def test_the_command(tmp_path):
    path = tmp_path / "gap.json"
    arguments = ["--models", "digits", "--recipes", "cptv-w4a8", "--seeds", "1", "--passes", "1"]
    evolution_gap.main([*arguments, "--images", "8", "--limit", "20", "--output", str(path)])
    (row,) = json.loads(path.read_text())["rows"]
    assert (row["evaluations"], row["images"], row["test_images"]) == (6 * 3, 8, 20)
    assert row["seconds"] > 0
    assert all(0 <= row[k] <= 100 for k in ("start", "last", "claimed", "worth"))
