// grad_norm.h on CUDA: a block a chunk, then one block for the chunks' sums. Nothing waits for the device.
#include "optimizer/grad_norm.h"

#include <stdexcept>
#include <string>

#include "common/cuda/launch.h"
#include "common/cuda/reduce.h"
#include "common/cuda/vector.h"
#include "optimizer/chunks.h"

namespace fastlm {
namespace cuda {
namespace {

constexpr int kFinalThreads = 1024;
static_assert(kChunk == kGradNormChunk, "one way to cut");

__global__ void __launch_bounds__(kChunkThreads) sum_chunks(const GradNormTensor* tensors, const int64_t count, double* sums) {
  FASTLM_SHARED(float2, scratch, kChunkThreads / 32);
  const int64_t k = tensor_of(&tensors[0].first_chunk, sizeof(GradNormTensor) / sizeof(int64_t), count, blockIdx.x);
  const GradNormTensor t = tensors[k];
  const auto type = static_cast<DType>(t.type);
  const bool aligned = reinterpret_cast<uintptr_t>(t.data) % 16 == 0;
  const int64_t begin = (blockIdx.x - t.first_chunk) * kChunk;
  const int64_t end = begin + kChunk < t.numel ? begin + kChunk : t.numel;
  float lanes[kVector] = {};
  for (int64_t i = begin + threadIdx.x * kVector; i < end; i += kChunkThreads * kVector) {
    const int n = end - i < kVector ? static_cast<int>(end - i) : kVector;
    float g[kVector];
    load_vector_as_float(t.data, i, type, aligned && n == kVector, n, g);
#pragma unroll
    for (int j = 0; j < kVector; j++) lanes[j] += g[j] * g[j];
  }
  float sum = 0.0f;
#pragma unroll
  for (int j = 0; j < kVector; j++) sum += lanes[j];
  const float total = group_sum(make_float2(sum, 0.0f), scratch, threadIdx.x / 32, kChunkThreads / 32).x;
  if (threadIdx.x == 0) sums[blockIdx.x] = total;
}

__global__ void __launch_bounds__(kFinalThreads)
    finish(const double* sums, const int64_t chunks, const float max_norm, float* norm, float* scale) {
  FASTLM_SHARED(double, parts, kFinalThreads);
  double sum = 0.0;
  for (int64_t i = threadIdx.x; i < chunks; i += kFinalThreads) sum += sums[i];
  parts[threadIdx.x] = sum;
  for (int width = kFinalThreads / 2; width > 0; width /= 2) {
    __syncthreads();
    if (threadIdx.x < width) parts[threadIdx.x] += parts[threadIdx.x + width];
  }
  if (threadIdx.x != 0) return;
  const float result = static_cast<float>(sqrt(parts[0]));
  const bool finite = fabsf(result) < __int_as_float(0x7f800000);
  *norm = result;
  *scale = finite ? fminf(1.0f, max_norm / (result + 1e-6f)) : __int_as_float(0x7fc00000);
}

}  // namespace
}  // namespace cuda

void grad_norm_cuda(const GradNormTensor* tensors, int64_t count, int64_t chunks, double* sums, float max_norm, float* norm,
                    float* scale, void* stream) {
  if (chunks > 2147483647) {
    throw std::invalid_argument("grad_norm: " + std::to_string(chunks) + " chunks; a CUDA grid holds at most 2147483647");
  }
  using namespace cuda;
  const auto s = static_cast<cudaStream_t>(stream);
  if (chunks > 0) {
    launch("grad_norm_chunks", {dim3(static_cast<unsigned>(chunks)), dim3(kChunkThreads), 0, s}, sum_chunks, tensors, count, sums);
  }
  launch("grad_norm", {dim3(1), dim3(kFinalThreads), 0, s}, finish, sums, chunks, max_norm, norm, scale);
}

}  // namespace fastlm
