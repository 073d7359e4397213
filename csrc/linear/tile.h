// The tile that products of matrices are made of: kStrip x two vectors of sums stay in registers while, step by step
// along the depth, each of kStrip numbers of one matrix is spread over a vector and multiplied by a panel's numbers of
// the other.
#pragma once
#include <algorithm>
#include <type_traits>

#include "common/rows.h"
#include "common/simd.h"
#include "common/transpose.h"

namespace fastlm::FASTLM_ISA {
namespace {

// Registers: strip x vectors for the sums, `vectors` for a panel's numbers, one for the number that is spread.
#if defined(__AVX512F__) || defined(__aarch64__)
constexpr int kStrip = 12;
#else
constexpr int kStrip = 6;
#endif
constexpr int kVectors = 2;
constexpr int64_t kSize = Vec::size, kPanel = kVectors * kSize;

// The depth of a block: about kDepth, so that its sums are as exact as MKL's, and kStrip rows of it stay in the first-level
// cache. All blocks have about the same, since each goes through the result once.
constexpr int64_t kDepth = 192, kMostDepth = kDepth * 3 / 2;
inline int64_t block_depth(int64_t depth) {
  const int64_t blocks = std::max<int64_t>(1, (depth + kDepth / 2) / kDepth);
  return (depth + blocks - 1) / blocks;
}

constexpr int64_t kGroup = 48;   // rows or columns that are taken together: whole strips, and whole cache lines
constexpr int64_t kRoomStride = kMostDepth + 16;
static_assert(kGroup % kStrip == 0 && kGroup % kSize == 0);

// kStrip rows of a matrix at some depth: element (r, k) at data[r * row + k * step].
struct Strip {
  const float* data;
  int64_t row, step;
};

// kStrip x kPanel numbers in rows: sums to begin with (null: zeros), or where they go.
template <class T>
struct Square {
  T* data;
  int64_t stride;
};

// Memory that the tile's loop fetches into the cache meanwhile: `lines` cache lines at each of `rows` addresses.
struct Ahead {
  const void* first;
  int64_t rows, stride, lines;  // stride in bytes

  // fetch(line) for the r-th of kStrip parts of it. Inlined always, as prefetch() is.
  template <class Fetch>
  [[gnu::always_inline]] void part(int r, const Fetch& fetch) const {
    const int64_t each = (rows + kStrip - 1) / kStrip, end = std::min(rows, (r + 1) * each);
    for (int64_t row = r * each; row < end; ++row) {
      for (int64_t i = 0; i < lines; ++i) fetch(static_cast<const char*>(first) + row * stride + i * kLine);
    }
  }
};

template <class T>
int64_t lines_of(int64_t elements) {
  return (elements * static_cast<int64_t>(sizeof(T)) + kLine - 1) / kLine;
}

// to = from + the strip's product with V vectors of the panel, which has kPanel numbers a step.
template <int V>
__attribute__((noinline)) void tile(int64_t depth, Strip strip, const float* panel, Square<const float> from,
                                    Square<float> to, Ahead read, Ahead write) {
  Vec sums[kStrip][V];
#pragma GCC unroll 16
  for (int r = 0; r < kStrip; ++r) {
#pragma GCC unroll 4
    for (int v = 0; v < V; ++v) sums[r][v] = zero();
  }
  const float* w = strip.data;
  const auto steps = [&](int64_t n) __attribute__((always_inline)) {
    for (; n > 0; --n) {
      Vec x[V];
#pragma GCC unroll 4
      for (int v = 0; v < V; ++v) {
        prefetch(panel + 8 * kPanel + v * kSize);
        x[v] = load(panel + v * kSize);
      }
#pragma GCC unroll 16
      for (int r = 0; r < kStrip; ++r) {
        const Vec number = set1(w[r * strip.row]);
#pragma GCC unroll 4
        for (int v = 0; v < V; ++v) sums[r][v] = fma(number, x[v], sums[r][v]);
      }
      w += strip.step;
      panel += kPanel;
    }
  };
  const int64_t part = depth / kStrip;  // fetches that come all at once would stand in each other's way
  for (int r = 0; r < kStrip; ++r) {
    read.part(r, [](const char* line) __attribute__((always_inline)) { prefetch(line); });
    write.part(r, [](const char* line) __attribute__((always_inline)) { prefetch_to_write(line); });
    steps(part);
  }
  steps(depth - part * kStrip);
#pragma GCC unroll 16
  for (int r = 0; r < kStrip; ++r) {
#pragma GCC unroll 4
    for (int v = 0; v < V; ++v) {
      if (from.data != nullptr) sums[r][v] += load(from.data + r * from.stride + v * kSize);
      store(to.data + r * to.stride + v * kSize, sums[r][v]);
    }
  }
}

// A matrix of `count` rows that lie in memory along the depth, from some depth on, turned: to[k * stride + r] for k below
// depth and r below kSize; zeros for the rows that are missing.
template <class T>
void turn_rows(const T* from, int64_t from_stride, int64_t count, int64_t depth, float* to, int64_t stride) {
  for (int64_t k = 0; k < depth; k += kSize) {
    const int64_t some = std::min(kSize, depth - k);
    Vec square[kSize];
    for (int64_t r = 0; r < kSize; ++r) {
      const T* const x = from + r * from_stride + k;
      square[r] = r >= count ? zero() : some == kSize ? load(x) : load_n(x, some);
    }
    transpose(square);
    for (int64_t i = 0; i < some; ++i) store(to + (k + i) * stride, square[i]);
  }
}

// kStrip rows that lie in memory along the depth, as floats whose rows do not share the cache's sets: where they are, or
// copied to `room` (kStrip x kRoomStride). Of rows that are missing, anything.
template <class T>
Strip strip_of_rows(const T* rows, int64_t stride, int64_t count, int64_t depth, float* room) {
  if constexpr (std::is_same_v<T, float>) {
    if (count == kStrip && stride * sizeof(float) % 4096 != 0) return {rows, stride, 1};
  }
  for (int64_t r = 0; r < kStrip; ++r) {
    const T* const from = rows + std::min(r, count - 1) * stride;
    float* const to = room + r * kRoomStride;
    over_row(depth, [&](auto at, int64_t k, int) { at.store(to + k, at.load(from + k)); });
  }
  return {room, kRoomStride, 1};
}

}  // namespace
}  // namespace fastlm::FASTLM_ISA
