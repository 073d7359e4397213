// cross_entropy.h on the GPU: a block of threads for each row of logits. Where loss and gradient are wanted and two blocks'
// rows fit into a multiprocessor's shared memory, a row is read once, and one block's row arrives while the other block
// computes. Otherwise there are two passes over it: the first keeps a running maximum and sum of exponentials in every
// thread; the second finds the row in the L2 cache, and writes the gradient.
#include <cfloat>

#include "common/cuda/launch.h"
#include "common/cuda/ptx_cp_async.h"
#include "common/cuda/ptx_math.h"
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

// Of a row that is left out: nothing but zeros.
template <class T>
FASTLM_DEVICE void ignore_row(const CrossEntropyBlock& p, int64_t row, T* logits) {
  if (threadIdx.x == 0 && p.loss != nullptr) p.loss[row] = p.lse[row] = 0.0f;
  const float nothing[kVector] = {};
  for (int64_t c = kVector * threadIdx.x; p.gradient && c < p.cols; c += kVector * blockDim.x) {
    store_vector(logits + c, vector_from_float<T>(nothing));
  }
}

// (shift - z) + log_sum rather than lse - z: a small loss keeps its digits beside a large logit.
FASTLM_DEVICE float loss_of(const CrossEntropyBlock& p, float shift, float log_sum, float at_target, float mean) {
  const float lse = shift + log_sum;
  return (1.0f - p.label_smoothing) * ((shift - at_target) + log_sum) + p.label_smoothing * ((shift - mean) + log_sum) +
         p.z_loss * lse * lse;
}

// A row's gradient is weight * exp(z - shift) - spread, and `less` less at the target.
struct GradientTerms {
  float weight, spread, less;
};

FASTLM_DEVICE GradientTerms gradient_terms(const CrossEntropyBlock& p, int64_t row, bool known, float inverse, float lse) {
  const float scale = known ? (p.dloss != nullptr ? p.scale * p.dloss[row] : p.scale) : NAN;
  return {scale * inverse * (1.0f + 2.0f * p.z_loss * lse), scale * p.label_smoothing / static_cast<float>(p.cols),
          scale * (1.0f - p.label_smoothing)};
}

template <class T>
__global__ void __launch_bounds__(32 * kMaxWarps) cross_entropy_block(const CrossEntropyBlock p, const CrossEntropyRows rows) {
  FASTLM_SHARED(float2, scratch, 2 * kMaxWarps);
  const int64_t row = blockIdx.x, target = p.targets[row];
  T* logits = static_cast<T*>(p.logits) + row * rows.stride;
  if (target == rows.ignore_index) return ignore_row(p, row, logits);
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
      p.loss[row] = loss_of(p, shift, log_sum, at_target, mean);
      p.lse[row] = lse;
    }
  }
  if (!p.gradient) return;
  __syncthreads();  // the target's logit has been read

  const GradientTerms g = gradient_terms(p, row, known, inverse, lse);
  over_row<T>(p, logits, [&](int64_t c, int, float (&z)[kVector]) {
#pragma unroll
    for (int j = 0; j < kVector; j++) {
      const float t = p.softcap == 0.0f ? 0.0f : z[j] / p.softcap;
      const float d = expf(z[j] - shift) * g.weight - g.spread - (c + j == target ? g.less : 0.0f);
      z[j] = d * (1.0f - t * t);
    }
    store_vector(logits + c, vector_from_float<T>(z));
  });
}

// exp(x) for x <= 0, as good as T deserves.
template <class T>
FASTLM_DEVICE float exponential(float x) { return sizeof(T) == 2 ? ptx::exp2_approx(1.44269504f * x) : expf(x); }

constexpr int kParts = 4;  // of a row, which arrive one after the other

