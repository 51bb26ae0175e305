#include "common/gpu/emulation.h"

#include <ucontext.h>

#include <cstdlib>
#include <cstring>
#include <deque>
#include <memory>
#include <random>
#include <string>
#include <vector>

#if defined(__SANITIZE_ADDRESS__)
#include <sanitizer/common_interface_defs.h>
#define VITQ_SWITCH_START(save, bottom, size) __sanitizer_start_switch_fiber(save, bottom, size)
#define VITQ_SWITCH_FINISH(save) __sanitizer_finish_switch_fiber(save, nullptr, nullptr)
#else
#define VITQ_SWITCH_START(save, bottom, size) static_cast<void>(save)
#define VITQ_SWITCH_FINISH(save) static_cast<void>(save)
#endif

namespace vitq::gpu::emulated {
namespace {

constexpr int kLanes = 32;
constexpr size_t kStack = 256 * 1024;
constexpr int kPoison = 0xA5;

struct Copy {
  void* to;
  const void* from;
  int bytes, valid;
};

struct Fiber {
  Thread index{};
  ucontext_t context{};
  std::unique_ptr<char[]> stack;
  void* fake_stack = nullptr;       // AddressSanitizer's
  const char* waits_for = nullptr;  // nullptr while it can go on
  bool done = false;
  std::deque<std::vector<Copy>> committed;
  std::vector<Copy> open;
};

// What the lanes of a warp, or the threads of a block, wait for together.
struct Meeting {
  int arrived = 0;
  const char* what = nullptr;
  void* arguments[kLanes] = {};
};

struct Block {
  std::vector<Fiber> fibers;
  std::vector<Meeting> warps;
  Meeting barrier;
  std::unique_ptr<char[]> memory;
  char* shared = nullptr;
  const std::function<void()>* body = nullptr;
  ucontext_t scheduler{};
  void* scheduler_fake_stack = nullptr;
  Fiber* running = nullptr;
  std::vector<int> runnable;
  std::string error;
};

Block* g_block = nullptr;

void to_scheduler() {
  Block& b = *g_block;
  Fiber& self = *b.running;
  VITQ_SWITCH_START(&self.fake_stack, nullptr, 0);
  swapcontext(&self.context, &b.scheduler);
  VITQ_SWITCH_FINISH(self.fake_stack);
}

void fiber_main() {
  VITQ_SWITCH_FINISH(nullptr);
  Block& b = *g_block;
  (*b.body)();
  b.running->done = true;
  VITQ_SWITCH_START(nullptr, nullptr, 0);
  setcontext(&b.scheduler);
}

void wait(const char* what) {
  g_block->running->waits_for = what;
  to_scheduler();
}

void wake(int first, int count) {
  Block& b = *g_block;
  for (int i = first; i < first + count; ++i) {
    if (b.fibers[i].waits_for == nullptr) continue;  // the one that woke them
    b.fibers[i].waits_for = nullptr;
    b.runnable.push_back(i);
  }
}

void fail(const std::string& what) {
  if (g_block->error.empty()) g_block->error = what;
  wait("the end, after an error");
}

void do_copy(const Copy& c) {
  std::memcpy(c.to, c.from, static_cast<size_t>(c.valid));
  std::memset(static_cast<char*>(c.to) + c.valid, 0, static_cast<size_t>(c.bytes - c.valid));
}

unsigned seed_of_environment() {
  const char* text = std::getenv("VITQ_EMULATION_SEED");
  return text == nullptr ? 0u : static_cast<unsigned>(std::strtoul(text, nullptr, 10));
}

}  // namespace

const Thread& current() { return g_block->running->index; }
char* shared() { return g_block->shared; }

void together(const char* what, void* argument, void (*all)(void* const*)) {
  Block& b = *g_block;
  const int thread = b.running->index.thread;
  Meeting& m = b.warps[thread / kLanes];
  if (m.arrived > 0 && std::strcmp(m.what, what) != 0) {
    fail(std::string("lanes of one warp diverge: some are at ") + m.what + ", one at " + what);
  }
  m.what = what;
  m.arguments[thread % kLanes] = argument;
  if (++m.arrived < kLanes) return wait(what);
  all(m.arguments);
  m.arrived = 0;
  wake(thread / kLanes * kLanes, kLanes);
}

void sync_warp() {
  together("sync_warp", nullptr, [](void* const*) {});
}

void sync_block() {
  Block& b = *g_block;
  const int threads = static_cast<int>(b.fibers.size());
  if (++b.barrier.arrived < threads) return wait("sync");
  b.barrier.arrived = 0;
  wake(0, threads);
}

void copy_async(void* to, const void* from, int bytes, int valid) {
  std::memset(to, kPoison, static_cast<size_t>(bytes));
  g_block->running->open.push_back({to, from, bytes, valid});
}

void commit_copies() {
  Fiber& f = *g_block->running;
  f.committed.push_back(std::move(f.open));
  f.open.clear();
}

void wait_copies(int newest_left) {
  Fiber& f = *g_block->running;
  while (static_cast<int>(f.committed.size()) > newest_left) {
    for (const Copy& c : f.committed.front()) do_copy(c);
    f.committed.pop_front();
  }
}

const char* run(int grid_x, int grid_y, int threads, int shared_bytes, const std::function<void()>& body) {
  static std::string message;
  std::mt19937 random(seed_of_environment());
  Block b;
  b.fibers.resize(static_cast<size_t>(threads));
  for (Fiber& f : b.fibers) f.stack = std::make_unique_for_overwrite<char[]>(kStack);
  b.memory = std::make_unique<char[]>(static_cast<size_t>(shared_bytes) + 128);
  b.shared = b.memory.get() + (128 - reinterpret_cast<uintptr_t>(b.memory.get()) % 128);
  b.body = &body;
  g_block = &b;
  for (int y = 0; y < grid_y && b.error.empty(); ++y) {
    for (int x = 0; x < grid_x && b.error.empty(); ++x) {
      std::memset(b.shared, kPoison, static_cast<size_t>(shared_bytes));
      b.warps.assign(static_cast<size_t>((threads + kLanes - 1) / kLanes), {});
      b.barrier = {};
      b.runnable.clear();
      for (int i = 0; i < threads; ++i) {
        Fiber& f = b.fibers[i];
        f.index = {i, x, y, grid_x, grid_y};
        f.waits_for = nullptr;
        f.done = false;
        f.committed.clear();
        f.open.clear();
        getcontext(&f.context);
        f.context.uc_stack.ss_sp = f.stack.get();
        f.context.uc_stack.ss_size = kStack;
        f.context.uc_link = nullptr;
        makecontext(&f.context, fiber_main, 0);
        b.runnable.push_back(i);
      }
      while (!b.runnable.empty() && b.error.empty()) {
        const size_t pick = random() % b.runnable.size();
        const int next = b.runnable[pick];
        b.runnable[pick] = b.runnable.back();
        b.runnable.pop_back();
        Fiber& f = b.fibers[next];
        b.running = &f;
        VITQ_SWITCH_START(&b.scheduler_fake_stack, f.stack.get(), kStack);
        swapcontext(&b.scheduler, &f.context);
        VITQ_SWITCH_FINISH(b.scheduler_fake_stack);
      }
      for (const Fiber& f : b.fibers) {
        if (f.done || !b.error.empty()) continue;
        b.error = "thread " + std::to_string(f.index.thread) + " of block (" + std::to_string(x) + ", " +
                  std::to_string(y) + ") waits forever at " + f.waits_for;
      }
    }
  }
  g_block = nullptr;
  message = b.error;
  return message.empty() ? nullptr : message.c_str();
}

}  // namespace vitq::gpu::emulated
