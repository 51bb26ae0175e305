// What sm_90's bulk tensor copies and wgmma do with shared memory, after the PTX manual ("Tensor swizzling
// modes", "Asynchronous warpgroup-level matrix ... layouts", "Matrix-descriptor"), for the emulation.
#pragma once

#include <cstdint>
#include <cstring>

#include "common/gpu/emulation.h"
#include "common/gpu/fragment.h"

namespace vitq::gpu::emulated {

// Swizzling permutes the 16-byte pieces of 128 (64, 32) bytes by the place of these bytes among 8 (4, 2)
// such.
constexpr uint32_t swizzled_address(uint32_t address, int span) {
  const uint32_t pieces = static_cast<uint32_t>(span) / 16;
  return address ^ (address / 128 % pieces * 16);
}

// A matrix-descriptor's fields.
struct Operand {
  uint32_t start, leading, stride;
  int span;  // of swizzling in bytes, 16 for none

  explicit constexpr Operand(uint64_t descriptor)
      : start(static_cast<uint32_t>(descriptor & 0x3fff) << 4),
        leading(static_cast<uint32_t>(descriptor >> 16 & 0x3fff) << 4),
        stride(static_cast<uint32_t>(descriptor >> 32 & 0x3fff) << 4),
        span(descriptor >> 62 == 0 ? 16 : 256 >> (descriptor >> 62)) {}

  // Byte `k` of the 32 of row `row`, K-major: groups of 8 rows `stride` apart; without swizzling, a group's
  // two columns of 16 bytes `leading` apart.
  constexpr uint32_t at(int row, int k) const {
    const auto r = static_cast<uint32_t>(row), b = static_cast<uint32_t>(k);
    if (span == 16) return start + r / 8 * stride + b / 16 * leading + r % 8 * 16 + b % 16;
    return swizzled_address(start + r / 8 * stride + r % 8 * static_cast<uint32_t>(span) + b, span);
  }
};

// Registers of a warpgroup's thread: A as of mma m16n8 in each warp's 16 rows; D, columns 8 at a time, as its
// C.
constexpr Place group_a_place(int thread, int reg, int element, int per_word) {
  const Place p = a_place(thread % 32, reg, element, per_word);
  return {thread / 32 * 16 + p.row, p.column};
}
constexpr Place group_d_place(int thread, int reg) {
  const Place p = c_place(thread % 32, reg % 4);
  return {thread / 32 * 16 + p.row, reg / 4 * 8 + p.column};
}

// d[64, kN] += a[64, 32 bytes]·b[kN, 32 bytes]: Element as stored, widened to Sum.
template <class Element, class Sum, Sum (*kWiden)(Element), int kN>
void multiply_group(const GroupMultiply* threads) {
  constexpr int kPer = 4 / sizeof(Element), kDepth = 8 * kPer;
  static Sum a[64][kDepth], b[kN][kDepth];
  const char* memory = async_memory();
  const auto read = [memory](const Operand& operand, int row, int k) {
    Element e;
    std::memcpy(&e, memory + operand.at(row, k * static_cast<int>(sizeof(Element))), sizeof(Element));
    return kWiden(e);
  };
  const Operand of_a(threads[0].a_descriptor), of_b(threads[0].b_descriptor);
  for (int k = 0; k < kDepth; ++k) {
    for (int row = 0; row < 64 && threads[0].a == nullptr; ++row) a[row][k] = read(of_a, row, k);
    for (int row = 0; row < kN; ++row) b[row][k] = read(of_b, row, k);
  }
  for (int thread = 0; thread < 128; ++thread) {
    for (int r = 0; r < 4 && threads[0].a != nullptr; ++r) {
      Element parts[kPer];
      std::memcpy(parts, threads[thread].a + r, 4);
      for (int i = 0; i < kPer; ++i) {
        const Place p = group_a_place(thread, r, i, kPer);
        a[p.row][p.column] = kWiden(parts[i]);
      }
    }
  }
  for (int thread = 0; thread < 128; ++thread) {
    Sum* d = static_cast<Sum*>(threads[thread].d);
    for (int r = 0; r < kN / 2; ++r) {
      const Place p = group_d_place(thread, r);
      Sum sum = d[r];
      for (int k = 0; k < kDepth; ++k) sum += a[p.row][k] * b[p.column][k];
      d[r] = sum;
    }
  }
}

inline int int_of_code(int8_t code) { return code; }

// Rows of bytes, of which a copy takes a box; as cuTensorMapEncodeTiled describes them to the copy engine.
struct TensorMap {
  const char* data;
  int64_t row_bytes, rows, pitch;
  int box_bytes, box_rows, span;
};

inline const char* describe(TensorMap* map, const void* data, int64_t row_bytes, int64_t rows, int64_t pitch,
                            int box_bytes, int box_rows, int span) {
  if (reinterpret_cast<uintptr_t>(data) % 16 != 0 || pitch % 16 != 0) return "rows do not start at 16 bytes";
  if (row_bytes < 1 || rows < 1) return "a tensor map of nothing";
  if (box_bytes % 16 != 0 || box_bytes > span || box_rows > 256) return "no such box";
  *map = {static_cast<const char*>(data), row_bytes, rows, pitch, box_bytes, box_rows, span};
  return nullptr;
}

// The box from (row, column) into `to`: zeros where there is no tensor.
inline void load_tile(const TensorMap& map, void* to, const void* barrier, int column, int row) {
  const uint32_t start = shared_address(to);
  const auto image = [map, start, column, row](char* box) {
    for (int r = 0; r < map.box_rows; ++r) {
      for (int c = 0; c < map.box_bytes; ++c) {
        const bool inside = row + r < map.rows && column + c < map.row_bytes;
        const uint32_t at = start + static_cast<uint32_t>(r * map.box_bytes + c);
        box[swizzled_address(at, map.span) - start] =
            inside ? map.data[(row + r) * map.pitch + column + c] : char{0};
      }
    }
  };
  copy_bulk(to, map.box_bytes * map.box_rows, barrier, image);
}

}  // namespace vitq::gpu::emulated
