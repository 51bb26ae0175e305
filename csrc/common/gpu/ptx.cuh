// Instructions by name. Where a C++ compiler reads this, the warp-wide ones follow the fragment layouts of
// the PTX manual, written down once more in fragment.h.
#pragma once

#include <cmath>
#include <cstring>

#include "common/dtype.h"
#include "common/gpu/device.cuh"

#if !defined(__CUDACC__)
#include "common/gpu/fragment.h"
#endif

namespace vitq::gpu {

#if defined(__CUDACC__)

VITQ_DEVICE uint32_t shared_address(const void* p) {
  return static_cast<uint32_t>(__cvta_generic_to_shared(p));
}

// 16 bytes of global into shared memory, of which the first `valid` (0 or 16) are read and the others are
// zeros.
VITQ_DEVICE void copy_async(void* to, const void* from, int valid) {
  asm volatile("cp.async.cg.shared.global [%0], [%1], 16, %2;" ::"r"(shared_address(to)), "l"(from),
               "r"(valid)
               : "memory");
}
VITQ_DEVICE void commit_copies() { asm volatile("cp.async.commit_group;" ::: "memory"); }
template <int kNewestLeft>
VITQ_DEVICE void wait_copies() {
  asm volatile("cp.async.wait_group %0;" ::"n"(kNewestLeft) : "memory");
}

// d[16, 8] += a[16, 32]·b[8, 32] of int8.
VITQ_DEVICE void mma_s8(int (&d)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1) {
  asm volatile(
      "mma.sync.aligned.m16n8k32.row.col.s32.s8.s8.s32 {%0,%1,%2,%3}, {%4,%5,%6,%7}, {%8,%9}, {%0,%1,%2,%3};"
      : "+r"(d[0]), "+r"(d[1]), "+r"(d[2]), "+r"(d[3])
      : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1));
}
// d[16, 8] += a[16, 32]·b[8, 32], a of uint8, b of int8.
VITQ_DEVICE void mma_u8s8(int (&d)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1) {
  asm volatile(
      "mma.sync.aligned.m16n8k32.row.col.s32.u8.s8.s32 {%0,%1,%2,%3}, {%4,%5,%6,%7}, {%8,%9}, {%0,%1,%2,%3};"
      : "+r"(d[0]), "+r"(d[1]), "+r"(d[2]), "+r"(d[3])
      : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1));
}
// d[16, 8] += a[16, 64]·b[8, 64] of int4.
VITQ_DEVICE void mma_s4(int (&d)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1) {
  asm volatile(
      "mma.sync.aligned.m16n8k64.row.col.s32.s4.s4.s32 {%0,%1,%2,%3}, {%4,%5,%6,%7}, {%8,%9}, {%0,%1,%2,%3};"
      : "+r"(d[0]), "+r"(d[1]), "+r"(d[2]), "+r"(d[3])
      : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1));
}
// d[16, 8] += a[16, 16]·b[8, 16] of float16 or bfloat16.
template <DType kType>
VITQ_DEVICE void mma_16(float (&d)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1) {
  static_assert(kType != DType::f32);
  if constexpr (kType == DType::f16) {
    asm volatile(
        "mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32 {%0,%1,%2,%3}, {%4,%5,%6,%7}, {%8,%9}, "
        "{%0,%1,%2,%3};"
        : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])
        : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1));
  } else {
    asm volatile(
        "mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 {%0,%1,%2,%3}, {%4,%5,%6,%7}, {%8,%9}, "
        "{%0,%1,%2,%3};"
        : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])
        : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1));
  }
}

// Four matrices [8, 16 bytes] in shared memory: lane 8i + r names row r of matrix i (16 bytes, aligned), and
// of each matrix i lane 4r + c receives 4 bytes of row r from byte 4c on.
VITQ_DEVICE void load_matrices(uint32_t (&out)[4], const void* row) {
  asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0,%1,%2,%3}, [%4];"
               : "=r"(out[0]), "=r"(out[1]), "=r"(out[2]), "=r"(out[3])
               : "r"(shared_address(row))
               : "memory");
}
// Four 8x8 matrices of 16 bits in shared memory, transposed: lane 8i + r names row r of matrix i (16 bytes,
// aligned), and of each matrix i lane 4n + c receives rows 2c and 2c + 1 of column n.
VITQ_DEVICE void load_transposed(uint32_t (&out)[4], const void* row) {
  asm volatile("ldmatrix.sync.aligned.m8n8.x4.trans.shared.b16 {%0,%1,%2,%3}, [%4];"
               : "=r"(out[0]), "=r"(out[1]), "=r"(out[2]), "=r"(out[3])
               : "r"(shared_address(row))
               : "memory");
}

template <class T>
VITQ_DEVICE T shuffle_xor(T value, int lanes) {
  return __shfl_xor_sync(0xffffffffu, value, lanes);
}

