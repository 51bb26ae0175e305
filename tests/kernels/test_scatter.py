"""``scatter`` of qattention and qattention_quantize: rows leave their windows as they are written."""

from __future__ import annotations

import re

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from test_qattention import BACKENDS, FOCUSES, arguments, call, flat_args, make, native, pinned

from vitq_kernels.formats import ActQuant
from vitq_kernels.ops import qattention, qattention_quantize, quantize
from vitq_kernels.testing import poison


def make_scatter(windows, n, tokens, seed=0):
    """[windows·n] int32 that names each of ``tokens`` rows once, in any order, and drops the other slots."""
    g = torch.Generator().manual_seed(seed)
    scatter = torch.full((windows * n,), -1, dtype=torch.int32)
    scatter[torch.randperm(windows * n, generator=g)[:tokens]] = torch.arange(tokens, dtype=torch.int32)
    return scatter


def moved(rows, scatter, tokens):
    """[B, N, C] windows as [B/nW, tokens, C], row by row."""
    images = rows.reshape(-1, len(scatter), rows.shape[-1])
    out = torch.full((len(images), tokens, rows.shape[-1]), -7, dtype=rows.dtype)
    for slot, row in enumerate(scatter.tolist()):
        if row >= 0:
            out[:, row] = images[:, slot]
    return out


@settings(max_examples=30, deadline=None, derandomize=True)
@given(
    backend=st.sampled_from(BACKENDS),
    images=st.integers(0, 2),
    windows=st.integers(1, 4),
    n=st.integers(1, 60),
    kept=st.floats(0.01, 1.0),
    dtype=st.sampled_from([torch.float32, torch.bfloat16]),
    mask=st.booleans(),
    seed=st.integers(0, 99),
)
def test_scatter_moves_rows(backend, images, windows, n, kept, dtype, mask, seed):
    """Bit for bit the rows of the windows, every one in its place; one mask for each window of an image."""
    tokens = max(1, int(kept * windows * n))
    data = make(images * windows, 2, n, n, 8, "per_head", True, (windows, True) if mask and images else None, seed)
    scatter = make_scatter(windows, n, tokens, seed)
    with poison(0x7F):
        got = call(data, FOCUSES["row4"], backend, scatter=scatter, tokens=tokens, out_dtype=dtype)
    want = call(data, FOCUSES["row4"], backend, out_dtype=dtype)
    assert got.is_contiguous()
    assert torch.equal(got, moved(want, scatter, tokens))


@pytest.mark.parametrize("backend", BACKENDS)
def test_scatter_of_windows_without_keys(backend):
    scatter = make_scatter(2, 9, 15)
    data = make(b=4, nk=0)
    assert torch.equal(call(data, FOCUSES["row4"], backend, scatter=scatter, tokens=15), torch.zeros(2, 15, 16))


SCATTERED = {
    "static": {"scale": torch.tensor([0.01]), "zero_point": 5, "qmin": -128},
    "scales of each row": {"scale": torch.linspace(0.01, 0.03, 2 * 35)[:, None]},
    "dynamic": {},
    "lora": {"lora_down": torch.randn(5, 32, generator=torch.Generator().manual_seed(0)) / 8},
    "subspace": {"lora_down": torch.eye(32)[:5].contiguous(), "subspace": True, "groups": 2},
    "row_qmax": {"row_qmax": torch.arange(2 * 35, dtype=torch.int32) % 127 + 1},
}


@pytest.mark.parametrize("order", ["any", "windows"])
@pytest.mark.parametrize("out", SCATTERED)
@pytest.mark.parametrize("backend", BACKENDS)
def test_quantized_rows_are_those_of_the_images(backend, out, order):
    """Bitwise the quantizer after attention: scales, bit-widths and t belong to the rows of the result."""
    *operands, softmax_scale, bias, mask = make(b=4, h=2, nq=20, nk=20, d=16, bias=True, mask=(2, True))
    scatter = make_scatter(2, 20, 35)
    if order == "windows":  # runs of five, as rows of windows in an image
        scatter = torch.arange(40).reshape(4, 2, 5).transpose(0, 1).flatten().to(torch.int32)
        scatter[scatter >= 35] = -1
    out = ActQuant(**SCATTERED[out])
    kw = {"focus": FOCUSES["row8"], "softmax_scale": softmax_scale, "bias": bias, "mask": mask}
    kw |= {"scatter": scatter, "tokens": 35}
    with pinned(backend):
        with poison(0x7F):
            got = qattention_quantize(*operands, out=out, **kw)
        want = quantize(qattention(*operands, **kw), out)
    assert torch.equal(got.q, want.q)
    assert torch.equal(got.scale, want.scale)
    assert got.t is None if want.t is None else torch.equal(got.t, want.t)


