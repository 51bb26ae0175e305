"""PMQ's allocation against brute force and the integer linear program; its sensitivity against plain forward passes."""

import itertools

import minmax
import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.optimize import Bounds, LinearConstraint, milp
from scipy.special import rel_entr, softmax
from vitq.allocation import frontier
from vitq.allocation.costs import Layer
from vitq.allocation.frontier import Component, pareto_frontier
from vitq.allocation.sensitivity import block_sensitivities, distance
from vitq.calibrate import calibrate
from vitq.convert import to_integer
from vitq.models import adapter_for
from vitq.recipes import load_recipe, parse
from vitq.scales import Search, set_activation, set_weight
from vitq.simulate import SimModel

from vitq_kernels.backends import backend
from vitq_kernels.formats import QuantSpec


@st.composite
def instances(draw, axes=(1, 2), most=5):
    """Components of few choices, with small whole costs (ties are common) and errors of which some are equal."""
    a = draw(st.sampled_from(axes))
    errors = st.one_of(st.sampled_from([0.0, 0.5, 1.0]), st.floats(0, 10))
    components = []
    for i in range(draw(st.integers(1, most))):
        count = draw(st.integers(1, 3))
        costs = draw(st.lists(st.tuples(*[st.integers(0, 9)] * a), min_size=count, max_size=count))
        components.append(Component(str(i), tuple(draw(errors) for _ in range(count)), tuple(costs)))
    return components


def totals(components, chosen):
    error, cost = 0.0, (0,) * len(components[0].costs[0])
    for component, j in zip(components, chosen):
        error += component.errors[j]
        cost = tuple(c + d for c, d in zip(cost, component.costs[j]))
    return error, cost


def check_against_brute_force(components):
    found = pareto_frontier(components)
    points = {totals(components, c) for c in itertools.product(*(range(len(x.errors)) for x in components))}
    beaten = {p for p in points if any(q != p and q[0] <= p[0] and all(map(int.__le__, q[1], p[1])) for q in points)}
    got = [(float(e), tuple(c)) for e, c in zip(found.errors, found.costs.tolist())]
    assert set(got) == points - beaten
    assert len(got) == len(set(got))
    assert [totals(components, c) for c in found.chosen.tolist()] == got


@settings(max_examples=150, deadline=None)
@given(instances())
def test_the_frontier_is_what_brute_force_leaves(components):
    check_against_brute_force(components)


def test_a_greedy_frontier_is_found_out(monkeypatch):
    """A plausible shortcut, dropping what lies above the convex hull, loses the point (1, 3)."""
    components = [Component("a", (4.0, 3.0, 0.0), ((0,), (1,), (2,)))]
    check_against_brute_force(components)
    monkeypatch.setattr(frontier, "_undominated", lambda costs, errors: np.array([0, 2]))
    with pytest.raises(AssertionError):
        check_against_brute_force(components)


def optimum(components, limits) -> float:
    """ΣΩ of the integer linear program."""
    errors = np.concatenate([c.errors for c in components])
    costs = np.concatenate([np.array(c.costs, float) for c in components]).T
    one = np.zeros((len(components), len(errors)))
    start = 0
    for i, c in enumerate(components):
        one[i, start : start + len(c.errors)] = 1
        start += len(c.errors)
    constraints = [LinearConstraint(one, 1, 1), LinearConstraint(costs, -np.inf, limits)]
    best = milp(errors, integrality=1, bounds=Bounds(0, 1), constraints=constraints, options={"mip_rel_gap": 0})
    return best.fun if best.success else np.inf


@settings(max_examples=40, deadline=None)
@given(instances(most=7), st.lists(st.floats(0, 1), min_size=2, max_size=2))
def test_every_budget_gets_the_optimum_of_the_integer_program(components, shares):
    found = pareto_frontier(components)
    limits = [int(s * found.costs[:, a].max()) for a, s in zip(range(found.costs.shape[1]), shares)]
    want = optimum(components, limits)
    if np.isinf(want):
        with pytest.raises(ValueError, match="the least costs are"):
            found.pick(limits)
    else:
        picked = found.pick(limits)
        assert (found.costs[picked] <= limits).all()
        assert found.errors[picked] == pytest.approx(want, rel=1e-6, abs=1e-6)


