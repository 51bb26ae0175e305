// Float activations times integer weights, by 16-bit mma.sync.
//
// A code has at most 8 bits, which float16 and bfloat16 hold: with x of these types the instruction's
// products are exact and its sums float32. A float32 x goes through as three bfloat16 parts of 8 bits each.
//
// Nothing is staged: a lane reads 16 consecutive x of a row and 16 consecutive codes of a column (or 16 bytes
// of nibbles, which are those of two such runs) straight into fragments, the order of k inside an instruction
// being ours. Rows and columns of a tile of 64x64 are read by two warps each, the second time from the
// first-level cache. A layer of a ViT has 0.6 to 2.4 MB of codes: at few rows their bytes are the bound, at
// many the tensor cores, of which this form keeps about half busy. What is quantized at all runs elsewhere.
#pragma once

#include "qlinear/epilogue.cuh"

namespace vitq::gpu {

template <DType kType>
struct WeightOnly {
  struct Params {
    LinearParams linear;
    AnyFloat x;  // [M, K] of kType
    bool nibbles;
    bool aligned;  // rows of x and of the weight start at multiples of 16 bytes
  };
  static constexpr int kBlock = 64, kThreads = 128, kBlocksPerSm = 1, kRun = 64;
  static constexpr int kRow = kBlock + 8, kShared = kBlock * kRow * 4;
  static constexpr DType kMultiplied = kType == DType::f32 ? DType::bf16 : kType;
  using Epilogue = LinearEpilogue<kBlock, kRow>;

  // 16 consecutive elements of a row.
  struct Run {
    float v[16];
  };
  struct Bytes {
    int8_t v[16];
  };

  static VITQ_DEVICE void run(const Params& all) {
    const LinearParams& p = all.linear;
    const int tiles_m = (p.m + kBlock - 1) / kBlock;
    const int m0 = block() % tiles_m * kBlock, n0 = block() / tiles_m * kBlock;
    const int group = lane() / 4, column = lane() % 4;
    const int row0 = warp() / 2 * 32 + group, col0 = warp() % 2 * 32 + group;
    float acc[2][4][4] = {};
    VITQ_UNROLL_ONCE
    for (int k = 16 * column; k - 16 * column < p.k; k += all.nibbles ? 2 * kRun : kRun) {
      VITQ_UNROLL
      for (int half = 0; half < 2; ++half) {
        if (half == 1 && !all.nibbles) break;
        Run low[2], high[2];
        VITQ_UNROLL
        for (int i = 0; i < 2; ++i) {
          low[i] = read(all, m0 + row0 + i * 16, k + half * kRun);
          high[i] = read(all, m0 + row0 + i * 16 + 8, k + half * kRun);
        }
        VITQ_UNROLL
        for (int j = 0; j < 4; ++j) {
          const Bytes w = codes(all, n0 + col0 + j * 8, k, half);
          VITQ_UNROLL
          for (int s = 0; s < 4; ++s) {
            const uint32_t b0 = pack_16<kMultiplied>(w.v[4 * s], w.v[4 * s + 1]);
            const uint32_t b1 = pack_16<kMultiplied>(w.v[4 * s + 2], w.v[4 * s + 3]);
            VITQ_UNROLL
            for (int i = 0; i < 2; ++i) multiply(acc[i][j], low[i].v + 4 * s, high[i].v + 4 * s, b0, b1);
          }
        }
      }
    }
    VITQ_UNROLL
    for (int j = 0; j < 4; ++j) {
      VITQ_UNROLL
      for (int e = 0; e < 2; ++e) {
        const int n = n0 + col0 - group + j * 8 + 2 * column + e;
        const float w_scale = n < p.n ? p.w_scale[n] : 0.0f;
        VITQ_UNROLL
        for (int i = 0; i < 2; ++i) {
          acc[i][j][e] *= w_scale;
          acc[i][j][e + 2] *= w_scale;
        }
      }
    }
    add_branch(p, m0 + row0 - group, n0 + col0 - group, acc);
    auto* result = reinterpret_cast<float*>(shared());
    VITQ_UNROLL
    for (int i = 0; i < 2; ++i) {
      VITQ_UNROLL
      for (int j = 0; j < 4; ++j) {
        VITQ_UNROLL
        for (int h = 0; h < 2; ++h) {
          float* to = result + (row0 + i * 16 + 8 * h) * kRow + col0 - group + j * 8 + 2 * column;
          to[0] = acc[i][j][2 * h];
          to[1] = acc[i][j][2 * h + 1];
        }
      }
    }
    sync();
    for (int row = warp(); row < kBlock && m0 + row < p.m; row += kThreads / kWarp) {
      typename Epilogue::Residual residual[1];
      Epilogue::load_residual(p, m0 + row, n0, residual[0]);
      Epilogue::finish_rows(p, m0 + row, 0, n0, result + row * kRow, residual);
    }
  }

