// out = a b + bias, or out += a b, of any sizes: a (rows, depth), b (depth, cols), out (rows, cols), bias (cols).
//
// Blocks of b are copied into the order in which the tile reads them, as a library does. It is used where the library
// that torch brings does not reach the processor's rate: MKL on AMD's processors (docs/cpu.md). Sums are float, of bf16
// numbers two by two where the processor can.
#pragma once
#include "common/dtype.h"

namespace fastlm {

// A matrix with contiguous rows `stride` elements apart, or the transpose of one.
struct Operand {
  const void* data;
  int64_t stride;
  bool transposed;
  DType type;
};

struct PackedProduct {
  Operand a, b;
  const void* bias;  // of b's type; null: none
  void* out;         // rows `out_stride` elements apart
  int64_t rows, cols, depth, out_stride;
  DType out_type;
  bool accumulate;            // add to `out`, which is float then; without a bias
};

// Results are the same to the bit whatever the number of threads, and each row's whatever the other rows are.
void packed_product_cpu(const PackedProduct& p);

}  // namespace fastlm
