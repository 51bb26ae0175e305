"""A GPU's kernels, Triton's or those in C++, on real ViT shapes and adversarial data, on the GPU's own tensors.

Runs where VITQ_TEST_DEVICE is set (bench/gpu/suite.py): on a GPU with the shapes below, interpreted or emulated ("cpu")
with their sizes divided by ``SHRINK``.
"""

from __future__ import annotations

from dataclasses import replace

import interpreted_triton as fused_tests
import pytest
import test_layer_norm_quantize as layer_norm_tests
import test_qlinear as linear_tests
import test_quantize as quantize_tests
import torch
from attention_oracle import assert_attention
from selected import BACKEND, DEVICE

import vitq_kernels as vk
from vitq_kernels.formats import FocusSpec

pytestmark = pytest.mark.skipif(DEVICE is None, reason="VITQ_TEST_DEVICE is not set: no device to try shapes on")
SHRINK = 16 if DEVICE == "cpu" else 1
BF16, F16 = torch.bfloat16, torch.float16


@pytest.fixture(autouse=True)
def _pinned():
    with vk.backend(BACKEND):
        yield


def small(n: int) -> int:
    return max(n // SHRINK, 1)


def to_device(x):
    """Tensors of a QTensor, a PackedWeight, an ActQuant, a dict or by themselves on the device."""
    if isinstance(x, torch.Tensor):
        return x.to(DEVICE)
    if isinstance(x, dict):
        return {k: to_device(v) for k, v in x.items()}
    if hasattr(x, "__dataclass_fields__"):
        moved = {k: v.to(DEVICE) for k, v in x.__dict__.items() if isinstance(v, torch.Tensor)}
        return replace(x, **moved)
    return x


def hostile(m: int, k: int, dtype=torch.float32, seed=0) -> torch.Tensor:
    """Normal values with an outlier channel, a row of zeros, a row of ties, one of huge and one of tiny values."""
    x = torch.randn(m, k, generator=torch.Generator().manual_seed(seed))
    x[:, k // 3] *= 300.0
    if m > 4:
        x[1] = 0.0
        x[2] = (torch.arange(k) % 255 - 127) * 0.5
        x[3] *= 1e4
        x[4] *= 1e-6
    return x.to(dtype).to(DEVICE)


def directions(rank: int, k: int) -> torch.Tensor:
    rank = min(rank, k)
    return (
        torch.linalg.qr(torch.randn(k, rank, generator=torch.Generator().manual_seed(1)))[0].T.contiguous().to(DEVICE)
    )


ROWS = [(197, 384), (1576, 768), (6304, 768), (1576, 3072), (12608, 1024), (203, 389), (3136, 96)]
QUANTS = {
    "dynamic": {},
    "static": {"scale": torch.tensor([0.02]), "zero_point": -7, "qmin": -128},
    "t": {"lora_down": 32},
    "subspace": {"lora_down": 17, "subspace": True},
}


def quant(name: str, k: int) -> vk.ActQuant:
    a = dict(QUANTS[name])
    if "lora_down" in a:
        a["lora_down"] = directions(a["lora_down"], k)
    return to_device(vk.ActQuant(**a))


@pytest.mark.parametrize("shape", ROWS, ids=str)
@pytest.mark.parametrize("name", QUANTS)
def test_rows(shape, name):
    m, k = map(small, shape)
    a = quant(name, k)
    quantize_tests.check(hostile(m, k), a)
    x = hostile(m, k, BF16, seed=1)
    gamma, beta = hostile(1, k, seed=2)[0], hostile(1, k, seed=3)[0]
    layer_norm_tests.check(x, gamma, beta, a, BACKEND)
    padded = torch.empty(m, k + 3, device=DEVICE)  # rows that start anywhere
    padded[:, 3:] = hostile(m, k, seed=4)
    quantize_tests.check(padded[:, 3:], a)


# (M, K, N, R): layers of ViT-S, B, L and Swin, and sizes that nothing divides
PRODUCTS = [
    (197, 768, 768, 32),
    (197, 3072, 768, 32),
    (197, 384, 1152, 32),
    (1576, 768, 2304, 32),
    (6304, 768, 3072, 32),
    (6304, 3072, 768, 0),
    (12608, 1024, 4096, 32),
    (3136, 128, 384, 16),
    (203, 389, 1153, 17),
    (1, 769, 1000, 5),
]


@pytest.mark.parametrize("shape", PRODUCTS, ids=str)
@pytest.mark.parametrize("name", linear_tests.FORMATS)
def test_products(shape, name):
    m, k, n = map(small, shape[:3])
    g = torch.Generator().manual_seed(m)
    for dtype, branch in ((BF16, F16), (F16, F16), (torch.float32, torch.float32)):
        case = linear_tests.make_case(g, m, k, n, shape[3], name, True, dtype=branch, activation="gelu_erf")
        x, weight, w_scale, kw = map(to_device, case)
        linear_tests.check(x, weight, w_scale, kw, dtype)
    x = replace(x, q=torch.where(x.q > 0, 127, -128).to(torch.int8))  # sums at their largest
    linear_tests.check(x, weight, w_scale, kw)


@pytest.mark.parametrize("shape", PRODUCTS, ids=str)
@pytest.mark.parametrize("name", QUANTS)
def test_quantizing_products(shape, name):
    m, k, n = map(small, shape[:3])
    n = -(-n // 3) * 3
    case = linear_tests.make_case(torch.Generator().manual_seed(m), m, k, n, shape[3], "w8", True, dtype=F16)
    x, weight, w_scale, kw = map(to_device, case)
    fused_tests.check_fused(x, weight, w_scale, kw, quant(name, n))
    if name == "dynamic":
        fused_tests.check_fused(x, weight, w_scale, kw, vk.ActQuant(groups=3))


def test_weight_only():
    for m, k, n in ((small(197), small(768), small(768)), (small(1576), small(3072), small(768))):
        g = torch.Generator().manual_seed(m)
        case, weight, w_scale, kw = linear_tests.make_case(g, m, k, n, 16, "w4", True, dtype=BF16)
        x = torch.randn(m, k, generator=g).to(BF16)
        x, t, weight, w_scale, kw = map(to_device, (x, case.t, weight, w_scale, kw))
        out = vk.qlinear_weight_only(x, weight, w_scale, lora_t=t, **kw)
        linear_tests.check_weight_only(out, x, t, weight, w_scale, kw)


ATTENTION = [  # B, H, N, d, bias, mask groups
    (128, 4, 49, 32, True, 64),
    (8, 12, 197, 64, False, 0),
    (2, 16, 577, 64, False, 0),
    (2, 12, 1024, 64, False, 0),
    (2, 3, 211, 80, True, 2),
]
FOCUSES = {
    "row": FocusSpec(power=2.0, anchor="row"),
    "absolute": FocusSpec(bits=4, b1=0.001, b2=0.2, renormalize=True),
}


@pytest.mark.parametrize("shape", ATTENTION, ids=str)
@pytest.mark.parametrize("focus", FOCUSES)
def test_attention(shape, focus):
    b, h, n, d, bias, groups = shape
    b, h, n, groups = small(b), small(h), small(n), small(groups) if groups else 0
    g = torch.Generator().manual_seed(n)
    codes = torch.randint(-127, 128, (b, n, 3, h, d), generator=g).to(torch.int8).to(DEVICE)
    q, k, v = codes.permute(2, 0, 3, 1, 4).unbind(0)
    scales = [(0.5 + torch.rand(b, h, n, generator=g)).to(DEVICE) * s for s in (0.02, 0.02, 0.05)]
    bias = torch.randn(h, n, n, generator=g).to(DEVICE) if bias else None
    mask = None
    if groups:
        mask = torch.where(torch.rand(groups, n, n, generator=g) < 0.7, 0.0, -100.0).to(DEVICE)
    arguments = (q, k, v, *scales)
    got = vk.qattention(*arguments, focus=FOCUSES[focus], softmax_scale=d**-0.5, bias=bias, mask=mask, out_dtype=BF16)
    oracle = (*arguments, FOCUSES[focus], d**-0.5)
    assert_attention(got, *oracle, bias=bias, mask=mask, out_unit=2.0**-8, vacuous=1.0)
