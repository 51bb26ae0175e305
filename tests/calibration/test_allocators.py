"""Bits of layers by relevance, Fisher traces and greed: each against rules written out, autograd or enumeration."""

import itertools

import minmax
import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch.nn.functional import log_softmax
from vitq.allocation.frontier import Component, pareto_frontier
from vitq.allocation.relevance import apply_rules, layer_relevance
from vitq.allocation.sensitivity import block_sensitivities, distance
from vitq.calibrate import calibrate
from vitq.fisher import combined_loss, fisher_traces
from vitq.jobs import average_bits
from vitq.models import adapter_for
from vitq.observers import InputStats
from vitq.recipes import load_recipe, parse
from vitq.simulate import SimModel
from vitq.stages import Calibration, bits, find
from vitq.stages.bits import Allocation, Choice
from vitq.stages.fisher import _errors
from vitq.stages.greedy import lower
from vitq.stages.reparameterize import ReparameterizeOptions, channel_map

BUILDS = [minmax.vit, minmax.swin]


def paths_of(sim: SimModel) -> list[str]:
    return [site.path for block in sim.family.blocks() for site in block.linears]


# Relevance


def ruled(model, products: str) -> SimModel:
    sim = SimModel(adapter_for(model)).double()
    apply_rules(sim, products)
    return sim


def flows(sim: SimModel, x: torch.Tensor) -> tuple[float, float, float, float]:
    """Largest logits, and relevance of the image, of embeddings added to it and of biases, summed over images."""
    added = {n: p.requires_grad_() for n, p in sim.model.named_parameters() if "pos_embed" in n or "cls_token" in n}
    biases = {n: p.requires_grad_() for n, p in sim.model.named_parameters() if n.endswith("bias")}
    x = x.double().requires_grad_()
    top = sim(x).amax(1).sum()
    leaves = [x, *added.values(), *biases.values()]
    got = [float((leaf.detach() * g).sum()) for leaf, g in zip(leaves, torch.autograd.grad(top, leaves))]
    return float(top.detach()), got[0], sum(got[1 : 1 + len(added)]), sum(got[1 + len(added) :])


@pytest.mark.parametrize("build", BUILDS)
@pytest.mark.parametrize("biases", [False, True])
def test_relevance_is_conserved(build, biases):
    model = build()
    for name, p in model.named_parameters():
        if name.endswith("bias") and not biases:
            p.zero_()
    logit, image, embedded, absorbed = flows(ruled(model, "values"), minmax.images(model, 2))
    assert image + embedded + absorbed == pytest.approx(logit, rel=1e-10)
    assert (absorbed == 0.0) != biases
    assert image != 0.0
    # Plain derivatives conserve nothing.
    logit, *plain = flows(SimModel(adapter_for(model)).double(), minmax.images(model, 2))
    assert sum(plain) != pytest.approx(logit, rel=1e-2)


@pytest.mark.parametrize("build", BUILDS)
@pytest.mark.parametrize("products", ["uniform", "values"])
def test_rules_leave_the_outputs(build, products):
    model = build()
    x = minmax.images(model, 2)
    assert torch.allclose(ruled(model, products)(x.double()), SimModel(adapter_for(model)).double()(x.double()))


def messages(qkv: np.ndarray, heads: int, scale: float, r: np.ndarray) -> np.ndarray:
    """AttnLRP's rules for attention: relevance r of the output [N, C] to that of qkv [N, 3C]."""
    n, c = r.shape
    q, k, v = qkv.reshape(n, 3, heads, -1).transpose(1, 2, 0, 3)
    r = r.reshape(n, heads, -1).transpose(1, 0, 2)
    s = scale * q @ k.transpose(0, 2, 1)
    p = np.exp(s - s.max(-1, keepdims=True))
    p /= p.sum(-1, keepdims=True)
    out = np.zeros((3, *v.shape))
    for h, i, d in np.ndindex(r.shape):
        terms = p[h, i] * v[h, :, d]
        out[2, h, :, d] += 0.5 * terms / terms.sum() * r[h, i, d]
    r_p = 0.5 * np.einsum("hij,hjd,hid->hij", p, v, r / (p @ v))
    r_s = s * (r_p - p * r_p.sum(-1, keepdims=True))
    for h, i, j in np.ndindex(s.shape):
        terms = 0.5 * scale * q[h, i] * k[h, j] / s[h, i, j] * r_s[h, i, j]
        out[0, h, i] += terms
        out[1, h, j] += terms
    return out.transpose(2, 0, 1, 3).reshape(n, 3 * c)


