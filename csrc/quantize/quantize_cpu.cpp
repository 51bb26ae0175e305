#include "quantize/quantize_cpu.h"

#include "common/convert.h"
#include "common/simd.h"

namespace vitq::VITQ_ISA {
namespace {

// t[i][r] = sum_k x[i][k]·d[r][k] for a tile of MR rows and NR directions. Every element is summed in the
// same order whatever the tile, so results do not depend on how rows are grouped.
template <int MR, int NR>
void project_tile(const float* x, int64_t ld, const float* d, int64_t k, float* t, int64_t rank) {
  F acc[MR][NR];
  clear(acc);
  const auto step = [&](int64_t c, auto load_at) VITQ_LAMBDA {
    F dv[NR];
    unroll<NR>([&](auto j) VITQ_LAMBDA { dv[j] = load_at(d + j * k + c); });
    unroll<MR>([&](auto i) VITQ_LAMBDA {
      const F xv = load_at(x + i * ld + c);
      unroll<NR>([&](auto j) VITQ_LAMBDA { acc[i][j] = fma(xv, dv[j], acc[i][j]); });
    });
  };
  int64_t c = 0;
  for (; c + kLanes <= k; c += kLanes) step(c, [](const float* p) VITQ_LAMBDA { return load(p); });
  if (c < k) step(c, [&](const float* p) VITQ_LAMBDA { return load_first(p, k - c); });
  unroll<MR>([&](auto i)
                 VITQ_LAMBDA { unroll<NR>([&](auto j) VITQ_LAMBDA { t[i * rank + j] = sum(acc[i][j]); }); });
}

// 16 accumulators fit beside the operands on 32 registers, 8 on 16.
constexpr int kProjectRows = kLanes == 16 ? 4 : 2;
constexpr int kProjectRank = 4;

template <int MR>
void project_rows(const float* x, int64_t ld, const QuantTail& tail, float* t) {
  int64_t r = 0;
  for (; r + kProjectRank <= tail.rank; r += kProjectRank)
    project_tile<MR, kProjectRank>(x, ld, tail.lora_down + r * tail.k, tail.k, t + r, tail.rank);
  for (; r < tail.rank; ++r)
    project_tile<MR, 1>(x, ld, tail.lora_down + r * tail.k, tail.k, t + r, tail.rank);
}

// residual = x − t·D for MR rows: the sum over the rank first, one subtraction after it.
template <int MR>
void subtract_rows(const float* x, float* residual, int64_t ld, const QuantTail& tail, const float* t) {
  for (int64_t c = 0; c < tail.k; c += kLanes) {
    const int64_t n = smaller<int64_t>(kLanes, tail.k - c);
    F acc[MR] = {};
    for (int64_t r = 0; r < tail.rank; ++r) {
      const float* d = tail.lora_down + r * tail.k + c;
      const F dv = load_upto(d, n);
      unroll<MR>([&](auto i) VITQ_LAMBDA { acc[i] = fma(set(t[i * tail.rank + r]), dv, acc[i]); });
    }
    unroll<MR>([&](auto i) VITQ_LAMBDA {
      store_upto(residual + i * ld + c, load_upto(x + i * ld + c, n) - acc[i], n);
    });
  }
}

// max|x|; NaN if any element is NaN: the magnitudes' bit patterns order as integers, NaN above infinity.
float absmax(const float* x, int64_t n) {
  constexpr int kChains = 4;  // independent maxima, so that none waits for the last
  I top[kChains] = {};
  int64_t i = 0;
  for (; i + kChains * kLanes <= n; i += kChains * kLanes)
    unroll<kChains>([&](auto c) VITQ_LAMBDA { top[c] = max((I)abs(load(x + i + c * kLanes)), top[c]); });
  for (; i < n; i += kLanes) top[0] = max((I)abs(load_upto(x + i, n - i)), top[0]);
  const int32_t best = max_of(max(max(top[0], top[1]), max(top[2], top[3])));
  float out;
  std::memcpy(&out, &best, 4);
  return out;
}

float dynamic_scale(float largest, float top) {
  if (largest == 0.0f) return 1.0f;
  const float scale = largest / top;
  if (!(scale <= 3.40282347e38f)) return __builtin_nanf("");  // NaN or infinite
  return scale == 0.0f ? 1.0f : scale;  // a subnormal row underflowed: a reciprocal of 0 would be infinite
}

VITQ_INLINE I codes(F x, F inverse, F low, F high, I zero_point) {
  F v = x * inverse;
  v = v == v ? v : F{};  // NaN takes the code of 0
  return round_to_int(min(max(v, low), high)) + zero_point;
}

void quantize_group(const float* x, int64_t n, float inverse, float low, float high, int32_t zero_point,
                    int8_t* q) {
  const F inv = set(inverse), lo = set(low), hi = set(high);
  const I z = set(zero_point);
  int64_t i = 0;
  for (; i + kLanes <= n; i += kLanes) store_int8(q + i, codes(load(x + i), inv, lo, hi, z));
  if (i < n) {
    int8_t tail[kLanes];
    store_int8(tail, codes(load_first(x + i, n - i), inv, lo, hi, z));
    std::memcpy(q + i, tail, static_cast<size_t>(n - i));
  }
}

}  // namespace

void quantize_rows(const QuantTail& tail, const float* x, float* residual, int64_t ld, int64_t row0,
                   int64_t rows) {
  if (tail.rank > 0) {
    int64_t i = 0;
    for (; i + kProjectRows <= rows; i += kProjectRows)
      project_rows<kProjectRows>(x + i * ld, ld, tail, tail.t + (row0 + i) * tail.rank);
    for (; i < rows; ++i) project_rows<1>(x + i * ld, ld, tail, tail.t + (row0 + i) * tail.rank);
    if (tail.subspace) {
      constexpr int kRows = 8;
      for (i = 0; i + kRows <= rows; i += kRows)
        subtract_rows<kRows>(x + i * ld, residual + i * ld, ld, tail, tail.t + (row0 + i) * tail.rank);
      for (; i < rows; ++i)
        subtract_rows<1>(x + i * ld, residual + i * ld, ld, tail, tail.t + (row0 + i) * tail.rank);
      x = residual;
    }
  }
  const int64_t width = tail.k / tail.groups;
  for (int64_t i = 0; i < rows; ++i) {
    const int64_t row = row0 + i;
    float low = static_cast<float>(tail.qmin - tail.zero_point),
          high = static_cast<float>(tail.qmax - tail.zero_point);
    if (tail.row_qmax != nullptr) {
      high = static_cast<float>(tail.row_qmax[row]);
      low = -high;
    }
    int8_t* q = tail.q + row * tail.k;
    for (int64_t g = 0; g < tail.groups; ++g) {
      const float* in = x + i * ld + g * width;
      float scale;
      if (tail.scale != nullptr) {
        scale = tail.scale[(tail.scale_per_row ? row * tail.groups : 0) + g];
      } else {
        scale = dynamic_scale(absmax(in, width), high);
        tail.out_scale[row * tail.groups + g] = scale;
      }
      quantize_group(in, width, 1.0f / scale, low, high, tail.zero_point, q + g * width);
    }
    if (tail.lut != nullptr)
      for (int64_t c = 0; c < tail.k; ++c) q[c] = tail.lut[q[c] + 128];
  }
}

namespace {

// Rows that one step holds in floats: enough to fill the tiles above, few enough to stay in the first cache
// levels.
constexpr int64_t kRows = 16;
// Below this many elements a second thread costs more than it saves.
constexpr int64_t kGrain = 16384;

// fill(out, row) writes row `row` as K floats; fill == nullptr-like rows are read in place by the caller.
template <class Fill>
void quantize_filled(const QuantTail& tail, int64_t m, const Pool& pool, const Fill& fill) {
  const int64_t ld = ceil_div(tail.k, 16) * 16;
  pool_for(pool, m, ceil_div(kGrain, tail.k + 1), [&](int64_t begin, int64_t end) {
    Scratch scratch(static_cast<size_t>(kRows * ld * 4));
    float* rows = scratch.at<float>();
    for (int64_t row = begin; row < end; row += kRows) {
      const int64_t n = smaller(kRows, end - row);
      for (int64_t i = 0; i < n; ++i) fill(rows + i * ld, row + i);
      quantize_rows(tail, rows, rows, ld, row, n);
    }
  });
}

// A sum in doubles of what is added four vectors at a time: the float additions inside a block round twice.
struct BlockSum {
  D low = {}, high = {};
  VITQ_INLINE void add(BlockSum& to, F block) {
    to.low += low_double(block);
    to.high += high_double(block);
  }
  double total() const { return sum(low + high); }
};

// y = (x − mean)·rstd·weight + bias, by the corrected two-pass algorithm: d = x − c for a c near the mean,
// the exact mean is c + δ with δ the mean of d, and the variance mean(d²) − δ². However rough c is, nothing
// cancels.
void layer_norm_row(const float* x, int64_t k, double eps, const float* weight, const float* bias, float* y) {
  constexpr int kBlock = 4;
  F near[kBlock] = {};
  int64_t i = 0;
  for (; i + kBlock * kLanes <= k; i += kBlock * kLanes)
    unroll<kBlock>([&](auto c) VITQ_LAMBDA { near[c] += load(x + i + c * kLanes); });
  for (; i < k; i += kLanes) near[0] += load_upto(x + i, k - i);
  const F centre = set(sum((near[0] + near[1]) + (near[2] + near[3])) / static_cast<float>(k));

  BlockSum sums, squares;
  for (i = 0; i + kBlock * kLanes <= k; i += kBlock * kLanes) {
    F d[kBlock];
    unroll<kBlock>([&](auto c) VITQ_LAMBDA {
      d[c] = load(x + i + c * kLanes) - centre;
      store(y + i + c * kLanes, d[c]);
    });
    BlockSum::add(sums, (d[0] + d[1]) + (d[2] + d[3]));
    BlockSum::add(squares, fma(d[0], d[0], d[1] * d[1]) + fma(d[2], d[2], d[3] * d[3]));
  }
  for (; i < k; i += kLanes) {
    store_upto(y + i, load_upto(x + i, k - i) - centre, k - i);
    const F d = load_upto(y + i, k - i);  // read back: the lanes past the end are zero then
    BlockSum::add(sums, d);
    BlockSum::add(squares, d * d);
  }
  const double delta = sums.total() / static_cast<double>(k);
  const double variance = squares.total() / static_cast<double>(k) - delta * delta;
  const F shift = set(static_cast<float>(delta));
  const F rstd =
      set(static_cast<float>(1.0 / __builtin_sqrt((variance > 0.0 ? variance : variance * 0.0) + eps)));
  const auto finish = [&](int64_t at, auto load_at) VITQ_LAMBDA {
    F v = (load_at(y + at) - shift) * rstd;
    if (weight != nullptr) v = v * load_at(weight + at);
    if (bias != nullptr) v = v + load_at(bias + at);
    return v;
  };
  for (i = 0; i + kLanes <= k; i += kLanes)
    store(y + i, finish(i, [](const float* p) VITQ_LAMBDA { return load(p); }));
  if (i < k)
    store_first(y + i, finish(i, [&](const float* p) VITQ_LAMBDA { return load_first(p, k - i); }), k - i);
}

}  // namespace

void quantize(const QuantizeArgs& args) {
  const QuantTail& tail = args.tail;
  if (args.x.dtype == DType::f32 && !tail.subspace) {
    const float* x = static_cast<const float*>(args.x.data);
    pool_for(args.pool, args.m, ceil_div(kGrain, tail.k + 1), [&](int64_t begin, int64_t end) {
      quantize_rows(tail, x + begin * tail.k, nullptr, tail.k, begin, end - begin);
    });
    return;
  }
  quantize_filled(tail, args.m, args.pool,
                  [&](float* out, int64_t row) { read_row(out, args.x.at(row * tail.k), tail.k); });
}

void layer_norm_quantize(const LayerNormQuantizeArgs& args) {
  const int64_t k = args.tail.k;
  Scratch affine(2 * lines(static_cast<size_t>(k) * 4));
  const float *weight = nullptr, *bias = nullptr;
  if (args.weight) {
    weight = affine.at<float>();
    read_row(affine.at<float>(), args.weight, k);
  }
  if (args.bias) {
    float* b = affine.at<float>(lines(static_cast<size_t>(k) * 4));
    read_row(b, args.bias, k);
    bias = b;
  }
  quantize_filled(args.tail, args.m, args.pool, [&](float* out, int64_t row) {
    const AnyFloat in = args.x.at(row * k);
    const float* x = static_cast<const float*>(in.data);
    if (in.dtype != DType::f32) {
      read_row(out, in, k);
      x = out;
    }
    layer_norm_row(x, k, args.eps, weight, bias, out);
  });
}

}  // namespace vitq::VITQ_ISA
