"""Simulated layers against the kernels' oracles: the same codes, the same arithmetic; gradients against formulas."""

from unittest import mock

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from vitq.quantizers import ActivationQuantizer, FocusQuantizer, SimAttention, SimLinear, SimPatchConv, WeightQuantizer
from vitq.quantizers import functional as fq

from vitq_kernels import _native, backend, ops
from vitq_kernels.formats import ActQuant, FocusSpec, LevelTable, PackedWeight, QuantSpec
from vitq_kernels.ops.qattention import ref as attention_ref
from vitq_kernels.packing import pack_weight

BACKENDS = ("ref",) if _native.unavailable("cpu") else ("ref", "cpu")
TABLE = LevelTable((-127, -60, -30, -14, -7, -3, -1, 0, 2, 5, 10, 20, 40, 70, 100, 127))
SPECS = [
    QuantSpec(8, symmetric=False),
    QuantSpec(3, symmetric=False),
    QuantSpec(4),
    QuantSpec(4, scale_rule="absmax_half_range"),
    QuantSpec(4, table=TABLE),
    QuantSpec(8, granularity="per_token", dynamic=True),
    QuantSpec(2, granularity="per_token", dynamic=True),
    QuantSpec(4, granularity="per_token", dynamic=True, table=TABLE),
]


def data(m: int, k: int, seed: int, outlier: bool = False) -> torch.Tensor:
    x = torch.randn(m, k, generator=torch.Generator().manual_seed(seed))
    if outlier and m and k:
        x[0] = 0.0
        x[-1, -1] = 1e4
    return x


def activation(spec: QuantSpec, groups: int, x: torch.Tensor) -> tuple[ActivationQuantizer, ActQuant]:
    """A quantizer of x's range and the kernel's epilogue of the same numbers."""
    q = ActivationQuantizer(groups)
    if spec.dynamic:
        q.set(spec)
        return q, ActQuant.from_spec(spec, groups=groups)
    scale = torch.linspace(0.8, 1.2, groups) * (x.abs().max() + 0.1) / (2 * spec.qmax)
    zero = 0 if spec.symmetric else max(spec.qmin, -2)
    q.set(spec, scale, float(zero))
    return q, ActQuant.from_spec(spec, scale.clone(), zero, groups=groups)


@settings(max_examples=60, deadline=None)
@given(
    spec=st.sampled_from(SPECS),
    m=st.sampled_from([0, 1, 16, 17, 49]),
    k=st.integers(1, 40),
    groups=st.integers(1, 3),
    outlier=st.booleans(),
    seed=st.integers(0, 99),
)
def test_activation_codes_are_the_kernels(spec, m, k, groups, outlier, seed):
    x = data(m, k * groups, seed, outlier)
    q, epilogue = activation(spec, groups, x if m else torch.ones(1))
    with backend("ref"):
        want = ops.quantize(x, epilogue)
    code, scale = q(x)
    assert torch.equal((code + q.integer_zero_point).to(torch.int8), want.q)
    assert torch.equal(scale.reshape(want.scale.shape), want.scale)


def test_activation_comparison_rejects_a_planted_bug():
    """Ties away from even: the codes must tell."""
    x = torch.arange(-100, 100).reshape(8, -1) + 0.5
    q, epilogue = ActivationQuantizer(), ActQuant.from_spec(QuantSpec(8), torch.ones(1))
    q.set(QuantSpec(8), torch.ones(1))
    with backend("ref"):
        want = ops.quantize(x, epilogue).q
    assert torch.equal(q(x)[0].to(torch.int8), want)
    with mock.patch.object(torch.Tensor, "round_", lambda v: v.add_(0.5).floor_()):
        assert not torch.equal(q(x)[0].to(torch.int8), want)


@pytest.mark.parametrize("spec", SPECS)
@pytest.mark.parametrize("groups", [1, 3])
def test_values_are_what_codes_stand_for(spec, groups):
    x = data(17, 24, 0)
    q, _ = activation(spec, groups, x)
    code, scale = q(x)
    values, same = q.values(x)
    assert torch.equal(scale, same)
    want = (code.reshape(17, groups, -1) * scale.unsqueeze(-1)).reshape(17, 24)
    assert torch.equal(values.detach(), want.detach())


