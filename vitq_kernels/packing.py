"""Weight layouts: pack/unpack pairs, each with its bit diagram. All are lossless for codes in their range.

Storage (checkpoints):   ``pack_bits``       b bits a code, b = 2..8, rows padded to whole bytes
Run time, any back end:  ``int8``            [N, K] int8, K-major
                         ``int4``            [N, ceil(K/2)] uint8
Run time, CPU:           ``int8_n16k4``      [N/16, K/4, 16, 4] int8
                         ``int4_n16k4``      [N/16, K/8, 16, 4] uint8
Run time, GPU:           ``int4_k64x2``      [N, K/128·64] uint8
                         ``int4_k64x2_s4``   the same bytes, of a layer whose activations are 4-bit codes, too: it is
                                             multiplied as int4 by int4

A 4-bit layout stores a nibble in 0..15: the code + 8, or the index of a level where the weight has a table.

``int4``: byte j of a row holds codes 2j (low nibble) and 2j+1 (high nibble)::

      bit 7     4 3     0
     | k=2j+1   | k=2j   |

``int8_n16k4``: sixteen output rows side by side, four consecutive k of each in one 32-bit lane: the operand that
``vpdpbusd`` and ``vpmaddubsw`` consume with four activations broadcast. N is padded to 16 and K to 4 with zeros::

     block (n16, k4), 64 bytes:  n0:k0 k1 k2 k3 | n1:k0 k1 k2 k3 | ... | n15:k0 k1 k2 k3

``int4_n16k4``: the same block order with two k4 blocks in one 64-byte line, the even one in the low nibbles and the
odd one in the high nibbles, so that unpacking is one mask and one shift for a whole line. K is padded to 8 with the
nibble of code 0 (of the level nearest to 0, which contributes nothing: the activations are padded with zeros).

``int4_k64x2``: rows of 64-byte runs, one for 128 k: the first 64 in the low nibbles, the next 64 in the high ones.
Either half of a run is 64 consecutive k: it multiplies a plain slice of the activations without being interleaved::

      byte j of run i:   bit 7              4 3            0
                        | k=128i+64+j        | k=128i+j     |
"""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import Tensor
from torch._subclasses import FakeTensor

from .formats import LevelTable, PackedWeight, _int_in, _one_of

LAYOUTS = ("int8", "int4", "int8_n16k4", "int4_n16k4", "int4_k64x2", "int4_k64x2_s4")
LAYOUT_IDS = {name: i for i, name in enumerate(LAYOUTS)}


def _check_codes(codes: Tensor) -> None:
    if codes.dtype != torch.int8:
        raise TypeError(f"codes has dtype {codes.dtype}, expected torch.int8")
    if codes.dim() != 2:
        raise ValueError(f"codes has shape {tuple(codes.shape)}, expected [N, K]")


def _has_values(codes: Tensor) -> bool:
    """False for a tensor of a shape alone, as warm-up and tracers pack it."""
    return not (codes.device.type == "meta" or isinstance(codes, FakeTensor))


def _check_range(codes: Tensor, low: int, high: int) -> None:
    if not _has_values(codes):
        return
    if codes.numel() and (int(codes.min()) < low or int(codes.max()) > high):
        raise ValueError(f"codes spans [{int(codes.min())}, {int(codes.max())}], expected a subset of [{low}, {high}]")


