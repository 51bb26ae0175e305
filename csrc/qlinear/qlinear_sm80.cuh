// The integer linear layer for tensor cores of sm_80 and later, by mma.sync.
//
// Both operands lie in shared memory as they lie in global memory, in slabs of 64 consecutive bytes of K, a
// row after the other, but for the order of a row's pieces of 16 bytes: see place(). ldmatrix then loads
// fragments as mma.sync takes them, from all banks at once, and the weight needs no packing. The two nibbles
// of a byte of `int4_k64x2` are 64 codes apart, which makes them the same place of the two slabs of a tile.
//
//   s8        int8 weights [N, K]
//   w4        int4 weights, shifted into the high nibbles of int8: products come 16 times too large, exactly
//   w4_table  int4 indices of a table of 16 levels
//   s4        int4 weights and activations whose int8 codes lie in [−8, 7], 64 codes an instruction
//
// Shared memory of 128x128: 96 KiB, of 3 stages of s8 and of 4 of the others. Registers and what they leave
// room for: tests/kernels/test_cuda_build.py.
#pragma once

#include "common/gpu/arrivals.cuh"
#include "qlinear/epilogue.cuh"
#include "qlinear/nibbles.cuh"

namespace vitq::gpu {

template <Product kProduct, int kBlockM, int kBlockN, int kWarpsM, int kWarpsN, int kStages, bool kAligned>
struct QLinear {
  using Params = LinearParams;
  static constexpr int kThreads = kWarp * kWarpsM * kWarpsN, kBlockRows = kBlockM, kBlockColumns = kBlockN;
  static constexpr int kBlocksPerSm = 1;
  static constexpr int kWarps = kWarpsM * kWarpsN;
  static constexpr int kTilesM = kBlockM / kWarpsM / 16, kTilesN = kBlockN / kWarpsN / 8;
  static constexpr int kAccumulators = kTilesM * kTilesN * 4;
  static constexpr int kBlockK = 128, kSlab = 64, kPieces = kBlockK / 16;
  static constexpr bool kNibbles = kProduct != Product::s8;
  static constexpr int kBytesX = kBlockM * kBlockK, kBytesW = kBlockN * (kNibbles ? kSlab : kBlockK);
  static constexpr int kStage = kBytesX + kBytesW;
  // Rows of the result as floats: 8 rows that a warp writes at once lie in different banks.
  static constexpr int kRow = kBlockN + 8;
  static constexpr int kResult = kBlockM * kRow * 4;
  static constexpr int kShared = kStages * kStage > kResult ? kStages * kStage : kResult;
  using Epilogue = LinearEpilogue<kBlockN, kRow>;
  static_assert(kTilesM > 0 && kTilesN > 0);

  using Accumulators = int[kTilesM][kTilesN][4];

  static VITQ_DEVICE void run(const Params& p) {
    const int tiles_m = (p.m + kBlockM - 1) / kBlockM;
    // Tiles under one another first: a wave of blocks then shares few column tiles of the weight.
    const int tile_m = block() % tiles_m, tile_n = block() / tiles_m;
    const int m0 = tile_m * kBlockM, n0 = tile_n * kBlockN;
    const int steps = (p.k + kBlockK - 1) / kBlockK;
    const int first = static_cast<int>(int64_t{steps} * block_y() / blocks_y());
    const int last = static_cast<int>(int64_t{steps} * (block_y() + 1) / blocks_y());
    Accumulators acc;
    VITQ_UNROLL
    for (int i = 0; i < kTilesM; ++i) {
      VITQ_UNROLL
      for (int j = 0; j < kTilesN; ++j) {
        VITQ_UNROLL
        for (int e = 0; e < 4; ++e) acc[i][j][e] = 0;
      }
    }
    multiply(p, m0, n0, first, last, acc);
    if (blocks_y() > 1 && !gather(p, tile_m + tile_n * tiles_m, acc)) return;
    finish(p, m0, n0, acc);
  }

 private:
  // ---- the product ----

