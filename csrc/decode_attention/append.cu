// append.h: a block a sequence and store.
#include "decode_attention/append.h"

#include <stdexcept>
#include <string>

#include "common/cuda/launch.h"
#include "common/cuda/vector.h"

namespace fastlm {
namespace cuda {
namespace {

constexpr int kThreads = 128;

template <class T>
__global__ void __launch_bounds__(kThreads) append(const CacheAppend p, const bool vectors) {
  const bool values = blockIdx.y == 1;
  const int64_t b = blockIdx.x, row = p.at[b];
  if (row < 0 || row >= p.capacity) return;
  const int64_t sequence = values ? p.v_cache_strides[0] : p.k_cache_strides[0];
  const int64_t step = values ? p.v_cache_strides[1] : p.k_cache_strides[1];
  const T* __restrict__ from = static_cast<const T*>(values ? p.v : p.k) + b * (values ? p.v_stride : p.k_stride);
  T* __restrict__ to = static_cast<T*>(values ? p.v_cache : p.k_cache) + b * sequence + row * step;
  if (vectors) {
#pragma unroll 1
    for (int64_t i = threadIdx.x * kVector; i < p.cols; i += kThreads * kVector) store_vector(to + i, load_vector(from + i));
  } else {
#pragma unroll 1
    for (int64_t i = threadIdx.x; i < p.cols; i += kThreads) to[i] = from[i];
  }
}

template <class T>
void run(const CacheAppend& p, cudaStream_t stream) {
  constexpr int64_t kSize = sizeof(T);
  bool vectors = p.cols % kVector == 0 && vector_aligned(p.k, p.k_stride, kSize) && vector_aligned(p.v, p.v_stride, kSize);
  for (int i = 0; i < 2; i++) {
    vectors = vectors && vector_aligned(p.k_cache, p.k_cache_strides[i], kSize) && vector_aligned(p.v_cache, p.v_cache_strides[i], kSize);
  }
  launch("cache_append", {dim3(static_cast<unsigned>(p.batch), 2), dim3(kThreads), 0, stream}, append<T>, p, vectors);
}

}  // namespace
}  // namespace cuda

void cache_append_cuda(const CacheAppend& p, void* stream) {
  if (p.batch == 0 || p.cols == 0) return;
  if (p.batch > 2147483647) throw std::invalid_argument("cache_append: " + std::to_string(p.batch) + " sequences are too many");
  const auto s = static_cast<cudaStream_t>(stream);
  switch (p.type) {
    case DType::f32: return cuda::run<float>(p, s);
    case DType::f16: return cuda::run<__half>(p, s);
    case DType::bf16: return cuda::run<__nv_bfloat16>(p, s);
  }
}

}  // namespace fastlm
