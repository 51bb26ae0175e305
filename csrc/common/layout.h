// Index maps of the CPU weight layouts (vitq_kernels/packing.py draws them). constexpr, so tests can walk
// them.
#pragma once

#include <cstdint>

namespace vitq {

// Run-time layout ids: the order of packing.LAYOUTS.
enum class Layout : int64_t { int8 = 0, int4 = 1, int8_n16k4 = 2, int4_n16k4 = 3 };

constexpr int64_t kBlockN = 16;  // output rows in one block
constexpr int64_t kBlockK = 4;   // consecutive k in one 32-bit lane
constexpr int64_t kBlockBytes = kBlockN * kBlockK;

// int8_n16k4: byte of code (n, k) in [ceil(N/16), ceil(K/4), 16, 4].
constexpr int64_t int8_n16k4_offset(int64_t n, int64_t k, int64_t k_total) {
  const int64_t blocks = (k_total + kBlockK - 1) / kBlockK;
  return ((n / kBlockN) * blocks + k / kBlockK) * kBlockBytes + (n % kBlockN) * kBlockK + k % kBlockK;
}

// int4_n16k4: byte of code (n, k) in [ceil(N/16), ceil(K/8), 16, 4]; the nibble is int4_n16k4_shift(k).
constexpr int64_t int4_n16k4_offset(int64_t n, int64_t k, int64_t k_total) {
  const int64_t blocks = (k_total + 2 * kBlockK - 1) / (2 * kBlockK);
  return ((n / kBlockN) * blocks + k / (2 * kBlockK)) * kBlockBytes + (n % kBlockN) * kBlockK + k % kBlockK;
}

// 0 for the low nibble (even k4 block), 4 for the high one.
constexpr int int4_n16k4_shift(int64_t k) { return (k / kBlockK) % 2 ? 4 : 0; }

}  // namespace vitq
