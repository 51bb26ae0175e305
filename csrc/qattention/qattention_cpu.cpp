#include "qattention/qattention_cpu.h"

#include "common/convert.h"
#include "common/simd.h"
#include "qattention/focus.h"
#include "qattention/integer_tile.h"

namespace vitq::VITQ_ISA {
namespace attention {
namespace {

constexpr int64_t round_up(int64_t n, int64_t multiple) { return (n + multiple - 1) / multiple * multiple; }

// Sizes that follow from the arguments.
struct Shape {
  explicit Shape(const QAttentionArgs& a)
      : blocks(ceil_div(a.nq, kQueryRows)),
        rows(round_up(ceil_div(a.nq, blocks), kTileRows)),
        keys(round_up(a.nk, kColumns)),
        width(round_up(a.d, kColumns)),
        qk_steps(ceil_div(a.d, kStep)),
        pv_steps(keys / kStep) {}

  // Queries whose scores are held at once. Fewer waste the packed keys and values on reloads, more leave the
  // L1 cache.
  static constexpr int64_t kQueryRows = 48;

  int64_t blocks, rows;  // blocks of a head, rows of a block
  int64_t keys, width;   // Nk and d padded to whole groups of columns
  int64_t qk_steps, pv_steps;
};

// Carves arrays out of one allocation: with no memory yet it only counts.
class Arena {
 public:
  explicit Arena(char* base) : base_(base) {}
  template <class T>
  T* take(int64_t n) {
    T* p = reinterpret_cast<T*>(base_ + size_);
    size_ +=
        lines(static_cast<size_t>(n) * sizeof(T)) + 64;  // the gap keeps equal strides out of one cache set
    return p;
  }
  size_t size() const { return size_; }

 private:
  char* base_;
  size_t size_ = 0;
};

struct Workspace {
  Workspace(const Shape& s, char* base) : arena(base) {
    keys = arena.take<B>(s.keys * s.qk_steps * kStep);
    values = arena.take<B>(s.width * s.keys);
    key_init = arena.take<int32_t>(s.keys);
    zeros = arena.take<int32_t>(s.width);
    value_sum = arena.take<int32_t>(s.width);
    key_scale = arena.take<float>(s.keys);
    value_ratio = arena.take<float>(s.keys);
    value_rows = arena.take<int8_t>(kStep * s.width);
    queries = arena.take<A>(s.rows * s.qk_steps * kStep);
    product = arena.take<int32_t>(s.rows * s.keys);
    levels = arena.take<uint8_t>(s.rows * s.keys);
    valid = arena.take<uint8_t>(s.rows * s.keys);
    if (sizeof(A) > 1) wide_levels = arena.take<A>(s.rows * s.keys);
    bias = arena.take<float>(s.keys);
    mask = arena.take<float>(s.keys);
    factor = arena.take<float>(s.rows);
    out = arena.take<int32_t>(s.rows * s.width);
    valid_out = arena.take<int32_t>(s.rows * s.width);
    row = arena.take<float>(s.width);
  }

  Arena arena;
  // of one head
  B *keys, *values;
  int32_t *key_init, *zeros, *value_sum;
  float *key_scale, *value_ratio;
  int8_t* value_rows;
  float value_top;
  // of one block of queries
  A* queries;
  int32_t* product;
  uint8_t *levels, *valid;
  A* wide_levels = nullptr;
  float *bias, *mask, *factor;
  int32_t *out, *valid_out;
  float* row;
};

class Attention {
 public:
  Attention(const QAttentionArgs& args, const Shape& shape, const FocusPlan& plan)
      : a(args),
        s(shape),
        plan(plan),
        track_valid(plan.focus.levels[0] != 0 || plan.focus.offset != 0.0),
        scratch(Workspace(shape, nullptr).arena.size()),
        w(shape, scratch.at<char>()) {
    std::memset(w.zeros, 0, static_cast<size_t>(s.width) * 4);
    // Rows behind the last query of a block are computed, never used.
    std::memset(w.queries, 0, static_cast<size_t>(s.rows * s.qk_steps * kStep) * sizeof(A));
    std::memset(w.levels, 0, static_cast<size_t>(s.rows * s.keys));
    std::memset(w.valid, 0, static_cast<size_t>(s.rows * s.keys));
  }

#if defined(__AMX_INT8__)
  ~Attention() { amx::release(); }
  Attention(const Attention&) = delete;
  Attention& operator=(const Attention&) = delete;
#endif

  void pack_head(int64_t b, int64_t h) {
    pack_keys([&](int64_t j) VITQ_LAMBDA { return a.k.row(b, h, j); }, a.nk, a.d, s.qk_steps, w.keys,
              w.key_init);
    own_scales = key_scales(a, b, h, s.keys, w.key_scale);
    pack_values(b, h);
  }

