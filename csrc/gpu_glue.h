// What the operators of the GPU library share beside glue.h: where they are registered and where they launch.
//
// They are a library of their own, `vitq_cuda`, in two forms from the same sources: nvcc's for CUDA tensors,
// and the emulation's for CPU tensors.
#pragma once

#include <torch/csrc/stable/accelerator.h>

#include <cstdlib>

#include "common/gpu/device.cuh"
#include "glue.h"
#include "quantize/codes.cuh"

#if defined(VITQ_EMULATED)
#define VITQ_GPU_LIBRARY(m) STABLE_TORCH_LIBRARY_IMPL(vitq_cuda, CPU, m)
#else
#define VITQ_GPU_LIBRARY(m) STABLE_TORCH_LIBRARY_IMPL(vitq_cuda, CUDA, m)
#endif

namespace vitq::glue {

// The device of `x` for the length of a call, its index, current stream and number of processors, and its
// compute capability (80 is 8.0).
class Launcher {
 public:
#if defined(VITQ_EMULATED)
  explicit Launcher(const Tensor&) {
    const auto setting = [](const char* name, int otherwise) {
      const char* text = std::getenv(name);
      return text == nullptr ? otherwise : std::atoi(text);
    };
    processors = setting("VITQ_EMULATED_PROCESSORS", 4);
    capability = setting("VITQ_EMULATED_CAPABILITY", 80);
  }
  bool captured() const { return false; }
#else
  explicit Launcher(const Tensor& x) : guard_(x.get_device_index()) {
    device = x.get_device_index();
    void* found = nullptr;
    STABLE_TORCH_ERROR_CODE_CHECK(aoti_torch_get_current_cuda_stream(device, &found));
    stream = static_cast<gpu::Stream>(found);
    const auto attribute = [this](cudaDeviceAttr which) {
      int value = 0;
      cudaDeviceGetAttribute(&value, which, device);
      return value;
    };
    processors = attribute(cudaDevAttrMultiProcessorCount);
    capability =
        10 * attribute(cudaDevAttrComputeCapabilityMajor) + attribute(cudaDevAttrComputeCapabilityMinor);
  }

  // Whether the stream's launches go to a graph, for all that is known.
  bool captured() const {
    cudaStreamCaptureStatus status = cudaStreamCaptureStatusNone;
    return cudaStreamIsCapturing(stream, &status) != cudaSuccess || status != cudaStreamCaptureStatusNone;
  }

 private:
  torch::stable::accelerator::DeviceGuard guard_;

 public:
#endif
  template <class Kernel>
  void run(const char* name, int64_t grid_x, int64_t grid_y, int shared_bytes,
           const typename Kernel::Params& params) const {
    STD_TORCH_CHECK(grid_x < int64_t{1} << 31 && grid_y < 65536, name, " has a grid of ", grid_x, " x ",
                    grid_y, " blocks, expected fewer than 2^31 x 65536: split the batch");
    const char* error =
        gpu::launch<Kernel>(static_cast<int>(grid_x), static_cast<int>(grid_y), shared_bytes, stream, params);
    STD_TORCH_CHECK(error == nullptr, name, " does not launch: ", error);
  }

  gpu::Stream stream{};
  int device = 0, processors = 1, capability = 80;
};

// `x`, or a copy of it if it does not start at a multiple of `bytes`, as many as a kernel reads of it at
// once.
inline Tensor starting_at(int64_t bytes, const Tensor& x) {
  const bool does = reinterpret_cast<uintptr_t>(x.const_data_ptr()) % static_cast<uintptr_t>(bytes) == 0;
  return does ? x : torch::stable::clone(x);
}

inline gpu::Codes codes_of(const QuantTail& tail) {
  return {tail.q,
          tail.out_scale,
          tail.scale,
          tail.scale_per_row,
          tail.zero_point,
          tail.qmin,
          tail.qmax,
          static_cast<int>(tail.groups),
          static_cast<int>(tail.k / tail.groups),
          tail.row_qmax,
          tail.lut};
}

}  // namespace vitq::glue
