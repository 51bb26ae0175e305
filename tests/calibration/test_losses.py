"""Losses of reconstruction: gradients of the KL, weights, low-rank form against numpy and autograd; what learning with
them does to the logits of images it never saw."""

from functools import partial

import minmax
import numpy as np
import pytest
import torch
from torch import nn
from torch.nn.functional import kl_div, log_softmax
from vitq.calibrate import calibrate
from vitq.losses import (
    KLGradients,
    LowRankLoss,
    UnitLoss,
    hooked,
    kl_gradient,
    log_probabilities,
    low_rank_factor,
    perturbation_weights,
)
from vitq.models import adapter_for
from vitq.quantizers import FocusQuantizer, SimLinear
from vitq.quantizers.functional import Drop
from vitq.recipes import load_recipe, parse
from vitq.simulate import SimModel
from vitq.stages import Calibration, find
from vitq.stages.base import Pack, Unit
from vitq.stages.reconstruct import reconstruct, rounding_rate, unit_loss

from vitq_kernels.formats import FocusSpec, QuantSpec

NAMES = ("output", "fisher_diagonal", "perturbation", "fisher_low_rank")
W3 = {
    "name": "test",
    "calibration": {"batch": 4},
    "bits": {"weights": 3, "activations": 4, "operands": 4, "softmax": 4},
    "focus": {"anchor": "absolute", "power": 1.0},
    "initialise": ["scales"],
}


def calibration(model, n: int = 10) -> Calibration:
    c = Calibration(SimModel(adapter_for(model)), minmax.images(model, n), parse(W3))
    c.reference = c.sim.twin()
    for _, m, options in c.recipe.steps():
        m.run(c, options)
    return c


def options(**fields):
    return find("reconstruct", "blocks").options(batch=8, curriculum=1.0, lr_rounding=0.03, **fields)


