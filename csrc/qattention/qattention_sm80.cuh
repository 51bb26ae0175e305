// Integer attention for tensor cores of sm_80 and later, by mma.sync: int8 scores, float32 softmax, 8-bit
// probabilities of the dynamic-focusing quantizer, int8 values.
//
// A block takes 64 queries of a head, a warp 16 of them, and keeps their scores in registers: whole rows up
// to 256 keys. Longer rows are gone through twice, 64 keys at a time: for the maximum (and Σ e where
// something divides by it), then for the levels and their product with V.
//
// Lane (g, c) = (l / 4, l % 4) gets a product's columns 2c, 2c + 1 of rows g, g + 8. Which key is a column,
// and which k is a key, is ours to choose: columns 2c, 2c + 1 of the four tiles of 32 keys are the eight keys
// from 8c on (`key_of`). So the levels of a lane are, packed to bytes, its fragment of the second product's
// operand A, and bias and mask are read four keys at a time.
//
// V goes to shared memory as it is. A transposed load of 16-bit elements hands a lane its keys for two
// neighbouring d; a byte permutation of two such words tells these apart: even d are columns of one tile of
// the second product, odd d of the next, and a lane ends up with four d side by side. K and V lie in slabs of
// kSlab bytes of d, their 16-byte pieces swapped (`place`) so that neither these loads nor those of K meet in
// a bank. Of K a lane reads 8 or 16 bytes at once and takes them for its fragments: the order of d in a
// product is ours, too, as long as Q has the same.
//
// Products are accumulated on the bits of 1.5·2^23, which makes them floats without a conversion (they stay
// below 2^22 for d <= 128); codes leave a float addition of that number as bytes.
//
// Roofline of a head: 4·Nq·Nk·d integer operations, Nq·Nk exponentials, d·(Nq + 2·Nk) bytes of codes and d·Nq
// floats of output. B=32, H=12, N=197, d=64 on an A100 (624 TOPS, 16 exponentials a clock and processor, 1.6
// TB/s): 6 µs, 6 µs, and 15 µs with float16 output. The row-anchored square law, renormalized, takes 8
// instructions a score beside the exponential, the products 3 more; with padding (13 tiles of 16 queries, 224
// keys) there are 18 M scores: 10 µs of issue. Memory limits a ViT, issue long rows, whose scores are
// computed twice.
#pragma once

#include <algorithm>
#include <type_traits>

#include "common/gpu/float_math.cuh"
#include "qattention/qattention_cpu.h"

namespace vitq::gpu {

// What level a code has: the code, rne(grid·(code/top)²), a table's entry.
enum class Levels : int { codes, squares, table };

// A FocusSpec as the kernel computes it, per row with Σ = 1 where `row`. With b1 = 0 (`direct`) a code is a
// multiple of t = e^(1/power), which is what the exponential then makes, and no root is taken:
// t·gain·Σ^(−1/power). Otherwise it is the root of t·gain/Σ + shift with t = e, clamped.
struct FocusLaw {
  float exponent;  // scores are times this: log2 e, over the power if direct
  float mass;      // e = t^mass: the power if direct, else 1
  float gain, shift;
  int law;        // power: 1, 2, or 0 for any other
  float inverse;  // 1/power
  float top;      // the largest code
  float high;     // top^power as far as it goes inside the root: of laws 1 and 2
  bool direct;
  bool cut;  // direct codes may exceed top
  bool row, renormalize;
  Levels decode;
  float level_gain;       // of squares
  const uint8_t* levels;  // of the table
  int count;
  float step, offset;
  VITQ_HOST_DEVICE bool total() const { return !(row && renormalize); }  // Σ e is asked for
};

struct AttentionParams {
  vitq::Codes q, k, v;
  Scales q_scale, k_scale, v_scale;
  Additive bias, mask;
  int mask_groups;
  RowMap scatter;
  int heads, nq, nk, d;
  bool aligned;  // d, strides and addresses of codes are multiples of 16
  float factor;  // softmax scale·exponent
  FocusLaw focus;
  void* out;  // [rows, heads·d]
  DType dtype;
  VITQ_HOST_DEVICE bool additive() const { return bias.x || mask.x; }
};

// kWidth: bytes of d, padded. kChunks: of 32 keys, in registers at a time; all of a row's if kWhole. kOffset:
// the focus decodes to an offset, which asks for Σ V' over the keys that count.
template <int kWidth, int kChunks, bool kWhole, bool kOffset>
struct QAttention {
  using Params = AttentionParams;

