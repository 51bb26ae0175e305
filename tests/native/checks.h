// What the cases of every kernel share: a count of failures, two threads, buffers without slack.
#pragma once

#include <cstdint>
#include <cstdio>
#include <memory>
#include <string>
#include <thread>

#include "common/parallel.h"

namespace vitq {

inline int failures = 0;

inline void expect(bool ok, const std::string& what) {
  if (!ok && ++failures <= 20) std::fprintf(stderr, "FAILED: %s\n", what.c_str());
}

// Two threads, so that the sanitizer sees kernels share their inputs.
inline void run_threads(int64_t begin, int64_t end, int64_t, void (*body)(int64_t, int64_t, void*),
                        void* context) {
  const int64_t middle = begin + (end - begin) / 2;
  std::thread other([=] {
    if (middle < end) body(middle, end, context);
  });
  if (begin < middle) body(begin, middle, context);
  other.join();
}
constexpr Pool kPool{2, &run_threads};

// Heap blocks of exactly `n` elements, so that AddressSanitizer guards both ends.
template <class T>
std::unique_ptr<T[]> block(int64_t n) {
  return std::make_unique<T[]>(static_cast<size_t>(n));
}

// Of each kernel's file: all cases on the selected instruction set.
void attention_cases();
void learning_cases();

}  // namespace vitq
