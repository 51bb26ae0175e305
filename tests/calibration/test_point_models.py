"""Point-cloud models: sampling against brute force, public key names, integer = simulated, degenerate clouds."""

import copy
from dataclasses import replace

import minmax
import pytest
import timm
import torch
from hypothesis import given
from hypothesis import strategies as st
from minmax import minmax_state, sqnr
from torch import nn
from vitq import checkpoint, jobs
from vitq.convert import to_integer
from vitq.export import to_program
from vitq.models import adapter_for
from vitq.models.points import (
    PointMAEClassifier,
    PointMAEPartSegmenter,
    PointTransformerClassifier,
    PointTransformerPartSegmenter,
)
from vitq.models.points.point_transformer import VectorAttention
from vitq.models.points.sampling import farthest_points, interpolate, nearest, take
from vitq.recipes import load_recipe
from vitq.restore import to_simulated
from vitq.sources import ModelSource, load_float

from vitq_kernels import _native, backend
from vitq_kernels.formats import QuantSpec
from vitq_kernels.nn import QBlock

BACKENDS = ("ref",) if _native.unavailable("cpu") else ("ref", "cpu")
TINY = {"num_points": 40, "num_group": 8, "group_size": 6, "trans_dim": 32, "num_heads": 2, "mlp_ratio": 2}
TINY |= {"encoder_width": 8}
TOKEN4 = QuantSpec(4, granularity="per_token", dynamic=True)


def spread(model: nn.Module) -> nn.Module:
    """Weights and running statistics at which every branch matters."""
    torch.manual_seed(0)
    minmax.spread(model)
    for module in model.modules():
        if isinstance(module, nn.BatchNorm1d):
            module.running_mean.normal_(std=0.3)
            module.running_var.uniform_(0.5, 2.0)
    return model


def classifier(**more) -> nn.Module:
    return spread(PointMAEClassifier(**(TINY | {"num_classes": 5, "depth": 2, "head_width": 16} | more)))


def segmenter(**more) -> nn.Module:
    arguments = TINY | {"num_classes": 7, "categories": 3, "depth": 3, "propagation": (24, 16)}
    return spread(PointMAEPartSegmenter(**(arguments | more)))


VECTOR = {"num_points": 40, "planes": (8, 16, 32), "blocks": (2, 2, 2), "strides": (1, 2, 4), "neighbours": (4, 6, 9)}
VECTOR |= {"share": 4}


def vector_classifier(**more) -> nn.Module:
    return spread(PointTransformerClassifier(num_classes=5, **(VECTOR | more)))


def vector_segmenter() -> nn.Module:
    return spread(PointTransformerPartSegmenter(num_classes=7, categories=3, **VECTOR))


PLAIN = {"classifier": classifier, "normals": lambda: classifier(in_channels=6), "parts": segmenter}
MODELS = PLAIN | {"vector": lambda: vector_classifier(in_channels=6), "vector-parts": vector_segmenter}
STATES = {
    "static": {},
    "w4a4-dynamic": {
        "weight": QuantSpec(4, granularity="per_channel"),
        "act": TOKEN4,
        "operands": QuantSpec(8, granularity="per_head", dynamic=True),
        "rank": 4,
        "kind": "subspace",
    },
}


def clouds(model: nn.Module, n: int = 5, seed: int = 1) -> torch.Tensor:
    points, channels = model.vitq_data["input_size"]
    x = torch.randn(n, points, channels, generator=torch.Generator().manual_seed(seed))
    if hasattr(model, "categories"):
        x[..., -1] = (torch.arange(n) % model.categories).float()[:, None]
    return x


def brute_farthest(points: torch.Tensor, count: int) -> list[int]:
    """One cloud, in Python."""
    rows, chosen = points.tolist(), [0]
    while len(chosen) < count:
        gap = [min(sum((a - b) ** 2 for a, b in zip(row, rows[c])) for c in chosen) for row in rows]
        chosen.append(gap.index(max(gap)))
    return chosen


@given(n=st.integers(1, 20), data=st.data())
def test_farthest_points_are_those_of_brute_force(n, data):
    count = data.draw(st.integers(1, n))
    # Few places: points repeat, and many are equally far. Small integers make every distance exact.
    x = torch.randint(-3, 4, (2, n, 3), generator=torch.Generator().manual_seed(data.draw(st.integers(0, 99)))).double()
    found = farthest_points(x, count)
    assert found.tolist() == [brute_farthest(cloud, count) for cloud in x]
    different = min(len(cloud.unique(dim=0)) for cloud in x)
    if count <= different:
        assert all(len(take(x, found)[b].unique(dim=0)) == count for b in range(2))


