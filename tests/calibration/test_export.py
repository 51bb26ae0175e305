"""Whole converted models compiled, exported and packaged: the same logits, one graph, any batch size."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from minmax import images, minmax_state, swin, vit
from timm.models.deit import VisionTransformerDistilled
from torch import nn
from torch.utils import _pytree as pytree
from vitq import export
from vitq.convert import to_integer

from vitq_kernels import _native, backends
from vitq_kernels.formats import QuantSpec
from vitq_kernels.triton import host, warmup

DYNAMIC = {
    "act": QuantSpec(8, granularity="per_token", dynamic=True),
    "operands": QuantSpec(8, granularity="per_head", dynamic=True),
    "weight": QuantSpec(4, granularity="per_channel"),
    "rank": 4,
}
MODELS = {
    "vit": (lambda: vit(depth=1), DYNAMIC),
    "deit": (lambda: vit(VisionTransformerDistilled, depth=1), {}),
    "swin": (lambda: swin(depths=(2,), num_heads=(2,)), DYNAMIC),
}
CASES = [("vit", "ref"), ("swin", "ref")]  # what DeiT adds are modules of torch's
if not _native.unavailable("cpu"):
    CASES += [(name, "cpu") for name in MODELS]


def integer(name: str, backend: str | None = None) -> tuple[nn.Module, torch.Tensor]:
    """A converted model and 5 images."""
    make, how = MODELS[name]
    model = make()
    return to_integer(model, minmax_state(model, images(model), **how), backend), images(model, 5)


# One operator on a GPU, and what it is made of on the CPU.
FUSED = {"vitq.qlinear_norm_quantize.default": ["vitq.qlinear.default", "vitq.layer_norm_quantize.default"]}


def operators(graph: torch.fx.Graph) -> list[str]:
    """Those of ``graph``, in order, that Triton serves."""
    served = {f"{op.replace('::', '.')}.default" for op in host.kernels}
    names = [str(node.target) for node in graph.nodes if node.op == "call_function"]
    return [part for name in names if name in served for part in FUSED.get(name, [name])]


@pytest.mark.parametrize(("name", "backend"), CASES)
def test_compiles_to_one_graph(name, backend):
    model, x = integer(name, backend)
    torch._dynamo.reset()
    with torch.no_grad():
        assert torch.equal(torch.compile(model, fullgraph=True, backend="aot_eager")(x), model(x))


@pytest.mark.parametrize(("name", "backend"), CASES)
def test_exports_with_any_batch_size(name, backend):
    model, x = integer(name, backend)
    program = export.to_program(model, x.shape[1:]).module()
    for b in (1, 2, 5):
        assert torch.equal(program(x[:b]), model(x[:b]))


@pytest.mark.skipif(not host.INSTALLED or host.INTERPRETED, reason="needs triton, not interpreted")
@pytest.mark.parametrize("name", MODELS)
def test_traces_for_a_gpu_hold_its_operators(name):
    """Without a GPU: what Triton serves stays an operator, of the name and as often as on the CPU."""
    model, x = integer(name)
    want = operators(export.to_program(model, x.shape[1:]).graph)
    with warmup.without_device(warmup.find_gpu("h200")):
        model.to("cuda", torch.float16)
        assert {backends.resolve("qlinear", "cuda", layout).name for layout in ("int8", "int4_k64x2")} == {"triton"}
        program = export.to_program(model, x.shape[1:])
        got = operators(program.graph)
        values = [value for node in program.graph.nodes for value in pytree.tree_leaves(node.meta.get("val"))]
        devices = {value.device.type for value in values if isinstance(value, torch.Tensor)}
    assert got == want
    assert len(want) > 6
    assert devices == {"cuda"}


@pytest.mark.parametrize("format", ["exported", pytest.param("aoti", marks=pytest.mark.slow)])
def test_loads_in_a_process_of_its_own(format, tmp_path):
    """With torch and the kernels alone; logits as here, but for sums that a compiler may order otherwise."""
    model, x = integer("vit")
    file, images_file, out = tmp_path / "model.pt2", tmp_path / "x.pt", tmp_path / "y.pt"
    export.write(model, file, x.shape[1:], format)
    assert [path.name for path in tmp_path.iterdir()] == ["model.pt2"]
    torch.save(x, images_file)
    load = {
        "exported": "torch.export.load(file).module()",
        "aoti": "torch._inductor.aoti_load_package(file)",
    }[format]
    code = f"""
import sys, torch, vitq_kernels
file, x, out = sys.argv[1:]
model = {load}
torch.save([model(x) for x in (torch.load(x), torch.load(x)[:1])], out)
assert not {{"timm", "vitq"}} & set(sys.modules)
"""
    environment = {**os.environ, "PYTHONPATH": str(Path(backends.__file__).parents[1])}
    command = [sys.executable, "-c", code, str(file), str(images_file), str(out)]
    run = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=300)
    assert run.returncode == 0, run.stderr[-2000:]
    for got, b in zip(torch.load(out), (5, 1)):
        want = model(x[:b])
        if format == "exported":
            assert torch.equal(got, want)
        else:
            # The final LayerNorm of 32 values in another order: 32 ulp; no code of the head rounds the other way.
            assert (got - want).abs().max() <= 32 * torch.finfo(torch.float32).eps * want.abs().max()


def test_refuses_what_it_cannot_write(tmp_path):
    model, x = integer("deit")
    size = x.shape[1:]
    for name, format, reason in (
        ("a.pt2", "onnx", "format is 'onnx', expected one of exported, aoti"),
        ("a.bin", "exported", r"ends in '\.bin', expected \.pt2"),
        (".", "exported", r"expected \.pt2"),
    ):
        with pytest.raises(ValueError, match=reason):
            export.write(model, tmp_path / name, size, format)
    (tmp_path / "folder.pt2").mkdir()
    with pytest.raises(ValueError, match="is a folder"):
        export.write(model, tmp_path / "folder.pt2", size)
    file = tmp_path / "a.pt2"
    file.write_text("old")
    with pytest.raises(ValueError, match="exists already"):
        export.write(model, file, size)
    export.write(model, file, size, overwrite=True)
    assert torch.equal(torch.export.load(file).module()(x), model(x))


def test_a_failed_export_leaves_the_old_file(tmp_path, monkeypatch):
    model, x = integer("deit")
    file = tmp_path / "a.pt2"
    file.write_text("old")

    def fails(*_, **__):
        raise RuntimeError("no C++ compiler\nfound")

    monkeypatch.setattr(torch._inductor, "aoti_compile_and_package", fails)
    with pytest.raises(ValueError, match=r"AOTInductor fails: no C\+\+ compiler found"):
        export.write(model, file, x.shape[1:], "aoti", overwrite=True)
    assert file.read_text() == "old"
    assert list(tmp_path.iterdir()) == [file]
