// vitq_cuda::qattention and qattention_quantize.
#include <cmath>

#include "attention_glue.h"
#include "gpu_glue.h"
#include "qattention/qattention_sm80.cuh"
#include "quantize/quantize_gpu.h"

namespace vitq::glue {
namespace {

constexpr int64_t kMaxHeadDim = 128;  // products then stay below 2^22

// `levels` must outlive the result.
gpu::FocusLaw law_of(const Tensor& levels, double step, double offset, double b1, double b2, double power,
                     bool row_anchor, bool renormalize) {
  const int64_t n = levels.numel() - 1;
  STD_TORCH_CHECK(n >= 1 && n <= 255, "levels has ", n + 1, " elements, expected 2 to 256");
  check(levels, ScalarType::Byte, n + 1, "levels");
  STD_TORCH_CHECK(offset == 0.0 || (offset == b1 && power == 1.0), "offset is ", offset,
                  ", expected b1 of power 1, or 0");
  gpu::FocusLaw f{};
  f.direct = b1 == 0.0;
  f.law = power == 1.0 ? 1 : power == 2.0 ? 2 : 0;
  f.mass = static_cast<float>(f.direct ? power : 1.0);
  f.exponent = static_cast<float>(1.4426950408889634 / (f.direct ? power : 1.0));
  f.inverse = static_cast<float>(1.0 / power);
  f.top = static_cast<float>(n);
  const double top = static_cast<double>(n), high = f.law == 1 ? top : f.law == 2 ? top * top : 1.0;
  f.high = static_cast<float>(high);
  f.gain = static_cast<float>(f.direct ? top * std::pow(b2, -1.0 / power) : high / (b2 - b1));
  f.shift = static_cast<float>(f.direct ? 0.0 : -b1 / (b2 - b1) * high);
  f.cut = b2 < 1.0;
  f.row = row_anchor;
  f.renormalize = renormalize;
  // As FocusSpec.decode: codes are levels of uniform specs; the square law from 0 on is computed.
  f.decode = power == 1.0 && offset == b1 ? gpu::Levels::codes
             : power == 2.0 && f.direct   ? gpu::Levels::squares
                                          : gpu::Levels::table;
  f.level_gain = static_cast<float>(std::nearbyint(b2 / step) / (top * top));
  f.levels = static_cast<const uint8_t*>(levels.const_data_ptr());
  f.count = static_cast<int>(n + 1);
  f.step = static_cast<float>(step);
  f.offset = static_cast<float>(offset);
  return f;
}

// q [B, H, Nq, d], k and v [B, H, Nk, d] to out [rows, H·d]: a block for each 64 queries of a head. Bias and
// mask, where there are any, take shared memory that blocks without them have for more of their kind.
template <class Kernel>
void start(const Launcher& launcher, const QAttentionArgs& a, const gpu::AttentionParams& p) {
  const int64_t tiles = (a.nq + Kernel::kRows - 1) / Kernel::kRows;
  launcher.run<Kernel>("qattention", tiles * a.heads * a.batch, 1,
                       p.additive() ? Kernel::kSharedAdditive : Kernel::kShared, p);
}

// Whole rows in registers where they fit, which spares the second pass over K: windows of up to 64 keys
// apart, whose blocks then are small enough for four or five on a processor (there are none with wide heads).
// Longer rows by steps of 64 keys, of 32 where the sums of a wide head and its offset leave no room for more.
template <int kWidth, bool kOffset>
void choose(const Launcher& launcher, const QAttentionArgs& a, const gpu::AttentionParams& p) {
  constexpr int kStep = kOffset && kWidth > 96 ? 1 : 2;
  if constexpr (kWidth <= 64) {
    if (a.nk <= 64) return start<gpu::QAttention<kWidth, 2, true, kOffset>>(launcher, a, p);
  }
  if (a.nk > 64 && a.nk <= 256) return start<gpu::QAttention<kWidth, 8, true, kOffset>>(launcher, a, p);
  start<gpu::QAttention<kWidth, kStep, false, kOffset>>(launcher, a, p);
}
template <int kWidth>
void choose(const Launcher& launcher, const QAttentionArgs& a, const gpu::AttentionParams& p) {
  if (p.focus.offset == 0.0f) return choose<kWidth, false>(launcher, a, p);
  choose<kWidth, true>(launcher, a, p);
}

struct Attention : AttentionTensors {
  Launcher launcher;
  Tensor levels;
  gpu::AttentionParams p{};

