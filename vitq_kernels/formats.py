"""The formats of the package: what a code means, and nothing else.

Everything that quantizes, packs, calibrates or multiplies refers to these frozen dataclasses; there is no
second description of a format anywhere. Conventions:

* ``x ≈ (q − zero_point) · scale``; rounding is half-to-even, then clamp to ``[qmin, qmax]``.
* Codes are stored as int8. An asymmetric b-bit code is stored shifted, in ``[−2^(b−1), 2^(b−1)−1]``, with its
  zero_point in the same shifted units, so that kernels only ever multiply signed by signed.
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass, replace
from itertools import pairwise
from typing import Literal

import torch
from torch import Tensor

Granularity = Literal["per_tensor", "per_token", "per_channel", "per_head"]
ScaleRule = Literal["absmax_qmax", "absmax_half_range"]


def _one_of(name: str, value: object, allowed: Iterable[object]) -> None:
    allowed = tuple(allowed)
    if value not in allowed:
        raise ValueError(f"{name} is {value!r}, expected one of {', '.join(map(repr, allowed))}")


def _int_in(name: str, value: object, low: int, high: int) -> None:
    if isinstance(value, bool) or not isinstance(value, int):
        raise TypeError(f"{name} is {value!r} ({type(value).__name__}), expected an int in [{low}, {high}]")
    if not low <= value <= high:
        raise ValueError(f"{name} is {value}, expected an int in [{low}, {high}]")


@dataclass(frozen=True)
class LevelTable:
    """A k-bit operand whose 2^k levels are any strictly increasing points of the int8 grid.

    Args:
        levels: 2 to 256 strictly increasing ints in [−128, 127]; their number is a power of two.

    A value is first rounded to the 8-bit grid, then moved to the nearest level (ties towards zero). Uniform,
    log2, twin-uniform and learned quantizers are all such tables, at the price of the uniform one wherever the
    hardware multiplies int8 anyway.
    """

    levels: tuple[int, ...]

    def __post_init__(self) -> None:
        for v in self.levels:
            if isinstance(v, bool) or v != int(v):
                raise TypeError(f"levels has {v!r} ({type(v).__name__}), expected ints")
        levels = tuple(int(v) for v in self.levels)
        object.__setattr__(self, "levels", levels)
        n = len(levels)
        if n < 2 or n > 256 or n & (n - 1):
            raise ValueError(f"levels has {n} entries, expected a power of two in [2, 256]")
        if any(b <= a for a, b in pairwise(levels)):
            raise ValueError(f"levels is {levels}, expected strictly increasing ints")
        if levels[0] < -128 or levels[-1] > 127:
            raise ValueError(f"levels spans [{levels[0]}, {levels[-1]}], expected a subset of [-128, 127]")

    @property
    def bits(self) -> int:
        return len(self.levels).bit_length() - 1

    def indices(self) -> Tensor:
        """[256] uint8: index of the level nearest to each grid code −128..127 (ties towards zero)."""
        grid = torch.arange(-128, 128, device="cpu").unsqueeze(1)
        levels = torch.tensor(self.levels, device="cpu")
        # The second term breaks ties towards zero without touching any non-tie (distances are integers).
        cost = (grid - levels).abs() * 512 + levels.abs()
        return cost.argmin(dim=1).to(torch.uint8)

    def lut(self) -> Tensor:
        """[256] int8: the level nearest to each grid code; entry ``q + 128`` serves code ``q``."""
        return torch.tensor(self.levels, device="cpu")[self.indices().long()].to(torch.int8)


@dataclass(frozen=True)
class QuantSpec:
    """How one operand is quantized.

    Args:
        bits: 2..8. With a ``table``, the table's bits.
        symmetric: zero_point is 0 and the code range is ±qmax.
        granularity: what shares one scale. Weights: per_channel. Activations: per_tensor, per_token, per_head.
        dynamic: scales are taken from the data at run time (activations only; always symmetric).
        scale_rule: ``absmax_qmax``: codes ±(2^(b−1)−1), scale absmax/(2^(b−1)−1);
            ``absmax_half_range``: codes [−2^(b−1), 2^(b−1)−1], scale absmax/((qmax−qmin)/2). The field uses both;
            they are 7 % apart at 4 bits.
        table: levels on the int8 grid; codes and scale then are those of the 8-bit grid.
    """

    bits: int = 8
    symmetric: bool = True
    granularity: Granularity = "per_tensor"
    dynamic: bool = False
    scale_rule: ScaleRule = "absmax_qmax"
    table: LevelTable | None = None

    def __post_init__(self) -> None:
        _int_in("bits", self.bits, 2, 8)
        _one_of("granularity", self.granularity, ("per_tensor", "per_token", "per_channel", "per_head"))
        _one_of("scale_rule", self.scale_rule, ("absmax_qmax", "absmax_half_range"))
        if self.dynamic and not self.symmetric:
            raise ValueError("symmetric is False with dynamic=True, expected dynamic scales to be symmetric")
        if self.dynamic and self.scale_rule != "absmax_qmax":
            raise ValueError(f"scale_rule is {self.scale_rule!r} with dynamic=True, expected 'absmax_qmax'")
        if self.granularity == "per_token" and not self.dynamic:
            raise ValueError("granularity is 'per_token' with dynamic=False, expected dynamic=True")
        if self.table is not None and self.table.bits != self.bits:
            raise ValueError(f"table has {self.table.bits} bits, expected bits={self.bits}")

    @property
    def grid_bits(self) -> int:
        """Width of the grid that the codes live on: 8 under a table, otherwise ``bits``."""
        return 8 if self.table is not None else self.bits

    @property
    def qmin(self) -> int:
        half = 1 << (self.grid_bits - 1)
        restricted = self.symmetric and self.scale_rule == "absmax_qmax"
        return -(half - 1) if restricted else -half

    @property
    def qmax(self) -> int:
        return (1 << (self.grid_bits - 1)) - 1

    @property
    def scale_divisor(self) -> float:
        """absmax / scale_divisor is the symmetric scale under the spec's rule."""
        return float(self.qmax) if self.scale_rule == "absmax_qmax" else (self.qmax - self.qmin) / 2


