// layer_norm and rms_norm, with the residual addition in front of them:
//
//   h    = x + residual                      (h = x where there is no residual)
//   y    = (h - mean(h)) * rstd * weight + bias,   rstd = 1 / sqrt(var(h) + eps)        layer norm
//   y    = h * rstd * weight,                      rstd = 1 / sqrt(mean(h^2) + eps)     RMS norm
//
// x, y: (rows, cols) of x_type. residual, h: (rows, cols) of h_type; h is rounded to h_type before the statistics are
// taken, so that the backward pass, which reads it back, sees what the forward saw. weight, bias: (cols) of w_type.
// mean, rstd: (rows) of float32; mean is null for RMS norm. All arithmetic is in float32.
// Rows are contiguous; x and residual may have any row stride (in elements). Every other tensor is packed.
// Ba, Lei; Kiros; Hinton: Layer Normalization (arXiv:1607.06450). Zhang; Sennrich: Root Mean Square Layer Normalization (arXiv:1910.07467).
#pragma once
#include "common/dtype.h"

namespace fastlm {

struct LayerNormForward {
  const void* x;
  const void* residual;  // null: no residual
  const void* weight;
  const void* bias;      // null: no bias
  void* y;
  void* h;               // null: no residual
  float* mean;           // null: RMS norm, or not wanted
  float* rstd;           // null (CPU): not wanted
  int64_t rows, cols;
  int64_t x_stride, residual_stride;
  float eps;
  bool rms;
  DType x_type, h_type, w_type;
};

//   dh = rstd * (g - mean(g) - xhat * mean(g * xhat)) + dh_in,   g = dy * weight, xhat = (h - mean) * rstd
// (RMS norm: without mean(g)). dx is dh rounded to x_type, dresidual is dh rounded to h_type.
// dweight = sum over rows of dy * xhat, dbias = sum over rows of dy, summed in a fixed order that does not depend on
// the number of threads: two runs give the same bits.
struct LayerNormBackward {
  const void* dy;        // x_type
  const void* dh_in;     // h_type; the gradient that reaches h from its other readers; null: none
  const void* h;         // h_type; x where there was no residual
  const void* weight;
  const float* mean;     // null: RMS norm
  const float* rstd;
  void* dx;              // x_type
  void* dresidual;       // h_type; null: no residual, or x_type == h_type and the caller shares dx
  void* dweight;         // w_type
  void* dbias;           // w_type; null: no bias
  float* workspace;      // layer_norm_backward_workspace(...) floats
  int64_t rows, cols;
  int64_t dy_stride, dh_in_stride, h_stride;
  bool rms;
  DType x_type, h_type, w_type;
};

// CPU. The rows are split into a fixed number of chunks, whatever the number of threads.
int64_t layer_norm_backward_workspace_cpu(int64_t rows, int64_t cols);  // floats
void layer_norm_forward_cpu(const LayerNormForward& p);
void layer_norm_backward_cpu(const LayerNormBackward& p);

// CUDA. `sms` is the device's number of multiprocessors (it decides the grid, so it is part of what makes results repeat).
int64_t layer_norm_backward_workspace_cuda(int64_t rows, int64_t cols, int sms);  // floats
void layer_norm_forward_cuda(const LayerNormForward& p, void* stream);
void layer_norm_backward_cuda(const LayerNormBackward& p, int sms, void* stream);

}  // namespace fastlm
