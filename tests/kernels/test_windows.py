"""Windows as modules take them: index maps, and attention that reads and writes its rows through them."""

import dataclasses

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from test_nn import DYNAMIC, OPERANDS, STATIC, TABLE, attention_state, gen, linear_state, norm_of
from torch import nn

from vitq_kernels import backends
from vitq_kernels.formats import QuantSpec
from vitq_kernels.nn import QAttention, QLinear, Window, WindowMap

sizes = st.tuples(st.integers(1, 5), st.integers(1, 5))


@settings(max_examples=80, deadline=None)
@given(size=sizes, shift=sizes, grid=st.tuples(st.integers(1, 11), st.integers(1, 11)))
def test_windows_are_roll_pad_and_cut(size, shift, grid):
    shift = tuple(a % b for a, b in zip(shift, size))
    window = Window(size, shift, grid)
    x = torch.randn(2, *grid, 3, generator=gen())
    maps = WindowMap(window)
    got = maps.partition(x)
    rolled = x.roll((-shift[0], -shift[1]), (1, 2))
    pad = [-g % s for g, s in zip(grid, size)]
    padded = nn.functional.pad(rolled, (0, 0, 0, pad[1], 0, pad[0]))
    cut = padded.unfold(1, size[0], size[0]).unfold(2, size[1], size[1])  # [B, gh, gw, 3, h, w]
    assert torch.equal(got, cut.permute(0, 1, 2, 4, 5, 3).reshape(-1, window.tokens, 3))
    assert got.shape[0] == 2 * window.count
    assert torch.equal(maps.reverse(got), x)
    assert window.padded == any(pad)
    mask = window.mask()
    if not any(shift):
        assert mask is None
    else:
        assert mask.shape == (window.count, window.tokens, window.tokens)
        assert torch.equal(mask, mask.transpose(1, 2))
        assert set(mask.unique().tolist()) <= {0.0, -float("inf")}


@settings(max_examples=80, deadline=None)
@given(size=sizes, shift=sizes, grid=st.tuples(st.integers(1, 11), st.integers(1, 11)))
def test_slots_and_their_tokens(size, shift, grid):
    """One map: every token in one slot, the other slots empty, and the way there and back of the index maps."""
    window = Window(size, tuple(a % b for a, b in zip(shift, size)), grid)
    maps = WindowMap(window)
    slots = maps.token_of_slot
    assert slots.dtype == torch.int32
    assert slots[slots >= 0].sort().values.tolist() == list(range(grid[0] * grid[1]))
    assert torch.equal(maps.reverse_index[slots[slots >= 0].long()], (slots >= 0).nonzero()[:, 0])
    x = torch.randn(1, *grid, 3, generator=gen())
    padded = nn.functional.pad(x.flatten(1, 2), (0, 0, 0, 1))[:, slots.long()]
    assert torch.equal(maps.partition(x).flatten(0, 1), padded[0])


@pytest.mark.parametrize("spec", [STATIC, DYNAMIC, QuantSpec(4, granularity="per_token", dynamic=True, table=TABLE)])
@pytest.mark.parametrize("grid", [(8, 12), (7, 10)])
def test_codes_travel_like_the_floats_they_stand_for(spec, grid):
    window = Window((4, 4), (2, 1), grid)
    maps = WindowMap(window)
    layer = QLinear.from_state(linear_state(6, 16, spec, rank=3))
    x = torch.randn(2, *grid, 16, generator=gen())
    moved = maps.partition(layer.encode(x), layer.input.zero_code)
    fresh = layer.encode(maps.partition(x))
    assert torch.equal(moved.q, fresh.q)
    assert torch.equal(moved.scale, fresh.scale)
    torch.testing.assert_close(moved.t, fresh.t)
    back = maps.reverse(moved)
    assert torch.equal(back.q, layer.encode(x).q)
    assert torch.equal(back.scale, layer.encode(x).scale)


def test_windows_refuse_what_does_not_fit():
    with pytest.raises(ValueError, match=r"shift is \(4, 0\)"):
        Window((4, 4), (4, 0), (8, 8))
    with pytest.raises(ValueError, match=r"size is \(0, 4\)"):
        Window((0, 4), (0, 0), (8, 8))
    with pytest.raises(ValueError, match=r"x has shape \(1, 8, 9, 3\)"):
        WindowMap(Window((4, 4), (0, 0), (8, 8))).partition(torch.zeros(1, 8, 9, 3))


def test_attention_within_windows():
    grid, window = (6, 10), Window((4, 4), (2, 2), (6, 10))
    state = attention_state(bias=torch.randn(2, 16, 16, generator=gen(7)))
    norm = norm_of(16)
    x = torch.randn(2, *grid, 16, generator=gen(1))
    attn = QAttention.from_state(state, norm=norm, window=window)
    got = attn(x, residual=x)
    # By hand: float windows of the normalized tokens, and no norm inside.
    maps = WindowMap(window)
    inner = QAttention.from_state(state)
    want = maps.reverse(inner(maps.partition(norm(x)), mask=window.mask())) + x
    torch.testing.assert_close(got, want, rtol=1e-5, atol=1e-5)
    with pytest.raises(ValueError, match="mask is given to attention within windows"):
        attn(x, mask=torch.zeros(1, 16, 16))


