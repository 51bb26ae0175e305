"""Integer modules: exact against the ops they are made of, and close to float64 by derivation."""

import copy
import dataclasses
import itertools

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

import vitq_kernels as vk
from vitq_kernels import backends
from vitq_kernels.formats import AttentionState, FocusSpec, LevelTable, LinearState, LowRankSpec, QTensor, QuantSpec
from vitq_kernels.nn import (
    FloatBranch,
    QAttention,
    QBlock,
    QLinear,
    QMlp,
    QPatchEmbed,
    Quantizer,
    prepack,
)
from vitq_kernels.nn import linear as linear_module
from vitq_kernels.ops.qattention import PreparedAttention
from vitq_kernels.packing import LAYOUTS

TABLE = LevelTable((-120, -90, -60, -40, -30, -20, -10, -5, 0, 5, 10, 20, 35, 50, 70, 110))
STATIC = QuantSpec(8, symmetric=False)
DYNAMIC = QuantSpec(8, granularity="per_token", dynamic=True)
ACTS = {
    "static": STATIC,
    "dynamic": DYNAMIC,
    "4-bit": QuantSpec(4, symmetric=False),
    "table": QuantSpec(4, table=TABLE),
    "none": None,
}


def gen(seed=0):
    return torch.Generator().manual_seed(seed)


def linear_state(n, k, act=STATIC, bits=8, rank=0, kind="error", table=None, bias=True, seed=0) -> LinearState:
    g = gen(seed)
    spec = QuantSpec(bits, granularity="per_channel", table=table)
    codes = torch.randint(spec.qmin, spec.qmax + 1, (n, k), generator=g, dtype=torch.int8)
    if table is not None:
        codes = table.lut()[codes.long() + 128]
    down = up = None
    if rank:
        down = torch.linalg.qr(torch.randn(k, rank, generator=g)).Q.T.contiguous()
        up = torch.randn(n, rank, generator=g) * 0.1
    static = act is not None and not act.dynamic
    return LinearState(
        codes=codes,
        weight_scale=torch.rand(n, generator=g) * 0.02 + 0.01,
        weight=spec,
        bias=torch.randn(n, generator=g) if bias else None,
        act=act,
        act_scale=torch.tensor([3.5 / act.qmax]) if static else None,
        act_zero_point=3 if static and not act.symmetric else 0,
        lora=LowRankSpec(rank, kind),
        lora_down=None if down is None else down.half(),
        lora_up=None if up is None else up.half(),
    )


def norm_of(k, seed=5) -> nn.LayerNorm:
    norm = nn.LayerNorm(k, eps=1e-6).requires_grad_(False)
    norm.weight.copy_(1 + 0.2 * torch.randn(k, generator=gen(seed)))
    norm.bias.copy_(0.2 * torch.randn(k, generator=gen(seed + 1)))
    return norm


def dequantized(state: LinearState, x: torch.Tensor) -> torch.Tensor:
    """The layer in float64 on float x."""
    x = x.double()
    t = None if state.lora_down is None else x @ state.lora_down.double().T
    y = x - t @ state.lora_down.double() if state.lora.kind == "subspace" and t is not None else x
    act = state.act
    if act is not None:
        scale = state.act_scale.double() if state.act_scale is not None else y.abs().amax(-1, keepdim=True) / act.qmax
        q = (torch.round(y / scale) + state.act_zero_point).clamp(act.qmin, act.qmax)
        q = q if act.table is None else act.table.lut().double()[q.long() + 128]
        y = (q - state.act_zero_point) * scale
    y = y @ (state.codes.double() * state.weight_scale.double()[:, None]).T
    y = y if t is None else y + t @ state.lora_up.double().T
    return y if state.bias is None else y + state.bias.double()


