// Floats to codes: the fields of an ActQuant as a kernel takes them, and one lane's share of a row.
#pragma once

#include "common/gpu/float_math.cuh"

namespace vitq::gpu {

// As QuantTail of the CPU kernels; null q: no codes are wanted.
struct Codes {
  int8_t* q;           // out [M, N]
  float* out_scale;    // out [M, groups] where `scale` is null
  const float* scale;  // static [groups], or [M, groups] if scale_per_row; null: dynamic
  bool scale_per_row;
  int zero_point, qmin, qmax;
  int groups, width;        // width·groups = N
  const int32_t* row_qmax;  // [M] or null
  const int8_t* lut;        // [256], entry q + 128; or null
};

struct Clamp {
  float low, high;
};

VITQ_DEVICE Clamp clamp_of(const Codes& c, int row) {
  if (c.row_qmax == nullptr) {
    return {static_cast<float>(c.qmin - c.zero_point), static_cast<float>(c.qmax - c.zero_point)};
  }
  const float top = static_cast<float>(c.row_qmax[row]);
  return {-top, top};
}

VITQ_DEVICE int8_t code_of(const Codes& c, float value, float inverse, Clamp range) {
  float code = round_even(value * inverse);
  code = code != code ? 0.0f : clamp(code, range.low, range.high);
  const int q = static_cast<int>(code) + c.zero_point;
  return c.lut == nullptr ? static_cast<int8_t>(q) : c.lut[q + 128];
}

}  // namespace vitq::gpu
