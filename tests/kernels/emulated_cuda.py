"""The C++ GPU kernels beyond what every back end is tested for: test_cuda_emulated.py runs this on the emulation,
bench/gpu/suite.py on a GPU, where what is set of the emulation changes nothing."""

import os
from dataclasses import replace

import pytest
import selected
import test_qlinear as linear_tests
import torch
from test_nn import linear_state

import vitq_kernels as vk
from vitq_kernels import backends
from vitq_kernels.formats import LinearState, QuantSpec
from vitq_kernels.nn import QLinear
from vitq_kernels.nn.base import choose_layout
from vitq_kernels.packing import pack_weight

S4 = "int4_k64x2_s4"
DYNAMIC4 = QuantSpec(4, granularity="per_token", dynamic=True)


@pytest.fixture(autouse=True)
def cuda():
    assert selected.CUDA
    with vk.backend("cuda"):
        yield


def generator(seed=0):
    return torch.Generator().manual_seed(seed)


def test_layouts_by_formats():
    weight, table = QuantSpec(4, granularity="per_channel"), linear_tests.TABLE
    layouts = backends.resolve("qlinear", "cpu").layouts
    assert choose_layout(layouts, weight, DYNAMIC4) == S4
    assert choose_layout(layouts, weight, QuantSpec(4, symmetric=False)) == S4
    wide, levels = QuantSpec(8), replace(QuantSpec(4), table=table)
    for act in (wide, levels, None):
        assert choose_layout(layouts, weight, act) == "int4_k64x2"
    assert choose_layout(layouts, replace(weight, table=table), DYNAMIC4) == "int4_k64x2"
    assert choose_layout(layouts, QuantSpec(5, granularity="per_channel"), DYNAMIC4) == "int8"
    with pytest.raises(ValueError, match="table is given with layout 'int4_k64x2_s4'"):
        pack_weight(table.lut()[torch.zeros(2, 2, dtype=torch.long)], 4, S4, table)


@pytest.mark.parametrize(("m", "k", "n", "r"), [(1, 1, 1, 0), (33, 200, 70, 0), (130, 384, 24, 16), (3, 1100, 130, 5)])
@pytest.mark.parametrize("zero_point", [0, -3])
def test_int4_products(m, k, n, r, zero_point):
    """Activations and weights in [−8, 7], extremes included: exact, as by way of int8."""
    g = generator(m + k)
    x, weight, w_scale, kw = linear_tests.make_case(g, m, k, n, r, "w4", True, torch.float16, "gelu_erf")
    x = replace(x, q=torch.randint(-8, 8, (m, k), generator=g).to(torch.int8), zero_point=zero_point)
    by_int4 = replace(weight, layout=S4)
    got = vk.qlinear(x, by_int4, w_scale, **kw)
    assert torch.equal(got, vk.qlinear(x, weight, w_scale, **kw))
    y, bound = linear_tests.exact_qlinear(x, weight, w_scale, kw)
    linear_tests.assert_within(got, y, bound)


@selected.needs_emulation
def test_a_layer_of_four_bits():
    state: LinearState = linear_state(24, 72, DYNAMIC4, 4, rank=3)
    layer, x = QLinear.from_state(state), torch.randn(5, 72, generator=generator())
    assert layer.layout == S4
    with vk.backend("ref"):
        want = QLinear.from_state(state)(x)
    # The branch multiplies in float16 here.
    assert (layer(x) - want).norm() < 2e-3 * want.norm()


@pytest.mark.parametrize("processors", ["1", "7", "64"])
@pytest.mark.parametrize("name", ["w8", "w4 table"])
def test_split_sums_are_the_whole_ones(processors, name, monkeypatch):
    """Few tiles and a long K: shares of it, summed by whoever comes last, are the same integers."""
    monkeypatch.setenv("VITQ_EMULATED_PROCESSORS", processors)
    case = linear_tests.make_case(generator(), 65, 2100, 40, 0, name, False)
    x, weight, w_scale, kw = case
    got = vk.qlinear(x, weight, w_scale, **kw)
    with vk.backend("ref"):
        assert torch.equal(got, vk.qlinear(x, weight, w_scale, **kw))


@pytest.mark.parametrize("k", [64, 70])
def test_groups_of_a_large_tile(k):
    """128 columns with a scale of their own: inside a tile, or behind it where rows start anywhere."""
    x, weight, w_scale, kw = linear_tests.make_case(generator(), 20, k, 256, 0, "w8", True)
    a = vk.ActQuant(groups=2)
    got, want = (
        vk.qlinear_quantize(x, weight, w_scale, out=a, **kw),
        vk.quantize(vk.qlinear(x, weight, w_scale, **kw), a),
    )
    assert torch.equal(got.q, want.q)
    assert torch.equal(got.scale, want.scale)


@pytest.mark.parametrize("seed", ["1", "2", "3"])
def test_any_order_of_threads(seed, monkeypatch):
    monkeypatch.setenv("VITQ_EMULATION_SEED", seed)
    assert os.environ["VITQ_EMULATION_SEED"] == seed
    for m, k, n in ((70, 400, 200), (200, 144, 260)):
        x, weight, w_scale, kw = linear_tests.make_case(generator(), m, k, n, 16, "w4", True, torch.bfloat16)
        got = vk.qlinear(x, weight, w_scale, **kw)
        monkeypatch.setenv("VITQ_EMULATION_SEED", "0")
        assert torch.equal(got, vk.qlinear(x, weight, w_scale, **kw))


@pytest.mark.parametrize("k", [64, 70])
@pytest.mark.parametrize("name", ["w4", "w4 table"])
def test_weights_that_start_anywhere(name, k):
    """Views into one buffer, as some checkpoints hold all of a model's weights."""
    x, weight, w_scale, kw = linear_tests.make_case(generator(), 9, k, 24, 0, name, True)
    want = vk.qlinear(x, weight, w_scale, **kw)

    def moved(v, offset):
        return None if v is None else torch.cat([v.new_zeros(offset), v.flatten()])[offset:].reshape(v.shape)

    at_8 = replace(weight, data=moved(weight.data, 8), lut=moved(weight.lut, 1))
    assert at_8.data.data_ptr() % 16 == 8
    assert torch.equal(vk.qlinear(x, at_8, w_scale, **kw), want)


@selected.needs_emulation
def test_what_the_library_refuses():
    x, weight, w_scale, _ = linear_tests.make_case(generator(), 3, 16, 5, 0, "w8", False)
    op, flat = torch.ops.vitq_cuda.qlinear.default, (5, 16, weight.col_sum, None, w_scale, *[None] * 2, 0, None, None)
    with pytest.raises(RuntimeError, match="layout is 3, expected int8"):
        op(x.q, x.scale, 0, None, weight.data, 3, *flat, torch.float32)
    with pytest.raises(RuntimeError, match="weight has 64 elements, expected 80"):
        op(x.q, x.scale, 0, None, weight.data[:4], 0, *flat, torch.float32)
    with pytest.raises(RuntimeError, match="out_dtype has dtype"):
        op(x.q, x.scale, 0, None, weight.data, 0, *flat, torch.int32)
