// vitq_cuda::qlinear, qlinear_quantize, qlinear_norm_quantize and qlinear_weight_only.
#include "common/gpu/arrivals.cuh"
#include "gpu_glue.h"
#include "qlinear/qlinear_sm80.cuh"
#include "qlinear/qlinear_sm90.cuh"
#include "qlinear/tail_glue.h"
#include "qlinear/weight_only_sm80.cuh"
#include "quantize/quantize_gpu.h"

namespace vitq::glue {
namespace {

using gpu::Product;

// Of packing.LAYOUTS.
constexpr int64_t kInt8 = 0, kInt4 = 4, kInt4ByInt4 = 5;

// Tiles. A block of 128x128 reads half the operands for a product that one of 64x64 does; its three stages of
// 32 KiB, or four of 24 where the weight has nibbles, are the 99 KiB that a block may have on sm_86 and
// sm_89. A warp's share is 64x32, or 32x32 of a small tile: two small blocks fit on a processor.
template <Product kProduct>
using Large = gpu::QLinear<kProduct, 128, 128, 2, 4, kProduct == Product::s8 ? 3 : 4, true>;
template <Product kProduct, bool kAligned>
using Small = gpu::QLinear<kProduct, 64, 64, 2, 2, 4, kAligned>;

// How K is cut among blocks: as often as there are processors to spare; each with the steps of 128 that fill
// a pipeline of four stages; at most 8 times, since the last block of a tile to come reads what all others
// have left.
int64_t splits_of(int64_t tiles, int64_t steps, int processors) {
  const int64_t spare = tiles > 0 ? processors / tiles : 1;
  return std::max<int64_t>(1, std::min({spare, steps / 4, int64_t{8}}));
}

// Kept from call to call, as the counters are.
gpu::Arrivals& arrivals() {
  static gpu::Arrivals all;
  return all;
}

// x [M, K] by weight [N, weight_row bytes] to out [M, N]: a block for each tile and share of K. partial:
// [tiles, splits, threads, accumulators] int32, counters [tiles]: see gather() of the kernel.
template <class Kernel>
void start(const Launcher& launcher, gpu::LinearParams& p) {
  const int64_t tiles = ceil_div(p.m, Kernel::kBlockRows) * ceil_div(p.n, Kernel::kBlockColumns);
  const int64_t splits = splits_of(tiles, ceil_div(p.k, Kernel::kBlockK), launcher.processors);
  std::optional<Tensor> partial, counters;
  if (splits > 1) {
    partial = new_tensor({tiles, splits, Kernel::kThreads, Kernel::kAccumulators}, ScalarType::Int);
    p.partial = static_cast<int32_t*>(partial->mutable_data_ptr());
    p.arrivals =
        arrivals().take(launcher.device, launcher.stream, launcher.captured(), static_cast<int>(tiles));
    if (p.arrivals < 0) {
      counters = new_tensor({tiles}, ScalarType::Int);
      torch::stable::zero_(*counters);
      p.counters = static_cast<unsigned*>(counters->mutable_data_ptr());
    }
  }
  launcher.run<Kernel>("qlinear", tiles, splits, Kernel::kShared, p);
}

bool at_16_bytes(const void* p) { return reinterpret_cast<uintptr_t>(p) % 16 == 0; }

// As above, without shares: as many blocks as processors, which take tile after tile. Boxes of the copy
// engine: kBlockM rows of kSpanX codes of x, kBlockN rows of kSpanW bytes of the weight and of kSpanBranch
// bytes of lora_up [N, rank].
template <Product kProduct, int kTeam>
void start_sm90(const Launcher& launcher, const gpu::LinearParams& p) {
  using Kernel = gpu::QLinearSm90<kProduct, kTeam>;
  typename Kernel::Params params{};
  params.linear = p;
  const auto describe = [](gpu::TensorMap& map, const void* data, int64_t row_bytes, int64_t rows,
                           int64_t box_rows, int span) {
    const char* error =
        gpu::describe_rows(&map, data, row_bytes, rows, row_bytes, span, static_cast<int>(box_rows), span);
    STD_TORCH_CHECK(error == nullptr, "qlinear does not launch: ", error);
  };
  describe(params.x, p.x, p.k, p.m, Kernel::kBlockM, Kernel::kSpanX);
  describe(params.weight, p.weight, p.weight_row, p.n, Kernel::kBlockN, Kernel::kSpanW);
  if (p.rank > 0 && p.lora_up.dtype != DType::f32) {
    params.chunks = static_cast<int>(ceil_div(p.rank, Kernel::kRanks));
    describe(params.lora_up, p.lora_up.data, int64_t{p.rank} * 2, p.n, Kernel::kBlockN, Kernel::kSpanBranch);
  }
  const int64_t rows = ceil_div(p.m, Kernel::kBlockM), tiles = rows * ceil_div(p.n, Kernel::kBlockN);
  STD_TORCH_CHECK(tiles < int64_t{1} << 30, "qlinear has ", tiles,
                  " tiles, expected fewer than 2^30: split the batch");
  params.rows = static_cast<int>(rows);
  params.tiles = static_cast<int>(tiles);
  params.steps = static_cast<int>(ceil_div(p.k, Kernel::kBlockK));
  launcher.run<Kernel>("qlinear", std::min<int64_t>(tiles, launcher.processors), 1, Kernel::kShared, params);
}

// True if sm_90a's kernel serves the call. It does where tiles of 128x128 fill the processors (below that,
// the smaller tiles and splits of K of sm_80's keep more of them busy) and rows start where the copy engine
// can.
//
// From K 2048 on both consumers share tiles of 256 rows, which read a quarter less through L2 for a product;
// below, the epilogue takes as long as the products and hides behind those of the other's tile. Not measured.
template <Product kProduct>
bool started_sm90(const Launcher& launcher, const gpu::LinearParams& p) {
#if defined(VITQ_HAS_SM90A)
  const bool branch = p.rank > 0 && p.lora_up.dtype != DType::f32;
  const auto tiles = [&p](int rows) { return ceil_div(p.m, rows) * ceil_div(p.n, 128); };
  if (launcher.capability != 90 || p.k == 0 || tiles(128) < launcher.processors) return false;
  if (p.k % 16 != 0 || !at_16_bytes(p.x) || !at_16_bytes(p.weight)) return false;
  if (branch && (p.rank % 8 != 0 || !at_16_bytes(p.lora_t) || !at_16_bytes(p.lora_up.data))) return false;
  if (p.k >= 2048 && tiles(256) >= launcher.processors) {
    start_sm90<kProduct, 2>(launcher, p);
  } else {
    start_sm90<kProduct, 1>(launcher, p);
  }
  return true;
#else
  return false;
#endif
}

template <Product kProduct>
void choose(const Launcher& launcher, gpu::LinearParams& p, bool aligned, bool large) {
  // Widened to int8: sm_90 has no int4 products.
  if (started_sm90<kProduct == Product::s4 ? Product::w4 : kProduct>(launcher, p)) return;
  if (large) return start<Large<kProduct>>(launcher, p);
  if (aligned) return start<Small<kProduct, true>>(launcher, p);
  start<Small<kProduct, false>>(launcher, p);
}

// What every call has: a weight, an epilogue, and the tensors they point into.
struct Layer {
  Launcher launcher;
  Tensor x, weight, w_scale;
  Held w_lut;
  TailTensors tensors;
  gpu::LinearParams p{};

