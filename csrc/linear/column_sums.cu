// column_sums.h: a block sums some rows of 256 columns, a second launch adds the blocks' sums.
#include "linear/column_sums.h"

#include <algorithm>
#include <stdexcept>
#include <string>

#include "common/cuda/vector.h"
#include "linear/sum_parts.h"

namespace fastlm {
namespace cuda {
namespace {

constexpr int kWarps = 8, kColumns = 32 * kVector;  // a warp reads a row of the block's columns at once
constexpr int kUnrolled = 4;                        // rows of a warp that are on their way together
constexpr int64_t kLeastRows = 128, kMostParts = 256;

int64_t parts_of(int64_t rows) { return std::clamp<int64_t>((rows + kLeastRows - 1) / kLeastRows, 1, kMostParts); }

__global__ void __launch_bounds__(32 * kWarps)
    sum_rows(const ColumnSums p, const int64_t rows_a_part, const bool vectors, float* __restrict__ parts) {
  FASTLM_SHARED(float, shared, kWarps * kColumns);
  const int lane = threadIdx.x % 32, warp = threadIdx.x / 32;
  const int64_t column = int64_t{blockIdx.x} * kColumns + kVector * lane;
  const int count = static_cast<int>(max(int64_t{0}, min(int64_t{kVector}, p.cols - column)));
  const int64_t first = blockIdx.y * rows_a_part, end = min(p.rows, first + rows_a_part);
  float sum[kVector] = {};
  for (int64_t row = first + warp; row < end && count > 0; row += kUnrolled * kWarps) {
    float x[kUnrolled][kVector];
#pragma unroll
    for (int i = 0; i < kUnrolled; i++) {
      const int64_t r = row + i * kWarps;
      if (r < end) load_vector_as_float(p.x, r * p.stride + column, p.type, vectors && count == kVector, count, x[i]);
    }
#pragma unroll
    for (int i = 0; i < kUnrolled; i++) {
#pragma unroll
      for (int j = 0; j < kVector; j++) sum[j] += row + i * kWarps < end ? x[i][j] : 0.0f;
    }
  }
#pragma unroll
  for (int j = 0; j < kVector; j++) shared[warp * kColumns + 32 * j + lane] = sum[j];
  __syncthreads();
  for (int i = threadIdx.x; i < kColumns; i += 32 * kWarps) {
    float total = 0.0f;
    for (int w = 0; w < kWarps; w++) total += shared[w * kColumns + i];
    const int64_t c = int64_t{blockIdx.x} * kColumns + i % 32 * kVector + i / 32;
    if (c < p.cols) parts[blockIdx.y * p.cols + c] = total;
  }
}

}  // namespace
}  // namespace cuda

int64_t column_sums_workspace_cuda(int64_t rows, int64_t cols) { return cuda::parts_of(rows) * cols; }

void column_sums_cuda(const ColumnSums& p, void* stream) {
  using namespace cuda;
  if (p.cols == 0) return;
  const auto s = static_cast<cudaStream_t>(stream);
  const int64_t parts = parts_of(p.rows), blocks = (p.cols + kColumns - 1) / kColumns;
  if (blocks > 2147483647) throw std::invalid_argument("column_sums: a matrix of " + std::to_string(p.cols) + " columns is too wide");
  launch("column_sums", {dim3(static_cast<unsigned>(blocks), static_cast<unsigned>(parts)), dim3(32 * kWarps), 0, s}, sum_rows, p,
         (p.rows + parts - 1) / parts, vector_aligned(p.x, p.stride, static_cast<int64_t>(size_of(p.type))), p.workspace);
  run_sum_columns(p.workspace, parts, p.cols, p.sums, p.sums_type, s);
}

}  // namespace fastlm
