"""The roofline's bytes are those of the tensors that a launch is given, its operations those of the kernel's loops."""

import pytest
import torch

import vitq_kernels as vk
from bench.gpu import roofline
from vitq_kernels.packing import LAYOUT_IDS
from vitq_kernels.triton import host

pytestmark = pytest.mark.skipif(not host.INSTALLED or host.INTERPRETED, reason="triton is needed, to record launches")
BF16, F16, I8 = torch.bfloat16, torch.float16, torch.int8


def flat(a: vk.ActQuant) -> tuple:
    return (a.scale, a.zero_point, a.qmin, a.qmax, a.groups, a.row_qmax, a.lut, a.lora_down, a.subspace)


def bytes_of(launches) -> int:
    """Of the distinct tensors of the only launch."""
    (launch,) = launches
    tensors = {x.data_ptr(): x for x in launch.arguments if isinstance(x, torch.Tensor) and x.numel()}
    return sum(x.numel() * x.element_size() for x in tensors.values())


@pytest.mark.parametrize("rank", [0, 32])
@pytest.mark.parametrize("norm", [False, True])
@pytest.mark.parametrize("dynamic", [False, True])
def test_quantize(rank, norm, dynamic):
    from vitq_kernels.ops.layer_norm_quantize import triton as layer_norm_quantize
    from vitq_kernels.ops.quantize import triton as quantize

    m, k = 50, 96
    x, gamma, beta = torch.ones(m, k, dtype=BF16), torch.ones(k), torch.ones(k)
    down = torch.ones(rank, k, dtype=F16) if rank else None
    args = flat(vk.ActQuant(scale=None if dynamic else torch.ones(1), lora_down=down))
    with host.recorded(run=False) as launches:
        if norm:
            layer_norm_quantize.layer_norm_quantize(x, gamma, beta, 1e-6, *args, None, 0)
        else:
            quantize.quantize(x, *args)
    assert bytes_of(launches) == roofline.quantize(m, k, rank, dynamic=dynamic, norm=norm).bytes


@pytest.mark.parametrize("rank", [0, 32])
@pytest.mark.parametrize("bits", [8, 4])
@pytest.mark.parametrize("form", ["float", "residual", "codes"])
def test_linear(rank, bits, form):
    from vitq_kernels.ops.qlinear import triton as qlinear

    m, k, n = 50, 200, 72
    weight = vk.pack_weight(torch.ones(n, k, dtype=I8), bits, "int8" if bits == 8 else "int4_k64x2")
    t, up = (torch.ones(m, rank), torch.ones(n, rank, dtype=F16)) if rank else (None, None)
    residual = torch.ones(m, n, dtype=BF16) if form == "residual" else None
    tail = (torch.ones(n), up, 0, None, residual)
    packed = (weight.data, LAYOUT_IDS[weight.layout], n, k, weight.col_sum, None, torch.ones(n))
    common = (torch.ones(m, k, dtype=I8), torch.ones(m), 0, t, *packed, *tail)
    with host.recorded(run=False) as launches:
        if form == "codes":
            qlinear.qlinear_quantize(*common, *flat(vk.ActQuant(scale=torch.ones(1))))
        else:
            qlinear.qlinear(*common, BF16)
    out = {"float": {}, "residual": {"residual_bytes": 2}, "codes": {"out_bytes": 1}}[form]
    counted = roofline.linear(m, n, k, rank, bits=bits, **out)
    assert bytes_of(launches) == counted.bytes + 4 * (form == "codes")  # the scale of the codes
    assert (counted.int8, counted.half) == (2 * m * n * k, 2 * m * n * rank)


def test_block():
    """Six launches; the codes that one writes are what the next one reads."""
    block = roofline.block(197, 2, 64, 2, 16)
    assert len(block) == 6
    assert sum(work.int8 for work in block.values()) == 2 * 394 * 64 * (12 * 64) + 4 * 2 * 2 * 197 * 197 * 32
    plain = roofline.linear(394, 64, 64, 16, per_row=False, residual_bytes=2)
    with_norm = block["proj + residual + LayerNorm + quantize"]
    assert with_norm.bytes - plain.bytes == 8 * 64 + 394 * 64 + 2 * 64 * 16 + 4 * 394 * 16


def test_attention_counts_each_operand_once():
    b, h, n, d = 2, 3, 49, 32
    q = k = v = b * h * n * d
    assert roofline.attention(b, h, n, d).bytes == q + k + v + 2 * b * n * h * d
    assert roofline.attention(b, h, n, d, bias=True, mask=2).bytes - roofline.attention(b, h, n, d).bytes == 4 * (
        h * n * n + 2 * n * n
    )
    assert roofline.attention(b, h, n, d).int8 == 2 * (2 * b * h * n * n * d)
