// Instructions of sm_90a by name: mbarriers, bulk tensor copies and wgmma. Where a C++ compiler reads this,
// they follow the PTX manual's layouts, written down once more in fragment_sm90.h.
#pragma once

#include "common/gpu/ptx.cuh"

#if defined(__CUDACC__)
#include <cuda.h>
#include <cudaTypedefs.h>
// Kernels of sm_90a do nothing but fail in the passes of other architectures.
#if defined(__CUDA_ARCH_FEAT_SM90_ALL)
#define VITQ_SM90A 1
#endif
#else
#include "common/gpu/fragment_sm90.h"
#define VITQ_SM90A 1
#endif

namespace vitq::gpu {

// ---- maps of tiles in shared memory

// Rows of kSpan bytes of K, one after the other, swizzled over that span: rows 8 apart lie in the same banks,
// fewer in different ones.
template <int kSpan>
constexpr int swizzled(int row, int byte) {
  static_assert(kSpan == 128 || kSpan == 64);
  return row * kSpan + (byte ^ row * kSpan / 128 % (kSpan / 16) * 16);
}

// wgmma's matrix-descriptor of such rows from byte `first` of K on, a multiple of 32; the tile starts at a
// multiple of 8 rows' bytes, so that addresses and offsets swizzle alike.
template <int kSpan>
VITQ_HOST_DEVICE constexpr uint64_t tile_descriptor(uint32_t address, int first) {
  static_assert(kSpan == 128 || kSpan == 64);
  constexpr uint64_t kMode = kSpan == 128 ? 1 : 2, kGroup = 8 * kSpan;
  return kMode << 62 | kGroup / 16 << 32 | uint64_t{1} << 16 | (address + first) % (1u << 18) / 16;
}

using Barrier = uint64_t;

#if defined(__CUDACC__)

// ---- bulk tensor copies

using TensorMap = CUtensorMap;

// Of `rows` rows of `row_bytes` bytes, `pitch` apart, in boxes. Returns nullptr, or what is wrong.
inline const char* describe_rows(TensorMap* map, const void* data, int64_t row_bytes, int64_t rows,
                                 int64_t pitch, int box_bytes, int box_rows, int span) {
  // Through the runtime: the library must load where there is no driver.
  static const auto encode = [] {
    void* found = nullptr;
    cudaDriverEntryPointQueryResult status{};
    const cudaError_t error =
        cudaGetDriverEntryPointByVersion("cuTensorMapEncodeTiled", &found, 12000, cudaEnableDefault, &status);
    return error == cudaSuccess && status == cudaDriverEntryPointSuccess
               ? reinterpret_cast<PFN_cuTensorMapEncodeTiled_v12000>(found)
               : nullptr;
  }();
  if (encode == nullptr) return "the driver has no cuTensorMapEncodeTiled";
  const cuuint64_t sizes[2] = {static_cast<cuuint64_t>(row_bytes), static_cast<cuuint64_t>(rows)};
  const cuuint64_t strides[1] = {static_cast<cuuint64_t>(pitch)};
  const cuuint32_t box[2] = {static_cast<cuuint32_t>(box_bytes), static_cast<cuuint32_t>(box_rows)};
  const cuuint32_t steps[2] = {1, 1};
  const CUresult result = encode(map, CU_TENSOR_MAP_DATA_TYPE_UINT8, 2, const_cast<void*>(data), sizes,
                                 strides, box, steps, CU_TENSOR_MAP_INTERLEAVE_NONE,
                                 span == 128 ? CU_TENSOR_MAP_SWIZZLE_128B : CU_TENSOR_MAP_SWIZZLE_64B,
                                 CU_TENSOR_MAP_L2_PROMOTION_L2_256B, CU_TENSOR_MAP_FLOAT_OOB_FILL_NONE);
  return result == CUDA_SUCCESS ? nullptr : "cuTensorMapEncodeTiled refuses the tensor";
}

// The box from (row, byte `column`) into `to`, zeros where there is no tensor; its bytes count at `barrier`.
VITQ_DEVICE void load_tile(const TensorMap& map, void* to, Barrier* barrier, int column, int row) {
  asm volatile(
      "cp.async.bulk.tensor.2d.shared::cluster.global.mbarrier::complete_tx::bytes [%0], [%1, {%3, %4}], "
      "[%2];" ::"r"(shared_address(to)),
      "l"(&map), "r"(shared_address(barrier)), "r"(column), "r"(row)
      : "memory");
}
VITQ_DEVICE void prefetch(const TensorMap& map) {
  asm volatile("prefetch.tensormap [%0];" ::"l"(&map) : "memory");
}

// Makes this thread's writes to shared memory before it those that bulk copies and wgmma see.
VITQ_DEVICE void fence_async() { asm volatile("fence.proxy.async.shared::cta;" ::: "memory"); }

// ---- mbarriers: a phase ends with its arrivals and the bytes they expect

VITQ_DEVICE void barrier_init(Barrier* barrier, int arrivals) {
  asm volatile("mbarrier.init.shared::cta.b64 [%0], %1;" ::"r"(shared_address(barrier)), "r"(arrivals)
               : "memory");
}
VITQ_DEVICE void fence_barrier_init() { asm volatile("fence.mbarrier_init.release.cluster;" ::: "memory"); }
VITQ_DEVICE void barrier_arrive(Barrier* barrier, int times = 1) {
  asm volatile("mbarrier.arrive.shared::cta.b64 _, [%0], %1;" ::"r"(shared_address(barrier)), "r"(times)
               : "memory");
}
VITQ_DEVICE void barrier_arrive_expecting(Barrier* barrier, int bytes) {
  asm volatile("mbarrier.arrive.expect_tx.shared::cta.b64 _, [%0], %1;" ::"r"(shared_address(barrier)),
               "r"(bytes)
               : "memory");
}
// Until the phase of this parity has ended; the one before a barrier's first counts as one of parity 1.
VITQ_DEVICE void barrier_wait(Barrier* barrier, int parity) {
  asm volatile(
      "{\n"
      ".reg .pred done;\n"
      "again:\n"
      "mbarrier.try_wait.parity.shared::cta.b64 done, [%0], %1;\n"
      "@!done bra again;\n"
      "}" ::"r"(shared_address(barrier)),
      "r"(parity)
      : "memory");
}

// Barrier `id` of kThreads of the block's threads, in whole warps.
template <int kThreads>
VITQ_DEVICE void sync_some(int id) {
  asm volatile("bar.sync %0, %1;" ::"r"(id), "n"(kThreads) : "memory");
}

// One lane of the warp.
VITQ_DEVICE bool elect() {
  uint32_t chosen;
  asm volatile(
      "{\n"
      ".reg .pred p;\n"
      "elect.sync _|p, 0xffffffff;\n"
      "selp.b32 %0, 1, 0, p;\n"
      "}"
      : "=r"(chosen));
  return chosen != 0;
}

// Registers of each thread of the calling warpgroup from here on.
template <int kRegisters>
VITQ_DEVICE void take_registers() {
  asm volatile("setmaxnreg.inc.sync.aligned.u32 %0;" ::"n"(kRegisters));
}
template <int kRegisters>
VITQ_DEVICE void leave_registers() {
  asm volatile("setmaxnreg.dec.sync.aligned.u32 %0;" ::"n"(kRegisters));
}

// ---- wgmma: d[64, kN] += a[64, 32 bytes]·b[kN, 32 bytes], over 128 threads, done when waited for

// Before the first after registers were touched.
VITQ_DEVICE void group_fence() { asm volatile("wgmma.fence.sync.aligned;" ::: "memory"); }
VITQ_DEVICE void group_commit() { asm volatile("wgmma.commit_group.sync.aligned;" ::: "memory"); }
template <int kNewestLeft>
VITQ_DEVICE void group_wait() {
  asm volatile("wgmma.wait_group.sync.aligned %0;" ::"n"(kNewestLeft) : "memory");
}
// Keeps reads of the sums behind a wait: to the compiler, an instruction has its result when it is issued.
template <int kCount>
VITQ_DEVICE void pin(int (&d)[kCount]) {
  VITQ_UNROLL
  for (int i = 0; i < kCount; ++i) asm volatile("" : "+r"(d[i]));
}
template <int kCount>
VITQ_DEVICE void pin(float (&d)[kCount]) {
  VITQ_UNROLL
  for (int i = 0; i < kCount; ++i) asm volatile("" : "+f"(d[i]));
}

#define VITQ_TEN(t) \
  "%" #t "0,%" #t "1,%" #t "2,%" #t "3,%" #t "4,%" #t "5,%" #t "6,%" #t "7,%" #t "8,%" #t "9,"
#define VITQ_NAMES_64                                                              \
  "%0,%1,%2,%3,%4,%5,%6,%7,%8,%9," VITQ_TEN(1) VITQ_TEN(2) VITQ_TEN(3) VITQ_TEN(4) \
      VITQ_TEN(5) "%60,%61,%62,%63"
#define VITQ_NAMES_128                                                                                     \
  "%0,%1,%2,%3,%4,%5,%6,%7,%8,%9," VITQ_TEN(1) VITQ_TEN(2) VITQ_TEN(3) VITQ_TEN(4) VITQ_TEN(5) VITQ_TEN(6) \
      VITQ_TEN(7) VITQ_TEN(8) VITQ_TEN(9) VITQ_TEN(10)                                                     \
          VITQ_TEN(11) "%120,%121,%122,%123,%124,%125,%126,%127"
#define VITQ_EIGHT(c, i) \
  c(d[i]), c(d[i + 1]), c(d[i + 2]), c(d[i + 3]), c(d[i + 4]), c(d[i + 5]), c(d[i + 6]), c(d[i + 7])
#define VITQ_SUMS_64(c, i)                                                              \
  VITQ_EIGHT(c, i), VITQ_EIGHT(c, i + 8), VITQ_EIGHT(c, i + 16), VITQ_EIGHT(c, i + 24), \
      VITQ_EIGHT(c, i + 32), VITQ_EIGHT(c, i + 40), VITQ_EIGHT(c, i + 48), VITQ_EIGHT(c, i + 56)
#define VITQ_SUMS_128(c, i) VITQ_SUMS_64(c, i), VITQ_SUMS_64(c, i + 64)
// One instruction: `a` names operand A, `b` B's descriptor, `tail` what follows. Always onto d: where a first
// one is told not to at run time, the compiler keeps what d held before.
#define VITQ_WGMMA(type, sums, a, b, tail, c, ...)                                          \
  asm volatile("{\n.reg .pred p;\nsetp.eq.b32 p, 0, 0;\nwgmma.mma_async.sync.aligned." type \
               " {" VITQ_NAMES_##sums "}, " a ", " b ", p" tail ";\n}"                      \
               : VITQ_SUMS_##sums(c, 0)                                                     \
               : __VA_ARGS__)

template <int kCount>
VITQ_DEVICE void group_mma_s8(int (&d)[kCount], uint64_t a, uint64_t b) {
  static_assert(kCount == 64 || kCount == 128);
  if constexpr (kCount == 64) {
    VITQ_WGMMA("m64n128k32.s32.s8.s8", 64, "%64", "%65", "", "+r", "l"(a), "l"(b));
  } else {
    VITQ_WGMMA("m64n256k32.s32.s8.s8", 128, "%128", "%129", "", "+r", "l"(a), "l"(b));
  }
}
// Operand A from registers, which stay as they are until the wait.
template <int kCount>
VITQ_DEVICE void group_mma_s8(int (&d)[kCount], const uint32_t (&a)[4], uint64_t b) {
  static_assert(kCount == 64 || kCount == 128);
  if constexpr (kCount == 64) {
    VITQ_WGMMA("m64n128k32.s32.s8.s8", 64, "{%64,%65,%66,%67}", "%68", "", "+r", "r"(a[0]), "r"(a[1]),
               "r"(a[2]), "r"(a[3]), "l"(b));
  } else {
    VITQ_WGMMA("m64n256k32.s32.s8.s8", 128, "{%128,%129,%130,%131}", "%132", "", "+r", "r"(a[0]), "r"(a[1]),
               "r"(a[2]), "r"(a[3]), "l"(b));
  }
}
// d += a·bᵀ of float16 or bfloat16.
template <DType kType, int kCount>
VITQ_DEVICE void group_mma_16(float (&d)[kCount], uint64_t a, uint64_t b) {
  static_assert(kType != DType::f32 && (kCount == 64 || kCount == 128));
  if constexpr (kCount == 64 && kType == DType::f16) {
    VITQ_WGMMA("m64n128k16.f32.f16.f16", 64, "%64", "%65", ", 1, 1, 0, 0", "+f", "l"(a), "l"(b));
  } else if constexpr (kCount == 64) {
    VITQ_WGMMA("m64n128k16.f32.bf16.bf16", 64, "%64", "%65", ", 1, 1, 0, 0", "+f", "l"(a), "l"(b));
  } else if constexpr (kType == DType::f16) {
    VITQ_WGMMA("m64n256k16.f32.f16.f16", 128, "%128", "%129", ", 1, 1, 0, 0", "+f", "l"(a), "l"(b));
  } else {
    VITQ_WGMMA("m64n256k16.f32.bf16.bf16", 128, "%128", "%129", ", 1, 1, 0, 0", "+f", "l"(a), "l"(b));
  }
}

#undef VITQ_TEN
#undef VITQ_NAMES_64
#undef VITQ_NAMES_128
#undef VITQ_EIGHT
#undef VITQ_SUMS_64
#undef VITQ_SUMS_128
#undef VITQ_WGMMA

#else

using emulated::fence_async;
using emulated::fence_barrier_init;
using emulated::group_commit;
using emulated::group_fence;
using emulated::load_tile;
using emulated::shared_address;
using emulated::TensorMap;

inline const char* describe_rows(TensorMap* map, const void* data, int64_t row_bytes, int64_t rows,
                                 int64_t pitch, int box_bytes, int box_rows, int span) {
  return emulated::describe(map, data, row_bytes, rows, pitch, box_bytes, box_rows, span);
}
inline void prefetch(const TensorMap&) {}

inline void barrier_init(Barrier* barrier, int arrivals) { emulated::barrier_init(barrier, arrivals); }
inline void barrier_arrive(Barrier* barrier, int times = 1) { emulated::barrier_arrive(barrier, times, 0); }
inline void barrier_arrive_expecting(Barrier* barrier, int bytes) {
  emulated::barrier_arrive(barrier, 1, bytes);
}
inline void barrier_wait(Barrier* barrier, int parity) { emulated::barrier_wait(barrier, parity); }

template <int kThreads>
void sync_some(int id) {
  emulated::sync_some(id, kThreads);
}

inline bool elect() {
  emulated::together("elect", nullptr, [](void* const*) {});
  return lane() == 0;
}

template <int kRegisters>
void take_registers() {
  static_assert(kRegisters % 8 == 0 && kRegisters >= 24 && kRegisters <= 256);
  emulated::together("setmaxnreg", nullptr, [](void* const*) {});
}
template <int kRegisters>
void leave_registers() {
  take_registers<kRegisters>();
}

template <int kNewestLeft>
void group_wait() {
  emulated::group_wait(kNewestLeft);
}
template <class T, int kCount>
void pin(T (&)[kCount]) {}

template <int kCount>
void group_mma_s8(int (&d)[kCount], uint64_t a, uint64_t b) {
  emulated::group_multiply(
      {d, nullptr, a, b, emulated::multiply_group<int8_t, int, emulated::int_of_code, 2 * kCount>});
}
template <int kCount>
void group_mma_s8(int (&d)[kCount], const uint32_t (&a)[4], uint64_t b) {
  emulated::group_multiply(
      {d, a, 0, b, emulated::multiply_group<int8_t, int, emulated::int_of_code, 2 * kCount>});
}
template <DType kType, int kCount>
void group_mma_16(float (&d)[kCount], uint64_t a, uint64_t b) {
  constexpr auto widen = kType == DType::f16 ? emulated::float_of_half : emulated::float_of_bfloat;
  emulated::group_multiply({d, nullptr, a, b, emulated::multiply_group<uint16_t, float, widen, 2 * kCount>});
}

#endif

}  // namespace vitq::gpu
