"""Vision models of transformers: families, and the round trip of its save_pretrained and from_pretrained."""

import json
from pathlib import Path

import families
import pytest
import torch
from minmax import minmax_state
from torch import nn
from vitq.calibrate import calibrate
from vitq.checkpoint import CheckpointError
from vitq.convert import to_integer
from vitq.models import adapter_for

from vitq_kernels.nn import QBlock

hf = pytest.importorskip("transformers")

SIZE = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 64}
VIT = {**SIZE, "image_size": 16, "patch_size": 4, "num_labels": 7}
SWIN = {"patch_size": 2, "embed_dim": 16, "depths": [2, 2], "num_heads": [2, 4], "window_size": 4, "num_labels": 7}
TEXT = {**SIZE, "vocab_size": 32, "bos_token_id": 0, "eos_token_id": 1}
MODELS = {
    "vit": lambda: hf.ViTForImageClassification(hf.ViTConfig(**VIT)),
    "vit-features": lambda: hf.ViTModel(hf.ViTConfig(**VIT)),
    "deit": lambda: hf.DeiTForImageClassificationWithTeacher(hf.DeiTConfig(**VIT)),
    "dinov2": lambda: hf.Dinov2ForImageClassification(hf.Dinov2Config(**VIT, mlp_ratio=2)),
    "dinov2-swiglu": lambda: hf.Dinov2Model(hf.Dinov2Config(**VIT, mlp_ratio=2, use_swiglu_ffn=True)),
    "dinov2-registers": lambda: hf.Dinov2WithRegistersModel(hf.Dinov2WithRegistersConfig(**VIT, mlp_ratio=2)),
    "siglip": lambda: hf.SiglipVisionModel(hf.SiglipVisionConfig(**VIT)),
    "siglip-classes": lambda: hf.SiglipForImageClassification(
        hf.SiglipConfig(vision_config=VIT, text_config=TEXT, num_labels=7)
    ),
    "clip": lambda: hf.CLIPVisionModelWithProjection(hf.CLIPVisionConfig(**VIT, projection_dim=24)),
    "swin": lambda: hf.SwinForImageClassification(hf.SwinConfig(**SWIN, image_size=32)),
    "swin-padded": lambda: hf.SwinModel(hf.SwinConfig(**SWIN, image_size=28)),
    "yolos": lambda: hf.YolosForObjectDetection(
        hf.YolosConfig(**{**VIT, "image_size": [16, 32], "num_detection_tokens": 5})
    ),
}


def images(model: nn.Module, n: int = 6) -> torch.Tensor:
    size = getattr(model.config, "image_size", None) or model.config.vision_config.image_size
    size = size if isinstance(size, list | tuple) else (size, size)
    return torch.randn(n, 3, *size, generator=torch.Generator().manual_seed(1))


@pytest.mark.parametrize("name", MODELS)
def test_parity(name):
    model = families.made(MODELS[name])
    x = images(model)
    families.assert_rewritten(model, x)
    families.assert_parity(model, x)
    family, state = adapter_for(model), minmax_state(model, x)
    whole = sum(isinstance(m, QBlock) for m in to_integer(model, state).modules())
    assert whole == len(family.blocks()) == len(family.attentions())
    # Windows that are both padded and shifted.
    assert whole == {"swin": 4}.get(name, 2)
    left = {path for path, reason in family.refused if not path.endswith(".act")}
    padded = {f"encoder.layers.{i}.blocks.1" for i in (0, 1)} if name == "swin-padded" else set()
    assert {p for p in left if "out_proj" not in p} == padded


@pytest.mark.parametrize("recipe", ["minmax", "vitq-w4a8"])
@pytest.mark.parametrize("name", MODELS)
def test_calibration(name, recipe):
    model = families.made(MODELS[name])
    families.assert_calibrates(model, images(model), recipe)


@pytest.mark.parametrize("name", ["vit", "clip", "swin", "siglip", "yolos"])
def test_features_and_hidden_states_are_returned(name):
    model = families.made(MODELS[name])
    x = images(model)
    model(x, output_hidden_states=True)  # the library installs its hooks on the float layers
    integer = to_integer(model, minmax_state(model, x))
    want, got = (m(x, output_hidden_states=True) for m in (model, integer))
    assert list(want.keys()) == list(got.keys())
    assert [h.shape for h in want.hidden_states] == [h.shape for h in got.hidden_states]
    assert torch.equal(got.hidden_states[-1], integer(x, output_hidden_states=True).hidden_states[-1])
    if name != "yolos":  # which hands the argument to no layer
        with pytest.raises(ValueError, match="output_attentions is bool, expected None"):
            integer(x, output_attentions=True)


