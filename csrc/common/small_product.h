// Matrix products of blocks that lie in the cache: C = A B, or C += A B.
//
// The result is made in tiles of kTileRows x kTileVectors registers. For each step along the depth, a tile loads a row
// of B as vectors and multiplies it by kTileRows elements of A, each spread over a vector. So B's rows must be
// contiguous, A may lie either way round at the same cost, and nothing needs packing.
//
// A tile too small to keep the multipliers busy splits the depth among several sums. So the order of additions follows
// from the shapes (and the register width), and from nothing else.
#pragma once
#include <algorithm>

#include "common/simd.h"

namespace fastlm::FASTLM_ISA {

// Registers: rows x vectors for the tile, `vectors` for B's row, one for A's element. AVX-512 and arm64 have 32, the
// others 16.
#if defined(__AVX512F__) || defined(__aarch64__)
constexpr int kTileRows = 6, kTileVectors = 4;
#else
constexpr int kTileRows = 6, kTileVectors = 2;
#endif

enum class Layout { rows, columns };  // how A lies in memory: element (r, k) at a[r * lda + k] or at a[k * lda + r]

// Of a matrix with a band structure: row r has something at the positions r + low .. r + high alone.
struct Band {
  int64_t low = -(int64_t{1} << 60), high = int64_t{1} << 60;
};

namespace small_product {

// Sums an element of the tile is split into: 24 or 12 registers hide the latency of a multiply-add.
constexpr int sums_of(int tile_size) {
  constexpr int full = kTileRows * kTileVectors;
  return tile_size * 4 <= full ? 4 : tile_size * 2 <= full ? 2 : 1;
}

// A step along the depth.
template <class B>
struct Step {
  static constexpr int64_t depth = 1;
  static Vec load(const float* b) { return FASTLM_ISA::load(b); }
  static Vec spread(const float* a) { return set1(*a); }
  static Vec add(Vec element, Vec row, Vec sum) { return fma(element, row, sum); }
};

#if defined(FASTLM_PAIRS_OF_BF16)
template <>
struct Step<Pair> {
  using P = Products<bf16>;
  static constexpr int64_t depth = 2;
  static P::Part load(const Pair* b) { return P::load(&b->first); }
  static P::Part spread(const bf16* a) { return P::spread(a); }
  static P::Part spread(const Pair* a) { return P::spread(&a->first); }
  static Vec add(P::Part element, P::Part row, Vec sum) { return P::add(element, row, sum); }
};
#endif

template <Layout layout, int R, int V, class A, class B>
inline void tile(int64_t step_begin, int64_t step_end, const A* a, int64_t lda, const B* b, int64_t ldb, float* c,
                 int64_t ldc, bool accumulate) {
  using Step = small_product::Step<B>;
  constexpr int S = sums_of(R * V);
  Vec sums[S][R][V];
#pragma GCC unroll 8
  for (int r = 0; r < R; ++r) {
#pragma GCC unroll 8
    for (int v = 0; v < V; ++v) {
      sums[0][r][v] = accumulate ? load(c + r * ldc + v * Vec::size) : zero();
#pragma GCC unroll 8
      for (int s = 1; s < S; ++s) sums[s][r][v] = zero();
    }
  }
  const auto step = [&](int64_t k, Vec(&into)[R][V]) __attribute__((always_inline)) {
    decltype(Step::load(b)) row[V];
#pragma GCC unroll 8
    for (int v = 0; v < V; ++v) row[v] = Step::load(b + k * ldb + v * Vec::size);
#pragma GCC unroll 8
    for (int r = 0; r < R; ++r) {
      const auto element = Step::spread(layout == Layout::rows ? a + r * lda + k * Step::depth : a + k * lda + r);
#pragma GCC unroll 8
      for (int v = 0; v < V; ++v) into[r][v] = Step::add(element, row[v], into[r][v]);
    }
  };
  int64_t k = step_begin;
  for (; k + S <= step_end; k += S) {
#pragma GCC unroll 8
    for (int s = 0; s < S; ++s) step(k + s, sums[s]);
  }
  if constexpr (S > 1) {
    for (; k < step_end; ++k) step(k, sums[0]);
  }
#pragma GCC unroll 8
  for (int r = 0; r < R; ++r) {
#pragma GCC unroll 8
    for (int v = 0; v < V; ++v) {
      Vec total = sums[0][r][v];
      if constexpr (S == 2) total = total + sums[1][r][v];
      if constexpr (S == 4) total = (total + sums[1][r][v]) + (sums[2][r][v] + sums[3][r][v]);
      store(c + r * ldc + v * Vec::size, total);
    }
  }
}

template <Layout layout, int R, int V = kTileVectors, class A, class B>
inline void tile_of(int64_t vectors, int64_t step_begin, int64_t step_end, const A* a, int64_t lda, const B* b,
                    int64_t ldb, float* c, int64_t ldc, bool accumulate) {
  if constexpr (V > 1) {
    if (vectors < V) {
      return tile_of<layout, R, V - 1>(vectors, step_begin, step_end, a, lda, b, ldb, c, ldc, accumulate);
    }
  }
  tile<layout, R, V>(step_begin, step_end, a, lda, b, ldb, c, ldc, accumulate);
}

template <Layout layout, int R = kTileRows, class A, class B>
inline void tile_of_rows(int64_t rows, int64_t vectors, int64_t step_begin, int64_t step_end, const A* a, int64_t lda,
                         const B* b, int64_t ldb, float* c, int64_t ldc, bool accumulate) {
  if constexpr (R > 1) {
    if (rows < R) {
      return tile_of_rows<layout, R - 1>(rows, vectors, step_begin, step_end, a, lda, b, ldb, c, ldc, accumulate);
    }
  }
  tile_of<layout, R>(vectors, step_begin, step_end, a, lda, b, ldb, c, ldc, accumulate);
}

}  // namespace small_product

// C (rows x columns) = A (rows x depth) B (depth x columns), added to C where `accumulate`. `columns` is a multiple of
// Vec::size. `wanted`: the band of C that is needed; the rest is left as it is or overwritten with anything.
// `nonzero`: the band of A that is not zero; the rest need not be read.
template <Layout layout, class A, class B>
inline void product(int64_t rows, int64_t columns, int64_t depth, const A* a, int64_t lda, const B* b, int64_t ldb,
                    float* c, int64_t ldc, bool accumulate, Band wanted = {}, Band nonzero = {}) {
  constexpr int64_t size = Vec::size, step = small_product::Step<B>::depth;
  for (int64_t r = 0; r < rows; r += kTileRows) {
    const int64_t count = std::min<int64_t>(kTileRows, rows - r), last = r + count - 1;
    const int64_t first_vector = std::max<int64_t>(0, r + wanted.low) / size;
    const int64_t end_vector = (std::clamp<int64_t>(last + wanted.high + 1, 0, columns) + size - 1) / size;
    const int64_t begin = std::max<int64_t>(0, r + nonzero.low) / step;
    const int64_t end = std::max(begin, (std::min<int64_t>(depth, last + nonzero.high + 1) + step - 1) / step);
    const A* a_rows = layout == Layout::rows ? a + r * lda : a + r;
    for (int64_t v = first_vector; v < end_vector;) {
      const int64_t left = end_vector - v, tiles = (left + kTileVectors - 1) / kTileVectors;
      const int64_t vectors = (left + tiles - 1) / tiles;  // 5 is 3 + 2 rather than 4 + 1
      small_product::tile_of_rows<layout>(count, vectors, begin, end, a_rows, lda, b + v * size, ldb,
                                          c + r * ldc + v * size, ldc, accumulate);
      v += vectors;
    }
  }
}

}  // namespace fastlm::FASTLM_ISA
