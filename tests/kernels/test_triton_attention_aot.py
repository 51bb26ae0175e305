"""Triton's attention compiled ahead of time, as test_triton_aot.py does it for the other kernels."""

import re

import pytest
import torch
from test_triton_aot import S8, WGMMA_S8

import vitq_kernels as vk
from vitq_kernels import tuning
from vitq_kernels.formats import FocusSpec
from vitq_kernels.ops import _schema
from vitq_kernels.ops.qattention import focus_args
from vitq_kernels.ops.qattention import triton as attention
from vitq_kernels.triton import aot, host

pytestmark = pytest.mark.skipif(host.INTERPRETED, reason="interpreted kernels are not compiled")

ROW8 = FocusSpec(power=2.0, anchor="row")
PAPER = FocusSpec(b2=0.4, renormalize=True)
STATIC = vk.ActQuant(scale=torch.ones(1))
DOWN = torch.empty(32, 768, dtype=torch.float16)
CPU = torch.device("cpu")


def run(b, h, n, d, focus, scales="per_token", additive=False, out=STATIC, windows=None, positions=False):
    """Keys, d, and a call that launches attention on views of a fused QKV; ``windows``: an image's, and its tokens."""
    qkv = torch.empty(b, n, 3, h, d, dtype=torch.int8)
    scale = torch.empty({"per_token": (b, h, n), "per_head": (h,), "per_tensor": (1,)}[scales])
    bias = torch.empty(h, n, n) if additive else None
    mask = torch.empty(4, n, n) if additive else None
    scatter = (None, 0) if windows is None else (torch.empty(windows[0] * n, dtype=torch.int32), windows[1])

    def call():
        if positions:
            product = torch.empty(b, h, n, n, dtype=torch.int32)
            shape = (focus.n, focus.b1, focus.b2, focus.power, focus.anchor == "row", focus.renormalize)
            attention.focus_position(product, scale, scale, d**-0.5, *shape, bias, mask)
            return
        heads = qkv.permute(2, 0, 3, 1, 4).unbind(0)
        flat = (*heads, *[scale] * 3, d**-0.5, *focus_args(focus, CPU), bias, mask, *scatter)
        if out is None:
            attention.qattention(*flat, torch.bfloat16)
        else:
            attention.qattention_quantize(*flat, *_schema.flatten(out))

    return n, d, call


KERNELS = {
    "ViT": run(32, 12, 197, 64, ROW8),
    "ViT, the paper's softmax": run(32, 12, 197, 64, PAPER, "per_head"),
    "1024 keys": run(8, 12, 1024, 64, ROW8),
    "1024 keys, mask, floats": run(8, 12, 1024, 64, ROW8, "per_tensor", additive=True, out=None),
    "Swin": run(256, 4, 49, 32, ROW8, additive=True, windows=(4, 180)),
    "ViT, per token, t": run(32, 12, 197, 64, ROW8, out=vk.ActQuant(lora_down=DOWN)),
    "ViT, per token, subspace": run(32, 12, 197, 64, ROW8, out=vk.ActQuant(lora_down=DOWN, subspace=True)),
    "positions": run(32, 12, 197, 64, ROW8, positions=True),
}
# (kernel, products that multiply a tile of keys, {compute capability: (registers a thread, KB of shared memory)}). Each
# kernel multiplies q·kᵀ (in two passes: in each of them), P·V, and the sums of V that levels above 127 need.
EXPECTED = [
    ("ViT", 3, {80: (252, 18), 89: (252, 18), 90: (248, 27), 120: (255, 18)}),
    ("ViT, the paper's softmax", 3, {80: (184, 18), 90: (200, 27)}),
    ("1024 keys", 4, {80: (192, 18), 90: (176, 27)}),
    ("1024 keys, mask, floats", 4, {80: (192, 27), 90: (168, 50)}),
    ("ViT, per token, t", 3, {80: (255, 18), 90: (248, 34)}),
    ("ViT, per token, subspace", 3, {80: (255, 18), 90: (255, 34)}),
    ("Swin", 3, {80: (216, 18), 90: (216, 18), 100: (208, 18)}),
]
CASES = [
    pytest.param(name, products, cc, *ceiling, id=f"{name}-sm_{cc}")
    for name, products, ceilings in EXPECTED
    for cc, ceiling in ceilings.items()
]