def test_codes_are_held_where_nothing_makes_them_anew():
    layer = SimLinear(torch.randn(6, 8), None)
    layer.quant.set(QuantSpec(4, granularity="per_channel"), torch.full((6,), 0.3))
    layer.hold()
    assert layer.held is None, "its scale may be learned"
    layer.requires_grad_(False)
    want = layer.codes()
    layer.hold()
    layer.weight.data.zero_()
    assert torch.equal(layer.codes(), want)
    assert torch.equal(layer.values(), want * 0.3)
    layer.held = None
    assert not layer.codes().any()
    layer.set_low_rank("merged", torch.randn(2, 8), torch.randn(6, 2))
    layer.hold()
    assert layer.held is None, "a merged branch is learned through the codes"


def linear(n: int, k: int, weight: QuantSpec, act: QuantSpec, kind: str, rank: int, x: torch.Tensor) -> SimLinear:
    w = data(n, k, 1)
    out = SimLinear(w, data(1, n, 2)[0])
    top = w.abs().amax(1)
    out.quant.set(weight, top / weight.scale_divisor)
    if rank:
        down = torch.linalg.qr(data(k, rank, 3)).Q.T
        out.set_low_rank(kind, down, 0.1 * data(n, rank, 4))
    q, _ = activation(act, 1, x)
    out.act.set(act, None if act.dynamic else q.scale.detach(), float(q.integer_zero_point))
    return out


def packed(state, backend_name: str) -> PackedWeight:
    layout = "int8_n16k4" if backend_name == "cpu" else "int8"
    return pack_weight(state.codes, state.weight.bits, layout, state.weight.table)


@settings(max_examples=40, deadline=None)
@given(
    act=st.sampled_from(SPECS),
    weight=st.sampled_from(
        [QuantSpec(b, granularity="per_channel") for b in (2, 4, 8)]
        + [QuantSpec(4, granularity="per_channel", table=TABLE)]
    ),
    branch=st.sampled_from([("error", 0), ("merged", 3), ("error", 3), ("subspace", 3)]),
    m=st.sampled_from([1, 17, 50]),
    n=st.integers(1, 33),
    k=st.integers(4, 70),
)
def test_linear_computes_what_the_integer_layer_does(act, weight, branch, m, n, k):
    x = data(m, k, 5)
    sim = linear(n, k, weight, act, *branch, x)
    state = sim.export()
    for name in BACKENDS:
        with backend(name):
            q = ops.quantize(x, state.act_quant)
            want = ops.qlinear(q, packed(state, name), state.weight_scale, state.bias, lora_up=state.lora_up)
            with torch.no_grad():
                got = sim(x)
        # The same float operations in the same order on exact integer sums.
        assert torch.equal(got, want), name
    # With gradients the branch is torch's matmul, in torch's order.
    assert torch.allclose(sim(x), want, rtol=0, atol=4e-6 * float(want.abs().max() + 1))


def test_unquantized_operands_stay_float():
    x = data(17, 24, 0)
    sim = SimLinear(data(8, 24, 1), data(1, 8, 2)[0])
    exact = torch.nn.functional.linear(x, sim.weight, sim.bias)
    assert torch.allclose(sim(x), exact, atol=1e-5)
    sim.quant.set(QuantSpec(8, granularity="per_channel"), sim.weight.abs().amax(1) / 127)
    dequantized = sim.codes() * sim.quant.scale[:, None]
    assert torch.allclose(sim(x), torch.nn.functional.linear(x, dequantized, sim.bias), atol=1e-4)
    with pytest.raises(ValueError, match="not quantized"):
        SimLinear(data(8, 24, 1), None).export()


def test_integer_product_is_exact_beyond_float32():
    a, b = torch.full((2, 4096), 255.0), torch.full((3, 4096), 127.0)
    a[0, 0] = 254.0
    want = (a.long() @ b.long().T).float()
    assert torch.equal(fq.integer_product(a, b, 255.0, 127.0), want)
    sums = a.long() @ b.long().T
    assert int(sums.max()) > 2**24  # float32 alone would not do


def test_patch_convolution_is_the_convolution():
    conv = torch.nn.Conv2d(3, 7, (4, 2), (4, 2))
    x = torch.randn(2, 3, 8, 6)
    assert torch.allclose(SimPatchConv(conv)(x), conv(x), atol=1e-5)


FOCI = [
    FocusSpec(4, 0.01, 0.3),
    FocusSpec(4, 0.01, 0.3, below="zero"),
    FocusSpec(3, 0.0, 0.6, power=2.0, renormalize=True),
    FocusSpec(4, 0.02, 0.9, power=3.0, renormalize=True, anchor="row"),
    FocusSpec(8, power=2.0, anchor="row"),
    FocusSpec(2, 0.05, 0.5, below="zero", renormalize=True),
]
OPERANDS = [
    (QuantSpec(8, granularity="per_head"), 1),
    (QuantSpec(4, granularity="per_tensor"), 0),
    (QuantSpec(8, granularity="per_token", dynamic=True), 1),
    (QuantSpec(4, granularity="per_token", dynamic=True), 1),
]


