"""sm_90a's kernels on the emulation: test_cuda_emulated.py runs this. The environment is read at every call."""

import pytest
import test_qlinear as linear_tests
import torch

import vitq_kernels as vk
from vitq_kernels import _cuda
from vitq_kernels.packing import pack_weight

NAMES = ("w8", "w4", "w4 table")
# Ragged everywhere, more tiles than blocks; by K, tiles of 128 rows in turns or of 256 rows together.
SHAPES = ((300, 272, 200), (129, 16, 130), (260, 2064, 140), (257, 2048, 1))


@pytest.fixture(autouse=True)
def hopper(monkeypatch):
    assert _cuda.EMULATED
    monkeypatch.setenv("VITQ_EMULATED_CAPABILITY", "90")
    monkeypatch.setenv("VITQ_EMULATED_PROCESSORS", "2")
    with vk.backend("cuda"):
        yield monkeypatch


def generator(seed=0):
    return torch.Generator().manual_seed(seed)


def by_sm80(monkeypatch, call):
    with monkeypatch.context() as inner:
        inner.setenv("VITQ_EMULATED_CAPABILITY", "80")
        return call()


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize(("m", "k", "n"), SHAPES)
def test_sums_and_epilogue_are_those_of_sm_80(m, k, n, name, hopper):
    """Without a branch all of it is in the same order: equal to the last bit."""
    x, weight, w_scale, kw = linear_tests.make_case(
        generator(k), m, k, n, 0, name, True, torch.float16, "gelu_tanh", per_row=k % 32 == 0
    )
    for out_dtype in (torch.float32, torch.bfloat16):
        got = vk.qlinear(x, weight, w_scale, out_dtype=out_dtype, **kw)
        want = by_sm80(hopper, lambda: vk.qlinear(x, weight, w_scale, out_dtype=out_dtype, **kw))  # noqa: B023
        assert torch.equal(got, want)


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("r", [8, 32, 40, 104])
@pytest.mark.parametrize(("m", "k", "n", "dtype"), [(300, 272, 200, torch.float16), (300, 2064, 130, torch.bfloat16)])
def test_branches(m, k, n, r, dtype, name):
    linear_tests.check(*linear_tests.make_case(generator(r), m, k, n, r, name, True, dtype, "gelu_erf"))


@pytest.mark.parametrize(("m", "k", "r", "offset"), [(260, 72, 0, 0), (260, 64, 5, 0), (260, 64, 8, 1), (20, 64, 0, 0)])
def test_what_it_leaves_to_sm_80(m, k, r, offset):
    """Rows that do not start at 16 bytes, ranks that are no multiple of 8, few tiles; float32 branches it takes."""
    for dtype in (torch.float16, torch.float32):
        x, weight, w_scale, kw = linear_tests.make_case(generator(), m, k, 200, r, "w8", True, dtype)
        x.q.set_(torch.cat([torch.zeros(offset, dtype=torch.int8), x.q.flatten()])[offset:].reshape(m, k))
        linear_tests.check(x, weight, w_scale, kw)


@pytest.mark.parametrize("k", [1024, 2064])
@pytest.mark.parametrize("name", NAMES[:2])
def test_extremes(k, name):
    layout, bits, _ = linear_tests.FORMATS[name]
    top = (1 << (bits - 1)) - 1
    for x_code, zero_point, w_code in ((-128, 127, -top - 1), (127, -128, -top - 1), (-128, 0, top), (127, 0, -1)):
        weight = pack_weight(torch.full((129, k), w_code, dtype=torch.int8), bits, layout)
        x = vk.QTensor(torch.full((260, k), x_code, dtype=torch.int8), torch.ones(1), zero_point)
        assert (vk.qlinear(x, weight, torch.ones(129)) == float((x_code - zero_point) * w_code * k)).all()


def test_four_bits_by_four_bits():
    """There are no int4 products here: widened, as the others."""
    g = generator()
    x, weight, w_scale, kw = linear_tests.make_case(g, 260, 160, 130, 8, "w4", True, torch.float16)
    by_int4 = pack_weight(linear_tests.unpack_weight(weight), 4, "int4_k64x2_s4")
    x.q.copy_(torch.randint(-8, 8, x.q.shape, generator=g))
    assert torch.equal(vk.qlinear(x, by_int4, w_scale, **kw), vk.qlinear(x, weight, w_scale, **kw))


@pytest.mark.parametrize("k", [400, 2048])
def test_any_number_of_blocks_and_order_of_threads(k, hopper):
    """A block's tiles follow one another through the ring and the barriers: none, a few, all of them."""
    for name in NAMES:
        x, weight, w_scale, kw = linear_tests.make_case(generator(), 520, k, 260, 40, name, True, torch.bfloat16)
        outs = []
        for seed, processors in ((0, 1), (1, 3), (2, 5), (3, 9)):
            hopper.setenv("VITQ_EMULATION_SEED", str(seed))
            hopper.setenv("VITQ_EMULATED_PROCESSORS", str(processors))
            outs.append(vk.qlinear(x, weight, w_scale, **kw))
        assert all(torch.equal(out, outs[0]) for out in outs)


@pytest.mark.parametrize("k", [144, 2048])
@pytest.mark.parametrize(
    "out",
    [
        {"scale": torch.tensor([0.7]), "zero_point": -30, "qmin": -128},
        {"groups": 3},
        {"groups": 6},
        {"scale": torch.tensor([0.7]), "lora_down": 32},
        {"groups": 12, "lora_down": 70},
    ],
)
def test_codes_are_those_of_sm_80(k, out, hopper):
    """Codes, dynamic scales of groups inside a tile, and what the next layer's branch starts from."""
    g = generator()
    x, weight, w_scale, kw = linear_tests.make_case(g, 300, k, 384, 0, "w8", True, torch.float16, "gelu_erf")
    out = dict(out)
    if "lora_down" in out:
        out["lora_down"] = (torch.randn(out["lora_down"], 384, generator=g) / 20).half()
    a = vk.ActQuant(**out)
    got = vk.qlinear_quantize(x, weight, w_scale, out=a, **kw)
    want = by_sm80(hopper, lambda: vk.qlinear_quantize(x, weight, w_scale, out=a, **kw))
    for one, other in ((got.q, want.q), (got.scale, want.scale), (got.t, want.t)):
        assert one is other or torch.equal(one, other)