  // Where 16 bytes of K are, of the 8 that a row has in a tile: in bytes.
  //
  // 8 rows of one slab lie in all banks, as ldmatrix reads them: two rows are 128 bytes, and what follows two
  // rows further is exchanged with its neighbours. Rows of the second slab are swapped in pairs, so that the
  // 8 lanes that copy one row write to all banks, too.
  static constexpr VITQ_HOST_DEVICE int place(int row, int piece, int rows) {
    const int slab = piece / 4;
    return (slab * rows + (row ^ slab)) * kSlab + (piece % 4 ^ row / 2 % 4) * 16;
  }
  static constexpr bool in_all_banks() {
    for (int i = 0; i < 8; ++i) {
      int rows = 0, pieces = 0;
      for (int j = 0; j < 8; ++j) {
        rows |= 1 << place(j, i, kBlockN) / 16 % 8;
        pieces |= 1 << place(i, j, kBlockN) / 16 % 8;
      }
      if (rows != 255 || pieces != 255) return false;
    }
    return true;
  }

  // What a thread copies in every step: 16 bytes of each of kRows rows of an operand, kStride rows apart.
  template <int kRows, int kRowPieces, bool kWhole>
  struct Copies {
    static constexpr int kStride = kThreads / kRowPieces, kCount = kRows / kStride;
    // By 8: place() treats all of the thread's rows alike.
    static_assert(kThreads % kRowPieces == 0 && kRows % kStride == 0 && kStride % 8 == 0);
    const char* from[kCount];
    int to, at;

    // Rows past the end, `rows`, repeat the last one: what they add to is not stored.
    VITQ_DEVICE Copies(const void* data, int64_t pitch, int first_row, int rows) {
      const int row = thread() / kRowPieces, piece = thread() % kRowPieces;
      at = piece * 16;
      to = place(row, piece, kRows);
      VITQ_UNROLL
      for (int j = 0; j < kCount; ++j) {
        const int r = first_row + row + j * kStride < rows ? first_row + row + j * kStride : rows - 1;
        from[j] = static_cast<const char*>(data) + r * pitch;
      }
    }

    // From byte `start` on of rows of `length`; what is past their ends becomes 0.
    VITQ_DEVICE void run(char* stage, int64_t start, int64_t length) const {
      const int64_t left = length - start - at;
      VITQ_UNROLL
      for (int j = 0; j < kCount; ++j) {
        copy_piece<kWhole>(stage + to + j * kStride * kSlab, from[j], left > 0 ? start + at : 0, left);
      }
    }
  };
  using CopiesX = Copies<kBlockM, kPieces, kAligned>;
  // Rows of nibbles are whole tiles and start at 16 bytes.
  using CopiesW = Copies<kBlockN, kNibbles ? kSlab / 16 : kPieces, kAligned || kNibbles>;

  // 16 bytes from byte `at` of a row, the first `left` of them, zeros for the others; kWhole: all or none.
  template <bool kWhole>
  static VITQ_DEVICE void copy_piece(char* to, const char* row, int64_t at, int64_t left) {
    const char* from = row + at;
    if constexpr (kWhole) {
      copy_async(to, from, left > 0 ? 16 : 0);
    } else {
      uint32_t words[4] = {0, 0, 0, 0};
      VITQ_UNROLL
      for (int i = 0; i < 16; ++i) {
        if (i < left) words[i / 4] |= static_cast<uint32_t>(static_cast<uint8_t>(from[i])) << i % 4 * 8;
      }
      *reinterpret_cast<Words4*>(to) = {words[0], words[1], words[2], words[3]};
    }
  }

  static VITQ_DEVICE void copy_stage(const Params& p, const CopiesX& x, const CopiesW& w, int step,
                                     char* stage) {
    x.run(stage, int64_t{step} * kBlockK, p.k);
    w.run(stage + kBytesX, int64_t{step} * (kNibbles ? kSlab : kBlockK), p.weight_row);
  }

  static VITQ_DEVICE void multiply(const Params& p, int m0, int n0, int first, int last, Accumulators& acc) {
    char* memory = shared();
    const CopiesX x(p.x, p.k, m0, p.m);
    const CopiesW w(p.weight, p.weight_row, n0, p.n);
    VITQ_UNROLL
    for (int s = 0; s < kStages - 1; ++s) {
      if (first + s < last) copy_stage(p, x, w, first + s, memory + s * kStage);
      commit_copies();
    }
    Words4 table{};
    if constexpr (kProduct == Product::w4_table) {
      VITQ_UNROLL
      for (int i = 0; i < 4; ++i) table.w[i] = reinterpret_cast<const uint32_t*>(p.lut)[i];
    }
    int slot = 0;
    VITQ_UNROLL_ONCE
    for (int step = first; step < last; ++step) {
      wait_copies<kStages - 2>();
      sync();
      // Into the slot that all have read in the step before.
      const int next = step + kStages - 1;
      if (next < last) copy_stage(p, x, w, next, memory + (slot + kStages - 1) % kStages * kStage);
      commit_copies();
      multiply_stage(table, memory + slot * kStage, acc);
      slot = slot + 1 == kStages ? 0 : slot + 1;
    }
    wait_copies<0>();
    sync();
  }

