// How attention is cut into blocks on the CPU, and how rows of q, k, v come into the cache as floats.
//
// A block has up to kRows query rows, the "lanes", of one batch entry and one head of k and v. Its scores are kept
// transposed, s[j * kRows + lane]: the maximum and the sum over j of a row are then operations on whole vectors, and q
// is the only operand that must be turned round, once a block of rows. Where there are few rows (decoding), the lanes
// are the rows of several query heads that share the head of k and v, so that k and v are read once for all of them.
#pragma once
#include <memory>
#include <vector>

#include "attention/attention.h"
#include "common/simd.h"
#include "common/small_product.h"
#include "common/tasks.h"
#include "common/transpose.h"

namespace fastlm::FASTLM_ISA {

// 64 x 64 floats are 16 KB: at a head dim of 64 the scores, q and a block of k or v fit the first-level cache together.
constexpr int64_t kRows = 64, kColumns = 64;

inline int64_t padded(int64_t n) { return (n + Vec::size - 1) / Vec::size * Vec::size; }
inline int64_t ceil_divide(int64_t a, int64_t b) { return (a + b - 1) / b; }

// Rows and columns count from the start of the tensors, also in packed sequences.
struct RowBlock {
  int64_t first_row, rows;
  int64_t first_head, heads;         // within the group of query heads that share a head of k and v
  int64_t first_column, end_column;  // what at least one of the rows sees
  int64_t diagonal;                  // row i is aligned with column i + diagonal
};

// The blocks that every batch entry and every head of k and v is cut into.
inline std::vector<RowBlock> row_blocks(const AttentionInputs& p) {
  std::vector<RowBlock> blocks;
  const int64_t group = p.heads / p.kv_heads;
  const int64_t sequences = p.cu_seqlens == nullptr ? 1 : p.sequences;
  for (int64_t s = 0; s < sequences; ++s) {
    const int64_t row = p.cu_seqlens == nullptr ? 0 : p.cu_seqlens[s], column = row;
    const int64_t end_row = p.cu_seqlens == nullptr ? p.rows : p.cu_seqlens[s + 1];
    const int64_t end_column = p.cu_seqlens == nullptr ? p.columns : end_row;
    const int64_t diagonal = end_column - end_row;
    if (row == end_row) continue;
    const int64_t heads = std::clamp<int64_t>(kRows / (end_row - row), 1, group);
    for (int64_t head = 0; head < group; head += heads) {
      for (int64_t r = row; r < end_row; r += kRows) {
        RowBlock block{r,       std::min(kRows, end_row - r), head, std::min(heads, group - head), column, end_column,
                       diagonal};
        const int64_t last_row = r + block.rows - 1;
        if (p.window_left >= 0) block.first_column = std::max(column, r + diagonal - p.window_left);
        if (p.window_right >= 0) block.end_column = std::min(end_column, last_row + diagonal + p.window_right + 1);
        block.end_column = std::max(block.first_column, block.end_column);
        blocks.push_back(block);
      }
    }
  }
  return blocks;
}

// Scores that are looked at, at one head of k and v of one batch entry.
inline int64_t scores_of(const std::vector<RowBlock>& blocks) {
  int64_t scores = 0;
  for (const RowBlock& b : blocks) scores += b.rows * b.heads * (b.end_column - b.first_column);
  return scores;
}

struct Lanes {
  int64_t batch, count, padded;
  int64_t row[kRows], head[kRows];
  float position[kRows];                              // the column that the row is aligned with
  float slope[kRows];                                 // of ALiBi
  uint32_t counter_row[kRows], counter_plane[kRows];  // of Philox
};

inline void set_lanes(const AttentionInputs& p, const RowBlock& block, int64_t batch, int64_t kv_head, Lanes& lanes) {
  lanes.batch = batch;
  lanes.count = block.rows * block.heads;
  lanes.padded = padded(lanes.count);
  const int64_t group = p.heads / p.kv_heads;
  for (int64_t i = 0; i < lanes.padded; ++i) {
    const int64_t k = std::min(i, lanes.count - 1);  // what pads repeats the last row and is not used
    const int64_t row = block.first_row + k % block.rows;
    const int64_t head = kv_head * group + block.first_head + k / block.rows;
    lanes.row[i] = row;
    lanes.head[i] = head;
    lanes.position[i] = static_cast<float>(row + block.diagonal);
    lanes.slope[i] = p.alibi_slopes == nullptr ? 0.0f : p.alibi_slopes[batch * p.alibi_batch_stride + head];
    lanes.counter_row[i] = static_cast<uint32_t>(row);
    lanes.counter_plane[i] = static_cast<uint32_t>(batch * p.heads + head);
  }
}

// For the columns from j0 on: which part of the scores can be visible, as a band around the rows. Rows of several heads
// have no such order.
inline Band band_of_rows(const AttentionInputs& p, const RowBlock& block, int64_t j0) {
  Band band;
  if (block.heads > 1) return band;
  const int64_t aligned = block.first_row + block.diagonal - j0;
  if (p.window_left >= 0) band.low = aligned - p.window_left;
  if (p.window_right >= 0) band.high = aligned + p.window_right;
  return band;
}
inline Band transposed(Band band) { return {-band.high, -band.low}; }

inline bool sees_all(const AttentionInputs& p, const RowBlock& block, int64_t j0, int64_t columns) {
  const int64_t first = block.first_row + block.diagonal, last = first + block.rows - 1;
  return (p.window_left < 0 || j0 >= last - p.window_left) &&
         (p.window_right < 0 || j0 + columns - 1 <= first + p.window_right);
}

// ---- rows in the cache ----

// `width` elements at `from`, as floats; zeros up to the next whole vector.
inline void read_row(const void* from, DType type, int64_t offset, int64_t width, float* to) {
  with_type(type, [&](auto t) {
    const auto* row = static_cast<const decltype(t)*>(from) + offset;
    int64_t d = 0;
    for (; d + Vec::size <= width; d += Vec::size) store(to + d, load(row + d));
    if (d < width) store(to + d, load_n(row + d, width - d));
  });
}

inline void write_row(const float* from, float factor, int64_t width, void* to, DType type, int64_t offset) {
  with_type(type, [&](auto t) {
    auto* row = static_cast<decltype(t)*>(to) + offset;
    const Vec f = set1(factor);
    int64_t d = 0;
    for (; d + Vec::size <= width; d += Vec::size) store(row + d, load(from + d) * f);
    if (d < width) store_n(row + d, load(from + d) * f, width - d);
  });
}

// Fetches rows of one batch entry: a head's lie far apart (a projection's row has all heads of q, k and v), so the
// processor's own prefetcher does not find the next one. What is needed next is fetched while scores become weights, which
// takes long and moves little.
class Fetcher {
 public:
  Fetcher(const void* tensor, DType type, const Strides& strides, int64_t batch, int64_t head, int64_t width)
      : first_(static_cast<const char*>(tensor) + (batch * strides.batch + head * strides.head) * size_of(type)),
        row_(strides.row * size_of(type)),
        head_(strides.head * size_of(type)),
        bytes_(width * size_of(type)) {}
  [[gnu::always_inline]] void fetch(int64_t row, int64_t heads_on = 0) const {
    const char* from = first_ + row * row_ + heads_on * head_;
    for (int64_t i = 0; i < bytes_; i += kLine) prefetch(from + i);
  }

