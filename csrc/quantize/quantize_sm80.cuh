// Rows of floats to codes, with LayerNorm before and a low-rank branch beside, for GPUs from sm_80 on.
//
// A block quantizes 16 rows, the height of a matrix instruction, so that the branch's two products
// (t = x·Dᵀ, x − t·D) are matrix instructions on the very registers that hold x: there is no tile of x in
// shared memory. A warp takes strips of 64 columns, and lane 4g + c of it rows g and g + 8 of columns
// 16c .. 16c + 15 of a strip. Those are, in v[strip][j][2h + e], row g + 8h, column 16c + 8e + j:
//
//   loads, codes    32 bytes of a 16-bit row and 16 bytes of its codes are consecutive in a lane, 128 and 64
//                   in the four lanes of a row
//   t = x·Dᵀ        x is operand A. The order of k inside a product is ours to choose as long as D is read in
//                   the same: lane c holds 4 consecutive k of each 16, hence reads 16 bytes of a row of D for
//                   two instructions
//   x − t·D         v is the accumulator: eight instructions j = 0..7 whose column n is column 8n + j of the
//                   strip, hence lane g reads 16 bytes of each of 4 rows of D for all eight
//
// Rows meet across warps in shared memory: sums of LayerNorm, partial sums of t, the largest magnitude of
// each group (by integer maxima: the bits of magnitudes order as they do, NaN above infinity).
//
// kWhole: the block's registers hold its rows; x is read once. Longer rows are read anew by each pass (mean,
// variance, t, the rest of the branch's ranks, scale, codes), from the second on from a cache: 16 rows of
// K = 4096 take 128 KB. kAligned: rows start at multiples of 16 bytes, and K and group widths are multiples
// of 16, so that a lane's columns are all there or not, and in one group.
//
// Roofline, M = 6304, K = 768, bfloat16, R = 32: 9.7 MB in, 4.8 + 0.8 MB out, 3.6 µs at 4.3 TB/s; D comes 394
// times from the second-level cache, 19 MB (twice that for `subspace`), beside it; 0.3 G operations. What
// limits it is how long one block takes, since all of them run at the same time: a load of x, two barriers of
// LayerNorm, a load of D and two barriers of t, two of the scale, a store.
#pragma once

#include "common/row_map.h"
#include "quantize/codes.cuh"

namespace vitq::gpu {

enum class Branch { none, f32, f16, bf16 };

struct QuantizeParams {
  AnyFloat x;  // row r from element (r / inner)·outer_stride + (r % inner)·row_stride; inner 0: r·row_stride
  int inner;
  int64_t outer_stride, row_stride;
  RowMap gather;  // row i of the result comes from row gather.token_row(i) of x, or is 0
  bool norm;
  AnyFloat weight, bias;  // [K] or absent
  float eps;
  int m, k;
  Codes codes;
  AnyFloat lora_down;  // [rank, K]
  int rank;
  bool subspace;  // quantize x − t·D
  float* t;       // out [M, rank]
};

template <Branch kBranch, int kWarps, int kStrips, bool kWhole, bool kAligned>
struct Quantize {
  using Params = QuantizeParams;
  static constexpr int kThreads = kWarp * kWarps, kBlocksPerSm = kStrips > 2 ? 1 : 2;
  static constexpr int kRows = 16, kStrip = 64, kColumns = kStrip * kWarps * kStrips;

  // What shared memory holds, in words: largest magnitudes, later scales, of as many groups; sums; t of as
  // many ranks at a time by each warp, 8 rows of which lie in different banks; where rows are whole, γ and β
  // as float32 and as they are.
  static constexpr bool kStaged = kWhole && kAligned;
  static constexpr int kSharedGroups = 64;
  static constexpr int kRanks = kWarps > 8 ? 16 : 32, kRanksRow = kRanks + 8;
  static constexpr int kSums = kRows * kSharedGroups, kPartial = kSums + 3 * kWarps * kRows;
  static constexpr int kAffine = kPartial + (kBranch == Branch::none ? 0 : kWarps * kRows * kRanksRow);

