"""PMQ's allocation against brute force and the integer linear program; its sensitivity against plain forward passes."""

import itertools

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.optimize import Bounds, LinearConstraint, milp
from vitq.allocation.frontier import Component, pareto_frontier


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


@settings(max_examples=150, deadline=None)
@given(instances())
def test_the_frontier_is_what_brute_force_leaves(components):
    frontier = pareto_frontier(components)
    points = {totals(components, c) for c in itertools.product(*(range(len(x.errors)) for x in components))}
    beaten = {p for p in points if any(q != p and q[0] <= p[0] and all(map(int.__le__, q[1], p[1])) for q in points)}
    got = [(float(e), tuple(c)) for e, c in zip(frontier.errors, frontier.costs.tolist())]
    assert set(got) == points - beaten
    assert len(got) == len(set(got))
    assert [totals(components, c) for c in frontier.chosen.tolist()] == got


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
    found = milp(errors, integrality=1, bounds=Bounds(0, 1), constraints=constraints, options={"mip_rel_gap": 0})
    return found.fun if found.success else np.inf


@settings(max_examples=40, deadline=None)
@given(instances(most=7), st.lists(st.floats(0, 1), min_size=2, max_size=2))
def test_every_budget_gets_the_optimum_of_the_integer_program(components, shares):
    frontier = pareto_frontier(components)
    limits = [int(s * frontier.costs[:, a].max()) for a, s in zip(range(frontier.costs.shape[1]), shares)]
    want = optimum(components, limits)
    if np.isinf(want):
        with pytest.raises(ValueError, match="the least costs are"):
            frontier.pick(limits)
    else:
        picked = frontier.pick(limits)
        assert (frontier.costs[picked] <= limits).all()
        assert frontier.errors[picked] == pytest.approx(want, rel=1e-6, abs=1e-6)


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
        frontier = pareto_frontier(one)
        assert len(frontier) < 1000
        for limit in frontier.costs[5 :: len(frontier) // 10, 0]:
            assert frontier.errors[frontier.pick([limit])] == pytest.approx(optimum(one, [limit]), rel=1e-6)
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
