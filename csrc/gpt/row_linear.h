// A linear layer on one row on a GPU, with what stands around it in a GPT's block: for decoding, where a kernel takes as long
// as it takes to read its weights, and every kernel more begins and ends as slowly.
//
//   h = x + residual;  y = act(norm(h) @ weight.T + bias)
//
// What is not wanted is null. Sums are taken in float32; h, the norm and what goes into the activation are rounded to the
// tensors' type, as they are where each is a kernel of its own.
#pragma once
#include "mlp/mlp.h"

namespace fastlm {

struct RowLinear {
  const void* x;                        // (cols)
  const void* residual;                 // (cols)
  void* h;                              // (cols), another memory than residual's
  const void *norm_weight, *norm_bias;  // (cols)
  const void* weight;                   // (outputs, cols), packed; of a gated activation (2 outputs, cols)
  const void* bias;                     // (outputs), gated (2 outputs)
  void* y;                              // (outputs)
  int64_t cols, outputs;
  float eps;
  bool rms;
  bool activate;
  Activation activation;
  DType type;
  bool programmatic;  // sm_90: may begin, and read weights, while the kernel in front of it is running
};

// Whether the kernel takes a row of so many columns; addresses have to be multiples of 16.
bool row_linear_takes(int64_t cols, DType type);

// Throws std::invalid_argument for what it does not take.
void row_linear_cuda(const RowLinear& p, void* stream);

}  // namespace fastlm
