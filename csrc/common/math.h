// GELU on native float vectors. Errors are bounded in tests/kernels against float64 (at most twice torch's
// own float32 error). Polynomials: our own minimax fits (relative error of the fit in brackets).
#pragma once

#include "common/gelu_table.h"
#include "common/simd.h"

namespace vitq::VITQ_ISA {

#if defined(__AVX512F__)

// x·(1 − t(x)) or x·t(−x): half the instructions of the closed forms below, no division. Two registers hold a
// table of 32, which one instruction reads. 0 below −5.96, where the result is less than 1e-8; NaN for NaN.
VITQ_INLINE F gelu_by_tail(F x, const float (&table)[5][kTailPieces]) {
  x = max(set(-12.5f), x);
  const F a = min(set((kTailPieces - 1) * kTailStep), abs(x));
  const F magic = set(12582912.0f);  // 1.5·2^23: adding it rounds to an integer, which its low bits then hold
  const F shifted = fma(a, set(1.0f / kTailStep), magic);
  const F r = fma(shifted - magic, set(-kTailStep), a);
  const auto row = [&](int i) VITQ_LAMBDA {
    return (F)_mm512_permutex2var_ps((__m512)load(table[i]), (__m512i)shifted, (__m512)load(table[i] + 16));
  };
  F t = fma(row(4), r, row(3));
  t = fma(t, r, row(2));
  t = fma(t, r, row(1));
  t = fma(t, r, row(0));
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
