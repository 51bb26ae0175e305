#include "qlinear/qlinear_cpu.h"

#include "qlinear/epilogue.h"
#include "qlinear/int_tile.h"

namespace vitq::VITQ_ISA {
namespace {

// Activations of one task should stay in the second-level cache while its panels pass by.
constexpr int64_t kActivationBytes = 1 << 20;
// The float rows of qlinear_quantize wait there until whole rows can be quantized. Fewer rows a task would
// read and decode the weights more often.
constexpr int64_t kFloatBytes = 1 << 20;
// Roughly the rows' worth of time that a task spends on a panel before its first row; only near-ties hang on
// it.
constexpr int64_t kSetupRows = 4;
// Below this many multiplications a second thread costs more than it saves.
constexpr int64_t kGrain = 1 << 19;

template <class P>
class Linear {
 public:
  static constexpr int kTileN = P::kBlocks * static_cast<int>(kBlockN);
  // Rows whose float part is computed in registers.
  static constexpr int kFinishRows = P::kRows < 6 ? P::kRows : 6;

  explicit Linear(const QLinearArgs& args)
      : args_(args),
        w_(args.weight),
        k4_(w_.layout == Layout::int8_n16k4 ? ceil_div(w_.k, 4) : 2 * ceil_div(w_.k, 8)),
        packed_block_(w_.layout == Layout::int8_n16k4 ? k4_ * 64 : k4_ * 32),
        decoded_block_(w_.layout == Layout::int8_n16k4 && P::kReadsInt8 ? 0 : k4_ * P::kStepBytes),
        lda_(k4_ * 4),
        panels_(ceil_div(w_.n, kTileN)),
        copied_(P::kCodesAsTheyAre && lda_ == w_.k ? args.m / P::kRows * P::kRows : 0),
        ups_(args.tail, w_.n, args.pool),
        codes_(static_cast<size_t>((padded_rows() - copied_) * lda_) * sizeof(typename P::Code)) {}

  void run() {
    prepare();
    const int64_t fit = kActivationBytes / (lda_ * static_cast<int64_t>(sizeof(typename P::Code)) + 1);
    const Split split = split_rows(args_.m, panels_, args_.pool.threads, P::kRows, kSetupRows, fit);
    // Consecutive tasks share a row chunk, so one thread's activations stay in its cache.
    pool_for(args_.pool, split.chunks * panels_, grain(split.rows * kTileN), [&](int64_t begin, int64_t end) {
      Workspace work(*this, split.rows, 0);
      for (int64_t task = begin; task < end; ++task) {
        const int64_t row = task / panels_ * split.rows;
        panel(work, task % panels_, row, smaller(row + split.rows, args_.m), nullptr, 0);
      }
    });
  }

  void run(const QuantTail& quant) {
    prepare();
    const int64_t ld = panels_ * kTileN;
    const int64_t fit = kFloatBytes / (ld * 4 + 1);
    const Split split = split_rows(args_.m, 1, args_.pool.threads, P::kRows, kSetupRows, fit);
    pool_for(args_.pool, split.chunks, grain(split.rows * w_.n), [&](int64_t begin, int64_t end) {
      Workspace work(*this, split.rows, split.rows * ld);
      for (int64_t chunk = begin; chunk < end; ++chunk) {
        const int64_t row = chunk * split.rows, last = smaller(row + split.rows, args_.m);
        for (int64_t p = 0; p < panels_; ++p) panel(work, p, row, last, work.rows + p * kTileN, ld);
        quantize_rows(quant, work.rows, work.rows, ld, row, last - row);
      }
    });
  }

