"""Integer attention: ``ref`` against hand-computed cases and scalar loops, every back end against a derived bound."""

from __future__ import annotations

import contextlib
import math
import re

import pytest
import torch
from attention_oracle import assert_attention, naive
from hypothesis import given, settings
from hypothesis import strategies as st
from selected import CUDA, GPU, TRITON

from vitq_kernels import _native, backends
from vitq_kernels.formats import ActQuant, FocusSpec
from vitq_kernels.ops import qattention, qattention_quantize, quantize
from vitq_kernels.ops.qattention import PreparedAttention, ref
from vitq_kernels.testing import poison
from vitq_kernels.triton import host

native = pytest.mark.skipif(_native.unavailable("cpu") is not None, reason=str(_native.unavailable("cpu")))
ISAS = [] if _native.extension() is None else _native.extension().available_isas()
if GPU:
    KERNELS = BACKENDS = ["triton" if TRITON else "cuda"]
else:
    # The C++ kernel once per instruction set; one skipped entry where it is not built.
    KERNELS = ISAS or [pytest.param("cpu", marks=native)]
    BACKENDS = ["ref", *KERNELS]

FOCUSES = {
    "dfq8": FocusSpec(),
    "dfq4": FocusSpec(bits=4, b1=0.01, b2=0.15),
    "dfq4_renorm": FocusSpec(bits=4, b1=0.01, b2=0.15, renormalize=True),
    "dfq3_zero": FocusSpec(bits=3, b1=0.02, b2=0.3, below="zero"),
    "dfq3_zero_renorm": FocusSpec(bits=3, b1=0.02, b2=0.3, below="zero", renormalize=True),
    "dfq2": FocusSpec(bits=2, b2=0.1),
    "abs_power2": FocusSpec(bits=4, b2=0.5, power=2.0, renormalize=True),
    "abs_power3_floor": FocusSpec(bits=6, b1=0.03, b2=0.7, power=3.0),
    "abs_power2.5_zero": FocusSpec(bits=5, b1=0.02, b2=0.6, power=2.5, below="zero", renormalize=True),
    "row2": FocusSpec(bits=2, power=2.0, anchor="row"),
    "row3_renorm": FocusSpec(bits=3, power=1.5, anchor="row", renormalize=True),
    "row4": FocusSpec(bits=4, power=2.0, anchor="row", renormalize=True),
    "row7": FocusSpec(bits=7, b2=0.8, power=3.0, anchor="row"),
    "row8": FocusSpec(bits=8, power=2.0, anchor="row"),
    "row8_renorm": FocusSpec(bits=8, power=2.0, anchor="row", renormalize=True),
    "row8_affine": FocusSpec(anchor="row", renormalize=True),
    "row_floor": FocusSpec(bits=5, b1=0.1, b2=0.9, anchor="row"),
    "row_floor_renorm": FocusSpec(bits=5, b1=0.1, b2=0.9, anchor="row", renormalize=True),
    "row_power_floor": FocusSpec(bits=4, b1=0.05, power=2.0, anchor="row"),
    "row_power_zero": FocusSpec(bits=6, b1=0.05, power=1.5, anchor="row", below="zero", renormalize=True),
    "grid63": FocusSpec(bits=6, power=2.0, anchor="row", grid=63),
}
# A few per cent of the work where a program takes a tenth of a second, and every form seconds to compile.
SOME = list(FOCUSES)[::5] if GPU else list(FOCUSES)
MOST_QUERIES = 10 if host.INTERPRETED else 70 if CUDA else 200
LENGTHS = (0, 1, 16, 17, 49, 50, 65, 197, 198, 257, 577, 1025)
HEAD_DIMS = (8, 17, 32, 64, 80, 128)
focuses = st.builds(
    FocusSpec,
    bits=st.integers(2, 8),
    b1=st.sampled_from([0.0, 0.01, 0.1]),
    b2=st.sampled_from([0.15, 0.5, 1.0]),
    power=st.sampled_from([1.0, 1.5, 2.0, 3.0]),
    anchor=st.sampled_from(["absolute", "row"]),
    below=st.sampled_from(["floor", "zero"]),
    renormalize=st.booleans(),
    grid=st.sampled_from([255, 255, 100]),
)


