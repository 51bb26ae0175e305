"""The shipped digits transformer: registration, weights and accuracy."""

import pytest
import timm
import torch
from safetensors import safe_open
from safetensors.torch import load_file
from timm.layers import LayerNorm
from timm.models.vision_transformer import Block
from vitq.data import load_digits
from vitq.evaluate import predict, top1
from vitq.models import vit_digits_patch4_32
from vitq.models.digits_vit import NAME, WEIGHTS


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
    assert top1(*predict(model, load_digits("test"))) >= 97.5
    assert 85.0 <= top1(*predict(model, load_digits("hard"))) <= 93.0