  static int shared_bytes(const Params& p) {
    const int64_t affine =
        (p.weight ? size_of(p.weight.dtype) : 0) + (p.bias ? size_of(p.bias.dtype) : 0) + 2 * 4;
    return kAffine * 4 + static_cast<int>(kStaged && p.norm ? p.k * affine : 0);
  }

  static VITQ_DEVICE void run(const Params& p) { Quantize(p).quantize(); }

 private:
  static constexpr bool k16Bits = kBranch == Branch::f16 || kBranch == Branch::bf16;
  static constexpr DType kDown = kBranch == Branch::f32   ? DType::f32
                                 : kBranch == Branch::f16 ? DType::f16
                                                          : DType::bf16;

  const Params& p;
  int group, column, warp;
  float* const memory = reinterpret_cast<float*>(shared());
  bool present[2];    // rows that are in x; the others hold 0
  int64_t source[2];  // their first elements
  AnyFloat weight, bias;
  float centre[2], rstd[2], shift[2];  // LayerNorm: (x − centre)·rstd + shift
  float v[kStrips][8][4];

  explicit VITQ_DEVICE Quantize(const Params& params) : p(params), weight(params.weight), bias(params.bias) {
    locate();
    VITQ_UNROLL
    for (int h = 0; h < 2; ++h) {
      const int64_t token = row(h) < p.m ? p.gather.token_row(row(h)) : -1;
      source[h] = token * p.row_stride;
      if (p.inner > 0 && token >= 0) {
        const int at = static_cast<int>(token);
        source[h] = at / p.inner * p.outer_stride + at % p.inner * p.row_stride;
      }
      present[h] = token >= 0;
    }
  }

  // Each stage finds its place anew: kept through all of them, what follows from it would be spilled.
  VITQ_DEVICE void locate() {
    const int self = thread_anew();
    group = self % kWarp / 4;
    column = self % 4 * 16;
    warp = self / kWarp;
  }

  VITQ_DEVICE int row(int h) const { return block() * kRows + group + 8 * h; }
  // First column of a strip of this warp.
  VITQ_DEVICE int strip(int base, int s) const { return base + (s * kWarps + warp) * kStrip; }

  VITQ_DEVICE void quantize() {
    const Codes& c = p.codes;
    const bool dynamic = c.scale == nullptr;
    if (kStaged && p.norm) copy_affine();
    if (kWhole) load(0);
    if (dynamic) clear_tops();
    if (p.norm) layer_norm();
    if constexpr (kBranch != Branch::none) {
      for (int rank = 0; rank < p.rank; rank += kRanks) project(rank);
      if (kWhole && p.subspace) subtract(0);
    }
    locate();
    if (dynamic) {
      sync();
      each(Stage::finished, [&](int base) { raise_tops(base); });
      sync();
      scales_of_tops();
      sync();
      locate();
    }
    each(Stage::finished, [&](int base) { encode(base); });
  }

  // ---- values ------------------------------------------------------------------------------------------

  // What `v` holds: x, the input of the quantizer, or that without its subspace.
  enum class Stage { raw, normalized, finished };

  // visit(first column) with the values at `stage` in `v`; whole rows are there already.
  template <class Visit>
  VITQ_DEVICE void each(Stage stage, const Visit& visit) {
    if constexpr (kWhole) {
      visit(0);
    } else {
      VITQ_UNROLL_ONCE
      for (int base = 0; base < p.k; base += kColumns) {
        load(base);
        if (p.norm && stage >= Stage::normalized) normalize(base);
        if constexpr (kBranch != Branch::none) {
          if (stage == Stage::finished && p.subspace) subtract(base);
        }
        visit(base);
      }
    }
  }

