// Bytes through a table of at most 256 bytes.
#pragma once

#include "common/simd.h"

namespace vitq::VITQ_ISA {

#if defined(__AVX512BW__)
// 64 codes a step through a table in four registers; Cascade Lake is the one VNNI machine without it.
__attribute__((target("avx512vbmi"), noinline)) static void look_up_vbmi(const uint8_t* table, int64_t n,
                                                                         uint8_t* codes) {
  const __m512i t0 = _mm512_loadu_si512(table), t1 = _mm512_loadu_si512(table + 64);
  const __m512i t2 = _mm512_loadu_si512(table + 128), t3 = _mm512_loadu_si512(table + 192);
  for (int64_t j = 0; j < n; j += 64) {
    const __m512i c = _mm512_loadu_si512(codes + j);
    const __m512i low = _mm512_permutex2var_epi8(t0, c, t1), high = _mm512_permutex2var_epi8(t2, c, t3);
    _mm512_storeu_si512(codes + j, _mm512_mask_blend_epi8(_mm512_movepi8_mask(c), low, high));
  }
}
#endif

// codes[i] = table[codes[i]] for codes in [0, top]; up to 63 bytes behind the last one may be overwritten.
VITQ_INLINE void look_up(const uint8_t* table, [[maybe_unused]] int top, int64_t n, uint8_t* codes) {
#if defined(__AVX512BW__)
  static const bool vbmi = __builtin_cpu_supports("avx512vbmi");
  if (vbmi) return look_up_vbmi(table, n, codes);
#endif
#if defined(__AVX2__)
  // Sixteen entries at a time: a code of another sixteen saturates to an index with its top bit set, which
  // yields 0.
  const __m256i bias = _mm256_set1_epi8(0x70), sixteen = _mm256_set1_epi8(16);
  for (int64_t j = 0; j < n; j += 64) {
    __m256i c[2], out[2] = {};
    unroll<2>([&](auto i) VITQ_LAMBDA { c[i] = load_as<__m256i>(codes + j + i * 32); });
    for (int t = 0; t <= top; t += 16) {
      const __m256i entries = _mm256_broadcastsi128_si256(load_as<__m128i>(table + t));
      unroll<2>([&](auto i) VITQ_LAMBDA {
        out[i] = _mm256_or_si256(out[i], _mm256_shuffle_epi8(entries, _mm256_adds_epu8(c[i], bias)));
        c[i] = _mm256_sub_epi8(c[i], sixteen);
      });
    }
    unroll<2>([&](auto i) VITQ_LAMBDA { store(codes + j + i * 32, out[i]); });
  }
#else
  for (int64_t j = 0; j < n; ++j) codes[j] = table[codes[j]];
#endif
}

}  // namespace vitq::VITQ_ISA
