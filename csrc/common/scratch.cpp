#include <cstdlib>
#include <new>

#include "common/parallel.h"

namespace vitq {

Scratch::Scratch(size_t bytes) : data_(static_cast<char*>(std::aligned_alloc(64, lines(bytes) + 64))) {
  if (data_ == nullptr) throw std::bad_alloc();
}

Scratch::~Scratch() { std::free(data_); }

}  // namespace vitq
