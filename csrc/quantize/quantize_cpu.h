// CPU kernels of quantize and layer_norm_quantize, and the quantizing tail that every *_quantize op ends in.
#pragma once

#include "common/dtype.h"
#include "common/isa.h"
#include "common/parallel.h"
#include "common/row_map.h"

namespace vitq {

// What turns rows of floats into codes: ActQuant's fields and the places of the results. K columns in
// `groups` equal groups; M rows in the whole call.
struct QuantTail {
  const float* scale;  // static: [groups], or [M, groups] if scale_per_row; null: dynamic
  bool scale_per_row;
  int32_t zero_point;  // 0 if dynamic or with row_qmax
  int32_t qmin, qmax;
  int64_t groups;
  const int32_t* row_qmax;  // [M], or null
  const int8_t* lut;        // [256], entry q + 128; or null
  const float* lora_down;   // [rank, K]; rank 0: none
  int64_t rank;
  bool subspace;  // quantize x − t·D instead of x
  int64_t k;
  int8_t* q;         // out [M, K]
  float* out_scale;  // out [M, groups] if dynamic
  float* t;          // out [M, rank]
};

struct QuantizeArgs {
  AnyFloat x;  // [M, K]
  int64_t m;
  QuantTail tail;
  Pool pool;
};

struct LayerNormQuantizeArgs {
  AnyFloat x;       // rows of K >= 1 columns
  AnyFloat weight;  // [K], or absent
  AnyFloat bias;    // [K], or absent
  double eps;
  int64_t m;      // rows of the result
  RowMap gather;  // row i of the result is that of x's row gather.token_row(i), or the codes of 0
  QuantTail tail;
  Pool pool;
};

// Quantizes rows row0 .. row0 + rows of the call.
//   x         [rows, ld] float32, the first K columns of each row; left alone
//   residual  [rows, ld], may be x itself; written only if tail.subspace
VITQ_DECLARE_PER_ISA(void quantize_rows(const QuantTail& tail, const float* x, float* residual, int64_t ld,
                                        int64_t row0, int64_t rows));
VITQ_DECLARE_PER_ISA(void quantize(const QuantizeArgs& args));
VITQ_DECLARE_PER_ISA(void layer_norm_quantize(const LayerNormQuantizeArgs& args));

}  // namespace vitq
