"""Products whose epilogue needs whole rows: one launch, finished by the last program of a row tile, whichever it is.

Needs TRITON_INTERPRET=1, as interpreted_triton.py does. Programs run one after the other there, hence in any order that
a test asks for; that several share a tile's units is tested on their counters.
"""

import pytest
import test_nn as nn_tests
import test_qlinear as linear_tests
import torch
import triton
import triton.language as tl
from interpreted_triton import TABLE, check_fused, directions, generator
from interpreter import spoiled_launch
from triton.runtime import interpreter

import vitq_kernels as vk
from vitq_kernels import tuning
from vitq_kernels.nn import QAttention, QBlock, QMlp, prepack
from vitq_kernels.ops.qlinear import triton as qlinear_triton
from vitq_kernels.ops.quantize import triton as quantize_triton
from vitq_kernels.testing import poison
from vitq_kernels.triton import host
from vitq_kernels.triton.fixup import arrive, leave, take

NORM = (torch.randn(144, generator=generator(8)), torch.randn(144, generator=generator(9)), 1e-6)


def counters_are_zero():
    assert not any(buffer.any() for buffer in host._counters.values()), "counters are left for the next launch"


@pytest.fixture(autouse=True)
def _pinned():
    assert host.INTERPRETED
    with vk.backend("triton"):
        yield
    counters_are_zero()


@triton.jit
def _visit(counters, out, programs, units, patient):
    if arrive(counters, programs, patient != 0):
        unit = take(counters)
        while unit < units:
            tl.store(out + unit, tl.program_id(0) + 1)
            unit = take(counters)
    leave(counters, programs)


@pytest.mark.parametrize("patient", [0, 1])
@pytest.mark.parametrize(
    ("before", "grid", "finished", "after"),
    [
        ([0, 0, 0], 3, [3, 3, 3], [0, 0, 0]),  # the last one finishes everything
        ([0, 0, 0], 2, [0, 0, 0], [2, 0, 2]),  # nobody does before all are there
        ([2, 0, 1], 1, [1, 1, 1], [3, 4, 2]),  # one is still there, and may look: nothing is reset
        ([2, 2, 2], 1, [0, 0, 1], [0, 0, 0]),  # units that others took are left alone
        ([2, 3, 2], 1, [0, 0, 0], [0, 0, 0]),
    ],
)
def test_protocol(patient, before, grid, finished, after):
    counters, out = torch.tensor(before, dtype=torch.int32), torch.zeros(3, dtype=torch.int32)
    _visit[(grid,)](counters, out, 3, 3, patient)
    assert out.tolist() == finished
    assert counters.tolist() == after


M = 37  # two row tiles of 32
# N, which takes several column tiles of 64, and the epilogue.
QUANTS = {
    "dynamic, long row": (300, {}),
    "dynamic, long row, t": (300, {"lora_down": directions(7, 300)}),
    "static, t": (144, {"scale": torch.tensor([0.7]), "lora_down": directions(7, 144)}),
    "heads, t": (144, {"groups": 9, "lora_down": directions(20, 144)}),
    "subspace": (144, {"lora_down": directions(7, 144), "subspace": True}),
    "subspace, 16 bits, zero point": (
        144,
        {"scale": torch.tensor([0.7]), "zero_point": 9, "lora_down": directions(40, 144).half(), "subspace": True},
    ),
    "odd groups, row_qmax, table": (
        150,
        {"groups": 3, "row_qmax": torch.arange(M, dtype=torch.int32) + 1, "lut": TABLE},
    ),
    "row and group scales": (144, {"scale": torch.rand(M, 3, generator=generator(3)) + 0.3, "groups": 3}),
    "rank beyond the epilogue": (160, {"scale": torch.tensor([0.7]), "lora_down": directions(130, 160)}),
}


def run(name, norm, out_dtype=torch.float16, seed=5):
    """Every result of one case: (y,) codes, scales, t."""
    n, spec = QUANTS[name]
    x, weight, w_scale, kw = linear_tests.make_case(generator(seed), M, 70, n, 5, "w4", True)
    a = vk.ActQuant(**spec)
    if not norm:
        out = vk.qlinear_quantize(x, weight, w_scale, out=a, **kw)
        return out.q, out.scale, *(() if out.t is None else (out.t,))
    affine = torch.randn(n, generator=generator(1)), torch.randn(n, generator=generator(2)), 1e-6
    y, out = linear_tests.norm_quantize(x, weight, w_scale, kw, affine, a, out_dtype)
    return y, out.q, out.scale, *(() if out.t is None else (out.t,))