  // o of queries [first, first + n) of one head, written at columns h·d .. of out's rows to.token_row(slot +
  // i).
  void block(int64_t b, int64_t h, int64_t first, int64_t n, void* out, DType dtype, const RowMap& to,
             int64_t slot) {
    const int64_t query_width = s.qk_steps * kStep;
    for (int64_t i = 0; i < n; ++i)
      query_row(a.q.row(b, h, first + i), a.d, w.queries + i * query_width, query_width);
    const int64_t rows = round_up(n, kTileRows);
    multiply(w.queries, query_width, rows, w.keys, s.keys / kColumns, s.qk_steps, w.key_init, w.product,
             s.keys);
    bool all_valid = true;
    for (int64_t i = 0; i < n; ++i) all_valid &= focus(b, h, first + i, i);
    weighted_sum(w.levels, rows, w.out);
    const bool masked_offset = plan.focus.offset != 0.0 && !all_valid;
    if (masked_offset) {
      for (int64_t j = 0; j < rows * s.keys; ++j) w.valid[j] &= 1;
      weighted_sum(w.valid, rows, w.valid_out);
    }
    for (int64_t i = 0; i < n; ++i) {
      const int64_t row = to.token_row(slot + i);
      if (row < 0) continue;
      finish(w.out + i * s.width, masked_offset ? w.valid_out + i * s.width : w.value_sum, w.factor[i]);
      write_row(out, dtype, row * a.heads * a.d + h * a.d, w.row, a.d);
    }
  }

 private:
  // V' = rne(V·s_v/S), S the head's largest scale; one scale for all tokens leaves the codes alone.
  void pack_values(int64_t b, int64_t h) {
    float top = a.nk > 0 ? a.v_scale.at(b, h, 0) : 0.0f;
    if (a.v_scale.per_token()) {
      for (int64_t j = 0; j < a.nk; ++j) {
        const float scale = a.v_scale.at(b, h, j);
        if (scale > top || scale != scale) top = scale;
      }
      for (int64_t j = 0; j < a.nk; ++j) w.value_ratio[j] = a.v_scale.at(b, h, j) / top;
    }
    w.value_top = top;
    std::memset(w.value_sum, 0, static_cast<size_t>(s.width) * 4);
    for (int64_t step = 0; step < s.pv_steps; ++step) {
      const int8_t* rows[kStep];
      for (int t = 0; t < kStep; ++t) {
        const int64_t j = step * kStep + t;
        int8_t* copy = w.value_rows + t * s.width;
        const int8_t* v = j < a.nk ? a.v.row(b, h, j) : nullptr;
        rows[t] = copy;
        if (v == nullptr) {
          std::memset(copy, 0, static_cast<size_t>(s.width));
        } else if (a.v_scale.per_token()) {
          aligned_row(v, w.value_ratio[j], copy);
        } else if (a.d == s.width) {
          rows[t] = v;
        } else {
          padded_row(v, copy);
        }
        if (v != nullptr && plan.focus.offset != 0.0)
          for (int64_t c = 0; c < a.d; ++c) w.value_sum[c] += rows[t][c];
      }
      pack_value_step(rows, s.width, step, s.pv_steps, w.values);
    }
  }

  void padded_row(const int8_t* v, int8_t* out) const {
    std::memcpy(out, v, static_cast<size_t>(a.d));
    std::memset(out + a.d, 0, static_cast<size_t>(s.width - a.d));
  }

  void aligned_row(const int8_t* v, float ratio, int8_t* out) const {
    padded_row(v, out);
    const F r = set(ratio), low = set(-128.0f), high = set(127.0f);
    for (int64_t c = 0; c < s.width; c += kLanes) {
      F x = to_float(widen_int8(out + c)) * r;
      x = x == x ? x : F{};
      store_int8(out + c, round_to_int(min(max(x, low), high)));
    }
  }

  // Row i of the block (query `query`): levels and the factor of its output. False if a key does not count.
  bool focus(int64_t b, int64_t h, int64_t query, int64_t i) {
    uint8_t* levels = w.levels + i * s.keys;
    const RowScores row = row_scores(a, plan, b, h, query, w.product + i * s.keys, own_scales, s.keys,
                                     AdditiveRows{w.bias, w.mask});
    const RowResult result = focus_row(plan, row, levels, track_valid ? w.valid + i * s.keys : nullptr);
    const Focus& f = plan.focus;
    float denom = f.row_anchor ? result.sum : 1.0f;
    if (f.renormalize) {
      int32_t sum = 0;
      for (int64_t j = 0; j < s.keys; ++j) sum += levels[j];
      denom = static_cast<float>(sum) * static_cast<float>(f.step) +
              static_cast<float>(result.valid) * static_cast<float>(f.offset);
    }
    float factor = denom == 0.0f ? 0.0f : w.value_top / denom;
    if (result.sum != result.sum) factor = __builtin_nanf("");
    w.factor[i] = result.valid == 0 ? 0.0f : factor;
    return result.valid == a.nk;
  }

