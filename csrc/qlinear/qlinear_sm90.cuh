// The integer linear layer for sm_90a: wgmma fed by bulk tensor copies, in persistent blocks.
//
// The weight is operand A, the activations operand B: a block multiplies 128 rows of the weight by kBlockM
// rows of x, and a thread's sums are a part of the result's transpose. That way int4 weights, which have to
// pass through registers, are widened on the way into the instruction (B can only come from shared memory),
// and both kinds of weight share the rest. It costs nothing that the others would not pay as well: the
// epilogue works on rows of the result and turns the tile in shared memory anyway.
//
//   warpgroup 0   a thread starts copies of tiles of 128 codes of K into a ring of stages, as far ahead as
//                 there is room, across the ends of tiles; three warps round the low-rank branch's t
//   warpgroup 1   multiply and finish: both a tile of 256 rows together, 64 columns each (kTeam 2), or each
//   warpgroup 2   tiles of 128 rows of its own, in turns, one finishing while the other multiplies (kTeam 1)
//
// The low-rank branch passes through the same ring after the K loop, 32 ranks a stage: U [128, 32] as it is,
// t [kBlockM, 32] rounded to U's dtype, multiplied onto the scaled sums by 16-bit wgmma.
//
// Shared memory: 192 KiB of stages (x, then the weight, rows of 128 or 64 bytes swizzled over that span),
// four pieces of 16 rows of the result as floats, the rows' scales, the mbarriers. Rows of 132 floats: lanes
// write columns, 4 rows of 8 lie in different banks.
//
// Roofline: DeiT-B's fc1 of 32 images, M 6304, K 768, N 3072: 29.7 Gop, 15 µs of the H200's 1979 TOPS; 26.6
// MB of operands and codes, 6 µs of its memory. L2 limits: a stage of 256x128 loads 48 KiB for 1024 cycles of
// products, of 128x128 32 KiB for 512. Estimated: the
// epilogue of a tile, 64 passes of a warp over two rows, takes as long as 4 (a bias, to 16 bits) to 10 stages
// (GELU, codes).
#pragma once

#include "common/gpu/ptx_sm90.cuh"
#include "qlinear/epilogue.cuh"
#include "qlinear/nibbles.cuh"

namespace vitq::gpu {

template <Product kProduct, int kTeam>
struct QLinearSm90 {
  struct Params {
    LinearParams linear;
    TensorMap x, weight, lora_up;
    // From the host, so that they take no registers: tiles under one another, all tiles, steps of K, and
    // chunks of kRanks ranks of a 16-bit branch.
    int rows, tiles, steps, chunks;
  };
  static constexpr int kGroup = 128, kThreads = 3 * kGroup, kBlocksPerSm = 1;
  static constexpr int kBlockM = 128 * kTeam, kBlockN = 128, kBlockK = 128, kRanks = 32;
  static constexpr int kSub = 2 / kTeam;  // of a consumer, 64 columns each
  static constexpr bool kNibbles = kProduct != Product::s8;
  static constexpr int kSpanX = kBlockK, kSpanW = kNibbles ? kBlockK / 2 : kBlockK, kSpanBranch = 2 * kRanks;
  static constexpr int kBytesX = kBlockM * kSpanX, kBytesW = kBlockN * kSpanW;
  static constexpr int kStage = kBytesX + kBytesW, kStages = 192 * 1024 / kStage;
  static constexpr int kConverters = 3;  // warps

  static constexpr int kRow = kBlockN + 4, kPiece = 16 * kTeam, kPieces = kBlockM / kPiece;
  using Epilogue = LinearEpilogue<kBlockN, kRow>;

  struct Barriers {
    Barrier full[kStages], empty[kStages];
    Barrier claimed[kStages];  // free to write t
    Barrier turn[2];           // of kTeam 1: whose products are next
  };
  static constexpr int kResultAt = kStages * kStage, kResult = 4 / kTeam * kPiece * kRow * 4;
  static constexpr int kScalesAt = kResultAt + kResult, kBarriersAt = kScalesAt + 256 * 4;
  static constexpr int kShared = kBarriersAt + static_cast<int>(sizeof(Barriers));
  static_assert(kShared <= 227 * 1024 && kBlockN * kSpanBranch <= kBytesW);

