// The integer inner products: how activations and weights are laid out for one instruction set, and the
// register tile.
//
// A tile is kRows activation rows by kBlocks blocks of 16 weight rows over the whole of K, exact in int32. A
// policy says
//
// - Code: an activation in the prepared matrix [M, 4·k4], zero padded;
// - kCodeOffset: what prepare() added to every activation, so that sums are too large by it times col_sum[n];
// - kStepBytes: of one k4 step of a decoded 16-row block; kReadsInt8: packed int8 blocks are used as they
// are;
// - decode(): one packed block to one decoded block. Returns the `run` that tiles over it need, if any;
// - kCodesAsTheyAre: a Code is an activation as it comes, so that rows which need no padding are read in
// place;
// - tile<MR>(): out [MR, 16·kBlocks] int32; kWhole: MR is kRows always, and activations are read in steps of
// 64 k;
// - Session(k4): lives in a thread as long as it computes tiles.
//
// Sums may wrap on the way; they are exact modulo 2^32, and the true sum fits (K <= 65,793).
#pragma once

#include "common/amx.h"
#include "common/layout.h"
#include "common/simd.h"

namespace vitq::VITQ_ISA {

constexpr int8_t kPlainNibbles[16] = {-8, -7, -6, -5, -4, -3, -2, -1, 0, 1, 2, 3, 4, 5, 6, 7};

// Tiles of any number of rows, of activations that prepare() has made.
struct AnyRows {
  static constexpr bool kWhole = false, kCodesAsTheyAre = false;
  struct Session {
    explicit Session(int64_t) {}
  };
};

template <class V>
VITQ_INLINE void put(int32_t* out, V sums, bool accumulate) {
  const I sum = (I)sums;
  store(out, accumulate ? (I)((U)sum + (U)load(out)) : sum);
}

// int4_n16k4 → int8_n16k4: `pairs` 64-byte lines become 2·pairs; table[nibble] is the weight.
VITQ_INLINE void decode_nibbles(const uint8_t* packed, int64_t pairs, const int8_t* table, uint8_t* out) {
#if defined(__AVX2__)
  const __m256i lut = _mm256_broadcastsi128_si256(_mm_loadu_si128(reinterpret_cast<const __m128i*>(table)));
  const __m256i mask = _mm256_set1_epi8(15);
  for (int64_t i = 0; i < pairs; ++i)
    for (int h = 0; h < 64; h += 32) {
      const __m256i line = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(packed + i * 64 + h));
      const __m256i low = _mm256_and_si256(line, mask),
                    high = _mm256_and_si256(_mm256_srli_epi16(line, 4), mask);
      _mm256_storeu_si256(reinterpret_cast<__m256i*>(out + i * 128 + h), _mm256_shuffle_epi8(lut, low));
      _mm256_storeu_si256(reinterpret_cast<__m256i*>(out + i * 128 + 64 + h), _mm256_shuffle_epi8(lut, high));
    }
#else
  for (int64_t i = 0; i < pairs; ++i)
    for (int64_t j = 0; j < 64; ++j) {
      out[i * 128 + j] = static_cast<uint8_t>(table[packed[i * 64 + j] & 15]);
      out[i * 128 + 64 + j] = static_cast<uint8_t>(table[packed[i * 64 + j] >> 4]);
    }
#endif
}

#if defined(__AVX512VNNI__) || defined(__AVXVNNI__)

// vpdpbusd multiplies unsigned by signed bytes and adds four products to an int32 without saturation.
struct Vnni : AnyRows {
  using Code = uint8_t;
  static constexpr int32_t kCodeOffset = 128;
  // 24 (12) accumulators, kBlocks weight vectors and one broadcast on 32 (16) registers.
  static constexpr int kRows = 6, kBlocks = kLanes == 16 ? 4 : 1;
  static constexpr int64_t kSliceK4 = kLanes == 16 ? 1024 : 256;

  static constexpr int64_t kStepBytes = 64;
  static constexpr bool kReadsInt8 = true;