def launches(name: str, capability: int) -> list[host.Launch]:
    keys, d, call = KERNELS[name]
    with tuning.config(tuning.nearest(capability, "", "attention", keys, d)), host.recorded(run=False) as recorded:
        call()
    return recorded


def multiplied(binary: aot.Binary, warps: int) -> int:
    """Products of two int8 numbers in the text of a program, by its instructions' shapes."""
    total = 0
    for m, n, k in re.findall(r"(?:mma\.sync|wgmma\.mma_async\.sync)\.aligned\.m(\d+)n(\d+)k(\d+)\S*\.s8", binary.ptx):
        total += int(m) * int(n) * int(k) * (warps // 4 if m == "64" else warps)
    return total


@pytest.mark.parametrize(("name", "products", "capability", "registers", "kilobytes"), CASES)
def test_compiled_attention(name, products, capability, registers, kilobytes):
    (launch,) = launches(name, capability)
    binary = aot.compile_launch(launch, capability)
    assert binary.stack == 0
    assert binary.local == 0
    assert binary.registers <= registers
    assert binary.shared <= kilobytes * 1024
    assert binary.count(S8[capability]) > 0
    named = dict(zip(launch.kernel.arg_names, launch.arguments, strict=True))
    tile = named["BLOCK_M"] * named["BLOCK_N"] * named["BLOCK_D"]
    if "tcgen05" not in binary.ptx:
        assert multiplied(binary, launch.options["num_warps"]) == products * tile
    if capability < 100:
        assert binary.count(r"ld\.shared\.[bsu]8") < 16  # V is turned by words, not by bytes


def test_probabilities_stay_in_registers():
    """On sm_90 P is operand A of its product, straight from the registers that it was quantized in."""
    binary = aot.compile_launch(launches("ViT", 90)[0], 90)
    held = re.findall(rf"{WGMMA_S8} \{{[^}}]*\}}, \{{%r\d+, ?%r\d+, ?%r\d+, ?%r\d+\}}", binary.ptx)
    assert len(held) > 0


def test_positions_lie_in_registers_as_scores_do():
    """The same instruction's accumulators, so that rows are summed up in the same order."""
    (launch,) = launches("positions", 90)
    binary = aot.compile_launch(launch, 90)
    assert binary.count(WGMMA_S8) > 0
    assert binary.shared <= 99 * 1024  # every GPU's


PER_GROUP = vk.ActQuant(scale=torch.ones(2), groups=2, lut=torch.empty(256, dtype=torch.int8))
# (keys, focus, with bias and mask, epilogue)
BRANCHES = {
    "table": (50, FocusSpec(bits=4, power=1.5, anchor="row"), True, vk.ActQuant(groups=2)),
    "table, floor": (300, FocusSpec(bits=6, b1=0.03, b2=0.7, power=3.0), True, None),
    "offset": (300, FocusSpec(bits=8, b1=0.01, b2=0.15, renormalize=True), False, PER_GROUP),
    "offset, mask": (50, FocusSpec(bits=8, b1=0.01, b2=0.15), True, PER_GROUP),
    "root": (50, FocusSpec(bits=4, b1=0.05, power=2.0, anchor="row"), False, None),
    "any power": (300, FocusSpec(bits=8, power=2.5), True, None),
}


@pytest.mark.parametrize("name", BRANCHES)
def test_every_branch_compiles(name):
    """What the interpreter does not see: types that change in a loop, layouts that do not convert."""
    keys, focus, additive, out = BRANCHES[name]
    with tuning.config(tuning.nearest(90, "", "attention", keys, 64)), host.recorded(run=False) as recorded:
        run(2, 2, keys, 40, focus, "per_head", additive=additive, out=out)[2]()
    assert [aot.compile_launch(launch, 90).stack for launch in recorded] == [0]


def test_specialization_ignores_the_batch():
    """Batches of other sizes are the same kernel."""
    sources = []
    for b in (4, 5, 64):
        with host.recorded(run=False) as recorded:
            run(b, 12, 197, 64, ROW8)[2]()
            run(b * 4, 4, 49, 32, ROW8, additive=True, windows=(4, 180))[2]()
        sources.append([aot.source(launch) for launch in recorded])
    for one, *others in zip(*sources):
        assert all((x.signature, x.constants, x.attrs) == (one.signature, one.constants, one.attrs) for x in others)
