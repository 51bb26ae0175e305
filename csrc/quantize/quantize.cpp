// vitq::quantize and vitq::layer_norm_quantize on CPU tensors.
#include "glue.h"
#include "quantize/quantize_cpu.h"

namespace vitq::glue {
namespace {

QuantizedTensors quantize(const Tensor& x, OptTensor q_scale, int64_t q_zero_point, int64_t qmin,
                          int64_t qmax, int64_t groups, OptTensor row_qmax, OptTensor q_lut,
                          OptTensor lora_down, bool subspace) {
  const int64_t k = last_dim(x, "x"), m = row_count(x);
  const Tensor input = dense(x);
  QuantTensors quant(shape_with_last(x, k), m, q_scale, q_zero_point, qmin, qmax, groups, row_qmax, q_lut,
                     lora_down, subspace);
  const QuantizeArgs args{any_float(input, m * k, "x"), m, quant.tail, pool()};
  if (m > 0) VITQ_DISPATCH(quantize)(args);
  return quant.results();
}

QuantizedTensors layer_norm_quantize(const Tensor& x, OptTensor weight, OptTensor bias, double eps,
                                     OptTensor q_scale, int64_t q_zero_point, int64_t qmin, int64_t qmax,
                                     int64_t groups, OptTensor row_qmax, OptTensor q_lut, OptTensor lora_down,
                                     bool subspace, OptTensor gather, int64_t tokens) {
  const int64_t k = last_dim(x, "x"), rows = row_count(x);
  STD_TORCH_CHECK(k > 0, "x has ", k, " columns, expected at least 1");
  const Tensor input = dense(x);
  const Held gamma(weight), beta(bias), map(gather);
  auto shape = shape_with_last(x, k);
  int64_t m = rows;
  if (gather) {
    STD_TORCH_CHECK(x.dim() > 1 && rows == x.size(0) * tokens, "x has ", rows, " rows, expected images of ",
                    tokens, " tokens");
    shape = {x.size(0), gather->numel(), k};
    m = shape[0] * shape[1];
  }
  QuantTensors quant(shape, m, q_scale, q_zero_point, qmin, qmax, groups, row_qmax, q_lut, lora_down,
                     subspace);
  const LayerNormQuantizeArgs args{any_float(input, rows * k, "x"),
                                   gamma.any_float(k, "weight"),
                                   beta.any_float(k, "bias"),
                                   eps,
                                   m,
                                   row_map(map, gather ? gather->numel() : 0, tokens, "gather"),
                                   quant.tail,
                                   pool()};
  if (m > 0) VITQ_DISPATCH(layer_norm_quantize)(args);
  return quant.results();
}

}  // namespace
}  // namespace vitq::glue

STABLE_TORCH_LIBRARY_IMPL(vitq, CPU, m) {
  m.impl("quantize", TORCH_BOX(&vitq::glue::quantize));
  m.impl("layer_norm_quantize", TORCH_BOX(&vitq::glue::layer_norm_quantize));
}
