#include "learning/learning_cpu.h"

#include "common/simd.h"
#include "qattention/vector_math.h"

namespace vitq::VITQ_ISA {
namespace {

constexpr int64_t kGrain = 16384;  // elements below which a second thread costs more than it saves

// All ones where element i + lane of `dropped` is quantized. The hash: multiplications and shifts that turn
// consecutive indices into words of 32 bits each of which is one half of the time (after C. Wellons's
// lowbias32), the same on every device.
VITQ_INLINE I quantized(const Dropped& dropped, int64_t i) {
  if (!dropped.any) return set(int32_t{-1});
  U h = (U)attention::lane_index() + (static_cast<uint32_t>(i) + dropped.key[0]);
  h = (h ^ (h >> 16)) * 0x7feb352du ^ dropped.key[1];
  h = (h ^ (h >> 15)) * 0x846ca68bu;
  return (I)(h ^ (h >> 16)) > set(dropped.last);
}

VITQ_INLINE F choose(I mask, F a, F b) { return (F)((mask & (I)a) | (~mask & (I)b)); }

VITQ_INLINE F masked(I mask, F a) { return (F)(mask & (I)a); }

VITQ_INLINE F gather(const float* table, I index) {
#if defined(__AVX512F__)
  return (F)_mm512_i32gather_ps((__m512i)index, table, 4);
#elif defined(__AVX2__)
  return (F)_mm256_i32gather_ps(table, (__m256i)index, 4);
#else
  F out;
  for (int i = 0; i < kLanes; ++i) out[i] = table[index[i]];
  return out;
#endif
}

// A table of float entries for every index of a byte.
struct Table {
  Table(const float* from, int count) {
    for (int i = 0; i < 256; ++i) entry[i] = from[smaller(i, count - 1)];
  }
  explicit Table(const int8_t* from) {
    for (int i = 0; i < 256; ++i) entry[i] = from == nullptr ? 0.0f : static_cast<float>(from[i]);
  }
  F operator[](I index) const { return gather(entry, index & 255); }
  float entry[256];
};

// The integer nearest to the zero point, within the codes.
struct ZeroPoint {
  explicit ZeroPoint(const FakeQuantizeArgs& a) {
    if (a.zero_point == nullptr) return;
    const float nearest = __builtin_nearbyintf(*a.zero_point);
    value = smaller(static_cast<float>(a.qmax), nearest < a.qmin ? static_cast<float>(a.qmin) : nearest);
    held = value != nearest;
  }
  float value = 0.0f;
  bool held = false;  // by the clamp: it has no gradient
};

// Quantizer of one row.
struct Row {
  Row(const FakeQuantizeArgs& a, const ZeroPoint& z, const Table& lut, int64_t r)
      : scale(a.scale[r % a.scales]),
        inverse(set(1.0f / scale)),
        low(set(static_cast<float>(a.row_qmax == nullptr ? a.qmin : -a.row_qmax[r]) - z.value)),
        high(set(static_cast<float>(a.row_qmax == nullptr ? a.qmax : a.row_qmax[r]) - z.value)),
        zero(set(z.value)),
        lut(a.lut == nullptr ? nullptr : &lut) {}
  // x·(1/scale) within the bounds; NaN stays.
  F clamped(F ratio) const { return min(high, max(low, ratio)); }
  F code(F within) const {
    const I rounded = round_to_int(within);
    F code = to_float(rounded);
    if (lut != nullptr) code = (*lut)[round_to_int(code + (zero + 128.0f))] - zero;
    return choose((I)(within == within), code, within);
  }
  float scale;
  F inverse, low, high, zero;
  const Table* lut;
};

}  // namespace

void fake_quantize(const FakeQuantizeArgs& a) {
  const Table lut(a.lut);
  const ZeroPoint zero(a);
  pool_for(a.pool, a.rows, ceil_div(kGrain, a.columns + 1), [&](int64_t begin, int64_t end) {
    for (int64_t r = begin; r < end; ++r) {
      const Row row(a, zero, lut, r);
      const F scale = set(row.scale);
      for (int64_t j = 0; j < a.columns; j += kLanes) {
        const int64_t i = r * a.columns + j, n = a.columns - j;
        const F x = load_upto(a.x + i, n);
        const F y = row.code(row.clamped(x * row.inverse)) * scale;
        store_upto(a.y + i, choose(quantized(a.dropped, i), y, x), n);
      }
    }
  });
}

void mix(const MixArgs& a) {
  pool_for(a.pool, a.n, kGrain, [&](int64_t begin, int64_t end) {
    for (int64_t i = begin; i < end; i += kLanes) {
      const int64_t n = end - i;
      store_upto(a.out + i, choose(quantized(a.dropped, i), load_upto(a.x + i, n), load_upto(a.other + i, n)),
                 n);
    }
  });
}

void fake_quantize_backward(const FakeQuantizeBackwardArgs& args) {
  const FakeQuantizeArgs& a = args.forward;
  const Table lut(a.lut);
  const ZeroPoint zero(a);
  pool_for(a.pool, a.rows, ceil_div(kGrain, a.columns + 1), [&](int64_t begin, int64_t end) {
    for (int64_t r = begin; r < end; ++r) {
      const Row row(a, zero, lut, r);
      F of_scale{}, of_zero{};
      for (int64_t j = 0; j < a.columns; j += kLanes) {
        const int64_t i = r * a.columns + j, n = a.columns - j;
        const F grad = load_upto(args.grad + i, n), ratio = load_upto(a.x + i, n) * row.inverse;
        const F within = row.clamped(ratio);
        const I kept = quantized(a.dropped, i), inside = within == ratio;
        const F error = row.code(within) - masked(inside, ratio);
        of_scale += masked(kept, grad * error);
        of_zero -= masked(kept & ~inside, grad);
        store_upto(args.grad_x + i, masked(inside | ~kept, grad), n);
      }
      args.grad_scale[r] = sum(of_scale);
      args.grad_zero[r] = zero.held ? 0.0f : sum(of_zero) * row.scale;
    }
  });
}

namespace {

// u to its position among the codes, and back.
template <int kPower>  // 1, 2, or 0 for any
struct Focus {
  explicit Focus(const FocusedSoftmaxArgs& a)
      : b1(set(a.b1)),
        inverse(set(a.inverse)),
        least(set(kPower == 1 ? 0.0f : 1e-30f)),
        top(set(static_cast<float>(a.top))),
        exponent(set(static_cast<float>(1.0 / a.power))) {}
  F place(F u) const { return (u - b1) * inverse; }
  F clamped(F x) const { return min(set(1.0f), max(least, x)); }
  F root(F x) const {
    if constexpr (kPower == 1) return x;
    if constexpr (kPower == 2) return attention::sqrt(x);
    return attention::exp2_nonpositive(attention::log2_positive(x) * exponent);
  }
  // Of top·root(x), by x.
  F slope(F x, F rooted) const {
    if constexpr (kPower == 1) return top;
    if constexpr (kPower == 2) return top * 0.5f / rooted;
    return top * exponent * rooted / x;
  }
  F b1, inverse, least, top, exponent;
};

template <int kPower>
void focused_softmax_of(const FocusedSoftmaxArgs& a) {
  const Focus<kPower> focus(a);
  const Table levels(a.levels, a.top + 1);
  pool_for(a.pool, a.rows, ceil_div(kGrain, a.columns + 1), [&](int64_t begin, int64_t end) {
    for (int64_t r = begin; r < end; ++r) {
      const float* scores = a.scores + r * a.columns;
      float* u = a.u + r * a.columns;
      F tops = set(scores[0]);
      for (int64_t j = 0; j < a.columns; j += kLanes) {
        const int64_t n = a.columns - j;
        const F s = load_upto(scores + j, n);
        tops = n >= kLanes
                   ? max(s, tops)
                   : choose((I)(attention::lane_index() < set(static_cast<int32_t>(n))), max(s, tops), tops);
      }
      const F top = set(max_of(tops)), log2e = set(1.44269504f);
      F sums{};
      for (int64_t j = 0; j < a.columns; j += kLanes) {
        const int64_t n = a.columns - j;
        const F e = attention::exp2_nonpositive((load_upto(scores + j, n) - top) * log2e);
        store_upto(u + j, e, n);
        sums += n >= kLanes ? e : masked((I)(attention::lane_index() < set(static_cast<int32_t>(n))), e);
      }
      const float total = sum(sums);
      // NaN anywhere is NaN everywhere.
      const F unit = set(a.row_anchor ? 1.0f + (total - total) : 1.0f / total);
      for (int64_t j = 0; j < a.columns; j += kLanes) {
        const int64_t i = r * a.columns + j, n = a.columns - j;
        const F p = load_upto(u + j, n) * unit;
        const F position = focus.root(focus.clamped(focus.place(p))) * focus.top;
        const F level = levels[round_to_int(position)];
        store_upto(u + j, p, n);
        store_upto(a.level + i, choose(quantized(a.dropped, i) & (I)(p == p), level, position), n);
      }
      a.total[r] = total;
    }
  });
}

template <int kPower>
void focused_softmax_backward_of(const FocusedSoftmaxBackwardArgs& args) {
  const FocusedSoftmaxArgs& a = args.forward;
  const Focus<kPower> focus(a);
  const Table slopes(a.slopes, a.top + 1), lifts(a.lifts, a.top + 1);
  pool_for(a.pool, a.rows, ceil_div(kGrain, a.columns + 1), [&](int64_t begin, int64_t end) {
    for (int64_t r = begin; r < end; ++r) {
      const float* u_row = args.u + r * a.columns;
      float* out = args.grad_scores + r * a.columns;
      const F of_total = set(a.row_anchor && args.grad_total != nullptr ? args.grad_total[r] : 0.0f);
      F first{}, second{}, third{}, weighted{};
      I largest{};
      for (int64_t j = 0; j < a.columns; j += kLanes) {
        const int64_t i = r * a.columns + j, n = a.columns - j;
        const F grad = load_upto(args.grad + i, n), u = load_upto(u_row + j, n);
        const F place = focus.place(u), x = focus.clamped(place), rooted = focus.root(x);
        const I code = round_to_int(rooted * focus.top), kept = quantized(a.dropped, i);
        const F g = masked((I)(x == place), choose(kept, grad * slopes[code], grad) * focus.slope(x, rooted));
        first += g;
        second += g * x;
        third += masked(kept, grad * lifts[code]);
        const F by_score = (g * focus.inverse + of_total) * u;
        weighted += by_score;
        largest -= (I)(u == 1.0f);
        store_upto(out + j, by_score, n);
      }
      args.sums[r] = sum(first);
      args.sums[a.rows + r] = sum(second);
      args.sums[2 * a.rows + r] = sum(third);
      const float whole = sum(weighted);
      if (a.row_anchor) {
        // exp(s − max s): what all of them lose goes to the largest, in equal parts.
        int32_t count = 0;
        for (int i = 0; i < kLanes; ++i) count += largest[i];
        const F part = set(whole / static_cast<float>(count > 0 ? count : 1));
        for (int64_t j = 0; j < a.columns; j += kLanes) {
          const int64_t n = a.columns - j;
          const I is_largest = load_upto(u_row + j, n) == 1.0f;
          store_upto(out + j, load_upto(out + j, n) - masked(is_largest, part), n);
        }
      } else {
        const F mean = set(whole);
        for (int64_t j = 0; j < a.columns; j += kLanes) {
          const int64_t n = a.columns - j;
          store_upto(out + j, load_upto(out + j, n) - load_upto(u_row + j, n) * mean, n);
        }
      }
    }
  });
}

// h(alpha) = clamp((zeta − gamma)·sigmoid(alpha) + gamma, 0, 1) and its derivative.
struct Rectified {
  explicit Rectified(F alpha) {
    const F e = attention::exp2_nonpositive(abs(alpha) * -1.44269504f);
    const F small = e / (1.0f + e), sigmoid = choose((I)(alpha < 0.0f), small, 1.0f - small);
    const F stretched = sigmoid * 1.2f - 0.1f;
    h = min(set(1.0f), max(F{}, stretched));
    slope = masked((I)(h == stretched), 1.2f * sigmoid * (1.0f - sigmoid));
  }
  F h, slope;
};

// floor(v) for |v| < 2^22.
VITQ_INLINE F floor(F v) {
  const F near = to_float(round_to_int(v));
  return near - masked((I)(near > v), set(1.0f));
}

// x^power for x in [0, 1] and power >= 1.
VITQ_INLINE F power_of(F x, F power) {
  return attention::exp2_nonpositive(attention::log2_positive(max(set(1e-30f), x)) * power);
}

}  // namespace

void soft_round(const SoftRoundArgs& a) {
  pool_for(a.pool, a.rows, ceil_div(kGrain, a.columns + 1), [&](int64_t begin, int64_t end) {
    const F low = set(a.qmin), high = set(a.qmax);
    for (int64_t r = begin; r < end; ++r) {
      const F scale = set(a.scale[r]);
      for (int64_t j = 0; j < a.columns; j += kLanes) {
        const int64_t i = r * a.columns + j, n = a.columns - j;
        const F up = floor(load_upto(a.weight + i, n) / scale) + Rectified(load_upto(a.alpha + i, n)).h;
        store_upto(a.values + i, min(high, max(low, up)) * scale, n);
      }
    }
  });
}

void soft_round_backward(const SoftRoundBackwardArgs& args) {
  const SoftRoundArgs& a = args.forward;
  pool_for(a.pool, a.rows, ceil_div(kGrain, a.columns + 1), [&](int64_t begin, int64_t end) {
    const F low = set(a.qmin), high = set(a.qmax);
    for (int64_t r = begin; r < end; ++r) {
      const F scale = set(a.scale[r]);
      F of_scale{};
      for (int64_t j = 0; j < a.columns; j += kLanes) {
        const int64_t i = r * a.columns + j, n = a.columns - j;
        const F grad = load_upto(args.grad + i, n);
        const Rectified up(load_upto(a.alpha + i, n));
        const F whole = floor(load_upto(a.weight + i, n) / scale) + up.h, code = min(high, max(low, whole));
        of_scale += grad * code;
        store_upto(args.grad_alpha + i, masked((I)(code == whole), grad * scale * up.slope), n);
      }
      args.grad_scale[r] = sum(of_scale);
    }
  });
}

void rounding_penalty(const RoundingPenaltyArgs& a) {
  pool_for(a.pool, a.rows, ceil_div(kGrain, a.columns + 1), [&](int64_t begin, int64_t end) {
    const F beta = set(a.beta);
    for (int64_t r = begin; r < end; ++r) {
      const F grad = set(a.grad == nullptr ? 0.0f : a.grad[r]);
      F sums{};
      for (int64_t j = 0; j < a.columns; j += kLanes) {
        const int64_t i = r * a.columns + j, n = a.columns - j;
        const Rectified up(load_upto(a.alpha + i, n));
        const F side = up.h * 2.0f - 1.0f;
        if (a.grad == nullptr) {
          const F part = 1.0f - power_of(abs(side), beta);
          sums +=
              n >= kLanes ? part : masked((I)(attention::lane_index() < set(static_cast<int32_t>(n))), part);
        } else {
          const F steep = copysign(power_of(abs(side), beta - 1.0f), side);
          store_upto(a.out + i, grad * -2.0f * beta * steep * up.slope, n);
        }
      }
      if (a.grad == nullptr) a.out[r] = sum(sums);
    }
  });
}

void focused_softmax(const FocusedSoftmaxArgs& a) {
  if (a.power == 1.0) return focused_softmax_of<1>(a);
  if (a.power == 2.0) return focused_softmax_of<2>(a);
  focused_softmax_of<0>(a);
}

void focused_softmax_backward(const FocusedSoftmaxBackwardArgs& a) {
  if (a.forward.power == 1.0) return focused_softmax_backward_of<1>(a);
  if (a.forward.power == 2.0) return focused_softmax_backward_of<2>(a);
  focused_softmax_backward_of<0>(a);
}

}  // namespace vitq::VITQ_ISA
