// A token for each row of logits, drawn from softmax(logits / temperature) after top-k, top-p and min-p, in that order.
//
//   x = logit / temperature,  w = floor(2^40 exp(x - max x)), an integer
//   top-k: the x that are at least the k-th largest.
//   top-p: of those, in descending order of x (equal ones in the order of their places), each whose predecessors' w sum to
//          less than top_p of all. min-p: x >= max x + log(min_p).
//   The token: the first, in the order of places, at which the sum of w exceeds floor(R * sum of all w / 2^64).
//
// R is a random number of 64 bits: words 0 and 1 of Philox4x32-10, for the counter (row, 0, 0, offset) under the key seed.
// The weights are integers, so that their sums are exact: no order of addition can change a result. A token that is less
// than 2^-40 times as likely as the most likely one has the weight 0.
#pragma once
#include "common/dtype.h"

namespace fastlm {

constexpr float kSampleOne = 0x1p40f;  // the weight of the most likely token

struct Sample {
  const void* logits;        // (rows, vocabulary), rows contiguous
  int64_t* ids;              // (rows); -1 where a row has a NaN, no finite logit, or +inf
  const int64_t* rng_state;  // (seed, offset); null where greedy
  int64_t rows, vocabulary, stride;  // vocabulary: at most 2^22, so that sums of weights stay below 2^63
  bool state_a_row;     // rng_state is (rows, 2), and the counter's row is 0: a row's token does not depend on its place
  float temperature;    // 0: the first of the largest logits
  int64_t top_k;        // 0: all
  double top_p;         // 1: all
  float log_min_p;      // -inf: all
  DType type;
};

void sample_cpu(const Sample& p);
void sample_cuda(const Sample& p, void* stream);

}  // namespace fastlm