  // What registers allow without spills, of which nvcc takes a few more on sm_90a.
  static constexpr int blocks_per_sm() {
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 900
    constexpr bool kMore = true;
#else
    constexpr bool kMore = kOffset;
#endif
    if (!kWhole) return std::max(2, (kMore ? 4 : 5) - kWidth / 32);
    if (kChunks > 2) return kWidth == 64 && !kMore ? 3 : 2;
    return kOffset ? 6 - kWidth / 32 : kWidth > 96 ? 4 : 5;
  }

  static constexpr int kWarps = 4, kThreads = kWarps * kWarp, kRows = kWarps * 16;
  static constexpr int kKeys = 32 * kChunks;  // at a time
  static constexpr int kBlocksPerSm = blocks_per_sm();
  static constexpr int kSlab = kWidth % 64 == 0 ? 64 : 32, kSlabs = kWidth / kSlab;
  static constexpr int kPieces = kWidth / 16, kSlabPieces = kSlab / 16;
  static constexpr int kShare = kSlab / 4;  // bytes
  static constexpr int kTiles = kWidth / 8;
  static constexpr int kTile = kKeys * kWidth, kStages = kWhole ? 1 : 2;
  static constexpr int kTable = kStages * 2 * kTile;
  // Additive terms of a warp's rows and 64 keys. 8 lanes read 16 bytes of two rows each: in different banks.
  static constexpr int kTermKeys = kKeys < 64 ? kKeys : 64, kTermRow = kTermKeys + 4;
  static constexpr int kTerms = kTable + 256;
  static constexpr int kShared = kTerms, kSharedAdditive = kTerms + kRows * kTermRow * 4;
  static_assert(kWidth % 32 == 0 && kKeys % kTermKeys == 0);

  using Piece = std::conditional_t<kSlab == 64, Words4, Words2>;  // of a row's slab, a lane's share
  using Scores = float[kChunks][4][4];
  using Sums = int[kTiles][4];

  // Of 32 keys, the one at column n of product tile j.
  static constexpr VITQ_HOST_DEVICE int key_of(int j, int n) { return 8 * (n / 2) + 2 * j + n % 2; }

  // Where 16 bytes `piece` of a slab of row `key` lie, within the slab.
  static constexpr VITQ_HOST_DEVICE int place(int key, int piece) {
    const int turn = key / 8 % 4;
    return kSlab == 64 ? key * 64 + (piece ^ turn) * 16 : (key ^ turn % 2 * 2) * 32 + (piece ^ turn / 2) * 16;
  }

  // 8 rows of a transposed load lie in 8 different sixteenths of the banks' 128 bytes.
  static constexpr bool transposed_loads_are_apart() {
    for (int j = 0; j < 4; ++j) {
      for (int piece = 0; piece < kSlabPieces; ++piece) {
        int seen = 0;
        for (int n = 0; n < 8; ++n) seen |= 1 << place(key_of(j, n), piece) / 16 % 8;
        if (seen != 255) return false;
      }
    }
    return true;
  }
  // So do the shares of the lanes that are served at once (8 of 16 bytes, 16 of 8) of K's rows.
  static constexpr bool key_loads_are_apart() {
    constexpr int kAtOnce = 128 / kShare;
    for (int j = 0; j < 4; ++j) {
      for (int first = 0; first < 32; first += kAtOnce) {
        int seen = 0;
        for (int lane = first; lane < first + kAtOnce; ++lane) {
          const int byte = lane % 4 * kShare, at = place(key_of(j, lane / 4), byte / 16) + byte % 16;
          seen |= 1 << at % 128 / kShare;
        }
        if (seen != (1 << kAtOnce) - 1) return false;
      }
    }
    return true;
  }

