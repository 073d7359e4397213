// narrow.h on the CPU. The rows of x are packed once, in panels of two vectors that lie in the second-level cache. Then
// the weights stream past, kStrip rows of them at a time: a tile of kStrip x two vectors of sums stays in registers while
// each weight, spread over a vector, is multiplied by a panel's numbers. So y comes out of a tile with its rows along the
// registers, and is turned on the way to memory.
#include "linear/narrow.h"

#include <algorithm>
#include <type_traits>

#include "common/error.h"
#include "common/rows.h"
#include "common/simd.h"
#include "common/tasks.h"
#include "common/transpose.h"

namespace fastlm::FASTLM_ISA {
namespace {

// Registers: strip x vectors for the sums, `vectors` for a panel's numbers, one for a weight.
#if defined(__AVX512F__) || defined(__aarch64__)
constexpr int kStrip = 12;
#else
constexpr int kStrip = 6;
#endif
constexpr int kVectors = 2;
constexpr int64_t kSize = Vec::size, kPanel = kVectors * kSize;

constexpr int64_t kDepth = 384;      // of a block: kStrip rows of it are 18 KB, which the first-level cache holds
constexpr int64_t kGroup = 48;       // columns of y that are written together: whole strips, and whole cache lines
constexpr int64_t kChunkPanels = 8;  // of x at a time: a block of them has 393 KB, with registers of 256 bits 197
constexpr int64_t kRoomStride = kDepth + 16;
static_assert(kGroup % kStrip == 0 && kGroup % kSize == 0);

// Rows of x that are worked on together.
struct Chunk {
  int64_t first, rows, panels;
  float* packed;  // panel by panel: `depth` times kPanel numbers side by side, zeros past the last row
};

// Numbers begin .. end-1 of the panel's rows.
template <class T>
void pack(const NarrowLinear& p, const Chunk& chunk, int64_t panel, int64_t begin, int64_t end) {
  float* const to = chunk.packed + panel * kPanel * p.depth;
  for (int64_t v = 0; v < kVectors; ++v) {
    const int64_t row = panel * kPanel + v * kSize, n = std::clamp<int64_t>(chunk.rows - row, 0, kSize);
    const T* const from = static_cast<const T*>(p.x) + (chunk.first + row) * p.x_stride;
    for (int64_t k = begin; k < end; k += kSize) {
      const int64_t some = std::min(kSize, end - k);
      Vec square[kSize];
      for (int64_t r = 0; r < kSize; ++r) {
        const T* const x = from + r * p.x_stride + k;
        square[r] = r >= n ? zero() : some == kSize ? load(x) : load_n(x, some);
      }
      transpose(square);
      for (int64_t i = 0; i < some; ++i) store(to + (k + i) * kPanel + v * kSize, square[i]);
    }
  }
}

// kStrip rows of the weights at some depth: element (r, k) at weights[r * stride + k].
struct Strip {
  const float* weights;
  int64_t stride;
};

// Memory that the tile's loop fetches into the cache meanwhile: `lines` cache lines at each of `rows` addresses.
struct Ahead {
  const char* first;
  int64_t rows, stride, lines;  // stride in bytes
};

// sums = from + the strip's product with V vectors of the panel; from null: zeros. Both with kPanel numbers a row.
template <int V>
__attribute__((noinline)) void tile(int64_t depth, Strip strip, const float* panel, const float* from, float* to,
                                    Ahead read, Ahead write) {
  Vec sums[kStrip][V];
#pragma GCC unroll 16
  for (int r = 0; r < kStrip; ++r) {
#pragma GCC unroll 4
    for (int v = 0; v < V; ++v) sums[r][v] = zero();
  }
  const float* w = strip.weights;
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
        const Vec weight = set1(w[r * strip.stride]);
#pragma GCC unroll 4
        for (int v = 0; v < V; ++v) sums[r][v] = fma(weight, x[v], sums[r][v]);
      }
      ++w;
      panel += kPanel;
    }
  };
  const int64_t part = depth / kStrip;  // fetches that come all at once would stand in each other's way
  for (int r = 0; r < kStrip; ++r) {
    if (r < read.rows) {
      for (int64_t i = 0; i < read.lines; ++i) prefetch(read.first + r * read.stride + i * 64);
    }
    if (r < write.rows) {
      for (int64_t i = 0; i < write.lines; ++i) prefetch_to_write(write.first + r * write.stride + i * 64);
    }
    steps(part);
  }
  steps(depth - part * kStrip);
