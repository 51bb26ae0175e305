"""C++ GPU kernels of quantize and layer_norm_quantize, beyond what every back end is tested for: the forms that rows of
different lengths take, the 16-bit branch, groups. Run as emulated_cuda.py."""

import pytest
import selected
import test_layer_norm_quantize as layer_norm_tests
import test_quantize as quantize_tests
import torch
from rows_oracle import assert_quantized

import vitq_kernels as vk
from vitq_kernels.formats import LevelTable
from vitq_kernels.ops.quantize import ref
from vitq_kernels.testing import poison

HALF, BFLOAT = torch.float16, torch.bfloat16
# Whole rows up to 1024 and 3072 columns, then chunks of 512; odd lengths are read element by element.
LENGTHS = (16, 48, 112, 192, 768, 1008, 1024, 1040, 1536, 3072, 3088, 3600, 1025, 530)


@pytest.fixture(autouse=True)
def _pinned():
    assert selected.CUDA
    with vk.backend("cuda"):
        yield


def generator(seed=0):
    return torch.Generator().manual_seed(seed)


def directions(rank, k, dtype=torch.float32, seed=1):
    return torch.linalg.qr(torch.randn(k, rank, generator=generator(seed)))[0].T.contiguous().to(dtype)


def check_quantize(x, a):
    out = vk.quantize(x, a)
    assert_quantized(out, x.reshape(-1, x.shape[-1]).double(), 0.0, a)
    return out


def check_norm(x, weight, bias, a, gather=None):
    out = vk.layer_norm_quantize(x, weight, bias, layer_norm_tests.EPS, a, gather)
    y, bound = layer_norm_tests.exact_layer_norm(x, weight, bias, layer_norm_tests.EPS, "cuda")
    if gather is not None:
        y, bound = (layer_norm_tests.gathered(v.flatten(1, -2), gather) for v in (y, bound))
    assert_quantized(out, y.reshape(-1, x.shape[-1]), bound.reshape(-1, x.shape[-1]), a)
    return out


REVERSED = torch.arange(-128, 128).flip(0).to(torch.int8)
QUANTS = {
    "dynamic": {},
    "zero point": {"scale": torch.tensor([0.02]), "zero_point": -37, "qmin": -128},
    "lut": {"scale": torch.tensor([0.02]), "zero_point": 90, "qmin": -128, "lut": REVERSED},
    "row_qmax": {"row_qmax": torch.arange(1, 20, dtype=torch.int32)},
    "row scales": {"scale": torch.rand(19, 1, generator=generator(7)) * 0.05 + 0.01},
}


@pytest.mark.parametrize("k", LENGTHS)
@pytest.mark.parametrize("name", QUANTS)
def test_every_length(name, k):
    x = torch.randn(19, k, generator=generator(k)) * 2
    x[4] = 0.0
    check_quantize(x, vk.ActQuant(**QUANTS[name]))
    check_quantize(x.bfloat16(), vk.ActQuant(**QUANTS[name]))


@pytest.mark.parametrize("k", LENGTHS)
@pytest.mark.parametrize("dtype", [torch.float32, HALF, BFLOAT])
@pytest.mark.parametrize("subspace", [False, True])
def test_branch_of_every_length(k, dtype, subspace):
    """Ranks on both sides of an instruction's 8, a step's 16 and the 32 (16 in long rows) that are summed at a time."""
    rank = {16: 8, 48: 1, 112: 16, 192: 17, 768: 32, 1008: 33, 1024: 40, 1536: 9}.get(k, 20)
    x = torch.randn(18, k, generator=generator(k)) * 3
    a = vk.ActQuant(lora_down=directions(rank, k, dtype), subspace=subspace)
    check_quantize(x, a)
    check_quantize(x.half(), vk.ActQuant(**{**a.__dict__, "scale": torch.tensor([0.05]), "zero_point": 3}))


