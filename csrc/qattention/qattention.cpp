// vitq::qattention and vitq::qattention_quantize on CPU tensors.
#include "attention_glue.h"
#include "glue.h"

namespace vitq::glue {
namespace {

// The tensors of one call, copied only where their last dimension is not contiguous, and the kernel's view of
// them.
class Attention {
 public:
  Attention(const Tensor& q, const Tensor& k, const Tensor& v, const Tensor& q_scale, const Tensor& k_scale,
            const Tensor& v_scale, double softmax_scale, const Tensor& levels, double step, double offset,
            double b1, double b2, double power, bool row_anchor, bool renormalize, const OptTensor& bias,
            const OptTensor& mask, const OptTensor& scatter, int64_t tokens)
      : q_(rows(q, "q")),
        k_(rows(k, "k")),
        v_(rows(v, "v")),
        q_scale_(dense(q_scale)),
        k_scale_(dense(k_scale)),
        v_scale_(dense(v_scale)),
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
    args.focus = focus_of(levels, step, offset, b1, b2, power, row_anchor, renormalize);
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
    args.pool = pool();
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