def attention(operands: QuantSpec, per_head: int, focus: FocusSpec, n: int, h: int, d: int, bias: bool) -> SimAttention:
    c = h * d
    sim = SimAttention(
        SimLinear(data(3 * c, c, 1), None), SimLinear(data(c, c, 2), None), h, d**-0.5, data(h * n, n, 3).view(h, n, n)
    )
    sim.bias = sim.bias if bias else None
    sim.operands.groups = 3 * h if per_head else 3
    scale = None if operands.dynamic else torch.linspace(0.9, 1.1, sim.operands.groups) * 3.5 / operands.qmax
    sim.operands.set(operands, scale)
    sim.focus = FocusQuantizer(focus)
    return sim


@settings(max_examples=60, deadline=None)
@given(
    operands=st.sampled_from(OPERANDS),
    focus=st.sampled_from(FOCI),
    n=st.sampled_from([1, 2, 16, 17, 50]),
    h=st.integers(1, 3),
    d=st.sampled_from([3, 8, 16]),
    bias=st.booleans(),
    windows=st.sampled_from([0, 1, 2]),
    seed=st.integers(0, 20),
)
def test_attention_computes_what_the_integer_attention_does(operands, focus, n, h, d, bias, windows, seed):
    sim = attention(*operands, focus, n, h, d, bias)
    b = 2
    qkv = data(b * n, 3 * h * d, seed).reshape(b, n, -1)
    mask = None
    if windows:
        mask = torch.where(torch.rand(windows, n, n, generator=torch.Generator().manual_seed(seed)) < 0.3, -100.0, 0.0)
    for name in BACKENDS:
        with backend(name), torch.no_grad():
            spec = sim.operands
            scale = None if spec.spec.dynamic else spec.scale.detach()
            q = ops.quantize(qkv, ActQuant.from_spec(spec.spec, scale, groups=spec.groups))
            codes = q.q.reshape(b, n, 3, h, d).permute(2, 0, 3, 1, 4)
            scales = q.scale.reshape(-1, 3, spec.groups // 3)
            parts = []
            for i in range(3):
                s = scales[:, i]
                if scale is None:
                    parts.append(s.reshape(b, n, -1).transpose(1, 2).expand(b, h, n).contiguous())
                else:
                    parts.append(s[0])
            extra = {"softmax_scale": sim.softmax_scale, "bias": sim.bias, "mask": mask}
            want = ops.qattention(*codes, *parts, focus=focus, **extra)
            assert torch.equal(sim.attend(qkv, mask), want), name


@pytest.mark.parametrize("focus", FOCI)
def test_focus_codes_are_the_kernels(focus):
    u = torch.rand(10_000, generator=torch.Generator().manual_seed(0))
    u[:5] = torch.tensor([0.0, 1.0, focus.b1, focus.b2, 1e-38])
    levels, step, offset = focus.decode()
    want = attention_ref.position(u, focus.b1, focus.b2, focus.power, focus.n).round()
    quantizer = FocusQuantizer(focus)
    with torch.no_grad():
        level, got_step, got_offset = quantizer(quantizer.position(u))
    assert torch.equal(level, levels.float()[want.long()])
    assert tuple(v.item() if isinstance(v, torch.Tensor) else v for v in (got_step, got_offset)) == (step, offset)


@pytest.mark.parametrize("focus", FOCI)
def test_focus_values_are_those_of_the_codes(focus):
    scores = data(50, 40, 0)
    e = torch.exp(scores - scores.amax(-1, keepdim=True))
    quantizer = FocusQuantizer(focus)
    with torch.no_grad():
        u = e if focus.anchor == "row" else e / e.sum(-1, keepdim=True)
        want = quantizer(quantizer.position(u))
        *got, total = quantizer.values(scores)
    assert float((got[0] == want[0]).float().mean()) > 0.998, "but for positions beside a tie"
    assert [torch.as_tensor(v).item() for v in got[1:]] == [torch.as_tensor(v).item() for v in want[1:]]
    torch.testing.assert_close(total, e.sum(-1, keepdim=True))


def test_scale_gradient_is_lsq():
    """∂(s·rne(clamp(x/s)))/∂s = rne(x/s) − x/s inside, else the bound (Esser et al. 2020); ∂/∂x = 1 inside, else 0."""
    spec = QuantSpec(4)
    x = torch.linspace(-3, 3, 101).reshape(1, -1).requires_grad_()
    q = ActivationQuantizer()
    q.set(spec, torch.tensor([0.3]))
    weight = torch.randn(1, 101, generator=torch.Generator().manual_seed(0))
    (q.values(x)[0] * weight).sum().backward()
    ratio = x.detach() / 0.3
    inside = (ratio.abs() < 7).float()
    want = torch.where(inside > 0, ratio.round() - ratio, 7.0 * ratio.sign())
    assert torch.allclose(q.scale.grad, (want * weight).sum().reshape(1), rtol=1e-4)
    assert torch.allclose(x.grad, inside * weight, rtol=1e-5)


def test_zero_point_gradient_is_the_scale_where_it_clips():
    spec = QuantSpec(4, symmetric=False)
    x = torch.tensor([[-50.0, -0.31, 0.2, 0.77, 50.0]])
    q = ActivationQuantizer()
    q.set(spec, torch.tensor([0.2]), -3.0)
    q.values(x)[0].sum().backward()
    assert torch.allclose(q.zero_point.grad, torch.tensor([-2 * 0.2]))


def test_interval_gradient():
    """Inside, P̂ ≈ u whatever the interval: ∂P̂/∂b1 is the rounding residual; clamped values move with their end."""
    focus = FocusQuantizer(FocusSpec(3, 0.1, 0.6))
    u = torch.tensor([0.02, 0.2, 0.37, 0.55, 0.9])
    for i in range(len(u)):
        level, step, offset, _ = focus.values(torch.stack([u[i], 1 - u[i]]).log())
        focus.b1.grad = focus.b2.grad = None
        (level * step + offset)[0].backward()
        ratio = (float(u[i]) - 0.1) / 0.5
        code = round(min(max(ratio, 0), 1) * 7)
        want = (1.0, 0.0) if ratio < 0 else (0.0, 1.0) if ratio > 1 else (ratio - code / 7, code / 7 - ratio)
        assert (float(focus.b1.grad), float(focus.b2.grad)) == pytest.approx(want, abs=1e-5)


@pytest.mark.parametrize("focus", FOCI)
def test_interval_gradient_is_finite_and_reaches_everything(focus):
    sim = attention(QuantSpec(8, granularity="per_head"), 1, focus, 16, 2, 8, True)
    qkv = data(32, 48, 0).reshape(2, 16, 48).requires_grad_()
    sim.attend(qkv).square().sum().backward()
    for g in (qkv.grad, sim.operands.scale.grad, sim.focus.b1.grad, sim.focus.b2.grad):
        assert bool(g.isfinite().all())
        assert float(g.abs().max()) > 0


def test_learned_rounding_starts_at_nearest_and_its_gradient_moves_it():
    w = data(6, 20, 0)
    q = WeightQuantizer()
    q.set(QuantSpec(4, granularity="per_channel"), w.abs().amax(1) / 7)
    nearest = q(w).detach()
    q.learn_rounding(w)
    assert torch.equal(q(w), nearest)
    q.soft = True
    assert torch.allclose(q.values(w), w, atol=1e-5)  # h(alpha) is the fraction: nothing is rounded yet
    q.values(w).sum().backward()
    assert float(q.alpha.grad.min()) >= 0 < float(q.alpha.grad.max())


def test_refusals():
    q = ActivationQuantizer()
    with pytest.raises(ValueError, match="expected positive finite"):
        q.set(QuantSpec(8), torch.tensor([0.0]))
    with pytest.raises(ValueError, match=r"expected \(1,\)"):
        q.set(QuantSpec(8), None)
    with pytest.raises(ValueError, match="expected None"):
        q.set(QuantSpec(8, granularity="per_token", dynamic=True), torch.ones(1))
    weight = WeightQuantizer()
    with pytest.raises(ValueError, match="expected both or neither"):
        weight.set(QuantSpec(4, granularity="per_channel"))
    weight.set(QuantSpec(4, granularity="per_channel", table=TABLE), torch.ones(3))
    with pytest.raises(ValueError, match="uniform codes"):
        weight.learn_rounding(torch.ones(3, 4))
    sim = attention(*OPERANDS[0], FOCI[0], 4, 1, 8, False)
    with pytest.raises(ValueError, match="takes neither"):
        sim(torch.zeros(1, 4, 8), is_causal=True)
