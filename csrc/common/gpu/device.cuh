// What a kernel is written in: CUDA where nvcc compiles it, a host emulation (emulation.h) where a C++
// compiler does, so that the sources that GPUs run also run in tests without one.
//
// A kernel is a struct with Params, kThreads, kBlocksPerSm and `static VITQ_DEVICE void run(const Params&)`;
// `launch<Kernel>` starts it.
#pragma once

#include <cstdint>

#if defined(__CUDACC__)
#include <cuda_runtime.h>
#define VITQ_DEVICE __device__ __forceinline__
#define VITQ_HOST_DEVICE __host__ __device__ __forceinline__
#define VITQ_UNROLL _Pragma("unroll")
#define VITQ_UNROLL_ONCE _Pragma("unroll 1")
#define VITQ_UNROLL_TWICE _Pragma("unroll 2")
#else
#include "common/gpu/emulation.h"
#define VITQ_DEVICE inline
#define VITQ_HOST_DEVICE inline
#define VITQ_UNROLL
#define VITQ_UNROLL_ONCE
#define VITQ_UNROLL_TWICE
#endif

namespace vitq::gpu {

constexpr int kWarp = 32;

struct alignas(8) Words2 {
  uint32_t w[2];
};
struct alignas(16) Words4 {
  uint32_t w[4];
};
struct alignas(16) Floats4 {
  float v[4];
};

#if defined(__CUDACC__)

using Stream = cudaStream_t;

VITQ_DEVICE int thread() { return static_cast<int>(threadIdx.x); }
// The same, which a compiler neither moves nor keeps: what follows from it holds no register from one use to
// the next.
VITQ_DEVICE int thread_anew() {
  int out;
  asm volatile("mov.u32 %0, %%tid.x;" : "=r"(out));
  return out;
}
VITQ_DEVICE int block() { return static_cast<int>(blockIdx.x); }
VITQ_DEVICE int block_y() { return static_cast<int>(blockIdx.y); }
VITQ_DEVICE int blocks() { return static_cast<int>(gridDim.x); }
VITQ_DEVICE int blocks_y() { return static_cast<int>(gridDim.y); }
VITQ_DEVICE void sync() { __syncthreads(); }
VITQ_DEVICE void sync_warp() { __syncwarp(); }

VITQ_DEVICE char* shared() {
  extern __shared__ __align__(1024) char memory[];
  return memory;
}

template <class Kernel>
__global__ void __launch_bounds__(Kernel::kThreads, Kernel::kBlocksPerSm)
    entry(const __grid_constant__ typename Kernel::Params params) {
  Kernel::run(params);
}

// Returns nullptr, or what the runtime says is wrong. More than 48 KiB of shared memory is asked for once per
// kernel and device.
template <class Kernel>
const char* launch(int grid_x, int grid_y, int shared_bytes, Stream stream,
                   const typename Kernel::Params& params) {
  auto* kernel = entry<Kernel>;
  if (shared_bytes > 48 * 1024) {
    const cudaError_t error =
        cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, shared_bytes);
    if (error != cudaSuccess) return cudaGetErrorString(error);
  }
  kernel<<<dim3(grid_x, grid_y), Kernel::kThreads, shared_bytes, stream>>>(params);
  const cudaError_t error = cudaGetLastError();
  return error == cudaSuccess ? nullptr : cudaGetErrorString(error);
}

#else

using Stream = void*;

inline int thread() { return emulated::current().thread; }
inline int thread_anew() { return thread(); }
inline int block() { return emulated::current().block; }
inline int block_y() { return emulated::current().block_y; }
inline int blocks() { return emulated::current().blocks; }
inline int blocks_y() { return emulated::current().blocks_y; }
inline void sync() { emulated::sync_block(); }
inline void sync_warp() { emulated::sync_warp(); }
inline char* shared() { return emulated::shared(); }

template <class Kernel>
const char* launch(int grid_x, int grid_y, int shared_bytes, Stream, const typename Kernel::Params& params) {
  return emulated::run(grid_x, grid_y, Kernel::kThreads, shared_bytes, [&params] { Kernel::run(params); });
}

#endif

VITQ_DEVICE int lane() { return thread() % kWarp; }
VITQ_DEVICE int warp() { return thread() / kWarp; }

}  // namespace vitq::gpu
