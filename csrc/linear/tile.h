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

// How a product goes along the depth: by floats one at a time, or, where the processor multiplies bf16 numbers two by
// two, by pairs. A lane is a float or a pair, and moving floats does not change their bits.
//
//   Element, step              what lies in memory, and how many of them make a lane
//   lanes(p, n)                a vector of lanes from n elements that lie side by side, zeros past them
//   lanes(first, second, n)    n lanes, each of an element of `first` and, in a pair, one of `second` (null: zero)
struct Singles {
  using Element = float;
  using Part = Vec;
  static constexpr int64_t step = 1;
  static Vec load(const float* p) { return FASTLM_ISA::load(p); }
  static Vec spread(const float* p) { return set1(*p); }
  static Vec add(Vec a, Vec b, Vec c) { return fma(a, b, c); }
  template <class T>
  static Vec lanes(const T* p, int64_t n) {
    return n >= kSize ? FASTLM_ISA::load(p) : load_n(p, n);
  }
  template <class T>
  static Vec lanes(const T* first, const T*, int64_t n) {
    return lanes(first, n);
  }
};

#if defined(FASTLM_PAIRS_OF_BF16)
struct Pairs {
  using Element = bf16;
  using Part = Products<bf16>::Part;
  static constexpr int64_t step = 2;
  static Part load(const bf16* p) { return Products<bf16>::load(p); }
  static Part spread(const bf16* p) { return Products<bf16>::spread(p); }
  static Vec add(Part a, Part b, Vec c) { return Products<bf16>::add(a, b, c); }
  static Vec lanes(const bf16* p, int64_t n) {
    return {_mm512_castsi512_ps((n >= 2 * kSize ? load(p) : Products<bf16>::load_n(p, n)).v)};
  }
  static Vec lanes(const bf16* first, const bf16* second, int64_t n) {
    return {_mm512_castsi512_ps(pairs_of(first, second, n >= kSize ? 0xffff : FASTLM_ISA::first(n)))};
  }
};
#endif

// kStrip rows of a matrix at some depth: lane (r, k) at data[r * row + k * step], in elements.
template <class N>
struct Strip {
  const typename N::Element* data;
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

// to = from + the strip's product with V vectors of the panel, which has kPanel lanes a step.
template <int V, class N>
__attribute__((noinline)) void tile(int64_t steps, Strip<N> strip, const typename N::Element* panel,
                                    Square<const float> from, Square<float> to, Ahead read, Ahead write) {
  Vec sums[kStrip][V];
#pragma GCC unroll 16
  for (int r = 0; r < kStrip; ++r) {
#pragma GCC unroll 4
    for (int v = 0; v < V; ++v) sums[r][v] = zero();
  }
  const typename N::Element* w = strip.data;
  const auto some_steps = [&](int64_t n) __attribute__((always_inline)) {
    for (; n > 0; --n) {
      typename N::Part x[V];
#pragma GCC unroll 4
      for (int v = 0; v < V; ++v) {
        prefetch(panel + (8 * kPanel + v * kSize) * N::step);
        x[v] = N::load(panel + v * kSize * N::step);
      }
#pragma GCC unroll 16
      for (int r = 0; r < kStrip; ++r) {
        const typename N::Part number = N::spread(w + r * strip.row);
#pragma GCC unroll 4
        for (int v = 0; v < V; ++v) sums[r][v] = N::add(number, x[v], sums[r][v]);
      }
      w += strip.step;
      panel += kPanel * N::step;
    }
  };
  const int64_t part = steps / kStrip;  // fetches that come all at once would stand in each other's way
  for (int r = 0; r < kStrip; ++r) {
    read.part(r, [](const char* line) __attribute__((always_inline)) { prefetch(line); });
    write.part(r, [](const char* line) __attribute__((always_inline)) { prefetch_to_write(line); });
    some_steps(part);
  }
  some_steps(steps - part * kStrip);
#pragma GCC unroll 16
  for (int r = 0; r < kStrip; ++r) {
#pragma GCC unroll 4
    for (int v = 0; v < V; ++v) {
      if (from.data != nullptr) sums[r][v] += load(from.data + r * from.stride + v * kSize);
      store(to.data + r * to.stride + v * kSize, sums[r][v]);
    }
  }
}

// A matrix of `count` rows that lie in memory along the depth, turned: lane k of row r at to[k * stride + r], r below
// kSize; zeros for the rows that are missing, and past the depth (in elements).
template <class N, class T>
void turn_rows(const T* from, int64_t from_stride, int64_t count, int64_t depth, float* to, int64_t stride) {
  for (int64_t k = 0; k < depth; k += kSize * N::step) {
    Vec square[kSize];
    for (int64_t r = 0; r < kSize; ++r) {
      square[r] = r >= count ? zero() : N::lanes(from + r * from_stride + k, depth - k);
    }
    transpose(square);
    const int64_t some = std::min(kSize, (depth - k + N::step - 1) / N::step);
    for (int64_t i = 0; i < some; ++i) store(to + (k / N::step + i) * stride, square[i]);
  }
}

// kStrip rows that lie in memory along the depth, such that they do not share the cache's sets: where they are, or copied
// to `room` (kStrip x kRoomStride lanes). Of rows that are missing, anything.
template <class N, class T>
Strip<N> strip_of_rows(const T* rows, int64_t stride, int64_t count, int64_t depth, float* room) {
  using Element = typename N::Element;
  if constexpr (std::is_same_v<T, Element>) {
    const bool apart = stride * static_cast<int64_t>(sizeof(T)) % 4096 != 0;
    if (count == kStrip && apart && depth % N::step == 0) return {rows, stride, N::step};
  }
  for (int64_t r = 0; r < kStrip; ++r) {
    const T* const from = rows + std::min(r, count - 1) * stride;
    for (int64_t k = 0; k < depth; k += kSize * N::step) {
      store(room + r * kRoomStride + k / N::step, N::lanes(from + k, depth - k));
    }
  }
  return {reinterpret_cast<const Element*>(room), kRoomStride * N::step, N::step};
}

}  // namespace
}  // namespace fastlm::FASTLM_ISA
