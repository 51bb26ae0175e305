// Between stable-ABI tensors and torch-free kernel arguments. Included by csrc/<op>/<op>.cpp and, for the
// library of GPU kernels, <op>.cu only.
#pragma once

#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>

#include <algorithm>
#include <cstdint>
#include <optional>
#include <tuple>
#include <vector>

#include "common/dtype.h"
#include "common/parallel.h"
#include "common/row_map.h"
#include "quantize/quantize_cpu.h"

#ifndef STABLE_TORCH_ERROR_CODE_CHECK  // its name up to torch 2.11
#define STABLE_TORCH_ERROR_CODE_CHECK TORCH_ERROR_CODE_CHECK
#endif

namespace vitq::glue {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;
using OptTensor = std::optional<Tensor>;
using QuantizedTensors = std::tuple<Tensor, Tensor, Tensor>;  // codes, dynamic scales, t

// The python wrappers name arguments in their errors; what is checked here keeps a direct call of
// torch.ops.vitq.* inside its buffers.
inline Tensor dense(const Tensor& x) { return x.is_contiguous() ? x : torch::stable::contiguous(x); }

// Where the tensors of this library's operators are.
#if defined(VITQ_GPU) && !defined(VITQ_EMULATED)
inline bool is_here(const Tensor& x) { return x.is_cuda(); }
inline const char* here() { return "a CUDA device"; }
inline int32_t device_type() { return aoti_torch_device_type_cuda(); }
inline int32_t device_index() {
  int32_t index = 0;
  STABLE_TORCH_ERROR_CODE_CHECK(aoti_torch_get_current_device_index(&index));
  return index;
}
#else
inline bool is_here(const Tensor& x) { return x.is_cpu(); }
inline const char* here() { return "the CPU"; }
inline int32_t device_type() { return aoti_torch_device_type_cpu(); }
inline int32_t device_index() { return 0; }
#endif

inline void check(const Tensor& x, ScalarType dtype, int64_t numel, const char* name) {
  STD_TORCH_CHECK(x.scalar_type() == dtype, name, " has dtype ", toString(x.scalar_type()), ", expected ",
                  toString(dtype));
  STD_TORCH_CHECK(x.numel() == numel, name, " has ", x.numel(), " elements, expected ", numel);
  STD_TORCH_CHECK(is_here(x), name, " is not on ", here());
}

inline DType dtype_of(ScalarType dtype, const char* name) {
  switch (dtype) {
    case ScalarType::Float:
      return DType::f32;
    case ScalarType::Half:
      return DType::f16;
    case ScalarType::BFloat16:
      return DType::bf16;
    default:
      STD_TORCH_CHECK(false, name, " has dtype ", toString(dtype), ", expected float32, float16 or bfloat16");
  }
}

// A contiguous float tensor of `numel` elements; `x` must outlive the result.
inline AnyFloat any_float(const Tensor& x, int64_t numel, const char* name) {
  const DType dtype = dtype_of(x.scalar_type(), name);
  check(x, x.scalar_type(), numel, name);
  return {x.const_data_ptr(), dtype};
}

// Keeps dense copies of optional arguments alive for the length of a call.
class Held {
 public:
  explicit Held(const OptTensor& x) {
    if (x.has_value()) tensor_ = dense(*x);
  }
  explicit operator bool() const { return tensor_.has_value(); }
  AnyFloat any_float(int64_t numel, const char* name) const {
    return tensor_ ? glue::any_float(*tensor_, numel, name) : AnyFloat{};
  }
  template <class T>
  const T* data(ScalarType dtype, int64_t numel, const char* name) const {
    if (!tensor_) return nullptr;
    check(*tensor_, dtype, numel, name);
    return static_cast<const T*>(tensor_->const_data_ptr());
  }

