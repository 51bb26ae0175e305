"""Detectors: integer = simulated at several image sizes, RoIs held in calibration, what stays float, long sequences."""

import copy
from functools import partial

import pytest
import timm
import torch
from minmax import minmax_state, spread, sqnr
from torch import nn
from torchvision.models.detection.roi_heads import RoIHeads
from torchvision.ops import box_iou
from vitq import checkpoint, jobs
from vitq.convert import to_integer
from vitq.data import shapes
from vitq.export import to_program
from vitq.models import adapter_for
from vitq.models.detection.family import ROIS
from vitq.models.detection.rcnn import CascadeHeads, padded_detections
from vitq.models.timm_family import TimmSwin
from vitq.recipes import load_recipe
from vitq.restore import to_simulated
from vitq.simulate import SimModel
from vitq.sources import ModelSource, load_float

from vitq_kernels import _native, backend
from vitq_kernels.formats import FocusSpec, QuantSpec
from vitq_kernels.nn import QBlock, Window

BACKENDS = ("ref",) if _native.unavailable("cpu") else ("ref", "cpu")
SMALL = {"image_size": (64, 64), "channels": 16, "head_width": 16, "mask_layers": (16,), "proposals": (60, 20)}
SWIN = {"embed_dim": 16, "depths": (2, 1, 2, 1), "num_heads": (1, 2, 2, 2)}
VIT = {"embed_dim": 32, "depth": 2, "num_heads": 2}


def made(name: str, **kwargs) -> nn.Module:
    torch.manual_seed(0)
    return spread(timm.create_model(name, **(SMALL | kwargs)))


MODELS = {
    "mask-swin": partial(made, "mask_rcnn_shapes", **SWIN),
    "cascade-swin": partial(made, "cascade_rcnn_shapes", masks=True, **SWIN),
    "swin-v2": partial(made, "mask_rcnn_shapes", body="swinv2_tiny_window8_256", masks=False, **SWIN),
    "vit": partial(made, "mask_rcnn_shapes_vit", anchors=(8, 16, 24, 32, 48), **VIT),
}
STATES = {
    "static": {},
    "w4-dynamic": {
        "weight": QuantSpec(4, granularity="per_channel"),
        "act": QuantSpec(8, granularity="per_token", dynamic=True),
        "operands": QuantSpec(8, granularity="per_head", dynamic=True),
        "rank": 4,
        "kind": "subspace",
    },
}
SIZES = ((64, 64), (40, 72), (96, 56))


def pictures(n: int, size: tuple[int, int] = (64, 64), split: str = "test") -> list[torch.Tensor]:
    return [(shapes.scene(split, i, size=size).image - 0.5) / 0.22 for i in range(n)]


@pytest.mark.parametrize("state", STATES)
@pytest.mark.parametrize("name", MODELS)
def test_integer_is_simulated_at_every_size(name, state):
    model = MODELS[name]()
    s = minmax_state(model, torch.stack(pictures(3)), **STATES[state])
    integer, sim, family = to_integer(model, s), to_simulated(model, s), adapter_for(model)
    assert not any(type(m) is nn.Linear for m in integer.modules())
    summed = [block for block in family.blocks() if block.branches]
    assert sum(isinstance(m, QBlock) for m in integer.modules()) == len(summed)
    assert len(family.attentions()) == len(family.blocks())
    batches = [pictures(2, size) for size in SIZES] + [[pictures(1, size)[0] for size in SIZES]]
    for batch in batches:
        # Of the reference, float products of a branch depend on how many rows there are: few, in the last stage.
        for back_end in BACKENDS if state == "static" else set(BACKENDS) - {"ref"}:
            with backend(back_end), torch.no_grad():
                found = integer(batch)
                assert torch.equal(sim(batch), family.output(found)), back_end
            assert len(found) == len(batch)
    padded = integer.batched(batches[1]).tensors
    with torch.no_grad():
        maps, want = integer.backbone(padded), model.backbone(padded)
    assert sqnr(want["0"], maps["0"]) > (20 if state == "static" else 12)


