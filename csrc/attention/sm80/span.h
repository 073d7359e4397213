// Which rows a block of threads works on, and which columns they see. Rows and columns count from the start of the
// tensors, also in packed sequences.
#pragma once
#include "attention/attention.h"
#include "common/cuda/platform.h"

namespace fastlm::cuda {

constexpr int kMaxLength = 1 << 29;  // of T and of S: sums of two lengths and a window stay below 2^31
constexpr int kUnbounded = 1 << 30;  // a side of the window without a bound

// One sequence. Row r sees the columns [low(r), high(r)), which both rise with r.
struct Span {
  int row, row_end, column, column_end;
  int diagonal;  // row r is aligned with column r + diagonal
  int left, right;

  FASTLM_DEVICE int low(int r) const { return max(column, r + diagonal - left); }
  FASTLM_DEVICE int high(int r) const { return min(column_end, r + diagonal + right + 1); }
  FASTLM_DEVICE int last(int row_stop) const { return min(row_stop, row_end) - 1; }

  // Of the rows [r0, r1) and columns [c0, c1) of a tile: whether nothing is seen, and whether everything is. Either may
  // be false of tiles at the edges, which are then masked for nothing.
  FASTLM_DEVICE bool sees_nothing(int r0, int r1, int c0, int c1) const {
    return r0 >= row_end || c1 <= r0 + diagonal - left || c0 >= r1 + diagonal + right;
  }
  FASTLM_DEVICE bool sees_all(int r0, int r1, int c0, int c1) const {
    return c0 >= column && c1 <= column_end && c0 >= r1 - 1 + diagonal - left && c1 <= r0 + diagonal + right + 1;
  }
  // Rows and columns in each other's place.
  FASTLM_DEVICE Span transposed() const { return {column, column_end, row, row_end, -diagonal, right, left}; }
};

// The sequence with this number: a batch entry, or one of the packed sequences.
FASTLM_DEVICE Span span_of(const AttentionInputs& p, int sequence) {
  int row = 0, row_end = static_cast<int>(p.rows), column_end = static_cast<int>(p.columns);
  if (p.cu_seqlens != nullptr) {
    row = p.cu_seqlens[sequence];
    row_end = column_end = p.cu_seqlens[sequence + 1];
  }
  const int left = p.window_left < 0 || p.window_left > kUnbounded ? kUnbounded : static_cast<int>(p.window_left);
  const int right = p.window_right < 0 || p.window_right > kUnbounded ? kUnbounded : static_cast<int>(p.window_right);
  return {row, row_end, row, column_end, column_end - row_end, left, right};
}

}  // namespace fastlm::cuda
