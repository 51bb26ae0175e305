// CPU kernel of qattention and qattention_quantize; the operands' views are those of the GPU kernel, too.
#pragma once

#include "common/dtype.h"
#include "common/isa.h"
#include "common/parallel.h"
#include "common/row_map.h"
#include "quantize/quantize_cpu.h"

namespace vitq {

// One operand [B, H, N, d], its last dimension contiguous. Strides in elements.
struct Codes {
  const int8_t* data;
  int64_t b, h, n;
  constexpr const int8_t* row(int64_t bi, int64_t hi, int64_t i) const {
    return data + bi * b + hi * h + i * n;
  }
};

// A scale of 1, [H] or [B, H, N] values, broadcast by zero strides.
struct Scales {
  const float* data;
  int64_t b, h, n;
  constexpr float at(int64_t bi, int64_t hi, int64_t i) const { return data[bi * b + hi * h + i * n]; }
  constexpr bool per_token() const { return n != 0; }
};

// Additive scores: row i of outer index o (head or mask group) starts at element o·outer + i·row.
struct Additive {
  AnyFloat x;  // absent if null
  int64_t outer, row;
};

// Probabilities to integer levels: FocusSpec in numbers.
struct Focus {
  uint8_t levels[256];  // [0 .. top], the rest 0
  int top;              // the largest code n
  double step, offset, b1, b2, power;
  bool row_anchor, renormalize;
};

struct QAttentionArgs {
  int64_t batch, heads, nq, nk, d;
  Codes q, k, v;
  Scales q_scale, k_scale, v_scale;
  float softmax_scale;
  Focus focus;
  Additive bias;  // outer: head
  Additive mask;  // outer: image mod mask_groups
  int64_t mask_groups;
  RowMap scatter;  // query i of image b goes to row scatter.token_row(b·Nq + i) of the result; −1: nowhere
  Pool pool;
};

// out [.., H·d]: B·Nq rows, or those that the map names; every element written.
VITQ_DECLARE_PER_ISA(void qattention(const QAttentionArgs& args, void* out, DType dtype));
// tail.k = H·d, rows as those of out.
VITQ_DECLARE_PER_ISA(void qattention_quantize(const QAttentionArgs& args, const QuantTail& tail));

}  // namespace vitq