@pytest.mark.parametrize("k", LENGTHS)
@pytest.mark.parametrize("types", [(torch.float32, torch.float32), (BFLOAT, torch.float32), (HALF, HALF)])
def test_layer_norm_of_every_length(k, types):
    x = (5.0 + torch.randn(2, 9, k, generator=generator(k)) * 2).to(types[0])
    weight, bias = (torch.randn(k, generator=generator(i)).to(types[1]) for i in (1, 2))
    gather = torch.tensor([5, -1, 0, 0, 6, -1, 2, 3, 8, 7, 4], dtype=torch.int32)
    check_norm(x, weight, bias, vk.ActQuant())
    check_norm(x, weight, None, vk.ActQuant(scale=torch.tensor([0.03]), zero_point=1, qmin=-128), gather)
    for subspace in (False, True):
        out = check_norm(x, None, bias, vk.ActQuant(lora_down=directions(9, k, HALF), subspace=subspace), gather)
        empty = (gather < 0).repeat(2)
        assert (out.scale[empty] == 1.0).all()
        assert not out.q.reshape(-1, k)[empty].any()
        assert not out.t[empty].any()


# 64 groups have their maxima in shared memory, 65 where the scales go; a lane's 16 columns and a strip's 64 may be in
# one group.
GROUPS = ((1024, 64), (1040, 65), (768, 12), (768, 16), (96, 2), (144, 3), (60, 12), (1120, 70), (3072, 96), (3600, 3))