#pragma GCC unroll 16
  for (int r = 0; r < kStrip; ++r) {
#pragma GCC unroll 4
    for (int v = 0; v < V; ++v) {
      if (from != nullptr) sums[r][v] += load(from + r * kPanel + v * kSize);
      store(to + r * kPanel + v * kSize, sums[r][v]);
    }
  }
}

// The group's sums, with the bias, into y.
template <class T>
void turn(const NarrowLinear& p, const Chunk& chunk, int64_t panel, const float* sums, const float* bias, int64_t col,
          int64_t cols) {
  for (int64_t v = 0; v < kVectors; ++v) {
    const int64_t row = panel * kPanel + v * kSize, n = std::clamp<int64_t>(chunk.rows - row, 0, kSize);
    T* const to = static_cast<T*>(p.y) + (chunk.first + row) * p.y_stride + col;
    for (int64_t c = 0; n > 0 && c < cols; c += kSize) {
      const int64_t some = std::min(kSize, cols - c);
      Vec square[kSize];
      for (int64_t r = 0; r < kSize; ++r) square[r] = load(sums + (c + r) * kPanel + v * kSize) + set1(bias[c + r]);
      transpose(square);
      for (int64_t i = 0; i < n; ++i) {
        if (some == kSize) {
          store(to + i * p.y_stride + c, square[i]);
        } else {
          store_n(to + i * p.y_stride + c, square[i], some);
        }
      }
    }
  }
}

// The weights as floats whose rows do not share the cache's sets: at hand, or copied to `room`.
template <class W>
Strip strip_at(const W* weights, int64_t stride, int64_t rows, int64_t depth, float* room) {
  if constexpr (std::is_same_v<W, float>) {
    if (rows == kStrip && stride * sizeof(float) % 4096 != 0) return {weights, stride};
  }
  for (int64_t r = 0; r < kStrip; ++r) {
    const W* const from = weights + std::min(r, rows - 1) * stride;  // the rows that are missing come to nothing
    float* const to = room + r * kRoomStride;
    over_row(depth, [&](auto at, int64_t k, int) { at.store(to + k, at.load(from + k)); });
  }
  return {room, kRoomStride};
}

template <class T>
int64_t lines_of(int64_t elements) {
  return (elements * static_cast<int64_t>(sizeof(T)) + 63) / 64;
}

// Of y, what a tile of the strip at column c of the group has fetched while it is multiplied: each strip some of the
// panel's rows, so that they are all there when the group is written.
template <class Y>
Ahead result_rows(const NarrowLinear& p, const Chunk& chunk, int64_t panel, int64_t col, int64_t c) {
  constexpr int64_t rows = kPanel * kStrip / kGroup;
  const int64_t row = panel * kPanel + c / kStrip * rows;
  const Y* const y = static_cast<const Y*>(p.y) + (chunk.first + row) * p.y_stride + col;
  const int64_t row_bytes = p.y_stride * static_cast<int64_t>(sizeof(Y));
  return {reinterpret_cast<const char*>(y), std::min(rows, chunk.rows - row), row_bytes, lines_of<Y>(kGroup)};
}

