// The two integer products of attention as one tile, and the operands it reads.
//
// C[i][n] = init[n] + sum_k A[i][k]·B[n][k], exact modulo 2^32 (and the true sum fits). B lies as
// [n/16][k/step][16][step]: a 64-byte line holds `step` consecutive k of 16 columns, and a 32-bit lane of it
// meets as many of A, broadcast.
//
// VNNI and AMX: A uint8, B int8, step 4, vpdpbusd or tdpbusd; signed queries are shifted by 128, which init
// takes out again. Otherwise: A, B int16, step 2, vpmaddwd; not vpmaddubsw, whose 16 bits two products of
// 255·127 saturate.
#pragma once

#include "common/amx.h"
#include "common/simd.h"

#if defined(__SSE2__)
#include <immintrin.h>
#endif

namespace vitq::VITQ_ISA::attention {

#if defined(__AVX512VNNI__) || defined(__AVXVNNI__)
using A = uint8_t;
using B = int8_t;
constexpr int kQueryShift = 128;
#else
using A = int16_t;
using B = int16_t;
constexpr int kQueryShift = 0;
#endif
constexpr int kStep = 4 / static_cast<int>(sizeof(A));
constexpr int kColumns = 16;
constexpr int kLine = kColumns * kStep;        // elements of B in one line
constexpr int kGroupVecs = kColumns / kLanes;  // accumulators of one row and one group of columns

// Rows and groups of columns of one tile: as many accumulators as the registers hold beside the operands.
#if defined(__AMX_INT8__)
constexpr int kTileRows = amx::kTileRows;
#else
constexpr int kTileRows = kLanes == 4 ? 2 : 6;
#endif
constexpr int kTileGroups = kLanes == 16 ? 4 : 1;

#if defined(__AMX_INT8__)

// Of tiles that `multiply` configures and its caller releases.
template <int Groups>
VITQ_INLINE void tile(const A* a, int64_t lda, const B* b, int64_t group, int64_t steps, const int32_t* init,
                      int32_t* c, int64_t ldc) {
  // A stride of 0: every row begins with the same sums.
  unroll<Groups>([&](auto j) VITQ_LAMBDA { amx::read<int{j}>(init + int{j} * kColumns, 0); });
  int64_t s = 0;
  for (; s + 16 <= steps; s += 16) {
    amx::read<4>(a + s * kStep, lda);
    unroll<Groups>([&](auto j) VITQ_LAMBDA {
      amx::read<5>(b + j * group + s * kLine, kLine);
      amx::dot_unsigned<int{j}, 4, 5>();
    });
  }
  if (s < steps) {
    amx::read<6>(a + s * kStep, lda);
    unroll<Groups>([&](auto j) VITQ_LAMBDA {
      amx::read<7>(b + j * group + s * kLine, kLine);
      amx::dot_unsigned<int{j}, 6, 7>();
    });
  }
  unroll<Groups>([&](auto j) VITQ_LAMBDA { amx::write<int{j}>(c + int{j} * kColumns, ldc * 4); });
}

#else

VITQ_INLINE I dot(I acc, I a, I b) {
#if defined(__AVX512VNNI__)
  return (I)_mm512_dpbusd_epi32((__m512i)acc, (__m512i)a, (__m512i)b);
#elif defined(__AVXVNNI__)
  return (I)_mm256_dpbusd_avx_epi32((__m256i)acc, (__m256i)a, (__m256i)b);
#elif defined(__AVX2__)
  return acc + (I)_mm256_madd_epi16((__m256i)a, (__m256i)b);
#elif defined(__SSE2__)
  return acc + (I)_mm_madd_epi16((__m128i)a, (__m128i)b);
#else
  return acc + ((I)((U)a << 16) >> 16) * ((I)((U)b << 16) >> 16) + (a >> 16) * (b >> 16);
#endif
}

VITQ_INLINE I broadcast_lane(const A* p) {
  int32_t lane;
  std::memcpy(&lane, p, 4);
  return set(lane);
}

// kTileRows rows × Groups groups of columns. a: [rows][lda]; b: `group` elements from one group to the next;
// init: [columns]; c: [rows][ldc].
template <int Groups>
void tile(const A* a, int64_t lda, const B* b, int64_t group, int64_t steps, const int32_t* init, int32_t* c,
          int64_t ldc) {
  constexpr int kVecs = Groups * kGroupVecs;
  I acc[kTileRows][kVecs];
#pragma GCC unroll 8
  for (int i = 0; i < kTileRows; ++i)
#pragma GCC unroll 8
    for (int v = 0; v < kVecs; ++v) acc[i][v] = load(init + v * kLanes);
  for (int64_t s = 0; s < steps; ++s) {
    I bv[kVecs];
#pragma GCC unroll 8
    for (int v = 0; v < kVecs; ++v)
      bv[v] = load_as<I>(b + v / kGroupVecs * group + s * kLine + v % kGroupVecs * (kLanes * kStep));
#pragma GCC unroll 8
    for (int i = 0; i < kTileRows; ++i) {
      const I av = broadcast_lane(a + i * lda + s * kStep);
#pragma GCC unroll 8
      for (int v = 0; v < kVecs; ++v) acc[i][v] = dot(acc[i][v], av, bv[v]);
    }
  }
#pragma GCC unroll 8
  for (int i = 0; i < kTileRows; ++i)
#pragma GCC unroll 8
    for (int v = 0; v < kVecs; ++v) store(c + i * ldc + v * kLanes, acc[i][v]);
}

#endif

// C for `rows` (a multiple of kTileRows) rows and `groups` groups of columns.
static void multiply(const A* a, int64_t lda, int64_t rows, const B* b, int64_t groups, int64_t steps,
                     const int32_t* init, int32_t* c, int64_t ldc) {
  const int64_t group = steps * kLine;
#if defined(__AMX_INT8__)
  amx::configure(amx::Config(steps % 16));
#endif
  // Equal widths rather than full ones and a remainder: a narrow tile cannot hide the latency of its sums.
  const int64_t tiles = (groups + kTileGroups - 1) / kTileGroups;
  for (int64_t t = 0; t < tiles; ++t) {
    const int64_t first = t * groups / tiles, width = (t + 1) * groups / tiles - first;
    const B* bt = b + first * group;
    const int32_t* it = init + first * kColumns;
    for (int64_t i = 0; i < rows; i += kTileRows) {
      const A* at = a + i * lda;
      int32_t* ct = c + i * ldc + first * kColumns;
      if constexpr (kTileGroups > 1) {
        if (width == 2) {
          tile<2>(at, lda, bt, group, steps, it, ct, ldc);
          continue;
        }
        if (width == 3) {
          tile<3>(at, lda, bt, group, steps, it, ct, ldc);
          continue;
        }
        if (width == 4) {
          tile<4>(at, lda, bt, group, steps, it, ct, ldc);
          continue;
        }
      }
      tile<1>(at, lda, bt, group, steps, it, ct, ldc);
    }
  }
}

// Query codes as A: [steps·kStep], zeros behind d.
VITQ_INLINE void query_row(const int8_t* q, int64_t d, A* a, int64_t width) {
  for (int64_t c = 0; c < d; ++c) a[c] = static_cast<A>(q[c] + kQueryShift);
  for (int64_t c = d; c < width; ++c) a[c] = 0;
}

// Keys as B's columns; init[j] takes the shift of the queries out. packed, init: whole groups, written
// entirely.
template <class Row>
void pack_keys(const Row& row, int64_t n, int64_t d, int64_t steps, B* packed, int32_t* init) {
  const int64_t padded = (n + kColumns - 1) / kColumns * kColumns;
  for (int64_t j = 0; j < padded; ++j) {
    B* out = packed + j / kColumns * steps * kLine + j % kColumns * kStep;
    int32_t sum = 0;
    const int8_t* k = j < n ? row(j) : nullptr;
    const int64_t whole = j < n ? d / kStep : 0;
    for (int64_t s = 0; s < whole; ++s)
      for (int t = 0; t < kStep; ++t) out[s * kLine + t] = k[s * kStep + t];
    for (int64_t s = whole; s < steps; ++s)
      for (int t = 0; t < kStep; ++t) out[s * kLine + t] = j < n && s * kStep + t < d ? k[s * kStep + t] : 0;
    if (j < n)
      for (int64_t c = 0; c < d; ++c) sum += k[c];
    init[j] = -kQueryShift * sum;
  }
}

VITQ_INLINE I widen_int8(const int8_t* p) {
#if defined(__AVX512F__)
  return (I)_mm512_cvtepi8_epi32(_mm_loadu_si128(reinterpret_cast<const __m128i*>(p)));
#elif defined(__AVX2__)
  return (I)_mm256_cvtepi8_epi32(_mm_loadl_epi64(reinterpret_cast<const __m128i*>(p)));
#else
  I v;
  for (int i = 0; i < kLanes; ++i) v[i] = p[i];
  return v;
#endif
}

// `kStep` rows of values ([width], width a multiple of 16) as the lines of step s: one 32-bit lane per
// column.
VITQ_INLINE void pack_value_step(const int8_t* const* rows, int64_t width, int64_t s, int64_t steps,
                                 B* packed) {
  constexpr int kBits = 32 / kStep;
  for (int64_t c = 0; c < width; c += kLanes) {
    U lanes{};
    for (int t = 0; t < kStep; ++t) {
      const U value = (U)widen_int8(rows[t] + c);
      lanes |= (value & (0xffffffffu >> (32 - kBits))) << (t * kBits);
    }
    store(packed + (c / kColumns * steps + s) * kLine + c % kColumns * kStep, lanes);
  }
}

}  // namespace vitq::VITQ_ISA::attention