  static int64_t decode(Layout, const uint8_t* packed, int64_t k4, const int8_t* table, uint8_t* out) {
    decode_nibbles(packed, k4 / 2, table, out);
    return 0;
  }

#if defined(__AVX512VNNI__)
  using Vector = __m512i;
  static constexpr int kVectors = kBlocks;
  VITQ_INLINE Vector weights(const uint8_t* p) { return _mm512_loadu_si512(p); }
  VITQ_INLINE Vector spread(int32_t v) { return _mm512_set1_epi32(v); }
  VITQ_INLINE Vector dot(Vector acc, Vector u, Vector s) { return _mm512_dpbusd_epi32(acc, u, s); }
#else
  using Vector = __m256i;
  static constexpr int kVectors = 2 * kBlocks;
  VITQ_INLINE Vector weights(const uint8_t* p) {
    return _mm256_loadu_si256(reinterpret_cast<const Vector*>(p));
  }
  VITQ_INLINE Vector spread(int32_t v) { return _mm256_set1_epi32(v); }
  VITQ_INLINE Vector dot(Vector acc, Vector u, Vector s) { return _mm256_dpbusd_avx_epi32(acc, u, s); }
#endif

  template <int MR>
  VITQ_TILE void tile(const Code* a, int64_t lda, const uint8_t* const* panel, int64_t k4, int64_t,
                      int32_t* out, bool accumulate) {
    Vector acc[MR][kVectors];
    clear(acc);
    for (int64_t k = 0; k < k4; ++k) {
      Vector w[kVectors];
      unroll<kVectors>([&](auto j) VITQ_LAMBDA {
        w[j] = weights(panel[j * kBlocks / kVectors] + k * 64 + (j * 64 * kBlocks / kVectors) % 64);
      });
      unroll<MR>([&](auto i) VITQ_LAMBDA {
        const Vector x = spread(load_as<int32_t>(a + i * lda + k * 4));
        unroll<kVectors>([&](auto j) VITQ_LAMBDA { acc[i][j] = dot(acc[i][j], x, w[j]); });
      });
    }
    unroll<MR>([&](auto i) VITQ_LAMBDA {
      unroll<kVectors>([&](auto j)
                           VITQ_LAMBDA { put(out + i * 16 * kBlocks + j * kLanes, acc[i][j], accumulate); });
    });
  }
};

#if defined(__AMX_INT8__)

// A tile of 16 rows and 64 k of activations by one of 64 k and 16 columns, which sixteen lines of a block are
// as they lie. Four tiles of sums, one of activations, one for weights, two for the k that are left in the
// end.
struct Amx {
  using Code = int8_t;
  static constexpr int32_t kCodeOffset = 0;
  static constexpr int kRows = amx::kTileRows, kBlocks = 4;
  static constexpr bool kWhole = true, kCodesAsTheyAre = true;
  static constexpr int64_t kStepBytes = 64, kLines = 16;
  static constexpr bool kReadsInt8 = true;
  static constexpr int64_t kSliceK4 = 96;  // four blocks of it stay in the L1 cache while rows pass by

  static int64_t decode(Layout, const uint8_t* packed, int64_t k4, const int8_t* table, uint8_t* out) {
    decode_nibbles(packed, k4 / 2, table, out);
    return 0;
  }

  struct Session {
    explicit Session(int64_t k4) { amx::configure(amx::Config(k4 % kLines)); }
    ~Session() { amx::release(); }
    Session(const Session&) = delete;
    Session& operator=(const Session&) = delete;
  };

