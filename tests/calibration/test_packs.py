"""Pack-PTQ: scores against a Hessian that is known, packs and bits against enumeration, packs as units."""

import itertools
import math

import minmax
import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from scipy.optimize import Bounds, LinearConstraint, milp
from torch import nn
from torch.nn.functional import kl_div, log_softmax
from vitq.calibrate import calibrate
from vitq.losses import UnitLoss
from vitq.models import adapter_for
from vitq.observers import weight_scale
from vitq.recipes import parse
from vitq.simulate import SimModel, inputs_of
from vitq.stages import Calibration, find, packs
from vitq.stages.base import Pack
from vitq.stages.packs import Score, TooLittle, _Sums, elements, greedy, optimal, pack, score_block
from vitq.stages.reconstruct import reconstruct

W4 = {
    "name": "test",
    "calibration": {"batch": 4},
    "bits": {"weights": 4, "activations": 4, "operands": 4, "softmax": 4, "boundary": 6},
    "initialise": ["scales"],
}
# The boundary layers of a tiny model are most of it: the published budget leaves nothing for its packs.
ROOM = {"average": 5.3}


def calibration(model, n: int = 8, **recipe) -> Calibration:
    c = Calibration(SimModel(adapter_for(model)), minmax.images(model, n), parse(W4 | recipe))
    c.reference = c.sim.twin()
    step(c, "initialise", "scales")
    return c


def step(c: Calibration, stage: str, name: str, **options) -> None:
    m = find(stage, name)
    m.run(c, m.options(**options))


def names(c: Calibration) -> list[list[str]]:
    return [[block.path for block in p.blocks] for p in c.packs]


# Scores


def quadratic(seed: int, images: int = 5, size: int = 6):
    """Per-image losses ½·dᵀHd whose gradient at z_fp is Hd."""
    rng = np.random.default_rng(seed)
    root = rng.normal(size=(size, size))
    h, d = root @ root.T, rng.normal(size=(images, size))
    return d, 0.5 * np.einsum("bi,ij,bj->b", d, h, d), d @ h


@pytest.mark.parametrize("normalise", [False, True])
def test_score_on_a_toy_hessian(normalise):
    d, loss, gradient = quadratic(0)
    sums = _Sums()
    for part in (slice(0, 2), slice(2, 5)):  # whatever the batches
        sums.add(*(torch.from_numpy(a[part]) for a in (loss, gradient, d)))
    got = sums.score(normalise)
    first = loss.mean() - (gradient / len(d) * d).mean()  # the gradient of the mean loss
    want = first / (0.5 * (d**2).mean()) / (d.shape[1] if normalise else 1)
    assert got.loss == pytest.approx(loss.mean())
    assert got.curvature == pytest.approx(want)
    assert got.sensitivity == pytest.approx(want * np.abs(d).mean())


@pytest.mark.parametrize("copies", [1, 8])
def test_normalised_score_is_the_curvature_whatever_the_size(copies):
    """H = 3·I: dᵀHd/‖d‖² is 3; as published it grows with the number of elements."""
    d = np.tile(np.random.default_rng(1).normal(size=(200, 5)), copies)
    sums = _Sums()
    sums.add(*map(torch.from_numpy, (1.5 * (d**2).sum(1), 3 * d, d)))
    # What is left of the gradient's term: 2·L in 200·5·copies.
    assert sums.score(True).curvature == pytest.approx(3 * (1 - 2 / d.size))
    assert sums.score(False).curvature == pytest.approx(3 * (1 - 2 / d.size) * 5 * copies)


def test_a_block_that_loses_nothing_scores_zero():
    sums = _Sums()
    sums.add(torch.zeros(2), torch.ones(2, 3), torch.zeros(2, 3))
    assert sums.score(True).curvature == sums.score(True).sensitivity == 0.0


