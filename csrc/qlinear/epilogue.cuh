// The end of every linear kernel: from rows of products and low-rank branches, as floats in shared memory, to
// floats or codes in memory.
#pragma once

#include "quantize/codes.cuh"

namespace vitq::gpu {

struct alignas(8) Halves4 {
  uint16_t h[4];
};

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

// y[16, 8] += t·Uᵀ at row m, column n, as a fragment of a warp. The order of ranks inside an instruction is
// ours, as that of k: a lane takes 4 in a row.
template <DType kType>
VITQ_DEVICE void add_branch_of(const LinearParams& p, int m, int n, float (&y)[4]) {
  const int group = lane() / 4, column = lane() % 4;
  const auto* up = static_cast<const uint16_t*>(p.lora_up.data);
  for (int r0 = 0; r0 < p.rank; r0 += 16) {
    uint32_t a[4], b[2];
    VITQ_UNROLL
    for (int e = 0; e < 2; ++e) {
      const int r = r0 + 4 * column + 2 * e;
      const bool one = r < p.rank, two = r + 1 < p.rank;
      VITQ_UNROLL
      for (int h = 0; h < 2; ++h) {
        const int row = m + group + 8 * h;
        const float* t = p.lora_t + int64_t{row < p.m ? row : p.m - 1} * p.rank + r;
        a[h + 2 * e] = pack_branch<kType>(one ? t[0] : 0.0f, two ? t[1] : 0.0f);
      }
      const uint16_t* u = up + int64_t{n + group < p.n ? n + group : p.n - 1} * p.rank + r;
      b[e] = (one ? u[0] : 0u) | (two ? u[1] : 0u) << 16;
    }
    mma_16<kType>(y, a, b[0], b[1]);
  }
}

// Of a branch in 16 bits; one in float32 is added by finish_rows.
VITQ_DEVICE void add_branch(const LinearParams& p, int m, int n, float (&y)[4]) {
  if (p.rank > 0 && p.lora_up.dtype == DType::f16) add_branch_of<DType::f16>(p, m, n, y);
  if (p.rank > 0 && p.lora_up.dtype == DType::bf16) add_branch_of<DType::bf16>(p, m, n, y);
}

// Rows of kColumns floats, kRow floats apart in shared memory, that warps finish: a lane kVector columns.
template <int kColumns, int kRow>
struct LinearEpilogue {
  static constexpr int kVector = kColumns / kWarp;
  static_assert(kVector > 0);

  // kRows rows by a warp, `step` apart from m on, those of m < p.m: bias, activation, LayerScale, residual;
  // then floats or codes. Rows side by side hide the latency of their chains of operations.
  template <int kRows>
  static VITQ_DEVICE void finish_rows(const LinearParams& p, int m, int step, int n0, float* rows,
                                      const float (&residual)[kRows][kVector]) {
    const int n = n0 + lane() * kVector;
    float v[kRows][kVector], column[kVector];
    VITQ_UNROLL
    for (int r = 0; r < kRows; ++r) read_row(rows + r * step * kRow, v[r]);
    if (p.rank > 0 && p.lora_up.dtype == DType::f32) {
      VITQ_UNROLL
      for (int r = 0; r < kRows; ++r) {
        if (m + r * step < p.m) add_branch(p, m + r * step, n, v[r]);
      }
    }
    if (p.bias) load_columns(p, p.bias, 0, n, column);
    VITQ_UNROLL
    for (int r = 0; r < kRows; ++r) {
      VITQ_UNROLL
      for (int e = 0; e < kVector; ++e) {
        if (p.bias) v[r][e] += column[e];
        v[r][e] = gelu(v[r][e], static_cast<Gelu>(p.activation));
      }
    }
    if (p.layer_scale) load_columns(p, p.layer_scale, 0, n, column);
    VITQ_UNROLL
    for (int r = 0; r < kRows; ++r) {
      VITQ_UNROLL
      for (int e = 0; e < kVector; ++e) {
        if (p.layer_scale) v[r][e] *= column[e];
        if (p.residual) v[r][e] += residual[r][e];
        if (n + e >= p.n) v[r][e] = 0.0f;
      }
    }
    VITQ_UNROLL
    for (int r = 0; r < kRows; ++r) {
      if (m + r * step >= p.m) break;
      if (p.lora_down) {
        float* y = rows + r * step * kRow + lane() * kVector;
        VITQ_UNROLL
        for (int e = 0; e < kVector; ++e) y[e] = v[r][e];
      }
      if (p.codes.q != nullptr) {
        write_codes(p, m + r * step, n, v[r]);
      } else {
        write_floats(p, m + r * step, n, v[r]);
      }
    }
  }