def _ceil(a: int, b: int) -> int:
    return -(-a // b)


def pack_bits(codes: Tensor, bits: int) -> Tensor:
    """True-width storage: row n is the little-endian bit stream of ``code + 2^(bits−1)``.

    Args:     codes ([N, K] int8, in [−2^(bits−1), 2^(bits−1)−1]); bits 2..8.
    Returns:  [N, ceil(K·bits/8)] uint8.
    Raises:   ValueError for codes outside the range, TypeError for another dtype.
    """
    _check_codes(codes)
    _int_in("bits", bits, 2, 8)
    half = 1 << (bits - 1)
    _check_range(codes, -half, half - 1)
    n, k = codes.shape
    unsigned = codes.to(torch.int16) + half
    stream = (unsigned.unsqueeze(-1) >> torch.arange(bits, dtype=torch.int16, device=codes.device)) & 1
    stream = stream.reshape(n, k * bits).to(torch.uint8)
    n_bytes = _ceil(k * bits, 8)
    stream = torch.nn.functional.pad(stream, (0, n_bytes * 8 - k * bits)).reshape(n, n_bytes, 8)
    weights = (1 << torch.arange(8, device=codes.device)).to(torch.uint8)
    return (stream * weights).sum(-1, dtype=torch.uint8)


def unpack_bits(packed: Tensor, bits: int, k: int) -> Tensor:
    """Inverse of :func:`pack_bits`: [N, ceil(K·bits/8)] uint8 → [N, K] int8."""
    _int_in("bits", bits, 2, 8)
    if packed.dtype != torch.uint8:
        raise TypeError(f"packed has dtype {packed.dtype}, expected torch.uint8")
    if packed.dim() != 2 or packed.shape[1] != _ceil(k * bits, 8):
        raise ValueError(f"packed has shape {tuple(packed.shape)}, expected [N, {_ceil(k * bits, 8)}]")
    n = packed.shape[0]
    stream = (packed.unsqueeze(-1) >> torch.arange(8, dtype=torch.uint8, device=packed.device)) & 1
    stream = stream.flatten(1)[:, : k * bits].reshape(n, k, bits).to(torch.int16)
    unsigned = (stream << torch.arange(bits, dtype=torch.int16, device=packed.device)).sum(-1, dtype=torch.int16)
    return (unsigned - (1 << (bits - 1))).to(torch.int8)


def pack_int4(nibbles: Tensor) -> Tensor:
    """[N, K] uint8 in 0..15 → [N, ceil(K/2)] uint8 (layout ``int4``; an odd K is padded with 8)."""
    n, k = nibbles.shape
    pairs = torch.nn.functional.pad(nibbles, (0, k % 2), value=8).reshape(n, _ceil(k, 2), 2)
    return pairs[..., 0] | (pairs[..., 1] << 4)


def unpack_int4(packed: Tensor, k: int) -> Tensor:
    """Inverse of :func:`pack_int4`."""
    return torch.stack([packed & 15, packed >> 4], dim=-1).flatten(1)[:, :k]


def pack_n16k4(codes: Tensor, pad: int = 0) -> Tensor:
    """[N, K] bytes → [ceil(N/16), ceil(K/4), 16, 4] (layout ``int8_n16k4``)."""
    n, k = codes.shape
    codes = torch.nn.functional.pad(codes, (0, -k % 4, 0, -n % 16), value=pad)
    return codes.reshape(codes.shape[0] // 16, 16, codes.shape[1] // 4, 4).transpose(1, 2).contiguous()


def unpack_n16k4(packed: Tensor, n: int, k: int) -> Tensor:
    """Inverse of :func:`pack_n16k4`."""
    return packed.transpose(1, 2).flatten(0, 1).flatten(1)[:n, :k].contiguous()


def pack_int4_n16k4(nibbles: Tensor, pad: int = 8) -> Tensor:
    """[N, K] uint8 in 0..15 → [ceil(N/16), ceil(K/8), 16, 4] uint8 (layout ``int4_n16k4``)."""
    k = nibbles.shape[1]
    blocks = pack_n16k4(torch.nn.functional.pad(nibbles, (0, -k % 8), value=pad), pad)
    return blocks[:, 0::2] | (blocks[:, 1::2] << 4)


def unpack_int4_n16k4(packed: Tensor, n: int, k: int) -> Tensor:
    """Inverse of :func:`pack_int4_n16k4`."""
    blocks = torch.stack([packed & 15, packed >> 4], dim=2).flatten(1, 2)
    return unpack_n16k4(blocks, n, k)


def pack_int4_k64x2(nibbles: Tensor, pad: int = 8) -> Tensor:
    """[N, K] uint8 in 0..15 → [N, ceil(K/128)·64] uint8 (layout ``int4_k64x2``)."""
    n, k = nibbles.shape
    runs = torch.nn.functional.pad(nibbles, (0, -k % 128), value=pad).reshape(n, _ceil(k, 128), 2, 64)
    return (runs[:, :, 0] | (runs[:, :, 1] << 4)).flatten(1)


def unpack_int4_k64x2(packed: Tensor, k: int) -> Tensor:
    """Inverse of :func:`pack_int4_k64x2`."""
    runs = packed.reshape(packed.shape[0], _ceil(k, 128), 64)
    return torch.stack([runs & 15, runs >> 4], dim=2).flatten(1)[:, :k]


def _nibbles(codes: Tensor, table: LevelTable | None) -> Tensor:
    if table is None:
        _check_range(codes, -8, 7)
        return (codes + 8).to(torch.uint8)
    return table_indices(codes, table)


def table_indices(levels: Tensor, table: LevelTable) -> Tensor:
    """Index of each value of ``levels`` (int8, every one a level of ``table``) as uint8.

    Raises: ValueError if a value is no level of the table.
    """
    index = table.indices().to(levels.device)[levels.long() + 128]
    decoded = torch.tensor(table.levels, device=levels.device)[index.long()]
    if _has_values(levels) and not torch.equal(decoded, levels.long()):
        raise ValueError("levels has values outside the table, expected codes snapped by table.lut()")
    return index


def pack_weight(codes: Tensor, bits: int, layout: str, table: LevelTable | None = None) -> PackedWeight:
    """Weight codes (or the levels of ``table``) [N, K] int8 → a run-time layout.

    Raises: ValueError for codes outside the width, an unknown layout, or a 4-bit layout for more than 4 bits.
    """
    _check_codes(codes)
    _one_of("layout", layout, LAYOUTS)
    _int_in("bits", bits, 2, 8)
    if layout.startswith("int4") and bits > 4:
        raise ValueError(f"bits is {bits} with layout {layout!r}, expected at most 4")
    if layout.endswith("_s4") and table is not None:
        raise ValueError(f"table is given with layout {layout!r}, expected uniform codes")
    if table is None:
        _check_range(codes, -(1 << (bits - 1)), (1 << (bits - 1)) - 1)
    else:
        table_indices(codes, table)
    n, k = codes.shape
    if layout == "int8":
        data = codes.contiguous()
    elif layout == "int8_n16k4":
        data = pack_n16k4(codes)
    else:
        zero = 8 if table is None else int(table.indices()[128])
        nibbles = _nibbles(codes, table)
        if layout == "int4":
            data = pack_int4(nibbles)
        else:
            data = (pack_int4_n16k4 if layout == "int4_n16k4" else pack_int4_k64x2)(nibbles, zero)
    packed = PackedWeight(data, layout, bits, n, k, codes.sum(1, dtype=torch.int32), table)
    return replace(packed, lut=weight_lut(packed))


def unpack_weight(weight: PackedWeight) -> Tensor:
    """Inverse of :func:`pack_weight`: the codes (or levels) [N, K] int8."""
    return unpack_codes(weight.data, weight.layout, weight.n, weight.k, weight.lut)


def weight_lut(weight: PackedWeight) -> Tensor | None:
    """[16] int8: what each nibble of a 4-bit layout with a table decodes to; None for every other weight."""
    if weight.table is None or not weight.layout.startswith("int4"):
        return None
    levels = list(weight.table.levels)
    return torch.tensor(levels + [0] * (16 - len(levels)), dtype=torch.int8, device=weight.data.device)


def unpack_codes(data: Tensor, layout: str, n: int, k: int, lut: Tensor | None = None) -> Tensor:
    """Codes [N, K] int8 of packed ``data``; ``lut`` [16] int8 decodes the nibbles of a table weight."""
    if layout == "int8":
        return data
    if layout == "int8_n16k4":
        return unpack_n16k4(data, n, k)
    if layout == "int4_n16k4":
        nibbles = unpack_int4_n16k4(data, n, k)
    else:
        nibbles = (unpack_int4 if layout == "int4" else unpack_int4_k64x2)(data, k)
    if lut is not None:
        return lut[nibbles.long()]
    return nibbles.to(torch.int8) - 8
