"""Layouts: lossless round trips for every shape, and bit diagrams written out by hand."""

import re

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from vitq_kernels import packing
from vitq_kernels.formats import LevelTable

sizes = st.tuples(st.integers(0, 37), st.integers(0, 41))
TABLE = LevelTable((-100, -60, -31, -17, -9, -5, -3, -1, 1, 2, 4, 9, 18, 30, 61, 110))


def random_codes(n, k, low, high, seed):
    return torch.randint(low, high + 1, (n, k), generator=torch.Generator().manual_seed(seed)).to(torch.int8)


@given(sizes, st.integers(2, 8), st.integers(0, 99))
def test_bits_round_trip(size, bits, seed):
    n, k = size
    codes = random_codes(n, k, -(1 << (bits - 1)), (1 << (bits - 1)) - 1, seed)
    packed = packing.pack_bits(codes, bits)
    assert packed.shape == (n, -(-k * bits // 8))
    assert torch.equal(packing.unpack_bits(packed, bits, k), codes)


@given(sizes, st.integers(2, 8), st.sampled_from(packing.LAYOUTS), st.integers(0, 99))
def test_weight_round_trip_and_col_sum(size, bits, layout, seed):
    n, k = size
    bits = min(bits, 4) if layout.startswith("int4") else bits
    codes = random_codes(n, k, -(1 << (bits - 1)), (1 << (bits - 1)) - 1, seed)
    weight = packing.pack_weight(codes, bits, layout)
    assert torch.equal(packing.unpack_weight(weight), codes)
    assert weight.col_sum.dtype == torch.int32
    assert weight.col_sum.tolist() == [sum(row) for row in codes.tolist()]


@given(sizes, st.sampled_from(packing.LAYOUTS), st.integers(0, 99))
def test_table_weight_round_trip(size, layout, seed):
    levels = torch.tensor(TABLE.levels, dtype=torch.int8)[random_codes(*size, 0, 15, seed).long()]
    if layout.endswith("_s4"):
        with pytest.raises(ValueError, match="expected uniform codes"):
            packing.pack_weight(levels, 4, layout, TABLE)
        return
    weight = packing.pack_weight(levels, 4, layout, TABLE)
    assert torch.equal(packing.unpack_weight(weight), levels)


def test_short_table_decodes_through_sixteen_entries():
    table = LevelTable((-50, -2, 3, 70))
    levels = torch.tensor([[3, -50, 70, -2, 3]], dtype=torch.int8)
    weight = packing.pack_weight(levels, 2, "int4", table)
    assert packing.weight_lut(weight).tolist() == [-50, -2, 3, 70] + [0] * 12
    assert torch.equal(packing.unpack_weight(weight), levels)


def test_bits_diagram():
    # 3-bit codes + 4: -4 → 000, 3 → 111, 1 → 101; little-endian stream, first code in the lowest bits.
    codes = torch.tensor([[-4, 3, 1]], dtype=torch.int8)
    assert packing.pack_bits(codes, 3).tolist() == [[0b01_111_000, 0b0000000_1]]
    # 2-bit codes + 2: four to a byte.
    assert packing.pack_bits(torch.tensor([[-2, -1, 0, 1]], dtype=torch.int8), 2).tolist() == [[0b11_10_01_00]]
    # 8 bits: code + 128.
    assert packing.pack_bits(torch.tensor([[-128, 0, 127]], dtype=torch.int8), 8).tolist() == [[0, 128, 255]]


def check_int4_diagram(pack):
    """Byte j holds codes 2j (low nibble) and 2j+1 (high nibble); an odd K is padded with the nibble of code 0."""
    assert pack(torch.tensor([[1, 2, 3]], dtype=torch.uint8)).tolist() == [[0x21, 0x83]]


def test_int4_diagram():
    check_int4_diagram(packing.pack_int4)


def test_planted_nibble_order_bug_is_caught():
    def swapped(nibbles):
        packed = packing.pack_int4(nibbles)
        return (packed >> 4) | (packed << 4)

    with pytest.raises(AssertionError):
        check_int4_diagram(swapped)


def test_n16k4_diagram():
    n, k = 18, 6
    codes = (torch.arange(n).unsqueeze(1) * 6 + torch.arange(k)).to(torch.int8)
    packed = packing.pack_n16k4(codes)
    assert packed.shape == (2, 2, 16, 4)
    flat = packed.flatten().tolist()
    for row in range(32):
        for col in range(8):
            at = ((row // 16 * 2 + col // 4) * 16 + row % 16) * 4 + col % 4
            assert flat[at] == (row * 6 + col if row < n and col < k else 0)


def test_int4_n16k4_diagram():
    """Even k4 blocks in the low nibbles, odd ones in the high nibbles of the same 64-byte line."""
    n, k = 17, 11
    nibbles = (torch.arange(n).unsqueeze(1) * 3 + torch.arange(k) * 5).remainder(16).to(torch.uint8)
    packed = packing.pack_int4_n16k4(nibbles, pad=8)
    assert packed.shape == (2, 2, 16, 4)
    flat = packed.flatten().tolist()
    for row in range(32):
        for col in range(16):
            line, high = col // 8, col // 4 % 2
            byte = flat[((row // 16 * 2 + line) * 16 + row % 16) * 4 + col % 4]
            want = int(nibbles[row, col]) if row < n and col < k else 8
            assert (byte >> 4 if high else byte & 15) == want


def test_int4_k64x2_diagram():
    """A run of 64 bytes holds 128 k: the first half in the low nibbles, the second in the high ones."""
    n, k = 3, 300
    nibbles = (torch.arange(n).unsqueeze(1) * 7 + torch.arange(k) * 5).remainder(16).to(torch.uint8)
    packed = packing.pack_int4_k64x2(nibbles, pad=8)
    assert packed.shape == (n, 3 * 64)
    for row in range(n):
        for col in range(384):
            byte = int(packed[row, col // 128 * 64 + col % 64])
            want = int(nibbles[row, col]) if col < k else 8
            assert (byte >> 4 if col // 64 % 2 else byte & 15) == want


BAD = {
    "dtype": (lambda: packing.pack_bits(torch.zeros(2, 2), 4), TypeError, "codes has dtype torch.float32"),
    "dim": (
        lambda: packing.pack_bits(torch.zeros(2, dtype=torch.int8), 4),
        ValueError,
        "codes has shape (2,), expected [N, K]",
    ),
    "bits": (lambda: packing.pack_bits(torch.zeros(2, 2, dtype=torch.int8), 9), ValueError, "bits is 9"),
    "range": (
        lambda: packing.pack_bits(torch.tensor([[8]], dtype=torch.int8), 4),
        ValueError,
        "codes spans [8, 8], expected a subset of [-8, 7]",
    ),
    "packed_dtype": (
        lambda: packing.unpack_bits(torch.zeros(1, 1), 4, 2),
        TypeError,
        "packed has dtype torch.float32",
    ),
    "packed_shape": (
        lambda: packing.unpack_bits(torch.zeros(1, 1, dtype=torch.uint8), 4, 3),
        ValueError,
        "packed has shape (1, 1), expected [N, 2]",
    ),
    "layout": (
        lambda: packing.pack_weight(torch.zeros(2, 2, dtype=torch.int8), 4, "int3"),
        ValueError,
        "layout is 'int3', expected one of",
    ),
    "int4_bits": (
        lambda: packing.pack_weight(torch.zeros(2, 2, dtype=torch.int8), 5, "int4"),
        ValueError,
        "bits is 5 with layout 'int4', expected at most 4",
    ),
    "weight_range": (
        lambda: packing.pack_weight(torch.tensor([[4]], dtype=torch.int8), 3, "int8"),
        ValueError,
        "codes spans [4, 4], expected a subset of [-4, 3]",
    ),
    "no_level": (
        lambda: packing.pack_weight(torch.tensor([[5]], dtype=torch.int8), 4, "int8", TABLE),
        ValueError,
        "levels has values outside the table",
    ),
}


@pytest.mark.parametrize("case", BAD, ids=str)
def test_refuses(case):
    build, error, message = BAD[case]
    with pytest.raises(error, match=re.escape(message)):
        build()