  Attention(const Tensor& q, const Tensor& k, const Tensor& v, const Tensor& q_scale, const Tensor& k_scale,
            const Tensor& v_scale, double softmax_scale, const Tensor& levels_, double step, double offset,
            double b1, double b2, double power, bool row_anchor, bool renormalize, const OptTensor& bias,
            const OptTensor& mask, const OptTensor& scatter, int64_t tokens)
      : AttentionTensors(q, k, v, q_scale, k_scale, v_scale, softmax_scale, bias, mask, scatter, tokens),
        launcher(q),
        levels(dense(levels_)) {
    STD_TORCH_CHECK(args.d <= kMaxHeadDim, "head_dim is ", args.d, ", the cuda back end serves at most ",
                    kMaxHeadDim);
    STD_TORCH_CHECK(softmax_scale >= 0.0, "softmax_scale is ", softmax_scale,
                    ", the cuda back end expects a number >= 0");
    STD_TORCH_CHECK(args.nq < int64_t{1} << 31, "q has ", args.nq, " queries, expected less than 2^31");
    p.q = args.q, p.k = args.k, p.v = args.v;
    p.q_scale = args.q_scale, p.k_scale = args.k_scale, p.v_scale = args.v_scale;
    p.bias = args.bias, p.mask = args.mask;
    p.mask_groups = static_cast<int>(args.mask_groups);
    p.scatter = args.scatter;
    p.heads = static_cast<int>(args.heads), p.d = static_cast<int>(args.d);
    p.nq = static_cast<int>(args.nq), p.nk = static_cast<int>(args.nk);
    p.aligned = args.d % 16 == 0 && aligned(p.q) && aligned(p.k) && aligned(p.v);
    p.focus = law_of(levels, step, offset, b1, b2, power, row_anchor, renormalize);
    p.factor = static_cast<float>(softmax_scale * p.focus.exponent);
  }

  void run(Tensor& out, DType dtype) {
    if (out.numel() == 0) return;
    if (args.nk == 0) {
      torch::stable::zero_(out);
      return;
    }
    p.out = out.mutable_data_ptr();
    p.dtype = dtype;
    if (args.d <= 32) return choose<32>(launcher, args, p);
    if (args.d <= 64) return choose<64>(launcher, args, p);
    if (args.d <= 96) return choose<96>(launcher, args, p);
    choose<128>(launcher, args, p);
  }

 private:
  static bool aligned(const Codes& x) {
    return (reinterpret_cast<uintptr_t>(x.data) | static_cast<uintptr_t>(x.b | x.h | x.n)) % 16 == 0;
  }
};

Tensor qattention(const Tensor& q, const Tensor& k, const Tensor& v, const Tensor& q_scale,
                  const Tensor& k_scale, const Tensor& v_scale, double softmax_scale, const Tensor& levels,
                  double step, double offset, double b1, double b2, double power, bool row_anchor,
                  bool renormalize, OptTensor bias, OptTensor mask, OptTensor scatter, int64_t tokens,
                  ScalarType out_dtype) {
  Attention attention(q, k, v, q_scale, k_scale, v_scale, softmax_scale, levels, step, offset, b1, b2, power,
                      row_anchor, renormalize, bias, mask, scatter, tokens);
  const DType dtype = dtype_of(out_dtype, "out_dtype");
  Tensor out = new_tensor(attention.out_shape(), out_dtype);
  attention.run(out, dtype);
  return out;
}

// The attention's own tile sees one head of a row only: floats first, then their quantizer.
QuantizedTensors qattention_quantize(const Tensor& q, const Tensor& k, const Tensor& v, const Tensor& q_scale,
                                     const Tensor& k_scale, const Tensor& v_scale, double softmax_scale,
                                     const Tensor& levels, double step, double offset, double b1, double b2,
                                     double power, bool row_anchor, bool renormalize, OptTensor bias,
                                     OptTensor mask, OptTensor scatter, int64_t tokens, OptTensor scale,
                                     int64_t zero_point, int64_t qmin, int64_t qmax, int64_t groups,
                                     OptTensor row_qmax, OptTensor lut, OptTensor lora_down, bool subspace) {
  Attention attention(q, k, v, q_scale, k_scale, v_scale, softmax_scale, levels, step, offset, b1, b2, power,
                      row_anchor, renormalize, bias, mask, scatter, tokens);
  const auto shape = attention.out_shape();
  const int64_t m = shape[0] * shape[1];
  const QuantTensors quant(shape, m, scale, zero_point, qmin, qmax, groups, row_qmax, lut, lora_down,
                           subspace);
  Tensor rows = new_tensor(shape, ScalarType::Float);
  attention.run(rows, DType::f32);
  quantize_rows(attention.launcher, {{rows.const_data_ptr(), DType::f32}, shape[2]}, {}, m, quant);
  return quant.results();
}

}  // namespace
}  // namespace vitq::glue

VITQ_GPU_LIBRARY(m) {
  m.impl("qattention", TORCH_BOX(&vitq::glue::qattention));
  m.impl("qattention_quantize", TORCH_BOX(&vitq::glue::qattention_quantize));
}
