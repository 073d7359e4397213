// row_linear.h: every block makes the row's norm anew in its shared memory, and each warp one or two outputs.
#include "gpt/row_linear.h"

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
constexpr int kLoads = 12;                      // vectors of weights that a lane has on their way
constexpr int kStep = 32 * kVector;             // columns that a warp reads at once
constexpr int64_t kMaxSharedBytes = 96 * 1024;  // two blocks a multiprocessor

// The row that is multiplied, into shared memory. Before `wait` returns, nothing is read that a kernel may have written.
template <class T, class Wait>
FASTLM_DEVICE void stage_row(const RowLinear& p, T* staged, float2* scratch, Wait wait) {
  const int warp = threadIdx.x / 32, cols = static_cast<int>(p.cols);
  const int first = kVector * static_cast<int>(threadIdx.x), step = kStep * kWarps;
  const T *norm_weight = static_cast<const T*>(p.norm_weight), *norm_bias = static_cast<const T*>(p.norm_bias);
  Vector<T> first_weight, first_bias;
  if (norm_weight != nullptr && first < cols) first_weight = load_vector(norm_weight + first);
  if (norm_bias != nullptr && first < cols) first_bias = load_vector(norm_bias + first);
  wait();

  float2 sum = make_float2(0.0f, 0.0f);
  for (int c = first; c < cols; c += step) {
    Vector<T> x = load_vector(static_cast<const T*>(p.x) + c);
    if (p.residual != nullptr) {
      const Vector<T> r = load_vector(static_cast<const T*>(p.residual) + c);
#pragma unroll
      for (int j = 0; j < kVector; j++) x.v[j] = from_float<T>(to_float(x.v[j]) + to_float(r.v[j]));
      if (blockIdx.x == 0) store_vector(static_cast<T*>(p.h) + c, x);
    }
#pragma unroll
    for (int j = 0; j < kVector; j++) sum.x += to_float(x.v[j]);
    store_vector(staged + c, x);
  }
  if (norm_weight != nullptr) {
    // In two passes, as the norm's own kernel: the variance is the mean of squared differences.
    const float mean = p.rms ? 0.0f : group_sum(sum, scratch, warp, kWarps).x / static_cast<float>(cols);
    float2 squares = make_float2(0.0f, 0.0f);
    for (int c = first; c < cols; c += step) {
      const Vector<T> h = load_vector(staged + c);
#pragma unroll
      for (int j = 0; j < kVector; j++) squares.x += (to_float(h.v[j]) - mean) * (to_float(h.v[j]) - mean);
    }
    const float variance = group_sum(squares, scratch + kWarps, warp, kWarps).x / static_cast<float>(cols);
    const float rstd = 1.0f / sqrtf(variance + p.eps);
    for (int c = first; c < cols; c += step) {
      const Vector<T> h = load_vector(staged + c), weight = c == first ? first_weight : load_vector(norm_weight + c);
      float v[kVector];
#pragma unroll
      for (int j = 0; j < kVector; j++) v[j] = (to_float(h.v[j]) - mean) * rstd * to_float(weight.v[j]);
      if (norm_bias != nullptr) {
        const Vector<T> bias = c == first ? first_bias : load_vector(norm_bias + c);
#pragma unroll
        for (int j = 0; j < kVector; j++) v[j] += to_float(bias.v[j]);
      }
      store_vector(staged + c, vector_from_float<T>(v));
    }
  }
  __syncthreads();
}

