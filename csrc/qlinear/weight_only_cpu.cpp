#include "qlinear/epilogue.h"
#include "qlinear/int_tile.h"

namespace vitq::VITQ_ISA {
namespace {

constexpr int kVectors = kLanes == 4 ? 2 : kLanes == 16 ? 4 : 2;
constexpr int kTileN = kVectors * kLanes < 16 ? 16 : kVectors * kLanes;
constexpr int kTileRows = kLanes == 4 ? 2 : 6;
constexpr int64_t kSliceK = 128;  // a decoded slice of a panel stays in the first-level cache
constexpr int64_t kActivationBytes = 1 << 20;
constexpr int64_t kSetupRows = 8;
constexpr int64_t kGrain = 1 << 18;

// Codes [k0, k0 + count) of the 16-row block at `packed` as floats, out[count][kTileN] from column 0 of the
// block.
void decode_block(const Weight& w, const uint8_t* packed, int64_t k0, int64_t count, float* out) {
  const int8_t* table = w.lut != nullptr ? w.lut : kPlainNibbles;
  for (int64_t k = k0; k < k0 + count; k += 4) {
    uint8_t bytes[64];
    const uint8_t* line = bytes;
    if (w.layout == Layout::int8_n16k4) {
      line = packed + k * 16;
    } else {
      const uint8_t* nibbles = packed + k / 8 * 64;
      const int shift = int4_n16k4_shift(k);
      for (int i = 0; i < 64; ++i) bytes[i] = static_cast<uint8_t>(table[(nibbles[i] >> shift) & 15]);
    }
    // Lane n holds four k: bring each to the top of the lane, then shift its sign down.
    for (int n = 0; n < 16; n += kLanes) {
      const U four = load_as<U>(line + n * 4);
      for (int j = 0; j < 4 && k + j < k0 + count; ++j)
        store(out + (k - k0 + j) * kTileN + n, to_float((I)(four << (24 - 8 * j)) >> 24));
    }
  }
}

}  // namespace

// Panels of columns, decoded to float slices of kSliceK; the tile sums stay in `sums` between slices, and
// every output is summed over k in order whatever the tiling.
void qlinear_weight_only(const WeightOnlyArgs& args) {
  const Weight& w = args.weight;
  const int64_t blocks = ceil_div(w.n, kBlockN), panels = ceil_div(w.n, kTileN);
  const int64_t packed_block = w.layout == Layout::int8_n16k4 ? ceil_div(w.k, 4) * 64 : ceil_div(w.k, 8) * 64;
  const Split split =
      split_rows(args.m, panels, args.pool.threads, kTileRows, kSetupRows, kActivationBytes / (w.k * 4 + 1));
  const float* x = static_cast<const float*>(args.x.data);
  const Scratch converted(args.x.dtype == DType::f32 ? 0 : static_cast<size_t>(args.m * w.k) * 4);
  if (args.x.dtype != DType::f32) {
    float* out = converted.at<float>();
    pool_for(args.pool, args.m, ceil_div(1 << 15, w.k + 1), [&](int64_t begin, int64_t end) {
      for (int64_t i = begin; i < end; ++i) read_row(out + i * w.k, args.x.at(i * w.k), w.k);
    });
    x = out;
  }
  const int64_t work_per_task = split.rows * kTileN * (w.k + 1);
  pool_for(
      args.pool, split.chunks * panels, ceil_div(kGrain, work_per_task), [&](int64_t begin, int64_t end) {
        const size_t up_bytes = lines(PanelTail<kTileN>::up_bytes(args.tail.rank));
        const size_t slice_bytes = kSliceK * kTileN * 4;
        const Scratch scratch(up_bytes + slice_bytes + static_cast<size_t>(split.rows * kTileN) * 4);
        PanelTail<kTileN> terms;
        terms.up = scratch.at<float>();
        float *slice = scratch.at<float>(up_bytes), *sums = scratch.at<float>(up_bytes + slice_bytes);
        alignas(64) float w_scale[kTileN];
        for (int64_t task = begin; task < end; ++task) {
          const int64_t p = task % panels, row = task / panels * split.rows, n0 = p * kTileN;
          const int64_t last = smaller(row + split.rows, args.m);
          terms.gather(args.tail, w.n, n0);
          std::memcpy(w_scale, w.w_scale + n0, static_cast<size_t>(terms.width) * 4);
          std::memset(sums, 0, static_cast<size_t>((last - row) * kTileN) * 4);
          for (int64_t k0 = 0; k0 < w.k; k0 += kSliceK) {
            const int64_t count = smaller(kSliceK, w.k - k0);
            for (int64_t b = 0; b < kTileN / kBlockN; ++b)
              decode_block(w, w.data + smaller(p * (kTileN / kBlockN) + b, blocks - 1) * packed_block, k0,
                           count, slice + b * kBlockN);
            for (int64_t i = row; i < last; i += kTileRows)
              with_rows<kTileRows>(smaller<int64_t>(kTileRows, last - i), [&]<int MR>() VITQ_LAMBDA {
                float_tile<MR, kTileN / kLanes, true>(x + i * w.k + k0, w.k, slice, count,
                                                      sums + (i - row) * kTileN);
              });
          }
          for (int64_t i = row; i < last; i += kTileRows) {
            const float* tile = sums + (i - row) * kTileN;
            const auto product = [&](int64_t r, int c)
                                     VITQ_LAMBDA { return load(tile + r * kTileN + c) * load(w_scale + c); };
            finish_tile<kTileN, kTileRows>(args.tail, terms, w.n, i, smaller<int64_t>(kTileRows, last - i),
                                           product, nullptr, 0, args.out, args.out_dtype);
          }
        }
      });
}

}  // namespace vitq::VITQ_ISA
