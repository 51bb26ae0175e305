"""The ONNX form: in float64 the oracle's function, in ONNX Runtime torch's, with the codes stored at their width."""

import sys

import numpy as np
import pytest
import torch
from minmax import deciding, images, minmax_state, simulated, spread, sqnr, swin, vit
from timm.models.deit import VisionTransformerDistilled
from vitq import qdq
from vitq.models.points import PointMAEClassifier
from vitq.restore import to_simulated

from vitq_kernels.formats import FocusSpec, LevelTable, QuantSpec

onnx = pytest.importorskip("onnx")
onnxruntime = pytest.importorskip("onnxruntime")
pytest.importorskip("onnxscript")

TABLE = LevelTable((-127, -96, -70, -52, -38, -26, -16, -8, 0, 9, 18, 30, 45, 64, 90, 127))
PER_TOKEN = QuantSpec(8, granularity="per_token", dynamic=True)
FOUR = QuantSpec(4, granularity="per_channel")
FORMATS = {
    "static": {},
    "static, four bits": {
        "weight": FOUR,
        "act": QuantSpec(4, symmetric=False),
        "operands": QuantSpec(4, granularity="per_tensor"),
        "focus": FocusSpec(4),
    },
    "static, table": {"act": QuantSpec(4, table=TABLE), "focus": FocusSpec(4, b1=0.02, b2=0.9, renormalize=True)},
    "dynamic, subspace": {
        "weight": FOUR,
        "act": PER_TOKEN,
        "operands": QuantSpec(8, granularity="per_head", dynamic=True),
        "rank": 4,
        "kind": "subspace",
    },
    "dynamic": {"act": PER_TOKEN, "operands": QuantSpec(8, dynamic=True), "focus": FocusSpec(8, b1=0.001)},
    "dynamic, table, error branch": {
        "weight": QuantSpec(4, granularity="per_channel", table=TABLE),
        "act": QuantSpec(4, granularity="per_token", dynamic=True, table=TABLE),
        "operands": QuantSpec(4, granularity="per_tensor", dynamic=True),
        "focus": FocusSpec(3, b1=0.01, power=3.0, below="zero"),
        "rank": 4,
    },
    "weights only": {"weight_only": ("head", "blocks.0.mlp.fc1", "layers.0.blocks.0.mlp.fc1")},
}
MODELS = {
    "vit": lambda: vit(depth=1),
    "deit": lambda: vit(VisionTransformerDistilled, depth=1),
    "swin": lambda: swin(depths=(2,), num_heads=(2,)),
}


def sim_of(model, **how):
    return to_simulated(model, minmax_state(model, images(model), **how))


@torch.no_grad()
@pytest.mark.parametrize("format", FORMATS)
@pytest.mark.parametrize("name", MODELS)
def test_is_the_function_of_the_oracle(name, format):
    """In float64 hardly a value lies at the middle between two codes; what is left are constants kept in float32."""
    model = MODELS[name]()
    state = minmax_state(model, images(model), **FORMATS[format])
    x = images(model, 5, seed=2).double()
    want = simulated(model, state)(x)
    want = model.forward_head(want) if want.dim() > 2 else want
    got = qdq.to_qdq(to_simulated(model, state)).double()(x)
    error = (got - want).abs().amax(1) / want.abs().max()
    assert error.median() <= 1e-6
    assert error.max() <= 1e-3


def run(proto, x):
    session = onnxruntime.InferenceSession(proto.SerializeToString(), providers=["CPUExecutionProvider"])
    return torch.from_numpy(session.run([qdq.OUTPUT], {qdq.INPUT: x.numpy()})[0])


@pytest.mark.slow
@pytest.mark.parametrize(
    ("name", "format"),
    [
        ("vit", "static"),
        ("vit", "dynamic"),
        ("vit", "dynamic, table, error branch"),
        ("deit", "static, four bits"),
        ("vit", "weights only"),
        ("swin", "static"),
        ("swin", "dynamic, subspace"),
    ],
)
def test_runs_in_onnx_runtime_at_any_batch_size(name, format):
    model = MODELS[name]()
    sim = sim_of(model, **FORMATS[format])
    graph = qdq.to_qdq(sim)
    x = images(model, 5, seed=2)
    proto = qdq.to_proto(graph, x.shape[1:])
    onnx.checker.check_model(proto, full_check=True)
    summary = qdq.summary(proto, proto.ByteSize())
    layers, attentions = sum(linear.act.spec is not None for linear in sim.linears.values()), len(sim.attentions)
    affine = sum(a.focus.spec.affine for a in sim.attentions.values())
    if format.startswith("dynamic"):
        assert (summary.quantize, summary.dequantize, summary.products) == (affine, attentions, layers)
    else:
        # Inputs, operands and probabilities; the weights besides.
        quantize = layers + attentions + affine
        assert (summary.quantize, summary.products) == (quantize, 0)
        assert summary.dequantize == layers + attentions + attentions + layers
    for b in (1, 5):
        assert sqnr(graph(x[:b]), run(proto, x[:b])) > 50  # a code here and there at a tie
    fixed = qdq.to_proto(graph, x.shape[1:], batch=2)
    assert [d.dim_value for d in fixed.graph.input[0].type.tensor_type.shape.dim] == [2, *x.shape[1:]]