  void weighted_sum(const uint8_t* p, int64_t rows, int32_t* out) {
    const A* left;
    if constexpr (sizeof(A) == 1) {
      left = reinterpret_cast<const A*>(p);
    } else {
      for (int64_t j = 0; j < rows * s.keys; ++j) w.wide_levels[j] = p[j];
      left = w.wide_levels;
    }
    multiply(left, s.keys, rows, w.values, s.width / kColumns, s.pv_steps, w.zeros, out, s.width);
  }

  // w.row = (product·step + offset·Σ V')·factor.
  void finish(const int32_t* product, const int32_t* value_sum, float factor) {
    const F step = set(static_cast<float>(plan.focus.step)),
            offset = set(static_cast<float>(plan.focus.offset));
    const F f = set(factor);
    for (int64_t c = 0; c < s.width; c += kLanes) {
      F o = to_float(load(product + c)) * step;
      if (plan.focus.offset != 0.0) o = o + to_float(load(value_sum + c)) * offset;
      store(w.row + c, o * f);
    }
  }

  const QAttentionArgs& a;
  const Shape& s;
  const FocusPlan& plan;
  const bool track_valid;
  Scratch scratch;
  Workspace w;
  const float* own_scales = nullptr;  // the head's, or null where its keys share one
};

// Images [first, first + images) into `out`, whose slot 0 is query 0 of the first one and whose rows are
// those of the slots under `to`. Work is split over images, heads and blocks of queries in this order; a
// thread packs a head's keys and values once for all its blocks. finish(slot, n) is called once for every n
// slots that all heads have written, by the thread that wrote the last of them.
template <class Finish>
void run(const QAttentionArgs& args, const FocusPlan& plan, int64_t first, int64_t images, void* out,
         DType dtype, const RowMap& to, const Finish& finish) {
  const Shape shape(args);
  Scratch counters(static_cast<size_t>(images * shape.blocks) * sizeof(int64_t));
  int64_t* heads_done = counters.at<int64_t>();
  std::memset(heads_done, 0, static_cast<size_t>(images * shape.blocks) * sizeof(int64_t));
  pool_for(args.pool, images * args.heads * shape.blocks, 1, [&](int64_t begin, int64_t end) {
    Attention attention(args, shape, plan);
    int64_t packed = -1;
    for (int64_t unit = begin; unit < end; ++unit) {
      const int64_t head = unit / shape.blocks, block = unit % shape.blocks;
      const int64_t image = head / args.heads, h = head % args.heads;
      if (head != packed) attention.pack_head(first + image, h);
      packed = head;
      const int64_t query = block * shape.rows, n = smaller(shape.rows, args.nq - query);
      if (n <= 0) continue;
      attention.block(first + image, h, query, n, out, dtype, to, image * args.nq + query);
      int64_t* done = heads_done + image * shape.blocks + block;
      if (__atomic_add_fetch(done, 1, __ATOMIC_ACQ_REL) == args.heads) finish(image * args.nq + query, n);
    }
  });
}

}  // namespace
}  // namespace attention

void qattention(const QAttentionArgs& args, void* out, DType dtype) {
  attention::run(args, attention::FocusPlan(args.focus), 0, args.batch, out, dtype, args.scatter,
                 [](int64_t, int64_t) {});
}

void qattention_quantize(const QAttentionArgs& args, const QuantTail& tail) {
  // Dynamic scales, lora_down and the subspace need whole rows over all heads, so o exists in floats. A row
  // is quantized as soon as its last head is there, in the same parallel region: a second one would cost a
  // second barrier. The buffer is bounded by going through large batches in equal parts.
  constexpr int64_t kBytes = 16 << 20;
  const int64_t image_bytes = args.nq * tail.k * 4;
  const int64_t parts = smaller(args.batch, ceil_div(args.batch * image_bytes + 1, kBytes));
  const int64_t images = ceil_div(args.batch, parts);
  Scratch rows(static_cast<size_t>(images * image_bytes));
  float* x = rows.at<float>();
  const attention::FocusPlan plan(args.focus);
  for (int64_t b = 0; b < args.batch; b += images) {
    // In runs of slots whose rows follow one another.
    const auto quantize_slots = [&](int64_t slot, int64_t n) {
      const int64_t end = slot + n;
      while (slot < end) {
        const int64_t row = args.scatter.token_row(b * args.nq + slot);
        int64_t run = 1;
        while (row >= 0 && slot + run < end && args.scatter.token_row(b * args.nq + slot + run) == row + run)
          ++run;
        float* in = x + slot * tail.k;
        if (row >= 0) quantize_rows(tail, in, in, tail.k, row, run);
        slot += run;
      }
    };
    attention::run(args, plan, b, smaller(images, args.batch - b), x, DType::f32, RowMap{}, quantize_slots);
  }
}

}  // namespace vitq::VITQ_ISA
