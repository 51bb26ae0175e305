"""The shipped digits transformer: registration, weights, accuracy, and the script that made it."""

import math
import re

import pytest
import timm
import torch
from safetensors import safe_open
from safetensors.torch import load_file
from timm.layers import LayerNorm
from timm.models.vision_transformer import Block
from vitq.data.digits import training_pixels
from vitq.models import train_digits, vit_digits_patch4_32
from vitq.models.digits_vit import NAME, WEIGHTS
from vitq.models.train_digits import top1, train


@pytest.fixture(scope="module")
def model():
    return timm.create_model(NAME, pretrained=True).eval()


def test_importing_the_package_registers_the_model():
    assert vit_digits_patch4_32 is timm.model_entrypoint(NAME)
    assert NAME in timm.list_models("*digits*", pretrained=True)


def test_weights_file_is_small_float16_and_says_where_it_comes_from():
    assert WEIGHTS.stat().st_size <= 4_000_000
    assert {tensor.dtype for tensor in load_file(WEIGHTS).values()} == {torch.float16}
    with safe_open(WEIGHTS, "pt") as file:
        assert file.metadata()["model"] == NAME


def test_pretrained_equals_the_file(model):
    stored, loaded = load_file(WEIGHTS), model.state_dict()
    assert stored.keys() == loaded.keys()
    for name, tensor in stored.items():
        assert loaded[name].dtype == torch.float32
        assert torch.equal(loaded[name], tensor.float()), name


def test_it_is_an_ordinary_timm_vit(model):
    assert all(type(block) is Block for block in model.blocks)
    block = model.blocks[0]
    assert isinstance(block.norm1, LayerNorm)
    assert block.attn.qkv.weight.shape == (576, 192)
    assert block.attn.qkv.bias is not None
    assert block.attn.head_dim == 64
    assert isinstance(block.mlp.act, torch.nn.GELU)
    assert block.mlp.act.approximate == "none"
    assert model.pos_embed.shape == (1, 65, 192)
    assert model(torch.zeros(2, 3, 32, 32)).shape == (2, 10)


def test_timm_arguments_still_work():
    assert timm.create_model(NAME, pretrained=True, num_classes=0)(torch.zeros(1, 3, 32, 32)).shape == (
        1,
        192,
    )
    assert timm.create_model(NAME, pretrained=True, img_size=48)(torch.zeros(1, 3, 48, 48)).shape == (1, 10)


def test_accuracy(model):
    assert top1(model, "test") >= 97.5
    assert 85.0 <= top1(model, "hard") <= 93.0


def test_training_is_deterministic_and_learns(monkeypatch, capsys):
    images, labels = training_pixels()
    few = (labels < 2).nonzero().squeeze(1)[:32]  # two classes: the head's bias alone learns fast
    monkeypatch.setattr(train_digits, "training_pixels", lambda: (images[few], labels[few]))
    first, second = (train(5, 16, 1e-3, seed=1).state_dict() for _ in range(2))
    assert all(torch.equal(first[name], second[name]) for name in first)
    losses = [float(loss) for loss in re.findall(r"loss ([\d.]+)", capsys.readouterr().out)]
    assert len(losses) == 10
    assert losses[4] < min(losses[0], math.log(10)) - 0.3


def test_script_writes_what_it_trained(model, monkeypatch, tmp_path, capsys):
    out = tmp_path / "new" / "weights.safetensors"
    monkeypatch.setattr(train_digits, "train", lambda *arguments: model)
    monkeypatch.setattr(train_digits, "top1", lambda model, split: 12.5)
    monkeypatch.setattr("sys.argv", ["train_digits", "--out", str(out), "--threads", str(torch.get_num_threads())])
    train_digits.main()
    assert [path.name for path in out.parent.iterdir()] == [out.name]
    stored = load_file(WEIGHTS)
    assert all(torch.equal(tensor, stored[name]) for name, tensor in load_file(out).items())
    assert "3.62 MB, as stored: train 12.50 %, test 12.50 %, hard 12.50 %" in capsys.readouterr().out