@dataclass(frozen=True)
class FocusSpec:
    """Dynamic-focusing quantizer (DFQ) of post-softmax probabilities: 2^k levels focused on [b1, b2].

    Level of code c: ``b1 + (b2 − b1)·(c/n)^power``, ``n = 2^bits − 1``; values outside [b1, b2] are clamped.

    Args:
        bits: 2..8.
        b1, b2: the interval, 0 ≤ b1 < b2 ≤ 1.
        power: ≥ 1; above 1 resolution moves towards small probabilities.
        anchor: ``absolute``: the interval is in probabilities. ``row``: in units of the row's largest one,
            u = p / max p = exp(s − max s); the row's scale goes into its normalizer.
        below: what code 0 decodes to: ``floor`` b1, ``zero`` nothing.
        renormalize: divide by the row sum of the decoded levels, so that each row sums to one again.
        grid: top of the unsigned integer grid that non-affine levels are snapped to (1..255).

    Source: AIQViT (arXiv 2502.04628) for the absolute uniform form (``power=1, anchor="absolute"``), whose decode
    of code 0 the paper leaves open; powers, row anchors and renormalization are this package's additions.
    """

    bits: int = 8
    b1: float = 0.0
    b2: float = 1.0
    power: float = 1.0
    anchor: Literal["absolute", "row"] = "absolute"
    below: Literal["floor", "zero"] = "floor"
    renormalize: bool = False
    grid: int = 255

    def __post_init__(self) -> None:
        _int_in("bits", self.bits, 2, 8)
        _int_in("grid", self.grid, 1, 255)
        _one_of("anchor", self.anchor, ("absolute", "row"))
        _one_of("below", self.below, ("floor", "zero"))
        if not (0.0 <= self.b1 < self.b2 <= 1.0):
            raise ValueError(f"(b1, b2) is ({self.b1}, {self.b2}), expected 0 <= b1 < b2 <= 1")
        if not (math.isfinite(self.power) and self.power >= 1.0):
            raise ValueError(f"power is {self.power}, expected a finite number >= 1")

    @property
    def n(self) -> int:
        """The largest code, 2^bits − 1."""
        return (1 << self.bits) - 1

    @property
    def affine(self) -> bool:
        """True where the codes themselves are the integer levels (uniform, floor): no snapping at all."""
        return self.power == 1.0 and (self.below == "floor" or self.b1 == 0.0)

    @property
    def step_offset(self) -> tuple[float, float]:
        """(step, offset) of :meth:`decode`."""
        return ((self.b2 - self.b1) / self.n, self.b1) if self.affine else (self.b2 / self.grid, 0.0)

    def decode(self) -> tuple[Tensor, float, float]:
        """Integer levels, step and offset: code c decodes to ``levels[c] · step + offset``.

        Returns:
            levels ([2^bits] int32, in [0, 255]), step (float), offset (float). Affine specs use their codes as levels;
            all others are snapped to ``grid`` steps of ``b2/grid``, offset 0.
        """
        code = torch.arange(self.n + 1, dtype=torch.float64, device="cpu")
        step, offset = self.step_offset
        if self.affine:
            return code.to(torch.int32), step, offset
        level = self.b1 + (self.b2 - self.b1) * (code / self.n) ** self.power
        levels = torch.round(level / step).clamp(0, self.grid).to(torch.int32)
        if self.below == "zero":
            levels[0] = 0
        return levels, step, offset


