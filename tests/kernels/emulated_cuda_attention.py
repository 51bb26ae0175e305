"""The C++ GPU attention beyond what every back end is tested for: run as emulated_cuda.py."""

import pytest
import selected
import test_qattention as attention_tests
import torch
from attention_oracle import assert_attention

import vitq_kernels as vk
from vitq_kernels.formats import ActQuant, FocusSpec
from vitq_kernels.ops import qattention, qattention_quantize
from vitq_kernels.ops.qattention import PreparedAttention

FOCUSES, make, oracle_args = attention_tests.FOCUSES, attention_tests.make, attention_tests.oracle_args


@pytest.fixture(autouse=True)
def cuda():
    assert selected.CUDA
    with vk.backend("cuda"):
        yield


def call(data, focus, **kw):
    *operands, softmax_scale, bias, mask = data
    return qattention(*operands, focus=focus, softmax_scale=softmax_scale, bias=bias, mask=mask, **kw)


@pytest.mark.parametrize("additive", [False, True], ids=["plain", "bias, mask"])
@pytest.mark.parametrize("nk", [70, 270], ids=["whole", "two passes"])
@pytest.mark.parametrize("focus", FOCUSES)
def test_every_focus_in_long_rows(focus, nk, additive):
    """Several chunks of a row in registers, and steps of two passes, the last ones short."""
    data = make(b=1, h=1, nq=5, nk=nk, d=16, scales="per_token", bias=additive, mask=(1, True) if additive else None)
    assert_attention(call(data, FOCUSES[focus]), *oracle_args(data, FOCUSES[focus]), vacuous=0.2)


@pytest.mark.parametrize("nk", [31, 32, 33, 64, 65, 96, 224, 225, 256, 257, 320])
@pytest.mark.parametrize("d", [32, 64, 96, 128])
def test_every_kernel_at_its_edges(d, nk):
    """Widths and numbers of keys by which a kernel is chosen, and the steps inside it."""
    data = make(b=1, h=1, nq=3, nk=nk, d=d, scales="per_head", seed=nk)
    for focus in ("row8_renorm", "dfq4"):  # without and with an offset
        assert_attention(call(data, FOCUSES[focus]), *oracle_args(data, FOCUSES[focus]), vacuous=0.2)


@pytest.mark.parametrize("nq", [1, 15, 16, 17, 64, 65, 81])
@pytest.mark.parametrize("nk", [40, 300])
def test_queries_of_a_warp_and_a_block(nq, nk):
    data = make(b=2, h=2, nq=nq, nk=nk, d=32, bias=True, seed=nq)
    assert_attention(call(data, FOCUSES["row8"]), *oracle_args(data, FOCUSES["row8"]))


@pytest.mark.parametrize("nk", [50, 300])
@pytest.mark.parametrize("d", [1, 17, 48, 72, 127])
def test_operands_that_are_not_aligned(d, nk):
    """Codes from odd addresses and of odd widths are those of aligned copies."""
    data = make(b=1, h=2, nq=5, nk=nk, d=d, scales="per_token", seed=d)
    want = call(data, FOCUSES["row8"])
    assert_attention(want, *oracle_args(data, FOCUSES["row8"]))

    def shifted(x):
        held = torch.full((x.numel() + 1,), 99, dtype=torch.int8)
        held[1:] = x.flatten()
        return held[1:].view(x.shape)

    assert torch.equal(call((*map(shifted, data[:3]), *data[3:]), FOCUSES["row8"]), want)


@pytest.mark.parametrize("seed", ["1", "2", "3"])
def test_no_order_of_threads_changes_a_bit(seed, monkeypatch):
    data = [make(b=1, h=2, nq=33, nk=nk, d=32, scales="per_token", bias=True, mask=(1, True)) for nk in (49, 100, 300)]
    want = [call(x, FOCUSES["abs_power3_floor"]) for x in data]
    monkeypatch.setenv("VITQ_EMULATION_SEED", seed)
    for x, y in zip(data, want):
        assert torch.equal(call(x, FOCUSES["abs_power3_floor"]), y)


def test_whole_rows_and_two_passes_agree():
    """Row anchors renormalized: integers but for exponentials of exact differences; keys that do not count add 0."""
    *data, _ = make(b=1, h=2, nq=20, nk=200, d=24, scales="per_head")
    q, k, v, *rest = data
    padding = torch.zeros(1, 2, 100, 24, dtype=torch.int8)
    mask = torch.cat([torch.zeros(1, 1, 200), torch.full((1, 1, 100), -torch.inf)], -1)
    whole = call((q, k, v, *rest, mask[..., :200]), FOCUSES["row8_renorm"])
    passes = call((q, torch.cat([k, padding], 2), torch.cat([v, padding + 7], 2), *rest, mask), FOCUSES["row8_renorm"])
    assert torch.equal(whole, passes)


