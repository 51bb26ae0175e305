// The epilogue's arguments of every linear op, from tensors.
#pragma once

#include "glue.h"
#include "qlinear/qlinear_cpu.h"

namespace vitq::glue {

// The tail's optional tensors, kept alive for the length of a call.
struct TailTensors {
  Held lora_t, bias, lora_up, layer_scale, residual;
  LinearTail tail;

  TailTensors(int64_t m, int64_t n, const OptTensor& lora_t_, const OptTensor& bias_,
              const OptTensor& lora_up_, int64_t activation, const OptTensor& layer_scale_,
              const OptTensor& residual_)
      : lora_t(lora_up_ ? lora_t_ : OptTensor()),
        bias(bias_),
        lora_up(lora_up_),
        layer_scale(layer_scale_),
        residual(residual_),
        tail{} {
    STD_TORCH_CHECK(activation >= 0 && activation <= 2, "activation is ", activation, ", expected 0, 1 or 2");
    tail.activation = static_cast<Activation>(activation);
    if (lora_up_) {
      STD_TORCH_CHECK(static_cast<bool>(lora_t), "lora_up is given without lora_t, expected lora_t [M, R]");
      tail.rank = last_dim(*lora_up_, "lora_up");
      tail.lora_t = lora_t.data<float>(ScalarType::Float, m * tail.rank, "lora_t");
      tail.lora_up = lora_up.any_float(n * tail.rank, "lora_up");
    }
    tail.bias = bias.any_float(n, "bias");
    tail.layer_scale = layer_scale.any_float(n, "layer_scale");
    tail.residual = residual.any_float(m * n, "residual");
  }
};

}  // namespace vitq::glue
