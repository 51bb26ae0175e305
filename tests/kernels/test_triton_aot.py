"""Triton kernels compiled ahead of time for every GPU generation, without one: instructions, spills, registers, memory.

The launches are those that the ops themselves record for real ViT shapes under the shipped tables. Ceilings leave about
a tenth above what triton 3.6 and 3.9 were seen to need; a kernel that outgrows one loses a resident program per
processor or starts to spill, and that is a decision, not an accident.
"""

import re
from dataclasses import replace

import pytest
import torch

import vitq_kernels as vk
from vitq_kernels import tuning
from vitq_kernels.formats import FocusSpec
from vitq_kernels.ops.layer_norm_quantize import triton as layer_norm_quantize
from vitq_kernels.ops.learning import triton as learning
from vitq_kernels.ops.qlinear import triton as qlinear
from vitq_kernels.ops.quantize import triton as quantize
from vitq_kernels.packing import LAYOUT_IDS
from vitq_kernels.triton import aot, host

pytestmark = pytest.mark.skipif(host.INTERPRETED, reason="interpreted kernels are not compiled")

BF16, I8 = torch.bfloat16, torch.int8
MMA_S8 = r"mma\.sync\.aligned\.m16n8k32\.row\.col(\.satfinite)?\.s32\.s8\.s8\.s32"
WGMMA_S8 = r"wgmma\.mma_async\.sync\.aligned\.m64n\d+k32\.s32\.s8\.s8"
TCGEN05_I8 = r"tcgen05\.mma\.cta_group::\d\.kind::i8"  # triton ≥ 3.9; before, sm_100 takes mma.sync
S8 = {80: MMA_S8, 89: MMA_S8, 90: WGMMA_S8, 100: f"{TCGEN05_I8}|{MMA_S8}", 120: MMA_S8}
HALF = {
    80: r"mma\.sync\.aligned\.m16n8k16\.row\.col\.f32\.bf16",
    90: r"wgmma\.mma_async\.sync\.aligned\.m64n\d+k16\.f32\.bf16",
    100: r"tcgen05\.mma\.cta_group::\d\.kind::f16",
}
HALF |= {89: HALF[80], 120: HALF[80]}


def flat(a: vk.ActQuant) -> tuple:
    return (a.scale, a.zero_point, a.qmin, a.qmax, a.groups, a.row_qmax, a.lut, a.lora_down, a.subspace)


def rows(norm: bool, **quant):
    """(No table), the launches of a [6304, 768] quantizing pass."""
    x, gamma = torch.empty(6304, 768, dtype=BF16), torch.empty(768)

    def run():
        if norm:
            layer_norm_quantize.layer_norm_quantize(x, gamma, gamma, 1e-6, *flat(vk.ActQuant(**quant)), None, 0)
        else:
            quantize.quantize(x, *flat(vk.ActQuant(**quant)))

    return "w8", 6304, 768, run


