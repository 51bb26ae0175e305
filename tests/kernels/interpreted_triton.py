"""Triton kernels on CPU tensors, beyond what every back end is tested for. Needs TRITON_INTERPRET=1: test_triton.py
runs this file, together with the tests of the other back ends."""

from dataclasses import replace

import pytest
import test_layer_norm_quantize as layer_norm_tests
import test_qlinear as linear_tests
import test_quantize as quantize_tests
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from interpreter import spoiled_launch
from torch import nn

import vitq_kernels as vk
from vitq_kernels import tuning
from vitq_kernels.formats import LevelTable, LinearState, LowRankSpec, QuantSpec
from vitq_kernels.nn import QLinear, QMlp
from vitq_kernels.ops.quantize import triton as quantize_triton
from vitq_kernels.testing import assert_codes_match, assert_within, gamma
from vitq_kernels.triton import host

SHAPES = settings(max_examples=25, deadline=None, derandomize=True)
TABLE = LevelTable((-128, -50, -20, -7, 3, 11, 60, 127)).lut()


@pytest.fixture(autouse=True)
def _pinned():
    assert host.INTERPRETED
    with vk.backend("triton"):
        yield


def generator(seed=0):
    return torch.Generator().manual_seed(seed)


def directions(rank, k, seed=1):
    return torch.linalg.qr(torch.randn(k, rank, generator=generator(seed)))[0].T.contiguous()


QUANTS = {
    "dynamic": {},
    "dynamic groups": {"groups": 4},
    "static groups": {"groups": 4, "scale": torch.tensor([0.01, 0.02, 0.03, 0.04])},
    "zero point": {"scale": torch.tensor([0.02]), "zero_point": 1, "qmin": -128},
    "row_qmax": {"row_qmax": torch.tensor([1, 3, 7, 15, 31, 63, 127, 8, 9], dtype=torch.int32)},
    "lut": {"lut": TABLE},
    "t": {"lora_down": directions(20, 200)},
    "groups lora": {"groups": 2, "lora_down": directions(5, 200)},
    "groups subspace": {"groups": 2, "lora_down": directions(5, 200), "subspace": True},
    "row scales": {"scale": torch.rand(9, 2, generator=generator(7)) + 0.01, "groups": 2},
}


@pytest.mark.parametrize("name", QUANTS)
@pytest.mark.parametrize("whole", [8192, 16], ids=["whole rows", "chunks"])
def test_long_rows_are_read_in_chunks(monkeypatch, name, whole):
    """K crosses the chunk of 128 columns and ends inside one; results do not depend on which kernel serves the row."""
    monkeypatch.setattr(quantize_triton, "WHOLE_ROW", whole)
    a = vk.ActQuant(**QUANTS[name])
    x = torch.randn(9, 200, generator=generator()) * 2
    x[3] = 0.0
    with host.recorded() as launches:
        quantize_tests.check(x, a)
    chunked = whole == 16 or a.lora_down is not None
    assert {launch.kernel.__name__ for launch in launches} == {"_chunked" if chunked else "_whole"}


@pytest.mark.parametrize("whole", [8192, 16], ids=["whole rows", "chunks"])
@pytest.mark.parametrize("k", [16, 129, 200])
def test_layer_norm_in_chunks(monkeypatch, whole, k):
    monkeypatch.setattr(quantize_triton, "WHOLE_ROW", whole)
    x = 50.0 + torch.randn(7, k, generator=generator())
    weight, bias = torch.randn(k, generator=generator(1)), torch.randn(k, generator=generator(2))
    layer_norm_tests.check(x, weight, bias, vk.ActQuant(), "triton")
    layer_norm_tests.check(x, weight, None, vk.ActQuant(scale=torch.tensor([0.03]), zero_point=1, qmin=-128), "triton")
    for subspace in (False, True):
        a = vk.ActQuant(lora_down=directions(3, k), subspace=subspace)
        layer_norm_tests.check(x, weight, bias, a, "triton")
    gather = torch.tensor([5, -1, 0, 0, 6, -1, 2, 3], dtype=torch.int32)
    for quant in ({}, {"lora_down": directions(3, k)}, {"lora_down": directions(3, k), "subspace": True}):
        a = vk.ActQuant(**quant)
        out = layer_norm_tests.check(torch.stack((x, x.flip(0))), weight, bias, a, "triton", gather=gather)
        assert (out.scale.reshape(2, 8)[:, gather < 0] == 1.0).all()
        assert not out.q[:, gather < 0].any()


