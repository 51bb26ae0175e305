// The emulation itself: what it must catch, and the fragment maps by the formulas of the PTX manual. Prints
// what fails.
#include "common/gpu/emulation.h"

#include <algorithm>
#include <cstdio>
#include <cstring>
#include <string>

#include "common/gpu/arrivals.cuh"
#include "common/gpu/ptx.cuh"

using namespace vitq::gpu;

namespace {

int g_failures = 0;

void expect(bool fine, const char* what) {
  if (fine) return;
  std::printf("FAILED %s\n", what);
  ++g_failures;
}

bool says(const char* message, const char* part) {
  return message != nullptr && std::strstr(message, part) != nullptr;
}

template <bool kWaits>
struct Copies {
  struct Params {
    const uint32_t* from;
    uint32_t* to;
  };
  static constexpr int kThreads = 32, kBlocksPerSm = 1;
  static void run(const Params& p) {
    char* mine = shared() + thread() * 16;
    copy_async(mine, p.from + thread() * 4, thread() == 7 ? 0 : 16);
    commit_copies();
    if (kWaits) wait_copies<0>();
    p.to[thread()] = *reinterpret_cast<uint32_t*>(mine);
  }
};

void asynchronous_copies() {
  alignas(16) uint32_t from[128], to[32];
  for (uint32_t i = 0; i < 128; ++i) from[i] = i;
  expect(launch<Copies<true>>(1, 1, 512, nullptr, {from, to}) == nullptr, "a copy that is waited for");
  for (uint32_t i = 0; i < 32; ++i) expect(to[i] == (i == 7 ? 0 : 4 * i), "its bytes, or zeros");
  expect(launch<Copies<false>>(1, 1, 512, nullptr, {from, to}) == nullptr, "a copy that is not waited for");
  for (const uint32_t word : to) expect(word == 0xa5a5a5a5, "is not there yet");
  expect(says(launch<Copies<true>>(1, 1, 512, nullptr, {from + 1, to}), "misaligned"),
         "a copy of 16 bytes from 4");
  expect(says(launch<Copies<true>>(0, 1, 512, nullptr, {from, to}), "no blocks"), "a launch of nothing");
}

template <bool kTransposed>
struct Matrices {
  struct Params {
    uint32_t (*out)[4];
    int shift;
  };
  static constexpr int kThreads = 32, kBlocksPerSm = 1;
  static void run(const Params& p) {
    auto* bytes = reinterpret_cast<uint8_t*>(shared());
    for (int i = 0; i < 16; ++i)
      bytes[thread() * 16 + i] = static_cast<uint8_t>(thread() * 8 + i / 2 + i % 2 * 100);
    sync_warp();
    const char* row = shared() + thread() * 16 + p.shift;
    kTransposed ? load_transposed(p.out[thread()], row) : load_matrices(p.out[thread()], row);
  }
};

// The manual: thread t holds elements 2·(t % 4) and the next of row t / 4 of each matrix, transposed or not.
void matrices() {
  uint32_t out[32][4];
  const auto element = [](int matrix, int row, int column) {
    const int low = ((8 * matrix + row) * 8 + column) & 255;
    return static_cast<uint32_t>(low | ((low + 100) & 255) << 8);
  };
  expect(launch<Matrices<false>>(1, 1, 512, nullptr, {out, 0}) == nullptr, "ldmatrix");
  for (int t = 0; t < 32; ++t) {
    for (int m = 0; m < 4; ++m) {
      const int row = t / 4, column = 2 * (t % 4);
      expect(out[t][m] == (element(m, row, column) | element(m, row, column + 1) << 16), "ldmatrix as it is");
    }
  }
  expect(launch<Matrices<true>>(1, 1, 512, nullptr, {out, 0}) == nullptr, "ldmatrix.trans");
  for (int t = 0; t < 32; ++t) {
    for (int m = 0; m < 4; ++m) {
      const int row = t / 4, column = 2 * (t % 4);
      expect(out[t][m] == (element(m, column, row) | element(m, column + 1, row) << 16),
             "ldmatrix transposed");
    }
  }
  expect(says(launch<Matrices<false>>(1, 1, 512, nullptr, {out, 4}), "misaligned"),
         "ldmatrix from 4 bytes on");
}

void counters_of_arrivals() {
  Arrivals all;
  int streams[2];
  Stream one = static_cast<Stream>(&streams[0]), two = static_cast<Stream>(&streams[1]);
  const int a = all.take(0, one, false, 66);
  expect(a >= 0 && all.take(0, one, false, 3) == a, "launches on one stream share their counters");
  const int b = all.take(0, two, false, 66), c = all.take(0, one, true, 66), d = all.take(0, one, true, 66);
  int firsts[4] = {a, b, c, d};
  std::sort(firsts, firsts + 4);
  for (int i = 0; i < 3; ++i) expect(firsts[i + 1] - firsts[i] >= 66, "streams and captures do not");
  expect(all.take(1, one, true, 66) == 0, "each device has counters of its own");
  const int e = all.take(0, one, false, 1000);
  expect(e >= 1000 || e > d, "a launch of more tiles gets more");
  expect(all.take(0, one, false, 66) == e, "and those are the stream's");
  expect(all.take(0, one, true, kArrivals) == -1, "none where there are not so many left");
  int taken = 0;
  while (all.take(1, one, true, 1 << 16) >= 0) ++taken;
  expect(taken == 15, "as many captures as there is room for");
  expect(all.take(1, one, false, 8) >= 0, "a stream still finds some");
}

struct Divergent {
  struct Params {};
  static constexpr int kThreads = 64, kBlocksPerSm = 1;
  static void run(const Params&) {
    if (thread() == 40) return sync_warp();
    shuffle_xor(1.0f, 1);
  }
};

struct Early {
  struct Params {};
  static constexpr int kThreads = 64, kBlocksPerSm = 1;
  static void run(const Params&) {
    if (thread() == 3) return;
    sync();
  }
};

void divergence() {
  expect(says(launch<Divergent>(1, 1, 0, nullptr, {}), "lanes of one warp diverge"), "a lane elsewhere");
  const char* message = launch<Early>(1, 1, 0, nullptr, {});
  expect(says(message, "waits forever at sync"), "a thread that left");
  alignas(16) uint32_t from[128] = {}, to[32];
  expect(launch<Copies<true>>(1, 1, 512, nullptr, {from, to}) == nullptr, "a launch after failed ones");
}

template <bool kSyncs>
struct Neighbours {
  struct Params {
    int* out;
  };
  static constexpr int kThreads = 128, kBlocksPerSm = 1;
  static void run(const Params& p) {
    auto* memory = reinterpret_cast<int*>(shared());
    memory[thread()] = thread();
    if (kSyncs) sync();
    p.out[block() * kThreads + thread()] = memory[(thread() + 1) % kThreads];
  }
};

template <bool kSyncs>
int wrong_neighbours() {
  int out[256], wrong = 0;
  launch<Neighbours<kSyncs>>(2, 1, 512, nullptr, {out});
  for (int i = 0; i < 256; ++i) wrong += out[i] != (i + 1) % 128;
  return wrong;
}

// The manual: of m16n8k32, element i of a lane's 16 of A is in row groupID for i < 4 and 8 <= i < 12, else
// groupID + 8, and in column threadID_in_group·4 + (i & 3), + 16 from i = 8 on; of its 8 of B in row
// threadID_in_group·4 + (i & 3),
// + 16 from i = 4 on. m16n8k16 and k64 alike, with 2 and 8 elements where k32 has 4.
constexpr bool as_in_the_manual(int per_word) {
  using namespace emulated;
  for (int lane = 0; lane < 32; ++lane) {
    for (int i = 0; i < 4 * per_word; ++i) {
      const int quarter = i / per_word, group = lane >> 2, in_group = lane % 4;
      const int row = quarter == 0 || quarter == 2 ? group : group + 8;
      const int column = in_group * per_word + i % per_word + (quarter >= 2 ? 4 * per_word : 0);
      const Place p = a_place(lane, quarter, i % per_word, per_word);
      if (p.row != row || p.column != column) return false;
    }
    for (int i = 0; i < 2 * per_word; ++i) {
      const int k = lane % 4 * per_word + i % per_word + (i >= per_word ? 4 * per_word : 0);
      const Place p = b_place(lane, i / per_word, i % per_word, per_word);
      if (p.row != lane >> 2 || p.column != k) return false;
    }
    for (int i = 0; i < 4; ++i) {
      const Place p = c_place(lane, i);
      if (p.row != (i < 2 ? lane >> 2 : (lane >> 2) + 8) || p.column != lane % 4 * 2 + (i & 1)) return false;
    }
  }
  return true;
}
static_assert(as_in_the_manual(2) && as_in_the_manual(4) && as_in_the_manual(8));

void sixteen_bits() {
  for (uint32_t bits = 0; bits < 65536; ++bits) {
    const auto half = static_cast<uint16_t>(bits);
    const float value = emulated::float_of_half(half);
    if (value != value) continue;
    expect(emulated::half_of(value) == half, "float16 to float32 and back");
    expect(value == static_cast<float>(*reinterpret_cast<const _Float16*>(&half)), "float16 to float32");
    // Between this number and the next: to the even one at the middle.
    const float next = emulated::float_of_half(static_cast<uint16_t>(half + 1));
    if ((bits & 0x7fff) < 0x7bff) {
      const float middle = static_cast<float>((static_cast<double>(value) + static_cast<double>(next)) / 2);
      expect(emulated::half_of(middle) == (half & 1 ? half + 1 : half), "float32 to float16 in the middle");
    }
  }
  expect(emulated::half_of(65519.0f) == 0x7bff && emulated::half_of(65520.0f) == 0x7c00, "float16 overflow");
  expect(emulated::bfloat_of(1.00390625f) == 0x3f80 && emulated::bfloat_of(1.01171875f) == 0x3f82,
         "float32 to bfloat16 in the middle");
}

}  // namespace

int main() {
  asynchronous_copies();
  matrices();
  counters_of_arrivals();
  divergence();
  expect(wrong_neighbours<true>() == 0, "neighbours behind a barrier");
  expect(wrong_neighbours<false>() > 0, "neighbours without a barrier");
  sixteen_bits();
  return g_failures > 0;
}
