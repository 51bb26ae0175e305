// One row of scores to integer levels of its probabilities.
#pragma once

#include "common/simd.h"
#include "qattention/qattention_cpu.h"
#include "qattention/vector_math.h"

namespace vitq::VITQ_ISA::attention {

// What one call's Focus comes to.
//
// With b1 = 0 the codes are a plain multiple of an exponential, n·(u/b2)^(1/power) = K·exp((s − max)/power),
// so the exponent carries 1/power and no root is taken. Otherwise x = (u − b1)/(b2 − b1) is clamped first and
// rooted after.
struct FocusPlan {
  explicit FocusPlan(const Focus& f)
      : focus(f),
        direct(f.b1 == 0.0),
        total_of_exp(!f.row_anchor || !f.renormalize),
        exponent(1.4426950408889634 / (direct ? f.power : 1.0)),
        gain(f.top * __builtin_pow(f.b2, -1.0 / f.power)) {
    identity = true;
    for (int c = 0; c <= f.top; ++c) identity &= f.levels[c] == c;
  }
  // K of a row whose exponentials sum to `total`.
  float row_gain(float total) const {
    if (focus.power == 1.0) return static_cast<float>(gain / total);
    if (focus.power == 2.0) return static_cast<float>(gain / __builtin_sqrt(total));
    return static_cast<float>(gain * __builtin_pow(total, -1.0 / focus.power));
  }
  const Focus& focus;
  bool direct;
  bool total_of_exp;  // the row's sum of exponentials is needed (or else only whether it is NaN)
  bool identity;      // levels are the codes
  double exponent;    // scores are kept times this: log2 e, over the power if direct
  double gain;        // n·b2^(-1/power)
};

// What a row of scores is made of: z = (product·scale·key_scale + (bias + mask)·exponent) in FocusPlan's
// units.
struct RowScores {
  int32_t* product;  // [padded]; scores take its place where they are stored at all
  float scale;
  const float* key_scale;  // [padded], or null
  const float* bias;       // [keys], or null
  const float* mask;       // [keys], or null
  int64_t keys, padded;    // padded: a multiple of 16
};

struct RowResult {
  float sum;      // of exp(s − max) (of its root where that serves), NaN if any score is
  int64_t valid;  // keys with a score above −inf; exact where `valid` is asked for, else keys or 0
};

// Stores the scores as floats, −inf behind the last key, and marks valid keys with 0xff if `valid` is given.
VITQ_INLINE float store_scores(const RowScores& row, F exponent, uint8_t* valid, int64_t* count) {
  const F minus_inf = set(-__builtin_inff()), scale = set(row.scale);
  F top = minus_inf;
  I excluded{};
  for (int64_t j = 0; j < row.padded; j += kLanes) {
    const int64_t n = row.keys - j;
    F z = minus_inf;
    if (n > 0) {
      z = to_float(load(row.product + j)) * scale;
      if (row.key_scale != nullptr) z = z * load(row.key_scale + j);
      if (row.bias != nullptr) z = fma(load_upto(row.bias + j, n), exponent, z);
      if (row.mask != nullptr) z = fma(load_upto(row.mask + j, n), exponent, z);
      if (n < kLanes) z = lane_index() < set(static_cast<int32_t>(n)) ? z : minus_inf;
    }
    store(row.product + j, z);
    top = max(z, top);
    if (valid != nullptr) {
      const I out = z == minus_inf;
      excluded += out;
      store_bytes(valid + j, ~out & 255);
    }
  }
  if (valid != nullptr) {
    int64_t n = row.padded;
    for (int i = 0; i < kLanes; ++i) n += excluded[i];
    *count = n;
  }
  return max_of(top);
}

// Largest product as a float (rounding keeps the order).
VITQ_INLINE float largest_product(const RowScores& row) {
  const F least = set(static_cast<float>(INT32_MIN));
  F top_v = least;
  for (int64_t j = 0; j < row.keys; j += kLanes) {
    F x = to_float(load(row.product + j));
    if (row.keys - j < kLanes) x = lane_index() < set(static_cast<int32_t>(row.keys - j)) ? x : least;
    top_v = max(x, top_v);
  }
  return max_of(top_v);
}

// Scores without additive terms stay the integers that they are: only their maximum is needed beforehand.
VITQ_INLINE bool plain(const RowScores& row) {
  const bool scaled_at_once = row.key_scale == nullptr && row.bias == nullptr && row.mask == nullptr;
  return scaled_at_once && row.scale >= 0.0f && row.scale <= 1e28f;  // no product overflows
}

// The loops below read exponents x(j) = z_j − max z through `load_x`: from stored scores or straight from
// products.

template <int Power>  // 1, 2: of t = 2^x; 0: any other
VITQ_INLINE F powered(F t, F x, F power) {
  if constexpr (Power == 1) return t;
  if constexpr (Power == 2) return t * t;
  return exp2_nonpositive(x * power);
}

// codes = rne(min(k·2^x, top)) at once; returns the sum of exponentials (of 2^x if Power is 1).
template <int Power, class LoadX>
VITQ_INLINE float codes_at_once(const LoadX& load_x, int64_t n, float k, float top, float power,
                                uint8_t* codes) {
  const F kv = set(k), topv = set(top), powerv = set(power);
  F sum_v{};
  for (int64_t j = 0; j < n; j += kLanes) {
    const F x = load_x(j), t = exp2_nonpositive(x);
    sum_v += powered<Power>(t, x, powerv);
    store_bytes(codes + j, round_to_int(min(t * kv, topv)));
  }
  return sum(sum_v);
}

// out = 2^x; returns the sum of exponentials.
template <int Power, class LoadX>
VITQ_INLINE float exponentials(const LoadX& load_x, int64_t n, float power, float* out) {
  const F powerv = set(power);
  F sum_v{};
  for (int64_t j = 0; j < n; j += kLanes) {
    const F x = load_x(j), t = exp2_nonpositive(x);
    sum_v += powered<Power>(t, x, powerv);
    store(out + j, t);
  }
  return sum(sum_v);
}

// codes = rne(min(k·t, top)).
VITQ_INLINE void codes_direct(const float* t, int64_t n, float k, float top, uint8_t* codes) {
  const F kv = set(k), topv = set(top);
  for (int64_t j = 0; j < n; j += kLanes) store_bytes(codes + j, round_to_int(min(load(t + j) * kv, topv)));
}

// codes = rne(top·clamp(e·slope − shift, 0, 1)^(1/Power)).
template <int Power>
VITQ_INLINE void codes_clamped(const float* e, int64_t n, double slope, double shift, double power, int top,
                               uint8_t* codes) {
  // n^power inside the root: one multiplication less, and 1 maps to `top` exactly.
  const double inside = Power == 1 ? top : Power == 2 ? top * top : 1;
  const F a = set(static_cast<float>(slope * inside)), b = set(static_cast<float>(-shift * inside));
  const F high = set(static_cast<float>(inside)), root = set(static_cast<float>(1.0 / power));
  const F topv = set(static_cast<float>(top));
  for (int64_t j = 0; j < n; j += kLanes) {
    F x = min(max(fma(load(e + j), a, b), F{}), high);
    if constexpr (Power == 2) x = sqrt(x);
    if constexpr (Power == 0) {
      const F tiny = set(1.17549435e-38f);
      const F y = exp2_nonpositive(min(log2_positive(max(x, tiny)) * root, F{}));
      x = x < tiny ? F{} : y * topv;
    }
    store_bytes(codes + j, round_to_int(x));
  }
}

template <class LoadX>
VITQ_INLINE float quantize_row(const FocusPlan& plan, const LoadX& load_x, int64_t n, float* scratch,
                               uint8_t* codes) {
  const Focus& f = plan.focus;
  const float top = static_cast<float>(f.top), power = static_cast<float>(f.power);
  if (plan.direct && f.row_anchor) {
    const float k = static_cast<float>(plan.gain);
    if (!plan.total_of_exp || f.power == 1.0) return codes_at_once<1>(load_x, n, k, top, power, codes);
    if (f.power == 2.0) return codes_at_once<2>(load_x, n, k, top, power, codes);
    return codes_at_once<0>(load_x, n, k, top, power, codes);
  }
  if (plan.direct) {
    float total;
    if (f.power == 1.0) {
      total = exponentials<1>(load_x, n, power, scratch);
    } else if (f.power == 2.0) {
      total = exponentials<2>(load_x, n, power, scratch);
    } else {
      total = exponentials<0>(load_x, n, power, scratch);
    }
    codes_direct(scratch, n, plan.row_gain(total), top, codes);
    return total;
  }
  const float total = exponentials<1>(load_x, n, power, scratch);
  const double span = f.b2 - f.b1, slope = 1.0 / (f.row_anchor ? span : span * total), shift = f.b1 / span;
  if (f.power == 1.0) {
    codes_clamped<1>(scratch, n, slope, shift, f.power, f.top, codes);
  } else if (f.power == 2.0) {
    codes_clamped<2>(scratch, n, slope, shift, f.power, f.top, codes);
  } else {
    codes_clamped<0>(scratch, n, slope, shift, f.power, f.top, codes);
  }
  return total;
}

#if defined(__AVX512BW__)
// 64 codes a step through a table in four registers; Cascade Lake is the one VNNI machine without it.
__attribute__((target("avx512vbmi"), noinline)) static void look_up_vbmi(const uint8_t* table, int64_t n,
                                                                         uint8_t* codes) {
  const __m512i t0 = _mm512_loadu_si512(table), t1 = _mm512_loadu_si512(table + 64);
  const __m512i t2 = _mm512_loadu_si512(table + 128), t3 = _mm512_loadu_si512(table + 192);
  for (int64_t j = 0; j < n; j += 64) {
    const __m512i c = _mm512_loadu_si512(codes + j);
    const __m512i low = _mm512_permutex2var_epi8(t0, c, t1), high = _mm512_permutex2var_epi8(t2, c, t3);
    _mm512_storeu_si512(codes + j, _mm512_mask_blend_epi8(_mm512_movepi8_mask(c), low, high));
  }
}
#endif

// codes = levels[codes]; up to 48 bytes behind the last code may be overwritten.
VITQ_INLINE void look_up(const FocusPlan& plan, int64_t n, uint8_t* codes) {
  const uint8_t* table = plan.focus.levels;
#if defined(__AVX512BW__)
  static const bool vbmi = __builtin_cpu_supports("avx512vbmi");
  if (vbmi) return look_up_vbmi(table, n, codes);
#endif
#if defined(__AVX2__)
  // Sixteen levels at a time: a code of another sixteen saturates to an index with its top bit set, which
  // yields 0.
  const __m256i bias = _mm256_set1_epi8(0x70);
  for (int64_t j = 0; j < n; j += 32) {
    const __m256i c = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(codes + j));
    __m256i out = _mm256_setzero_si256();
    for (int t = 0; t <= plan.focus.top; t += 16) {
      const __m256i levels =
          _mm256_broadcastsi128_si256(_mm_loadu_si128(reinterpret_cast<const __m128i*>(table + t)));
      const __m256i index =
          _mm256_adds_epu8(_mm256_xor_si256(c, _mm256_set1_epi8(static_cast<char>(t))), bias);
      out = _mm256_or_si256(out, _mm256_shuffle_epi8(levels, index));
    }
    _mm256_storeu_si256(reinterpret_cast<__m256i*>(codes + j), out);
  }
#else
  for (int64_t j = 0; j < n; ++j) codes[j] = table[codes[j]];
#endif
}