  using Sums = int[kSub][kBlockM / 2];
  using Floats = float[kSub][kBlockM / 2];

  static VITQ_DEVICE void run(const Params& p) {
#if defined(VITQ_SM90A)
    Barriers& b = barriers();
    if (thread() == 0) {
      for (int s = 0; s < kStages; ++s) {
        barrier_init(&b.full[s], 1 + kConverters);
        barrier_init(&b.empty[s], 4 * kTeam);
        barrier_init(&b.claimed[s], 1);
      }
      barrier_init(&b.turn[0], 4);
      barrier_init(&b.turn[1], 4);
      fence_barrier_init();
    }
    sync();
    if (warp() < 4) {
      leave_registers<56>();
      if (warp() > 0) {
        convert(p);
      } else if (elect()) {
        copy(p);
      }
    } else {
      take_registers<224>();
      consume(p);
    }
#elif defined(__CUDA_ARCH__)
    __trap();  // another architecture's machine code was taken
#endif
  }

 private:
  static VITQ_DEVICE Barriers& barriers() { return *reinterpret_cast<Barriers*>(shared() + kBarriersAt); }

  // The n-th use of the ring.
  static VITQ_DEVICE int slot_of(int use) { return use % kStages; }
  static VITQ_DEVICE int parity_of(int use) { return use / kStages % 2; }
  static VITQ_DEVICE char* stage_of(int use) { return shared() + slot_of(use) * kStage; }

  // A block's tile number `turn`; those under one another first: a wave of blocks then shares few column
  // tiles of the weight.
  struct Tile {
    int m0, n0, use;  // the first use of the ring
    bool there;

    VITQ_DEVICE Tile(const Params& p, int turn) {
      const int index = block() + turn * blocks();
      m0 = index % p.rows * kBlockM;
      n0 = index / p.rows * kBlockN;
      use = turn * (p.steps + p.chunks);
      there = index < p.tiles;
    }
  };

  // ---- producers ----

  static VITQ_DEVICE void copy(const Params& p) {
    Barriers& b = barriers();
    prefetch(p.x);
    prefetch(p.weight);
    if (p.chunks > 0) prefetch(p.lora_up);
    int use = 0;
    for (int turn = 0;; ++turn) {
      const Tile tile(p, turn);
      if (!tile.there) break;
      VITQ_UNROLL_ONCE
      for (int step = 0; step < p.steps; ++step, ++use) {
        Barrier* full = &b.full[slot_of(use)];
        barrier_wait(&b.empty[slot_of(use)], parity_of(use) ^ 1);
        barrier_arrive(full, kConverters);
        barrier_arrive_expecting(full, kStage);
        load_tile(p.x, stage_of(use), full, step * kSpanX, tile.m0);
        load_tile(p.weight, stage_of(use) + kBytesX, full, step * kSpanW, tile.n0);
      }
      VITQ_UNROLL_ONCE
      for (int chunk = 0; chunk < p.chunks; ++chunk, ++use) {
        Barrier* full = &b.full[slot_of(use)];
        barrier_wait(&b.empty[slot_of(use)], parity_of(use) ^ 1);
        barrier_arrive(&b.claimed[slot_of(use)]);
        barrier_arrive_expecting(full, kBlockN * kSpanBranch);
        load_tile(p.lora_up, stage_of(use) + kBytesX, full, chunk * kSpanBranch, tile.n0);
      }
    }
  }

