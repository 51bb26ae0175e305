"""Converted timm models against timm's own modules in float64 with the same quantizers between them."""

import copy
import dataclasses

import minmax
import pytest
import torch
from minmax import minmax_state, simulated, sqnr, swin, vit
from timm.layers import SwiGLU, get_act_layer
from timm.models.deit import VisionTransformerDistilled
from timm.models.vision_transformer import ParallelScalingBlock
from torch import nn
from vitq.convert import to_integer
from vitq.models import adapter_for
from vitq.restore import to_simulated
from vitq.state import ModelState

from vitq_kernels import _native, backend
from vitq_kernels.formats import FocusSpec, LevelTable, QuantSpec
from vitq_kernels.nn import QBlock, QLinear, QMlp, QPatchEmbed, Window

BACKENDS = ("ref",) if _native.unavailable("cpu") else ("ref", "cpu")
TOKEN8 = QuantSpec(8, granularity="per_token", dynamic=True)
TOKEN4 = QuantSpec(4, granularity="per_token", dynamic=True)
HEADS = QuantSpec(8, granularity="per_head", dynamic=True)
TABLE = LevelTable((-120, -90, -60, -40, -30, -20, -10, -5, 0, 5, 10, 20, 35, 50, 70, 110))

MODELS = {
    "vit": vit,
    "layer-scale-avg-no-token": lambda: vit(init_values=0.5, class_token=False, global_pool="avg"),
    "registers-prenorm": lambda: vit(reg_tokens=2, pre_norm=True, no_embed_class=True, qkv_bias=False),
    "inner-norms": lambda: vit(scale_attn_norm=True, scale_mlp_norm=True),
    "gelu-tanh": lambda: vit(act_layer=get_act_layer("gelu_tanh")),
    "distilled": lambda: vit(VisionTransformerDistilled),
    "swin": swin,
    "swin-exact-fit": lambda: swin(img_size=(16, 32)),
    "swin-rectangular": lambda: swin(window_size=(3, 5), img_size=(20, 28)),
    "swin-small-grid": lambda: swin(img_size=16, window_size=8),
}
STATES = {
    "static": {},
    "dynamic": {"act": TOKEN8, "operands": HEADS, "rank": 4},
    "dynamic-tensor": {"act": TOKEN8, "operands": QuantSpec(8, dynamic=True), "rank": 4, "kind": "subspace"},
    "w4a4": {
        "weight": QuantSpec(4, granularity="per_channel"),
        "act": QuantSpec(4, symmetric=False),
        "operands": QuantSpec(4),
        "focus": FocusSpec(4, b1=0.01, b2=0.6, renormalize=True),
    },
    "tables": {
        "weight": QuantSpec(4, granularity="per_channel", table=TABLE),
        "act": QuantSpec(4, granularity="per_token", dynamic=True, table=TABLE),
        "rank": 3,
    },
}


def assert_same_function(integer: nn.Module, oracle: nn.Module, model: nn.Module, x: torch.Tensor) -> None:
    """Unit by unit on the oracle's own activations, then end to end.

    A code may round the other way where float64 x/scale lies within float32 rounding of a tie (1e-5 of all codes). One
    such code costs the tokens that see it about a step, 1e-2 of the largest value; all others agree to float precision.
    End to end these steps add up to far less than quantization itself.
    """
    read, _ = minmax.inputs_of(oracle, _units(model), x.double())
    for path, value in read.items():
        want, got = (m.get_submodule(path)(value.to(t)) for m, t in ((oracle, torch.float64), (integer, torch.float32)))
        error = (got - want).abs().amax(1 if path.startswith("patch_embed") else -1)
        agree = (error <= 2e-4 * want.abs().amax()).float().mean()
        assert agree >= 0.7, f"{path}: {agree:.0%} of the tokens agree"
    assert sqnr(oracle(x.double()), integer(x)) > 18


def _units(model: nn.Module) -> list[str]:
    """Blocks and the layers between them, each with the LayerNorm that conversion moves into it."""
    sites = adapter_for(model).sequence()
    return [s.path.rpartition(".")[0] if getattr(s, "norm", None) is not None else s.path for s in sites]


@pytest.mark.parametrize("state", STATES)
@pytest.mark.parametrize("name", MODELS)
def test_integer_model_is_the_simulation(name, state):
    model = MODELS[name]()
    x = minmax.images(model)
    s = minmax_state(model, x, **STATES[state])
    integer = to_integer(model, s)
    assert_same_function(integer, simulated(model, s), model, x)
    assert sum(isinstance(m, QBlock) for m in integer.modules()) == len(adapter_for(model).blocks())
    assert not any(isinstance(m, nn.Linear | nn.Conv2d | nn.Dropout) for m in integer.modules())


