// y = x weight^T + bias for some tens to hundreds of rows of x: a prompt, a short sequence, a block of the loss's rows.
//
// A library copies both operands into the order of its kernel before it multiplies. That is nothing beside a large
// product, but half of one with 32 rows: here the rows alone are copied, and the weights are read where they lie.
#pragma once
#include "common/dtype.h"

namespace fastlm {

struct NarrowLinear {
  const void* x;       // (rows, depth), rows `x_stride` elements apart
  const void* weight;  // (cols, depth), rows `weight_stride` elements apart
  const void* bias;    // (cols), of `weight_type`; null: none
  void* y;             // (rows, cols), rows `y_stride` elements apart
  float* workspace;    // narrow_linear_workspace_cpu(rows, depth) floats
  int64_t rows, cols, depth, x_stride, weight_stride, y_stride;
  DType x_type, weight_type, y_type;  // sums are float
};

// Results are the same to the bit whatever the number of threads, and each row's whatever the other rows are.
void narrow_linear_cpu(const NarrowLinear& p);
int64_t narrow_linear_workspace_cpu(int64_t rows, int64_t depth);

}  // namespace fastlm