  // t as 16 bits into the stages of the branch. `claimed` says when one is free: it counts these uses of a
  // stage alone, where phases of `empty` would pass unseen.
  static VITQ_DEVICE void convert(const Params& p) {
    const LinearParams& l = p.linear;
    uint32_t parities = 0;
    if (p.chunks == 0) return;
    for (int turn = 0;; ++turn) {
      const Tile tile(p, turn);
      if (!tile.there) break;
      for (int chunk = 0; chunk < p.chunks; ++chunk) {
        const int use = tile.use + p.steps + chunk;
        const int slot = slot_of(use);
        barrier_wait(&barriers().claimed[slot], static_cast<int>(parities >> slot & 1));
        parities ^= 1u << slot;
        if (l.lora_up.dtype == DType::f16) {
          round_chunk<DType::f16>(l, stage_of(use), tile.m0, chunk * kRanks);
        } else {
          round_chunk<DType::bf16>(l, stage_of(use), tile.m0, chunk * kRanks);
        }
        fence_async();
        sync_warp();
        if (lane() == 0) barrier_arrive(&barriers().full[slot]);
      }
    }
  }

  // 8 ranks of a row at a time: ranks are a multiple of 8.
  template <DType kType>
  static VITQ_DEVICE void round_chunk(const LinearParams& l, char* stage, int m0, int rank0) {
    constexpr int kParts = kRanks / 8, kAhead = 2, kThere = kConverters * kWarp;
    VITQ_UNROLL_ONCE
    for (int i0 = thread() - kWarp; i0 < kBlockM * kParts; i0 += kAhead * kThere) {
      Floats4 t[kAhead][2];
      VITQ_UNROLL
      for (int a = 0; a < kAhead; ++a) {
        const int i = i0 + a * kThere, m = m0 + i / kParts, rank = rank0 + i % kParts * 8;
        const bool there = m < l.m && rank < l.rank;
        const auto* from =
            reinterpret_cast<const Floats4*>(l.lora_t + (there ? int64_t{m} * l.rank + rank : 0));
        t[a][0] = there ? from[0] : Floats4{};
        t[a][1] = there ? from[1] : Floats4{};
      }
      VITQ_UNROLL
      for (int a = 0; a < kAhead; ++a) {
        const int i = i0 + a * kThere;
        if (i >= kBlockM * kParts) break;
        const float (&u)[4] = t[a][0].v, (&v)[4] = t[a][1].v;
        *reinterpret_cast<Words4*>(stage + swizzled<kSpanBranch>(i / kParts, i % kParts * 16)) = {
            pack_branch<kType>(u[0], u[1]), pack_branch<kType>(u[2], u[3]), pack_branch<kType>(v[0], v[1]),
            pack_branch<kType>(v[2], v[3])};
      }
    }
  }

  // ---- consumers ----

  static VITQ_DEVICE int consumer() { return warp() / 4 - 1; }
  // The same where each part of a tile's work derives it: kept around the epilogue, it would cost registers.
  static VITQ_DEVICE int consumer_anew() { return thread_anew() / kGroup - 1; }
  static VITQ_DEVICE int team_thread() {
    return kTeam == 2 ? thread_anew() - kGroup : thread_anew() % kGroup;
  }
  static VITQ_DEVICE void sync_team() { sync_some<kTeam * kGroup>(kTeam == 2 ? 1 : 1 + consumer_anew()); }
  static VITQ_DEVICE void release(int use) {
    if constexpr (kNibbles) sync_warp();  // other lanes' reads of the weight
    if (lane() == 0) barrier_arrive(&barriers().empty[slot_of(use)]);
  }
  // Behind the last wait for a stage of one's tile.
  static VITQ_DEVICE void hand_over() {
    if (kTeam == 1 && lane() == 0) barrier_arrive(&barriers().turn[1 - consumer_anew()]);
  }
  // The first of the 64 columns of the tile that `sub` of this warpgroup multiplies.
  static VITQ_DEVICE int columns_of(int sub) { return 64 * (kTeam == 2 ? consumer() : sub); }

