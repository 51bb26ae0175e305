"""Families of timm beside ViT and Swin: rewritten faithfully, simulated = integer, refused with a reason."""

from functools import partial

import families
import minmax
import pytest
import timm
import torch
import vitq
from families import made
from minmax import minmax_state, simulated, sqnr
from timm.layers import RmsNorm, SwiGLU
from timm.models.beit import Beit
from timm.models.cait import Cait
from timm.models.eva import Eva
from timm.models.swin_transformer_v2 import SwinTransformerV2
from timm.models.vision_transformer import ResPostBlock
from timm.models.vision_transformer_relpos import ResPostRelPosBlock, VisionTransformerRelPos
from torch import nn
from vitq.calibrate import calibrate
from vitq.convert import to_integer
from vitq.models import adapter_for, state_data

from vitq_kernels.nn import QAttention, QBlock

SWIN = {"img_size": (24, 40), "patch_size": 2, "embed_dim": 16, "depths": (2, 2), "num_heads": (2, 4), "num_classes": 7}
eva = partial(made, Eva, **minmax.TINY)
rotating = partial(eva, use_rot_pos_emb=True)
beit = partial(made, Beit, **minmax.TINY)
relpos = partial(made, VisionTransformerRelPos, **minmax.TINY)
swin2 = partial(made, SwinTransformerV2, **SWIN, window_size=4)

#: Models whose attention is integer in every block; True where a QBlock is the whole of it.
MODELS = {
    "eva02": (partial(rotating, swiglu_mlp=True, scale_mlp=True, qkv_fused=False, init_values=0.3), True),
    "eva-glu": (partial(rotating, swiglu_mlp=True), True),
    "eva-inner-norm": (partial(eva, scale_attn_inner=True), True),
    "eva-post-norm": (partial(eva, use_post_norm=True), False),
    "dinov3": (
        partial(
            rotating,
            rope_type="dinov3",
            num_reg_tokens=4,
            init_values=0.1,
            rope_rotate_half=True,
            dynamic_img_size=True,
        ),
        True,
    ),
    "rope-mixed": (partial(rotating, rope_type="mixed", attn_type="rope"), True),
    "rope-qk-norm": (partial(rotating, attn_type="rope", qk_norm=True), True),
    "beit": (partial(beit, use_rel_pos_bias=True, init_values=0.1, qkv_bias=True), True),
    "beit-shared": (partial(beit, use_shared_rel_pos_bias=True), True),
    "relative-mlp": (partial(relpos, rel_pos_type="mlp", init_values=0.1), True),
    "relative-shared": (partial(relpos, rel_pos_type="bias", shared_rel_pos=True), True),
    "relative-post-norm": (partial(relpos, block_fn=ResPostRelPosBlock, class_token=True), False),
    "swin-v2": (swin2, False),
    "swin-v2-dynamic": (partial(swin2, strict_img_size=False), False),
    "qk-norm": (partial(minmax.vit, qk_norm=True), True),
    "rms-norm": (partial(minmax.vit, norm_layer=RmsNorm), False),
    "swiglu": (partial(minmax.vit, mlp_layer=SwiGLU), True),
    "post-norm": (partial(minmax.vit, block_fn=ResPostBlock), False),
}
CAIT = partial(made, Cait, **minmax.TINY)


@pytest.mark.parametrize("name", MODELS)
def test_parity(name):
    make, whole = MODELS[name]
    model = make()
    x = minmax.images(model)
    families.assert_rewritten(model, x)
    families.assert_parity(model, x)
    family = adapter_for(model)
    integer = to_integer(model, minmax_state(model, x))
    blocks = len(family.blocks())
    assert len(family.attentions()) == blocks == sum(isinstance(m, QAttention) for m in integer.modules())
    assert sum(isinstance(m, QBlock) for m in integer.modules()) == whole * blocks


@pytest.mark.parametrize("recipe", ["minmax", "vitq-w4a8"])
@pytest.mark.parametrize("name", MODELS)
def test_calibration(name, recipe):
    model = MODELS[name][0]()
    families.assert_calibrates(model, minmax.images(model), recipe)