def test_from_a_hessian_to_scores_to_packs():
    """Four blocks behind which the loss is ½·h_b·‖d‖² with h = 5, 2, 3, 7: S is h·(1 − 2/elements), packs follow it."""
    rng, h, omegas = np.random.default_rng(2), (5.0, 2.0, 3.0, 7.0), []
    curvatures = []
    for curvature, size in zip(h, (0.1, 0.4, 0.2, 0.3)):
        d = torch.from_numpy(size * rng.normal(size=(50, 6)))
        sums = _Sums()
        for part in d.split(20):
            sums.add(0.5 * curvature * part.square().sum(1), curvature * part, part)
        score = sums.score(True)
        assert score.curvature == pytest.approx(curvature * (1 - 2 / d.numel()))
        assert score.sensitivity == pytest.approx(score.curvature * float(d.abs().mean()))
        curvatures.append(score.curvature)
        omegas.append(score.sensitivity)
    # From the end: the least of all is block 1; before it only block 0 is left.
    assert pack(curvatures) == [(0, 1), (1, 4)]
    assert pack(curvatures, cap=2) == [(0, 1), (1, 2), (2, 4)]
    of_packs = [sum(omegas[a:b]) / (b - a) for a, b in pack(curvatures, cap=2)]
    costs = [[(b,) for b in (3, 4, 6)]] * 3
    # One pack may be raised: that of the greatest h·E|d|, the last by 1.2 to 0.8 and 0.5.
    assert greedy(of_packs, (3, 4, 6), costs, [14]) == [4, 4, 6]


@pytest.mark.parametrize("build", [minmax.vit, minmax.swin])
def test_block_scores_of_a_model(build):
    """L by kl_div, and the gradient's term by a central difference along d, in float64."""
    c = calibration(build())
    block = [unit for unit in c.sim.sequence if hasattr(unit, "linears")][1]
    got = score_block(c, block, False)
    module, seen = c.reference.model.get_submodule(block.path), {}

    def tail(shift: float) -> torch.Tensor:
        """log P of the float model with the block's output moved by ``shift``·d."""

        def hook(module, inputs, output):
            seen["d"] = output - c.sim.model.get_submodule(block.path)(*inputs)
            return output + shift * seen["d"]

        handle = module.register_forward_hook(hook)
        with torch.no_grad():
            out = log_softmax(c.reference(c.images).double(), -1)
        handle.remove()
        return out

    wanted, float_model = tail(-1.0), tail(0.0)

    def loss(log_p: torch.Tensor) -> float:
        return float(kl_div(log_p, wanted, reduction="batchmean", log_target=True))

    slope = (loss(tail(0.01)) - loss(tail(-0.01))) / 0.02
    d = seen["d"].double()
    want = (loss(float_model) - slope / d.numel()) / (0.5 * float(d.square().mean()))
    assert got.loss == pytest.approx(loss(float_model), rel=1e-4)
    # The term is 1/numel of L; that it is there at all is the toy's to show.
    assert got.curvature == pytest.approx(want, rel=1e-4)


# Packing


def by_definition(scores: list[float], cap: int) -> list[tuple[int, int]]:
    """The one composition of n whose every pack starts at the lowest score of what is left (of its last ``cap``)."""
    n = len(scores)
    found = []
    for cuts in itertools.chain.from_iterable(itertools.combinations(range(1, n), k) for k in range(n)):
        edges = [0, *cuts, n]
        split = list(itertools.pairwise(edges))
        lowest = lambda end: min((scores[i], i) for i in range(max(0, end - (cap or n)), end))[1]  # noqa: E731
        if all(first == lowest(end) for first, end in split):
            found.append(split)
    assert len(found) == 1
    return found[0]


@given(st.lists(st.integers(-3, 6).map(float), min_size=1, max_size=8), st.integers(0, 4))
def test_packing_is_its_definition(scores, cap):
    got = pack(scores, cap)
    assert got == by_definition(scores, cap)
    assert not cap or max(b - a for a, b in got) <= cap


def test_packing_by_hand():
    assert pack([5.0, 1.0, 4.0, 2.0, 3.0]) == [(0, 1), (1, 5)]
    assert pack([1.0, 2.0, 3.0]) == [(0, 3)]
    assert pack([3.0, 2.0, 1.0]) == [(0, 1), (1, 2), (2, 3)]
    assert pack([1.0, 2.0, 3.0, 4.0, 5.0], cap=2) == [(0, 1), (1, 3), (3, 5)]
    assert pack([1.0, 1.0]) == [(0, 2)]


# Bits


def costs(sizes: list[int], candidates: tuple[int, ...], *more: list[int]) -> list[list[tuple[int, ...]]]:
    """Bits of packs of these sizes; with ``more``, on axes of other sizes, too."""
    return [[tuple(n * b for n in axes) for b in candidates] for axes in zip(sizes, *more)]


