// float32 tensors as kernels take them. Included by csrc/<op>/<op>.cpp of operators that compute in float32
// only.
#pragma once

#include "glue.h"

namespace vitq::glue {

// Of a contiguous tensor.
inline const float* floats(const Tensor& x, int64_t numel, const char* name) {
  check(x, ScalarType::Float, numel, name);
  return static_cast<const float*>(x.const_data_ptr());
}

// Of a tensor made by new_tensor.
inline float* new_floats(Tensor& out) { return static_cast<float*>(out.mutable_data_ptr()); }

inline std::vector<int64_t> shape_of(const Tensor& x) { return {x.sizes().begin(), x.sizes().end()}; }

}  // namespace vitq::glue
