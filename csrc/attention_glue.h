// Scales, additive scores and the focus of an attention call as the kernels take them. Included by
// csrc/<op>/<op>.cpp only.
#pragma once

#include <cstring>

#include "glue.h"
#include "qattention/qattention_cpu.h"

namespace vitq::glue {

// `x` must outlive the result.
inline Scales scales(const Tensor& x, int64_t b, int64_t h, int64_t n, const char* name) {
  const bool per_token = x.dim() == 3;
  check(x, ScalarType::Float, per_token ? b * h * n : x.numel() == 1 ? 1 : h, name);
  const float* data = static_cast<const float*>(x.const_data_ptr());
  if (per_token) return {data, h * n, n, 1};
  return {data, 0, x.numel() == 1 ? 0 : 1, 0};
}

// [outer, Nq or 1, Nk]; `held` keeps the memory.
inline Additive additive(const OptTensor& x, OptTensor& held, int64_t outer, int64_t nq, int64_t nk,
                         const char* name) {
  if (!x) return {{}, 0, 0};
  STD_TORCH_CHECK(x->dim() == 3 && x->is_cpu() && x->size(0) == outer && x->size(2) == nk &&
                      (x->size(1) == nq || x->size(1) == 1),
                  name, " does not fit the scores");
  held = x->stride(2) == 1 || nk <= 1 ? *x : torch::stable::contiguous(*x);
  return {{held->const_data_ptr(), dtype_of(held->scalar_type(), name)},
          held->stride(0),
          held->size(1) == 1 ? 0 : held->stride(1)};
}

inline int64_t mask_groups(const OptTensor& mask, int64_t batch) {
  if (!mask) return 1;
  const int64_t groups = mask->dim() > 0 ? mask->size(0) : 0;
  STD_TORCH_CHECK(groups > 0 && batch % groups == 0, "mask has ", groups, " groups, expected a divisor of ",
                  batch);
  return groups;
}

// The parameters of FocusSpec; its levels stay those of the codes themselves.
inline Focus focus_of(int64_t n, double b1, double b2, double power, bool row_anchor, bool renormalize) {
  STD_TORCH_CHECK(n >= 1 && n <= 255, "the largest code is ", n, ", expected 1 to 255");
  Focus f{};
  f.top = static_cast<int>(n);
  for (int c = 0; c <= f.top; ++c) f.levels[c] = static_cast<uint8_t>(c);
  f.step = 1.0, f.offset = 0.0, f.b1 = b1, f.b2 = b2, f.power = power;
  f.row_anchor = row_anchor, f.renormalize = renormalize;
  return f;
}

inline Focus focus_of(const Tensor& levels, double step, double offset, double b1, double b2, double power,
                      bool row_anchor, bool renormalize) {
  const int64_t n = levels.numel();
  STD_TORCH_CHECK(n >= 2 && n <= 256, "levels has ", n, " elements, expected 2 to 256");
  const Tensor table = dense(levels);
  check(table, ScalarType::Byte, n, "levels");
  Focus f = focus_of(n - 1, b1, b2, power, row_anchor, renormalize);
  std::memcpy(f.levels, table.const_data_ptr(), static_cast<size_t>(n));
  f.step = step, f.offset = offset;
  return f;
}

}  // namespace vitq::glue