class Toy(nn.Module):
    """[B, 4] -> body -> [B, 6] -> A -> [B, 3] logits, in float64; the gradient and the Hessian of its KL by numpy."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(3)
        self.body, self.head = nn.Linear(4, 6), nn.Linear(6, 3, bias=False)
        self.double().requires_grad_(False)
        self.a = self.head.weight.numpy()
        self.images = torch.randn(5, 4, dtype=torch.float64)

    def forward(self, x):
        return self.head(self.body(x))

    def p(self, z, t: float) -> np.ndarray:
        e = np.exp(np.asarray(z) @ self.a.T / t)
        return e / e.sum(1, keepdims=True)

    def gradient(self, z, t: float) -> np.ndarray:
        """At z, of KL to the float model."""
        return (self.p(z, t) - self.p(self.body(self.images), t)) @ self.a / t


@pytest.mark.parametrize("t", [1.0, 20.0])
def test_gradient_of_a_linear_tail(t):
    toy = Toy()
    z = toy.body(toy.images) + torch.randn(5, 6, dtype=torch.float64)
    loss, gradient = kl_gradient(toy, toy.body, z, toy.images, log_probabilities(toy(toy.images), t), t)
    p, q = toy.p(toy.body(toy.images), t), toy.p(z, t)
    assert loss.numpy() == pytest.approx((p * np.log(p / q)).sum(1))
    assert gradient.numpy() == pytest.approx(toy.gradient(z, t))
    # In batches, with the float model's probabilities kept.
    assert torch.allclose(KLGradients(toy, toy.images, 2, t)(toy.body, z), gradient)
    assert not z.requires_grad
    assert not toy.body._forward_hooks


@pytest.mark.parametrize("family", [minmax.vit, minmax.swin])
def test_gradients_do_not_need_what_is_not_read(family):
    """The blocks before one need not be computed, and are not: their outputs are NaN."""
    c = calibration(family(), 6)
    gradients = KLGradients(c.reference, c.images, 4, 2.0)
    for block in c.sim.family.blocks()[1:]:
        module, unread = c.reference.model.get_submodule(block.path), c.unread(block.path)
        z = 1.1 * next(c.run(c.reference, u, x) for u, x, _ in c.walk() if u.path == block.path)
        want = gradients(module, z)
        assert torch.equal(gradients(module, z, unread), want)
        assert not any("forward" in vars(m) for m in (module, *unread))
    assert unread, "the last block reads another"


def test_what_is_read_elsewhere_is_computed():
    c = calibration(minmax.vit(), 4)
    first, *_, last = c.sim.family.blocks()
    assert c.unread(last.path)
    model, seen = c.reference.model, []
    model.get_submodule(first.path).register_forward_hook(lambda module, inputs, output: seen.append(output))
    forward = model.forward
    model.forward = lambda x: forward(x) + seen.pop().mean()
    assert c.unread(last.path) == {}


def quantized_outputs(c: Calibration) -> tuple[Unit, tuple[torch.Tensor, ...], torch.Tensor, torch.Tensor]:
    """The first block, its inputs, its float and its quantized outputs."""
    unit, *inputs = next(u for u in c.walk() if hasattr(u[0], "linears"))
    return unit, inputs, c.run(c.reference, unit, inputs[0]), c.run(c.sim, unit, inputs[1])


def loss_of(c: Calibration, name: str) -> UnitLoss:
    unit, inputs, target, _ = quantized_outputs(c)
    gradients = None if name == "output" else KLGradients(c.reference, c.images, 4, 2.0)
    return unit_loss(c, options(loss=name, temperature=2.0), gradients, unit, *inputs, target)


def test_fisher_diagonal_of_a_model_by_autograd():
    """Behind the first block of a ViT come the second, a LayerNorm, pooling and the head: by timm's own modules."""
    model = minmax.vit()
    c = calibration(model)
    _, _, _, z = quantized_outputs(c)
    z = z.requires_grad_()
    logits = model.head(model.fc_norm(model.pool(model.norm(model.blocks[1](z)))))
    target = log_softmax(model(c.images) / 2.0, -1)
    kl_div(log_softmax(logits / 2.0, -1), target, reduction="sum", log_target=True).backward()
    want = z.grad.square() / z.grad.square().mean()
    got = loss_of(c, "fisher_diagonal").weights
    assert got.shape == want.shape
    assert torch.allclose(got, want, rtol=1e-2, atol=1e-3 * float(want.max()))
    # Squared error weighted image by image.
    error = torch.randn_like(want[:3])
    chosen = torch.tensor([7, 0, 4])
    by_hand = [float((want[i] * e**2).mean()) for i, e in zip(chosen, error)]
    assert loss_of(c, "fisher_diagonal")(error, chosen).tolist() == pytest.approx(by_hand, rel=1e-2)


def test_perturbation_is_the_size_of_the_hessians_rows():
    toy, t = Toy(), 2.0
    z = toy.body(toy.images)
    gradient = partial(KLGradients(toy, toy.images, 5, t), toy.body)
    got = perturbation_weights(gradient, z, torch.Generator().manual_seed(7))
    signs = torch.randint(0, 2, z.shape, generator=torch.Generator().manual_seed(7)).numpy() * 2 - 1
    want = np.zeros(6)
    for p, v in zip(toy.p(z, t), signs):
        h = toy.a.T @ (np.diag(p) - np.outer(p, p)) @ toy.a / t**2
        want += np.abs(h @ v) / len(z)
    assert got.numpy()[0] == pytest.approx(want, rel=1e-4)


def test_what_all_channels_share_has_no_effect():
    """Why the directions are drawn: the published one, equal in all channels, is in the null space of the Hessian."""
    c = calibration(minmax.vit())
    unit, _, target, _ = quantized_outputs(c)
    gradients = KLGradients(c.reference, c.images, 4, 2.0)
    at = partial(gradients, c.reference.model.get_submodule(unit.path))
    drawn = perturbation_weights(at, target, torch.Generator().manual_seed(0))
    step = 1e-3 * float(target.square().mean().sqrt())
    shared = (at(target + step) - at(target - step)).abs() / (2 * step)
    assert float(drawn.min()) > 0
    assert float(shared.mean()) < 0.05 * float(drawn.mean())


