// Runs a kernel on the host: the threads of a block are fibers on one OS thread, blocks run one after
// another.
//
// What is checked while it runs: that all threads of a warp reach the same warp-wide operation and all
// threads of a block the same barriers (else the launch fails and says where they wait); that shared memory
// is written before it is read (it starts out poisoned); that an asynchronous copy is waited for (its
// destination is poisoned until then). Which of the runnable threads goes on is drawn at random from
// VITQ_EMULATION_SEED, so that a missing barrier shows.
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

// One operation of a whole warp: `all` gets the 32 lanes' `argument`s once every lane has come, on behalf of
// all. `what` names it: lanes that meet must name the same.
void together(const char* what, void* argument, void (*all)(void* const* arguments));

// cp.async, cp.async.commit_group, cp.async.wait_group n of the current thread.
void copy_async(void* to, const void* from, int bytes, int valid);
void commit_copies();
void wait_copies(int newest_left);

// nullptr, or what went wrong.
const char* run(int grid_x, int grid_y, int threads, int shared_bytes, const std::function<void()>& body);

}  // namespace vitq::gpu::emulated