def test_attention_follows_the_rules_written_out():
    sim = ruled(minmax.vit(), "uniform")
    attention = sim.attentions["blocks.0.attn"]
    g = torch.Generator().manual_seed(0)
    qkv = torch.randn(1, 6, 96, dtype=torch.float64, generator=g).requires_grad_()
    out = attention.attend(qkv)
    r = torch.randn(out.shape, dtype=torch.float64, generator=g)
    got = qkv * torch.autograd.grad((out * (r / out).detach()).sum(), qkv)[0]
    want = messages(qkv.detach()[0].numpy(), attention.heads, attention.softmax_scale, r[0].numpy())
    np.testing.assert_allclose(got.detach()[0].numpy(), want, rtol=1e-9, atol=1e-9)
    assert float(r.sum()) != pytest.approx(want.sum(), rel=1e-3)  # the softmax absorbs some


def test_activations_pass_relevance_as_it_is():
    sim = ruled(minmax.vit(), "values")
    x = torch.tensor([[-2.0, -0.1, 0.0, 1e-30, 3.0]], dtype=torch.float64).requires_grad_()
    y = sim.model.blocks[0].mlp.act(x)
    r = torch.tensor([[1.0, -2.0, 3.0, 4.0, 5.0]])
    got = x * torch.autograd.grad((y * torch.where(y == 0, 0, r / y).detach()).sum(), x)[0]
    assert torch.allclose(got, torch.tensor([[1.0, -2.0, 0.0, 4.0, 5.0]], dtype=torch.float64))


@pytest.mark.parametrize("build", BUILDS)
def test_shares_of_layers(build):
    model = build()
    x = minmax.images(model, 5)
    sim = SimModel(adapter_for(model))
    paths = paths_of(sim)
    whole = layer_relevance(sim, paths, x, 5)
    assert sum(whole.values()) == pytest.approx(1)
    assert list(layer_relevance(sim, paths, x, 2).values()) == pytest.approx(list(whole.values()), rel=1e-4)
    assert layer_relevance(sim, paths, x, 5, "values") != pytest.approx(whole, rel=0.05)
    idle = paths[5]
    sim.linears[idle].weight.zero_()
    sim.linears[idle].bias.zero_()
    without = layer_relevance(sim, paths, x, 5)
    assert without[idle] == 0.0 < min(whole.values())


# Fisher


def every_sign(monkeypatch, classes: int) -> None:
    """Each combination of signs in turn, instead of random ones."""
    signs = itertools.cycle(itertools.product((0, 1), repeat=classes))
    monkeypatch.setattr(torch, "randint", lambda *_, **__: torch.tensor(next(signs))[None])


def test_combined_losses_have_the_second_moment_of_label_draws(monkeypatch):
    every_sign(monkeypatch, 3)
    p = torch.tensor([0.6, 0.3, 0.1], dtype=torch.float64)
    z = p.log().expand(1, 3).clone().requires_grad_()
    v = torch.cat([torch.autograd.grad(combined_loss(z, None).sum(), z)[0] for _ in range(8)])
    wanted = sum(p[y] * torch.outer(torch.eye(3)[y] - p, torch.eye(3)[y] - p) for y in range(3))
    assert torch.allclose(v.T @ v / 8, wanted)


@pytest.mark.parametrize("build", BUILDS)
def test_fisher_traces_are_those_of_every_label_and_image(build, monkeypatch):
    model = build(num_classes=3)
    sim, x = SimModel(adapter_for(model)), minmax.images(model, 3)
    paths = paths_of(sim)[::3]
    want = dict.fromkeys(paths, 0.0)
    for image in x:
        weights = [sim.linears[path].weight.requires_grad_() for path in paths]
        log_p = log_softmax(sim(image[None]), 1)[0]
        for y in range(3):
            gradients = torch.autograd.grad(log_p[y], weights, retain_graph=True)
            for path, g in zip(paths, gradients):
                want[path] += float(log_p[y].detach().exp() * g.square().sum()) / 3
    sim.requires_grad_(False)
    every_sign(monkeypatch, 3)
    got = fisher_traces(sim, x.split(2), paths, 8, None)
    assert list(got.values()) == pytest.approx(list(want.values()), rel=1e-4)


