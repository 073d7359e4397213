// decode_linear.h: every block makes the rows' norm anew in its shared memory, and each warp one output of all rows.
#include "gpt/decode_linear.h"

#include <stdexcept>
#include <string>

#include "common/cuda/launch.h"
#include "common/cuda/ptx_grid.h"
#include "common/cuda/reduce.h"
#include "common/cuda/vector.h"
#include "mlp/activation_cuda.h"

namespace fastlm {
namespace cuda {
namespace {

constexpr int kWarps = 4, kThreads = 32 * kWarps;
constexpr int kLoads = 8;                        // of weights, 16 bytes or (float32) 32, that a lane has on their way
constexpr int kStep = 32 * kVector;              // columns that a warp reads at once
constexpr int64_t kMaxSharedBytes = 96 * 1024;   // two blocks a multiprocessor

FASTLM_DEVICE void wait_for_kernel_in_front(bool programmatic) {
#if !defined(__CUDA_ARCH__) || __CUDA_ARCH__ >= 900
  if (programmatic) {
    ptx::grid_launch_dependents();
    ptx::grid_dependency_wait();
  }
#endif
}

// The rows that are multiplied, into shared memory. `groups` of the block's warps take a row each, turn by turn.
template <class T>
FASTLM_DEVICE void stage_rows(const DecodeLinearCuda& p, T* staged, float2* scratch, int groups) {
  const int warps = kWarps / groups, warp = threadIdx.x / 32 % warps, group = threadIdx.x / 32 / warps;
  const int cols = static_cast<int>(p.cols), first = kVector * (32 * warp + threadIdx.x % 32), step = kStep * warps;
  for (int row0 = 0; row0 < p.rows; row0 += groups) {
    const int row = row0 + group;
    const bool there = row < p.rows;  // the others take part in the barriers
    const int end = there ? cols : 0;
    const int64_t at = int64_t{row} * cols;
    T* mine = staged + at;
    float2 sum = make_float2(0.0f, 0.0f);
    for (int c = first; c < end; c += step) {
      Vector<T> x = load_vector(static_cast<const T*>(p.x) + at + c);
      if (p.residual != nullptr) {
        const Vector<T> r = load_vector(static_cast<const T*>(p.residual) + at + c);
#pragma unroll
        for (int j = 0; j < kVector; j++) x.v[j] = from_float<T>(to_float(x.v[j]) + to_float(r.v[j]));
        if (blockIdx.x == 0) store_vector(static_cast<T*>(p.h) + at + c, x);
      }
#pragma unroll
      for (int j = 0; j < kVector; j++) sum.x += to_float(x.v[j]);
      store_vector(mine + c, x);
    }
    if (p.norm_weight == nullptr) continue;
    // In two passes, as the norm's own kernel: the variance is the mean of squared differences.
    const float mean = p.rms ? 0.0f : group_sum(sum, scratch + group * warps, warp, warps).x / static_cast<float>(cols);
    float2 squares = make_float2(0.0f, 0.0f);
    for (int c = first; c < end; c += step) {
      const Vector<T> h = load_vector(mine + c);
#pragma unroll
      for (int j = 0; j < kVector; j++) squares.x += (to_float(h.v[j]) - mean) * (to_float(h.v[j]) - mean);
    }
    const float variance = group_sum(squares, scratch + kWarps + group * warps, warp, warps).x / static_cast<float>(cols);
    const float rstd = 1.0f / sqrtf(variance + p.eps);
    for (int c = first; c < end; c += step) {
      const Vector<T> h = load_vector(mine + c), weight = load_vector(static_cast<const T*>(p.norm_weight) + c);
      float v[kVector];
#pragma unroll
      for (int j = 0; j < kVector; j++) v[j] = (to_float(h.v[j]) - mean) * rstd * to_float(weight.v[j]);
      if (p.norm_bias != nullptr) {
        const Vector<T> bias = load_vector(static_cast<const T*>(p.norm_bias) + c);
#pragma unroll
        for (int j = 0; j < kVector; j++) v[j] += to_float(bias.v[j]);
      }
      store_vector(mine + c, vector_from_float<T>(v));
    }
    __syncthreads();  // the next rows' sums go where these were
  }
  __syncthreads();
}

// kParts: of a gated activation an output's two rows of weights; else outputs one above the other, that share what is read of x.
template <class T, int kRows, int kParts>
__global__ void __launch_bounds__(kThreads) decode_linear_kernel(const DecodeLinearCuda p, const bool gated, const int groups) {
  FASTLM_SHARED_DYNAMIC(shared, 16);
  FASTLM_SHARED(float2, scratch, 2 * kWarps);
  constexpr int kAhead = kLoads / kParts;
  const T* staged = reinterpret_cast<const T*>(shared);
  const int lane = threadIdx.x % 32, warp = threadIdx.x / 32, cols = static_cast<int>(p.cols);
  const int64_t unit = int64_t{blockIdx.x} * kWarps + warp, output = gated ? unit : unit * kParts;
  const T* weights[kParts];
#pragma unroll
  for (int part = 0; part < kParts; part++) {
    const int64_t row = output + part * (gated ? p.outputs : 1), rows = (gated ? 2 : 1) * p.outputs;
    weights[part] = static_cast<const T*>(p.weight) + (row < rows ? row : rows - 1) * cols;
  }
  Vector<T> w[kAhead][kParts];
  auto load = [&](int c0) {
#pragma unroll
    for (int a = 0; a < kAhead; a++) {
      const int c = c0 + a * kStep + lane * kVector;
#pragma unroll
      for (int part = 0; part < kParts; part++) {
        if (c < cols) w[a][part] = load_vector(weights[part] + c);
      }
    }
  };
  load(0);  // weights are nobody's result: before the wait
  wait_for_kernel_in_front(p.programmatic);
  stage_rows<T>(p, reinterpret_cast<T*>(shared), scratch, groups);

  float sums[kParts][kRows] = {};
  for (int c0 = 0; c0 < cols; c0 += kAhead * kStep) {
    if (c0 > 0) load(c0);
#pragma unroll
    for (int a = 0; a < kAhead; a++) {
      const int c = c0 + a * kStep + lane * kVector;
      if (c >= cols) continue;
#pragma unroll
      for (int r = 0; r < kRows; r++) {
        const int row = r < p.rows ? r : 0;
        float x[kVector];
        to_floats(load_vector(staged + row * cols + c), x);
#pragma unroll
        for (int part = 0; part < kParts; part++) {
#pragma unroll
          for (int j = 0; j < kVector; j++) sums[part][r] = fmaf(to_float(w[a][part].v[j]), x[j], sums[part][r]);
        }
      }
    }
  }
  float mine[kParts] = {};  // of row number `lane`
#pragma unroll
  for (int part = 0; part < kParts; part++) {
#pragma unroll
    for (int r = 0; r < kRows; r++) {
      const float sum = warp_sum(sums[part][r]);
      if (lane == r) mine[part] = sum;
    }
  }
  if (lane >= p.rows) return;
  const T* bias = static_cast<const T*>(p.bias);
  T* y = static_cast<T*>(p.y) + int64_t{lane} * p.outputs;
  auto finished = [&](int part, int64_t row) {
    return to_float(from_float<T>(mine[part] + (bias != nullptr ? to_float(bias[row]) : 0.0f)));
  };
  auto activated = [&](float v) {
    if (p.activate) with_activation(p.activation, [&](auto act) { v = decltype(act)::value(v); });
    return v;
  };
  if (gated) {
    if (output < p.outputs) y[output] = from_float<T>(activated(finished(0, output)) * finished(kParts - 1, output + p.outputs));
    return;
  }
#pragma unroll
  for (int part = 0; part < kParts; part++) {
    if (output + part < p.outputs) y[output + part] = from_float<T>(activated(finished(part, output + part)));
  }
}

template <class T, int kRows, int kParts>
void run(const DecodeLinearCuda& p, bool gated, cudaStream_t stream) {
  const int64_t units = gated ? p.outputs : (p.outputs + kParts - 1) / kParts, blocks = (units + kWarps - 1) / kWarps;
  const int groups = p.rows >= 4 ? 4 : p.rows >= 2 ? 2 : 1;
  Launch l{dim3(static_cast<unsigned>(blocks)), dim3(kThreads), static_cast<size_t>(p.rows * p.cols) * sizeof(T), stream};
  l.programmatic = p.programmatic;
  launch("decode_linear", l, decode_linear_kernel<T, kRows, kParts>, p, gated, groups);
}

template <class T, int kRows>
void run(const DecodeLinearCuda& p, cudaStream_t stream) {
  // Two outputs a warp where there are warps enough all the same: half as many reads of x.
  constexpr int64_t kMany = 16384;
  const bool gated = p.activate && is_gated(p.activation);
  gated || p.outputs >= kMany ? run<T, kRows, 2>(p, gated, stream) : run<T, kRows, 1>(p, false, stream);
}

template <class T>
void run(const DecodeLinearCuda& p, cudaStream_t stream) {
  if (p.rows == 1) return run<T, 1>(p, stream);
  if (p.rows == 2) return run<T, 2>(p, stream);
  if (p.rows <= 4) return run<T, 4>(p, stream);
  run<T, 8>(p, stream);
}

}  // namespace
}  // namespace cuda

bool decode_linear_takes(int64_t rows, int64_t cols, DType type) {
  return rows >= 1 && rows <= kDecodeRows && cols >= 1 && cols % cuda::kVector == 0 &&
         rows * cols * static_cast<int64_t>(size_of(type)) <= cuda::kMaxSharedBytes;
}

void decode_linear_cuda(const DecodeLinearCuda& p, void* stream) {
  if (!decode_linear_takes(p.rows, p.cols, p.type) || p.outputs < 1 || p.outputs > (int64_t{1} << 31)) {
    throw std::invalid_argument("decode_linear: " + std::to_string(p.rows) + " rows of " + std::to_string(p.cols) + " columns to " +
                                std::to_string(p.outputs) + " outputs are not what it is for");
  }
  const auto s = static_cast<cudaStream_t>(stream);
  switch (p.type) {
    case DType::f32: return cuda::run<float>(p, s);
    case DType::f16: return cuda::run<__half>(p, s);
    case DType::bf16: return cuda::run<__nv_bfloat16>(p, s);
  }
}

}  // namespace fastlm
