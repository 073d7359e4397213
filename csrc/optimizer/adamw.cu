// adamw.h on CUDA: one launch for all tensors of a group. The arithmetic is that of adamw.cpp, operation by operation.
#include <stdexcept>
#include <string>

#include "common/cuda/launch.h"
#include "common/cuda/vector.h"
#include "optimizer/adamw_constants.h"
#include "optimizer/chunks.h"

namespace fastlm {
namespace cuda {
namespace {

// Three blocks to a multiprocessor: 80 registers a thread, which its eight elements of four tensors need.
__global__ void __launch_bounds__(kChunkThreads, 3)
    step_chunks(const AdamWRow* rows, const int64_t count, const AdamWConstants c, const float* grad_scale) {
  const int64_t k = tensor_of(&rows[0].first_chunk, sizeof(AdamWRow) / sizeof(int64_t), count, blockIdx.x);
  const AdamWRow t = rows[k];
  const auto p_type = static_cast<DType>(t.p_type), g_type = static_cast<DType>(t.g_type);
  const float scale = grad_scale == nullptr ? c.grad_scale : __fmul_rn(c.grad_scale, *grad_scale);
  const bool vectors = t.vectors != 0;
  const int64_t begin = (blockIdx.x - t.first_chunk) * kChunk;
  const int64_t end = begin + kChunk < t.numel ? begin + kChunk : t.numel;
#pragma unroll 1
  for (int64_t i = begin + threadIdx.x * kVector; i < end; i += kChunkThreads * kVector) {
    const int n = end - i < kVector ? static_cast<int>(end - i) : kVector;
    const bool whole = vectors && n == kVector;
    float g[kVector], m[kVector], v[kVector], p[kVector];
    load_vector_as_float(t.grad, i, g_type, whole, n, g);
    load_vector_as_float(t.exp_avg, i, DType::f32, whole, n, m);
    load_vector_as_float(t.exp_avg_sq, i, DType::f32, whole, n, v);
    load_vector_as_float(t.param, i, p_type, whole, n, p);
#pragma unroll
    for (int j = 0; j < kVector; j++) {
      g[j] = __fmul_rn(g[j], scale);
      m[j] = __fmaf_rn(c.beta1, m[j], __fmul_rn(c.one_minus_beta1, g[j]));
      v[j] = __fmaf_rn(c.beta2, v[j], __fmul_rn(__fmul_rn(c.one_minus_beta2, g[j]), g[j]));
    }
    store_vector_from_float(t.exp_avg, i, DType::f32, whole, n, m);
    store_vector_from_float(t.exp_avg_sq, i, DType::f32, whole, n, v);
    if (t.max_exp_avg_sq != nullptr) {
      float largest[kVector];
      load_vector_as_float(t.max_exp_avg_sq, i, DType::f32, whole, n, largest);
#pragma unroll
      for (int j = 0; j < kVector; j++) v[j] = largest[j] > v[j] ? largest[j] : v[j];
      store_vector_from_float(t.max_exp_avg_sq, i, DType::f32, whole, n, v);
    }
#pragma unroll
    for (int j = 0; j < kVector; j++) {
      const float ratio = m[j] / __fmaf_rn(sqrtf(v[j]), c.v_scale, c.eps);
      p[j] = __fadd_rn(__fmul_rn(p[j], c.decay), -__fmul_rn(c.step_size, ratio));
    }
    store_vector_from_float(t.param, i, p_type, whole, n, p);
    if (t.shadow != nullptr) store_vector_from_float(t.shadow, i, DType::bf16, whole, n, p);
  }
}

}  // namespace
}  // namespace cuda

void adamw_step_cuda(const AdamWRow* rows, int64_t count, int64_t chunks, const AdamWStep& s, const float* grad_scale,
                     void* stream) {
  if (chunks == 0) return;
  if (chunks > 2147483647) {
    throw std::invalid_argument("adamw: " + std::to_string(chunks) + " chunks; a CUDA grid holds at most 2147483647");
  }
  const cuda::Launch config{dim3(static_cast<unsigned>(chunks)), dim3(cuda::kChunkThreads), 0, static_cast<cudaStream_t>(stream)};
  cuda::launch("adamw", config, cuda::step_chunks, rows, count, constants_of(s), grad_scale);
}

}  // namespace fastlm