// Bits of `x` where the mask has ones, of `y` where it has zeros.
VITQ_DEVICE uint32_t chosen_bits(uint32_t mask, uint32_t x, uint32_t y) {
  uint32_t out;
  asm("lop3.b32 %0, %1, %2, %3, 0xca;" : "=r"(out) : "r"(mask), "r"(x), "r"(y));
  return out;
}
// (x & mask) ^ flip.
VITQ_DEVICE uint32_t and_xor(uint32_t x, uint32_t mask, uint32_t flip) {
  uint32_t out;
  asm("lop3.b32 %0, %1, %2, %3, 0x6a;" : "=r"(out) : "r"(x), "r"(mask), "r"(flip));
  return out;
}

// Byte i of the result is byte (selector >> 4i) & 7 of b:a.
VITQ_DEVICE uint32_t permute(uint32_t a, uint32_t b, uint32_t selector) {
  return __byte_perm(a, b, selector);
}

VITQ_DEVICE float float_of_half(uint16_t bits) {
  float out;
  asm("cvt.f32.f16 %0, %1;" : "=f"(out) : "h"(bits));
  return out;
}
VITQ_DEVICE uint16_t half_of(float value) {
  uint16_t out;
  asm("cvt.rn.f16.f32 %0, %1;" : "=h"(out) : "f"(value));
  return out;
}
VITQ_DEVICE uint16_t bfloat_of(float value) {
  uint16_t out;
  asm("cvt.rn.bf16.f32 %0, %1;" : "=h"(out) : "f"(value));
  return out;
}
VITQ_DEVICE uint32_t bits_of(float value) { return __float_as_uint(value); }
VITQ_DEVICE float float_of_bits(uint32_t bits) { return __uint_as_float(bits); }
VITQ_DEVICE float round_even(float value) { return rintf(value); }
// NaN if either is: what is not a number must not look small.
VITQ_DEVICE float max_or_nan(float a, float b) {
  float out;
  asm("max.NaN.f32 %0, %1, %2;" : "=f"(out) : "f"(a), "f"(b));
  return out;
}
VITQ_DEVICE float min_or_nan(float a, float b) {
  float out;
  asm("min.NaN.f32 %0, %1, %2;" : "=f"(out) : "f"(a), "f"(b));
  return out;
}

// One instruction each, a relative error of 2^-22 (of the logarithm: absolute, near 1; of the reciprocal:
// 2^-23); subnormal numbers are zeros.
VITQ_DEVICE float fast_exp2(float x) {
  float out;
  asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(out) : "f"(x));
  return out;
}
VITQ_DEVICE float fast_log2(float x) {
  float out;
  asm("lg2.approx.ftz.f32 %0, %1;" : "=f"(out) : "f"(x));
  return out;
}
VITQ_DEVICE float fast_sqrt(float x) {
  float out;
  asm("sqrt.approx.ftz.f32 %0, %1;" : "=f"(out) : "f"(x));
  return out;
}
VITQ_DEVICE float fast_reciprocal(float x) {
  float out;
  asm("rcp.approx.ftz.f32 %0, %1;" : "=f"(out) : "f"(x));
  return out;
}

// The value before; all of the block's writes before it are seen by who finds its result.
VITQ_DEVICE unsigned count_arrival(unsigned* counter, unsigned last) {
  __threadfence();
  return atomicInc(counter, last);
}
VITQ_DEVICE void see_arrivals() { __threadfence(); }

// In shared or global memory.
VITQ_DEVICE void raise_to(unsigned* to, unsigned value) { atomicMax(to, value); }

// Both rounded to 16 bits, `low` in the low half. Volatile: out of a loop of products, where a compiler would
// move it, a whole operand's pairs would take its registers.
template <DType kType>
VITQ_DEVICE uint32_t pack_16(float low, float high) {
  uint32_t out;
  if constexpr (kType == DType::f16) {
    asm volatile("cvt.rn.f16x2.f32 %0, %1, %2;" : "=r"(out) : "f"(high), "f"(low));
  } else {
    asm volatile("cvt.rn.bf16x2.f32 %0, %1, %2;" : "=r"(out) : "f"(high), "f"(low));
  }
  return out;
}

#else

inline void copy_async(void* to, const void* from, int valid) { emulated::copy_async(to, from, 16, valid); }
inline void commit_copies() { emulated::commit_copies(); }
template <int kNewestLeft>
void wait_copies() {
  emulated::wait_copies(kNewestLeft);
}