def test_linears_are_listed_in_execution_order():
    for make in MODELS.values():
        family = adapter_for(families.made(make))
        order, seen = [site.path for site in family.linears()], []
        for path in order:
            module = family.model.get_submodule(path)
            module.register_forward_hook(lambda *a, path=path, seen=seen: seen.append(path))
        family.model(images(family.model))
        assert list(dict.fromkeys(seen)) == order


def test_other_models_are_refused():
    clip = hf.CLIPModel(hf.CLIPConfig(vision_config=VIT, text_config=TEXT))
    with pytest.raises(TypeError, match="model is CLIPModel, expected a vision model"):
        adapter_for(clip)
    assert adapter_for(clip.vision_model)
    with pytest.raises(TypeError, match="model is ConvNextModel"):
        adapter_for(hf.ConvNextModel(hf.ConvNextConfig(hidden_sizes=[8], depths=[1], num_stages=1)))


@pytest.fixture
def saved(tmp_path):
    from vitq.pretrained import to_pretrained

    def save(name: str) -> tuple[nn.Module, nn.Module, torch.Tensor, Path]:
        model = families.made(MODELS[name])
        x = images(model)
        integer = to_pretrained(model, calibrate(model, x, "vitq-w4a8").state)
        integer.save_pretrained(tmp_path)
        return model, integer, x, tmp_path

    return save


@pytest.mark.parametrize("name", MODELS)
def test_round_trip(saved, name):
    model, integer, x, folder = saved(name)
    again = type(model).from_pretrained(folder)
    output = adapter_for(model).output
    want, got = integer(x), again(x)
    assert torch.equal(output(want), output(got))
    if name != "yolos":
        assert type(again.base_model) is type(model.base_model)
    config = json.loads((folder / "config.json").read_text())
    assert config["quantization_config"]["quant_method"] == "vitq"
    assert config["quantization_config"]["recipe"]["name"] == "vitq-w4a8"
    # What was loaded can be saved.
    again.save_pretrained(folder / "again")
    assert (folder / "again" / "model.safetensors").read_bytes() == (folder / "model.safetensors").read_bytes()
    assert not hasattr(model.config, "quantization_config"), "the float model is left alone"


def test_auto_classes_and_dtypes(saved):
    _, integer, x, folder = saved("vit")
    auto = hf.AutoModelForImageClassification.from_pretrained(folder)
    assert torch.equal(auto.to("cpu")(x).logits, integer(x).logits)
    half = hf.AutoModelForImageClassification.from_pretrained(folder, dtype=torch.bfloat16)
    assert half(x.bfloat16()).logits.dtype == torch.bfloat16
    with pytest.raises(ValueError, match="device_map"):
        hf.AutoModelForImageClassification.from_pretrained(folder, device_map="auto")


def test_broken_folders_are_refused(saved):
    model, _, _, folder = saved("vit")
    config = json.loads((folder / "config.json").read_text())

    def refused(match: str, **fields) -> None:
        changed = {**config, "quantization_config": {**config["quantization_config"], **fields}}
        (folder / "config.json").write_text(json.dumps(changed))
        with pytest.raises(CheckpointError, match=match):
            type(model).from_pretrained(folder)

    refused("quantization_config: version", version=2)
    refused("quantization_config: spare", spare=1)
    sites = dict(config["quantization_config"]["sites"])
    del sites["classifier"]
    refused(r"holds 'site\.classifier\.", sites=sites)
    (folder / "config.json").write_text(json.dumps({**config, "hidden_size": 64}))
    with pytest.raises(CheckpointError, match="does not fit ViTForImageClassification"):
        type(model).from_pretrained(folder)
    (folder / "config.json").write_text(json.dumps(config))
    weights = folder / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-9])
    with pytest.raises((CheckpointError, OSError, RuntimeError)):
        type(model).from_pretrained(folder)
