#include "qlinear/epilogue.h"
#include "qlinear/int_tile.h"

namespace vitq::VITQ_ISA {
namespace {

constexpr int kVectors = kLanes == 4 ? 2 : kLanes == 16 ? 4 : 2;
constexpr int kTileN = kVectors * kLanes < 16 ? 16 : kVectors * kLanes;
constexpr int kTileRows = kLanes == 4 ? 2 : 6;
constexpr int64_t kSliceK = 128;  // a decoded slice of a panel stays in the first-level cache
// Activations of one task should stay in the second-level cache: from the third, a tile waits for them.
constexpr int64_t kActivationBytes = 5 << 18;
constexpr int64_t kSetupRows = 8;
constexpr int64_t kGrain = 1 << 18;

// Codes [k0, k0 + count) of the 16-row block at `packed` as floats, out[count][kTileN] from column 0 of the
// block.
void decode_block(const Weight& w, const uint8_t* packed, int64_t k0, int64_t count, float* out) {
  alignas(64) uint8_t lines[kSliceK * kBlockN];
  const uint8_t* bytes = lines;
  if (w.layout == Layout::int8_n16k4)
    bytes = packed + k0 * kBlockN;
  else
    decode_nibbles(packed + k0 * kBlockN / 2, ceil_div(count, 8), w.lut != nullptr ? w.lut : kPlainNibbles,
                   lines);
  for (int64_t k = 0; k < count; k += kBlockK)
    // Lane n holds four k: bring each to the top of the lane, then shift its sign down.
    for (int n = 0; n < kBlockN; n += kLanes) {
      const U four = load_as<U>(bytes + k * kBlockN + n * kBlockK);
      for (int j = 0; j < kBlockK && k + j < count; ++j)
        store(out + (k + j) * kTileN + n, to_float((I)(four << (24 - 8 * j)) >> 24));
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
  // Activations as [slices, M, kSliceK] float32: a tile then reads one short contiguous stretch. Rows of K
  // floats apart would be dozens of streams for the prefetcher, and often of one cache set.
  const Scratch sliced(static_cast<size_t>(ceil_div(w.k, kSliceK) * args.m * kSliceK) * 4);
  float* x = sliced.at<float>();
  pool_for(args.pool, args.m, ceil_div(1 << 15, w.k + 1), [&](int64_t begin, int64_t end) {
    for (int64_t i = begin; i < end; ++i)
      for (int64_t k0 = 0; k0 < w.k; k0 += kSliceK)
        read_row(x + k0 * args.m + i * kSliceK, args.x.at(i * w.k + k0), smaller(kSliceK, w.k - k0));
  });
  const UpPanels<kTileN> ups(args.tail, w.n, args.pool);
  const int64_t work_per_task = split.rows * kTileN * (w.k + 1);
  pool_for(
      args.pool, split.chunks * panels, ceil_div(kGrain, work_per_task), [&](int64_t begin, int64_t end) {
        const size_t slice_bytes = kSliceK * kTileN * 4;
        const Scratch scratch(slice_bytes + static_cast<size_t>(split.rows * kTileN) * 4);
        PanelTail<kTileN> terms;
        float *slice = scratch.at<float>(), *sums = scratch.at<float>(slice_bytes);
        alignas(64) float w_scale[kTileN];
        for (int64_t task = begin; task < end; ++task) {
          const int64_t p = task % panels, row = task / panels * split.rows;
          const int64_t last = smaller(row + split.rows, args.m);
          terms.gather(args.tail, w.n, p, ups);
          std::memcpy(w_scale, w.w_scale + terms.n0, static_cast<size_t>(terms.width) * 4);
          std::memset(sums, 0, static_cast<size_t>((last - row) * kTileN) * 4);
          for (int64_t k0 = 0; k0 < w.k; k0 += kSliceK) {
            const int64_t count = smaller(kSliceK, w.k - k0);
            for (int64_t b = 0; b < kTileN / kBlockN; ++b)
              decode_block(w, w.data + smaller(p * (kTileN / kBlockN) + b, blocks - 1) * packed_block, k0,
                           count, slice + b * kBlockN);
            for (int64_t i = row; i < last; i += kTileRows)
              with_rows<kTileRows>(smaller<int64_t>(kTileRows, last - i), [&]<int MR>() VITQ_LAMBDA {
                float_tile<MR, kTileN / kLanes, true>(x + k0 * args.m + i * kSliceK, kSliceK, slice, count,
                                                      sums + (i - row) * kTileN);
              });
          }
          for (int64_t i = row; i < last; i += kTileRows) {
            const float* tile = sums + (i - row) * kTileN;
            const auto product = [&](int c) VITQ_LAMBDA {
              return [scale = load(w_scale + c), at = tile + c](int64_t r)
                         VITQ_LAMBDA { return load(at + r * kTileN) * scale; };
            };
            finish_tile<kTileN, kTileRows>(args.tail, terms, w.n, i, smaller<int64_t>(kTileRows, last - i),
                                           product, nullptr, 0, args.out, args.out_dtype);
          }
        }
      });
}

}  // namespace vitq::VITQ_ISA