 private:
  const char* first_;
  int64_t row_, head_, bytes_;  // bytes
};

template <class T>
struct Matrix {
  const T* data;
  int64_t stride;
};

// Read once as A of a product, or by every tile of it as B: then the rows lie close together.
enum class Use { once, often };

// `count` rows of k or v from row `first` on: the tensor's own memory where that will do, else copied to `buffer`.
inline Matrix<float> rows_of(const void* tensor, DType type, const Strides& strides, int64_t batch, int64_t head,
                             int64_t first, int64_t count, int64_t width, Use use, float* buffer) {
  const int64_t offset = batch * strides.batch + head * strides.head + first * strides.row;
  if (type == DType::f32 && use == Use::once) return {static_cast<const float*>(tensor) + offset, strides.row};
  const int64_t stride = padded(width);
  for (int64_t r = 0; r < count; ++r) read_row(tensor, type, offset + r * strides.row, width, buffer + r * stride);
  return {buffer, stride};
}

// The lanes' rows of q or dout (null: zeros), and zeros up to a whole number of vectors of lanes.
inline void read_lanes(const void* tensor, DType type, const Strides& strides, const Lanes& lanes, int64_t width,
                       float* to) {
  const int64_t stride = padded(width);
  if (tensor == nullptr) return (void)std::fill(to, to + lanes.padded * stride, 0.0f);
  for (int64_t i = 0; i < lanes.count; ++i) {
    const int64_t offset = lanes.batch * strides.batch + lanes.head[i] * strides.head + lanes.row[i] * strides.row;
    read_row(tensor, type, offset, width, to + i * stride);
  }
  std::fill(to + lanes.count * stride, to + lanes.padded * stride, 0.0f);
}

// to[d * kRows + lane] = factor * from[lane * padded(width) + d]
inline void transpose_lanes(const float* from, const Lanes& lanes, int64_t width, float factor, float* to) {
  const int64_t stride = padded(width);
  for (int64_t i = 0; i < lanes.padded; i += Vec::size) {
    for (int64_t d = 0; d < stride; d += Vec::size) {
      Vec square[Vec::size];
      for (int64_t r = 0; r < Vec::size; ++r) square[r] = load(from + (i + r) * stride + d) * set1(factor);
      transpose(square);
      for (int64_t r = 0; r < Vec::size; ++r) store(to + (d + r) * kRows + i, square[r]);
    }
  }
}

}  // namespace fastlm::FASTLM_ISA
