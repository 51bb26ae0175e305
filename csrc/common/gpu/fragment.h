// What the matrix instructions do, lane by lane: the fragment layouts of the PTX manual ("Matrix Fragments
// for mma.m16n8k16 / k32 / k64"), for the emulation.
//
// Lane l is of row group g = l/4 and column c = l%4. With e elements in 32 bits (2 of 16, 4 of 8, 8 of 4
// bits):
//   A [16, 8e]: register r holds row g + 8·(r%2), columns 4e·(r/2) + e·c + 0..e−1;
//   B [8, 8e] (by its columns): register r holds column g, rows 4e·r + e·c + 0..e−1;
//   C [16, 8]: register r holds row g + 8·(r/2), column 2c + r%2.
#pragma once

#include <cmath>
#include <cstdint>
#include <cstring>

namespace vitq::gpu::emulated {

struct Place {
  int row, column;
};
constexpr Place a_place(int lane, int reg, int element, int per_word) {
  return {lane / 4 + 8 * (reg % 2), 4 * per_word * (reg / 2) + per_word * (lane % 4) + element};
}
constexpr Place b_place(int lane, int reg, int element, int per_word) {
  return {lane / 4, 4 * per_word * reg + per_word * (lane % 4) + element};
}
constexpr Place c_place(int lane, int reg) { return {lane / 4 + 8 * (reg / 2), 2 * (lane % 4) + reg % 2}; }

inline float float_of_half(uint16_t h) {
  const uint32_t exponent = h >> 10 & 31, mantissa = h & 1023;
  const float sign = h >> 15 ? -1.0f : 1.0f;
  if (exponent == 31) return mantissa ? NAN : sign * INFINITY;
  return sign * std::ldexp(static_cast<float>(exponent ? mantissa + 1024 : mantissa),
                           static_cast<int>(exponent ? exponent : 1) - 25);
}
inline float float_of_bfloat(uint16_t h) {
  const uint32_t bits = static_cast<uint32_t>(h) << 16;
  float out;
  std::memcpy(&out, &bits, 4);
  return out;
}
inline uint16_t half_of(float v) {
  const uint16_t sign = std::signbit(v) ? 0x8000 : 0;
  const float a = std::fabs(v);
  if (std::isnan(v)) return 0x7fff;
  if (a >= 65520.0f) return sign | 0x7c00;
  if (a == 0.0f) return sign;
  int exponent = 0;
  std::frexp(a, &exponent);                                     // a in [2^(exponent−1), 2^exponent)
  const int place = exponent - 11 < -24 ? -24 : exponent - 11;  // of the last bit
  const auto units = static_cast<uint32_t>(std::nearbyint(std::ldexp(a, -place)));
  // Units of a subnormal number count as they are; of a normal one, they hold the leading bit.
  const uint32_t bits = place == -24 ? units : (static_cast<uint32_t>(place + 25) << 10) + units - 1024;
  return static_cast<uint16_t>(sign | bits);
}
inline uint16_t bfloat_of(float v) {
  uint32_t u;
  std::memcpy(&u, &v, 4);
  if (std::isnan(v)) return 0x7fff;
  return static_cast<uint16_t>((u + 0x7fff + (u >> 16 & 1)) >> 16);
}

struct Integers {
  int* d;
  uint32_t a[4], b[2];
};

template <int kBits, bool kUnsignedA = false>
void multiply_integers(void* const* lanes) {
  constexpr int kPer = 32 / kBits, kDepth = 8 * kPer;
  static int a[16][kDepth], b[8][kDepth];
  const auto element = [](uint32_t word, int i) {
    return static_cast<int32_t>(word << (32 - kBits * (i + 1))) >> (32 - kBits);
  };
  for (int lane = 0; lane < 32; ++lane) {
    const auto& call = *static_cast<const Integers*>(lanes[lane]);
    for (int r = 0; r < 4; ++r) {
      for (int i = 0; i < kPer; ++i) {
        const Place p = a_place(lane, r, i, kPer);
        a[p.row][p.column] = element(call.a[r], i) & (kUnsignedA ? (1 << kBits) - 1 : -1);
      }
    }
    for (int r = 0; r < 2; ++r) {
      for (int i = 0; i < kPer; ++i) {
        const Place p = b_place(lane, r, i, kPer);
        b[p.row][p.column] = element(call.b[r], i);
      }
    }
  }
  for (int lane = 0; lane < 32; ++lane) {
    const auto& call = *static_cast<const Integers*>(lanes[lane]);
    for (int r = 0; r < 4; ++r) {
      const Place p = c_place(lane, r);
      int sum = call.d[r];
      for (int k = 0; k < kDepth; ++k) sum += a[p.row][k] * b[p.column][k];
      call.d[r] = sum;
    }
  }
}

struct Floats {
  float* d;
  uint32_t a[4], b[2];
};

template <float (*kWiden)(uint16_t)>
void multiply_floats(void* const* lanes) {
  constexpr int kPer = 2, kDepth = 16;
  static float a[16][kDepth], b[8][kDepth];
  for (int lane = 0; lane < 32; ++lane) {
    const auto& call = *static_cast<const Floats*>(lanes[lane]);
    for (int r = 0; r < 4; ++r) {
      for (int i = 0; i < kPer; ++i) {
        const Place p = a_place(lane, r, i, kPer);
        a[p.row][p.column] = kWiden(static_cast<uint16_t>(call.a[r] >> 16 * i));
      }
    }
    for (int r = 0; r < 2; ++r) {
      for (int i = 0; i < kPer; ++i) {
        const Place p = b_place(lane, r, i, kPer);
        b[p.row][p.column] = kWiden(static_cast<uint16_t>(call.b[r] >> 16 * i));
      }
    }
  }
  for (int lane = 0; lane < 32; ++lane) {
    const auto& call = *static_cast<const Floats*>(lanes[lane]);
    for (int r = 0; r < 4; ++r) {
      const Place p = c_place(lane, r);
      float sum = call.d[r];
      for (int k = 0; k < kDepth; ++k) sum += a[p.row][k] * b[p.column][k];
      call.d[r] = sum;
    }
  }
}

struct Matrices {
  uint32_t* out;
  const void* row;
};

template <bool kTransposed>
void load_matrices(void* const* lanes) {
  static uint16_t m[4][8][8];
  for (int lane = 0; lane < 32; ++lane) {
    std::memcpy(m[lane / 8][lane % 8], static_cast<const Matrices*>(lanes[lane])->row, 16);
  }
  for (int lane = 0; lane < 32; ++lane) {
    uint32_t* out = static_cast<const Matrices*>(lanes[lane])->out;
    const int n = lane / 4, c = lane % 4;
    for (int i = 0; i < 4; ++i) {
      const uint16_t low = kTransposed ? m[i][2 * c][n] : m[i][n][2 * c];
      const uint16_t high = kTransposed ? m[i][2 * c + 1][n] : m[i][n][2 * c + 1];
      out[i] = low | static_cast<uint32_t>(high) << 16;
    }
  }
}

struct Shuffle {
  void* value;
  size_t size;
  int lanes;
};

inline void exchange(void* const* lanes) {
  static char old[32][16];
  for (int lane = 0; lane < 32; ++lane) {
    const auto& call = *static_cast<const Shuffle*>(lanes[lane]);
    std::memcpy(old[lane], call.value, call.size);
  }
  for (int lane = 0; lane < 32; ++lane) {
    const auto& call = *static_cast<const Shuffle*>(lanes[lane]);
    std::memcpy(call.value, old[(lane ^ call.lanes) % 32], call.size);
  }
}

}  // namespace vitq::gpu::emulated
