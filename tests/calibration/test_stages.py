"""Transforms, reconstruction and rank search on small models."""

import minmax
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from vitq import scales
from vitq.calibrate import calibrate
from vitq.losses import UnitLoss
from vitq.models import adapter_for
from vitq.observers import thinned
from vitq.quantizers import SimLinear
from vitq.recipes import parse
from vitq.simulate import SimModel
from vitq.stages import Calibration, find, rank_search, reconstruct
from vitq.stages.rank_search import RankMixture, candidates
from vitq.stages.reconstruct import easy_fraction, losses

from vitq_kernels.formats import FocusSpec, QuantSpec
from vitq_kernels.ops.learning.ref import rectified_sigmoid

SCALES = {"method": "scales"}


def calibration(model, recipe: dict, n: int = 8) -> Calibration:
    recipe = parse({"name": "test", "calibration": {"batch": 4}, **recipe})
    return Calibration(SimModel(adapter_for(model)), minmax.images(model, n), recipe)


def run_steps(model, recipe: dict, n: int = 8) -> Calibration:
    """After all steps of ``recipe``."""
    c = calibration(model, recipe, n)
    for stage, m, options in c.recipe.steps():
        if stage != "transform" and c.reference is None:
            c.reference = c.sim.twin()
        m.run(c, options)
    return c


def step(c: Calibration, stage: str, name: str, **options) -> None:
    if stage != "transform" and c.reference is None:
        c.reference = c.sim.twin()
    m = find(stage, name)
    m.run(c, m.options(**options))