@native
def test_native_code_checks_what_addresses_memory():
    args = list(flat_args(make(b=4), FOCUSES["row4"]))
    op = torch.ops.vitq.qattention.default
    for entry in (-2, 15):
        args[-2:] = [make_scatter(2, 9, 15).masked_fill(make_scatter(2, 9, 15) == 3, entry), 15]
        with pytest.raises(RuntimeError, match=r"scatter has entries in \[.*\], expected \[-1, 15\)"):
            op(*args, torch.float32)
    for scatter, tokens, message in (
        (torch.zeros(10).int(), 5, "scatter has 10 elements, expected Nq = 9 for each window"),
        (torch.zeros(27).int(), 5, "scatter has 27 elements"),
        (torch.zeros(18).int(), 19, "tokens is 19, expected 1 to 18"),
    ):
        args[-2:] = [scatter, tokens]
        with pytest.raises(RuntimeError, match=message):
            op(*args, torch.float32)


BUGS = {
    "another slot": lambda scatter: scatter.roll(1),
    "slots that go nowhere": lambda scatter: torch.where(scatter == 4, -1, scatter),
    "two rows in one place": lambda scatter: torch.where(scatter == 4, 5, scatter),
}


@pytest.mark.parametrize("bug", BUGS)
@pytest.mark.parametrize("backend", BACKENDS)
def test_planted_bugs_are_caught(backend, bug):
    data, scatter = make(b=4), make_scatter(2, 9, 15)
    want = moved(call(data, FOCUSES["row8"], backend), scatter, 15)
    with poison(0x7F):
        assert torch.equal(call(data, FOCUSES["row8"], backend, scatter=scatter, tokens=15), want)
        assert not torch.equal(call(data, FOCUSES["row8"], backend, scatter=BUGS[bug](scatter), tokens=15), want)


def test_opcheck():
    args = flat_args(make(b=4, bias=True, mask=(2, True)), FOCUSES["row4"], make_scatter(2, 9, 15), 15)
    torch.library.opcheck(torch.ops.vitq.qattention.default, (*args, torch.float32))
    tail = (None, 0, -127, 127, 2, None, None, torch.ones(3, 16), False)
    torch.library.opcheck(torch.ops.vitq.qattention_quantize.default, (*args, *tail))


BAD = {
    "scatter_dtype": (
        {"scatter": torch.zeros(18), "tokens": 9},
        TypeError,
        "scatter has dtype torch.float32, expected torch.int32",
    ),
    "scatter_dim": (
        {"scatter": torch.zeros(2, 9).int(), "tokens": 9},
        ValueError,
        "scatter has shape (2, 9), expected (any)",
    ),
    "scatter_device": (
        {"scatter": torch.zeros(9, device="meta").int(), "tokens": 9},
        ValueError,
        "scatter is on meta, expected cpu",
    ),
    "scatter_size": (
        {"scatter": torch.zeros(10).int(), "tokens": 9},
        ValueError,
        "scatter has shape (10), expected 9 for each of nW windows, nW a divisor of 2",
    ),
    "scatter_windows": ({"scatter": torch.zeros(27).int(), "tokens": 9}, ValueError, "nW a divisor of 2"),
    "scatter_empty": ({"scatter": torch.zeros(0).int(), "tokens": 9}, ValueError, "scatter has shape (0)"),
    "tokens": ({"scatter": torch.zeros(9).int(), "tokens": 10}, ValueError, "tokens is 10, expected 1 to scatter's 9"),
    "no_tokens": ({"scatter": torch.zeros(9).int()}, ValueError, "tokens is 0, expected 1 to scatter's 9"),
    "no_scatter": ({"tokens": 9}, ValueError, "tokens is 9, expected 0 without scatter"),
}


@pytest.mark.parametrize("case", BAD)
def test_refuses(case):
    change, error, message = BAD[case]
    with pytest.raises(error, match=re.escape(message)):
        qattention(**arguments(**change))
    with pytest.raises(error, match=re.escape(message)):
        qattention_quantize(**arguments(**change), out=ActQuant())
