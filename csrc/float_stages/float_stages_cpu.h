// The float stages of the fused kernels by themselves: see vitq_kernels/ops/float_stages.
#pragma once

#include "common/dtype.h"
#include "common/isa.h"
#include "common/parallel.h"
#include "qattention/qattention_cpu.h"

namespace vitq {

struct LayerNormArgs {
  const float* x;       // [m, k], k >= 1
  const float* weight;  // [k], or null
  const float* bias;    // [k], or null
  double eps;
  int64_t m, k;
  float* y;  // out [m, k]
  Pool pool;
};

// project: t [m, rank] = x [m, k]·Dᵀ; expand: x [m, k] = t [m, rank]·D. D [rank, k].
struct LowRankArgs {
  const float* in;
  const float* basis;
  int64_t m, k, rank;
  float* out;
  Pool pool;
};

struct GeluArgs {
  const float* x;
  bool tanh;
  int64_t n;
  float* y;
  Pool pool;
};

struct FocusPositionArgs {
  int64_t batch, heads, nq, nk;
  const int32_t* product;  // [B, H, Nq, Nk]
  Scales q_scale, k_scale;
  float softmax_scale;
  Focus focus;
  Additive bias;  // outer: head
  Additive mask;  // outer: image mod mask_groups
  int64_t mask_groups;
  float* position;  // out [B, H, Nq, Nk]
  float* total;     // out [B, H, Nq]
  Pool pool;
};

VITQ_DECLARE_PER_ISA(void layer_norm(const LayerNormArgs& args));
VITQ_DECLARE_PER_ISA(void project(const LowRankArgs& args));
VITQ_DECLARE_PER_ISA(void expand(const LowRankArgs& args));
VITQ_DECLARE_PER_ISA(void gelu(const GeluArgs& args));
VITQ_DECLARE_PER_ISA(void focus_position(const FocusPositionArgs& args));

}  // namespace vitq