def test_layer_norm_with_groups():
    x = torch.randn(5, 48, generator=generator())
    out = vk.layer_norm_quantize(x, None, None, 1e-6, vk.ActQuant(groups=3))
    y, bound = layer_norm_tests.exact_layer_norm(x, None, None, 1e-6, "triton")
    scale = out.scale.double().repeat_interleave(16, 1)
    assert_codes_match(out.q, y / scale, bound / scale + gamma(3) * (y / scale).abs(), -127, 127)
    absmax = y.abs().reshape(5, 3, 16).amax(-1)
    assert_within(out.scale, absmax / 127, bound.reshape(5, 3, 16).amax(-1) / 127 + gamma(1) * absmax / 127)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_subspace_in_16_bits_subtracts_the_t_it_returns(dtype):
    """The branch multiplies in the dtype of lora_down; what is subtracted is what lora_up will multiply."""
    x = torch.randn(6, 150, generator=generator()) * 3
    d = directions(9, 150).to(dtype)
    out = vk.quantize(x, vk.ActQuant(lora_down=d, subspace=True))
    assert torch.equal(out.t, out.t.to(dtype).float())
    rounded = x.to(dtype).double()
    t = rounded @ d.double().T
    u = {torch.float16: 2.0**-11, torch.bfloat16: 2.0**-8}[dtype]
    assert_within(out.t, t, gamma(151) * (rounded.abs() @ d.double().abs().T) + 1.01 * u * t.abs())
    exact = (x.double() - out.t.double() @ d.double()) / out.scale.double()
    error = gamma(11) * (out.t.double().abs() @ d.double().abs() + x.double().abs()) / out.scale.double()
    assert_codes_match(out.q, exact, error + gamma(3) * exact.abs(), -127, 127)


def test_rank_beyond_the_registers_is_refused():
    with pytest.raises(ValueError, match="lora_down has rank 257, the triton back end serves at most 256"):
        vk.quantize(torch.zeros(2, 300), vk.ActQuant(lora_down=torch.zeros(257, 300)))


