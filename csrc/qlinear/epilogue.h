// The float part after a product, one register tile at a time; shared by the integer and the weight-only
// layers.
#pragma once

#include "common/convert.h"
#include "common/math.h"
#include "qlinear/qlinear_cpu.h"

namespace vitq::VITQ_ISA {

// fn.operator()<rows>() for rows in 1..N.
template <int N, class Fn>
VITQ_INLINE void with_rows(int64_t rows, const Fn& fn) {
  if constexpr (N == 1) {
    fn.template operator()<1>();
  } else {
    if (rows == N)
      fn.template operator()<N>();
    else
      with_rows<N - 1>(rows, fn);
  }
}

// out[MR][V·kLanes] = (or +=) a[MR, depth] · b[depth, V·kLanes], b with the row stride of a tile: the sum
// runs over depth in order, in registers.
template <int MR, int V, bool kAccumulate>
VITQ_TILE void float_tile(const float* a, int64_t lda, const float* b, int64_t depth, float* out) {
  constexpr int kWidth = V * kLanes;
  F acc[MR][V];
  clear(acc);
  const auto each = [](const auto& fn) VITQ_LAMBDA {
    unroll<MR>([&](auto i) VITQ_LAMBDA { unroll<V>([&](auto v) VITQ_LAMBDA { fn(i, v); }); });
  };
  if constexpr (kAccumulate)
    each([&](auto i, auto v) VITQ_LAMBDA { acc[i][v] = load(out + i * kWidth + v * kLanes); });
  for (int64_t k = 0; k < depth; ++k) {
    F bv[V];
    unroll<V>([&](auto v) VITQ_LAMBDA { bv[v] = load(b + k * kWidth + v * kLanes); });
    unroll<MR>([&](auto i) VITQ_LAMBDA {
      const F av = set(a[i * lda + k]);
      unroll<V>([&](auto v) VITQ_LAMBDA { acc[i][v] = fma(av, bv[v], acc[i][v]); });
    });
  }
  each([&](auto i, auto v) VITQ_LAMBDA { store(out + i * kWidth + v * kLanes, acc[i][v]); });
}

// lora_up as [panels][rank][NP]: the columns of a panel side by side, zeros behind the last.
template <int NP>
class UpPanels {
 public:
  UpPanels(const LinearTail& tail, int64_t n_total, const Pool& pool)
      : rank_(tail.rank),
        panels_(tail.rank > 0 ? ceil_div(n_total, NP) : 0),
        data_(static_cast<size_t>(panels_ * rank_) * NP * 4) {
    pool_for(pool, panels_, ceil_div(1 << 16, (rank_ + 1) * NP), [&](int64_t begin, int64_t end) {
      for (int64_t p = begin; p < end; ++p) transpose(tail, p * NP, smaller<int64_t>(NP, n_total - p * NP));
    });
  }

  // [rank, NP]; not to be read if the rank is 0.
  const float* at(int64_t panel) const { return data_.at<float>() + panel * rank_ * NP; }

 private:
  // In slices that stay in the first-level cache.
  void transpose(const LinearTail& tail, int64_t n0, int64_t width) {
    float* up = data_.at<float>() + n0 * rank_;
    constexpr int64_t kSlice = 64;
    float row[kSlice];
    for (int64_t r0 = 0; r0 < rank_; r0 += kSlice) {
      const int64_t count = smaller(kSlice, rank_ - r0);
      for (int64_t n = 0; n < NP; ++n) {
        if (n < width)
          read_row(row, tail.lora_up.at((n0 + n) * rank_ + r0), count);
        else
          std::memset(row, 0, sizeof(row));
        for (int64_t r = 0; r < count; ++r) up[(r0 + r) * NP + n] = row[r];
      }
    }
  }

  const int64_t rank_, panels_;
  const Scratch data_;
};

// What one panel of NP output columns needs, gathered once and reused by all of its row tiles.
template <int NP>
struct PanelTail {
  alignas(64) float bias[NP] = {}, gamma[NP] = {};
  const float* up;  // [rank, NP]
  int64_t n0, width;

