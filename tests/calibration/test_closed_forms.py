"""Low-rank starts, regressions, rounding and level tables against independent truth."""

import itertools

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from vitq import lowrank
from vitq.levels import activation_table, optimal_levels, weight_table
from vitq.observers import Histogram, InputStats, affine_range, moment, search_range, weight_scale

from vitq_kernels.formats import LevelTable, QuantSpec


def rows(t: int, k: int, seed: int, spread: float = 1.0) -> torch.Tensor:
    g = torch.Generator().manual_seed(seed)
    mix = torch.randn(k, k, generator=g, dtype=torch.float64)
    scale = torch.logspace(0, spread, k, dtype=torch.float64)
    return torch.randn(t, k, generator=g, dtype=torch.float64) * scale @ mix


def cost(e: torch.Tensor, up: torch.Tensor, down: torch.Tensor, x: torch.Tensor) -> float:
    return float((x @ (e - up @ down).T).square().sum())


@settings(max_examples=15, deadline=None)
@given(n=st.integers(2, 20), k=st.integers(2, 20), rank=st.integers(1, 6), seed=st.integers(0, 50))
def test_whitened_branch_is_optimal(n, k, rank, seed):
    """Nothing nearby of the same rank, and not the plain SVD, leaves less E‖(E − UD)x‖²."""
    rank = min(rank, n, k)
    x = rows(200, k, seed)
    e = torch.randn(n, k, dtype=torch.float64, generator=torch.Generator().manual_seed(seed + 1))
    c = x.T @ x / len(x)
    up, down = lowrank.whitened(e, c, rank)
    best = cost(e, up, down, x)
    tail = np.linalg.svd((e @ lowrank.roots(c)[0]).numpy(), compute_uv=False)[rank:]
    assert best == pytest.approx(len(x) * float((tail**2).sum()), rel=1e-6, abs=1e-9 * cost(e, 0 * up, down, x))
    assert best <= cost(e, *lowrank.truncated(e, rank), x) * (1 + 1e-9) + 1e-9
    g = torch.Generator().manual_seed(seed)
    for size in (1e-3, 1e-1, 1.0):
        moved = (p + size * p.std() * torch.randn(p.shape, generator=g, dtype=p.dtype) for p in (up, down))
        assert best <= cost(e, *moved, x) * (1 + 1e-9) + 1e-9


def test_roots_and_damping():
    x = rows(50, 7, 3)
    c = x.T @ x / 50
    root, inverse = lowrank.roots(c)
    assert torch.allclose(root @ root, c, rtol=1e-9)
    assert torch.allclose(root @ inverse, torch.eye(7, dtype=torch.float64), atol=1e-6)
    dead = torch.zeros(4, 4, dtype=torch.float64)
    assert float(torch.linalg.eigvalsh(lowrank.damped(dead, 0.1)).min()) > 0


def test_principal_directions_are_orthonormal_and_explain_most():
    x = rows(300, 24, 0)
    c = x.T @ x / len(x)
    p = lowrank.principal_directions(c, 8)
    assert torch.allclose(p @ p.T, torch.eye(8, dtype=torch.float64), atol=1e-10)
    left = float((x - x @ p.T @ p).square().sum())
    assert left == pytest.approx(len(x) * float(np.linalg.eigvalsh(c.numpy())[:-8].sum()), rel=1e-9)
    other = torch.linalg.qr(torch.randn(24, 8, dtype=torch.float64)).Q.T
    assert left < float((x - x @ other.T @ other).square().sum())


def test_regression_is_numpys_ridge():
    x, target = rows(100, 9, 1), torch.randn(5, 9, dtype=torch.float64)
    y = torch.randn(100, 5, dtype=torch.float64)
    c, cross, damping = x.T @ x / 100, y.T @ x / 100, 0.3
    strength = damping * float(c.diagonal().mean())
    # Ridge towards the target is least squares with √λ·I appended.
    a = np.vstack([x.numpy() / 10, np.sqrt(strength) * np.eye(9)])
    b = np.vstack([y.numpy() / 10, np.sqrt(strength) * target.numpy().T])
    want = np.linalg.lstsq(a, b, rcond=None)[0].T
    assert np.allclose(lowrank.regress(target, cross, c, damping).numpy(), want, atol=1e-9)