  // 8 elements from `at` of a row that starts there, or zeros from its end, `left` elements on.
  template <DType kType>
  static VITQ_DEVICE void read_8(const void* at, int left, float (&out)[8]) {
    if constexpr (!kAligned) {
      VITQ_UNROLL
      for (int i = 0; i < 8; ++i) out[i] = i < left ? gpu::load({at, kType}, i) : 0.0f;
    } else if constexpr (kType == DType::f32) {
      Floats4 words[2] = {};
      VITQ_UNROLL
      for (int i = 0; i < 2; ++i) {
        if (left > 0) words[i] = static_cast<const Floats4*>(at)[i];
      }
      VITQ_UNROLL
      for (int i = 0; i < 8; ++i) out[i] = words[i / 4].v[i % 4];
    } else {
      const Words4 words = read_words(static_cast<const uint16_t*>(at), left);
      VITQ_UNROLL
      for (int i = 0; i < 8; ++i) out[i] = float_of_16<kType>(words.w[i / 2] >> i % 2 * 16);
    }
  }

  // The same of 16-bit elements, as they are.
  static VITQ_DEVICE Words4 read_words(const uint16_t* at, int left) {
    Words4 out = {};
    if constexpr (kAligned) {
      if (left > 0) out = *reinterpret_cast<const Words4*>(at);
    } else {
      VITQ_UNROLL
      for (int i = 0; i < 8; ++i) out.w[i / 2] |= (i < left ? uint32_t{at[i]} : 0u) << i % 2 * 16;
    }
    return out;
  }

  template <class Body>
  static VITQ_DEVICE void with_type(DType type, const Body& body) {
    if (type == DType::f32) body(Type<DType::f32>());
    if (type == DType::f16) body(Type<DType::f16>());
    if (type == DType::bf16) body(Type<DType::bf16>());
  }
  template <DType kType>
  struct Type {
    static constexpr DType value = kType;
  };

  VITQ_DEVICE void load(int base) {
    // One branch around all loads: they are under way together.
    with_type(p.x.dtype, [&](auto type) {
      VITQ_UNROLL
      for (int s = 0; s < kStrips; ++s) {
        const int first = strip(base, s) + column;
        VITQ_UNROLL
        for (int h = 0; h < 2; ++h) {
          VITQ_UNROLL
          for (int e = 0; e < 2; ++e) {
            float x[8];
            read_8<decltype(type)::value>(p.x.at(source[h] + first + 8 * e).data,
                                          present[h] ? p.k - first - 8 * e : 0, x);
            VITQ_UNROLL
            for (int j = 0; j < 8; ++j) v[s][j][2 * h + e] = x[j];
          }
        }
      }
    });
  }

  // ---- LayerNorm ---------------------------------------------------------------------------------------

  // γ and β on their way into shared memory, as they are: every group of lanes reads all of them.
  VITQ_DEVICE void copy_affine() {
    char* to = reinterpret_cast<char*>(memory + kAffine + 2 * p.k);
    if (weight) to = copy(weight, to);
    if (bias) copy(bias, to);
    commit_copies();
  }
  VITQ_DEVICE char* copy(AnyFloat& vector, char* to) {
    const int bytes = p.k * static_cast<int>(size_of(vector.dtype));
    const char* from = static_cast<const char*>(vector.data);
    for (int i = thread() * 16; i < bytes; i += kThreads * 16) copy_async(to + i, from + i, 16);
    vector.data = to;
    return to + bytes;
  }
  // The same as float32, or what stands for them.
  VITQ_DEVICE void widen_affine() {
    float* to = memory + kAffine;
    VITQ_UNROLL_ONCE
    for (int i = thread(); i < p.k; i += kThreads) {
      to[i] = weight ? gpu::load(weight, i) : 1.0f;
      to[p.k + i] = bias ? gpu::load(bias, i) : 0.0f;
    }
  }

  // visit(h, j) for every value of columns 8e .. 8e + 7 of the lane's part of strip s that there is.
  template <class Visit>
  VITQ_DEVICE void each_value(int base, int s, int e, const Visit& visit) const {
    const int left = p.k - strip(base, s) - column - 8 * e;
    VITQ_UNROLL
    for (int h = 0; h < 2; ++h) {
      if (!present[h] || left <= 0) continue;
      VITQ_UNROLL
      for (int j = 0; j < 8; ++j) {
        if (kAligned || j < left) visit(h, j);
      }
    }
  }

