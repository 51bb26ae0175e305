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
  int arrivals;        // the first of [tiles] of g_arrivals, or −1 and
  unsigned* counters;  // [tiles], 0 before and after
};

// y += t·Uᵀ for kTilesM x kTilesN fragments [16, 8] of a warp, the first at row m, column n. The order of
// ranks inside an instruction is ours, as that of k: a lane takes 4 in a row.
template <DType kType, int kTilesM, int kTilesN>
VITQ_DEVICE void add_branch_of(const LinearParams& p, int m, int n, float (&y)[kTilesM][kTilesN][4]) {
  const int group = lane() / 4, column = lane() % 4;
  const bool whole = p.rank % 4 == 0 && reinterpret_cast<uintptr_t>(p.lora_t) % 16 == 0 &&
                     reinterpret_cast<uintptr_t>(p.lora_up.data) % 8 == 0;
  VITQ_UNROLL_ONCE
  for (int r = 4 * column; r - 4 * column < p.rank; r += 16) {
    uint32_t b[kTilesN][2];
    VITQ_UNROLL
    for (int j = 0; j < kTilesN; ++j) {
      const int to = n + 8 * j + group;
      const auto* u =
          static_cast<const uint16_t*>(p.lora_up.data) + int64_t{to < p.n ? to : p.n - 1} * p.rank + r;
      Halves4 h{};
      if (whole) {
        if (r < p.rank) h = *reinterpret_cast<const Halves4*>(u);
      } else {
        VITQ_UNROLL
        for (int e = 0; e < 4; ++e) h.h[e] = r + e < p.rank ? u[e] : uint16_t{0};
      }
      VITQ_UNROLL
      for (int e = 0; e < 2; ++e) b[j][e] = h.h[2 * e] | static_cast<uint32_t>(h.h[2 * e + 1]) << 16;
    }
    VITQ_UNROLL
    for (int i = 0; i < kTilesM; ++i) {
      uint32_t a[4];
      VITQ_UNROLL
      for (int h = 0; h < 2; ++h) {
        const int row = m + 16 * i + group + 8 * h;
        const float* t = p.lora_t + int64_t{row < p.m ? row : p.m - 1} * p.rank + r;
        Floats4 f{};
        if (whole) {
          if (r < p.rank) f = *reinterpret_cast<const Floats4*>(t);
        } else {
          VITQ_UNROLL
          for (int e = 0; e < 4; ++e) f.v[e] = r + e < p.rank ? t[e] : 0.0f;
        }
        a[h] = pack_branch<kType>(f.v[0], f.v[1]);
        a[h + 2] = pack_branch<kType>(f.v[2], f.v[3]);
      }
      VITQ_UNROLL
      for (int j = 0; j < kTilesN; ++j) mma_16<kType>(y[i][j], a, b[j][0], b[j][1]);
    }
  }
}

// Of a branch in 16 bits; one in float32 is added by finish_rows.
template <int kTilesM, int kTilesN>
VITQ_DEVICE void add_branch(const LinearParams& p, int m, int n, float (&y)[kTilesM][kTilesN][4]) {
  if (p.rank > 0 && p.lora_up.dtype == DType::f16) add_branch_of<DType::f16>(p, m, n, y);
  if (p.rank > 0 && p.lora_up.dtype == DType::bf16) add_branch_of<DType::bf16>(p, m, n, y);
}

// Rows of kColumns floats, kRow floats apart in shared memory, that warps finish: a lane kVector columns.
template <int kColumns, int kRow>
struct LinearEpilogue {
  static constexpr int kVector = kColumns / kWarp;
  static_assert(kVector == 2 || kVector == 4);

  // kVector numbers of a row: float32 a word each, 16 bits two of a word.
  struct Residual {
    uint32_t w[kVector];
    template <DType kType>
    VITQ_DEVICE float half(int e) const {
      return float_of_16<kType>(w[e / 2] >> e % 2 * 16 & 0xffffu);
    }
  };