def test_greedy_by_hand():
    # Packs of 10, 30, 20 at 4 bits cost 240; 280 pays for +2 bits on 20 elements: the most sensitive pack (30) does not
    # fit, the next (20) does and uses it up.
    bits = (3, 4, 6)
    own = costs([10, 30, 20], bits)
    assert greedy([1.0, 3.0, 2.0], bits, own, [280]) == [4, 4, 6]
    assert greedy([1.0, 3.0, 2.0], bits, own, [320]) == [6, 6, 4]
    assert greedy([1.0, 3.0, 2.0], bits, own, [240]) == [4, 4, 4]
    with pytest.raises(TooLittle) as error:
        greedy([1.0, 3.0, 2.0], bits, own, [239])
    assert error.value.args == ([240],)
    both = costs([10, 30, 20], bits, [1, 1, 5])
    assert greedy([1.0, 3.0, 2.0], bits, both, [320, 37]) == [6, 6, 4], "20 elements fit the first limit alone"
    assert greedy([1.0, 3.0, 2.0], bits, both, [999, 30]) == [4, 6, 4]


INSTANCES = st.lists(st.tuples(st.integers(-4, 20), st.integers(1, 12), st.integers(0, 9)), min_size=1, max_size=5)


@given(INSTANCES, st.sampled_from([(2, 3, 4), (3, 4, 6), (4, 6, 8)]), st.floats(0, 1), st.floats(0, 1), st.booleans())
def test_optimum_is_brute_force_and_the_ilp(instance, candidates, share, other_share, one_axis):
    omegas = [float(o) for o, _, _ in instance]
    axes = [[n for _, n, _ in instance], [m for _, _, m in instance]][: 1 if one_axis else 2]
    limits = [
        math.floor(sum(sizes) * (candidates[0] + s * (candidates[2] - candidates[0])))
        for sizes, s in zip(axes, (share, other_share))
    ]
    own = costs(axes[0], candidates, *axes[1:])
    bits = optimal(omegas, candidates, own, limits)
    value = np.dot(omegas, bits)
    every = itertools.product(candidates, repeat=len(omegas))
    feasible = [b for b in every if all(np.dot(sizes, b) <= limit for sizes, limit in zip(axes, limits))]
    assert tuple(bits) in feasible
    assert value == max(np.dot(omegas, b) for b in feasible)
    # One binary variable per pack and candidate.
    wide = np.array(candidates)
    solved = milp(
        -np.outer(omegas, wide).ravel(),
        constraints=[
            LinearConstraint(np.kron(np.eye(len(omegas)), np.ones(3)), 1, 1),
            LinearConstraint(np.array([np.outer(sizes, wide).ravel() for sizes in axes]), -np.inf, limits),
        ],
        bounds=Bounds(0, 1),
        integrality=np.ones(3 * len(omegas)),
    )
    assert -solved.fun == pytest.approx(value)
    if all(np.dot(sizes, [candidates[1]] * len(sizes)) <= limit for sizes, limit in zip(axes, limits)):
        assert value >= np.dot(omegas, greedy(omegas, candidates, own, limits))


def test_a_limit_below_everything_is_refused():
    with pytest.raises(TooLittle) as error:
        optimal([1.0, 1.0], (3, 4, 6), costs([10, 20], (3, 4, 6)), [89])
    assert error.value.args == ([90],)


def test_elements_by_hand():
    """ViT of 17 tokens, width 32, 2 heads, MLP 64; images 3 x 16 x 16 in 48-wide patches."""
    sizes = elements(calibration(minmax.vit()))
    assert sizes["patch_embed.proj"] == 32 * 48 + 3 * 16 * 16
    assert sizes["blocks.0.attn.qkv"] == 96 * 32 + 17 * 32 + 17 * 96 + 2 * 17 * 17
    assert sizes["blocks.1.mlp.fc2"] == 32 * 64 + 17 * 64
    assert sizes["head"] == 7 * 32 + 32


# The method


