// vitq::layer_norm, project, expand, gelu and focus_position on CPU tensors.
#include "attention_glue.h"
#include "float_glue.h"
#include "float_stages/float_stages_cpu.h"

namespace vitq::glue {
namespace {

Tensor layer_norm(const Tensor& x_, OptTensor weight, OptTensor bias, double eps) {
  const int64_t k = last_dim(x_, "x"), m = row_count(x_);
  STD_TORCH_CHECK(k > 0, "x has ", k, " columns, expected at least 1");
  const Tensor x = dense(x_);
  const Held gamma(weight), beta(bias);
  Tensor y = new_tensor(shape_of(x), ScalarType::Float);
  const LayerNormArgs args{floats(x, m * k, "x"),
                           gamma.data<float>(ScalarType::Float, k, "weight"),
                           beta.data<float>(ScalarType::Float, k, "bias"),
                           eps,
                           m,
                           k,
                           new_floats(y),
                           pool()};
  if (m > 0) VITQ_DISPATCH(layer_norm)(args);
  return y;
}

// basis [R, K]; in [M, K] to [M, R] (project) or [M, R] to [M, K] (expand).
template <class Kernel>
Tensor low_rank(const Tensor& in_, const Tensor& basis_, bool expands, Kernel kernel) {
  const Tensor in = dense(in_), basis = dense(basis_);
  STD_TORCH_CHECK(in.dim() == 2 && basis.dim() == 2, "input and basis have ", in.dim(), " and ", basis.dim(),
                  " dimensions, expected two each");
  const int64_t m = in.size(0), rank = basis.size(0), k = basis.size(1);
  Tensor out = new_tensor({m, expands ? k : rank}, ScalarType::Float);
  const float* source = floats(in, m * (expands ? rank : k), "input");
  const LowRankArgs args{source, floats(basis, rank * k, "basis"), m, k, rank, new_floats(out), pool()};
  if (m > 0) kernel(args);
  return out;
}

Tensor project(const Tensor& x, const Tensor& basis) {
  return low_rank(x, basis, false, VITQ_DISPATCH(project));
}

Tensor expand(const Tensor& t, const Tensor& basis) {
  return low_rank(t, basis, true, VITQ_DISPATCH(expand));
}

Tensor gelu(const Tensor& x_, bool tanh) {
  const Tensor x = dense(x_);
  Tensor y = new_tensor(shape_of(x), ScalarType::Float);
  const GeluArgs args{floats(x, x.numel(), "x"), tanh, static_cast<int64_t>(x.numel()), new_floats(y),
                      pool()};
  VITQ_DISPATCH(gelu)(args);
  return y;
}

std::tuple<Tensor, Tensor> focus_position(const Tensor& product_, const Tensor& q_scale_,
                                          const Tensor& k_scale_, double softmax_scale, int64_t n, double b1,
                                          double b2, double power, bool row_anchor, bool renormalize,
                                          OptTensor bias, OptTensor mask) {
  STD_TORCH_CHECK(product_.dim() == 4, "product has ", product_.dim(),
                  " dimensions, expected [B, H, Nq, Nk]");
  const Tensor product = dense(product_), q_scale = dense(q_scale_), k_scale = dense(k_scale_);
  const int64_t b = product.size(0), h = product.size(1), nq = product.size(2), nk = product.size(3);
  check(product, ScalarType::Int, b * h * nq * nk, "product");
  Tensor position = new_tensor({b, h, nq, nk}, ScalarType::Float);
  Tensor total = new_tensor({b, h, nq}, ScalarType::Float);
  OptTensor bias_held, mask_held;
  FocusPositionArgs args{};
  args.batch = b, args.heads = h, args.nq = nq, args.nk = nk;
  args.product = static_cast<const int32_t*>(product.const_data_ptr());
  args.q_scale = scales(q_scale, b, h, nq, "q_scale");
  args.k_scale = scales(k_scale, b, h, nk, "k_scale");
  args.softmax_scale = static_cast<float>(softmax_scale);
  args.focus = focus_of(n, b1, b2, power, row_anchor, renormalize);
  args.bias = additive(bias, bias_held, h, nq, nk, "bias");
  args.mask_groups = mask_groups(mask, b);
  args.mask = additive(mask, mask_held, args.mask_groups, nq, nk, "mask");
  args.position = new_floats(position);
  args.total = new_floats(total);
  args.pool = pool();
  VITQ_DISPATCH(focus_position)(args);
  return {position, total};
}

}  // namespace
}  // namespace vitq::glue

STABLE_TORCH_LIBRARY_IMPL(vitq, CPU, m) {
  m.impl("layer_norm", TORCH_BOX(&vitq::glue::layer_norm));
  m.impl("project", TORCH_BOX(&vitq::glue::project));
  m.impl("expand", TORCH_BOX(&vitq::glue::expand));
  m.impl("gelu", TORCH_BOX(&vitq::glue::gelu));
  m.impl("focus_position", TORCH_BOX(&vitq::glue::focus_position));
}