def test_windows_of_another_size_are_seen():
    """Shifted windows that stay those of the model's own size, or lose their masks, give another result."""
    model = MODELS["mask-swin"]()
    s = minmax_state(model, torch.stack(pictures(3)))
    batch = pictures(2, (96, 56))
    integer, sim = to_integer(model, s), to_simulated(model, s)
    with torch.no_grad():
        assert torch.equal(sim(batch), adapter_for(model).output(integer(batch)))
    attention = integer.backbone.body.layers[0].blocks[1].attn
    attention.window.others[(24, 16), torch.device("cpu")].mask.zero_()
    assert not torch.equal(sim(batch), adapter_for(model).output(integer(batch)))
    own = attention.window.window
    object.__setattr__(own, "dynamic", False)
    with pytest.raises(ValueError, match=r"expected \(B, \*\(16, 16\), C\)"):
        integer(batch)


def test_the_body_is_described_as_by_its_own_family():
    model = MODELS["mask-swin"]()
    ours, own = adapter_for(model), TimmSwin(model.backbone.body)
    below = [f"backbone.body.{site.path}" for site in own.linears()]
    assert [site.path for site in ours.linears()][: len(below)] == below
    assert [a.bias_table for a in ours.attentions()] == [f"backbone.body.{a.bias_table}" for a in own.attentions()]
    assert [a.window for a in ours.attentions()] == [a.window for a in own.attentions()]
    assert all(isinstance(a.window, Window) and a.window.dynamic for a in ours.attentions())
    merge = ours.find("backbone.body.layers.1.downsample.reduction")
    assert (merge.role, merge.norm.weight) == ("reduction", "backbone.body.layers.1.downsample.norm.weight")
    heads = {site.path: site.role for site in ours.linears()[len(below) :]}
    assert heads == {
        **{f"roi_heads.box_head.{n}": "other" for n in ("fc6", "fc7")},
        **{f"roi_heads.box_predictor.{n}": "head" for n in ("cls_score", "bbox_pred")},
    }


def test_what_stays_float_is_listed():
    model = MODELS["cascade-swin"]()
    floating = to_integer(model, minmax_state(model, torch.stack(pictures(2)))).vitq_report.floating
    assert "convolutions" in floating["backbone.fpn"]
    assert "suppression" in floating["rpn"]
    assert "RoIAlign" in floating["roi_heads.stages.1.box_roi_pool"]
    assert "convolutions" in floating["roi_heads.stages.2.mask_head"]
    assert "roi_heads.stages.0.mask_head" not in floating


@pytest.mark.parametrize("focus", [FocusSpec(8, power=2.0, anchor="row"), FocusSpec(4, 0.0, 0.01, renormalize=True)])
def test_sequences_beyond_a_thousand_tokens(focus, monkeypatch):
    """Rows too long to stay on chip: normalized probabilities take a pass of their own."""
    monkeypatch.setattr("minmax.FOCUS", focus)
    model = made("mask_rcnn_shapes_vit", **(VIT | {"depth": 1, "patch_size": 4}))
    s = minmax_state(model, torch.stack(pictures(1)))
    integer, sim = to_integer(model, s), to_simulated(model, s)
    batch = pictures(1, (128, 136))
    seen = []
    integer.backbone.body.blocks[0].register_forward_pre_hook(lambda module, inputs: seen.append(inputs[0].shape[1]))
    with torch.no_grad():
        assert torch.equal(sim(batch), adapter_for(model).output(integer(batch)))
    assert seen == [1 + 32 * 34]


CALIBRATED = [("mask-swin", recipe) for recipe in ("minmax-w4a4", "vitq-w4a8", "repq-vit-tables", "aiqvit-coco")]