@pytest.mark.parametrize("b2", [1.0, 0.35])
def test_square_law_levels_need_no_table(b2):
    """The levels that are computed, instead of looked up, are those of the oracle."""
    for bits, grid in ((8, 255), (8, 100), (7, 255), (5, 63), (3, 255)):
        focus = FocusSpec(bits=bits, b2=b2, power=2.0, anchor="row", grid=grid)
        data = make(b=1, h=1, nq=3, nk=200, d=16, seed=bits)
        assert_attention(call(data, focus), *oracle_args(data, focus))


def test_strided_scales_are_read_where_they_are():
    """Per token [B, N, 3·H] as q, k and v see them, and one scale for all tokens of a head of an image."""
    *operands, softmax_scale, bias, mask = make(b=2, h=3, nq=9, nk=9, d=16, scales="per_token")
    codes, scales = operands[:3], operands[3:]
    fused = torch.stack(scales, 0).permute(1, 3, 0, 2).contiguous()  # [B, N, 3, H]
    views = fused.permute(2, 0, 3, 1).unbind(0)
    kw = {"focus": FOCUSES["row8"], "softmax_scale": softmax_scale, "bias": bias, "mask": mask}
    assert torch.equal(qattention(*codes, *views, **kw), qattention(*codes, *scales, **kw))
    same = tuple(s[..., :1].expand(2, 3, 9) for s in scales)
    data = (*codes, *same, softmax_scale, bias, mask)
    assert_attention(call(data, FOCUSES["row8"]), *oracle_args(data, FOCUSES["row8"]))


ROWS = torch.arange(2 * 21, dtype=torch.int32)
QUANT = {
    "static groups": {"scale": torch.tensor([0.01, 0.02, 0.03, 0.01]), "groups": 4},
    "row scales": {"scale": (ROWS.float().unsqueeze(1) + 9) / 3000},
    "heads, row_qmax": {"groups": 2, "row_qmax": ROWS % 127 + 1},
    "dynamic, t": {"lora_down": torch.randn(3, 32, generator=torch.Generator().manual_seed(4)).half() / 8},
}


@pytest.mark.parametrize("name", QUANT)
def test_quantized_rows_of_windows(name):
    """Rows of scales and of t are those of the result, which `scatter` puts in order."""
    *operands, softmax_scale, bias, mask = make(b=2, h=2, nq=21, nk=30, d=16, bias=True)
    slots = torch.randperm(42, generator=torch.Generator().manual_seed(1)).to(torch.int32)
    kw = {"focus": FOCUSES["row8"], "softmax_scale": softmax_scale, "bias": bias, "mask": mask}
    kw |= {"scatter": slots, "tokens": 42}
    out = ActQuant(**QUANT[name])
    got, want = qattention_quantize(*operands, out=out, **kw), vk.quantize(qattention(*operands, **kw), out)
    assert torch.equal(got.q, want.q)
    assert torch.equal(got.scale, want.scale)
    assert (got.t is None) == (want.t is None)
    assert got.t is None or torch.equal(got.t, want.t)


@selected.needs_emulation
def test_refusals():
    def flat(data, focus):
        *operands, softmax_scale, bias, mask = data
        return PreparedAttention(focus, softmax_scale, bias, None, operands[0].device).flat(*operands, mask)

    with pytest.raises(RuntimeError, match="head_dim is 129, the cuda back end serves at most 128"):
        call(make(d=129), FocusSpec())
    data = make()
    with pytest.raises(RuntimeError, match="softmax_scale is -1, the cuda back end expects a number >= 0"):
        call((*data[:6], -1.0, None, None), FocusSpec())
    arguments = list(flat(data, FOCUSES["dfq4"]))
    op = torch.ops.vitq_cuda.qattention.default
    for index, value, message in (
        (1, data[1][:, :, :, :4], "k has 176 elements, expected 352"),
        (3, torch.ones(3), "q_scale has 3 elements, expected 2"),
        (7, torch.zeros(300, dtype=torch.uint8), "levels has 300 elements, expected 2 to 256"),
        (9, 0.5, "offset is 0.5, expected b1 of power 1, or 0"),
        (15, torch.zeros(2, 9, 10), "bias does not fit the scores"),
        (16, torch.zeros(3, 9, 11), "mask has 3 groups, expected a divisor of 2"),
        (17, torch.zeros(5, dtype=torch.int32), "scatter has 5 elements, expected Nq = 9"),
    ):
        wrong = [*arguments[:index], value, *arguments[index + 1 :], torch.float32]
        with pytest.raises(RuntimeError, match=message):
            op(*wrong)
