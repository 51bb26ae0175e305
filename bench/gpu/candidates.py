"""What the tuner tries: shapes, configurations that can be good for them, and one layer to check and time."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace

import test_qlinear as linear_oracle
import torch
from torch import Tensor
from triton.runtime.errors import OutOfResources

import vitq_kernels as vk
from vitq_kernels import ActQuant, backend, tuning
from vitq_kernels.tuning import Config

from . import ops
from .machine import Machine
from .ops import Variant
from .shapes import RANK


@dataclass(frozen=True)
class Shape:
    """[M, N] products of one kind; ks: the K that layers of this N have, all timed. "attention": m keys, head_dim n."""

    kind: str
    m: int
    n: int
    ks: tuple[int, ...]


def work(kinds: list[str], dry: bool) -> list[Shape]:
    """The shapes in the order of their use: large and middle M first."""
    if dry:
        return [Shape(kind, 17, 48, (128,)) if kind != "attention" else Shape(kind, 9, 16, ()) for kind in kinds]
    layers = {
        768: (768, 3072),
        2304: (768,),
        3072: (768,),
        384: (384, 1536),
        1152: (384,),
        1024: (1024, 4096),
        4096: (1024,),
    }
    found = [Shape("attention", *s, ()) for s in ((197, 64), (1024, 64), (49, 32), (577, 64))]
    rows = (6304, 1576, 197, 64, 16)
    return (found if "attention" in kinds else []) + [
        Shape(kind, m, n, ks) for kind in kinds if kind != "attention" for m in rows for n, ks in layers.items()
    ]


def candidates(shape: Shape, processors: int, most: int = 16) -> list[Config] | list[tuning.Attention]:
    """At most ``most`` configurations that can be good for ``shape``."""
    return _attention(shape)[:most] if shape.kind == "attention" else _products(shape, processors)[:most]


def _attention(shape: Shape) -> list[tuning.Attention]:
    """Rows and warps whose scores fit into registers."""
    whole = shape.m <= 256
    tiles = [(128, 8), (64, 4), (64, 8), (32, 4), (16, 4)]
    return [
        tuning.Attention(block_m, block_n, warps, stages)
        for block_m, warps in tiles
        if block_m < 2 * max(shape.m, 16)
        for block_n, stages in ([(64, 1)] if whole else [(64, 1), (64, 2), (128, 2)])
    ]


def _products(shape: Shape, processors: int) -> list[Config]:
    """Those of the fewest predicted cycles first.

    Their accumulators fit into registers and their tiles into shared memory; cycles are waves of whole tiles on all
    processors, by a tile's area and the operands that it reads for it.
    """
    packed, floating = shape.kind.startswith("w4"), shape.kind.endswith("_float")
    found = []
    for block_m in (16, 32, 64, 128, 256):
        for block_n in (32, 64, 128, 256):
            warps = 8 if block_m * block_n >= 128 * 128 else 4
            for block_k in (128,) if packed else (64, 128):
                for stages in (3, 4):
                    x_bytes = block_m * block_k * (2 if floating else 1)
                    shared = stages * (x_bytes + block_n * block_k // (2 if packed else 1))
                    registers = block_m * block_n // (32 * warps)
                    unpacked = block_n * block_k // (32 * warps) // (2 if floating else 4) if packed else 0
                    # A tile more than twice as high as M, or as wide as N, is mostly padding.
                    if (
                        registers + unpacked > 160
                        or shared > 200_000
                        or block_m >= 2 * max(shape.m, 16)
                        or block_n >= 2 * shape.n
                    ):
                        continue
                    for swap in (1,) if packed or block_m < 64 else (0, 1):
                        found.append(Config(block_m, block_n, block_k, 8, swap, warps, stages))

    def cost(c: Config) -> tuple[float, float]:
        tiles = -(-shape.m // c.block_m) * -(-shape.n // c.block_n)
        waves = -(-tiles // processors)
        reads = 1 / c.block_m + 1 / c.block_n  # bytes of operands per operation
        return waves * c.block_m * c.block_n * (1 + 32 * reads), -c.num_stages

    return sorted(found, key=cost)


class Bench:
    """One layer per K of a shape (or one attention), checked and timed under a configuration."""

    def __init__(self, machine: Machine, shape: Shape) -> None:
        self.machine = machine
        if shape.kind == "attention":
            masks = 0 if shape.m > 49 else 2 if machine.dry else 64
            images = 2 if machine.dry else max(1, 100_000 // shape.m // 64 * 64 if masks else 12_608 // shape.m)
            self.variants = [ops.attention(machine, images, 2 if machine.dry else 12, shape.m, shape.n, masks)]
        else:
            self.variants = [_layer(machine, shape.kind, shape.m, k, shape.n) for k in shape.ks]

    def run(self, config: Config | tuning.Attention, timed: bool) -> float:
        """Milliseconds of all layers (0 if not ``timed``); infinite where the GPU has not the shared memory for it.

        Raises: AssertionError for a wrong result.
        """
        total = 0.0
        with tuning.config(config), backend("triton"):
            for variant in self.variants:
                try:
                    result = variant.run_once()
                except OutOfResources:
                    return math.inf
                variant.check(result)
                if timed:
                    total += self.machine.time(variant.run, variant.inputs, seconds=0.02).median
        self.machine.release()
        return total


def _layer(machine: Machine, kind: str, m: int, k: int, n: int) -> Variant:
    """A product of one kind of ``vitq_kernels.tuning``, with a branch and bias."""
    device = machine.device
    g = torch.Generator(device=device).manual_seed(m + k + n)
    bits = 4 if kind.startswith("w4") else 8
    codes = torch.randint(-(2 ** (bits - 1)), 2 ** (bits - 1), (n, k), generator=g, device=device, dtype=torch.int8)
    weight = vk.pack_weight(codes, bits, "int4_k64x2" if bits == 4 else "int8")
    up, bias = torch.randn(n, RANK, generator=g, device=device).half(), torch.randn(n, generator=g, device=device)
    w_scale = torch.rand(n, generator=g, device=device) * 1e-3 + 1e-4
    x, t = (
        torch.randn(m, k, generator=g, device=device),
        torch.randn(m, RANK, generator=g, device=device).half().float(),
    )
    if not kind.endswith("_float"):
        return ops.product(replace(vk.quantize(x, ActQuant()), t=t), weight, w_scale, bias, up)
    x = x.to(torch.bfloat16)
    tensors = {"x": x, "w": weight.data, "s": w_scale, "b": bias, "up": up, "t": t}

    def run(a: dict[str, Tensor]) -> Tensor:
        packed = replace(weight, data=a["w"])
        return vk.qlinear_weight_only(a["x"], packed, a["s"], a["b"], lora_t=a["t"], lora_up=a["up"])

    kw = {"activation": "none", "bias": bias, "lora_up": up}
    return Variant(run, tensors, None, lambda y: linear_oracle.check_weight_only(y, x, t, weight, w_scale, kw))