  // Where this lane's row of a fragment begins: of x, [16, 32] from row `row` on; of the weight, [8, 64].
  static VITQ_DEVICE int place_x(int row, int slab, int step) {
    return place(row + lane() % 16, slab * 4 + step * 2 + lane() / 16, kBlockM);
  }
  static VITQ_DEVICE int place_w(int row, int slab) {
    return place(row + lane() % 8, slab * 4 + lane() / 8, kBlockN);
  }

  static VITQ_DEVICE void multiply_stage(const Words4& table, const char* stage, Accumulators& acc) {
    static_assert(in_all_banks());
    const int row0 = warp() / kWarpsN * (kBlockM / kWarpsM), n0 = warp() % kWarpsN * (kBlockN / kWarpsN);
    const char* w = stage + kBytesX;
    if constexpr (kProduct == Product::s4) {
      Words4 b[kTilesN];
      VITQ_UNROLL
      for (int j = 0; j < kTilesN; ++j) {
        load_matrices(b[j].w, w + place_w(n0, 0) + j * 8 * kSlab);
        VITQ_UNROLL
        for (int e = 0; e < 4; ++e) b[j].w[e] ^= 0x88888888u;  // code + 8 to two's complement
      }
      VITQ_UNROLL
      for (int i = 0; i < kTilesM; ++i) {
        VITQ_UNROLL
        for (int s = 0; s < 2; ++s) {
          // Codes of both slabs in [−8, 7] as nibbles, the first slab's in the low ones.
          uint32_t a[4], high[4];
          load_matrices(a, stage + place_x(row0, 0, s) + i * 16 * kSlab);
          load_matrices(high, stage + place_x(row0, 1, s) + i * 16 * kSlab);
          VITQ_UNROLL
          for (int e = 0; e < 4; ++e) a[e] = chosen_bits(0x0f0f0f0fu, a[e], high[e] << 4);
          VITQ_UNROLL
          for (int j = 0; j < kTilesN; ++j) mma_s4(acc[i][j], a, b[j].w[2 * s], b[j].w[2 * s + 1]);
        }
      }
    } else {
      Words4 b[2][kTilesN];
      VITQ_UNROLL
      for (int slab = 0; slab < 2; ++slab) {
        VITQ_UNROLL
        for (int j = 0; j < kTilesN; ++j) {
          if (slab == 0 || !kNibbles) load_matrices(b[slab][j].w, w + place_w(n0, slab) + j * 8 * kSlab);
          if (slab == 0 && kNibbles) widen(table, b[0][j], b[1][j]);
        }
        VITQ_UNROLL
        for (int i = 0; i < kTilesM; ++i) {
          VITQ_UNROLL
          for (int s = 0; s < 2; ++s) {
            uint32_t a[4];
            load_matrices(a, stage + place_x(row0, slab, s) + i * 16 * kSlab);
            VITQ_UNROLL
            for (int j = 0; j < kTilesN; ++j)
              mma_s8(acc[i][j], a, b[slab][j].w[2 * s], b[slab][j].w[2 * s + 1]);
          }
        }
      }
    }
  }

  // Bytes of nibbles to the int8 of both slabs.
  static VITQ_DEVICE void widen(const Words4& table, Words4& packed, Words4& second) {
    VITQ_UNROLL
    for (int e = 0; e < 4; ++e) {
      if constexpr (kProduct == Product::w4) {
        const uint32_t w = packed.w[e];
        packed.w[e] = high_nibbles(w << 4);
        second.w[e] = high_nibbles(w);
      } else {
        levels(table.w, packed.w[e], packed.w[e], second.w[e]);
      }
    }
  }

  // ---- split K ----