@pytest.mark.parametrize("state", STATES)
@pytest.mark.parametrize("name", MODELS)
def test_integer_logits_are_the_simulated_ones(name, state):
    """Bit for bit on each back end: sums are exact, and both models take their float stages from it."""
    model = MODELS[name]()
    x = minmax.images(model)
    s = minmax_state(model, x, **STATES[state])
    integer, sim = to_integer(model, s), to_simulated(model, s)
    logits = []
    for back_end in BACKENDS:
        with backend(back_end), torch.no_grad():
            logits.append(integer(x))
            assert torch.equal(sim(x), logits[-1]), back_end
    # Between back ends codes beside a tie differ, and that is all.
    assert sqnr(logits[0], logits[-1]) > 18


@pytest.mark.parametrize("name", MODELS)
def test_eight_bits_stay_close_to_float(name):
    # Random weights amplify rounding; a wrong connection anywhere ends below 10 dB.
    model = MODELS[name]()
    x = minmax.images(model)
    integer = to_integer(model, minmax_state(model, x, act=TOKEN8, operands=HEADS))
    assert sqnr(model(x), integer(x)) > 22


@pytest.mark.parametrize(
    ("plant", "name"),
    [
        ("shift", "swin"),
        ("mask", "swin-exact-fit"),
        ("padding", "swin"),
        ("bias", "swin"),
        ("layer_scale", "layer-scale-avg-no-token"),
        ("softmax_scale", "vit"),
        ("col_sum", "vit"),
        ("norm", "distilled"),
    ],
)
def test_planted_bugs_are_caught(plant, name):
    model = MODELS[name]()
    x = minmax.images(model)
    s = minmax_state(model, x)
    integer, oracle = to_integer(model, s), simulated(model, s)
    assert_same_function(integer, oracle, model, x)
    attentions = [block.attn for block in integer.modules() if isinstance(block, QBlock)]
    # Swin's last block is shifted, the one before is padded without a mask to hide it.
    attn = attentions[{"shift": -1, "mask": -1, "padding": -2}.get(plant, 0)]
    if plant == "shift":
        attn.window.token_of_slot = attn.window.token_of_slot.roll(1)
    elif plant == "mask":
        attn.window.mask = None
    elif plant == "padding":
        assert attn.window.window.padded
        attn.window.token_of_slot = attn.window.token_of_slot.clamp(min=0)
    elif plant == "bias":
        attn.bias = attn.bias.flip(1)
    elif plant == "layer_scale":
        attn.proj.layer_scale = None
    elif plant == "softmax_scale":
        attn.softmax_scale *= 1.01
    elif plant == "col_sum":
        attn.qkv.col_sum = attn.qkv.col_sum * 0
    elif plant == "norm":
        attn.qkv.norm.eps = 1e-3
    with pytest.raises(AssertionError):
        assert_same_function(integer, oracle, model, x)


def test_forward_api_is_timms():
    for name in ("distilled", "swin", "layer-scale-avg-no-token"):
        model = MODELS[name]()
        x = minmax.images(model)
        integer = to_integer(model, minmax_state(model, x))
        features = integer.forward_features(x)
        assert features.shape == model.forward_features(x).shape
        assert torch.equal(integer.forward_head(features), integer(x))
        assert (
            integer.forward_head(features, pre_logits=True).shape == model.forward_head(features, pre_logits=True).shape
        )
    model = vit()
    integer = to_integer(model, minmax_state(model, x[..., :16, :16]))
    intermediate = integer.forward_intermediates(x[..., :16, :16], intermediates_only=True)
    assert [t.shape for t in intermediate] == [
        t.shape for t in model.forward_intermediates(x[..., :16, :16], intermediates_only=True)
    ]


def test_attention_masks_reach_the_integer_attention():
    model = vit()
    x = minmax.images(model)
    s = minmax_state(model, x)
    integer, oracle = to_integer(model, s), simulated(model, s)
    keep = torch.ones(17, 17, dtype=torch.bool)
    keep[:, 9:13] = False
    want, got = oracle(x.double(), attn_mask=keep), integer(x, attn_mask=keep)
    assert sqnr(want, got) > 30
    assert sqnr(integer(x), got) < 20
    additive = torch.zeros(17, 17).masked_fill(~keep, float("-inf"))
    assert torch.equal(integer(x, attn_mask=additive.expand(6, 1, 17, 17)), got)
    with pytest.raises(ValueError, match="is_causal is True"):
        integer.blocks[0](torch.zeros(1, 17, 32), is_causal=True)
    with pytest.raises(ValueError, match="attn_mask has shape"):
        integer(x, attn_mask=additive.expand(6, 2, 17, 17))


# What stays float, and why.


def gated() -> nn.Module:
    model = vit()
    for block in model.blocks:
        block.attn.gate = nn.Linear(32, 32).requires_grad_(False)
    return model


