"""Which of a GPU's two back ends serves a call: by an invented table, for a GPU that is not there."""

import json

import pytest
import torch

from vitq_kernels import backend, backends
from vitq_kernels.formats import QuantSpec
from vitq_kernels.nn.base import choose_layout
from vitq_kernels.triton import host
from vitq_kernels.tuning import serving

S4 = "int4_k64x2_s4"
ROWS = [
    # M, N, K, speed-up of the C++ kernel
    ["qlinear", "int8", 200, 768, 768, 0.8],
    ["qlinear", "int8", 1600, 768, 768, 1.2],
    ["qlinear", "int8", 6400, 768, 768, 1.01],  # noise
    ["qlinear", "int8", 200, 4096, 1024, 1.5],
    ["qlinear", S4, 1600, 768, 768, 1.9],
    ["qlinear", S4, 1600, 96, 96, 0.9],
    ["quantize", "", 200, 768, 0.9],
    ["quantize", "", 6400, 768, 1.1],
]


@pytest.fixture
def gpu(monkeypatch, tmp_path):
    """A GPU "Some GPU 1" for which both back ends are live."""
    for op in ("qlinear", "qlinear_quantize", "quantize", "layer_norm_quantize"):
        for name in ("triton", "cuda"):
            found = backends.table()[op][name]
            live = backends.Implementation(name, found.fn, lambda device: None, found.layouts, lambda device: ())
            monkeypatch.setitem(backends._table[op], name, live)
    monkeypatch.setattr(backends, "_ENVIRONMENT", None)
    monkeypatch.setattr(host, "name", lambda: "Some GPU 1")
    monkeypatch.setattr(serving, "FOLDER", tmp_path)
    backends.forget()
    yield tmp_path
    backends.forget()


@pytest.fixture
def table(gpu):
    (gpu / "some_gpu_1.cuda.json").write_text(json.dumps({"gpu": "Some GPU 1", "commit": "", "date": "", "rows": ROWS}))
    return gpu


def name(op, layout, *sizes, **kw):
    return backends.resolve(op, "cuda", layout, sizes=sizes, **kw).name


def test_triton_serves_every_call_without_a_table(gpu):
    assert name("qlinear", "int8", 1600, 768, 768) == "triton"
    assert name("quantize", None, 6400, 768) == "triton"


@pytest.mark.parametrize(
    ("sizes", "want"),
    [
        ((1, 768, 768), "triton"),
        ((565, 768, 768), "triton"),  # halfway from 200 to 1600 on a log scale: 565.7
        ((566, 768, 768), "cuda"),
        ((1600, 768, 768), "cuda"),
        ((3200, 768, 768), "cuda"),
        ((3201, 768, 768), "triton"),
        ((10**6, 768, 768), "triton"),
        ((0, 768, 768), "triton"),
        ((200, 3072, 1024), "cuda"),  # nearer to 4096 x 1024
        ((10**6, 3072, 1024), "cuda"),
        ((200, 1, 1), "triton"),
    ],
)
def test_the_nearest_shape_decides(table, sizes, want):
    assert name("qlinear", "int8", *sizes) == want


def test_what_was_not_measured_is_not_served(table):
    assert name("qlinear", "int4_k64x2", 1600, 768, 768) == "triton"
    assert name("qlinear_quantize", "int8", 1600, 768, 768) == "triton"
    assert name("layer_norm_quantize", None, 6400, 768) == "triton"
    assert name("quantize", None, 6400, 768) == "cuda"
    assert backends.resolve("qlinear", "cpu", "int8_n16k4", sizes=(1600, 768, 768), pin="cpu").name == "cpu"


def test_a_pin_wins(table):
    assert name("qlinear", "int8", 1600, 768, 768, pin="triton") == "triton"
    assert name("qlinear", "int8", 200, 768, 768, pin="cuda") == "cuda"
    with backend("triton"):
        assert name("qlinear", "int8", 1600, 768, 768) == "triton"
        assert (
            backends.layouts("qlinear", torch.device("cuda"), 768, 768) == backends.table()["qlinear"]["triton"].layouts
        )


def test_a_back_end_that_is_not_there_serves_nothing(table, monkeypatch):
    found = backends.table()["qlinear"]["cuda"]
    gone = backends.Implementation("cuda", found.fn, lambda device: "not built", found.layouts)
    monkeypatch.setitem(backends._table["qlinear"], "cuda", gone)
    assert name("qlinear", "int8", 1600, 768, 768) == "triton"


def test_another_gpu_that_is_compiled_for_takes_triton(table):
    with host.assuming(host.Gpu(90, "NVIDIA H200", 132)):
        assert name("qlinear", "int8", 1600, 768, 768) == "triton"


def test_int4_products_are_chosen_where_they_win(table, monkeypatch):
    """The layout is chosen once, for every M; a call of an M where they lose goes to Triton, which reads it, too."""
    triton = backends.table()["qlinear"]["triton"]
    shipped = backends.Implementation("triton", triton.fn, lambda device: None, triton.layouts, lambda device: (S4,))
    monkeypatch.setitem(backends._table["qlinear"], "triton", shipped)
    four, device = QuantSpec(4), torch.device("cuda")
    assert choose_layout(backends.layouts("qlinear", device, 768, 768), four, four) == S4
    assert choose_layout(backends.layouts("qlinear", device, 96, 96), four, four) == "int4_k64x2"
    assert name("qlinear", S4, 1600, 768, 768) == "cuda"
    assert name("qlinear_quantize", S4, 1600, 768, 768) == "triton"


def test_traces_choose_as_calls_do(table, monkeypatch):
    def which(x):
        serves = backends.resolve("qlinear", "cuda", "int8", sizes=(x.shape[0], 768, 768)).name
        return x + (1.0 if serves == "cuda" else 0.0)

    compiled = torch.compile(which, backend="eager", fullgraph=True, dynamic=True)
    for m, want in ((100, 0.0), (1000, 1.0), (1500, 1.0), (9000, 0.0), (101, 0.0)):
        assert compiled(torch.zeros(m)).unique().tolist() == [want]

    class Model(torch.nn.Module):
        def forward(self, x):
            return which(x)

    # A program for any M: not every one of the table's is won.
    m = torch.export.Dim("m", min=2, max=10_000)
    program = torch.export.export(Model(), (torch.zeros(1600),), dynamic_shapes=({0: m},), strict=True)
    assert not program.module()(torch.zeros(1600)).any()
