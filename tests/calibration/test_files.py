"""Files on disk: the modes that the umask gives, and a full disk that leaves what was there and is named."""

import dataclasses
import json
import os
import resource
from contextlib import contextmanager

import minmax
import pytest
import timm
import torch
from vitq import checkpoint, export, files
from vitq.models import adapter_for, state_data
from vitq.simulate import SimModel
from vitq.workdir import WorkDir

VIT = {"img_size": 32, "patch_size": 8, "embed_dim": 32, "depth": 1, "num_heads": 2, "num_classes": 7}


@contextmanager
def full_disk(size: int = 1000):
    """No file grows beyond ``size`` bytes."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


@pytest.fixture(scope="module")
def model():
    torch.manual_seed(0)
    return minmax.spread(timm.create_model("vit_tiny_patch16_224", **VIT))


@pytest.fixture(scope="module")
def state(model):
    about = {"architecture": "vit_tiny_patch16_224", "kwargs": VIT, "data": state_data(model)}
    return dataclasses.replace(minmax.minmax_state(model, minmax.images(model)), **about)


@pytest.mark.parametrize(("mask", "mode"), [(0o022, 0o644), (0o077, 0o600), (0o002, 0o664)])
def test_the_umask_decides_the_mode(model, state, tmp_path, mask, mode):
    before = os.umask(mask)
    try:
        checkpoint.save(tmp_path / "c", state)
        sim = SimModel(adapter_for(model))
        WorkDir(tmp_path / "w", {}).keep("0.step", "blocks.0", sim, {})
        files.write_text(tmp_path / "page.html", "text")
    finally:
        os.umask(before)
    found = {path: path.stat().st_mode & 0o777 for path in tmp_path.rglob("*") if path.is_file()}
    assert len(found) == 5
    assert set(found.values()) == {mode}


def test_a_full_disk_is_named(model, state, tmp_path):
    folder, work = tmp_path / "c", WorkDir(tmp_path / "w", {})
    sim = SimModel(adapter_for(model))
    with full_disk(), pytest.raises(OSError, match=f"{tmp_path}/c/.*File too large"):
        checkpoint.save(folder, state)
    assert not folder.exists()
    with full_disk(), pytest.raises(OSError, match=f"{tmp_path}/w/.*File too large"):
        work.keep("0.step", "blocks.0", sim, {})
    with full_disk(), pytest.raises(OSError, match=r"File too large.*frontier\.json"):
        work.note("frontier", ["x" * 2000])
    (tmp_path / "page.html").write_text("the old page")
    with full_disk(), pytest.raises(OSError, match=r"File too large.*page\.html"):
        files.write_text(tmp_path / "page.html", "y" * 2000)
    assert (tmp_path / "page.html").read_text() == "the old page"
    assert not list(tmp_path.glob(".writing-*"))


def test_a_program_that_does_not_fit_the_disk(tmp_path):
    """torch's own writer would end the process."""
    target = tmp_path / "e.pt2"
    linear = torch.nn.Linear(64, 64).eval()
    with full_disk(), pytest.raises(OSError, match=r"File too large.*e\.pt2"):
        export.write(linear, target, (64,))
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("text", ["[]", "garbage", "\xff", json.dumps({"format": 1})])
def test_a_work_dir_with_another_index(tmp_path, text):
    (tmp_path / "calibration.json").write_bytes(text.encode("latin-1"))
    with pytest.raises(ValueError, match=f"work_dir {tmp_path}.*(cannot be read|another calibration)"):
        WorkDir(tmp_path, {})