  // Sums over a row's lanes in all warps, in an order of their own: the same whatever runs first.
  template <int kCount>
  VITQ_DEVICE void sum_warps(float* sums, float (&x)[kCount][2]) {
    VITQ_UNROLL
    for (int i = 0; i < kCount; ++i) {
      VITQ_UNROLL
      for (int h = 0; h < 2; ++h) {
        x[i][h] += shuffle_xor(x[i][h], 1);
        x[i][h] += shuffle_xor(x[i][h], 2);
        if (column == 0) sums[(i * kWarps + warp) * kRows + group + 8 * h] = x[i][h];
      }
    }
    sync();
    VITQ_UNROLL
    for (int i = 0; i < kCount; ++i) {
      VITQ_UNROLL
      for (int h = 0; h < 2; ++h) {
        x[i][h] = 0.0f;
        VITQ_UNROLL
        for (int w = 0; w < kWarps; ++w) x[i][h] += sums[(i * kWarps + w) * kRows + group + 8 * h];
      }
    }
  }

  // The first mean only centres; what it is off by, the second one takes out (a mean of small numbers). Sums
  // go four at a time, neither a chain nor a tree that takes many registers.
  VITQ_DEVICE void layer_norm() {
    locate();
    const float count = static_cast<float>(p.k);
    float first[1][2] = {};
    each(Stage::raw, [&](int) {
      VITQ_UNROLL
      for (int h = 0; h < 2; ++h) {
        float sum[4] = {};
        VITQ_UNROLL
        for (int i = 0; i < 16 * kStrips; ++i) sum[i % 4] += v[i / 16][i % 8][2 * h + i / 8 % 2];
        first[0][h] += sum_of(sum);
      }
    });
    if (kStaged) wait_copies<0>();
    sum_warps(memory + kSums, first);
    if (kStaged) widen_affine();  // read behind the next barrier
    VITQ_UNROLL
    for (int h = 0; h < 2; ++h) centre[h] = first[0][h] / count;
    float second[2][2] = {};
    each(Stage::raw, [&](int base) {
      float sum[2][4] = {}, squares[2][4] = {};
      VITQ_UNROLL
      for (int s = 0; s < kStrips; ++s) {
        VITQ_UNROLL
        for (int e = 0; e < 2; ++e) {
          each_value(base, s, e, [&](int h, int j) {
            const float d = v[s][j][2 * h + e] - centre[h];
            sum[h][j % 4] += d;
            squares[h][j % 4] = fmaf(d, d, squares[h][j % 4]);
          });
        }
      }
      VITQ_UNROLL
      for (int h = 0; h < 2; ++h) {
        second[0][h] += sum_of(sum[h]);
        second[1][h] += sum_of(squares[h]);
      }
    });
    sum_warps(memory + kSums + kWarps * kRows, second);
    VITQ_UNROLL
    for (int h = 0; h < 2; ++h) {
      const float mean = second[0][h] / count;
      const float variance = second[1][h] / count - mean * mean;
      rstd[h] = 1.0f / sqrtf((variance > 0.0f ? variance : variance * 0.0f) + p.eps);
      shift[h] = -mean * rstd[h];
    }
    locate();
    if (kWhole) normalize(0);
  }

  static VITQ_DEVICE float sum_of(const float (&x)[4]) { return (x[0] + x[1]) + (x[2] + x[3]); }

  // 8 elements of γ, β or a row of D, or what stands for them.
  VITQ_DEVICE void read_any(const AnyFloat& from, int first, float without, float (&out)[8]) const {
    VITQ_UNROLL
    for (int j = 0; j < 8; ++j) out[j] = without;
    if (!from) return;
    with_type(from.dtype,
              [&](auto type) { read_8<decltype(type)::value>(from.at(first).data, p.k - first, out); });
  }

