// The GEMM kernel, and which of its instances runs a product. gemm_<type>.cu compile it, one type each.
#pragma once
#include "common/cuda/launch.h"
#include "gemm/epilogue.h"
#include "gemm/gemm_plan.h"
#include "gemm/main_loop.h"

namespace fastlm::cuda {

struct GemmTask {
  Matrix a, b;
  int64_t m, n, k;
  int64_t tiles_m, tiles_n;
  int64_t split_k;  // elements of k of one blockIdx.y: all, or a multiple of a stage's
  float* partials;  // (splits, m, n); null: the tile is finished at once
  EpilogueTask epilogue;
};

// Neighbouring blocks work on kGroup rows of tiles, column by column: what they read together stays in the L2 cache.
constexpr int kGroup = 8;

// The row and the column of tile number i.
template <class Int, class Pair>
FASTLM_DEVICE Pair tile_at(Int i, Int tiles_m, Int tiles_n) {
  const Int in_group = kGroup * tiles_n, first = i / in_group * kGroup;
  const Int rows = min(tiles_m - first, Int{kGroup});
  return {first + i % in_group % rows, i % in_group / rows};
}

// A partial product of one split of k as an epilogue: it is stored in float32 where the finishing kernel finds it.
FASTLM_DEVICE EpilogueTask partial_task(const GemmTask& p, int64_t split) {
  EpilogueTask r{};
  r.e.kind = EpilogueKind::store;
  r.e.out = p.partials + split * p.m * p.n;
  r.e.out_stride = p.n;
  r.e.out_type = DType::f32;
  r.m = p.m;
  r.cols = p.epilogue.cols;
  r.vectors = p.n % 4 == 0 && r.cols % 4 == 0;
  return r;
}

template <class T, int kSize, bool kTransposedA, bool kTransposedB, bool kAligned>
__global__ void __launch_bounds__(kGemmThreads, 2) gemm_kernel(const GemmTask p) {
  using Loop = MainLoop<T, kSize, kSize, kTransposedA, kTransposedB, kAligned>;
  FASTLM_SHARED_DYNAMIC(shared, 128);
  const longlong2 tile = tile_at<int64_t, longlong2>(blockIdx.x, p.tiles_m, p.tiles_n);
  // A tile of a gated pre-activation is half gate, half what that multiplies, of the same columns of the result.
  const bool halves = p.epilogue.gated && p.epilogue.e.kind == EpilogueKind::activate;
  const int width = halves ? kSize / 2 : kSize;
  const int64_t row0 = tile.x * kSize, col0 = tile.y * width;
  const int64_t k0 = blockIdx.y * p.split_k, k = min(p.k - k0, p.split_k);

  typename Loop::Accumulators c = {};
  {
    typename Loop::LoaderA load_a(p.a, row0, kSize, p.m, k0);
    typename Loop::LoaderB load_b(p.b, col0, width, p.epilogue.cols, k0);
    Loop::run(c, load_a, load_b, k, shared);
  }
  float* staging = reinterpret_cast<float*>(shared);
  Loop::store(c, staging);
  __syncthreads();

  auto load = [&](int r, int col, float (&v)[kVector], float (&up)[kVector]) {
    const float* from = staging + r * Loop::kRowFloats + col;
    to_floats(load_vector(from), v);
    if (halves) to_floats(load_vector(from + width), up);
  };
  if (p.partials == nullptr) {
    finish_tile<T, !kTransposedA>(p.epilogue, tile.x, row0, kSize, col0, width, load, staging);
    return;
  }
  EpilogueTask partial = partial_task(p, blockIdx.y);
  finish_tile<T, false>(partial, tile.x, row0, kSize, col0, width, load, staging);
  if (halves) {
    partial.e.out = static_cast<float*>(partial.e.out) + partial.cols;
    auto second = [&](int r, int col, float (&v)[kVector], float (&)[kVector]) {
      to_floats(load_vector(staging + r * Loop::kRowFloats + width + col), v);
    };
    finish_tile<T, false>(partial, tile.x, row0, kSize, col0, width, second, staging);
  }
}

// Where c comes from when no tile of a GEMM is at hand: partial products (their sum, in their order), or a matrix of T.
struct EpilogueSource {
  const float* partials;  // (splits, m, n)
  int64_t splits, n;
  const void* matrix;     // (m, cols) of T
};

// The sum of the partial products at eight elements from `at` on.
FASTLM_DEVICE void sum_parts(const EpilogueSource& source, int64_t m, int64_t at, bool vectors, int count, float (&v)[kVector]) {
#pragma unroll
  for (int j = 0; j < kVector; j++) v[j] = 0.0f;
  auto add = [&](const Vector<float>& part) {
#pragma unroll
    for (int j = 0; j < kVector; j++) v[j] += part.v[j];
  };
  const int64_t step = m * source.n;
  if (vectors && count == kVector) {
#pragma unroll 4  // several loads under way
    for (int64_t s = 0; s < source.splits; s++) add(load_vector(source.partials + s * step + at));
  } else {
    for (int64_t s = 0; s < source.splits; s++) add(load_some<float>(source.partials, s * step + at, false, count));
  }
}

constexpr int kFinishSize = 64;

template <class T>
__global__ void __launch_bounds__(kGemmThreads) finish_kernel(const EpilogueTask task, const EpilogueSource source) {
  FASTLM_SHARED(float, scratch, kColumnSumsBytes / sizeof(float));
  const int64_t tile = blockIdx.x, row0 = tile * kFinishSize, col0 = static_cast<int64_t>(blockIdx.y) * kFinishSize;
  const bool halves = task.gated && task.e.kind == EpilogueKind::activate;
  auto load = [&](int r, int c, float (&v)[kVector], float (&up)[kVector]) {
    const int64_t col = col0 + c;
    const int count = static_cast<int>(min(int64_t{kVector}, task.cols - col));
    if (source.matrix != nullptr) {
      to_floats(load_some<T>(source.matrix, (row0 + r) * task.cols + col, task.vectors, count), v);
      return;
    }
    const int64_t at = (row0 + r) * source.n + col;
    sum_parts(source, task.m, at, task.vectors, count, v);
    if (halves) sum_parts(source, task.m, at + task.cols, task.vectors, count, up);
  };
  finish_tile<T, true>(task, tile, row0, kFinishSize, col0, kFinishSize, load, scratch);
}

template <class T, int kSize, bool kTransposedA, bool kTransposedB, bool kAligned>
void launch_gemm(const GemmTask& task, const GemmPlan& plan, cudaStream_t stream) {
  using Loop = MainLoop<T, kSize, kSize, kTransposedA, kTransposedB, kAligned>;
  static_assert(Loop::kStagingBytes >= kColumnSumsBytes, "the column sums reuse the staging");
  constexpr size_t kShared = Loop::kSharedBytes > Loop::kStagingBytes ? Loop::kSharedBytes : Loop::kStagingBytes;
  launch("gemm", {grid_of(plan.tiles_m * plan.tiles_n, plan.splits), dim3(kGemmThreads), kShared, stream},
         gemm_kernel<T, kSize, kTransposedA, kTransposedB, kAligned>, task);
}

// Rows of 16-byte accesses, whatever the plan says, need a large tile only where they are 16-bit.
template <class T, bool kTransposedA, bool kTransposedB>
void launch_gemm(const GemmTask& task, const GemmPlan& plan, cudaStream_t stream) {
  if (!plan.aligned) return launch_gemm<T, 64, kTransposedA, kTransposedB, false>(task, plan, stream);
  if constexpr (sizeof(T) == 2) {
    if (plan.rows == 128) return launch_gemm<T, 128, kTransposedA, kTransposedB, true>(task, plan, stream);
  }
  launch_gemm<T, 64, kTransposedA, kTransposedB, true>(task, plan, stream);
}

template <class T>
void run_gemm(const GemmTask& task, const GemmPlan& plan, cudaStream_t stream) {
  if (task.a.transposed) return launch_gemm<T, true, true>(task, plan, stream);
  task.b.transposed ? launch_gemm<T, false, true>(task, plan, stream) : launch_gemm<T, false, false>(task, plan, stream);
}

template <class T>
void run_finish(const EpilogueTask& task, const EpilogueSource& source, cudaStream_t stream) {
  const int64_t rows = ceil_div(task.m, kFinishSize), cols = ceil_div(task.cols, kFinishSize);
  launch("gemm_finish", {grid_of(rows, cols), dim3(kGemmThreads), 0, stream}, finish_kernel<T>, task, source);
}

// One file each, so that they compile side by side.
#define FASTLM_GEMM_TYPE(EXTERN, T)                                                     \
  EXTERN template void run_gemm<T>(const GemmTask&, const GemmPlan&, cudaStream_t);     \
  EXTERN template void run_finish<T>(const EpilogueTask&, const EpilogueSource&, cudaStream_t);

}  // namespace fastlm::cuda
