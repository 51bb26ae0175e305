// One call of one CPU kernel at a shape of ViT-S, for bench/instructions.py, which counts its instructions.
// Without arguments: the names of the cases. The instruction set is that of VITQ_CPU_ISA.
#include <cmath>
#include <cstdint>
#include <cstdio>
#include <functional>
#include <map>
#include <random>
#include <string>
#include <vector>

#include "common/isa.h"
#include "common/layout.h"
#include "learning/learning_cpu.h"
#include "qattention/qattention_cpu.h"
#include "qlinear/qlinear_cpu.h"
#include "quantize/quantize_cpu.h"

// The counter counts what happens inside this function; the empty statement keeps the call from becoming a
// jump out of it.
extern "C" __attribute__((noinline, visibility("default"))) void vitq_measured(
    const std::function<void()>& call) {
  call();
  asm volatile("");
}

namespace vitq {
namespace {

constexpr int64_t kRows = 197, kRank = 32;
const Pool kPool{1, nullptr};  // one thread: a pool is not asked

template <class T>
std::vector<T> filled(int64_t n, double scale) {
  static std::mt19937 rng(0);
  std::uniform_real_distribution<double> value(-scale, scale);
  std::vector<T> out(static_cast<size_t>(n));
  for (T& x : out) x = static_cast<T>(value(rng));
  return out;
}

// A layer of random codes; everything that its calls point to.
struct Linear {
  Linear(int64_t k, int64_t n, bool int4, int64_t rank)
      : x(filled<int8_t>(kRows * k, 127)),
        packed(filled<uint8_t>(ceil_div(n, 16) * ceil_div(k, int4 ? 8 : 4) * 64, 255)),
        xf(filled<float>(kRows * k, 1)),
        scale(filled<float>(n, 1)),
        row_scale(filled<float>(kRows, 1)),
        bias(filled<float>(n, 1)),
        t(filled<float>(kRows * rank, 1)),
        up(filled<float>(n * rank, 1)),
        out(kRows * n),
        col_sum(n),
        q(kRows * n),
        out_scale(kRows) {
    args.x = x.data();
    args.m = kRows;
    args.x_scale = row_scale.data();
    args.x_scale_per_row = true;
    args.weight = {packed.data(), int4 ? Layout::int4_n16k4 : Layout::int8_n16k4, n, k, nullptr,
                   scale.data()};
    args.col_sum = col_sum.data();
    args.tail.bias = {bias.data(), DType::f32};
    args.tail.lora_t = t.data();
    args.tail.lora_up = {up.data(), DType::f32};
    args.tail.rank = rank;
    args.out = out.data();
    args.pool = kPool;
    quant.qmin = -127, quant.qmax = 127, quant.groups = 1, quant.k = n;
    quant.q = q.data(), quant.out_scale = out_scale.data();
  }
  std::vector<int8_t> x;
  std::vector<uint8_t> packed;
  std::vector<float> xf, scale, row_scale, bias, t, up, out;
  std::vector<int32_t> col_sum;
  std::vector<int8_t> q;
  std::vector<float> out_scale;
  QLinearArgs args{};
  QuantTail quant{};
};

// Rows of floats and the places of their codes.
struct Rows {
  explicit Rows(int64_t k)
      : x(filled<float>(kRows * k, 1)),
        gamma(filled<float>(k, 1)),
        down(filled<float>(kRank * k, 1)),
        lut(filled<int8_t>(256, 127)),
        q(kRows * k),
        scale(kRows),
        t(kRows * kRank) {
    tail.qmin = -127, tail.qmax = 127, tail.groups = 1, tail.k = k;
    tail.q = q.data(), tail.out_scale = scale.data(), tail.t = t.data();
  }
  std::vector<float> x, gamma, down;
  std::vector<int8_t> lut, q;
  std::vector<float> scale, t;
  QuantTail tail{};
};

void attention() {
  const int64_t heads = 6, d = 64, stride = 3 * heads * d;
  const auto fused = filled<int8_t>(kRows * stride, 127);
  const float scale = 0.02f;
  std::vector<float> out(static_cast<size_t>(kRows * heads * d));
  QAttentionArgs args{};
  args.batch = 1, args.heads = heads, args.nq = args.nk = kRows, args.d = d;
  for (auto [operand, part] : {std::pair{&args.q, 0}, {&args.k, 1}, {&args.v, 2}})
    *operand = {fused.data() + part * heads * d, kRows * stride, d, stride};
  args.q_scale = args.k_scale = args.v_scale = {&scale, 0, 0, 0};
  args.softmax_scale = 0.125f;
  Focus& f = args.focus;
  f.top = 255, f.b1 = 0.0, f.b2 = 1.0, f.power = 2.0, f.row_anchor = true, f.step = 1.0 / 255;
  for (int c = 0; c <= f.top; ++c)
    f.levels[c] = static_cast<uint8_t>(std::nearbyint(std::pow(c / 255.0, f.power) / f.step));
  args.mask_groups = 1;
  args.pool = kPool;
  vitq_measured([&] { VITQ_DISPATCH(qattention)(args, out.data(), DType::f32); });
}

void learned_quantizer(bool back) {
  const int64_t k = 384;
  const auto x = filled<float>(kRows * k, 1), grad = filled<float>(kRows * k, 1);
  const float scale = 0.2f;
  std::vector<float> y(static_cast<size_t>(kRows * k)), of_scale(kRows), of_zero(kRows);
  FakeQuantizeArgs args{};
  args.x = x.data(), args.rows = kRows, args.columns = k;
  args.scale = &scale, args.scales = 1;
  args.qmin = -7, args.qmax = 7;
  args.dropped = {true, {1, 2}, 0};
  args.y = y.data();
  args.pool = kPool;
  if (back)
    vitq_measured([&] {
      VITQ_DISPATCH(fake_quantize_backward)({args, grad.data(), y.data(), of_scale.data(), of_zero.data()});
    });
  else
    vitq_measured([&] { VITQ_DISPATCH(fake_quantize)(args); });
}

void learned_softmax(bool back) {
  const int64_t n = kRows * kRows;
  const auto scores = filled<float>(n, 3), grad = filled<float>(n, 1);
  const std::vector<float> table(16, 1);
  std::vector<float> level(static_cast<size_t>(n)), u(static_cast<size_t>(n)), sums(3 * kRows);
  FocusedSoftmaxArgs args{};
  args.scores = scores.data(), args.rows = args.columns = kRows;
  args.b1 = 0.01f, args.inverse = 2.0f, args.power = 2.0, args.row_anchor = true, args.top = 15;
  args.levels = args.slopes = args.lifts = table.data();
  args.level = level.data(), args.u = u.data(), args.total = sums.data();
  args.pool = kPool;
  const auto forward = [&] { VITQ_DISPATCH(focused_softmax)(args); };
  if (!back) return vitq_measured(forward);
  forward();
  vitq_measured([&] {
    VITQ_DISPATCH(focused_softmax_backward)(
        {args, grad.data(), nullptr, u.data(), level.data(), sums.data()});
  });
}

using Cases = std::map<std::string, std::function<void()>>;

Cases cases() {
  Cases out;
  for (const bool int4 : {false, true}) {
    const std::string name = int4 ? "w4a8" : "w8a8";
    for (const auto& [k, n] : {std::pair<int64_t, int64_t>{384, 1536}, {1536, 384}})
      out["qlinear " + name + " 197x" + std::to_string(k) + "x" + std::to_string(n)] = [=] {
        Linear layer(k, n, int4, 0);
        vitq_measured([&] { VITQ_DISPATCH(qlinear)(layer.args); });
      };
    out["qlinear " + name + " 197x384x1536, rank 32"] = [=] {
      Linear layer(384, 1536, int4, kRank);
      vitq_measured([&] { VITQ_DISPATCH(qlinear)(layer.args); });
    };
    out["qlinear_quantize " + name + " 197x384x1536, GELU"] = [=] {
      Linear layer(384, 1536, int4, 0);
      layer.args.tail.activation = Activation::gelu_erf;
      vitq_measured([&] { VITQ_DISPATCH(qlinear_quantize)(layer.args, layer.quant); });
    };
  }
  out["qlinear_weight_only w4 197x384x1536"] = [] {
    Linear layer(384, 1536, true, 0);
    const WeightOnlyArgs args{
        {layer.xf.data(), DType::f32}, kRows, layer.args.weight, {}, layer.out.data(), DType::f32, kPool};
    vitq_measured([&] { VITQ_DISPATCH(qlinear_weight_only)(args); });
  };
  const auto quantizer = [&](const std::string& name, bool table, bool subspace) {
    out["quantize 197x384" + name] = [=] {
      Rows rows(384);
      if (table) rows.tail.lut = rows.lut.data();
      if (subspace) rows.tail.lora_down = rows.down.data(), rows.tail.rank = kRank, rows.tail.subspace = true;
      vitq_measured([&] { VITQ_DISPATCH(quantize)({{rows.x.data(), DType::f32}, kRows, rows.tail, kPool}); });
    };
  };
  quantizer("", false, false);
  quantizer(", table", true, false);
  quantizer(", subspace 32", false, true);
  out["layer_norm_quantize 197x384"] = [] {
    Rows rows(384);
    const AnyFloat gamma{rows.gamma.data(), DType::f32};
    const LayerNormQuantizeArgs args{
        {rows.x.data(), DType::f32}, gamma, gamma, 1e-6, kRows, {}, rows.tail, kPool};
    vitq_measured([&] { VITQ_DISPATCH(layer_norm_quantize)(args); });
  };
  out["qattention 1x6x197x64"] = attention;
  for (const bool back : {false, true}) {
    const std::string suffix = back ? ", backward" : "";
    out["fake_quantize 197x384, half dropped" + suffix] = [=] { learned_quantizer(back); };
    out["focused_softmax 197x197" + suffix] = [=] { learned_softmax(back); };
  }
  return out;
}

}  // namespace
}  // namespace vitq

int main(int argc, char** argv) {
  const auto cases = vitq::cases();
  if (argc == 1) {
    for (const auto& [name, run] : cases) std::printf("%s\n", name.c_str());
    return 0;
  }
  const auto found = cases.find(argv[1]);
  if (found == cases.end()) {
    std::fprintf(stderr, "case is '%s', expected one that is listed without arguments\n", argv[1]);
    return 2;
  }
  found->second();
  return 0;
}
