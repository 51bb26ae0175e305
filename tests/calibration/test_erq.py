"""ERQ: both ridge regressions against numpy's least squares, refinement against a loop and enumeration, the recipe."""

import itertools

import minmax
import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from test_stages import run_steps
from vitq import jobs
from vitq.calibrate import calibrate
from vitq.data import load_calibration, load_data
from vitq.evaluate import predict, sqnr_db
from vitq.models.digits_vit import NAME
from vitq.recipes import load_recipe, parse
from vitq.sources import ModelSource, load_float
from vitq.stages import Calibration, find
from vitq.stages.erq import reduce_error, refine

from vitq_kernels.formats import QuantSpec

BASE = {"name": "test", "bits": {"weights": 3, "activations": 4}, "initialise": ["scales"]}


def layer(seed: int, n: int, k: int, bits: int, rows: int = 40):
    """A weight [N, K], correlated rows [T, K] with a mean, scales that leave some weights outside the grid."""
    g = np.random.default_rng(seed)
    x = g.normal(size=(rows, k)) @ g.normal(size=(k, k)) + g.normal(size=k)
    w = g.normal(size=(n, k))
    spec = QuantSpec(bits, granularity="per_channel")
    return w, x, 0.8 * np.abs(w).max(1) / spec.qmax, spec


def t(*arrays: np.ndarray):
    return [torch.from_numpy(a) for a in arrays]


def by_hand(w, c, s, spec, flips):
    """Errors of one row: the paper's loop, the proxy evaluated anew for every flip."""
    codes = np.clip(np.round(w / s), spec.qmin, spec.qmax)
    sides = np.clip([np.floor(w / s), np.ceil(w / s)], spec.qmin, spec.qmax)
    proxy = lambda q: float((q * s - w) @ c @ (q * s - w))  # noqa: E731
    for _ in range(flips):
        gradient = 2 * c @ (codes * s - w)
        able = (sides[0] != sides[1]) & ((codes * s - w) * gradient > 0)
        if not able.any():
            break
        j = np.flatnonzero(able)[np.abs(gradient[able]).argmax()]
        trial = codes.copy()
        trial[j] = sides[:, j].sum() - codes[j]
        if proxy(trial) >= proxy(codes):
            break
        codes = trial
    return codes * s - w


@given(seed=st.integers(0, 10_000), k=st.integers(1, 9), bits=st.integers(2, 4), flips=st.integers(0, 12))
def test_refinement_is_the_papers_loop_and_never_raises_the_proxy(seed, k, bits, flips):
    w, x, s, spec = layer(seed, 5, k, bits)
    c = x.T @ x / len(x)
    got = refine(*t(w, c, s), spec, flips).numpy()
    assert np.allclose(got, [by_hand(row, c, scale, spec, flips) for row, scale in zip(w, s)], atol=1e-12)
    proxy = lambda e: np.einsum("nk,kl,nl->n", e, c, e)  # noqa: E731
    nearest = refine(*t(w, c, s), spec, 0).numpy()
    assert np.array_equal(nearest, np.clip(np.round(w / s[:, None]), spec.qmin, spec.qmax) * s[:, None] - w)
    assert (proxy(got) <= proxy(nearest) * (1 + 1e-12)).all()
    for row, scale, found in zip(w, s, proxy(got)):
        sides = [sorted({*np.clip([np.floor(v), np.ceil(v)], spec.qmin, spec.qmax)}) for v in row / scale]
        every = np.array(list(itertools.product(*sides))) * scale - row
        assert found >= proxy(every).min() * (1 - 1e-12)


def test_refinement_helps_where_inputs_are_correlated():
    w, x, s, spec = layer(0, 64, 24, 3)
    x = x + 5.0
    c = x.T @ x / len(x)
    proxy = [np.einsum("nk,kl,nl->n", e, c, e).mean() for e in (refine(*t(w, c, s), spec, f).numpy() for f in (0, 100))]
    assert proxy[1] < 0.5 * proxy[0]


def ridge(x: np.ndarray, y: np.ndarray, target: np.ndarray, damping: float) -> np.ndarray:
    """Towards ``target``, as least squares with √λ·I appended."""
    strength = np.sqrt(damping * (x**2).mean(0).mean())
    a = np.vstack([x / np.sqrt(len(x)), strength * np.eye(x.shape[1])])
    b = np.vstack([y / np.sqrt(len(x)), strength * target.T])
    return np.linalg.lstsq(a, b, rcond=None)[0].T