@given(n=st.integers(1, 20), data=st.data())
def test_neighbours_are_those_of_brute_force(n, data):
    k = data.draw(st.integers(1, n))
    generator = torch.Generator().manual_seed(data.draw(st.integers(0, 99)))
    points, queries = (torch.randint(-3, 4, (2, m, 3), generator=generator).double() for m in (n, 4))
    distance, index = nearest(queries, points, k)
    every = torch.cdist(queries, points, compute_mode="donot_use_mm_for_euclid_dist").square()
    torch.testing.assert_close(distance, every.sort(-1).values[..., :k])
    torch.testing.assert_close((take(points, index) - queries.unsqueeze(2)).square().sum(-1), distance)
    assert all(len(set(row)) == k for cloud in index.tolist() for row in cloud)


def test_sampling_refuses_more_than_there_is():
    x = torch.zeros(1, 4, 3)
    with pytest.raises(ValueError, match="count is 5, expected 1 to 4"):
        farthest_points(x, 5)
    with pytest.raises(ValueError, match="k is 5, expected 1 to 4"):
        nearest(x, x, 5)
    with pytest.raises(ValueError, match=r"shape \(4, 3\), expected \[B, N, C\]"):
        farthest_points(x[0], 1)


def test_interpolation_meets_the_points_and_weighs_by_distance():
    points = torch.tensor([[[0.0, 0, 0], [1, 0, 0], [0, 2, 0], [9, 9, 9]]])
    features = torch.tensor([[[1.0], [2.0], [4.0], [100.0]]])
    torch.testing.assert_close(interpolate(points[:, :3], points, features), features[:, :3], atol=1e-5, rtol=0)
    query = torch.tensor([[[0.5, 0.0, 0.0]]])
    weights = torch.tensor([4.0, 4.0, 1 / 4.25])
    want = (weights * features[0, :3, 0]).sum() / weights.sum()
    torch.testing.assert_close(interpolate(query, points, features)[0, 0, 0], want)
    assert interpolate(query, points[:, :1], features[:, :1]).item() == 1.0


def test_public_checkpoints_load_by_their_names():
    model = classifier()
    wanted = model.state_dict()
    conv = ("encoder.first_conv.0", "encoder.first_conv.3", "encoder.second_conv.0", "encoder.second_conv.3")
    public = {f"module.{k}": v.unsqueeze(-1) if k.removesuffix(".weight") in conv else v for k, v in wanted.items()}
    # A few names as they stand in the published files.
    for name in ("encoder.first_conv.1.running_mean", "blocks.blocks.1.attn.qkv.weight", "cls_head_finetune.8.bias"):
        assert f"module.{name}" in public
    assert public["module.encoder.second_conv.3.weight"].shape == (32, 32, 1)
    other = PointMAEClassifier(**(TINY | {"num_classes": 5, "depth": 2, "head_width": 16})).eval()
    other.load_state_dict(public)
    assert torch.equal(other(clouds(model)), model(clouds(model)))
    # Pretraining: another prefix, a decoder that is left out, and no head.
    encoder = {k: v for k, v in wanted.items() if not k.startswith("cls_")}
    pretrained = {f"module.MAE_encoder.{k}": v for k, v in encoder.items()} | {"module.mask_token": torch.zeros(1)}
    missing = other.load_state_dict(pretrained, strict=False)
    assert not missing.unexpected_keys
    assert all(name.startswith("cls_") for name in missing.missing_keys)
    with pytest.raises(RuntimeError, match="cls_head_finetune"):
        other.load_state_dict(pretrained)


def test_public_files_load_as_weights(tmp_path):
    arguments = {"depth": 1, "trans_dim": 32, "num_heads": 2, "head_width": 16, "encoder_width": 8}
    source = ModelSource("point_mae_modelnet40", pretrained=False, kwargs=arguments)
    model = load_float(source)
    public = {f"module.{name}": value for name, value in model.state_dict().items()}
    torch.save({"base_model": public, "epoch": 3, "best_metrics": {"acc": 93.8}}, tmp_path / "ckpt.pth")
    loaded = load_float(replace(source, seed=1, weights=str(tmp_path / "ckpt.pth")))
    assert all(torch.equal(a, b) for a, b in zip(loaded.state_dict().values(), model.state_dict().values()))
    torch.save({"base_model": {k: v for k, v in public.items() if "cls_head" not in k}}, tmp_path / "pretrained.pth")
    with pytest.raises(ValueError, match=r"do not fit the model.*Missing.*cls_head_finetune"):
        load_float(replace(source, weights=str(tmp_path / "pretrained.pth")))