  Layer(const Tensor& x_, const OptTensor& lora_t, const Tensor& weight_, int64_t layout, int64_t n,
        int64_t k, const OptTensor& w_lut_, const Tensor& w_scale_, const OptTensor& bias,
        const OptTensor& lora_up, int64_t activation, const OptTensor& layer_scale, const OptTensor& residual)
      : launcher(x_),
        x(dense(x_)),
        // int8 ones are read byte by byte if need be.
        weight(layout == kInt8 ? dense(weight_) : starting_at(16, dense(weight_))),
        w_scale(dense(w_scale_)),
        w_lut(w_lut_ ? OptTensor(starting_at(4, dense(*w_lut_))) : w_lut_),
        tensors(row_count(x_), n, lora_t, bias, lora_up, activation, layer_scale, residual) {
    const int64_t m = row_count(x);
    STD_TORCH_CHECK(layout == kInt8 || layout == kInt4 || layout == kInt4ByInt4, "layout is ", layout,
                    ", expected int8 (0), int4_k64x2 (4) or int4_k64x2_s4 (5) on CUDA");
    STD_TORCH_CHECK(std::max({m, n, k}) < int64_t{1} << 31, "M, N, K are ", m, ", ", n, ", ", k,
                    ", expected less than 2^31");
    STD_TORCH_CHECK(x.numel() == m * k, "x has ", x.numel(), " elements, expected ", m * k);
    check(w_scale, ScalarType::Float, n, "w_scale");
    const int64_t row = layout == kInt8 ? k : ceil_div(k, 128) * 64;
    check(weight, layout == kInt8 ? ScalarType::Char : ScalarType::Byte, n * row, "weight");
    p.weight = static_cast<const uint8_t*>(weight.const_data_ptr());
    p.weight_row = row;
    p.lut = w_lut.data<int8_t>(ScalarType::Char, 16, "w_lut");
    p.w_scale = static_cast<const float*>(w_scale.const_data_ptr());
    const LinearTail& tail = tensors.tail;
    p.lora_t = tail.lora_t;
    p.lora_up = tail.lora_up;
    p.rank = static_cast<int>(tail.rank);
    p.bias = tail.bias;
    p.layer_scale = tail.layer_scale;
    p.residual = tail.residual;
    p.activation = static_cast<int>(tail.activation);
    p.m = static_cast<int>(m);
    p.n = static_cast<int>(n);
    p.k = static_cast<int>(k);
  }

