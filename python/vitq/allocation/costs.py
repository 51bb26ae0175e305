"""What a linear layer costs at given bits: bytes, bit operations, measured time. All whole numbers."""

from __future__ import annotations

from dataclasses import dataclass
from fractions import Fraction

import torch
from torch import Tensor
from torch.nn import functional

from vitq_kernels.formats import LinearState
from vitq_kernels.nn import QLinear

from ..bench.latency import compare
from ..simulate import SimModel, recording

# What the float model is counted at, and what a low-rank branch is stored and multiplied in.
FLOAT_BITS, BRANCH_BITS = 32, 16


@dataclass(frozen=True)
class Layer:
    """A linear layer's work: N out features, K in features, rows multiplied per image, rank of its side branch."""

    n: int
    k: int
    rows: int
    rank: int = 0

    def size(self, weight_bits: int) -> int:
        """Bytes: codes at their true width, float32 scales, float16 branch."""
        return -(-self.n * self.k * weight_bits // 8) + 4 * self.n + self.rank * (self.n + self.k) * BRANCH_BITS // 8

    def bitops(self, weight_bits: int, act_bits: int | Fraction) -> int:
        """Bit operations per image: MAC·b_w·b_a, the branch at 16 x 16 bits; ``act_bits``: the mean over rows."""
        branch = self.rank * (self.n + self.k) * BRANCH_BITS**2
        return int(self.rows * (self.n * self.k * weight_bits * act_bits + branch))

    @property
    def float_size(self) -> int:
        return self.n * self.k * FLOAT_BITS // 8

    @property
    def float_bitops(self) -> int:
        return self.rows * self.n * self.k * FLOAT_BITS**2


def layers_of(model: SimModel, image: Tensor, ranks: dict[str, int]) -> dict[str, Layer]:
    """The work of ``model``'s linear layers on one image [1, C, H, W]: those that ``ranks`` names, with their rank."""
    linears, rows = {path: model.linears[path] for path in ranks}, {}

    def record(path: str, inputs: tuple, output: Tensor) -> None:
        rows[path] = linears[path].rows(inputs[0]).shape[0]

    with torch.no_grad(), recording(linears, record):
        model(image)
    return {path: Layer(*linear.shape, rows[path], ranks[path]) for path, linear in linears.items()}


def latency(layer: Layer, states: list[LinearState], batch: int, seconds: float) -> tuple[list[int], int]:
    """Median nanoseconds of the integer layer (quantizing its float input, product, branch) and of the float32 one.

    Measured in turn on this machine with torch's current threads, on ``batch`` images' rows. States that run from the
    same layout are the same kernel on as many bytes (5..8-bit weights all live in int8, 2..4 in int4): they share one
    measurement, so that noise makes no difference between them.

    Args: states: of the layer, one per choice of bits; seconds: about how long each measurement takes.
    Returns: nanoseconds per state, and of the float layer.
    """
    x = torch.randn(batch * layer.rows, layer.k, generator=torch.Generator().manual_seed(0))
    weight = torch.zeros(layer.n, layer.k)
    modules = [QLinear.from_state(state) for state in states]
    names = [
        f"{m.layout}, table={m.weight_spec.table is not None}, rank={s.lora.rank}" for m, s in zip(modules, states)
    ]
    calls = {name: lambda module=module: module(x) for name, module in zip(names, modules)}
    with torch.inference_mode():
        times = compare({"float": lambda: functional.linear(x, weight), **calls}, seconds)
    nanoseconds = {name: round(1e6 * timing.median) for name, timing in times.items()}
    return [nanoseconds[name] for name in names], nanoseconds["float"]