  static VITQ_DEVICE void run(const Params& p) {
    static_assert(transposed_loads_are_apart() && key_loads_are_apart());
    Warp w(p);
    const bool idle = w.first >= p.nq;  // past the last query: helps to copy
    for (int i = thread(); i < 256; i += kThreads) {
      shared()[kTable + i] = i < p.focus.count ? static_cast<char>(p.focus.levels[i]) : 0;
    }
    if constexpr (kWhole) {
      copy(p, p.k, w, 0, shared());
      commit_copies();
      copy(p, p.v, w, 0, shared() + kTile);
      commit_copies();
      w.load(p);
      wait_copies<1>();
      sync();
      Scores s;
      if (!idle) {
        score(p, w, 0, shared(), s);
        each(s, p.nk, [&](float& v, int half, int) { w.top[half] = max_or_nan(w.top[half], v); });
        w.share_top();
        if (p.focus.total()) {
          exponentials<true>(p, w, s, p.nk);
          w.share_total();
        } else {
          exponentials<false>(p, w, s, p.nk);
        }
      }
      wait_copies<0>();
      sync();
      if (p.v_scale.per_token()) align_values(p, w, 0, shared() + kTile, w.value_scale(p));
      if (idle) return;
      weigh(p, w, s, p.nk, shared() + kTile);
      finish(p, w, w.value_scale(p));
    } else {
      const int steps = (p.nk + kKeys - 1) / kKeys;
      const auto start_copies = [&](int u) {
        char* stage = shared() + u % 2 * 2 * kTile;
        copy(p, p.k, w, u % steps * kKeys, stage);
        if (u >= steps) copy(p, p.v, w, u % steps * kKeys, stage + kTile);
        commit_copies();
      };
      start_copies(0);
      w.load(p);
      const float largest = w.value_scale(p);
      VITQ_UNROLL_ONCE
      for (int u = 0; u < 2 * steps; ++u) {
        wait_copies<0>();
        sync();
        // Into the stage that all have read in the step before.
        if (u + 1 < 2 * steps) start_copies(u + 1);
        char* stage = shared() + u % 2 * 2 * kTile;
        const int first = u % steps * kKeys;
        if (u >= steps && p.v_scale.per_token()) align_values(p, w, first, stage + kTile, largest);
        if (idle) continue;
        Scores s;
        score(p, w, first, stage, s);
        if (u < steps) {
          observe(p, w, s, p.nk - first);
          if (u == steps - 1) w.share(p);
        } else {
          exponentials<false>(p, w, s, p.nk - first);
          weigh(p, w, s, p.nk - first, stage + kTile);
        }
      }
      if (!idle) finish(p, w, largest);
    }
  }

 private:
  static constexpr int kMagic = 0x4B400000;  // the bits of 1.5·2^23
  static constexpr float kMagicFloat = 12582912.0f, kTiny = 1.17549435e-38f;

  // Not 0, whose product with the −∞ of a key past the end would be NaN.
  static VITQ_DEVICE float positive(float scale) { return max_or_nan(scale, kTiny); }

  // ---- a warp's rows
  // ------------------------------------------------------------------------------------------

  struct Warp {
    int64_t b;
    int h, first;  // head and first query
    Piece query[kSlabs][2];
    float factor[2];        // of a product, in units of the exponent
    float top[2];           // largest score (of this lane until shared)
    float total[2];         // Σ e above it, likewise
    Sums sums, valid_sums;  // levels·V', Σ V' of keys that count
    int level_sum[4], valid_count[4];

    explicit VITQ_DEVICE Warp(const Params& p) {
      // Tiles of one head follow one another: they share its K and V in the cache.
      const int tiles = (p.nq + kRows - 1) / kRows, head = block() / tiles;
      b = head / p.heads;
      h = head % p.heads;
      first = block() % tiles * kRows + warp() * 16;
      VITQ_UNROLL
      for (int e = 0; e < 4; ++e) {
        VITQ_UNROLL
        for (int j = 0; j < kTiles; ++j) sums[j][e] = valid_sums[j][e] = 0;
        level_sum[e] = valid_count[e] = 0;
      }
    }

    VITQ_DEVICE int query_of(int half) const { return first + lane() / 4 + 8 * half; }

    VITQ_DEVICE void load(const Params& p) {
      VITQ_UNROLL
      for (int half = 0; half < 2; ++half) {
        // Queries past the end repeat the last one: what comes of them is not stored.
        const int i = query_of(half) < p.nq ? query_of(half) : p.nq - 1;
        const int8_t* row = p.q.row(b, h, i);
        VITQ_UNROLL
        for (int slab = 0; slab < kSlabs; ++slab) {
          query[slab][half] = read<Piece>(p, row, slab * kSlab + lane() % 4 * kShare, p.d);
        }
        float f = p.q_scale.at(b, h, i) * p.factor;
        if (!p.k_scale.per_token()) f *= p.k_scale.at(b, h, 0);
        factor[half] = positive(f);
        top[half] = -INFINITY;
        total[half] = 0.0f;
      }
    }