  VITQ_DEVICE void normalize(int base) {
    VITQ_UNROLL
    for (int s = 0; s < kStrips; ++s) {
      VITQ_UNROLL
      for (int e = 0; e < 2; ++e) {
        const int first = strip(base, s) + column + 8 * e;
        float gamma[8], beta[8];
        if constexpr (kStaged) {
          const float* affine = memory + kAffine + first;
          read_8<DType::f32>(affine, p.k - first, gamma);
          read_8<DType::f32>(affine + p.k, p.k - first, beta);
        } else {
          read_any(weight, first, 1.0f, gamma);
          read_any(bias, first, 0.0f, beta);
        }
        each_value(base, s, e, [&](int h, int j) {
          float& x = v[s][j][2 * h + e];
          x = fmaf(fmaf(x - centre[h], rstd[h], shift[h]), gamma[j], beta[j]);
        });
      }
    }
  }

  // ---- the branch --------------------------------------------------------------------------------------

  // t of ranks from r0 on, at most kRanks: every warp's share, then their sum.
  VITQ_DEVICE void project(int r0) {
    locate();
    float* partial = memory + kPartial;
    float* mine = partial + (warp * kRows + group) * kRanksRow;
    if constexpr (k16Bits) {
      float acc[kRanks / 8][4] = {};
      each(Stage::normalized, [&](int base) { multiply(base, r0, acc); });
      VITQ_UNROLL
      for (int j = 0; j < kRanks / 8; ++j) {
        VITQ_UNROLL
        for (int e = 0; e < 4; ++e) {
          mine[e / 2 * 8 * kRanksRow + 8 * j + column / 8 + e % 2] = acc[j][e];
        }
      }
    } else {
      if (column == 0) {
        for (int r = 0; r < kRanks; ++r) mine[r] = mine[8 * kRanksRow + r] = 0.0f;
      }
      each(Stage::normalized, [&](int base) {
        VITQ_UNROLL_ONCE
        for (int r = 0; r < kRanks && r0 + r < p.rank; ++r) add_dots(base, r0 + r, mine + r);
      });
    }
    sync();
    VITQ_UNROLL_ONCE
    for (int i = thread(); i < kRows * kRanks; i += kThreads) {
      const int local = i / kRanks, r = i % kRanks, m = block() * kRows + local;
      if (m >= p.m || r0 + r >= p.rank) continue;
      float sum = 0.0f;
      VITQ_UNROLL
      for (int w = 0; w < kWarps; ++w) sum += partial[(w * kRows + local) * kRanksRow + r];
      // What is subtracted here and what lora_up multiplies later is one and the same number.
      if constexpr (k16Bits) {
        if (p.subspace) sum = float_of_16<kDown>(pack_branch<kDown>(sum, 0.0f));
      }
      p.t[int64_t{m} * p.rank + r0 + r] = sum;
    }
    sync();
  }

  VITQ_DEVICE void multiply(int base, int r0, float (&acc)[kRanks / 8][4]) {
    const auto* down = static_cast<const uint16_t*>(p.lora_down.data);
    VITQ_UNROLL
    for (int s = 0; s < kStrips; ++s) {
      if (strip(base, s) >= p.k) continue;
      VITQ_UNROLL
      for (int e = 0; e < 2; ++e) {
        uint32_t a[2][4];
        VITQ_UNROLL
        for (int q = 0; q < 2; ++q) {
          VITQ_UNROLL
          for (int i = 0; i < 4; ++i) {
            const int j = 4 * q + i / 2 * 2, at = i % 2 * 2 + e;
            a[q][i] = pack_branch<kDown>(v[s][j][at], v[s][j + 1][at]);
          }
        }
        const int first = strip(base, s) + column + 8 * e;
        VITQ_UNROLL
        for (int j = 0; j < kRanks / 8; ++j) {
          if (r0 + 8 * j >= p.rank) continue;
          // Ranks past the end repeat the last one: their sums are not stored.
          const int r = r0 + 8 * j + group < p.rank ? r0 + 8 * j + group : p.rank - 1;
          const Words4 d = read_words(down + (r * p.k + first), p.k - first);
          VITQ_UNROLL
          for (int q = 0; q < 2; ++q) mma_16<kDown>(acc[j], a[q], d.w[2 * q], d.w[2 * q + 1]);
        }
      }
    }
  }