def product(
    m, k, n, weight, quant=None, activation=0, residual=False, table=False, branch=BF16, rank=32, x=I8, norm=False
):
    """(kind, M, N), the launches of a product with a rank-32 branch, bias, and per-token scales."""
    packed = weight == "w4"
    data = torch.empty(n, k // 2, dtype=torch.uint8) if packed else torch.empty(n, k, dtype=I8)
    weights = (data, LAYOUT_IDS["int4_k64x2" if packed else "int8"], n, k)
    lut = torch.empty(16, dtype=I8) if table else None
    added = torch.empty(m, n, dtype=BF16) if residual else None
    tail = (lut, torch.empty(n), torch.empty(n), torch.empty(n, rank, dtype=branch), activation, None, added)
    codes, t = torch.empty(m, k, dtype=x), torch.empty(m, rank)

    def run():
        if x != I8:
            qlinear.qlinear_weight_only(codes, t, *weights, *tail, BF16)
            return
        common = (codes, torch.empty(m), 0, t, *weights, torch.empty(n, dtype=torch.int32), *tail)
        if norm:
            gamma = torch.empty(n)
            qlinear.qlinear_norm_quantize(*common, BF16, gamma, gamma, 1e-6, *flat(vk.ActQuant(**quant)))
        elif quant is None:
            qlinear.qlinear(*common, BF16)
        else:
            qlinear.qlinear_quantize(*common, *flat(vk.ActQuant(**quant)))

    return f"{weight}{'' if x == I8 else '_float'}", m, n, run


ONE = torch.ones(1)
DOWN = torch.empty(32, 768, dtype=BF16)
FC1 = {"scale": ONE, "lora_down": torch.empty(32, 3072, dtype=BF16)}
KERNELS = {
    "quantize, per token": rows(False),
    "LayerNorm, t": rows(True, lora_down=DOWN),
    "LayerNorm, subspace": rows(True, lora_down=DOWN, subspace=True),
    "w8, M=197": product(197, 768, 768, "w8"),
    "w8, residual": product(6304, 768, 768, "w8", residual=True),
    "w8, heads": product(6304, 768, 2304, "w8", quant={"groups": 36}),
    "w4, residual": product(6304, 3072, 768, "w4", residual=True),
    "w4, GELU, quantize, t": product(6304, 768, 3072, "w4", quant=FC1, activation=1),
    "w4, quantize, whole rows": product(6304, 768, 3072, "w4", quant={}),
    "w4, GELU, subspace": product(6304, 768, 3072, "w4", quant=FC1 | {"scale": None, "subspace": True}, activation=1),
    "w8, residual, norm": product(6304, 768, 768, "w8", quant={}, residual=True, norm=True),
    "w4, residual, norm, t": product(
        6304, 768, 768, "w4", quant={"scale": ONE, "lora_down": DOWN}, residual=True, norm=True
    ),
    "w8, M=197, norm": product(197, 768, 768, "w8", quant={"lora_down": DOWN, "subspace": True}, norm=True),
    "w4, table": product(1576, 768, 768, "w4", table=True),
    "w4, float32 branch": product(1576, 768, 768, "w4", branch=torch.float32),
    "w4a16": product(1576, 768, 768, "w4", x=BF16),
}
NONE = dict.fromkeys(S8)
# (kernel, its tensor-core instruction, {compute capability: (registers a thread, KB of shared memory)})
EXPECTED = [
    ("quantize, per token", NONE, {80: (72, 1), 90: (72, 1)}),
    ("LayerNorm, t", HALF | {90: HALF[80], 100: HALF[80]}, {80: (160, 32), 90: (160, 32)}),
    ("LayerNorm, subspace", HALF | {90: HALF[80], 100: HALF[80]}, {80: (144, 32), 90: (144, 32), 120: (144, 32)}),
    ("w8, M=197", S8, {80: (144, 32), 90: (112, 64), 120: (144, 32)}),
    ("w8, residual", S8, {80: (200, 72), 89: (200, 72), 90: (192, 128), 100: (208, 129)}),
    ("w8, heads", S8, {80: (200, 72), 90: (192, 128)}),
    ("w4, residual", S8, {80: (200, 48), 89: (200, 48), 90: (200, 88), 100: (208, 89), 120: (200, 48)}),
    ("w4, GELU, quantize, t", S8, {80: (255, 48), 90: (232, 88), 100: (248, 89)}),  # sm_80: 254 with 3.6, 168 with 3.9
    ("w4, quantize, whole rows", S8, {80: (184, 48), 90: (168, 88)}),
    ("w4, GELU, subspace", S8, {90: (168, 88), 100: (240, 89)}),
    ("w8, residual, norm", S8, {80: (200, 72), 90: (192, 128)}),
    ("w4, residual, norm, t", S8, {80: (184, 48), 90: (208, 88), 100: (224, 89), 120: (200, 48)}),
    ("w8, M=197, norm", S8, {90: (192, 64)}),
    ("w4, table", S8, {80: (232, 48), 90: (184, 72)}),
    ("w4, float32 branch", S8, {80: (248, 48), 90: (216, 72)}),
    ("w4a16", HALF, {80: (144, 32), 90: (224, 48), 100: (168, 48)}),
]
CASES = [
    pytest.param(name, cc, instruction[cc], *ceiling, id=f"{name}-sm_{cc}")
    for name, instruction, ceilings in EXPECTED
    for cc, ceiling in ceilings.items()
]


def launches(name: str, capability: int) -> list[host.Launch]:
    kind, m, n, run = KERNELS[name]
    with tuning.config(tuning.nearest(capability, "", kind, m, n)), host.recorded(run=False) as recorded:
        run()
    return recorded


@pytest.mark.parametrize(("name", "capability", "instruction", "registers", "kilobytes"), CASES)
def test_compiled_kernels(name, capability, instruction, registers, kilobytes):
    binary = aot.compile_launch(launches(name, capability)[0], capability)
    assert binary.stack == 0
    assert binary.local == 0
    assert binary.registers <= registers
    assert binary.shared <= kilobytes * 1024
    if instruction is not None:
        assert binary.count(instruction) > 0
    # a·b + c is contracted only where the source says so: see device.py
    assert binary.count(r"\bfma\.") == binary.count(r"\bfma\.rn") <= 512
    if "GELU" not in name:
        assert binary.count(r"\bfma\.") == 0


def wide(**quant):
    """LayerNorm and quantization of rows with two strides, in float16."""
    x = torch.empty(8, 198, 768, dtype=torch.float16)[:, 1:]
    layer_norm_quantize.layer_norm_quantize(x, None, None, 1e-6, *flat(vk.ActQuant(**quant)), None, 0)


def windows(**quant):
    """LayerNorm and quantization of 28² tokens into windows, as Swin's second stage."""
    x, gamma = torch.empty(8, 28, 28, 192, dtype=BF16), torch.empty(192)
    gather = torch.empty(784, dtype=torch.int32)
    layer_norm_quantize.layer_norm_quantize(x, gamma, gamma, 1e-6, *flat(vk.ActQuant(**quant)), gather, 784)


TABLE, BITS = torch.empty(256, dtype=I8), torch.empty(6304, dtype=torch.int32)
PER_ROW = torch.empty(6304, 3)
BRANCHES = {
    "quantize, groups, row_qmax, table": rows(False, groups=3, row_qmax=BITS, lut=TABLE)[3],
    "quantize, scales per row": rows(False, groups=3, scale=PER_ROW, zero_point=3)[3],
    "LayerNorm, groups": rows(True, groups=3, scale=ONE.expand(3).contiguous())[3],
    "LayerNorm, groups, t, subspace": rows(True, groups=3, lora_down=DOWN.float(), subspace=True)[3],
    "two strides": wide,
    "two strides, t": lambda: wide(lora_down=DOWN.half()),
    "LayerNorm into windows": windows,
    "LayerNorm into windows, t, subspace": lambda: windows(lora_down=DOWN[:, :192].contiguous(), subspace=True),
    "product, scales per group": product(6304, 768, 768, "w8", quant={"groups": 3, "scale": PER_ROW[0]})[3],
    "product, scales per row and group": product(6304, 768, 768, "w8", quant={"groups": 3, "scale": PER_ROW})[3],
    "product, table, row_qmax": product(6304, 768, 768, "w4", quant={"scale": ONE, "lut": TABLE, "row_qmax": BITS})[3],
    "product, whole row": product(6304, 768, 192, "w4", quant={"lora_down": DOWN[:, :192].contiguous()})[3],
    "product of odd sizes": product(37, 70, 51, "w8", activation=2, rank=3)[3],
    "floats of odd sizes": product(37, 70, 51, "w8", table=True, x=torch.float32)[3],
}


@pytest.mark.parametrize("name", BRANCHES)
def test_every_branch_compiles(name):
    """What the interpreter does not see: types that change in a loop, layouts that do not convert."""
    tiles = tuning.nearest(90, "", "w4", 1576, 768)
    with tuning.config(tiles), host.recorded(run=False) as recorded:
        BRANCHES[name]()
    assert [aot.compile_launch(launch, 90).stack for launch in recorded] == [0] * len(recorded)


def learned(bits, **focus):
    """A ViT-S block's quantizers as they are learned, 24 images at a time."""

    def run():
        qmax = (1 << bits - 1) - 1
        x, one, u = torch.empty(4728, 1536), torch.ones(1), torch.empty(24 * 6 * 197, 197)
        quantizer = (x, one, one, -qmax, qmax, None, TABLE, 5 << 40, 7)
        learning.fake_quantize(*quantizer)
        learning.fake_quantize_backward(x, *quantizer)
        spec = FocusSpec(4, 0.01, 0.5, **focus)
        by = (0.01, 0.5, spec.power, spec.anchor == "row", torch.empty(3, 16), 5 if spec.affine else None, 7)
        learning.focused_softmax(u, *by)
        learning.focused_softmax_backward(u, u[:, 0].contiguous(), u, *by)
        learning.mix(x, x, 5, 7)
        rounding = (x, x, torch.empty(4728), -qmax, qmax)
        learning.soft_round(*rounding)
        learning.soft_round_backward(x, *rounding)
        learning.rounding_penalty(x, 3.0)
        learning.rounding_penalty_backward(x[:, 0].contiguous(), x, 3.0)

    return run


@pytest.mark.parametrize("capability", [80, 90])
@pytest.mark.parametrize(("bits", "focus"), [(4, {}), (2, {"power": 2.0, "anchor": "row"}), (8, {"power": 3.0})])
def test_learning_kernels(bits, focus, capability):
    """Bound by memory: at 72 registers a thread a processor holds 28 warps of them.

    Of 2 bits the largest code is 1, which Triton makes a constant of where it is an integer.
    """
    with host.recorded(run=False) as recorded:
        learned(bits, **focus)()
    assert len(recorded) == 9
    for launch in recorded:
        binary = aot.compile_launch(launch, capability)
        assert binary.stack == 0
        assert binary.registers <= 72


def test_unpacked_weights_stay_in_registers():
    """On sm_90 the 4-bit weights are operand A, straight from the registers they were unpacked in."""
    binary = aot.compile_launch(launches("w4, residual", 90)[0], 90)
    from_registers = re.findall(rf"{WGMMA_S8} \{{[^}}]*\}}, \{{%r\d+, ?%r\d+, ?%r\d+, ?%r\d+\}}", binary.ptx)
    assert len(from_registers) == binary.count(WGMMA_S8) > 0


def order_of_finishing(ptx: str) -> str:
    """What orders memory, from the tile's last store to the first load of what other programs stored: a letter each.

    s store, l load, b barrier of the program, A atomic that acquires and releases, a load that acquires.
    """
    letters = {
        "A": r"atom\.global\.gpu\.acq_rel",
        "a": r"ld\.global\.gpu\.acquire|ld\.acquire\.gpu|atom\.global\.gpu\.acquire",
        "b": r"bar\.sync",
        "s": r"st\.global",
        "l": r"ld\.global\.(?!gpu)|cp\.async\.\w+\.shared",
    }
    found = re.finditer("|".join(f"(?P<{letter}>{pattern})" for letter, pattern in letters.items()), ptx)
    return "".join(match.lastgroup for match in found)


ORDERED = re.compile(r"sb+Ab+ab[^l]*l")
"""All stores, a barrier, count up, a barrier (the count is broadcast); the looks of those who wait; only then loads."""


@pytest.mark.parametrize("name", ["w4, GELU, quantize, t", "w8, residual, norm"])
def test_rows_are_finished_after_everybody_has_stored(name):
    (launch,) = launches(name, 90)
    ptx = aot.compile_launch(launch, 90).ptx
    order = order_of_finishing(ptx)
    assert order.count("A") == 2  # arriving and leaving
    tail = order[order.rindex("s", 0, order.index("A")) :]
    assert ORDERED.match(tail), tail
    without = order_of_finishing(ptx.replace("bar.sync", "nop"))
    assert not ORDERED.match(without[without.rindex("s", 0, without.index("A")) :])


def test_spills_would_be_found():
    """A tile that cannot fit the register file shows in ``stack``."""
    launch = launches("w8, residual", 80)[0]
    names = launch.kernel.arg_names
    arguments = list(launch.arguments)
    arguments[names.index("BLOCK_N")] = 256
    spilled = aot.compile_launch(replace(launch, arguments=tuple(arguments), options={"num_warps": 4}), 80)
    assert spilled.stack > 0


def test_specialization_follows_the_arguments():
    launch = launches("w8, M=197", 90)[0]
    source = aot.source(launch)
    built = aot.build(launch, 90).src
    assert (source.signature, source.constants, source.attrs) == (built.signature, built.constants, built.attrs)
    index = {name: (i,) for i, name in enumerate(launch.kernel.arg_names)}
    assert source.signature["x"] == "*i8"
    assert source.signature["residual"] == "constexpr"
    assert source.constants[index["residual"]] is None
    assert source.constants[index["groups"]] == 1
    assert source.signature["zero_point"] == "i32"
    assert source.attrs[index["x"]] == source.attrs[index["K"]] == [["tt.divisibility", 16]]
    assert not source.attrs.get(index["M"])