def make(b=2, h=2, nq=9, nk=11, d=8, scales="per_tensor", bias=False, mask=None, seed=0, extreme=False):
    """(q, k, v, q_scale, k_scale, v_scale, softmax_scale, bias, mask), scores of a few units."""
    g = torch.Generator().manual_seed(seed)

    def codes(n):
        if extreme:
            return (torch.randint(0, 2, (b, h, n, d), generator=g) * 255 - 128).to(torch.int8)
        return torch.randint(-127, 128, (b, h, n, d), generator=g).to(torch.int8)

    def scale(n, size):
        shape = {"per_tensor": (1,), "scalar": (), "per_head": (h,), "per_token": (b, h, n)}[scales]
        return (0.5 + torch.rand(shape, generator=g)) * size

    size = 1.5 / 73.0
    q, k, v = codes(nq), codes(nk), codes(nk)
    operands = q, k, v, scale(nq, size), scale(nk, size), scale(nk, 0.02)
    bias = torch.randn(h, nq, nk, generator=g) if bias else None
    if mask is not None:
        groups, rows = mask
        keep = torch.rand(groups, nq if rows else 1, nk, generator=g) < 0.7
        mask = torch.where(keep, torch.randn(keep.shape, generator=g), -math.inf)
        if rows and nq > 1:
            mask[:, 1] = -math.inf
    return (*operands, d**-0.5, bias, mask)


def oracle_args(data, focus):
    return (*data[:6], focus, *data[6:])


@contextlib.contextmanager
def pinned(name):
    """``ref``, ``triton``, ``cuda``, ``cpu`` (the best instruction set) or the C++ kernel of one instruction set."""
    extension = _native.extension()
    with backends.backend(name if name in ("ref", "triton", "cuda") else "cpu"):
        if name in ISAS:
            extension.set_cpu_isa(name)
        try:
            yield
        finally:
            if extension is not None:
                extension.set_cpu_isa("auto")


def call(data, focus, backend="cpu", **kw):
    *operands, softmax_scale, bias, mask = data
    with pinned(backend):
        return qattention(*operands, focus=focus, softmax_scale=softmax_scale, bias=bias, mask=mask, **kw)


def ref64(data, focus):
    """``ref`` in float64: the scales decide the dtype."""
    q, k, v, *scales, softmax_scale, bias, mask = data
    levels, step, offset = focus.decode()
    flat = (levels, step, offset, focus.b1, focus.b2, focus.power, focus.anchor == "row", focus.renormalize)
    scales = [s.double() for s in scales]
    return ref.qattention(q, k, v, *scales, softmax_scale, *flat, bias, mask, torch.float32)


# --- the reference itself --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("backend", BACKENDS)
def test_by_hand_uniform(backend):
    """Equal scores over 4 keys, p = 1/4: round(0.25·255) = 64, o = 64/255·(1 + 2 + 3 + 4)·0.5."""
    one = torch.ones(1)
    k = torch.zeros(1, 1, 4, 1, dtype=torch.int8)
    v = torch.tensor([1, 2, 3, 4], dtype=torch.int8).reshape(1, 1, 4, 1)
    o = call((k[:, :, :1], k, v, one, one, 0.5 * one, 1.0, None, None), FocusSpec(), backend)
    assert o.tolist() == [[[pytest.approx(64 / 255 * 5, rel=1e-6)]]]


