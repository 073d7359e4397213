// One token for each of a few sequences through all blocks of a GPT, by one call.
//
// A generated token is so little work that calling the layers one by one from Python costs as much as the layers do
// (in small models several times as much). This strings the CPU kernels together; it computes nothing itself.
#pragma once
#include <vector>

#include "common/dtype.h"
#include "mlp/mlp.h"

namespace fastlm {

struct DecodeNorm {
  const void *weight, *bias;  // (C); bias null: none
};

struct DecodeLinear {
  const void *weight, *bias;  // (out, in), contiguous; (out), null: none
};

struct DecodeBlock {
  DecodeNorm norm_1;
  DecodeLinear qkv;
  const void *q_norm, *k_norm;  // (D), of an RMS norm over each head of the queries and of the keys; null: none
  DecodeLinear proj;
  DecodeNorm norm_2;
  DecodeLinear fc, mlp_proj;
};

// Sequences of one length, next to each other in the batch, with the keys and values of their tokens so far.
struct DecodeGroup {
  int64_t rows, length, capacity;
  void* const* keys;    // for each block: (rows, capacity, H_kv, D), contiguous; the new token's go to [:, length]
  void* const* values;
};

struct Decode {
  const DecodeBlock* blocks;
  int64_t layers;
  DecodeNorm norm;
  const DecodeGroup* groups;
  int64_t group_count;
  int64_t rows, width, heads, kv_heads, head_dim, mlp_size;  // rows: at most kSkinnyRows; width: C
  bool rms;
  float eps, scale, softcap;
  int64_t window_left;        // -1: no bound
  const float* alibi_slopes;  // (H); null: none
  const float *cos, *sin;     // (1 or rows, D / 2); null: no rotary positions
  bool table_of_each_row;
  Activation activation;
  DType type;
  void* h;                    // (rows, C): the embedded tokens; the residual stream is kept here
  void* out;                  // (rows, C): the result, after the last norm
};

void decode_cpu(const Decode& p);

}  // namespace fastlm
