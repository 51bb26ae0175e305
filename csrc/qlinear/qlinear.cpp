// vitq::qlinear, qlinear_quantize and qlinear_weight_only on CPU tensors.
#include "glue.h"
#include "qlinear/tail_glue.h"

namespace vitq::glue {
namespace {

Weight weight_of(const Tensor& data, int64_t layout, int64_t n, int64_t k, const Held& lut,
                 const Tensor& w_scale) {
  const bool int8 = layout == static_cast<int64_t>(Layout::int8_n16k4);
  STD_TORCH_CHECK(int8 || layout == static_cast<int64_t>(Layout::int4_n16k4), "layout is ", layout,
                  ", expected int8_n16k4 (2) or int4_n16k4 (3) on the CPU");
  STD_TORCH_CHECK(n >= 0 && k >= 0, "(n, k) is (", n, ", ", k, "), expected sizes");
  STD_TORCH_CHECK(data.is_contiguous(), "weight is not contiguous");
  const int64_t blocks = ceil_div(n, kBlockN) * (int8 ? ceil_div(k, kBlockK) : ceil_div(k, 2 * kBlockK));
  check(data, int8 ? ScalarType::Char : ScalarType::Byte, blocks * kBlockBytes, "weight");
  check(w_scale, ScalarType::Float, n, "w_scale");
  Weight w{};
  w.data = static_cast<const uint8_t*>(data.const_data_ptr());
  w.layout = static_cast<Layout>(layout);
  w.n = n;
  w.k = k;
  w.lut = lut.data<int8_t>(ScalarType::Char, 16, "w_lut");
  w.w_scale = static_cast<const float*>(w_scale.const_data_ptr());
  return w;
}

// One call's arguments and the tensors they point into.
struct Call {
  Tensor x, x_scale, weight, col_sum, w_scale;
  Held w_lut;
  TailTensors tensors;
  QLinearArgs args;

  Call(const Tensor& x_, const Tensor& x_scale_, int64_t x_zero_point, const OptTensor& lora_t,
       const Tensor& weight_, int64_t layout, int64_t n, int64_t k, const Tensor& col_sum_,
       const OptTensor& w_lut_, const Tensor& w_scale_, const OptTensor& bias, const OptTensor& lora_up,
       int64_t activation, const OptTensor& layer_scale, const OptTensor& residual)
      : x(dense(x_)),
        x_scale(dense(x_scale_)),
        weight(dense(weight_)),
        col_sum(dense(col_sum_)),
        w_scale(dense(w_scale_)),
        w_lut(w_lut_),
        tensors(row_count(x_), n, lora_t, bias, lora_up, activation, layer_scale, residual),
        args{} {
    args.m = row_count(x);
    check(x, ScalarType::Char, args.m * k, "x");
    args.x_scale_per_row = x_scale.numel() != 1;
    check(x_scale, ScalarType::Float, args.x_scale_per_row ? args.m : 1, "x_scale");
    check(col_sum, ScalarType::Int, n, "col_sum");
    STD_TORCH_CHECK(x_zero_point >= -128 && x_zero_point <= 127, "x_zero_point is ", x_zero_point,
                    ", expected an int in [-128, 127]");
    args.x = static_cast<const int8_t*>(x.const_data_ptr());
    args.x_scale = static_cast<const float*>(x_scale.const_data_ptr());
    args.x_zero_point = static_cast<int32_t>(x_zero_point);
    args.weight = weight_of(weight, layout, n, k, w_lut, w_scale);
    args.col_sum = static_cast<const int32_t*>(col_sum.const_data_ptr());
    args.tail = tensors.tail;
    args.pool = pool();
  }
};

Tensor qlinear(const Tensor& x, const Tensor& x_scale, int64_t x_zero_point, OptTensor lora_t,
               const Tensor& weight, int64_t layout, int64_t n, int64_t k, const Tensor& col_sum,
               OptTensor w_lut, const Tensor& w_scale, OptTensor bias, OptTensor lora_up, int64_t activation,
               OptTensor layer_scale, OptTensor residual, ScalarType out_dtype) {
  Call call(x, x_scale, x_zero_point, lora_t, weight, layout, n, k, col_sum, w_lut, w_scale, bias, lora_up,
            activation, layer_scale, residual);
  call.args.out_dtype = dtype_of(out_dtype, "out_dtype");
  const Tensor out = new_tensor(shape_with_last(x, n), out_dtype);
  call.args.out = out.mutable_data_ptr();
  if (out.numel() > 0) VITQ_DISPATCH(qlinear)(call.args);
  return out;
}

QuantizedTensors qlinear_quantize(const Tensor& x, const Tensor& x_scale, int64_t x_zero_point,
                                  OptTensor lora_t, const Tensor& weight, int64_t layout, int64_t n,
                                  int64_t k, const Tensor& col_sum, OptTensor w_lut, const Tensor& w_scale,
                                  OptTensor bias, OptTensor lora_up, int64_t activation,
                                  OptTensor layer_scale, OptTensor residual, OptTensor q_scale,
                                  int64_t q_zero_point, int64_t qmin, int64_t qmax, int64_t groups,
                                  OptTensor row_qmax, OptTensor q_lut, OptTensor lora_down, bool subspace) {
  const Call call(x, x_scale, x_zero_point, lora_t, weight, layout, n, k, col_sum, w_lut, w_scale, bias,
                  lora_up, activation, layer_scale, residual);
  QuantTensors quant(shape_with_last(x, n), call.args.m, q_scale, q_zero_point, qmin, qmax, groups, row_qmax,
                     q_lut, lora_down, subspace);
  if (call.args.m > 0) VITQ_DISPATCH(qlinear_quantize)(call.args, quant.tail);
  return quant.results();
}

Tensor qlinear_weight_only(const Tensor& x_, OptTensor lora_t, const Tensor& weight_, int64_t layout,
                           int64_t n, int64_t k, OptTensor w_lut, const Tensor& w_scale_, OptTensor bias,
                           OptTensor lora_up, int64_t activation, OptTensor layer_scale, OptTensor residual,
                           ScalarType out_dtype) {
  const Tensor x = dense(x_), weight = dense(weight_), w_scale = dense(w_scale_);
  const int64_t m = row_count(x);
  const Held lut(w_lut);
  const TailTensors tensors(m, n, lora_t, bias, lora_up, activation, layer_scale, residual);
  const Tensor out = new_tensor(shape_with_last(x, n), out_dtype);
  const WeightOnlyArgs args{any_float(x, m * k, "x"),
                            m,
                            weight_of(weight, layout, n, k, lut, w_scale),
                            tensors.tail,
                            out.mutable_data_ptr(),
                            dtype_of(out_dtype, "out_dtype"),
                            pool()};
  if (out.numel() > 0) VITQ_DISPATCH(qlinear_weight_only)(args);
  return out;
}

}  // namespace
}  // namespace vitq::glue

STABLE_TORCH_LIBRARY_IMPL(vitq, CPU, m) {
  m.impl("qlinear", TORCH_BOX(&vitq::glue::qlinear));
  m.impl("qlinear_quantize", TORCH_BOX(&vitq::glue::qlinear_quantize));
  m.impl("qlinear_weight_only", TORCH_BOX(&vitq::glue::qlinear_weight_only));
}
