// qattention without torch, under the sanitizers: buffers as large as the contract says and no larger, ragged
// and strided shapes, all-extreme codes, every focus form. Two settings make the result known without a
// softmax of its own:
//
//   flat  all scores equal: every key has the top level, so o is the integer sum of the values
//   hard  scores so far apart that only keys of the largest product count: o is the mean of their values
#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstring>
#include <random>
#include <string>
#include <vector>

#define VITQ_ISA portable  // for vector_math.h: the same polynomials on every instruction set
#include "checks.h"
#include "common/isa.h"
#include "qattention/qattention_cpu.h"
#include "qattention/vector_math.h"

namespace vitq {
namespace {

std::mt19937 rng(1);

struct Size {
  int64_t b, h, nq, nk, d;
};

enum class Fill { random, low, high, mixed };

// [B, H, N, d] with a gap between rows; the last row ends with its buffer.
struct Operand {
  Operand(int64_t b, int64_t h, int64_t n, int64_t d, Fill fill) : stride(d + 3) {
    const int64_t size = (b * h * n - 1) * stride + d;
    data = block<int8_t>(size);
    for (int64_t i = 0; i < size; ++i) {
      const int random = static_cast<int>(rng() % 256) - 128;
      data[i] = static_cast<int8_t>(fill == Fill::random ? random
                                    : fill == Fill::low  ? -128
                                    : fill == Fill::high ? 127
                                                         : (random < 0 ? -128 : 127));
    }
    view = {data.get(), h * n * stride, n * stride, stride};
  }
  int64_t stride;
  std::unique_ptr<int8_t[]> data;
  Codes view;
};

Focus focus(int top, double b1, double b2, double power, bool row_anchor, bool renormalize) {
  Focus f{};
  f.top = top, f.b1 = b1, f.b2 = b2, f.power = power;
  f.row_anchor = row_anchor, f.renormalize = renormalize;
  const bool affine = power == 1.0;
  f.step = affine ? (b2 - b1) / top : b2 / 255;
  f.offset = affine ? b1 : 0.0;
  for (int c = 0; c <= top; ++c) {
    const double level = b1 + (b2 - b1) * std::pow(static_cast<double>(c) / top, power);
    f.levels[c] = static_cast<uint8_t>(affine ? c : std::nearbyint(level / f.step));
  }
  return f;
}

struct Case {
  Case(const Size& size, Fill fill_q, Fill fill_v)
      : s(size),
        q(s.b, s.h, s.nq, s.d, fill_q),
        k(s.b, s.h, s.nk, s.d, fill_q == Fill::random ? Fill::random : Fill::mixed),
        v(s.b, s.h, s.nk, s.d, fill_v),
        scale(block<float>(1)),
        one(block<float>(1)),
        out(block<float>(s.b * s.nq * s.h * s.d)) {
    one[0] = 1.0f;
    args.batch = s.b, args.heads = s.h, args.nq = s.nq, args.nk = s.nk, args.d = s.d;
    args.q = q.view, args.k = k.view, args.v = v.view;
    args.q_scale = {scale.get(), 0, 0, 0};
    args.k_scale = args.v_scale = {one.get(), 0, 0, 0};
    args.softmax_scale = 1.0f;
    args.mask_groups = 1;
    args.pool = kPool;
  }
  int64_t product(int64_t b, int64_t h, int64_t i, int64_t j) const {
    int64_t sum = 0;
    for (int64_t c = 0; c < s.d; ++c) sum += q.view.row(b, h, i)[c] * k.view.row(b, h, j)[c];
    return sum;
  }
  float& at(int64_t b, int64_t i, int64_t h, int64_t c) { return out[((b * s.nq + i) * s.h + h) * s.d + c]; }