@pytest.mark.parametrize("backend", BACKENDS)
def test_by_hand_row_anchor_power(backend):
    """u = (1, 1/4, 1/16), √u·3 = (3, 1.5, 0.75) → codes 3, 2 (tie to even), 1 → levels 255, 113, 28."""
    q = torch.ones(1, 1, 1, 1, dtype=torch.int8)
    k = torch.tensor([0, -2, -4], dtype=torch.int8).reshape(1, 1, 3, 1)
    v = torch.tensor([10, 20, -30], dtype=torch.int8).reshape(1, 1, 3, 1)
    # The exponent is a hair above −2 ln 2, so that the tie of 1.5 is not one in any arithmetic.
    scale = torch.tensor([math.log(2) * 0.999])
    one = torch.ones(1)
    focus = FocusSpec(bits=2, power=2.0, anchor="row", renormalize=True)
    want = (255 * 10 + 113 * 20 - 28 * 30) / (255 + 113 + 28)
    o = call((q, k, v, scale, one, one, 1.0, None, None), focus, backend)
    assert float(o) == pytest.approx(want, rel=1e-6)


@pytest.mark.parametrize("backend", BACKENDS)
def test_by_hand_offset_excludes_masked_keys(backend):
    """Floor decode: two valid keys of p = 1/2 in [0.25, 0.75] → (0.5, 0.5); the masked key adds no offset."""
    zero = torch.zeros(1, 1, 3, 1, dtype=torch.int8)
    v = torch.tensor([10, 20, 100], dtype=torch.int8).reshape(1, 1, 3, 1)
    mask = torch.tensor([0.0, 0.0, -math.inf]).reshape(1, 1, 3)
    one = torch.ones(1)
    focus = FocusSpec(bits=2, b1=0.2, b2=0.8)  # levels 0.2, 0.4, 0.6, 0.8; p = 0.5 is a tie, to code 2
    o = call((zero[:, :, :1], zero, v, one, one, one, 1.0, None, mask), FocusSpec(bits=2, b1=0.2, b2=0.5), backend)
    assert float(o) == pytest.approx(0.5 * 30, rel=1e-6)
    renormalized = FocusSpec(bits=2, b1=focus.b1, b2=0.5, renormalize=True)
    o = call((zero[:, :, :1], zero, v, one, one, one, 1.0, None, mask), renormalized, backend)
    assert float(o) == pytest.approx(15, rel=1e-6)


VARIANTS = [
    {},
    {"scales": "per_head", "bias": True},
    {"scales": "per_token", "mask": (1, False)},
    {"scales": "scalar", "bias": True, "mask": (2, True), "nq": 3},
]
FORMS = [(f, v) for i, f in enumerate(FOCUSES) for v in range(len(VARIANTS)) if not GPU or v == i % 4]


@pytest.mark.parametrize("variant", range(len(VARIANTS)))
@pytest.mark.parametrize("focus", FOCUSES)
def test_float64_ref_is_exact(focus, variant):
    data = make(d=3, nk=7, seed=variant, **VARIANTS[variant])
    want = naive(*oracle_args(data, FOCUSES[focus]))
    got = ref64(data, FOCUSES[focus])
    torch.testing.assert_close(got, want, rtol=1e-11, atol=1e-12)
    assert_attention(got, *oracle_args(data, FOCUSES[focus]), unit=2.0**-53)


# --- every back end against the bound --------------------------------------------------------------------------------


@pytest.mark.parametrize(("focus", "variant"), FORMS)
@pytest.mark.parametrize("backend", BACKENDS)
def test_focus_forms(backend, focus, variant):
    data = make(nk=50, d=16, seed=variant, **(VARIANTS[variant] | {"nq": 37}))
    assert_attention(call(data, FOCUSES[focus], backend), *oracle_args(data, FOCUSES[focus]))


@pytest.mark.parametrize("n", LENGTHS)
@pytest.mark.parametrize("focus", ["dfq4", "row8_renorm"])
@pytest.mark.parametrize("backend", BACKENDS)
def test_lengths(backend, focus, n):
    data = make(b=1, h=2, nq=min(n, MOST_QUERIES) + 3, nk=n, d=32, scales="per_token", seed=n)
    assert_attention(call(data, FOCUSES[focus], backend), *oracle_args(data, FOCUSES[focus]))


