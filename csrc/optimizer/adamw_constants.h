// What a step of AdamW needs of its hyperparameters, rounded once from float64: the same on the CPU and on CUDA.
#pragma once
#include <cmath>

#include "optimizer/adamw.h"

namespace fastlm {
namespace {

struct AdamWConstants {
  float decay;      // 1 - lr weight_decay
  float beta1, one_minus_beta1, beta2, one_minus_beta2;
  float step_size;  // lr / (1 - beta1^step)
  float v_scale;    // 1 / sqrt(1 - beta2^step)
  float eps;
  float grad_scale;
};

inline AdamWConstants constants_of(const AdamWStep& s) {
  const double correction1 = 1.0 - std::pow(s.beta1, static_cast<double>(s.step));
  const double correction2 = 1.0 - std::pow(s.beta2, static_cast<double>(s.step));
  AdamWConstants c;
  c.decay = static_cast<float>(1.0 - s.lr * s.weight_decay);
  c.beta1 = static_cast<float>(s.beta1);
  c.one_minus_beta1 = static_cast<float>(1.0 - s.beta1);
  c.beta2 = static_cast<float>(s.beta2);
  c.one_minus_beta2 = static_cast<float>(1.0 - s.beta2);
  c.step_size = static_cast<float>(s.lr / correction1);
  c.v_scale = static_cast<float>(1.0 / std::sqrt(correction2));
  c.eps = static_cast<float>(s.eps);
  c.grad_scale = s.maximize ? -s.grad_scale : s.grad_scale;
  return c;
}

}  // namespace
}  // namespace fastlm