def two_launches(name, norm, out_dtype=torch.float16, seed=5):
    n, spec = QUANTS[name]
    x, weight, w_scale, kw = linear_tests.make_case(generator(seed), M, 70, n, 5, "w4", True)
    a = vk.ActQuant(**spec)
    y = vk.qlinear(x, weight, w_scale, out_dtype=out_dtype if norm else torch.float32, **kw)
    affine = torch.randn(n, generator=generator(1)), torch.randn(n, generator=generator(2)), 1e-6
    out = vk.layer_norm_quantize(y, *affine, a) if norm else vk.quantize(y, a)
    return *((y,) if norm else ()), out.q, out.scale, *(() if out.t is None else (out.t,))


def equal(a, b):
    return len(a) == len(b) and all(map(torch.equal, a, b))


@pytest.mark.parametrize("norm", [False, True], ids=["quantize", "norm"])
@pytest.mark.parametrize("name", QUANTS)
def test_one_launch_is_the_two_it_replaces(monkeypatch, name, norm):
    """To the bit, where rows are finished in the chunks that ``quantize`` takes; t of a tile's epilogue is summed tile
    by tile and has its own test. M ends inside a row tile and inside a unit."""
    monkeypatch.setattr(quantize_triton, "WHOLE_ROW", 16)
    warps = 4 >> QUANTS[name][1].get("subspace", False)
    monkeypatch.setattr(qlinear_triton, "WIDE_ROW", 256 // warps)
    with host.recorded() as launches:
        got = run(name, norm)
    assert len(launches) == 1
    counters_are_zero()
    want = two_launches(name, norm)
    if name in ("static, t", "heads, t") and not norm:
        got, want = got[:-1], want[:-1]
    assert equal(got, want)


def in_order(monkeypatch, order):
    """Programs of one-dimensional grids run in ``order(grid)`` from here on."""
    builder, place = interpreter.interpreter_builder, interpreter.interpreter_builder.__class__.set_grid_idx

    def set_grid_idx(x, y, z):
        place(builder, order(builder.grid_dim[0])[x], y, z)

    monkeypatch.setattr(builder, "set_grid_idx", set_grid_idx, raising=False)


ORDERS = {
    "backwards": lambda n: list(range(n))[::-1],
    "shuffled": lambda n: torch.randperm(n, generator=generator(n)).tolist(),
}


@pytest.mark.parametrize("name", ["dynamic, long row, t", "static, t", "subspace"])
def test_results_are_the_same_bits_whichever_program_is_last(monkeypatch, name):
    want = [(run(name, norm)) for norm in (False, True)]
    assert all(equal(run(name, norm), want[norm]) for norm in (False, True))
    for order in ORDERS.values():
        with monkeypatch.context() as patch:
            in_order(patch, order)
            assert all(equal(run(name, norm), want[norm]) for norm in (False, True))
            counters_are_zero()


def test_orders_are_orders(monkeypatch):
    seen, out = [], torch.zeros(3, dtype=torch.int32)
    in_order(monkeypatch, ORDERS["backwards"])
    _visit[(3,)](torch.zeros(3, dtype=torch.int32), out, 3, 3, 0)
    seen += out.tolist()
    assert seen == [1, 1, 1]  # program 0 came last


@pytest.mark.parametrize("config", [(16, 16, 32, 1, 0), (32, 16, 128, 3, 1), (64, 32, 32, 8, 0), (128, 128, 64, 2, 1)])
def test_tiles(config):
    """Row tiles of one unit and of many, one column tile, groups of row tiles that the grid does not fill."""
    with tuning.config(tuning.Config(*config, 4, 1)):
        for name in ("static, t", "subspace"):
            n, spec = QUANTS[name]
            case = linear_tests.make_case(generator(5), M, 70, n, 5, "w4", True)
            check_fused(*case, vk.ActQuant(**spec))
            affine = torch.randn(n, generator=generator(1)), None, 1e-6
            linear_tests.check_norm_quantize(*case, affine, vk.ActQuant(**spec), torch.bfloat16, "triton")
            counters_are_zero()


def test_shares_are_summed_in_the_order_of_the_tiles():
    with host.recorded() as launches:
        *_, t = run("heads, t", False)
    (launch,) = launches
    shares = dict(zip(launch.kernel.arg_names, launch.arguments, strict=True))["shares"]
    assert shares.shape == (3, M, 20)
    total = torch.zeros_like(t)
    for share in shares:
        total += share
    assert torch.equal(t, total)
    assert not torch.equal(t, shares[2] + shares[1] + shares[0])


def test_many_shares():
    """More column tiles than loads in flight."""
    a = vk.ActQuant(scale=torch.tensor([0.7]), lora_down=directions(5, 300))
    case = linear_tests.make_case(generator(5), 20, 40, 300, 0, "w8", True)
    with tuning.config(tuning.Config(32, 16, 64, 1, 0, 4, 1)):
        check_fused(*case, a)


@pytest.mark.parametrize("name", ["dynamic, long row, t", "static, t", "subspace"])
def test_nothing_is_read_before_it_is_written(name):
    outs = []
    for byte in (0x7F, 0xFE):
        with poison(byte):
            outs.append(run(name, False) + run(name, True))
    assert equal(*outs)


def test_special_values_pass_through_the_norm():
    """A row with a NaN scale spoils itself only."""
    x, weight, w_scale, kw = linear_tests.make_case(generator(), 5, 40, 144, 0, "w8", False)
    x.scale[1] = float("nan")
    y, out = linear_tests.norm_quantize(x, weight, w_scale, kw, NORM, vk.ActQuant())
    assert y[1].isnan().all()
    assert out.scale[1].isnan().all()
    assert not out.q[1].any()
    assert out.scale[[0, 2, 3, 4]].isfinite().all()
    constant = vk.QTensor(torch.zeros(5, 40, dtype=torch.int8), torch.ones(1))
    y, out = linear_tests.norm_quantize(constant, weight, w_scale, {}, (None, None, 1e-6), vk.ActQuant())
    assert not y.any()
    assert not out.q.any()
    assert (out.scale == 1.0).all()


STATES = {
    "static": {"act": nn_tests.STATIC},
    "dynamic, error": {"act": nn_tests.DYNAMIC, "rank": 5},
    "dynamic, subspace": {"act": nn_tests.DYNAMIC, "rank": 5, "kind": "subspace"},
}


def block(recipe: str, backend: str) -> QBlock:
    """80 channels (two column tiles), two heads."""

    def state(n, k, seed):
        return nn_tests.linear_state(n, k, bits=4, seed=seed, **STATES[recipe])

    def norm(seed):
        return nn_tests.norm_of(80, seed)

    with vk.backend(backend):
        attention = vk.formats.AttentionState(
            state(240, 80, 1),
            state(80, 80, 2),
            2,
            40**-0.5,
            vk.formats.QuantSpec(8, granularity="per_head"),
            torch.linspace(0.05, 0.1, 6),
            vk.formats.FocusSpec(8, power=2.0, anchor="row"),
        )
        attn = QAttention.from_state(attention, norm=norm(5), layer_scale=torch.rand(80, generator=generator(1)))
        mlp = QMlp.from_states(state(160, 80, 3), state(80, 160, 4), norm=norm(6))
    return prepack(QBlock(attn, mlp), backend)


@pytest.mark.parametrize("recipe", STATES)
def test_a_block_is_six_launches(recipe):
    """LayerNorm + quantize, QKV, attention + quantize (+ t), proj + residual + LayerNorm + quantize, fc1 + GELU +
    quantize (+ t), fc2 + residual."""
    x = torch.randn(2, 9, 80, generator=generator(3))
    with host.recorded() as launches, torch.no_grad():
        got = block(recipe, "triton")(x)
    kernels = [launch.kernel.__name__ for launch in launches]
    assert kernels[0] in ("_whole", "_chunked")
    assert kernels[1:] == ["_product", "_attention", "_product", "_product", "_product"]
    want = block(recipe, "ref")(x)
    # One code of difference at a quantizer moves an output by a scale times a weight: a few of them.
    assert (got - want).abs().max() < 0.02 * (want - x).abs().max()


def _finish_early(a):
    """Counters that say one too many, as a launch would leave them that does not reset them."""
    a["counters"].view(-1, 3)[:, 0] += 1
    a["out"].fill_(float("nan"))


def _take_one(a):
    a["counters"].view(-1, 3)[:, 1] += 1
    a["codes"].fill_(99)


BUGS = {
    "counters not reset": _finish_early,
    "β left out": lambda a: a.update(norm_bias=None),
    "norm left out": lambda a: a.update(NORM=False),
    "another eps": lambda a: a.update(eps=1e-2),
    "a unit left out": _take_one,
}


@pytest.mark.parametrize("bug", BUGS)
def test_planted_bugs_are_caught(bug, monkeypatch):
    case = linear_tests.make_case(generator(5), 37, 70, 144, 0, "w4", True, per_row=False)
    check = (NORM, vk.ActQuant(), torch.float32, "triton")
    linear_tests.check_norm_quantize(*case, *check)
    monkeypatch.setattr(host, "launch", spoiled_launch(lambda _, named: BUGS[bug](named)))
    with pytest.raises(AssertionError, match=r"\d+ of \d+ (elements|codes) off"):
        linear_tests.check_norm_quantize(*case, *check)


def test_counters_that_are_left_are_found(monkeypatch):
    monkeypatch.setattr(host, "_counters", {})
    monkeypatch.setattr(host, "launch", spoiled_launch(lambda _, a: a["counters"].view(-1, 3)[:, 2].add_(1)))
    run("static, t", False)
    with pytest.raises(AssertionError, match="counters are left"):
        counters_are_zero()
