"""layer_norm_quantize: against float64 with the error bound of a two-pass LayerNorm."""

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

import vitq_kernels as vk
from vitq_kernels.testing import assert_codes_match, assert_within, gamma, isas, poison

EPS = 1e-6
SHAPES = settings(
    max_examples=40, deadline=None, derandomize=True, suppress_health_check=[HealthCheck.function_scoped_fixture]
)


def flat(a: vk.ActQuant):
    return (a.scale, a.zero_point, a.qmin, a.qmax, a.groups, a.row_qmax, a.lut, a.lora_down, a.subspace)


def exact_layer_norm(x, weight, bias, eps, implementation):
    """float64 LayerNorm and the error bound of float32 arithmetic after statistics in double.

    d = x − c rounds once, d − δ once, the variance is off by 6u (its root by 3u), rstd, product and γ round once each:
    8u of the result; δ itself, a mean of once-rounded d in blocks of four, is off by 3u of the mean |d|, at most 1.
    The float32 statistics of torch, which the oracle uses, cost K-term sums and a mean rounded to float32 besides.
    Those of a GPU are float32 too, but centred by a first mean and summed in trees, no term through more than 32
    additions: 32u more on δ, half of 32u more on rstd.
    """
    x = x.double()
    mean = x.mean(-1, keepdim=True)
    variance = (x - mean).square().mean(-1, keepdim=True)
    centred = (x - mean) / torch.sqrt(variance + eps)
    y = centred if weight is None else centred * weight.double()
    tree = 32 if implementation in ("triton", "cuda") else 0
    bound = gamma(8 + tree // 2) * y.abs() + gamma(4 + tree) * (1.0 if weight is None else weight.double().abs())
    if implementation == "ref":
        worst = gamma(x.shape[-1] + 8) * (x.abs().amax(-1, keepdim=True) / torch.sqrt(variance + eps) + centred.abs())
        bound = bound + worst * (1.0 if weight is None else weight.double().abs())
    if bias is not None:
        y = y + bias.double()
        bound = bound + gamma(2) * y.abs() + gamma(1) * bias.double().abs()
    return y, bound


def gathered(y, gather):
    """Rows of [B, T, K] in the order of ``gather``, zeros where it holds −1: by Python's own indexing, row by row."""
    zero = torch.zeros(y.shape[-1], dtype=y.dtype)
    rows = [image[token] if token >= 0 else zero for image in y for token in gather.tolist()]
    return torch.stack(rows) if rows else y.new_zeros(0, y.shape[-1])


def check(x, weight, bias, a: vk.ActQuant, implementation, eps=EPS, gather=None):
    out = vk.layer_norm_quantize(x, weight, bias, eps, a, gather)
    return check_output(out, x, weight, bias, a, implementation, eps, gather)


def check_output(out, x, weight, bias, a: vk.ActQuant, implementation, eps=EPS, gather=None):
    k = x.shape[-1]
    m = x.shape[:-1].numel()
    y, bound = exact_layer_norm(x.reshape(m, k), weight, bias, eps, implementation)
    if gather is None:
        assert out.q.shape == x.shape
    else:
        assert out.q.shape == (x.shape[0], len(gather), k)
        y, bound = (gathered(v.reshape(x.flatten(1, -2).shape), gather) for v in (y, bound))
        m = len(y)
    if a.lora_down is not None:
        d = a.lora_down.double()
        t = y @ d.T
        t_bound = bound @ d.abs().T + gamma(k + 1) * (y.abs() @ d.abs().T)
        assert_within(out.t, t, t_bound, "t")
        if a.subspace:
            bound = bound + t_bound @ d.abs() + gamma(d.shape[0] + 2) * (t.abs() @ d.abs() + y.abs())
            y = y - t @ d
    scale = out.scale.double().reshape(-1, 1)
    exact = y / scale
    low, high = a.qmin - a.zero_point, a.qmax - a.zero_point
    if a.row_qmax is not None:
        high = a.row_qmax.double()[:, None]
        low = -high
    if a.scale is None:
        absmax = y.abs().amax(-1, keepdim=True)
        want = torch.where(absmax == 0, 1.0, absmax / high)
        slack = bound.amax(-1, keepdim=True) / high + gamma(1) * want
        assert_within(scale, want, torch.where(absmax == 0, 0.0, slack), "scale")
    tolerance = bound / scale + gamma(3) * exact.abs()
    assert_codes_match(out.q.reshape(m, k), exact, tolerance, low, high, a.zero_point)
    return out


def test_hand_computed(implementation):
    x = torch.tensor([[1.0, 3.0], [5.0, 5.0]])
    out = vk.layer_norm_quantize(
        x, torch.tensor([2.0, 4.0]), torch.tensor([0.0, 1.0]), 0.0, vk.ActQuant(scale=torch.tensor([1.0]))
    )
    # (1, 3) normalizes to (−1, 1). Without eps a constant row is 0/0: NaN, hence the codes of zero.
    assert out.q[0].tolist() == [-2, 5]
    assert out.q[1].tolist() == [0, 0]


@SHAPES
@given(m=st.integers(0, 20), k=st.integers(1, 150), seed=st.integers(0, 99))
def test_shapes(implementation, m, k, seed):
    g = torch.Generator().manual_seed(seed)
    x = torch.randn(m, k, generator=g) * 3
    weight = torch.randn(k, generator=g) if seed % 2 else None
    bias = torch.randn(k, generator=g) if seed % 3 else None
    down = torch.linalg.qr(torch.randn(k, min(k, 9), generator=g))[0].T.contiguous()
    static = torch.tensor([0.03])
    cases = (
        {},
        {"scale": static},
        {"scale": static, "zero_point": -20, "qmin": -128},
        {"lora_down": down, "scale": static},
        {"lora_down": down, "subspace": True, "scale": static},
    )
    check(x, weight, bias, vk.ActQuant(**cases[seed % 5]), implementation)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_dtypes(implementation, dtype):
    g = torch.Generator().manual_seed(0)
    x = torch.randn(2, 9, 50, generator=g).to(dtype)
    check(x[:, ::2], torch.randn(50, generator=g).to(dtype), torch.randn(50).to(dtype), vk.ActQuant(), implementation)


def test_large_mean(implementation):
    """A mean a thousand times the deviation: one-pass variance would lose every digit."""
    x = 1000.0 + torch.randn(5, 384, generator=torch.Generator().manual_seed(0))
    check(x, None, None, vk.ActQuant(), implementation)


def test_outlier_channel(implementation):
    x = torch.randn(17, 96, generator=torch.Generator().manual_seed(0))
    x[:, 5] = 1e4
    check(x, None, torch.ones(96), vk.ActQuant(), implementation)


def test_special_values(implementation):
    x = torch.randn(3, 40)
    x[0, 7], x[1, 3], x[2] = float("nan"), float("inf"), 4.0
    out = vk.layer_norm_quantize(x, None, None, EPS, vk.ActQuant())
    assert out.scale[:2].isnan().all()
    assert out.scale[2].item() == 1.0
    assert not out.q.any()


def test_written_everywhere_and_repeatable(implementation):
    x = torch.randn(37, 71, generator=torch.Generator().manual_seed(0))
    a = vk.ActQuant(lora_down=torch.randn(5, 71, generator=torch.Generator().manual_seed(1)))
    before, outs = torch.get_num_threads(), []
    try:
        for byte, threads in ((0x7F, 1), (0xA5, 2)):
            torch.set_num_threads(threads)
            with poison(byte):
                outs.append(vk.layer_norm_quantize(x.clone(), None, None, EPS, a))
    finally:
        torch.set_num_threads(before)
    assert torch.equal(outs[0].q, outs[1].q)
    assert torch.equal(outs[0].scale, outs[1].scale)


def make_gather(tokens, slots, generator):
    """[slots] int32: tokens in any order, some several times, some never, a fifth of the slots empty."""
    gather = torch.randint(0, tokens, (slots,), generator=generator)
    return gather.masked_fill(torch.rand(slots, generator=generator) < 0.2, -1).to(torch.int32)


GATHERED = (
    {},
    {"scale": torch.tensor([0.03])},
    {"scale": torch.tensor([0.03]), "zero_point": -20, "qmin": -128},
    {"lora_down": True},
    {"lora_down": True, "subspace": True},
    {"lora_down": True, "subspace": True, "scale": torch.tensor([0.03]), "zero_point": 7, "qmin": -128},
)


@SHAPES
@given(
    b=st.integers(0, 3),
    grid=st.tuples(st.integers(1, 5), st.integers(1, 5)),
    slots=st.integers(0, 20),
    k=st.integers(1, 60),
    case=st.sampled_from(GATHERED),
    eps=st.sampled_from([EPS, 0.0]),
    seed=st.integers(0, 99),
)
def test_gather(implementation, b, grid, slots, k, case, eps, seed):
    g = torch.Generator().manual_seed(seed)
    k += 7 if eps == 0.0 else 0  # a row of one column has no deviation
    x = torch.randn(b, *grid, k, generator=g) * 3
    gather = make_gather(grid[0] * grid[1], slots, g)
    if "lora_down" in case:
        case = case | {"lora_down": torch.linalg.qr(torch.randn(k, min(k, 5), generator=g))[0].T.contiguous()}
    a = vk.ActQuant(**case)
    out = check(x, torch.randn(k, generator=g), torch.randn(k, generator=g), a, implementation, eps, gather)
    empty = (gather < 0).repeat(b)
    assert (out.q.reshape(-1, k)[empty] == a.zero_point).all()
    assert a.scale is not None or (out.scale[empty] == 1.0).all()
    assert out.t is None or not out.t[empty].any()


def test_gather_with_everything_per_row(implementation):
    """Rows with two strides, a strided map; scales, bit-widths and tables in the order of the result."""
    g = torch.Generator().manual_seed(0)
    x = torch.randn(3, 9, 40, generator=g)[:, 2:]
    gather = torch.tensor([3, 0, -1, 0, 6, 0, 2, 0, 0], dtype=torch.int32)[::2]
    row_qmax = torch.arange(1, 16, dtype=torch.int32)
    for quant in ({}, {"scale": torch.rand(15, 1, generator=g) + 0.01}, {"row_qmax": row_qmax}):
        check(x, None, torch.ones(40), vk.ActQuant(**quant), implementation, gather=gather)
    lut = torch.arange(-128, 128).flip(0).to(torch.int8)
    codes, moved = (
        vk.layer_norm_quantize(x, None, None, EPS, vk.ActQuant(lut=table), gather).q for table in (None, lut)
    )
    assert torch.equal(moved, lut[codes.long() + 128])


def test_gathered_rows_are_the_rows(implementation):
    """No row depends on the rows beside it: bit for bit what the same tokens give in their own order."""
    g = torch.Generator().manual_seed(0)
    x, weight = torch.randn(2, 5, 7, 96, generator=g).bfloat16(), torch.randn(96, generator=g)
    gather = make_gather(35, 48, g)
    plain = vk.layer_norm_quantize(x, weight, None, EPS, vk.ActQuant())
    with poison(0xA5):
        got = vk.layer_norm_quantize(x, weight, None, EPS, vk.ActQuant(), gather)
    assert torch.equal(got.q.flatten(0, 1), gathered(plain.q.reshape(2, 35, 96), gather))
    scale = gathered(plain.scale.reshape(2, 35, 1), gather)
    assert torch.equal(got.scale, torch.where((gather < 0).repeat(2)[:, None], 1.0, scale))


GATHER_BUGS = {
    "another slot": lambda gather: gather.roll(1),
    "padding reads a token": lambda gather: gather.clamp(min=0),
    "tokens become padding": lambda gather: torch.where(gather == gather.max(), -1, gather),
}


@pytest.mark.parametrize("bug", GATHER_BUGS)
def test_planted_gather_bugs_are_caught(bug, monkeypatch):
    g = torch.Generator().manual_seed(0)
    x, gather = torch.randn(2, 12, 20, generator=g), make_gather(12, 16, g)
    a = vk.ActQuant(scale=torch.tensor([0.03]))
    with vk.backend("ref"):
        check(x, None, None, a, "ref", gather=gather)
        right = vk.layer_norm_quantize
        monkeypatch.setattr(vk, "layer_norm_quantize", lambda *args: right(*args[:-1], GATHER_BUGS[bug](args[-1])))
        with pytest.raises(AssertionError, match="codes off"):
            check(x, None, None, a, "ref", gather=gather)


@pytest.mark.parametrize("bug", ["unbiased variance", "eps outside the root"])
def test_planted_bugs_are_caught(bug):
    x = torch.randn(4, 12, generator=torch.Generator().manual_seed(0)) * 0.01
    y, bound = exact_layer_norm(x, None, None, 1e-4, "cpu")
    mean, eps = x.mean(-1, keepdim=True), 1e-4
    if bug == "unbiased variance":
        wrong = (x - mean) / torch.sqrt(x.var(-1, keepdim=True) + eps)
    else:
        wrong = (x - mean) / (x.var(-1, keepdim=True, unbiased=False).sqrt() + eps)
    with pytest.raises(AssertionError, match="codes off"):
        assert_codes_match(torch.round(wrong / 0.01).to(torch.int8), y / 0.01, bound / 0.01, -127, 127)


BAD = (
    (lambda x: vk.layer_norm_quantize(x.int(), None, None, EPS, vk.ActQuant()), TypeError, "x has dtype"),
    (lambda x: vk.layer_norm_quantize(x, torch.ones(3), None, EPS, vk.ActQuant()), ValueError, "weight has shape"),
    (lambda x: vk.layer_norm_quantize(x, None, torch.ones(3), EPS, vk.ActQuant()), ValueError, "bias has shape"),
    (lambda x: vk.layer_norm_quantize(x, None, None, -1.0, vk.ActQuant()), ValueError, "eps is -1.0"),
    (lambda x: vk.layer_norm_quantize(x[:, :0], None, None, EPS, vk.ActQuant()), ValueError, "K >= 1"),
    (lambda x: gathering(x[None], torch.zeros(3)), TypeError, "gather has dtype torch.float32, expected torch.int32"),
    (lambda x: gathering(x[None], torch.zeros(3, 1).int()), ValueError, r"gather has shape \(3, 1\), expected \(any\)"),
    (lambda x: gathering(x[None], torch.zeros(3, device="meta").int()), ValueError, "gather is on meta, expected cpu"),
    (lambda x: gathering(x, torch.zeros(3).int()), ValueError, r"x has shape \(2, 8\), expected \[B, ..., K\] where"),
    (
        lambda x: gathering(x[None], torch.zeros(3).int(), row_qmax=torch.ones(2).int()),
        ValueError,
        r"quant.row_qmax has shape \(2,\), expected \(3\)",
    ),
)


def gathering(x, gather, **quant):
    return vk.layer_norm_quantize(x, None, None, EPS, vk.ActQuant(**quant), gather)


@pytest.mark.parametrize(("call", "error", "message"), BAD)
def test_bad_input(call, error, message):
    with pytest.raises(error, match=message):
        call(torch.zeros(2, 8))


def test_opcheck():
    a = vk.ActQuant(lora_down=torch.ones(3, 8))
    args = (torch.randn(2, 3, 8), torch.ones(8), None, EPS, *flat(a))
    torch.library.opcheck(torch.ops.vitq.layer_norm_quantize.default, (*args, None, 0))
    gather = torch.tensor([2, -1, 0, 1], dtype=torch.int32)
    torch.library.opcheck(torch.ops.vitq.layer_norm_quantize.default, (*args, gather, 3))


@pytest.mark.skipif(not isas(), reason="the C++ kernels are not built")
def test_a_gather_of_images_without_tokens(implementation):
    x, nowhere = torch.empty(2, 0, 8), torch.full((4,), -1, dtype=torch.int32)
    out = vk.layer_norm_quantize(x, None, None, 1e-6, vk.ActQuant(), gather=nowhere)
    assert not out.q.any()
    if implementation.startswith("cpu"):
        with pytest.raises(RuntimeError, match=r"gather has entries in \[0, 0\], expected \[-1, 0\)"):
            vk.layer_norm_quantize(x, None, None, 1e-6, vk.ActQuant(), gather=nowhere + 1)


def test_native_code_checks_what_addresses_memory():
    args = (torch.zeros(2, 3, 8), None, None, EPS, *flat(vk.ActQuant()))
    op = torch.ops.vitq.layer_norm_quantize.default
    for entry in (-2, 3):
        with pytest.raises(RuntimeError, match=r"gather has entries in \[.*\], expected \[-1, 3\)"):
            op(*args, torch.tensor([0, entry], dtype=torch.int32), 3)
    with pytest.raises(RuntimeError, match="x has 6 rows, expected images of 4 tokens"):
        op(*args, torch.zeros(2, dtype=torch.int32), 4)


def test_compile_and_export():
    class Norm(torch.nn.Module):
        def forward(self, x):
            return vk.layer_norm_quantize(x, None, None, EPS, vk.ActQuant()).q

    x = torch.randn(2, 8)
    want = Norm()(x)
    assert torch.equal(torch.compile(Norm(), fullgraph=True, backend="aot_eager")(x), want)
    assert torch.equal(torch.export.export(Norm(), (x,)).module()(x), want)
