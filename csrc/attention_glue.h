// The operands, scales, additive scores and focus of an attention call as the kernels take them. Included by
// csrc/<op>/<op>.cpp and, for the library of GPU kernels, <op>.cu only.
#pragma once

#include <cstring>

#include "glue.h"
#include "qattention/qattention_cpu.h"

namespace vitq::glue {

// Per token: with any strides. `x` must outlive the result.
inline Scales scales(const Tensor& x, int64_t b, int64_t h, int64_t n, const char* name) {
  const bool per_token = x.dim() == 3;
  check(x, ScalarType::Float, per_token ? b * h * n : x.numel() == 1 ? 1 : h, name);
  const float* data = static_cast<const float*>(x.const_data_ptr());
  if (per_token) return {data, x.stride(0), x.stride(1), x.stride(2)};
  return {data, 0, x.numel() == 1 ? 0 : 1, 0};
}

// [outer, Nq or 1, Nk]; `held` keeps the memory.
inline Additive additive(const OptTensor& x, OptTensor& held, int64_t outer, int64_t nq, int64_t nk,
                         const char* name) {
  if (!x) return {{}, 0, 0};
  STD_TORCH_CHECK(x->dim() == 3 && is_here(*x) && x->size(0) == outer && x->size(2) == nk &&
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

// What every attention op takes, copied only where a last dimension is not contiguous, and the kernels' view
// of it but for the focus.
class AttentionTensors {
 public:
  AttentionTensors(const Tensor& q, const Tensor& k, const Tensor& v, const Tensor& q_scale,
                   const Tensor& k_scale, const Tensor& v_scale, double softmax_scale, const OptTensor& bias,
                   const OptTensor& mask, const OptTensor& scatter, int64_t tokens)
      : q_(rows(q, "q")),
        k_(rows(k, "k")),
        v_(rows(v, "v")),
        q_scale_(tokens_apart(q_scale)),
        k_scale_(tokens_apart(k_scale)),
        v_scale_(tokens_apart(v_scale)),
        scatter_(scatter) {
    args.batch = q.size(0), args.heads = q.size(1), args.nq = q.size(2), args.d = q.size(3);
    args.nk = k.size(2);
    args.q = codes(q_, args.nq, "q");
    args.k = codes(k_, args.nk, "k");
    args.v = codes(v_, args.nk, "v");
    args.q_scale = scales(q_scale_, args.batch, args.heads, args.nq, "q_scale");
    args.k_scale = scales(k_scale_, args.batch, args.heads, args.nk, "k_scale");
    args.v_scale = scales(v_scale_, args.batch, args.heads, args.nk, "v_scale");
    args.softmax_scale = static_cast<float>(softmax_scale);
    // What int32 sums hold: 255·128·Nk and 128·128·d.
    STD_TORCH_CHECK(args.nk <= 65793, "k has ", args.nk, " keys, expected at most 65793");
    STD_TORCH_CHECK(args.d <= 131071, "q has head_dim ", args.d, ", expected at most 131071");
    args.bias = additive(bias, bias_, args.heads, args.nq, args.nk, "bias");
    args.mask_groups = mask_groups(mask, args.batch);
    args.mask = additive(mask, mask_, args.mask_groups, args.nq, args.nk, "mask");
    if (scatter) {
      const int64_t slots = scatter->numel();
      STD_TORCH_CHECK(slots > 0 && args.nq > 0 && slots % args.nq == 0 && args.batch % (slots / args.nq) == 0,
                      "scatter has ", slots, " elements, expected Nq = ", args.nq,
                      " for each window of an image");
      STD_TORCH_CHECK(tokens >= 1 && tokens <= slots, "tokens is ", tokens, ", expected 1 to ", slots);
      args.scatter = row_map(scatter_, slots, tokens, "scatter");
    }
  }

  std::vector<int64_t> out_shape() const {
    const RowMap& map = args.scatter;
    const int64_t width = args.heads * args.d;
    if (map.index == nullptr) return {args.batch, args.nq, width};
    return {args.batch * args.nq / map.slots, map.tokens, width};
  }
  bool empty() const { return args.batch * args.nq * args.heads * args.d == 0; }

  QAttentionArgs args;

 private:
  static Tensor rows(const Tensor& x, const char* name) {
    STD_TORCH_CHECK(x.dim() == 4, name, " has ", x.dim(), " dimensions, expected [B, H, N, d]");
    return x.stride(3) == 1 || x.size(3) <= 1 ? x : torch::stable::contiguous(x);
  }
  static Tensor tokens_apart(const Tensor& scale) { return scale.dim() == 3 ? scale : dense(scale); }

  Codes codes(const Tensor& x, int64_t n, const char* name) const {
    check(x, ScalarType::Char, args.batch * args.heads * n * args.d, name);
    STD_TORCH_CHECK(x.size(0) == args.batch && x.size(1) == args.heads && x.size(2) == n, name,
                    " does not fit q's and k's shapes");
    return {static_cast<const int8_t*>(x.const_data_ptr()), x.stride(0), x.stride(1), x.stride(2)};
  }

  Tensor q_, k_, v_, q_scale_, k_scale_, v_scale_;
  Held scatter_;
  OptTensor bias_, mask_;
};

}  // namespace vitq::glue