  Size s;
  Operand q, k, v;
  std::unique_ptr<float[]> scale, one, out;
  QAttentionArgs args{};
};

void known_results(const Size& s, Fill fill_q, Fill fill_v, const std::string& name) {
  Case c(s, fill_q, fill_v);
  c.args.focus = focus(255, 0.0, 1.0, 1.0, true, true);
  for (const bool hard : {false, true}) {
    c.scale[0] = hard ? 1000.0f : 0.0f;
    std::fill_n(c.out.get(), s.b * s.nq * s.h * s.d, NAN);
    VITQ_DISPATCH(qattention)(c.args, c.out.get(), DType::f32);
    for (int64_t b = 0; b < s.b; ++b)
      for (int64_t h = 0; h < s.h; ++h)
        for (int64_t i = 0; i < s.nq; ++i) {
          std::vector<int64_t> products;
          for (int64_t j = 0; j < s.nk; ++j) products.push_back(c.product(b, h, i, j));
          const int64_t top = *std::max_element(products.begin(), products.end());
          for (int64_t col = 0; col < s.d; ++col) {
            int64_t sum = 0, count = 0;
            for (int64_t j = 0; j < s.nk; ++j)
              if (!hard || products[j] == top) sum += c.v.view.row(b, h, j)[col], ++count;
            const double want = static_cast<double>(sum) / static_cast<double>(count);
            expect(std::fabs(c.at(b, i, h, col) - want) <= 1e-6 * std::fabs(want),
                   (hard ? "hard " : "flat ") + name);
          }
        }
  }
}

// Everything that can be switched on: only that it stays inside its buffers and finite.
void every_form(const Size& s, const Focus& f, bool extras, const std::string& name) {
  Case c(s, Fill::random, Fill::random);
  c.args.focus = f;
  auto q_scale = block<float>(s.b * s.h * s.nq), k_scale = block<float>(s.b * s.h * s.nk),
       v_scale = block<float>(s.b * s.h * s.nk), bias = block<float>(s.h * s.nq * s.nk);
  auto mask = block<uint16_t>(s.nk);  // bfloat16
  for (auto [p, n] : {std::pair{q_scale.get(), s.nq}, {k_scale.get(), s.nk}, {v_scale.get(), s.nk}})
    for (int64_t i = 0; i < s.b * s.h * n; ++i) p[i] = static_cast<float>(1 + rng() % 100) * 2e-4f;
  for (int64_t i = 0; i < s.h * s.nq * s.nk; ++i) bias[i] = static_cast<float>(rng() % 7) - 3.0f;
  for (int64_t j = 0; j < s.nk; ++j) mask[j] = j % 3 == 1 ? 0xff80 : 0;  // −inf
  c.scale[0] = 1e-4f;
  if (extras) {
    c.args.q_scale = {q_scale.get(), s.h * s.nq, s.nq, 1};
    c.args.k_scale = {k_scale.get(), s.h * s.nk, s.nk, 1};
    c.args.v_scale = {v_scale.get(), s.h * s.nk, s.nk, 1};
    c.args.bias = {{bias.get(), DType::f32}, s.nq * s.nk, s.nk};
    c.args.mask = {{mask.get(), DType::bf16}, s.nk, 0};
  }
  const int64_t width = s.h * s.d, rows = s.b * s.nq;
  VITQ_DISPATCH(qattention)(c.args, c.out.get(), DType::f32);
  for (int64_t i = 0; i < rows * width; ++i) expect(std::isfinite(c.out[i]), "finite " + name);
  auto half = block<uint16_t>(rows * width);
  VITQ_DISPATCH(qattention)(c.args, half.get(), DType::bf16);
  auto q = block<int8_t>(rows * width), q2 = block<int8_t>(rows * width);
  auto scale = block<float>(rows), scale2 = block<float>(rows);
  QuantTail tail{};
  tail.qmin = -127, tail.qmax = 127, tail.groups = 1, tail.k = width;
  tail.q = q.get(), tail.out_scale = scale.get();
  VITQ_DISPATCH(qattention_quantize)(c.args, tail);
  tail.q = q2.get(), tail.out_scale = scale2.get();
  VITQ_DISPATCH(quantize)(QuantizeArgs{{c.out.get(), DType::f32}, rows, tail, c.args.pool});
  expect(std::memcmp(q.get(), q2.get(), static_cast<size_t>(rows * width)) == 0, "quantized " + name);

  // Each window an image of its own, whose second query goes nowhere and whose last becomes the first.
  if (s.nq < 2) return;
  const int64_t tokens = s.nq - 1;
  auto slots = block<int32_t>(s.nq);
  for (int64_t i = 0; i < s.nq; ++i)
    slots[i] = static_cast<int32_t>(i == 1 ? -1 : i == 0 ? tokens - 1 : tokens - 1 - (i - 1));
  c.args.scatter = {slots.get(), s.nq, tokens};
  auto moved = block<float>(s.b * tokens * width);
  auto q3 = block<int8_t>(s.b * tokens * width);
  auto scale3 = block<float>(s.b * tokens);
  VITQ_DISPATCH(qattention)(c.args, moved.get(), DType::f32);
  tail.q = q3.get(), tail.out_scale = scale3.get();
  VITQ_DISPATCH(qattention_quantize)(c.args, tail);
  for (int64_t i = 0; i < rows; ++i) {
    if (slots[i % s.nq] < 0) continue;
    const int64_t row = i / s.nq * tokens + slots[i % s.nq];
    const auto bytes = static_cast<size_t>(width);
    expect(std::memcmp(&moved[row * width], &c.out[i * width], 4 * bytes) == 0, "scattered " + name);
    expect(std::memcmp(&q3[row * width], &q[i * width], bytes) == 0, "scattered codes " + name);
    expect(scale3[row] == scale[i], "scattered scale " + name);
  }
}

// At most twice the float32 error of torch's exp (1.03 units roundoff); sampled over the whole range.
void vector_math() {
  using namespace portable;
  for (float x = 0.0f; x > -126.0f; x -= 0.00101f) {
    const double want = std::exp2(static_cast<double>(x));
    expect(std::fabs(attention::exp2_nonpositive(set(x))[0] - want) <= want * 2.06 * 0x1p-24, "exp2");
  }
  for (float x = 1.5e-38f; x < 1.0f; x *= 1.0007f) {
    const double want = std::log2(static_cast<double>(x));
    expect(std::fabs(attention::log2_positive(set(x))[0] - want) <= (2 - want) * 0x1p-24, "log2");
  }
  expect(std::isnan(attention::exp2_nonpositive(set(NAN))[0]), "exp2 of NaN");
  expect(attention::exp2_nonpositive(set(-INFINITY))[0] < 2e-38f, "exp2 of -inf");
}

}  // namespace

void attention_cases() {
  vector_math();
  const Size sizes[] = {{1, 1, 1, 1, 1},    {2, 1, 5, 17, 3},  {1, 2, 7, 16, 16}, {1, 3, 50, 49, 17},
                        {1, 1, 13, 65, 80}, {2, 2, 3, 198, 8}, {1, 1, 2, 33, 64}};
  for (const Size& s : sizes) {
    const std::string name = std::string(isa_name(cpu_isa())) + " nq=" + std::to_string(s.nq) +
                             " nk=" + std::to_string(s.nk) + " d=" + std::to_string(s.d);
    for (Fill q : {Fill::random, Fill::low, Fill::high, Fill::mixed})
      for (Fill v : {Fill::random, Fill::low, Fill::high, Fill::mixed}) known_results(s, q, v, name);
    for (const double b1 : {0.0, 0.05})
      for (const double power : {1.0, 1.5, 2.0, 3.0})
        for (const int top : {3, 15, 255})
          for (const int anchor_and_norm : {0, 1, 2, 3})
            for (const bool extras : {false, true})
              every_form(s, focus(top, b1, 0.8, power, anchor_and_norm & 1, anchor_and_norm & 2), extras,
                         name);
  }
}

}  // namespace vitq
