"""The outlier variant: same logits, wider channels, clear refusals."""

import pytest
import timm
import torch
from torch import nn
from vitq.data import load_digits
from vitq.models import outlier_variant
from vitq.models.digits_vit import NAME

SMALL = {
    NAME: {"pretrained": True},
    "deit_tiny_distilled_patch16_224": {"img_size": 32, "patch_size": 8, "depth": 2},
    "swin_tiny_patch4_window7_224": {
        "img_size": 32,
        "window_size": 4,
        "embed_dim": 24,
        "depths": (2, 2),
        "num_heads": (2, 4),
    },
}


def build(name):
    torch.manual_seed(0)
    model = timm.create_model(name, **SMALL[name]).eval()
    for module in model.modules():  # freshly initialised norms have β = 0, which hides mistakes
        if isinstance(module, nn.LayerNorm) and not module.bias.any():
            nn.init.normal_(module.bias, std=0.3)
    return model


def norm_ranges(model, images):
    """Per LayerNorm of a block, each channel's largest magnitude over tokens and images."""
    ranges, hooks = {}, []
    for name, module in model.named_modules():
        if name.endswith(("norm1", "norm2")):

            def keep(module, inputs, output, name=name):
                ranges[name] = output.abs().flatten(0, -2).amax(0)

            hooks.append(module.register_forward_hook(keep))
    with torch.no_grad():
        model(images)
    for hook in hooks:
        hook.remove()
    return ranges


@pytest.mark.parametrize("name", SMALL)
def test_logits_are_preserved(name):
    model, images = build(name), load_digits("hard").tensors[0][:32]
    variant = outlier_variant(model)
    with torch.no_grad():
        plain, spread = model(images), variant(images)
    # Powers of two commute with every rounding; only another summation order could show.
    assert torch.allclose(plain, spread, rtol=0, atol=1e-5 * plain.abs().max().item())


def test_logits_are_preserved_to_rounding_for_any_factor():
    model, images = build(NAME).double(), load_digits("test").tensors[0][:8].double()
    with torch.no_grad():
        error = model(images) - outlier_variant(model, factors=(3.0, 50.1))(images)
    assert error.abs().max() < 1e-12


@pytest.mark.parametrize("name", SMALL)
def test_every_norm_gets_its_outliers(name):
    model, images = build(name), load_digits("test").tensors[0][:32]
    before, after = norm_ranges(model, images), norm_ranges(outlier_variant(model, channels=6), images)
    assert len(before) >= 4
    for norm in before:
        ratio = after[norm] / before[norm]
        assert sorted(ratio[ratio > 1.5].round().tolist()) == [8, 8, 16, 16, 32, 64]
        assert after[norm].max() / after[norm].median() > 2 * before[norm].max() / before[norm].median()


def test_original_is_untouched_and_the_seed_decides():
    model = build(NAME)
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    one, same, other = (outlier_variant(model, seed=seed).state_dict() for seed in (1, 1, 2))
    assert all(torch.equal(before[name], tensor) for name, tensor in model.state_dict().items())
    assert all(torch.equal(one[name], same[name]) for name in one)
    changed = {name for name in one if not torch.equal(one[name], before[name])}
    assert changed == {
        f"blocks.{i}.{part}"
        for i in range(6)
        for part in (
            "norm1.weight",
            "norm1.bias",
            "norm2.weight",
            "norm2.bias",
            "attn.qkv.weight",
            "mlp.fc1.weight",
        )
    }
    assert any(not torch.equal(one[name], other[name]) for name in one)
    assert not torch.equal(one["blocks.0.norm1.weight"] > 4, one["blocks.1.norm1.weight"] > 4)


def test_refusals():
    model = build(NAME)
    with pytest.raises(TypeError, match="model must be a timm VisionTransformer or SwinTransformer, got Linear"):
        outlier_variant(nn.Linear(2, 2))
    with pytest.raises(ValueError, match=r"channels must be between 1 and 192.*got 193"):
        outlier_variant(model, channels=193)
    with pytest.raises(ValueError, match="channels must be"):
        outlier_variant(model, channels=0)
    with pytest.raises(ValueError, match=r"factors must be positive.*got \(8.0, -1.0\)"):
        outlier_variant(model, factors=(8.0, -1.0))
    with pytest.raises(ValueError, match="at least one"):
        outlier_variant(model, factors=())


def test_unknown_parts_are_named():
    post = timm.create_model(
        "vit_tiny_patch16_224", depth=1, block_fn=timm.models.vision_transformer.ResPostBlock, img_size=32
    )
    with pytest.raises(ValueError, match="block 0 is a ResPostBlock"):
        outlier_variant(post)
    rms = timm.create_model("vit_tiny_patch16_224", depth=1, norm_layer=timm.layers.RmsNorm, img_size=32)
    with pytest.raises(ValueError, match=r"block 0.norm1 must be a LayerNorm"):
        outlier_variant(rms)
    conv = build(NAME)
    conv.blocks[3].mlp.fc1 = nn.Conv2d(192, 384, 1)
    with pytest.raises(ValueError, match=r"block 3.norm2 must feed Linear layers of its width, got Conv2d"):
        outlier_variant(conv)
