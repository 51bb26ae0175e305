// The end of every linear kernel: from rows of products and low-rank branches, as floats in shared memory, to
// floats or codes in memory.
#pragma once

#include "quantize/codes.cuh"

namespace vitq::gpu {

enum class Product { s8, w4, w4_table, s4 };

struct LinearParams {
  const int8_t* x;       // [M, K]
  const float* x_scale;  // [M], or [1] with stride 0
  int x_scale_stride;
  int x_zero_point;
  const uint8_t* weight;  // [N, weight_row]
  int64_t weight_row;
  const int32_t* col_sum;  // [N]
  const int8_t* lut;       // [16], of w4_table
  const float* w_scale;    // [N]
  const float* lora_t;     // [M, rank]
  AnyFloat lora_up;        // [N, rank]
  int rank;
  AnyFloat bias, layer_scale;  // [N] or absent
  AnyFloat residual;           // [M, N] or absent
  int activation;
  int m, n, k;
  void* out;  // [M, N] of out_dtype, or null where codes are wanted
  DType out_dtype;
  Codes codes;
  AnyFloat lora_down;  // [rank_down, N] of 16 bits, or absent
  int rank_down;
  float* shares;       // [column tiles, M, rank_down]: each column tile's part of the next layer's t
  int32_t* partial;    // of split K: [tiles, splits, threads, accumulators]
  unsigned* counters;  // [tiles], 0 before and after
};

// Rows of kColumns floats, kRow floats apart in shared memory, that warps finish: a lane kVector columns.
template <int kColumns, int kRow>
struct LinearEpilogue {
  static constexpr int kVector = kColumns / kWarp;
  static_assert(kVector > 0);

  // A row by a warp: bias, activation, LayerScale, residual; then floats or codes.
  static VITQ_DEVICE void finish_row(const LinearParams& p, int m, int n0, float* row) {
    float* y = row + lane() * kVector;
    const int n = n0 + lane() * kVector;
    float v[kVector];
    VITQ_UNROLL
    for (int e = 0; e < kVector; ++e) {
      v[e] = y[e];
      if (n + e >= p.n) {
        v[e] = 0.0f;
        continue;
      }
      if (p.rank > 0 && p.lora_up.dtype == DType::f32) {
        const auto* up = static_cast<const float*>(p.lora_up.data) + int64_t{n + e} * p.rank;
        const float* t = p.lora_t + int64_t{m} * p.rank;
        float sum = 0.0f;
        for (int r = 0; r < p.rank; ++r) sum += t[r] * up[r];
        v[e] += sum;
      }
      if (p.bias) v[e] += load(p.bias, n + e);
      v[e] = gelu(v[e], static_cast<Gelu>(p.activation));
      if (p.layer_scale) v[e] *= load(p.layer_scale, n + e);
      if (p.residual) v[e] += load(p.residual, int64_t{m} * p.n + n + e);
    }
    if (p.lora_down) {
      VITQ_UNROLL
      for (int e = 0; e < kVector; ++e) y[e] = v[e];
    }
    if (p.codes.q != nullptr) return write_codes(p, m, n, v);
    VITQ_UNROLL
    for (int e = 0; e < kVector; ++e) {
      if (n + e < p.n) store(p.out, p.out_dtype, int64_t{m} * p.n + n + e, v[e]);
    }
  }