def started(model, **fields) -> Calibration:
    c = Calibration(SimModel(adapter_for(model)), minmax.images(model, 6), parse(BASE | fields))
    c.reference = c.sim.twin()
    method = find("initialise", "scales")
    method.run(c, method.options())
    return c


BASE = {"name": "test", "calibration": {"batch": 4}, "bits": {"weights": 4, "activations": 4}, "initialise": ["scales"]}


def test_types_count_alike_whatever_the_size_of_their_traces():
    c = started(minmax.vit())
    allocation = Allocation(c, find("allocate", "fisher").options(bits=(3, 4, 5)))
    g = np.random.default_rng(0)
    traces = {path: float(g.uniform(1, 2)) for path in allocation.layers}
    errors = _errors(allocation, traces)
    scaled = {path: t * (1000 if path.endswith("fc1") else 1) for path, t in traces.items()}
    assert _errors(allocation, scaled) == {path: pytest.approx(e) for path, e in errors.items()}
    of_type = [errors[path][1] for path in errors if path.endswith("qkv")]
    assert np.mean(of_type) == pytest.approx(1)
    ratio = errors["blocks.0.attn.qkv"][0] / errors["blocks.1.attn.qkv"][0]
    lost = []
    for i in range(2):
        path = f"blocks.{i}.attn.qkv"
        linear = c.reference.twin().linears[path]
        allocation.setting(path, Choice(3, 3))(linear)
        lost.append(((linear.codes() * linear.quant.scale[:, None] - linear.weight).detach().square().mean()).item())
    assert ratio == pytest.approx(
        traces["blocks.0.attn.qkv"] * lost[0] / (traces["blocks.1.attn.qkv"] * lost[1]), rel=1e-5
    )


def test_a_quantized_model_is_probed_and_left_as_it_was():
    c = started(minmax.vit())
    allocation = Allocation(c, find("allocate", "fisher").options(bits=(3, 4, 5)))
    allocation.give(dict.fromkeys(allocation.layers, 1))
    path, x = "blocks.1.mlp.fc1", c.images
    with torch.no_grad():
        before, z = c.sim(x), c.reference(x)
        other = c.sim.twin()
        allocation.setting(path, Choice(5, 5))(other.linears[path])
        want = distance(z, other(x), "l2")
    settings = {path: [allocation.setting(path, Choice(b, b)) for b in (4, 5)]}
    restore = {path: allocation.setting(path, Choice(4, 4))}
    got = block_sensitivities(c.sim, c.sim.family.blocks()[1], x, z, settings, batch=4, restore=restore)
    assert got[path] == pytest.approx([distance(z, before, "l2"), want], rel=1e-5)
    with torch.no_grad():
        assert torch.equal(c.sim(x), before)


# Greed


def test_greed_by_hand():
    a, b = (Component("a", (9.0, 3.0, 0.0), ((1,), (2,), (3,))), Component("b", (5.0, 2.0, 1.0), ((2,), (4,), (6,))))
    # b loses 1/2 per unit, then 3/2; a 3, then 6.
    assert [lower([a, b], [limit]) for limit in (9, 8, 7, 6, 5, 4, 3)] == [
        [2, 2], [2, 1], [2, 1], [2, 0], [2, 0], [1, 0], [0, 0],
    ]  # fmt: skip
    assert lower([a, b], [2]) is None


def test_greed_passes_over_what_saves_nothing():
    """Of 4, 6, 7 and 8 bits the upper three share one time; a noisy one of a is even slower."""
    a = Component("a", (9.0, 3.0, 2.0, 0.0), ((1,), (4,), (5,), (4,)))
    b = Component("b", (7.0, 1.0, 1.0, 1.0), ((2,), (4,), (4,), (4,)))
    assert [lower([a, b], [limit]) for limit in (8, 7, 6, 5, 3)] == [[3, 3], [0, 3], [0, 3], [0, 3], [0, 0]]
    assert lower([a, b], [2]) is None


@st.composite
def ladders(draw):
    count = draw(st.integers(1, 3))
    costs = sorted(draw(st.sets(st.integers(1, 30), min_size=count, max_size=count)))
    errors = sorted(draw(st.lists(st.floats(0, 9), min_size=count, max_size=count)), reverse=True)
    return Component("a", tuple(errors), tuple((c,) for c in costs))