def test_published_shapes():
    """Those of the fine-tuned checkpoints, by name."""
    with torch.device("meta"):
        shapes = {n: tuple(p.shape) for n, p in timm.create_model("point_mae_modelnet40").state_dict().items()}
        parts = {n: tuple(p.shape) for n, p in timm.create_model("point_mae_shapenetpart").state_dict().items()}
    assert shapes["encoder.second_conv.0.weight"] == (512, 512)
    assert shapes["blocks.blocks.11.mlp.fc1.weight"] == (1536, 384)
    assert "blocks.blocks.0.attn.qkv.bias" not in shapes
    assert shapes["cls_head_finetune.0.weight"] == (256, 768)
    assert shapes["cls_pos"] == (1, 1, 384)
    assert parts["propagation_0.mlp_convs.0.weight"] == (1536, 1155)
    assert parts["convs1.weight"] == (512, 3392)
    assert parts["convs3.weight"] == (50, 256)
    assert parts["label_conv.0.weight"] == (64, 16)
    assert "label_conv.0.bias" not in parts
    assert "cls_token" not in parts


@pytest.mark.parametrize("name", MODELS)
def test_every_linear_layer_is_a_site_in_execution_order(name):
    model = MODELS[name]()
    seen = []
    for path, module in model.named_modules():
        if isinstance(module, nn.Linear):
            module.register_forward_hook(lambda module, inputs, output, path=path: seen.append(path))
    model(clouds(model))
    family = adapter_for(model)
    assert [site.path for site in family.linears()] == seen
    roles = {site.path: site.role for site in family.linears()}
    assert [path for path, role in roles.items() if role == "head"] == [seen[-1]]
    first = {path for path, role in roles.items() if role == "patch_embed"}
    if name in PLAIN:
        assert first == {"encoder.first_conv.0", "pos_embed.0"}
    else:
        assert first == {"enc1.0.linear"} | {path for path in seen if path.endswith("linear_p.0")}


@pytest.mark.parametrize("state", STATES)
@pytest.mark.parametrize("name", MODELS)
def test_integer_logits_are_the_simulated_ones(name, state):
    model = MODELS[name]()
    x = clouds(model)
    s = minmax_state(model, x, **STATES[state])
    integer, sim = to_integer(model, s), to_simulated(model, s)
    assert not any(isinstance(m, nn.Linear | nn.Dropout) for m in integer.modules())
    assert sum(isinstance(m, QBlock) for m in integer.modules()) == len(adapter_for(model).blocks())
    for back_end in BACKENDS:
        with backend(back_end), torch.no_grad():
            logits = integer(x)
            assert torch.equal(sim(x), logits), back_end
    if state == "static":
        assert sqnr(model(x), logits) > 15


def test_a_wrong_scale_is_seen():
    model = classifier()
    x = clouds(model)
    s = minmax_state(model, x)
    site = s.sites["encoder.second_conv.0"]
    wrong = replace(s, sites=s.sites | {"encoder.second_conv.0": replace(site, weight_scale=site.weight_scale * 1.01)})
    assert not torch.equal(to_simulated(model, s)(x), to_integer(model, wrong)(x))


def test_what_stays_float_is_listed():
    model = segmenter()
    report = to_integer(model, minmax_state(model, clouds(model))).vitq_report
    assert {"group_divider", "encoder", "pos_embed"} <= report.floating.keys()
    assert {"encoder.second_conv.1", "norm", "bns1", "propagation_0.mlp_bns.0"} <= report.floating.keys()
    assert "blocks.blocks.2.attn" in report.integer


@pytest.mark.parametrize("name", MODELS)
def test_degenerate_clouds(name):
    model = MODELS[name]()
    integer = to_integer(model, minmax_state(model, clouds(model)))
    for m in (model, integer):
        x = clouds(model, 2)
        x[0, :, :3] = 0.25
        logits = m(x)
        assert bool(logits.isfinite().all())
        # One place without extent: only where it lies matters, and each of its points is a part like any other.
        if name.endswith("parts"):
            torch.testing.assert_close(logits[0], logits[0, :1].expand_as(logits[0]))
        with pytest.raises(ValueError, match="clouds have 1 points, expected at least 8"):
            m(x[:, :1])
        with pytest.raises(ValueError, match="NaN or Inf"):
            m(x.masked_fill(torch.arange(x.shape[-1]) == 1, torch.nan))
        with pytest.raises(ValueError, match="expected \\[B, N, "):
            m(x[..., :2])
        assert m(x[:0]).shape[0] == 0


def test_categories_are_checked():
    model = segmenter()
    x = clouds(model)
    x[..., -1] = 3
    with pytest.raises(ValueError, match="categories of clouds are 3 to 3, expected 0 to 2"):
        model(x)


