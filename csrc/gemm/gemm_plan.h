// How a product is shared out among the blocks: the size of a tile, and into how many parts k is split.
#pragma once
#include <algorithm>
#include <stdexcept>
#include <string>

#include "common/cuda/launch.h"
#include "gemm/gemm.h"

namespace fastlm::cuda {

// Of the kernel in gemm_kernel_sm90.h: a tile's rows, which are added up in so many strips, and a block's threads.
constexpr int kWgmmaRows = 128, kWgmmaStrips = 4, kWgmmaThreads = 384;

struct GemmPlan {
  bool wgmma;        // by the kernel in gemm_kernel_sm90.h
  bool aligned;      // operands are copied 16 bytes at a time
  int rows, cols;    // of a tile; by mma.sync 64 x 64 or 128 x 128
  int64_t tiles_m, tiles_n;
  int64_t splits;
  int64_t split_k;   // elements of k a split
};

// Throws std::invalid_argument beyond what a CUDA grid can hold.
inline dim3 grid_of(int64_t x, int64_t y) {
  if (x > 2147483647 || y > 65535) {
    throw std::invalid_argument("gemm: a grid of " + std::to_string(x) + " x " + std::to_string(y) +
                                " blocks wanted, but CUDA holds at most 2147483647 x 65535");
  }
  return dim3(static_cast<unsigned>(x), static_cast<unsigned>(y));
}

inline bool is_gated_product(const Epilogue& e) { return e.kind == EpilogueKind::activate && is_gated(e.activation); }

inline GemmPlan tiles_of(const Gemm& p, bool aligned, int rows, int cols) {
  const bool gated = is_gated_product(p.epilogue);
  return {false, aligned, rows, cols, ceil_div(p.m, rows), ceil_div(gated ? p.n / 2 : p.n, gated ? cols / 2 : cols), 1, p.k};
}

// The same tiles with k in about so many parts.
inline GemmPlan split(GemmPlan plan, int64_t k, int64_t splits) {
  if (splits > 1) {
    plan.split_k = ceil_div(ceil_div(k, splits), 64) * 64;
    plan.splits = ceil_div(k, plan.split_k);
  }
  return plan;
}

constexpr int64_t kLeastDepth = 256, kMostSplits = 16;  // of a part of k

// Large tiles where they keep the device busy, if need be with k split; else small ones. k is split where there are fewer
// tiles than multiprocessors, into parts of at least 256 elements and at most 16 of them, for two blocks a multiprocessor.
inline GemmPlan plan_mma(const Gemm& p, bool aligned) {
  auto plan_with = [&](int size) {
    const GemmPlan r = tiles_of(p, aligned, size, size);
    const int64_t tiles = r.tiles_m * r.tiles_n;
    if (tiles == 0 || tiles >= p.sms) return r;
    return split(r, p.k, std::min({2 * p.sms / tiles, p.k / kLeastDepth, kMostSplits}));
  };
  if (p.type != DType::f32 && aligned && p.m > 64 && (is_gated_product(p.epilogue) ? p.n / 2 : p.n) > 64) {
    const GemmPlan large = plan_with(128);
    if (large.tiles_m * large.tiles_n * large.splits >= p.sms) return large;
  }
  return plan_with(64);
}

// Cycles of a multiprocessor of an H100 that a plan takes, about: its products at 4096 operations a cycle, of which mma.sync
// reaches 63 % (arXiv:2402.13499); filling the first stages and finishing the last tile; and partial products, written and
// read at 14 bytes a cycle (3.35 TB/s).
inline double cycles_of(const Gemm& p, const GemmPlan& plan) {
  const int64_t tiles = plan.wgmma ? ceil_div(plan.tiles_m, 2) * plan.tiles_n : plan.tiles_m * plan.tiles_n;
  const int64_t turns = ceil_div(tiles * plan.splits, plan.wgmma ? p.sms / 2 : p.sms);
  const double product = 2.0 * plan.rows * plan.cols * plan.split_k / (plan.wgmma ? 4096 : 0.63 * 4096);
  const double partials = plan.splits > 1 ? 8.0 * plan.splits * p.m * p.n / (14.0 * p.sms) : 0.0;
  return turns * product + partials + 5000.0 * (plan.splits > 1 ? 2 : 1);
}

// Whether TMA and wgmma can take the operands, but for their addresses; what they can only pad is left to mma.sync.
inline bool wgmma_takes(const Gemm& p) {
  auto fits = [&](const Matrix& x, int64_t rows) { return x.stride >= (x.transposed ? rows : p.k); };
  constexpr int64_t kLargest = int64_t{1} << 30;  // TMA's coordinates are 32-bit
  return p.wgmma && p.sms >= 2 && p.type != DType::f32 && p.m > 64 && p.n > 64 && p.k >= 64 && p.m <= kLargest &&
         p.n <= kLargest && p.k <= kLargest && fits(p.a, p.m) && fits(p.b, p.n) &&
         !(is_gated_product(p.epilogue) && p.b.transposed);
}

// Whether a tile of 192 columns leaves its epilogue registers enough.
inline bool wide_tiles_fit(const Epilogue& e) {
  return e.kind == EpilogueKind::store || !is_gated(e.activation);
}

// aligned: the operands' rows are. whole: so are those of everything in the epilogue, in multiples of eight elements.
inline GemmPlan plan_gemm(const Gemm& p, bool aligned, bool whole) {
  GemmPlan best = plan_mma(p, aligned);
  if (!aligned || !whole || !wgmma_takes(p)) return best;
  for (const int cols : {192, 128}) {
    if (cols > 128 && !wide_tiles_fit(p.epilogue)) continue;
    GemmPlan tiles = tiles_of(p, aligned, kWgmmaRows, cols);
    tiles.wgmma = true;
    for (int64_t splits = 1; splits <= std::min(kMostSplits, std::max<int64_t>(1, p.k / kLeastDepth)); splits++) {
      GemmPlan plan = split(tiles, p.k, splits);
      if (plan.splits > 1) plan.tiles_n = ceil_div(p.n, cols);  // parts of a gated product are not gated yet
      if (cycles_of(p, plan) < cycles_of(p, best)) best = plan;
    }
  }
  return best;
}

}  // namespace fastlm::cuda