PARTIAL = {
    "gated-attention": (gated, "blocks.0.attn", "gates its output"),
    "attention-pool": (lambda: vit(global_pool="map", class_token=False), "attn_pool", "AttentionPoolLatent"),
    "quick-gelu": (lambda: vit(act_layer=get_act_layer("quick_gelu")), "blocks.1.mlp.act", "QuickGELU"),
    "swiglu": (lambda: vit(mlp_layer=SwiGLU), "blocks.0.mlp.act", "Gated"),
    "dynamic-swin": (lambda: swin(strict_img_size=False), "layers.0.blocks.1.attn", "each input size"),
}


@pytest.mark.parametrize("name", PARTIAL)
def test_what_cannot_be_converted_is_listed_and_the_rest_is_integer(name):
    make, path, reason = PARTIAL[name]
    model = make()
    x = minmax.images(model)
    s = minmax_state(model, x)
    integer = to_integer(model, s)
    assert reason in dict(adapter_for(model).refused)[path]
    assert reason in integer.vitq_report.floating[path]
    assert path in str(integer.vitq_report)
    assert not any(isinstance(m, nn.Linear | nn.Conv2d) for m in integer.modules()), "linear layers are integer anyway"
    assert_same_function(integer, simulated(model, s), model, x)


def test_unknown_blocks_stay_float():
    model = vit(block_fn=ParallelScalingBlock)
    x = minmax.images(model)
    family = adapter_for(model)
    refused = dict(family.refused)
    assert "ParallelScalingBlock" in refused["blocks.0"]
    s = minmax_state(model, x)
    integer = to_integer(model, s)
    assert set(s.sites) == {"patch_embed.proj", "head"}
    assert set(refused) <= set(integer.vitq_report.floating)
    assert_same_function(integer, simulated(model, s), model, x)


@pytest.mark.parametrize("skip", ["attn", "mlp.fc1", "mlp.fc2", "mlp", "patch_embed.proj", "head"])
@pytest.mark.parametrize("name", ["layer-scale-avg-no-token", "swin"])
def test_sites_without_a_state_stay_float(name, skip):
    model = MODELS[name]()
    x = minmax.images(model)
    paths = {site.path for site in (*adapter_for(model).attentions(), *adapter_for(model).linears())}
    left = {p for p in paths if p.endswith((skip, f"{skip}.fc1", f"{skip}.fc2")) or (skip == "head" and "head" in p)}
    assert left
    s = minmax_state(model, x, skip=left)
    integer = to_integer(model, s)
    assert all(integer.vitq_report.floating[p] == "the state leaves it float" for p in left)
    assert not left & set(integer.vitq_report.integer)
    assert_same_function(integer, simulated(model, s), model, x)


def test_every_parameter_is_accounted_for():
    for make in (*MODELS.values(), *(make for make, _, _ in PARTIAL.values())):
        model = make()
        report = to_integer(model, minmax_state(model, minmax.images(model))).vitq_report
        paths = (*report.integer, *report.floating)
        absorbed = ("norm1", "norm2", "attn.norm", "mlp.norm", "downsample.norm")
        for name, module in adapter_for(model).model.named_modules():
            if any(True for _ in module.parameters(recurse=False)):
                inside = name in paths or name.endswith((*absorbed, "ls1", "ls2", "attn"))
                assert inside or any(name.startswith(f"{p}.") for p in paths), name


def test_weight_only_layers():
    model = swin()
    x = minmax.images(model)
    every = tuple(site.path for site in adapter_for(model).linears())
    s = minmax_state(model, x, weight_only=every, rank=3)
    integer = to_integer(model, s)
    assert_same_function(integer, simulated(model, s), model, x)
    assert "float input" in integer.vitq_report.integer["head.fc"]


# Nothing of the float model is needed or touched.


def test_the_float_model_is_left_alone_and_its_weights_unused():
    model = swin()
    before = {name: t.clone() for name, t in model.state_dict().items()}
    x = minmax.images(model)
    s = minmax_state(model, x)
    want = to_integer(model, s)(x)
    assert all(torch.equal(t, before[name]) for name, t in model.state_dict().items())
    torch.manual_seed(9)
    other = swin()
    for p in other.parameters():
        p.normal_()
    assert torch.equal(to_integer(other, s)(x), want)


def test_module_types_and_training_only_modules():
    model = vit(drop_rate=0.1, drop_path_rate=0.1, proj_drop_rate=0.1, patch_drop_rate=0.5, pos_drop_rate=0.1)
    x = minmax.images(model)
    integer = to_integer(model, minmax_state(model, x))
    family = adapter_for(model)
    assert not any(isinstance(m, family.training_only) for m in integer.modules())
    assert isinstance(integer.blocks[0], QBlock)
    assert isinstance(integer.blocks[0].mlp, QMlp)
    assert isinstance(integer.patch_embed.proj, QPatchEmbed)
    assert isinstance(integer.head, QLinear)
    assert not list(integer.blocks.parameters()) or not any(p.requires_grad for p in integer.parameters())
    integer.train()
    assert torch.equal(integer(x), integer.eval()(x))


