"""CPT-V's contrastive search for weight scales: loss, prefix cache, evolution, and the stage on small models."""

import math

import minmax
import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.special import logsumexp
from test_stages import run_steps
from vitq.calibrate import calibrate
from vitq.convert import to_integer
from vitq.recipes import parse
from vitq.stages import Calibration, find
from vitq.stages.evolution import EvolutionOptions, Suffixes, contrastive_loss, default_epsilon, evolve

from vitq_kernels import backend

BASE = {
    "name": "test",
    "calibration": {"batch": 4},
    "bits": {"weights": 3},
    "low_rank": {"kind": "none"},
    "initialise": [{"method": "scales"}],
}
FAST = {"method": "evolution", "passes": 2, "epsilon": 0.05, "relative": True}


def calibration(model, n: int = 8, **fields) -> Calibration:
    """A finished calibration by ``BASE``, about to be refined."""
    return run_steps(model, BASE | fields, n)


def refine(c: Calibration, **options) -> None:
    m = find("refine", "evolution")
    m.run(c, m.options(**options))


def loss(c: Calibration, **options) -> float:
    """Of the whole model, image by image, by numpy."""
    with torch.no_grad():
        q, k = (np.concatenate([m(x).numpy() for x in c.images.split(4)]) for m in (c.sim, c.sim.family.model))
    return by_numpy(q, k, **options)


def by_numpy(q: np.ndarray, k: np.ndarray, temperature: float = 3.0) -> float:
    q, k = (x.astype(np.float64) / np.linalg.norm(x.astype(np.float64), axis=1, keepdims=True) for x in (q, k))
    terms = [logsumexp([qi @ kj / temperature for kj in k]) - qi @ ki / temperature for qi, ki in zip(q, k)]
    return 2 * temperature * float(np.mean(terms))


# The loss


def test_the_loss_of_two_images_by_hand():
    """q = (1, 0), (0.6, 0.8) and k the axes: −log(e^(1/T)/(e^(1/T) + 1)) and −log(e^(.8/T)/(e^(.6/T) + e^(.8/T)))."""
    q, k = torch.tensor([[5.0, 0.0], [3.0, 4.0]]), torch.tensor([[2.0, 0.0], [0.0, 0.1]])
    want = 3.0 * (math.log1p(math.exp(-1 / 3)) + math.log1p(math.exp(-0.2 / 3)))
    assert contrastive_loss(q, k) == pytest.approx(want, rel=1e-12)
    swapped = contrastive_loss(q, k.flip(0))
    assert swapped > want + 1


@settings(max_examples=25, deadline=None)
@given(n=st.integers(2, 12), c=st.integers(2, 9), t=st.floats(0.1, 5), seed=st.integers(0, 99), size=st.floats(-6, 6))
def test_the_loss_is_numpys(n, c, t, seed, size):
    g = np.random.default_rng(seed)
    q, k = g.normal(size=(n, c)) * 10.0**size, g.normal(size=(n, c))
    got = contrastive_loss(torch.from_numpy(q), torch.from_numpy(k), t)
    assert got == pytest.approx(by_numpy(q, k, t), rel=1e-11)
    assert contrastive_loss(torch.from_numpy(q) * 7, torch.from_numpy(k) / 3, t) == pytest.approx(got, rel=1e-11)


def test_images_are_contrasted_within_even_batches():
    q, k = torch.randn(10, 5), torch.randn(10, 5)
    want = sum(len(q[s]) * by_numpy(q[s].numpy(), k[s].numpy()) for s in (slice(0, 4), slice(4, 7), slice(7, 10))) / 10
    assert contrastive_loss(q, k, batch=4) == pytest.approx(want, rel=1e-11)


def test_the_published_range():
    """100 images, T = 3: 2T·log 100 where all logits are alike, 25.65 where every image is on its own."""
    assert contrastive_loss(torch.ones(100, 3), torch.ones(100, 3)) == pytest.approx(6 * math.log(100), rel=1e-12)
    opposed = torch.eye(100) - 0.01
    assert 25.6 < contrastive_loss(opposed, opposed) < 25.7


# Evolution


def test_evolution_climbs_down_a_bowl():
    options = EvolutionOptions(cycles=200, population=15)
    g = torch.Generator().manual_seed(0)
    seen = []

    def evaluate(x):
        seen.append(float((x[0] - 1.0).square().sum()))
        return seen[-1]

    start = (torch.zeros(4),)
    best, least = evolve(start, 4.0, evaluate, lambda p: (p[0] + 0.2 * torch.randn(4, generator=g),), options, g)
    assert least == min(seen) == float((best[0] - 1.0).square().sum()) < 0.2
    assert len(seen) == 200
    assert not start[0].any()