  // Leaves this block's share where the last block of the tile to come finds it; true for that one, which
  // then has the sum of all. Integers: the order does not matter.
  static VITQ_DEVICE bool gather(const Params& p, int tile, Accumulators& acc) {
    const auto share = [&](int split) {
      return p.partial + ((int64_t{tile} * blocks_y() + split) * kAccumulators) * kThreads + thread();
    };
    int32_t* mine = share(block_y());
    VITQ_UNROLL
    for (int e = 0; e < kAccumulators; ++e) mine[e * kThreads] = (&acc[0][0][0])[e];
    auto* before = reinterpret_cast<unsigned*>(shared());
    sync();
    if (thread() == 0) {
      unsigned* counters = p.arrivals < 0 ? p.counters : g_arrivals + p.arrivals;
      *before = count_arrival(counters + tile, static_cast<unsigned>(blocks_y() - 1));
    }
    sync();
    const bool last = *before == static_cast<unsigned>(blocks_y() - 1);
    sync();
    if (!last) return false;
    see_arrivals();
    for (int split = 0; split < blocks_y(); ++split) {
      if (split == block_y()) continue;
      const int32_t* other = share(split);
      VITQ_UNROLL
      for (int e = 0; e < kAccumulators; ++e) (&acc[0][0][0])[e] += other[e * kThreads];
    }
    return true;
  }

  // ---- the epilogue ----

  static VITQ_DEVICE void finish(const Params& p, int m0, int n0, const Accumulators& acc) {
    auto* result = reinterpret_cast<float*>(shared());
    scale_and_branch(p, m0, n0, acc);
    sync();
    for (int row = warp(); row < kBlockM && m0 + row < p.m; row += kWarps) {
      typename Epilogue::Residual residual[1];
      Epilogue::load_residual(p, m0 + row, n0, residual[0]);
      Epilogue::finish_rows(p, m0 + row, 0, n0, result + row * kRow, residual);
    }
    if (p.lora_down) {
      sync();
      const bool f16 = p.lora_down.dtype == DType::f16;
      for (int row = warp() * 16; row < kBlockM && m0 + row < p.m; row += kWarps * 16) {
        if (f16) Epilogue::template project<DType::f16>(p, m0 + row, n0, result + row * kRow, 0, 8);
        if (!f16) Epilogue::template project<DType::bf16>(p, m0 + row, n0, result + row * kRow, 0, 8);
      }
    }
  }

  // Product and low-rank branch, [kBlockM, kBlockN] floats into shared memory.
  static VITQ_DEVICE void scale_and_branch(const Params& p, int m0, int n0, const Accumulators& acc) {
    const int group = lane() / 4, column = lane() % 4;
    const int row0 = warp() / kWarpsN * (kBlockM / kWarpsM), col0 = warp() % kWarpsN * (kBlockN / kWarpsN);
    float y[kTilesM][kTilesN][4], x_scale[kTilesM][2];
    VITQ_UNROLL
    for (int i = 0; i < 2 * kTilesM; ++i) {
      const int m = m0 + row0 + group + i * 8;
      x_scale[i / 2][i % 2] = m < p.m ? p.x_scale[int64_t{m} * p.x_scale_stride] : 0.0f;
    }
    VITQ_UNROLL
    for (int j = 0; j < kTilesN; ++j) {
      float w_scale[2];
      int correction[2];
      VITQ_UNROLL
      for (int e = 0; e < 2; ++e) {
        const int n = n0 + col0 + j * 8 + 2 * column + e;
        w_scale[e] = n < p.n ? p.w_scale[n] : 0.0f;
        correction[e] = p.x_zero_point != 0 && n < p.n ? p.x_zero_point * p.col_sum[n] : 0;
      }
      VITQ_UNROLL
      for (int i = 0; i < kTilesM; ++i) {
        VITQ_UNROLL
        for (int e = 0; e < 4; ++e) {
          const int total = kProduct == Product::w4 ? acc[i][j][e] >> 4 : acc[i][j][e];
          y[i][j][e] = static_cast<float>(total - correction[e % 2]) * (x_scale[i][e / 2] * w_scale[e % 2]);
        }
      }
    }
    add_branch(p, m0 + row0, n0 + col0, y);
    auto* result = reinterpret_cast<float*>(shared()) + (row0 + group) * kRow + col0 + 2 * column;
    VITQ_UNROLL
    for (int i = 0; i < kTilesM; ++i) {
      VITQ_UNROLL
      for (int j = 0; j < kTilesN; ++j) {
        VITQ_UNROLL
        for (int h = 0; h < 2; ++h) {
          float* to = result + (i * 16 + 8 * h) * kRow + j * 8;
          to[0] = y[i][j][2 * h];
          to[1] = y[i][j][2 * h + 1];
        }
      }
    }
  }
};

}  // namespace vitq::gpu
