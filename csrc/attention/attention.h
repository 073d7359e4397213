// Attention, forward and backward (fastlm/ops/attention/__init__.py has the contract):
//
//   s[i, j] = softcap * tanh(scale * q_i . k_j / softcap) - slope * |i + S - T - j|   (each part where asked for)
//   out_i = sum over the visible j of p[i, j] v_j,   p = softmax(s) with dropout,   lse_i = log sum exp s[i, j]
//
// Visible: i + S - T - window_left <= j <= i + S - T + window_right, and both in the same packed sequence.
#pragma once
#include "common/dtype.h"

namespace fastlm {

struct Strides {
  int64_t batch, row, head;  // in elements; the last dimension is contiguous
};

struct AttentionInputs {
  const void *q, *k, *v;  // (B, T, H, D), (B, S, H_kv, D), (B, S, H_kv, D)
  Strides q_strides, k_strides, v_strides;
  const float* alibi_slopes;                             // null: none
  int64_t alibi_batch_stride;                            // 0: (H), else (B, H)
  const int32_t* cu_seqlens;                             // null: none
  int64_t sequences;                                     // with cu_seqlens: their number
  const int64_t* rng_state;                              // (seed, offset); null: no dropout
  uint32_t dropout_threshold;                            // random words below it are dropped
  float dropout_scale;                                   // 1 / (1 - p)
  int64_t batch, rows, columns, heads, kv_heads, width;  // B, T, S, H, H_kv, D
  int64_t window_left, window_right;                     // -1: no bound; causal: window_right = 0
  int64_t max_seqlen;                                    // with cu_seqlens: no sequence is longer (CUDA)
  float scale, softcap;                                  // softcap 0: none
  DType type;
  bool wgmma;  // CUDA: the device runs code for sm_90a, and it is compiled in
};

// out and lse are contiguous. Results are the same to the bit whatever the number of threads.
void attention_forward_cpu(const AttentionInputs& p, void* out, float* lse);

struct AttentionGradients {
  const void* out;   // (B, T, H, D), contiguous
  const float* lse;  // (B, H, T)
  const void* dout;  // (B, T, H, D); null: zero
  Strides dout_strides;
  const float* dlse;        // (B, H, T), contiguous; null: zero
  void *dq, *dk, *dv;       // the heads of a token lie together
  int64_t dq_row, dkv_row;  // elements from a token of dq to the next; of dk and dv. More than H D in a packed gradient
};

void attention_backward_cpu(const AttentionInputs& p, const AttentionGradients& g);

// CUDA, sm_80 and newer. D is a multiple of 8 up to 256; every tensor of rows and its strides are aligned to 16 bytes.
// dout is there also where it is zero. Everything is summed in a fixed order: two runs give the same bits.
void attention_forward_cuda(const AttentionInputs& p, void* out, float* lse, void* stream);
// workspace: attention_backward_workspace(p) floats.
void attention_backward_cuda(const AttentionInputs& p, const AttentionGradients& g, float* workspace, void* stream);

// Where one kernel makes dq, dk and dv: 16-bit types with a head dim up to 128.
inline bool attention_backward_has_one_pass(const AttentionInputs& p) { return p.type != DType::f32 && p.width <= 128; }
// What lies in the workspace one after the other, in floats: twice `rows`, dq, counters.
struct AttentionBackwardSizes {
  int64_t rows;      // lse, and delta; for one pass with room for whole blocks of queries, if no sequences are packed
  int64_t dq;        // for one pass: dq in float32, with room for every sequence in whole blocks of queries
  int64_t counters;  // for one pass: a turn for each block of 32 queries or more, and the ticket
};
inline AttentionBackwardSizes attention_backward_sizes(const AttentionInputs& p) {
  if (!attention_backward_has_one_pass(p)) return {p.batch * p.heads * p.rows, 0, 0};
  const int64_t block = p.wgmma ? 128 : 64;  // the largest
  if (p.cu_seqlens != nullptr) {
    const int64_t queries = p.rows + 64 * p.sequences;  // sm90 leaves these to sm80
    return {p.batch * p.heads * p.rows, queries * p.heads * (p.width <= 64 ? 64 : 128), queries * p.heads / 32 + 1};
  }
  const int64_t queries = p.batch * ((p.rows + block - 1) / block * block);
  return {queries * p.heads, queries * p.heads * (p.width <= 64 ? 64 : 128), queries * p.heads / 32 + 1};
}
inline int64_t attention_backward_workspace(const AttentionInputs& p) {
  const AttentionBackwardSizes sizes = attention_backward_sizes(p);
  return 2 * sizes.rows + sizes.dq + sizes.counters;
}

}  // namespace fastlm