inline void mma_s8(int (&d)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1) {
  emulated::Integers call{d, {a[0], a[1], a[2], a[3]}, {b0, b1}};
  emulated::together("mma m16n8k32 s8", &call, emulated::multiply_integers<8>);
}
inline void mma_u8s8(int (&d)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1) {
  emulated::Integers call{d, {a[0], a[1], a[2], a[3]}, {b0, b1}};
  emulated::together("mma m16n8k32 u8 s8", &call, emulated::multiply_integers<8, true>);
}
inline void mma_s4(int (&d)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1) {
  emulated::Integers call{d, {a[0], a[1], a[2], a[3]}, {b0, b1}};
  emulated::together("mma m16n8k64 s4", &call, emulated::multiply_integers<4>);
}
template <DType kType>
void mma_16(float (&d)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1) {
  emulated::Floats call{d, {a[0], a[1], a[2], a[3]}, {b0, b1}};
  constexpr auto widen = kType == DType::f16 ? emulated::float_of_half : emulated::float_of_bfloat;
  emulated::together("mma m16n8k16", &call, emulated::multiply_floats<widen>);
}

inline void load_matrices(uint32_t (&out)[4], const void* row) {
  emulated::expect_row(row);
  emulated::Matrices call{out, row};
  emulated::together("ldmatrix x4", &call, emulated::load_matrices<false>);
}
inline void load_transposed(uint32_t (&out)[4], const void* row) {
  emulated::expect_row(row);
  emulated::Matrices call{out, row};
  emulated::together("ldmatrix x4 trans", &call, emulated::load_matrices<true>);
}

template <class T>
T shuffle_xor(T value, int lanes) {
  emulated::Shuffle call{&value, sizeof(T), lanes};
  emulated::together("shuffle", &call, emulated::exchange);
  return value;
}

inline uint32_t chosen_bits(uint32_t mask, uint32_t x, uint32_t y) { return (x & mask) | (y & ~mask); }
inline uint32_t and_xor(uint32_t x, uint32_t mask, uint32_t flip) { return (x & mask) ^ flip; }
inline uint32_t permute(uint32_t a, uint32_t b, uint32_t selector) {
  const uint64_t both = static_cast<uint64_t>(b) << 32 | a;
  uint32_t out = 0;
  for (int i = 0; i < 4; ++i) {
    out |= static_cast<uint32_t>(both >> (selector >> 4 * i & 7) * 8 & 0xff) << 8 * i;
  }
  return out;
}

inline float float_of_half(uint16_t bits) { return emulated::float_of_half(bits); }
inline uint16_t half_of(float value) { return emulated::half_of(value); }
inline uint16_t bfloat_of(float value) { return emulated::bfloat_of(value); }
inline uint32_t bits_of(float value) {
  uint32_t bits;
  std::memcpy(&bits, &value, 4);
  return bits;
}
inline float float_of_bits(uint32_t bits) {
  float value;
  std::memcpy(&value, &bits, 4);
  return value;
}
inline float round_even(float value) { return __builtin_rintf(value); }
inline float max_or_nan(float a, float b) { return a > b || a != a ? a : b; }
inline float min_or_nan(float a, float b) { return a < b || a != a ? a : b; }

inline float fast_exp2(float x) { return std::exp2(x); }
inline float fast_log2(float x) { return std::log2(x); }
inline float fast_sqrt(float x) { return std::sqrt(x); }
inline float fast_reciprocal(float x) { return 1.0f / x; }

inline unsigned count_arrival(unsigned* counter, unsigned last) {
  const unsigned before = *counter;
  *counter = before >= last ? 0 : before + 1;
  return before;
}
inline void see_arrivals() {}
inline void raise_to(unsigned* to, unsigned value) { *to = *to < value ? value : *to; }

template <DType kType>
uint32_t pack_16(float low, float high) {
  const uint32_t l = kType == DType::f16 ? half_of(low) : bfloat_of(low);
  const uint32_t h = kType == DType::f16 ? half_of(high) : bfloat_of(high);
  return l | h << 16;
}

#endif

VITQ_DEVICE float float_of_bfloat(uint16_t bits) { return float_of_bits(static_cast<uint32_t>(bits) << 16); }

template <DType kType>
VITQ_DEVICE float float_of_16(uint32_t bits) {
  return kType == DType::f16 ? float_of_half(static_cast<uint16_t>(bits))
                             : float_of_bfloat(static_cast<uint16_t>(bits));
}

VITQ_DEVICE float load(const AnyFloat& x, int64_t i) {
  if (x.dtype == DType::f32) return static_cast<const float*>(x.data)[i];
  const uint16_t bits = static_cast<const uint16_t*>(x.data)[i];
  return x.dtype == DType::f16 ? float_of_half(bits) : float_of_bfloat(bits);
}

VITQ_DEVICE void store(void* out, DType dtype, int64_t i, float value) {
  if (dtype == DType::f32) {
    static_cast<float*>(out)[i] = value;
  } else {
    static_cast<uint16_t*>(out)[i] = dtype == DType::f16 ? half_of(value) : bfloat_of(value);
  }
}

}  // namespace vitq::gpu
