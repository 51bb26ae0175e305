"""quantize: against float64, on adversarial data, with planted bugs."""

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

import vitq_kernels as vk
from vitq_kernels.formats import LevelTable
from vitq_kernels.ops.quantize import ref
from vitq_kernels.testing import assert_codes_match, assert_within, gamma, poison

SHAPES = settings(
    max_examples=60, deadline=None, derandomize=True, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
DTYPES = (torch.float32, torch.float16, torch.bfloat16)


def flat(a: vk.ActQuant):
    return (a.scale, a.zero_point, a.qmin, a.qmax, a.groups, a.row_qmax, a.lut, a.lora_down, a.subspace)


def quotient(x, a: vk.ActQuant, scale):
    """float64 (x − t·D)/scale with its rounding error, and t with its own; scale as the kernel returned it."""
    x = x.reshape(-1, x.shape[-1]).double()
    t = t_bound = None
    error = torch.zeros_like(x)
    if a.lora_down is not None:
        d = a.lora_down.double()
        t = x @ d.T
        t_bound = gamma(x.shape[1] + 1) * (x.abs() @ d.abs().T)
        if a.subspace:
            error = t_bound @ d.abs() + gamma(d.shape[0] + 2) * (t.abs() @ d.abs() + x.abs())
            x = x - t @ d
    m, k = x.shape
    grouped = scale.double().reshape(-1, a.groups, 1)
    exact = (x.reshape(m, a.groups, -1) / grouped).reshape(m, k)
    # reciprocal and product are rounded once each
    tolerance = (error.reshape(m, a.groups, -1) / grouped).reshape(m, k) + gamma(3) * exact.abs()
    return exact, tolerance, t, t_bound


def check(x, a: vk.ActQuant):
    out = vk.quantize(x, a)
    assert out.q.shape == x.shape
    assert out.q.is_contiguous()
    assert out.zero_point == a.zero_point
    m, k = x.reshape(-1, x.shape[-1]).shape if x.numel() else (x.shape[:-1].numel(), x.shape[-1])
    low, high = a.qmin - a.zero_point, a.qmax - a.zero_point
    if a.row_qmax is not None:
        high = a.row_qmax.double().reshape(-1, 1)
        low = -high
    if a.scale is None:
        assert out.scale.shape == (m, a.groups)
    codes = out.q.reshape(m, k)
    if x.numel():
        exact, tolerance, t, t_bound = quotient(x, a, out.scale)
        if a.lut is not None:
            plain = vk.quantize(x, vk.ActQuant(**{**a.__dict__, "lut": None})).q
            assert torch.equal(out.q, a.lut[plain.long() + 128])
            codes = plain.reshape(m, k)
        assert_codes_match(codes, exact, tolerance, low, high, a.zero_point)
        if t is not None:
            assert_within(out.t, t, t_bound, "t")
        if a.scale is None and not a.subspace:
            top = high if a.row_qmax is not None else torch.tensor(float(a.qmax), dtype=torch.float64)
            absmax = x.reshape(m, a.groups, -1).double().abs().amax(-1)
            want = torch.where(absmax == 0, 1.0, absmax / top)
            assert_within(out.scale, want, gamma(1) * want, "scale")
    return out


def test_hand_computed(implementation):
    x = torch.tensor([[0.0, 0.5, 1.5, 2.5, -0.5, -3.0, 200.0, -200.0]])
    out = vk.quantize(x, vk.ActQuant(scale=torch.tensor([1.0])))
    assert out.q.tolist() == [[0, 0, 2, 2, 0, -3, 127, -127]]  # ties to even, symmetric clamp
    out = vk.quantize(x, vk.ActQuant(scale=torch.tensor([1.0]), qmin=-128, zero_point=-28))
    assert out.q.tolist() == [[-28, -28, -26, -26, -28, -31, 127, -128]]
    out = vk.quantize(torch.tensor([[1.2, -2.0, 0.25], [0.0, 0.0, 0.0]]), vk.ActQuant(qmin=-7, qmax=7))
    assert out.q.tolist() == [[4, -7, 1], [0, 0, 0]]  # 4.2, 0.875
    assert out.scale.tolist() == [[torch.tensor(2.0 / 7).item()], [1.0]]


def test_hand_computed_low_rank(implementation):
    x = torch.tensor([[3.0, 4.0, 1.0]])
    down = torch.tensor([[0.6, 0.8, 0.0]])
    out = vk.quantize(x, vk.ActQuant(scale=torch.tensor([0.5]), lora_down=down, subspace=True))
    assert_within(out.t, torch.tensor([[5.0]]), 1e-5)
    assert out.q.tolist() == [[0, 0, 2]]
    assert vk.quantize(x, vk.ActQuant(scale=torch.tensor([0.5]), lora_down=down)).q.tolist() == [[6, 8, 2]]


@SHAPES
@given(m=st.integers(0, 37), k=st.integers(0, 150), seed=st.integers(0, 99), case=st.integers(0, 7))
def test_shapes(implementation, m, k, seed, case):
    g = torch.Generator().manual_seed(seed)
    x = torch.randn(m, k, generator=g) * 3
    down = torch.linalg.qr(torch.randn(max(k, 1), min(k, 1 + seed % 21), generator=g))[0].T[:, :k].contiguous()
    groups = 3 if k % 3 == 0 else 1
    row_qmax = torch.randint(1, 128, (m,), generator=g, dtype=torch.int32)
    static = torch.rand(groups, generator=g) * 0.05 + 0.01
    table = LevelTable((-128, -50, -20, -7, 3, 11, 60, 127)).lut()
    cases = (
        {},
        {"groups": groups},
        {"scale": static, "groups": groups},
        {"scale": static[:1], "zero_point": -37, "qmin": -128},
        {"row_qmax": row_qmax},
        {"scale": torch.rand(m, groups, generator=g) + 0.01, "groups": groups, "row_qmax": row_qmax},
        {"lut": table, "lora_down": down},
        {"lora_down": down, "subspace": True},
    )
    check(x, vk.ActQuant(**cases[case]))


@pytest.mark.parametrize("m", [1, 16, 17, 49, 50, 197, 198, 577])
def test_vit_rows(implementation, m):
    x = torch.randn(m, 100, generator=torch.Generator().manual_seed(m))
    x[:, 3] *= 1e4  # an outlier channel
    check(x, vk.ActQuant(lora_down=torch.randn(5, 100, generator=torch.Generator().manual_seed(1))))


@pytest.mark.parametrize("dtype", DTYPES)
def test_dtypes_and_strides(implementation, dtype):
    base = torch.randn(2, 41, 7, generator=torch.Generator().manual_seed(0)).to(dtype)
    down = torch.randn(3, 41, generator=torch.Generator().manual_seed(1)).to(dtype)
    for x in (base.transpose(1, 2), base.transpose(1, 2).contiguous()[:, 1:], base.transpose(1, 2)[:, ::2]):
        out = check(x, vk.ActQuant(lora_down=down))
        same = vk.quantize(x.float().contiguous(), vk.ActQuant(lora_down=down.float()))
        assert torch.equal(out.q, same.q)
        assert torch.equal(out.scale, same.scale)
    misaligned = torch.randn(1 + 3 * 33)[1:].reshape(3, 33)
    check(misaligned, vk.ActQuant())


def test_16_bit_values_are_read_exactly(implementation):
    """Every float16 and bfloat16 value, subnormals included, quantizes as its float32 value does."""
    for dtype in (torch.float16, torch.bfloat16):
        x = torch.arange(-(1 << 15), 1 << 15, dtype=torch.int32).to(torch.int16).view(dtype).reshape(16, -1)
        for scale in (1e-7, 0.01, 300.0):
            a = vk.ActQuant(scale=torch.tensor([scale]))
            assert torch.equal(vk.quantize(x, a).q, vk.quantize(x.float(), a).q)


def test_ties_and_scale_equal_the_oracle_bitwise(implementation):
    x = torch.arange(-1024, 1024).reshape(16, 128) * 0.5
    for a in (vk.ActQuant(), vk.ActQuant(scale=torch.tensor([1.0])), vk.ActQuant(scale=torch.tensor([2.0]))):
        out = vk.quantize(x, a)
        q, scale, _ = ref.quantize(x, *flat(a))
        assert torch.equal(out.q, q)
        assert a.scale is not None or torch.equal(out.scale, scale)


def test_special_values(implementation):
    nan, inf = float("nan"), float("inf")
    x = torch.tensor([[1.0, nan, 2.0] * 11, [inf, 1.0, -inf] * 11, [0.0] * 33, [1e-42, -1e-44, 0.0] * 11])
    static = vk.quantize(x, vk.ActQuant(scale=torch.tensor([1.0]), zero_point=5, qmin=-128))
    assert static.q[0, :3].tolist() == [6, 5, 7]
    assert static.q[1, :3].tolist() == [127, 6, -128]
    dynamic = vk.quantize(x, vk.ActQuant())
    assert dynamic.scale[:2].isnan().all()
    assert dynamic.scale[2].item() == 1.0
    assert not dynamic.q[:3].any()
    want, scale, _ = ref.quantize(x, *flat(vk.ActQuant()))
    assert torch.equal(dynamic.q, want)
    assert torch.equal(dynamic.scale[2:], scale[2:])


def test_results_are_written_everywhere(implementation):
    x = torch.randn(13, 71, generator=torch.Generator().manual_seed(0))
    down = torch.linalg.qr(torch.randn(71, 9, generator=torch.Generator().manual_seed(1)))[0].T.contiguous()
    a = vk.ActQuant(lora_down=down, subspace=True)
    outs = []
    for byte in (0x7F, 0xA5):
        with poison(byte):
            outs.append(vk.quantize(x.clone(), a))
    for field in ("q", "scale", "t"):
        assert torch.equal(getattr(outs[0], field), getattr(outs[1], field))


def test_bitwise_repeatable_for_any_thread_count(implementation):
    x = torch.randn(300, 96, generator=torch.Generator().manual_seed(0))
    a = vk.ActQuant(lora_down=torch.randn(7, 96, generator=torch.Generator().manual_seed(1)))
    before = torch.get_num_threads()
    outs = []
    try:
        for threads in (1, 2, 3):
            torch.set_num_threads(threads)
            outs.append(vk.quantize(x, a))
    finally:
        torch.set_num_threads(before)
    for out in outs[1:]:
        assert torch.equal(out.q, outs[0].q)
        if implementation != "ref":  # the oracle's matmul is torch's, which promises nothing
            assert torch.equal(out.t, outs[0].t)


@pytest.mark.parametrize("bug", ["half away from zero", "wrong zero point", "one tail element", "scale by 128"])
def test_planted_bugs_are_caught(bug):
    x = torch.arange(-240, 241).reshape(1, -1) * 0.5
    scale = torch.tensor([1.0])
    exact = x.double()
    codes = torch.round(exact).to(torch.int8)
    if bug == "half away from zero":
        codes = (torch.sign(exact) * torch.floor(exact.abs() + 0.5)).to(torch.int8)
    elif bug == "wrong zero point":
        codes += 1
    elif bug == "one tail element":
        codes[0, -1] = 0
    else:
        codes = torch.round(exact * 127 / 128).to(torch.int8)
    with pytest.raises(AssertionError, match="codes off"):
        # a tie computed without error has no tolerance
        assert_codes_match(codes, exact / scale, 0.0, -127, 127)


BAD = (
    (lambda x: vk.quantize(x.int(), vk.ActQuant()), TypeError, "x has dtype torch.int32, expected"),
    (lambda x: vk.quantize(x, vk.ActQuant(groups=5)), ValueError, "groups is 5, expected a divisor"),
    (lambda x: vk.quantize(x, vk.ActQuant(scale=torch.ones(3))), ValueError, r"quant.scale has shape \(3,\)"),
    (lambda x: vk.quantize(x, vk.ActQuant(scale=torch.ones(1).double())), TypeError, "quant.scale has dtype"),
    (lambda x: vk.quantize(x, vk.ActQuant(row_qmax=torch.ones(9, dtype=torch.int32))), ValueError, "row_qmax"),
    (lambda x: vk.quantize(x, vk.ActQuant(lut=torch.zeros(16, dtype=torch.int8))), ValueError, "quant.lut"),
    (lambda x: vk.quantize(x, vk.ActQuant(lora_down=torch.zeros(2, 9))), ValueError, "lora_down has shape"),
    (lambda x: vk.quantize(torch.tensor(1.0), vk.ActQuant()), ValueError, r"x has shape \(\)"),
)


@pytest.mark.parametrize(("call", "error", "message"), BAD)
def test_bad_input(call, error, message):
    with pytest.raises(error, match=message):
        call(torch.zeros(2, 8))


SAMPLES = (
    vk.ActQuant(),
    vk.ActQuant(scale=torch.tensor([0.1, 0.2]), groups=2, lora_down=torch.ones(3, 8)),
    vk.ActQuant(row_qmax=torch.tensor([7, 127], dtype=torch.int32), lora_down=torch.eye(8)[:2], subspace=True),
)


@pytest.mark.parametrize("a", SAMPLES)
def test_opcheck(a):
    torch.library.opcheck(torch.ops.vitq.quantize.default, (torch.randn(2, 8), *flat(a)))


def test_compile_and_export():
    x, a = torch.randn(2, 8), SAMPLES[1]

    class Quantize(torch.nn.Module):
        def forward(self, x):
            out = vk.quantize(x, a)
            return out.q, out.t

    want = vk.quantize(x, a)
    for run in (
        torch.compile(Quantize(), fullgraph=True, backend="aot_eager"),
        torch.export.export(Quantize(), (x,)).module(),
    ):
        q, t = run(x)
        assert torch.equal(q, want.q)
        assert torch.equal(t, want.t)
