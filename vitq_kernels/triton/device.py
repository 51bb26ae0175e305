"""Functions that run inside Triton kernels. Formulas and constants are those of the C++ kernels (``csrc/common``).

Two rules keep results equal on every GPU and in the interpreter:

* Kernels are compiled without contraction of ``a·b + c`` (see ``host.launch``); where one rounding is wanted,
  ``tl.fma`` says so. Otherwise x·(1/scale) would round differently than in the oracle, and codes would differ at ties.
* Division that the contract rounds once is ``tl.div_rn``; a plain ``/`` is two units in the last place off.
"""

from __future__ import annotations

import triton
import triton.language as tl

INTERPRET = tl.constexpr(bool(triton.knobs.runtime.interpret))
"""True where kernels run on the CPU under TRITON_INTERPRET=1; fixed when Triton decorates them."""


@triton.jit
def narrow(x, DTYPE: tl.constexpr):
    """x rounded to nearest-even in DTYPE."""
    if INTERPRET and DTYPE == tl.bfloat16:  # noqa: SIM300 (capitals are parameters here, not constants)
        # The interpreter truncates: add what rounds to even first.
        bits = x.to(tl.float32).to(tl.uint32, bitcast=True)
        rounded = (bits + 0x7FFF + ((bits >> 16) & 1)) & 0xFFFF0000
        return tl.where(x == x, rounded, 0x7FC00000).to(tl.uint32).to(tl.float32, bitcast=True).to(tl.bfloat16)
    else:
        return x.to(DTYPE)


@triton.jit
def branch_value(x, DTYPE: tl.constexpr):
    """x in the side branch's dtype. float16 saturates: a rare huge value is then off by what it exceeds 65504 by, where
    an Inf would take its whole row along."""
    if DTYPE == tl.float16 and x.dtype == tl.float32:  # noqa: SIM300
        x = tl.clamp(x, -65504.0, 65504.0, propagate_nan=tl.PropagateNan.ALL)
    return narrow(x, DTYPE)


@triton.jit
def dot_operand(x, DTYPE: tl.constexpr):
    """x in the side branch's dtype, as ``float_dot`` takes it."""
    x = branch_value(x, DTYPE)
    if INTERPRET:
        x = x.to(tl.float32)  # the interpreter's bfloat16 product is meaningless; float32 products are exact
    return x


@triton.jit
def float_dot(a, b, acc):
    """acc + a·b with float32 sums. Operands of 16 bits multiply exactly; float32 ones as three TF32 products (the error
    per product is below 2^-21), because one TF32 product would keep 10 bits."""
    return tl.dot(a, b, acc, input_precision="tf32x3")


@triton.jit
def round_half_even(x):
    """rne(x) for |x| < 2^22: adding 1.5·2^23 leaves no fraction bits."""
    return (x + 12582912.0) - 12582912.0


@triton.jit
def magnitude(x):
    """|x|, with Inf for NaN: a maximum over it cannot lose the NaN."""
    return tl.where(x == x, tl.abs(x), float("inf"))


@triton.jit
def dynamic_scale(absmax, top):
    """absmax/top rounded once; 1 for a row of zeros (or one that underflows), NaN for a row with NaN or Inf."""
    scale = tl.div_rn(absmax, top)
    scale = tl.where(scale == 0.0, 1.0, scale)
    return tl.where(scale < float("inf"), scale, float("nan"))


@triton.jit
def encode(x, inverse, low, high, zero_point, lut):
    """int8 lut[clamp(rne(x·inverse), low, high) + zero_point]; NaN becomes the code of 0. lut may be None."""
    x = x * inverse
    x = tl.where(x == x, x, 0.0)
    # Clamping to integers first commutes with rounding and keeps the conversion in range.
    code = round_half_even(tl.minimum(tl.maximum(x, low), high)).to(tl.int32) + zero_point
    if lut is not None:
        return tl.load(lut + (code + 128))
    else:
        return code.to(tl.int8)


@triton.jit
def gelu_by_odds(x, a, log2_odds):
    """max(x, 0) − a·e/(1 + e), a = |x| at most 12.5, log₂ e as given (see csrc/common/gpu/float_math.cuh)."""
    odds = tl.exp2(log2_odds)
    # Not tl.maximum: NaN comes from a.
    return tl.fma(-a, odds / (1.0 + odds), tl.where(x > 0.0, x, 0.0))


