"""qlinear, qlinear_quantize, qlinear_weight_only: exact integer sums, derived float bounds, every epilogue."""

from dataclasses import replace

import pytest
import test_layer_norm_quantize as layer_norm_tests
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from selected import GPU

import vitq_kernels as vk
from vitq_kernels.formats import LevelTable
from vitq_kernels.ops._schema import Epilogue
from vitq_kernels.ops.qlinear import PreparedLinear, ref
from vitq_kernels.packing import LAYOUT_IDS, unpack_weight, weight_lut
from vitq_kernels.testing import ROUNDOFF, assert_codes_match, assert_within, gamma, isas, poison

TABLE = LevelTable((-128, -90, -60, -40, -25, -12, -5, -1, 1, 6, 13, 27, 45, 66, 95, 127))  # no zero: pads with 1 or −1
INT8, INT4 = ("int8", "int4_k64x2") if GPU else ("int8_n16k4", "int4_n16k4")
FORMATS = {
    "w8": (INT8, 8, None),
    "w4": (INT4, 4, None),
    "w4 table": (INT4, 4, TABLE),
    "w8 table": (INT8, 4, TABLE),
}
SHAPES = settings(
    max_examples=40, deadline=None, derandomize=True, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
GELU_SLOPE = 1.13  # the largest |GELU'|
GELU_ERROR = 8 * ROUNDOFF[torch.float32]  # of |x|, see test_gelu_accuracy


def make_weight(g, name, n, k):
    layout, bits, table = FORMATS[name]
    if table is None:
        codes = torch.randint(-(1 << (bits - 1)), 1 << (bits - 1), (n, k), generator=g).to(torch.int8)
    else:
        codes = table.lut()[torch.randint(0, 256, (n, k), generator=g)]
    return vk.pack_weight(codes, bits, layout, table)


def make_case(g, m, k, n, r, name, everything, dtype=torch.float32, activation="none", per_row=True):
    """A QTensor, a weight, its scale, and keyword arguments of the epilogue."""
    x = vk.QTensor(
        torch.randint(-128, 128, (m, k), generator=g).to(torch.int8),
        torch.rand(m if per_row else 1, generator=g) * 0.01 + 1e-3,
        0 if per_row else 17,
        torch.randn(m, r, generator=g) if r else None,
    )
    kw = {"activation": activation}
    if r:
        kw["lora_up"] = torch.randn(n, r, generator=g).to(dtype)
    if everything:
        kw["bias"] = torch.randn(n, generator=g).to(dtype)
        kw["layer_scale"] = torch.randn(n, generator=g).to(dtype)
        kw["residual"] = torch.randn(m, n, generator=g).to(dtype)
    return x, make_weight(g, name, n, k), torch.rand(n, generator=g) * 0.01 + 1e-3, kw


def exact_linear(product, terms, operations, t, kw):
    """float64 epilogue and error bound: ``product`` is computed by ``operations`` roundings of magnitude ``terms``."""
    up, bias = kw.get("lora_up"), kw.get("bias")
    y, magnitude = product, terms
    if up is not None:
        t = t.to(up.dtype) if GPU else t  # the branch multiplies in the dtype of lora_up
        y = y + t.double() @ up.double().T
        magnitude = magnitude + t.double().abs() @ up.double().abs().T
        operations += up.shape[1] + 1
    if bias is not None:
        y = y + bias.double()
        magnitude = magnitude + bias.double().abs()
        operations += 1
    bound = gamma(operations) * magnitude
    if kw["activation"] != "none":
        approximate = "tanh" if kw["activation"] == "gelu_tanh" else "none"
        bound = GELU_SLOPE * bound + GELU_ERROR * y.abs()
        y = torch.nn.functional.gelu(y, approximate=approximate)
    if kw.get("layer_scale") is not None:
        bound = (bound + gamma(1) * y.abs()) * kw["layer_scale"].double().abs()
        y = y * kw["layer_scale"].double()
    if kw.get("residual") is not None:
        y = y + kw["residual"].double()
        bound = bound + gamma(1) * y.abs()
    return y, bound


def exact_qlinear(x, weight, w_scale, kw):
    codes = unpack_weight(weight).double()
    total = (x.q.double() - x.zero_point) @ codes.T
    product = total * x.scale.double().reshape(-1, 1) * w_scale.double()
    return exact_linear(product, product.abs(), 3, x.t, kw)  # int → float, scale product, product


def round_to(y, bound, dtype):
    u = ROUNDOFF[dtype]
    tiny = {torch.float32: 0.0, torch.float16: 2.0**-25, torch.bfloat16: 2.0**-134}[dtype]
    return bound if dtype == torch.float32 else bound + u * (y.abs() + bound) + tiny


def check(x, weight, w_scale, kw, out_dtype=torch.float32):
    out = vk.qlinear(x, weight, w_scale, out_dtype=out_dtype, **kw)
    assert out.dtype == out_dtype
    assert out.is_contiguous()
    y, bound = exact_qlinear(x, weight, w_scale, kw)
    assert_within(out, y, round_to(y, bound, out_dtype))
    return out


def check_weight_only(out, x, t, weight, w_scale, kw):
    codes = unpack_weight(weight).double()
    terms = (x.double().abs() @ codes.abs().T) * w_scale.double()
    y, bound = exact_linear((x.double() @ codes.T) * w_scale.double(), terms, x.shape[-1] + 2, t, kw)
    assert_within(out, y, round_to(y, bound, x.dtype))


@pytest.mark.parametrize("name", ["w8", "w4"])
def test_hand_computed(implementation, name):
    layout, bits, _ = FORMATS[name]
    weight = vk.pack_weight(torch.tensor([[1, 2, -3], [0, -8, 7]], dtype=torch.int8), bits, layout)
    x = vk.QTensor(torch.tensor([[10, -20, 30], [1, 1, 1]], dtype=torch.int8), torch.tensor([0.5]), 1)
    # codes − 1: (9, −21, 29), (0, 0, 0); sums (−120, 371); × 0.5 × (1, 2)
    y = vk.qlinear(x, weight, torch.tensor([1.0, 2.0]), torch.tensor([0.0, 1.0]))
    assert y.tolist() == [[-60.0, 372.0], [0.0, 1.0]]
    x = replace(x, t=torch.tensor([[1.0, 2.0], [0.0, -1.0]]))
    kw = {"lora_up": torch.tensor([[10.0, 0.0], [0.0, 1.0]]), "layer_scale": torch.tensor([2.0, 1.0])}
    y = vk.qlinear(x, weight, torch.tensor([1.0, 2.0]), residual=torch.ones(2, 2), **kw)
    assert y.tolist() == [[-99.0, 374.0], [1.0, 0.0]]


@SHAPES
@given(
    m=st.integers(0, 29),
    k=st.integers(0, 90),
    n=st.integers(0, 140),
    r=st.sampled_from([0, 0, 1, 7, 32, 70]),
    seed=st.integers(0, 999),
)
def test_shapes(implementation, m, k, n, r, seed):
    g = torch.Generator().manual_seed(seed)
    name = list(FORMATS)[seed % 4]
    activation = ("none", "gelu_erf", "gelu_tanh")[seed % 3]
    check(*make_case(g, m, k, n, r, name, seed % 5 > 0, activation=activation, per_row=seed % 2 == 0))


@pytest.mark.parametrize("m", [1, 16, 17, 49, 50, 197, 198, 577])
@pytest.mark.parametrize("name", ["w8", "w4"])
def test_vit_rows(implementation, m, name):
    check(*make_case(torch.Generator().manual_seed(m), m, 100, 72, 0, name, True, per_row=False))


@pytest.mark.parametrize("name", FORMATS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_dtypes(implementation, name, dtype):
    g = torch.Generator().manual_seed(3)
    check(*make_case(g, 11, 40, 70, 8, name, True, dtype=dtype, activation="gelu_erf"), out_dtype=dtype)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_huge_values_do_not_spoil_a_branch(implementation, dtype):
    """What float16 cannot hold saturates where the branch is multiplied in it; an Inf would take the row along."""
    x, weight, w_scale, kw = make_case(torch.Generator().manual_seed(4), 5, 40, 70, 8, "w8", False, dtype=dtype)
    x.t[2, 3] = -3e5
    top = 65504.0 if GPU and dtype == torch.float16 else float("inf")
    kept = replace(x, t=x.t.clamp(-top, top))
    assert_within(vk.qlinear(x, weight, w_scale, **kw), *exact_qlinear(kept, weight, w_scale, kw))
    down = torch.randn(3, 70, generator=torch.Generator().manual_seed(5)).to(dtype)
    bias = torch.zeros(70)
    bias[9] = 2e5
    act = vk.ActQuant(scale=torch.ones(1), lora_down=down)
    got = vk.qlinear_quantize(x, weight, w_scale, bias, out=act, **kw).t
    y, bound = exact_qlinear(kept, weight, w_scale, kw | {"bias": bias})
    y = y.clamp(-top, top)
    u = ROUNDOFF[dtype] if GPU else 0.0  # y is rounded to the dtype of lora_down
    weights = down.double().abs().T
    assert_within(got, y @ down.double().T, (bound + (u + gamma(80)) * y.abs()) @ weights)
    assert got.isfinite().all()


@pytest.mark.parametrize("name", ["w8", "w4"])
def test_sums_are_exact_on_extreme_data(implementation, name):
    """All operands at their extremes: any 16-bit saturation on the way would show (KERNELS §5)."""
    layout, bits, _ = FORMATS[name]
    top = (1 << (bits - 1)) - 1
    for k in (2, 7, 64, 1027):
        for x_code, zero_point in ((-128, 0), (-128, 127), (127, -128), (127, 0)):
            # all codes of 4 bits: how many products an int16 holds depends on the weights
            for w_code in range(-top - 1, top + 1) if bits == 4 else (-top - 1, -top, top):
                weight = vk.pack_weight(torch.full((17, k), w_code, dtype=torch.int8), bits, layout)
                x = vk.QTensor(torch.full((7, k), x_code, dtype=torch.int8), torch.ones(1), zero_point)
                want = (x_code - zero_point) * w_code * k
                assert (vk.qlinear(x, weight, torch.ones(17)) == float(want)).all()


def test_largest_k(implementation):
    """K = 65,793 with 255 · −128 in every term is the largest sum that fits an int32."""
    k = 65_793
    weight = vk.pack_weight(torch.full((3, k), -128, dtype=torch.int8), 8, INT8)
    x = vk.QTensor(torch.full((2, k), 127, dtype=torch.int8), torch.ones(1), -128)
    assert (vk.qlinear(x, weight, torch.ones(3)).double() == float(torch.tensor(-255 * 128 * k).float())).all()


@pytest.mark.parametrize("name", ["w8", "w4"])
def test_alternating_extremes(implementation, name):
    """Signs that alternate within one 4-code group: pair sums saturate although the whole sum is small."""
    layout, bits, _ = FORMATS[name]
    k, top = 512, (1 << (bits - 1)) - 1
    sign = torch.tensor([1, 1, -1, -1]).repeat(k // 4)
    x = vk.QTensor(torch.where(sign > 0, 127, -128).to(torch.int8).repeat(9, 1), torch.ones(1))
    codes = torch.where(sign > 0, top, top - 1).to(torch.int8).repeat(33, 1)
    want = x.q.double() @ codes.double().T
    assert torch.equal(vk.qlinear(x, vk.pack_weight(codes, bits, layout), torch.ones(33)).double(), want)


def test_largest_sums_of_mixed_weights(implementation):
    """Each row of activations agrees in sign with one row of normal weights, or disagrees: no sum can be larger."""
    codes = torch.randn(17, 1500, generator=torch.Generator().manual_seed(0)).mul(2.5).round().clamp(-8, 7)
    q = torch.where(torch.cat([codes, -codes]) > 0, 127, -128).to(torch.int8)
    got = vk.qlinear(vk.QTensor(q, torch.ones(1)), vk.pack_weight(codes.to(torch.int8), 4, INT4), torch.ones(17))
    assert torch.equal(got.double(), q.double() @ codes.double().T)


def test_the_checks_would_catch_saturation():
    """A model of vpmaddubsw on 8-bit weights (pair sums clamped to int16) fails the two tests above."""

    def saturating(u8, s8):
        pairs = (u8 * s8).reshape(-1, 2).sum(-1).clamp(-32768, 32767)
        return int(pairs.sum())

    x, w = torch.full((64,), 255), torch.full((64,), 127)
    assert saturating(x, w) != int((x * w).sum())
    sign = torch.tensor([1, 1, -1, -1]).repeat(16)
    u8 = torch.where(sign > 0, 127, -128) + 128
    w = torch.where(sign > 0, 127, 126)
    assert saturating(u8, w) - 128 * int(w.sum()) != int(((u8 - 128) * w).sum())
    # and weights of 4 bits summed over nine int16 steps overflow where eight do not
    assert 8 * 2 * 255 * 8 <= 32767 < 9 * 2 * 255 * 8


@pytest.mark.parametrize("activation", ["gelu_erf", "gelu_tanh"])
def test_gelu_accuracy(implementation, activation):
    """At most twice the error of torch's float32 GELU, and far better in the negative tail."""
    x = torch.cat([torch.linspace(-15, 15, 20001), torch.randn(2000) * 1e-3, torch.tensor([0.0, -0.0, 50.0, -50.0])])
    approximate = "tanh" if activation == "gelu_tanh" else "none"
    want = torch.nn.functional.gelu(x.double(), approximate=approximate)
    torch_error = (torch.nn.functional.gelu(x, approximate=approximate).double() - want).abs()
    weight = vk.pack_weight(torch.zeros(x.numel(), 1, dtype=torch.int8), 8, INT8)
    code = vk.QTensor(torch.zeros(1, 1, dtype=torch.int8), torch.ones(1))
    y = vk.qlinear(code, weight, torch.ones(x.numel()), x, activation=activation)[0]
    error = (y.double() - want).abs()
    for low, high in ((-15, -4), (-4, -1), (-1, 1), (1, 4), (4, 51)):
        part = (x >= low) & (x < high)
        assert error[part].max() <= 2 * torch_error[part].max() + 1e-38, (low, high)
    assert (error <= GELU_ERROR * x.double().abs() + 1e-33).all()


def test_gelu_special_values(implementation):
    x = torch.tensor([float("nan"), float("inf"), 1e30, -1e30, -1e5])
    weight = vk.pack_weight(torch.zeros(5, 1, dtype=torch.int8), 8, INT8)
    code = vk.QTensor(torch.zeros(1, 1, dtype=torch.int8), torch.ones(1))
    for activation in ("gelu_erf", "gelu_tanh"):
        y = vk.qlinear(code, weight, torch.ones(5), x, activation=activation)[0]
        assert y[0].isnan()
        if implementation != "ref":  # torch's vectorized erf GELU makes NaN of inf
            assert y[1] == float("inf")
        assert y[2] == 1e30
        assert y[3:].abs().max() < 1e-30


def test_nan_scale_makes_a_nan_row(implementation):
    g = torch.Generator().manual_seed(0)
    x, weight, w_scale, kw = make_case(g, 8, 20, 40, 0, "w8", True)
    x.scale[3] = float("nan")
    y = vk.qlinear(x, weight, w_scale, **kw)
    assert y[3].isnan().all()
    assert not y[[0, 1, 2, 4, 5, 6, 7]].isnan().any()


OUTS = (
    {},
    {"scale": torch.tensor([0.7])},
    {"scale": torch.tensor([0.7]), "zero_point": -30, "qmin": -128},
    {"groups": 3},
    {"groups": 3, "scale": torch.tensor([0.7, 0.4, 1.1])},
    {"lora_down": True},
    {"lora_down": True, "subspace": True, "scale": torch.tensor([0.4])},
)


@SHAPES
@given(m=st.integers(0, 60), k=st.integers(1, 60), n=st.integers(1, 47), seed=st.integers(0, 999))
def test_quantize(implementation, m, k, n, seed):
    """The fused op against quantize of its own float result: both must be the oracle's within the float bound."""
    g = torch.Generator().manual_seed(seed)
    n *= 3
    x, weight, w_scale, kw = make_case(
        g, m, k, n, (0, 9)[seed % 2], list(FORMATS)[seed % 4], True, activation=("none", "gelu_erf")[seed % 2]
    )
    spec = dict(OUTS[seed % len(OUTS)])
    if spec.pop("lora_down", False):
        spec["lora_down"] = torch.linalg.qr(torch.randn(n, min(n, 7), generator=g))[0].T.contiguous()
    a = vk.ActQuant(**spec)
    out = vk.qlinear_quantize(x, weight, w_scale, out=a, **kw)
    assert out.q.shape == (m, n)
    if m == 0:
        return
    y, bound = exact_qlinear(x, weight, w_scale, kw)
    if a.lora_down is not None:
        d = a.lora_down.double()
        t = y @ d.T
        t_bound = bound @ d.abs().T + gamma(n + 1) * (y.abs() @ d.abs().T)
        assert_within(out.t, t, t_bound, "t")
        if a.subspace:
            bound = bound + t_bound @ d.abs() + gamma(d.shape[0] + 2) * (t.abs() @ d.abs() + y.abs())
            y = y - t @ d
    scale = out.scale.double().reshape(-1, a.groups).repeat_interleave(n // a.groups, 1)
    if a.scale is None:
        absmax = y.abs().reshape(m, a.groups, -1).amax(-1)
        slack = bound.reshape(m, a.groups, -1).amax(-1) / a.qmax
        assert_within(out.scale, absmax / a.qmax, slack + gamma(1) * absmax / a.qmax, "scale")
    tolerance = bound / scale + gamma(3) * (y / scale).abs()
    assert_codes_match(out.q, y / scale, tolerance, a.qmin - a.zero_point, a.qmax - a.zero_point, a.zero_point)


def test_a_strided_table(implementation):
    """As an attribute of a weight that somebody else has put together."""
    x, weight, w_scale, kw = make_case(torch.Generator().manual_seed(0), 5, 40, 24, 0, "w4 table", True)
    if weight.lut is None:
        pytest.skip("codes of this layout are levels already")
    strided = replace(weight, lut=weight.lut.repeat_interleave(2)[::2])
    assert torch.equal(vk.qlinear(x, strided, w_scale, **kw), vk.qlinear(x, weight, w_scale, **kw))


def test_no_columns(implementation):
    """Codes of nothing have the scale of zeros, t is zeros."""
    x, weight, w_scale, kw = make_case(torch.Generator().manual_seed(0), 5, 16, 0, 0, "w8", True)
    out = vk.qlinear_quantize(x, weight, w_scale, out=vk.ActQuant(lora_down=torch.zeros(3, 0)), **kw)
    assert out.q.shape == (5, 0)
    assert torch.equal(out.scale.flatten(), torch.ones(5))
    assert torch.equal(out.t, torch.zeros(5, 3))


@SHAPES
@given(
    m=st.integers(0, 29),
    k=st.integers(0, 300),
    n=st.integers(0, 140),
    r=st.sampled_from([0, 0, 7, 32]),
    seed=st.integers(0, 999),
)
def test_weight_only(implementation, m, k, n, r, seed):
    g = torch.Generator().manual_seed(seed)
    dtype = (torch.float32, torch.float16, torch.bfloat16)[seed % 3]
    case, weight, w_scale, kw = make_case(g, m, k, n, r, list(FORMATS)[seed % 4], seed % 5 > 0, dtype=dtype)
    x = torch.randn(m, k, generator=g).to(dtype)
    out = vk.qlinear_weight_only(x, weight, w_scale, lora_t=case.t, **kw)
    check_weight_only(out, x, case.t, weight, w_scale, kw)


def test_leading_dimensions_and_strides(implementation):
    g = torch.Generator().manual_seed(0)
    x, weight, w_scale, kw = make_case(g, 12, 20, 40, 5, "w4", True)
    want = vk.qlinear(x, weight, w_scale, **kw)
    strided = torch.empty(20, 12, dtype=torch.int8).T.copy_(x.q)
    kw = {**kw, "residual": torch.empty(40, 12).T.copy_(kw["residual"]).reshape(3, 4, 40)}
    shaped = replace(x, q=strided.reshape(3, 4, 20), scale=x.scale.reshape(3, 4))
    assert torch.equal(vk.qlinear(shaped, weight, w_scale, **kw), want.reshape(3, 4, 40))


@pytest.mark.parametrize("name", FORMATS)
def test_written_everywhere_and_repeatable(implementation, name):
    """Bitwise the same for any thread count and whatever memory held before."""
    g = torch.Generator().manual_seed(0)
    x, weight, w_scale, kw = make_case(g, 130, 50, 200, 9, name, True)
    a = vk.ActQuant(lora_down=torch.randn(4, 200, generator=g))
    xf = torch.randn(130, 50, generator=g)
    before, outs = torch.get_num_threads(), []
    try:
        for byte, threads in ((0x7F, 1), (0xA5, 2), (0x11, 3)):
            torch.set_num_threads(threads)
            with poison(byte):
                fused = vk.qlinear_quantize(x, weight, w_scale, out=a, **kw)
                outs.append(
                    (
                        vk.qlinear(x, weight, w_scale, **kw),
                        fused.q,
                        fused.t,
                        vk.qlinear_weight_only(xf, weight, w_scale, lora_t=x.t, **kw),
                    )
                )
    finally:
        torch.set_num_threads(before)
    for other in outs[1:]:
        for got, want in zip(other, outs[0]):
            if implementation == "ref":  # torch's own float products promise nothing across thread counts
                torch.testing.assert_close(got.float(), want.float(), rtol=1e-4, atol=1.0)
            else:
                assert torch.equal(got, want)


@pytest.mark.parametrize("bug", ["col_sum of padding", "bias after the activation", "one row's scale", "last column"])
def test_planted_bugs_are_caught(bug):
    g = torch.Generator().manual_seed(0)
    x, weight, w_scale, kw = make_case(
        g, 8, 21, 40, 3, "w4", True, activation="gelu_erf", per_row=bug != "col_sum of padding"
    )
    y, bound = exact_qlinear(x, weight, w_scale, kw)
    if bug == "col_sum of padding":
        wrong = exact_qlinear(replace(x, zero_point=x.zero_point + 1), weight, w_scale, kw)[0]
    elif bug == "bias after the activation":
        bare = {**kw, "bias": None, "layer_scale": None, "residual": None}
        wrong = (exact_qlinear(x, weight, w_scale, bare)[0] + kw["bias"]) * kw["layer_scale"] + kw["residual"]
    elif bug == "one row's scale":
        wrong = exact_qlinear(replace(x, scale=x.scale.roll(1)), weight, w_scale, kw)[0]
    else:
        wrong = y.clone()
        wrong[:, -1] = 0.0
    with pytest.raises(AssertionError, match="elements off"):
        assert_within(wrong, y, bound)


def norm_quantize(x, weight, w_scale, kw, norm, a, out_dtype=torch.float32):
    """qlinear and, of its result as it is rounded, layer_norm_quantize with (γ, β, eps): what a block fuses."""
    layer = PreparedLinear(weight, w_scale, kw.get("bias"), kw.get("lora_up"), kw.get("layer_scale"))
    return layer.qlinear_norm_quantize(x, *norm, Epilogue(a), kw.get("residual"), out_dtype)


def check_norm_quantize(x, weight, w_scale, kw, norm, a, out_dtype, implementation):
    y, out = norm_quantize(x, weight, w_scale, kw, norm, a, out_dtype)
    exact, bound = exact_qlinear(x, weight, w_scale, kw)
    assert_within(y, exact, round_to(exact, bound, out_dtype))
    layer_norm_tests.check_output(out, y, *norm[:2], a, implementation, norm[2])
    return y, out


@settings(SHAPES, max_examples=25)
@given(
    m=st.integers(0, 40),
    k=st.integers(1, 70),
    n=st.integers(1, 150),
    name=st.sampled_from(list(FORMATS)),
    dtype=st.sampled_from([torch.float32, torch.float16, torch.bfloat16]),
    seed=st.integers(0, 99),
)
def test_norm_behind_a_product(implementation, m, k, n, name, dtype, seed):
    g = torch.Generator().manual_seed(seed)
    x, weight, w_scale, kw = make_case(g, m, k, n, seed % 4, name, seed % 3 > 0, dtype)
    norm = (torch.randn(n, generator=g), torch.randn(n, generator=g) if seed % 2 else None, 1e-6)
    static = torch.tensor([0.03])
    down = torch.linalg.qr(torch.randn(n, min(n, 9), generator=g))[0].T.contiguous()
    a = (
        vk.ActQuant(),
        vk.ActQuant(scale=static, zero_point=-20, qmin=-128),
        vk.ActQuant(scale=static, lora_down=down),
        vk.ActQuant(scale=static, lora_down=down, subspace=True),
    )[seed % 4]
    y, out = check_norm_quantize(x, weight, w_scale, kw, norm, a, dtype, implementation)
    if implementation != "triton":  # there, sums of float32 run in another order
        want = vk.qlinear(x, weight, w_scale, out_dtype=dtype, **kw)
        coded = vk.layer_norm_quantize(want, *norm, a)
        assert torch.equal(y, want)
        for got, expected in zip((out.q, out.scale, out.t), (coded.q, coded.scale, coded.t)):
            assert got is expected or torch.equal(got, expected)


def test_norm_behind_a_product_is_refused(implementation):
    x, weight, w_scale, kw = make_case(torch.Generator().manual_seed(0), 3, 8, 12, 0, "w8", False)
    good = (torch.ones(12), None, 1e-6)
    for norm, a, error, message in (
        ((torch.ones(8), None, 1e-6), vk.ActQuant(), ValueError, r"weight has shape \(8,\), expected \(12\)"),
        ((None, torch.ones(12).int(), 1e-6), vk.ActQuant(), TypeError, "bias has dtype torch.int32"),
        ((None, None, -1.0), vk.ActQuant(), ValueError, r"eps is -1.0, expected a number >= 0"),
        (good, vk.ActQuant(groups=5), ValueError, "groups is 5, expected a divisor of the 12 columns"),
    ):
        with pytest.raises(error, match=message):
            norm_quantize(x, weight, w_scale, kw, norm, a)
    empty = vk.pack_weight(torch.zeros(0, 8, dtype=torch.int8), 8, weight.layout)
    with pytest.raises(ValueError, match="weight has 0 out features, expected at least 1"):
        norm_quantize(x, empty, torch.ones(0), {}, (None, None, 1e-6), vk.ActQuant())


def _flat_args(m=3, k=12, n=20):
    g = torch.Generator().manual_seed(0)
    x, weight, w_scale, kw = make_case(g, m, k, n, 4, "w4 table", True)
    packed = (weight.data, LAYOUT_IDS[weight.layout], n, k)
    lut = weight_lut(weight)
    tail = (kw["bias"], kw["lora_up"], 1, kw["layer_scale"], kw["residual"])
    return x, packed, weight.col_sum, lut, w_scale, tail


def test_opcheck():
    x, packed, col_sum, lut, w_scale, tail = _flat_args()
    flat = (x.q, x.scale, 0, x.t, *packed, col_sum, lut, w_scale, *tail)
    quant = (None, 0, -127, 127, 1, None, None, torch.ones(2, 20), False)
    torch.library.opcheck(torch.ops.vitq.qlinear.default, (*flat, torch.float16))
    torch.library.opcheck(torch.ops.vitq.qlinear_quantize.default, (*flat, *quant))
    normed = (*flat, torch.float16, torch.ones(20), None, 1e-6, *quant)
    torch.library.opcheck(torch.ops.vitq.qlinear_norm_quantize.default, normed)
    xf = torch.randn(3, 12)
    torch.library.opcheck(
        torch.ops.vitq.qlinear_weight_only.default, (xf, x.t, *packed, lut, w_scale, *tail, torch.float32)
    )


def test_direct_calls_stay_inside_their_buffers():
    """torch.ops.vitq.* without the wrappers: sizes that do not fit are refused, not read."""
    x, packed, col_sum, lut, w_scale, tail = _flat_args()
    if not isas():
        pytest.skip("no native kernels")
    good = [x.q, x.scale, 0, x.t, *packed, col_sum, lut, w_scale, *tail, torch.float32]
    for position, bad in ((1, torch.ones(2)), (4, packed[0][:0]), (6, 300), (8, col_sum[:3]), (10, w_scale[:2])):
        args = list(good)
        args[position] = bad
        with pytest.raises(RuntimeError, match="expected"):
            torch.ops.vitq.qlinear(*args)


def test_compile_and_export():
    g = torch.Generator().manual_seed(0)
    x, weight, w_scale, kw = make_case(g, 6, 16, 24, 3, "w4", True)
    kw.pop("residual")

    class Layer(torch.nn.Module):
        def forward(self, q, scale, t):
            x = vk.QTensor(q, scale, 0, t)
            y = vk.qlinear_quantize(x, weight, w_scale, out=vk.ActQuant(), **kw)
            normed, coded = norm_quantize(x, weight, w_scale, kw, (None, None, 1e-6), vk.ActQuant())
            return vk.qlinear(x, weight, w_scale, **kw), y.q, normed, coded.q, coded.scale

    args = (x.q, x.scale, x.t)
    want = Layer()(*args)
    for run in (
        torch.compile(Layer(), fullgraph=True, backend="aot_eager"),
        torch.export.export(Layer(), args).module(),
    ):
        for got, expected in zip(run(*args), want):
            assert torch.equal(got, expected)


def test_oracle_in_float64_agrees_with_this_file(implementation):
    """The float64 form of ref is this file's independent formula, exactly where the sums are exact."""
    g = torch.Generator().manual_seed(0)
    x, weight, w_scale, kw = make_case(g, 5, 30, 24, 0, "w4", False)
    packed = (weight.data, LAYOUT_IDS[weight.layout], 24, 30, weight.col_sum, None, w_scale.double())
    y = ref.qlinear(x.q, x.scale.double(), 0, None, *packed, None, None, 0, None, None, torch.float64)
    assert_within(y, exact_qlinear(x, weight, w_scale, kw)[0], 1e-12)


def test_a_weight_in_another_layout_does_not_fall_back_to_the_oracle():
    """The oracle would serve it, a hundred times slower; asked for by name it does."""
    codes = torch.ones(4, 8, dtype=torch.int8)
    wrong = vk.pack_weight(codes, 8, "int8")
    x = vk.QTensor(torch.ones(2, 8, dtype=torch.int8), torch.ones(1))
    with vk.backend("ref"):
        assert vk.qlinear(x, wrong, torch.ones(4)).eq(8).all()
    if vk.backends.status()["cpu"] is None:
        with pytest.raises(ValueError, match=r"cpu: reads weight layouts .*, not int8 \(repack the weight\)"):
            vk.qlinear(x, wrong, torch.ones(4))
