// Runs every CPU kernel of this project, without torch, on every instruction set of the machine: ragged
// shapes and all-extreme data against naive loops. Built with -DVITQ_SANITIZE=ON, so a read or write outside
// a buffer ends it. Buffers are exactly as large as the contract says. Prints one line per instruction set;
// exit status 1 on a mismatch.
#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstdio>
#include <cstring>
#include <random>
#include <string>
#include <utility>
#include <vector>

#include "checks.h"
#include "common/isa.h"
#include "common/layout.h"
#include "qlinear/qlinear_cpu.h"
#include "quantize/quantize_cpu.h"

namespace vitq {

namespace {

std::mt19937 rng(0);

enum class Fill { random, low, high, alternating };

int fill_code(Fill fill, int low, int high, int64_t i) {
  switch (fill) {
    case Fill::low:
      return low;
    case Fill::high:
      return high;
    case Fill::alternating:
      return i / 2 % 2 ? low : high;
    default:
      return std::uniform_int_distribution<int>(low, high)(rng);
  }
}

struct Case {
  int64_t m, k, n, rank;
  bool int4, table;
  Fill x, w;
};

std::string describe(const Case& c, Isa isa) {
  return std::string(isa_name(isa)) + " m=" + std::to_string(c.m) + " k=" + std::to_string(c.k) +
         " n=" + std::to_string(c.n) + " r=" + std::to_string(c.rank) + (c.int4 ? " int4" : " int8") +
         (c.table ? " table" : "") + " fill " + std::to_string(static_cast<int>(c.x)) +
         std::to_string(static_cast<int>(c.w));
}

float random_float() { return std::normal_distribution<float>()(rng); }

// qlinear with unit scales is the integer sum itself; then every epilogue, fused and not, must agree with
// each other.
void linear_case(const Case& c, Isa isa) {
  const int levels[16] = {-128, -99, -60, -31, -9, -4, -2, -1, 3, 7, 12, 20, 44, 77, 100, 127};
  const int64_t lines4 = ceil_div(c.n, 16) * ceil_div(c.k, 8), lines8 = ceil_div(c.n, 16) * ceil_div(c.k, 4);
  const int64_t bytes = 64 * (c.int4 ? lines4 : lines8);
  auto x = block<int8_t>(c.m * c.k);
  auto codes = block<int>(c.n * c.k);
  auto packed = block<uint8_t>(bytes);
  auto lut = block<int8_t>(16);
  auto col_sum = block<int32_t>(c.n);
  auto ones = block<float>(c.n), x_scale = block<float>(1), out = block<float>(c.m * c.n);
  for (int i = 0; i < 16; ++i) lut[i] = static_cast<int8_t>(levels[i]);
  for (int64_t i = 0; i < bytes; ++i)
    packed[i] = c.int4 ? 0x88 : 0;  // padding: the code of a level that is not 0
  for (int64_t i = 0; i < c.m * c.k; ++i) x[i] = static_cast<int8_t>(fill_code(c.x, -128, 127, i));
  for (int64_t n = 0; n < c.n; ++n) {
    ones[n] = 1.0f;
    for (int64_t k = 0; k < c.k; ++k) {
      const int nibble = c.int4 ? fill_code(c.w, 0, 15, k) : 0;
      const int code = !c.int4 ? fill_code(c.w, -128, 127, k) : c.table ? levels[nibble] : nibble - 8;
      codes[n * c.k + k] = code;
      col_sum[n] += code;
      if (c.int4) {
        uint8_t& at = packed[int4_n16k4_offset(n, k, c.k)];
        const int shift = int4_n16k4_shift(k);
        at = static_cast<uint8_t>((at & (0xf0 >> shift)) | (nibble << shift));
      } else {
        packed[int8_n16k4_offset(n, k, c.k)] = static_cast<uint8_t>(code);
      }
    }
  }
  const int zero_point = static_cast<int>(rng() % 256) - 128;
  x_scale[0] = 1.0f;
  QLinearArgs args{};
  args.x = x.get();
  args.m = c.m;
  args.x_scale = x_scale.get();
  args.x_zero_point = zero_point;
  args.weight = {
      packed.get(), c.int4 ? Layout::int4_n16k4 : Layout::int8_n16k4, c.n, c.k, c.table ? lut.get() : nullptr,
      ones.get()};
  args.col_sum = col_sum.get();
  args.out = out.get();
  args.pool = kPool;
  VITQ_DISPATCH(qlinear)(args);
  for (int64_t m = 0; m < c.m; ++m)
    for (int64_t n = 0; n < c.n; ++n) {
      int64_t sum = 0;
      for (int64_t k = 0; k < c.k; ++k) sum += (x[m * c.k + k] - zero_point) * codes[n * c.k + k];
      expect(out[m * c.n + n] == static_cast<float>(sum), "qlinear " + describe(c, isa));
    }

  // Everything at once, in half precision, against the fused quantizing form.
  auto t = block<float>(c.m * c.rank), up = block<float>(c.n * c.rank), row = block<float>(c.n);
  auto residual = block<float>(c.m * c.n);
  for (int64_t i = 0; i < c.m * c.rank; ++i) t[i] = random_float();
  for (int64_t i = 0; i < c.n * c.rank; ++i) up[i] = random_float();
  for (int64_t i = 0; i < c.n; ++i) row[i] = random_float();
  for (int64_t i = 0; i < c.m * c.n; ++i) residual[i] = random_float();
  x_scale[0] = 1e-3f;
  args.tail = {t.get(),
               {up.get(), DType::f32},
               c.rank,
               {row.get(), DType::f32},
               Activation::gelu_erf,
               {row.get(), DType::f32},
               {residual.get(), DType::f32}};
  VITQ_DISPATCH(qlinear)(args);
  auto half = block<uint16_t>(c.m * c.n);
  QLinearArgs narrow = args;
  narrow.out = half.get();
  narrow.out_dtype = DType::bf16;
  VITQ_DISPATCH(qlinear)(narrow);
  for (int64_t i = 0; i < c.m * c.n; ++i) {
    const uint32_t bits = static_cast<uint32_t>(half[i]) << 16;
    float value;
    std::memcpy(&value, &bits, 4);
    expect(std::fabs(value - out[i]) <= std::fabs(out[i]) / 256.0f, "bfloat16 " + describe(c, isa));
  }
  auto q = block<int8_t>(c.m * c.n);
  auto scale = block<float>(c.m);
  auto down = block<float>(3 * c.n), next_t = block<float>(3 * c.m);
  for (int64_t i = 0; i < 3 * c.n; ++i) down[i] = random_float();
  QuantTail quant{};
  quant.qmin = -127;
  quant.qmax = 127;
  quant.groups = 1;
  quant.k = c.n;
  quant.q = q.get();
  quant.out_scale = scale.get();
  quant.lora_down = down.get();
  quant.rank = 3;
  quant.t = next_t.get();
  VITQ_DISPATCH(qlinear_quantize)(args, quant);
  auto q2 = block<int8_t>(c.m * c.n);
  auto scale2 = block<float>(c.m), t2 = block<float>(3 * c.m);
  QuantTail again = quant;
  again.q = q2.get();
  again.out_scale = scale2.get();
  again.t = t2.get();
  VITQ_DISPATCH(quantize)(QuantizeArgs{{out.get(), DType::f32}, c.m, again, kPool});
  for (int64_t i = 0; i < c.m * c.n; ++i) expect(q[i] == q2[i], "qlinear_quantize " + describe(c, isa));
  for (int64_t i = 0; i < 3 * c.m; ++i) expect(next_t[i] == t2[i], "t " + describe(c, isa));

  auto xf = block<float>(c.m * c.k);
  for (int64_t i = 0; i < c.m * c.k; ++i) xf[i] = static_cast<float>(static_cast<int>(rng() % 33) - 16);
  const WeightOnlyArgs plain{{xf.get(), DType::f32}, c.m, args.weight, {}, out.get(), DType::f32, kPool};
  VITQ_DISPATCH(qlinear_weight_only)(plain);
  for (int64_t m = 0; m < c.m; ++m)
    for (int64_t n = 0; n < c.n; ++n) {
      double sum = 0;  // integers this small are exact in float32, too
      for (int64_t k = 0; k < c.k; ++k) sum += xf[m * c.k + k] * codes[n * c.k + k];
      expect(out[m * c.n + n] == static_cast<float>(sum), "qlinear_weight_only " + describe(c, isa));
    }
}

void quantize_case(int64_t m, int64_t k, Isa isa) {
  const std::string name = std::string(isa_name(isa)) + " m=" + std::to_string(m) + " k=" + std::to_string(k);
  auto x = block<float>(m * k), scale = block<float>(m), down = block<float>(5 * k), t = block<float>(5 * m);
  auto half = block<uint16_t>(m * k);
  auto q = block<int8_t>(m * k), lut = block<int8_t>(256);
  for (int i = 0; i < 256; ++i) lut[i] = static_cast<int8_t>(i - 128);
  for (int64_t i = 0; i < m * k; ++i) {
    x[i] = std::nearbyint(random_float() * 40.0f);  // integers: no rounding but the one at stake
    uint32_t bits;
    std::memcpy(&bits, &x[i], 4);
    half[i] = static_cast<uint16_t>(bits >> 16);
    bits &= 0xffff0000u;
    std::memcpy(&x[i], &bits, 4);
  }
  QuantTail tail{};
  tail.qmin = -127;
  tail.qmax = 127;
  tail.groups = 1;
  tail.lut = lut.get();
  tail.lora_down = down.get();
  tail.rank = 5;
  tail.subspace = true;  // of directions that are all zero: the residual is x
  tail.k = k;
  tail.q = q.get();
  tail.out_scale = scale.get();
  tail.t = t.get();
  VITQ_DISPATCH(quantize)(QuantizeArgs{{half.get(), DType::bf16}, m, tail, kPool});
  for (int64_t i = 0; i < m; ++i) {
    float absmax = 0;
    for (int64_t c = 0; c < k; ++c) absmax = std::max(absmax, std::fabs(x[i * k + c]));
    const float want = absmax == 0 ? 1.0f : absmax / 127.0f;
    expect(scale[i] == want, "scale " + name);
    const float inverse = 1.0f / want;
    for (int64_t c = 0; c < k; ++c)
      expect(q[i * k + c] == static_cast<int>(std::nearbyint(x[i * k + c] * inverse)), "quantize " + name);
  }
  if (k == 0) return;
  tail.rank = 0;
  tail.subspace = false;
  VITQ_DISPATCH(layer_norm_quantize)
  (LayerNormQuantizeArgs{{x.get(), DType::f32}, {}, {x.get(), DType::f32}, 1e-5, m, {}, tail, kPool});
  for (int64_t i = 0; i < m; ++i) expect(std::isfinite(scale[i]), "layer_norm_quantize " + name);
  // One image of m tokens, last token first, behind an empty slot.
  auto moved = block<int8_t>((m + 1) * k);
  auto moved_scale = block<float>(m + 1);
  auto slots = block<int32_t>(m + 1);
  for (int64_t i = 0; i <= m; ++i) slots[i] = static_cast<int32_t>(i == 0 ? -1 : m - i);
  QuantTail to = tail;
  to.q = moved.get();
  to.out_scale = moved_scale.get();
  const RowMap gather{slots.get(), m + 1, m};
  VITQ_DISPATCH(layer_norm_quantize)
  (LayerNormQuantizeArgs{{x.get(), DType::f32}, {}, {x.get(), DType::f32}, 1e-5, m + 1, gather, to, kPool});
  expect(moved_scale[0] == 1.0f, "scale of an empty slot " + name);
  for (int64_t c = 0; c < k; ++c) expect(moved[c] == 0, "codes of an empty slot " + name);
  for (int64_t i = 1; i <= m; ++i) {
    expect(moved_scale[i] == scale[m - i], "gathered scale " + name);
    for (int64_t c = 0; c < k; ++c) expect(moved[i * k + c] == q[(m - i) * k + c], "gathered codes " + name);
  }
}

}  // namespace
}  // namespace vitq

