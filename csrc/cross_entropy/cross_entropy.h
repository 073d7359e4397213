// The loss of a block of rows of logits, and its gradient in place of the logits. For a row z (after the soft cap):
//
//   z    = softcap * tanh(z / softcap)                      (softcap = 0: as it is)
//   lse  = log(sum(exp(z)))
//   loss = lse - (1 - smoothing) * z[target] - smoothing * mean(z) + z_loss * lse^2
//   dz   = scale * (exp(z - lse) * (1 + 2 z_loss lse) - smoothing / cols - (1 - smoothing) [column = target])
//          * (1 - (z / softcap)^2)
//
// All arithmetic is in float32 (on the CPU the log in float64). A row is summed in an order that depends on its length
// alone, and on the instruction set.
#pragma once
#include "common/dtype.h"

namespace fastlm {

struct CrossEntropyBlock {
  void* logits;            // (rows, cols) of `type`, packed; overwritten by the gradient where `gradient`
  const int64_t* targets;  // (rows), each from 0 to cols - 1; on the CPU the caller has checked
  float* loss;             // (rows); null: only the gradient is wanted, from lse
  float* lse;              // (rows); written with the loss, read without it
  const float* dloss;      // (rows), multiplies each row's gradient; null: 1
  int64_t rows, cols;
  float label_smoothing, z_loss, softcap;
  float scale;             // multiplies the gradient
  bool gradient;
  DType type;
};

void cross_entropy_block_cpu(const CrossEntropyBlock& p);

// What the GPU's kernel needs besides. It cannot tell the caller about a target outside the vocabulary: such a row's loss
// and gradient are NaN.
struct CrossEntropyRows {
  int64_t stride;        // elements from row to row of the logits, a multiple of 8
  int64_t ignore_index;  // rows with this target have loss, lse and gradient 0
};

void cross_entropy_block_cuda(const CrossEntropyBlock& p, const CrossEntropyRows& rows, void* stream);

}  // namespace fastlm
