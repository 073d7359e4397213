// A linear layer on one row with what stands around it, on small cases, for the sanitizers. Plain loops give the wanted values.
#include <cstdio>

#include "gpt/row_linear.h"
#include "sanitize_values.h"

namespace {

using namespace fastlm;

struct Case {
  DType type;
  int64_t cols, outputs;
  bool residual, norm, rms, bias, activate;
  Activation activation;
};

double act(Activation a, double v) { return a == Activation::relu ? std::max(v, 0.0) : v / (1.0 + std::exp(-v)); }

void run(const Case& c) {
  const bool gated = c.activate && is_gated(c.activation);
  const int64_t rows = (gated ? 2 : 1) * c.outputs;
  Tensor x(c.cols, c.type, 1), residual(c.cols, c.type, 2), h(c.cols, c.type, 3), norm_weight(c.cols, c.type, 4),
      norm_bias(c.cols, c.type, 5), weight(rows * c.cols, c.type, 6), bias(rows, c.type, 7), y(c.outputs, c.type, 8);
  std::vector<double> total(c.cols), normed(c.cols), pre(rows), wanted(c.outputs);
  double mean = 0.0, variance = 0.0;
  for (int64_t i = 0; i < c.cols; i++) total[i] = double{x[i]} + (c.residual ? residual[i] : 0.0f);
  for (int64_t i = 0; i < c.cols; i++) mean += c.rms ? 0.0 : total[i] / c.cols;
  for (int64_t i = 0; i < c.cols; i++) variance += (total[i] - mean) * (total[i] - mean) / c.cols;
  for (int64_t i = 0; i < c.cols; i++) {
    normed[i] = (total[i] - mean) / std::sqrt(variance + 1e-5) * norm_weight[i] + (c.rms ? 0.0f : norm_bias[i]);
    if (!c.norm) normed[i] = total[i];
  }
  for (int64_t r = 0; r < rows; r++) {
    pre[r] = c.bias ? bias[r] : 0.0f;
    for (int64_t i = 0; i < c.cols; i++) pre[r] += normed[i] * weight[r * c.cols + i];
  }
  for (int64_t o = 0; o < c.outputs; o++) {
    wanted[o] = c.activate ? act(c.activation, pre[o]) : pre[o];
    if (gated) wanted[o] *= pre[o + c.outputs];
  }
  row_linear_cuda({x.data, c.residual ? residual.data : nullptr, c.residual ? h.data : nullptr, c.norm ? norm_weight.data : nullptr,
                   c.norm && !c.rms ? norm_bias.data : nullptr, weight.data, c.bias ? bias.data : nullptr, y.data, c.cols,
                   c.outputs, 1e-5f, c.rms, c.activate, c.activation, c.type, true},
                  nullptr);
  if (c.residual) compare("row_linear, h", h, total);
  compare("row_linear", y, wanted);
}

}  // namespace

// With an argument also the cases with many threads: under ThreadSanitizer each costs a fiber, and those are slow to make.
int main(int arguments, char**) {
  const DType f32 = DType::f32, f16 = DType::f16, bf16 = DType::bf16;
  try {
    run({f32, 40, 5, true, true, false, true, false, Activation::relu});
    run({bf16, 264, 3, false, false, false, true, true, Activation::relu});
    run({f32, 8, 2, true, true, true, false, true, Activation::swiglu});
    if (arguments > 1) {
      run({f32, 1096, 9, true, true, false, true, true, Activation::silu});  // several vectors of a thread
      run({f16, 3336, 6, false, false, false, false, false, Activation::relu});  // more than a lane reads at once
      run({bf16, 16, 8193, true, false, false, true, false, Activation::relu});  // two outputs a warp
    }
  } catch (const std::exception& e) {
    std::printf("%s\n", e.what());
    return 3;
  }
  return 0;
}
