"""Triton's attention on CPU tensors, beyond what every back end is tested for. Needs TRITON_INTERPRET=1: test_triton.py
runs this file, together with the tests of the other back ends."""

import pytest
import test_qattention as attention_tests
import torch
from attention_oracle import assert_attention
from interpreter import spoiled_launch

import vitq_kernels as vk
from vitq_kernels import tuning
from vitq_kernels.formats import ActQuant, FocusSpec, LevelTable
from vitq_kernels.ops import qattention, qattention_quantize
from vitq_kernels.ops.qattention import PreparedAttention
from vitq_kernels.ops.qattention import ref as attention_ref
from vitq_kernels.ops.qattention import triton as attention
from vitq_kernels.triton import host

FOCUSES, make, oracle_args = attention_tests.FOCUSES, attention_tests.make, attention_tests.oracle_args
ONE_TILE = tuning.Attention(block_m=16, block_n=32, num_warps=4, num_stages=1)


@pytest.fixture(autouse=True)
def _pinned():
    assert host.INTERPRETED
    with vk.backend("triton"):
        yield


def call(data, focus, **kw):
    *operands, softmax_scale, bias, mask = data
    return qattention(*operands, focus=focus, softmax_scale=softmax_scale, bias=bias, mask=mask, **kw)


@pytest.mark.parametrize("additive", [False, True], ids=["plain", "bias, mask"])
@pytest.mark.parametrize("focus", FOCUSES)
def test_every_focus_in_two_passes(monkeypatch, focus, additive):
    """Rows of three blocks of keys, the last one short, are within the bound, and as a whole row is but for Σ e."""
    data = make(b=1, h=1, nq=10, nk=70, d=16, scales="per_token", bias=additive, mask=(1, True) if additive else None)
    results = []
    for keys in (1024, 16):
        monkeypatch.setattr(attention, "WHOLE_KEYS", keys)
        with tuning.config(ONE_TILE), host.recorded() as launches:
            results.append(call(data, FOCUSES[focus]))
        named = dict(zip(launches[0].kernel.arg_names, launches[0].arguments, strict=True))
        assert named["WHOLE"] == (keys == 1024)
        assert_attention(results[-1], *oracle_args(data, FOCUSES[focus]))
    # Only Σ e depends on the blocks: where nothing divides by it, results are the same bits.
    if FOCUSES[focus].anchor == "row" and FOCUSES[focus].renormalize:
        assert torch.equal(*results)


CONFIGS = [tuning.Attention(m, n, 4, 1) for m, n in ((16, 32), (32, 64), (64, 128))]


def test_results_do_not_depend_on_the_tiles(monkeypatch):
    """Row anchors renormalized: integers but for exponentials of exact differences."""
    data = make(b=1, h=2, nq=37, nk=130, d=24, scales="per_head")
    outs = []
    for keys in (256, 64):
        monkeypatch.setattr(attention, "WHOLE_KEYS", keys)
        for config in CONFIGS:
            with tuning.config(config):
                outs.append(call(data, FOCUSES["row8_renorm"]))
    assert all(torch.equal(outs[0], other) for other in outs[1:])


@pytest.mark.parametrize("d", [1, 17, 33, 127])
def test_odd_head_dims(d):
    data = make(b=1, h=3, nq=5, nk=35, d=d, scales="per_head", bias=True, seed=d)
    assert_attention(call(data, FOCUSES["row8"]), *oracle_args(data, FOCUSES["row8"]))


def test_refusals():
    data = make(d=129)
    with host.recorded() as launches, pytest.raises(ValueError, match="head_dim is 129, the triton back end serves at"):
        call(data, FocusSpec())
    data = make()
    with pytest.raises(ValueError, match=r"softmax_scale is -1.0, the triton back end expects a number >= 0"):
        call((*data[:6], -1.0, None, None), FocusSpec())
    assert not launches