def test_vector_attention_by_hand():
    """One point after another, one neighbour after another."""
    layer = spread(VectorAttention(6, 3)).double()
    points, x = torch.randn(1, 5, 3).double(), torch.randn(1, 5, 6).double()
    near = nearest(points, points, 3)[1]
    want = torch.zeros(5, 6).double()
    for i in range(5):
        scores, values = [], []
        for j in near[0, i].tolist():
            delta = layer.linear_p((points[0, j] - points[0, i]).view(1, 3))[0]
            difference = layer.linear_k(x[0, j]) - layer.linear_q(x[0, i]) + delta
            scores.append(layer.linear_w(difference.view(1, -1))[0])
            values.append(layer.linear_v(x[0, j]) + delta)
        weight = torch.stack(scores).softmax(0)
        want[i] = sum(w.repeat(3) * value for w, value in zip(weight, values))
    torch.testing.assert_close(layer(points, x, near)[0], want)


def test_published_names_of_point_transformer():
    with torch.device("meta"):
        shapes = {
            n: tuple(p.shape) for n, p in timm.create_model("point_transformer_shapenetpart").state_dict().items()
        }
    assert shapes["enc2.0.linear.weight"] == (64, 35)
    assert shapes["enc5.2.transformer2.linear_w.2.weight"] == (64, 512)
    assert shapes["dec5.0.linear1.0.weight"] == (512, 1024)
    assert "dec5.0.linear2.1.weight" not in shapes
    assert shapes["dec4.0.linear2.0.weight"] == (256, 512)
    assert shapes["dec4.0.linear1.0.weight"] == (256, 256)
    assert shapes["cls.3.weight"] == (50, 32)


def test_vector_attention_is_listed_as_float():
    model = vector_classifier()
    report = to_integer(model, minmax_state(model, clouds(model))).vitq_report
    assert "softmax" in report.floating["enc2.1.transformer2"]
    assert "sampling" in report.floating["enc2.0"]
    assert {"enc2.1.transformer2.linear_w.2", "enc2.0.linear", "cls.3"} <= report.integer.keys()


def test_order_of_points_does_not_matter_beyond_the_first():
    model = classifier()
    x = clouds(model)
    order = torch.cat([torch.zeros(1, dtype=torch.int64), 1 + torch.randperm(39)])
    torch.testing.assert_close(model(x[:, order]), model(x), atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("recipe", ["minmax-w4a4", "vitq-w4a8", "aiqvit-w4a8", "repq-vit-tables"])
@pytest.mark.parametrize("name", ["classifier", "parts", "vector-parts"])
def test_recipes_run_and_what_is_calibrated_is_what_runs(name, recipe):
    model = MODELS[name]()
    x = clouds(model, 48)
    source = ModelSource("point_mae_primitives", pretrained=False)
    done = jobs.quantize(model, source, load_recipe(recipe, fast=True), x)
    with torch.no_grad():
        assert torch.equal(done.calibrated.sim(x), done.integer(x))
    assert done.state.data["input_size"] == model.vitq_data["input_size"]


def test_checkpoints_of_clouds(tmp_path):
    source = ModelSource("point_mae_parts", pretrained=False, kwargs={"depth": 3, "trans_dim": 32, "num_heads": 2})
    model = load_float(source)
    x = torch.randn(2, 512, 4)
    x[..., 3] = 1
    done = jobs.quantize(model, source, load_recipe("minmax-w4a4"), x)
    checkpoint.save(tmp_path / "c", done.state)
    loaded = checkpoint.load(tmp_path / "c")
    assert loaded.vitq_config.data.input_size == (512, 4)
    assert torch.equal(loaded(x), done.integer(x))


@pytest.mark.parametrize("name", ["classifier", "vector-parts"])
def test_export_takes_any_number_of_clouds(name):
    model = MODELS[name]()
    integer = to_integer(model, minmax_state(model, clouds(model)))
    program = to_program(integer, model.vitq_data["input_size"])
    x = clouds(model, 3)
    with torch.no_grad():
        assert torch.equal(program.module()(x), integer(x))


def test_models_are_refused_that_cannot_be():
    with pytest.raises(ValueError, match="depth is 4, expected a multiple of 3"):
        segmenter(depth=4)
    with pytest.raises(ValueError, match="in_channels is 2"):
        classifier(in_channels=2)
    with pytest.raises(ValueError, match="point_mae_modelnet40 cannot be had"):
        load_float(ModelSource("point_mae_modelnet40"))
    with pytest.raises(ValueError, match=r"expected a float batch \[B, N, C\]"):
        jobs.quantize(classifier(), ModelSource("x"), load_recipe("minmax"), torch.zeros(2, 3, 8, 8))
    assert isinstance(copy.deepcopy(classifier()), PointMAEClassifier)
