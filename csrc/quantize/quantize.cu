// vitq_cuda::quantize and layer_norm_quantize.
#include "quantize/quantize_gpu.h"
#include "quantize/quantize_sm80.cuh"

namespace vitq::glue {
namespace {

using gpu::Branch;

// Rows of x [.., K] to q [M, K], scales [groups] or [M, groups], t [M, rank]: a block for each 16 of them.
template <class Kernel>
void start(const Launcher& launcher, const gpu::QuantizeParams& p) {
  launcher.run<Kernel>("quantize", ceil_div(p.m, Kernel::kRows), 1, Kernel::shared_bytes(p), p);
}

// Whole rows where a block's registers hold them: 64 values a thread of 256 up to K = 1024, two blocks on a
// processor; 128 values a thread of 384 up to K = 3072. Longer rows, and those of a float32 branch, which is
// not there for speed, go in chunks. Blocks have 16 rows however few there are: what a branch multiplies.
template <Branch kBranch>
void choose(const Launcher& launcher, const gpu::QuantizeParams& p, bool aligned) {
  using gpu::Quantize;
  if (!aligned) return start<Quantize<kBranch, 8, 1, false, false>>(launcher, p);
  if constexpr (kBranch != Branch::f32) {
    using Short = Quantize<kBranch, 8, 2, true, true>;
    using Long = Quantize<kBranch, 12, 4, true, true>;
    if (p.k <= Short::kColumns) return start<Short>(launcher, p);
    if (p.k <= Long::kColumns) return start<Long>(launcher, p);
  }
  start<Quantize<kBranch, 8, 1, false, true>>(launcher, p);
}

bool starts_aligned(const AnyFloat& x) { return reinterpret_cast<uintptr_t>(x.data) % 16 == 0; }

// Rows of `x` where two strides describe them and columns are consecutive; else `held` is a dense copy.
FloatRows rows_of(const Tensor& x, std::optional<Tensor>& held) {
  struct Dim {
    int64_t size, stride;
  };
  const int64_t last = x.dim() - 1;
  std::vector<Dim> dims;
  for (int64_t i = 0; i < last; ++i) {
    const Dim dim{x.size(i), x.stride(i)};
    if (dim.size == 1) continue;
    if (!dims.empty() && dims.back().stride == dim.size * dim.stride) {
      dims.back() = {dims.back().size * dim.size, dim.stride};
    } else {
      dims.push_back(dim);
    }
  }
  const bool rows = dims.size() <= 2 && (x.size(last) == 1 || x.stride(last) == 1);
  held = rows ? x : torch::stable::contiguous(x);
  check(*held, x.scalar_type(), x.numel(), "x");
  const AnyFloat data{held->const_data_ptr(), dtype_of(x.scalar_type(), "x")};
  if (!rows || dims.empty()) return {data, x.size(last)};
  if (dims.size() == 1) return {data, dims[0].stride};
  return {data, dims[1].stride, dims[1].size, dims[0].stride};
}

}  // namespace

void quantize_rows(const Launcher& launcher, const FloatRows& x, const std::optional<LayerNorm>& norm,
                   int64_t m, const QuantTensors& quant, const RowMap& gather) {
  const QuantTail& tail = quant.tail;
  STD_TORCH_CHECK(std::max({m, tail.k, tail.rank}) < int64_t{1} << 31, "M, K, R are ", m, ", ", tail.k, ", ",
                  tail.rank, ", expected less than 2^31");
  if (m == 0) return;
  gpu::QuantizeParams p{};
  p.x = x.data;
  p.inner = static_cast<int>(x.inner);
  p.outer_stride = x.outer_stride;
  p.row_stride = x.row_stride;
  p.gather = gather;
  p.norm = norm.has_value();
  if (norm) {
    p.weight = norm->weight;
    p.bias = norm->bias;
    p.eps = static_cast<float>(norm->eps);
  }
  p.m = static_cast<int>(m);
  p.k = static_cast<int>(tail.k);
  p.codes = codes_of(tail);
  p.lora_down = quant.down;
  p.rank = static_cast<int>(tail.rank);
  p.subspace = tail.subspace;
  p.t = tail.t;
  const int64_t step = 16 / size_of(x.data.dtype);
  const bool aligned = p.k % 16 == 0 && (p.codes.groups == 1 || p.codes.width % 16 == 0) &&
                       x.row_stride % step == 0 && x.outer_stride % step == 0 && starts_aligned(x.data) &&
                       starts_aligned(p.weight) && starts_aligned(p.bias) && starts_aligned(p.lora_down);
  if (p.rank == 0) return choose<Branch::none>(launcher, p, aligned);
  switch (p.lora_down.dtype) {
    case DType::f32:
      return choose<Branch::f32>(launcher, p, aligned);
    case DType::f16:
      return choose<Branch::f16>(launcher, p, aligned);
    case DType::bf16:
      return choose<Branch::bf16>(launcher, p, aligned);
  }
}

namespace {

QuantizedTensors quantize(const Tensor& x, OptTensor q_scale, int64_t q_zero_point, int64_t qmin,
                          int64_t qmax, int64_t groups, OptTensor row_qmax, OptTensor q_lut,
                          OptTensor lora_down, bool subspace) {
  const Launcher launcher(x);
  const int64_t k = last_dim(x, "x"), m = row_count(x);
  std::optional<Tensor> held;
  const FloatRows rows = rows_of(x, held);
  const QuantTensors quant(shape_with_last(x, k), m, q_scale, q_zero_point, qmin, qmax, groups, row_qmax,
                           q_lut, lora_down, subspace);
  quantize_rows(launcher, rows, {}, m, quant);
  return quant.results();
}

QuantizedTensors layer_norm_quantize(const Tensor& x, OptTensor weight, OptTensor bias, double eps,
                                     OptTensor q_scale, int64_t q_zero_point, int64_t qmin, int64_t qmax,
                                     int64_t groups, OptTensor row_qmax, OptTensor q_lut, OptTensor lora_down,
                                     bool subspace, OptTensor gather, int64_t tokens) {
  const Launcher launcher(x);
  const int64_t k = last_dim(x, "x"), count = row_count(x);
  STD_TORCH_CHECK(k > 0, "x has ", k, " columns, expected at least 1");
  STD_TORCH_CHECK(count < int64_t{1} << 31, "x has ", count, " rows, expected less than 2^31");
  std::optional<Tensor> held;
  const FloatRows rows = rows_of(x, held);
  const Held gamma(weight), beta(bias), map(gather);
  auto shape = shape_with_last(x, k);
  int64_t m = count;
  if (gather) {
    STD_TORCH_CHECK(x.dim() > 1 && count == x.size(0) * tokens, "x has ", count, " rows, expected images of ",
                    tokens, " tokens");
    shape = {x.size(0), gather->numel(), k};
    m = shape[0] * shape[1];
  }
  const QuantTensors quant(shape, m, q_scale, q_zero_point, qmin, qmax, groups, row_qmax, q_lut, lora_down,
                           subspace);
  const LayerNorm norm{gamma.any_float(k, "weight"), beta.any_float(k, "bias"), eps};
  quantize_rows(launcher, rows, norm, m, quant, row_map(map, gather ? gather->numel() : 0, tokens, "gather"));
  return quant.results();
}

}  // namespace
}  // namespace vitq::glue

VITQ_GPU_LIBRARY(m) {
  m.impl("quantize", TORCH_BOX(&vitq::glue::quantize));
  m.impl("layer_norm_quantize", TORCH_BOX(&vitq::glue::layer_norm_quantize));
}