@pytest.mark.parametrize(("name", "recipe"), [*CALIBRATED, ("cascade-swin", "minmax-w4a4"), ("vit", "minmax-w4a8")])
def test_what_is_calibrated_is_what_runs(name, recipe):
    model = MODELS[name]()
    x = torch.stack(pictures(4, split="train"))
    done = jobs.quantize(model, ModelSource("x"), load_recipe(recipe, fast=True), x)
    assert done.calibrated.sim.model.held.of_image is None
    output = adapter_for(model).output
    for batch in (pictures(1, size) for size in SIZES[:2]):
        with torch.no_grad():
            assert torch.equal(done.calibrated.sim(batch), output(done.integer(batch)))
    assert {"roi_heads.stages.2.box_head.fc6", "roi_heads.box_head.fc6"} & done.state.sites.keys()
    assert done.state.data == model.vitq_data


def test_regions_are_held_while_calibrating():
    model = MODELS["cascade-swin"]()
    sim, x = SimModel(adapter_for(model)), torch.stack(pictures(3))
    fc6 = []
    with sim.family.holding(sim.model, x, 2), torch.no_grad():
        twin = sim.twin()
        for stage in twin.model.stages:
            stage.box_head.fc6.register_forward_hook(lambda module, inputs, output: fc6.append(inputs[0]))
        want = twin(x)
        assert want.shape == (3, 3 * ROIS, 7)
        # Regions stay, whatever becomes of the layers that chose them.
        twin.model.rpn.head.bbox_pred.weight.mul_(-3)
        twin.model.stages[0].box_predictor.bbox_pred.weight.mul_(5)
        assert torch.equal(twin(x), want)
        assert torch.equal(twin(x.flip(0)), want.flip(0))
        assert all(rows.shape[0] == 3 * ROIS for rows in fc6)
        with pytest.raises(ValueError, match="1 images have no RoIs"):
            sim(x[:1] + 1)
        with pytest.raises(ValueError, match="held already"), sim.family.holding(sim.model, x, 2):
            pass
        # The model itself and copies of it that were there before find their own.
        assert isinstance(model(x), list)
    assert twin(x).shape[1] == 100
    with pytest.raises(ValueError, match=r"images are \(3, 32, 64\), expected \(3, 64, 64\)"):
        sim.family.holding(sim.model, x[:, :, :32], 2)


def test_boxes_stay_within_their_image_whatever_the_batch_is_padded_to():
    model = MODELS["mask-swin"]()
    small, large = pictures(1, (40, 56))[0], pictures(1, (96, 104))[0]
    with torch.no_grad():
        alone, beside = model([small])[0], model([small, large])[0]
    for found in (alone, beside):
        assert len(found["boxes"])
        assert found["boxes"].min() >= 0
        assert found["boxes"][:, 2].max() <= 56
        assert found["boxes"][:, 3].max() <= 40
        assert torch.equal(found["scores"], found["scores"].sort(descending=True).values)
    assert model.batched([small, large]).tensors.shape == (2, 3, 96, 128)
    assert torch.equal(model.batched([small, large]).tensors[0, :, :40, :56], small)


def test_images_are_checked():
    model = MODELS["mask-swin"]()
    for bad in ([], [torch.zeros(3, 0, 8)], [torch.zeros(1, 8, 8)], torch.zeros(3, 8, 8)):
        with pytest.raises(ValueError, match=r"expected at least one \[3, H, W\]"):
            model(bad)
    with pytest.raises(ValueError, match="expected 4 or 5 sizes"):
        made("mask_rcnn_shapes", anchors=(8, 16))
    with pytest.raises(ValueError, match="body is 'resnet18', expected a model of timm whose name starts with swin"):
        made("mask_rcnn_shapes", body="resnet18")
    with pytest.raises(ValueError, match="batch_norm is True, expected False"):
        made("mask_rcnn_shapes_vit", batch_norm=True)


