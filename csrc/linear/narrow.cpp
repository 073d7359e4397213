// narrow.h on the CPU. The rows of x are packed once, in panels of two vectors that lie in the second-level cache. Then
// the weights stream past, kStrip rows of them at a time: a tile of kStrip x two vectors of sums stays in registers while
// each weight, spread over a vector, is multiplied by a panel's numbers. So y comes out of a tile with its rows along the
// registers, and is turned on the way to memory.
#include "linear/narrow.h"

#include "common/error.h"
#include "common/tasks.h"
#include "linear/tile.h"

namespace fastlm::FASTLM_ISA {
namespace {

constexpr int64_t kChunkPanels = 8;  // of x at a time: a block of them has 393 KB, with registers of 256 bits 197

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
    const T* const from = static_cast<const T*>(p.x) + (chunk.first + row) * p.x_stride + begin;
    turn_rows<Singles>(from, p.x_stride, n, end - begin, to + begin * kPanel + v * kSize, kPanel);
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

// Of y, what a tile of the strip at column c of the group has fetched while it is multiplied: each strip some of the
// panel's rows, so that they are all there when the group is written.
template <class Y>
Ahead result_rows(const NarrowLinear& p, const Chunk& chunk, int64_t panel, int64_t col, int64_t c) {
  constexpr int64_t rows = kPanel * kStrip / kGroup;
  const int64_t row = panel * kPanel + c / kStrip * rows;
  const Y* const y = static_cast<const Y*>(p.y) + (chunk.first + row) * p.y_stride + col;
  const int64_t row_bytes = p.y_stride * static_cast<int64_t>(sizeof(Y));
  return {y, std::min(rows, chunk.rows - row), row_bytes, lines_of<Y>(kGroup)};
}

// kGroup columns of y from `col` on. `sums`: kGroup x kPanel floats a panel; `room`: where a strip is copied to.
template <class W, class Y>
void group_product(const NarrowLinear& p, const Chunk& chunk, int64_t col, float* sums, float* room) {
  const int64_t cols = std::min(kGroup, p.cols - col);
  const W* const weights = static_cast<const W*>(p.weight) + col * p.weight_stride;
  const int64_t row_bytes = p.weight_stride * static_cast<int64_t>(sizeof(W));
  const int64_t most = block_depth(p.depth);
  for (int64_t begin = 0; begin < p.depth; begin += most) {
    const int64_t depth = std::min(most, p.depth - begin);
    const bool last = begin + depth == p.depth;
    const int64_t lines = (lines_of<W>(depth) + chunk.panels - 1) / chunk.panels;
    for (int64_t c = 0; c < cols; c += kStrip) {
      const W* const first = weights + c * p.weight_stride + begin;
      const auto strip = strip_of_rows<Singles>(first, p.weight_stride, std::min<int64_t>(kStrip, cols - c), depth, room);
      for (int64_t panel = 0; panel < chunk.panels; ++panel) {
        const char* const after = reinterpret_cast<const char*>(first + kStrip * p.weight_stride);
        const Ahead next{after + panel * lines * 64, kStrip, row_bytes, lines};
        const Ahead result = last ? result_rows<Y>(p, chunk, panel, col, c) : Ahead{};
        const float* const x = chunk.packed + panel * kPanel * p.depth + begin * kPanel;
        const Square<float> here{sums + (panel * kGroup + c) * kPanel, kPanel};
        const Square<const float> from{begin == 0 ? nullptr : here.data, kPanel};
        if (chunk.rows - panel * kPanel > kSize) {
          tile<2, Singles>(depth, strip, x, from, here, next, result);
        } else {
          tile<1, Singles>(depth, strip, x, from, here, next, result);
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
  const int64_t panels = chunk_panels(p.rows), most = block_depth(p.depth), parts = (p.depth + most - 1) / most;
  const int64_t work = p.rows * p.cols * p.depth;
  for (int64_t first = 0; first < p.rows; first += panels * kPanel) {
    const int64_t rows = std::min(panels * kPanel, p.rows - first);
    const Chunk chunk{first, rows, (rows + kPanel - 1) / kPanel, p.workspace};
    with_type(p.x_type, [&](auto x) {
      for_each_task(chunk.panels * parts, work, 0, [&](int64_t i, float*) {
        const int64_t begin = i % parts * most;
        pack<decltype(x)>(p, chunk, i / parts, begin, std::min(p.depth, begin + most));
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