    // The head's largest value scale, NaN if there is a NaN.
    VITQ_DEVICE float value_scale(const Params& p) const {
      float most = p.v_scale.at(b, h, 0);
      if (!p.v_scale.per_token()) return most;
      for (int j = lane(); j < p.nk; j += kWarp) most = max_or_nan(most, p.v_scale.at(b, h, j));
      for (int step = 1; step < kWarp; step *= 2) most = max_or_nan(most, shuffle_xor(most, step));
      return most < INFINITY ? most : NAN;
    }

    // Of a difference of scores, to make it one of exponents.
    VITQ_DEVICE float gain(const Params& p, int half) const { return p.additive() ? 1.0f : factor[half]; }

    // What is subtracted along a row: its maximum, 0 for a row without keys.
    VITQ_DEVICE float base(int half) const { return top[half] == -INFINITY ? 0.0f : top[half]; }

    VITQ_DEVICE void share_top() {
      VITQ_UNROLL
      for (int half = 0; half < 2; ++half) {
        top[half] = max_or_nan(top[half], shuffle_xor(top[half], 1));
        top[half] = max_or_nan(top[half], shuffle_xor(top[half], 2));
      }
    }
    VITQ_DEVICE void share_total() {
      VITQ_UNROLL
      for (int half = 0; half < 2; ++half) {
        total[half] += shuffle_xor(total[half], 1);
        total[half] += shuffle_xor(total[half], 2);
      }
    }
    VITQ_DEVICE void share(const Params& p) {
      const float own[2] = {top[0], top[1]};
      share_top();
      rebase(p, own);
      share_total();
    }
    // Totals above `before` to such above `top`.
    VITQ_DEVICE void rebase(const Params& p, const float (&before)[2]) {
      VITQ_UNROLL
      for (int half = 0; half < 2; ++half) {
        total[half] *= fast_exp2((before[half] - base(half)) * gain(p, half) * p.focus.mass);
      }
    }
  };

  // ---- codes into shared memory and registers
  // ------------------------------------------------------------

  // As many bytes of a row of `length` as a T has, from byte `at`; 0 past its end.
  template <class T>
  static VITQ_DEVICE T read(const Params& p, const int8_t* row, int at, int length) {
    T out{};
    if (p.aligned) {
      if (at < length) out = *reinterpret_cast<const T*>(row + at);
    } else {
      VITQ_UNROLL
      for (int i = 0; i < static_cast<int>(sizeof(T)); ++i) {
        const uint32_t byte = at + i < length ? static_cast<uint8_t>(row[at + i]) : 0;
        out.w[i / 4] |= byte << i % 4 * 8;
      }
    }
    return out;
  }

  // Keys first .. first + kKeys of K or V, with zeros up to a multiple of 32 keys and to kWidth.
  static VITQ_DEVICE void copy(const Params& p, const vitq::Codes& x, const Warp& w, int first, char* to) {
    const int left = p.nk - first, keys = left < kKeys ? (left + 31) / 32 * 32 : kKeys;
    const int8_t* from = x.row(w.b, w.h, first);
    for (int i = thread(); i < keys * kSlabPieces; i += kThreads) {
      const int key = i / kSlabPieces, piece = i % kSlabPieces;
      const int length = key < left ? p.d : 0;
      const int8_t* row = from + (key < left ? key * x.n : 0);
      VITQ_UNROLL
      for (int slab = 0; slab < kSlabs; ++slab) {
        char* out = to + slab * kKeys * kSlab + place(key, piece);
        const int at = slab * kSlab + piece * 16;
        if (p.aligned) {
          copy_async(out, at < length ? row + at : row, at < length ? 16 : 0);
        } else {
          *reinterpret_cast<Words4*>(out) = read<Words4>(p, row, at, length);
        }
      }
    }
  }

  // V' = rne(V·s_v/S) in place of V, for all.
  static VITQ_DEVICE void align_values(const Params& p, const Warp& w, int first, char* values,
                                       float largest) {
    const int left = p.nk - first, keys = left < kKeys ? left : kKeys;
    for (int i = thread(); i < keys * kPieces; i += kThreads) {
      const int key = i / kPieces, piece = i % kPieces;
      const float scale = p.v_scale.at(w.b, w.h, first + key) / largest;
      const float ratio = scale == scale ? scale : 0.0f;
      auto* codes = reinterpret_cast<Words4*>(values + piece / kSlabPieces * kKeys * kSlab +
                                              place(key, piece % kSlabPieces));
      Words4 x = *codes;
      VITQ_UNROLL
      for (int word = 0; word < 4; ++word) {
        const uint32_t shifted = x.w[word] ^ 0x80808080u;
        float y[4];
        VITQ_UNROLL
        for (int e = 0; e < 4; ++e) {
          // The bits of 2^23 + (code + 128).
          const float code = float_of_bits(permute(shifted, 0x4B000000u, 0x7440u + e)) - 8388736.0f;
          y[e] = code * ratio + kMagicFloat;
        }
        x.w[word] = packed(bits_of(y[0]), bits_of(y[1]), bits_of(y[2]), bits_of(y[3]));
      }
      *codes = x;
    }
    sync();
  }

