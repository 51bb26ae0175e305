#include "quantize/quantize_cpu.h"

#include "common/convert.h"
#include "common/look_up.h"
#include "common/simd.h"
#include "quantize/row_stages.h"

namespace vitq::VITQ_ISA {
namespace {

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

// Codes through a level table, whose first entry is that of −128.
struct Levels {
  explicit Levels(const int8_t* lut) {
    if (lut == nullptr) return;
    std::memcpy(table, lut + 128, 128);  // by the codes' bytes: 0 .. 127, −128 .. −1
    std::memcpy(table + 128, lut, 128);
  }
  void look_up_row(int64_t n, int8_t* q) const {
    constexpr int64_t kStep = 64;
    const int64_t whole = n / kStep * kStep;
    look_up(table, 255, whole, reinterpret_cast<uint8_t*>(q));
    uint8_t tail[kStep] = {};
    std::memcpy(tail, q + whole, static_cast<size_t>(n - whole));
    look_up(table, 255, n - whole, tail);
    std::memcpy(q + whole, tail, static_cast<size_t>(n - whole));
  }
  uint8_t table[256];
};

}  // namespace

void quantize_rows(const QuantTail& tail, const float* x, float* residual, int64_t ld, int64_t row0,
                   int64_t rows) {
  if (tail.rank > 0) {
    float* t = tail.t + row0 * tail.rank;
    project_rows(x, ld, rows, tail.lora_down, tail.rank, tail.k, t);
    if (tail.subspace) {
      expand_rows(t, rows, tail.lora_down, tail.rank, tail.k,
                  [&](int64_t i, int64_t c, int64_t n, F v) VITQ_LAMBDA {
                    store_upto(residual + i * ld + c, load_upto(x + i * ld + c, n) - v, n);
                  });
      x = residual;
    }
  }
  const int64_t width = tail.k / tail.groups;
  const Levels levels(tail.lut);
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
    if (tail.lut != nullptr) levels.look_up_row(tail.k, q);
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
    const int64_t source = args.gather.token_row(row);
    if (source < 0) {
      std::memset(out, 0, static_cast<size_t>(k) * 4);
      return;
    }
    const AnyFloat in = args.x.at(source * k);
    const float* x = static_cast<const float*>(in.data);
    if (in.dtype != DType::f32) {
      read_row(out, in, k);
      x = out;
    }
    layer_norm_row(x, k, args.eps, weight, bias, out);
  });
}

}  // namespace vitq::VITQ_ISA
