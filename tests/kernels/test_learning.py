"""Learning ops: the oracle against what autograd makes of the definition, in float64; back ends against the oracle."""

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from selected import TRITON

from vitq_kernels.formats import FocusSpec
from vitq_kernels.ops import learning
from vitq_kernels.ops.learning import Dropped, ref

CASES = settings(
    max_examples=8 if TRITON else 25,
    deadline=None,
    derandomize=True,
    suppress_health_check=[HealthCheck.function_scoped_fixture],
)
ROWS, COLUMNS = st.sampled_from([1, 6, 12, 30]), st.sampled_from([1, 15, 16, 37, 65, 200])
FOCI = [
    FocusSpec(4, 0.01, 0.3),
    FocusSpec(4, 0.0, 1.0),
    FocusSpec(4, 0.01, 0.3, below="zero"),
    FocusSpec(3, 0.0, 0.6, power=2.0),
    FocusSpec(4, 0.02, 0.9, power=3.0, anchor="row"),
    FocusSpec(8, power=2.0, anchor="row"),
    FocusSpec(3, 0.05, 0.5, 2.5, "row", "zero"),
]
TABLE = (torch.arange(-128, 128).clamp(-8, 7) // 2 * 2).to(torch.int8)


def normal(*shape: int, seed: int, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).to(dtype)


def gradients(y: torch.Tensor, upstream: torch.Tensor, *of: torch.Tensor) -> tuple[torch.Tensor, ...]:
    return torch.autograd.grad((y * upstream).sum(), of)


def assert_near(got, want, error: float = 1e-5) -> None:
    """Relative to the largest: sums of many terms are compared."""
    for g, w in zip(got, want, strict=True):
        assert g.shape == w.shape
        assert g.dtype == w.dtype
        assert float((g - w).abs().max()) <= error * float(w.abs().max() + 1e-6)


def kept(x: torch.Tensor, dropped: Dropped | None) -> torch.Tensor:
    """Which elements are quantized, by what becomes of ones at a scale of 7."""
    if dropped is None:
        return torch.ones_like(x, dtype=torch.bool)
    ones = torch.ones(x.shape[0], x.shape[1], dtype=x.dtype)
    return learning.fake_quantize(ones, ones.new_full((1,), 7.0), None, -8, 7, dropped=dropped) == 0


def defined_fake_quantize(x, scale, zero, qmin, qmax, lut, quantized):
    """y = s·(clamp(x/s) + what rounding adds, a constant); dropped elements are x."""
    s = scale.repeat(len(x) // scale.numel()).unsqueeze(1)
    within = torch.maximum(torch.minimum(x / s, qmax - zero), qmin - zero)
    code = within.round()
    if lut is not None:
        code = lut.double()[(code + zero + 128).long()] - zero
    return torch.where(quantized, s * (within + (code - within).detach()), x)


@CASES
@given(
    rows=ROWS,
    columns=COLUMNS,
    scales=st.sampled_from([1, 3, 0]),
    table=st.booleans(),
    rate=st.sampled_from([None, 0.25, 1.0]),
    per_row=st.booleans(),
    seed=st.integers(0, 99),
)
def test_fake_quantize(implementation, rows, columns, scales, table, rate, per_row, seed):
    count = scales if scales and rows % scales == 0 else rows
    x, upstream = 4 * normal(rows, columns, seed=seed), normal(rows, columns, seed=seed + 1)
    scale = torch.rand(count, generator=torch.Generator().manual_seed(seed)) + 0.3
    zero, lut = None if per_row else torch.tensor([-2.3]), TABLE if table else None
    row_qmax = torch.tensor([7, 1], dtype=torch.int32).repeat(rows)[:rows] if per_row else None
    dropped = None if rate is None else Dropped(seed * 2**40 + 12345, rate)

    inputs = [v.clone().requires_grad_() for v in (x, scale, zero) if v is not None]
    y = learning.fake_quantize(*inputs[:2], None if per_row else inputs[2], -8, 7, row_qmax, lut, dropped)
    got = gradients(y, upstream, *inputs)
    draw = (None, 0) if dropped is None else (dropped.key, dropped.last)
    assert torch.equal(y, ref.fake_quantize(x, scale, zero, -8, 7, row_qmax, lut, *draw))

    # Straight through its rounding the zero point is −2.
    wide = [v.double().requires_grad_() for v in (x, scale, torch.zeros(1) if per_row else torch.tensor([-2.0]))]
    qmax = torch.tensor([[7.0]]).double() if row_qmax is None else row_qmax.double().unsqueeze(1)
    want = defined_fake_quantize(*wide, qmax * 0 - 8 if row_qmax is None else -qmax, qmax, lut, kept(x, dropped))
    torch.testing.assert_close(y.double(), want, rtol=1e-6, atol=1e-6)
    assert_near([g.double() for g in got], gradients(want, upstream.double(), *wide[: len(inputs)]))


@pytest.mark.parametrize(("zero", "clamped"), [(-8.4, -8), (-8.6, -8), (7.4, 7), (9.0, 7), (0.5, 0)])
def test_a_zero_point_beyond_the_codes_is_held(implementation, zero, clamped):
    x, zero_point = torch.tensor([[-40.0, 3.0, 50.0]]), torch.tensor([zero], requires_grad=True)
    y = learning.fake_quantize(x, torch.tensor([0.5]), zero_point, -8, 7)
    want = (torch.tensor([[-80, 6, 100]]).clamp(-8 - clamped, 7 - clamped)) * 0.5
    assert torch.equal(y, want)
    y.sum().backward()
    held = round(zero) != clamped
    outside = int((want != x).sum())
    assert float(zero_point.grad) == (0.0 if held else -0.5 * outside)


def defined_focused_softmax(scores, b1, b2, spec, quantized):
    """Straight through the rounding; levels on a grid with the derivatives of those before snapping."""
    e = torch.exp(scores - scores.amax(1, keepdim=True))
    total = e.sum(1, keepdim=True)
    x = ((e if spec.anchor == "row" else e / total) - b1) * (1.0 / (b2 - b1))
    inside = x.clamp(0.0 if spec.power == 1.0 else 1e-30, 1.0).detach()
    x = torch.where(x == inside, x, inside)  # whether clamp has a gradient at its ends differs between versions
    position = x ** (1.0 / spec.power) * spec.n
    code = torch.where(quantized, position + (position.round() - position).detach(), position)
    if spec.affine:
        return code, total.squeeze(1)
    smooth = (b1 + (b2 - b1) * (code / spec.n) ** spec.power) / (b2 / spec.grid)
    if spec.below == "zero":
        smooth = smooth * (code > 0)
    return smooth + (spec.decode()[0].double()[code.long()] - smooth).detach(), total.squeeze(1)


def check_focused_softmax(inputs, upstream, spec, dropped=None) -> None:
    """Levels, sums and gradients of ``inputs``, scores and interval, against the definition in float64."""
    level, total = learning.focused_softmax(*inputs, spec, dropped)
    rows, flat = inputs[0].shape[-1], [v.detach().double().requires_grad_() for v in inputs]
    scores = flat[0].reshape(-1, rows)
    want, sums = defined_focused_softmax(scores, *flat[1:], spec, kept(scores.detach().float(), dropped))
    want, sums = want.view(level.shape), sums.view(total.shape)
    # A float32 position beside a tie takes the other code: a step of levels, and the gradients of that code.
    same = (level.double() - want).abs() < (0.5 if dropped is None else 1e-3)
    assert int((~same).sum()) <= 1 + level.numel() // 2000
    upstream = upstream * same
    torch.testing.assert_close(total.double(), sums, rtol=1e-5, atol=0)
    got, defined = (level * upstream).sum(), (want * upstream.double()).sum()
    if spec.anchor == "row":
        got, defined = got + total.square().sum(), defined + sums.square().sum()
    got, defined = torch.autograd.grad(got, inputs), torch.autograd.grad(defined, flat)
    # The root's derivative is steep beside b1, where float32 cancels.
    assert_near([g.double() for g in got], defined, 2e-4)


@CASES
@given(
    rows=ROWS,
    columns=COLUMNS,
    spec=st.sampled_from(FOCI),
    rate=st.sampled_from([None, 0.25]),
    excluded=st.booleans(),
    seed=st.integers(0, 99),
)
def test_focused_softmax(implementation, rows, columns, spec, rate, excluded, seed):
    scores = 2 * normal(rows, columns, seed=seed)
    if excluded:
        scores[:, 1::3] = -torch.inf
    upstream = normal(rows, columns, seed=seed + 1) * (scores > -torch.inf)  # levels of excluded keys are not used
    dropped = Dropped(seed * 2**40 + 7, rate) if rate is not None and spec.affine else None
    interval = [torch.tensor(v, dtype=torch.float64, requires_grad=True) for v in (spec.b1, spec.b2)]
    check_focused_softmax([scores.requires_grad_(), *interval], upstream, spec, dropped)


def test_a_largest_score_that_is_shared_shares_what_it_loses(implementation):
    scores = torch.tensor([[1.0, 3.0, 3.0, -1.0]], requires_grad=True)
    wide = scores.detach().double().requires_grad_()
    spec = FocusSpec(4, anchor="row")
    b1, b2 = torch.tensor(0.0, dtype=torch.float64), torch.tensor(1.0, dtype=torch.float64)
    upstream = torch.tensor([[0.3, -1.0, 2.0, 5.0]])
    (got,) = gradients(learning.focused_softmax(scores, b1, b2, spec)[0], upstream, scores)
    want, _ = defined_focused_softmax(wide, b1, b2, spec, torch.ones(1, 4, dtype=torch.bool))
    assert_near([got.double()], gradients(want, upstream.double(), wide))


def defined_soft_round(alpha, weight, scale, qmin, qmax):
    h = (torch.sigmoid(alpha) * 1.2 - 0.1).clamp(0, 1)
    return ((weight / scale[:, None]).floor().detach() + h).clamp(qmin, qmax) * scale[:, None]


@CASES
@given(rows=ROWS, columns=COLUMNS, beta=st.sampled_from([2.0, 7.3, 20.0]), seed=st.integers(0, 99))
def test_learned_rounding(implementation, rows, columns, beta, seed):
    alpha, weight = 3 * normal(rows, columns, seed=seed), normal(rows, columns, seed=seed + 1)
    scale = torch.rand(rows, generator=torch.Generator().manual_seed(seed)) / 4 + 0.05
    inputs = [v.requires_grad_() for v in (alpha, scale)]
    wide = [v.detach().double().requires_grad_() for v in inputs]
    values = learning.soft_round(alpha, weight, scale, -7, 7)
    # The floor of a float32 quotient is the one meant.
    whole = ((weight / scale.detach()[:, None]).floor() + 0.5).double() * scale.detach().double()[:, None]
    want = defined_soft_round(wide[0], whole, wide[1], -7, 7)
    torch.testing.assert_close(values.double(), want, rtol=1e-5, atol=1e-6)
    upstream = normal(rows, columns, seed=seed + 2)
    assert_near([g.double() for g in gradients(values, upstream, *inputs)], gradients(want, upstream.double(), *wide))

    penalty = learning.rounding_penalty(alpha, beta)
    h = (torch.sigmoid(wide[0]) * 1.2 - 0.1).clamp(0, 1)
    defined = (1 - (2 * h - 1).abs().pow(beta)).sum(1)
    torch.testing.assert_close(penalty.double(), defined, rtol=1e-5, atol=1e-5)
    upstream = normal(rows, seed=seed + 3)
    got, wanted = gradients(penalty, upstream, alpha), gradients(defined, upstream.double(), wide[0])
    assert_near([g.double() for g in got], wanted)


@pytest.mark.parametrize("rate", [0.0, 0.1, 0.5, 1.0])
def test_what_is_dropped_is_random(implementation, rate):
    """Binomial, 4 standard deviations: overall, per row and column, beside each other, and of two draws."""
    n = 128
    first, second = (kept(torch.ones(n, n), Dropped(key, rate)).double() for key in (2**62 + 99, 2**62 + 100))
    error = 4 * (rate * (1 - rate)) ** 0.5
    assert float(first.mean()) == pytest.approx(1 - rate, abs=error / n)
    for lines in (first.mean(0), first.mean(1)):
        assert float((lines - (1 - rate)).abs().max()) <= 1.2 * error / n**0.5
    for a, b in ((first[:, 1:], first[:, :-1]), (first[1:], first[:-1]), (first, second)):
        assert float(((a - 1 + rate) * (b - 1 + rate)).mean()) == pytest.approx(
            0.0, abs=4 * rate * (1 - rate) / (n - 1)
        )


@pytest.mark.parametrize("shape", [(7,), (3, 37), (2, 5, 16)])
def test_mixed(implementation, shape):
    x, other, dropped = normal(*shape, seed=0), normal(*shape, seed=1), Dropped(2**40 + 2**32 - 5, 0.5)
    mixed = learning.mix(x, other, dropped)
    taken = mixed == other
    assert torch.equal(mixed, torch.where(taken, other, x))
    assert torch.equal(taken, ref.mix(x, other, dropped.key, dropped.last) == other)
    assert 0 < int(taken.sum()) < x.numel()
    assert torch.equal(learning.mix(x, other, Dropped(5, 0.0)), x)
    assert torch.equal(learning.mix(x, other, Dropped(5, 1.0)), other)


def test_nan_stays(implementation):
    x = torch.tensor([[1.0, torch.nan, 2.0]])
    scale = torch.tensor([0.5], requires_grad=True)
    for lut in (None, TABLE):
        assert torch.equal(learning.fake_quantize(x, scale, None, -8, 7, lut=lut).isnan(), x.isnan())
    learning.fake_quantize(x, scale, None, -8, 7).sum().backward()
    assert bool(scale.grad.isnan())
    interval = torch.tensor(0.0, dtype=torch.float64), torch.tensor(1.0, dtype=torch.float64)
    for anchor in ("absolute", "row"):
        for at in (0, 5, 19):  # wherever a maximum is begun, or goes on
            scores = torch.zeros(2, 20)
            scores[0, at] = torch.nan
            level, total = learning.focused_softmax(scores, *interval, FocusSpec(4, anchor=anchor))
            assert level.isnan().all(1).tolist() == [True, False]
            assert total.isnan().tolist() == [True, False]
            assert not level[1].isnan().any()


def test_a_strided_table(implementation):
    x, scale = normal(8, 32, seed=0), torch.tensor([0.05], requires_grad=True)
    strided = TABLE.repeat_interleave(2)[::2]
    values = []
    for table in (TABLE, strided):
        y = learning.fake_quantize(x, scale, None, -8, 7, lut=table)
        values.append((y, *gradients(y, x, scale)))
    assert not strided.is_contiguous()
    assert all(torch.equal(a, b) for a, b in zip(*values))


def test_no_rows(implementation):
    x, scale = torch.zeros(0, 3, 8), torch.zeros(0, 3, 1)
    assert learning.fake_quantize(x, scale, None, -8, 7).shape == x.shape


def test_16_bit_floats_are_widened(implementation):
    x = normal(6, 16, seed=0, dtype=torch.bfloat16)
    scale = torch.tensor([0.3])
    assert torch.equal(
        learning.fake_quantize(x, scale, None, -8, 7), learning.fake_quantize(x.float(), scale, None, -8, 7)
    )
    interval = torch.tensor(0.1, dtype=torch.float64), torch.tensor(0.9, dtype=torch.float64)
    level, _ = learning.focused_softmax(x, *interval, FocusSpec(4, 0.1, 0.9))
    assert level.dtype == torch.float32


@pytest.mark.skipif(TRITON, reason="of the operators that torch's dispatcher knows on a CPU")
def test_opcheck():
    x, grad, one = normal(6, 16, seed=0), normal(6, 16, seed=1), torch.ones(1)
    quantizer = (x, torch.ones(3), 0 * one, -8, 7, torch.ones(6, dtype=torch.int32), TABLE, 5, 0)
    table = learning._table(FocusSpec(4, 0.1, 0.9, 2.0, "row"), torch.device("cpu"), torch.float32)
    focus = (0.1, 0.9, 2.0, True, table, None, 0)
    rounding = (x, x, torch.ones(6), -7, 7)
    for op, arguments in (
        ("fake_quantize", quantizer),
        ("fake_quantize_backward", (grad, *quantizer)),
        ("focused_softmax", (x, *focus)),
        ("focused_softmax_backward", (grad, torch.ones(6), x.sigmoid(), *focus)),
        ("soft_round", rounding),
        ("soft_round_backward", (grad, *rounding)),
        ("mix", (x, grad, 5, 0)),
        ("rounding_penalty", (x, 3.0)),
        ("rounding_penalty_backward", (torch.ones(6), x, 3.0)),
    ):
        torch.library.opcheck(getattr(torch.ops.vitq, op).default, arguments)


@pytest.mark.skipif(TRITON, reason="the C++ operators' own checks")
@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({0: torch.ones(12)}, "x has 1 dimensions, expected"),
        ({0: torch.ones(6, 2).double()}, "x has dtype Double, expected Float"),
        ({1: torch.ones(4)}, "scale has 4 elements, expected a divisor of the 6 rows"),
        ({2: torch.ones(2)}, "zero_point has 2 elements, expected 1"),
        ({3: -200}, r"\(qmin, qmax\) is \(-200, 7\), expected a range within"),
        ({5: torch.ones(2, dtype=torch.int32)}, "row_qmax has 2 elements, expected 6"),
        ({6: torch.ones(16, dtype=torch.int8)}, "lut has 16 elements, expected 256"),
    ],
)
def test_an_operator_called_by_itself_stays_inside_its_buffers(change, message):
    one = torch.ones(1)
    arguments = [torch.ones(6, 2), one, one, -8, 7, None, None, None, 0]
    for i, value in change.items():
        arguments[i] = value
    with pytest.raises(RuntimeError, match=message):
        torch.ops.vitq.fake_quantize(*arguments)


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"x": torch.ones(6, 2, dtype=torch.int8)}, TypeError, "x has dtype torch.int8, expected torch.float32 or"),
        ({"x": torch.ones(6, 0)}, ValueError, r"x has shape \(6, 0\), expected \[..., L\] with L >= 1"),
        ({"scale": torch.ones(4)}, ValueError, "scale has 4 elements, expected a divisor of the 6 rows"),
        ({"scale": torch.ones(1).double()}, TypeError, "scale has dtype torch.float64, expected torch.float32"),
        ({"zero_point": torch.zeros(2)}, ValueError, r"zero_point has shape \(2,\), expected \(1\)"),
        ({"zero_point": torch.zeros(1).double()}, TypeError, "zero_point has dtype torch.float64"),
        ({"qmax": 200}, ValueError, r"\(qmin, qmax\) is \(-8, 200\), expected a range around 0"),
        ({"row_qmax": torch.ones(2, dtype=torch.int32)}, ValueError, r"row_qmax has shape \(2,\), expected \(6\)"),
        ({"lut": torch.zeros(16, dtype=torch.int8)}, ValueError, r"lut has shape \(16,\), expected \(256\)"),
    ],
)
def test_refusals_of_fake_quantize(change, error, message):
    arguments = {"x": torch.ones(6, 2), "scale": torch.ones(1), "zero_point": None, "qmin": -8, "qmax": 7}
    with pytest.raises(error, match=message):
        learning.fake_quantize(**arguments | change)


def test_refusals():
    x, half = torch.ones(2, 3), torch.tensor(0.5, dtype=torch.float64)
    with pytest.raises(ValueError, match="its levels are no positions"):
        learning.focused_softmax(x, half, half, FocusSpec(4, power=2.0), Dropped(1, 0.5))
    with pytest.raises(TypeError, match=r"b2 has dtype torch\.float32, expected torch\.float64"):
        learning.focused_softmax(x, half, half.float(), FocusSpec(4))
    with pytest.raises(ValueError, match=r"weight has shape \(3, 2\), expected \(2, 3\)"):
        learning.soft_round(x, x.T, x[:, 0], -8, 7)
    with pytest.raises(ValueError, match=r"beta is 1\.5, expected at least 2"):
        learning.rounding_penalty(x, 1.5)
    with pytest.raises(ValueError, match=r"other has shape \(3, 2\), expected \(2, 3\)"):
        learning.mix(x, x.T, Dropped(1, 0.5))
    with pytest.raises(ValueError, match=r"rate is 1\.5, expected a number in \[0, 1\]"):
        Dropped(1, 1.5)
    with pytest.raises(ValueError, match="key is -1, expected an int"):
        Dropped(-1, 0.5)