  static VITQ_DEVICE void consume(const Params& p) {
    const LinearParams& l = p.linear;
    for (int turn = kTeam == 1 ? consumer() : 0;; turn += kTeam == 1 ? 2 : 1) {
      const Tile tile(p, turn);
      if (!tile.there) break;
      const int m = tile.m0 + team_thread();
      const float scale = m < l.m ? l.x_scale[int64_t{m} * l.x_scale_stride] : 0.0f;
      // Also: the waits below tell a phase from the next one only; those before have ended.
      if constexpr (kTeam == 1) barrier_wait(&barriers().turn[turn % 2], turn / 2 % 2 ^ (turn % 2 == 0));
      Sums sums;
      VITQ_UNROLL
      for (int sub = 0; sub < kSub; ++sub) {
        VITQ_UNROLL
        for (int i = 0; i < kBlockM / 2; ++i) sums[sub][i] = 0;
      }
      if constexpr (kNibbles) multiply_nibbles(l, tile.use, p.steps, sums);
      if constexpr (!kNibbles) multiply(tile.use, p.steps, sums);
      float* scales = reinterpret_cast<float*>(shared() + kScalesAt) + (kTeam == 2 ? 0 : turn % 2 * kBlockM);
      scales[team_thread()] = scale;
      sync_team();
      if (p.chunks == 0) hand_over();
      Floats y;
      scale_sums(l, tile.n0, scales, sums, y);
      if (p.chunks > 0) {
        if (l.lora_up.dtype == DType::f16) {
          add_branch<DType::f16>(tile.use + p.steps, p.chunks, y);
        } else {
          add_branch<DType::bf16>(tile.use + p.steps, p.chunks, y);
        }
        hand_over();
      }
      finish(l, tile.m0, tile.n0, y);
    }
  }

  static VITQ_DEVICE void multiply(int use, int steps, Sums& sums) {
    VITQ_UNROLL_ONCE
    for (int step = 0; step < steps; ++step, ++use) {
      const uint32_t x = shared_address(stage_of(use)), w = x + kBytesX;
      barrier_wait(&barriers().full[slot_of(use)], parity_of(use));
      group_fence();
      VITQ_UNROLL
      for (int k = 0; k < kBlockK; k += 32) {
        VITQ_UNROLL
        for (int sub = 0; sub < kSub; ++sub) {
          group_mma_s8(sums[sub], tile_descriptor<kSpanW>(w + columns_of(sub) * kSpanW, k),
                       tile_descriptor<kSpanX>(x, k));
        }
      }
      group_commit();
      group_wait<1>();
      if (step > 0) release(use - 1);
    }
    group_wait<0>();
    VITQ_UNROLL
    for (int sub = 0; sub < kSub; ++sub) pin(sums[sub]);
    release(use - 1);
  }

  // Half a tile of K at a time, that of the low nibbles and that of the high ones, while the other half is
  // multiplied: each has registers of its own.
  static VITQ_DEVICE void multiply_nibbles(const LinearParams& l, int use, int steps, Sums& sums) {
    uint32_t table[4] = {};
    if constexpr (kProduct == Product::w4_table) {
      VITQ_UNROLL
      for (int i = 0; i < 4; ++i) table[i] = reinterpret_cast<const uint32_t*>(l.lut)[i];
    }
    uint32_t packed[kSub][2][4], a[2][kSub][2][4];
    VITQ_UNROLL_ONCE
    for (int step = 0; step < steps; ++step, ++use) {
      char* stage = stage_of(use);
      const int lane = thread_anew() % kWarp;
      barrier_wait(&barriers().full[slot_of(use)], parity_of(use));
      VITQ_UNROLL
      for (int half = 0; half < 2; ++half) {
        VITQ_UNROLL
        for (int sub = 0; sub < kSub; ++sub) {
          VITQ_UNROLL
          for (int k = 0; k < 2; ++k) {
            // Again for the other half where levels need the registers.
            if (half == 0 || kProduct == Product::w4_table) {
              read_packed(stage + kBytesX, lane, columns_of(sub), k, packed[sub][k]);
            }
            VITQ_UNROLL
            for (int r = 0; r < 4; ++r) {
              a[half][sub][k][r] = widened(table, half == 0 ? packed[sub][k][r] : packed[sub][k][r] >> 4);
            }
          }
        }
        group_fence();
        VITQ_UNROLL
        for (int k = 0; k < 2; ++k) {
          VITQ_UNROLL
          for (int sub = 0; sub < kSub; ++sub) {
            group_mma_s8(sums[sub], a[half][sub][k],
                         tile_descriptor<kSpanX>(shared_address(stage), half * 64 + k * 32));
          }
        }
        group_commit();
        group_wait<1>();
        if (half == 0 && step > 0) release(use - 1);
      }
    }
    group_wait<0>();
    VITQ_UNROLL
    for (int sub = 0; sub < kSub; ++sub) pin(sums[sub]);
    release(use - 1);
  }