@pytest.mark.slow
def test_a_classifier_of_clouds(tmp_path):
    torch.manual_seed(0)
    small = {"num_points": 40, "num_group": 8, "group_size": 6, "encoder_width": 8, "head_width": 16}
    model = spread(PointMAEClassifier(**small, trans_dim=32, depth=1, num_heads=2, mlp_ratio=2, num_classes=5))
    clouds = torch.randn(5, 40, 3)
    sim = to_simulated(model, minmax_state(model, clouds))
    qdq.write(sim, tmp_path / "a.onnx", (40, 3))
    proto = onnx.load(tmp_path / "a.onnx")
    for b in (1, 5):
        assert sqnr(sim(clouds[:b]), run(proto, clouds[:b])) > 30


@pytest.mark.parametrize("act", [None, PER_TOKEN])
def test_four_bits_take_four(act, tmp_path):
    model = vit(depth=1)
    sim = sim_of(model, weight=FOUR, act=act)
    written = qdq.write(sim, tmp_path / "new" / "a.onnx", images(model).shape[1:])
    assert (written.int4, written.int8) == (6, 0)
    assert written.bytes == (tmp_path / "new" / "a.onnx").stat().st_size
    proto = onnx.load(tmp_path / "new" / "a.onnx")
    stored = {t.name: t for t in proto.graph.initializer if t.data_type == onnx.TensorProto.INT4}
    for path, linear in sim.linears.items():
        tensor = stored[f"model.{path}.weight"]
        assert len(tensor.raw_data) == -(-linear.weight.numel() // 2)
        codes = onnx.numpy_helper.to_array(tensor).astype(np.float32)
        assert np.array_equal(codes, linear.codes().T.numpy())
    # Neither where it was made nor by what.
    assert str(tmp_path).encode() not in proto.SerializeToString()
    assert b"site-packages" not in proto.SerializeToString()


def test_refuses_what_it_cannot_say(tmp_path):
    model = vit(depth=1)
    size = images(model).shape[1:]
    sim = sim_of(model)
    for name, reason in (("a.pt2", r"ends in '\.pt2', expected \.onnx"), (".", "expected .onnx")):
        with pytest.raises(ValueError, match=reason):
            qdq.write(sim, tmp_path / name, size)
    dynamic = minmax_state(model, images(model), **FORMATS["dynamic, subspace"])
    with pytest.raises(ValueError, match=r"'blocks\.0\.attn' decides token-wise bits, which QDQ cannot say"):
        qdq.to_qdq(to_simulated(model, deciding(model, dynamic, share=0.5, low=4)))
    file = tmp_path / "a.onnx"
    file.write_text("old")
    with pytest.raises(ValueError, match="exists already"):
        qdq.write(sim, file, size)
    with pytest.raises(ValueError, match="attn_mask or is_causal is given"):
        qdq.to_qdq(sim).model.blocks[0].attn(torch.zeros(1, 4, 32), attn_mask=torch.ones(4, 4))
    assert file.read_text() == "old"
    assert list(tmp_path.iterdir()) == [file]


def test_a_failed_export_leaves_the_old_file(tmp_path, monkeypatch):
    model = vit(depth=1)
    sim, file = sim_of(model), tmp_path / "a.onnx"
    file.write_text("old")

    def fails(*_, **__):
        raise torch.onnx.errors.OnnxExporterError("no operator\nfor it")

    monkeypatch.setattr(torch.onnx, "export", fails)
    with pytest.raises(ValueError, match=r"torch\.onnx fails: no operator for it"):
        qdq.write(sim, file, images(model).shape[1:], overwrite=True)
    assert file.read_text() == "old"
    assert list(tmp_path.iterdir()) == [file]


@pytest.mark.parametrize("missing", ["onnx", "onnxscript"])
def test_says_which_package_is_missing(missing, tmp_path, monkeypatch):
    model = vit(depth=1)
    monkeypatch.setitem(sys.modules, missing, None)  # neither found nor imported
    with pytest.raises(ValueError, match=rf"ONNX needs {missing}, expected pip install 'vitq-kernels\[onnx\]'"):
        qdq.write(sim_of(model), tmp_path / "a.onnx", images(model).shape[1:])
    assert not list(tmp_path.iterdir())
