// How torch-free kernels run in parallel and where they keep temporaries.
#pragma once

#include <cstddef>
#include <cstdint>

namespace vitq {

// The caller's thread pool (torch's own inside the extension). `run` splits [begin, end) into contiguous
// ranges of at least `grain` and calls body(begin, end, context) for each; it returns when all are done.
struct Pool {
  int64_t threads;
  void (*run)(int64_t begin, int64_t end, int64_t grain, void (*body)(int64_t, int64_t, void*),
              void* context);
};

// pool_for(pool, n, grain, [&](int64_t begin, int64_t end) { ... });
template <class Body>
static inline void pool_for(const Pool& pool, int64_t n, int64_t grain, const Body& body) {
  if (n <= 0) return;
  if (n <= grain || pool.threads == 1) return body(int64_t{0}, n);
  pool.run(
      0, n, grain,
      [](int64_t begin, int64_t end, void* context) { (*static_cast<const Body*>(context))(begin, end); },
      const_cast<void*>(static_cast<const void*>(&body)));
}

// Uninitialized memory aligned to 64 bytes, with 64 readable bytes behind its end. Destroyed by the thread
// that made it, which keeps the memory for its next ones, up to a bound.
class Scratch {
 public:
  explicit Scratch(size_t bytes);
  ~Scratch();
  Scratch(const Scratch&) = delete;
  Scratch& operator=(const Scratch&) = delete;
  template <class T>
  T* at(size_t byte_offset = 0) const {
    return reinterpret_cast<T*>(block_.data + byte_offset);
  }

  struct Block {
    char* data = nullptr;
    size_t bytes = 0;
  };

 private:
  Block block_;
};

// Rounded up to whole cache lines: offsets of consecutive arrays in one Scratch.
constexpr size_t lines(size_t bytes) { return (bytes + 63) / 64 * 64; }

constexpr int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }

}  // namespace vitq