  // kRows rows by a warp, `step` apart from m on, those of m < p.m: bias, activation, LayerScale, residual;
  // then floats or codes. Rows side by side hide the latency of their chains of operations.
  template <int kRows>
  static VITQ_DEVICE void finish_rows(const LinearParams& p, int m, int step, int n0, float* rows,
                                      const Residual (&residual)[kRows]) {
    const int n = n0 + lane() * kVector;
    float v[kRows][kVector], column[kVector], inverse[kRows];
    if (p.codes.q != nullptr) load_inverses(p, m, step, n, inverse);
    VITQ_UNROLL
    for (int r = 0; r < kRows; ++r) read_row(rows + r * step * kRow, v[r]);
    if (p.rank > 0 && p.lora_up.dtype == DType::f32) {
      VITQ_UNROLL
      for (int r = 0; r < kRows; ++r) {
        if (m + r * step < p.m) add_branch(p, m + r * step, n, v[r]);
      }
    }
    const auto each = [&v](const auto& fn) {
      VITQ_UNROLL
      for (int r = 0; r < kRows; ++r) {
        VITQ_UNROLL
        for (int e = 0; e < kVector; ++e) v[r][e] = fn(v[r][e], r, e);
      }
    };
    if (p.bias) {
      load_columns(p, p.bias, 0, n, column);
      each([&](float y, int, int e) { return y + column[e]; });
    }
    if (p.activation == static_cast<int>(Gelu::erf)) each([](float y, int, int) { return gelu_erf(y); });
    if (p.activation == static_cast<int>(Gelu::tanh)) each([](float y, int, int) { return gelu_tanh(y); });
    if (p.layer_scale) {
      load_columns(p, p.layer_scale, 0, n, column);
      each([&](float y, int, int e) { return y * column[e]; });
    }
    if (p.residual && p.residual.dtype == DType::f32) {
      each([&](float y, int r, int e) { return y + float_of_bits(residual[r].w[e]); });
    } else if (p.residual && p.residual.dtype == DType::f16) {
      each([&](float y, int r, int e) { return y + residual[r].template half<DType::f16>(e); });
    } else if (p.residual) {
      each([&](float y, int r, int e) { return y + residual[r].template half<DType::bf16>(e); });
    }
    if (n0 + kColumns > p.n) each([&](float y, int, int e) { return n + e < p.n ? y : 0.0f; });
    VITQ_UNROLL
    for (int r = 0; r < kRows; ++r) {
      if (m + r * step >= p.m) break;
      if (p.lora_down) write_row(rows + r * step * kRow, v[r]);
      if (p.codes.q != nullptr) {
        write_codes(p, m + r * step, n, v[r], inverse[r]);
      } else {
        write_floats(p, m + r * step, n, v[r]);
      }
    }
  }

  // This lane's part of a row of the residual, to be loaded well before it is added: as it comes from memory,
  // since a conversion would wait for it.
  static VITQ_DEVICE void load_residual(const LinearParams& p, int m, int n0, Residual& out) {
    const int n = n0 + lane() * kVector;
    if (!p.residual || m >= p.m || n >= p.n) return;
    const int64_t at = int64_t{m} * p.n + n;
    const bool all = whole(p, p.residual.data);
    if (p.residual.dtype == DType::f32) {
      const auto* from = static_cast<const uint32_t*>(p.residual.data) + at;
      if (all) {
        const auto four = *reinterpret_cast<const Words4*>(from);
        VITQ_UNROLL
        for (int e = 0; e < kVector; ++e) out.w[e] = four.w[e];
      } else {
        VITQ_UNROLL
        for (int e = 0; e < kVector; ++e) out.w[e] = n + e < p.n ? from[e] : 0;
      }
    } else {
      const auto* from = static_cast<const uint16_t*>(p.residual.data) + at;
      if (all) {
        const auto two = *reinterpret_cast<const Words2*>(from);
        VITQ_UNROLL
        for (int e = 0; e < kVector / 2; ++e) out.w[e] = two.w[e];
      } else {
        VITQ_UNROLL
        for (int e = 0; e < kVector; e += 2) {
          const uint32_t low = n + e < p.n ? from[e] : 0, high = n + e + 1 < p.n ? from[e + 1] : 0;
          out.w[e / 2] = low | high << 16;
        }
      }
    }
  }

