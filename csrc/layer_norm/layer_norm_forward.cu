// layer_norm and rms_norm, forward. The contract is in layer_norm.h.
#include "common/cuda/launch.h"
#include "common/cuda/reduce.h"
#include "layer_norm/layer_norm_types.h"

namespace fastlm {
namespace cuda {
namespace {

constexpr int kVectors = 4;    // vectors of a row that a thread holds: 32 float32 values
constexpr int kMaxWarps = 16;  // 512 threads may use 128 registers each
constexpr int64_t kMaxColsInRegisters = int64_t{32} * kMaxWarps * kVectors * kVector;  // 16384

// (mean, 1 / standard deviation) of a row in two passes: the variance is the mean of squared
// differences, which does not cancel as E[h^2] - mean^2 does. for_each(f) calls f on the row's values of this thread.
template <class ForEach>
FASTLM_DEVICE float2 row_statistics(ForEach for_each, float2* scratch, int warp, int warps, const LayerNormForward& p) {
  const float cols = static_cast<float>(p.cols);
  float mean = 0.0f;
  if (!p.rms) {
    float2 sum = make_float2(0.0f, 0.0f);
    for_each([&](float h) { sum.x += h; });
    mean = group_sum(sum, scratch, warp, warps).x / cols;
  }
  float2 squares = make_float2(0.0f, 0.0f);
  for_each([&](float h) { squares.x += (h - mean) * (h - mean); });
  const float variance = group_sum(squares, scratch + kMaxWarps, warp, warps).x / cols;
  return make_float2(mean, 1.0f / sqrtf(variance + p.eps));
}

// `warps` warps hold one row in registers, so that every input is read once. All rows and pointers are 16-byte aligned.
template <class X, class H, class W>
__global__ void __launch_bounds__(32 * kMaxWarps) forward_in_registers(const LayerNormForward p, const RowGroups groups) {
  FASTLM_SHARED(float2, scratch, 2 * kMaxWarps);
  const int warp = threadIdx.x / 32 % groups.warps;
  const int group = threadIdx.x / 32 / groups.warps;
  const int64_t row = static_cast<int64_t>(blockIdx.x) * groups.rows + group;
  const int first = kVector * (32 * warp + threadIdx.x % 32);
  const int step = kVector * 32 * groups.warps;
  // Rows past the end take part in the barriers with no columns.
  const int cols = row < p.rows ? static_cast<int>(p.cols) : 0;

  const X* __restrict__ x = static_cast<const X*>(p.x) + row * p.x_stride;
  Vector<X> x_raw[kVectors];
#pragma unroll
  for (int i = 0; i < kVectors; i++) {
    if (first + i * step < cols) x_raw[i] = load_vector(x + first + i * step);
  }
  float h[kVectors][kVector];
#pragma unroll
  for (int i = 0; i < kVectors; i++) {
#pragma unroll
    for (int j = 0; j < kVector; j++) h[i][j] = to_float(x_raw[i].v[j]);
  }
  if (p.residual != nullptr) {
    const H* __restrict__ residual = static_cast<const H*>(p.residual) + row * p.residual_stride;
    H* __restrict__ h_out = static_cast<H*>(p.h) + row * p.cols;
#pragma unroll
    for (int i = 0; i < kVectors; i++) {
      if (first + i * step < cols) {
        const Vector<H> r = load_vector(residual + first + i * step);
#pragma unroll
        for (int j = 0; j < kVector; j++) h[i][j] += to_float(r.v[j]);
        const Vector<H> rounded = vector_from_float<H>(h[i]);
#pragma unroll
        for (int j = 0; j < kVector; j++) h[i][j] = to_float(rounded.v[j]);
        store_vector(h_out + first + i * step, rounded);
      }
    }
  }

  auto for_each = [&](auto f) {
#pragma unroll
    for (int i = 0; i < kVectors; i++) {
      if (first + i * step < cols) {
#pragma unroll
        for (int j = 0; j < kVector; j++) f(h[i][j]);
      }
    }
  };
  const float2 s = row_statistics(for_each, scratch + group * groups.warps, warp, groups.warps, p);
  if (cols == 0) return;
  if (first == 0) {
    if (p.mean != nullptr) p.mean[row] = s.x;
    p.rstd[row] = s.y;
  }
  const W* __restrict__ weight = static_cast<const W*>(p.weight);
  const W* __restrict__ bias = static_cast<const W*>(p.bias);
  X* __restrict__ y = static_cast<X*>(p.y) + row * p.cols;
#pragma unroll
  for (int i = 0; i < kVectors; i++) {
    const int c = first + i * step;
    if (c < cols) {
      const Vector<W> w = load_vector(weight + c);
      float out[kVector];
#pragma unroll
      for (int j = 0; j < kVector; j++) out[j] = (h[i][j] - s.x) * s.y * to_float(w.v[j]);
      if (bias != nullptr) {
        const Vector<W> b = load_vector(bias + c);
#pragma unroll
        for (int j = 0; j < kVector; j++) out[j] += to_float(b.v[j]);
      }
      store_vector(y + c, vector_from_float<X>(out));
    }
  }
}

// Any width, alignment and types: one block a row, which is read again for each of the three passes.
__global__ void __launch_bounds__(32 * kMaxWarps) forward_any(const LayerNormForward p, const bool vectors) {
  FASTLM_SHARED(float2, scratch, 2 * kMaxWarps);
  const int64_t row = blockIdx.x;
  const int64_t first = kVector * threadIdx.x;
  const int64_t step = kVector * blockDim.x;
  const bool has_residual = p.residual != nullptr;
  auto count = [&](int64_t c) { return static_cast<int>(p.cols - c < kVector ? p.cols - c : kVector); };

  if (has_residual) {
    for (int64_t c = first; c < p.cols; c += step) {
      float h[kVector], r[kVector];
      load_vector_as_float(p.x, row * p.x_stride + c, p.x_type, vectors, count(c), h);
      load_vector_as_float(p.residual, row * p.residual_stride + c, p.h_type, vectors, count(c), r);
#pragma unroll
      for (int j = 0; j < kVector; j++) h[j] += r[j];
      store_vector_from_float(p.h, row * p.cols + c, p.h_type, vectors, count(c), h);
    }
  }
  // Each thread reads back the elements of h that it wrote itself, so no barrier is needed.
  const void* source = has_residual ? p.h : p.x;
  const DType source_type = has_residual ? p.h_type : p.x_type;
  const int64_t source_row = row * (has_residual ? p.cols : p.x_stride);
  auto for_each = [&](auto f) {
    for (int64_t c = first; c < p.cols; c += step) {
      float h[kVector];
      load_vector_as_float(source, source_row + c, source_type, vectors, count(c), h);
#pragma unroll
      for (int j = 0; j < kVector; j++) {
        if (j < count(c)) f(h[j]);
      }
    }
  };
  const float2 s = row_statistics(for_each, scratch, threadIdx.x / 32, blockDim.x / 32, p);
  if (threadIdx.x == 0) {
    if (p.mean != nullptr) p.mean[row] = s.x;
    p.rstd[row] = s.y;
  }
  for (int64_t c = first; c < p.cols; c += step) {
    float h[kVector], w[kVector], b[kVector];
    load_vector_as_float(source, source_row + c, source_type, vectors, count(c), h);
    load_vector_as_float(p.weight, c, p.w_type, vectors, count(c), w);
#pragma unroll
    for (int j = 0; j < kVector; j++) h[j] = (h[j] - s.x) * s.y * w[j];
    if (p.bias != nullptr) {
      load_vector_as_float(p.bias, c, p.w_type, vectors, count(c), b);
#pragma unroll
      for (int j = 0; j < kVector; j++) h[j] += b[j];
    }
    store_vector_from_float(p.y, row * p.cols + c, p.x_type, vectors, count(c), h);
  }
}

bool all_vector_aligned(const LayerNormForward& p) {
  const int64_t x = size_of(p.x_type), h = size_of(p.h_type);
  return p.cols % kVector == 0 && vector_aligned(p.x, p.x_stride, x) && vector_aligned(p.y, p.cols, x) &&
         vector_aligned(p.residual, p.residual_stride, h) && vector_aligned(p.h, p.cols, h) &&
         vector_aligned(p.weight, 0, 1) && vector_aligned(p.bias, 0, 1);
}

}  // namespace
}  // namespace cuda

void layer_norm_forward_cuda(const LayerNormForward& p, void* stream) {
  using namespace cuda;
  if (p.rows == 0 || p.cols == 0) return;
  const auto cuda_stream = static_cast<cudaStream_t>(stream);
  const bool vectors = all_vector_aligned(p);
  if (vectors && p.cols <= kMaxColsInRegisters) {
    const RowGroups groups = row_groups(p.cols, kVectors, 4);
    const Launch config{blocks_for(ceil_div(p.rows, groups.rows)), dim3(groups.threads()), 0, cuda_stream};
    const DType h_type = p.residual != nullptr ? p.h_type : p.x_type;
    const bool done = with_common_types(p.x_type, h_type, p.w_type, [&](auto x, auto h, auto w) {
      launch("layer_norm_forward_in_registers", config,
             forward_in_registers<typename decltype(x)::type, typename decltype(h)::type, typename decltype(w)::type>,
             p, groups);
    });
    if (done) return;
  }
  const int threads = std::min(kMaxWarps, row_groups(p.cols, 1, 1).warps) * 32;
  launch("layer_norm_forward_any", {blocks_for(p.rows), dim3(threads), 0, cuda_stream}, forward_any, p, vectors);
}

}  // namespace fastlm