def test_the_size_of_a_vit_is_no_matter():
    """DeiT-S: 48 components, three widths, bytes and BitOps; every tenth budget against the integer program."""
    g = np.random.default_rng(0)
    shapes = {"qkv": (1152, 384), "proj": (384, 384), "fc1": (1536, 384), "fc2": (384, 1536)}
    components = []
    for block, (role, (n, k)) in itertools.product(range(12), shapes.items()):
        errors = g.lognormal(-4, 2) * np.array([1.0, 0.06, 0.004]) * g.uniform(0.8, 1.2, 3)
        costs = tuple((n * k * b // 8, 197 * n * k * b * b) for b in (4, 6, 8))
        components.append(Component(f"{block}.{role}", tuple(errors.tolist()), costs))
    for axis in (0, 1):
        one = [Component(c.name, c.errors, tuple((cost[axis],) for cost in c.costs)) for c in components]
        found = pareto_frontier(one)
        assert len(found) < 1000
        for limit in found.costs[5 :: len(found) // 10, 0]:
            assert found.errors[found.pick([limit])] == pytest.approx(optimum(one, [limit]), rel=1e-6)
    both = pareto_frontier(components)
    limits = np.quantile(both.costs, 0.4, axis=0).astype(int)
    assert both.errors[both.pick(limits)] == pytest.approx(optimum(components, limits), rel=1e-6)


@pytest.mark.parametrize(
    ("errors", "costs", "most", "reason"),
    [
        ((1.0,), (), 9, "1 errors and 0 costs"),
        ((float("nan"),), ((1,),), 9, "expected finite"),
        ((1.0,), ((0.5,),), 9, "expected whole numbers"),
        ((1.0,), ((1, 2, 3),), 9, "expected 1 or 2"),
        ((1.0,), ((1 << 62,),), 9, "coarser unit"),
        ((2.0, 1.0), ((1,), (2,)), 1, "at most 1: budget one axis only"),
    ],
)
def test_bad_instances_are_refused(errors, costs, most, reason):
    with pytest.raises(ValueError, match=reason):
        pareto_frontier([Component("a", errors, costs)], most)
    with pytest.raises(ValueError, match="components have"):
        pareto_frontier([])


def quantizer(rows, bits):
    """Plain min-max ranges."""

    def quantize(linear):
        search = Search(method="minmax")
        set_weight(linear, linear.weight, QuantSpec(bits, granularity="per_channel"), search)
        set_activation(linear, rows, QuantSpec(bits, symmetric=False), search)

    return quantize


@pytest.mark.parametrize("build", [minmax.vit, minmax.swin])
def test_sensitivity_is_that_of_whole_forward_passes(build):
    model = build()
    sim, x = SimModel(adapter_for(model)), minmax.images(model, 5)
    read, _ = minmax.inputs_of(model, list(sim.linears), x)
    before = {k: v.clone() for k, v in sim.state_dict().items()}
    with torch.no_grad():
        z = sim(x)
    for block in sim.family.blocks():
        settings = {
            site.path: [quantizer(minmax.rows(site, read[site.path]), bits) for bits in (3, 6)]
            for site in block.linears
        }
        got = block_sensitivities(sim, block, x, z, settings, batch=2)
        assert list(got) == [site.path for site in block.linears]
        for path, choices in settings.items():
            for omega, choice in zip(got[path], choices):
                other = SimModel(adapter_for(model))
                choice(other.linears[path])
                with torch.no_grad():
                    d = (other(x) - z).double().numpy()
                want = ((d**2).sum(1) / (z.double().numpy() ** 2).sum(1)).mean()
                assert omega == pytest.approx(want, rel=1e-3)
        assert all(a > b for a, b in got.values())
    assert all(torch.equal(v, before[k]) for k, v in sim.state_dict().items())
    with torch.no_grad():
        assert torch.equal(sim(x), z)


def test_prefixes_run_once():
    model = minmax.vit(depth=3)
    sim, x = SimModel(adapter_for(model)), minmax.images(model, 4)
    runs = [0, 0, 0]
    for i, block in enumerate(sim.model.blocks):
        block.norm1.register_forward_hook(lambda *_, i=i: runs.__setitem__(i, runs[i] + 1))
    path = "blocks.1.mlp.fc1"
    choice = quantizer(torch.randn(9, 32), 4)
    block_sensitivities(sim, sim.family.blocks()[1], x, torch.ones(4, 7), {path: [choice] * 5}, batch=2)
    assert runs == [2, 2 * 5, 2 * 5]


def test_distances():
    z, other = torch.tensor([[3.0, 4.0], [0.0, 1.0]]), torch.tensor([[3.0, 3.0], [1.0, 1.0]])
    assert distance(z, other, "l2") == pytest.approx((1 / 25 + 1) / 2)
    p, q = softmax(z.double().numpy(), 1), softmax(other.double().numpy(), 1)
    assert distance(z, other, "kl") == pytest.approx(rel_entr(p, q).sum(1).mean())


def test_costs_by_hand():
    layer = Layer(n=10, k=5, rows=3, rank=16)
    assert layer.size(3) == 19 + 40 + 16 * 15 * 2  # 150 bits are 19 bytes
    assert layer.bitops(3, 4) == 3 * (50 * 12 + 16 * 15 * 256)
    assert (layer.float_size, layer.float_bitops) == (200, 3 * 50 * 1024)


BASE = {
    "name": "test",
    "calibration": {"batch": 4},
    "bits": {"weights": 8, "activations": 8},
    "initialise": ["scales"],
    "compensate": [{"method": "closed_form"}],
}


def recipe(budget: dict, options: dict | None = None, **fields):
    step = {"method": "pareto", "budget": budget, "bits": [3, 5, 8], **(options or {})}
    return parse(BASE | fields | {"allocate": [step]})


@pytest.mark.parametrize(
    ("budget", "options", "fields"),
    [
        ({"size": 0.2}, {}, {}),
        ({"bitops": 0.21}, {"metric": "kl"}, {"low_rank": {"kind": "subspace", "rank": 16}}),
        ({"size": 0.2, "bitops": 0.04}, {"activation_bits": "free"}, {"activations": "dynamic"}),
        ({"size": 0.55}, {"activation_bits": "fixed"}, {"low_rank": {"kind": "error", "rank": 16}}),
        ({"size": 0.2}, {}, {"weight_levels": "table", "activation_levels": "table"}),
        ({"size": 0.35}, {"ranks": [16, 0]}, {"low_rank": {"kind": "subspace", "rank": 16}}),
        ({"bitops": 0.6}, {"ranks": [0, 16]}, {"low_rank": {"kind": "error", "rank": 0}}),
    ],
)
def test_the_finished_model_has_the_bits_that_were_picked(budget, options, fields):
    model = minmax.vit()
    result = calibrate(model, minmax.images(model, 8), recipe(budget, options, **fields))
    state, x = result.state, minmax.images(model, 6, seed=7)
    with torch.no_grad(), backend("ref"):
        simulated, integer = result.sim(x), to_integer(model, state)(x)
    assert torch.equal(simulated.argmax(1), integer.argmax(1))
    assert minmax.sqnr(simulated, integer) > 45
    record = state.metrics["frontier"]
    linears = {path: linear for path, linear in state.linears().items() if path in record["sensitivity"]}
    assert len(linears) == 8
    ranks = {p: [l.lora.rank] if "ranks" in options else [] for p, l in linears.items()}
    assert {p: [l.weight.bits, l.act.bits, *ranks[p]] for p, l in linears.items()} == record["picked_bits"]
    if "ranks" in options:
        assert {0, 16} == {l.lora.rank for l in linears.values()}, "a budget between none and all"
    point = record["points"][record["picked"]]
    assert [record["choices"][int(c)] for c in point["chosen"]] == list(record["picked_bits"].values())
    size = sum(
        -(-l.codes.numel() * l.weight.bits // 8) + 4 * len(l.codes) + 2 * l.lora.rank * sum(l.codes.shape)
        for l in linears.values()
    )
    assert point["size"] == pytest.approx(size / sum(4 * l.codes.numel() for l in linears.values()))
    fitting = [p for p in record["points"] if all(p[a] <= limit for a, limit in budget.items())]
    assert point in fitting
    assert point["error"] == min(p["error"] for p in fitting)
    assert len(set(map(tuple, record["picked_bits"].values()))) > 1


def test_without_a_budget_the_size_of_uniform_bits_is_spent():
    model = minmax.vit()
    plain = BASE | {"bits": {"weights": 5}, "allocate": [{"method": "pareto", "bits": [3, 5, 8]}]}
    state = calibrate(model, minmax.images(model, 8), parse(plain)).state
    record = state.metrics["frontier"]
    weights = [l.codes for p, l in state.linears().items() if p in record["sensitivity"]]
    uniform = sum(w.numel() * 5 // 8 + 4 * len(w) for w in weights) / sum(4 * w.numel() for w in weights)
    assert record["budget"] == {"size": pytest.approx(uniform)}
    point = record["points"][record["picked"]]
    assert point["size"] <= uniform * (1 + 1e-9)
    assert point["error"] <= sum(omega[1] for omega in record["sensitivity"].values())


def test_layers_outside_blocks_keep_the_recipes_bits():
    model = minmax.swin()
    state = calibrate(model, minmax.images(model, 4), recipe({"bitops": 0.02}, bits={"weights": 6})).state
    outside = {
        p: l.weight.bits for p, l in state.linears().items() if p not in state.metrics["frontier"]["sensitivity"]
    }
    assert outside == {"patch_embed.proj": 8, "layers.1.downsample.reduction": 6, "head.fc": 8}


def test_latency_is_measured_and_shared_by_what_runs_alike():
    model = minmax.vit()
    options = {"latency_seconds": 0.001, "latency_batch": 2}
    x = minmax.images(model, 4)
    state = calibrate(model, x, recipe({"latency": 100.0}, options)).state
    record = state.metrics["frontier"]
    for times in record["latency_ms"].values():
        assert min(times) > 0
        assert times[1] == times[2]  # 5 and 8 bits are the same kernel
    point = record["points"][record["picked"]]
    chosen = [times[int(c)] for times, c in zip(record["latency_ms"].values(), point["chosen"])]
    assert point["latency"] == pytest.approx(sum(chosen) / record["latency_ms_float"])


def test_a_branch_has_a_measured_price():
    model = minmax.vit()
    options = {"latency_seconds": 0.001, "ranks": [0, 16], "bits": [8]}
    low_rank = {"kind": "subspace", "rank": 16}
    state = calibrate(model, minmax.images(model, 4), recipe({"latency": 100.0}, options, low_rank=low_rank)).state
    record = state.metrics["frontier"]
    assert record["choices"] == [[8, 8, 0], [8, 8, 16]]
    assert all(len(times) == 2 and times[0] != times[1] for times in record["latency_ms"].values())


def test_ranks_are_refused_where_they_mean_nothing():
    with pytest.raises(ValueError, match=r"ranks is \(-1,\), expected ranks >= 0"):
        recipe({"size": 0.2}, {"ranks": [-1]})
    model = minmax.vit()
    x = minmax.images(model, 4)
    with pytest.raises(ValueError, match=r"ranks \(16,\) and low_rank.kind 'none', expected a kept branch"):
        calibrate(model, x, recipe({"size": 0.2}, {"ranks": [16]}))
    many = {"ranks": list(range(0, 144, 16)), "bits": [2, 3, 4, 5, 6, 7, 8]}
    with pytest.raises(ValueError, match="make 63 choices a layer, expected at most 62"):
        calibrate(model, x, recipe({"size": 0.2}, many, low_rank={"kind": "error", "rank": 16}))


def test_an_interrupted_allocation_resumes(tmp_path):
    model = minmax.vit()
    x, wanted = minmax.images(model, 4), recipe({"latency": 100.0, "size": 0.2}, {"latency_seconds": 0.001})

    class Interrupted(Exception):
        pass

    def interrupt(step, done, total):
        if "pareto" in step and done == 1:
            raise Interrupted

    with pytest.raises(Interrupted):
        calibrate(model, x, wanted, work_dir=tmp_path, progress=interrupt)
    first = tmp_path / "1.allocate.pareto.blocks.0.json"
    stamp = first.stat().st_mtime_ns
    whole = calibrate(model, x, wanted, work_dir=tmp_path).state.metrics
    assert first.stat().st_mtime_ns == stamp
    assert (tmp_path / "frontier.json").exists()
    # The measured table, too, is kept.
    assert calibrate(model, x, wanted, work_dir=tmp_path).state.metrics == whole
    first.write_text("[")
    with pytest.raises(ValueError, match="delete it to compute it again"):
        calibrate(model, x, wanted, work_dir=tmp_path)


def test_bad_budgets_are_refused():
    for budget, reason in (
        ({}, "budget limits nothing, expected one or two"),
        ({"size": 1, "bitops": 1, "latency": 1}, "expected one or two of size, bitops, latency"),
        ({"size": 0}, "budget.size is 0"),
        ({"weight": 1}, "budget.weight is no field"),
    ):
        with pytest.raises(ValueError, match=reason):
            recipe(budget)
    model = minmax.vit()
    with pytest.raises(ValueError, match=r"budget is size=0\.01, expected at least size=0\.1"):
        calibrate(model, minmax.images(model, 4), recipe({"size": 0.01}))
    assert load_recipe("pmq-mixed").with_budget({"size": 0.2}).allocate[0].options.budget.size == 0.2
    with pytest.raises(ValueError, match="no step of recipe minmax-w4a4 has one"):
        load_recipe("minmax-w4a4").with_budget({"size": 0.2})
