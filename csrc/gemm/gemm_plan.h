// How a product is shared out among the blocks: the size of a tile, and into how many parts k is split.
#pragma once
#include <algorithm>
#include <stdexcept>
#include <string>

#include "common/cuda/platform.h"
#include "gemm/gemm.h"

namespace fastlm::cuda {

struct GemmPlan {
  int size;          // of a tile: 64 or 128 rows and columns
  bool aligned;      // operands are copied 16 bytes at a time
  int64_t tiles_m, tiles_n;
  int64_t splits;
  int64_t split_k;   // elements of k a split
};

inline int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }

// Throws std::invalid_argument beyond what a CUDA grid can hold.
inline dim3 grid_of(int64_t x, int64_t y) {
  if (x > 2147483647 || y > 65535) {
    throw std::invalid_argument("gemm: a grid of " + std::to_string(x) + " x " + std::to_string(y) +
                                " blocks wanted, but CUDA holds at most 2147483647 x 65535");
  }
  return dim3(static_cast<unsigned>(x), static_cast<unsigned>(y));
}

inline bool is_gated_product(const Epilogue& e) { return e.kind == EpilogueKind::activate && is_gated(e.activation); }

// Large tiles where they keep the device busy, if need be with k split; else small ones. k is split where there are fewer
// tiles than multiprocessors, into parts of at least 256 elements and at most 16 of them, for two blocks a multiprocessor.
inline GemmPlan plan_gemm(const Gemm& p, bool aligned) {
  constexpr int64_t kLeastDepth = 256, kMostSplits = 16;
  const bool gated = is_gated_product(p.epilogue);
  const int64_t cols = gated ? p.n / 2 : p.n;
  auto plan_with = [&](int size) {
    GemmPlan r{size, aligned, ceil_div(p.m, size), ceil_div(cols, gated ? size / 2 : size), 1, p.k};
    const int64_t tiles = r.tiles_m * r.tiles_n;
    if (tiles > 0 && tiles < p.sms) {
      const int64_t splits = std::min({2 * p.sms / tiles, p.k / kLeastDepth, kMostSplits});
      if (splits > 1) {
        r.split_k = ceil_div(ceil_div(p.k, splits), 64) * 64;
        r.splits = ceil_div(p.k, r.split_k);
      }
    }
    return r;
  };
  if (p.type != DType::f32 && aligned && p.m > 64 && cols > 64) {
    const GemmPlan large = plan_with(128);
    if (large.tiles_m * large.tiles_n * large.splits >= p.sms) return large;
  }
  return plan_with(64);
}

}  // namespace fastlm::cuda
