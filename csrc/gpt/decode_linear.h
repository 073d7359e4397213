// A linear layer on one to eight rows of a GPU, with what stands around it in a GPT's block: for decoding, where a kernel's
// time is that of reading the weights once, and each kernel more costs as much again.
//
//   h = x + residual;  y = act(norm(h) @ weight.T + bias)
//
// What is not wanted is null. Sums are taken in float32; h, the norm and what goes into the activation are rounded to the
// tensors' type, as they are where each is a kernel of its own.
#pragma once
#include "mlp/mlp.h"

namespace fastlm {

constexpr int64_t kDecodeRows = 8;

struct DecodeLinearCuda {
  const void* x;                        // (rows, cols), packed, as every tensor
  const void* residual;                 // (rows, cols)
  void* h;                              // (rows, cols), another memory than residual's
  const void *norm_weight, *norm_bias;  // (cols)
  const void* weight;                   // (outputs, cols); of a gated activation (2 outputs, cols)
  const void* bias;                     // (outputs), gated (2 outputs)
  void* y;                              // (rows, outputs)
  int64_t rows, cols, outputs;
  float eps;
  bool rms;
  bool activate;
  Activation activation;
  DType type;
  bool programmatic;  // sm_90: may begin, and read weights, while the kernel in front of it is running
};

// Whether the kernel takes such a layer; addresses have to be multiples of 16.
bool decode_linear_takes(int64_t rows, int64_t cols, DType type);

// Throws std::invalid_argument for what it does not take.
void decode_linear_cuda(const DecodeLinearCuda& p, void* stream);

}  // namespace fastlm