int main() {
  using namespace vitq;
  for (Isa isa : available_isas()) {
    set_cpu_isa(isa_name(isa));
    const int before = failures;
    int cases = 0;
    const int64_t shapes[][4] = {{1, 1, 1, 0},    {1, 3, 17, 1},    {2, 8, 16, 0},
                                 {5, 9, 15, 4},   {6, 33, 63, 16},  {7, 64, 64, 2},
                                 {13, 70, 65, 0}, {25, 31, 130, 5}, {4, 0, 5, 2}};
    const std::pair<Fill, Fill> fills[] = {
        {Fill::random, Fill::random}, {Fill::low, Fill::low},   {Fill::low, Fill::high},
        {Fill::high, Fill::low},      {Fill::high, Fill::high}, {Fill::alternating, Fill::alternating}};
    for (const auto& s : shapes)
      for (int format = 0; format < 3; ++format)
        for (const auto& [x, w] : fills) {
          linear_case({s[0], s[1], s[2], s[3], format > 0, format == 2, x, w}, isa);
          ++cases;
        }
    for (bool int4 : {false, true}) {  // long enough for any 16-bit accumulator to overflow
      linear_case({3, 1003, 18, 1, int4, false, Fill::low, Fill::high}, isa);
      linear_case({3, 1003, 18, 1, int4, false, Fill::low, Fill::low}, isa);
    }
    for (int64_t m : {1, 2, 3, 5, 17})
      for (int64_t k : {0, 1, 4, 7, 15, 16, 17, 33, 100}) quantize_case(m, k, isa);
    attention_cases();
    learning_cases();
    std::printf("%s: %d linear cases, %d failures\n", isa_name(isa), cases, failures - before);
  }
  return failures == 0 ? 0 : 1;
}
