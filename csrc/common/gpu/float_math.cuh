// Scalar float functions of epilogues, in the order of operations of the oracles.
#pragma once

#include <cmath>

#include "common/gpu/ptx.cuh"

namespace vitq::gpu {

enum class Gelu : int { none = 0, erf = 1, tanh = 2 };

// max(x, 0) − a·e/(1 + e), a = |x|: the second term is a·Φ(−a), e the odds of Φ(−a) (in the tanh form: of
// what stands for it). No cancellation, and the two approximate instructions err in the small term only.
// Beyond 12.5 the odds are 0, whatever the polynomial says.
template <class LogOdds>
VITQ_DEVICE float gelu_by_odds(float x, const LogOdds& log2_odds) {
  const float a = min_or_nan(fabsf(x), 12.5f);
  const float odds = fast_exp2(a * log2_odds(a * a));
  return fmaf(-a, odds * fast_reciprocal(1.0f + odds), fmaxf(x, 0.0f));
}

// Our own minimax fit of log2(Φ(−a)/Φ(a))/a in a², weighted by what it does to the result: 3e-8 of |x|.
VITQ_DEVICE float gelu_erf(float x) {
  return gelu_by_odds(x, [](float s) {
    float p = fmaf(s, -5.06723618e-9f, 3.81631274e-7f);
    p = fmaf(p, s, -1.14398335e-5f);
    p = fmaf(p, s, 1.59579939e-4f);
    p = fmaf(p, s, 9.40492289e-5f);
    p = fmaf(p, s, -0.104835122f);
    return fmaf(p, s, -2.3022093f);
  });
}

// log2 e^(−2u), u = √(2/π)·(a + 0.044715·a³).
VITQ_DEVICE float gelu_tanh(float x) {
  return gelu_by_odds(x, [](float s) { return fmaf(s, -0.102943240f, -2.30220818f); });
}

VITQ_DEVICE float clamp(float x, float low, float high) { return fminf(fmaxf(x, low), high); }

// As the low-rank branch takes a value: float16 saturates, so that a rare huge one is off by what it exceeds
// 65504 by, where an Inf would take its whole row along.
template <DType kType>
VITQ_DEVICE float branch_value(float x) {
  return kType == DType::f16 && x == x ? clamp(x, -65504.0f, 65504.0f) : x;
}
template <DType kType>
VITQ_DEVICE uint32_t pack_branch(float low, float high) {
  return pack_16<kType>(branch_value<kType>(low), branch_value<kType>(high));
}

// The scale of a group whose largest magnitude is `absmax`: 1 for zeros (and what underflows), NaN beyond
// float32.
VITQ_DEVICE float dynamic_scale(float absmax, float top) {
  if (absmax == 0.0f) return 1.0f;
  const float scale = absmax / top;
  if (!(scale < INFINITY)) return NAN;
  return scale == 0.0f ? 1.0f : scale;
}

}  // namespace vitq::gpu