@pytest.mark.parametrize("name", ["mask-swin", "cascade-swin"])
def test_training_reaches_every_parameter_and_takes_empty_scenes(name):
    model = MODELS[name]().requires_grad_(True).train()
    scenes = [shapes.scene("train", i, shapes.CLEAN, (64, 64)) for i in range(3)]
    empty = shapes.scene("train", 0, shapes.Nuisance(figures=1, small=0.3), (64, 64)).target
    empty = {"boxes": empty["boxes"][:0], "labels": empty["labels"][:0], "masks": empty["masks"][:0]}
    losses = model([scene.image for scene in scenes], [scene.target for scene in scenes[:2]] + [empty])
    assert {"loss_objectness", "loss_mask", "loss_classifier"} <= losses.keys()
    assert len(losses) == (5 if name == "mask-swin" else 9)
    sum(losses.values()).backward()
    assert [n for n, p in model.named_parameters() if p.grad is None] == []
    assert all(bool(loss.isfinite()) for loss in losses.values())


def test_a_cascade_of_one_stage_is_torchvisions_head():
    model = made("mask_rcnn_shapes", **SWIN)
    cascade = copy.deepcopy(model)
    cascade.roi_heads = CascadeHeads([copy.deepcopy(model.roi_heads)])
    batch = pictures(2)
    with torch.no_grad():
        assert torch.equal(*(padded_detections(m(batch), 100) for m in (model, cascade)))


def test_stages_of_a_cascade_read_the_boxes_of_the_one_before():
    model = MODELS["cascade-swin"]()
    for stage in model.stages:
        nn.init.zeros_(stage.box_predictor.bbox_pred.weight)
        nn.init.zeros_(stage.box_predictor.bbox_pred.bias)
    # Each stage moves right by a tenth of the width: dx is weighted by 10, 20, 30.
    for weight, stage in zip((10, 20, 30), model.stages):
        assert isinstance(stage, RoIHeads)
        stage.box_predictor.bbox_pred.bias.data[0] = 0.1 * weight
    seen = []
    for stage in model.stages:
        stage.box_roi_pool.register_forward_pre_hook(lambda module, inputs: seen.append(inputs[1][0]))
    with torch.no_grad():
        model(pictures(1))
    first, second, third = seen
    moved = first + 0.1 * (first[:, 2:3] - first[:, :1]) * torch.tensor([1.0, 0, 1, 0])
    torch.testing.assert_close(second, moved.clamp(0, 64))
    inside = (second[:, 2] < 58) & (first[:, 2] < 58)
    assert bool((box_iou(third, first).diagonal() < 1)[inside].all())
    assert [s.proposal_matcher.high_threshold for s in model.stages] == [0.5, 0.6, 0.7]


def test_checkpoints_of_detectors(tmp_path):
    source = ModelSource("mask_rcnn_shapes", pretrained=False, kwargs=SMALL | SWIN)
    model = spread(load_float(source))
    done = jobs.quantize(model, source, load_recipe("minmax-w4a4"), torch.stack(pictures(2)))
    checkpoint.save(tmp_path / "c", done.state)
    loaded = checkpoint.load(tmp_path / "c")
    assert loaded.vitq_config.data.input_size == (3, 64, 64)
    batch = pictures(2, (72, 40))
    with torch.no_grad():
        assert torch.equal(*(padded_detections(m(batch), 100) for m in (loaded, done.integer)))
    with pytest.raises(ValueError, match="model is a Detector: regions and boxes depend on the image"):
        to_program(loaded, (3, 64, 64))


def test_published_sizes():
    for name, blocks in (("mask_rcnn_swin_tiny", 12), ("cascade_mask_rcnn_swin_small", 24), ("mask_rcnn_vit_base", 12)):
        with torch.device("meta"):
            model = timm.create_model(name)
            family = adapter_for(model)
        assert len(family.attentions()) == len(family.blocks()) == blocks
        fc6 = [site for site in family.linears() if site.path.endswith("fc6")]
        assert {(site.out_features, site.in_features) for site in fc6} == {(1024, 256 * 49)}
        assert len(fc6) == (3 if "cascade" in name else 1)
        scores = [site.out_features for site in family.linears() if site.path.endswith("cls_score")]
        assert set(scores) == {81}