def test_low_rank_factor_is_numpys():
    rng = np.random.default_rng(0)
    g, d = rng.normal(size=(3, 8)), rng.normal(size=(3, 8))
    factor = low_rank_factor(*map(torch.from_numpy, (g, d))).numpy()
    assert factor.T @ factor == pytest.approx(g.T @ np.linalg.inv(d @ d.T) @ g)
    # Of rows that agree, one counts.
    g[2], d[2] = g[1], d[1]
    factor = low_rank_factor(*map(torch.from_numpy, (g, d))).numpy()
    assert factor.shape == (2, 8)
    assert factor.T @ factor == pytest.approx(g.T @ np.linalg.pinv(d @ d.T, rcond=1e-6) @ g)


def test_low_rank_loss_by_hand():
    toy, rng = Toy(), np.random.default_rng(1)
    target = toy.body(toy.images).numpy()
    outputs = [target + rng.normal(size=target.shape) for _ in range(3)]
    given = iter(outputs)
    gradient = partial(KLGradients(toy, toy.images, 5, 1.0), toy.body)
    loss = LowRankLoss(torch.from_numpy(target), lambda: torch.from_numpy(next(given)), gradient, rank=3)
    for rows in (1, 2, 3):
        g = np.stack([np.abs(toy.gradient(z, 1.0)).mean(0) for z in outputs[:rows]])
        d = np.stack([np.abs(z - target).mean(0) for z in outputs[:rows]])
        f = g.T @ np.linalg.inv(d @ d.T) @ g
        diagonal = lambda e, g=g: (e**2 * g.mean(0) / g.mean()).mean(1)  # noqa: E731
        low_rank = lambda e, f=f: np.einsum("bi,ij,bj->b", np.abs(e), f, np.abs(e))  # noqa: E731
        latest = outputs[rows - 1] - target
        balance = diagonal(latest).mean() / low_rank(latest).mean()
        e = rng.normal(size=(2, 6))
        want = 0.5 * (diagonal(e) + balance * low_rank(e))
        assert loss(torch.from_numpy(e), torch.tensor([4, 1])).numpy() == pytest.approx(want)
        for step in range((rows - 1) * 10 // 3, 10):
            loss.refresh(step, 10)  # a row more after every third of the steps
            if step < rows * 10 // 3:
                assert len(loss._rows) == rows
            else:
                break
    assert len(loss._rows) == 3


def test_weights_that_say_nothing_are_ones():
    assert torch.equal(UnitLoss(torch.zeros(1, 4)).weights, torch.ones(1, 4))


def kl_of_unit(c: Calibration, unit: Unit, images: torch.Tensor) -> float:
    """KL of the logits to the float model's where nothing but ``unit`` is quantized."""
    quantized, model = c.sim.model.get_submodule(unit.path), c.reference.model
    with torch.no_grad():
        wanted = log_probabilities(model(images))
        module = model.get_submodule(unit.path)
        got = log_probabilities(hooked(model, module, lambda _, inputs, output: quantized(*inputs), images))
    return float(kl_div(got, wanted, reduction="batchmean", log_target=True))


@pytest.mark.parametrize(
    ("name", "most"), [("output", 0.95), ("fisher_diagonal", 1.0), ("perturbation", 0.85), ("fisher_low_rank", 0.75)]
)
def test_learning_brings_the_logits_nearer(name, most):
    """On images that were not learned from. The squared gradients of a few images say little about others."""
    c = calibration(minmax.vit(), 48)
    unseen = minmax.images(c.sim.family.model, 64, seed=9)
    unit, inputs, target, _ = quantized_outputs(c)
    before = kl_of_unit(c, unit, unseen)
    wanted = options(loss=name, iterations=60, temperature=2.0)
    reconstruct(c, unit, *inputs, target, wanted, loss_of(c, name))
    assert kl_of_unit(c, unit, unseen) <= most * before


def test_losses_of_windows_and_packs():
    """Swin's blocks write [B, H, W, C]; a pack's output is that of its last block."""
    c = calibration(minmax.swin(), 4)
    blocks = c.sim.family.blocks()[:2]
    c.packs = [Pack(tuple(blocks))]
    before = [b.clone() for b in c.sim.model.buffers()]
    for name in NAMES:
        find("reconstruct", "blocks").run(c, options(loss=name, iterations=2, unit="pack", rank=2))
    assert all(torch.equal(a, b) for a, b in zip(before, c.sim.model.buffers()))
    unit, x_ref, x_sim = next(c.walk(c.packs))
    target = c.run(c.reference, unit, x_ref)
    gradients = KLGradients(c.reference, c.images, 4, 1.0)
    loss = unit_loss(c, options(loss="fisher_low_rank"), gradients, unit, x_ref, x_sim, target)
    assert loss.weights.shape == (1, *target.shape[1:])


@pytest.mark.parametrize(
    ("rate", "effort", "want"), [(1e-3, 1, 1e-3), (1e-3, 0.1, 1e-2), (1e-3, 0.01, 0.03), (0.1, 0.1, 0.1)]
)
def test_fewer_steps_of_rounding_are_larger(rate, effort, want):
    assert rounding_rate(rate, effort) == pytest.approx(want)


# QDrop


def test_dropped_elements_stay_float():
    torch.manual_seed(0)
    linear = SimLinear(torch.randn(5, 8), None)
    linear.quant.set(QuantSpec(4, granularity="per_channel"), torch.full((5,), 0.3))
    linear.act.set(QuantSpec(3, symmetric=False), torch.tensor([0.1]), 2.0)
    x, weight = torch.randn(64, 8), linear.codes() * 0.3
    quantized = linear.compute(x).detach()
    linear.act.drop = Drop(1.0, torch.Generator().manual_seed(0))
    assert torch.allclose(linear.compute(x), x @ weight.T, atol=1e-5)  # unclamped, too
    with torch.no_grad():
        assert torch.allclose(linear.compute(x), quantized, atol=1e-5)
    linear.act.drop = Drop(0.25, torch.Generator().manual_seed(0))
    assert float((linear.act.values(x)[0] == x).float().mean()) == pytest.approx(0.25, abs=0.05)


def test_dropped_probabilities_stay_float():
    focus = FocusQuantizer(FocusSpec(3, b1=0.0, b2=1.0, power=1.0, anchor="absolute"))
    scores = torch.randn(4, 16)
    focus.drop = Drop(1.0, torch.Generator().manual_seed(0))
    level, step, offset, _ = focus.values(scores)
    assert torch.allclose((level * step + offset).float(), scores.softmax(-1), atol=1e-6)


def test_nothing_is_dropped_after_learning():
    c = calibration(minmax.vit())
    with torch.no_grad():
        before = c.sim(c.images)
    steps = partial(find("reconstruct", "blocks").run, c)
    steps(options(iterations=2, lr_scale=0.0, lr_focus=0.0, lr_bias=0.0, lr_branch=0.0, dropping=0.5))
    assert not any(getattr(m, "drop", None) for m in c.sim.modules())
    with torch.enable_grad():
        assert torch.equal(c.sim(c.images), c.sim(c.images))
    assert before.shape == (10, 7)


# Recipes


@pytest.mark.parametrize(
    ("name", "loss", "qdrop"),
    [
        ("brecq", "fisher_diagonal", 0.0),
        ("qdrop", "output", 0.5),
        ("aphq-vit", "perturbation", 0.5),
        ("fima-q", "fisher_low_rank", 0.5),
    ],
)
def test_recipes(name, loss, qdrop):
    plain = load_recipe(name, calibration={"batch": 4}).plain()
    (learning,) = plain["reconstruct"]
    assert (learning["loss"], learning["mixing"], learning["dropping"]) == (loss, qdrop, qdrop)
    assert learning["iterations"] * plain["fast_effort"] >= learning["least_iterations"]
    learning |= {"iterations": 2, "least_iterations": 0, "batch": 4}
    model = minmax.vit()
    state = calibrate(model, minmax.images(model, 8), parse(plain)).state
    assert {linear.weight.bits for linear in state.linears().values()} == {4, 8}
