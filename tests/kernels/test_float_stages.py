"""Float stages: each fused op is the composition of its stages, bit for bit (on Triton but for the order of the
branch's sum); each stage is accurate."""

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from selected import TRITON

import vitq_kernels as vk
from vitq_kernels import backends
from vitq_kernels.formats import QuantSpec
from vitq_kernels.nn.base import choose_layout
from vitq_kernels.ops import float_stages as stages
from vitq_kernels.packing import pack_weight
from vitq_kernels.testing import assert_within, gamma

SHAPES = settings(
    max_examples=6 if TRITON else 25,
    deadline=None,
    derandomize=True,
    suppress_health_check=[HealthCheck.function_scoped_fixture],
)
ROWS, COLUMNS, RANKS = st.sampled_from([1, 3, 16, 17, 65]), st.integers(1, 150), st.integers(1, 33)


def branch() -> torch.dtype:
    """In which the back end of this test multiplies low-rank branches."""
    return backends.resolve("qlinear", "cpu").branch


def normal(*shape: int, seed: int) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


@SHAPES
@given(m=ROWS, k=COLUMNS, rank=RANKS, subspace=st.booleans(), seed=st.integers(0, 99))
def test_layer_norm_quantize_is_its_stages(implementation, m, k, rank, subspace, seed):
    x, weight, bias = 3 * normal(m, k, seed=seed) + 1, normal(k, seed=1), normal(k, seed=2)
    down = (normal(rank, k, seed=3) / k**0.5).to(branch())
    fused = vk.layer_norm_quantize(x, weight, bias, 1e-6, vk.ActQuant(lora_down=down, subspace=subspace))
    y = stages.layer_norm(x, weight, bias, 1e-6)
    t = stages.project(y, down)
    composed = vk.quantize(y - stages.expand(t, down) if subspace else y, vk.ActQuant())
    assert torch.equal(fused.q, composed.q)
    assert torch.equal(fused.scale, composed.scale)
    # What is subtracted is what lora_up multiplies: in 16 bits where the branch is.
    assert torch.equal(fused.t, t.to(branch()).float() if subspace else t)


@SHAPES
@given(
    m=ROWS,
    n=st.integers(1, 70),
    k=COLUMNS,
    rank=RANKS,
    activation=st.sampled_from(["none", "gelu_erf", "gelu_tanh"]),
    bits=st.sampled_from([4, 8]),
    seed=st.integers(0, 99),
)
def test_qlinear_is_its_stages(implementation, m, n, k, rank, activation, bits, seed):
    g = torch.Generator().manual_seed(seed)
    codes = torch.randint(-8, 8, (n, k), generator=g, dtype=torch.int8)
    layout = choose_layout(backends.resolve("qlinear", "cpu").layouts, QuantSpec(bits), None)
    weight = pack_weight(codes, bits, layout)
    down, up = ((normal(rank, k, seed=3) / k**0.5).to(branch()), normal(n, rank, seed=4).to(branch()))
    w_scale, bias = torch.rand(n, generator=g) / 50 + 0.001, normal(n, seed=5)
    gamma_, residual = normal(n, seed=6), normal(m, n, seed=7)
    x = vk.quantize(normal(m, k, seed=seed), vk.ActQuant(lora_down=down))
    fused = vk.qlinear(
        x, weight, w_scale, bias, lora_up=up, activation=activation, layer_scale=gamma_, residual=residual
    )
    y = (x.q.double() @ codes.double().T).float() * (x.scale * w_scale) + stages.expand(x.t, up.T) + bias
    if activation != "none":
        y = stages.gelu(y, "tanh" if activation == "gelu_tanh" else "none")
    composed = y * gamma_ + residual
    if TRITON:  # its branch starts from y, which comes first in a sum of R + 1 terms instead of last
        size = (x.t.abs() @ up.float().abs().T + y.abs() + bias.abs()) * gamma_.abs() + residual.abs()
        assert_within(fused, composed, gamma(rank + 4) * 1.2 * size)
    else:
        assert torch.equal(fused, composed)


@SHAPES
@given(m=ROWS, k=COLUMNS, seed=st.integers(0, 99))
def test_accuracy(implementation, m, k, seed):
    """Against float64: a K-term sum's error for the products, twice torch's own float32 error for GELU."""
    x, basis = normal(m, k, seed=seed), normal(5, k, seed=1)
    t, grid = stages.project(x, basis), basis.to(branch()).double()
    a = x.to(branch()).double()
    assert_within(t, a @ grid.T, gamma(k + 1) * (a.abs() @ grid.abs().T), "t")
    a = t.to(branch()).double()
    assert_within(stages.expand(t, basis), a @ grid, gamma(7) * (a.abs() @ grid.abs()), "t·B")
    for approximate in ("none", "tanh"):
        want = torch.nn.functional.gelu(x.double(), approximate=approximate)
        error = (torch.nn.functional.gelu(x, approximate=approximate).double() - want).abs().max()
        assert_within(stages.gelu(x, approximate), want, (2 * error + 2.0**-23).expand_as(want), approximate)


