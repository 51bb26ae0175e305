// Native-width float vectors on the compilers' generic vectors: one source for 4 (portable), 8 (AVX2) and 16
// (AVX-512) lanes. Included by kernels only; everything lives in the namespace of the instruction set,
// because two translation units compiled with different flags must not share one inline function.
#pragma once

#ifndef VITQ_ISA
#error "common/simd.h belongs to *_cpu.cpp kernels, which are compiled once per instruction set"
#endif

#include <cstdint>
#include <cstring>

#if defined(__AVX2__)
#include <immintrin.h>
#endif

#define VITQ_INLINE static inline __attribute__((always_inline))
// Register tiles: inlined into a larger function, their accumulators may be spilled.
#define VITQ_TILE static __attribute__((noinline))
#define VITQ_LAMBDA __attribute__((always_inline))

namespace vitq::VITQ_ISA {

#if defined(__AVX512F__)
constexpr int kLanes = 16;
#elif defined(__AVX2__)
constexpr int kLanes = 8;
#else
constexpr int kLanes = 4;
#endif

typedef float F __attribute__((vector_size(4 * kLanes)));
typedef int32_t I __attribute__((vector_size(4 * kLanes)));
typedef uint32_t U __attribute__((vector_size(4 * kLanes)));
typedef double D __attribute__((vector_size(4 * kLanes)));  // half the lanes
typedef float HalfF __attribute__((vector_size(2 * kLanes)));

template <class V, class T>
VITQ_INLINE V load_as(const T* p) {
  V v;
  std::memcpy(&v, p, sizeof(V));
  return v;
}
VITQ_INLINE F load(const float* p) { return load_as<F>(p); }
VITQ_INLINE I load(const int32_t* p) { return load_as<I>(p); }
template <class V, class T>
VITQ_INLINE void store(T* p, V v) {
  std::memcpy(p, &v, sizeof(V));
}

VITQ_INLINE F set(float x) { return x - F{}; }
VITQ_INLINE I set(int32_t x) { return x - I{}; }

// The first n < kLanes elements (the others zero).
VITQ_INLINE F load_first(const float* p, int64_t n) {
#if defined(__AVX512F__)
  return (F)_mm512_maskz_loadu_ps((__mmask16)((1u << n) - 1), p);
#else
  F v{};
  std::memcpy(&v, p, 4 * static_cast<size_t>(n));
  return v;
#endif
}
VITQ_INLINE void store_first(float* p, F v, int64_t n) {
#if defined(__AVX512F__)
  _mm512_mask_storeu_ps(p, (__mmask16)((1u << n) - 1), (__m512)v);
#else
  std::memcpy(p, &v, 4 * static_cast<size_t>(n));
#endif
}

VITQ_INLINE F load_upto(const float* p, int64_t n) { return n >= kLanes ? load(p) : load_first(p, n); }
VITQ_INLINE void store_upto(float* p, F v, int64_t n) {
  if (n >= kLanes)
    store(p, v);
  else
    store_first(p, v, n);
}

// a*b + c, rounded once where the machine can.
VITQ_INLINE F fma(F a, F b, F c) {
#if defined(__AVX512F__)
  return (F)_mm512_fmadd_ps((__m512)a, (__m512)b, (__m512)c);
#elif defined(__FMA__)
  return (F)_mm256_fmadd_ps((__m256)a, (__m256)b, (__m256)c);
#else
  return a * b + c;
#endif
}

// b where an operand is NaN. (Compilers make a compare and a blend of `a > b ? a : b`.)
#if defined(__AVX512F__)
VITQ_INLINE F min(F a, F b) { return (F)_mm512_min_ps((__m512)a, (__m512)b); }
VITQ_INLINE F max(F a, F b) { return (F)_mm512_max_ps((__m512)a, (__m512)b); }
VITQ_INLINE I max(I a, I b) { return (I)_mm512_maskz_max_epi32(0xffff, (__m512i)a, (__m512i)b); }
#elif defined(__AVX2__)
VITQ_INLINE F min(F a, F b) { return (F)_mm256_min_ps((__m256)a, (__m256)b); }
VITQ_INLINE F max(F a, F b) { return (F)_mm256_max_ps((__m256)a, (__m256)b); }
VITQ_INLINE I max(I a, I b) { return (I)_mm256_max_epi32((__m256i)a, (__m256i)b); }
#else
VITQ_INLINE F min(F a, F b) { return a < b ? a : b; }
VITQ_INLINE F max(F a, F b) { return a > b ? a : b; }
VITQ_INLINE I max(I a, I b) { return a > b ? a : b; }
#endif
VITQ_INLINE F abs(F a) { return (F)((U)a & 0x7fffffffu); }
VITQ_INLINE F copysign(F magnitude, F sign) {
  return (F)(((U)magnitude & 0x7fffffffu) | ((U)sign & 0x80000000u));
}

VITQ_INLINE F to_float(I v) { return __builtin_convertvector(v, F); }

// Nearest integer, ties to even, for |v| < 2^22.
VITQ_INLINE I round_to_int(F v) {
#if defined(__AVX512F__)
  return (I)_mm512_cvtps_epi32((__m512)v);
#elif defined(__AVX2__)
  return (I)_mm256_cvtps_epi32((__m256)v);
#else
  const F magic = set(12582912.0f);  // 1.5 * 2^23: the unit in the last place is 1
  return (I)(v + magic) - (I)magic;
#endif
}

// kLanes codes in [-128, 127].
VITQ_INLINE void store_int8(int8_t* p, I v) {
#if defined(__AVX512F__)
  _mm_storeu_si128((__m128i*)p, _mm512_cvtepi32_epi8((__m512i)v));
#elif defined(__AVX2__)
  const __m256i w = (__m256i)v;
  const __m128i words = _mm_packs_epi32(_mm256_castsi256_si128(w), _mm256_extracti128_si256(w, 1));
  _mm_storel_epi64((__m128i*)p, _mm_packs_epi16(words, words));
#else
  for (int i = 0; i < kLanes; ++i) p[i] = static_cast<int8_t>(v[i]);
#endif
}

// Reductions of all lanes, pairwise.
#if defined(__AVX2__)
VITQ_INLINE float sum(__m256 v) {
  __m128 a = _mm_add_ps(_mm256_castps256_ps128(v), _mm256_extractf128_ps(v, 1));
  a = _mm_add_ps(a, _mm_movehl_ps(a, a));
  return _mm_cvtss_f32(_mm_add_ss(a, _mm_movehdup_ps(a)));
}
VITQ_INLINE double sum(__m256d v) {
  const __m128d a = _mm_add_pd(_mm256_castpd256_pd128(v), _mm256_extractf128_pd(v, 1));
  return _mm_cvtsd_f64(_mm_add_sd(a, _mm_unpackhi_pd(a, a)));
}
VITQ_INLINE float max_of(__m256 v) {
  __m128 a = _mm_max_ps(_mm256_castps256_ps128(v), _mm256_extractf128_ps(v, 1));
  a = _mm_max_ps(a, _mm_movehl_ps(a, a));
  return _mm_cvtss_f32(_mm_max_ss(a, _mm_movehdup_ps(a)));
}
VITQ_INLINE int32_t max_of(__m256i v) {
  __m128i a = _mm_max_epi32(_mm256_castsi256_si128(v), _mm256_extracti128_si256(v, 1));
  a = _mm_max_epi32(a, _mm_unpackhi_epi64(a, a));
  return _mm_cvtsi128_si32(_mm_max_epi32(a, _mm_shuffle_epi32(a, 1)));
}
#endif
#if defined(__AVX512F__)
// Half 0 or 1. The zero-masked form: GCC 12 warns of the undefined operand in the plain one.
template <int kHalf>
VITQ_INLINE __m256d half(__m512d v) {
  return _mm512_maskz_extractf64x4_pd(0xf, v, kHalf);
}
template <int kHalf>
VITQ_INLINE __m256 half(F v) {
  return _mm256_castpd_ps(half<kHalf>(_mm512_castps_pd((__m512)v)));
}
template <int kHalf>
VITQ_INLINE __m256i half(I v) {
  return _mm256_castpd_si256(half<kHalf>(_mm512_castsi512_pd((__m512i)v)));
}
VITQ_INLINE float sum(F v) { return sum(_mm256_add_ps(half<0>(v), half<1>(v))); }
VITQ_INLINE double sum(D v) { return sum(_mm256_add_pd(half<0>(v), half<1>(v))); }
VITQ_INLINE float max_of(F v) { return max_of(_mm256_max_ps(half<0>(v), half<1>(v))); }
VITQ_INLINE int32_t max_of(I v) { return max_of(_mm256_max_epi32(half<0>(v), half<1>(v))); }
#elif defined(__AVX2__)
VITQ_INLINE int32_t max_of(I v) { return max_of((__m256i)v); }
#else
VITQ_INLINE float sum(F v) { return (v[0] + v[2]) + (v[1] + v[3]); }
VITQ_INLINE double sum(D v) { return v[0] + v[1]; }
template <class V>
VITQ_INLINE auto max_of(V v) {
  auto top = v[0];
  for (int i = 1; i < kLanes; ++i) top = v[i] > top ? v[i] : top;
  return top;
}
#endif

// v as doubles, low half and high half.
VITQ_INLINE D low_double(F v) {
  HalfF h;
  std::memcpy(&h, &v, sizeof(h));
  return __builtin_convertvector(h, D);
}
VITQ_INLINE D high_double(F v) {
  HalfF h;
  std::memcpy(&h, reinterpret_cast<const char*>(&v) + sizeof(h), sizeof(h));
  return __builtin_convertvector(h, D);
}

// fn(Index<0>) ... fn(Index<N − 1>), unrolled in the front end: arrays of vectors indexed by constants become
// registers, which loops that the optimizer unrolls later do not guarantee (GCC 12 then keeps accumulators in
// memory).
template <int V>
struct Index {
  constexpr operator int() const { return V; }
};
template <int N, class Fn>
VITQ_INLINE void unroll(const Fn& fn) {
  if constexpr (N > 0) {
    unroll<N - 1>(fn);
    fn(Index<N - 1>{});
  }
}

// Zeros every element of a two-dimensional array of vectors; `= {}` would be one store to memory that GCC
// keeps.
template <class V, int M, int N>
VITQ_INLINE void clear(V (&a)[M][N]) {
  unroll<M>([&](auto i) VITQ_LAMBDA { unroll<N>([&](auto j) VITQ_LAMBDA { a[i][j] = V{}; }); });
}

template <class T>
VITQ_INLINE T smaller(T a, T b) {
  return a < b ? a : b;
}

}  // namespace vitq::VITQ_ISA
