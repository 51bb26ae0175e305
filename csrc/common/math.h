// GELU on native float vectors. Errors are bounded in tests/kernels against float64 (at most twice torch's
// own float32 error). Polynomials: our own minimax fits (relative error of the fit in brackets).
#pragma once

#include "common/gelu_table.h"
#include "common/simd.h"

namespace vitq::VITQ_ISA {

#if defined(__AVX2__)

#if defined(__AVX512F__)
static constexpr auto &kErfTail = kErfTail32, &kTanhTail = kTanhTail32;
VITQ_INLINE F look_up(const float (&row)[32], F low_bits) {
  return (F)_mm512_permutex2var_ps((__m512)load(row), (__m512i)low_bits, (__m512)load(row + 16));
}
#else
static constexpr auto &kErfTail = kErfTail8, &kTanhTail = kTanhTail8;
VITQ_INLINE F look_up(const float (&row)[8], F low_bits) {
  return (F)_mm256_permutevar8x32_ps((__m256)load(row), (__m256i)low_bits);
}
#endif

// x·(1 − t(x)) or x·t(−x): half the instructions of the closed forms below, no division; one instruction
// looks a register of coefficients up. 0 below −5.96 (AVX2: −5.68), where the result is less than 1e-7; NaN
// for NaN.
template <int kTerms, int kPieces>
VITQ_INLINE F gelu_by_tail(F x, const float (&table)[kTerms][kPieces]) {
  constexpr float step = tail_step(kPieces);
  x = max(set(-12.5f), x);
  const F a = min(set((kPieces - 1) * step), abs(x));
  const F magic = set(12582912.0f);  // 1.5·2^23: adding it rounds to an integer, which its low bits then hold
  const F shifted = fma(a, set(1.0f / step), magic);
  const F r = fma(shifted - magic, set(-step), a);
  F t = look_up(table[kTerms - 1], shifted);
  unroll<kTerms - 1>([&](auto i) VITQ_LAMBDA { t = fma(t, r, look_up(table[kTerms - 2 - i], shifted)); });
  return x * (x < 0.0f ? t : 1.0f - t);
}
VITQ_INLINE F gelu_erf(F x) { return gelu_by_tail(x, kErfTail); }
VITQ_INLINE F gelu_tanh(F x) { return gelu_by_tail(x, kTanhTail); }

#else

// e^x for x in [−87, 88], where the result is normal; NaN for NaN. [3e-9]
VITQ_INLINE F exp_normal(F x) {
  const F magic = set(12582912.0f);  // 1.5·2^23: adding it rounds to an integer, which its low bits then hold
  const F shifted = fma(x, set(1.44269504f), magic);
  const F n = shifted - magic;
  // n·ln 2 in two parts, the first with few enough bits for an exact product.
  const F r = fma(n, set(-1.42860677e-6f), fma(n, set(-0.693145752f), x));
  F p = fma(r, set(0.00138142216f), set(0.00836889911f));
  p = fma(p, r, set(0.0416684039f));
  p = fma(p, r, set(0.166665196f));
  p = fma(p, r, set(0.49999994f));
  p = fma(p * r, r, r) + 1.0f;
  return (F)((U)p + ((U)shifted << 23));
}

// x·Φ(x), Φ(−a) = exp(−a²/2)·P(t) with t = 1/(1 + 0.21·a) [1.6e-8]: no cancellation for negative x. Below
// −12.5, where the result is less than 1e-34, it stays what it is there. NaN for NaN.
VITQ_INLINE F gelu_erf(F x) {
  x = max(set(-12.5f), x);
  const F a = min(set(12.5f), abs(x));
  const F t = 1.0f / fma(a, set(0.21f), set(1.0f));
  F p = fma(t, set(-0.0716560185f), set(0.283587128f));
  p = fma(p, t, set(-0.330250293f));
  p = fma(p, t, set(0.349397361f));
  p = fma(p, t, set(-0.0939225778f));
  p = fma(p, t, set(0.124871559f));
  p = fma(p, t, set(0.069192484f));
  p = fma(p, t, set(0.085068807f));
  p = fma(p, t, set(0.0837115794f));
  const F lower = p * t * exp_normal(a * a * -0.5f);
  return x * (x < 0.0f ? lower : 1.0f - lower);
}

// x/2·(1 + tanh u) = x/(1 + e^(−2u)), u = √(2/π)·(x + 0.044715·x³). Below −9.6, where the result is less than
// 1e-32, it stays what it is there. NaN for NaN.
VITQ_INLINE F gelu_tanh(F x) {
  x = max(set(-9.6f), x);
  const F minus_2u = x * fma(x * x, set(-2.0f * 0.797884561f * 0.044715f), set(-2.0f * 0.797884561f));
  return x / (1.0f + exp_normal(max(set(-80.0f), minus_2u)));
}

#endif

}  // namespace vitq::VITQ_ISA
