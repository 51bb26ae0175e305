#include "float_stages/float_stages_cpu.h"

#include "common/convert.h"
#include "common/math.h"
#include "common/simd.h"
#include "qattention/focus.h"
#include "quantize/row_stages.h"

namespace vitq::VITQ_ISA {
namespace {

constexpr int64_t kGrain = 16384;  // elements below which a second thread costs more than it saves

template <class Fn>
void map(const float* x, float* y, int64_t begin, int64_t end, const Fn& fn) {
  for (int64_t i = begin; i < end; i += kLanes) store_upto(y + i, fn(load_upto(x + i, end - i)), end - i);
}

}  // namespace

void layer_norm(const LayerNormArgs& a) {
  pool_for(a.pool, a.m, ceil_div(kGrain, a.k), [&](int64_t begin, int64_t end) {
    for (int64_t i = begin; i < end; ++i)
      layer_norm_row(a.x + i * a.k, a.k, a.eps, a.weight, a.bias, a.y + i * a.k);
  });
}

void project(const LowRankArgs& a) {
  pool_for(a.pool, a.m, ceil_div(kGrain, a.k + 1), [&](int64_t begin, int64_t end) {
    project_rows(a.in + begin * a.k, a.k, end - begin, a.basis, a.rank, a.k, a.out + begin * a.rank);
  });
}

void expand(const LowRankArgs& a) {
  pool_for(a.pool, a.m, ceil_div(kGrain, a.k + 1), [&](int64_t begin, int64_t end) {
    expand_rows(a.in + begin * a.rank, end - begin, a.basis, a.rank, a.k,
                [&](int64_t i, int64_t c, int64_t n, F v)
                    VITQ_LAMBDA { store_upto(a.out + (begin + i) * a.k + c, v, n); });
  });
}

void gelu(const GeluArgs& a) {
  pool_for(a.pool, a.n, kGrain, [&](int64_t begin, int64_t end) {
    if (a.tanh)
      map(a.x, a.y, begin, end, [](F v) VITQ_LAMBDA { return gelu_tanh(v); });
    else
      map(a.x, a.y, begin, end, [](F v) VITQ_LAMBDA { return gelu_erf(v); });
  });
}

void focus_position(const FocusPositionArgs& a) {
  using namespace attention;
  const FocusPlan plan(a.focus);
  constexpr int64_t kPad = 16;  // as in the fused kernel
  const int64_t padded = ceil_div(a.nk, kPad) * kPad;
  const size_t row_bytes = static_cast<size_t>(padded) * 4;
  pool_for(a.pool, a.batch * a.heads, 1, [&](int64_t begin, int64_t end) {
    Scratch scratch(5 * row_bytes);
    int32_t* product = scratch.at<int32_t>();
    float* position = scratch.at<float>(row_bytes);
    for (int64_t bh = begin; bh < end; ++bh) {
      const int64_t b = bh / a.heads, h = bh % a.heads;
      const float* scales = key_scales(a, b, h, padded, scratch.at<float>(2 * row_bytes));
      for (int64_t i = 0; i < a.nq; ++i) {
        const int64_t at = (bh * a.nq + i) * a.nk;
        std::memcpy(product, a.product + at, static_cast<size_t>(a.nk) * 4);
        std::memset(product + a.nk, 0, static_cast<size_t>(padded - a.nk) * 4);
        const AdditiveRows held{scratch.at<float>(3 * row_bytes), scratch.at<float>(4 * row_bytes)};
        const RowScores row = row_scores(a, plan, b, h, i, product, scales, padded, held);
        RowResult result;
        if (place_scores(plan, row, nullptr, WrittenTo{position}, result))
          std::memcpy(a.position + at, position, static_cast<size_t>(a.nk) * 4);
        else
          std::memset(a.position + at, 0, static_cast<size_t>(a.nk) * 4);
        a.total[bh * a.nq + i] = result.sum;
      }
    }
  });
}

}  // namespace vitq::VITQ_ISA