 private:
  // Rows past the end repeat the last one; what is past the end of a row is 0.
  static VITQ_DEVICE Run read(const Params& all, int m, int k) {
    const int64_t at = int64_t{m < all.linear.m ? m : all.linear.m - 1} * all.linear.k + k;
    Run out;
    if (all.aligned && k + 16 <= all.linear.k) {
      constexpr int kEach = kType == DType::f32 ? 4 : 8;
      VITQ_UNROLL
      for (int i = 0; i < 16 / kEach; ++i) {
        const auto four = *reinterpret_cast<const Words4*>(static_cast<const char*>(all.x.data) +
                                                           (at + i * kEach) * size_of(kType));
        VITQ_UNROLL
        for (int e = 0; e < kEach; ++e) {
          if constexpr (kType == DType::f32) {
            out.v[i * kEach + e] = float_of_bits(four.w[e]);
          } else {
            const auto bits = static_cast<uint16_t>(four.w[e / 2] >> e % 2 * 16);
            out.v[i * kEach + e] = kType == DType::f16 ? float_of_half(bits) : float_of_bfloat(bits);
          }
        }
      }
      return out;
    }
    VITQ_UNROLL
    for (int e = 0; e < 16; ++e)
      out.v[e] = k + e < all.linear.k ? load(AnyFloat{all.x.data, kType}, at + e) : 0.0f;
    return out;
  }

  static VITQ_DEVICE Bytes codes(const Params& all, int n, int k, int half) {
    const LinearParams& p = all.linear;
    const uint8_t* row = p.weight + (n < p.n ? n : p.n - 1) * p.weight_row;
    const int at = all.nibbles ? k / (2 * kRun) * kRun + k % kRun : k;
    uint8_t bytes[16];
    if (all.aligned && at + 16 <= p.weight_row) {
      const Words4 four = *reinterpret_cast<const Words4*>(row + at);
      VITQ_UNROLL
      for (int e = 0; e < 16; ++e) bytes[e] = static_cast<uint8_t>(four.w[e / 4] >> e % 4 * 8);
    } else {
      VITQ_UNROLL
      for (int e = 0; e < 16; ++e) bytes[e] = at + e < p.weight_row ? row[at + e] : 0;
    }
    Bytes out;
    VITQ_UNROLL
    for (int e = 0; e < 16; ++e) {
      const int nibble = half ? bytes[e] >> 4 : bytes[e] & 15;
      out.v[e] = static_cast<int8_t>(!all.nibbles ? bytes[e] : p.lut == nullptr ? nibble - 8 : p.lut[nibble]);
    }
    return out;
  }

  // y[16, 8] += 4 of k from each lane of a row: rows g from `low`, g + 8 from `high`.
  static VITQ_DEVICE void multiply(float (&y)[4], const float* low, const float* high, uint32_t b0,
                                   uint32_t b1) {
    float rest[2][4];
    VITQ_UNROLL
    for (int e = 0; e < 4; ++e) {
      rest[0][e] = low[e];
      rest[1][e] = high[e];
    }
    VITQ_UNROLL
    for (int part = 0; part < (kType == DType::f32 ? 3 : 1); ++part) {
      uint32_t a[4];
      VITQ_UNROLL
      for (int h = 0; h < 2; ++h) {
        VITQ_UNROLL
        for (int e = 0; e < 2; ++e) a[h + 2 * e] = pack_16<kMultiplied>(rest[h][2 * e], rest[h][2 * e + 1]);
        if constexpr (kType == DType::f32) {
          VITQ_UNROLL
          for (int e = 0; e < 4; ++e) {
            const float taken = float_of_bfloat(bfloat_of(rest[h][e]));
            // Nothing is left of an infinity: ∞ − ∞ would be none.
            rest[h][e] = fabsf(taken) < INFINITY ? rest[h][e] - taken : 0.0f;
          }
        }
      }
      mma_16<kMultiplied>(y, a, b0, b1);
    }
  }
};

}  // namespace vitq::gpu
