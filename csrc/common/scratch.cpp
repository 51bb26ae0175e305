#include <cstdlib>
#include <new>
#include <utility>

#include "common/parallel.h"

namespace vitq {
namespace {

#if defined(__SANITIZE_ADDRESS__)
constexpr size_t kKept = 0;  // every access outside an object is to be seen
#else
constexpr size_t kKept = 16 << 20;  // bytes of one thread
#endif

// Blocks that a thread has given back. Allocators return large ones to the system, and the page faults of
// getting them anew cost as much as a small layer.
class Kept {
  using Block = Scratch::Block;

 public:
  ~Kept() {
    for (Block& block : blocks_) std::free(block.data);
  }

  // The smallest that holds `bytes`; an empty block if none does.
  Scratch::Block take(size_t bytes) {
    Block* best = nullptr;
    for (Block& block : blocks_)
      if (block.bytes >= bytes && (best == nullptr || block.bytes < best->bytes)) best = &block;
    if (best == nullptr) return {};
    total_ -= best->bytes;
    return std::exchange(*best, {});
  }

  // In the place of the smallest, if that leaves more than before.
  void give(Block block) {
    Block* least = blocks_;
    for (Block& other : blocks_)
      if (other.bytes < least->bytes) least = &other;
    if (block.bytes > least->bytes && total_ - least->bytes + block.bytes <= kKept) {
      total_ += block.bytes - least->bytes;
      std::swap(*least, block);
    }
    std::free(block.data);
  }

 private:
  Block blocks_[4] = {};
  size_t total_ = 0;
};

thread_local Kept kept;

}  // namespace

Scratch::Scratch(size_t bytes) : block_(kept.take(lines(bytes) + 64)) {
  if (block_.data != nullptr) return;
  block_ = {static_cast<char*>(std::aligned_alloc(64, lines(bytes) + 64)), lines(bytes) + 64};
  if (block_.data == nullptr) throw std::bad_alloc();
}

Scratch::~Scratch() { kept.give(block_); }

}  // namespace vitq