@dataclass(frozen=True)
class PackedWeight:
    """A weight matrix of codes in one run-time layout (see ``packing``).

    Args:
        data: the packed bytes (int8 or uint8, 1-D or 2-D as the layout says).
        layout: a name from ``packing.LAYOUTS``.
        bits: 2..8, the true width.
        n, k: out and in features.
        col_sum: [N] int32, Σ_k code[n, k] of the *decoded* codes: it takes activation zero points out exactly.
        table: the weight's levels where codes are table indices, else None.
        lut: [16] int8, what each nibble of a 4-bit layout with a table decodes to; None for every other weight.
    """

    data: Tensor
    layout: str
    bits: int
    n: int
    k: int
    col_sum: Tensor
    table: LevelTable | None = None
    lut: Tensor | None = None

    @property
    def nbytes(self) -> int:
        return self.data.numel() * self.data.element_size()


@dataclass(frozen=True)
class QTensor:
    """Quantized activations on their way to the next integer kernel.

    Args:
        q: [..., K] int8 codes.
        scale: [G] static or [M, G] dynamic float32, M the number of rows (product of the leading dims), G the
            number of equal column groups (1 unless produced for attention).
        zero_point: int, in code units.
        t: [M, R] low-rank activations ``x · lora_downᵀ``, or None.
    """

    q: Tensor
    scale: Tensor
    zero_point: int = 0
    t: Tensor | None = None


@dataclass(frozen=True)
class ActQuant:
    """Run-time parameters of a quantizing epilogue: everything a kernel needs to turn floats into a QTensor.

    Args:
        qmin, qmax: the clamp range in code units, within [−128, 127].
        scale: static scale(s): float32 [G], or [M, G] for per-row static scales; None takes dynamic ones,
            absmax/qmax per row and column group.
        zero_point: int; 0 for dynamic.
        groups: G, the number of equal column groups that have scales of their own (query, key, value heads).
        row_qmax: int32 [M], symmetric code range of each row (token-wise bit-widths), else None.
        lut: int8 [256] snap map of a ``LevelTable`` (entry q + 128), else None.
        lora_down: float [R, K], the low-rank directions: t = x · lora_downᵀ, else None.
        subspace: subtract ``t · lora_down`` from x before quantizing (rows of lora_down orthonormal).
    """

    qmin: int = -127
    qmax: int = 127
    scale: Tensor | None = None
    zero_point: int = 0
    groups: int = 1
    row_qmax: Tensor | None = None
    lut: Tensor | None = None
    lora_down: Tensor | None = None
    subspace: bool = False

    def __post_init__(self) -> None:
        _int_in("qmin", self.qmin, -128, 0)
        _int_in("qmax", self.qmax, 1, 127)
        _int_in("groups", self.groups, 1, 1 << 20)
        if self.scale is None and self.zero_point != 0:
            raise ValueError(f"zero_point is {self.zero_point} with dynamic scales, expected 0")
        if self.row_qmax is not None and self.zero_point != 0:
            raise ValueError(f"zero_point is {self.zero_point} with row_qmax, expected 0 (symmetric)")
        if self.subspace and self.lora_down is None:
            raise ValueError("subspace is True without lora_down, expected lora_down [R, K]")

    @classmethod
    def from_spec(cls, spec: QuantSpec, scale: Tensor | None = None, zero_point: int = 0, **kw) -> ActQuant:
        """The run-time form of ``spec`` with calibrated ``scale`` and ``zero_point`` (static) or none (dynamic)."""
        if spec.dynamic and scale is not None:
            raise ValueError("scale is given for a dynamic spec, expected None")
        if not spec.dynamic and scale is None:
            raise ValueError("scale is None for a static spec, expected a float32 tensor")
        lut = None if spec.table is None else spec.table.lut()
        return cls(qmin=spec.qmin, qmax=spec.qmax, scale=scale, zero_point=zero_point, lut=lut, **kw)

    def to(self, device: torch.device | str) -> ActQuant:
        move = {
            f: getattr(self, f).to(device)
            for f in ("scale", "row_qmax", "lut", "lora_down")
            if getattr(self, f) is not None
        }
        return replace(self, **move)


