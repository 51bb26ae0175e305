"""Whole converted models on Triton kernels. Needs TRITON_INTERPRET=1: test_triton_models.py runs this file."""

import minmax
import pytest
import torch
from minmax import deciding, minmax_state, sqnr, swin, vit
from test_convert import STATES
from torch.utils._python_dispatch import TorchDispatchMode
from vitq.convert import to_integer
from vitq.restore import to_simulated

import vitq_kernels as vk
from vitq_kernels.nn import QBlock
from vitq_kernels.triton import host

MODELS = {
    "vit": lambda: vit(num_classes=20),
    "swin": lambda: swin(img_size=(12, 20), depths=(2,), num_heads=(2,)),
    "swin-exact-fit": lambda: swin(img_size=(16, 16), depths=(2,), num_heads=(2,)),
}


@pytest.fixture(autouse=True)
def _pinned():
    assert host.INTERPRETED
    with vk.backend("triton"), torch.no_grad():
        yield


def made(name: str, state: str, images: int = 2):
    model = MODELS[name]()
    x = minmax.images(model, images)
    return model, minmax_state(model, x, **STATES[state]), x


@pytest.mark.parametrize("state", STATES)
@pytest.mark.parametrize("name", MODELS)
def test_logits(name, state):
    """The simulation, on Triton's float stages, differs by codes beside a tie; ``ref`` multiplies branches in float32
    besides. How far such codes carry is what test_convert.py allows between ``ref`` and the C++ kernels."""
    model, s, x = made(name, state)
    logits = to_integer(model, s)(x)
    assert sqnr(to_simulated(model, s)(x), logits) > 25
    with vk.backend("ref"):
        assert sqnr(to_integer(model, s)(x), logits) > 18


@pytest.mark.parametrize("name", ["vit", "swin"])
def test_token_wise_bits(name):
    model, s, x = made(name, "dynamic")
    s = deciding(model, s, share=0.5, low=4)
    logits = to_integer(model, s)(x)
    assert sqnr(to_simulated(model, s)(x), logits) > 25


class Work(TorchDispatchMode):
    """Names of the operators that launch something on a GPU: all but views and uninitialized tensors."""

    def __init__(self) -> None:
        super().__init__()
        self.names: list[str] = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if not func.is_view and not func._schema.name.removeprefix("aten::").startswith(("empty", "detach")):
            self.names.append(func._schema.name)
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("state", STATES)
@pytest.mark.parametrize("name", MODELS)
def test_a_block_is_six_launches_and_nothing_else(name, state):
    model, s, x = made(name, state, 1)
    integer = to_integer(model, s)
    host.counters(1, x.device)  # made once per stream
    seen = []

    def around(block):
        forward = block.forward

        def counted(x, *args, **kwargs):
            with host.recorded(run=False) as launches, Work() as work:
                y = forward(x, *args, **kwargs)
            seen.append(([launch.kernel.__name__ for launch in launches], work.names))
            return torch.zeros_like(y)

        block.forward = counted

    for block in integer.modules():
        if isinstance(block, QBlock):
            around(block)
    integer(x)
    assert len(seen) == 2
    for kernels, others in seen:
        assert kernels[0] in ("_whole", "_chunked")
        assert kernels[1:] == ["_product", "_attention", "_product", "_product", "_product"]
        assert others == []
