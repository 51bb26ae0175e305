// The emulation of sm_90's copies, barriers and wgmma: what it must catch, and the maps by the formulas of
// the PTX manual. Prints what fails.
#include <algorithm>
#include <cstdio>
#include <cstring>
#include <set>

#include "common/gpu/ptx_sm90.cuh"

using namespace vitq::gpu;

namespace {

int g_failures = 0;

void expect(bool fine, const char* what) {
  if (fine) return;
  std::printf("FAILED %s\n", what);
  ++g_failures;
}

// The manual: within 8 rows of 128 bytes, 16-byte piece c of row r lies at c ^ r; of 64 bytes (two rows to
// 128), at c ^ r/2. The descriptor of a tile's 32 bytes from `first` on finds every byte where that puts it.
template <int kSpan>
constexpr bool descriptors_find_their_bytes(uint32_t address) {
  constexpr int kPieces = kSpan / 16;
  for (int row = 0; row < 128; ++row) {
    for (int byte = 0; byte < kSpan; ++byte) {
      const int piece = byte / 16 ^ row * kSpan / 128 % kPieces;
      const int at = row * kSpan + piece * 16 + byte % 16;
      if (swizzled<kSpan>(row, byte) != at) return false;
      if (emulated::swizzled_address(address + row * kSpan + byte, kSpan) != address + at) return false;
      const emulated::Operand operand(tile_descriptor<kSpan>(address, byte / 32 * 32));
      if (operand.at(row, byte % 32) != address + at) return false;
    }
  }
  return true;
}
static_assert(descriptors_find_their_bytes<128>(0) && descriptors_find_their_bytes<128>(200 * 1024));
static_assert(descriptors_find_their_bytes<64>(512) && descriptors_find_their_bytes<64>(226 * 1024));

// Without swizzling: 8 rows of 16 bytes make 128; the second 16 bytes of K `leading` on, 8 rows on `stride`.
static_assert(emulated::Operand(uint64_t{4096 / 16} | uint64_t{256 / 16} << 16 | uint64_t{512 / 16} << 32)
                  .at(19, 21) == 4096 + 2 * 512 + 256 + 3 * 16 + 5);

// The manual: register i of thread t of D is in row 16·warp + lane/4 + 8·(i/2 % 2), column 8·(i/4) + 2·(lane
// % 4) + i % 2.
constexpr bool sums_lie_as_in_the_manual() {
  for (int t = 0; t < 128; ++t) {
    for (int i = 0; i < 128; ++i) {
      const emulated::Place p = emulated::group_d_place(t, i);
      if (p.row != t / 32 * 16 + t % 32 / 4 + (i / 2 % 2) * 8 || p.column != i / 4 * 8 + t % 4 * 2 + i % 2)
        return false;
    }
  }
  return true;
}
static_assert(sums_lie_as_in_the_manual());

enum class Fault {
  none,
  stored_b,
  no_init,
  init_not_fenced,
  too_few_bytes,
  arrival_not_awaited,
  no_async_fence,
  no_fence,
  no_commit,
  not_awaited,
  read_late,
  written_early,
  wrong_span,
  registers_reused,
  one_thread_elsewhere
};

constexpr int kRows = 64, kColumns = 128, kDepth = 128;

// out[64, 128] = a[64, 128]·b[128, 128]ᵀ by one warpgroup.
template <Fault kFault>
struct Multiply {
  struct Params {
    TensorMap a, b;
    const int8_t* plain_a;
    const int8_t* plain_b;
    int* out;
  };
  static constexpr int kThreads = 128, kBlocksPerSm = 1;
  static constexpr bool kFromRegisters = kFault == Fault::registers_reused;
  static constexpr bool kStores = kFault == Fault::stored_b || kFault == Fault::no_async_fence;