@dataclass(frozen=True)
class TokenBits:
    """Token-wise activation bits that one attention decides: its most attended patches keep their layers' own bits.

    Args:
        share: r in [0, 1]: of P patches ⌊r·P + ½⌋ keep their bits (the earlier one of equal scores).
        low: 2..8, the bits of all other patches, where a layer's own are not fewer still.
        prefix: leading tokens that are no patches; they keep their bits.
        class_token: score the attention of the first token; without one, the mean over all queries.
        rank_by: ``attention``, or a control: ``inverted`` keeps the least attended, ``random`` ranks by a hash of
            score and ``seed``.

    Source: PMQ (arXiv 2305.06559), reconstructed from its abstract.
    """

    share: float
    low: int
    prefix: int = 0
    class_token: bool = False
    rank_by: Literal["attention", "inverted", "random"] = "attention"
    seed: int = 0

    def __post_init__(self) -> None:
        if not 0.0 <= self.share <= 1.0:
            raise ValueError(f"share is {self.share}, expected a number in [0, 1]")
        _int_in("low", self.low, 2, 8)
        _int_in("prefix", self.prefix, 0, 1 << 16)
        _int_in("seed", self.seed, 0, (1 << 31) - 1)
        _one_of("rank_by", self.rank_by, ("attention", "inverted", "random"))

    def kept(self, patches: int) -> int:
        """How many of ``patches`` keep their bits."""
        return int(self.share * patches + 0.5)


@dataclass(frozen=True)
class LowRankSpec:
    """The low-rank branch of one linear layer.

    Args:
        rank: R ≥ 0 (0 is no branch).
        kind: ``merged``: folded into the weight before it is quantized (free at run time);
            ``error``: y += (x·Dᵀ)·Uᵀ beside the integer product of Q(x);
            ``subspace``: the same with D orthonormal and Q(x − (x·Dᵀ)·D), so that U carries W·Dᵀ.
    """

    rank: int = 0
    kind: Literal["merged", "error", "subspace"] = "error"

    def __post_init__(self) -> None:
        _int_in("rank", self.rank, 0, 4096)
        _one_of("kind", self.kind, ("merged", "error", "subspace"))


