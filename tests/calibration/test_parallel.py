"""Two processes of torchrun calibrate one model: the same result on both, and that of one process but for rounding."""

import os
import subprocess
import sys
from pathlib import Path

import parallel_case
import pytest
import torch
from vitq import parallel
from vitq.evaluate import sqnr_db


def launch(folder: Path) -> list[dict]:
    case = Path(parallel_case.__file__)
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", case, folder]
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr[-3000:]
    return [torch.load(folder / f"{rank}.pt") for rank in (0, 1)]


def test_two_processes_share_the_work_and_agree(tmp_path):
    (tmp_path / "one").mkdir()
    alone = parallel_case.run(tmp_path / "one")
    first, second = launch(tmp_path)
    assert first["tensors"].keys() == second["tensors"].keys() == alone["tensors"].keys()
    assert all(torch.equal(first["tensors"][name], second["tensors"][name]) for name in first["tensors"])
    # Steps of five images are three and two.
    assert first["seen"] + second["seen"] == alone["seen"]
    assert 0.35 * alone["seen"] < second["seen"] < first["seen"]
    assert sqnr_db(alone["logits"], first["logits"]) > 30
    assert torch.equal(first["logits"], second["logits"])
    # Finished units are the first process's; both go on from there to the same end.
    again = launch(tmp_path)
    assert again[0]["seen"] == again[1]["seen"] == 0
    assert all(torch.equal(again[1]["tensors"][name], t) for name, t in first["tensors"].items())


def test_one_process_is_not_a_group():
    assert (parallel.size(), parallel.rank()) == (1, 0)
    chosen = torch.arange(3)
    assert torch.equal(parallel.share(chosen), chosen)
    assert torch.equal(parallel.spread(2.0 * chosen, chosen), 2.0 * chosen)
    assert parallel.same(chosen) is chosen


def test_a_step_with_fewer_images_than_processes_is_refused(monkeypatch):
    monkeypatch.setattr(parallel, "size", lambda: 4)
    with pytest.raises(ValueError, match="batch is 3, expected at least one image for each of 4 processes"):
        parallel.share(torch.arange(3))
