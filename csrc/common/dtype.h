// Float element types known at run time.
#pragma once

#include <cstdint>

namespace vitq {

enum class DType : int32_t { f32, f16, bf16 };

constexpr int64_t size_of(DType dtype) { return dtype == DType::f32 ? 4 : 2; }

// A float vector or row-major matrix; null data: absent.
struct AnyFloat {
  const void* data = nullptr;
  DType dtype = DType::f32;
  constexpr explicit operator bool() const { return data != nullptr; }
  // Starting at element i.
  constexpr AnyFloat at(int64_t i) const {
    return {static_cast<const char*>(data) + i * size_of(dtype), dtype};
  }
};

}  // namespace vitq
