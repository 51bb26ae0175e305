// What a row of floats goes through before it is rounded: LayerNorm and the low-rank projections. Shared by
// the quantizing kernels and the float stages, which therefore agree to the last bit.
#pragma once

#include "common/simd.h"

namespace vitq::VITQ_ISA {

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
void project_tiles(const float* x, int64_t ld, const float* down, int64_t rank, int64_t k, float* t) {
  int64_t r = 0;
  for (; r + kProjectRank <= rank; r += kProjectRank)
    project_tile<MR, kProjectRank>(x, ld, down + r * k, k, t + r, rank);
  for (; r < rank; ++r) project_tile<MR, 1>(x, ld, down + r * k, k, t + r, rank);
}

// t [rows, rank] = x [rows, ld]·Dᵀ, D [rank, k].
inline void project_rows(const float* x, int64_t ld, int64_t rows, const float* down, int64_t rank, int64_t k,
                         float* t) {
  int64_t i = 0;
  for (; i + kProjectRows <= rows; i += kProjectRows)
    project_tiles<kProjectRows>(x + i * ld, ld, down, rank, k, t + i * rank);
  for (; i < rows; ++i) project_tiles<1>(x + i * ld, ld, down, rank, k, t + i * rank);
}

// finish(i, c, n, v) receives v = columns [c, c + n) of row i of t [rows, rank]·basis [rank, k]: the sum runs
// over the rank in order (as the low-rank tile of the linear layers does).
template <int MR, class Finish>
void expand_tile(const float* t, const float* basis, int64_t rank, int64_t k, int64_t row,
                 const Finish& finish) {
  for (int64_t c = 0; c < k; c += kLanes) {
    const int64_t n = smaller<int64_t>(kLanes, k - c);
    F acc[MR] = {};
    for (int64_t r = 0; r < rank; ++r) {
      const F b = load_upto(basis + r * k + c, n);
      unroll<MR>([&](auto i) VITQ_LAMBDA { acc[i] = fma(set(t[(row + i) * rank + r]), b, acc[i]); });
    }
    unroll<MR>([&](auto i) VITQ_LAMBDA { finish(row + i, c, n, acc[i]); });
  }
}

template <class Finish>
void expand_rows(const float* t, int64_t rows, const float* basis, int64_t rank, int64_t k,
                 const Finish& finish) {
  constexpr int kRows = 8;
  int64_t i = 0;
  for (; i + kRows <= rows; i += kRows) expand_tile<kRows>(t, basis, rank, k, i, finish);
  for (; i < rows; ++i) expand_tile<1>(t, basis, rank, k, i, finish);
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
inline void layer_norm_row(const float* x, int64_t k, double eps, const float* weight, const float* bias,
                           float* y) {
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

}  // namespace vitq::VITQ_ISA
