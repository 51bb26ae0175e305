// AMX: eight tiles of up to 16 rows of 64 bytes. Assembly, since GCC's intrinsics do not say that a tile is
// read from memory, and to name tiles by template arguments.
#pragma once

#include "common/simd.h"

#if defined(__AMX_INT8__)

namespace vitq::VITQ_ISA::amx {

constexpr int64_t kTileBytes = 64, kTileRows = 16;  // of a row; 16 lines of a packed weight are one tile

// The shapes of all tiles. A thread's tiles keep what they hold until configured again or released.
struct Config {
  uint8_t palette = 1, start = 0, reserved[14] = {};
  uint16_t row_bytes[16] = {};
  uint8_t rows[16] = {};

  // Tiles 0 to 5 whole; tiles 6 and 7 for a product over `rest` steps of four k only.
  explicit Config(int64_t rest) {
    for (int t = 0; t < 8; ++t) row_bytes[t] = kTileBytes, rows[t] = kTileRows;
    row_bytes[6] = static_cast<uint16_t>(4 * rest), rows[6] = rest > 0 ? kTileRows : 0;
    row_bytes[7] = rest > 0 ? kTileBytes : 0, rows[7] = static_cast<uint8_t>(rest);
  }
};
static_assert(sizeof(Config) == 64);

VITQ_INLINE void configure(const Config& config) { asm volatile("ldtilecfg %0" ::"m"(config)); }
VITQ_INLINE void release() { asm volatile("tilerelease"); }

template <int T>
VITQ_INLINE void zero() {
  asm volatile("tilezero %%tmm%c0" ::"i"(T));
}
template <int T, class P>
VITQ_INLINE void read(const P* from, int64_t stride) {
  asm volatile("tileloadd (%1,%2,1), %%tmm%c0" ::"i"(T), "r"(from), "r"(stride) : "memory");
}
template <int T, class P>
VITQ_INLINE void write(P* to, int64_t stride) {
  asm volatile("tilestored %%tmm%c0, (%1,%2,1)" ::"i"(T), "r"(to), "r"(stride) : "memory");
}

// sums += a·b of bytes, exact modulo 2^32; b is signed.
template <int Sums, int A, int B>
VITQ_INLINE void dot_signed() {
  asm volatile("tdpbssd %%tmm%c2, %%tmm%c1, %%tmm%c0" ::"i"(Sums), "i"(A), "i"(B));
}
template <int Sums, int A, int B>
VITQ_INLINE void dot_unsigned() {
  asm volatile("tdpbusd %%tmm%c2, %%tmm%c1, %%tmm%c0" ::"i"(Sums), "i"(A), "i"(B));
}

}  // namespace vitq::VITQ_ISA::amx

#endif
