"""Tile configurations per GPU: one small table each, chosen offline, looked up by the nearest shape.

``<device name>.json`` (lower case, ``_`` for everything else) holds what was measured on that GPU, ``sm_<cc>.json``
serves every other GPU of that compute capability or above; ``measured`` in the file says which of the two a row set is.
Nothing is tuned at run time, so that a request, a capture or a compilation never waits for it.

A file: ``{"gpu", "measured", "columns": [names of Config's fields behind m, n], "w8": rows, "w4": rows, ...}``, one row
``[m, n, block_m, block_n, ...]`` for each shape that was tuned. Likewise "attention_columns" and "attention", where m
and n are the number of keys and head_dim. Whether Triton's kernel is the one that runs says ``serving``.
"""

from __future__ import annotations

import contextlib
import json
import math
import re
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cache
from pathlib import Path

import torch

from ..triton import host

KINDS = ("w8", "w4", "w8_float", "w4_float")
"""Weight width, and ``_float`` for the weight-only product."""


@dataclass(frozen=True)
class Config:
    """Tiles of one product.

    Args:
        block_m, block_n, block_k: tile of the output and of K (128 for 4-bit weights: one run of their layout).
        group_m: row tiles that share a column tile while it is in the second-level cache.
        swap: 1 to make the weights operand A: yᵀ = W·xᵀ. Unpacked weights then stay in registers, and a short M
            becomes the instruction's narrow side.
        num_warps, num_stages: of the launch.
    """

    block_m: int
    block_n: int
    block_k: int
    group_m: int
    swap: int
    num_warps: int
    num_stages: int


@dataclass(frozen=True)
class Attention:
    """Tiles of an attention.

    Args:
        block_m: queries of a program.
        block_n: keys at a time, where a row of scores is too long to be held whole. The same for every head_dim.
        num_warps, num_stages: of the launch.
    """

    block_m: int
    block_n: int
    num_warps: int
    num_stages: int


_INTERPRETER: dict[str, Config | Attention] = {
    kind: Config(
        block_m=32, block_n=64, block_k=64, group_m=2, swap=int(kind.startswith("w4")), num_warps=4, num_stages=1
    )
    for kind in KINDS
}
_INTERPRETER["attention"] = Attention(block_m=64, block_n=64, num_warps=4, num_stages=1)
"""Interpreted programs cost 10 ms each, whatever their size; small enough that tests cross every boundary."""

_pinned: list[Config | Attention] = []


@contextlib.contextmanager
def config(value: Config | Attention) -> Iterator[None]:
    """Every product, or attention, inside uses ``value``: what a tuner, or a test of one configuration, needs."""
    _pinned.append(value)
    try:
        yield
    finally:
        _pinned.pop()


def files() -> list[Path]:
    return sorted(path for path in Path(__file__).parent.glob("*.json") if "." not in path.stem)


def slug(name: str) -> str:
    """File stem of a device name: "NVIDIA H200" → "nvidia_h200"."""
    return re.sub(r"[^a-z0-9]+", "_", name.lower()).strip("_")


@cache
def load(stem: str) -> dict[str, list[tuple[int, int, Config | Attention]]] | None:
    """The tables of one file, or None if there is no such file."""
    path = Path(__file__).parent / f"{stem}.json"
    if not path.exists():
        return None
    record = json.loads(path.read_text())

    def table(kind: str, form: type, columns: list[str]) -> list[tuple[int, int, Config | Attention]]:
        return [(row[0], row[1], form(**dict(zip(columns, row[2:], strict=True)))) for row in record[kind]]

    tables = {kind: table(kind, Config, record["columns"]) for kind in KINDS}
    return tables | {"attention": table("attention", Attention, record["attention_columns"])}


def _for_capability(capability: int) -> dict[str, list[tuple[int, int, Config | Attention]]]:
    stems = [path.stem for path in files() if re.fullmatch(r"sm_\d+", path.stem)]
    known = sorted(int(stem[3:]) for stem in stems)
    # 12.0 is a consumer part with the shared memory of 8.9, not a larger 10.0.
    usable = [cc for cc in known if cc <= (89 if capability >= 120 else capability)]
    return load(f"sm_{usable[-1] if usable else known[0]}")


@cache
def _nearest(capability: int, name: str, kind: str, m: int, n: int) -> Config | Attention:
    rows = (load(slug(name)) or _for_capability(capability))[kind]

    def distance(row: tuple[int, int, Config | Attention]) -> tuple[float, float]:
        return abs(math.log2(max(m, 1) / row[0])), abs(math.log2(max(n, 1) / row[1]))

    return min(rows, key=distance)[2]


def nearest(capability: int, name: str, kind: str, m: int, n: int) -> Config | Attention:
    """The row of the table of GPU ``name`` (or of its capability) whose M, and then N, is nearest on a log scale."""
    # Buckets of M keep the cache small where every request has another length.
    return _nearest(capability, name, kind, 1 << max(m - 1, 0).bit_length(), n)


def _gpu(device: torch.device) -> tuple[int, str]:
    gpu = host.gpu(device)
    return gpu.capability, gpu.name


def _lookup(form: type, device: torch.device, kind: str, m: int, n: int) -> Config | Attention:
    for value in reversed(_pinned):
        if isinstance(value, form):
            return value
    if device.type != "cuda":
        return _INTERPRETER[kind]
    return nearest(*_gpu(device), kind, m, n)


def lookup(device: torch.device, kind: str, m: int, n: int) -> Config:
    """The configuration of an [M, N] product with weights of ``kind`` on ``device``."""
    return _lookup(Config, device, kind, m, n)


def attention(device: torch.device, keys: int, head_dim: int) -> Attention:
    """The configuration of an attention over so many keys on ``device``."""
    return _lookup(Attention, device, "attention", keys, head_dim)