def test_equal_losses_do_not_compare_tensors():
    g = torch.Generator().manual_seed(0)
    start = (torch.zeros(3),)
    best, least = evolve(start, 1.0, lambda x: 1.0, lambda p: (p[0] + 1,), EvolutionOptions(cycles=9, population=2), g)
    assert least == 1.0
    assert best[0].shape == (3,)


def test_what_is_worse_is_never_kept():
    g = torch.Generator().manual_seed(0)
    start = (torch.zeros(3),)
    options = EvolutionOptions(cycles=40, population=3)
    best, least = evolve(start, 1.0, lambda x: 2.0, lambda p: (p[0] + 1,), options, g)
    assert (least, best) == (1.0, start)


# The stage


@pytest.mark.parametrize("build", [minmax.vit, minmax.swin])
def test_prefix_caching_is_the_full_forward(build):
    c = calibration(build())
    blocks = c.sim.family.blocks()
    suffixes = Suffixes(c, blocks)
    for unit in reversed(blocks):
        c.sim.linears[unit.attention.qkv.path].quant.scale.data *= 1.03
        with torch.no_grad():
            want = torch.cat([c.sim(x) for x in c.images.split(4)])
        assert torch.equal(suffixes.logits(unit.path), want)
        assert not any("forward" in vars(m) or m._forward_pre_hooks for m in c.sim.modules())
    # By now a block before the last one has changed: what was recorded for the last one is out of date.
    last = blocks[-1].path
    assert not torch.equal(suffixes.logits(last), want)
    assert torch.equal(Suffixes(c, blocks[-1:]).logits(last), want)


def scales(c: Calibration) -> dict[str, torch.Tensor]:
    return {path: linear.quant.scale.detach().clone() for path, linear in c.sim.linears.items()}


@pytest.mark.parametrize("build", [minmax.vit, minmax.swin])
def test_the_search_lowers_the_loss_and_touches_attention_only(build):
    c = calibration(build())
    before, start = loss(c), scales(c)
    weights = {path: linear.weight.clone() for path, linear in c.sim.linears.items()}
    refine(c, passes=4, epsilon=0.03, relative=True)
    assert loss(c) < before
    end = scales(c)
    changed = {path for path in start if not torch.equal(start[path], end[path])}
    assert changed
    assert all(c.sim.sites[path].role in ("qkv", "proj") for path in changed)
    assert all(bool((end[path] > 0).all()) for path in end)
    # The weight is rounded anew under its new scale.
    for path, linear in c.sim.linears.items():
        assert torch.equal(linear.weight, weights[path])
        want = (linear.weight / linear.quant.scale[:, None]).round().clamp(-linear.quant.limit, linear.quant.limit)
        assert float((linear.codes() - want).detach().abs().max()) <= 1
        assert float((linear.codes() != want).float().mean()) < 1e-3


def test_the_refined_integer_model_is_the_simulated_model():
    model = minmax.vit()
    result = calibrate(model, minmax.images(model, 8), parse(BASE | {"refine": [FAST]}))
    x = minmax.images(model, 8, seed=7)
    with torch.no_grad(), backend("ref"):
        assert torch.equal(result.sim(x), to_integer(model, result.state)(x))


def test_mlp_scales_join_on_request():
    c = calibration(minmax.vit())
    start = scales(c)
    refine(c, passes=3, epsilon=0.02, relative=True, mlp=True)
    assert {c.sim.sites[p].role for p, s in scales(c).items() if not torch.equal(s, start[p])} > {"fc1", "fc2"}


@pytest.mark.parametrize("epsilon", [1e-6, 0.5])
@pytest.mark.parametrize("relative", [False, True])
def test_never_worse_than_the_start(epsilon, relative):
    c = calibration(minmax.vit())
    before = loss(c)
    refine(c, passes=1, epsilon=epsilon, relative=relative)
    assert loss(c) <= before * (1 + 1e-12)


def test_steps_stay_within_epsilon():
    for options in ({}, {"epsilon": 0.01}, {"epsilon": 0.1, "relative": True}):
        c = calibration(minmax.vit())
        start = scales(c)
        refine(c, passes=1, cycles=1, **options)
        moved = torch.cat(
            [(s - start[p]).abs() / (start[p] if "relative" in options else 1) for p, s in scales(c).items()]
        )
        most = options.get("epsilon", 1e-3)
        assert 0.9 * most < float(moved.max()) <= most * (1 + 1e-4)


