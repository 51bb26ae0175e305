// Rows of images in another order, as windows take them.
#pragma once

#include <cstdint>

namespace vitq {

// Slot s of an image holds its token index[s], or none where that is −1. Without an index slots are tokens.
struct RowMap {
  const int32_t* index = nullptr;  // [slots], entries in [−1, tokens)
  int64_t slots = 0, tokens = 0;   // of one image

  // The row among all images' tokens of row `slot` among all their slots; −1: none.
  constexpr int64_t token_row(int64_t slot) const {
    if (index == nullptr) return slot;
    const int64_t token = index[slot % slots];
    return token < 0 ? -1 : slot / slots * tokens + token;
  }
};

}  // namespace vitq
