// CPU kernels of the integer linear layers. Shapes: M rows, N out, K in, R rank.
#pragma once

#include "common/dtype.h"
#include "common/isa.h"
#include "common/layout.h"
#include "common/parallel.h"
#include "quantize/quantize_cpu.h"

namespace vitq {

enum class Activation : int64_t { none = 0, gelu_erf = 1, gelu_tanh = 2 };

// A packed weight and its scales.
struct Weight {
  const uint8_t* data;  // int8_n16k4 or int4_n16k4
  Layout layout;
  int64_t n, k;
  const int8_t* lut;     // [16] what a nibble decodes to; null: nibble − 8
  const float* w_scale;  // [N]
};

// What follows the product, in this order: + t·Uᵀ, + bias, activation, · layer_scale, + residual.
struct LinearTail {
  const float* lora_t;  // [M, rank]
  AnyFloat lora_up;     // [N, rank]
  int64_t rank;         // 0: no low-rank branch
  AnyFloat bias;        // [N], or absent
  Activation activation;
  AnyFloat layer_scale;  // [N], or absent
  AnyFloat residual;     // [M, N], or absent
};

struct QLinearArgs {
  const int8_t* x;  // [M, K]
  int64_t m;
  const float* x_scale;  // [M], or [1]
  bool x_scale_per_row;
  int32_t x_zero_point;
  Weight weight;
  const int32_t* col_sum;  // [N] sum over k of the decoded codes
  LinearTail tail;
  void* out;  // [M, N] of out_dtype; not used by qlinear_quantize
  DType out_dtype;
  Pool pool;
};

struct WeightOnlyArgs {
  AnyFloat x;  // [M, K]
  int64_t m;
  Weight weight;
  LinearTail tail;
  void* out;  // [M, N]
  DType out_dtype;
  Pool pool;
};

VITQ_DECLARE_PER_ISA(void qlinear(const QLinearArgs& args));
VITQ_DECLARE_PER_ISA(void qlinear_quantize(const QLinearArgs& args, const QuantTail& quant));
VITQ_DECLARE_PER_ISA(void qlinear_weight_only(const WeightOnlyArgs& args));

}  // namespace vitq