  template <int MR>
  VITQ_TILE void tile(const Code* a, int64_t lda, const uint8_t* const* panel, int64_t k4, int64_t,
                      int32_t* out, bool accumulate) {
    static_assert(MR == kRows, "tiles are whole");
    constexpr int64_t kSumBytes = 64 * kBlocks;
    unroll<kBlocks>([&](auto j) VITQ_LAMBDA {
      constexpr int kJ = int{j};
      if (accumulate)
        amx::read<kJ>(out + kJ * 16, kSumBytes);
      else
        amx::zero<kJ>();
    });
    int64_t k = 0;
    for (; k + kLines <= k4; k += kLines) {
      amx::read<4>(a + k * 4, lda);
      unroll<kBlocks>([&](auto j) VITQ_LAMBDA {
        amx::read<5>(panel[j] + k * 64, 64);
        amx::dot_signed<int{j}, 4, 5>();
      });
    }
    if (k < k4) {
      amx::read<6>(a + k * 4, lda);
      unroll<kBlocks>([&](auto j) VITQ_LAMBDA {
        amx::read<7>(panel[j] + k * 64, 64);
        amx::dot_signed<int{j}, 6, 7>();
      });
    }
    unroll<kBlocks>([&](auto j) VITQ_LAMBDA { amx::write<int{j}>(out + int{j} * 16, kSumBytes); });
  }
};

using Int8Policy = Amx;
using Int4Policy = Amx;
using Int4LutPolicy = Amx;

#else

using Int8Policy = Vnni;
using Int4Policy = Vnni;
using Int4LutPolicy = Vnni;

#endif

#elif defined(__AVX2__)

// Ends one row's step before the next begins. Sixteen registers hold a tile and one product; GCC would start
// several rows' products first and spill the accumulators instead.
VITQ_INLINE void settle(__m256i& a, __m256i& b) { asm volatile("" : "+x"(a), "+x"(b)); }

// vpmaddwd on widened operands: exact for every pair of int8 (vpmaddubsw is not: 2·128·128 saturates an
// int16). The four k of a lane make two int32 sums, added at the end.
struct Words : AnyRows {
  using Code = int16_t;
  static constexpr int32_t kCodeOffset = 0;
  static constexpr int kRows = 6, kBlocks = 1;

  static constexpr int64_t kStepBytes = 128;
  static constexpr bool kReadsInt8 = false;
  static constexpr int64_t kSliceK4 = 128;

  static int64_t decode(Layout layout, const uint8_t* packed, int64_t k4, const int8_t* table, uint8_t* out) {
    alignas(64) uint8_t lines[128];
    for (int64_t k = 0; k < k4; k += 2) {
      const uint8_t* bytes = lines;
      if (layout == Layout::int8_n16k4)
        bytes = packed + k * 64;
      else
        decode_nibbles(packed + k * 32, 1, table, lines);
      const int count = k + 2 <= k4 ? 128 : 64;
      for (int i = 0; i < count; i += 16)
        _mm256_storeu_si256(
            reinterpret_cast<__m256i*>(out + k * 128 + i * 2),
            _mm256_cvtepi8_epi16(_mm_loadu_si128(reinterpret_cast<const __m128i*>(bytes + i))));
    }
    return 0;
  }

  // Eight of the sixteen columns: 12 accumulators, two weight vectors, one activation; every line is read
  // once per tile.
  template <int MR>
  VITQ_TILE void half_tile(const Code* a, int64_t lda, const uint8_t* panel, int64_t k4, int32_t* out,
                           bool accumulate) {
    __m256i acc[MR][2];
    clear(acc);
    for (int64_t k = 0; k < k4; ++k) {
      const __m256i w0 = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(panel + k * 128));
      const __m256i w1 = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(panel + k * 128 + 32));
      unroll<MR>([&](auto i) VITQ_LAMBDA {
        const __m256i x = _mm256_set1_epi64x(load_as<long long>(a + i * lda + k * 4));
        acc[i][0] = _mm256_add_epi32(acc[i][0], _mm256_madd_epi16(x, w0));
        acc[i][1] = _mm256_add_epi32(acc[i][1], _mm256_madd_epi16(x, w1));
        settle(acc[i][0], acc[i][1]);
      });
    }
    unroll<MR>([&](auto i) VITQ_LAMBDA {
      // hadd works within 128-bit halves: lanes n0 n1 n4 n5 | n2 n3 n6 n7.
      const __m256i pairs = _mm256_hadd_epi32(acc[i][0], acc[i][1]);
      put(out + i * 16, _mm256_permute4x64_epi64(pairs, 0xd8), accumulate);
    });
  }

  template <int MR>
  VITQ_TILE void tile(const Code* a, int64_t lda, const uint8_t* const* panel, int64_t k4, int64_t,
                      int32_t* out, bool accumulate) {
    half_tile<MR>(a, lda, panel[0], k4, out, accumulate);
    half_tile<MR>(a, lda, panel[0] + 64, k4, out + 8, accumulate);
  }
};

