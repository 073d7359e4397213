// The second half of a sum of a matrix's rows: parts of it are added up.
#pragma once
#include "common/cuda/convert.h"
#include "common/cuda/launch.h"

namespace fastlm::cuda {
namespace {

constexpr int kSumRows = 32;  // a 32 x 32 block: a warp reads 32 neighbouring columns, 32 warps share the parts

// sums = the sum of the parts (count, cols), in an order that depends on their number alone.
__global__ void __launch_bounds__(32 * kSumRows)
    sum_columns(const float* parts, const int64_t count, const int64_t cols, void* sums, const DType type) {
  FASTLM_SHARED(float, shared, 32 * kSumRows);
  const int64_t c = 32 * static_cast<int64_t>(blockIdx.x) + threadIdx.x;
  float sum = 0.0f;
  if (c < cols) {
    for (int64_t i = threadIdx.y; i < count; i += kSumRows) sum += parts[i * cols + c];
  }
  shared[32 * threadIdx.y + threadIdx.x] = sum;
  __syncthreads();
  if (threadIdx.y != 0 || c >= cols) return;
  for (int i = 1; i < kSumRows; i++) sum += shared[32 * i + threadIdx.x];
  store_from_float(sums, c, type, sum);
}

inline void run_sum_columns(const float* parts, int64_t count, int64_t cols, void* sums, DType type, cudaStream_t stream) {
  launch("sum_columns", {dim3(static_cast<unsigned>((cols + 31) / 32)), dim3(32, kSumRows), 0, stream}, sum_columns, parts, count,
         cols, sums, type);
}

}  // namespace
}  // namespace fastlm::cuda