@pytest.mark.parametrize("d", HEAD_DIMS)
@pytest.mark.parametrize("backend", BACKENDS)
def test_head_dims(backend, d):
    data = make(b=1, h=3, nq=50, nk=49, d=d, scales="per_head", bias=True, seed=d)
    for focus in ("dfq8", "row4"):
        assert_attention(call(data, FOCUSES[focus], backend), *oracle_args(data, FOCUSES[focus]))


@pytest.mark.parametrize("backend", KERNELS)
@settings(max_examples=20 if GPU else 50, deadline=None)
@given(
    focuses,
    st.tuples(st.sampled_from([1, 2, 4]), st.integers(1, 3), st.integers(0, 40), st.integers(0, 70)),
    st.integers(1, 70),
    st.sampled_from(["per_tensor", "per_head", "per_token"]),
    st.booleans(),
    st.sampled_from([None, (1, False), (1, True), (2, True)]),
    st.integers(0, 99),
)
def test_any_shape_and_focus(backend, focus, size, d, scales, bias, mask, seed):
    b, h, nq, nk = size
    mask = None if mask and b % mask[0] else mask
    data = make(b, h, nq, nk, d, scales, bias, mask, seed)
    # A row of a few keys may sit on a tie altogether; such elements are no evidence of a vacuous bound.
    assert_attention(call(data, focus, backend), *oracle_args(data, focus), vacuous=1.0)


@pytest.mark.parametrize("focus", ["dfq8", "row8", "row4", "row_floor"])
@pytest.mark.parametrize("backend", BACKENDS)
def test_all_extreme_codes_do_not_saturate(backend, focus):
    """q, k, v ∈ {−128, 127}, and rows of equal probabilities at the top level: every product at its largest."""
    data = make(nq=7, nk=197, d=64, extreme=True)
    q, k, v, *rest = data
    tiny = torch.full((1,), 1e-6)
    data = (q, k, v, tiny, tiny, *rest[2:])
    assert_attention(call(data, FOCUSES[focus], backend), *oracle_args(data, FOCUSES[focus]))
    same = torch.full_like(v, -128)
    data = (q, k, same, tiny, tiny, *rest[2:])
    assert_attention(call(data, FOCUSES[focus], backend), *oracle_args(data, FOCUSES[focus]))


@pytest.mark.parametrize("backend", BACKENDS)
def test_hard_attention_is_the_mean_over_the_best_keys(backend):
    """Scores of 1e8: their rounding errors are units, so the maximum must be exact where it is subtracted."""
    data = make(nq=20, nk=60, d=32)
    q, k, v, *_ = data
    one, focus = torch.ones(1), FocusSpec(anchor="row")
    got = call((q, k, v, 1000 * one, one, one, 1.0, None, None), focus, backend)
    product = q.double() @ k.double().mT
    best = (product == product.amax(-1, keepdim=True)).double()
    want = (best @ v.double()) / best.sum(-1, keepdim=True)
    torch.testing.assert_close(got.double(), want.transpose(1, 2).reshape(2, 20, -1), rtol=1e-6, atol=0)


@pytest.mark.parametrize("backend", BACKENDS)
def test_sharp_and_flat_rows(backend):
    """Scores of ±1e3 units (every other probability underflows) and identical scores."""
    data = make(nq=20, nk=60, d=32)
    for factor in (0.0, 1e-9, 300.0):
        scaled = (*data[:3], data[3] * factor, *data[4:])
        for focus in ("dfq8", "dfq4_renorm", "row8_renorm", "row_power_zero"):
            assert_attention(call(scaled, FOCUSES[focus], backend), *oracle_args(scaled, FOCUSES[focus]), vacuous=1.0)