  // *mine += this warp's share of t of rank r, of both rows.
  VITQ_DEVICE void add_dots(int base, int r, float* mine) {
    float sum[2] = {};
    VITQ_UNROLL
    for (int s = 0; s < kStrips; ++s) {
      VITQ_UNROLL
      for (int e = 0; e < 2; ++e) {
        float d[8];
        read_any(p.lora_down.at(int64_t{r} * p.k), strip(base, s) + column + 8 * e, 0.0f, d);
        VITQ_UNROLL
        for (int j = 0; j < 8; ++j) {
          VITQ_UNROLL
          for (int h = 0; h < 2; ++h) sum[h] += v[s][j][2 * h + e] * d[j];
        }
      }
    }
    VITQ_UNROLL
    for (int h = 0; h < 2; ++h) {
      sum[h] += shuffle_xor(sum[h], 1);
      sum[h] += shuffle_xor(sum[h], 2);
      if (column == 0) mine[8 * h * kRanksRow] += sum[h];
    }
  }

  // v −= t·D.
  VITQ_DEVICE void subtract(int base) {
    // Rows past the end repeat the last one: they are not stored.
    const auto t_of = [&](int h) { return p.t + int64_t{row(h) < p.m ? row(h) : p.m - 1} * p.rank; };
    if constexpr (k16Bits) {
      const auto* down = static_cast<const uint16_t*>(p.lora_down.data);
      VITQ_UNROLL_ONCE
      for (int r0 = 0; r0 < p.rank; r0 += 16) {
        locate();
        const int r = r0 + column / 4;
        uint32_t a[4];
        VITQ_UNROLL
        for (int i = 0; i < 4; ++i) {
          const int at = r + i / 2 * 2;
          const float* from = t_of(i % 2) + at;
          a[i] = pack_16<kDown>(at < p.rank ? -from[0] : 0.0f, at + 1 < p.rank ? -from[1] : 0.0f);
        }
        VITQ_UNROLL
        for (int s = 0; s < kStrips; ++s) {
          if (strip(base, s) >= p.k) continue;
          locate();  // kept from strip to strip, it is a register too many on sm_90a
          const int first = strip(base, s) + 8 * group;
          Words4 d[4];
          VITQ_UNROLL
          for (int i = 0; i < 4; ++i) {
            const int rank = r + i < p.rank ? r + i : p.rank - 1;
            d[i] = read_words(down + (rank * p.k + first), p.k - first);
          }
          VITQ_UNROLL
          for (int j = 0; j < 8; ++j) {
            const uint32_t pair = j % 2 ? 0x7632u : 0x5410u;
            mma_16<kDown>(v[s][j], a, permute(d[0].w[j / 2], d[1].w[j / 2], pair),
                          permute(d[2].w[j / 2], d[3].w[j / 2], pair));
          }
        }
      }
    } else {
      VITQ_UNROLL_ONCE
      for (int r = 0; r < p.rank; ++r) {
        VITQ_UNROLL
        for (int s = 0; s < kStrips; ++s) {
          VITQ_UNROLL
          for (int e = 0; e < 2; ++e) {
            float d[8];
            read_any(p.lora_down.at(int64_t{r} * p.k), strip(base, s) + column + 8 * e, 0.0f, d);
            VITQ_UNROLL
            for (int j = 0; j < 8; ++j) {
              VITQ_UNROLL
              for (int h = 0; h < 2; ++h) v[s][j][2 * h + e] -= t_of(h)[r] * d[j];
            }
          }
        }
      }
    }
  }

  // ---- scales and codes --------------------------------------------------------------------------------

  VITQ_DEVICE bool tops_are_shared() const { return p.codes.groups <= kSharedGroups; }
  // [rows of the block, groups]: the bits of largest magnitudes, then of scales; where there are too many for
  // shared memory, the output itself, which is always addressed as integers then.
  VITQ_DEVICE unsigned* tops() const {
    if (tops_are_shared()) return reinterpret_cast<unsigned*>(memory);
    return reinterpret_cast<unsigned*>(p.codes.out_scale + int64_t{block()} * kRows * p.codes.groups);
  }
  VITQ_DEVICE int count_of_tops() const {
    const int rows = p.m - block() * kRows;
    return (rows < kRows ? rows : kRows) * p.codes.groups;
  }
  VITQ_DEVICE int group_of(int col) const { return p.codes.groups == 1 ? 0 : col / p.codes.width; }