  void gather(const LinearTail& tail, int64_t n_total, int64_t panel, const UpPanels<NP>& ups) {
    n0 = panel * NP;
    width = smaller<int64_t>(NP, n_total - n0);
    up = ups.at(panel);
    if (tail.bias) read_row(bias, tail.bias.at(n0), width);
    if (tail.layer_scale) read_row(gamma, tail.layer_scale.at(n0), width);
  }
};

// Asks for what finish_tile will add. Tiles go down the columns of the residual, which no hardware prefetcher
// follows: asked for before the tile is multiplied, it has arrived when it is needed.
template <int NP>
VITQ_INLINE void prefetch_residual(const LinearTail& tail, const PanelTail<NP>& panel, int64_t n_total,
                                   int64_t row, int64_t rows) {
  if (!tail.residual) return;
  const int64_t line = tail.residual.dtype == DType::f32 ? 16 : 32;  // elements
  for (int64_t i = 0; i < rows; ++i)
    for (int64_t c = 0; c < panel.width; c += line)
      __builtin_prefetch(tail.residual.at((row + i) * n_total + panel.n0 + c).data);
}

// Finishes `rows` rows of a panel: dst[i·ld + c] = γ·act(product + (t·Uᵀ)[i, c] + bias) + residual, all NP
// columns (those past `width` hold nothing of use). product(c) gives a function of the row: kLanes columns of
// the scaled product, from column c.
template <int NP, int kRows, Activation kActivation, class Product>
void finish_tile_as(const LinearTail& tail, const PanelTail<NP>& panel, int64_t n_total, int64_t row,
                    int64_t rows, const float* low_rank, const Product& product, float* dst, int64_t ld) {
  alignas(64) float held[kRows * NP];
  const float* residual = nullptr;
  int64_t residual_ld = n_total;
  if (tail.residual) {
    const AnyFloat in = tail.residual.at(row * n_total + panel.n0);
    residual = static_cast<const float*>(in.data);
    if (in.dtype != DType::f32 || panel.width < NP) {
      for (int64_t i = 0; i < rows; ++i) read_row(held + i * NP, in.at(i * n_total), panel.width);
      residual = held;
      residual_ld = NP;
    }
  }
  for (int c = 0; c < NP; c += kLanes) {
    const auto product_of = product(c);
    const F bias = load(panel.bias + c), gamma = load(panel.gamma + c);
    for (int64_t i = 0; i < rows; ++i) {
      F y = product_of(i);
      if (tail.rank > 0) y += load(low_rank + i * NP + c);
      if (tail.bias) y += bias;
      if constexpr (kActivation == Activation::gelu_erf) y = gelu_erf(y);
      if constexpr (kActivation == Activation::gelu_tanh) y = gelu_tanh(y);
      if (tail.layer_scale) y *= gamma;
      if (residual != nullptr) y += load(residual + i * residual_ld + c);
      store(dst + i * ld + c, y);
    }
  }
}

// The same for any activation, into a float matrix (`dst`, ld >= NP columns writable) or, if dst is null,
// rounded into columns n0 .. n0 + width of `out` [M, N].
template <int NP, int kRows, class Product>
void finish_tile(const LinearTail& tail, const PanelTail<NP>& panel, int64_t n_total, int64_t row,
                 int64_t rows, const Product& product, float* dst, int64_t ld, void* out, DType out_dtype) {
  alignas(64) float low_rank[kRows * NP], staged[kRows * NP];
  if (tail.rank > 0)
    with_rows<kRows>(rows, [&]<int MR>() VITQ_LAMBDA {
      float_tile<MR, NP / kLanes, false>(tail.lora_t + row * tail.rank, tail.rank, panel.up, tail.rank,
                                         low_rank);
    });
  const bool in_place = dst != nullptr || (out_dtype == DType::f32 && panel.width == NP);
  if (dst == nullptr) {
    dst = in_place ? static_cast<float*>(out) + row * n_total + panel.n0 : staged;
    ld = in_place ? n_total : NP;
  }
  auto finish =
      tail.activation == Activation::gelu_erf    ? &finish_tile_as<NP, kRows, Activation::gelu_erf, Product>
      : tail.activation == Activation::gelu_tanh ? &finish_tile_as<NP, kRows, Activation::gelu_tanh, Product>
                                                 : &finish_tile_as<NP, kRows, Activation::none, Product>;
  finish(tail, panel, n_total, row, rows, low_rank, product, dst, ld);
  if (!in_place)
    for (int64_t i = 0; i < rows; ++i)
      write_row(out, out_dtype, (row + i) * n_total + panel.n0, staged + i * NP, panel.width);
}

// How M rows × `panels` column panels are dealt to threads.
struct Split {
  int64_t rows, chunks;  // rows per task (a multiple of the tile height), number of row chunks
};

// The longest share of any thread, counted in row-panels, is least. `setup` is what a task spends before its
// first row (decoding a panel), in rows; at most `most_rows` rows stay in one task (their activations should
// fit a cache).
VITQ_INLINE Split split_rows(int64_t m, int64_t panels, int64_t threads, int64_t tile, int64_t setup,
                             int64_t most_rows) {
  const int64_t tiles = ceil_div(m, tile);
  const int64_t fewest = ceil_div(tiles, most_rows > tile ? most_rows / tile : 1);
  Split best{};
  int64_t best_cost = INT64_MAX;
  for (int64_t chunks = fewest; chunks <= tiles && chunks <= fewest + 4 * threads; ++chunks) {
    const int64_t rows = ceil_div(tiles, chunks) * tile;
    const int64_t used = ceil_div(m, rows);
    const int64_t cost = ceil_div(used * panels, threads) * (rows + setup);
    if (cost < best_cost) {
      best_cost = cost;
      best = {rows, used};
    }
  }
  return best;
}

}  // namespace vitq::VITQ_ISA