  // The low bytes of four words.
  static VITQ_DEVICE uint32_t packed(uint32_t a, uint32_t b, uint32_t c, uint32_t d) {
    return permute(permute(a, b, 0x0040u), permute(c, d, 0x0040u), 0x5410u);
  }

  // ---- scores
  // -------------------------------------------------------------------------------------------------

  // f(score, half, key) for all of this lane's scores, of which those of 32 keys past the `count`-th are left
  // out.
  template <class F>
  static VITQ_DEVICE void each(Scores& s, int count, const F& f) {
    VITQ_UNROLL
    for (int chunk = 0; chunk < kChunks; ++chunk) {
      if (chunk * 32 >= count) continue;
      VITQ_UNROLL
      for (int j = 0; j < 4; ++j) {
        VITQ_UNROLL
        for (int e = 0; e < 4; ++e) {
          f(s[chunk][j][e], e / 2, 32 * chunk + key_of(j, lane() % 4 * 2 + e % 2));
        }
      }
    }
  }

  // Scores of the keys from `first` on in units of the exponent of 2, −∞ past the last one. Without additive
  // terms they lack the row's factor and may be shifted by 1.5·2^23: differences to the row's maximum are
  // those of exact numbers, and multiplied then.
  static VITQ_DEVICE void score(const Params& p, const Warp& w, int first, const char* keys, Scores& s) {
    const int count = p.nk - first;
    multiply_keys(w, keys, count, s);
    const bool per_key = p.k_scale.per_token();
    if (per_key) {
      each(s, count, [&](float& v, int, int key) {
        v = (v - kMagicFloat) * positive(key < count ? p.k_scale.at(w.b, w.h, first + key) : 0.0f);
      });
    }
    if (!p.additive()) return;
    each(s, count, [&](float& v, int half, int) { v = (per_key ? v : v - kMagicFloat) * w.factor[half]; });
    VITQ_UNROLL
    for (int slice = 0; slice < kKeys / kTermKeys; ++slice) {
      if (slice * kTermKeys < count) add_terms(p, w, first + slice * kTermKeys, &s[slice * kTermKeys / 32]);
    }
  }

  static VITQ_DEVICE void multiply_keys(const Warp& w, const char* keys, int count, Scores& s) {
    const int group = lane() / 4, byte = lane() % 4 * kShare;
    const int at = place(key_of(0, group), byte / 16) + byte % 16;
    VITQ_UNROLL
    for (int chunk = 0; chunk < kChunks; ++chunk) {
      if (chunk * 32 >= count) continue;
      VITQ_UNROLL
      for (int j = 0; j < 4; ++j) {
        int acc[4] = {kMagic, kMagic, kMagic, kMagic};
        VITQ_UNROLL
        for (int slab = 0; slab < kSlabs; ++slab) {
          const Piece k = *reinterpret_cast<const Piece*>(keys + (slab * kKeys + chunk * 32) * kSlab +
                                                          (at ^ 2 * j * kSlab));
          const Piece &low = w.query[slab][0], &high = w.query[slab][1];
          VITQ_UNROLL
          for (int i = 0; i < kSlab / 32; ++i) {
            const uint32_t a[4] = {low.w[2 * i], high.w[2 * i], low.w[2 * i + 1], high.w[2 * i + 1]};
            mma_s8(acc, a, k.w[2 * i], k.w[2 * i + 1]);
          }
        }
        VITQ_UNROLL
        for (int e = 0; e < 4; ++e) s[chunk][j][e] = float_of_bits(static_cast<uint32_t>(acc[e]));
      }
    }
    if (count % 32 == 0 || count > kKeys) return;
    each(s, count, [&](float& v, int, int key) {
      if (key >= count) v = -INFINITY;
    });
  }