def test_views_are_read_where_they_are():
    """The q, k and v of a fused result, and a broadcast bias and mask."""
    b, n, h, d = 2, 9, 3, 16
    qkv = torch.randint(-127, 128, (b, n, 3, h, d), generator=torch.Generator().manual_seed(5)).to(torch.int8)
    rest = make(b, h, n, n, d, scales="per_head", bias=True, mask=(1, False))[3:]
    rest = (*rest[:4], rest[4].mT.contiguous().mT, rest[5])
    data = (*qkv.permute(2, 0, 3, 1, 4).unbind(0), *rest)
    with host.recorded() as launches:
        got = call(data, FOCUSES["row4"])
    named = dict(zip(launches[0].kernel.arg_names, launches[0].arguments, strict=True))
    for name, index in (("q", 0), ("k", 1), ("v", 2), ("bias", 7), ("mask", 8)):
        assert named[name].data_ptr() == data[index].data_ptr()
    assert_attention(got, *oracle_args(data, FOCUSES["row4"]))


@pytest.mark.parametrize("b2", [1.0, 0.35])
def test_square_law_levels_need_no_table(b2):
    """rne(c·(c·(grid/n²))), in the kernel's float32 operations, is the level of every code of every grid."""
    for bits in range(2, 9):
        for grid in range(1, 256):
            focus = FocusSpec(bits=bits, b2=b2, power=2.0, anchor="row", grid=grid)
            floats, constants = attention._focus(focus.n, *focus.step_offset, 0.0, b2, 2.0, True, False)
            *_, level_gain, step, offset = floats
            *_, decode, shift = constants
            code = torch.arange(focus.n + 1, dtype=torch.float32)
            # The second product is rounded to an integer at once: its exact value decides.
            fused = torch.round((code * torch.tensor(level_gain)).double() * code)
            assert torch.equal(fused.int(), focus.decode()[0])
            assert torch.equal(torch.round(code * torch.tensor(level_gain) * code), fused.float())
            assert (decode, shift, step, offset) == (attention.SQUARES, 128 * (grid > 127), *focus.step_offset)


def test_scales_of_a_fused_result_are_not_copied():
    """Per token [B, N, 3·H] as q, k and v see them; k and v of unlike strides are copied, and right all the same."""
    *operands, softmax_scale, bias, mask = make(b=2, h=3, nq=9, nk=9, d=16, scales="per_token")
    codes, scales = operands[:3], operands[3:]
    fused = torch.stack(scales, 0).permute(1, 3, 0, 2).contiguous()  # [B, N, 3, H]
    views = fused.permute(2, 0, 3, 1).unbind(0)
    kw = {"focus": FOCUSES["row8"], "softmax_scale": softmax_scale, "bias": bias, "mask": mask}
    want = qattention(*codes, *scales, **kw)
    with host.recorded() as launches:
        assert torch.equal(qattention(*codes, *views, **kw), want)
    named = dict(zip(launches[0].kernel.arg_names, launches[0].arguments, strict=True))
    for name, view in zip(("q_scale", "k_scale", "v_scale"), views):
        assert named[name].data_ptr() == view.data_ptr()
    assert torch.equal(qattention(*codes, views[0], views[1], scales[2], **kw), want)


TABLE = LevelTable((-128, -50, -20, -7, 3, 11, 60, 127)).lut()
ROWS = torch.arange(2 * 21, dtype=torch.int32)
BASIS = torch.linalg.qr(torch.randn(32, 3, generator=torch.Generator().manual_seed(4))).Q.T.contiguous()
# of [2, 21, 2·16] outputs
FUSED = {
    "static": {"scale": torch.tensor([0.01])},
    "zero point, table": {"scale": torch.tensor([0.01]), "zero_point": 5, "qmin": -128, "lut": TABLE},
    "static groups": {"scale": torch.tensor([0.01, 0.02, 0.03, 0.01]), "groups": 4},
    "row scales": {"scale": (ROWS.float().unsqueeze(1) + 9) / 3000},
    "row_qmax": {"scale": torch.tensor([0.02]), "row_qmax": ROWS % 127 + 1},
    "heads": {"groups": 2},
    "heads, row_qmax": {"groups": 2, "row_qmax": ROWS % 127 + 1},
    "dynamic": {},
    "dynamic, row_qmax, table": {"row_qmax": ROWS % 127 + 1, "lut": TABLE},
    "dynamic groups": {"groups": 4},
    "row and group scales": {"scale": (torch.arange(84).reshape(42, 2) + 9) / 3000, "groups": 2},
    "t": {"scale": torch.tensor([0.01]), "lora_down": BASIS},
    "dynamic, t": {"lora_down": BASIS.half()},
    "subspace": {"lora_down": BASIS, "subspace": True},
}