  // This lane's part of a row of the residual, to be loaded well before it is added.
  static VITQ_DEVICE void load_residual(const LinearParams& p, int m, int n0, float (&v)[kVector]) {
    if (p.residual && m < p.m) load_columns(p, p.residual, int64_t{m} * p.n, n0 + lane() * kVector, v);
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
      VITQ_UNROLL_TWICE  // as far as registers last beside sums of a whole tile
          for (int k = 0; k < kColumns; k += 16) {
        uint32_t a[4], b[2];
        VITQ_UNROLL
        for (int e = 0; e < 2; ++e) {
          VITQ_UNROLL
          for (int h = 0; h < 2; ++h) {
            // Rows past the end were not finished: what they hold stays in rows that are not stored.
            const float* from = y + 8 * h * kRow + k + 2 * e;
            a[h + 2 * e] = pack_branch<kType>(from[0], from[1]);
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

 private:
  // Whether rows of N elements from `data` on take accesses of kVector elements.
  static VITQ_DEVICE bool whole(const LinearParams& p, const void* data) {
    return kVector == 4 && p.n % 4 == 0 && reinterpret_cast<uintptr_t>(data) % 16 == 0;
  }

  static VITQ_DEVICE void load_columns(const LinearParams& p, const AnyFloat& x, int64_t row, int n,
                                       float (&v)[kVector]) {
    if (whole(p, x.data)) {
      if (n >= p.n) return;
      if (x.dtype == DType::f32) {
        const auto f = *reinterpret_cast<const Floats4*>(static_cast<const float*>(x.data) + row + n);
        VITQ_UNROLL
        for (int e = 0; e < kVector; ++e) v[e] = f.v[e];
      } else {
        const auto h = *reinterpret_cast<const Halves4*>(static_cast<const uint16_t*>(x.data) + row + n);
        VITQ_UNROLL
        for (int e = 0; e < kVector; ++e) {
          v[e] = x.dtype == DType::f16 ? float_of_half(h.h[e]) : float_of_bfloat(h.h[e]);
        }
      }
      return;
    }
    VITQ_UNROLL
    for (int e = 0; e < kVector; ++e) v[e] = n + e < p.n ? load(x, row + n + e) : 0.0f;
  }

  static VITQ_DEVICE void read_row(const float* row, float (&v)[kVector]) {
    if constexpr (kVector == 4) {
      const auto f = reinterpret_cast<const Floats4*>(row)[lane()];
      VITQ_UNROLL
      for (int e = 0; e < kVector; ++e) v[e] = f.v[e];
    } else {
      VITQ_UNROLL
      for (int e = 0; e < kVector; ++e) v[e] = row[lane() * kVector + e];
    }
  }

  // A float32 branch has no matrix instruction.
  static VITQ_DEVICE void add_branch(const LinearParams& p, int m, int n, float (&v)[kVector]) {
    VITQ_UNROLL
    for (int e = 0; e < kVector; ++e) {
      if (n + e >= p.n) continue;
      const auto* up = static_cast<const float*>(p.lora_up.data) + int64_t{n + e} * p.rank;
      const float* t = p.lora_t + int64_t{m} * p.rank;
      float sum = 0.0f;
      for (int r = 0; r < p.rank; ++r) sum += t[r] * up[r];
      v[e] += sum;
    }
  }

  static VITQ_DEVICE void write_floats(const LinearParams& p, int m, int n, const float (&v)[kVector]) {
    const int64_t at = int64_t{m} * p.n + n;
    if constexpr (kVector == 4) {
      if (whole(p, p.out)) {
        if (n >= p.n) return;
        if (p.out_dtype == DType::f32) {
          *reinterpret_cast<Floats4*>(static_cast<float*>(p.out) + at) = {v[0], v[1], v[2], v[3]};
        } else {
          const bool f16 = p.out_dtype == DType::f16;
          Halves4 h;
          VITQ_UNROLL
          for (int e = 0; e < kVector; ++e) h.h[e] = f16 ? half_of(v[e]) : bfloat_of(v[e]);
          *reinterpret_cast<Halves4*>(static_cast<uint16_t*>(p.out) + at) = h;
        }
        return;
      }
    }
    VITQ_UNROLL
    for (int e = 0; e < kVector; ++e) {
      if (n + e < p.n) store(p.out, p.out_dtype, at + e, v[e]);
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
