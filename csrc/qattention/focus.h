// One row of scores to integer levels of its probabilities.
#pragma once

#include "common/convert.h"
#include "common/look_up.h"
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
// products, and hand positions in [0, top] to `out`, which rounds them to codes or keeps them.

struct RoundedTo {
  uint8_t* codes;
  __attribute__((always_inline)) void operator()(int64_t j, F position) const {
    store_bytes(codes + j, round_to_int(position));
  }
};
struct WrittenTo {
  float* positions;
  __attribute__((always_inline)) void operator()(int64_t j, F position) const {
    store(positions + j, position);
  }
};

template <int Power>  // 1, 2: of t = 2^x; 0: any other
VITQ_INLINE F powered(F t, F x, F power) {
  if constexpr (Power == 1) return t;
  if constexpr (Power == 2) return t * t;
  return exp2_nonpositive(x * power);
}

// out: min(k·2^x, top) at once; returns the sum of exponentials (of 2^x if Power is 1).
template <int Power, class LoadX, class Out>
VITQ_INLINE float place_at_once(const LoadX& load_x, int64_t n, float k, float top, float power,
                                const Out& out) {
  const F kv = set(k), topv = set(top), powerv = set(power);
  F sum_v{};
  for (int64_t j = 0; j < n; j += kLanes) {
    const F x = load_x(j), t = exp2_nonpositive(x);
    sum_v += powered<Power>(t, x, powerv);
    out(j, min(t * kv, topv));
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

// out: min(k·t, top).
template <class Out>
VITQ_INLINE void place_direct(const float* t, int64_t n, float k, float top, const Out& out) {
  const F kv = set(k), topv = set(top);
  for (int64_t j = 0; j < n; j += kLanes) out(j, min(load(t + j) * kv, topv));
}

// out: top·clamp(e·slope − shift, 0, 1)^(1/Power).
template <int Power, class Out>
VITQ_INLINE void place_clamped(const float* e, int64_t n, double slope, double shift, double power, int top,
                               const Out& out) {
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
    out(j, x);
  }
}

template <class LoadX, class Out>
VITQ_INLINE float place_row(const FocusPlan& plan, const LoadX& load_x, int64_t n, float* scratch,
                            const Out& out) {
  const Focus& f = plan.focus;
  const float top = static_cast<float>(f.top), power = static_cast<float>(f.power);
  if (plan.direct && f.row_anchor) {
    const float k = static_cast<float>(plan.gain);
    if (!plan.total_of_exp || f.power == 1.0) return place_at_once<1>(load_x, n, k, top, power, out);
    if (f.power == 2.0) return place_at_once<2>(load_x, n, k, top, power, out);
    return place_at_once<0>(load_x, n, k, top, power, out);
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
    place_direct(scratch, n, plan.row_gain(total), top, out);
    return total;
  }
  const float total = exponentials<1>(load_x, n, power, scratch);
  const double span = f.b2 - f.b1, slope = 1.0 / (f.row_anchor ? span : span * total), shift = f.b1 / span;
  if (f.power == 1.0) {
    place_clamped<1>(scratch, n, slope, shift, f.power, f.top, out);
  } else if (f.power == 2.0) {
    place_clamped<2>(scratch, n, slope, shift, f.power, f.top, out);
  } else {
    place_clamped<0>(scratch, n, slope, shift, f.power, f.top, out);
  }
  return total;
}

// Positions in [0, top] of one row's keys to `out`, which is called for all of [padded]; what it gets for
// excluded keys and behind the last key has no meaning. False if no key counts (NaN scores do).
//   valid  [padded]: receives 0xff for keys that count; null where the caller need not know.
template <class Out>
VITQ_INLINE bool place_scores(const FocusPlan& plan, const RowScores& row, uint8_t* valid, const Out& out,
                              RowResult& result) {
  float* const z = reinterpret_cast<float*>(row.product);
  result = {0.0f, row.keys};
  if (plain(row)) {
    // Subtracted before scaling: exact for products below 2^24, and the largest is exactly 0.
    const F scale = set(row.scale), top = set(largest_product(row));
    const auto load_x = [&](int64_t j) VITQ_LAMBDA {
      const F x = (to_float(load(row.product + j)) - top) * scale;
      if (j + kLanes <= row.keys) return x;
      return lane_index() < set(static_cast<int32_t>(row.keys - j)) ? x : set(-__builtin_inff());
    };
    result.sum = place_row(plan, load_x, row.padded, z, out);
    if (valid != nullptr) std::memset(valid, 0xff, static_cast<size_t>(row.keys));
    return true;
  }
  const float top = store_scores(row, set(static_cast<float>(plan.exponent)), valid, &result.valid);
  const F topv = set(top == -__builtin_inff() ? 0.0f : top);
  const auto load_x = [&](int64_t j) VITQ_LAMBDA { return load(z + j) - topv; };
  result.sum = place_row(plan, load_x, row.padded, z, out);
  if (top != -__builtin_inff() || result.sum != result.sum) return true;
  result.valid = 0;
  return false;
}

// Levels [padded] of one row (0 for keys of score −inf and behind the last key).
//   valid  [padded]: receives 0xff for keys that count; null where an excluded key has level 0 anyway.
VITQ_INLINE RowResult focus_row(const FocusPlan& plan, const RowScores& row, uint8_t* levels,
                                uint8_t* valid) {
  RowResult result;
  if (!place_scores(plan, row, valid, RoundedTo{levels}, result)) {
    std::memset(levels, 0, static_cast<size_t>(row.padded));
    return result;
  }
  if (!plan.identity) look_up(plan.focus.levels, plan.focus.top, row.padded, levels);
  if (valid != nullptr)
    for (int64_t j = 0; j < row.keys; ++j) levels[j] &= valid[j];
  std::memset(levels + row.keys, 0, static_cast<size_t>(row.padded - row.keys));
  return result;
}

// What both kernels of a row read: `Args` has q_scale, k_scale, softmax_scale, bias, mask, mask_groups and
// nk.
struct AdditiveRows {
  float *bias, *mask;  // [nk] each, for rows that are not float32
};
template <class Args>
VITQ_INLINE RowScores row_scores(const Args& a, const FocusPlan& plan, int64_t b, int64_t h, int64_t query,
                                 int32_t* product, const float* key_scale, int64_t padded,
                                 const AdditiveRows& held) {
  const auto additive = [&](const Additive& x, int64_t outer, float* copy) VITQ_LAMBDA -> const float* {
    if (!x.x) return nullptr;
    const AnyFloat row = x.x.at(outer * x.outer + query * x.row);
    if (row.dtype == DType::f32) return static_cast<const float*>(row.data);
    read_row(copy, row, a.nk);
    return copy;
  };
  const double scale = static_cast<double>(a.q_scale.at(b, h, query)) * a.softmax_scale * plan.exponent *
                       (key_scale != nullptr ? 1.0f : a.k_scale.at(b, h, 0));
  return {product,
          static_cast<float>(scale),
          key_scale,
          additive(a.bias, h, held.bias),
          additive(a.mask, a.mask.x ? b % a.mask_groups : 0, held.mask),
          a.nk,
          padded};
}

// The keys' own scales, zero behind the last key; null where they share one. `out` [padded].
template <class Args>
VITQ_INLINE const float* key_scales(const Args& a, int64_t b, int64_t h, int64_t padded, float* out) {
  if (!a.k_scale.per_token()) return nullptr;
  for (int64_t j = 0; j < a.nk; ++j) out[j] = a.k_scale.at(b, h, j);
  for (int64_t j = a.nk; j < padded; ++j) out[j] = 0.0f;
  return out;
}

}  // namespace vitq::VITQ_ISA::attention