@pytest.mark.parametrize("windows", [False, True])
@pytest.mark.parametrize("name", FUSED)
def test_fused_quantization_is_one_launch(name, windows):
    *operands, softmax_scale, bias, mask = make(b=2, h=2, nq=21, nk=30, d=16, bias=True)
    kw = {"focus": FOCUSES["row8"], "softmax_scale": softmax_scale, "bias": bias, "mask": mask}
    if windows:  # two of them, of one image
        slots = torch.randperm(42, generator=torch.Generator().manual_seed(1)).to(torch.int32)
        kw |= {"scatter": slots, "tokens": 42}
    out = ActQuant(**FUSED[name])
    with host.recorded() as launches:
        got = qattention_quantize(*operands, out=out, **kw)
    assert len(launches) == 1
    named = dict(zip(launches[0].kernel.arg_names, launches[0].arguments, strict=True))
    assert (named["counters"] is None) == (not named["FINISH"])
    assert named["counters"] is None or not named["counters"].any()
    composed = vk.quantize(qattention(*operands, **kw), out)
    assert torch.equal(got.q, composed.q)
    assert torch.equal(got.scale, composed.scale)
    assert (got.t is None) == (composed.t is None)
    if got.t is not None:
        assert torch.equal(got.t, composed.t)


def flat(data, focus):
    *operands, softmax_scale, bias, mask = data
    return PreparedAttention(focus, softmax_scale, bias, None, operands[0].device).flat(*operands, mask)