  // s += (bias + mask)·exponent for 64 keys. Read as fragments lie, 32 lanes would take 32 sectors of memory
  // at a time; a row after the other they go through shared memory.
  static VITQ_DEVICE void add_terms(const Params& p, const Warp& w, int first, float (*s)[4][4]) {
    float* terms = reinterpret_cast<float*>(shared() + kTerms) + warp() * 16 * kTermRow;
    if (p.bias.x) stage_terms(p, w, p.bias, w.h, first, terms, false);
    if (p.mask.x) stage_terms(p, w, p.mask, w.b % p.mask_groups, first, terms, static_cast<bool>(p.bias.x));
    sync_warp();
    VITQ_UNROLL
    for (int half = 0; half < 2; ++half) {
      VITQ_UNROLL
      for (int four = 0; four < kTermKeys / 16; ++four) {
        const int chunk = four / 2, j = four % 2 * 2;
        const Floats4 t = *reinterpret_cast<const Floats4*>(terms + (lane() / 4 + 8 * half) * kTermRow +
                                                            32 * chunk + key_of(j, lane() % 4 * 2));
        VITQ_UNROLL
        for (int e = 0; e < 4; ++e) {
          float& v = s[chunk][j + e / 2][2 * half + e % 2];
          v = fmaf(t.v[e], p.focus.exponent, v);
        }
      }
    }
    sync_warp();
  }

  static VITQ_DEVICE void stage_terms(const Params& p, const Warp& w, const Additive& x, int64_t outer,
                                      int first, float* terms, bool add) {
    const AnyFloat rows = x.x.at(outer * x.outer + first);
    if (rows.dtype == DType::f32) return stage_terms_of<DType::f32>(p, w, rows, x.row, first, terms, add);
    if (rows.dtype == DType::f16) return stage_terms_of<DType::f16>(p, w, rows, x.row, first, terms, add);
    stage_terms_of<DType::bf16>(p, w, rows, x.row, first, terms, add);
  }
  template <DType kType>
  static VITQ_DEVICE void stage_terms_of(const Params& p, const Warp& w, AnyFloat rows, int64_t stride,
                                         int first, float* terms, bool add) {
    constexpr int kAtOnce = 4;  // rows whose loads are in flight together
    VITQ_UNROLL_ONCE
    for (int row = 0; row < 16; row += kAtOnce) {
      VITQ_UNROLL
      for (int i = 0; i < kAtOnce * kTermKeys / kWarp; ++i) {
        const int r = row + i * kWarp / kTermKeys, query = w.first + r;
        const int key = i * kWarp % kTermKeys + lane();
        const bool inside = query < p.nq && first + key < p.nk;
        const float term = inside ? gpu::load({rows.data, kType}, query * stride + key) : 0.0f;
        float* to = terms + r * kTermRow + key;
        *to = add ? *to + term : term;
      }
    }
  }

  // ---- probabilities
  // ------------------------------------------------------------------------------------------

  // Of the focus; only uniform ones decode to an offset.
  static VITQ_DEVICE bool direct(const Params& p) { return !kOffset && p.focus.direct; }
  static VITQ_DEVICE int law(const Params& p) { return kOffset ? 1 : p.focus.law; }
  static VITQ_DEVICE Levels decode(const Params& p) { return kOffset ? Levels::codes : p.focus.decode; }

  // This lane's maximum and total over one more step.
  static VITQ_DEVICE void observe(const Params& p, Warp& w, Scores& s, int count) {
    const float before[2] = {w.top[0], w.top[1]};
    each(s, count, [&](float& v, int half, int) { w.top[half] = max_or_nan(w.top[half], v); });
    if (!p.focus.total()) return;
    w.rebase(p, before);
    exponentials<true>(p, w, s, count);
  }

  // t in place of the scores, and Σ e if kTotal.
  template <bool kTotal>
  static VITQ_DEVICE void exponentials(const Params& p, Warp& w, Scores& s, int count) {
    if (!direct(p)) return exponentials<kTotal ? 1 : -1, true>(p, w, s, count);
    if constexpr (kTotal) {
      if (law(p) == 1) return exponentials<1, false>(p, w, s, count);
      if (law(p) == 2) return exponentials<2, false>(p, w, s, count);
      exponentials<0, false>(p, w, s, count);
    } else {
      exponentials<-1, false>(p, w, s, count);
    }
  }
  // e is t to the kMass-th, 0: to any other, −1: not asked for. kMark: keys that do not count have a t of −0.
  template <int kMass, bool kMark>
  static VITQ_DEVICE void exponentials(const Params& p, Warp& w, Scores& s, int count) {
    const float base[2] = {w.base(0), w.base(1)}, gain[2] = {w.gain(p, 0), w.gain(p, 1)};
    each(s, count, [&](float& v, int half, int) {
      const float x = (v - base[half]) * gain[half], t = fast_exp2(x);
      if constexpr (kMass == 0) w.total[half] += fast_exp2(x * p.focus.mass);
      if constexpr (kMass == 1) w.total[half] += t;
      if constexpr (kMass == 2) w.total[half] = fmaf(t, t, w.total[half]);
      v = kMark && v == -INFINITY ? -0.0f : t;
    });
  }