// vpmaddubsw of activations + 128 (u8) and weights of 4 bits: a pair sum is at most 2·255·8 = 4080 in
// magnitude, so eight of them fit an int16 before they are widened. Weights whose signs and magnitudes mix,
// as trained ones do, allow longer runs: a lane of 16 bits stays between −255·Σ|w < 0| and 255·Σ(w > 0) of
// its own weights, whatever the activations are.
struct Nibbles : AnyRows {
  using Code = uint8_t;
  static constexpr int32_t kCodeOffset = 128;
  static constexpr int kRows = 6, kBlocks = 1;

  static constexpr int64_t kStepBytes = 64;
  static constexpr bool kReadsInt8 = false;
  static constexpr int64_t kSliceK4 = 256;

  // Returns how many steps, a multiple of kGroup, int16 sums surely hold.
  static int64_t decode(Layout, const uint8_t* packed, int64_t k4, const int8_t* table, uint8_t* out) {
    decode_nibbles(packed, k4 / 2, table, out);
    constexpr int64_t kGroup = 8;
    const __m256i ones = _mm256_set1_epi8(1);
    __m256i most =
        _mm256_setzero_si256();  // over groups, 2·max(Σ(w > 0), Σ|w < 0|) = Σ|w| + |Σw| of each lane
    for (int64_t k0 = 0; k0 < k4; k0 += kGroup)
      for (int half = 0; half < 64; half += 32) {
        __m256i sum = _mm256_setzero_si256(), magnitude = _mm256_setzero_si256();  // of bytes, at most 64
        for (int64_t k = k0; k < smaller(k0 + kGroup, k4); ++k) {
          const __m256i w = load_as<__m256i>(out + k * 64 + half);
          sum = _mm256_add_epi8(sum, w);
          magnitude = _mm256_add_epi8(magnitude, _mm256_abs_epi8(w));
        }
        most = _mm256_max_epi16(most, _mm256_add_epi16(_mm256_maddubs_epi16(ones, magnitude),
                                                       _mm256_abs_epi16(_mm256_maddubs_epi16(ones, sum))));
      }
    // Of each half of a 32-bit lane; |255·Σ| <= 32,640.
    const __m256i wide =
        _mm256_max_epi32(_mm256_srli_epi32(most, 16), _mm256_and_si256(most, _mm256_set1_epi32(0xffff)));
    const int32_t top = max_of((I)wide);
    return kGroup * (256 / (top > 0 ? top : 1));
  }

  template <int MR>
  VITQ_TILE void tile(const Code* a, int64_t lda, const uint8_t* const* panel, int64_t k4, int64_t run,
                      int32_t* out, bool accumulate) {
    const __m256i ones = _mm256_set1_epi16(1);
    const uint8_t* w = panel[0];
    __m256i total[MR][2];
    clear(total);
    for (int64_t k0 = 0; k0 < k4; k0 += run) {
      __m256i acc[MR][2];
      const auto step = [&](auto s, const auto& add) VITQ_LAMBDA {
        const __m256i w0 = load_as<__m256i>(w + s * 64), w1 = load_as<__m256i>(w + s * 64 + 32);
        unroll<MR>([&](auto i) VITQ_LAMBDA {
          add(acc[i], _mm256_set1_epi32(load_as<int32_t>(a + i * lda + s * 4)), w0, w1);
        });
      };
      // Two steps at a time (k4 is even), the first of which starts the sums.
      step(Index<0>{}, start);
      step(Index<1>{}, add_products);
      w += 128, a += 8;
      for (const uint8_t* end = w + (smaller(run, k4 - k0) - 2) * 64; w < end; w += 128, a += 8) {
        step(Index<0>{}, add_products);
        step(Index<1>{}, add_products);
      }
      unroll<MR>([&](auto i) VITQ_LAMBDA {
        unroll<2>([&](auto j) VITQ_LAMBDA {
          total[i][j] = _mm256_add_epi32(total[i][j], _mm256_madd_epi16(acc[i][j], ones));
        });
      });
    }
    unroll<MR>([&](auto i) VITQ_LAMBDA {
      unroll<2>([&](auto j) VITQ_LAMBDA { put(out + i * 16 + j * 8, total[i][j], accumulate); });
    });
  }