  static void run(const Params& p) {
    constexpr int kBytesA = kRows * kDepth, kBytesB = kColumns * kDepth;
    char *a = shared(), *b = a + kBytesA;
    auto* barrier = reinterpret_cast<Barrier*>(b + kBytesB);
    if (thread() == 0 && kFault != Fault::no_init) {
      barrier_init(barrier, 1);
      if (kFault != Fault::init_not_fenced) fence_barrier_init();
    }
    sync();
    if (thread() == 0) {
      barrier_arrive_expecting(barrier, kBytesA + (kFault == Fault::too_few_bytes || kStores ? 0 : kBytesB));
      load_tile(p.a, a, barrier, 0, 0);
      if (!kStores) load_tile(p.b, b, barrier, 0, 0);
    }
    if (kStores) {
      for (int byte = 0; byte < kDepth; ++byte) {
        b[swizzled<128>(thread(), byte)] = static_cast<char>(p.plain_b[thread() * kDepth + byte]);
      }
      if (kFault != Fault::no_async_fence) fence_async();
      sync();
    }
    if (kFault != Fault::arrival_not_awaited) barrier_wait(barrier, 0);
    int d[64] = {};
    uint32_t registers[4];
    if (kFault != Fault::no_fence) group_fence();
    if (kFault == Fault::one_thread_elsewhere && thread() == 77) return sync();
    for (int k = 0; k < kDepth; k += 32) {
      const uint64_t of_b = kFault == Fault::wrong_span ? tile_descriptor<64>(shared_address(b), k)
                                                        : tile_descriptor<128>(shared_address(b), k);
      if (kFromRegisters) {
        for (int r = 0; r < 4; ++r) {
          const int row = warp() * 16 + lane() / 4 + r % 2 * 8;
          std::memcpy(&registers[r], p.plain_a + row * kDepth + k + r / 2 * 16 + lane() % 4 * 4, 4);
        }
        group_mma_s8(d, registers, of_b);
      } else {
        group_mma_s8(d, tile_descriptor<128>(shared_address(a), k), of_b);
      }
    }
    if (kFault != Fault::no_commit) group_commit();
    if (kFault == Fault::written_early) {
      sync();
      b[thread() * kDepth] ^= 1;
      fence_async();
      sync();
    }
    if (kFault != Fault::not_awaited && kFault != Fault::read_late) group_wait<0>();
    for (int i = 0; i < 64; ++i) {
      const emulated::Place place = emulated::group_d_place(thread(), i);
      p.out[place.row * kColumns + place.column] = d[i];
    }
    if (kFault == Fault::read_late) group_wait<0>();
  }
};

int8_t g_a[kRows * kDepth], g_b[kColumns * kDepth];

// What the launch said; `right`: whether the product is.
template <Fault kFault>
const char* multiply(bool* right) {
  static int out[kRows * kColumns];
  std::fill(std::begin(out), std::end(out), -1);
  typename Multiply<kFault>::Params p{{}, {}, g_a, g_b, out};
  // Of a, 60 rows: zeros beyond.
  expect(describe_rows(&p.a, g_a, kDepth, 60, kDepth, kDepth, kRows, 128) == nullptr, "a map");
  expect(describe_rows(&p.b, g_b, kDepth, kColumns, kDepth, kDepth, kColumns, 128) == nullptr, "a map");
  const char* message = launch<Multiply<kFault>>(1, 1, (kRows + kColumns) * kDepth + 64, nullptr, p);
  *right = true;
  for (int row = 0; row < kRows; ++row) {
    for (int column = 0; column < kColumns; ++column) {
      int sum = 0;
      for (int k = 0; k < kDepth; ++k)
        sum += (row < 60 ? g_a[row * kDepth + k] : 0) * g_b[column * kDepth + k];
      *right &= out[row * kColumns + column] == sum;
    }
  }
  return message;
}

template <Fault kFault>
void expect_right(const char* what) {
  bool right = false;
  expect(multiply<kFault>(&right) == nullptr && right, what);
}
template <Fault kFault>
void expect_wrong(const char* what) {
  bool right = false;
  expect(multiply<kFault>(&right) == nullptr && !right, what);
}
template <Fault kFault>
void expect_refused(const char* what, const char* part) {
  bool right = false;
  const char* message = multiply<kFault>(&right);
  expect(message != nullptr && std::strstr(message, part) != nullptr, what);
}

template <bool kInTurns>
struct Phases {
  struct Params {
    int* wrong;
  };
  static constexpr int kThreads = 64, kBlocksPerSm = 1;
  // Warp 0 fills a slot that warp 1 reads and frees, ten times.
  static void run(const Params& p) {
    auto* slot = reinterpret_cast<int*>(shared());
    auto* full = reinterpret_cast<Barrier*>(shared() + 64);
    auto* empty = full + 1;
    if (thread() == 0) {
      barrier_init(full, 1);
      barrier_init(empty, 1);
      fence_barrier_init();
    }
    sync();
    for (int use = 0; use < 10; ++use) {
      if (warp() == 0 && elect()) {
        if (kInTurns) barrier_wait(empty, use % 2 ^ 1);
        *slot = use;
        barrier_arrive(full);
      }
      if (warp() == 1) {
        barrier_wait(full, use % 2);
        if (lane() == 0) *p.wrong += *slot != use;
        sync_some<32>(3);
        if (lane() == 0) barrier_arrive(empty);
      }
    }
  }
};

}  // namespace

int main() {
  for (int i = 0; i < kRows * kDepth; ++i) g_a[i] = static_cast<int8_t>(i * 37 + i / 128);
  for (int i = 0; i < kColumns * kDepth; ++i) g_b[i] = static_cast<int8_t>(i * 101 + i / 64);
  expect_right<Fault::none>("a product of copied tiles");
  expect_right<Fault::stored_b>("a product of a stored tile");
  expect_refused<Fault::no_init>("no init", "used before its init");
  expect_refused<Fault::init_not_fenced>("an init that copies may not see", "not fenced");
  expect_refused<Fault::too_few_bytes>("more bytes than expected", "");
  expect_wrong<Fault::no_async_fence>("stores that wgmma does not see");
  expect_refused<Fault::arrival_not_awaited>("copies that are not awaited", "bulk copies under way");
  expect_refused<Fault::no_fence>("wgmma without a fence", "without a wgmma.fence");
  expect_refused<Fault::no_commit>("wgmma without a commit", "wgmmas under way");
  expect_refused<Fault::not_awaited>("wgmma that is not awaited", "wgmmas under way");
  expect_wrong<Fault::read_late>("sums read before the wait");
  expect_wrong<Fault::written_early>("an operand written before the wait");
  expect_wrong<Fault::wrong_span>("a descriptor of another swizzle");
  expect_wrong<Fault::registers_reused>("operand registers written before the wait");
  expect_refused<Fault::one_thread_elsewhere>("a thread elsewhere", "waits forever at");

  int wrong = 0;
  expect(launch<Phases<true>>(1, 1, 128, nullptr, {&wrong}) == nullptr && wrong == 0, "phases");
  const char* message = launch<Phases<false>>(1, 1, 128, nullptr, {&wrong});
  expect(message != nullptr || wrong > 0, "a slot filled before it is free");
  return g_failures > 0;
}
