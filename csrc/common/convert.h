// Rows of float32, float16 or bfloat16 in and out of float32: kernels compute in float32 only.
#pragma once

#include "common/dtype.h"
#include "common/simd.h"

namespace vitq::VITQ_ISA {

typedef uint16_t H __attribute__((vector_size(2 * kLanes)));

VITQ_INLINE F from_half(H h) {
#if defined(__AVX512F__)
  return (F)_mm512_cvtph_ps((__m256i)h);
#elif defined(__F16C__)
  return (F)_mm256_cvtph_ps((__m128i)h);
#else
  const U u = __builtin_convertvector(h, U);
  // The half's exponent and mantissa as a float that is too small by 2^112: exact for subnormals, too.
  const F scaled = (F)((u & 0x7fffu) << 13) * 0x1p112f;
  const U special = (U)((u & 0x7c00u) == 0x7c00u) & 0x7f800000u;
  return (F)((U)scaled | special | ((u & 0x8000u) << 16));
#endif
}

VITQ_INLINE H to_half(F v) {
#if defined(__AVX512F__)
  return (H)_mm512_cvtps_ph((__m512)v, _MM_FROUND_TO_NEAREST_INT);
#elif defined(__F16C__)
  return (H)_mm256_cvtps_ph((__m256)v, _MM_FROUND_TO_NEAREST_INT);
#else
  const U u = (U)v, a = u & 0x7fffffffu;
  const U normal = (a + 0xfffu + ((a >> 13) & 1u) - (112u << 23)) >> 13;
  const U subnormal = (U)((F)a + 0.5f) - 0x3f000000u;  // the adder rounds to the half's last subnormal place
  const U special = a > 0x7f800000u ? U{} + 0x7e00u : U{} + 0x7c00u;
  const U magnitude = a >= 0x47800000u ? special : (a < 0x38800000u ? subnormal : normal);
  return __builtin_convertvector(magnitude | ((u >> 16) & 0x8000u), H);
#endif
}

VITQ_INLINE F from_bfloat(H h) { return (F)(__builtin_convertvector(h, U) << 16); }

VITQ_INLINE H to_bfloat(F v) {
  const U u = (U)v;
  const U rounded = (u + 0x7fffu + ((u >> 16) & 1u)) >> 16;
  return __builtin_convertvector((u & 0x7fffffffu) > 0x7f800000u ? U{} + 0x7fc0u : rounded, H);
}

template <class From>
VITQ_INLINE void widen(float* out, const uint16_t* in, int64_t n, From from) {
  int64_t i = 0;
  for (; i + kLanes <= n; i += kLanes) store(out + i, from(load_as<H>(in + i)));
  if (i < n) {
    H h{};
    std::memcpy(&h, in + i, 2 * static_cast<size_t>(n - i));
    store_first(out + i, from(h), n - i);
  }
}

template <class To>
VITQ_INLINE void narrow(uint16_t* out, const float* in, int64_t n, To to) {
  int64_t i = 0;
  for (; i + kLanes <= n; i += kLanes) store(out + i, to(load(in + i)));
  if (i < n) {
    const H h = to(load_first(in + i, n - i));
    std::memcpy(out + i, &h, 2 * static_cast<size_t>(n - i));
  }
}

// out[0..n) = in[0..n) as float32.
VITQ_INLINE void read_row(float* out, AnyFloat in, int64_t n) {
  if (in.dtype == DType::f32) {
    std::memcpy(out, in.data, 4 * static_cast<size_t>(n));
  } else if (in.dtype == DType::f16) {
    widen(out, static_cast<const uint16_t*>(in.data), n, [](H h) VITQ_LAMBDA { return from_half(h); });
  } else {
    widen(out, static_cast<const uint16_t*>(in.data), n, [](H h) VITQ_LAMBDA { return from_bfloat(h); });
  }
}

// Elements [offset, offset + n) of `out` = in[0..n), rounded to `dtype` once.
VITQ_INLINE void write_row(void* out, DType dtype, int64_t offset, const float* in, int64_t n) {
  if (dtype == DType::f32) {
    std::memcpy(static_cast<float*>(out) + offset, in, 4 * static_cast<size_t>(n));
  } else if (dtype == DType::f16) {
    narrow(static_cast<uint16_t*>(out) + offset, in, n, [](F v) VITQ_LAMBDA { return to_half(v); });
  } else {
    narrow(static_cast<uint16_t*>(out) + offset, in, n, [](F v) VITQ_LAMBDA { return to_bfloat(v); });
  }
}

}  // namespace vitq::VITQ_ISA
