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

// Two or four of them, the first in the lowest byte. Past 1.5·2^23 a float's last place is 1 and its low bits
// hold the integer: one addition rounds and converts, where two conversions would share a unit of a quarter
// of the rate.
template <int kCount>
VITQ_DEVICE uint32_t codes_of(const Codes& c, const float (&values)[kCount], float inverse, Clamp range) {
  static_assert(kCount == 2 || kCount == 4);
  uint32_t bits[kCount];
  VITQ_UNROLL
  for (int i = 0; i < kCount; ++i) {
    const float code = values[i] * inverse;
    bits[i] = bits_of((code != code ? 0.0f : clamp(code, range.low, range.high)) + 12582912.0f);
  }
  uint32_t out = permute(bits[0], bits[1], 0x0040);
  if constexpr (kCount == 4) out = permute(out, permute(bits[2], bits[3], 0x0040), 0x5410);
  if (c.zero_point != 0) {
    // Byte by byte: no carry leaves the seven low bits of one.
    const uint32_t zero_point = static_cast<uint8_t>(c.zero_point) * 0x01010101u;
    out = ((out & 0x7f7f7f7fu) + (zero_point & 0x7f7f7f7fu)) ^ ((out ^ zero_point) & 0x80808080u);
  }
  if (c.lut != nullptr) {
    uint32_t levels = 0;
    VITQ_UNROLL
    for (int i = 0; i < kCount; ++i) {
      const uint32_t at = (out >> 8 * i & 0xffu) ^ 0x80u;  // code + 128
      levels |= static_cast<uint32_t>(static_cast<uint8_t>(c.lut[at])) << 8 * i;
    }
    out = levels;
  }
  return out;
}

}  // namespace vitq::gpu