@dataclass(frozen=True)
class LinearState:
    """Everything a quantized linear layer is: what calibration hands over, checkpoints store and modules run.

    Args:
        codes: [N, K] int8 weight codes (the levels themselves where ``weight.table`` is set).
        weight_scale: [N] float32.
        weight: QuantSpec of the weight (symmetric, per_channel).
        bias: [N] float32, or None.
        act: QuantSpec of the input, or None for weight-only layers.
        act_scale: [1] float32 for a static ``act``, else None.
        act_zero_point: int in code units (0 unless ``act`` is asymmetric).
        lora: the low-rank branch; ``merged`` branches are inside ``codes`` already.
        lora_down: [R, K] float16, lora_up: [N, R] float16; None without a side branch. Tensor cores multiply them as
            they are; kernels on the CPU get the same values in float32.
    """

    codes: Tensor
    weight_scale: Tensor
    weight: QuantSpec
    bias: Tensor | None = None
    act: QuantSpec | None = None
    act_scale: Tensor | None = None
    act_zero_point: int = 0
    lora: LowRankSpec = LowRankSpec()
    lora_down: Tensor | None = None
    lora_up: Tensor | None = None

    def __post_init__(self) -> None:
        if self.codes.dtype != torch.int8:
            raise TypeError(f"codes has dtype {self.codes.dtype}, expected torch.int8")
        if self.codes.dim() != 2:
            raise ValueError(f"codes has shape {tuple(self.codes.shape)}, expected [N, K]")
        n, k = self.codes.shape
        if tuple(self.weight_scale.shape) != (n,):
            raise ValueError(f"weight_scale has shape {tuple(self.weight_scale.shape)}, expected ({n},)")
        if self.bias is not None and tuple(self.bias.shape) != (n,):
            raise ValueError(f"bias has shape {tuple(self.bias.shape)}, expected ({n},)")
        if not self.weight.symmetric:
            raise ValueError("weight is asymmetric, expected a symmetric QuantSpec")
        static = self.act is not None and not self.act.dynamic
        if static != (self.act_scale is not None):
            raise ValueError(f"act_scale is {self.act_scale}, expected a [1] tensor exactly for a static act")
        if self.act_zero_point != 0 and (self.act is None or self.act.symmetric):
            raise ValueError(f"act_zero_point is {self.act_zero_point}, expected 0 unless act is asymmetric")
        side = self.lora.rank > 0 and self.lora.kind != "merged"
        for name, p, shape in (
            ("lora_down", self.lora_down, (self.lora.rank, k)),
            ("lora_up", self.lora_up, (n, self.lora.rank)),
        ):
            if side and (p is None or tuple(p.shape) != shape):
                raise ValueError(f"{name} is {None if p is None else tuple(p.shape)}, expected shape {shape}")
            if not side and p is not None:
                raise ValueError(f"{name} is given without a side branch, expected None")
        for name, p in (("lora_down", self.lora_down), ("lora_up", self.lora_up)):
            if p is not None and p.dtype != torch.float16:
                raise TypeError(f"{name} has dtype {p.dtype}, expected torch.float16")

    @property
    def act_quant(self) -> ActQuant:
        """The quantizing epilogue that produces this layer's input (``act`` must not be None)."""
        side = self.lora_down is not None
        subspace = side and self.lora.kind == "subspace"
        return ActQuant.from_spec(
            self.act, self.act_scale, self.act_zero_point, lora_down=self.lora_down, subspace=subspace
        )


@dataclass(frozen=True)
class AttentionState:
    """A quantized multi-head self-attention.

    Args:
        qkv, proj: the two linear layers; qkv's N is 3·H·d in the order [3, H, d].
        heads: H.
        softmax_scale: float, the factor on q·kᵀ.
        operands: QuantSpec of Q, K and V (symmetric): static per_tensor or per_head, or dynamic per_token.
        operand_scale: float32 [3] (per_tensor) or [3·H] (per_head) for static operands, else None.
        focus: FocusSpec of the probabilities.
        bias: [H, N, N] float32 additive scores (relative position), or None.
        token_bits: what this attention decides about the inputs of proj, of the block's MLP and of the next block's
            qkv, and about the next block's Q and K; None leaves every token its bits. Needs dynamic quantizers there.
    """

    qkv: LinearState
    proj: LinearState
    heads: int
    softmax_scale: float
    operands: QuantSpec
    operand_scale: Tensor | None
    focus: FocusSpec
    bias: Tensor | None = None
    token_bits: TokenBits | None = None

    def __post_init__(self) -> None:
        _int_in("heads", self.heads, 1, 1 << 16)
        if not math.isfinite(self.softmax_scale):
            raise ValueError(f"softmax_scale is {self.softmax_scale}, expected a finite number")
        if not self.operands.symmetric:
            raise ValueError("operands is asymmetric, expected a symmetric QuantSpec")
        _one_of("operands.granularity", self.operands.granularity, ("per_tensor", "per_token", "per_head"))
        if self.operands.dynamic != (self.operand_scale is None):
            raise ValueError("operand_scale must be None exactly for dynamic operands")
        if self.operand_scale is not None and self.operand_scale.numel() != self.groups:
            raise ValueError(f"operand_scale has {self.operand_scale.numel()} values, expected {self.groups}")
        if self.qkv.codes.shape[0] % (3 * self.heads):
            raise ValueError(f"heads is {self.heads}, expected a divisor of qkv's {self.qkv.codes.shape[0]} / 3")

    @property
    def groups(self) -> int:
        return 3 if self.operands.granularity == "per_tensor" else 3 * self.heads

    @property
    def operand_quant(self) -> ActQuant:
        """The quantizing epilogue of the qkv layer."""
        return ActQuant.from_spec(self.operands, self.operand_scale, groups=self.groups)