  // This tile's share of the next layer's t for the 16 rows from m: y[16, kColumns]·Dᵀ, 8 ranks at a time.
  template <DType kType>
  static VITQ_DEVICE void project(const LinearParams& p, int m, int n0, const float* rows, int first_rank,
                                  int rank_step) {
    const int group = lane() / 4, column = lane() % 4;
    const float* y = rows + group * kRow + 4 * column;
    const auto* down = static_cast<const uint16_t*>(p.lora_down.data);
    const bool whole = p.n % 4 == 0 && reinterpret_cast<uintptr_t>(down) % 8 == 0;
    for (int r0 = first_rank; r0 < p.rank_down; r0 += rank_step) {
      float sum[4] = {0.0f, 0.0f, 0.0f, 0.0f};
      const int r = r0 + group;
      const uint16_t* d = down + int64_t{r < p.rank_down ? r : p.rank_down - 1} * p.n + n0 + 4 * column;
      const int left = p.n - n0 - 4 * column;
      VITQ_UNROLL_TWICE  // as far as registers last beside sums of a whole tile
          for (int k = 0; k < kColumns; k += 16) {
        uint32_t a[4], b[2];
        VITQ_UNROLL
        for (int h = 0; h < 2; ++h) {
          // Rows past the end were not finished: what they hold stays in rows that are not stored.
          const auto four = *reinterpret_cast<const Floats4*>(y + 8 * h * kRow + k);
          a[h] = pack_branch<kType>(four.v[0], four.v[1]);
          a[h + 2] = pack_branch<kType>(four.v[2], four.v[3]);
        }
        Halves4 halves{};
        if (whole) {
          if (k < left) halves = *reinterpret_cast<const Halves4*>(d + k);
        } else {
          VITQ_UNROLL
          for (int e = 0; e < 4; ++e) halves.h[e] = k + e < left ? d[k + e] : uint16_t{0};
        }
        VITQ_UNROLL
        for (int e = 0; e < 2; ++e) {
          b[e] = halves.h[2 * e] | static_cast<uint32_t>(halves.h[2 * e + 1]) << 16;
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

  static VITQ_DEVICE void write_row(float* row, const float (&v)[kVector]) {
    if constexpr (kVector == 4) {
      reinterpret_cast<Floats4*>(row)[lane()] = {v[0], v[1], v[2], v[3]};
    } else {
      VITQ_UNROLL
      for (int e = 0; e < kVector; ++e) row[lane() * kVector + e] = v[e];
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

  static VITQ_DEVICE int group_of(const LinearParams& p, int n) {
    return p.codes.groups == 1 ? 0 : (n < p.n ? n : p.n - 1) / p.codes.width;
  }
  // Whether a lane's columns have one scale. A dynamic one they do: its groups lie inside the tile, a power
  // of two of columns from kVector on, or all there are.
  static VITQ_DEVICE bool one_scale(const Codes& c) {
    return c.scale == nullptr || c.groups == 1 || c.width % kVector == 0;
  }
  static VITQ_DEVICE const float* static_scales(const Codes& c, int m) {
    return c.scale + (c.scale_per_row ? int64_t{m} * c.groups : 0);
  }

  // 1/scale of rows whose static scale is one for all of this lane's columns, n on.
  template <int kRows>
  static VITQ_DEVICE void load_inverses(const LinearParams& p, int m, int step, int n,
                                        float (&inverse)[kRows]) {
    const Codes& c = p.codes;
    if (c.scale == nullptr || !one_scale(c)) return;
    const int group = group_of(p, n);
    VITQ_UNROLL
    for (int r = 0; r < kRows; ++r) {
      const int row = m + r * step < p.m ? m + r * step : p.m - 1;
      inverse[r] = 1.0f / static_scales(c, row)[group];
      if (r == 0 && !c.scale_per_row) {
        VITQ_UNROLL
        for (int other = 1; other < kRows; ++other) inverse[other] = inverse[0];
        return;
      }
    }
  }

  // Codes of a row's columns n .. n + kVector of this lane.
  static VITQ_DEVICE void write_codes(const LinearParams& p, int m, int n, const float (&v)[kVector],
                                      float inverse) {
    const Codes& c = p.codes;
    const Clamp range = clamp_of(c, m);
    int8_t* q = c.q + int64_t{m} * p.n + n;
    if (!one_scale(c)) {
      VITQ_UNROLL
      for (int e = 0; e < kVector; ++e) {
        if (n + e >= p.n) break;
        q[e] = code_of(c, v[e], 1.0f / static_scales(c, m)[(n + e) / c.width], range);
      }
      return;
    }
    if (c.scale == nullptr) {
      float absmax = 0.0f;
      VITQ_UNROLL
      for (int e = 0; e < kVector; ++e) absmax = max_or_nan(absmax, fabsf(v[e]));
      const int lanes = c.groups == 1 ? kWarp : c.width / kVector;
      for (int step = 1; step < lanes; step *= 2) absmax = max_or_nan(absmax, shuffle_xor(absmax, step));
      const float scale =
          dynamic_scale(absmax, c.row_qmax == nullptr ? static_cast<float>(c.qmax) : range.high);
      if (n < p.n && n % c.width == 0) c.out_scale[int64_t{m} * c.groups + group_of(p, n)] = scale;
      inverse = 1.0f / scale;
    }
    const uint32_t word = codes_of(c, v, inverse, range);
    if (p.n % kVector == 0) {
      if (n >= p.n) return;
      if constexpr (kVector == 4) *reinterpret_cast<uint32_t*>(q) = word;
      if constexpr (kVector == 2) *reinterpret_cast<uint16_t*>(q) = static_cast<uint16_t>(word);
      return;
    }
    VITQ_UNROLL
    for (int e = 0; e < kVector; ++e) {
      if (n + e < p.n) q[e] = static_cast<int8_t>(word >> 8 * e);
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
