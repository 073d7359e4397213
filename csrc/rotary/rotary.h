// Rotary positions (Su et al.: RoFormer, arXiv:2104.09864): each pair of dimensions of a head is turned by its position's
// angle. Of a pair (a, b): a' = a cos - b sin, b' = b cos + a sin. The inverse, which is the backward pass too: -sin.
//
// The first 2 * pairs dimensions of a head are turned, the others copied. Pair i is the dimensions (i, pairs + i), or
// (2 i, 2 i + 1) where interleaved. Arithmetic is in float32. y may be x itself, with its strides.
#pragma once
#include "common/dtype.h"

namespace fastlm {

struct RotaryTensor {
  const void* x;                      // (B, T, heads, D), the last dimension contiguous; null: there is none
  void* y;                            // likewise
  int64_t x_batch, x_row, x_head;     // strides, in elements
  int64_t y_batch, y_row, y_head;
  int64_t heads;
};

struct Rotary {
  RotaryTensor tensors[2];            // queries and keys
  const float *cos, *sin;             // rows of `pairs`
  int64_t table_rows;                 // with positions: the rows of the tables
  int64_t table_batch;                // without positions: elements between the tables of two batch entries (0: shared)
  const void* positions;              // the row of the tables for each token; null: row t
  bool wide_positions;                // int64, else int32
  int64_t positions_batch;            // 0: (T), else T: (B, T)
  int64_t batch, rows, width, pairs;  // B, T, D
  bool interleaved, inverse;
  DType type;
};

// Throws std::invalid_argument where a position is not a row of the tables.
void rotary_cpu(const Rotary& p);

// A token whose position is not a row of the tables becomes NaN: looking for one would wait for the device.
void rotary_cuda(const Rotary& p, void* stream);

}  // namespace fastlm
