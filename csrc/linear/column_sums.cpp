// column_sums.h on the CPU: rows are summed in chunks, whose sums stay in the first-level cache, then the chunks' sums.
#include "linear/column_sums.h"

#include <algorithm>

#include "common/error.h"
#include "common/parallel.h"
#include "common/rows.h"
#include "common/simd.h"

namespace fastlm::FASTLM_ISA {
namespace {

// Taller than those of rows.h: nothing else is done to a row here, so the chunks' sums must be few beside the rows.
constexpr int64_t kLeastRows = 64, kMostChunks = 64;

int64_t rows_of_a_chunk(int64_t rows) { return std::max(kLeastRows, (rows + kMostChunks - 1) / kMostChunks); }
int64_t chunks_of(int64_t rows) { return (rows + rows_of_a_chunk(rows) - 1) / rows_of_a_chunk(rows); }

// Four rows at a time: their sum so far is read and written once.
template <class X>
void sum_rows(const X* x, int64_t stride, int64_t rows, int64_t cols, float* sums) {
  std::fill(sums, sums + cols, 0.0f);
  int64_t row = 0;
  for (; row + 4 <= rows; row += 4, x += 4 * stride) {
    over_row(cols, [&](auto at, int64_t i, int) {
      const Vec a = at.load(x + i) + at.load(x + stride + i), b = at.load(x + 2 * stride + i) + at.load(x + 3 * stride + i);
      at.store(sums + i, at.load(sums + i) + (a + b));
    });
  }
  for (; row < rows; ++row, x += stride) {
    over_row(cols, [&](auto at, int64_t i, int) { at.store(sums + i, at.load(sums + i) + at.load(x + i)); });
  }
}

}  // namespace

void column_sums_cpu(const ColumnSums& p) {
  check(p.rows >= 0 && p.cols >= 0, "column_sums: wanted rows >= 0 and cols >= 0");
  const int64_t chunks = chunks_of(p.rows), size = rows_of_a_chunk(p.rows);
  with_type(p.type, [&](auto type) {
    using X = decltype(type);
    parallel_for(chunks, 1 + kGrain / (1 + size * p.cols), [&](int64_t begin, int64_t end) {
      for (int64_t c = begin; c < end; ++c) {
        sum_rows(static_cast<const X*>(p.x) + c * size * p.stride, p.stride, std::min(size, p.rows - c * size), p.cols,
                 p.workspace + c * p.cols);
      }
    });
  });
  with_type(p.sums_type, [&](auto type) {
    parallel_for(p.cols, 1 + kGrain / (chunks + 1), [&](int64_t begin, int64_t end) {
      add_chunks(p.workspace, chunks, p.cols, begin, end, static_cast<decltype(type)*>(p.sums));
    });
  });
}

}  // namespace fastlm::FASTLM_ISA

FASTLM_DISPATCH(column_sums_cpu, (const ColumnSums& p), (p))

#if defined(FASTLM_ISA_IS_BASELINE)
int64_t fastlm::column_sums_workspace_cpu(int64_t rows, int64_t cols) {
  return fastlm::FASTLM_ISA::chunks_of(rows) * cols;  // the same on every instruction set
}
#endif
