#include "common/gpu/emulation.h"

#include <ucontext.h>

#include <cstdlib>
#include <cstring>
#include <deque>
#include <map>
#include <memory>
#include <random>
#include <string>
#include <vector>

#if defined(__SANITIZE_ADDRESS__)
#include <sanitizer/common_interface_defs.h>
#define VITQ_SWITCH_START(save, bottom, size) __sanitizer_start_switch_fiber(save, bottom, size)
#define VITQ_SWITCH_FINISH(save, bottom, size) __sanitizer_finish_switch_fiber(save, bottom, size)
#else
#define VITQ_SWITCH_START(save, bottom, size) static_cast<void>(save)
#define VITQ_SWITCH_FINISH(save, bottom, size) static_cast<void>(save)
#endif

namespace vitq::gpu::emulated {
namespace {

constexpr int kLanes = 32, kGroup = 128;
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
  const void* barrier = nullptr;    // the mbarrier that it waits for
  bool done = false;
  std::deque<std::vector<Copy>> committed;
  std::vector<Copy> open;
};

// What the lanes of a warp, a warpgroup's or a block's threads wait for together.
struct Meeting {
  int arrived = 0;
  const char* what = nullptr;
  void* arguments[kGroup] = {};
  std::vector<int> waiting;  // of named barriers, who has come
};

struct Barrier {
  int expected = 0, pending = 0, bytes = 0, phase = 0;
  bool fenced = false;
};

struct BulkCopy {
  void* to;
  int bytes;
  const void* barrier;
  std::function<void(char*)> read;
};

// wgmmas of one warpgroup under way.
struct Group {
  Meeting meeting;
  bool fenced = false;
  using Batch = std::vector<std::vector<GroupMultiply>>;
  std::deque<Batch> committed;
  Batch open;
};

struct Block {
  std::vector<Fiber> fibers;
  std::vector<Meeting> warps;
  std::vector<Group> groups;
  Meeting barrier;
  std::map<int, Meeting> named;
  std::map<const void*, Barrier> barriers;
  std::vector<BulkCopy> copies;
  std::unique_ptr<char[]> memory;
  char* shared = nullptr;
  std::vector<char> async;  // what bulk copies and wgmma see of it
  const std::function<void()>* body = nullptr;
  ucontext_t scheduler{};
  // AddressSanitizer's. It must know the scheduler's own stack again, or it aborts where a later call throws.
  void* scheduler_fake_stack = nullptr;
  const void* scheduler_stack = nullptr;
  size_t scheduler_stack_bytes = 0;
  Fiber* running = nullptr;
  std::vector<int> runnable;
  std::string error;
};

Block* g_block = nullptr;

void to_scheduler() {
  Block& b = *g_block;
  Fiber& self = *b.running;
  VITQ_SWITCH_START(&self.fake_stack, b.scheduler_stack, b.scheduler_stack_bytes);
  swapcontext(&self.context, &b.scheduler);
  VITQ_SWITCH_FINISH(self.fake_stack, nullptr, nullptr);
}

void fiber_main() {
  Block& b = *g_block;
  VITQ_SWITCH_FINISH(nullptr, &b.scheduler_stack, &b.scheduler_stack_bytes);
  (*b.body)();
  b.running->done = true;
  VITQ_SWITCH_START(nullptr, b.scheduler_stack, b.scheduler_stack_bytes);
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

// Returns when all `count` threads from `first` have come, `all` done with their arguments.
template <class All>
void meet(Meeting& m, int first, int count, const char* what, void* argument, const All& all) {
  if (m.arrived > 0 && std::strcmp(m.what, what) != 0) {
    const std::string who = count == kLanes ? "lanes of one warp" : "threads of one warpgroup";
    fail(who + " diverge: some are at " + m.what + ", one at " + what);
  }
  m.what = what;
  m.arguments[g_block->running->index.thread - first] = argument;
  if (++m.arrived < count) return wait(what);
  all(m.arguments);
  m.arrived = 0;
  wake(first, count);
}

Group& group() { return g_block->groups[g_block->running->index.thread / kGroup]; }

template <class All>
void meet_group(const char* what, void* argument, const All& all) {
  meet(group().meeting, g_block->running->index.thread / kGroup * kGroup, kGroup, what, argument, all);
}

Barrier& barrier_at(const void* place) {
  const auto found = g_block->barriers.find(place);
  if (found == g_block->barriers.end()) fail("an mbarrier is used before its init");
  return found->second;
}

void end_phase_if_complete(const void* place) {
  Block& b = *g_block;
  Barrier& barrier = b.barriers[place];
  if (barrier.pending > 0 || barrier.bytes != 0) return;
  ++barrier.phase;
  barrier.pending = barrier.expected;
  for (Fiber& f : b.fibers) {
    if (f.waits_for == nullptr || f.barrier != place) continue;
    f.barrier = nullptr;
    wake(f.index.thread, 1);
  }
}

// One bulk copy that somebody waits for, if there is one.
bool land_a_copy(unsigned random) {
  Block& b = *g_block;
  std::vector<size_t> awaited;
  for (size_t i = 0; i < b.copies.size(); ++i) {
    for (const Fiber& f : b.fibers) {
      if (f.barrier != b.copies[i].barrier) continue;
      awaited.push_back(i);
      break;
    }
  }
  if (awaited.empty()) return false;
  const size_t i = awaited[random % awaited.size()];
  const BulkCopy copy = std::move(b.copies[i]);
  b.copies.erase(b.copies.begin() + static_cast<ptrdiff_t>(i));
  copy.read(static_cast<char*>(copy.to));
  std::memcpy(b.async.data() + shared_address(copy.to), copy.to, static_cast<size_t>(copy.bytes));
  b.barriers[copy.barrier].bytes -= copy.bytes;
  end_phase_if_complete(copy.barrier);
  return true;
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
  const int warp = g_block->running->index.thread / kLanes;
  meet(g_block->warps[warp], warp * kLanes, kLanes, what, argument, all);
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

void sync_some(int id, int threads) {
  Block& b = *g_block;
  Meeting& m = b.named[id];
  m.waiting.push_back(b.running->index.thread);
  if (static_cast<int>(m.waiting.size()) < threads) return wait("a named barrier");
  const std::vector<int> came = std::move(m.waiting);
  m.waiting.clear();
  for (const int thread : came) wake(thread, 1);
}

uint32_t shared_address(const void* p) {
  return static_cast<uint32_t>(static_cast<const char*>(p) - g_block->shared);
}
const char* async_memory() { return g_block->async.data(); }
void fence_async() { std::memcpy(g_block->async.data(), g_block->shared, g_block->async.size()); }

void barrier_init(const void* barrier, int arrivals) {
  g_block->barriers[barrier] = {arrivals, arrivals, 0, 0, false};
}
void fence_barrier_init() {
  for (auto& [place, barrier] : g_block->barriers) barrier.fenced = true;
}
void barrier_arrive(const void* place, int times, int bytes) {
  Barrier& barrier = barrier_at(place);
  if (barrier.pending < times) fail("an mbarrier gets more arrivals than it expects");
  barrier.bytes += bytes;
  barrier.pending -= times;
  end_phase_if_complete(place);
}
void barrier_wait(const void* place, int parity) {
  while (barrier_at(place).phase % 2 == parity) {
    g_block->running->barrier = place;
    wait("an mbarrier");
  }
}

void copy_bulk(void* to, int bytes, const void* place, std::function<void(char*)> read) {
  if (!barrier_at(place).fenced) fail("a bulk copy meets an mbarrier whose init was not fenced");
  std::memset(to, kPoison, static_cast<size_t>(bytes));
  std::memset(g_block->async.data() + shared_address(to), kPoison, static_cast<size_t>(bytes));
  g_block->copies.push_back({to, bytes, place, std::move(read)});
}

void group_fence() {
  meet_group("wgmma.fence", nullptr, [](void* const*) { group().fenced = true; });
}
void group_multiply(const GroupMultiply& thread) {
  GroupMultiply mine = thread;
  meet_group("wgmma.mma_async", &mine, [](void* const* threads) {
    if (!group().fenced) fail("wgmma without a wgmma.fence since the last wait");
    std::vector<GroupMultiply> all;
    for (int i = 0; i < kGroup; ++i) {
      all.push_back(*static_cast<const GroupMultiply*>(threads[i]));
      if (all[i].a_descriptor != all[0].a_descriptor || all[i].b_descriptor != all[0].b_descriptor ||
          all[i].multiply != all[0].multiply) {
        fail("threads of one warpgroup give wgmma different operands");
      }
    }
    group().open.push_back(std::move(all));
  });
}
void group_commit() {
  meet_group("wgmma.commit_group", nullptr, [](void* const*) {
    group().committed.push_back(std::move(group().open));
    group().open.clear();
  });
}
void group_wait(int newest_left) {
  meet_group("wgmma.wait_group", nullptr, [newest_left](void* const*) {
    Group& g = group();
    g.fenced = false;
    while (static_cast<int>(g.committed.size()) > newest_left) {
      for (const auto& call : g.committed.front()) call[0].multiply(call.data());
      g.committed.pop_front();
    }
  });
}

void expect_row(const void* p) {
  if (reinterpret_cast<uintptr_t>(p) % 16 != 0) fail("misaligned address of ldmatrix");
}

void copy_async(void* to, const void* from, int bytes, int valid) {
  const auto place = reinterpret_cast<uintptr_t>(to) | reinterpret_cast<uintptr_t>(from);
  if (place % static_cast<uintptr_t>(bytes) != 0) return fail("misaligned address of an asynchronous copy");
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
  if (grid_x < 1 || grid_y < 1) return "a grid of no blocks";
  std::mt19937 random(seed_of_environment());
  Block b;
  b.fibers.resize(static_cast<size_t>(threads));
  for (Fiber& f : b.fibers) f.stack = std::make_unique_for_overwrite<char[]>(kStack);
  b.memory = std::make_unique<char[]>(static_cast<size_t>(shared_bytes) + 1024);
  b.shared = b.memory.get() + (1024 - reinterpret_cast<uintptr_t>(b.memory.get()) % 1024);
  b.body = &body;
  g_block = &b;
  for (int y = 0; y < grid_y && b.error.empty(); ++y) {
    for (int x = 0; x < grid_x && b.error.empty(); ++x) {
      std::memset(b.shared, kPoison, static_cast<size_t>(shared_bytes));
      b.warps.assign(static_cast<size_t>((threads + kLanes - 1) / kLanes), {});
      b.async.assign(static_cast<size_t>(shared_bytes), static_cast<char>(kPoison));
      b.groups.assign(static_cast<size_t>((threads + kGroup - 1) / kGroup), {});
      b.barrier = {};
      b.named.clear();
      b.barriers.clear();
      b.runnable.clear();
      for (int i = 0; i < threads; ++i) {
        Fiber& f = b.fibers[i];
        f.index = {i, x, y, grid_x, grid_y};
        f.waits_for = nullptr;
        f.barrier = nullptr;
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
      while (b.error.empty()) {
        if (!b.copies.empty() && random() % 8 == 0) land_a_copy(random());
        while (b.runnable.empty() && land_a_copy(random())) {
        }
        if (b.runnable.empty()) break;
        const size_t pick = random() % b.runnable.size();
        const int next = b.runnable[pick];
        b.runnable[pick] = b.runnable.back();
        b.runnable.pop_back();
        Fiber& f = b.fibers[next];
        b.running = &f;
        VITQ_SWITCH_START(&b.scheduler_fake_stack, f.stack.get(), kStack);
        swapcontext(&b.scheduler, &f.context);
        VITQ_SWITCH_FINISH(b.scheduler_fake_stack, nullptr, nullptr);
      }
      for (const Fiber& f : b.fibers) {
        if (f.done || !b.error.empty()) continue;
        b.error = "thread " + std::to_string(f.index.thread) + " of block (" + std::to_string(x) + ", " +
                  std::to_string(y) + ") waits forever at " + f.waits_for;
      }
      if (b.error.empty() && !b.copies.empty()) b.error = "a block ends with bulk copies under way";
      for (const Group& g : b.groups) {
        if (b.error.empty() && !(g.open.empty() && g.committed.empty())) {
          b.error = "a block ends with wgmmas under way";
        }
      }
      b.copies.clear();
    }
  }
  g_block = nullptr;
  message = b.error;
  return message.empty() ? nullptr : message.c_str();
}

}  // namespace vitq::gpu::emulated