  // This lane's bytes of operand A's registers of 32 bytes of K from 32·k on.
  static VITQ_DEVICE void read_packed(const char* w, int lane, int column0, int k, uint32_t (&out)[4]) {
    const int row = warp() % 4 * 16 + lane / 4;
    VITQ_UNROLL
    for (int r = 0; r < 4; ++r) {
      // Swizzling repeats every 8 rows: of those, constants remain.
      const int at = swizzled<kSpanW>(row, k * 32 + r / 2 * 16 + lane % 4 * 4);
      out[r] = *reinterpret_cast<const uint32_t*>(w + at + (column0 + 8 * (r % 2)) * kSpanW);
    }
  }

  // The low nibbles of 4 bytes as int8.
  static VITQ_DEVICE uint32_t widened(const uint32_t (&table)[4], uint32_t w) {
    if constexpr (kProduct == Product::w4_table) return levels(table, w);
    return high_nibbles(w << 4);
  }

  // Sums to float32: thread's rows n of the transpose, of which w_scale is, and columns m, of which x_scale
  // is.
  static VITQ_DEVICE void scale_sums(const LinearParams& l, int n0, const float* scales, const Sums& sums,
                                     Floats& y) {
    float w_scale[kSub][2];
    int correction[kSub][2];
    VITQ_UNROLL
    for (int i = 0; i < 2 * kSub; ++i) {
      const int n = n0 + columns_of(i / 2) + warp() % 4 * 16 + lane() / 4 + i % 2 * 8;
      w_scale[i / 2][i % 2] = n < l.n ? l.w_scale[n] : 0.0f;
      correction[i / 2][i % 2] = l.x_zero_point != 0 && n < l.n ? l.x_zero_point * l.col_sum[n] : 0;
    }
    VITQ_UNROLL
    for (int c = 0; c < kBlockM / 4; ++c) {
      // Volatile, and behind barriers: or the compiler loads the scales of all columns first, and spills.
      const float x_scale = static_cast<const volatile float*>(scales)[c / 2 * 8 + lane() % 4 * 2 + c % 2];
      VITQ_UNROLL
      for (int h = 0; h < 2; ++h) {
        const int i = c / 2 * 4 + h * 2 + c % 2;
        VITQ_UNROLL
        for (int sub = 0; sub < kSub; ++sub) {
          const int total = kProduct == Product::w4 ? sums[sub][i] >> 4 : sums[sub][i];
          y[sub][i] = static_cast<float>(total - correction[sub][h]) * (x_scale * w_scale[sub][h]);
        }
      }
      if (c % (4 * kTeam) == 4 * kTeam - 1) sync_warp();
    }
  }