 private:
  static constexpr auto start = [](__m256i (&acc)[2], __m256i x, __m256i w0, __m256i w1) VITQ_LAMBDA {
    acc[0] = _mm256_maddubs_epi16(x, w0);
    acc[1] = _mm256_maddubs_epi16(x, w1);
    settle(acc[0], acc[1]);
  };
  // The instructions themselves: from intrinsics GCC 12 makes a copy of every accumulator in every step, and
  // the front end is as busy as the multipliers.
  static constexpr auto add_products = [](__m256i (&acc)[2], __m256i x, __m256i w0, __m256i w1) VITQ_LAMBDA {
    __m256i product;
    asm volatile(
        "vpmaddubsw %[w0], %[x], %[product]\n\t"
        "vpaddw %[product], %[acc0], %[acc0]\n\t"
        "vpmaddubsw %[w1], %[x], %[x]\n\t"
        "vpaddw %[x], %[acc1], %[acc1]"
        : [acc0] "+x"(acc[0]), [acc1] "+x"(acc[1]), [x] "+x"(x), [product] "=&x"(product)
        : [w0] "x"(w0), [w1] "x"(w1));
  };
};

using Int8Policy = Words;
using Int4Policy = Nibbles;
using Int4LutPolicy = Words;

#else

// Any CPU: plain loops over sixteen columns that compilers turn into whatever vectors there are.
struct Plain : AnyRows {
  using Code = int16_t;
  static constexpr int32_t kCodeOffset = 0;
  static constexpr int kRows = 2, kBlocks = 1;

  static constexpr int64_t kStepBytes = 128;
  static constexpr bool kReadsInt8 = false;
  static constexpr int64_t kSliceK4 = 128;

  // → [4·k4, 16] int16.
  static int64_t decode(Layout layout, const uint8_t* packed, int64_t k4, const int8_t* table, uint8_t* out) {
    uint8_t lines[128];
    for (int64_t k = 0; k < k4; ++k) {
      const uint8_t* bytes = lines + k % 2 * 64;
      if (layout == Layout::int8_n16k4)
        bytes = packed + k * 64;
      else if (k % 2 == 0)
        decode_nibbles(packed + k * 32, 1, table, lines);
      for (int j = 0; j < 4; ++j)
        for (int n = 0; n < 16; ++n) {
          const int16_t v = static_cast<int8_t>(bytes[n * 4 + j]);
          std::memcpy(out + ((k * 4 + j) * 16 + n) * 2, &v, 2);
        }
    }
    return 0;
  }

  template <int MR>
  VITQ_TILE void tile(const Code* a, int64_t lda, const uint8_t* const* panel, int64_t k4, int64_t,
                      int32_t* out, bool accumulate) {
    const int16_t* w = reinterpret_cast<const int16_t*>(panel[0]);
    uint32_t acc[MR][16] = {};
    if (accumulate) std::memcpy(acc, out, sizeof(acc));
    for (int64_t k = 0; k < k4 * 4; ++k)
      for (int i = 0; i < MR; ++i) {
        const int32_t x = a[i * lda + k];
        for (int n = 0; n < 16; ++n) acc[i][n] += static_cast<uint32_t>(x * w[k * 16 + n]);
      }
    std::memcpy(out, acc, sizeof(acc));
  }
};

using Int8Policy = Plain;
using Int4Policy = Plain;
using Int4LutPolicy = Plain;

#endif

}  // namespace vitq::VITQ_ISA