@triton.jit
def gelu_erf(x):
    """x·Φ(x) by the odds of Φ(−|x|), whose logarithm is fitted: no cancellation, errors in the small term only."""
    a = tl.minimum(tl.abs(x), 12.5, propagate_nan=tl.PropagateNan.ALL)
    s = a * a
    p = tl.fma(s, -5.06723618e-9, 3.81631274e-7)
    p = tl.fma(p, s, -1.14398335e-5)
    p = tl.fma(p, s, 1.59579939e-4)
    p = tl.fma(p, s, 9.40492289e-5)
    p = tl.fma(p, s, -0.104835122)
    p = tl.fma(p, s, -2.3022093)
    return gelu_by_odds(x, a, a * p)


@triton.jit
def gelu_tanh(x):
    """x/(1 + e^(−2u)), u = √(2/π)·(x + 0.044715·x³): tanh without its cancellation."""
    a = tl.minimum(tl.abs(x), 12.5, propagate_nan=tl.PropagateNan.ALL)
    return gelu_by_odds(x, a, a * tl.fma(a * a, -0.102943240, -2.30220818))


@triton.jit
def activate(x, ACTIVATION: tl.constexpr):
    """The activation by its schema number: none, gelu_erf, gelu_tanh."""
    if ACTIVATION == 1:
        return gelu_erf(x)
    elif ACTIVATION == 2:
        return gelu_tanh(x)
    else:
        return x


@triton.jit
def load_float(pointer, mask):
    """float32 of what is at ``pointer``; 0 where masked."""
    return tl.load(pointer, mask=mask, other=0.0).to(tl.float32)


@triton.jit
def static_inverse(scale, offset, mask):
    """1/scale, rounded once."""
    return tl.div_rn(1.0, tl.load(scale + offset, mask=mask, other=1.0))


# Four bytes of packed weights at a time: instruction counts are for eight codes. Operands are $0 and $1 (out: the low
# and the high nibbles, one per byte), $2 (in: four packed bytes), $3 to $18 (in: the table's four words, four times
# each, since an int32 operand has one register per element).
UNPACK = tl.constexpr("""{
.reg .b32 low;
shl.b32 low, $2, 4;
lop3.b32 $0, low, 0xf0f0f0f0, 0x80808080, 0x6a;
lop3.b32 $1, $2, 0xf0f0f0f0, 0x80808080, 0x6a;
}""")
"""16·(nibble − 8) per byte: (x & 0xf0) ^ 0x80. The nibble itself would take three times the instructions."""

UNPACK_TABLE = tl.constexpr("""{
.reg .b32 index, half, a, b, even, odd;
and.b32 index, $2, 0x77777777;
shr.u32 half, $2, 1;
and.b32 half, half, 0x44444444;
or.b32 half, half, 0x32103210;
prmt.b32 a, $3, $7, index;
prmt.b32 b, $11, $15, index;
prmt.b32 even, a, b, half;
shr.u32 index, index, 16;
shr.u32 half, half, 16;
prmt.b32 a, $3, $7, index;
prmt.b32 b, $11, $15, index;
prmt.b32 odd, a, b, half;
prmt.b32 $0, even, odd, 0x6420;
prmt.b32 $1, even, odd, 0x7531;
}""")
"""Table entry of every nibble: its low three bits pick from either half of the table, its top bit picks the half."""


@triton.jit
def unpack_int4(packed, table):
    """uint8 [n, j] → int8 of its low and of its high nibbles: 16·(nibble − 8), or table[nibble] ([16] int8).

    Layout ``int4_k64x2``: in a run of 64 bytes they are k..k+63 and k+64..k+127.
    """
    if INTERPRET:
        low, high = packed & 15, packed >> 4
        if table is None:
            return ((low.to(tl.int32) - 8) * 16).to(tl.int8), ((high.to(tl.int32) - 8) * 16).to(tl.int8)
        else:
            return tl.load(table + low.to(tl.int32)), tl.load(table + high.to(tl.int32))
    elif table is None:
        return tl.inline_asm_elementwise(UNPACK, "=&r,=&r,r", [packed], dtype=(tl.int8, tl.int8), is_pure=True, pack=4)
    else:
        words = table.to(tl.pointer_type(tl.int32))
        return tl.inline_asm_elementwise(
            UNPACK_TABLE,
            "=&r,=&r,r,r,r,r,r,r,r,r,r,r,r,r,r,r,r,r,r",
            [packed, tl.load(words), tl.load(words + 1), tl.load(words + 2), tl.load(words + 3)],
            dtype=(tl.int8, tl.int8),
            is_pure=True,
            pack=4,
        )