// Loss and gradient of a row that is kept in shared memory. A thread works on what it has copied there itself: the sums
// alone make the block wait. kCapped: there is a soft cap.
template <class T, bool kCapped>
__global__ void __launch_bounds__(32 * kMaxWarps, 2) cross_entropy_row(const CrossEntropyBlock p, const CrossEntropyRows rows) {
  FASTLM_SHARED_DYNAMIC(shared, 16);
  FASTLM_SHARED(float, maxima, kMaxWarps);
  FASTLM_SHARED(float2, scratch, kMaxWarps);
  const int64_t row = blockIdx.x, target = p.targets[row];
  T* logits = static_cast<T*>(p.logits) + row * rows.stride;
  if (target == rows.ignore_index) return ignore_row(p, row, logits);
  T* kept = reinterpret_cast<T*>(shared);
  const int thread = threadIdx.x, threads = blockDim.x, warps = threads / 32;
  const int cols = static_cast<int>(p.cols), vectors = (cols + kVector - 1) / kVector;
  const int part = (vectors + kParts * threads - 1) / (kParts * threads) * threads;  // vectors
  const uint32_t to = ptx::shared_address(shared);
  constexpr int kPieces = sizeof(Vector<T>) / 16;
#pragma unroll
  for (int i = 0; i < kParts; i++) {
#pragma unroll 4
    for (int v = i * part + thread; v < min(vectors, (i + 1) * part); v += threads) {
#pragma unroll
      for (int j = 0; j < kPieces; j++) {
        ptx::cp_async_16(to + (v * kPieces + j) * 16, reinterpret_cast<const uint4*>(logits) + v * kPieces + j);
      }
    }
    ptx::cp_async_commit();
  }
  const bool known = target >= 0 && target < p.cols;
  const float at_target = thread == 0 && known ? capped(to_float(logits[target]), p.softcap) : NAN;

  float shift = -FLT_MAX;
  auto raise = [&](int i) {
#pragma unroll 2
    for (int v = i * part + thread; v < min(vectors, (i + 1) * part); v += threads) {
      T* at = kept + v * kVector;
#pragma unroll 1
      for (int j = cols - v * kVector; j < kVector; j++) at[j] = from_float<T>(-INFINITY);  // what does not exist
      float z[kVector];
      to_floats(load_vector(at), z);
#pragma unroll
      for (int j = 0; j < kVector; j++) shift = fmaxf(shift, z[j]);
    }
  };
  ptx::cp_async_wait<3>();
  raise(0);
  ptx::cp_async_wait<2>();
  raise(1);
  ptx::cp_async_wait<1>();
  raise(2);
  ptx::cp_async_wait<0>();
  raise(3);
  shift = warp_max(shift);
  if (thread % 32 == 0) maxima[thread / 32] = shift;
  __syncthreads();
  for (int i = 0; i < warps; i++) shift = fmaxf(shift, maxima[i]);
  if (kCapped) shift = capped(shift, p.softcap);

  auto read = [&](int v, float (&z)[kVector]) {
    to_floats(load_vector(kept + v * kVector), z);
#pragma unroll
    for (int j = 0; kCapped && j < kVector; j++) z[j] = v * kVector + j < cols ? capped(z[j], p.softcap) : -INFINITY;
  };
  float2 sums = make_float2(0.0f, 0.0f);  // of exp(z - shift), and of z
#pragma unroll 2
  for (int v = thread; v < vectors; v += threads) {
    float z[kVector];
    read(v, z);
    float sum = 0.0f;
#pragma unroll
    for (int j = 0; j < kVector; j++) sum += exponential<T>(z[j] - shift);
    sums.x += sum;
    if (p.label_smoothing == 0.0f) continue;
#pragma unroll
    for (int j = 0; j < kVector; j++) sums.y += v * kVector + j < cols ? z[j] : 0.0f;
  }
  sums = group_sum(sums, scratch, thread / 32, warps);
  const float log_sum = logf(sums.x), lse = shift + log_sum;
  if (thread == 0) {
    p.loss[row] = loss_of(p, shift, log_sum, at_target, p.label_smoothing != 0.0f ? sums.y / static_cast<float>(cols) : shift);
    p.lse[row] = lse;
  }

  if (warps == 1) __syncthreads();  // the target's logit has been read
  const GradientTerms g = gradient_terms(p, row, known, 1.0f / sums.x, lse);
  const int at = known ? static_cast<int>(target) : -1;
#pragma unroll 2
  for (int v = thread; v < vectors; v += threads) {
    float z[kVector], d[kVector];
    read(v, z);
#pragma unroll
    for (int j = 0; j < kVector; j++) d[j] = exponential<T>(z[j] - shift) * g.weight - g.spread;
    if (at >= 0 && at / kVector == v) {
#pragma unroll
      for (int j = 0; j < kVector; j++) d[j] -= at % kVector == j ? g.less : 0.0f;
    }
#pragma unroll
    for (int j = 0; kCapped && j < kVector; j++) {
      const float t = z[j] / p.softcap;
      d[j] *= 1.0f - t * t;
    }
    store_vector(logits + v * kVector, vector_from_float<T>(d));
  }
}

template <class T>
void launch_rows(const CrossEntropyBlock& p, const CrossEntropyRows& rows, cudaStream_t stream) {
  const int64_t vectors = (p.cols + kVector - 1) / kVector, warps = (vectors + 31) / 32;
  const dim3 grid(static_cast<unsigned>(p.rows)), block(32 * static_cast<unsigned>(warps < kMaxWarps ? warps : kMaxWarps));
  const size_t bytes = static_cast<size_t>(vectors) * sizeof(Vector<T>);
  constexpr size_t kBeside = 2048;  // of a block's shared memory: the arrays of fixed size, and CUDA's own KiB
  if (p.loss != nullptr && p.gradient && 2 * (bytes + kBeside) <= max_shared_memory()) {
    Launch l{grid, block, bytes, stream};
    l.most_shared = true;
    return launch("cross_entropy_row", l, p.softcap != 0.0f ? cross_entropy_row<T, true> : cross_entropy_row<T, false>, p, rows);
  }
  launch("cross_entropy_block", {grid, block, 0, stream}, cross_entropy_block<T>, p, rows);
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
