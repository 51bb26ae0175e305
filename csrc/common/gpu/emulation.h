// Runs a kernel on the host: the threads of a block are fibers on one OS thread, blocks run one after
// another.
//
// What is checked while it runs: that all threads of a warp reach the same warp-wide operation and all
// threads of a block the same barriers (else the launch fails and says where they wait); that shared memory
// is written before it is read (it starts out poisoned); that what ldmatrix reads is aligned; that an
// asynchronous copy is, and is waited for (its destination is poisoned until then). Which of the runnable
// threads goes on is drawn at random from VITQ_EMULATION_SEED, so that a missing barrier shows.
//
// Of sm_90: a bulk copy lands when somebody waits for it, in any order among those awaited; wgmma reads its
// operands when it is waited for. Both see a second image of shared memory, which ordinary writes reach at a
// fence.proxy.async only (that fence then publishes the writes of all threads, more than the real one does).
#pragma once

#include <cstddef>
#include <cstdint>
#include <functional>

namespace vitq::gpu::emulated {

struct Thread {
  int thread, block, block_y, blocks, blocks_y;
};

const Thread& current();
char* shared();
void sync_block();
void sync_warp();
// Named barrier `id` of `threads` threads.
void sync_some(int id, int threads);

// One operation of a whole warp: `all` gets the 32 lanes' `argument`s once every lane has come, on behalf of
// all. `what` names it: lanes that meet must name the same.
void together(const char* what, void* argument, void (*all)(void* const* arguments));

// The launch fails if `p` is not a multiple of 16 bytes: a row of ldmatrix.
void expect_row(const void* p);

// cp.async, cp.async.commit_group, cp.async.wait_group n of the current thread.
void copy_async(void* to, const void* from, int bytes, int valid);
void commit_copies();
void wait_copies(int newest_left);

// ---- sm_90

uint32_t shared_address(const void* p);
// What bulk copies and wgmma see, by shared_address.
const char* async_memory();
void fence_async();

// mbarrier: by its place, 8 bytes of shared memory. Arriving expects `bytes` more of bulk copies first.
void barrier_init(const void* barrier, int arrivals);
void fence_barrier_init();
void barrier_arrive(const void* barrier, int times, int bytes);
void barrier_wait(const void* barrier, int parity);

// `read` writes `bytes` as they are to lie at `to`, once somebody waits for the barrier.
void copy_bulk(void* to, int bytes, const void* barrier, std::function<void(char* image)> read);

// wgmma of one thread; `multiply` gets those of a warpgroup's 128.
struct GroupMultiply {
  void* d;
  const uint32_t* a;  // operand A in registers, or null
  uint64_t a_descriptor, b_descriptor;
  void (*multiply)(const GroupMultiply* threads);
};
void group_fence();
void group_multiply(const GroupMultiply& thread);
void group_commit();
void group_wait(int newest_left);

// nullptr, or what went wrong.
const char* run(int grid_x, int grid_y, int threads, int shared_bytes, const std::function<void()>& body);

}  // namespace vitq::gpu::emulated
