// vitq::fake_quantize, focused_softmax and their derivatives on CPU tensors.
#include "float_glue.h"
#include "learning/learning_cpu.h"

namespace vitq::glue {
namespace {

Dropped dropped(std::optional<int64_t> key, int64_t last) {
  const uint64_t bits = static_cast<uint64_t>(key.value_or(0));
  return {key.has_value(),
          {static_cast<uint32_t>(bits), static_cast<uint32_t>(bits >> 32)},
          static_cast<int32_t>(std::clamp<int64_t>(last, INT32_MIN, INT32_MAX))};
}

// The arguments that both directions have, with what keeps them alive.
struct FakeQuantize {
  FakeQuantize(const Tensor& x_, const Tensor& scale_, const OptTensor& zero_point_, int64_t qmin,
               int64_t qmax, const OptTensor& row_qmax_, const OptTensor& lut_, std::optional<int64_t> key,
               int64_t last)
      : x(dense(x_)), scale(dense(scale_)), zero_point(zero_point_), row_qmax(row_qmax_), lut(lut_) {
    STD_TORCH_CHECK(x.dim() == 2, "x has ", x.dim(), " dimensions, expected [R, L]");
    args.rows = x.size(0), args.columns = x.size(1);
    args.x = floats(x, x.numel(), "x");
    args.scales = scale.numel();
    STD_TORCH_CHECK(args.scales > 0 && args.rows % args.scales == 0, "scale has ", args.scales,
                    " elements, expected a divisor of the ", args.rows, " rows");
    args.scale = floats(scale, args.scales, "scale");
    args.zero_point = zero_point.data<float>(ScalarType::Float, 1, "zero_point");
    STD_TORCH_CHECK(qmin >= -128 && qmin <= 0 && qmax >= 0 && qmax <= 127, "(qmin, qmax) is (", qmin, ", ",
                    qmax, "), expected a range within [-128, 127]");
    args.qmin = static_cast<int32_t>(qmin), args.qmax = static_cast<int32_t>(qmax);
    args.row_qmax = row_qmax.data<int32_t>(ScalarType::Int, args.rows, "row_qmax");
    args.lut = lut.data<int8_t>(ScalarType::Char, 256, "lut");
    args.dropped = dropped(key, last);
    args.pool = pool();
  }
  Tensor x, scale;
  Held zero_point, row_qmax, lut;
  FakeQuantizeArgs args{};
};

Tensor fake_quantize(const Tensor& x, const Tensor& scale, OptTensor zero_point, int64_t qmin, int64_t qmax,
                     OptTensor row_qmax, OptTensor lut, std::optional<int64_t> key, int64_t last) {
  FakeQuantize call(x, scale, zero_point, qmin, qmax, row_qmax, lut, key, last);
  Tensor y = new_tensor(shape_of(x), ScalarType::Float);
  call.args.y = new_floats(y);
  VITQ_DISPATCH(fake_quantize)(call.args);
  return y;
}

std::tuple<Tensor, Tensor, Tensor> fake_quantize_backward(const Tensor& grad_, const Tensor& x,
                                                          const Tensor& scale, OptTensor zero_point,
                                                          int64_t qmin, int64_t qmax, OptTensor row_qmax,
                                                          OptTensor lut, std::optional<int64_t> key,
                                                          int64_t last) {
  const FakeQuantize call(x, scale, zero_point, qmin, qmax, row_qmax, lut, key, last);
  const Tensor grad = dense(grad_);
  Tensor of_x = new_tensor(shape_of(x), ScalarType::Float);
  Tensor of_scale = new_tensor({call.args.rows}, ScalarType::Float);
  Tensor of_zero = new_tensor({call.args.rows}, ScalarType::Float);
  VITQ_DISPATCH(fake_quantize_backward)
  ({call.args, floats(grad, x.numel(), "grad"), new_floats(of_x), new_floats(of_scale), new_floats(of_zero)});
  return {of_x, of_scale, of_zero};
}

Tensor mix(const Tensor& x_, const Tensor& other_, int64_t key, int64_t last) {
  const Tensor x = dense(x_), other = dense(other_);
  Tensor mixed = new_tensor(shape_of(x), ScalarType::Float);
  VITQ_DISPATCH(mix)
  ({floats(x, x.numel(), "x"), floats(other, x.numel(), "other"), static_cast<int64_t>(x.numel()),
    dropped(key, last), new_floats(mixed), pool()});
  return mixed;
}

struct FocusedSoftmax {
  FocusedSoftmax(const Tensor& of, double b1, double b2, double power, bool row_anchor, const Tensor& table_,
                 std::optional<int64_t> key, int64_t last)
      : table(dense(table_)) {
    STD_TORCH_CHECK(of.dim() == 2 && of.size(1) > 0, "scores have ", of.dim(), " dimensions and ", of.numel(),
                    " elements, expected [R, L] with L >= 1");
    STD_TORCH_CHECK(table.dim() == 2 && table.size(0) == 3 && table.size(1) >= 1 && table.size(1) <= 256,
                    "table has ", table.numel(), " elements, expected [3, n + 1] with n <= 255");
    STD_TORCH_CHECK(b1 < b2 && power >= 1.0, "(b1, b2, power) is (", b1, ", ", b2, ", ", power,
                    "), expected b1 < b2 and power >= 1");
    const int64_t entries = table.size(1);
    const float* rows = floats(table, 3 * entries, "table");
    args.rows = of.size(0), args.columns = of.size(1);
    args.b1 = static_cast<float>(b1), args.inverse = static_cast<float>(1.0 / (b2 - b1));
    args.power = power, args.row_anchor = row_anchor;
    args.top = static_cast<int32_t>(entries - 1);
    args.levels = rows, args.slopes = rows + entries, args.lifts = rows + 2 * entries;
    args.dropped = dropped(key, last);
    args.pool = pool();
  }
  Tensor table;
  FocusedSoftmaxArgs args{};
};

std::tuple<Tensor, Tensor, Tensor> focused_softmax(const Tensor& scores_, double b1, double b2, double power,
                                                   bool row_anchor, const Tensor& table,
                                                   std::optional<int64_t> key, int64_t last) {
  const Tensor scores = dense(scores_);
  FocusedSoftmax call(scores, b1, b2, power, row_anchor, table, key, last);
  Tensor level = new_tensor(shape_of(scores), ScalarType::Float),
         u = new_tensor(shape_of(scores), ScalarType::Float);
  Tensor total = new_tensor({call.args.rows}, ScalarType::Float);
  call.args.scores = floats(scores, scores.numel(), "scores");
  call.args.level = new_floats(level), call.args.u = new_floats(u), call.args.total = new_floats(total);
  VITQ_DISPATCH(focused_softmax)(call.args);
  return {level, u, total};
}

std::tuple<Tensor, Tensor> focused_softmax_backward(const Tensor& grad_, OptTensor grad_total_,
                                                    const Tensor& u_, double b1, double b2, double power,
                                                    bool row_anchor, const Tensor& table,
                                                    std::optional<int64_t> key, int64_t last) {
  const Tensor grad = dense(grad_), u = dense(u_);
  const FocusedSoftmax call(u, b1, b2, power, row_anchor, table, key, last);
  const Held grad_total(grad_total_);
  Tensor of_scores = new_tensor(shape_of(u), ScalarType::Float);
  Tensor sums = new_tensor({3, call.args.rows}, ScalarType::Float);
  VITQ_DISPATCH(focused_softmax_backward)
  ({call.args, floats(grad, u.numel(), "grad"),
    grad_total.data<float>(ScalarType::Float, call.args.rows, "grad_total"), floats(u, u.numel(), "u"),
    new_floats(of_scores), new_floats(sums)});
  return {of_scores, sums};
}

struct SoftRound {
  SoftRound(const Tensor& alpha_, const Tensor& weight_, const Tensor& scale_, int64_t qmin, int64_t qmax)
      : alpha(dense(alpha_)), weight(dense(weight_)), scale(dense(scale_)) {
    STD_TORCH_CHECK(alpha.dim() == 2, "alpha has ", alpha.dim(), " dimensions, expected [N, K]");
    args.rows = alpha.size(0), args.columns = alpha.size(1);
    args.alpha = floats(alpha, alpha.numel(), "alpha");
    args.weight = floats(weight, alpha.numel(), "weight");
    args.scale = floats(scale, args.rows, "scale");
    args.qmin = static_cast<float>(qmin), args.qmax = static_cast<float>(qmax);
    args.pool = pool();
  }
  Tensor alpha, weight, scale;
  SoftRoundArgs args{};
};

Tensor soft_round(const Tensor& alpha, const Tensor& weight, const Tensor& scale, int64_t qmin,
                  int64_t qmax) {
  SoftRound call(alpha, weight, scale, qmin, qmax);
  Tensor values = new_tensor(shape_of(alpha), ScalarType::Float);
  call.args.values = new_floats(values);
  VITQ_DISPATCH(soft_round)(call.args);
  return values;
}

std::tuple<Tensor, Tensor> soft_round_backward(const Tensor& grad_, const Tensor& alpha, const Tensor& weight,
                                               const Tensor& scale, int64_t qmin, int64_t qmax) {
  const SoftRound call(alpha, weight, scale, qmin, qmax);
  const Tensor grad = dense(grad_);
  Tensor of_alpha = new_tensor(shape_of(alpha), ScalarType::Float);
  Tensor of_scale = new_tensor({call.args.rows}, ScalarType::Float);
  VITQ_DISPATCH(soft_round_backward)
  ({call.args, floats(grad, alpha.numel(), "grad"), new_floats(of_alpha), new_floats(of_scale)});
  return {of_alpha, of_scale};
}

Tensor penalty(const Tensor& alpha_, double beta, const Tensor* grad) {
  const Tensor alpha = dense(alpha_);
  STD_TORCH_CHECK(alpha.dim() == 2, "alpha has ", alpha.dim(), " dimensions, expected [N, K]");
  STD_TORCH_CHECK(beta >= 2.0, "beta is ", beta, ", expected at least 2");
  const int64_t rows = alpha.size(0);
  Tensor result =
      new_tensor(grad == nullptr ? std::vector<int64_t>{rows} : shape_of(alpha), ScalarType::Float);
  VITQ_DISPATCH(rounding_penalty)
  ({floats(alpha, alpha.numel(), "alpha"), rows, alpha.size(1), static_cast<float>(beta),
    grad == nullptr ? nullptr : floats(*grad, rows, "grad"), new_floats(result), pool()});
  return result;
}

Tensor rounding_penalty(const Tensor& alpha, double beta) { return penalty(alpha, beta, nullptr); }

Tensor rounding_penalty_backward(const Tensor& grad_, const Tensor& alpha, double beta) {
  const Tensor grad = dense(grad_);
  return penalty(alpha, beta, &grad);
}

}  // namespace
}  // namespace vitq::glue

STABLE_TORCH_LIBRARY_IMPL(vitq, CPU, m) {
  m.impl("fake_quantize", TORCH_BOX(&vitq::glue::fake_quantize));
  m.impl("fake_quantize_backward", TORCH_BOX(&vitq::glue::fake_quantize_backward));
  m.impl("mix", TORCH_BOX(&vitq::glue::mix));
  m.impl("focused_softmax", TORCH_BOX(&vitq::glue::focused_softmax));
  m.impl("focused_softmax_backward", TORCH_BOX(&vitq::glue::focused_softmax_backward));
  m.impl("soft_round", TORCH_BOX(&vitq::glue::soft_round));
  m.impl("soft_round_backward", TORCH_BOX(&vitq::glue::soft_round_backward));
  m.impl("rounding_penalty", TORCH_BOX(&vitq::glue::rounding_penalty));
  m.impl("rounding_penalty_backward", TORCH_BOX(&vitq::glue::rounding_penalty_backward));
}
