// 4-bit indices to their levels.
#pragma once

#include "common/gpu/ptx.cuh"

namespace vitq::gpu {

// 16 times what the high nibbles of bytes stand for, code + 8, as int8. One instruction: a compiler makes two
// of it, with a constant each.
VITQ_DEVICE uint32_t high_nibbles(uint32_t bytes) { return and_xor(bytes, 0xf0f0f0f0u, 0x80808080u); }

// Levels of the 4 low and of the 4 high nibbles of the bytes of `index`: half the instructions of one after
// the other.
VITQ_DEVICE void levels(const uint32_t* table, uint32_t index, uint32_t& low, uint32_t& high) {
  uint32_t four[2];  // nibbles of the lower, of the upper two bytes
  VITQ_UNROLL
  for (int i = 0; i < 2; ++i) {
    // 8 levels from each half of the table, then the half by the top bit.
    const uint32_t selector = (index & 0x77777777u) >> 16 * i;
    const uint32_t half = ((index >> 1 & 0x44444444u) | 0x32103210u) >> 16 * i;
    four[i] = permute(permute(table[0], table[1], selector), permute(table[2], table[3], selector), half);
  }
  low = permute(four[0], four[1], 0x6420u);
  high = permute(four[0], four[1], 0x7531u);
}

// Levels of the 4 low nibbles of the bytes of `index`.
VITQ_DEVICE uint32_t levels(const uint32_t* table, uint32_t index) {
  // The nibbles beside one another, then 8 levels from each half of the table, then the half by the top
  // bit.
  const uint32_t pairs = (index & 0x000f000fu) | (index >> 4 & 0x00f000f0u);
  const uint32_t selector = (pairs & 0xffu) | (pairs >> 8 & 0xff00u);
  const uint32_t below = permute(table[0], table[1], selector & 0x7777u);
  const uint32_t above = permute(table[2], table[3], selector & 0x7777u);
  return permute(below, above, 0x3210u | (selector & 0x8888u) >> 1);
}

}  // namespace vitq::gpu