@settings(max_examples=10, deadline=None)
@given(bits=st.integers(2, 4), seed=st.integers(0, 50), table=st.booleans())
def test_compensated_rounding_beats_nearest_and_is_nearest_of_its_latent(bits, seed, table):
    x, w = rows(400, 32, seed), torch.randn(12, 32, dtype=torch.float64)
    spec = QuantSpec(bits, granularity="per_channel")
    if table:
        spec = weight_table(w.float(), spec, None)
    scale = weight_scale(w.float(), spec, None, "mse", 2.0, 40).double()
    c = x.T @ x / len(x)
    codes, latent = lowrank.compensated_rounding(w, c, scale, spec)
    lut = None if spec.table is None else spec.table.lut().double()

    def nearest(v):
        q = (v / scale[:, None]).round().clamp(spec.qmin, spec.qmax)
        return q if lut is None else lut[q.long() + 128]

    assert torch.equal(nearest(latent), codes)
    loss = lambda q: float((x @ (w - q * scale[:, None]).T).square().sum())  # noqa: E731
    assert loss(codes) < loss(nearest(w))


def test_compensated_rounding_of_uncorrelated_inputs_is_nearest():
    w = torch.randn(6, 10, dtype=torch.float64)
    spec, scale = QuantSpec(4, granularity="per_channel"), w.abs().amax(1) / 7
    codes, latent = lowrank.compensated_rounding(w, torch.eye(10, dtype=torch.float64), scale, spec)
    assert torch.equal(codes, (w / scale[:, None]).round().clamp(-7, 7))
    assert torch.allclose(latent, w)


def test_kernel_rank():
    assert [lowrank.kernel_rank(r, 192, 576) for r in (0, 15, 16, 33, 500)] == [0, 0, 16, 32, 96]
    assert lowrank.kernel_rank(32, 10, 192) == 0


@settings(max_examples=20, deadline=None)
@given(count=st.sampled_from([2, 4]), seed=st.integers(0, 100), points=st.integers(4, 9))
def test_level_tables_are_optimal(count, seed, points):
    """Against brute force over all partitions of a few occupied codes."""
    g = np.random.default_rng(seed)
    where = np.sort(g.choice(255, points, replace=False))
    mass = torch.zeros(255)
    mass[where] = torch.from_numpy(g.random(points).astype(np.float32)) + 0.1
    table = optimal_levels(mass, count)

    def error(levels):
        return sum(float(mass[i]) * min((i - 127 - l) ** 2 for l in levels) for i in where)

    best = np.inf
    for cuts in itertools.combinations(range(1, points), count - 1):
        groups = np.split(where - 127, cuts)
        levels = [round(float(np.average(v, weights=mass[v + 127].numpy()))) for v in groups]
        best = min(best, error(levels))
    assert error(table.levels) <= best * (1 + 1e-6) + 1e-6


def test_degenerate_tables_stay_valid():
    one = torch.zeros(255)
    one[127] = 5.0
    assert optimal_levels(one, 16).bits == 4
    assert optimal_levels(torch.ones(255), 128).bits == 7
    edge = torch.zeros(255)
    edge[254] = 1.0
    assert optimal_levels(edge, 4).levels[-1] == 127


def test_tables_beat_uniform_levels():
    x = torch.randn(2000, 16, generator=torch.Generator().manual_seed(0)) ** 3
    spec = QuantSpec(4, granularity="per_token", dynamic=True)
    error = {}
    for name, s in (("uniform", spec), ("table", activation_table(x, spec))):
        scale = x.abs().amax(1, keepdim=True) / s.qmax
        q = (x / scale).round().clamp(s.qmin, s.qmax)
        q = q if s.table is None else s.table.lut().float()[q.long() + 128]
        error[name] = float((q * scale - x).square().sum())
    assert error["table"] < 0.6 * error["uniform"]


