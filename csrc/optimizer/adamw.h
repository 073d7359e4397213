// AdamW (Loshchilov, Hutter: Decoupled Weight Decay Regularization, arXiv:1711.05101), one pass over memory:
//
//   p -= lr * weight_decay * p
//   m  = beta1 m + (1 - beta1) g;   v = beta2 v + (1 - beta2) g^2      (g negated where maximize, scaled by grad_scale)
//   p -= lr / (1 - beta1^step) * m / (sqrt(v / (1 - beta2^step)) + eps)
#pragma once
#include "common/dtype.h"

namespace fastlm {

struct AdamWTensor {
  void* param;           // p_type
  const void* grad;      // g_type
  float* exp_avg;
  float* exp_avg_sq;
  float* max_exp_avg_sq; // null: no amsgrad
  void* shadow;          // bf16 copy of the parameter, written in the same pass; null: none
  int64_t numel;
  DType p_type, g_type;
};

struct AdamWStep {
  double lr, beta1, beta2, eps, weight_decay;
  int64_t step;          // counted from 1
  float grad_scale;      // the gradient is multiplied by it first (clipping); 1: as it is
  bool maximize;
};

// The same as eleven int64, a row of the table on the device.
struct AdamWRow {
  void* param;
  const void* grad;
  float* exp_avg;
  float* exp_avg_sq;
  float* max_exp_avg_sq;
  void* shadow;
  int64_t numel;
  int64_t p_type, g_type;
  int64_t first_chunk;  // chunks of the tensors before this one
  int64_t vectors;      // every address is a multiple of 16
};

void adamw_step_cpu(const AdamWTensor* tensors, int64_t count, const AdamWStep& s);

// `rows`, and grad_scale (a further factor; null: none), lie on the device.
void adamw_step_cuda(const AdamWRow* rows, int64_t count, int64_t chunks, const AdamWStep& s, const float* grad_scale,
                     void* stream);

}  // namespace fastlm