@pytest.mark.parametrize(("build", "runs"), [(minmax.vit, [3]), (minmax.swin, [2, 2])])
def test_packs_cover_every_run_of_blocks(build, runs):
    c = calibration(build(**({"depth": 3} if build is minmax.vit else {})))
    step(c, "allocate", "packs", cap=2)
    figures = c.metrics["packs"]
    assert [[b["path"] for b in f["blocks"]] for f in figures] == names(c)
    assert [b for pack in names(c) for b in pack] == [u.path for u in c.sim.sequence if hasattr(u, "linears")]
    assert max(map(len, names(c))) <= 2
    start = 0
    for length in runs:
        blocks = [b for f in figures for b in f["blocks"]][start : start + length]
        edges = [p for p in names(c) if p[0] in [b["path"] for b in blocks]]
        assert [len(p) for p in edges] == [b - a for a, b in pack([b["curvature"] for b in blocks], 2)]
        start += length
    assert all(f["bits"] == 4 and f["elements"] > 0 for f in figures)
    assert c.metrics.keys() == {"packs"}


@pytest.mark.parametrize("precision", ["greedy", "optimal"])
def test_bits_reach_every_operand_of_a_pack(precision):
    model = minmax.vit(depth=3)
    recipe = W4 | {"allocate": [{"method": "packs", "cap": 1, "precision": precision, **ROOM}]}
    state = calibrate(model, minmax.images(model, 8), parse(recipe)).state
    figures = state.metrics["packs"]
    assert len({p["bits"] for p in figures}) > 1
    total = paid = 0
    for p in figures:
        attention = state.sites[f"{p['blocks'][0]['path']}.attn"]
        fc1 = state.sites[f"{p['blocks'][0]['path']}.mlp.fc1"]
        for got in (attention.qkv.weight, attention.proj.act, attention.operands, attention.focus, fc1.weight, fc1.act):
            assert got.bits == p["bits"]
        total, paid = total + p["elements"], paid + p["elements"] * p["bits"]
    outside = 32 * 48 + 3 * 16 * 16 + 7 * 32 + 32
    assert state.metrics["average_element_bits"] == pytest.approx((paid + 6 * outside) / (total + outside))
    assert state.metrics["average_element_bits"] <= ROOM["average"]


@pytest.mark.parametrize("importance", [None, "input", "none"])
def test_weights_of_other_bits_count_what_the_option_says(importance):
    """Against the same search on the layer's own weight; the default is the inputs' power, and is not written down."""
    c = calibration(minmax.vit(depth=3))
    given = {} if importance is None else {"weight_importance": importance}
    step(c, "allocate", "packs", cap=1, precision="greedy", **ROOM, **given)
    (path,) = (p["blocks"][0]["path"] for p in c.metrics["packs"] if p["bits"] == 6)
    linear, rows = c.sim.linears[f"{path}.mlp.fc1"], c.observations().inputs[f"{path}.mlp.fc1"].rows
    wanted = {"none": None, "input": rows.square().mean(0)}
    found = {
        name
        for name, counts in wanted.items()
        if torch.equal(linear.quant.scale, weight_scale(linear.weight, linear.quant.spec, counts, "mse", 2.0, 50))
    }
    assert found == {importance or "input"}
    plain = find("allocate", "packs").options(**given).model_dump(mode="json")
    assert plain.get("weight_importance") == ("none" if importance == "none" else None)
    assert plain["operands"]["method"] == "minmax"


@pytest.mark.parametrize("precision", ["greedy", "optimal"])
@pytest.mark.parametrize("budget", [{"size": 0.19}, {"bitops": 0.023}, {"size": 0.19, "bitops": 0.023}])
def test_packs_within_a_budget(precision, budget):
    """What the state's layers cost, counted from their shapes alone, is what may be spent and what was noted."""
    model = minmax.vit(depth=3)
    allocate = [{"method": "packs", "cap": 1, "precision": precision, "budget": budget}]
    state = calibrate(model, minmax.images(model, 8), parse(W4 | {"allocate": allocate})).state
    of_packs = {p["blocks"][0]["path"]: p["bits"] for p in state.metrics["packs"]}
    assert len(set(of_packs.values())) > 1
    weights = outputs = size = bitops = 0
    for path, b in of_packs.items():
        block = model.get_submodule(path)
        for layer in (block.attn.qkv, block.attn.proj, block.mlp.fc1, block.mlp.fc2):
            n, k = layer.weight.shape
            weights, outputs = weights + n * k, outputs + n
            size, bitops = size + n * k * b / 8 + 4 * n, bitops + n * k * b * b
    spent = {"size": size / (4 * weights), "bitops": bitops / (1024 * weights)}
    for axis, limit in budget.items():
        assert spent[axis] <= limit
    assert {axis: state.metrics["allocation"][axis] for axis in spent} == pytest.approx(spent)