@settings(max_examples=30, deadline=None)
@given(bits=st.integers(2, 8), low=st.floats(-9, 3), width=st.floats(1e-3, 20))
def test_affine_range_represents_zero_and_spans_the_range(bits, low, width):
    spec = QuantSpec(bits, symmetric=False)
    a, b = torch.tensor([low]), torch.tensor([low + width])
    scale, zero = affine_range(a, b, spec)
    assert spec.qmin <= float(zero) <= spec.qmax
    assert float(zero) == round(float(zero))
    # Rounding the zero point moves the range by at most half a step.
    step = float(scale) * 0.501
    assert (spec.qmin - float(zero)) * float(scale) <= min(low, 0.0) + step
    assert (spec.qmax - float(zero)) * float(scale) >= max(low + width, 0.0) - step


def test_searches_do_what_they_say():
    x = torch.randn(1, 20_000, generator=torch.Generator().manual_seed(1))
    x[0, 0] = 60.0
    h, spec = Histogram.of(x), QuantSpec(4, symmetric=False)
    arguments = {"percentile": 0.999, "norm": 2.0, "steps": 60}

    def error(method):
        scale, zero = search_range(h, spec, method, **arguments)
        q = (x / scale).round().add(zero).clamp(spec.qmin, spec.qmax)
        return float(((q - zero) * scale - x)[0, 1:].square().sum()), float(scale)

    plain, scale = error("minmax")
    assert scale == pytest.approx(float(x.max() - x.min()) / 15, rel=1e-6)
    assert error("percentile")[0] < plain / 10
    assert error("mse")[0] < plain / 10
    with pytest.raises(ValueError, match="expected 'minmax'"):
        search_range(h, spec, "median", **arguments)


def test_weight_scale_finds_the_grids_optimum_and_heeds_importance():
    w = torch.randn(4, 64, generator=torch.Generator().manual_seed(2))
    spec = QuantSpec(3, granularity="per_channel")
    error = lambda s, i=1.0: ((w - (w / s[:, None]).round().clamp(-3, 3) * s[:, None]).square() * i).sum(1)  # noqa: E731
    absmax, best = (weight_scale(w, spec, None, m, 2.0, 60) for m in ("minmax", "mse"))
    assert torch.equal(absmax, w.abs().amax(1) / 3)
    assert bool((error(best) <= error(absmax)).all())
    importance = torch.zeros(64)
    importance[:4] = 1.0
    focused = weight_scale(w, spec, importance, "mse", 2.0, 60)
    assert float(error(focused, importance).sum()) < float(error(best, importance).sum())


def test_statistics_of_rows():
    x = rows(90, 5, 4).float()
    stats = InputStats()
    for part in x.split(30):
        stats.update(part, 1000)
    assert torch.equal(stats.rows, x)
    assert torch.equal(stats.low, x.amin(0))
    assert torch.equal(stats.high, x.amax(0))
    assert torch.allclose(stats.second_moment(), x.double().T @ x.double() / 90, rtol=1e-4)
    y = rows(90, 3, 5).float()
    assert torch.allclose(moment(y, x), y.double().T @ x.double() / 90, rtol=1e-4, atol=1e-4)


def test_tables_are_level_tables():
    w = torch.randn(8, 50)
    assert isinstance(weight_table(w, QuantSpec(3, granularity="per_channel"), torch.ones(50)).table, LevelTable)
    static = activation_table(w, QuantSpec(4, symmetric=False))
    assert static.symmetric
    assert static.table.bits == 4


def test_compensated_rounding_keeps_no_graph():
    """Of its thousands of steps, with a scale that may be learned later: it would outlive the calibration."""
    g = torch.Generator().manual_seed(0)
    x = torch.randn(40, 8, generator=g, dtype=torch.float64)
    scale = torch.nn.Parameter(torch.full((5,), 0.1, dtype=torch.float64))
    weight = torch.randn(5, 8, generator=g, dtype=torch.float64).requires_grad_()
    parts = lowrank.compensated_rounding(weight, x.T @ x / 40, scale, QuantSpec(4, granularity="per_channel"))
    assert not any(part.requires_grad for part in parts)
