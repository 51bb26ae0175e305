// Scalar float functions of epilogues, in the order of operations of the oracles.
#pragma once

#include <cmath>

#include "common/gpu/ptx.cuh"

namespace vitq::gpu {

enum class Gelu : int { none = 0, erf = 1, tanh = 2 };

VITQ_DEVICE float gelu(float x, Gelu kind) {
  if (kind == Gelu::erf) return x * (0.5f * (1.0f + erff(x * 0.70710678f)));
  if (kind == Gelu::tanh) {
    // x/2·(1 + tanh u) = x/(1 + e^(−2u)); below −9.6 the exponential would overflow to 0·∞ on the way.
    const float c = x < -9.6f ? -9.6f : x;
    return c / (1.0f + expf(c * (-1.59576912f + c * c * -0.0713548164f)));
  }
  return x;
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
