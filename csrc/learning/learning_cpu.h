// Quantizers with straight-through gradients, one pass each way: see vitq_kernels/ops/learning.
#pragma once

#include "common/isa.h"
#include "common/parallel.h"

namespace vitq {

// Which elements stay float while something is learned: those whose hash, an int32 of their index under a
// key, is at most `last`.
struct Dropped {
  bool any;
  uint32_t key[2];
  int32_t last;
};

struct FakeQuantizeArgs {
  const float* x;  // [rows, columns]
  int64_t rows, columns;
  const float* scale;  // row r takes scale[r mod scales]
  int64_t scales;
  const float* zero_point;  // [1], rounded and clamped to [qmin, qmax] where it is used; or null: 0
  int32_t qmin, qmax;
  const int32_t* row_qmax;  // [rows]: ±row_qmax instead, or null
  const int8_t* lut;        // [256], entry q + 128; or null
  Dropped dropped;
  float* y;  // out [rows, columns]
  Pool pool;
};

struct FakeQuantizeBackwardArgs {
  FakeQuantizeArgs forward;  // its y unused
  const float* grad;         // [rows, columns], of y
  float* grad_x;             // out [rows, columns]
  float* grad_scale;         // out [rows]: what the row adds to the gradient of its scale
  float* grad_zero;          // out [rows], of the zero point
};

// out = x, but `other` where dropped.
struct MixArgs {
  const float* x;
  const float* other;
  int64_t n;
  Dropped dropped;
  float* out;
  Pool pool;
};

struct FocusedSoftmaxArgs {
  const float* scores;  // [rows, columns]
  int64_t rows, columns;
  float b1, inverse;  // x = (u − b1)·inverse
  double power;
  bool row_anchor;
  int32_t top;  // largest code; tables have top + 1 entries
  const float *levels, *slopes, *lifts;
  Dropped dropped;  // whose level is their position
  float* level;     // out [rows, columns]
  float* u;         // out [rows, columns]: probabilities, or relative to the row's largest with row_anchor
  float* total;     // out [rows]
  Pool pool;
};

struct FocusedSoftmaxBackwardArgs {
  FocusedSoftmaxArgs forward;  // its outputs unused
  const float* grad;           // [rows, columns], of the levels
  const float* grad_total;     // [rows], with row_anchor; or null
  const float* u;              // of the forward pass
  float* grad_scores;          // out [rows, columns]
  float* sums;                 // out [3, rows]: of g, g·x and grad·lifts, with g the gradient of x
};

// Learned rounding (AdaRound): values = scale·clamp(floor(weight/scale) + h(alpha), qmin, qmax), with h the
// stretched sigmoid.
struct SoftRoundArgs {
  const float* alpha;   // [rows, columns]
  const float* weight;  // [rows, columns]
  const float* scale;   // [rows]
  int64_t rows, columns;
  float qmin, qmax;
  float* values;  // out [rows, columns]
  Pool pool;
};

struct SoftRoundBackwardArgs {
  SoftRoundArgs forward;  // its values unused
  const float* grad;      // [rows, columns], of the values
  float* grad_alpha;      // out [rows, columns]
  float* grad_scale;      // out [rows]
};

// Σ over each row of 1 − |2h(alpha) − 1|^beta, or with `grad` its derivative.
struct RoundingPenaltyArgs {
  const float* alpha;  // [rows, columns]
  int64_t rows, columns;
  float beta;         // ≥ 2
  const float* grad;  // [rows], of the sums; or null
  float* out;         // [rows], or with grad [rows, columns]
  Pool pool;
};

VITQ_DECLARE_PER_ISA(void fake_quantize(const FakeQuantizeArgs& args));
VITQ_DECLARE_PER_ISA(void fake_quantize_backward(const FakeQuantizeBackwardArgs& args));
VITQ_DECLARE_PER_ISA(void mix(const MixArgs& args));
VITQ_DECLARE_PER_ISA(void focused_softmax(const FocusedSoftmaxArgs& args));
VITQ_DECLARE_PER_ISA(void focused_softmax_backward(const FocusedSoftmaxBackwardArgs& args));
VITQ_DECLARE_PER_ISA(void soft_round(const SoftRoundArgs& args));
VITQ_DECLARE_PER_ISA(void soft_round_backward(const SoftRoundBackwardArgs& args));
VITQ_DECLARE_PER_ISA(void rounding_penalty(const RoundingPenaltyArgs& args));

}  // namespace vitq