  // Whether rows of x and of the weight start at multiples of 16 bytes.
  bool aligned(int64_t x_bytes) const {
    return p.k * x_bytes % 16 == 0 && p.weight_row % 16 == 0 && at_16_bytes(x.const_data_ptr()) &&
           at_16_bytes(p.weight);
  }
};

// An integer product.
struct Call : Layer {
  Tensor x_scale, col_sum;
  Product product = Product::s8;
  bool large = false;

  Call(const Tensor& x_, const Tensor& x_scale_, int64_t x_zero_point, const OptTensor& lora_t,
       const Tensor& weight_, int64_t layout, int64_t n, int64_t k, const Tensor& col_sum_,
       const OptTensor& w_lut_, const Tensor& w_scale_, const OptTensor& bias, const OptTensor& lora_up,
       int64_t activation, const OptTensor& layer_scale, const OptTensor& residual)
      : Layer(x_, lora_t, weight_, layout, n, k, w_lut_, w_scale_, bias, lora_up, activation, layer_scale,
              residual),
        x_scale(dense(x_scale_)),
        col_sum(dense(col_sum_)) {
    const int64_t m = p.m;
    check(x, ScalarType::Char, m * k, "x");
    const bool per_row = x_scale.numel() != 1;
    check(x_scale, ScalarType::Float, per_row ? m : 1, "x_scale");
    check(col_sum, ScalarType::Int, n, "col_sum");
    STD_TORCH_CHECK(x_zero_point >= -128 && x_zero_point <= 127, "x_zero_point is ", x_zero_point,
                    ", expected an int in [-128, 127]");
    STD_TORCH_CHECK(!w_lut || layout != kInt4ByInt4,
                    "w_lut is given, expected uniform int4 weights of int4 products");
    product = layout == kInt8         ? Product::s8
              : layout == kInt4ByInt4 ? Product::s4
              : w_lut                 ? Product::w4_table
                                      : Product::w4;
    p.x = static_cast<const int8_t*>(x.const_data_ptr());
    p.x_scale = static_cast<const float*>(x_scale.const_data_ptr());
    p.x_scale_stride = per_row ? 1 : 0;
    p.x_zero_point = static_cast<int>(x_zero_point);
    p.col_sum = static_cast<const int32_t*>(col_sum.const_data_ptr());
    // Where they fill the processors. Rows that start anywhere, as those of a patch of 14x14, are copied byte
    // by byte: they are too few layers for large tiles of their own.
    large = aligned(1) && ceil_div(m, 128) * ceil_div(n, 128) >= launcher.processors;
  }

  // The result as floats, [..., N] as x is [..., K].
  Tensor floats(ScalarType dtype) {
    p.out_dtype = dtype_of(dtype, "out_dtype");
    const Tensor out = new_tensor(shape_with_last(x, p.n), dtype);
    p.out = out.mutable_data_ptr();
    if (out.numel() > 0) run();
    return out;
  }

  int64_t column_tiles() const { return ceil_div(p.n, large ? 128 : 64); }