def test_packs_within_a_latency():
    model = minmax.vit(depth=2)
    step_of = {"method": "packs", "precision": "optimal", "latency_seconds": 0.01}
    recipe = parse(W4 | {"allocate": [step_of | {"budget": {"latency": 1000.0}}]})
    state = calibrate(model, minmax.images(model, 8), recipe).state
    assert {p["bits"] for p in state.metrics["packs"]} == {6}, "there is time for the high width"
    assert 0 < state.metrics["allocation"]["latency"] <= 1000
    recipe = parse(W4 | {"allocate": [step_of | {"budget": {"latency": 1e-9}}]})
    with pytest.raises(ValueError, match=r"budget is latency=1e-09, expected at least latency="):
        calibrate(model, minmax.images(model, 8), recipe)


def test_what_mixed_precision_refuses():
    options = {"precision": "greedy", **ROOM}
    c = calibration(minmax.vit())
    step(c, "initialise", "log_levels", softmax="sqrt2")
    with pytest.raises(
        ValueError, match=r"softmax of 'blocks\.0\.attn' has a LogLevels, expected a focusing quantizer"
    ):
        step(c, "allocate", "packs", **options)
    step(c, "allocate", "packs")  # at one width they have theirs
    with pytest.raises(ValueError, match="expected one width"):
        step(calibration(minmax.vit(), bits={"weights": 4, "activations": 8}), "allocate", "packs", **options)
    five = dict.fromkeys(("weights", "activations", "operands", "softmax"), 5)
    with pytest.raises(ValueError, match="one of 3, 4, 6"):
        step(calibration(minmax.vit(), bits=five), "allocate", "packs", **options)
    with pytest.raises(ValueError, match="5 bits in the middle"):
        step(calibration(minmax.vit(), bits=five), "allocate", "packs", candidates=(3, 4, 6), **options)
    with pytest.raises(ValueError, match=r"budget is -?\d+ bits for the packs, expected at least \d+"):
        step(calibration(minmax.vit()), "allocate", "packs", precision="greedy", average=2.0)
    with pytest.raises(ValueError, match=r"budget is size=0\.01, expected at least size="):
        step(calibration(minmax.vit()), "allocate", "packs", precision="greedy", budget={"size": 0.01})
    for wrong in ({"precision": "uniform"}, {"precision": "greedy", "average": 5.0}):
        with pytest.raises(ValueError, match="precision greedy or optimal, and no average"):
            parse(W4 | {"allocate": [{"method": "packs", "budget": {"size": 0.2}, **wrong}]})
    with pytest.raises(ValueError, match="ascending"):
        parse(W4 | {"allocate": [{"method": "packs", "candidates": [4, 3, 6]}]})


# Packs as units


def learn(c: Calibration, **options) -> None:
    step(c, "reconstruct", "blocks", unit="pack", iterations=25, batch=8, curriculum=1.0, **options)


def test_walk_gives_packs_their_inputs():
    c = calibration(minmax.vit(depth=3))
    step(c, "allocate", "packs", cap=2)
    plain = {unit.path: inputs for unit, *inputs in c.walk()}
    for unit, *inputs in c.walk(c.packs):
        assert all(torch.equal(a, b) for a, b in zip(inputs, plain[unit.path]))


@pytest.mark.parametrize("build", [minmax.vit, minmax.swin])
def test_reconstruction_lowers_every_packs_loss(build):
    c = calibration(build())
    c.packs = [Pack(blocks) for blocks in zip(*[iter(u for u in c.sim.sequence if hasattr(u, "linears"))] * 2)]
    before = pack_losses(c)
    learn(c, lr_rounding=0.01, mixing=0.5, mixing_unit="element", layers=True)
    after = pack_losses(c)
    assert after[0] < 0.97 * before[0]
    assert after[-1] < before[-1]
    learned = [path for path, linear in c.sim.linears.items() if linear.quant.alpha is not None]
    assert learned == list(c.sim.linears)  # between, before and after the packs, too


def pack_losses(c: Calibration) -> list[float]:
    return [
        float((c.run(c.sim, unit, x_sim) - c.run(c.reference, unit, x_ref)).square().mean())
        for unit, x_ref, x_sim in c.walk(c.packs)
    ]