 private:
  OptTensor tensor_;
};

// The tensor's entries as a RowMap of as many slots, in range: they address memory. (On a GPU they are
// the caller's promise: to look at them would wait for the device.) `map` must outlive the result.
inline RowMap row_map(const Held& map, int64_t slots, int64_t tokens, const char* name) {
  if (!map) return {};
  const int32_t* index = map.data<int32_t>(ScalarType::Int, slots, name);
#if !defined(VITQ_GPU)
  int32_t least = 0, most = -1;
  for (int64_t i = 0; i < slots; ++i) least = std::min(least, index[i]), most = std::max(most, index[i]);
  STD_TORCH_CHECK(least >= -1 && most < tokens, name, " has entries in [", least, ", ", most,
                  "], expected [-1, ", tokens, ")");
#endif
  return {index, slots, tokens};
}

inline int64_t last_dim(const Tensor& x, const char* name) {
  STD_TORCH_CHECK(x.dim() > 0, name, " has no dimensions, expected [..., K]");
  return x.size(x.dim() - 1);
}

inline int64_t row_count(const Tensor& x) {
  int64_t m = 1;
  for (int64_t i = 0; i + 1 < x.dim(); ++i) m *= x.size(i);
  return m;
}

inline std::vector<int64_t> shape_with_last(const Tensor& x, int64_t last) {
  std::vector<int64_t> shape;
  for (int64_t i = 0; i + 1 < x.dim(); ++i) shape.push_back(x.size(i));
  shape.push_back(last);
  return shape;
}

// A new contiguous tensor; the shim directly, because aten::empty through the dispatcher costs a
// microsecond.
inline Tensor new_tensor(const std::vector<int64_t>& shape, ScalarType dtype) {
  std::vector<int64_t> strides(shape.size(), 1);
  for (size_t i = shape.size(); i-- > 1;) strides[i - 1] = strides[i] * std::max<int64_t>(shape[i], 1);
  AtenTensorHandle handle;
  STABLE_TORCH_ERROR_CODE_CHECK(
      aoti_torch_empty_strided(static_cast<int64_t>(shape.size()), shape.data(), strides.data(),
                               torch::stable::detail::to<int32_t>(torch::stable::detail::from(dtype)),
                               device_type(), device_index(), &handle));
  return Tensor(handle);
}

// torch's own pool.
inline Pool pool() {
  return {
      static_cast<int64_t>(torch::stable::get_num_threads()),
      [](int64_t begin, int64_t end, int64_t grain, void (*body)(int64_t, int64_t, void*), void* context) {
        torch::stable::parallel_for(begin, end, grain, [&](int64_t b, int64_t e) { body(b, e, context); });
      }};
}

// The flat arguments of a quantizing epilogue (QUANT_ARGS of ops/_schema.py) as a QuantTail, with its result
// tensors.
class QuantTensors {
 public:
  // shape: of the codes, [..., K]; m: the number of rows.
  QuantTensors(const std::vector<int64_t>& shape, int64_t m, const OptTensor& q_scale, int64_t q_zero_point,
               int64_t qmin, int64_t qmax, int64_t groups, const OptTensor& row_qmax, const OptTensor& q_lut,
               const OptTensor& lora_down, bool subspace)
      : scale_(q_scale),
        row_qmax_(row_qmax),
        lut_(q_lut),
        q(new_tensor(shape, ScalarType::Char)),
        out_scale(new_tensor(q_scale ? std::vector<int64_t>{0} : std::vector<int64_t>{m, groups},
                             ScalarType::Float)),
        t(new_tensor(lora_down ? std::vector<int64_t>{m, lora_down->size(0)} : std::vector<int64_t>{0},
                     ScalarType::Float)) {
    const int64_t k = shape.back();
    STD_TORCH_CHECK(groups > 0 && k % groups == 0, "groups is ", groups, ", expected a divisor of ", k);
    STD_TORCH_CHECK(qmin >= -128 && qmin <= 0 && qmax >= 1 && qmax <= 127, "(qmin, qmax) is (", qmin, ", ",
                    qmax, "), expected a range within [-128, 127]");
    STD_TORCH_CHECK(q_zero_point >= -128 && q_zero_point <= 127, "q_zero_point is ", q_zero_point,
                    ", expected an int in [-128, 127]");
    const bool per_row = q_scale && q_scale->dim() == 2;
    tail.scale = scale_.data<float>(ScalarType::Float, per_row ? m * groups : groups, "q_scale");
    tail.scale_per_row = per_row;
    tail.zero_point = static_cast<int32_t>(q_zero_point);
    tail.qmin = static_cast<int32_t>(qmin);
    tail.qmax = static_cast<int32_t>(qmax);
    tail.groups = groups;
    tail.row_qmax = row_qmax_.data<int32_t>(ScalarType::Int, m, "row_qmax");
    tail.lut = lut_.data<int8_t>(ScalarType::Char, 256, "q_lut");
    tail.lora_down = nullptr;
    tail.rank = 0;
    if (lora_down) {
      tail.rank = lora_down->size(0);
#if defined(VITQ_GPU)
      lora_down_ = dense(*lora_down);
      down = any_float(*lora_down_, tail.rank * k, "lora_down");
#else
      lora_down_ = dense(lora_down->scalar_type() == ScalarType::Float
                             ? *lora_down
                             : torch::stable::to(*lora_down, ScalarType::Float));
      check(*lora_down_, ScalarType::Float, tail.rank * k, "lora_down");
      tail.lora_down = static_cast<const float*>(lora_down_->const_data_ptr());
#endif
    }
    STD_TORCH_CHECK(!subspace || lora_down, "subspace is True without lora_down, expected lora_down [R, K]");
    tail.subspace = subspace;
    tail.k = k;
    tail.q = static_cast<int8_t*>(q.mutable_data_ptr());
    tail.out_scale = static_cast<float*>(out_scale.mutable_data_ptr());
    tail.t = static_cast<float*>(t.mutable_data_ptr());
  }

  QuantizedTensors results() const { return {q, out_scale, t}; }

 private:
  Held scale_, row_qmax_, lut_;
  OptTensor lora_down_;

 public:
  Tensor q, out_scale, t;
  QuantTail tail;
  AnyFloat down;  // lora_down [rank, K] in its own dtype, on GPUs
};

}  // namespace vitq::glue