def test_scatter_puts_rows_where_they_belong():
    """4 windows of 6 slots over an image of 20 tokens: 4 slots are padding, every token is written once."""
    b, nw, nq, tokens, h, d = 8, 4, 6, 20, 2, 5
    data = make(b=b, h=h, nq=nq, nk=nq, d=d, bias=True, mask=(nw, True))
    order = torch.randperm(nw * nq, generator=torch.Generator().manual_seed(1)).to(torch.int32)
    scatter = torch.where(order < tokens, order, -1)
    plain = call(data, FOCUSES["row8"]).reshape(b // nw, nw * nq, h * d)
    want = torch.zeros(b // nw, tokens, h * d)
    want[:, scatter[scatter >= 0].long()] = plain[:, scatter >= 0]
    arguments = (*flat(data, FOCUSES["row8"])[:-2], scatter, tokens)
    assert torch.equal(attention.qattention(*arguments, torch.float32), want)
    rows = torch.arange(b // nw * tokens).reshape(-1, 1) / 5000 + 0.002
    for spec in ({"scale": rows}, {"groups": h}, {}):
        out = ActQuant(**spec)
        quant = (out.scale, 0, -127, 127, out.groups, None, None, None, False)
        codes, scale, _ = attention.qattention_quantize(*arguments, *quant)
        composed = vk.quantize(want, out)
        assert torch.equal(codes, composed.q)
        if out.scale is None:
            assert torch.equal(scale, composed.scale)


def composed(data, focus):
    """The integer model in steps: exact product, ``focus_position``, rounding, exact product, one division."""
    q, k, v, q_scale, k_scale, v_scale, softmax_scale, bias, mask = data
    (b, h, nq, d), nk = q.shape, k.shape[2]
    product = (q.double() @ k.double().mT).to(torch.int32)
    args = (focus.n, focus.b1, focus.b2, focus.power, focus.anchor == "row", focus.renormalize)
    position, total = attention.focus_position(product, q_scale, k_scale, softmax_scale, *args, bias, mask)
    valid = torch.ones(b, h, nq, nk, dtype=torch.bool)
    if mask is not None:
        valid &= (mask != -torch.inf)[torch.arange(b) % mask.shape[0]].unsqueeze(1)
    levels, step, offset = focus.decode()
    level = levels[position.round().long().clamp(0, focus.n)] * valid
    value, top = attention_ref.align_values(v, attention_ref.spread(v_scale, b, h, nk))
    out = (level.double() @ value.double()).float() * step
    if offset:
        out = out + (valid.double() @ value.double()).float() * offset
    if focus.renormalize:
        denom = level.sum(-1, keepdim=True).float() * step + valid.sum(-1, keepdim=True).float() * offset
    else:
        denom = total.unsqueeze(-1) if focus.anchor == "row" else torch.ones_like(total).unsqueeze(-1)
    out = torch.where(denom == 0, 0.0, out * (top.unsqueeze(-1) / denom))
    out = torch.where(valid.any(-1, keepdim=True), out, 0.0)
    return out.transpose(1, 2).reshape(b, nq, h * d)


@pytest.mark.parametrize("focus", FOCUSES)
@pytest.mark.parametrize("keys", [256, 16], ids=["whole rows", "two passes"])
def test_attention_is_its_stages(monkeypatch, focus, keys):
    """Bit for bit: every code of P is that of the fused kernel. (step and offset round to float32 on both sides.)"""
    monkeypatch.setattr(attention, "WHOLE_KEYS", keys)
    data = make(b=2, h=1, nq=9, nk=70, d=16, scales="per_token", bias=True, mask=(2, True), seed=3)
    with tuning.config(ONE_TILE):
        assert torch.equal(call(data, FOCUSES[focus]), composed(data, FOCUSES[focus]))


def test_stages_of_odd_products():
    """No queries, no keys, strided products, scales of every kind."""
    one = torch.ones(1)
    for shape in ((1, 2, 0, 3), (1, 2, 3, 0)):
        position, total = attention.focus_position(
            torch.zeros(shape, dtype=torch.int32), one, one, 1.0, 15, 0.0, 1.0, 1.0, True, False, None, None
        )
        assert position.shape == shape
        assert total.tolist() == torch.zeros(shape[:-1]).tolist()
    g = torch.Generator().manual_seed(0)
    product = torch.randint(-9000, 9000, (2, 3, 7, 20), generator=g).to(torch.int32)
    for scale in (one, torch.rand(3, generator=g) + 0.5, torch.rand(2, 3, 7, generator=g) + 0.5):
        args = (scale, one * 1e-3, 0.7, 15, 0.02, 0.4, 2.0, False, False, None, None)
        position, total = attention.focus_position(product, *args)
        exact = attention_ref.scores(product, scale.double(), one.double() * 1e-3, 0.7, None, None)
        e, want = attention_ref.exponentials(exact)
        torch.testing.assert_close(total.double(), want.squeeze(-1), rtol=1e-5, atol=0)
        u = attention_ref.position(e / want, 0.02, 0.4, 2.0, 15)
        torch.testing.assert_close(position.double(), u, rtol=1e-4, atol=1e-3)
        strided = product.mT.contiguous().mT
        assert torch.equal(attention.focus_position(strided, *args)[0], position)


BUGS = {
    "last key": lambda a: a.update(Nk=a["Nk"] - 1),
    "half a code": lambda a: a.update(gain=a["gain"] * 0.98),
    "other mask": lambda a: a.update(G=1),
    "other head's bias": lambda a: a.update(bias_head=0),
    "levels less 128": lambda a: a.update(SHIFT=0),
    "exponent": lambda a: a.update(exponent=a["exponent"] * 1.05),
    "root forgotten": lambda a: a.update(factor=a["factor"] * 2, exponent=a["exponent"] * 2),
    "values of the first head": lambda a: a.update(v_head=0),
    "scale per token": lambda a: a.update(V_SCALES=0),
}


@pytest.mark.parametrize("bug", BUGS)
def test_planted_bugs_are_caught(bug, monkeypatch):
    data = make(b=2, h=2, nq=12, nk=40, d=16, scales="per_token", bias=True, mask=(2, True))
    focus = FOCUSES["row8"]
    assert_attention(call(data, focus), *oracle_args(data, focus))
    monkeypatch.setattr(host, "launch", spoiled_launch(lambda _, named: BUGS[bug](named)))
    got = call(data, focus)
    with pytest.raises(AssertionError, match="wrong"):
        assert_attention(got, *oracle_args(data, focus))