@pytest.mark.parametrize("backend", BACKENDS)
def test_views_of_a_fused_qkv_result(backend):
    b, n, h, d = 2, 50, 3, 16
    qkv = torch.randint(-127, 128, (b, n, 3, h, d), generator=torch.Generator().manual_seed(5)).to(torch.int8)
    q, k, v = qkv.permute(2, 0, 3, 1, 4).unbind(0)
    rest = make(b, h, n, n, d, scales="per_head")[3:]
    got = call((q, k, v, *rest), FOCUSES["row4"], backend)
    copied = call((q.contiguous(), k.contiguous(), v.contiguous(), *rest), FOCUSES["row4"], backend)
    assert torch.equal(got, copied)
    across = (x.mT.contiguous().mT for x in (q, k, v))  # last dimension strided
    assert torch.equal(got, call((*across, *rest), FOCUSES["row4"], backend))
    shared = k[:1].expand(b, h, n, d)  # stride 0
    assert torch.equal(
        call((q, shared, v, *rest), FOCUSES["row4"], backend),
        call((q, shared.contiguous(), v, *rest), FOCUSES["row4"], backend),
    )


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("backend", BACKENDS)
def test_dtypes_of_bias_mask_and_output(backend, dtype):
    data = make(bias=True, mask=(1, True), nq=20, nk=33)
    data = (*data[:7], data[7].to(dtype), data[8].to(dtype))
    got = call(data, FOCUSES["row8"], backend, out_dtype=dtype)
    assert got.dtype == dtype
    out_unit = torch.finfo(dtype).eps / 2
    assert_attention(got, *oracle_args(data, FOCUSES["row8"]), out_unit=out_unit)


@pytest.mark.parametrize("backend", BACKENDS)
def test_mask_groups_serve_images_modulo(backend):
    """Swin: image b uses mask[b mod G]; strided bias and mask views are read as they are."""
    data = make(b=6, h=2, nq=17, nk=17, bias=True, mask=(3, True))
    bias = data[7].mT.contiguous().mT
    mask = data[8].expand(3, 17, 17)
    got = call((*data[:7], bias, mask), FOCUSES["row8"], backend)
    assert_attention(got, *oracle_args(data, FOCUSES["row8"]))
    for b in range(6):
        alone = (*(x[b : b + 1] for x in data[:3]), *data[3:7], bias, mask[b % 3 : b % 3 + 1])
        assert torch.equal(call(alone, FOCUSES["row8"], backend), got[b : b + 1])


@pytest.mark.parametrize("focus", SOME)
@pytest.mark.parametrize("backend", BACKENDS)
def test_rows_without_keys_are_zero(backend, focus):
    data = make(nq=8, nk=20)
    mask = torch.zeros(1, 8, 20)
    mask[:, 3] = mask[:, 5] = -math.inf
    got = call((*data[:8], mask), FOCUSES[focus], backend)
    assert torch.equal(got[:, [3, 5]], torch.zeros_like(got[:, [3, 5]]))
    assert (got[:, [0, 7]] != 0).any()