@pytest.mark.parametrize("name", ["vit", "swin"])
def test_windows_and_masks_are_timms(name):
    model = MODELS[name]()
    family = adapter_for(model)
    for site in family.attentions():
        if site.window is not None:
            want = model.get_submodule(site.path.rpartition(".")[0]).attn_mask
            got = family.attention_mask(site)
            assert (want is None) == (got is None)
            # timm's −100 leaves a key in; here it is out.
            assert want is None or torch.equal(want.masked_fill(want == -100, -torch.inf), got)
    order = [site.path for site in family.linears()]
    seen = []
    hooks = [model.get_submodule(p).register_forward_hook(lambda *a, p=p: seen.append(p)) for p in order]
    model(minmax.images(model))
    assert seen == order, "linears() lists layers in execution order"
    for hook in hooks:
        hook.remove()


# Graphs.


@pytest.mark.parametrize("make", [lambda: vit(VisionTransformerDistilled, depth=1), lambda: swin(depths=(2, 1))])
@pytest.mark.parametrize("backend", [None, "ref"])
def test_compile_export_deepcopy(make, backend):
    model = make()
    x = minmax.images(model)
    integer = to_integer(model, minmax_state(model, x, act=TOKEN4, operands=HEADS, rank=4, kind="subspace"), backend)
    exported = torch.export.export(integer, (x,))  # first: nothing may depend on an eager call before
    torch._dynamo.reset()
    compiled = torch.compile(integer, fullgraph=True, backend="aot_eager")
    want = integer(x)
    assert torch.equal(compiled(x), want)
    assert torch.equal(exported.module()(x), want)
    assert torch.equal(copy.deepcopy(integer)(x), want)
    assert torch.equal(integer.to("cpu", torch.float32)(x), want)


# Errors.


def test_states_that_do_not_fit():
    model = vit()
    x = minmax.images(model)
    good = minmax_state(model, x)

    def refused(match, error=ValueError, sites=None, floats=None, target=model):
        state = ModelState("test", good.sites | (sites or {}), good.floats if floats is None else floats)
        with pytest.raises(error, match=match):
            to_integer(target, state)

    attention, head = good.sites["blocks.0.attn"], good.sites["head"]
    refused("'blocks.7.attn' is no quantizable site", sites={"blocks.7.attn": attention})
    refused("'norm' is no quantizable site", sites={"norm": head})
    refused(r"sites\['blocks.0.attn'\] is LinearState, expected AttentionState", TypeError, {"blocks.0.attn": head})
    refused(r"sites\['head'\] is AttentionState", TypeError, {"head": attention})
    refused(r"codes of 'head' has shape \(32, 32\), expected \(7, 32\)", sites={"head": attention.proj})
    refused("beside the attention that it is part of", sites={"blocks.0.attn.qkv": attention.qkv})
    refused("floats lacks cls_token", floats={k: v for k, v in good.floats.items() if k != "cls_token"})
    refused("floats has spare", floats=good.floats | {"spare": torch.zeros(1)})
    refused(r"floats\['pos_embed'\] has shape \(1,\)", floats=good.floats | {"pos_embed": torch.zeros(1)})
    refused("heads of .* is 2, expected 4", target=vit(num_heads=4))
    refused("gates its output", target=gated())
    refused("model is Linear, expected one of VisionTransformer, Eva", TypeError, target=nn.Linear(2, 2))
    with pytest.raises(TypeError, match=r"sites\['x'\] is int"):
        ModelState("test", {"x": 1}, {})
    with pytest.raises(TypeError, match=r"floats\['x'\] is torch.float16"):
        ModelState("test", {}, {"x": torch.zeros(1).half()})


def test_swin_bias_must_fit():
    model = swin()
    s = minmax_state(model, minmax.images(model))
    path = "layers.0.blocks.0.attn"
    wrong = dataclasses.replace(s.sites[path], bias=None)
    with pytest.raises(ValueError, match=r"bias of .* has shape None, expected \(2, 16, 16\)"):
        to_integer(model, ModelState("test", s.sites | {path: wrong}, s.floats))


def test_images_of_another_size_are_refused():
    model = swin()
    integer = to_integer(model, minmax_state(model, minmax.images(model)))
    with pytest.raises(AssertionError):
        integer(torch.zeros(1, 3, 16, 16))
    with pytest.raises(ValueError, match="expected \\(B, \\*\\(12, 20\\), C\\)"):
        integer.layers[0].blocks[0](torch.zeros(1, 8, 8, 16))
    assert isinstance(integer.layers[0].blocks[0].attn.window.window, Window)