def test_kept_codes_stay_and_learned_rounding_is_kept():
    c = calibration(minmax.vit(), low_rank={"kind": "merged", "rank": 16}, compensate=["closed_form"])
    learned = c.sim.linears["blocks.1.attn.proj"]
    learned.quant.learn_rounding(learned.effective_weight())
    learned.quant.alpha.data.copy_(torch.randn(learned.shape, generator=torch.Generator().manual_seed(0)))
    before, start = {p: l.codes().clone() for p, l in c.sim.linears.items()}, scales(c)
    value = loss(c)
    refine(c, passes=2, epsilon=0.1, relative=True)
    assert loss(c) < value
    assert torch.equal(learned.codes(), before["blocks.1.attn.proj"])
    assert not torch.equal(learned.quant.scale, start["blocks.1.attn.proj"])
    assert any(not torch.equal(l.codes(), before[p]) for p, l in c.sim.linears.items())
    c = calibration(minmax.vit(), weight_levels="table")
    before = {p: l.codes().clone() for p, l in c.sim.linears.items()}
    start = scales(c)
    refine(c, passes=2, epsilon=0.1, relative=True, codes="kept")
    assert all(torch.equal(l.codes(), before[p]) for p, l in c.sim.linears.items())
    assert any(not torch.equal(s, start[p]) for p, s in scales(c).items())


def test_learned_rounding_is_kept_in_every_pass():
    """The first pass itself ends the learned rounding; 8-bit codes would follow a scale that moves by a tenth."""
    c = calibration(minmax.vit(), bits={"weights": 8})
    learned = c.sim.linears["blocks.1.attn.proj"]
    learned.quant.learn_rounding(learned.effective_weight())
    learned.quant.alpha.data.copy_(torch.randn(learned.shape, generator=torch.Generator().manual_seed(0)))
    before, start = learned.codes().clone(), learned.quant.scale.detach().clone()
    refine(c, passes=3, epsilon=0.1, relative=True)
    assert not torch.equal(learned.quant.scale, start)
    assert torch.equal(learned.codes(), before)


def test_the_number_of_evaluations(monkeypatch):
    c, seen = calibration(minmax.vit(depth=3)), []
    whole = Suffixes.logits
    monkeypatch.setattr(Suffixes, "logits", lambda self, path: seen.append(path) or whole(self, path))
    refine(c, passes=2, cycles=4)
    order = [f"blocks.{i}" for i in (2, 1, 0)]
    assert seen == order[:1] + 2 * [path for path in order for _ in range(4)]


def test_the_teacher_is_the_untouched_model():
    """A reference that was tampered with changes nothing."""
    a, b = calibration(minmax.vit()), calibration(minmax.vit())
    with torch.no_grad():
        for p in b.reference.parameters():
            p.zero_()
    for c in (a, b):
        refine(c, passes=1, epsilon=0.02, relative=True)
    assert all(torch.equal(x, y) for x, y in zip(scales(a).values(), scales(b).values()))


class Interrupted(Exception):
    pass


def test_deterministic_and_resumable(tmp_path):
    model = minmax.vit()
    images, recipe = minmax.images(model, 8), parse(BASE | {"refine": [FAST]})

    def run(seed: int = 3, **options) -> list[torch.Tensor]:
        state = calibrate(model, images, recipe, seed=seed, **options).state
        return [t for s in state.linears().values() for t in (s.weight_scale, s.codes)]

    def same(a, b) -> bool:
        return all(torch.equal(x, y) for x, y in zip(a, b))

    whole = run()
    assert same(whole, run())
    assert not same(whole, run(seed=4))
    for stop in (1, 3):

        def interrupt(step: str, done: int, total: int, stop: int = stop) -> None:
            if "refine" in step and (done, total) == (stop, 4):
                raise Interrupted

        with pytest.raises(Interrupted):
            run(work_dir=tmp_path / str(stop), progress=interrupt)
        assert len(list((tmp_path / str(stop)).glob("*evolution*.safetensors"))) == stop
        assert same(whole, run(work_dir=tmp_path / str(stop)))


def test_epsilon_follows_the_bits():
    assert [default_epsilon(b) for b in (3, 4, 8)] == [1e-3, 1e-3, 1e-4]


@pytest.mark.parametrize(
    ("options", "reason"),
    [
        ({"relative": True}, "epsilon is None, expected a number"),
        ({"relative": True, "epsilon": 1.5}, r"epsilon is 1\.5, expected less than 1"),
        ({"epsilon": -1}, "epsilon is -1"),
        ({"codes": "all"}, "codes is 'all'"),
        ({"batch": 1}, "batch is 1"),
    ],
)
def test_bad_options_are_refused(options, reason):
    with pytest.raises(ValueError, match=reason):
        parse(BASE | {"refine": [{"method": "evolution", **options}]})


def test_what_cannot_be_refined_is_refused():
    with pytest.raises(ValueError, match="no qkv or proj layer of a block is quantized"):
        refine(calibration(minmax.vit(), initialise=[]))
    with pytest.raises(ValueError, match="images holds 1, expected at least 2"):
        refine(calibration(minmax.vit(), n=1))
