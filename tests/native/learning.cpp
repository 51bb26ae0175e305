// The learning kernels without torch, under the sanitizers: buffers exactly as large as the contract says,
// every tail of a register, against naive loops. What is differentiated is tested in
// tests/kernels/test_learning.py.
#include <algorithm>
#include <cmath>
#include <cstdint>
#include <random>
#include <string>
#include <vector>

#include "checks.h"
#include "common/isa.h"
#include "learning/learning_cpu.h"

namespace vitq {
namespace {

std::mt19937 rng(2);

std::unique_ptr<float[]> block(int64_t n, float low, float high) {
  std::uniform_real_distribution<float> value(low, high);
  auto out = vitq::block<float>(n);
  for (int64_t i = 0; i < n; ++i) out[i] = value(rng);
  return out;
}

bool near(float a, float b, float error = 1e-5f) { return std::fabs(a - b) <= error * (1.0f + std::fabs(b)); }

void quantizer_case(int64_t rows, int64_t columns, bool table, bool drop, bool per_row) {
  const std::string name =
      "fake_quantize " + std::to_string(rows) + "x" + std::to_string(columns) + (drop ? ", dropped" : "");
  const int64_t n = rows * columns;
  auto x = block(n, -20, 20), grad = block(n, -1, 1), scale = block(rows, 0.3f, 2), y = block(n, 0, 0),
       of_x = block(n, 0, 0), of_scale = block(rows, 0, 0), of_zero = block(rows, 0, 0),
       zero = block(1, 1.2f, 1.2f);
  auto top = vitq::block<int32_t>(rows);
  for (int64_t r = 0; r < rows; ++r) top[r] = r % 2 == 0 ? 7 : 3;
  auto lut = vitq::block<int8_t>(256);
  for (int i = 0; i < 256; ++i) lut[i] = static_cast<int8_t>((i - 128) / 2 * 2);
  FakeQuantizeArgs a{};
  a.x = x.get(), a.rows = rows, a.columns = columns;
  a.scale = scale.get(), a.scales = rows;
  a.zero_point = per_row ? nullptr : zero.get();
  a.qmin = -8, a.qmax = 7, a.row_qmax = per_row ? top.get() : nullptr;
  a.lut = table ? lut.get() : nullptr;
  a.dropped = {drop, {123u, 456u}, 0};
  a.y = y.get();
  a.pool = kPool;
  VITQ_DISPATCH(fake_quantize)(a);
  VITQ_DISPATCH(fake_quantize_backward)({a, grad.get(), of_x.get(), of_scale.get(), of_zero.get()});
  int64_t kept = 0;
  for (int64_t r = 0; r < rows; ++r) {
    float scale_sum = 0, zero_sum = 0;
    const float z = per_row ? 0.0f : 1.0f, high = per_row ? static_cast<float>(top[r]) : 7.0f - z;
    const float low = per_row ? -high : -8.0f - z;
    for (int64_t c = 0; c < columns; ++c) {
      const int64_t i = r * columns + c;
      const float ratio = x[i] * (1.0f / scale[r]), within = std::min(high, std::max(low, ratio));
      float code = std::nearbyint(within);
      if (table) code = static_cast<float>(lut[static_cast<int>(code + z) + 128]) - z;
      const bool inside = within == ratio, dropped = drop && y[i] == x[i];
      kept += !dropped;
      expect(dropped || y[i] == code * scale[r], name);
      expect(of_x[i] == (inside || dropped ? grad[i] : 0.0f), name + ", of x");
      if (!dropped) {
        scale_sum += grad[i] * (code - (inside ? ratio : 0.0f));
        zero_sum -= inside ? 0.0f : grad[i] * scale[r];
      }
    }
    expect(near(of_scale[r], scale_sum, 1e-4f), name + ", of the scale");
    expect(near(of_zero[r], zero_sum, 1e-4f), name + ", of the zero point");
  }
  if (drop && n > 500) expect(kept > n / 3 && kept < 2 * n / 3, name + ", about one half");
}

void softmax_case(int64_t rows, int64_t columns, double power, bool row_anchor) {
  const std::string name = "focused_softmax " + std::to_string(rows) + "x" + std::to_string(columns) +
                           ", power " + std::to_string(power);
  const int64_t n = rows * columns;
  auto scores = block(n, -3, 3), grad = block(n, -1, 1), level = block(n, 0, 0), u = block(n, 0, 0),
       total = block(rows, 0, 0), of_total = block(rows, -1, 1), of_scores = block(n, 0, 0),
       sums = block(3 * rows, 0, 0);
  std::vector<float> levels(16), ones(16, 1.0f), zeros(16, 0.0f);
  for (int i = 0; i < 16; ++i) levels[i] = static_cast<float>(i);
  FocusedSoftmaxArgs a{};
  a.scores = scores.get(), a.rows = rows, a.columns = columns;
  a.b1 = 0.01f, a.inverse = 2.0f, a.power = power, a.row_anchor = row_anchor, a.top = 15;
  a.levels = levels.data(), a.slopes = ones.data(), a.lifts = zeros.data();
  a.level = level.get(), a.u = u.get(), a.total = total.get();
  a.pool = kPool;
  VITQ_DISPATCH(focused_softmax)(a);
  const float* total_grad = row_anchor ? of_total.get() : nullptr;
  VITQ_DISPATCH(focused_softmax_backward)
  ({a, grad.get(), total_grad, u.get(), of_scores.get(), sums.get()});
  for (int64_t r = 0; r < rows; ++r) {
    const float* s = scores.get() + r * columns;
    const float top = *std::max_element(s, s + columns);
    double sum = 0, first = 0, all = 0;
    for (int64_t c = 0; c < columns; ++c) sum += std::exp(static_cast<double>(s[c] - top));
    expect(near(total[r], static_cast<float>(sum)), name + ", total");
    for (int64_t c = 0; c < columns; ++c) {
      const int64_t i = r * columns + c;
      const double e = std::exp(static_cast<double>(s[c] - top)), p = row_anchor ? e : e / sum;
      expect(near(u[i], static_cast<float>(p)), name + ", u");
      const double x = std::clamp((p - 0.01) * 2.0, 0.0, 1.0), position = std::pow(x, 1.0 / power) * 15.0;
      expect(std::fabs(level[i] - position) <= 0.51, name + ", level");
      // The root is steep at b1: by the kernel's own u.
      const float own = (u[i] - 0.01f) * 2.0f;
      if (own > 0.0f && own <= 1.0f) first += grad[i] * 15.0 / power * std::pow(own, 1.0 / power - 1.0);
      all += of_scores[i];
    }
    expect(std::fabs(sums[r] - first) <= 2e-3 * (columns + std::fabs(first)), name + ", sums");
    expect(sums[2 * rows + r] == 0.0f, name + ", sums of lifts");
    // A common shift of the scores changes nothing.
    expect(std::fabs(all) <= 1e-3 * columns, name + ", of the scores");
  }
}

void rounding_case(int64_t rows, int64_t columns) {
  const std::string name = "soft_round " + std::to_string(rows) + "x" + std::to_string(columns);
  const int64_t n = rows * columns;
  auto alpha = block(n, -6, 6), weight = block(n, -1, 1), grad = block(n, -1, 1),
       scale = block(rows, 0.1f, 0.3f), values = block(n, 0, 0), of_alpha = block(n, 0, 0),
       of_scale = block(rows, 0, 0), sums = block(rows, 0, 0), of_sums = block(rows, -1, 1),
       of_penalty = block(n, 0, 0);
  const SoftRoundArgs a{alpha.get(), weight.get(), scale.get(), rows, columns, -7, 7, values.get(), kPool};
  VITQ_DISPATCH(soft_round)(a);
  VITQ_DISPATCH(soft_round_backward)({a, grad.get(), of_alpha.get(), of_scale.get()});
  VITQ_DISPATCH(rounding_penalty)({alpha.get(), rows, columns, 5.0f, nullptr, sums.get(), kPool});
  VITQ_DISPATCH(rounding_penalty)
  ({alpha.get(), rows, columns, 5.0f, of_sums.get(), of_penalty.get(), kPool});
  for (int64_t r = 0; r < rows; ++r) {
    double scale_sum = 0, penalty = 0;
    for (int64_t c = 0; c < columns; ++c) {
      const int64_t i = r * columns + c;
      const double sigmoid = 1.0 / (1.0 + std::exp(-static_cast<double>(alpha[i])));
      const double stretched = 1.2 * sigmoid - 0.1, h = std::clamp(stretched, 0.0, 1.0);
      const double slope = h == stretched ? 1.2 * sigmoid * (1.0 - sigmoid) : 0.0;
      const double whole = std::floor(weight[i] / scale[r]) + h, code = std::clamp(whole, -7.0, 7.0);
      expect(near(values[i], static_cast<float>(code * scale[r])), name);
      expect(near(of_alpha[i], static_cast<float>(code == whole ? grad[i] * scale[r] * slope : 0.0)),
             name + ", of alpha");
      scale_sum += grad[i] * code;
      const double side = 2.0 * h - 1.0;
      penalty += 1.0 - std::pow(std::fabs(side), 5.0);
      const double steep = std::copysign(std::pow(std::fabs(side), 4.0), side);
      expect(near(of_penalty[i], static_cast<float>(of_sums[r] * -10.0 * steep * slope)),
             name + ", of the penalty");
    }
    expect(near(of_scale[r], static_cast<float>(scale_sum), 1e-4f), name + ", of the scale");
    expect(near(sums[r], static_cast<float>(penalty), 1e-4f), name + ", penalty");
  }
}

}  // namespace

void learning_cases() {
  for (int64_t rows : {1, 2, 7})
    for (int64_t columns : {1, 3, 4, 7, 8, 15, 16, 17, 33, 197}) {
      for (bool table : {false, true})
        for (bool drop : {false, true}) quantizer_case(rows, columns, table, drop, drop);
      for (double power : {1.0, 2.0, 3.0})
        for (bool row_anchor : {false, true}) softmax_case(rows, columns, power, row_anchor);
      rounding_case(rows, columns);
    }
}

}  // namespace vitq
