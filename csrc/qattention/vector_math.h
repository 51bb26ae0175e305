// What the softmax needs beyond common/simd.h: exp2, log2, square root, unsigned bytes.
#pragma once

#include "common/simd.h"

namespace vitq::VITQ_ISA::attention {

VITQ_INLINE I lane_index() {
  I v;
  for (int i = 0; i < kLanes; ++i) v[i] = i;
  return v;
}

// kLanes codes in [0, 255].
VITQ_INLINE void store_bytes(uint8_t* p, I v) {
#if defined(__AVX512F__)
  _mm_storeu_si128(reinterpret_cast<__m128i*>(p), _mm512_cvtepi32_epi8((__m512i)v));
#elif defined(__AVX2__)
  const __m256i w = (__m256i)v;
  const __m128i words = _mm_packus_epi32(_mm256_castsi256_si128(w), _mm256_extracti128_si256(w, 1));
  _mm_storel_epi64(reinterpret_cast<__m128i*>(p), _mm_packus_epi16(words, words));
#else
  for (int i = 0; i < kLanes; ++i) p[i] = static_cast<uint8_t>(v[i]);
#endif
}

// 2^x for x <= 0, NaN for NaN; 2^-126 for everything below. Relative error below 1.4·2^-24 with fused
// operations, 1.7·2^-24 without (torch's own: 1.03; the polynomial's: 0.03).
VITQ_INLINE F exp2_nonpositive(F x) {
  x = max(set(-126.0f), x);  // in this order NaN stays
  const F magic = set(12582912.0f);
  const F shifted = x + magic;
  const F r = x - (shifted - magic);
  F p = set(0.000153458124f);
  p = fma(p, r, set(0.00133999309f));
  p = fma(p, r, set(0.00961848907f));
  p = fma(p, r, set(0.0555032864f));
  p = fma(p, r, set(0.240226462f));
  p = fma(p, r, set(0.693147182f));
  p = fma(p, r, set(1.0f));
  return (F)((I)p + ((I)shifted << 23));
}

// log2 x for normal x > 0, absolute error < 2^-24·(2 + |log2 x|).
VITQ_INLINE F log2_positive(F x) {
  const I bits = (I)x - 0x3f3504f3;  // sqrt(1/2): the mantissa is taken in [sqrt(1/2), sqrt(2))
  const F exponent = to_float(bits >> 23);
  const F m = (F)((bits & 0x007fffff) + 0x3f3504f3);
  const F s = (m - 1.0f) / (m + 1.0f), ss = s * s;
  F p = set(0.43173470f);
  p = fma(p, ss, set(0.57671444f));
  p = fma(p, ss, set(0.96179885f));
  p = fma(p, ss, set(2.8853901f));
  return fma(p, s, exponent);
}

VITQ_INLINE F sqrt(F v) {
#if defined(__AVX512F__)
  return (F)_mm512_sqrt_ps((__m512)v);
#elif defined(__AVX2__)
  return (F)_mm256_sqrt_ps((__m256)v);
#else
  for (int i = 0; i < kLanes; ++i) v[i] = __builtin_sqrtf(v[i]);
  return v;
#endif
}

}  // namespace vitq::VITQ_ISA::attention