def test_a_pack_is_learned_for_its_own_output():
    """With one step of one rate for all: every parameter moves as the error of the *last* block's output says."""
    c = calibration(minmax.vit(), n=16)
    blocks = c.sim.family.blocks()
    pack = Pack(tuple(blocks))
    c.packs = [pack]
    x_ref, x_sim = (inputs_of(m.model, blocks[0].path, c.images, 4) for m in (c.reference, c.sim))
    target = c.run(c.reference, pack, x_ref)
    sim = c.sim.twin()
    biases = [sim.linears[path].bias.requires_grad_() for block in blocks for path in c.sim.linears_of(block)]
    output = nn.Sequential(*(sim.model.get_submodule(block.path) for block in blocks))(x_sim)
    wanted = torch.autograd.grad((output - target).square().mean(), biases)

    start = [bias.detach().clone() for bias in biases]
    rates = {"lr_bias": 1e-4, "lr_branch": 0.0, "lr_scale": 0.0, "lr_focus": 0.0}
    step(c, "reconstruct", "blocks", unit="pack", iterations=1, batch=16, curriculum=1.0, holdout=0.0, **rates)
    after = [c.sim.linears[path].bias for block in blocks for path in c.sim.linears_of(block)]
    for a, b, gradient in zip(after, start, wanted, strict=True):
        clear = gradient.abs() > 1e-3 * gradient.abs().max()  # the rest is rounding: a key's bias shifts all scores
        assert bool(((a - b).sign() == -gradient.sign())[clear].all())


def test_elementwise_mixing_draws_every_element():
    """All float or all quantized at the ends of its range: with chance 1 the quantized input is never seen."""
    c = calibration(minmax.vit())
    block = c.sim.family.blocks()[1]
    (x_ref, x_sim) = next(inputs for unit, *inputs in c.walk([block]))
    target = c.run(c.reference, block, x_ref)
    seen = []
    module = c.sim.model.get_submodule(block.path)
    handle = module.register_forward_pre_hook(lambda m, inputs: seen.append(inputs[0].detach().clone()))
    options = find("reconstruct", "blocks").options
    for mixing in (0.5, 1.0):
        seen.clear()
        given_options = options(iterations=2, batch=8, holdout=0.0, mixing=mixing, mixing_unit="element")
        reconstruct(c, block, x_ref, x_sim, target, given_options, UnitLoss())
        share = [float((x.sort(0).values == x_ref.sort(0).values).float().mean()) for x in seen if len(x) == 8]
        assert share == [1.0] * 2 if mixing == 1.0 else all(s < 0.5 for s in share)
    handle.remove()


def test_packs_are_needed():
    with pytest.raises(ValueError, match=r"expected allocate\.packs"):
        learn(calibration(minmax.vit()))


def test_an_interrupted_pack_is_learned_again(tmp_path, monkeypatch):
    """Stopped when the first of two blocks of a pack had been kept: resuming gives what no interruption gives."""
    known = {"blocks.0": 2.0, "blocks.1": 1.0, "blocks.2": 3.0}
    monkeypatch.setattr(packs, "score_block", lambda c, block, normalise: Score(1.0, known[block.path], 1.0))
    model = minmax.vit(depth=3)
    x = minmax.images(model, 8)
    allocate = [{"method": "packs", "precision": "greedy", **ROOM}]
    learning = {"method": "blocks", "unit": "pack", "iterations": 3, "batch": 4, "lr_rounding": 0.01, "holdout": 0.0}
    recipe = parse(W4 | {"allocate": allocate, "reconstruct": [learning]})
    whole = calibrate(model, x, recipe, work_dir=tmp_path).state
    assert [[b["path"] for b in p["blocks"]] for p in whole.metrics["packs"]] == [
        ["blocks.0"],
        ["blocks.1", "blocks.2"],
    ]
    kept = sorted(tmp_path.glob("*.safetensors"))
    assert [file.stem.rsplit(".", 1)[1] for file in kept] == ["0", "1", "2"]
    kept[2].unlink()
    again = calibrate(model, x, recipe, work_dir=tmp_path).state
    for path, linear in whole.linears().items():
        assert torch.equal(linear.codes, again.linears()[path].codes)
        assert torch.equal(linear.act_scale, again.linears()[path].act_scale)
    assert again.metrics == whole.metrics