@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("flips", [0, 20])
def test_halves_and_what_the_rest_makes_up_for(bias, flips):
    """Column by column on the grid, the float rest each time numpy's ridge regression of what is left to explain."""
    w, x, s, spec = layer(1, 6, 11, 3)
    if bias:
        x = np.hstack([x, np.ones((len(x), 1))])
        w = np.hstack([w, np.random.default_rng(2).normal(size=(6, 1))])
    c = x.T @ x / len(x)
    got = reduce_error(*t(w), 11, *t(c, s), spec, 0.05, flips).numpy()
    want, ends = w.copy(), [5, 8, 9, 10, 11] if not bias else [6, 9, 10, 11]
    for start, end in zip([0, *ends], ends):
        part = c[start:end, start:end]
        error = np.array([by_hand(row, part, scale, spec, flips) for row, scale in zip(want[:, start:end], s)])
        y = want[:, end:] @ x[:, end:].T - error @ x[:, start:end].T
        want[:, start:end] += error
        if end < x.shape[1]:
            want[:, end:] = ridge(x[:, end:], y.T, want[:, end:], 0.05)
    assert np.allclose(got, want, atol=1e-8)
    codes = got[:, :11] / s[:, None]
    assert np.allclose(codes, codes.round(), atol=1e-9)
    assert np.abs(codes).max() <= spec.qmax + 1e-9
    loss = lambda q: float((((q - w) @ x.T) ** 2).sum())  # noqa: E731
    nearest = w.copy()
    nearest[:, :11] = np.clip(np.round(w[:, :11] / s[:, None]), spec.qmin, spec.qmax) * s[:, None]
    assert loss(got) < loss(nearest)


def calibration(model, n: int = 8, **fields) -> Calibration:
    """Ready to be compensated."""
    return run_steps(model, BASE | fields, n)


def compensate(c: Calibration, **options) -> None:
    m = find("compensate", "erq")
    m.run(c, m.options(**options))


def test_activation_error_is_a_ridge_regression():
    """With 8-bit weights that hardly round: W and bias by numpy from the float inputs and their codes."""

    def lost(seen, y, w, b) -> float:
        return float(((seen @ w.T + b - y) ** 2).sum())

    c = calibration(minmax.vit(), bits={"weights": 8, "activations": 3})
    compensate(c, activation_damping=0.02, flips=0)
    for path, linear in c.interior().items():
        x, reference = c.observations().inputs[path].rows, c.reference.linears[path]
        with torch.no_grad():
            seen = torch.mul(*linear.act(x)).double().numpy()
            y = reference.compute(x).double().numpy()
            got = (linear.codes() * linear.quant.scale.unsqueeze(1)).double().numpy()
        ones = np.ones((len(seen), 1))
        target = np.hstack([reference.weight.detach().numpy(), reference.bias.detach().numpy()[:, None]])
        want = ridge(np.hstack([seen, ones]), y, target, 0.02)
        best = lost(seen, y, want[:, :-1], want[:, -1])
        assert best < 0.97 * lost(seen, y, target[:, :-1], target[:, -1])
        assert lost(seen, y, got, linear.bias.detach().numpy()) == pytest.approx(best, rel=0.02)


@pytest.mark.parametrize("build", [minmax.vit, minmax.swin])
def test_every_layer_ends_closer_to_its_float_output(build):
    c = calibration(build())

    def losses() -> dict[str, float]:
        out = {}
        for path, linear in c.sim.linears.items():
            x = c.observations().inputs[path].rows
            with torch.no_grad():
                out[path] = float((linear.compute(x) - c.reference.linears[path].compute(x)).square().mean())
        return out

    before = losses()
    compensate(c)
    after = losses()
    inner = c.interior()
    assert sum(after[p] / before[p] for p in inner) < 0.7 * len(inner)
    assert all(after[p] < 1.05 * before[p] for p in inner)


def test_rounding_gives_back_the_codes_that_were_found():
    c = calibration(minmax.vit())
    compensate(c)
    for linear in c.sim.linears.values():
        with torch.no_grad():
            assert torch.allclose(linear.codes() * linear.quant.scale.unsqueeze(1), linear.weight, atol=1e-6)


@pytest.mark.parametrize(
    ("fields", "reason"),
    [
        ({"low_rank": {"kind": "error", "rank": 16}}, r"low_rank\.kind is 'error', expected 'none'"),
        ({"weight_levels": "table"}, "weight_levels is 'table', expected 'uniform'"),
    ],
)
def test_what_does_not_fit_is_refused(fields, reason):
    model = minmax.vit()
    with pytest.raises(ValueError, match=reason):
        calibrate(model, minmax.images(model, 4), parse(BASE | fields | {"compensate": ["erq"]}))


def test_the_recipe_beats_nearest_rounding_on_digits():
    """At 3-bit weights, with 8-bit uniform probabilities: the paper's exist in simulation only."""
    source = ModelSource(NAME)
    model = load_float(source)
    data, images = load_data("digits", "test", model, 64), load_calibration("digits", model, 16, seed=0)
    reference, _ = predict(model, data)
    recipe = load_recipe("erq-w3a4", bits={"softmax": 8}, initialise=["scales"])
    done = jobs.quantize(model, source, recipe, images)
    simulated, integer = (predict(m, data)[0] for m in (done.calibrated.sim, done.integer))
    assert torch.equal(simulated, integer)
    nearest, _ = predict(calibrate(model, images, recipe.model_copy(update={"compensate": ()})).sim, data)
    assert sqnr_db(reference, integer) > sqnr_db(reference, nearest) + 1.5


def test_the_papers_recipe_is_refused_at_export_and_the_one_on_tables_is_not():
    assert load_recipe("erq").refusal
    assert load_recipe("erq-tables").refusal is None
    assert all([s.method for s in load_recipe(name).compensate] == ["erq"] for name in ("erq", "erq-tables"))
