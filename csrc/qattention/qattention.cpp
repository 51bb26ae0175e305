// vitq::qattention and vitq::qattention_quantize on CPU tensors.
#include "attention_glue.h"
#include "glue.h"

namespace vitq::glue {
namespace {

struct Attention : AttentionTensors {
  Attention(const Tensor& q, const Tensor& k, const Tensor& v, const Tensor& q_scale, const Tensor& k_scale,
            const Tensor& v_scale, double softmax_scale, const Tensor& levels, double step, double offset,
            double b1, double b2, double power, bool row_anchor, bool renormalize, const OptTensor& bias,
            const OptTensor& mask, const OptTensor& scatter, int64_t tokens)
      : AttentionTensors(q, k, v, q_scale, k_scale, v_scale, softmax_scale, bias, mask, scatter, tokens) {
    args.focus = focus_of(levels, step, offset, b1, b2, power, row_anchor, renormalize);
    args.pool = pool();
  }
};

Tensor qattention(const Tensor& q, const Tensor& k, const Tensor& v, const Tensor& q_scale,
                  const Tensor& k_scale, const Tensor& v_scale, double softmax_scale, const Tensor& levels,
                  double step, double offset, double b1, double b2, double power, bool row_anchor,
                  bool renormalize, OptTensor bias, OptTensor mask, OptTensor scatter, int64_t tokens,
                  ScalarType out_dtype) {
  const Attention attention(q, k, v, q_scale, k_scale, v_scale, softmax_scale, levels, step, offset, b1, b2,
                            power, row_anchor, renormalize, bias, mask, scatter, tokens);
  const DType dtype = dtype_of(out_dtype, "out_dtype");
  Tensor out = new_tensor(attention.out_shape(), out_dtype);
  if (!attention.empty()) VITQ_DISPATCH(qattention)(attention.args, out.mutable_data_ptr(), dtype);
  return out;
}

QuantizedTensors qattention_quantize(const Tensor& q, const Tensor& k, const Tensor& v, const Tensor& q_scale,
                                     const Tensor& k_scale, const Tensor& v_scale, double softmax_scale,
                                     const Tensor& levels, double step, double offset, double b1, double b2,
                                     double power, bool row_anchor, bool renormalize, OptTensor bias,
                                     OptTensor mask, OptTensor scatter, int64_t tokens, OptTensor scale,
                                     int64_t zero_point, int64_t qmin, int64_t qmax, int64_t groups,
                                     OptTensor row_qmax, OptTensor lut, OptTensor lora_down, bool subspace) {
  const Attention attention(q, k, v, q_scale, k_scale, v_scale, softmax_scale, levels, step, offset, b1, b2,
                            power, row_anchor, renormalize, bias, mask, scatter, tokens);
  const auto shape = attention.out_shape();
  QuantTensors quant(shape, shape[0] * shape[1], scale, zero_point, qmin, qmax, groups, row_qmax, lut,
                     lora_down, subspace);
  if (shape[0] * shape[1] > 0) VITQ_DISPATCH(qattention_quantize)(attention.args, quant.tail);
  return quant.results();
}

}  // namespace
}  // namespace vitq::glue

STABLE_TORCH_LIBRARY_IMPL(vitq, CPU, m) {
  m.impl("qattention", TORCH_BOX(&vitq::glue::qattention));
  m.impl("qattention_quantize", TORCH_BOX(&vitq::glue::qattention_quantize));
}
