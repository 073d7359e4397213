// attention.h on CUDA, backward. With p_ij = e^(s_ij - lse_i), and p' = p / (1 - probability) or 0 by dropout,
//
//   delta_i = sum over d of dout_id out_id - dlse_i,   ds_ij = (p'_ij dout_i . v_j - p_ij delta_i) softcap'
//   dv_j = sum over i of p'_ij dout_i,   dk_j = scale sum over i of ds_ij q_i,   dq_i = scale sum over j of ds_ij k_j
//
// dk and dv are sums over rows and dq is one over columns. Where registers and shared memory hold dk and dv next to whole
// blocks of scores, one kernel makes all three with five products (backward_one_pass_sm80.cu). For float32 and wider heads
// each has a kernel in which a block of threads owns what it sums: no order to enforce, and seven products.
#pragma once
#include "attention/sm80/fragments.h"
#include "attention/sm80/launch.h"
#include "attention/sm80/scores.h"

namespace fastlm::cuda {

struct BackwardInputs {
  AttentionInputs p;
  const void* dout;
  Strides dout_strides;
  const float* lse;    // (B, H, T): the base of Scoring's weights; +infinity in rows that see nothing, whose weights become 0
  const float* delta;  // (B, H, T)
};

// The part of the workspace that the one-pass kernel needs.
struct OnePassWorkspace {
  float* dq;         // blocks of queries by heads, each as its accumulators lie in registers
  uint32_t* turns;   // by the same: how many blocks of keys have added their part; 0 at first
  uint32_t* ticket;  // how many blocks of threads have begun; 0 at first
};

// g: where dq, dk and dv go.
void attention_backward_one_pass(const BackwardInputs& inputs, const OnePassWorkspace& w, const AttentionGradients& g,
                                 cudaStream_t stream);
// The same on Hopper: whether it can, and doing it. There a head's lse and delta are as long as whole blocks of 128 queries.
bool attention_backward_takes_sm90(const BackwardInputs& inputs);
void attention_backward_sm90(const BackwardInputs& inputs, const OnePassWorkspace& w, const AttentionGradients& g,
                             cudaStream_t stream);
void attention_backward_rows(const BackwardInputs& inputs, const AttentionGradients& g, cudaStream_t stream);
void attention_backward_columns(const BackwardInputs& inputs, const AttentionGradients& g, cudaStream_t stream);

// s: products q . k, which become p'; dp: products dout . v, which become ds. `lse` and `delta` are functions of (r, n, e),
// as is `distance`, from the column that the row is aligned with. kept: bit 4 n + e of kept[r].
template <bool kGeneral, int kRowTiles, int kTiles, class Lse, class Delta, class Distance>
FASTLM_DEVICE void weights_and_gradients(float (&s)[kRowTiles][kTiles][4], float (&dp)[kRowTiles][kTiles][4],
                                         const Scoring<kGeneral>& scoring, const uint32_t (&kept)[kRowTiles], float dropout_scale,
                                         Lse lse, Delta delta, Distance distance) {
#pragma unroll
  for (int r = 0; r < kRowTiles; r++) {
#pragma unroll
    for (int n = 0; n < kTiles; n++) {
#pragma unroll
      for (int e = 0; e < 4; e++) {
        float slope = 1.0f;
        float weight, dweight = dp[r][n][e];
        if constexpr (kGeneral) {
          weight = scoring.weight(scoring.score(s[r][n][e], distance(r, n, e), slope), lse(r, n, e));
          const bool keep = kept[r] >> (4 * n + e) & 1;
          dweight = keep ? dweight * dropout_scale : 0.0f;
          s[r][n][e] = keep ? weight : 0.0f;
        } else {
          weight = s[r][n][e] = scoring.weight(s[r][n][e], lse(r, n, e));
        }
        dp[r][n][e] = weight * (dweight - delta(r, n, e)) * slope;
      }
    }
  }
}

}  // namespace fastlm::cuda