@pytest.mark.parametrize("backend", BACKENDS)
def test_keys_excluded_by_the_mask_do_not_count_at_all(backend):
    """Padding keys changes nothing, whatever they hold, even for offset decodes."""
    data = make(nq=9, nk=40, d=16)
    q, k, v, qs, ks, vs, scale, *_ = data
    mask = torch.zeros(1, 1, 40)
    mask[..., 25:] = -math.inf
    for focus in map(FOCUSES.get, SOME):
        short = call((q, k[:, :, :25], v[:, :, :25], qs, ks, vs, scale, None, None), focus, backend)
        padded = call((q, k, v, qs, ks, vs, scale, None, mask), focus, backend)
        torch.testing.assert_close(padded, short, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("focus", SOME)
@pytest.mark.parametrize("backend", BACKENDS)
def test_nan_and_inf_make_nan_rows(backend, focus):
    data = make(nq=20, nk=33, scales="per_token", bias=True)
    q_scale = data[3].clone()
    q_scale[1, 0, 4] = math.nan
    bias = data[7].clone()
    bias[1, 9, 32] = math.inf
    got = call((*data[:3], q_scale, *data[4:7], bias, None), FOCUSES[focus], backend).unflatten(-1, (2, -1))
    clean = call(data, FOCUSES[focus], backend).unflatten(-1, (2, -1))
    bad = torch.zeros(2, 20, 2, dtype=torch.bool)
    bad[1, 4, 0] = True
    bad[:, 9, 1] = True
    assert got[bad].isnan().all()
    assert torch.equal(got[~bad], clean[~bad])


@pytest.mark.parametrize("backend", BACKENDS)
def test_nan_scales_of_keys_and_values(backend):
    data = make(nq=5, nk=33, scales="per_token")
    for operand in (4, 5):
        scale = data[operand].clone()
        scale[0, 1, 20] = math.nan
        got = call((*data[:operand], scale, *data[operand + 1 :]), FOCUSES["row8"], backend).unflatten(-1, (2, -1))
        assert got[0, :, 1].isnan().all()
        assert got[:, :, 0].isfinite().all()
        assert got[1].isfinite().all()


@pytest.mark.parametrize("backend", BACKENDS)
def test_per_token_values_are_aligned_to_the_largest_scale(backend):
    """One key per query: o = S·rne(V·s_v/S) exactly, so the alignment itself is visible."""
    b, h, n, d = 1, 1, 19, 5
    g = torch.Generator().manual_seed(3)
    v = torch.randint(-127, 128, (b, h, n, d), generator=g).to(torch.int8)
    scale = torch.rand(b, h, n, generator=g) + 0.01
    zero, one = torch.zeros(b, h, n, d, dtype=torch.int8), torch.ones(1)
    mask = torch.where(torch.eye(n) > 0, 0.0, -math.inf).unsqueeze(0)
    focus = FocusSpec(anchor="row", renormalize=True)
    got = call((zero, zero, v, one, one, scale, 1.0, None, mask), focus, backend)
    want = torch.round(v.float() * (scale / scale.amax()).unsqueeze(-1)) * scale.amax()
    torch.testing.assert_close(got, want.reshape(1, n, d), rtol=4 * 2**-24, atol=0)


# --- the planted bugs that the bound must reject ---------------------------------------------------------------------

BUGS = {
    "truncated codes": lambda d, f: ref64(d, f) * (1 - 0.5 / f.n),
    "keys in the wrong order": lambda d, f: ref64((*d[:2], d[2].roll(1, 2), *d[3:]), f),
    "mask by b // G": lambda d, f: ref64((*d[:8], d[8].roll(1, 0)), f),
    "bias dropped": lambda d, f: ref64((*d[:7], None, d[8]), f),
    "one level of one key off": lambda d, f: ref64(d, f) + (torch.arange(32) == 5) * 0.02 * 60 / f.n / 8,
    "heads and images swapped": lambda d, f: ref64(d, f).unflatten(-1, (2, -1)).flip(2).flatten(2),
}


@pytest.mark.parametrize("bug", BUGS)
def test_planted_bugs_are_rejected(bug):
    data = make(b=2, h=2, nq=12, nk=40, d=16, scales="per_head", bias=True, mask=(2, True))
    focus = FOCUSES["row8"]
    assert_attention(ref64(data, focus), *oracle_args(data, focus))
    with pytest.raises(AssertionError, match="wrong"):
        assert_attention(BUGS[bug](data, focus), *oracle_args(data, focus))


# --- quantized output ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "out",
    [
        ActQuant(scale=torch.tensor([0.01]), zero_point=5, qmin=-128),
        ActQuant(),
        ActQuant(qmin=-7, qmax=7, groups=2),
        ActQuant(lora_down=torch.randn(5, 32, generator=torch.Generator().manual_seed(0)) / 8),
        ActQuant(row_qmax=torch.arange(2 * 21, dtype=torch.int32) % 127 + 1),
    ],
    ids=["static", "dynamic", "groups", "lora", "row_qmax"],
)
@pytest.mark.parametrize("backend", BACKENDS)
def test_quantize_is_the_quantizer_after_attention(backend, out):
    """Bitwise: the fused op returns what ``quantize`` makes of the same back end's float result."""
    *operands, softmax_scale, bias, mask = make(b=2, h=2, nq=21, nk=30, d=16, bias=True)
    kw = {"focus": FOCUSES["row8"], "softmax_scale": softmax_scale, "bias": bias, "mask": mask}
    with pinned(backend):
        got = qattention_quantize(*operands, out=out, **kw)
        want = quantize(qattention(*operands, **kw), out)
    assert torch.equal(got.q, want.q)
    assert torch.equal(got.scale, want.scale)
    assert got.zero_point == want.zero_point
    assert (got.t is None) == (want.t is None)
    if got.t is not None:
        assert torch.equal(got.t, want.t)


