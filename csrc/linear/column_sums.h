// The sum of a matrix's rows: the gradient of a linear layer's bias. In float32, in an order that depends on the sizes alone.
#pragma once
#include "common/dtype.h"

namespace fastlm {

struct ColumnSums {
  const void* x;       // (rows, cols), rows contiguous
  void* sums;          // (cols)
  float* workspace;    // column_sums_workspace_... floats
  int64_t rows, cols, stride;
  DType type, sums_type;
};

int64_t column_sums_workspace_cpu(int64_t rows, int64_t cols);
void column_sums_cpu(const ColumnSums& p);

int64_t column_sums_workspace_cuda(int64_t rows, int64_t cols);
void column_sums_cuda(const ColumnSums& p, void* stream);

}  // namespace fastlm