 private:
  // One thread's memory: a decoded panel, the sums of a task's rows where K takes several slices (of one tile
  // otherwise), and `floats` floats waiting to be quantized.
  struct Workspace {
    Workspace(const Linear& linear, int64_t task_rows, int64_t floats)
        : decoded_bytes(lines(static_cast<size_t>(linear.decoded_block_) * P::kBlocks)),
          sum_bytes(static_cast<size_t>(linear.k4_ > P::kSliceK4 ? task_rows : P::kRows) * kTileN * 4),
          scratch(decoded_bytes + sum_bytes + static_cast<size_t>(floats) * 4),
          session(linear.k4_),
          decoded(scratch.at<uint8_t>()),
          sums(scratch.at<int32_t>(decoded_bytes)),
          rows(scratch.at<float>(decoded_bytes + sum_bytes)) {}
    const size_t decoded_bytes, sum_bytes;
    const Scratch scratch;
    [[no_unique_address]] const typename P::Session session;
    uint8_t* const decoded;
    int32_t* const sums;
    float* const rows;
    PanelTail<kTileN> terms;
    alignas(64) float w_scale[kTileN];
    alignas(64) int32_t column[kTileN];
  };

  int64_t grain(int64_t outputs_per_task) const {
    return ceil_div(kGrain, (outputs_per_task + 1) * (w_.k + 1));
  }

  int64_t padded_rows() const { return P::kWhole ? ceil_div(args_.m, P::kRows) * P::kRows : args_.m; }

  // Activations as the tile wants them, padded with zeros (which meet whatever pads the weights). Where it
  // wants them as they are, only the rows of the last tile are copied.
  void prepare() {
    auto* codes = codes_.template at<typename P::Code>();
    const int64_t rows = args_.m - copied_, behind = (padded_rows() - args_.m) * lda_;
    std::memset(codes + rows * lda_, 0, static_cast<size_t>(behind) * sizeof(typename P::Code));
    pool_for(args_.pool, rows, ceil_div(1 << 16, w_.k + 1), [&](int64_t begin, int64_t end) {
      for (int64_t i = begin; i < end; ++i)
        prepare_row(args_.x + (copied_ + i) * w_.k, codes + i * lda_, w_.k, lda_);
    });
  }

  // Row i, the first of a tile.
  const typename P::Code* codes_of(int64_t i) const {
    if constexpr (P::kCodesAsTheyAre)
      if (i < copied_) return args_.x + i * lda_;
    return codes_.template at<typename P::Code>() + (i - copied_) * lda_;
  }

  // Bytes may alias anything, the members of *this, too: without `restrict` and sizes by value this is a loop
  // over single bytes that takes nearly as long as the products.
  static void prepare_row(const int8_t* __restrict x, typename P::Code* __restrict out, int64_t k,
                          int64_t padded) {
    for (int64_t i = 0; i < k; ++i) out[i] = static_cast<typename P::Code>(x[i] + P::kCodeOffset);
    for (int64_t i = k; i < padded; ++i) out[i] = 0;
  }

