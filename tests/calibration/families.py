"""For tests only: what every family must show, on tiny models with random weights."""

from collections.abc import Callable

import minmax
import torch
from minmax import minmax_state, simulated, sqnr
from torch import Tensor, nn
from vitq.calibrate import calibrate
from vitq.convert import to_integer
from vitq.models import adapter_for
from vitq.restore import to_simulated

from vitq_kernels import _native, backend
from vitq_kernels.formats import QuantSpec

BACKENDS = ("ref",) if _native.unavailable("cpu") else ("ref", "cpu")
STATES = (
    {},
    {
        "act": QuantSpec(8, granularity="per_token", dynamic=True),
        "operands": QuantSpec(8, granularity="per_head", dynamic=True),
        "rank": 4,
        "kind": "subspace",
    },
)


def made(build: Callable[..., nn.Module], *args, **kwargs) -> nn.Module:
    """A model whose random weights make every branch matter."""
    torch.manual_seed(0)
    return minmax.spread(build(*args, **kwargs))


def assert_rewritten(model: nn.Module, x: Tensor) -> None:
    """The adapter's model computes what the library's does, and leaves that as it was."""
    before = {name: t.clone() for name, t in model.state_dict().items()}
    family = adapter_for(model)
    want, got = (family.output(m(x)) for m in (model, family.model))
    assert float((got - want).abs().max()) <= 1e-5 * float(want.abs().max())
    assert before.keys() == model.state_dict().keys()
    assert all(torch.equal(t, before[name]) for name, t in model.state_dict().items())
    assert type(adapter_for(family.model).model) is type(model), "a rewritten model has an adapter, too"


@torch.no_grad()
def assert_parity(model: nn.Module, x: Tensor) -> None:
    """Simulated = integer bit for bit on each back end, and both compute the model."""
    output = adapter_for(model).output
    for options in STATES:
        state = minmax_state(model, x, **options)
        integer, sim = to_integer(model, state), to_simulated(model, state)
        for name in BACKENDS:
            with backend(name):
                assert torch.equal(sim(x), output(integer(x))), name
        # Against float64 arithmetic that shares no code with either.
        assert sqnr(output(simulated(model, state)(x.double())), output(integer(x))) > 18
        # A wrong connection anywhere ends below 10 dB.
        assert sqnr(output(model(x)), output(integer(x))) > 18


def assert_calibrates(model: nn.Module, x: Tensor, recipe: str) -> None:
    """Calibration's simulated model is the integer one of its state."""
    done = calibrate(model, x, recipe)
    integer, output = to_integer(model, done.state), adapter_for(model).output
    with torch.no_grad():
        got = output(integer(x))
        assert torch.equal(done.sim(x), got)
        assert torch.equal(to_simulated(model, done.state)(x), got)
        if recipe != "minmax":
            assert sqnr(output(model(x)), got) > 18
