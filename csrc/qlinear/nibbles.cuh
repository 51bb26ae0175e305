// 4-bit indices to their levels.
#pragma once

#include "common/gpu/ptx.cuh"

namespace vitq::gpu {

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
