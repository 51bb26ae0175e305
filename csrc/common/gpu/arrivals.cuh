// Counters of blocks that arrive, which every launch finds zero and leaves zero: zeroing them in every call
// would be a launch of its own, which takes as long as a small product.
#pragma once

#include <map>
#include <mutex>
#include <utility>

#include "common/gpu/device.cuh"

namespace vitq::gpu {

constexpr int kArrivals = 1 << 20;

// On each device. Included by one source only, or there are several.
#if defined(__CUDACC__)
static __device__ unsigned g_arrivals[kArrivals];
#else
inline unsigned g_arrivals[kArrivals];
#endif

// Which of them a launch may have.
class Arrivals {
 public:
  // The first of `count` that are this launch's, or -1 if there are not so many left.
  //
  // Launches on one stream run one after the other and share. A graph may be replayed beside anything: what
  // it captures gets counters that nothing else ever has, for as long as the process lives.
  int take(int device, Stream stream, bool captured, int count) {
    const std::lock_guard<std::mutex> lock(mutex_);
    if (captured) return fresh(device, count);
    Range& own = of_stream_.try_emplace({device, stream}, Range{-1, 0}).first->second;
    if (own.count < count) {
      const int wanted = count > kOfStream ? count : kOfStream;
      const int first = fresh(device, wanted);
      if (first < 0) return -1;
      own = {first, wanted};
    }
    return own.first;
  }

 private:
  static constexpr int kOfStream = 256;  // a product is split where its tiles are at most half the processors
  struct Range {
    int first, count;
  };

  int fresh(int device, int count) {
    int& used = used_.try_emplace(device, 0).first->second;
    if (count > kArrivals - used) return -1;
    used += count;
    return used - count;
  }

  std::mutex mutex_;
  std::map<std::pair<int, Stream>, Range> of_stream_;
  std::map<int, int> used_;
};

}  // namespace vitq::gpu