// kRows: of weights that a warp multiplies, which share what is read of the row; of a gated activation an output's two.
template <class T, int kRows>
__global__ void __launch_bounds__(kThreads) row_linear(const RowLinear p, const bool gated) {
  FASTLM_SHARED_DYNAMIC(shared, 16);
  FASTLM_SHARED(float2, scratch, 2 * kWarps);
  constexpr int kAhead = kLoads / kRows;
  T* staged = reinterpret_cast<T*>(shared);
  const int lane = threadIdx.x % 32, cols = static_cast<int>(p.cols);
  const int64_t unit = int64_t{blockIdx.x} * kWarps + threadIdx.x / 32, output = gated ? unit : unit * kRows;
  const T* weights[kRows];
#pragma unroll
  for (int r = 0; r < kRows; r++) {
    const int64_t row = output + r * (gated ? p.outputs : 1), rows = (gated ? 2 : 1) * p.outputs;
    weights[r] = static_cast<const T*>(p.weight) + (row < rows ? row : rows - 1) * cols;
  }
  Vector<T> w[kAhead][kRows];
  auto load = [&](int c0) {
#pragma unroll
    for (int a = 0; a < kAhead; a++) {
      const int c = c0 + a * kStep + lane * kVector;
#pragma unroll
      for (int r = 0; r < kRows; r++) {
        if (c < cols) w[a][r] = load_vector(weights[r] + c);
      }
    }
  };
  load(0);  // weights are no kernel's result: they are on their way while this one waits
  stage_row<T>(p, staged, scratch, [&] {
#if !defined(__CUDA_ARCH__) || __CUDA_ARCH__ >= 900
    if (p.programmatic) {
      ptx::grid_launch_dependents();
      ptx::grid_dependency_wait();
    }
#endif
  });

  float sums[kRows] = {};
  for (int c0 = 0; c0 < cols; c0 += kAhead * kStep) {
    if (c0 > 0) load(c0);
#pragma unroll
    for (int a = 0; a < kAhead; a++) {
      const int c = c0 + a * kStep + lane * kVector;
      if (c >= cols) continue;
      float x[kVector];
      to_floats(load_vector(staged + c), x);
#pragma unroll
      for (int r = 0; r < kRows; r++) {
#pragma unroll
        for (int j = 0; j < kVector; j++) sums[r] = fmaf(to_float(w[a][r].v[j]), x[j], sums[r]);
      }
    }
  }
#pragma unroll
  for (int r = 0; r < kRows; r++) sums[r] = warp_sum(sums[r]);
  if (lane > 0) return;
  const T* bias = static_cast<const T*>(p.bias);
  T* y = static_cast<T*>(p.y);
  auto finished = [&](int r, int64_t row) {
    return to_float(from_float<T>(sums[r] + (bias != nullptr ? to_float(bias[row]) : 0.0f)));
  };
  auto activated = [&](float v) {
    if (p.activate) with_activation(p.activation, [&](auto act) { v = decltype(act)::value(v); });
    return v;
  };
  if (gated) {
    if (output < p.outputs) y[output] = from_float<T>(activated(finished(0, output)) * finished(kRows - 1, output + p.outputs));
    return;
  }
#pragma unroll
  for (int r = 0; r < kRows; r++) {
    if (output + r < p.outputs) y[output + r] = from_float<T>(activated(finished(r, output + r)));
  }
}

template <class T, int kRows>
void run(const RowLinear& p, bool gated, cudaStream_t stream) {
  const int64_t units = gated ? p.outputs : (p.outputs + kRows - 1) / kRows, blocks = (units + kWarps - 1) / kWarps;
  Launch l{dim3(static_cast<unsigned>(blocks)), dim3(kThreads), static_cast<size_t>(p.cols) * sizeof(T), stream};
  l.programmatic = p.programmatic;
  launch("row_linear", l, row_linear<T, kRows>, p, gated);
}

template <class T>
void run(const RowLinear& p, cudaStream_t stream) {
  constexpr int64_t kMany = 8192;  // outputs: there are warps enough with two each
  const bool gated = p.activate && is_gated(p.activation);
  gated || p.outputs >= kMany ? run<T, 2>(p, gated, stream) : run<T, 1>(p, false, stream);
}

}  // namespace
}  // namespace cuda

bool row_linear_takes(int64_t cols, DType type) {
  return cols >= 1 && cols % cuda::kVector == 0 && cols * static_cast<int64_t>(size_of(type)) <= cuda::kMaxSharedBytes;
}

void row_linear_cuda(const RowLinear& p, void* stream) {
  if (!row_linear_takes(p.cols, p.type) || p.outputs < 1 || p.outputs > 2147483647) {
    throw std::invalid_argument("row_linear: " + std::to_string(p.cols) + " columns to " + std::to_string(p.outputs) +
                                " outputs are not what it is for");
  }
  const auto s = static_cast<cudaStream_t>(stream);
  switch (p.type) {
    case DType::f32: return cuda::run<float>(p, s);
    case DType::f16: return cuda::run<__half>(p, s);
    case DType::bf16: return cuda::run<__nv_bfloat16>(p, s);
  }
}

}  // namespace fastlm
