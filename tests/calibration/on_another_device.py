"""Calibration and models on the device of elsewhere.py: no tensor is on another one, and results are those of the CPU,
bit for bit (plain torch computes both). Run by test_devices.py, in a process of its own."""

import copy

import elsewhere
import families
import minmax
import pytest
import test_calibrate
import test_detectors
import test_point_models
import torch
from vitq import jobs, lowrank
from vitq.calibrate import calibrate
from vitq.convert import to_integer
from vitq.evaluate import predict
from vitq.models import adapter_for
from vitq.recipes import Recipe, load_recipe, names, parse
from vitq.restore import to_simulated

from vitq_kernels import backend

OWN = {
    "learned": test_calibrate.SMALL,
    "dynamic": test_calibrate.DYNAMIC,
    "merged": test_calibrate.MERGED,
    "refined": test_calibrate.REFINED,
    "simulated": test_calibrate.SIMULATED,
    "allocated": test_calibrate.ALLOCATED,
}
SHALLOW = {"depth": 1, "num_heads": 1}


def transformers():
    import test_transformers  # skips whoever has no such package

    return test_transformers


MODELS = {
    "swin": lambda: minmax.swin(img_size=16, depths=(1, 1)),
    "transformers": lambda: families.made(transformers().MODELS["swin"]),
    "detector": test_detectors.MODELS["vit"],
    "clouds": lambda: test_point_models.classifier(depth=1),
    "parts": test_point_models.segmenter,
}


def covering() -> dict[str, Recipe]:
    """Small recipes, and of the shipped ones the first with each method that those have not."""
    found = {name: parse(recipe) for name, recipe in OWN.items()}
    seen = set().union(*(methods(recipe) for recipe in found.values()))
    for name in names():
        recipe = load_recipe(name, fast=True)
        if methods(recipe) - seen:
            found[name] = recipe
            seen |= methods(recipe)
    return found


def methods(recipe: Recipe) -> set[tuple[str, str]]:
    return {(stage, method.name) for stage, method, _ in recipe.steps()}


RECIPES = covering()


@pytest.fixture(autouse=True, scope="module")
def registered():
    elsewhere.register()


@pytest.fixture(autouse=True)
def plain_torch():
    with backend("ref"):
        yield


def images(model, n: int = 4, seed: int = 1) -> torch.Tensor:
    if hasattr(model, "config"):
        return transformers().images(model, n)
    if hasattr(model, "vitq_data") and len(model.vitq_data["input_size"]) == 2:
        return test_point_models.clouds(model, n, seed)
    if hasattr(model, "roi_heads"):
        return torch.stack(test_detectors.pictures(n, split="train"))
    return minmax.images(model, n, seed)


def there(x: torch.Tensor) -> torch.Tensor:
    return x.to(elsewhere.NAME)


MIXTURES = {
    "sum": lambda x, y: x + y,
    "product": lambda x, y: x @ y.T,
    "assigned values": lambda x, y: x.index_put((torch.tensor([0]),), y[0]),
    "index of the device into the CPU": lambda x, y: y[x.argmax(1)],
    "numbers in a row": lambda x, y: torch.stack([x.sum(), y.sum()]),
    "data": lambda x, y: setattr(x, "data", y),
    "in place": lambda x, y: y.add_(x),
}


@pytest.mark.parametrize("name", MIXTURES)
def test_mixtures_are_refused(name):
    with elsewhere.emulated(), pytest.raises((AssertionError, RuntimeError), match=r"(?i)devices?|expected"):
        MIXTURES[name](there(torch.randn(3, 4)), torch.randn(3, 4))


def test_what_a_gpu_takes_is_taken():
    x, index = torch.randn(3, 4), torch.tensor([2, 0])
    with elsewhere.emulated():
        y, weight = there(x), torch.nn.Parameter(there(x))
        assert y.device.type == elsewhere.NAME
        assert torch.equal((y * torch.tensor(2.0)).cpu(), 2 * x)
        assert torch.equal(y[index].cpu(), x[index])
        assert torch.equal(torch.tensor([[1.0, 2.0]], device=y.device).cpu(), torch.tensor([[1.0, 2.0]]))
        y[0] = 7.0
        assert y.tolist()[0] == [7.0] * 4
        assert float(x[0, 0]) != 7.0, "what was moved is a copy"
        (weight.square().sum() / 2).backward()
        assert torch.equal(weight.grad.cpu(), x)
        assert there(x).cpu().data_ptr() != x.data_ptr()


@pytest.mark.parametrize("name", RECIPES)
def test_every_step_of_calibration(name):
    assert_same_calibration(lambda: minmax.vit(**SHALLOW), RECIPES[name])


@pytest.mark.parametrize("name", MODELS)
def test_every_family(name):
    assert_same_calibration(MODELS[name], parse(test_calibrate.MINMAX))


def assert_same_calibration(build, recipe):
    """Of states where there is an integer model; of the simulated model's outputs."""
    model = build()
    x, output = images(model), adapter_for(model).output
    want = calibrate(model, x, recipe, seed=1)
    with elsewhere.emulated():
        got = calibrate(build().to(elsewhere.NAME), there(x), recipe, seed=1)
    assert {t.device.type for t in (*got.sim.parameters(), *got.sim.buffers())} == {"cpu"}
    with torch.no_grad():
        assert torch.equal(output(want.sim(x)), output(got.sim(x)))
    if want.refusals:
        return
    assert test_calibrate.same(want.state, got.state)
    for made in (to_simulated, to_integer):
        with torch.no_grad():
            here = output(made(model, want.state)(x))
            with elsewhere.emulated():
                assert torch.equal(here, output(made(model, want.state).to(elsewhere.NAME)(there(x))).cpu())


def test_evaluation(monkeypatch):
    monkeypatch.setattr(jobs, "predict", torch.no_grad()(predict.__wrapped__))  # not for wrappers: inference mode
    model = minmax.vit()
    x = images(model, 8)
    state = minmax.minmax_state(model, x)
    data = {"test": torch.utils.data.TensorDataset(x, torch.arange(8) % 7)}

    def rows(device):
        models = (model, to_simulated(model, state), to_integer(model, state))
        floating, simulated, integer = (copy.deepcopy(m).to(device) for m in models)
        return jobs.evaluate(jobs.predict_splits(floating, data, 3), simulated, integer, data, 3)

    (here,) = rows("cpu")
    with elsewhere.emulated():
        (got,) = rows(elsewhere.NAME)
    # The float model's attention is another algorithm there.
    assert got == here | {"logit_sqnr_db": pytest.approx(here["logit_sqnr_db"], abs=1e-3)}


def test_a_planted_tensor_is_found(monkeypatch):
    damped = lowrank.damped
    monkeypatch.setattr(lowrank, "damped", lambda c, damping: damped(c, damping) + 0 * torch.eye(len(c)))
    with pytest.raises(AssertionError, match="tensors on two devices"):
        assert_same_calibration(lambda: minmax.vit(**SHALLOW), parse(test_calibrate.DYNAMIC))