  // y += t·Uᵀ, kRanks ranks a stage.
  template <DType kType>
  static VITQ_DEVICE void add_branch(int use, int chunks, Floats& y) {
    VITQ_UNROLL_ONCE
    for (const int end = use + chunks; use < end; ++use) {
      const uint32_t t = shared_address(stage_of(use)), up = t + kBytesX;
      barrier_wait(&barriers().full[slot_of(use)], parity_of(use));
      VITQ_UNROLL
      for (int sub = 0; sub < kSub; ++sub) pin(y[sub]);
      group_fence();
      VITQ_UNROLL
      for (int k = 0; k < 2 * kRanks; k += 32) {
        VITQ_UNROLL
        for (int sub = 0; sub < kSub; ++sub) {
          group_mma_16<kType>(y[sub], tile_descriptor<kSpanBranch>(up + columns_of(sub) * kSpanBranch, k),
                              tile_descriptor<kSpanBranch>(t, k));
        }
      }
      group_commit();
      group_wait<0>();
      VITQ_UNROLL
      for (int sub = 0; sub < kSub; ++sub) pin(y[sub]);
      release(use);
    }
  }

  // Pieces of the tile's rows through shared memory, in two places in turns: what a warp still reads of one
  // piece is written over by the one after the next, behind the barrier of the next.
  static VITQ_DEVICE void finish(const LinearParams& l, int m0, int n0, const Floats& y) {
    constexpr int kFloats = kPiece * kRow;
    float* result =
        reinterpret_cast<float*>(shared() + kResultAt) + (kTeam == 2 ? 0 : consumer_anew() * 2 * kFloats);
    const int team_warp = team_thread() / kWarp;
    // A warp's rows of a piece, two at a time; what the next two add from memory is on its way meanwhile, if
    // there are registers for it.
    constexpr int kStep = 4 * kTeam, kRows = 2;
    constexpr bool kAhead = kTeam == 2 || !kNibbles;
    typename Epilogue::Residual residual[kRows], next[kRows];
    const auto load = [&](int m, typename Epilogue::Residual(&to)[kRows]) {
      VITQ_UNROLL
      for (int r = 0; r < kRows; ++r) Epilogue::load_residual(l, m + r * kStep, n0, to[r]);
    };
    if (kAhead) load(m0 + team_warp, next);
    VITQ_UNROLL_ONCE
    for (int piece = 0; piece < kPieces && m0 + piece * kPiece < l.m; ++piece) {
      float* rows = result + piece % 2 * kFloats;
      const int m = m0 + piece * kPiece;
      VITQ_UNROLL_ONCE
      for (int row = team_warp; row < kPiece; row += kRows * kStep) {
        if (!kAhead) load(m + row, residual);
        if (row == team_warp) {
          VITQ_UNROLL
          for (int q = 0; q < kPieces; ++q) {
            if (q == piece) write_piece(y, q, rows);
          }
          sync_team();
        }
        if (kAhead) {
          VITQ_UNROLL
          for (int r = 0; r < kRows; ++r) residual[r] = next[r];
          // Behind a piece's last row follows the next one's first; a tile's last ones load what nobody adds.
          load(m + row + kRows * kStep, next);
        }
        Epilogue::finish_rows(l, m + row, kStep, n0, rows + row * kRow, residual);
      }
      if (l.lora_down) {
        sync_team();
        // 16 rows by 4 warps, 8 ranks at a time.
        const int row = team_warp / 4 * 16, rank = team_warp % 4 * 8;
        if (l.lora_down.dtype == DType::f16) {
          Epilogue::template project<DType::f16>(l, m + row, n0, rows + row * kRow, rank, 32);
        } else {
          Epilogue::template project<DType::bf16>(l, m + row, n0, rows + row * kRow, rank, 32);
        }
      }
    }
  }

  static VITQ_DEVICE void write_piece(const Floats& y, int piece, float* rows) {
    VITQ_UNROLL
    for (int sub = 0; sub < kSub; ++sub) {
      VITQ_UNROLL
      for (int i = 0; i < kPiece / 2; ++i) {
        const int m = i / 4 * 8 + lane() % 4 * 2 + i % 2;
        const int n = columns_of(sub) + warp() % 4 * 16 + lane() / 4 + i / 2 % 2 * 8;
        rows[m * kRow + n] = y[sub][piece * (kPiece / 2) + i];
      }
    }
  }
};

}  // namespace vitq::gpu