def test_cait_runs_its_attention_in_float():
    model = CAIT()
    x = minmax.images(model)
    families.assert_parity(model, x)
    families.assert_calibrates(model, x, "vitq-w4a8")
    family = adapter_for(model)
    refused = dict(family.refused)
    assert "talking heads" in refused["blocks.0.attn"]
    assert "queries are those of one token" in refused["blocks_token_only.1.attn"]
    assert "mixes heads" in refused["blocks.1.attn.proj_l"]
    integer = to_integer(model, minmax_state(model, x))
    left = {name for name, m in integer.named_modules() if isinstance(m, nn.Linear)}
    assert left == {f"blocks.{i}.attn.proj_{p}" for i in (0, 1) for p in "lw"}


@pytest.mark.parametrize(
    ("plant", "name"),
    [("rope", "dinov3"), ("prefix", "dinov3"), ("logit_scale", "swin-v2"), ("bias", "beit"), ("k_norm", "qk-norm")],
)
def test_planted_bugs_are_caught(plant, name):
    model = MODELS[name][0]()
    x = minmax.images(model)
    state = minmax_state(model, x)
    integer, oracle = to_integer(model, state), simulated(model, state)(x.double())
    before = sqnr(oracle, integer(x))
    attention = next(m for m in integer.modules() if isinstance(m, QAttention))
    stage = attention.stage
    if plant == "rope":
        stage.rope = stage.rope.roll(1, -2)
    elif plant == "prefix":
        stage.prefix, stage.rope = 0, torch.cat((stage.rope[: stage.prefix], stage.rope))
    elif plant == "logit_scale":
        stage.logit_scale = stage.logit_scale.flip(0)
    elif plant == "bias":
        attention.bias = attention.bias.transpose(1, 2)
    else:
        stage.k_norm = nn.Identity()
    assert before > 18
    assert sqnr(oracle, integer(x)) < before - 6


def test_rotations_are_of_one_image_size():
    model = MODELS["dinov3"][0]()
    integer = to_integer(model, minmax_state(model, minmax.images(model)))
    with pytest.raises(ValueError, match="x has 41 tokens, expected 21: rotations are of one image size"):
        integer(torch.zeros(1, 3, 24, 24))


def test_masks_are_refused_where_quantization_gives_them_up():
    model = MODELS["eva02"][0]()
    integer = to_integer(model, minmax_state(model, minmax.images(model)))
    with pytest.raises(ValueError, match="attn_mask is Tensor, expected None"):
        integer.blocks[0](torch.zeros(1, 17, 32), attn_mask=torch.zeros(17, 17))


def test_attention_of_another_form_is_refused_by_name():
    with torch.device("meta"):
        family = adapter_for(timm.create_model("vit_base_patch14_dinov2.lvd142m", depth=1, num_classes=0))
        assert not family.refused
        grouped = Eva(**minmax.TINY, attn_type="rope", num_kv_heads=1, qkv_fused=False)
        assert "shares keys and values among heads" in dict(adapter_for(grouped).refused)["blocks.0.attn"]
        with pytest.raises(
            TypeError, match=r"model is MaxxVit.* no adapter for its attention AttentionCl, .* batch norms"
        ):
            adapter_for(timm.create_model("maxvit_rmlp_pico_rw_256"))


def test_checkpoints_of_rewritten_models(tmp_path):
    name, kwargs = "vit_small_patch16_rope_mixed_224", {"depth": 1, "embed_dim": 32, "num_heads": 2, "num_classes": 7}
    kwargs |= {"img_size": 32, "patch_size": 8}
    model = made(timm.create_model, name, **kwargs)
    x = minmax.images(model)
    done = calibrate(model, x, "vitq-w4a8", architecture=name, kwargs=kwargs, data=state_data(model))
    vitq.save(tmp_path / "out", done.state)
    # Learned rotations come from the checkpoint, not from the architecture that is built to be filled.
    assert torch.equal(vitq.load(tmp_path / "out")(x), to_integer(model, done.state)(x))


@pytest.mark.parametrize("name", ["eva02", "swin-v2"])
def test_compile_and_export(name):
    model = MODELS[name][0]()
    x = minmax.images(model)
    integer = to_integer(model, minmax_state(model, x, **families.STATES[1]))
    exported = torch.export.export(integer, (x,))
    torch._dynamo.reset()
    compiled = torch.compile(integer, fullgraph=True, backend="aot_eager")
    want = integer(x)
    assert torch.equal(exported.module()(x), want)
    assert torch.equal(compiled(x), want)