@pytest.mark.parametrize("build", [minmax.vit, minmax.swin])
def test_a_fresh_simulation_is_the_float_model(build):
    model = build()
    x = minmax.images(model)
    with torch.no_grad():
        assert torch.allclose(SimModel(adapter_for(model))(x), model(x), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("build", [minmax.vit, minmax.swin])
@pytest.mark.parametrize("options", [{}, {"strength": 0.5, "width": "deviation", "keys": True}, {"strength": 0.0}])
def test_reparameterization_preserves_the_function(build, options):
    model = build()
    c = calibration(model, {})
    x = minmax.images(model, seed=5).double()
    before = [p.clone() for p in c.sim.model.parameters()]
    with torch.no_grad():
        want = c.sim.model.double()(x)
        c.sim.model.float()
        step(c, "transform", "reparameterize", **options)
        got = c.sim.model.double()(x)
    assert any(not torch.equal(a, b) for a, b in zip(before, c.sim.model.parameters()))
    # Folded in float32: a relative 2^-24 per factor, amplified by the depth of a small model.
    assert torch.allclose(got, want, rtol=1e-5, atol=1e-5 * float(want.abs().max()))


def test_reparameterization_equalizes_channels():
    model = minmax.vit()
    with torch.no_grad():
        model.blocks[0].norm1.weight[3] *= 64
    c = calibration(model, {})
    spread = lambda s: float((s.high - s.low).max() / (s.high - s.low).min())  # noqa: E731
    path = "blocks.0.attn.qkv"
    assert spread(c.observations().inputs[path]) > 30
    step(c, "transform", "reparameterize")
    stats = c.observations().inputs[path]
    assert spread(stats) == pytest.approx(1.0, abs=1e-3)
    assert float((stats.high + stats.low).abs().max()) < 1e-3 * float(stats.high.max())


def test_padded_windows_keep_their_zeros():
    """24 x 40 images in 2 x 2 patches and windows of 5: the padding's zeros come after the LayerNorm, so no shift."""
    model = minmax.swin(window_size=5)
    c = calibration(model, {})
    assert any(s.window is not None and s.window.padded for s in c.sim.attention_sites.values())
    x = minmax.images(model, seed=5)
    with torch.no_grad():
        want = c.sim(x)
        step(c, "transform", "reparameterize")
        assert torch.allclose(c.sim(x), want, rtol=1e-3, atol=1e-3 * float(want.abs().max()))


def test_curriculum_schedule():
    assert easy_fraction(0, 100, 0.5) == 0.5
    assert easy_fraction(50, 100, 0.5) == 0.75
    assert easy_fraction(100, 100, 0.5) == 1.0
    assert easy_fraction(3, 100, 1.0) == 1.0


BASE = {
    "bits": {"weights": 3, "activations": 4, "operands": 4, "softmax": 3},
    "low_rank": {"kind": "error", "rank": 16},
    "focus": {"anchor": "absolute", "power": 1.0, "b2": 0.9},
}


@pytest.mark.parametrize(
    ("options", "learning"),
    [({}, "float32"), ({"curriculum": 1.0, "lr_weight_scale": 0.001, "mixing": 0.2}, "float32"), ({}, "bfloat16")],
)
def test_reconstruction_lowers_every_blocks_loss(options, learning):
    c = calibration(minmax.vit(), BASE | {"learning": learning})
    step(c, "initialise", "scales")
    step(c, "compensate", "closed_form", start="whitened")
    before = block_losses(c)
    step(c, "reconstruct", "blocks", iterations=25, batch=8, **options)
    after = block_losses(c)
    assert after[0] < 0.97 * before[0]
    assert after[-1] < before[-1]
    assert not any(p.requires_grad for p in c.sim.parameters() if p.grad is None and p.dim() > 1)


class Seen(UnitLoss):
    """Notes the images of every step of learning, and of the judgement after it."""

    def __init__(self) -> None:
        super().__init__()
        self.steps, self.judged = [], []

    def __call__(self, error, images):
        if torch.is_grad_enabled():
            self.steps.append(set(images.tolist()))
            self.judged.clear()
        else:
            self.judged += images.tolist()
        return super().__call__(error, images)


#: So small that no loss changes.
FROZEN = {"lr_branch": 0.0, "lr_scale": 0.0, "lr_focus": 0.0, "lr_bias": 1e-12}


def reconstructed(n: int, spread: float = 0.0, **options) -> tuple[Seen, torch.Tensor]:
    """What learning the first block met, and how hard the images were [n]: from nothing to ``spread``, in no order."""
    c = calibration(minmax.vit(), {"bits": {"weights": 3}}, n)
    step(c, "initialise", "scales")
    unit, x_ref, x_sim = next(iter(c.walk(c.sim.family.blocks())))
    start = c.run(c.sim if spread else c.reference, unit, x_sim)
    hard = spread * torch.randperm(n, generator=torch.Generator().manual_seed(1)) / n
    target = start + hard.reshape(-1, 1, 1)
    seen = Seen()
    reconstruct.reconstruct(c, unit, x_ref, x_sim, target, find("reconstruct", "blocks").options(**options), seen)
    return seen, hard


def test_learning_starts_with_the_easiest_images_and_never_sees_the_judges():
    steps, learned = 60, 24
    seen, hard = reconstructed(32, 1.0, iterations=steps, batch=3, curriculum=0.25, holdout=0.25, **FROZEN)
    judges = set(seen.judged)
    assert (len(seen.steps), len(judges)) == (steps, 8)
    assert len(seen.judged) == 16  # the end and the start
    easiest = sorted(set(range(32)) - judges, key=hard.tolist().__getitem__)
    for t, drawn in enumerate(seen.steps):
        assert len(drawn) == 3
        assert drawn <= set(easiest[: round(learned * (0.25 + 0.75 * t / steps))]), t
    assert set().union(*seen.steps) - set(easiest[:12])
    everywhere, _ = reconstructed(32, 1.0, iterations=8, batch=3, curriculum=1.0, holdout=0.25, **FROZEN)
    assert not all(drawn <= set(easiest[:8]) for drawn in everywhere.steps)


def test_roundings_are_decided_while_beta_falls(monkeypatch):
    """The regulariser alone: from h(α) anywhere to its ends; with the other sign all of them would go to one half."""
    betas, ends = [], []
    penalty, finish = reconstruct._rounding_penalty, reconstruct._Learner.finish

    def noted(linears, beta):
        betas.append(beta)
        return penalty(linears, beta)

    def decided(learner):
        h = torch.cat([rectified_sigmoid(l.quant.alpha.detach())[0].flatten() for l in learner.linears])
        ends.append(float(((h < 0.02) | (h > 0.98)).float().mean()))
        finish(learner)

    monkeypatch.setattr(reconstruct, "_rounding_penalty", noted)
    monkeypatch.setattr(reconstruct._Learner, "finish", decided)
    options = FROZEN | {"lr_bias": 0.0, "lr_rounding": 0.1, "batch": 4, "rounding_warmup": 0.2, "curriculum": 1.0}
    for weight in (0.0, 1000.0):
        reconstructed(8, iterations=100, rounding_weight=weight, **options)
    assert ends[0] < 0.6
    assert ends[1] > 0.7
    assert len(betas) == 160
    assert betas[80:] == pytest.approx([20 - 18 * (t / 100 - 0.2) / 0.8 for t in range(20, 100)])


def test_reconstruction_never_keeps_what_is_worse():
    """Learned rounding that is cut short: its hard form is worse than the start, which stays."""
    c = calibration(minmax.vit(), BASE)
    step(c, "initialise", "scales")
    before = block_losses(c)
    step(c, "reconstruct", "blocks", iterations=2, batch=8, lr_rounding=50.0)
    assert block_losses(c) == pytest.approx(before, rel=1e-6)


def block_losses(c: Calibration) -> list[float]:
    """Of each block in the quantized prefix that it will see."""
    out = []
    for unit, x_ref, x_sim in c.walk(c.sim.sequence[1:-1]):
        target = c.run(c.reference, unit, x_ref)
        out.append(float(losses(c.sim.model.get_submodule(unit.path), x_sim, target, 4).mean()))
    return out


def test_learning_the_interval_reduces_the_loss():
    c = calibration(minmax.vit(), BASE | {"bits": {"softmax": 3}, "low_rank": {"kind": "none"}})
    step(c, "initialise", "scales")
    before, start = block_losses(c), [a.focus.spec for a in c.sim.attentions.values()]
    only = {"lr_branch": 0.0, "lr_scale": 0.0, "lr_bias": 0.0, "lr_focus": 0.02}
    step(c, "reconstruct", "blocks", iterations=30, batch=8, curriculum=1.0, **only)
    after, end = block_losses(c), [a.focus.spec for a in c.sim.attentions.values()]
    assert after[0] < before[0]
    assert all(a != b and 0 <= b.b1 < b.b2 <= 1 for a, b in zip(start, end))


def test_interval_search_finds_a_better_interval():
    c = calibration(minmax.vit(), BASE | {"bits": {"softmax": 2}})
    step(c, "initialise", "scales", focus_search=12)
    specs = [a.focus.spec for a in c.sim.attentions.values()]
    assert all(isinstance(s, FocusSpec) and s.b2 < 0.9 for s in specs)
    for path, a in c.sim.attentions.items():
        qkv = c.observations().qkv[path]
        a.operands.spec, a.focus, kept = None, None, a.focus
        with torch.no_grad():
            exact = a.attend(qkv)
            errors = []
            for focus in (kept, type(kept)(c.recipe.focus_spec())):
                a.focus = focus
                errors.append(float((a.attend(qkv) - exact).square().sum()))
        assert errors[0] < errors[1]


def test_subspace_directions_stay_orthonormal():
    c = calibration(minmax.vit(), BASE | {"low_rank": {"kind": "subspace", "rank": 16}})
    step(c, "initialise", "scales")
    step(c, "compensate", "closed_form", rounding="compensated")
    step(c, "reconstruct", "blocks", iterations=5, batch=4)
    branches = [l for l in c.sim.linears.values() if l.lora.rank]
    assert len(branches) == 8
    for l in branches:
        assert l.lora.kind == "subspace"
        assert torch.allclose(l.lora_down @ l.lora_down.T, torch.eye(16), atol=1e-3)  # float16


@pytest.mark.parametrize(
    ("better", "worse"),
    [
        ({"low_rank": {"kind": "error", "rank": 16}}, {"low_rank": {"kind": "none"}}),
        ({}, {"compensate": [{"method": "closed_form", "start": "plain"}]}),
        (
            {"low_rank": {"kind": "none"}, "compensate": [{"method": "closed_form", "rounding": "compensated"}]},
            {"low_rank": {"kind": "none"}},
        ),
    ],
)
def test_closed_forms_improve_the_output(better, worse):
    """W3 with 8-bit activations, so that the weights' error is what is compared."""
    model = minmax.vit()
    x = minmax.images(model, 16)
    base = {
        "name": "test",
        "bits": {"weights": 3},
        "low_rank": {"kind": "error", "rank": 16},
        "initialise": [SCALES],
        "compensate": [{"method": "closed_form"}],
    }
    with torch.no_grad():
        want = model(x)
        errors = [float((calibrate(model, x, parse(base | o)).sim(x) - want).square().sum()) for o in (better, worse)]
    assert errors[0] < errors[1]


def test_merged_branch_costs_nothing_at_run_time():
    model = minmax.vit()
    recipe = BASE | {"low_rank": {"kind": "merged", "rank": 16}, "initialise": [SCALES]}
    recipe |= {"compensate": [{"method": "closed_form", "ridge": True}], "name": "test"}
    state = calibrate(model, minmax.images(model, 8), parse(recipe)).state
    assert all(s.lora_up is None for s in state.linears().values())


def test_rank_search_picks_the_planted_rank():
    """Weights on the 4-bit grid plus a rank-16 matrix below half a step: rounding loses rank 16 and nothing else."""
    g = torch.Generator().manual_seed(0)
    model = minmax.vit(embed_dim=96, depth=1, mlp_ratio=1)
    for site in adapter_for(model).linears()[1:-1]:
        w = model.get_submodule(site.path).weight
        plant = torch.randn(w.shape[0], 16, generator=g) @ torch.randn(16, w.shape[1], generator=g)
        grid = torch.randint(-6, 7, w.shape, generator=g).float()
        grid[:, 0] = 7.0
        plant[:, 0] = 0.0
        with torch.no_grad():
            w.copy_((grid + 0.49 * plant / plant.abs().max()) * 0.03)
    c = calibration(model, {"bits": {"weights": 4}, "low_rank": {"kind": "error", "rank": 16}}, n=16)
    step(c, "initialise", "scales", weights={"method": "minmax"})
    for linear in c.sim.linears.values():
        linear.act.set(None)
    for attention in c.sim.attentions.values():
        attention.operands.set(None)
        attention.focus = None
    search = {"candidates": (0, 16, 32, 48), "iterations": 60, "batch": 8, "drop": 0.0, "lr_alpha": 0.1}
    step(c, "allocate", "rank_search", cost_weight=1e-6, **search)
    assert c.ranks == dict.fromkeys(c.interior(), 16)


def test_rank_search_learns_branches_and_ranks_from_different_images(monkeypatch):
    """Steps alternate between the branches and α, each with a half of the images of its own."""
    c = calibration(minmax.vit(), BASE, 8)
    step(c, "initialise", "scales")
    unit, _, x = next(iter(c.walk(c.sim.family.blocks())))
    module, drawn, moved = c.sim.model.get_submodule(unit.path), [], []
    adam = rank_search.adam

    def noted(groups):
        optimizer, own = adam(groups), len(moved)
        moved.append([])
        optimizer.register_step_pre_hook(lambda *_: moved[own].append(len(drawn)))
        return optimizer

    monkeypatch.setattr(rank_search, "adam", noted)
    target = c.run(c.reference, unit, x)
    handle = module.register_forward_pre_hook(
        lambda _, inputs: drawn.append({i for row in inputs[0] for i in range(8) if torch.equal(row, x[i])})
    )
    options = find("allocate", "rank_search").options(candidates=(0, 16), batch=3)
    rank_search.search(c, unit, x, target, options, 12)
    handle.remove()
    assert moved == [list(range(1, 25, 2)), list(range(2, 25, 2))]
    branches, ranks = (set().union(*drawn[i::2]) for i in (0, 1))
    assert (len(branches), len(ranks)) == (4, 4)
    assert not branches & ranks


def test_rank_mixture():
    up, down = torch.randn(5, 32), torch.randn(32, 7)
    mixture = RankMixture([0, 16, 32], up, down)
    x = torch.randn(3, 7)
    mixture.keep = torch.tensor([1.0, 0.0, 1.0])
    assert torch.allclose(mixture(x), x @ down.T @ up.T / 3, atol=1e-5)
    mixture.keep = torch.tensor([1.0, 1.0, 0.0])
    assert torch.allclose(mixture(x), x @ down[:16].T @ up[:, :16].T / 3, atol=1e-5)
    assert mixture.best == 0  # equal shares: the cheapest
    assert float(mixture.cost(5, 7)) == pytest.approx(16 * 12 / 35)
    options = find("allocate", "rank_search").options()
    assert candidates(options, (96, 288)) == [0, 16, 32, 48]
    with pytest.raises(ValueError, match="needs a branch"):
        step(calibration(minmax.vit(), {}), "allocate", "rank_search")


@given(groups=st.integers(1, 40), size=st.integers(1, 20), keep=st.integers(1, 60))
def test_thinned_rows_meet_every_place_of_a_group(groups, size, keep):
    x = torch.arange(groups * size)
    chosen = thinned(x, keep)
    assert len(chosen) >= min(keep, len(x))
    gaps = chosen.diff().unique()
    assert len(gaps) <= 1
    # Places within a group are met within one of equally often, as often as there are rows enough.
    counts = (chosen % size).bincount(minlength=size)
    assert int(counts.max() - counts.min()) <= 1


def test_thinned_rows_of_a_square():
    assert thinned(torch.arange(4096), 64).diff().unique().tolist() == [63]


def test_sampled_ranges_see_every_channel(monkeypatch):
    monkeypatch.setattr(scales, "SAMPLE", 64)
    rows = torch.zeros(64, 16)
    rows[:, 5] = torch.linspace(-1, 100, 64)
    linear = SimLinear(torch.ones(4, 16), None)
    spec = QuantSpec(8, symmetric=False)
    scales.set_activation(linear, rows, spec, scales.Search(method="minmax"))
    # Every fifteenth value is seen, four of the channel's.
    assert linear.act.scale.item() > 0.75 * 101 / 255