  void run() {
    switch (product) {
      case Product::s8:
        return choose<Product::s8>(launcher, p, aligned(1), large);
      case Product::w4:
        return choose<Product::w4>(launcher, p, aligned(1), large);
      case Product::w4_table:
        return choose<Product::w4_table>(launcher, p, aligned(1), large);
      case Product::s4:
        return choose<Product::s4>(launcher, p, aligned(1), large);
    }
  }
};

Tensor qlinear(const Tensor& x, const Tensor& x_scale, int64_t x_zero_point, OptTensor lora_t,
               const Tensor& weight, int64_t layout, int64_t n, int64_t k, const Tensor& col_sum,
               OptTensor w_lut, const Tensor& w_scale, OptTensor bias, OptTensor lora_up, int64_t activation,
               OptTensor layer_scale, OptTensor residual, ScalarType out_dtype) {
  Call call(x, x_scale, x_zero_point, lora_t, weight, layout, n, k, col_sum, w_lut, w_scale, bias, lora_up,
            activation, layer_scale, residual);
  return call.floats(out_dtype);
}

// How a tile of the product can turn its own result into codes: not at all, any tile, or one of 128 columns
// only. Dynamic scales need their group of columns inside the tile, as whole lanes of a row's warp; a branch
// that is taken out before quantizing needs the whole row; a float32 lora_down has no matrix instruction.
enum class InTile { no, any, wide };

InTile in_tile(const QuantTail& q, const AnyFloat& down) {
  if (q.subspace || (down && down.dtype == DType::f32)) return InTile::no;
  if (q.scale != nullptr) return InTile::any;
  const int64_t width = q.k / q.groups;
  if (q.groups == 1 && q.k <= 128) return q.k <= 64 ? InTile::any : InTile::wide;
  if ((width & (width - 1)) != 0 || width < 4 || width > 128) return InTile::no;
  return width <= 64 ? InTile::any : InTile::wide;
}

QuantizedTensors qlinear_quantize(const Tensor& x, const Tensor& x_scale, int64_t x_zero_point,
                                  OptTensor lora_t, const Tensor& weight, int64_t layout, int64_t n,
                                  int64_t k, const Tensor& col_sum, OptTensor w_lut, const Tensor& w_scale,
                                  OptTensor bias, OptTensor lora_up, int64_t activation,
                                  OptTensor layer_scale, OptTensor residual, OptTensor q_scale,
                                  int64_t q_zero_point, int64_t qmin, int64_t qmax, int64_t groups,
                                  OptTensor row_qmax, OptTensor q_lut, OptTensor lora_down, bool subspace) {
  Call call(x, x_scale, x_zero_point, lora_t, weight, layout, n, k, col_sum, w_lut, w_scale, bias, lora_up,
            activation, layer_scale, residual);
  QuantTensors quant(shape_with_last(x, n), call.p.m, q_scale, q_zero_point, qmin, qmax, groups, row_qmax,
                     q_lut, lora_down, subspace);
  if (call.p.m == 0) return quant.results();
  const InTile how = n == 0 ? InTile::no : in_tile(quant.tail, quant.down);
  if (how == InTile::no || (how == InTile::wide && !call.aligned(1))) {
    const Tensor y = call.floats(ScalarType::Float);
    quantize_rows(call.launcher, {any_float(y, y.numel(), "y"), n}, {}, call.p.m, quant);
    return quant.results();
  }
  call.p.codes = codes_of(quant.tail);
  call.large |= how == InTile::wide;
  const int64_t count = int64_t{call.p.m} * quant.tail.rank, parts = call.column_tiles();
  std::optional<Tensor> shares;  // one column tile's is t itself
  if (count > 0) {
    if (parts > 1) shares = new_tensor({parts, count}, ScalarType::Float);
    call.p.lora_down = quant.down;
    call.p.rank_down = static_cast<int>(quant.tail.rank);
    call.p.shares = shares ? static_cast<float*>(shares->mutable_data_ptr()) : quant.tail.t;
  }
  call.run();
  if (shares) {
    const gpu::AddShares::Params sum{call.p.shares, quant.tail.t, count, static_cast<int>(parts)};
    call.launcher.run<gpu::AddShares>("qlinear_quantize", ceil_div(count, gpu::AddShares::kThreads), 1, 0,
                                      sum);
  }
  return quant.results();
}

// Two launches: a LayerNorm needs whole rows.
std::tuple<Tensor, Tensor, Tensor, Tensor> qlinear_norm_quantize(
    const Tensor& x, const Tensor& x_scale, int64_t x_zero_point, OptTensor lora_t, const Tensor& weight,
    int64_t layout, int64_t n, int64_t k, const Tensor& col_sum, OptTensor w_lut, const Tensor& w_scale,
    OptTensor bias, OptTensor lora_up, int64_t activation, OptTensor layer_scale, OptTensor residual,
    ScalarType out_dtype, OptTensor norm_weight, OptTensor norm_bias, double eps, OptTensor q_scale,
    int64_t q_zero_point, int64_t qmin, int64_t qmax, int64_t groups, OptTensor row_qmax, OptTensor q_lut,
    OptTensor lora_down, bool subspace) {
  STD_TORCH_CHECK(n > 0, "n is 0, expected at least 1 in front of a LayerNorm");
  Call call(x, x_scale, x_zero_point, lora_t, weight, layout, n, k, col_sum, w_lut, w_scale, bias, lora_up,
            activation, layer_scale, residual);
  const QuantTensors quant(shape_with_last(x, n), call.p.m, q_scale, q_zero_point, qmin, qmax, groups,
                           row_qmax, q_lut, lora_down, subspace);
  const Tensor y = call.floats(out_dtype);
  const Held gamma(norm_weight), beta(norm_bias);
  const LayerNorm norm{gamma.any_float(n, "norm_weight"), beta.any_float(n, "norm_bias"), eps};
  quantize_rows(call.launcher, {any_float(y, y.numel(), "y"), n}, norm, call.p.m, quant);
  return {y, quant.q, quant.out_scale, quant.t};
}

// x [M, K] floats. One tile size and no split of K: a layer comes here because its activations stay floats,
// its few rows are limited by the bytes of the weight, which 64 rows read once.
template <DType kType>
void start_weight_only(const Layer& layer, bool nibbles) {
  using Kernel = gpu::WeightOnly<kType>;
  const typename Kernel::Params params{
      layer.p, {layer.x.const_data_ptr(), kType}, nibbles, layer.aligned(size_of(kType))};
  const int64_t tiles = ceil_div(layer.p.m, Kernel::kBlock) * ceil_div(layer.p.n, Kernel::kBlock);
  layer.launcher.run<Kernel>("qlinear_weight_only", tiles, 1, Kernel::kShared, params);
}

Tensor qlinear_weight_only(const Tensor& x, OptTensor lora_t, const Tensor& weight, int64_t layout, int64_t n,
                           int64_t k, OptTensor w_lut, const Tensor& w_scale, OptTensor bias,
                           OptTensor lora_up, int64_t activation, OptTensor layer_scale, OptTensor residual,
                           ScalarType out_dtype) {
  Layer layer(x, lora_t, weight, layout, n, k, w_lut, w_scale, bias, lora_up, activation, layer_scale,
              residual);
  const DType type = dtype_of(x.scalar_type(), "x");
  check(layer.x, x.scalar_type(), int64_t{layer.p.m} * k, "x");
  layer.p.out_dtype = dtype_of(out_dtype, "out_dtype");
  const Tensor out = new_tensor(shape_with_last(x, n), out_dtype);
  layer.p.out = out.mutable_data_ptr();
  if (out.numel() == 0) return out;
  const bool nibbles = layout != kInt8;
  if (type == DType::f32) start_weight_only<DType::f32>(layer, nibbles);
  if (type == DType::f16) start_weight_only<DType::f16>(layer, nibbles);
  if (type == DType::bf16) start_weight_only<DType::bf16>(layer, nibbles);
  return out;
}

}  // namespace
}  // namespace vitq::glue

VITQ_GPU_LIBRARY(m) {
  m.impl("qlinear", TORCH_BOX(&vitq::glue::qlinear));
  m.impl("qlinear_quantize", TORCH_BOX(&vitq::glue::qlinear_quantize));
  m.impl("qlinear_weight_only", TORCH_BOX(&vitq::glue::qlinear_weight_only));
  m.impl("qlinear_norm_quantize", TORCH_BOX(&vitq::glue::qlinear_norm_quantize));
}
