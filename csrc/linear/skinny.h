// y = x weight^T + bias for few rows of x, as in decoding: x (rows, depth), weight (cols, depth), bias (cols), y (rows, cols).
//
// Such a product reads every weight once and uses it `rows` times, so it runs at the speed of memory. Libraries are made
// for large products: what they do first (copying the weights into the order of their kernel) costs more than the product.
#pragma once
#include "common/dtype.h"

namespace fastlm {

constexpr int64_t kSkinnyRows = 16;  // from about here on a library's product is faster

struct SkinnyLinear {
  const void* x;       // rows `x_stride` elements apart
  const void* weight;  // rows `weight_stride` elements apart
  const void* bias;    // null: none
  void* y;             // contiguous
  int64_t rows, cols, depth, x_stride, weight_stride;
  DType type;          // of all four; sums are float
};

// Results are the same to the bit whatever the number of threads, and each row's whatever the other rows are.
void skinny_linear_cpu(const SkinnyLinear& p);

}  // namespace fastlm