  VITQ_DEVICE void clear_tops() {
    for (int i = thread(); i < count_of_tops(); i += kThreads) tops()[i] = 0;
  }

  VITQ_DEVICE void raise_tops(int base) {
    // Where the four lanes of a row hold one group, they go there as one.
    const bool together = kAligned && (p.codes.groups == 1 || p.codes.width % kStrip == 0);
    VITQ_UNROLL
    for (int s = 0; s < kStrips; ++s) {
      if (strip(base, s) >= p.k) continue;
      const int first = strip(base, s) + column;
      VITQ_UNROLL
      for (int h = 0; h < 2; ++h) {
        unsigned* row_tops = tops() + (group + 8 * h) * p.codes.groups;
        float top = 0.0f;
        VITQ_UNROLL
        for (int i = 0; i < 16; ++i) {
          const float size = fabsf(v[s][i % 8][2 * h + i / 8]);
          top = max_or_nan(top, size);
          if (!kAligned && row(h) < p.m && first + i < p.k) {
            raise_to(row_tops + group_of(first + i), bits_of(size));
          }
        }
        if (!kAligned) continue;
        if (together) {
          top = max_or_nan(top, shuffle_xor(top, 1));
          top = max_or_nan(top, shuffle_xor(top, 2));
        }
        if (row(h) < p.m && first < p.k && (!together || column == 0)) {
          raise_to(row_tops + group_of(first), bits_of(top));
        }
      }
    }
  }

  VITQ_DEVICE void scales_of_tops() {
    const Codes& c = p.codes;
    for (int i = thread(); i < count_of_tops(); i += kThreads) {
      const int m = block() * kRows + i / c.groups;
      const float scale = dynamic_scale(float_of_bits(tops()[i]),
                                        static_cast<float>(c.row_qmax == nullptr ? c.qmax : c.row_qmax[m]));
      if (tops_are_shared()) c.out_scale[int64_t{block()} * kRows * c.groups + i] = scale;
      tops()[i] = bits_of(scale);
    }
  }

  VITQ_DEVICE float inverse(int h, int col) const {
    const Codes& c = p.codes;
    const int at = group_of(col);
    if (c.scale == nullptr) return 1.0f / float_of_bits(tops()[(group + 8 * h) * c.groups + at]);
    return 1.0f / c.scale[(c.scale_per_row ? int64_t{row(h)} * c.groups : 0) + at];
  }

  VITQ_DEVICE void encode(int base) {
    VITQ_UNROLL
    for (int h = 0; h < 2; ++h) {
      if (row(h) >= p.m) continue;
      const Clamp range = clamp_of(p.codes, row(h));
      VITQ_UNROLL
      for (int s = 0; s < kStrips; ++s) {
        const int first = strip(base, s) + column;
        if (first >= p.k) continue;
        int8_t* q = p.codes.q + int64_t{row(h)} * p.k + first;
        if constexpr (kAligned) {
          const float one = inverse(h, first);
          Words4 words;
          VITQ_UNROLL
          for (int i = 0; i < 4; ++i) {
            float x[4];
            VITQ_UNROLL
            for (int j = 0; j < 4; ++j) x[j] = v[s][i % 2 * 4 + j][2 * h + i / 2];
            words.w[i] = codes_of(p.codes, x, one, range);
          }
          *reinterpret_cast<Words4*>(q) = words;
        } else {
          VITQ_UNROLL
          for (int i = 0; i < 16; ++i) {
            if (first + i < p.k) {
              q[i] = code_of(p.codes, v[s][i % 8][2 * h + i / 8], inverse(h, first + i), range);
            }
          }
        }
      }
    }
  }
};

}  // namespace vitq::gpu