@pytest.mark.parametrize("grid", [(6, 10), (8, 4), (3, 3), (13, 9)])
def test_dynamic_windows_are_those_of_each_grid(grid):
    state, norm = attention_state(bias=torch.randn(2, 16, 16, generator=gen(7))), norm_of(16)
    window = Window((4, 4), (2, 2), (6, 10), dynamic=True)
    attn = QAttention.from_state(state, norm=norm, window=window)
    want = QAttention.from_state(state, norm=norm, window=Window((4, 4), (2, 2), grid))
    x = torch.randn(2, *grid, 16, generator=gen(1))
    for _ in range(2):
        assert torch.equal(attn(x, residual=x), want(x, residual=x))
    assert len(attn.window.others) == (grid != (6, 10))
    assert attn.state_dict().keys() == want.state_dict().keys()


def test_maps_of_many_grids_are_not_kept():
    maps = WindowMap(Window((2, 2), (1, 1), (4, 4), dynamic=True))
    for side in range(1, 60):
        assert maps.at(torch.zeros(1, side, 3, 2)).window.resolution == (side, 3)
    assert len(maps.others) == 8
    assert [grid for grid, _ in maps.others] == [(side, 3) for side in range(52, 60)]
    with pytest.raises(ValueError, match=r"x has shape \(1, 4, 2\), expected \(B, \*\(4, 4\), C\)"):
        maps.at(torch.zeros(1, 4, 2))


BY_HAND = {"static": STATIC, "dynamic": DYNAMIC, "table": QuantSpec(4, table=TABLE), "none": None}


@settings(max_examples=60, deadline=None)
@given(
    size=st.tuples(st.integers(1, 4), st.integers(1, 4)),
    shift=st.tuples(st.integers(0, 3), st.integers(0, 3)),
    grid=st.tuples(st.integers(1, 9), st.integers(1, 9)),
    b=st.integers(0, 3),
    act=st.sampled_from(list(BY_HAND)),
    proj_act=st.sampled_from(list(BY_HAND)),
    kind=st.sampled_from(["error", "subspace"]),
    operands=st.sampled_from(list(OPERANDS)),
    norm=st.booleans(),
    dtype=st.sampled_from([torch.float32, torch.bfloat16]),
)
def test_windows_inside_the_kernels_are_windows_between_them(
    size, shift, grid, b, act, proj_act, kind, operands, norm, dtype
):
    """Bit for bit what codes gathered into windows and floats gathered back give."""
    window = Window(size, tuple(a % b for a, b in zip(shift, size)), grid)
    c, n = 16, window.tokens
    state = attention_state(OPERANDS[operands], torch.randn(2, n, n, generator=gen(7)))
    qkv, proj = (
        linear_state(m, c, BY_HAND[a], rank=2, kind=kind if BY_HAND[a] else "error", seed=m)
        for m, a in ((3 * c, act), (c, proj_act))
    )
    state = dataclasses.replace(state, qkv=qkv, proj=proj)
    attn = QAttention.from_state(state, norm=norm_of(c) if norm else None, window=window)
    x = torch.randn(b, *grid, c, generator=gen(1)).to(dtype)
    if b == 0:
        assert attn(x, residual=x).shape == x.shape
        return
    maps, qkv = attn.window, attn.qkv
    codes = maps.partition(qkv.encode(x), 0 if qkv.input is None else qkv.input.zero_code)
    coded = qkv.multiply(codes, out=attn.operands)
    heads = coded.q.reshape(-1, n, 3, 2, 8).permute(2, 0, 3, 1, 4)
    _, scales = attn._split(coded, 3)
    out = {"mask": maps.mask, "out_dtype": torch.float32 if attn.proj.takes else dtype}
    y = maps.reverse(attn.prepared()[0].qattention(*heads, *scales, **out))
    y = y if attn.proj.takes is None else attn.proj.takes(y)
    assert torch.equal(attn(x, residual=x), attn.proj(y, residual=x, out_dtype=dtype))


def test_windows_are_read_and_written_by_the_kernels(monkeypatch):
    """A block within windows runs the ops of one without, and no index_select."""
    attn = QAttention.from_state(attention_state(), norm=norm_of(16), window=Window((4, 4), (2, 2), (6, 10)))
    x = torch.randn(2, 6, 10, 16, generator=gen(1))
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as profile:
        attn(x, residual=x)
    seen = [event.name for event in profile.events()]
    ops = ("layer_norm_quantize", "qlinear_quantize", "qattention_quantize", "qlinear")
    if backends.status()["cpu"] is None:
        assert [name for name in seen if name.startswith("vitq::")] == [f"vitq::{op}" for op in ops]
        assert not {"aten::index_select", "aten::index", "aten::gather", "aten::copy_"} & set(seen)