@pytest.mark.parametrize("focus", [vk.FocusSpec(4, b1=0.01, b2=0.4), vk.FocusSpec(4, power=2.0, anchor="row")])
def test_focus_position(implementation, focus):
    """Two keys of equal score, one far below: u is known (absolute ½, ½, 0; row 1, 1, 0)."""
    product = torch.tensor([[[[100, 100, -90000]]]], dtype=torch.int32)
    one = torch.ones(1)
    position, total = stages.focus_position(product, one, one, focus=focus, softmax_scale=0.1)
    u = 1.0 if focus.anchor == "row" else 0.5
    top = focus.n * min(max((u - focus.b1) / (focus.b2 - focus.b1), 0.0), 1.0) ** (1 / focus.power)
    assert position.flatten().tolist() == pytest.approx([top, top, 0.0], abs=1e-5)
    assert float(total) == pytest.approx(2.0)
    mask = torch.tensor([[[0.0, -float("inf"), 0.0]]])
    _, total = stages.focus_position(product, one, one, focus=focus, softmax_scale=0.1, mask=mask)
    assert float(total) == pytest.approx(1.0)


def test_empty_and_strided(implementation):
    assert stages.layer_norm(torch.empty(0, 5), None, None, 1e-6).shape == (0, 5)
    assert stages.gelu(torch.empty(0)).shape == (0,)
    assert stages.project(torch.empty(0, 5), torch.ones(2, 5)).shape == (0, 2)
    assert not stages.expand(torch.empty(3, 0), torch.empty(0, 4)).any()
    wide = normal(6, 40, seed=0)
    x, basis = wide[::2, ::3], normal(14, 4, seed=1).T
    assert torch.equal(stages.project(x, basis), stages.project(x.contiguous(), basis.contiguous()))
    close = {"rtol": 1e-6, "atol": 1e-6}  # torch's own loops differ between strides
    torch.testing.assert_close(stages.gelu(x), stages.gelu(x.contiguous()), **close)
    torch.testing.assert_close(
        stages.layer_norm(x, None, None, 0.1), stages.layer_norm(x.contiguous(), None, None, 0.1), **close
    )
    affine = normal(14, 4, seed=2)[:, 0], normal(14, 4, seed=3)[:, 1]
    dense = [p.contiguous() for p in affine]
    assert torch.equal(stages.layer_norm(x, *affine, 0.1), stages.layer_norm(x, *dense, 0.1))


def test_refusals():
    x = torch.ones(2, 3)
    with pytest.raises(TypeError, match="x has dtype"):
        stages.layer_norm(x.half(), None, None, 1e-6)
    with pytest.raises(ValueError, match=r"x has shape \(2, 0\)"):
        stages.layer_norm(x[:, :0], None, None, 1e-6)
    with pytest.raises(ValueError, match="weight has shape"):
        stages.layer_norm(x, torch.ones(2), None, 1e-6)
    with pytest.raises(ValueError, match="lora_down has shape"):
        stages.project(x, torch.ones(2, 2))
    with pytest.raises(ValueError, match="basis has shape"):
        stages.expand(x, torch.ones(2, 2))
    with pytest.raises(ValueError, match="approximate is 'erf'"):
        stages.gelu(x, "erf")
    product, one = torch.ones(2, 2, 3, 3, dtype=torch.int32), torch.ones(1)
    args = {"focus": vk.FocusSpec(), "softmax_scale": 1.0}
    with pytest.raises(TypeError, match="product has dtype"):
        stages.focus_position(product.float(), one, one, **args)
    with pytest.raises(ValueError, match="k_scale has shape"):
        stages.focus_position(product, one, torch.ones(5), **args)
    with pytest.raises(ValueError, match="bias has shape"):
        stages.focus_position(product, one, one, bias=torch.ones(1, 3, 3), **args)
    with pytest.raises(ValueError, match="mask has shape"):
        stages.focus_position(product, one, one, mask=torch.ones(3, 3, 3), **args)


def test_opcheck():
    ops = torch.ops.vitq
    x, one = normal(4, 6, seed=0), torch.ones(1)
    product = torch.ones(1, 2, 3, 3, dtype=torch.int32)
    torch.library.opcheck(ops.layer_norm.default, (x, torch.ones(6), None, 1e-6))
    torch.library.opcheck(ops.project.default, (x, normal(2, 6, seed=1)))
    torch.library.opcheck(ops.expand.default, (x, normal(6, 3, seed=1)))
    torch.library.opcheck(ops.gelu.default, (x, True))
    args = (1.0, 15, 0.0, 1.0, 1.0, False, False, None, None)
    torch.library.opcheck(ops.focus_position.default, (product, one, one, *args))