// kGroup columns of y from `col` on. `sums`: kGroup x kPanel floats a panel; `room`: where a strip is copied to.
template <class W, class Y>
void group_product(const NarrowLinear& p, const Chunk& chunk, int64_t col, float* sums, float* room) {
  const int64_t cols = std::min(kGroup, p.cols - col);
  const W* const weights = static_cast<const W*>(p.weight) + col * p.weight_stride;
  const int64_t row_bytes = p.weight_stride * static_cast<int64_t>(sizeof(W));
  for (int64_t begin = 0; begin < p.depth; begin += kDepth) {
    const int64_t depth = std::min(kDepth, p.depth - begin);
    const bool last = begin + depth == p.depth;
    const int64_t lines = (lines_of<W>(depth) + chunk.panels - 1) / chunk.panels;
    for (int64_t c = 0; c < cols; c += kStrip) {
      const W* const first = weights + c * p.weight_stride + begin;
      const Strip strip = strip_at(first, p.weight_stride, std::min<int64_t>(kStrip, cols - c), depth, room);
      for (int64_t panel = 0; panel < chunk.panels; ++panel) {
        const char* const after = reinterpret_cast<const char*>(first + kStrip * p.weight_stride);
        const Ahead next{after + panel * lines * 64, kStrip, row_bytes, lines};
        const Ahead result = last ? result_rows<Y>(p, chunk, panel, col, c) : Ahead{};
        const float* const x = chunk.packed + panel * kPanel * p.depth + begin * kPanel;
        float* const here = sums + (panel * kGroup + c) * kPanel;
        const float* const from = begin == 0 ? nullptr : here;
        if (chunk.rows - panel * kPanel > kSize) {
          tile<2>(depth, strip, x, from, here, next, result);
        } else {
          tile<1>(depth, strip, x, from, here, next, result);
        }
      }
    }
  }
  float bias[kGroup] = {};
  if (p.bias != nullptr) {
    const W* const from = static_cast<const W*>(p.bias) + col;
    over_row(cols, [&](auto at, int64_t c, int) { at.store(bias + c, at.load(from + c)); });
  }
  for (int64_t panel = 0; panel < chunk.panels; ++panel) {
    turn<Y>(p, chunk, panel, sums + panel * kGroup * kPanel, bias, col, cols);
  }
}

// Panels of x at a time: about equally many.
int64_t chunk_panels(int64_t rows) {
  const int64_t all = (rows + kPanel - 1) / kPanel, chunks = (all + kChunkPanels - 1) / kChunkPanels;
  return chunks == 0 ? 0 : (all + chunks - 1) / chunks;
}

}  // namespace

void narrow_linear_cpu(const NarrowLinear& p) {
  check(p.rows >= 0 && p.cols >= 1 && p.depth >= 1,
        "narrow_linear: wanted rows >= 0, at least one column and one element of depth");
  const int64_t panels = chunk_panels(p.rows), parts = (p.depth + kDepth - 1) / kDepth;
  const int64_t work = p.rows * p.cols * p.depth;
  for (int64_t first = 0; first < p.rows; first += panels * kPanel) {
    const int64_t rows = std::min(panels * kPanel, p.rows - first);
    const Chunk chunk{first, rows, (rows + kPanel - 1) / kPanel, p.workspace};
    with_type(p.x_type, [&](auto x) {
      for_each_task(chunk.panels * parts, work, 0, [&](int64_t i, float*) {
        const int64_t begin = i % parts * kDepth;
        pack<decltype(x)>(p, chunk, i / parts, begin, std::min(p.depth, begin + kDepth));
      });
    });
    with_type(p.weight_type, [&](auto w) {
      with_type(p.y_type, [&](auto y) {
        const int64_t room = kStrip * kRoomStride, sums = chunk.panels * kGroup * kPanel;
        for_each_task((p.cols + kGroup - 1) / kGroup, work, room + sums, [&](int64_t i, float* buffer) {
          group_product<decltype(w), decltype(y)>(p, chunk, i * kGroup, buffer + room, buffer);
        });
      });
    });
  }
}

}  // namespace fastlm::FASTLM_ISA

FASTLM_DISPATCH(narrow_linear_cpu, (const NarrowLinear& p), (p))

#if defined(FASTLM_ISA_IS_BASELINE)
int64_t fastlm::narrow_linear_workspace_cpu(int64_t rows, int64_t depth) {
  constexpr int64_t widest = 32;  // rows of a panel with AVX-512; the others need less
  return std::min<int64_t>((rows + widest - 1) / widest, fastlm::FASTLM_ISA::kChunkPanels) * widest * depth;
}
#endif