@given(st.lists(ladders(), min_size=1, max_size=5), st.floats(0, 1))
def test_greed_keeps_the_budget_and_does_not_beat_the_optimum(components, share):
    least, most = (sum(c.costs[i][0] for c in components) for i in (0, -1))
    limit = int(least + share * (most - least))
    chosen = lower(components, [limit])
    assert sum(c.costs[j][0] for c, j in zip(components, chosen)) <= limit
    frontier = pareto_frontier(components)
    assert sum(c.errors[j] for c, j in zip(components, chosen)) >= frontier.errors[frontier.pick([limit])] - 1e-9
    assert lower(components, [least - 1]) is None


# The methods


QUICK = {"weights": {"steps": 6}, "activations": {"steps": 6}}
METHODS = {
    "relevance": {},
    "mix": {"method": "relevance", "sensitivity": "measured"},
    "fisher": {"rounds": 1},
    "greedy": {},
}


@pytest.mark.parametrize("name", METHODS)
@pytest.mark.parametrize("build", BUILDS)
def test_bits_differ_and_take_no_more_than_the_recipes(name, build):
    model = build()
    step = {"method": name, "bits": [3, 4, 6], **QUICK, **METHODS[name]}
    done = calibrate(model, minmax.images(model, 6), parse(BASE | {"allocate": [step]}))
    record = done.state.metrics["allocation"]
    linears = {p: l for p, l in done.state.linears().items() if p in record["bits"]}
    assert list(record["bits"]) == paths_of(done.sim)
    assert {p: [l.weight.bits, l.act.bits] for p, l in linears.items()} == record["bits"]
    if name != "relevance":  # whose layers are much alike in a fresh model
        assert len(set(map(tuple, record["bits"].values()))) > 1
    spent = sum(-(-l.codes.numel() * l.weight.bits // 8) for l in linears.values())
    assert spent <= sum(l.codes.numel() // 2 for l in linears.values())
    assert spent > 0.9 * sum(l.codes.numel() // 2 for l in linears.values())
    weights = [l.codes.numel() for l in linears.values()]
    assert record["size"] == pytest.approx((spent + sum(4 * len(l.codes) for l in linears.values())) / 4 / sum(weights))
    assert average_bits(done.sim)[0] < 6


@pytest.mark.parametrize("name", ["relevance", "mix"])
def test_relevance_gives_the_best_bits_there_are(name):
    model = minmax.vit()
    x = minmax.images(model, 6)
    options = {"method": name, "bits": [3, 4, 5], "budget": {"size": 0.15}, **QUICK, **METHODS[name]}
    record = calibrate(model, x, parse(BASE | {"allocate": [options]})).state.metrics["allocation"]
    sim = SimModel(adapter_for(model))
    share = layer_relevance(sim, paths_of(sim), x, 4)
    assert record["relevance"] == pytest.approx(share, rel=1e-5)
    c = started(model)
    allocation = Allocation(c, find("allocate", "relevance").options(bits=(3, 4, 5), **QUICK))
    errors, sizes = [], []
    with torch.no_grad():
        z = sim(x)
        for path, linear in sim.linears.items():
            if path not in share:
                continue
            n, k = linear.shape
            sizes.append([n * k * b // 8 + 4 * n for b in (3, 4, 5)])
            if name == "relevance":
                errors.append([share[path] * 2 * 4.0**-b for b in (3, 4, 5)])
                continue
            errors.append([])
            for b in (3, 4, 5):
                other = SimModel(adapter_for(model))
                allocation.setting(path, Choice(b, b))(other.linears[path])
                errors[-1].append(share[path] * distance(z, other(x), "l2"))
    limit = int(0.15 * sum(4 * sim.linears[path].weight.numel() for path in share))
    fits = (c for c in itertools.product(range(3), repeat=8) if sum(s[j] for s, j in zip(sizes, c)) <= limit)
    best = min(fits, key=lambda c: sum(e[j] for e, j in zip(errors, c)))
    assert record["bits"] == {path: [3 + j, 3 + j] for path, j in zip(share, best)}


def test_updates_lower_the_measured_error():
    model = minmax.vit()
    x = minmax.images(model, 6)

    def run(rounds):
        step = {"method": "fisher", "bits": [2, 3, 4, 5, 6], "rounds": rounds, **QUICK}
        done = calibrate(model, x, parse(BASE | {"allocate": [step]}))
        return done, done.state.metrics["allocation"]["errors"]

    plain, (start,) = run(0)
    done, history = run(2)
    assert history[0] == pytest.approx(start)
    assert len(history) > 1
    assert all(a > b for a, b in itertools.pairwise(history))
    with torch.no_grad():
        assert distance(model(x), done.sim(x), "l2") == pytest.approx(history[-1], rel=1e-4)
        assert distance(model(x), plain.sim(x), "l2") == pytest.approx(start, rel=1e-4)


def by_layout(layer, states, batch, seconds):
    """Times of ``latency`` without a clock: 4 bits and fewer take half of what more take, float twice that."""
    return [layer.k * (1 if state.weight.bits <= 4 else 2) for state in states], 4 * layer.k


@pytest.mark.parametrize("name", METHODS)
def test_latency_is_measured_where_it_is_budgeted(name, monkeypatch):
    monkeypatch.setattr(bits, "latency", by_layout)
    model = minmax.vit()
    x = minmax.images(model, 4)
    options = {"method": name, "bits": [3, 4, 6, 8], **QUICK, **METHODS[name]}
    record = calibrate(model, x, parse(BASE | {"allocate": [options | {"budget": {"latency": 0.4}}]})).state.metrics
    record = record["allocation"]
    assert 0.25 < record["latency"] <= 0.4
    assert {own[0] > 4 for own in record["bits"].values()} == {False, True}
    with pytest.raises(ValueError, match=r"budget is latency=0\.2, expected at least latency=0\.25"):
        calibrate(model, x, parse(BASE | {"allocate": [options | {"budget": {"latency": 0.2}}]}))


def test_what_is_refused():
    model = minmax.vit()
    x = minmax.images(model, 4)
    with pytest.raises(ValueError, match="expected 'tied' or 'fixed'"):
        calibrate(model, x, parse(BASE | {"allocate": [{"method": "greedy", "activation_bits": "free"}]}))
    for name in ("greedy", "relevance"):
        wanted = parse(BASE | {"allocate": [{"method": name, "budget": {"size": 0.05}, **QUICK}]})
        with pytest.raises(ValueError, match=r"budget is size=0\.05, expected at least size=0\.08"):
            calibrate(model, x, wanted)
    logarithmic = {"method": "log_levels", "softmax": None, "gelu": "adaptive"}
    wanted = parse(BASE | {"initialise": ["scales", logarithmic], "allocate": [{"method": "relevance", **QUICK}]})
    with pytest.raises(ValueError, match="bits of LogLevels is 4 once and for all"):
        calibrate(model, x, wanted)


def test_twin_ranges_after_gelu_take_the_bits_of_their_layers():
    model = minmax.vit()
    step = {"method": "greedy", "bits": [3, 4, 6], **QUICK}
    twin = {"method": "twin_uniform", "softmax": False, "rounds": 1, "steps": 4, "images": 4}
    recipe = parse(BASE | {"initialise": ["scales", twin], "allocate": [step]})
    done = calibrate(model, minmax.images(model, 6), recipe)
    bits = done.fields["metrics"]["allocation"]["bits"]
    quantizers = {path: linear.simulated for path, linear in done.sim.linears.items() if linear.simulated is not None}
    assert sorted(quantizers) == ["blocks.0.mlp.fc2", "blocks.1.mlp.fc2"]
    assert {path: q.bits for path, q in quantizers.items()} == {path: bits[path][1] for path in quantizers}


@pytest.mark.parametrize("name", ["lrp-qvit", "mix-qvit", "lampq", "mptq-vit"])
def test_recipes(name):
    recipe = load_recipe(f"{name}-w3a3")
    assert recipe.bits.weights == recipe.bits.softmax == 3
    (step,) = recipe.allocate
    assert step.options.budget is None
    assert step.options.bits == (2, 3, 4, 5, 6, 7, 8)
    assert recipe.source


def test_clipped_channels_leave_their_outliers():
    g = torch.Generator().manual_seed(0)
    rows = torch.randn(1000, 3, generator=g)
    rows[0, 1] = 100.0
    stats = InputStats()
    stats.update(rows, 1000)
    shift, factor = channel_map(stats, ReparameterizeOptions(clip=0.02))
    low, high = np.quantile(rows.numpy(), (0.01, 0.99), axis=0)
    half = (high - low) / 2
    np.testing.assert_allclose(shift.numpy(), (high + low) / 2, rtol=1e-4, atol=1e-6)
    np.testing.assert_allclose(factor.numpy(), half / np.exp(np.log(half).mean()), rtol=1e-4)
    assert channel_map(stats, ReparameterizeOptions())[1][1] > 5 * factor[1]