  // Rows [row, last) of panel p into dst (element [row, n0] at dst, row stride ld) or, if null, into
  // args.out.
  void panel(Workspace& work, int64_t p, int64_t row, int64_t last, float* dst, int64_t ld) const {
    const int64_t blocks = ceil_div(w_.n, kBlockN), n0 = p * kTileN;
    const uint8_t* block[P::kBlocks];
    int64_t run = 0;
    for (int j = 0; j < P::kBlocks; ++j) {
      // Past the last block the tile repeats it: computed, never stored.
      const uint8_t* packed = w_.data + smaller(p * P::kBlocks + j, blocks - 1) * packed_block_;
      block[j] = packed;
      if (decoded_block_ > 0) {
        uint8_t* decoded = work.decoded + j * decoded_block_;
        run = P::decode(w_.layout, packed, k4_, w_.lut != nullptr ? w_.lut : kPlainNibbles, decoded);
        block[j] = decoded;
      }
    }
    PanelTail<kTileN>& terms = work.terms;
    terms.gather(args_.tail, w_.n, p, ups_);
    std::memcpy(work.w_scale, w_.w_scale + n0, static_cast<size_t>(terms.width) * 4);
    const uint32_t offset = static_cast<uint32_t>(P::kCodeOffset + args_.x_zero_point);
    for (int64_t c = 0; c < terms.width; ++c)  // modulo 2^32: the whole sum fits, this part need not
      work.column[c] = static_cast<int32_t>(0u - offset * static_cast<uint32_t>(args_.col_sum[n0 + c]));

    // The next panel's bytes are asked for a little with every tile: they come from far away.
    const uint8_t* next = w_.data + smaller((p + 1) * P::kBlocks, blocks) * packed_block_;
    const uint8_t* const next_end = w_.data + smaller((p + 2) * P::kBlocks, blocks) * packed_block_;
    const int64_t tiles = ceil_div(last - row, P::kRows) * ceil_div(k4_, P::kSliceK4);
    const int64_t share = ceil_div(next_end - next, 64 * tiles + 1);
    for (int64_t k = 0; k < k4_ || k == 0; k += P::kSliceK4) {
      const int64_t steps = smaller(P::kSliceK4, k4_ - k);
      const uint8_t* slice[P::kBlocks];
      for (int j = 0; j < P::kBlocks; ++j) slice[j] = block[j] + k * P::kStepBytes;
      for (int64_t i = row; i < last; i += P::kRows) {
        const int64_t rows = smaller<int64_t>(P::kRows, last - i);
        for (int64_t line = 0; line < share && next < next_end; ++line, next += 64)
          __builtin_prefetch(next, 0, 2);
        if (k + steps == k4_) prefetch_residual(args_.tail, terms, w_.n, i, rows);
        const auto* a = codes_of(i) + k * 4;
        int32_t* sums = work.sums + (k4_ > P::kSliceK4 ? (i - row) * kTileN : 0);
        if constexpr (P::kWhole)
          P::template tile<P::kRows>(a, lda_, slice, steps, run, sums, k > 0);
        else
          with_rows<P::kRows>(rows, [&]<int MR>() VITQ_LAMBDA {
            P::template tile<MR>(a, lda_, slice, steps, run, sums, k > 0);
          });
        if (k + steps < k4_) continue;
        for (int64_t r = 0; r < rows; r += kFinishRows)
          finish(work, i + r, smaller<int64_t>(kFinishRows, rows - r), sums + r * kTileN,
                 dst == nullptr ? nullptr : dst + (i + r - row) * ld, ld);
      }
    }
  }

  void finish(const Workspace& work, int64_t row, int64_t rows, const int32_t* sums, float* dst,
              int64_t ld) const {
    const float* x_scale = args_.x_scale + (args_.x_scale_per_row ? row : 0);
    const int64_t scale_step = args_.x_scale_per_row ? 1 : 0;
    const auto product = [&](int c) VITQ_LAMBDA {
      const F w_scale = load(work.w_scale + c);
      const U column = (U)load(work.column + c);
      return [=](int64_t r) VITQ_LAMBDA {
        return to_float((I)((U)load(sums + r * kTileN + c) + column)) * (w_scale * x_scale[r * scale_step]);
      };
    };
    finish_tile<kTileN, kFinishRows>(args_.tail, work.terms, w_.n, row, rows, product, dst, ld, args_.out,
                                     args_.out_dtype);
  }

  const QLinearArgs& args_;
  const Weight& w_;
  const int64_t k4_, packed_block_, decoded_block_, lda_, panels_;
  const int64_t copied_;  // rows from here on are copied into codes_; a multiple of the tile height
  const UpPanels<kTileN> ups_;
  const Scratch codes_;  // [M − copied, lda] Code, and what tiles read behind
};

// f.operator()<Policy>() for the policy that reads `weight`.
template <class Fn>
VITQ_INLINE void with_policy(const Weight& weight, const Fn& fn) {
  if (weight.layout == Layout::int8_n16k4)
    fn.template operator()<Int8Policy>();
  else if (weight.lut != nullptr)
    fn.template operator()<Int4LutPolicy>();
  else
    fn.template operator()<Int4Policy>();
}

}  // namespace

void qlinear(const QLinearArgs& args) {
  with_policy(args.weight, [&]<class P>() { Linear<P>(args).run(); });
}

void qlinear_quantize(const QLinearArgs& args, const QuantTail& quant) {
  with_policy(args.weight, [&]<class P>() { Linear<P>(args).run(quant); });
}

}  // namespace vitq::VITQ_ISA
