// Loops over the columns of a row, and sums over rows (of gradients of weights and biases) in a fixed order.
#pragma once
#include <algorithm>

#include "common/simd.h"

namespace fastlm::FASTLM_ISA {

constexpr int kSums = 4;  // independent sums: an addition need not wait for the one before it

// body(access, i, k): a vector at column i, to be added to sum k.
template <class Body>
inline void over_row(int64_t cols, const Body& body) {
  constexpr int64_t step = Vec::size;
  int64_t i = 0;
  for (; i + kSums * step <= cols; i += kSums * step) {
    for (int k = 0; k < kSums; ++k) body(Whole{}, i + k * step, k);
  }
  for (; i + step <= cols; i += step) body(Whole{}, i, 0);
  if (i < cols) body(Rest{cols - i}, i, 0);
}

inline float total(const Vec (&sums)[kSums]) { return sum((sums[0] + sums[1]) + (sums[2] + sums[3])); }

// At least this many elements to a thread: below, waking a thread costs more than it saves.
constexpr int64_t kGrain = 16384;

// The rows of one chunk: they share one partial sum of each column. At least 24 K elements, so that adding up the chunks
// is a small part of the work; at most 64 chunks, so that the workspace stays small. Nothing here may depend on the
// number of threads: it decides the order of the additions.
inline int64_t chunk_rows(int64_t rows, int64_t cols) {
  return std::max({int64_t(8), (24576 + cols - 1) / cols, (rows + 63) / 64});
}
inline int64_t chunk_count(int64_t rows, int64_t cols) {
  const int64_t size = chunk_rows(rows, cols);
  return (rows + size - 1) / size;
}

// Columns begin .. end-1 of `out`: the chunks' sums, added in the order of the chunks.
template <class W>
inline void add_chunks(const float* sums, int64_t chunks, int64_t chunk_stride, int64_t begin, int64_t end, W* out) {
  over_row(end - begin, [&](auto at, int64_t i, int) {
    Vec s = zero();
    for (int64_t c = 0; c < chunks; ++c) s += at.load(sums + c * chunk_stride + begin + i);
    at.store(out + begin + i, s);
  });
}

}  // namespace fastlm::FASTLM_ISA
