// Rows of floats to codes on the GPU, for the operators there: quantize.cu's own, and those whose tiles
// cannot quantize by themselves.
#pragma once

#include "gpu_glue.h"

namespace vitq::glue {

// Row r is at element (r / inner)·outer_stride + (r % inner)·row_stride; at r·row_stride where inner is 0.
struct FloatRows {
  AnyFloat data;
  int64_t row_stride;
  int64_t inner = 0, outer_stride = 0;
};

struct LayerNorm {
  AnyFloat weight, bias;  // [K] or absent
  double eps;
};

// q, out_scale and t of `quant` from `m` rows of `x`, the rows in the order of `gather`, after `norm` if
// there is one (K >= 1 then).
void quantize_rows(const Launcher& launcher, const FloatRows& x, const std::optional<LayerNorm>& norm,
                   int64_t m, const QuantTensors& quant, const RowMap& gather = {});

}  // namespace vitq::glue