  // Codes in place of t, in the low bytes of floats around 1.5·2^23; the sign of a t that is marked stays.
  static VITQ_DEVICE void place_codes(const Params& p, const Warp& w, Scores& s, int count) {
    const FocusLaw& f = p.focus;
    float gain[2];
    VITQ_UNROLL
    for (int half = 0; half < 2; ++half) {
      const float total = w.total[half];
      gain[half] = f.row                       ? f.gain
                   : !direct(p) || law(p) == 1 ? f.gain / total
                   : law(p) == 2               ? f.gain / sqrtf(total)
                                               : f.gain * fast_exp2(-fast_log2(total) * f.inverse);
    }
    if (!direct(p)) {
      if (law(p) == 1) return place_clamped<1>(f, gain, s, count);
      if (law(p) == 2) return place_clamped<2>(f, gain, s, count);
      return place_clamped<0>(f, gain, s, count);
    }
    // t <= 1, of which no rounding makes top + 1/2: without b2 nothing is cut off.
    if (f.cut) {
      const float top = kMagicFloat + f.top;
      each(s, count, [&](float& v, int half, int) { v = fminf(fmaf(v, gain[half], kMagicFloat), top); });
    } else {
      each(s, count, [&](float& v, int half, int) { v = fmaf(v, gain[half], kMagicFloat); });
    }
  }
  template <int kLaw>
  static VITQ_DEVICE void place_clamped(const FocusLaw& f, const float (&gain)[2], Scores& s, int count) {
    each(s, count, [&](float& v, int half, int) {
      float y = clamp(fmaf(v, gain[half], f.shift), 0.0f, f.high);
      if constexpr (kLaw == 2) y = fast_sqrt(y);
      if constexpr (kLaw == 0) {
        const float root = fast_exp2(fminf(fast_log2(fmaxf(y, kTiny)) * f.inverse, 0.0f));
        y = y < kTiny ? 0.0f : root * f.top;
      }
      v = float_of_bits(bits_of(y + kMagicFloat) | (bits_of(v) & 0x80000000u));
    });
  }

  // ---- the second product
  // ------------------------------------------------------------------------------------

  // One byte f(score) for every score of 32 keys, as a fragment of operand A.
  template <class F>
  static VITQ_DEVICE void pack(const float (&s)[4][4], uint32_t (&out)[4], const F& f) {
    VITQ_UNROLL
    for (int r = 0; r < 4; ++r) {
      const auto &low = s[r / 2 * 2], &high = s[r / 2 * 2 + 1];
      const int e = r % 2 * 2;
      out[r] = packed(f(low[e]), f(low[e + 1]), f(high[e]), f(high[e + 1]));
    }
  }

  using Bytes = uint32_t[kChunks][4];
  template <class F>
  static VITQ_DEVICE void pack_all(const Scores& s, int count, Bytes& out, const F& f) {
    VITQ_UNROLL
    for (int chunk = 0; chunk < kChunks; ++chunk) {
      if (chunk * 32 < count) pack(s[chunk], out[chunk], f);
    }
  }

  static VITQ_DEVICE void pack_levels(const Params& p, const Scores& s, int count, Bytes& out) {
    if (decode(p) == Levels::codes) return pack_all(s, count, out, [](float v) { return bits_of(v); });
    if (decode(p) == Levels::squares) {
      return pack_all(s, count, out, [&](float v) {
        const float code = v - kMagicFloat;
        return bits_of(fmaf(code * p.focus.level_gain, code, kMagicFloat));
      });
    }
    pack_all(s, count, out, [&](float v) -> uint32_t {
      const uint32_t code = bits_of(v);
      return code >> 31 ? 0 : static_cast<uint8_t>(shared()[kTable + (code & 255)]);
    });
  }

