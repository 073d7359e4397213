// cross_entropy.h on the GPU: a block of threads for each row of logits, in two passes over it. The first keeps a running
// maximum and sum of exponentials in every thread; the second finds the row in the L2 cache, and writes the gradient.
#include <cfloat>

#include "common/cuda/launch.h"
#include "common/cuda/reduce.h"
#include "common/cuda/vector.h"
#include "common/error.h"
#include "cross_entropy/cross_entropy.h"

namespace fastlm {
namespace cuda {
namespace {

constexpr int kMaxWarps = 16;

// sum = sum of exp(z - highest)
struct Exponentials {
  float highest, sum;
};

FASTLM_DEVICE Exponentials merge(Exponentials a, Exponentials b) {
  const float highest = fmaxf(a.highest, b.highest);
  return {highest, a.sum * expf(a.highest - highest) + b.sum * expf(b.highest - highest)};
}

// Over the block, in a fixed order; every thread gets the result.
FASTLM_DEVICE Exponentials merge_block(Exponentials v, float2* scratch) {
#pragma unroll
  for (int offset = 16; offset > 0; offset /= 2) {
    const float highest = __shfl_xor_sync(kFullWarp, v.highest, offset), sum = __shfl_xor_sync(kFullWarp, v.sum, offset);
    v = merge(v, {highest, sum});
  }
  const int warps = blockDim.x / 32;
  if (warps == 1) return v;
  if (threadIdx.x % 32 == 0) scratch[threadIdx.x / 32] = make_float2(v.highest, v.sum);
  __syncthreads();
  v = {scratch[0].x, scratch[0].y};
  for (int i = 1; i < warps; i++) v = merge(v, {scratch[i].x, scratch[i].y});
  return v;
}

FASTLM_DEVICE float capped(float z, float softcap) { return softcap == 0.0f ? z : softcap * tanhf(z / softcap); }

// body(column, count, z): eight logits of the row, soft-capped, of which `count` exist.
template <class T, class Body>
FASTLM_DEVICE void over_row(const CrossEntropyBlock& p, const T* row, Body body) {
  for (int64_t c = kVector * threadIdx.x; c < p.cols; c += kVector * blockDim.x) {
    const Vector<T> raw = load_vector(row + c);  // a row has room for whole vectors
    const int count = static_cast<int>(min(int64_t{kVector}, p.cols - c));
    float z[kVector];
#pragma unroll
    for (int j = 0; j < kVector; j++) z[j] = j < count ? capped(to_float(raw.v[j]), p.softcap) : -INFINITY;
    body(c, count, z);
  }
}

template <class T>
__global__ void __launch_bounds__(32 * kMaxWarps) cross_entropy_block(const CrossEntropyBlock p, const CrossEntropyRows rows) {
  FASTLM_SHARED(float2, scratch, 2 * kMaxWarps);
  const int64_t row = blockIdx.x, target = p.targets[row];
  T* logits = static_cast<T*>(p.logits) + row * rows.stride;
  if (target == rows.ignore_index) {
    if (threadIdx.x == 0 && p.loss != nullptr) p.loss[row] = p.lse[row] = 0.0f;
    const float nothing[kVector] = {};
    for (int64_t c = kVector * threadIdx.x; p.gradient && c < p.cols; c += kVector * blockDim.x) {
      store_vector(logits + c, vector_from_float<T>(nothing));
    }
    return;
  }
  const bool known = target >= 0 && target < p.cols;

  float shift, inverse = 1.0f, lse;  // softmax(z) = exp(z - shift) * inverse
  if (p.loss == nullptr) {
    shift = lse = p.lse[row];
  } else {
    const float at_target = known ? capped(to_float(logits[target]), p.softcap) : NAN;
    Exponentials mine = {-FLT_MAX, 0.0f};
    float2 total = make_float2(0.0f, 0.0f);
    over_row<T>(p, logits, [&](int64_t, int count, const float (&z)[kVector]) {
      float highest = mine.highest;
#pragma unroll
      for (int j = 0; j < kVector; j++) highest = fmaxf(highest, z[j]);
      float sum = mine.sum * expf(mine.highest - highest);
#pragma unroll
      for (int j = 0; j < kVector; j++) {
        sum += expf(z[j] - highest);
        total.x += j < count ? z[j] : 0.0f;
      }
      mine = {highest, sum};
    });
    const Exponentials all = merge_block(mine, scratch);
    shift = all.highest;
    inverse = 1.0f / all.sum;
    const float log_sum = logf(all.sum);
    lse = shift + log_sum;
    float mean = shift;
    if (p.label_smoothing != 0.0f) {
      mean = group_sum(total, scratch + kMaxWarps, threadIdx.x / 32, blockDim.x / 32).x / static_cast<float>(p.cols);
    }
    if (threadIdx.x == 0) {
      // (shift - z) + log_sum rather than lse - z: a small loss keeps its digits beside a large logit.
      p.loss[row] = (1.0f - p.label_smoothing) * ((shift - at_target) + log_sum) +
                    p.label_smoothing * ((shift - mean) + log_sum) + p.z_loss * lse * lse;
      p.lse[row] = lse;
    }
  }
  if (!p.gradient) return;
  __syncthreads();  // the target's logit has been read

  const float scale = known ? (p.dloss != nullptr ? p.scale * p.dloss[row] : p.scale) : NAN;
  const float weight = scale * inverse * (1.0f + 2.0f * p.z_loss * lse);
  const float spread = scale * p.label_smoothing / static_cast<float>(p.cols);
  const float less = scale * (1.0f - p.label_smoothing);
  over_row<T>(p, logits, [&](int64_t c, int, float (&z)[kVector]) {
#pragma unroll
    for (int j = 0; j < kVector; j++) {
      const float t = p.softcap == 0.0f ? 0.0f : z[j] / p.softcap;
      const float d = expf(z[j] - shift) * weight - spread - (c + j == target ? less : 0.0f);
      z[j] = d * (1.0f - t * t);
    }
    store_vector(logits + c, vector_from_float<T>(z));
  });
}

template <class T>
void launch_rows(const CrossEntropyBlock& p, const CrossEntropyRows& rows, cudaStream_t stream) {
  const int64_t warps = (p.cols + 32 * kVector - 1) / (32 * kVector);
  const int threads = 32 * static_cast<int>(warps < kMaxWarps ? warps : kMaxWarps);
  launch("cross_entropy_block", {dim3(static_cast<unsigned>(p.rows)), dim3(threads), 0, stream}, cross_entropy_block<T>, p, rows);
}

}  // namespace
}  // namespace cuda

void cross_entropy_block_cuda(const CrossEntropyBlock& p, const CrossEntropyRows& rows, void* stream) {
  check(p.rows >= 0 && p.rows <= 2147483647 && p.cols >= 1, "cross_entropy: wanted 0 to 2147483647 rows, and cols >= 1");
  check(p.loss != nullptr || p.gradient || p.rows == 0, "cross_entropy: wanted the loss or the gradient, got neither");
  check(rows.stride >= p.cols && rows.stride % cuda::kVector == 0 && reinterpret_cast<uintptr_t>(p.logits) % 16 == 0,
        "cross_entropy: wanted rows of logits that are 16-byte aligned, and a multiple of 8 apart");
  if (p.rows == 0) return;
  const auto cuda_stream = static_cast<cudaStream_t>(stream);
  if (p.type == DType::bf16) return cuda::launch_rows<__nv_bfloat16>(p, rows, cuda_stream);
  if (p.type == DType::f16) return cuda::launch_rows<__half>(p, rows, cuda_stream);
  cuda::launch_rows<float>(p, rows, cuda_stream);
}

}  // namespace fastlm