  // Codes of a row's columns n .. n + kVector of this lane. Dynamic groups lie inside the tile: a power of
  // two of columns from kVector on, or all there are.
  static VITQ_DEVICE void write_codes(const LinearParams& p, int m, int n, const float (&v)[kVector]) {
    const Codes& c = p.codes;
    const Clamp range = clamp_of(c, m);
    const int group = (n < p.n ? n : p.n - 1) / c.width;
    float inverse[kVector];
    if (c.scale == nullptr) {
      float absmax = 0.0f;
      VITQ_UNROLL
      for (int e = 0; e < kVector; ++e) absmax = max_or_nan(absmax, fabsf(v[e]));
      const int lanes = c.groups == 1 ? kWarp : c.width / kVector;
      for (int step = 1; step < lanes; step *= 2) absmax = max_or_nan(absmax, shuffle_xor(absmax, step));
      const float scale =
          dynamic_scale(absmax, c.row_qmax == nullptr ? static_cast<float>(c.qmax) : range.high);
      if (n < p.n && n % c.width == 0) c.out_scale[int64_t{m} * c.groups + group] = scale;
      VITQ_UNROLL
      for (int e = 0; e < kVector; ++e) inverse[e] = 1.0f / scale;
    } else {
      const float* scale = c.scale + (c.scale_per_row ? int64_t{m} * c.groups : 0);
      VITQ_UNROLL
      for (int e = 0; e < kVector; ++e) inverse[e] = 1.0f / scale[(n + e < p.n ? n + e : p.n - 1) / c.width];
    }
    int8_t* q = c.q + int64_t{m} * p.n + n;
    if (kVector == 4 && p.n % 4 == 0) {
      uint32_t word = 0;
      VITQ_UNROLL
      for (int e = 0; e < kVector; ++e) {
        word |= static_cast<uint32_t>(static_cast<uint8_t>(code_of(c, v[e], inverse[e], range))) << 8 * e;
      }
      if (n < p.n) *reinterpret_cast<uint32_t*>(q) = word;
      return;
    }
    VITQ_UNROLL
    for (int e = 0; e < kVector; ++e) {
      if (n + e < p.n) q[e] = code_of(c, v[e], inverse[e], range);
    }
  }

  // This tile's share of the next layer's t for the 16 rows from m: y[16, kColumns]·Dᵀ, 8 ranks at a time.
  template <DType kType>
  static VITQ_DEVICE void project(const LinearParams& p, int m, int n0, const float* rows, int first_rank,
                                  int rank_step) {
    const int group = lane() / 4, column = lane() % 4;
    const float* y = rows + group * kRow + 4 * column;
    const auto* down = static_cast<const uint16_t*>(p.lora_down.data);
    for (int r0 = first_rank; r0 < p.rank_down; r0 += rank_step) {
      float sum[4] = {0.0f, 0.0f, 0.0f, 0.0f};
      const int r = r0 + group;
      const uint16_t* d = down + int64_t{r < p.rank_down ? r : p.rank_down - 1} * p.n;
      for (int k = 0; k < kColumns; k += 16) {
        uint32_t a[4], b[2];
        VITQ_UNROLL
        for (int e = 0; e < 2; ++e) {
          VITQ_UNROLL
          for (int h = 0; h < 2; ++h) {
            // Rows past the end were not finished: what they hold stays in rows that are not stored.
            const float* from = y + 8 * h * kRow + k + 2 * e;
            a[h + 2 * e] = pack_16<kType>(from[0], from[1]);
          }
          const int n = n0 + k + 4 * column + 2 * e;
          b[e] = (n < p.n ? d[n] : 0u) | (n + 1 < p.n ? d[n + 1] : 0u) << 16;
        }
        mma_16<kType>(sum, a, b[0], b[1]);
      }
      VITQ_UNROLL
      for (int e = 0; e < 4; ++e) {
        const int to = m + group + 8 * (e / 2), rank = r0 + 2 * column + e % 2;
        if (to < p.m && rank < p.rank_down) {
          p.shares[(int64_t{n0 / kColumns} * p.m + to) * p.rank_down + rank] = sum[e];
        }
      }
    }
  }
};

// t[m, r] = Σ over column tiles of shares, in their order.
struct AddShares {
  struct Params {
    const float* shares;  // [parts, count]
    float* t;             // [count]
    int64_t count;
    int parts;
  };
  static constexpr int kThreads = 256, kBlocksPerSm = 1;
  static VITQ_DEVICE void run(const Params& p) {
    const int64_t i = int64_t{block()} * kThreads + thread();
    if (i >= p.count) return;
    float sum = 0.0f;
    for (int part = 0; part < p.parts; ++part) sum += p.shares[part * p.count + i];
    p.t[i] = sum;
  }
};

}  // namespace vitq::gpu
