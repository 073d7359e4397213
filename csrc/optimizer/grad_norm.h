// The norm of all gradients together, and the factor that clips it:
//
//   norm = sqrt(sum of g^2),  scale = min(1, max_norm / (norm + 1e-6)), NaN where the norm is not finite
//
// The gradients are cut into chunks of 4096. A chunk's squares are summed in float32, the chunks in float64, in an order
// that follows from the shapes alone: neither the number of threads nor of multiprocessors shows in the result.
#pragma once
#include "common/dtype.h"

namespace fastlm {

struct GradNormTensor {
  const void* data;  // packed
  int64_t numel;
  int64_t first_chunk;  // chunks of the tensors before this one
  int64_t type;         // of DType
};

constexpr int64_t kGradNormChunk = 4096;

// `sums`: a float64 for each chunk. norm and scale: one float each.
void grad_norm_cpu(const GradNormTensor* tensors, int64_t count, int64_t chunks, double* sums, float max_norm, float* norm,
                   float* scale);

// The same; `tensors` and the rest lie on the device.
void grad_norm_cuda(const GradNormTensor* tensors, int64_t count, int64_t chunks, double* sums, float max_norm, float* norm,
                    float* scale, void* stream);

}  // namespace fastlm