# --- how an op behaves -----------------------------------------------------------------------------------------------


def flat_args(data, focus, *scatter):
    *operands, softmax_scale, bias, mask = data
    return PreparedAttention(focus, softmax_scale, bias, None, operands[0].device).flat(*operands, mask, *scatter)


@pytest.mark.parametrize("shape", [{}, {"nq": 0}, {"nk": 0}, {"b": 0}])
def test_opcheck(shape):
    data = make(bias=True, mask=None if shape.get("b") == 0 else (1, True), **shape)
    args = flat_args(data, FOCUSES["row4"])
    torch.library.opcheck(torch.ops.vitq.qattention.default, (*args, torch.float32))
    tail = (torch.ones(1), 0, -127, 127, 1, None, None, None, False)
    torch.library.opcheck(torch.ops.vitq.qattention_quantize.default, (*args, *tail))


class Attention(torch.nn.Module):
    def forward(self, q, k, v, q_scale, k_scale, v_scale):
        focus = FocusSpec(bits=4, power=2.0, anchor="row", renormalize=True)
        y = qattention(q, k, v, q_scale, k_scale, v_scale, focus=focus)
        z = qattention_quantize(q, k, v, q_scale, k_scale, v_scale, focus=focus, out=ActQuant())
        return y * 2, z.q, z.scale


def test_compile_fullgraph():
    data = make(nq=33, nk=33)[:6]
    want = Attention()(*data)
    got = torch.compile(Attention(), fullgraph=True, backend="aot_eager")(*data)
    assert all(torch.equal(a, b) for a, b in zip(got, want))


def test_compile_with_any_softmax_scale():
    """A float argument that changes becomes symbolic."""

    def scaled(q, k, v, q_scale, k_scale, v_scale, softmax_scale):
        return qattention(q, k, v, q_scale, k_scale, v_scale, focus=FocusSpec(4), softmax_scale=softmax_scale)

    data = make(nq=33, nk=33)[:6]
    torch._dynamo.reset()
    compiled = torch.compile(scaled, fullgraph=True, backend="aot_eager", dynamic=True)
    for scale in (0.25, 0.5):
        assert torch.equal(compiled(*data, scale), scaled(*data, scale))


def test_export():
    data = make(nq=33, nk=33)[:6]
    program = torch.export.export(Attention(), data)
    assert all(torch.equal(a, b) for a, b in zip(program.module()(*data), Attention()(*data)))


@pytest.mark.parametrize("focus", ["dfq4", "row8_renorm"])
@pytest.mark.parametrize("backend", KERNELS)
def test_bitwise_repeatable_for_any_thread_count(backend, focus):
    heads = 1 if host.INTERPRETED else 3
    data = make(b=heads, h=heads, nq=MOST_QUERIES, nk=130, d=32, scales="per_token", bias=True)
    before = torch.get_num_threads()
    try:
        results = []
        for threads in (1, 2, 3, 1):
            torch.set_num_threads(threads)
            results.append(call(data, FOCUSES[focus], backend))
    finally:
        torch.set_num_threads(before)
    assert all(torch.equal(results[0], r) for r in results[1:])


@pytest.mark.parametrize("backend", BACKENDS)
def test_every_output_element_is_written(backend):
    """Outputs come from memory that holds 3e38."""
    data = make(nq=19, nk=35, d=17, mask=(1, True))
    with poison(0x7F):
        for focus in ("dfq4", "row8_renorm"):
            assert_attention(call(data, FOCUSES[focus], backend), *oracle_args(data, FOCUSES[focus]))