def agree(got: torch.Tensor, want: torch.Tensor, k: int) -> None:
    """float32 rounding of K products and an epilogue; a code rounding the other way costs a row a step (1 in 200)."""
    error, top = (got.double() - want).abs().flatten(0, -2), want.abs().amax()
    bad = (error > (k + 8) * 2.0**-22 * top).any(-1)
    assert bad.sum() <= max(1, bad.numel() // 200), f"{int(bad.sum())} of {bad.numel()} rows differ"
    assert error.amax() <= 0.3 * top


def layer_norm(x: torch.Tensor, norm: nn.LayerNorm) -> torch.Tensor:
    return nn.functional.layer_norm(
        x.double(), norm.normalized_shape, norm.weight.double(), norm.bias.double(), norm.eps
    )


def equal(a, b) -> bool:
    if isinstance(a, torch.Tensor):
        return a.dtype == b.dtype and torch.equal(a, b)
    if dataclasses.is_dataclass(a):
        return type(a) is type(b) and all(equal(getattr(a, f.name), getattr(b, f.name)) for f in dataclasses.fields(a))
    return a == b


# QLinear


@settings(max_examples=60, deadline=None)
@given(
    m=st.sampled_from([1, 2, 17, 50]),
    n=st.integers(1, 40),
    k=st.integers(1, 40),
    act=st.sampled_from(list(ACTS)),
    bits=st.integers(2, 8),
    rank=st.sampled_from([0, 1, 5]),
    kind=st.sampled_from(["error", "subspace"]),
    bias=st.booleans(),
    seed=st.integers(0, 9),
)
def test_linear_is_its_float64_meaning(m, n, k, act, bits, rank, kind, bias, seed):
    rank = min(rank, k - 1)  # a subspace of all K dimensions leaves nothing but rounding to quantize
    kind = "error" if ACTS[act] is None else kind
    state = linear_state(n, k, ACTS[act], bits, rank, kind, bias=bias, seed=seed)
    layer = QLinear.from_state(state)
    x = torch.randn(2, m, k, generator=gen(seed))
    y = layer(x)
    assert y.shape == (2, m, n)
    assert y.dtype == x.dtype
    agree(y, dequantized(state, x), k + rank)
    assert equal(layer.state(), state)


@pytest.mark.parametrize("act", ACTS)
def test_linear_epilogues(act):
    state = linear_state(24, 32, ACTS[act], rank=4)
    gamma, residual = torch.rand(24, generator=gen(1)), torch.randn(3, 7, 24, generator=gen(2))
    x = torch.randn(3, 7, 32, generator=gen(3))
    layer = QLinear.from_state(state, layer_scale=gamma)
    y = layer(x, activation="gelu_erf", residual=residual)
    want = nn.functional.gelu(dequantized(state, x)) * gamma.double() + residual.double()
    agree(y, want, 40)
    follow = linear_state(5, 24, DYNAMIC, rank=3, kind="subspace")
    quant = QLinear.from_state(follow).input.quant
    coded = layer(x, activation="gelu_erf", residual=residual, out=quant)
    by_hand = vk.quantize(y, quant)
    assert isinstance(coded, QTensor)
    assert (coded.q.int() - by_hand.q.int()).abs().max() <= 1
    assert torch.equal(QLinear.from_state(follow)(coded), QLinear.from_state(follow).multiply(coded))


@pytest.mark.parametrize("act", ACTS)
def test_absorbed_norm_is_the_norm_in_front(act):
    state = linear_state(24, 32, ACTS[act], rank=4)
    norm = norm_of(32)
    x = torch.randn(3, 7, 32, generator=gen(3))
    fused = QLinear.from_state(state, norm=norm)(x)
    agree(
        fused,
        dequantized(state, nn.functional.layer_norm(x.double(), (32,), norm.weight.double(), norm.bias.double(), 1e-6)),
        40,
    )


def test_linear_takes_what_the_layer_before_quantized():
    state = linear_state(24, 32)
    layer = QLinear.from_state(state)
    x = torch.randn(5, 32, generator=gen(3))
    coded = layer.encode(x)
    assert layer.encode(coded) is coded
    assert torch.equal(layer(coded), layer(x))
    assert layer(coded).dtype == torch.float32
    assert layer(x.half()).dtype == torch.float16
    assert layer(coded, residual=torch.zeros(5, 24, dtype=torch.bfloat16)).dtype == torch.bfloat16


@pytest.mark.parametrize(("bits", "table"), [(2, None), (3, None), (4, None), (8, None), (4, TABLE)])
def test_repacking_is_lossless_and_changes_nothing(bits, table, monkeypatch):
    state = linear_state(19, 21, bits=bits, table=table)
    layer = QLinear.from_state(state, backend="ref")
    x = torch.randn(4, 21, generator=gen(1))
    want = layer(x)
    for layout in LAYOUTS:
        if layout.startswith("int4") and (bits > 4 or (table is not None and layout.endswith("_s4"))):
            continue
        monkeypatch.setattr(linear_module, "choose_layout", lambda *_, layout=layout: layout)
        prepack(layer, "ref")
        assert layer.layout == layer.packed.layout == layout
        assert torch.equal(layer(x), want)
        assert equal(layer.state(), state)
        assert layout in repr(layer)


def test_moving_to_another_kind_of_device_repacks():
    layer = QLinear.from_state(linear_state(19, 21, bits=4))
    x = torch.randn(4, 21, generator=gen(1))
    want, layout = layer(x), layer.layout
    with backends.backend("ref"):
        layer.packed_for = "elsewhere"
        layer.to("cpu")
    assert layer.layout == "int4"
    layer.packed_for = "elsewhere"
    assert layer.to("cpu").layout == layout
    assert torch.equal(layer(x), want)


@pytest.mark.parametrize("table", [None, TABLE])
def test_made_without_memory_and_filled_later(table):
    """``to_empty`` takes whatever lies in memory: no codes to look at, but the layout of the device."""
    state = linear_state(19, 21, bits=3 if table is None else 4, table=table)
    layer = QLinear.from_state(state)
    empty = copy.deepcopy(layer).to("meta")
    empty.packed_for = "elsewhere"
    empty.to_empty(device="cpu")
    assert empty.layout == layer.layout
    empty.load_state_dict(layer.state_dict())
    assert equal(empty.state(), state)


def test_compiled_for_any_batch():
    b = block()
    torch._dynamo.reset()
    compiled = torch.compile(b, fullgraph=True, backend="aot_eager", dynamic=True)
    for n in (2, 3):
        x = torch.randn(n, 9, 16, generator=gen(n))
        assert torch.equal(compiled(x), b(x))


def test_four_bits_are_packed_two_to_a_byte():
    assert QLinear.from_state(linear_state(32, 64, bits=4), backend="ref").weight.numel() == 32 * 64 // 2
    assert QLinear.from_state(linear_state(32, 64, bits=5), backend="ref").weight.numel() == 32 * 64


def test_repr_says_what_matters():
    assert "W4A8" in repr(QLinear.from_state(linear_state(8, 8, bits=4, rank=2, kind="subspace", act=DYNAMIC)))
    text = QLinear.from_state(linear_state(8, 8, bits=4, rank=2, kind="subspace", act=DYNAMIC)).extra_repr()
    assert "dynamic per_token" in text
    assert "rank=2 subspace" in text
    assert "W8A16" in QLinear.from_state(linear_state(8, 8, act=None)).extra_repr()
    assert "static per_tensor" in QLinear.from_state(linear_state(8, 8)).extra_repr()


def test_scales_survive_a_change_of_dtype():
    layer = QLinear.from_state(linear_state(24, 32, rank=4, table=TABLE, bits=4), norm=norm_of(32))
    x = torch.randn(5, 32, generator=gen(3))
    want = layer(x)
    half = copy.deepcopy(layer).half()
    assert half.weight_scale.dtype == half.input.scale.dtype == torch.float32
    assert torch.equal(half.weight_scale, layer.weight_scale), "not even rounded on the way"
    assert half.norm.weight.dtype == torch.float16
    y = half(x.half())
    assert y.dtype == torch.float16
    assert (y - want).abs().max() < 0.05 * want.abs().max()
    assert torch.equal(layer(x), want), "the original is untouched"


def test_patch_embed_is_a_convolution():
    for act, rank in itertools.product(ACTS.values(), (0, 3)):
        state = linear_state(10, 3 * 4 * 2, act, rank=rank)
        x = torch.randn(2, 3, 13, 8, generator=gen(4))
        got = QPatchEmbed.from_state(state, (4, 2))(x)
        patches = nn.functional.unfold(x, (4, 2), stride=(4, 2)).transpose(1, 2)
        want = dequantized(state, patches).transpose(1, 2).unflatten(2, (3, 4))
        assert got.shape == want.shape == (2, 10, 3, 4)
        agree(got.permute(0, 2, 3, 1), want.permute(0, 2, 3, 1), 24)
    with pytest.raises(ValueError, match=r"patch is \(5, 2\)"):
        QPatchEmbed.from_state(state, (5, 2))


# QAttention


def attention_state(operands=None, bias=None, act=STATIC, proj_act=DYNAMIC) -> AttentionState:
    c, heads, focus = 16, 2, FocusSpec(8, power=2.0, anchor="row")
    operands = operands or QuantSpec(8, granularity="per_head")
    groups = 3 if operands.granularity == "per_tensor" else 3 * heads
    scale = None if operands.dynamic else torch.linspace(0.03, 0.06, groups)
    qkv, proj = linear_state(3 * c, c, act, rank=2), linear_state(c, c, proj_act, rank=3, kind="subspace", seed=1)
    return AttentionState(qkv, proj, heads, (c // heads) ** -0.5, operands, scale, focus, bias)


OPERANDS = {
    "per_head": QuantSpec(8, granularity="per_head"),
    "per_tensor": QuantSpec(8),
    "dynamic-head": QuantSpec(8, granularity="per_head", dynamic=True),
    "dynamic-tensor": QuantSpec(8, dynamic=True),
}


def attention_by_ops(state: AttentionState, x: torch.Tensor, norm, gamma, residual, mask) -> torch.Tensor:
    """The same arithmetic with every intermediate written out, contiguous and in float between the ops."""
    b, n, c = x.shape
    h, d = state.heads, c // state.heads
    y = norm(x)
    q = vk.quantize(y, state.qkv.act_quant)
    layout = linear_module.choose_layout(backends.resolve("qlinear", "cpu").layouts, QuantSpec(8), None)
    w = vk.pack_weight(state.qkv.codes, 8, layout)
    f = vk.qlinear(q, w, state.qkv.weight_scale, state.qkv.bias, lora_up=state.qkv.lora_up)
    coded = vk.quantize(f, state.operand_quant)
    parts = [p.contiguous() for p in coded.q.reshape(b, n, 3, h, d).permute(2, 0, 3, 1, 4)]
    scale = coded.scale.reshape(-1, 3, state.groups // 3)
    if state.operands.dynamic:
        scales = [s.reshape(b, n, -1).transpose(1, 2).expand(b, h, n) for s in scale.unbind(1)]
    else:
        scales = [s[0] for s in scale.unbind(1)]
    o = vk.qattention(*parts, *scales, focus=state.focus, softmax_scale=state.softmax_scale, bias=state.bias, mask=mask)
    p = vk.quantize(o, state.proj.act_quant) if state.proj.act is not None else o
    proj = QLinear.from_state(state.proj)(p)
    return proj * gamma + residual


@pytest.mark.parametrize("operands", OPERANDS)
@pytest.mark.parametrize("proj_act", ["dynamic", "static", "none"])
def test_attention_is_its_ops(operands, proj_act):
    h, n = 2, 9
    state = attention_state(
        operands=OPERANDS[operands], bias=torch.randn(h, n, n, generator=gen(7)), proj_act=ACTS[proj_act]
    )
    if ACTS[proj_act] is None:
        state = dataclasses.replace(state, proj=linear_state(16, 16, None, rank=3, seed=1))
    norm, gamma = norm_of(16), torch.rand(16, generator=gen(8))
    x, mask = torch.randn(4, n, 16, generator=gen(9)), torch.randn(2, n, n, generator=gen(10))
    attn = QAttention.from_state(state, norm=norm, layer_scale=gamma)
    got = attn(x, residual=x, mask=mask)
    want = attention_by_ops(state, x, norm, gamma, x, mask)
    torch.testing.assert_close(got, want, rtol=1e-5, atol=1e-5)
    assert equal(attn.state(), state)
    assert attn(x).shape == x.shape


def test_attention_takes_views_not_copies(monkeypatch):
    state = attention_state()
    attn = QAttention.from_state(state)
    seen = {}
    original = PreparedAttention.qattention_quantize

    def spy(self, q, k, v, *args, **kwargs):
        seen.update(q=q, k=k, v=v)
        return original(self, q, k, v, *args, **kwargs)

    monkeypatch.setattr(PreparedAttention, "qattention_quantize", spy)
    attn(torch.randn(2, 5, 16))
    assert seen["q"].untyped_storage().data_ptr() == seen["v"].untyped_storage().data_ptr()
    assert seen["k"].storage_offset() == 16


# QMlp, QBlock


@pytest.mark.parametrize("activation", ["gelu_erf", "gelu_tanh", nn.SiLU()])
@pytest.mark.parametrize("acts", [("static", "dynamic"), ("none", "table"), ("dynamic", "none")])
def test_mlp(activation, acts):
    fc1, fc2 = linear_state(24, 16, ACTS[acts[0]], rank=2), linear_state(16, 24, ACTS[acts[1]], rank=2, seed=1)
    norm, inner, gamma = norm_of(16), norm_of(24), torch.rand(16, generator=gen(8))
    x = torch.randn(3, 5, 16, generator=gen(9))
    for inner_norm in (None, inner):
        mlp = QMlp.from_states(fc1, fc2, activation, norm=norm, inner_norm=inner_norm, layer_scale=gamma)
        hidden = dequantized(
            fc1, nn.functional.layer_norm(x.double(), (16,), norm.weight.double(), norm.bias.double(), 1e-6)
        )
        if isinstance(activation, str):
            hidden = nn.functional.gelu(hidden, approximate="tanh" if activation == "gelu_tanh" else "none")
        else:
            hidden = activation(hidden)
        if inner_norm is not None:
            hidden = layer_norm(hidden, inner)
        agree(mlp(x, residual=x), dequantized(fc2, hidden) * gamma.double() + x.double(), 200)
    with pytest.raises(ValueError, match="fc2 has 24 in features, expected fc1's 16"):
        QMlp.from_states(linear_state(16, 24), fc2)


def block() -> QBlock:
    attn = QAttention.from_state(attention_state(), norm=norm_of(16), layer_scale=torch.rand(16, generator=gen(1)))
    mlp = QMlp.from_states(linear_state(24, 16), linear_state(16, 24, DYNAMIC), norm=norm_of(16))
    return QBlock(attn, mlp)


def test_block_sums_its_branches():
    b, x = block(), torch.randn(2, 9, 16, generator=gen(1))
    y = x + b.attn(x)
    torch.testing.assert_close(b(x), y + b.mlp(y), rtol=1e-5, atol=1e-5)
    branch = FloatBranch(norm_of(16), nn.Linear(16, 16), torch.full((16,), 0.5)).requires_grad_(False)
    y = b.attn(x, residual=x)
    torch.testing.assert_close(QBlock(b.attn, branch)(x), y + 0.5 * branch.module(branch.norm(y)))


def mixed_block(fc1: LinearState, norm: nn.LayerNorm | None, activation="gelu_erf") -> QBlock:
    attn = QAttention.from_state(attention_state(), norm=norm_of(16))
    return QBlock(attn, QMlp.from_states(fc1, linear_state(16, 24, DYNAMIC), activation, norm=norm))


MIXED = {
    "fused": (lambda: block(), 1),
    "subspace": (lambda: mixed_block(linear_state(24, 16, DYNAMIC, rank=3, kind="subspace"), norm_of(16)), 1),
    "norm without affine": (lambda: mixed_block(linear_state(24, 16), nn.LayerNorm(16, elementwise_affine=False)), 1),
    "float activation": (lambda: mixed_block(linear_state(24, 16), norm_of(16), nn.ReLU()), 1),
    "weight-only": (lambda: mixed_block(linear_state(24, 16, None), norm_of(16)), 0),
    "no norm": (lambda: mixed_block(linear_state(24, 16), None), 0),
}


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
@pytest.mark.parametrize("name", MIXED)
def test_block_is_bit_for_bit_its_two_branches(name, dtype, monkeypatch):
    """Whether or not the norm of the MLP goes into the projection before it."""
    make, fused = MIXED[name]
    b, x = make().to(dtype), torch.randn(2, 9, 16, generator=gen(1)).to(dtype)
    y = b.attn(x, residual=x)
    want = b.mlp(y, residual=y)
    seen = []
    original = backends.resolve
    monkeypatch.setattr(backends, "resolve", lambda op, *rest: seen.append(op) or original(op, *rest))
    got = b(x)
    assert seen.count("qlinear_norm_quantize") == fused
    assert got.dtype == dtype
    assert torch.equal(got, want)


def test_branches_pinned_to_different_back_ends_are_not_fused():
    b, x = block(), torch.randn(2, 9, 16, generator=gen(1))
    prepack(b.mlp, "ref")
    y = b.attn(x, residual=x)
    assert torch.equal(b(x), b.mlp(y, residual=y))


def test_nothing_else_goes_between_a_layer_and_the_norm_behind_it():
    b, x = block(), torch.randn(2, 9, 16, generator=gen(1))
    for kw in ({"activation": "gelu_erf"}, {"out": vk.ActQuant()}):
        with pytest.raises(ValueError, match="then is given with activation"):
            b.attn.proj(x, then=b.mlp.fc1, **kw)


def test_mlp_takes_what_its_first_layer_would_make():
    mlp, x = block().mlp, torch.randn(2, 9, 16, generator=gen(1))
    taken = mlp.fc1.encode(x)
    assert torch.equal(mlp(taken, residual=x), mlp(x, residual=x))
    assert torch.equal(mlp(taken), mlp(x))
    assert mlp(taken, residual=x.bfloat16()).dtype == torch.bfloat16


@pytest.mark.slow
def test_block_with_inductor():
    b, x = block(), torch.randn(2, 9, 16, generator=gen(1))
    torch._dynamo.reset()
    compiled = torch.compile(b.mlp, fullgraph=True)
    torch.testing.assert_close(compiled(x, residual=x), b.mlp(x, residual=x), rtol=1e-4, atol=1e-4)


# Back ends


def test_modules_are_pinned_to_their_back_end(monkeypatch):
    b, x = block(), torch.randn(2, 9, 16, generator=gen(1))
    seen = []
    original = backends.resolve

    def spy(op, *args, **kwargs):
        implementation = original(op, *args, **kwargs)
        seen.append((op, implementation.name))
        return implementation

    monkeypatch.setattr(backends, "resolve", spy)
    monkeypatch.setattr(backends, "_ENVIRONMENT", None)
    b(x)
    assert {name for _, name in seen} == {"cpu" if backends.status()["cpu"] is None else "ref"}
    assert [op for op, _ in seen] == [
        "layer_norm_quantize",
        "qlinear_quantize",
        "qattention_quantize",
        "qlinear_norm_quantize",
        "qlinear_quantize",
        "qlinear",
    ], "a block is six launches"
    prepack(b, "ref")
    seen.clear()
    b(x)
    assert {name for _, name in seen} == {"ref"}
    prepack(b)
    seen.clear()
    with backends.backend("ref"):
        b(x)
    assert {name for _, name in seen} == {"ref"}


def test_a_back_end_that_cannot_serve_is_refused_when_packing():
    with pytest.raises(ValueError, match="no back end serves qlinear on cpu: triton"):
        QLinear.from_state(linear_state(8, 8), backend="triton")
    with pytest.raises(ValueError, match="backend is 'fpga'"):
        prepack(block(), "fpga")


def test_quantizer_module():
    spec = QuantSpec(4, table=TABLE)
    state = linear_state(8, 16, spec, rank=2)
    quantizer = Quantizer(state.act_quant)
    x = torch.randn(3, 16, generator=gen(1))
    assert torch.equal(quantizer(x).q, vk.quantize(x, state.act_quant).q)
    assert set(quantizer(x).q.unique().tolist()) <= set(TABLE.levels)
    assert quantizer.zero_code == 0
    with pytest.raises(ValueError, match="row_qmax is given"):
        Quantizer(dataclasses.replace(state.act_quant, row_qmax=torch.ones(3, dtype=torch.int32)))
