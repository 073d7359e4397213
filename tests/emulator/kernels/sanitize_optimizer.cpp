// AdamW and the norm of the gradients on small cases, for the sanitizers. A plain loop gives the wanted values.
#include <algorithm>
#include <cstdio>
#include <memory>

#include "optimizer/adamw.h"
#include "optimizer/grad_norm.h"
#include "sanitize_values.h"

namespace {

using namespace fastlm;

constexpr int64_t kChunk = kGradNormChunk;

struct Shape {
  int64_t numel;
  DType p_type, g_type;
  bool amsgrad, shadow;
  int shift;  // bytes, of every address
};

int64_t chunks_of(int64_t numel) { return (numel + kChunk - 1) / kChunk; }

// A parameter with its state, stepped by AdamW; `wanted` are the state and the parameter after the step.
struct Parameter {
  Tensor param, grad, m, v, largest, shadow;
  std::vector<double> wanted_param, wanted_m, wanted_v, wanted_largest;

  Parameter(const Shape& s, int64_t seed)
      : param(s.numel, s.p_type, seed, s.shift), grad(s.numel, s.g_type, seed + 1, s.shift),
        m(s.numel, DType::f32, seed + 2, s.shift), v(s.numel, DType::f32, seed + 3, s.shift),
        largest(s.numel, DType::f32, seed + 4, s.shift), shadow(s.numel, DType::bf16, seed + 5, s.shift) {
    for (int64_t i = 0; i < s.numel; i++) {
      v.set(i, std::abs(v[i]) + 0.125f);
      largest.set(i, std::abs(largest[i]) + 0.125f);
    }
  }

  void step(const AdamWStep& s, double grad_scale, bool amsgrad) {
    for (int64_t i = 0; i < param.numel; i++) {
      const double g = (s.maximize ? -1 : 1) * s.grad_scale * grad_scale * grad[i];
      wanted_m.push_back(s.beta1 * m[i] + (1 - s.beta1) * g);
      wanted_v.push_back(s.beta2 * v[i] + (1 - s.beta2) * g * g);
      wanted_largest.push_back(amsgrad ? std::max<double>(largest[i], wanted_v.back()) : largest[i]);
      const double second = amsgrad ? wanted_largest.back() : wanted_v.back();
      const double m_hat = wanted_m.back() / (1 - std::pow(s.beta1, s.step)), v_hat = second / (1 - std::pow(s.beta2, s.step));
      wanted_param.push_back(param[i] * (1 - s.lr * s.weight_decay) - s.lr * m_hat / (std::sqrt(v_hat) + s.eps));
    }
  }
};

void adamw(const std::vector<Shape>& shapes, bool maximize, bool grad_scale) {
  const AdamWStep s{0.125, 0.9, 0.99, 1e-8, 0.1, 3, 0.5f, maximize};
  const float factor = 0.75f;
  std::vector<std::unique_ptr<Parameter>> all;
  std::vector<AdamWRow> rows;
  std::vector<std::vector<double>> untouched;
  int64_t chunks = 0;
  for (const Shape& shape : shapes) {
    all.push_back(std::make_unique<Parameter>(shape, static_cast<int64_t>(all.size()) * 7));
    Parameter& t = *all.back();
    t.step(s, grad_scale ? factor : 1.0, shape.amsgrad);
    untouched.push_back(t.shadow.values());
    rows.push_back({t.param.data, t.grad.data, t.m.floats(), t.v.floats(), shape.amsgrad ? t.largest.floats() : nullptr,
                    shape.shadow ? t.shadow.data : nullptr, shape.numel, static_cast<int64_t>(shape.p_type),
                    static_cast<int64_t>(shape.g_type), chunks, shape.shift % 16 == 0});
    chunks += chunks_of(shape.numel);
  }
  adamw_step_cuda(rows.data(), static_cast<int64_t>(rows.size()), chunks, s, grad_scale ? &factor : nullptr, nullptr);
  for (size_t i = 0; i < all.size(); i++) {
    compare("adamw's parameter", all[i]->param, all[i]->wanted_param);
    compare("adamw's first moment", all[i]->m, all[i]->wanted_m);
    compare("adamw's second moment", all[i]->v, all[i]->wanted_v);
    compare("adamw's largest second moment", all[i]->largest, all[i]->wanted_largest);
    compare("adamw's bfloat16 copy", all[i]->shadow, shapes[i].shadow ? all[i]->wanted_param : untouched[i]);
  }
}

void grad_norm(const std::vector<Shape>& shapes, float max_norm) {
  std::vector<std::unique_ptr<Tensor>> all;
  std::vector<GradNormTensor> table;
  int64_t chunks = 0;
  double squares = 0.0;
  for (const Shape& shape : shapes) {
    all.push_back(std::make_unique<Tensor>(shape.numel, shape.g_type, static_cast<int64_t>(all.size()), shape.shift));
    table.push_back({all.back()->data, shape.numel, chunks, static_cast<int64_t>(shape.g_type)});
    chunks += chunks_of(shape.numel);
    for (const double g : all.back()->values()) squares += g * g;
  }
  Buffer sums(8 * chunks);
  Tensor norm(1, DType::f32), scale(1, DType::f32);
  grad_norm_cuda(table.data(), static_cast<int64_t>(table.size()), chunks, reinterpret_cast<double*>(sums.data), max_norm,
                 norm.floats(), scale.floats(), nullptr);
  compare("grad_norm", norm, {std::sqrt(squares)});
  compare("grad_norm's scale", scale, {std::min(1.0, max_norm / (std::sqrt(squares) + 1e-6))});
}

}  // namespace

// With an argument also the cases with many threads: under ThreadSanitizer each costs a fiber, and those are slow to make.
int main(int arguments, char**) {
  const DType f32 = DType::f32, f16 = DType::f16, bf16 = DType::bf16;
  const Shape small{37, f32, f32, false, false, 0}, shifted{21, bf16, bf16, true, true, 4}, two{4099, f32, bf16, false, true, 0};
  try {
    adamw({small, two}, false, true);
    grad_norm({small, shifted}, 1.0f);
    if (arguments > 1) {
      const Shape one{1, f16, f16, true, false, 0}, even{8200, bf16, f32, true, true, 0}, half{4096, f16, f16, false, false, 0};
      adamw({one, even, shifted, half, small, two}, true, false);
      adamw({shifted}, false, true);
      grad_norm({one, even, shifted, half, small, two}, 1e6f);
      grad_norm({}, 1.0f);
    }
  } catch (const std::exception& e) {
    std::printf("%s\n", e.what());
    return 3;
  }
  return 0;
}