  static VITQ_DEVICE void weigh(const Params& p, Warp& w, Scores& s, int count, const char* values) {
    place_codes(p, w, s, count);
    if constexpr (kOffset) {
      multiply_values(p, count, values, w.valid_sums, w.valid_count, [&](int chunk, uint32_t (&a)[4]) {
        pack(s[chunk], a, [](float v) { return bits_of(v) >> 31 ^ 1u; });
      });
    }
    // All of them first: scores leave their registers before sums need some.
    Bytes levels;
    pack_levels(p, s, count, levels);
    multiply_values(p, count, values, w.sums, w.level_sum, [&](int chunk, uint32_t (&a)[4]) {
      VITQ_UNROLL
      for (int r = 0; r < 4; ++r) a[r] = levels[chunk][r];
    });
  }

  // sums += P·V', row_sum += Σ P, where load(chunk, a) are P's fragments.
  template <class Load>
  static VITQ_DEVICE void multiply_values(const Params& p, int count, const char* values, Sums& sums,
                                          int (&row_sum)[4], const Load& load) {
    const int at = place(key_of(lane() / 8, lane() % 8), 0);
    VITQ_UNROLL
    for (int chunk = 0; chunk < kChunks; ++chunk) {
      if (chunk * 32 >= count) continue;
      uint32_t a[4];
      load(chunk, a);
      if (p.focus.renormalize) mma_u8s8(row_sum, a, 0x01010101u, 0x01010101u);
      VITQ_UNROLL
      for (int piece = 0; piece < kPieces; ++piece) {
        uint32_t v[4];
        load_transposed(
            v, values + (piece / kSlabPieces * kKeys + chunk * 32) * kSlab + (at ^ piece % kSlabPieces * 16));
        mma_u8s8(sums[2 * piece], a, permute(v[0], v[1], 0x6420u), permute(v[2], v[3], 0x6420u));
        mma_u8s8(sums[2 * piece + 1], a, permute(v[0], v[1], 0x7531u), permute(v[2], v[3], 0x7531u));
      }
    }
  }

  // ---- the result
  // --------------------------------------------------------------------------------------------

  static VITQ_DEVICE void finish(const Params& p, const Warp& w, float largest) {
    const FocusLaw& f = p.focus;
    VITQ_UNROLL
    for (int half = 0; half < 2; ++half) {
      const int i = w.query_of(half);
      const int64_t row = i < p.nq ? p.scatter.token_row(w.b * p.nq + i) : -1;
      if (row < 0) continue;
      float denominator = f.row ? w.total[half] : 1.0f;
      if (f.renormalize) {
        denominator = static_cast<float>(w.level_sum[2 * half]) * f.step;
        if constexpr (kOffset) denominator += static_cast<float>(w.valid_count[2 * half]) * f.offset;
      }
      float back = denominator == 0.0f ? 0.0f : largest / denominator;
      // A score of +∞ makes NaN, too: ∞ − ∞.
      if (!(w.top[half] < INFINITY && w.factor[half] < INFINITY)) back = NAN;
      const bool empty = w.top[half] == -INFINITY;
      VITQ_UNROLL
      for (int piece = 0; piece < kPieces; ++piece) {
        Floats4 y;
        VITQ_UNROLL
        for (int e = 0; e < 4; ++e) {
          const int tile = 2 * piece + e % 2, at = 2 * half + e / 2;
          float v = static_cast<float>(w.sums[tile][at]) * f.step;
          if constexpr (kOffset) v += static_cast<float>(w.valid_sums[tile][at]) * f.offset;
          y.v[e] = empty ? 0.0f : v * back;
        }
        write(p, row * p.heads + w.h, 16 * piece + 4 * (lane() % 4), y);
      }
    }
  }

  // Four of the d columns of a row's head, from `column` on.
  static VITQ_DEVICE void write(const Params& p, int64_t head, int column, const Floats4& y) {
    const int64_t at = head * p.d + column;
    if (p.d % 4 != 0) {
      VITQ_UNROLL
      for (int e = 0; e < 4; ++e) {
        if (column + e < p.d) store(p.out, p.dtype, at + e, y.v[e]);
      }
    } else if (column < p.d && p.dtype == DType::f32) {
      *reinterpret_cast<Floats4*>(static_cast<float*>(p.out) + at) = y;
    } else if (column < p.d) {
      const bool f16 = p.dtype == DType::f16;
      *reinterpret_cast<Words2*>(static_cast<uint16_t*>(p.out) + at) = {
          f16 ? pack_16<DType::f16>(y.v[0], y.v[1]) : pack_16<DType::bf16>(y.v[0], y.v[1]),
          f16 ? pack_16<DType::f16>(y.v[2], y.v[3]) : pack_16<DType::bf16>(y.v[2], y.v[3])};
    }
  }
};

}  // namespace vitq::gpu