// Levels [padded] of one row (0 for keys of score −inf and behind the last key).
//   valid  [padded]: receives 0xff for keys that count; null where an excluded key has level 0 anyway.
VITQ_INLINE RowResult focus_row(const FocusPlan& plan, const RowScores& row, uint8_t* levels,
                                uint8_t* valid) {
  float* const z = reinterpret_cast<float*>(row.product);
  RowResult result{0.0f, row.keys};
  if (plain(row)) {
    // Subtracted before scaling: exact for products below 2^24, and the largest is exactly 0.
    const F scale = set(row.scale), top = set(largest_product(row));
    const auto load_x = [&](int64_t j) VITQ_LAMBDA {
      const F x = (to_float(load(row.product + j)) - top) * scale;
      if (j + kLanes <= row.keys) return x;
      return lane_index() < set(static_cast<int32_t>(row.keys - j)) ? x : set(-__builtin_inff());
    };
    result.sum = quantize_row(plan, load_x, row.padded, z, levels);
    if (valid != nullptr) std::memset(valid, 0xff, static_cast<size_t>(row.keys));
  } else {
    const float top = store_scores(row, set(static_cast<float>(plan.exponent)), valid, &result.valid);
    const F topv = set(top == -__builtin_inff() ? 0.0f : top);
    const auto load_x = [&](int64_t j) VITQ_LAMBDA { return load(z + j) - topv; };
    result.sum = quantize_row(plan, load_x, row.padded, z, levels);
    if (top == -__builtin_inff() && result.sum == result.sum) {
      std::memset(levels, 0, static_cast<size_t>(row.padded));
      result.valid = 0;
      return result;
    }
  }
  if (!plan.identity) look_up(plan, row.padded, levels);
  if (valid != nullptr)
    for (int64_t j = 0; j < row.keys; ++j) levels[j] &= valid[j];
  std::memset(levels + row.keys, 0, static_cast<size_t>(row.padded - row.keys));
  return result;
}

}  // namespace vitq::VITQ_ISA::attention