def check_fused(x, weight, w_scale, kw, a):
    """As test_qlinear's test_quantize, for every form of epilogue."""
    out = vk.qlinear_quantize(x, weight, w_scale, out=a, **kw)
    m, n = x.q.shape[0], weight.n
    y, bound = linear_tests.exact_qlinear(x, weight, w_scale, kw)
    if a.lora_down is not None:
        d = a.lora_down.double()
        t = y @ d.T
        t_bound = bound @ d.abs().T + gamma(n + 1) * (y.abs() @ d.abs().T)
        assert_within(out.t, t, t_bound, "t")
        if a.subspace:
            bound = bound + t_bound @ d.abs() + gamma(d.shape[0] + 2) * (t.abs() @ d.abs() + y.abs())
            y = y - t @ d
    low, high = a.qmin - a.zero_point, a.qmax - a.zero_point
    if a.row_qmax is not None:
        high = a.row_qmax.double().reshape(-1, 1)
        low = -high
    if a.scale is None:
        size = y.abs().reshape(m, a.groups, -1).amax(-1)
        slack = bound.reshape(m, a.groups, -1).amax(-1) / high
        assert_within(out.scale, size / high, slack + gamma(1) * size / high, "scale")
    scale = out.scale.double().reshape(-1, a.groups).repeat_interleave(n // a.groups, 1)
    codes = out.q
    if a.lut is not None:
        codes = vk.qlinear_quantize(x, weight, w_scale, out=replace(a, lut=None), **kw).q
        assert torch.equal(out.q, a.lut[codes.long() + 128])
    tolerance = bound / scale + gamma(3) * (y / scale).abs()
    assert_codes_match(codes, y / scale, tolerance, low, high, a.zero_point)
    return out


# (N, epilogue, launches): columns per tile are 64 here.
FUSED = {
    "static": (144, {"scale": torch.tensor([0.7])}, 1),
    "static groups": (144, {"scale": torch.rand(9, generator=generator(3)) + 0.3, "groups": 9}, 1),
    "row scales": (144, {"scale": torch.rand(37, 1, generator=generator(3)) + 0.3}, 1),
    "row and group scales": (144, {"scale": torch.rand(37, 3, generator=generator(3)) + 0.3, "groups": 3}, 1),
    "zero point, table": (144, {"scale": torch.tensor([0.7]), "zero_point": -30, "qmin": -128, "lut": TABLE}, 1),
    "row_qmax": (144, {"row_qmax": torch.arange(37, dtype=torch.int32) + 1, "scale": torch.tensor([0.5])}, 1),
    "heads": (144, {"groups": 9}, 1),
    "wide heads": (384, {"groups": 3}, 1),
    "heads, row_qmax, table": (
        96,
        {"groups": 3, "row_qmax": torch.arange(37, dtype=torch.int32) + 1, "lut": TABLE},
        1,
    ),
    "whole row": (144, {}, 1),
    "whole row, t": (144, {"lora_down": directions(7, 144)}, 1),
    "static, t": (144, {"scale": torch.tensor([0.7]), "lora_down": directions(7, 144)}, 1),
    "heads, t": (144, {"groups": 9, "lora_down": directions(20, 144)}, 1),
    "long row": (300, {}, 1),
    "long row, t": (300, {"lora_down": directions(7, 300)}, 1),
    "groups of odd width": (150, {"groups": 3}, 1),
    "subspace": (144, {"scale": torch.tensor([0.7]), "lora_down": directions(7, 144), "subspace": True}, 1),
    "rank beyond the epilogue": (160, {"scale": torch.tensor([0.7]), "lora_down": directions(130, 160)}, 1),
}


@pytest.mark.parametrize("weight", ["w8", "w4"])
@pytest.mark.parametrize("name", FUSED)
def test_fused_quantization_and_its_launches(name, weight):
    n, spec, want = FUSED[name]
    case = linear_tests.make_case(generator(5), 37, 70, n, 9, weight, True, activation="gelu_tanh")
    with host.recorded() as launches:
        vk.qlinear_quantize(*case[:3], out=vk.ActQuant(**spec), **case[3])
    assert len(launches) == want
    check_fused(*case, vk.ActQuant(**spec))


def test_special_values_pass_through_the_fused_epilogue():
    """A row with a NaN scale, a row of zeros and an infinite bias, by tile and through the second launch."""
    x, weight, w_scale, kw = linear_tests.make_case(generator(), 5, 40, 64, 0, "w8", False)
    x.scale[1] = float("nan")
    x.q[2] = 0
    for groups in (1, 2, 4):
        out = vk.qlinear_quantize(x, weight, w_scale, out=vk.ActQuant(groups=groups), **kw)
        assert out.scale[1].isnan().all()
        assert not out.q[1].any()
        assert (out.scale[2] == 1.0).all()
        assert not out.q[2].any()
        assert out.scale[[0, 3, 4]].isfinite().all()
    bias = torch.zeros(64)
    bias[40] = float("inf")
    out = vk.qlinear_quantize(x, weight, w_scale, bias, out=vk.ActQuant(groups=2), **kw)
    assert out.scale[:, 1].isnan().all()
    assert out.scale[[0, 2, 3, 4], 0].isfinite().all()


CONFIGS = [
    tuning.Config(block_m, block_n, block_k, group_m, swap, 4, 1)
    for block_m, block_n, block_k, group_m, swap in (
        (16, 16, 32, 1, 0),
        (32, 16, 128, 3, 1),
        (16, 64, 64, 2, 1),
        (64, 32, 32, 8, 0),
    )
]


@pytest.mark.parametrize("name", linear_tests.FORMATS)
def test_results_do_not_depend_on_the_tiles(name):
    """Without a branch every output is one exact integer and one fixed chain of roundings."""
    x, weight, w_scale, kw = linear_tests.make_case(generator(2), 45, 130, 70, 0, name, True, activation="gelu_erf")
    floats = torch.randint(-8, 9, (45, 130), generator=generator()).float()  # whose sums are exact as well
    outs = []
    for config in CONFIGS:
        with tuning.config(config):
            linear_tests.check(x, weight, w_scale, kw)
            only = vk.qlinear_weight_only(floats, weight, w_scale, **kw)
            outs.append((vk.qlinear(x, weight, w_scale, **kw), only))
    for other in outs[1:]:
        assert all(map(torch.equal, other, outs[0]))


@SHAPES
@given(m=st.integers(1, 40), k=st.integers(1, 300), n=st.integers(1, 70), seed=st.integers(0, 99))
def test_four_bit_activations(m, k, n, seed):
    """W4A4 on hardware without a 4-bit product: the same kernel on codes of ±7."""
    g = generator(seed)
    x = vk.QTensor(torch.randint(-7, 8, (m, k), generator=g).to(torch.int8), torch.ones(1))
    weight = linear_tests.make_weight(g, "w4", n, k)
    want = x.q.double() @ vk.unpack_weight(weight).double().T
    assert torch.equal(vk.qlinear(x, weight, torch.ones(n)).double(), want)


def test_strided_codes_are_not_copied():
    q = torch.randint(-128, 128, (3, 9, 40), generator=generator()).to(torch.int8)
    weight = linear_tests.make_weight(generator(), "w4", 20, 40)
    for view in (q[:, 1:], q[::2], q.transpose(0, 1)):
        with host.recorded() as launches:
            y = vk.qlinear(vk.QTensor(view, torch.ones(1)), weight, torch.ones(20))
        assert launches[0].arguments[0].data_ptr() == view.data_ptr()
        assert torch.equal(y.double(), view.double() @ vk.unpack_weight(weight).double().T)


def _state(seed, n, k, rank, kind="error", dynamic=True):
    g = generator(seed)
    act = QuantSpec(8, granularity="per_token", dynamic=True) if dynamic else QuantSpec(8)
    return LinearState(
        codes=torch.randint(-8, 8, (n, k), generator=g).to(torch.int8),
        weight_scale=torch.rand(n, generator=g) * 0.02 + 1e-3,
        weight=QuantSpec(4, granularity="per_channel", scale_rule="absmax_half_range"),
        bias=torch.randn(n, generator=g),
        act=act,
        act_scale=None if dynamic else torch.tensor([0.03]),
        lora=LowRankSpec(rank, kind),
        lora_down=directions(rank, k, seed).half(),
        lora_up=torch.randn(n, rank, generator=g).half(),
    )


@pytest.mark.parametrize("kind", ["error", "subspace"])
@pytest.mark.parametrize("dynamic", [True, False])
def test_modules_agree_with_the_oracle(kind, dynamic):
    """A whole MLP, LayerNorm to residual: two LayerNorm passes apart, only rounding differs between the back ends."""
    fc1, fc2 = _state(1, 96, 40, 6, kind, dynamic), _state(2, 40, 96, 6, kind, dynamic)
    norm = nn.LayerNorm(40)
    x = torch.randn(2, 9, 40, generator=generator())
    outs = {}
    for name in ("triton", "ref"):
        with vk.backend(name), torch.no_grad():
            mlp = QMlp.from_states(fc1, fc2, norm=norm)
            outs[name] = mlp(x, residual=x)
            if name == "triton":
                assert mlp.fc1.layout == mlp.fc2.layout == "int4_k64x2"
                moved = QLinear.from_state(fc1).state()
    assert torch.equal(moved.codes, fc1.codes)
    # One code of difference at fc1's or fc2's quantizer moves an output by a scale times a weight: a few of them.
    error = (outs["triton"] - outs["ref"]).abs().max() / (outs["ref"] - x).abs().max()
    assert error < 0.02


def _finish_early(a):
    """As if one program of every row tile had been counted twice: the last one's share is missing."""
    a["counters"].view(-1, 3)[:, 0] += 1
    a["shares"].fill_(float("nan"))


BUGS = {
    "a tile's share of t": lambda kernel, a: _finish_early(a),
    "zero point": lambda kernel, a: a.update(x_zero_point=a["x_zero_point"] + 1) if kernel == "_product" else None,
    "clamp": lambda kernel, a: a.update(high=a["high"] + 1) if kernel == "_product" else None,
    "last column": lambda kernel, a: a.update(N=a["N"] - 1) if kernel == "_product" else None,
    "nibbles swapped": None,
}


GATHER_BUGS = {
    "image": lambda a: a.update(tokens=a["tokens"] - 1),
    "slot": lambda a: a.update(gather=a["gather"].roll(1)),
    "padding": lambda a: a.update(gather=a["gather"].clamp(min=0)),
}


@pytest.mark.parametrize("rank", [0, 3])
@pytest.mark.parametrize("bug", GATHER_BUGS)
def test_planted_gather_bugs_are_caught(bug, rank, monkeypatch):
    x = torch.randn(2, 7, 40, generator=generator())
    gather = torch.tensor([5, -1, 0, 0, 6, -1, 2, 3], dtype=torch.int32)
    a = vk.ActQuant(scale=torch.tensor([0.03]), lora_down=directions(rank, 40) if rank else None)
    layer_norm_tests.check(x, None, None, a, "triton", gather=gather)
    monkeypatch.setattr(host, "launch", spoiled_launch(lambda kernel, named: GATHER_BUGS[bug](named)))
    with pytest.raises(AssertionError, match=r"\d+ of \d+ (elements|codes) off"):
        layer_norm_tests.check(x, None, None, a, "triton", gather=gather)


@pytest.mark.parametrize("bug", BUGS)
def test_planted_bugs_are_caught(bug, monkeypatch):
    """The checks of this file fail on what such kernels get wrong."""
    case = linear_tests.make_case(generator(5), 37, 70, 144, 0, "w4", True, per_row=False)
    a = vk.ActQuant(scale=torch.tensor([0.1]), lora_down=directions(7, 144), qmin=-7, qmax=7)
    check_fused(*case, a)
    if bug == "nibbles swapped":
        right = case[1]
        wrong = replace(right, data=(right.data >> 4) | (right.data << 4))
        monkeypatch.setattr(linear_tests, "unpack_weight", lambda weight: vk.unpack_weight(right))
        case = (case[0], wrong, *case[2:])
    else:
        monkeypatch.setattr(host, "launch", spoiled_launch(BUGS[bug]))
    with pytest.raises(AssertionError, match=r"\d+ of \d+ (elements|codes) off"):
        check_fused(*case, a)