@pytest.mark.parametrize(("k", "groups"), GROUPS)
def test_groups(k, groups):
    x = torch.randn(18, k, generator=generator(k)) * 2
    x[3, : k // groups] = 0.0
    static = torch.rand(groups, generator=generator(2)) * 0.05 + 0.01
    per_row = torch.rand(18, groups, generator=generator(3)) * 0.05 + 0.01
    for quant in ({}, {"scale": static}, {"scale": per_row, "row_qmax": torch.arange(1, 19, dtype=torch.int32)}):
        check_quantize(x, vk.ActQuant(groups=groups, **quant))
    check_quantize(x, vk.ActQuant(groups=groups, lora_down=directions(5, k, BFLOAT), subspace=True))
    check_norm(x, None, None, vk.ActQuant(groups=groups))
    x[5, 0], x[6, -1] = float("nan"), float("inf")
    out = vk.quantize(x, vk.ActQuant(groups=groups))
    q, scale, _ = ref.quantize(x, *quantize_tests.flat(vk.ActQuant(groups=groups)))
    assert torch.equal(out.q, q)
    assert torch.equal(out.scale.isnan(), scale.isnan())


@pytest.mark.parametrize("k", [768, 1040, 3104])
def test_what_is_misaligned_has_the_same_codes(k):
    """Without sums of floats, the form that serves a row does not show: element by element, or 16 bytes at a time."""
    table = LevelTable((-128, -50, -20, -7, 3, 11, 60, 127)).lut()
    base = torch.randn(5 * k + 1, generator=generator()).bfloat16()
    x = base[1:].reshape(5, k)
    for quant in ({}, {"scale": torch.tensor([0.02]), "zero_point": 7, "qmin": -128, "lut": table}):
        moved, plain = vk.quantize(x, vk.ActQuant(**quant)), vk.quantize(x.clone(), vk.ActQuant(**quant))
        assert torch.equal(moved.q, plain.q)
        assert torch.equal(moved.scale, plain.scale)


def test_ties_are_those_of_the_oracle():
    x = torch.arange(-1024, 1024).reshape(16, 128) * 0.5
    for zero_point in (0, 1, -1, 126):
        a = vk.ActQuant(scale=torch.tensor([1.0]), zero_point=zero_point, qmin=-128)
        assert torch.equal(vk.quantize(x, a).q, ref.quantize(x, *quantize_tests.flat(a))[0])


@pytest.mark.parametrize("k", [64, 70])
def test_strides(k):
    base = torch.randn(4, 6, 2, k, generator=generator())
    for x in (base[:, 1:], base[:, :, 1], base[::2, 1:, 0], base.transpose(0, 2), base[..., ::2], base[:, 0, 0]):
        a = vk.ActQuant(lora_down=directions(3, x.shape[-1], HALF))
        for op in (vk.quantize, lambda x, a: vk.layer_norm_quantize(x, None, None, 1e-6, a)):
            out, dense = op(x, a), op(x.clone(memory_format=torch.contiguous_format), a)
            assert torch.equal(out.q, dense.q)
            assert torch.equal(out.t, dense.t)
    gather = torch.tensor([3, -1, 0, 4, 4], dtype=torch.int32)
    check_norm(base[:, 1:, 1], None, None, vk.ActQuant(), gather)


@pytest.mark.parametrize("k", [128, 1200, 3200])
def test_special_values_stay_in_their_rows(k):
    nan, inf = float("nan"), float("inf")
    x = torch.randn(20, k, generator=generator())
    x[1, 7], x[2, k - 1], x[3, 0], x[4] = nan, inf, -inf, 0.0
    x[5] = x[5] * 1e-44
    x[6, 9] = 1e6  # above float16
    for dtype in (HALF, BFLOAT, torch.float32):
        for subspace in (False, True):
            out = vk.quantize(x, vk.ActQuant(lora_down=directions(9, k, dtype), subspace=subspace))
            assert out.scale[1:4].isnan().all()
            assert not out.q[1:5].any()
            assert out.t[[0, *range(4, 20)]].isfinite().all()
            rest = [0, *range(7, 20)]
            alone = vk.quantize(x[rest], vk.ActQuant(lora_down=directions(9, k, dtype), subspace=subspace))
            assert torch.equal(out.q[rest], alone.q)
            assert torch.equal(out.t[rest], alone.t)
    out = vk.layer_norm_quantize(x, None, None, 1e-6, vk.ActQuant())
    assert out.scale[1:4].isnan().all()
    assert out.scale[4].item() == 1.0
    assert not out.q[1:5].any()


@pytest.mark.parametrize("k", [768, 1536, 3600, 530])
def test_results_do_not_depend_on_the_order_of_threads(k, monkeypatch):
    x = torch.randn(33, k, generator=generator()).bfloat16()
    a = vk.ActQuant(lora_down=directions(35, k, BFLOAT), subspace=True)
    outs = []
    for seed, byte in ((0, 0x7F), (1, 0xA5), (2, 0x7F), (3, 0xA5)):
        monkeypatch.setenv("VITQ_EMULATION_SEED", str(seed))
        with poison(byte):
            outs.append((vk.layer_norm_quantize(x, torch.ones(k), None, 1e-6, a), vk.quantize(x, vk.ActQuant())))
    for other in outs[1:]:
        for got, want in zip(other, outs[0]):
            for field in ("q", "scale", "t"):
                assert (field == "t" and want.t is None) or torch.equal(getattr(got, field), getattr(want, field))


@selected.needs_emulation
def test_native_code_checks_what_addresses_memory():
    x, quant = torch.zeros(2, 3, 8), quantize_tests.flat(vk.ActQuant())
    op = torch.ops.vitq_cuda.layer_norm_quantize.default
    with pytest.raises(RuntimeError, match="x has 6 rows, expected images of 4 tokens"):
        op(x, None, None, 1e-6, *quant, torch.zeros(2, dtype=torch.int32), 4)
    with pytest.raises(RuntimeError, match="gather has dtype Long, expected Int"):
        op(x, None, None, 1e-6, *quant, torch.zeros(2, dtype=torch.int64), 3)
    with pytest.raises(RuntimeError, match="weight has 7 elements, expected 8"):
        op(x, torch.zeros(7), None, 1e-6, *quant, None, 0)
    with pytest.raises(RuntimeError, match="x has dtype Int, expected float32, float16 or bfloat16"):
        torch.ops.vitq_cuda.quantize.default(x.int(), *quant)
    with pytest.raises(RuntimeError, match="lora_down has 7 elements, expected"):
        torch.ops.vitq_cuda.quantize.default(x, *quant[:-2], torch.zeros(1, 7), False)
