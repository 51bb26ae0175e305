"""Bytes and operations of every kernel from its shapes, and its floor: the time that a GPU needs for them at least.

Inputs are read once and outputs written once, whatever a cache makes of it. Integer and 16-bit products take turns on
the tensor cores, so their times add up; exponentials have a unit of their own. Floor: the largest of memory, tensor
cores and exponentials. Benchmarks report this floor over the measured time; docs/gpu.md prints the same counts.
"""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Peaks:
    """What a GPU can do a second: bytes to and from memory, int8 and 16-bit operations, exponentials."""

    bandwidth: float
    int8: float
    half: float
    exp2: float


# Data sheet, but for the bandwidth: that of a copy. Exponentials: 16 a clock on each of 132 processors at 1.98 GHz.
H200 = Peaks(bandwidth=4.3e12, int8=1979e12, half=989e12, exp2=16 * 132 * 1.98e9)


@dataclass(frozen=True)
class Work:
    """One launch, or several in a row: ``a + b``."""

    bytes: int
    int8: int = 0
    half: int = 0
    exp2: int = 0

    def __add__(self, other: Work) -> Work:
        return Work(self.bytes + other.bytes, self.int8 + other.int8, self.half + other.half, self.exp2 + other.exp2)

    def times(self, peaks: Peaks) -> dict[str, float]:
        """Seconds on each unit."""
        return {
            "memory": self.bytes / peaks.bandwidth,
            "tensor cores": self.int8 / peaks.int8 + self.half / peaks.half,
            "exponentials": self.exp2 / peaks.exp2,
        }

    def floor(self, peaks: Peaks) -> float:
        """Seconds that no version runs faster than."""
        return max(self.times(peaks).values())

    def bound(self, peaks: Peaks) -> str:
        """The unit that the floor is."""
        times = self.times(peaks)
        return max(times, key=times.get)


def quantize(m: int, k: int, rank: int = 0, *, float_bytes: int = 2, dynamic: bool = True, subspace: bool = False,
             norm: bool = False) -> Work:  # fmt: skip
    """``quantize`` or, with ``norm``, ``layer_norm_quantize`` of [M, K]; lora_down in 16 bits, γ and β in float32."""
    scales = 4 * m if dynamic else 4
    read = m * k * float_bytes + 2 * rank * k + 2 * 4 * k * norm
    return Work(read + m * k + scales + 4 * m * rank, half=2 * m * k * rank * (1 + subspace))


def linear(m: int, n: int, k: int, rank: int = 0, *, bits: int = 8, out_bytes: int = 2, per_row: bool = True,
           bias_bytes: int = 4, residual_bytes: int = 0, rank_down: int = 0, norm: bool = False) -> Work:  # fmt: skip
    """``qlinear`` to [M, N] floats (``out_bytes`` of 2 or 4), or ``qlinear_quantize`` to codes (1).

    bits: of a weight as it lies in memory: 8, or 4 (K in runs of 128). rank: of the branch, t in float32 and lora_up in
    16 bits. rank_down: of the next layer's lora_down, computed on the way. norm: the LayerNorm of the result is
    quantized besides, which adds γ, β and the codes.
    """
    weight = n * k if bits == 8 else n * (-(-k // 128) * 64)
    scales = 4 * (m if per_row else 1) + 4 * n
    branch = 4 * m * rank + 2 * n * rank
    down = 2 * n * rank_down + 4 * m * rank_down
    down += (8 * n + m * n) * norm
    moved = m * k + weight + scales + branch + down + n * bias_bytes + m * n * (residual_bytes + out_bytes)
    return Work(moved, int8=2 * m * n * k, half=2 * m * n * (rank + rank_down))


def attention(b: int, h: int, n: int, d: int, *, out_bytes: int = 2, bias: bool = False, mask: int = 0) -> Work:
    """``qattention`` among N tokens; mask: its groups. Each probability takes one exponential."""
    added = 4 * (h * n * n * bias + mask * n * n)
    return Work(b * h * n * d * (3 + out_bytes) + added, int8=4 * b * h * n * n * d, exp2=b * h * n * n)


def float_linear(m: int, n: int, k: int, float_bytes: int = 2) -> Work:
    """The same layer in 16 bits: what the integer kernels are measured against."""
    return Work(float_bytes * (m * k + n * k + m * n + n), half=2 * m * n * k)


def block(tokens: int, images: int, width: int, heads: int, rank: int = 0, *, bits: int = 8) -> dict[str, Work]:
    """The six launches of a converted transformer block with static scales, and their work."""
    m, w, r = tokens * images, width, rank
    common = {"bits": bits, "per_row": False}
    return {
        "LayerNorm + quantize": quantize(m, w, r, dynamic=False, norm=True),
        "qkv": linear(m, 3 * w, w, r, out_bytes=1, **common),
        "attention": attention(images, heads, tokens, w // heads, out_bytes=1),
        "proj + residual + LayerNorm + quantize": linear(
            m, w, w, r, residual_bytes=2, rank_down=r, norm=True, **common
        ),
        "fc1 + GELU + quantize": linear(m, 4 * w, w, r, out_bytes=1, rank_down=r, **common),
        "fc2 + residual": linear(m, w, 4 * w, r, residual_bytes=2, **common),
    }