def arguments(**kw):
    q, k, v, qs, ks, vs = make()[:6]
    args = {"q": q, "k": k, "v": v, "q_scale": qs, "k_scale": ks, "v_scale": vs, "focus": FocusSpec()}
    return args | kw


int8 = torch.int8
BAD = {
    "q_dtype": ({"q": torch.zeros(2, 2, 9, 8)}, TypeError, "q has dtype torch.float32, expected torch.int8"),
    "q_dim": ({"q": torch.zeros(9, 8, dtype=int8)}, ValueError, "q has shape (9, 8), expected (any, any, any, any)"),
    "q_list": ({"q": [1]}, TypeError, "q is list, expected a torch.Tensor"),
    "k_shape": ({"k": torch.zeros(2, 2, 11, 9, dtype=int8)}, ValueError, "k has shape (2, 2, 11, 9), expected (2, 2"),
    "v_shape": ({"v": torch.zeros(2, 2, 12, 8, dtype=int8)}, ValueError, "v has shape (2, 2, 12, 8), expected (2, 2"),
    "k_device": ({"k": torch.zeros(2, 2, 11, 8, dtype=int8, device="meta")}, ValueError, "k is on meta, expected cpu"),
    "keys": (
        {name: torch.zeros(1, 1, 1, 1, dtype=int8).expand(2, 2, 65794, 8) for name in "kv"},
        ValueError,
        "k has 65794 keys, expected at most 65793",
    ),
    "q_scale_dtype": ({"q_scale": torch.ones(1).double()}, TypeError, "q_scale has dtype torch.float64"),
    "k_scale_shape": ({"k_scale": torch.ones(2, 2, 9)}, ValueError, "k_scale has shape (2, 2, 9), expected (1), (2)"),
    "v_scale_shape": (
        {"v_scale": torch.ones(3)},
        ValueError,
        "v_scale has shape (3,), expected (1), (2) or (2, 2, 11)",
    ),
    "bias_shape": ({"bias": torch.zeros(9, 11)}, ValueError, "bias has shape (9, 11), expected (2, 9, 11)"),
    "bias_dtype": ({"bias": torch.zeros(2, 9, 11, dtype=int8)}, TypeError, "bias has dtype torch.int8"),
    "mask_shape": ({"mask": torch.zeros(1, 9, 10)}, ValueError, "mask has shape (1, 9, 10), expected (any, any, 11)"),
    "mask_groups": ({"mask": torch.zeros(3, 9, 11)}, ValueError, "mask has shape (3, 9, 11), expected (a divisor of 2"),
    "mask_none": ({"mask": torch.zeros(0, 9, 11)}, ValueError, "mask has shape (0, 9, 11), expected (a divisor of 2"),
    "mask_rows": ({"mask": torch.zeros(1, 4, 11)}, ValueError, "mask has shape (1, 4, 11), expected (a divisor of 2"),
    "levels": ({"levels": torch.zeros(3, dtype=torch.uint8)}, ValueError, "levels has shape (3,), expected (256)"),
    "focus": ({"focus": 4}, TypeError, "focus is int, expected a FocusSpec"),
    "out_dtype": ({"out_dtype": torch.int8}, TypeError, "out_dtype is torch.int8, expected torch.float32 or"),
    "softmax_scale": ({"softmax_scale": math.nan}, ValueError, "softmax_scale is nan, expected a finite number"),
}


@pytest.mark.parametrize("case", BAD)
def test_refuses(case):
    change, error, message = BAD[case]
    with pytest.raises(error, match=re.escape(message)):
        qattention(**arguments(**change))


def test_quantize_refuses_groups_that_do_not_divide():
    with pytest.raises(ValueError, match="groups is 3, expected a divisor of the 16 columns"):
        qattention_quantize(**arguments(), out=ActQuant(groups=3))
